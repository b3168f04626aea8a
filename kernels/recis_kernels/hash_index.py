"""Map ids to row numbers: one open-addressing table per logical table, all reached by one launch.

    rows = find(index, ids [U], segments [U])        -1 = absent        segment = number of the logical table

Every int64 is a legal id, and a (segment, id) pair never meets another. Slots are laid out as `hash_probe` states; each
segment has its own slot tensor behind a table of addresses, so one can double while the others stay. A segment without
ids owns no memory. It doubles before an insert whose worst case would pass load 0.9, and in `maintain` (between steps)
above 0.75; erased ids keep their slot until they pass an eighth of the slots and `maintain` rebuilds the segment.
A find reads one cache line per id nearly always, so it is bound by latency: the loop prefetches 24 ids ahead.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from recis_kernels import hash_probe as probe
from recis_kernels.dispatch import Impl, choose
from recis_kernels.host_memory import zeroed_bytes
from recis_kernels.philox import hash64
from recis_kernels.threads import num_threads, run_parts, split
from recis_kernels.unique_ids import order_by_segment_and_id, unique_ids

GROW_LOAD = 0.75
LAUNCH_LOAD = 0.9
_MIN_PER_THREAD = 8192  # inserting: each thread scans all ids, so a share pays later than in find


class HashIndex:
    """Row numbers of the ids of many segments.

    Attributes:
        device: where the slots lie.
        table: int64 [num_segments, 8], CPU: address, shift, slots, live, dead and the row of the id EMPTY, per segment.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._no_slots = self._new_slots(
            probe.GROUP_SLOTS
        )  # what a segment without ids reads; nothing is ever put there
        self._slots: list[Tensor] = []
        self._rows = torch.zeros(0, probe.COLUMNS, dtype=torch.int64)

    def __reduce__(self) -> tuple:
        raise TypeError(
            "a HashIndex holds addresses and cannot be copied or pickled; insert what export() gives into another"
        )

    @property
    def num_segments(self) -> int:
        return len(self._slots)

    @property
    def table(self) -> Tensor:
        return self._rows[: len(self._slots)]

    def add_segment(self) -> int:
        """Add an empty segment and return its number."""
        segment = len(self._slots)
        if segment == len(self._rows):  # room for as many again, so that n segments cost O(n)
            self._rows = torch.cat((self._rows, torch.zeros(max(segment, 8), probe.COLUMNS, dtype=torch.int64)))
        self._slots.append(self._no_slots)
        self._reset(segment)
        return segment

    def find(self, ids: Tensor, segments: Tensor | int = 0) -> Tensor:
        """Return the row of each id, see `find`."""
        return find(self, ids, segments)

    def insert(self, ids: Tensor, segments: Tensor | int, rows: Tensor) -> None:
        """Give each id its row, see `insert`."""
        insert(self, ids, segments, rows)

    def erase(self, ids: Tensor, segments: Tensor | int = 0) -> Tensor:
        """Remove ids and return the rows they had, see `erase`."""
        return erase(self, ids, segments)

    def size(self, segment: int) -> int:
        """Return how many ids the segment holds."""
        live, side = self.table[segment, [probe.LIVE, probe.SIDE]].tolist()
        return live + (side >= 0)

    def sizes(self) -> Tensor:
        """Return how many ids each segment holds, int64 [num_segments]."""
        return self.table[:, probe.LIVE] + (self.table[:, probe.SIDE] >= 0)

    def num_bytes(self) -> int:
        """Return the memory of all slots."""
        return int(self.table[:, probe.SLOTS].sum()) * probe.SLOT_BYTES

    def export(self, segment: int) -> tuple[Tensor, Tensor]:
        """Return (ids, rows) of a segment, int64 [size] each, by ascending signed id."""
        size = self.size(segment)
        ids, rows = torch.empty(2, size, dtype=torch.int64)
        slots = self._slots[segment].cpu()
        probe.export_loop(slots.numpy(), int(self.table[segment, probe.SIDE]), ids.numpy(), rows.numpy())
        order = torch.from_numpy(np.argsort(ids.numpy()))
        return ids[order].to(self.device), rows[order].to(self.device)

    def reserve(self, segment: int, num_ids: int) -> None:
        """Make room for num_ids ids in all, so that inserts up to there move nothing."""
        slots = _slots_for(num_ids, int(self.table[segment, probe.SLOTS]))
        if slots > self.table[segment, probe.SLOTS]:
            self._rebuild(np.array([segment]), np.array([slots]))

    def clear(self, segment: int) -> None:
        """Remove every id of a segment and give its memory back."""
        self._slots[segment] = self._no_slots
        self._reset(segment)

    def maintain(self) -> None:
        """Between steps: double segments above load 0.75 and drop dead slots above an eighth; looks at counts alone."""
        slots, live, dead = (self.table.numpy()[:, column] for column in (probe.SLOTS, probe.LIVE, probe.DEAD))
        due = np.flatnonzero((live + dead > GROW_LOAD * slots) | (dead * 8 > slots))
        if len(due):
            self._rebuild(due, np.array([_slots_for(live[segment], slots[segment]) for segment in due]))

    def make_room(self, segments: Tensor, num_ids: int) -> None:
        """Rebuild the segments whose load could pass 0.9 if all num_ids ids were new.

        Args:
            segments: int32 [num_ids], or [1] when all ids are of one segment.
        """
        table = self.table.numpy()
        if segments.numel() == 1:
            touched = segments.numpy().astype(np.int64)
            counts = np.array([num_ids])
        else:
            counts = np.zeros(self.num_segments, dtype=np.int64)
            probe.count_loop(segments.numpy(), counts)
            touched = np.flatnonzero(counts)
            counts = counts[touched]
        slots, live, dead = (table[touched, column] for column in (probe.SLOTS, probe.LIVE, probe.DEAD))
        full = np.flatnonzero(live + dead + counts > LAUNCH_LOAD * slots)
        if len(full):
            wanted = [_slots_for(live[k] + counts[k], slots[k]) for k in full]
            self._rebuild(touched[full], np.array(wanted))

    def _new_slots(self, num_slots: int) -> Tensor:
        slots = zeroed_bytes(num_slots * probe.SLOT_BYTES, self.device).view(torch.int64).view(num_slots, 2)
        if slots.device.type == "cpu":
            probe.clear_loop(slots.numpy())
        else:
            slots[:, 0], slots[:, 1] = probe.EMPTY, -1
        return slots

    def _reset(self, segment: int) -> None:
        shift = 64 - (probe.GROUP_SLOTS.bit_length() - 1)
        row = [self._no_slots.data_ptr(), shift, 0, 0, 0, -1, 0, 0]
        self._rows[segment] = torch.tensor(row, dtype=torch.int64)

    def _rebuild(self, segments: np.ndarray, num_slots: np.ndarray) -> None:
        """Give each segment num_slots fresh slots and move its live ids there."""
        table = self.table.numpy()
        fresh = [self._new_slots(int(num)) for num in num_slots]
        old = table[segments][:, [probe.ADDRESS, probe.SLOTS]].copy()
        table[segments, probe.ADDRESS] = [slots.data_ptr() for slots in fresh]
        table[segments, probe.SHIFT] = [64 - (int(num).bit_length() - 1) for num in num_slots]
        table[segments, probe.SLOTS] = num_slots
        probe.rebuild_loop(table, segments, old)
        for segment, slots in zip(segments.tolist(), fresh, strict=True):
            self._slots[segment] = slots  # the old tensor is freed here, after its ids have moved


