"""Read rows from row blocks: one vector per position, or pooled per bag.

    row_gather     out[p] = row(rows[inverse[p]])
    embedding_bag  out[n] = sum over positions p of bag n of factors[p] * row(rows[inverse[p]])

No row (inverse -1, or a row number of -1) reads zeros. The sum is a left fold in fp32 in ascending position. Rows are
fetched some positions ahead, because a random row costs a wait on memory. Least traffic: 8 + 4 D bytes a position and 4 D
a bag for fp32 rows. What comes back to the rows goes through `row_grads`; here are only the gradients of the factors.

The Triton versions give the numba versions' bits. torch.compile and export see registered ops, which take the block tensors
themselves (recis::row_gather and so on); eager calls skip the registration, whose cost grows with the number of blocks.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from recis_kernels.address import float32_at, load_int32, load_int64, store_float32
from recis_kernels.contents import check_offsets, check_range
from recis_kernels.dispatch import Impl, choose, njit
from recis_kernels.embedding_bag_triton import gather, pool, pull_factors
from recis_kernels.lanes import fold_rows, fold_words, lane_scratch, lane_sum
from recis_kernels.prefetch import prefetch
from recis_kernels.row_blocks import RowBlocks, layout_of_key
from recis_kernels.row_rounding import widen_row
from recis_kernels.threads import run_parts, split

ROWS_AHEAD = 16
MIN_POSITIONS_PER_THREAD = 4096


def row_gather(
    blocks: RowBlocks,
    rows: Tensor,
    inverse: Tensor | None = None,
    *,
    out: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Return the weights of rows[inverse] (inverse None: of rows) as float32 [L, D]; zeros where there is no row.

    Args:
        rows: [U] int64 row numbers, -1 = no row.
        inverse: [L] int32 or int64 into rows, -1 = no row.
        out: float32 [L, D], contiguous: where to write and what to return; None = new memory.

    Raises:
        ValueError: rows, inverse or out has another shape or dtype.
    """
    inverse = _checked_inverse(blocks, rows, inverse)
    if out is not None:
        shape = ((rows if inverse is None else inverse).numel(), blocks.layout.dim)
        if tuple(out.shape) != shape or out.dtype != torch.float32 or not out.is_contiguous():
            raise ValueError(f"out must be {shape} float32, contiguous; got {tuple(out.shape)} {out.dtype}")
    if torch.compiler.is_compiling():
        made = _gather_op(blocks.blocks, blocks.layout_key, blocks.shift, rows, inverse, impl)
        return made if out is None else out.copy_(made)
    return _gather(blocks, rows, inverse, impl, out)


