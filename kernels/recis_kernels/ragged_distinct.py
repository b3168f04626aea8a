"""Find the distinct ids of every row of a jagged column, in the order of their first (or last) occurrence.

    row 5 3 5 8 3:   keep = "first" -> positions 0 1 3 (5 3 8);   keep = "last" -> positions 2 3 4 (5 8 3)

Cost: in rows of up to 32 ids each is compared with those found before; longer rows use a small hash table.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from recis_kernels.columns import check_columns, column_of_value
from recis_kernels.dispatch import Impl, choose, njit
from recis_kernels.jagged import check_offsets_form, lengths_to_offsets
from recis_kernels.philox import hash64_one
from recis_kernels.threads import run_parts, split

Keep = Literal["first", "last"]
_COMPARE_UP_TO = 32


def ragged_distinct(
    ids: Tensor, offsets: Tensor, row_offsets: Sequence[int], keeps: Sequence[Keep], *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Return positions [M] of the ids that stay, ascending, and their offsets [R + 1]; both int64.

    Args:
        ids: int64 [L] of all columns.
        offsets: [R + 1] of their rows.
        row_offsets: C + 1 ints; column c owns rows row_offsets[c] .. row_offsets[c + 1] - 1.
        keeps: per column which of equal ids stays.

    Raises:
        ValueError: ids is not int64 [L], a keep is neither, or columns and keeps do not fit together.
    """
    if ids.ndim != 1 or ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64 [L]; got {tuple(ids.shape)} {ids.dtype}")
    check_offsets_form(offsets)
    check_columns(offsets.numel() - 1, row_offsets, len(keeps))
    for keep in keeps:
        if keep not in ("first", "last"):
            raise ValueError(f'keep must be "first" or "last"; got {keep!r}')
    return choose(impl, ids, numba=_numba, reference=_reference)(ids, offsets, row_offsets, keeps)


def first_occurrences(ids: Tensor, offsets: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return positions [L], those of a row's distinct ids at the front of its place, and how many per row [R]."""
    positions = np.empty(ids.shape[0], dtype=np.int64)
    counts = np.zeros(offsets.numel() - 1, dtype=np.int64)
    never = np.zeros(counts.size, dtype=np.int64)
    arrays = ids.contiguous().numpy(), offsets.numpy(), never, positions, counts
    run_parts(lambda start, stop: _find(*arrays, start, stop), split(counts.size, min_items=512))
    return positions, counts


def _reference(
    ids: Tensor, offsets: Tensor, row_offsets: Sequence[int], keeps: Sequence[Keep]
) -> tuple[Tensor, Tensor]:
    numbers, ends = ids.tolist(), offsets.tolist()
    positions, lengths = [], []
    for (first_row, last_row), keep in zip(pairwise(row_offsets), keeps, strict=True):
        for row in range(first_row, last_row):
            span = range(ends[row], ends[row + 1])
            ordered = span if keep == "first" else reversed(span)
            chosen = {}
            for position in ordered:
                chosen.setdefault(numbers[position], position)
            positions += sorted(chosen.values())
            lengths.append(len(chosen))
    kept = torch.tensor(positions, dtype=torch.int64, device=ids.device)
    return kept, lengths_to_offsets(torch.tensor(lengths, dtype=torch.int64, device=ids.device))


def _numba(ids: Tensor, offsets: Tensor, row_offsets: Sequence[int], keeps: Sequence[Keep]) -> tuple[Tensor, Tensor]:
    num_rows = offsets.numel() - 1
    places = np.empty(ids.shape[0], dtype=np.int64)
    counts = np.zeros(num_rows, dtype=np.int64)
    from_end = column_of_value(row_offsets, [int(keep == "last") for keep in keeps], ids.device).numpy()
    ends, parts = offsets.numpy(), split(num_rows, min_items=512)
    source = ids.contiguous().numpy()
    run_parts(lambda start, stop: _find(source, ends, from_end, places, counts, start, stop), parts)
    new_offsets = lengths_to_offsets(torch.from_numpy(counts))
    positions = torch.empty(int(new_offsets[-1]), dtype=torch.int64)
    target, new_ends = positions.numpy(), new_offsets.numpy()
    run_parts(lambda start, stop: _pack(places, ends, from_end, counts, target, new_ends, start, stop), parts)
    return positions, new_offsets


@njit
def _find(source, ends, from_end, positions, counts, start, stop):
    longest = np.int64(0)
    for row in range(start, stop):
        longest = max(longest, np.int64(ends[row + 1] - ends[row]))
    num_slots = 1
    while num_slots < 2 * longest and longest > _COMPARE_UP_TO:
        num_slots *= 2
    slots = np.full(num_slots, -1, dtype=np.int64)  # positions; those outside the row at hand count as free
    for row in range(start, stop):
        first, last = np.int64(ends[row]), np.int64(ends[row + 1])
        if last - first <= _COMPARE_UP_TO:
            counts[row] = _find_short(source, positions, first, last, from_end[row])
        else:
            counts[row] = _find_long(source, positions, slots, first, last, from_end[row])


@njit
def _find_short(source, positions, first, last, from_end):
    count = 0
    for step in range(last - first):
        i = last - 1 - step if from_end else first + step
        seen = False
        for j in range(count):
            if source[positions[first + j]] == source[i]:
                seen = True
                break
        if not seen:
            positions[first + count] = i
            count += 1
    return count


@njit
def _find_long(source, positions, slots, first, last, from_end):
    count, mask = 0, np.uint64(slots.size - 1)
    for step in range(last - first):
        i = last - 1 - step if from_end else first + step
        slot = np.int64(hash64_one(source[i]) & mask)
        while slots[slot] >= first and source[slots[slot]] != source[i]:
            slot = (slot + 1) & (slots.size - 1)
        if slots[slot] < first:
            slots[slot] = i
            positions[first + count] = i
            count += 1
    return count


@njit
def _pack(places, ends, from_end, counts, target, new_ends, start, stop):
    """Bring each row's positions together, ascending: those found from the end stand in descending order."""
    for row in range(start, stop):
        first, count, at = np.int64(ends[row]), counts[row], new_ends[row]
        for i in range(count):
            target[at + i] = places[first + count - 1 - i] if from_end[row] else places[first + i]