def find(index: HashIndex, ids: Tensor, segments: Tensor | int = 0, *, impl: Impl = "auto") -> Tensor:
    """Return the row of each id, int64 [U], -1 where absent; changes nothing.

    Args:
        index: the index.
        ids: int64 [U]; any order, repeats allowed.
        segments: of each id, int32 or int64 [U], or one number for all. What it holds is trusted.

    Raises:
        ValueError: wrong shape or dtype, or a segment number this index does not have.
    """
    ids, segments = _checked(index, ids, segments)
    return choose(impl, ids, numba=_numba_find, reference=_reference_find)(index, ids, segments)


def insert(index: HashIndex, ids: Tensor, segments: Tensor | int, rows: Tensor, *, impl: Impl = "auto") -> None:
    """Give each id its row; an id that has one gets the new one, and of equal ids the last wins.

    Args:
        index: grows where needed.
        ids, segments: as in `find`; absent distinct ids are what this is fast for.
        rows: int64 [U], each >= 0.

    Raises:
        ValueError: wrong shape or dtype, or a segment number this index does not have.
    """
    ids, segments = _checked(index, ids, segments)
    if rows.shape != ids.shape or rows.dtype != torch.int64:
        raise ValueError(f"rows must be int64 {tuple(ids.shape)}; got {rows.dtype} {tuple(rows.shape)}")
    if ids.numel() == 0:
        return
    index.make_room(segments, ids.numel())
    choose(impl, ids, numba=_numba_insert, reference=_reference_insert)(index, ids, segments, rows.contiguous())


