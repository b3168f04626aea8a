"""The versions of find, insert and erase over a segment table and its slots, and their nodes of torch.compile.

A version takes the table that kernels and loops read, the slot tensors (which only the reference touches: the others reach
slots by address), ids [U] and segments [U] or [1]. Room has been made: load stays at most 0.9. `hash_index` is the public
form. A registered op names the table and the slots as tensors that it changes; it takes their addresses anew.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from recis_kernels import hash_index_triton
from recis_kernels import hash_probe as probe
from recis_kernels.dispatch import Impl, choose
from recis_kernels.hash_reference import reference_erase, reference_find, reference_insert
from recis_kernels.host_memory import ALIGNMENT, zeroed_bytes
from recis_kernels.threads import num_threads, run_parts, split

LAUNCH_LOAD = 0.9
_MIN_PER_THREAD = 8192  # inserting: each thread scans all ids, so a share pays later than in find


def find(table: Tensor, slots: Sequence[Tensor], ids: Tensor, segments: Tensor, impl: Impl) -> Tensor:
    """Return the row of each id, int64 [U], -1 where absent."""
    run = choose(impl, ids, triton=hash_index_triton.find, numba=_numba_find, reference=reference_find)
    return run(table, slots, ids, segments)


def insert(table: Tensor, slots: Sequence[Tensor], ids: Tensor, segments: Tensor, rows: Tensor, impl: Impl) -> None:
    """Give each id its row; of equal ids the last wins."""
    run = choose(impl, ids, triton=hash_index_triton.insert, numba=_numba_insert, reference=reference_insert)
    run(table, slots, ids, segments, rows)


def erase(table: Tensor, slots: Sequence[Tensor], ids: Tensor, segments: Tensor, impl: Impl) -> Tensor:
    """Remove ids and return the rows they had."""
    run = choose(impl, ids, triton=hash_index_triton.erase, numba=_numba_erase, reference=reference_erase)
    return run(table, slots, ids, segments)


# ---- nodes of torch.compile and export: the table and the slots are tensors that they read or change


class Rebound:
    """A table whose addresses are those of the slot tensors given: torch.compile may hand an op copies of them.

    CPU loops need groups at multiples of their size, so slots that lie elsewhere are worked on in a copy.
    """

    def __init__(self, table: Tensor, slots: Sequence[Tensor]) -> None:
        self._given = table, slots
        self.slots = [part if part.data_ptr() % ALIGNMENT == 0 else _aligned_copy(part) for part in slots]
        self.table = table.clone()
        addresses = torch.tensor([part.data_ptr() for part in self.slots], dtype=torch.int64)
        self.table[:, probe.ADDRESS] = addresses.to(table.device, non_blocking=True)

    def write_back(self) -> None:
        table, slots = self._given
        table[:, probe.LIVE :] = self.table[:, probe.LIVE :]
        for part, used in zip(slots, self.slots, strict=True):
            if part is not used:
                part.copy_(used)


def _aligned_copy(slots: Tensor) -> Tensor:
    buffer = zeroed_bytes(slots.numel() * 8, slots.device).view(torch.int64).view(slots.shape)
    return buffer.copy_(slots)


@torch.library.custom_op("recis::hash_find", mutates_args=())
def find_op(table: Tensor, slots: Sequence[Tensor], ids: Tensor, segments: Tensor, impl: str) -> Tensor:
    bound = Rebound(table, slots)
    return find(bound.table, bound.slots, ids, segments, impl)  # type: ignore[arg-type]


@torch.library.custom_op("recis::hash_insert", mutates_args=("table", "slots"))
def insert_op(table: Tensor, slots: Sequence[Tensor], ids: Tensor, segments: Tensor, rows: Tensor, impl: str) -> None:
    bound = Rebound(table, slots)
    if table.device.type == "cpu":
        require_room(bound.table, segments, ids.numel())
    if ids.numel():
        insert(bound.table, bound.slots, ids, segments, rows.contiguous(), impl)  # type: ignore[arg-type]
    bound.write_back()


@torch.library.custom_op("recis::hash_erase", mutates_args=("table", "slots"))
def erase_op(table: Tensor, slots: Sequence[Tensor], ids: Tensor, segments: Tensor, impl: str) -> Tensor:
    bound = Rebound(table, slots)
    rows = erase(bound.table, bound.slots, ids, segments, impl)  # type: ignore[arg-type]
    bound.write_back()
    return rows


@find_op.register_fake
def _(table, slots, ids, segments, impl):
    return torch.empty_like(ids)


@erase_op.register_fake
def _(table, slots, ids, segments, impl):
    return torch.empty_like(ids)


def require_room(table: Tensor, segments: Tensor, num_ids: int) -> None:
    """Raise RuntimeError where these ids, all new, would pass the load that a walk can bear."""
    counts = torch.bincount(segments.expand(num_ids), minlength=len(table))
    full = (table[:, probe.LIVE] + table[:, probe.DEAD] + counts > LAUNCH_LOAD * table[:, probe.SLOTS]) & (counts > 0)
    if bool(full.any()):
        raise RuntimeError(
            f"segments {full.nonzero().squeeze(1).tolist()} have no room for these ids, and an insert inside "
            "torch.compile cannot grow them: call index.make_room(segments, num_ids) before"
        )


# ---- numba


def _stride(segments: Tensor) -> int:
    return 0 if segments.numel() == 1 else 1


def _numba_find(table: Tensor, slots: Sequence[Tensor], ids: Tensor, segments: Tensor) -> Tensor:
    rows = torch.empty_like(ids)
    args = (table.numpy(), ids.numpy(), segments.numpy(), _stride(segments), rows.numpy())
    run_parts(lambda start, stop: probe.find_loop(*args, start, stop), split(ids.numel()))
    return rows


def _numba_insert(table: Tensor, slots: Sequence[Tensor], ids: Tensor, segments: Tensor, rows: Tensor) -> None:
    parts = max(1, min(num_threads(), ids.numel() // _MIN_PER_THREAD))
    changes = np.zeros((parts, len(table), 2), dtype=np.int64)
    left = np.empty((parts, ids.numel()), dtype=np.int64)
    counts_table, stride = table.numpy(), _stride(segments)
    args = (counts_table, ids.numpy(), segments.numpy(), stride, rows.numpy())

    def loop(part: int, _: int) -> int:
        return probe.insert_loop(*args, part, parts, changes[part], left[part])

    counts = run_parts(loop, list(pairwise(range(parts + 1))))
    rest = torch.from_numpy(np.concatenate([left[part, :count] for part, count in enumerate(counts)]))
    if rest.numel():
        rest_segments = segments[rest] if stride else segments
        args = (counts_table, ids[rest].numpy(), rest_segments.numpy(), stride, rows[rest].numpy())
        probe.insert_loop(*args, 0, 1, changes[0], left[0])
    counts_table[:, [probe.LIVE, probe.DEAD]] += changes.sum(axis=0)


def _numba_erase(table: Tensor, slots: Sequence[Tensor], ids: Tensor, segments: Tensor) -> Tensor:
    rows = torch.empty_like(ids)
    probe.erase_loop(table.numpy(), ids.numpy(), segments.numpy(), _stride(segments), rows.numpy())
    return rows


def numba_rebuild(table: Tensor, segments: np.ndarray, old: np.ndarray) -> None:
    probe.rebuild_loop(table.numpy(), segments, old)


def numba_export(slots: Tensor, side: int) -> tuple[Tensor, Tensor]:
    keys, rows = slots.numpy()[:, 0], slots.numpy()[:, 1]
    size = int(np.count_nonzero((keys != probe.EMPTY) & (rows >= 0))) + (side >= 0)
    ids, found = torch.empty(2, size, dtype=torch.int64)
    probe.export_loop(slots.numpy(), side, ids.numpy(), found.numpy())
    return ids, found


# ---- any device


def torch_export(slots: Tensor, side: int) -> tuple[Tensor, Tensor]:
    live = slots[(slots[:, 0] != probe.EMPTY) & (slots[:, 1] >= 0)]
    mark = slots.new_tensor([[probe.EMPTY, side]] if side >= 0 else []).view(-1, 2)
    ids, rows = torch.cat((live, mark)).unbind(1)
    return ids, rows


def triton_rebuild(table: Tensor, segments: np.ndarray, old: np.ndarray) -> None:
    """Launch once for each size of old slots: a grid is as deep as its largest segment."""
    for num_slots in np.unique(old[:, 1]).tolist():
        of_size = np.flatnonzero(old[:, 1] == num_slots)
        numbers, pieces = torch.from_numpy(segments[of_size]), torch.from_numpy(old[of_size])
        hash_index_triton.rebuild(table, numbers.to(table.device), pieces.to(table.device), num_slots)
