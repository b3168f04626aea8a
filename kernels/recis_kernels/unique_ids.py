"""Find the distinct (segment, id) pairs of a batch and where each position's pair lies among them.

    out.ids[out.inverse[l]] == ids[l],  out.segments[out.inverse[l]] == segment of l,  out.counts[u] = positions of pair u

Order: by the top bits of the pair's hash, then by first position: a function of the input alone, whatever the threads.
It is also nearly the order of a hash index's slots, so a find of the result walks memory forwards.
Three passes, each split over threads: scatter the positions into partitions of about 2048 by hash (in the order of
position), number the pairs of each partition with a small table that stays in cache, write what each position got.
About 40 bytes move per id, all of it from cache at training sizes; no sort. A GPU does the same by tickets
(`unique_ids_triton`) or by sorting (`unique_ids_sort`), as `calibration` says.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recis_kernels import unique_ids_sort, unique_ids_triton
from recis_kernels.calibration import current
from recis_kernels.contents import check_offsets, check_range
from recis_kernels.dispatch import Impl, choose, njit
from recis_kernels.philox import hash64, hash64_one
from recis_kernels.threads import run_parts, split
from recis_kernels.unique_ids_order import argsort_ids, even_shares, order_by_segment_and_id, scatter

__all__ = ["PaddedUnique", "Unique", "argsort_ids", "order_by_segment_and_id", "unique_ids", "unique_ids_padded"]

_PARTITION_IDS = 2048
_MAX_BITS = 8  # at most 256 partitions, see unique_ids_order
_SEGMENT_MIX = np.uint64(unique_ids_sort.SEGMENT_MIX)
_MIN_PER_THREAD = 8192
_TABLE_BITS = np.uint64(20)  # where in the hash the table slot lies: clear of partition (top) and owner slice (low 16)


@dataclass(frozen=True, slots=True)
class Unique:
    """Distinct pairs of a batch.

    Attributes:
        ids: int64 [U].
        segments: int32 [U].
        inverse: int32 [L], position -> pair.
        counts: int32 [U], positions of each pair, at least 1.
    """

    ids: Tensor
    segments: Tensor
    inverse: Tensor
    counts: Tensor


@dataclass(frozen=True, slots=True)
class PaddedUnique:
    """Distinct pairs of a batch in arrays as long as the batch: their number U stays on the device.

    Attributes:
        ids: int64 [L], segments: int32 [L], counts: int32 [L]; as in `Unique`, then zeros from U on.
        inverse: int32 [L], position -> pair.
        num_unique: int64 [1], U.
    """

    ids: Tensor
    segments: Tensor
    inverse: Tensor
    counts: Tensor
    num_unique: Tensor


def unique_ids(
    ids: Tensor, segments: Tensor | None = None, offsets: Tensor | None = None, *, impl: Impl = "auto"
) -> Unique:
    """Return the distinct (segment, id) pairs of ids [L], see the head of this file. One host sync on a GPU, for U.

    Args:
        ids: int64 [L], every value legal; L below 2**31.
        segments: int32 or int64. With offsets: [R], positions offsets[r]:offsets[r + 1] are of segment segments[r] (a
            segment may have many ranges: features that share a table). Without: [L], or [1] for all. None = all 0.
        offsets: int64 [R + 1], ascending from 0 to L; trusted.

    Raises:
        ValueError: wrong shape or dtype, or L too large for int32 positions.
    """
    ids, per_id = _checked(ids, segments, offsets)
    return Unique(*(_unique_op if torch.compiler.is_compiling() else _unique)(ids, per_id, impl))


def unique_ids_padded(
    ids: Tensor, segments: Tensor | None = None, offsets: Tensor | None = None, *, impl: Impl = "auto"
) -> PaddedUnique:
    """Do unique_ids without waiting for the device: the same pairs in the same order, in arrays of L."""
    ids, per_id = _checked(ids, segments, offsets)
    return PaddedUnique(*(_padded_op if torch.compiler.is_compiling() else _padded)(ids, per_id, impl))


# ---- which version runs, and nodes of torch.compile


def _unique(ids: Tensor, segments: Tensor, impl: Impl) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = choose(impl, ids, triton=_triton, numba=_numba, torch=_torch, reference=_reference)(ids, segments)
    return found.ids, found.segments, found.inverse, found.counts


def _padded(ids: Tensor, segments: Tensor, impl: Impl) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if ids.numel() == 0:
        found = _reference(ids, segments)
        return found.ids, found.segments, found.inverse, found.counts, ids.new_zeros(1)
    versions = {"triton": _triton_padded, "numba": _numba_padded, "torch": _torch_padded}
    return choose(impl, ids, reference=_reference_padded, **versions)(ids, segments)


@torch.library.custom_op("recis::unique_ids", mutates_args=())
def _unique_op(ids: Tensor, segments: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(part.clone() for part in _unique(ids, segments, impl))  # type: ignore[return-value, arg-type]


@torch.library.custom_op("recis::unique_ids_padded", mutates_args=())
def _padded_op(ids: Tensor, segments: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _padded(ids, segments, impl)  # type: ignore[arg-type]


def _fake_arrays(ids: Tensor, num_unique: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    numbers = [ids.new_empty(size, dtype=torch.int32) for size in (num_unique, ids.shape[0], num_unique)]
    return ids.new_empty(num_unique), *numbers  # type: ignore[return-value]


@_unique_op.register_fake
def _(ids, segments, impl):
    return _fake_arrays(ids, torch.library.get_ctx().new_dynamic_size())


@_padded_op.register_fake
def _(ids, segments, impl):
    return *_fake_arrays(ids, ids.shape[0]), ids.new_empty(1)


def _checked(ids: Tensor, segments: Tensor | None, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return ids [L] and their segments int32 [L] or [1], contiguous."""
    if ids.ndim != 1 or ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64 [L]; got {ids.dtype} {tuple(ids.shape)}")
    if ids.numel() >= 1 << 31:
        raise ValueError(f"one call takes fewer than 2**31 ids; got {ids.numel()}: cut the batch")
    return ids.contiguous(), _segment_of_id(ids, segments, offsets)