def erase(index: HashIndex, ids: Tensor, segments: Tensor | int = 0, *, impl: Impl = "auto") -> Tensor:
    """Remove ids and return the rows they had, int64 [U]; -1 where absent, and for all but the first of equal ids.

    Raises:
        ValueError: as `find`.
    """
    ids, segments = _checked(index, ids, segments)
    return choose(impl, ids, numba=_numba_erase, reference=_reference_erase)(index, ids, segments)


def find_or_insert(
    index: HashIndex, ids: Tensor, segments: Tensor | int, allocate: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return the row of each id, int64 [U], after giving a row to the ids that had none.

    Args:
        index, ids, segments: as in `find`; repeats share one row.
        allocate: called at most once with the new distinct (ids [N] int64, segments [N] int32), in ascending
            (segment, signed id) order; returns their rows, int64 [N]. So row numbers depend on nothing else.
    """
    ids, segments = _checked(index, ids, segments)
    rows = find(index, ids, segments)
    absent = (rows < 0).nonzero().squeeze(1)
    if absent.numel():
        all_of_one = segments.numel() == 1
        unique = unique_ids(ids[absent], segments if all_of_one else segments[absent])
        order = order_by_segment_and_id(unique.ids, unique.segments, index.num_segments)
        new_ids, new_segments = unique.ids[order], unique.segments[order]
        new_rows = allocate(new_ids, new_segments)
        rows_of_unique = torch.empty_like(new_rows)
        rows_of_unique[order] = new_rows
        # in the order of `unique`, which is nearly that of the slots, so that the insert walks memory forwards
        insert(index, unique.ids, segments if all_of_one else unique.segments, rows_of_unique)
        rows[absent] = rows_of_unique[unique.inverse]
    return rows


def _slots_for(num_ids: int, at_least: int) -> int:
    """Return the power of two of slots that holds num_ids at load 0.75."""
    slots = max(int(at_least), probe.GROUP_SLOTS)
    while num_ids > GROW_LOAD * slots:
        slots *= 2
    return slots


def _checked(index: HashIndex, ids: Tensor, segments: Tensor | int) -> tuple[Tensor, Tensor]:
    """Return ids [U] and segments int32 [U], or [1] for a single number, contiguous."""
    if ids.ndim != 1 or ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64 [U]; got {ids.dtype} {tuple(ids.shape)}")
    if isinstance(segments, int):
        if not 0 <= segments < index.num_segments:
            raise ValueError(f"segment must lie in [0, {index.num_segments}); got {segments}; add_segment() makes one")
        return ids.contiguous(), torch.tensor([segments], dtype=torch.int32)
    if segments.dtype not in (torch.int32, torch.int64) or segments.shape not in (ids.shape, (1,)):
        wanted = f"int32 or int64 [{ids.numel()}]"
        raise ValueError(f"segments must be a number or {wanted}; got {segments.dtype} {tuple(segments.shape)}")
    return ids.contiguous(), segments.to(torch.int32).contiguous()


def _stride(segments: Tensor) -> int:
    return 0 if segments.numel() == 1 else 1


def _numba_find(index: HashIndex, ids: Tensor, segments: Tensor) -> Tensor:
    rows = torch.empty_like(ids)
    args = (index.table.numpy(), ids.numpy(), segments.numpy(), _stride(segments), rows.numpy())
    run_parts(lambda start, stop: probe.find_loop(*args, start, stop), split(ids.numel()))
    return rows


def _numba_insert(index: HashIndex, ids: Tensor, segments: Tensor, rows: Tensor) -> None:
    parts = max(1, min(num_threads(), ids.numel() // _MIN_PER_THREAD))
    changes = np.zeros((parts, index.num_segments, 2), dtype=np.int64)
    left = np.empty((parts, ids.numel()), dtype=np.int64)
    table, stride = index.table.numpy(), _stride(segments)
    args = (table, ids.numpy(), segments.numpy(), stride, rows.numpy())

    def loop(part: int, _: int) -> int:
        return probe.insert_loop(*args, part, parts, changes[part], left[part])

    counts = run_parts(loop, list(pairwise(range(parts + 1))))
    rest = torch.from_numpy(np.concatenate([left[part, :count] for part, count in enumerate(counts)]))
    if rest.numel():
        rest_segments = segments[rest] if stride else segments
        args = (table, ids[rest].numpy(), rest_segments.numpy(), stride, rows[rest].numpy())
        probe.insert_loop(*args, 0, 1, changes[0], left[0])
    table[:, [probe.LIVE, probe.DEAD]] += changes.sum(axis=0)


def _numba_erase(index: HashIndex, ids: Tensor, segments: Tensor) -> Tensor:
    rows = torch.empty_like(ids)
    probe.erase_loop(index.table.numpy(), ids.numpy(), segments.numpy(), _stride(segments), rows.numpy())
    return rows


# ---- reference: walks the slots in Python, by the words of hash_probe's first paragraph


def _reference_slot(index: HashIndex, row_id: int, segment: int) -> tuple[Tensor, bool]:
    """Return the slot [2] that holds row_id, or the EMPTY one where its walk ends, and whether it holds it."""
    slots = index._slots[segment]
    home = (int(hash64(torch.tensor(row_id))) % (1 << 64)) >> int(index.table[segment, probe.SHIFT])
    for group in range(len(slots) // probe.GROUP_SLOTS):
        for step in range(probe.GROUP_SLOTS):
            first = (home // probe.GROUP_SLOTS + group) * probe.GROUP_SLOTS % len(slots)
            slot = slots[first + (home + step) % probe.GROUP_SLOTS]
            if int(slot[0]) in (row_id, probe.EMPTY):
                return slot, int(slot[0]) == row_id
    raise RuntimeError(f"segment {segment} has no empty slot: its load passed {LAUNCH_LOAD}")


def _reference_find(index: HashIndex, ids: Tensor, segments: Tensor) -> Tensor:
    rows = []
    for row_id, segment in zip(ids.tolist(), segments.expand(ids.shape).tolist(), strict=True):
        if row_id == probe.EMPTY:
            rows.append(int(index.table[segment, probe.SIDE]))
        else:
            slot, found = _reference_slot(index, row_id, segment)
            rows.append(int(slot[1]) if found else -1)
    return torch.tensor(rows, dtype=torch.int64)


def _reference_insert(index: HashIndex, ids: Tensor, segments: Tensor, rows: Tensor) -> None:
    for row_id, segment, row in zip(ids.tolist(), segments.expand(ids.shape).tolist(), rows.tolist(), strict=True):
        if row_id == probe.EMPTY:
            index.table[segment, probe.SIDE] = row
            continue
        slot, found = _reference_slot(index, row_id, segment)
        if not found or int(slot[1]) < 0:
            index.table[segment, probe.LIVE] += 1
            index.table[segment, probe.DEAD] -= int(found)
        slot[0], slot[1] = row_id, row


def _reference_erase(index: HashIndex, ids: Tensor, segments: Tensor) -> Tensor:
    rows = []
    for row_id, segment in zip(ids.tolist(), segments.expand(ids.shape).tolist(), strict=True):
        rows.append(int(_reference_find(index, torch.tensor([row_id]), torch.tensor([segment]))))
        if row_id == probe.EMPTY:
            index.table[segment, probe.SIDE] = -1
        elif rows[-1] >= 0:
            _reference_slot(index, row_id, segment)[0][1] = -1
            index.table[segment, probe.LIVE] -= 1
            index.table[segment, probe.DEAD] += 1
    return torch.tensor(rows, dtype=torch.int64)
