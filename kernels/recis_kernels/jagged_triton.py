"""Copies between jagged and dense forms on a GPU: one launch each, whatever the lengths of the bags.

Programs take tiles [rows, columns] of the side whose rows are dense, so one huge bag spreads over as many programs as its
rows need; each row finds its bag by halving the offsets, about 20 reads from cache. Rows move as integers of their item
size: one kernel serves every dtype. Addresses are int64. Each value is read once and written once.
"""

import torch
from torch import Tensor

from recis_kernels.dispatch import jit, launch, tl

_VALUES_PER_PROGRAM = 1024
NO_LIMIT = 1 << 62


def words(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor as integers of its item size: a copy needs no more."""
    return tensor.contiguous().view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    )


def word_of(fill: float, dtype: torch.dtype) -> int:
    """Return `fill` rounded to dtype as that integer."""
    return int(words(torch.tensor([fill]).to(dtype))[0])


def tile(width: int) -> tuple[int, int]:
    """Return rows and columns of the tile of one program for rows of `width` numbers."""
    columns = 1
    while columns < min(width, 128):
        columns *= 2
    return max(1, _VALUES_PER_PROGRAM // columns), columns


def bags_of_values(offsets: Tensor, num_values: int) -> Tensor:
    """Return the bag of each of num_values values, int64."""
    out = torch.empty(num_values, dtype=torch.int64, device=offsets.device)
    block = 1024
    if num_values:
        launch(
            _bag_of_value_kernel,
            (-(-num_values // block),),
            offsets.contiguous(),
            out,
            offsets.numel() - 1,
            num_values,
            BLOCK=block,
        )
    return out


def copy_runs(
    packed: Tensor, other: Tensor, starts: Tensor, offsets: Tensor, *, to_packed: bool, limit: int = NO_LIMIT
) -> None:
    """Copy rows between packed runs and runs that lie apart; rows of a packed run past `limit` count as zeros.

    Args:
        packed: [N, ...] contiguous; run r is packed[offsets[r]:offsets[r + 1]].
        other: contiguous, rows of the same width; run r starts at its row starts[r].
        starts: int64 [R].  offsets: [R + 1] int64 or int32, from 0 to N.
    """
    num_rows = packed.shape[0]
    if packed.numel() == 0:
        return
    width = packed.numel() // num_rows
    block_r, block_d = tile(width)
    grid = (-(-num_rows // block_r), -(-width // block_d))
    arguments = words(packed), words(other), starts.contiguous(), offsets.contiguous()
    sizes = offsets.numel() - 1, num_rows, width, limit
    launch(_copy_runs_kernel, grid, *arguments, *sizes, TO_PACKED=to_packed, BLOCK_R=block_r, BLOCK_D=block_d)


def pad(values: Tensor, offsets: Tensor, max_length: int, fill: float) -> Tensor:
    """Return jagged_to_padded's rows."""
    num_bags = offsets.numel() - 1
    out = values.new_empty((num_bags, max_length, *values.shape[1:]))
    if out.numel() == 0:
        return out
    num_rows = num_bags * max_length
    width = out.numel() // num_rows
    block_r, block_d = tile(width)
    grid = (-(-num_rows // block_r), -(-width // block_d))
    sizes = num_rows, max_length, width, word_of(fill, values.dtype)
    launch(_pad_kernel, grid, words(values), words(out), offsets.contiguous(), *sizes, BLOCK_R=block_r, BLOCK_D=block_d)
    return out


@jit
def bag_of_place(offsets_ptr, place, num_bags):
    """Return the bag of each place int64 [N]: the last whose offset is at most the place; num_bags - 1 past the end."""
    low = place * 0
    high = low + num_bags
    open_bags = tl.full([], num_bags, tl.int64)
    while open_bags > 1:
        middle = (low + high) >> 1
        before = tl.load(offsets_ptr + middle) <= place
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
        open_bags = (open_bags + 1) >> 1
    return low


@jit
def _bag_of_value_kernel(offsets_ptr, out_ptr, num_bags, num_values, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + place, bag_of_place(offsets_ptr, place, num_bags), mask=place < num_values)


@jit
def _copy_runs_kernel(
    packed_ptr,
    other_ptr,
    starts_ptr,
    offsets_ptr,
    num_runs,
    num_rows,
    width,
    limit,
    TO_PACKED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    run = bag_of_place(offsets_ptr, row, num_runs)
    step = row - tl.load(offsets_ptr + run)
    in_run = (step < limit) & (row < tl.load(offsets_ptr + run + 1))
    apart = tl.load(starts_ptr + run) + step
    exists = (row < num_rows)[:, None] & (column < width)[None, :]
    inside = exists & in_run[:, None]
    packed = packed_ptr + row[:, None] * width + column[None, :]
    other = other_ptr + apart[:, None] * width + column[None, :]
    if TO_PACKED:
        tl.store(packed, tl.load(other, mask=inside, other=0), mask=exists)
    else:
        tl.store(other, tl.load(packed, mask=inside, other=0), mask=inside)


@jit
def _pad_kernel(
    values_ptr, out_ptr, offsets_ptr, num_rows, max_length, width, fill, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    row_exists = row < num_rows
    bag, position = row // max_length, row % max_length
    first = tl.load(offsets_ptr + bag, mask=row_exists, other=0).to(tl.int64)
    size = tl.load(offsets_ptr + bag + 1, mask=row_exists, other=0).to(tl.int64) - first
    exists = row_exists[:, None] & (column < width)[None, :]
    inside = exists & (position < size)[:, None]
    value = tl.load(values_ptr + (first + position)[:, None] * width + column[None, :], mask=inside, other=0)
    value = tl.where(inside, value, tl.full([BLOCK_R, BLOCK_D], fill, value.dtype))
    tl.store(out_ptr + row[:, None] * width + column[None, :], value, mask=exists)
