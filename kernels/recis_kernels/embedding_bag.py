"""Read rows from row blocks: one vector per position, or pooled per bag.

    row_gather     out[p] = row(rows[inverse[p]])
    embedding_bag  out[n] = sum over positions p of bag n of factors[p] * row(rows[inverse[p]])

No row (inverse -1, or a row number of -1) reads zeros. The sum is a left fold in fp32 in ascending position. Rows are
fetched some positions ahead, because a random row costs a wait on memory. Least traffic: 8 + 4 D bytes a position and 4 D
a bag for fp32 rows. What comes back to the rows goes through `row_grads`; here are only the gradients of the factors.
"""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from recis_kernels.address import float32_at, load_float32, load_int32, load_int64, store_float32
from recis_kernels.dispatch import Impl, checks_enabled, choose, njit
from recis_kernels.lanes import NUM_LANES, lane_sum
from recis_kernels.prefetch import prefetch
from recis_kernels.row_blocks import RowBlocks
from recis_kernels.row_rounding import widen_row
from recis_kernels.threads import run_parts, split

ROWS_AHEAD = 16
MIN_POSITIONS_PER_THREAD = 4096


def row_gather(blocks: RowBlocks, rows: Tensor, inverse: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
    """Return the weights of rows[inverse] (inverse None: of rows) as float32 [L, D]; zeros where there is no row.

    Args:
        rows: [U] int64 row numbers, -1 = no row.
        inverse: [L] int32 or int64 into rows, -1 = no row.

    Raises:
        ValueError: rows or inverse has another shape or dtype.
    """
    inverse = _checked_inverse(blocks, rows, inverse)
    return choose(impl, rows, numba=_gather_numba, reference=_gather_reference)(blocks, rows, inverse)


def embedding_bag(
    blocks: RowBlocks,
    rows: Tensor,
    inverse: Tensor | None,
    offsets: Tensor,
    factors: Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Return the pooled bags, float32 [N, D]; an empty bag gives zeros.

    Args:
        rows, inverse: as for row_gather.
        offsets: [N + 1] int64, positions of each bag; they need not start at 0 nor end at L. Trusted.
        factors: float32, one per position; None = 1, see bag_factors.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    inverse = _checked_inverse(blocks, rows, inverse)
    _check_offsets(offsets)
    if factors is not None and (factors.ndim != 1 or factors.dtype != torch.float32):
        raise ValueError(f"factors must be [L] float32; got {tuple(factors.shape)} {factors.dtype}")
    return choose(impl, rows, numba=_bag_numba, reference=_bag_reference)(blocks, rows, inverse, offsets, factors)


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
    _check_offsets(offsets)
    if tuple(grad.shape) != (offsets.numel() - 1, blocks.layout.dim):
        raise ValueError(f"grad must be {(offsets.numel() - 1, blocks.layout.dim)}; got {tuple(grad.shape)}")
    version = choose(impl, rows, numba=_factor_grads_numba, reference=_factor_grads_reference)
    return version(blocks, rows, inverse, offsets, grad.float().contiguous())


def tile_positions(offsets: Tensor, num_kept: int) -> Tensor:
    """Return [N * num_kept] int64: the first num_kept positions of each bag, -1 where the bag is shorter."""
    positions = offsets[:-1, None] + torch.arange(num_kept, device=offsets.device)
    return torch.where(positions < offsets[1:, None], positions, -1).reshape(-1)


def bag_factors(offsets: Tensor, weights: Tensor | None, mean: Tensor | bool) -> Tensor | None:
    """Return what each position is multiplied with, float32 [L], or None for all ones; differentiable in weights.

    Sum: w.  Mean: w / sum of the bag's w, 0 where that sum is 0.  No weights: all w = 1.

    Args:
        offsets: [N + 1] int64, as for embedding_bag.
        weights: [L] floating point or None.
        mean: for all bags, or bool [F] with F dividing N: for the bags of each feature, key-major.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    _check_offsets(offsets)
    num_bags = offsets.numel() - 1
    if isinstance(mean, Tensor) and (mean.dtype != torch.bool or mean.ndim != 1 or num_bags % max(mean.numel(), 1)):
        raise ValueError(f"mean must be bool [F] with F dividing {num_bags} bags; got {tuple(mean.shape)} {mean.dtype}")
    if weights is not None and (weights.ndim != 1 or not weights.is_floating_point()):
        raise ValueError(f"weights must be floating point [L]; got {tuple(weights.shape)} {weights.dtype}")
    takes_mean = mean if isinstance(mean, Tensor) else torch.tensor([mean], device=offsets.device)
    if not isinstance(mean, Tensor) and not mean:
        return None if weights is None else weights.float()
    of_bag = takes_mean.repeat_interleave(num_bags // max(takes_mean.numel(), 1))
    if weights is None:
        weights = torch.ones(int(offsets[-1]), device=offsets.device)
    return _MeanFactors.apply(weights.float(), offsets, of_bag)


class _MeanFactors(torch.autograd.Function):
    """f_p = w_p / S, S = sum of the bag's w;  d loss / d w_q = (a_q - sum over the bag of f_p a_p) / S."""

    @staticmethod
    def forward(ctx, weights: Tensor, offsets: Tensor, of_bag: Tensor) -> Tensor:
        bag = _bag_of_position(offsets, weights.numel())
        inside = bag >= 0
        sums = torch.zeros(of_bag.numel(), dtype=torch.float64, device=weights.device)
        sums.index_add_(0, bag[inside], weights[inside].double())
        divisors = torch.where(of_bag, sums, 1.0)
        inverse_sums = torch.where(divisors == 0, 0.0, 1.0 / divisors)
        scale = torch.where(inside, inverse_sums[bag.clamp(min=0)] if of_bag.numel() else inside.double(), 1.0)
        factors = (weights.double() * scale).float()
        ctx.save_for_backward(factors, bag, scale, of_bag)
        return factors

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        factors, bag, scale, of_bag = ctx.saved_tensors
        grad, inside = grads[0].double(), bag >= 0
        pulled = torch.zeros(of_bag.numel(), dtype=torch.float64, device=grad.device)
        pulled.index_add_(0, bag[inside], (factors.double() * grad)[inside])
        pulled = torch.where(of_bag, pulled, 0.0)
        if of_bag.numel():
            grad = grad - torch.where(inside, pulled[bag.clamp(min=0)], 0.0)
        return (grad * scale).float(), None, None


def _bag_of_position(offsets: Tensor, num_positions: int) -> Tensor:
    """Return the bag of each position, -1 outside all bags."""
    positions = torch.arange(num_positions, device=offsets.device)
    bag = torch.searchsorted(offsets[1:].contiguous(), positions, right=True)
    return torch.where((positions >= offsets[0]) & (bag < offsets.numel() - 1), bag, -1)


def _checked_inverse(blocks: RowBlocks, rows: Tensor, inverse: Tensor | None) -> Tensor:
    if rows.ndim != 1 or rows.dtype != torch.int64:
        raise ValueError(f"rows must be [U] int64; got {tuple(rows.shape)} {rows.dtype}")
    if inverse is None:
        inverse = torch.arange(rows.numel(), dtype=torch.int32, device=rows.device)
    if inverse.ndim != 1 or inverse.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"inverse must be [L] int32 or int64; got {tuple(inverse.shape)} {inverse.dtype}")
    if checks_enabled():
        for name, values, limit in (("rows", rows, blocks.capacity), ("inverse", inverse, rows.numel())):
            if values.numel() and not (int(values.min()) >= -1 and int(values.max()) < limit):
                raise ValueError(f"{name} must lie in -1..{limit - 1}; got {int(values.min())}..{int(values.max())}")
    return inverse.contiguous()


def _check_offsets(offsets: Tensor) -> None:
    if offsets.ndim != 1 or offsets.numel() == 0 or offsets.dtype != torch.int64:
        raise ValueError(f"offsets must be [N + 1] int64; got {tuple(offsets.shape)} {offsets.dtype}")


# ---- reference: float64, one bag at a time


def _gather_reference(blocks: RowBlocks, rows: Tensor, inverse: Tensor) -> Tensor:
    at = torch.where(inverse >= 0, rows[inverse.long().clamp(min=0)], -1) if rows.numel() else inverse.long()
    out = torch.zeros(inverse.numel(), blocks.layout.dim)
    out[at >= 0] = blocks.read(at[at >= 0], ("weight",))["weight"].float()
    return out


def _bag_reference(blocks: RowBlocks, rows: Tensor, inverse: Tensor, offsets: Tensor, factors: Tensor | None) -> Tensor:
    vectors = _gather_reference(blocks, rows, inverse).double()
    out = torch.zeros(offsets.numel() - 1, blocks.layout.dim)
    for bag in range(offsets.numel() - 1):
        part = slice(int(offsets[bag]), int(offsets[bag + 1]))
        scaled = vectors[part] if factors is None else vectors[part] * factors[part, None].double()
        out[bag] = scaled.sum(0).float()
    return out


def _factor_grads_reference(blocks: RowBlocks, rows: Tensor, inverse: Tensor, offsets: Tensor, grad: Tensor) -> Tensor:
    vectors = _gather_reference(blocks, rows, inverse).double()
    out = torch.zeros(inverse.numel())
    for bag in range(offsets.numel() - 1):
        part = slice(int(offsets[bag]), int(offsets[bag + 1]))
        out[part] = (vectors[part] @ grad[bag].double()).float()
    return out


# ---- numba


def _source(blocks: RowBlocks, rows: Tensor, inverse: Tensor) -> tuple[tuple[int, ...], np.ndarray]:
    """Return (numbers, pointers) that say where the row of each position lies."""
    layout = blocks.layout
    numbers = (
        *(rows.contiguous().data_ptr(), rows.numel()),
        *(inverse.data_ptr(), int(inverse.dtype == torch.int64)),
        *(blocks.shift, layout.row_bytes, layout.dim, int(layout.dtype == torch.bfloat16)),
    )
    return numbers, blocks.pointers.numpy()


def _gather_numba(blocks: RowBlocks, rows: Tensor, inverse: Tensor) -> Tensor:
    rows = rows.contiguous()
    out = torch.empty(inverse.numel(), blocks.layout.dim)
    source, pointers = _source(blocks, rows, inverse)

    def loop(start: int, stop: int) -> None:
        _gather_loop(source, pointers, out.data_ptr(), start, stop)

    run_parts(loop, split(inverse.numel(), min_items=MIN_POSITIONS_PER_THREAD))
    return out


def _bag_parts(offsets: Tensor) -> list[tuple[int, int]]:
    """Cut the bags into a (start, stop) per thread with about equal numbers of positions."""
    ends = offsets.numpy()
    parts = split(int(ends[-1] - ends[0]), min_items=MIN_POSITIONS_PER_THREAD)
    inner = np.searchsorted(ends, [int(ends[0]) + stop for _, stop in parts[:-1]])
    bounds = [0, *(min(int(bound), len(ends) - 1) for bound in inner), len(ends) - 1]
    return list(pairwise(bounds))


def _bag_numba(blocks: RowBlocks, rows: Tensor, inverse: Tensor, offsets: Tensor, factors: Tensor | None) -> Tensor:
    rows, offsets = rows.contiguous(), offsets.contiguous()
    scale = None if factors is None else factors.detach().contiguous()
    out = torch.empty(offsets.numel() - 1, blocks.layout.dim)
    source, pointers = _source(blocks, rows, inverse)

    def loop(start: int, stop: int) -> None:
        scale_at = 0 if scale is None else scale.data_ptr()
        _bag_loop(source, pointers, offsets.numpy(), scale_at, out.data_ptr(), start, stop)

    run_parts(loop, _bag_parts(offsets))
    return out


def _factor_grads_numba(blocks: RowBlocks, rows: Tensor, inverse: Tensor, offsets: Tensor, grad: Tensor) -> Tensor:
    rows, offsets = rows.contiguous(), offsets.contiguous()
    out = torch.zeros(inverse.numel())
    source, pointers = _source(blocks, rows, inverse)

    def loop(start: int, stop: int) -> None:
        _factor_grads_loop(source, pointers, offsets.numpy(), grad.data_ptr(), out.data_ptr(), start, stop)

    run_parts(loop, _bag_parts(offsets))
    return out


@njit
def _row_addresses(source, pointers, start, stop, addresses):
    """Write the address of the row of positions start .. stop - 1, 0 = no row."""
    rows, num_rows, inverse, is_wide, shift, row_bytes = source[:6]
    mask = (1 << shift) - 1
    for p in range(start, stop):
        u = load_int64(inverse + 8 * p) if is_wide != 0 else np.int64(load_int32(inverse + 4 * p))
        row = load_int64(rows + 8 * u) if u >= 0 and num_rows > 0 else np.int64(-1)
        addresses[p - start] = pointers[row >> shift] + (row & mask) * row_bytes if row >= 0 else 0


@njit
def _fetch(address, num_bytes):
    for line in range(0, num_bytes, 64):
        prefetch(address + line)


@njit
def _gather_loop(source, pointers, out, start, stop):
    dim, is_bf16 = source[6], source[7] != 0
    weight_bytes = 2 * dim if is_bf16 else 4 * dim
    addresses = np.empty(stop - start, np.int64)
    _row_addresses(source, pointers, start, stop, addresses)
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
def _bag_loop(source, pointers, offsets, factors, out, start, stop):
    dim, is_bf16 = source[6], source[7] != 0
    weight_bytes = 2 * dim if is_bf16 else 4 * dim
    first = offsets[start]
    addresses = np.empty(offsets[stop] - first, np.int64)
    _row_addresses(source, pointers, first, offsets[stop], addresses)
    scratch = np.empty(dim, np.float32)
    wide = scratch.ctypes.data
    for n in range(start, stop):
        total = float32_at(out + 4 * dim * n, dim)
        started = False
        for i in range(offsets[n] - first, offsets[n + 1] - first):
            if i + ROWS_AHEAD < addresses.size:
                _fetch(addresses[i + ROWS_AHEAD], weight_bytes)
            row_at = addresses[i]
            if row_at == 0:
                continue
            if is_bf16:
                widen_row(row_at, wide, dim)
                row_at = wide
            row = float32_at(row_at, dim)
            factor = load_float32(factors + 4 * (first + i)) if factors != 0 else np.float32(1.0)
            if started:
                for c in range(dim):
                    total[c] += factor * row[c]
            else:
                for c in range(dim):
                    total[c] = factor * row[c]
                started = True
        if not started:
            for c in range(dim):
                total[c] = np.float32(0.0)


@njit
def _factor_grads_loop(source, pointers, offsets, grads, out, start, stop):
    dim, is_bf16 = source[6], source[7] != 0
    first = offsets[start]
    addresses = np.empty(offsets[stop] - first, np.int64)
    _row_addresses(source, pointers, first, offsets[stop], addresses)
    padded = (dim + NUM_LANES - 1) // NUM_LANES * NUM_LANES
    scratch = np.zeros(2 * padded, np.float32)
    products_at, wide = scratch.ctypes.data, scratch.ctypes.data + 4 * padded
    products = float32_at(products_at, dim)
    for n in range(start, stop):
        grad = float32_at(grads + 4 * dim * n, dim)
        for p in range(offsets[n], offsets[n + 1]):
            row_at = addresses[p - first]
            if row_at == 0:
                continue
            if is_bf16:
                widen_row(row_at, wide, dim)
                row_at = wide
            row = float32_at(row_at, dim)
            for c in range(dim):
                products[c] = row[c] * grad[c]
            store_float32(out + 4 * p, lane_sum(products_at, padded))