def embedding_bag(
    blocks: RowBlocks,
    rows: Tensor,
    inverse: Tensor | None,
    offsets: Tensor,
    factors: Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Return the pooled bags, float32 [N, D]; an empty bag gives zeros. Differentiable in factors.

    Args:
        rows, inverse: as for row_gather.
        offsets: [N + 1] int64, positions of each bag; they need not start at 0 nor end at L. Trusted.
        factors: float32, one per position; None = 1. recis_kernels.bag_factors makes them.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    inverse = _checked_inverse(blocks, rows, inverse)
    num_positions = (rows if inverse is None else inverse).numel()
    _check_offsets(offsets, num_positions)
    if factors is not None and (factors.shape != (num_positions,) or factors.dtype != torch.float32):
        raise ValueError(f"factors must be [{num_positions}] float32; got {tuple(factors.shape)} {factors.dtype}")
    needs_grad = factors is not None and factors.requires_grad and torch.is_grad_enabled()
    if needs_grad or torch.compiler.is_compiling():
        return _bag_op(blocks.blocks, blocks.layout_key, blocks.shift, rows, inverse, offsets, factors, impl)
    return _bag(blocks, rows, inverse, offsets, factors, impl)


def factor_grads(
    blocks: RowBlocks,
    rows: Tensor,
    inverse: Tensor | None,
    offsets: Tensor,
    grad: Tensor,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Return d loss / d factors, float32 [L]: each position's row times the upstream grad [N, D] of its bag.

    Positions outside all bags get 0. Raises ValueError when a shape or dtype does not fit.
    """
    inverse = _checked_inverse(blocks, rows, inverse)
    _check_offsets(offsets, (rows if inverse is None else inverse).numel())
    if tuple(grad.shape) != (offsets.numel() - 1, blocks.layout.dim):
        raise ValueError(f"grad must be {(offsets.numel() - 1, blocks.layout.dim)}; got {tuple(grad.shape)}")
    if torch.compiler.is_compiling():
        return _factor_grads_op(blocks.blocks, blocks.layout_key, blocks.shift, rows, inverse, offsets, grad, impl)
    return _factor_grads(blocks, rows, inverse, offsets, grad, impl)


def tile_positions(offsets: Tensor, num_kept: int) -> Tensor:
    """Return [N * num_kept] int64: the first num_kept positions of each bag, -1 where the bag is shorter.

    Raises:
        ValueError: offsets is not [N + 1] int64, or num_kept is negative; inside `checks()`, offsets that do not ascend.
    """
    _check_offsets(offsets, None)
    if num_kept < 0:
        raise ValueError(f"num_kept must be at least 0; got {num_kept}")
    positions = offsets[:-1, None] + torch.arange(num_kept, device=offsets.device)
    return torch.where(positions < offsets[1:, None], positions, -1).reshape(-1)


def _checked_inverse(blocks: RowBlocks, rows: Tensor, inverse: Tensor | None) -> Tensor | None:
    if rows.ndim != 1 or rows.dtype != torch.int64:
        raise ValueError(f"rows must be [U] int64; got {tuple(rows.shape)} {rows.dtype}")
    if inverse is not None and (inverse.ndim != 1 or inverse.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"inverse must be [L] int32 or int64; got {tuple(inverse.shape)} {inverse.dtype}")
    check_range("rows", rows, -1, blocks.capacity - 1)
    check_range("inverse", inverse, -1, rows.numel() - 1)
    return None if inverse is None else inverse.contiguous()


def _check_offsets(offsets: Tensor, num_positions: int | None) -> None:
    if offsets.ndim != 1 or offsets.numel() == 0 or offsets.dtype != torch.int64:
        raise ValueError(f"offsets must be [N + 1] int64; got {tuple(offsets.shape)} {offsets.dtype}")
    check_offsets(offsets, num_positions)


def _filled(rows: Tensor, inverse: Tensor | None) -> Tensor:
    return torch.arange(rows.numel(), dtype=torch.int32, device=rows.device) if inverse is None else inverse


# ---- one version of each op, and the ops as torch.compile and export see them


def _gather(blocks: RowBlocks, rows: Tensor, inverse: Tensor | None, impl: Impl, out: Tensor | None = None) -> Tensor:
    version = choose(impl, rows, triton=gather, numba=_gather_numba, reference=_gather_reference)
    if out is not None and version is _gather_numba:
        return _gather_numba(blocks, rows.contiguous(), inverse, out)
    made = version(blocks, rows.contiguous(), inverse)
    return made if out is None else out.copy_(made)


def _bag(
    blocks: RowBlocks, rows: Tensor, inverse: Tensor | None, offsets: Tensor, factors: Tensor | None, impl: Impl
) -> Tensor:
    version = choose(impl, rows, triton=pool, numba=_bag_numba, reference=_bag_reference)
    fixed = None if factors is None else factors.detach().contiguous()
    return version(blocks, rows.contiguous(), inverse, offsets.contiguous(), fixed)


def _factor_grads(
    blocks: RowBlocks, rows: Tensor, inverse: Tensor | None, offsets: Tensor, grad: Tensor, impl: Impl
) -> Tensor:
    version = choose(impl, rows, triton=pull_factors, numba=_factor_grads_numba, reference=_factor_grads_reference)
    return version(blocks, rows.contiguous(), inverse, offsets.contiguous(), grad.float().contiguous())


@torch.library.custom_op("recis::row_gather", mutates_args=())
def _gather_op(
    blocks: Sequence[Tensor], layout: str, shift: int, rows: Tensor, inverse: Tensor | None, impl: str
) -> Tensor:
    return _gather(RowBlocks.over(layout_of_key(layout), shift, blocks, rows.device), rows, inverse, impl)  # type: ignore[arg-type]


@torch.library.custom_op("recis::embedding_bag", mutates_args=())
def _bag_op(
    blocks: Sequence[Tensor],
    layout: str,
    shift: int,
    rows: Tensor,
    inverse: Tensor | None,
    offsets: Tensor,
    factors: Tensor | None,
    impl: str,
) -> Tensor:
    store = RowBlocks.over(layout_of_key(layout), shift, blocks, rows.device)
    return _bag(store, rows, inverse, offsets, factors, impl)  # type: ignore[arg-type]


@torch.library.custom_op("recis::factor_grads", mutates_args=())
def _factor_grads_op(
    blocks: Sequence[Tensor],
    layout: str,
    shift: int,
    rows: Tensor,
    inverse: Tensor | None,
    offsets: Tensor,
    grad: Tensor,
    impl: str,
) -> Tensor:
    store = RowBlocks.over(layout_of_key(layout), shift, blocks, rows.device)
    return _factor_grads(store, rows, inverse, offsets, grad, impl)  # type: ignore[arg-type]


@_gather_op.register_fake
def _(blocks, layout, shift, rows, inverse, impl):
    num_positions = (rows if inverse is None else inverse).shape[0]
    return rows.new_empty((num_positions, layout_of_key(layout).dim), dtype=torch.float32)


@_bag_op.register_fake
def _(blocks, layout, shift, rows, inverse, offsets, factors, impl):
    return rows.new_empty((offsets.shape[0] - 1, layout_of_key(layout).dim), dtype=torch.float32)


@_factor_grads_op.register_fake
def _(blocks, layout, shift, rows, inverse, offsets, grad, impl):
    return rows.new_empty((rows if inverse is None else inverse).shape[0], dtype=torch.float32)


def _keep_for_backward(ctx, inputs, output) -> None:
    blocks, ctx.layout, ctx.shift, rows, inverse, offsets, factors, ctx.impl = inputs
    ctx.num_factors = 0 if factors is None else factors.shape[0]
    ctx.save_for_backward(*blocks, rows, inverse, offsets)


def _bag_backward(ctx, grad):
    *blocks, rows, inverse, offsets = ctx.saved_tensors
    pulled = None
    if ctx.needs_input_grad[6]:
        pulled = _factor_grads_op(blocks, ctx.layout, ctx.shift, rows, inverse, offsets, grad, ctx.impl)
    return [None] * len(blocks), None, None, None, None, None, pulled, None


_bag_op.register_autograd(_bag_backward, setup_context=_keep_for_backward)


# ---- reference: float64, one bag at a time


def _gather_reference(blocks: RowBlocks, rows: Tensor, inverse: Tensor | None) -> Tensor:
    inverse = _filled(rows, inverse)
    at = torch.where(inverse >= 0, rows[inverse.long().clamp(min=0)], -1) if rows.numel() else inverse.long()
    out = torch.zeros(inverse.numel(), blocks.layout.dim)
    out[at >= 0] = blocks.read(at[at >= 0], ("weight",))["weight"].float()
    return out


def _bag_reference(
    blocks: RowBlocks, rows: Tensor, inverse: Tensor | None, offsets: Tensor, factors: Tensor | None
) -> Tensor:
    vectors = _gather_reference(blocks, rows, inverse).double()
    out = torch.zeros(offsets.numel() - 1, blocks.layout.dim)
    for bag in range(offsets.numel() - 1):
        part = slice(int(offsets[bag]), int(offsets[bag + 1]))
        scaled = vectors[part] if factors is None else vectors[part] * factors[part, None].double()
        out[bag] = scaled.sum(0).float()
    return out


def _factor_grads_reference(
    blocks: RowBlocks, rows: Tensor, inverse: Tensor | None, offsets: Tensor, grad: Tensor
) -> Tensor:
    vectors = _gather_reference(blocks, rows, inverse).double()
    out = torch.zeros(vectors.shape[0])
    for bag in range(offsets.numel() - 1):
        part = slice(int(offsets[bag]), int(offsets[bag + 1]))
        out[part] = (vectors[part] @ grad[bag].double()).float()
    return out


# ---- numba


def _source(blocks: RowBlocks, rows: Tensor, inverse: Tensor) -> tuple[tuple[int, ...], np.ndarray]:
    """Return (numbers, pointers) that say where the row of each position lies."""
    layout = blocks.layout
    numbers = (
        *(rows.data_ptr(), rows.numel()),
        *(inverse.data_ptr(), int(inverse.dtype == torch.int64)),
        *(blocks.shift, layout.row_bytes, layout.dim, int(layout.dtype == torch.bfloat16)),
    )
    return numbers, blocks.pointers.numpy()


def _gather_numba(blocks: RowBlocks, rows: Tensor, inverse: Tensor | None, given: Tensor | None = None) -> Tensor:
    inverse = _filled(rows, inverse)
    out = torch.empty(inverse.numel(), blocks.layout.dim) if given is None else given
    source, pointers = _source(blocks, rows, inverse)

    def loop(start: int, stop: int) -> None:
        _gather_loop(source, pointers, np.empty(stop - start, np.int64), out.data_ptr(), start, stop)

    run_parts(loop, split(inverse.numel(), min_items=MIN_POSITIONS_PER_THREAD))
    return out


def _bag_parts(offsets: Tensor) -> list[tuple[int, int]]:
    """Cut the bags into a (start, stop) per thread with about equal numbers of positions."""
    ends = offsets.numpy()
    parts = split(int(ends[-1] - ends[0]), min_items=MIN_POSITIONS_PER_THREAD)
    inner = np.searchsorted(ends, [int(ends[0]) + stop for _, stop in parts[:-1]])
    bounds = [0, *(min(int(bound), len(ends) - 1) for bound in inner), len(ends) - 1]
    return list(pairwise(bounds))


def _scratch(blocks: RowBlocks, offsets: Tensor, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Return memory for a loop over bags start .. stop - 1.

    It holds the addresses of its positions' rows and ROWS_AHEAD more, and three rows of zeros: the first is read where
    there is no row, the others are room for a row of the loop's own.
    """
    addresses = np.empty(int(offsets[stop] - offsets[start]) + ROWS_AHEAD, np.int64)
    return addresses, lane_scratch(blocks.layout.dim, 3)


def _bag_numba(
    blocks: RowBlocks, rows: Tensor, inverse: Tensor | None, offsets: Tensor, factors: Tensor | None
) -> Tensor:
    inverse = _filled(rows, inverse)
    out = torch.empty(offsets.numel() - 1, blocks.layout.dim)
    source, pointers = _source(blocks, rows, inverse)

    def loop(start: int, stop: int) -> None:
        scratch = _scratch(blocks, offsets, start, stop)
        scale_at = 0 if factors is None else factors.data_ptr()
        _bag_loop(source, pointers, offsets.numpy(), scale_at, scratch, out.data_ptr(), start, stop)

    run_parts(loop, _bag_parts(offsets))
    return out


def _factor_grads_numba(
    blocks: RowBlocks, rows: Tensor, inverse: Tensor | None, offsets: Tensor, grad: Tensor
) -> Tensor:
    inverse = _filled(rows, inverse)
    out = torch.zeros(inverse.numel())
    source, pointers = _source(blocks, rows, inverse)

    def loop(start: int, stop: int) -> None:
        scratch = _scratch(blocks, offsets, start, stop)
        _factor_grads_loop(source, pointers, offsets.numpy(), grad.data_ptr(), scratch, out.data_ptr(), start, stop)

    run_parts(loop, _bag_parts(offsets))
    return out


@njit
def _row_addresses(source, pointers, start, stop, absent, addresses):
    """Write the address of the row of positions start .. stop - 1; `absent` where there is no row."""
    rows, num_rows, inverse, is_wide, shift, row_bytes = source[:6]
    mask = (1 << shift) - 1
    for p in range(start, stop):
        u = load_int64(inverse + 8 * p) if is_wide != 0 else np.int64(load_int32(inverse + 4 * p))
        row = load_int64(rows + 8 * u) if u >= 0 and num_rows > 0 else np.int64(-1)
        addresses[p - start] = pointers[row >> shift] + (row & mask) * row_bytes if row >= 0 else absent


@njit
def _fetch(address, num_bytes):
    for line in range(0, num_bytes, 64):
        prefetch(address + line)


@njit
def _gather_loop(source, pointers, addresses, out, start, stop):
    dim, is_bf16 = source[6], source[7] != 0
    weight_bytes = 2 * dim if is_bf16 else 4 * dim
    _row_addresses(source, pointers, start, stop, 0, addresses)
    for i in range(stop - start):
        if i + ROWS_AHEAD < addresses.size:
            _fetch(addresses[i + ROWS_AHEAD], weight_bytes)
        target_at = out + 4 * dim * (start + i)
        if addresses[i] == 0:
            target = float32_at(target_at, dim)
            for c in range(dim):
                target[c] = np.float32(0.0)
        elif is_bf16:
            widen_row(addresses[i], target_at, dim)
        else:
            target, row = float32_at(target_at, dim), float32_at(addresses[i], dim)
            for c in range(dim):
                target[c] = row[c]


@njit
def _bag_loop(source, pointers, offsets, factors, scratch, out, start, stop):
    addresses, rows = scratch
    dim, is_bf16 = source[6], source[7] != 0
    weight_bytes = 2 * dim if is_bf16 else 4 * dim
    first, absent = offsets[start], rows.ctypes.data
    _row_addresses(source, pointers, first, offsets[stop], absent, addresses)
    addresses[addresses.size - ROWS_AHEAD :] = absent  # what the last positions fetch ahead
    addresses_at = addresses.ctypes.data
    for i in range(ROWS_AHEAD):
        _fetch(addresses[i], weight_bytes)
    for n in range(start, stop):
        total, done, end = out + 4 * dim * n, offsets[n] - first, offsets[n + 1] - first
        if done == end:
            empty = float32_at(total, dim)
            for c in range(dim):
                empty[c] = np.float32(0.0)
            continue
        own_factors = factors + 4 * (first + done) if factors != 0 else 0
        if is_bf16:
            fold_words(addresses_at + 8 * done, own_factors, end - done, total, dim, ROWS_AHEAD)
        else:
            fold_rows(addresses_at + 8 * done, own_factors, end - done, total, dim, False, ROWS_AHEAD)


@njit
def _factor_grads_loop(source, pointers, offsets, grads, scratch, out, start, stop):
    addresses, rows = scratch
    dim, is_bf16 = source[6], source[7] != 0
    first, padded = offsets[start], rows.shape[1]
    _row_addresses(source, pointers, first, offsets[stop], rows.ctypes.data, addresses)
    products_at, wide_at = rows.ctypes.data + 4 * padded, rows.ctypes.data + 8 * padded
    products = float32_at(products_at, dim)
    for n in range(start, stop):
        grad = float32_at(grads + 4 * dim * n, dim)
        for p in range(offsets[n], offsets[n + 1]):
            row_at = addresses[p - first]
            if is_bf16:
                widen_row(row_at, wide_at, dim)
                row_at = wide_at
            row = float32_at(row_at, dim)
            for c in range(dim):
                products[c] = row[c] * grad[c]
            store_float32(out + 4 * p, lane_sum(products_at, padded))
