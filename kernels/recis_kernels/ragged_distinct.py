"""Find the distinct ids of every row of a jagged column, in the order of their first (or last) occurrence.

    row 5 3 5 8 3:   keep = "first" -> positions 0 1 3 (5 3 8);   keep = "last" -> positions 2 3 4 (5 8 3)

Cost on a CPU: in rows of up to 32 ids each is compared with those found before; longer rows use a small hash table.
On a GPU all rows share one table of (row, id), at most half full and probed from hash64: a slot takes the first position
that comes by atomic_cas, then the first (or last) of its row by atomic_min, so the outcome does not depend on the order
in which lanes arrive. About four random accesses of 8 bytes per id, whatever the lengths of the rows.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from recis_kernels.byte_hash_triton import largest
from recis_kernels.columns import check_columns, column_of_value, to_device
from recis_kernels.contents import check_offsets
from recis_kernels.dispatch import Impl, choose, jit, launch, njit, tl
from recis_kernels.jagged import check_offsets_form, lengths_to_offsets
from recis_kernels.jagged_triton import bag_of_place
from recis_kernels.philox import hash64_one
from recis_kernels.philox_triton import hash64
from recis_kernels.ragged_truncate import keep_where
from recis_kernels.threads import run_parts, split

Keep = Literal["first", "last"]
_COMPARE_UP_TO = 32
_PER_PROGRAM = 256
_FREE = 2**63 - 1


def ragged_distinct(
    ids: Tensor, offsets: Tensor, row_offsets: Sequence[int], keeps: Sequence[Keep], *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Return positions [M] of the ids that stay, ascending, and their offsets [R + 1]; both int64.

    One host sync on a GPU: M.

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
    check_offsets(offsets, ids.shape[0])
    check_columns(offsets.numel() - 1, row_offsets, len(keeps))
    for keep in keeps:
        if keep not in ("first", "last"):
            raise ValueError(f'keep must be "first" or "last"; got {keep!r}')
    lasts = [int(keep == "last") for keep in keeps]
    return (_op if torch.compiler.is_compiling() else _run)(ids, offsets, row_offsets, lasts, impl)


def _run(
    ids: Tensor, offsets: Tensor, row_offsets: Sequence[int], lasts: Sequence[int], impl: str
) -> tuple[Tensor, Tensor]:
    """Return ragged_distinct's tensors; lasts[c] is 1 where the last of equal ids stays."""
    version = choose(impl, ids, triton=_triton, numba=_numba, reference=_reference)  # type: ignore[arg-type]
    return version(ids, offsets, row_offsets, lasts)


_op = torch.library.custom_op("recis::ragged_distinct", _run, mutates_args=())


@_op.register_fake
def _(ids, offsets, row_offsets, lasts, impl):
    num_kept = torch.library.get_ctx().new_dynamic_size()
    return ids.new_empty(num_kept), offsets.new_empty(offsets.shape, dtype=torch.int64)