def _segment_of_id(ids: Tensor, segments: Tensor | None, offsets: Tensor | None) -> Tensor:
    """Return the segment of each id, int32 [L], or [1] when all are equal by form."""
    if segments is None:
        if offsets is not None:
            raise ValueError("offsets need segments [R]: the segment of each range")
        return torch.zeros(1, dtype=torch.int32, device=ids.device)
    if segments.ndim != 1 or segments.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"segments must be int32 or int64, 1-D; got {segments.dtype} {tuple(segments.shape)}")
    check_range("segments", segments, 0, 2**31 - 1)
    segments = segments.to(torch.int32)
    if offsets is not None:
        if offsets.dtype != torch.int64 or offsets.shape != (segments.numel() + 1,):
            wanted = f"int64 [{segments.numel() + 1}]"
            raise ValueError(f"offsets must be {wanted}; got {offsets.dtype} {tuple(offsets.shape)}")
        check_offsets(offsets, ids.numel(), whole=True)
        if segments.numel() == 1:
            return segments
        return segments.repeat_interleave(offsets.diff(), output_size=ids.numel())
    if segments.numel() not in (1, ids.numel()):
        raise ValueError(f"segments must be [{ids.numel()}] or [1]; got [{segments.numel()}]")
    return segments.contiguous()


def _partition_bits(num_ids: int) -> int:
    """Return how many top bits of the hash number the partitions of a batch of num_ids."""
    return min(_MAX_BITS, max(0, (num_ids - 1).bit_length() - _PARTITION_IDS.bit_length() + 1))


def _reference(ids: Tensor, segments: Tensor) -> Unique:
    pairs = list(zip(segments.expand(ids.shape).tolist(), ids.tolist(), strict=True))
    mask = (1 << 64) - 1
    hashes = [int(h) & mask for h in hash64(ids)]
    mixed = [h ^ (segment * int(_SEGMENT_MIX) & mask) for h, (segment, _) in zip(hashes, pairs, strict=True)]
    bits = _partition_bits(len(pairs))
    first: dict[tuple[int, int], int] = {}
    for position, pair in enumerate(pairs):
        first.setdefault(pair, position)
    ordered = sorted(first, key=lambda pair: (mixed[first[pair]] >> (64 - bits), first[pair]))
    number = {pair: u for u, pair in enumerate(ordered)}
    inverse = torch.tensor([number[pair] for pair in pairs], dtype=torch.int32)
    return Unique(
        torch.tensor([row_id for _, row_id in ordered], dtype=torch.int64),
        torch.tensor([segment for segment, _ in ordered], dtype=torch.int32),
        inverse,
        torch.bincount(inverse, minlength=len(ordered)).to(torch.int32),
    )


