"""Read rows from row blocks on a GPU: gather, pool per bag, and the gradient of the factors. See embedding_bag.py.

A program takes a tile of bags (or positions) and columns, 512 elements for four warps: 8 bags at D = 64, one from D = 512 on,
more column tiles beyond. Four positions of each bag are fetched together, stage by stage (position -> distinct row -> row
number -> block -> row), so that four waits overlap; they are added one after the other. The fold starts at -0.0 and adds
-0.0 past a bag's end, which changes no bit of any sum, so results equal the CPU's. The bags of a tile run until its longest
ends; what the others would read is masked. A bag is one chain of additions: a huge bag is as slow as its length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recis_kernels.calibration import current
from recis_kernels.dispatch import jit, launch, tl
from recis_kernels.lanes_triton import fold_lanes
from recis_kernels.row_blocks import RowBlocks
from recis_kernels.row_blocks_triton import next_power_of_2, row_address

_POSITIONS = 16  # of a bag at a time in factor_grads


def tile_of(dim: int) -> tuple[int, int]:
    """Return (bags or positions, columns) of a program's tile."""
    tile = current().gather_tile_items
    block_d = min(max(next_power_of_2(dim), 4), tile)
    return tile // block_d, block_d


def gather(blocks: RowBlocks, rows: Tensor, inverse: Tensor | None) -> Tensor:
    """As row_gather; rows and inverse are checked and contiguous."""
    num_positions, dim = rows.numel() if inverse is None else inverse.numel(), blocks.layout.dim
    out = torch.empty(num_positions, dim, dtype=torch.float32, device=rows.device)
    block_p, block_d = tile_of(dim)
    launch(
        _row_gather_kernel,
        (-(-num_positions // block_p), -(-dim // block_d)),
        *(blocks.device_pointers, rows, rows if inverse is None else inverse, out),
        *(num_positions, dim, blocks.shift, blocks.layout.row_bytes),
        HAS_INVERSE=inverse is not None,
        BF16=blocks.layout.dtype == torch.bfloat16,
        BLOCK_P=block_p,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return out


def pool(blocks: RowBlocks, rows: Tensor, inverse: Tensor | None, offsets: Tensor, factors: Tensor | None) -> Tensor:
    """As embedding_bag; all tensors checked and contiguous."""
    num_bags, dim = offsets.numel() - 1, blocks.layout.dim
    out = torch.empty(num_bags, dim, dtype=torch.float32, device=rows.device)
    block_b, block_d = tile_of(dim)
    launch(
        _embedding_bag_kernel,
        (-(-num_bags // block_b), -(-dim // block_d)),
        *(blocks.device_pointers, rows, rows if inverse is None else inverse, offsets),
        *(out if factors is None else factors, out),
        *(num_bags, dim, blocks.shift, blocks.layout.row_bytes),
        HAS_INVERSE=inverse is not None,
        HAS_FACTORS=factors is not None,
        BF16=blocks.layout.dtype == torch.bfloat16,
        BLOCK_B=block_b,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return out


def pull_factors(blocks: RowBlocks, rows: Tensor, inverse: Tensor | None, offsets: Tensor, grad: Tensor) -> Tensor:
    """As factor_grads; all tensors checked and contiguous."""
    num_positions = rows.numel() if inverse is None else inverse.numel()
    out = torch.zeros(num_positions, dtype=torch.float32, device=rows.device)
    launch(
        _factor_grads_kernel,
        (offsets.numel() - 1,),
        *(blocks.device_pointers, rows, rows if inverse is None else inverse, offsets, grad, out),
        *(blocks.layout.dim, blocks.shift, blocks.layout.row_bytes),
        HAS_INVERSE=inverse is not None,
        BF16=blocks.layout.dtype == torch.bfloat16,
        BLOCK_P=_POSITIONS,
        num_warps=1,
    )
    return out


@jit
def distinct_of_position(inverse_ptr, p, valid, HAS_INVERSE: tl.constexpr):
    """Return the int64 number of the distinct row of positions p, -1 = none."""
    if HAS_INVERSE:
        return tl.load(inverse_ptr + p, mask=valid, other=-1).to(tl.int64)
    return tl.where(valid, p, -1)


@jit
def row_of_distinct(rows_ptr, u):
    """Return the row number of distinct rows u, -1 = none."""
    return tl.load(rows_ptr + u, mask=u >= 0, other=-1)


@jit
def load_row(address, present, cols, dim, BF16: tl.constexpr):
    """Return the weights of rows at addresses [N] as float32 [N, BLOCK_D]; zeros where absent and from column dim on."""
    if BF16:
        weight = address.to(tl.pointer_type(tl.bfloat16))
    else:
        weight = address.to(tl.pointer_type(tl.float32))
    weight = tl.multiple_of(weight, 16)  # rows start at multiples of 32 bytes
    mask = present[:, None] & (cols < dim)[None, :]
    return tl.load(weight[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@jit
def _row_gather_kernel(
    pointers_ptr,
    rows_ptr,
    inverse_ptr,
    out_ptr,
    num_positions,
    dim,
    shift,
    row_bytes,
    HAS_INVERSE: tl.constexpr,
    BF16: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    valid = p < num_positions
    row = row_of_distinct(rows_ptr, distinct_of_position(inverse_ptr, p, valid, HAS_INVERSE))
    address = row_address(pointers_ptr, row, row >= 0, shift, row_bytes)
    values = load_row(address, row >= 0, cols, dim, BF16)
    tl.store(out_ptr + p[:, None] * dim + cols[None, :], values, mask=valid[:, None] & (cols < dim)[None, :])


@jit
def _added(total, values, factors_ptr, p, valid, HAS_FACTORS: tl.constexpr):
    """Return total + factors[p] * values, unchanged past a bag's end."""
    if HAS_FACTORS:
        values = tl.load(factors_ptr + p, mask=valid, other=1.0)[:, None] * values
    return total + tl.where(valid[:, None], values, -0.0)


@jit
def _embedding_bag_kernel(
    pointers_ptr,
    rows_ptr,
    inverse_ptr,
    offsets_ptr,
    factors_ptr,
    out_ptr,
    num_bags,
    dim,
    shift,
    row_bytes,
    HAS_INVERSE: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    BF16: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    bag = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    exists = bag < num_bags
    first = tl.load(offsets_ptr + bag, mask=exists, other=0)
    last = tl.load(offsets_ptr + bag + 1, mask=exists, other=0)
    total = tl.full([BLOCK_B, BLOCK_D], -0.0, dtype=tl.float32)
    for done in range(0, tl.max(last - first, axis=0), 4):  # pyright: ignore[reportArgumentType]
        p0 = first + done
        p1, p2, p3 = p0 + 1, p0 + 2, p0 + 3
        u0 = distinct_of_position(inverse_ptr, p0, p0 < last, HAS_INVERSE)
        u1 = distinct_of_position(inverse_ptr, p1, p1 < last, HAS_INVERSE)
        u2 = distinct_of_position(inverse_ptr, p2, p2 < last, HAS_INVERSE)
        u3 = distinct_of_position(inverse_ptr, p3, p3 < last, HAS_INVERSE)
        r0 = row_of_distinct(rows_ptr, u0)
        r1 = row_of_distinct(rows_ptr, u1)
        r2 = row_of_distinct(rows_ptr, u2)
        r3 = row_of_distinct(rows_ptr, u3)
        a0 = row_address(pointers_ptr, r0, r0 >= 0, shift, row_bytes)
        a1 = row_address(pointers_ptr, r1, r1 >= 0, shift, row_bytes)
        a2 = row_address(pointers_ptr, r2, r2 >= 0, shift, row_bytes)
        a3 = row_address(pointers_ptr, r3, r3 >= 0, shift, row_bytes)
        x0 = load_row(a0, r0 >= 0, cols, dim, BF16)
        x1 = load_row(a1, r1 >= 0, cols, dim, BF16)
        x2 = load_row(a2, r2 >= 0, cols, dim, BF16)
        x3 = load_row(a3, r3 >= 0, cols, dim, BF16)
        total = _added(total, x0, factors_ptr, p0, p0 < last, HAS_FACTORS)
        total = _added(total, x1, factors_ptr, p1, p1 < last, HAS_FACTORS)
        total = _added(total, x2, factors_ptr, p2, p2 < last, HAS_FACTORS)
        total = _added(total, x3, factors_ptr, p3, p3 < last, HAS_FACTORS)
    total = tl.where((last > first)[:, None], total, 0.0)
    tl.store(out_ptr + bag[:, None] * dim + cols[None, :], total, mask=exists[:, None] & (cols < dim)[None, :])


@jit
def _factor_grads_kernel(
    pointers_ptr,
    rows_ptr,
    inverse_ptr,
    offsets_ptr,
    grad_ptr,
    out_ptr,
    dim,
    shift,
    row_bytes,
    HAS_INVERSE: tl.constexpr,
    BF16: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    bag = tl.program_id(0).to(tl.int64)
    last = tl.load(offsets_ptr + bag + 1)
    for first in range(tl.load(offsets_ptr + bag), last, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        row = row_of_distinct(rows_ptr, distinct_of_position(inverse_ptr, p, p < last, HAS_INVERSE))
        address = row_address(pointers_ptr, row, row >= 0, shift, row_bytes)
        lanes = tl.zeros([BLOCK_P, 16], dtype=tl.float32)
        for start in range(0, dim, 16):
            cols = start + tl.arange(0, 16)
            grad = tl.load(grad_ptr + bag * dim + cols, mask=cols < dim, other=0.0)
            lanes = lanes + load_row(address, row >= 0, cols, dim, BF16) * grad[None, :]
        tl.store(out_ptr + p, fold_lanes(lanes, BLOCK_P), mask=p < last)