def first_occurrences(ids: Tensor, offsets: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return positions [L], those of a row's distinct ids at the front of its place, and how many per row [R]."""
    positions = np.empty(ids.shape[0], dtype=np.int64)
    counts = np.zeros(offsets.numel() - 1, dtype=np.int64)
    never = np.zeros(counts.size, dtype=np.int64)
    arrays = ids.contiguous().numpy(), offsets.numpy(), never, positions, counts
    run_parts(lambda start, stop: _find(*arrays, start, stop), split(counts.size, min_items=512))
    return positions, counts


def _reference(ids: Tensor, offsets: Tensor, row_offsets: Sequence[int], lasts: Sequence[int]) -> tuple[Tensor, Tensor]:
    numbers, ends = ids.tolist(), offsets.tolist()
    positions, lengths = [], []
    for (first_row, last_row), last in zip(pairwise(row_offsets), lasts, strict=True):
        for row in range(first_row, last_row):
            span = range(ends[row], ends[row + 1])
            ordered = reversed(span) if last else span
            chosen = {}
            for position in ordered:
                chosen.setdefault(numbers[position], position)
            positions += sorted(chosen.values())
            lengths.append(len(chosen))
    kept = torch.tensor(positions, dtype=torch.int64, device=ids.device)
    return kept, lengths_to_offsets(torch.tensor(lengths, dtype=torch.int64, device=ids.device))


def _numba(ids: Tensor, offsets: Tensor, row_offsets: Sequence[int], lasts: Sequence[int]) -> tuple[Tensor, Tensor]:
    num_rows = offsets.numel() - 1
    places = np.empty(ids.shape[0], dtype=np.int64)
    counts = np.zeros(num_rows, dtype=np.int64)
    from_end = column_of_value(row_offsets, lasts, ids.device).numpy()
    ends, parts = offsets.numpy(), split(num_rows, min_items=512)
    source = ids.contiguous().numpy()
    run_parts(lambda start, stop: _find(source, ends, from_end, places, counts, start, stop), parts)
    new_offsets = lengths_to_offsets(torch.from_numpy(counts))
    positions = torch.empty(int(new_offsets[-1]), dtype=torch.int64)
    target, new_ends = positions.numpy(), new_offsets.numpy()
    run_parts(lambda start, stop: _pack(places, ends, from_end, counts, target, new_ends, start, stop), parts)
    return positions, new_offsets


def _triton(ids: Tensor, offsets: Tensor, row_offsets: Sequence[int], lasts: Sequence[int]) -> tuple[Tensor, Tensor]:
    return keep_where(distinct_mask(ids, offsets, row_offsets, lasts), offsets)


def distinct_mask(ids: Tensor, offsets: Tensor, row_offsets: Sequence[int], lasts: Sequence[int]) -> Tensor:
    """Return by Triton which ids stay, bool [L]; two launches and no host sync. lasts[c]: 1 where the last stays."""
    num_values, device = ids.shape[0], ids.device
    kept = torch.ones(num_values, dtype=torch.bool, device=device)  # where kernels are compiled, not run, all stay
    if num_values == 0:
        return kept
    num_slots = 1 << (2 * num_values - 1).bit_length()
    slots = torch.full((num_slots + 1,), _FREE, dtype=torch.int64, device=device)  # the last is where idle lanes aim
    slot_of = torch.empty(num_values, dtype=torch.int64, device=device)
    rules = to_device(torch.tensor([list(row_offsets), [*lasts, 0]], dtype=torch.int64), device)
    grid = (-(-num_values // _PER_PROGRAM),)
    tables = ids.contiguous(), offsets.contiguous(), rules, slots, slot_of
    sizes = offsets.numel() - 1, len(lasts), num_values, num_slots
    launch(_ragged_distinct_insert_kernel, grid, *tables, *sizes, BLOCK=_PER_PROGRAM, num_warps=4)
    launch(_ragged_distinct_mark_kernel, grid, slots, slot_of, kept, num_values, BLOCK=_PER_PROGRAM, num_warps=4)
    return kept


@jit
def _position_of(code, num_values):
    """Return the position a slot's code stands for: 2 * position, or 2 * (L - 1 - position) + 1 where the last stays."""
    order = code >> 1
    return tl.where((code & 1) == 1, num_values - 1 - order, order)


@jit
def _ragged_distinct_insert_kernel(
    ids_ptr,
    offsets_ptr,
    rules_ptr,
    slots_ptr,
    slot_of_ptr,
    num_rows,
    num_columns,
    num_values,
    num_slots,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    active = place < num_values
    value = tl.load(ids_ptr + place, mask=active, other=0)
    row = bag_of_place(offsets_ptr, place, num_rows)
    first, last = tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)
    keep_last = tl.load(rules_ptr + num_columns + 1 + bag_of_place(rules_ptr, row, num_columns))
    code = tl.where(keep_last == 1, 2 * (num_values - 1 - place) + 1, 2 * place)
    free = tl.full([BLOCK], 0x7FFFFFFFFFFFFFFF, tl.int64)
    dummy = tl.full([BLOCK], num_slots, tl.int64)
    mixed = hash64(value ^ (row * 0x5851F42D4C957F2D))  # the odd factor is any: it parts equal ids of other rows
    slot = (mixed & (dummy - 1).to(tl.uint64)).to(tl.int64)
    left = largest(active.to(tl.int32))
    step = left.to(tl.int64) * 0
    while (left > 0) & (step < num_slots):
        seen = tl.load(slots_ptr + slot, mask=active, other=0)
        tries = active & (seen == free)
        found = tl.atomic_cas(slots_ptr + tl.where(tries, slot, dummy), free, code)
        seen = tl.where(tries, found, seen)
        claimed = tries & (found == free)
        twin = _position_of(seen, num_values)
        in_row = active & ~claimed & (twin >= first) & (twin < last)
        same = in_row & (tl.load(ids_ptr + twin, mask=in_row, other=0) == value)
        tl.atomic_min(slots_ptr + slot, code, mask=same & (code < seen))
        done = claimed | same
        tl.store(slot_of_ptr + place, slot, mask=done)
        active = active & ~done
        slot = tl.where(slot + 1 == dummy, 0, slot + 1)
        left = largest(active.to(tl.int32))
        step += 1


@jit
def _ragged_distinct_mark_kernel(slots_ptr, slot_of_ptr, kept_ptr, num_values, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < num_values
    code = tl.load(slots_ptr + tl.load(slot_of_ptr + place, mask=mask, other=0), mask=mask, other=0)
    tl.store(kept_ptr + place, _position_of(code, num_values) == place, mask=mask)


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
