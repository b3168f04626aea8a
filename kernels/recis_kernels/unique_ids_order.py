"""Order distinct (segment, id) pairs by segment and signed id, and the dealing of ids into partitions that sorts use.

    order[k] = position of the k-th pair;   segments[order], then ids[order], ascending

On the CPU ids are sorted without their segments and then dealt by segment, stably: one radix pass. A GPU does two stable
sorts. The order is unique, so every version returns the same permutation.
"""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from recis_kernels.calibration import current
from recis_kernels.contents import check_range
from recis_kernels.dispatch import Impl, choose, njit
from recis_kernels.threads import run_parts, split

_MAX_BITS = 8  # at most 256 partitions: more write streams than that fall out of the first-level cache
_MIN_PER_THREAD = 8192


def order_by_segment_and_id(ids: Tensor, segments: Tensor, num_segments: int, *, impl: Impl = "auto") -> Tensor:
    """Return the permutation int64 [U] that sorts distinct pairs by ascending (segment, signed id); never waits.

    Args:
        ids: int64 [U].  segments: int32 or int64 [U], each in [0, num_segments).

    Raises:
        ValueError: wrong shape or dtype; inside `checks()`, a segment out of range.
    """
    if ids.ndim != 1 or ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64 [U]; got {ids.dtype} {tuple(ids.shape)}")
    if segments.shape != ids.shape or segments.dtype not in (torch.int32, torch.int64):
        wanted = f"int32 or int64 {tuple(ids.shape)}"
        raise ValueError(f"segments must be {wanted}; got {segments.dtype} {tuple(segments.shape)}")
    check_range("segments", segments, 0, num_segments - 1)
    return (_order_op if torch.compiler.is_compiling() else _order)(ids, segments, num_segments, impl)


def _numba_order(ids: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    by_id = argsort_ids(ids.numpy())  # unstable, and need not be: equal ids are of different segments
    if num_segments <= 1 or ids.numel() < 2:
        return torch.from_numpy(by_id)
    order = np.empty_like(by_id)
    _stable_by_segment(by_id, segments.numpy(), np.zeros(num_segments + 1, np.int64), order)
    return torch.from_numpy(order)


def _torch_order(ids: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    by_id = ids.argsort(stable=True)
    return by_id if num_segments <= 1 else by_id[segments[by_id].argsort(stable=True)]


def _reference_order(ids: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    pairs = list(zip(segments.tolist(), ids.tolist(), strict=True))
    return torch.tensor(sorted(range(len(pairs)), key=pairs.__getitem__), dtype=torch.int64)


def _order(ids: Tensor, segments: Tensor, num_segments: int, impl: Impl) -> Tensor:
    versions = {"numba": _numba_order, "torch": _torch_order, "triton": _torch_order, "reference": _reference_order}
    return choose(impl, ids, **versions)(ids, segments, num_segments)


@torch.library.custom_op("recis::order_by_segment_and_id", mutates_args=())
def _order_op(ids: Tensor, segments: Tensor, num_segments: int, impl: str) -> Tensor:
    return _order(ids, segments, num_segments, impl)  # type: ignore[arg-type]


@_order_op.register_fake
def _(ids, segments, num_segments, impl):
    return torch.empty_like(ids)


def argsort_ids(ids: np.ndarray) -> np.ndarray:
    """Return a permutation int64 [U] that sorts int64 ids; equal ids come in any order.

    A long list (`Calibration.bucketed_sort_from_ids`) is first dealt into 256 even ranges of values: numpy's vectorised
    sort is twice as fast in cache, and the ranges go to all threads. Ids that crowd in one range cost one plain sort.
    """
    if len(ids) < current().bucketed_sort_from_ids:
        return np.argsort(ids)
    lowest = ids.min()
    shift = max(0, (int(ids.max()) - int(lowest)).bit_length() - _MAX_BITS)
    ranges = np.empty(len(ids), np.uint8)
    keys, positions = np.empty_like(ids), np.empty(len(ids), np.int32)
    starts = np.zeros((1 << _MAX_BITS) + 1, np.int64)
    _name_ranges(ids, lowest, shift, ranges)
    scatter(ids, ranges, 0, len(ids), starts, keys, positions)
    order = np.empty(len(ids), np.int64)

    def sort(low: int, high: int) -> None:
        for start, stop in pairwise(starts[low : high + 1].tolist()):
            if stop > start:
                order[start:stop] = positions[start:stop][np.argsort(keys[start:stop])]

    cuts = split(len(ids), min_items=_MIN_PER_THREAD)
    run_parts(sort, even_shares(starts, cuts))
    return order


def even_shares(starts: np.ndarray, cuts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return one run of partitions for each cut, with about the same number of positions: some are far longer."""
    bounds = [0, *np.searchsorted(starts, [stop for _, stop in cuts[:-1]]).tolist(), len(starts) - 1]
    return list(pairwise(bounds))


@njit
def _name_ranges(ids, lowest, shift, ranges):
    """Write which of 256 even ranges of values each id lies in, counted from the lowest."""
    for i in range(ids.shape[0]):
        ranges[i] = np.uint8((np.uint64(ids[i]) - np.uint64(lowest)) >> np.uint64(shift))


@njit
def scatter(ids, partitions, start, stop, starts, keys, positions):
    """Order positions start:stop by partition, keeping their order inside one; starts[p] = where partition p begins."""
    num_partitions = starts.shape[0] - 1
    cursor = np.zeros(num_partitions, np.int64)
    for i in range(start, stop):
        cursor[partitions[i]] += 1
    total = start
    for p in range(num_partitions):
        starts[p] = total
        total += cursor[p]
        cursor[p] = starts[p]
    starts[num_partitions] = total
    for i in range(start, stop):
        to = cursor[partitions[i]]
        keys[to] = ids[i]
        positions[to] = i
        cursor[partitions[i]] = to + 1


@njit
def _stable_by_segment(by_id, segments, starts, order):
    for u in range(segments.shape[0]):
        starts[segments[u] + 1] += 1
    for s in range(starts.shape[0] - 1):
        starts[s + 1] += starts[s]
    for k in range(by_id.shape[0]):
        u = by_id[k]
        order[starts[segments[u]]] = u
        starts[segments[u]] += 1
