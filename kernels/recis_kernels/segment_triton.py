"""Reductions per bag on a GPU: one launch each; the lanes of a program hold [bags, columns] and walk along their rows.

Sums are left folds in row order, so they equal the CPU's bit for bit: masked lanes add +0.0, which changes no sum that
started at +0.0. Four rows are read before they are added, to have their reads in flight together. A lane owns its bag, so
a bag costs the time of its length whatever the GPU's width: many bags of a like length run at the speed of memory, one huge
bag at the latency of its reads.
"""

import torch
from torch import Tensor

from recis_kernels.dispatch import jit, launch, tl, triton
from recis_kernels.jagged_triton import bag_of_place, tile, words

_LANES = 512


def _wide(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _shape(num_bags: int, dim: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Return grid and tile for lanes [bags, columns]."""
    block_d = tile(dim)[1]
    block_b = max(1, _LANES // block_d)
    return (-(-num_bags // block_b), -(-dim // block_d)), {"BLOCK_B": block_b, "BLOCK_D": block_d}


def sum_bags(values: Tensor, offsets: Tensor) -> Tensor:
    """Return the sums [B, D] of values [L, D], in values.dtype."""
    num_bags, dim = offsets.numel() - 1, values.shape[1]
    out = values.new_empty(num_bags, dim)
    grid, options = _shape(num_bags, dim)
    arguments = values.contiguous(), offsets.contiguous(), out, num_bags, dim
    launch(_segment_sum_kernel, grid, *arguments, WIDE=_WIDE[_wide(values)], **options)
    return out


def max_bags(values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maxima [B, D] and their rows, int64 [B, D]; 0 and L for an empty bag."""
    (num_rows, dim), num_bags = values.shape, offsets.numel() - 1
    out, rows = values.new_empty(num_bags, dim), offsets.new_empty(num_bags, dim)
    grid, options = _shape(num_bags, dim)
    arguments = values.contiguous(), offsets.contiguous(), out, rows, num_bags, num_rows, dim
    launch(_segment_max_kernel, grid, *arguments, WIDE=_WIDE[_wide(values)], **options)
    return out, rows


def softmax_bags(values: Tensor, offsets: Tensor) -> Tensor:
    """Return the softmax [L, D] over the rows of each bag."""
    num_bags, dim = offsets.numel() - 1, values.shape[1]
    out = torch.empty_like(values, memory_format=torch.contiguous_format)
    grid, options = _shape(num_bags, dim)
    arguments = values.contiguous(), offsets.contiguous(), out, num_bags, dim
    launch(_segment_softmax_kernel, grid, *arguments, WIDE=_WIDE[_wide(values)], **options)
    return out


def softmax_grad(softmax: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    """Return the gradient [L, D] of softmax_bags' values."""
    num_bags, dim = offsets.numel() - 1, softmax.shape[1]
    out = torch.empty_like(softmax, memory_format=torch.contiguous_format)
    grid, options = _shape(num_bags, dim)
    arguments = softmax.contiguous(), grad.contiguous(), offsets.contiguous(), out, num_bags, dim
    launch(_segment_softmax_grad_kernel, grid, *arguments, WIDE=_WIDE[_wide(softmax)], **options)
    return out


def spread(bags: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
    """Return [num_rows, D]: to every row the numbers of its bag."""
    dim = bags.shape[1]
    out = bags.new_empty(num_rows, dim)
    if out.numel():
        block_r, block_d = tile(dim)
        grid = (-(-num_rows // block_r), -(-dim // block_d))
        arguments = words(bags), offsets.contiguous(), words(out), bags.shape[0], num_rows, dim
        launch(_segment_spread_kernel, grid, *arguments, BLOCK_R=block_r, BLOCK_D=block_d)
    return out


def place_at_rows(bags: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Return zeros [num_rows, D] with bags[b, d] at [rows[b, d], d]; a row of num_rows is dropped."""
    num_bags, dim = bags.shape
    out = bags.new_zeros(num_rows, dim)
    grid, options = _shape(num_bags, dim)
    if out.numel():
        launch(
            _segment_place_kernel, grid, words(bags), rows.contiguous(), words(out), num_bags, num_rows, dim, **options
        )
    return out


_WIDE = {} if triton is None else {torch.float32: tl.float32, torch.float64: tl.float64}


@jit
def _lanes(offsets_ptr, num_bags, dim, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return bag [B, 1], column [1, D], which lanes exist, first and last row of each bag [B, 1], and the longest."""
    bag = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    column = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(offsets_ptr + bag, mask=bag < num_bags, other=0)
    last = tl.load(offsets_ptr + bag + 1, mask=bag < num_bags, other=0)
    exists = (bag < num_bags)[:, None] & (column < dim)[None, :]
    return bag[:, None], column[None, :], exists, first[:, None], last[:, None], tl.max(last - first, axis=0)


@jit
def _row_of(values_ptr, row, column, last, exists, dim, other, WIDE: tl.constexpr):
    inside = exists & (row < last)
    value = tl.load(values_ptr + row * dim + column, mask=inside, other=other)
    if value.dtype == tl.bfloat16:  # exact by its bits; the interpreter's own cast loses the smallest numbers
        value = (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(WIDE), inside


@jit
def rounded_to(value, DTYPE: tl.constexpr):
    """Round to the nearest number of the result's dtype; by integers for bf16, where the interpreter would truncate."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = value.to(tl.uint32, bitcast=True)
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        upper = tl.where(value == value, upper, 0x7FC0)  # NaN stays NaN
        return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(DTYPE)


@jit
def _segment_sum_kernel(
    values_ptr, offsets_ptr, out_ptr, num_bags, dim, WIDE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr
):
    bag, column, exists, first, last, longest = _lanes(offsets_ptr, num_bags, dim, BLOCK_B, BLOCK_D)
    total = tl.zeros([BLOCK_B, BLOCK_D], dtype=WIDE)
    for step in range(0, longest, 4):
        row = first + step
        value0, _ = _row_of(values_ptr, row, column, last, exists, dim, 0.0, WIDE)
        value1, _ = _row_of(values_ptr, row + 1, column, last, exists, dim, 0.0, WIDE)
        value2, _ = _row_of(values_ptr, row + 2, column, last, exists, dim, 0.0, WIDE)
        value3, _ = _row_of(values_ptr, row + 3, column, last, exists, dim, 0.0, WIDE)
        total = total + value0
        total = total + value1
        total = total + value2
        total = total + value3
    tl.store(out_ptr + bag * dim + column, rounded_to(total, out_ptr.dtype.element_ty), mask=exists)


@jit
def _segment_max_kernel(
    values_ptr,
    offsets_ptr,
    out_ptr,
    rows_ptr,
    num_bags,
    num_rows,
    dim,
    WIDE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    bag, column, exists, first, last, longest = _lanes(offsets_ptr, num_bags, dim, BLOCK_B, BLOCK_D)
    top = tl.zeros([BLOCK_B, BLOCK_D], dtype=WIDE)
    best = tl.zeros([BLOCK_B, BLOCK_D], dtype=tl.int64) + num_rows
    for step in range(longest):
        value, inside = _row_of(values_ptr, first + step, column, last, exists, dim, 0.0, WIDE)
        first_nan = (value != value) & (top == top)
        take = inside & ((best == num_rows) | (value > top) | first_nan)
        top = tl.where(take, value, top)
        best = tl.where(take, first + step, best)
    tl.store(out_ptr + bag * dim + column, top.to(out_ptr.dtype.element_ty), mask=exists)
    tl.store(rows_ptr + bag * dim + column, best, mask=exists)


@jit
def _segment_softmax_kernel(
    values_ptr, offsets_ptr, out_ptr, num_bags, dim, WIDE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr
):
    _bag, column, exists, first, last, longest = _lanes(offsets_ptr, num_bags, dim, BLOCK_B, BLOCK_D)
    top = tl.full([BLOCK_B, BLOCK_D], float("-inf"), dtype=WIDE)
    for step in range(longest):
        value, _inside = _row_of(values_ptr, first + step, column, last, exists, dim, float("-inf"), WIDE)
        top = tl.maximum(top, value)
    total = tl.zeros([BLOCK_B, BLOCK_D], dtype=WIDE)
    for step in range(longest):
        value, inside = _row_of(values_ptr, first + step, column, last, exists, dim, 0.0, WIDE)
        total = total + tl.where(inside, tl.exp(value - top), 0.0)
    for step in range(longest):
        row = first + step
        value, inside = _row_of(values_ptr, row, column, last, exists, dim, 0.0, WIDE)
        share = tl.exp(value - top) / total
        tl.store(out_ptr + row * dim + column, rounded_to(share, out_ptr.dtype.element_ty), mask=inside)


@jit
def _segment_softmax_grad_kernel(
    softmax_ptr,
    grad_ptr,
    offsets_ptr,
    out_ptr,
    num_bags,
    dim,
    WIDE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    _bag, column, exists, first, last, longest = _lanes(offsets_ptr, num_bags, dim, BLOCK_B, BLOCK_D)
    dot = tl.zeros([BLOCK_B, BLOCK_D], dtype=WIDE)
    for step in range(longest):
        share, _inside = _row_of(softmax_ptr, first + step, column, last, exists, dim, 0.0, WIDE)
        grad, _inside = _row_of(grad_ptr, first + step, column, last, exists, dim, 0.0, WIDE)
        dot = dot + share * grad
    for step in range(longest):
        row = first + step
        share, inside = _row_of(softmax_ptr, row, column, last, exists, dim, 0.0, WIDE)
        grad, _inside = _row_of(grad_ptr, row, column, last, exists, dim, 0.0, WIDE)
        change = share * (grad - dot)
        tl.store(out_ptr + row * dim + column, rounded_to(change, out_ptr.dtype.element_ty), mask=inside)


@jit
def _segment_spread_kernel(
    bags_ptr, offsets_ptr, out_ptr, num_bags, num_rows, dim, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    bag = bag_of_place(offsets_ptr, row, num_bags)
    exists = (row < num_rows)[:, None] & (column < dim)[None, :]
    value = tl.load(bags_ptr + bag[:, None] * dim + column[None, :], mask=exists, other=0)
    tl.store(out_ptr + row[:, None] * dim + column[None, :], value, mask=exists)


@jit
def _segment_place_kernel(
    bags_ptr, rows_ptr, out_ptr, num_bags, num_rows, dim, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr
):
    bag = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    column = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    exists = (bag < num_bags)[:, None] & (column < dim)[None, :]
    place = bag[:, None] * dim + column[None, :]
    row = tl.load(rows_ptr + place, mask=exists, other=num_rows)
    value = tl.load(bags_ptr + place, mask=exists, other=0)
    tl.store(out_ptr + row * dim + column[None, :], value, mask=exists & (row < num_rows))