def _pad(found: Unique) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_ids, num_unique = found.inverse.numel(), found.ids.numel()
    more = num_ids - num_unique
    ids, segments, counts = (
        torch.cat((part, part.new_zeros(more))) for part in (found.ids, found.segments, found.counts)
    )
    return ids, segments, found.inverse, counts, torch.tensor([num_unique])


def _reference_padded(ids: Tensor, segments: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _pad(_reference(ids, segments))


def _numba_padded(ids: Tensor, segments: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _pad(_numba(ids, segments))


def _torch_padded(ids: Tensor, segments: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return unique_ids_sort.padded(ids, segments, _partition_bits(ids.numel()))


def _triton_padded(ids: Tensor, segments: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    way = unique_ids_sort if current().reduce_duplicates_by == "sort" else unique_ids_triton
    return way.padded(ids, segments, _partition_bits(ids.numel()))


def _torch(ids: Tensor, segments: Tensor) -> Unique:
    return _cut(ids, segments, _torch_padded)


def _triton(ids: Tensor, segments: Tensor) -> Unique:
    return _cut(ids, segments, _triton_padded)


def _cut(ids: Tensor, segments: Tensor, padded: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> Unique:
    if ids.numel() == 0:
        return Unique(ids, segments.new_empty(0), segments.new_empty(0), segments.new_empty(0))
    out_ids, out_segments, inverse, counts, num_unique = padded(ids, segments)
    size = int(num_unique)
    return Unique(out_ids[:size], out_segments[:size], inverse, counts[:size])


def _numba(ids: Tensor, segments: Tensor) -> Unique:
    num_ids, bits = ids.numel(), _partition_bits(ids.numel())
    num_partitions = 1 << bits
    values, of_id, stride = ids.numpy(), segments.numpy(), 0 if segments.numel() == 1 else 1
    cuts = split(num_ids, min_items=_MIN_PER_THREAD)
    threads = list(pairwise(range(len(cuts) + 1)))
    scratch = _Scratch(num_ids)
    starts = np.zeros((len(cuts), num_partitions + 1), np.int64)

    def deal(part: int, _: int) -> None:
        start, stop = cuts[part]
        _name_partitions(values, of_id, stride, bits, start, stop, scratch.partitions)
        scatter(values, scratch.partitions, start, stop, starts[part], scratch.keys, scratch.positions)

    run_parts(deal, threads)
    bases = np.zeros(num_partitions + 1, np.int64)
    np.cumsum(np.diff(starts, axis=1).sum(axis=0), out=bases[1:])
    shares = even_shares(bases, cuts)
    sizes = np.zeros(num_partitions + 1, np.int64)
    shared = (scratch.positions, of_id, stride, starts, bases)
    pairs = (scratch.found, scratch.seen, scratch.counts, scratch.numbers)
    run_parts(lambda low, high: _number(scratch.keys, *shared, low, high, *pairs, sizes[1:]), shares)
    ends = np.cumsum(sizes)
    out_ids, out_segments = np.empty(ends[-1], np.int64), np.empty(ends[-1], np.int32)
    out_counts, inverse = np.empty(ends[-1], np.int32), np.empty(num_ids, np.int32)
    out = (out_ids, out_segments, out_counts, inverse)
    run_parts(lambda low, high: _finish(*shared, ends, low, high, *pairs, *out), shares)
    return Unique(*(torch.from_numpy(array) for array in (out_ids, out_segments, inverse, out_counts)))


class _Scratch:
    """Arrays of one call, cut from one allocation: several of this size would be mapped and unmapped each time."""

    def __init__(self, num_ids: int) -> None:
        self._arena = np.empty(num_ids * 33, np.uint8)
        self._used = 0
        self.keys = self._cut(num_ids, np.int64)  # ids by partition
        self.found = self._cut(num_ids, np.int64)  # distinct ids of partition p, from its base on
        self.positions = self._cut(num_ids, np.int32)  # of keys
        self.numbers = self._cut(num_ids, np.int32)  # pair of each key, from 0 in its partition
        self.counts = self._cut(num_ids, np.int32)  # of found
        self.seen = self._cut(num_ids, np.int32)  # segments of found
        self.partitions = self._cut(num_ids, np.uint8)

    def _cut(self, num_items: int, dtype: type[np.generic]) -> np.ndarray:
        start = self._used
        self._used += num_items * np.dtype(dtype).itemsize
        return self._arena[start : self._used].view(dtype)


@njit
def _pair_hash(row_id, segment):
    return hash64_one(row_id) ^ (np.uint64(segment) * _SEGMENT_MIX)


@njit
def _name_partitions(ids, segments, stride, bits, start, stop, partitions):
    """Write the top bits of the pair hash of positions start:stop; the two loops are one, so that each vectorises."""
    shift = np.uint64(63 - bits)  # after a shift by 1: one by 64 - 0 is undefined
    if stride == 0:
        mix = np.uint64(segments[0]) * _SEGMENT_MIX
        for i in range(start, stop):
            partitions[i] = np.uint8(((hash64_one(ids[i]) ^ mix) >> np.uint64(1)) >> shift)
    else:
        for i in range(start, stop):
            partitions[i] = np.uint8((_pair_hash(ids[i], segments[i]) >> np.uint64(1)) >> shift)


@njit
def _table_slots(num_ids):
    """Return a power of two of slots at load 1/4 at most: a miss then ends at the first slot, and is well predicted."""
    slots = np.int64(16)
    while slots < 4 * num_ids:
        slots *= 2
    return slots


@njit
def _number(keys, positions, segments, stride, starts, bases, low, high, found, seen, counts, numbers, sizes):
    """Number the pairs of partitions low:high from 0 in each; found, seen, counts from bases[p] hold its pairs."""
    longest = np.int64(0)
    for p in range(low, high):
        longest = max(longest, bases[p + 1] - bases[p])
    table = np.empty(_table_slots(longest), np.int32)  # pair + 1; 0 = empty
    segment = segments[0] if segments.shape[0] else np.int32(0)
    for p in range(low, high):
        num_slots = _table_slots(bases[p + 1] - bases[p])
        table[:num_slots] = 0
        mask, base, size = num_slots - 1, bases[p] - 1, np.int64(0)
        for part in range(starts.shape[0]):
            for j in range(starts[part, p], starts[part, p + 1]):
                row_id = keys[j]
                if stride:
                    segment = segments[positions[j]]
                slot = np.int64(_pair_hash(row_id, segment) >> _TABLE_BITS) & mask
                while True:
                    pair = np.int64(table[slot])
                    if pair == 0:
                        size += 1
                        table[slot] = size
                        found[base + size] = row_id
                        if stride:
                            seen[base + size] = segment
                        counts[base + size] = 1
                        numbers[j] = size - 1
                        break
                    if found[base + pair] == row_id and (stride == 0 or seen[base + pair] == segment):
                        counts[base + pair] += 1
                        numbers[j] = pair - 1
                        break
                    slot = (slot + 1) & mask
        sizes[p] = size


@njit
def _finish(
    positions, segments, stride, starts, bases, ends, low, high, found, seen, counts, numbers,
    out_ids, out_segments, out_counts, inverse,
):  # fmt: skip
    """Pack the pairs of partitions low:high to ends[p] and tell each position its pair."""
    for p in range(low, high):
        base, first, size = bases[p], ends[p], ends[p + 1] - ends[p]
        out_ids[first : first + size] = found[base : base + size]
        out_counts[first : first + size] = counts[base : base + size]
        if stride:
            out_segments[first : first + size] = seen[base : base + size]
        else:
            out_segments[first : first + size] = segments[0]
        for part in range(starts.shape[0]):
            for j in range(starts[part, p], starts[part, p + 1]):
                inverse[positions[j]] = first + numbers[j]
