"""Find, insert and erase in a hash index, slot by slot in Python: the words of `hash_probe` as directly as they can be said.

The obvious version that tests compare the loops and kernels with; milliseconds per id.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from recis_kernels import hash_probe as probe
from recis_kernels.philox import hash64


def _slot_of(table: Tensor, slots: Sequence[Tensor], row_id: int, segment: int) -> tuple[Tensor, bool]:
    """Return the slot [2] that holds row_id, or the EMPTY one where its walk ends, and whether it holds it."""
    own = slots[segment]
    home = (int(hash64(torch.tensor(row_id))) % (1 << 64)) >> int(table[segment, probe.SHIFT])
    for group in range(len(own) // probe.GROUP_SLOTS):
        for step in range(probe.GROUP_SLOTS):
            first = (home // probe.GROUP_SLOTS + group) * probe.GROUP_SLOTS % len(own)
            slot = own[first + (home + step) % probe.GROUP_SLOTS]
            if int(slot[0]) in (row_id, probe.EMPTY):
                return slot, int(slot[0]) == row_id
    raise RuntimeError(f"segment {segment} has no empty slot: its load passed 0.9")


def reference_find(table: Tensor, slots: Sequence[Tensor], ids: Tensor, segments: Tensor) -> Tensor:
    rows = []
    for row_id, segment in zip(ids.tolist(), segments.expand(ids.shape).tolist(), strict=True):
        if row_id == probe.EMPTY:
            rows.append(int(table[segment, probe.SIDE]))
        else:
            slot, found = _slot_of(table, slots, row_id, segment)
            rows.append(int(slot[1]) if found else -1)
    return torch.tensor(rows, dtype=torch.int64)


def reference_insert(table: Tensor, slots: Sequence[Tensor], ids: Tensor, segments: Tensor, rows: Tensor) -> None:
    for row_id, segment, row in zip(ids.tolist(), segments.expand(ids.shape).tolist(), rows.tolist(), strict=True):
        if row_id == probe.EMPTY:
            table[segment, probe.SIDE] = row
            continue
        slot, found = _slot_of(table, slots, row_id, segment)
        if not found or int(slot[1]) < 0:
            table[segment, probe.LIVE] += 1
            table[segment, probe.DEAD] -= int(found)
        slot[0], slot[1] = row_id, row


def reference_erase(table: Tensor, slots: Sequence[Tensor], ids: Tensor, segments: Tensor) -> Tensor:
    rows = []
    for row_id, segment in zip(ids.tolist(), segments.expand(ids.shape).tolist(), strict=True):
        rows.append(int(reference_find(table, slots, torch.tensor([row_id]), torch.tensor([segment]))))
        if row_id == probe.EMPTY:
            table[segment, probe.SIDE] = -1
        elif rows[-1] >= 0:
            _slot_of(table, slots, row_id, segment)[0][1] = -1
            table[segment, probe.LIVE] -= 1
            table[segment, probe.DEAD] += 1
    return torch.tensor(rows, dtype=torch.int64)
