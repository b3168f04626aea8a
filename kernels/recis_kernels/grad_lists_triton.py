"""List the contributions to each row in fold order on a GPU, and fold them inside Triton kernels. See grad_lists.py.

    place = contributions before it in ascending (micro-batch, sample, feature, position);  lists = stable sort of rows by place

A prefix sum over the bags, sample by sample, says at which place each bag starts; one kernel per view writes row, source
address and factor of every position there; a stable sort by row then makes the lists, in fold order. No atomics, no host
sync: all sizes are bounds known on the host. Traffic: about 100 bytes a position, most of it the sort.

The fold takes four contributions at a time, one addition after the other, a program for a tile of rows (512 elements for
four warps). So a hot row is a chain of additions as long as its list: 10,000 contributions take milliseconds. `cut_long_runs`
makes a tree of fixed form of it where exact order is not asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recis_kernels.dispatch import jit, launch, tl
from recis_kernels.grad_lists import check_view
from recis_kernels.lanes_triton import square_sums
from recis_kernels.row_blocks_triton import TILE, next_power_of_2

if TYPE_CHECKING:
    from recis_kernels.row_grads import RowGrad

_POSITIONS = 256  # per program of the listing
LONG_RUN = 1024  # contributions above which cut_long_runs cuts a row's list
PIECE = 256  # contributions of each part then: a row of 65,536 becomes two chains of 256


@dataclass(frozen=True, slots=True)
class DeviceGradLists:
    """The contributions of all positions, listed per distinct row in fold order; everything lies on the device.

    first, last [U] int32: row u has contributions first[u] .. last[u] - 1.
    sources int64: address of each contribution's gradient row.  factors float32 or None when all are 1.
    is_aligned: whether every gradient row starts at a multiple of 16 bytes.  keep: what owns the memory at the addresses.
    """

    first: Tensor
    last: Tensor
    sources: Tensor
    factors: Tensor | None
    is_aligned: bool
    keep: tuple[Tensor, ...]

    def kernel_args(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the tensors as kernels take them; without factors any tensor stands in their place."""
        return self.first, self.last, self.sources, self.sources if self.factors is None else self.factors


def row_tile(dim: int) -> tuple[int, int, int]:
    """Return (rows, columns, warps) of a program that holds whole rows."""
    block_d = max(next_power_of_2(dim), 16)
    return max(TILE // block_d, 1), block_d, min(max(block_d // 256, 4), 16)


def list_grads_on_device(views: Sequence[RowGrad], num_rows: int, dim: int, device: torch.device) -> DeviceGradLists:
    """List the contributions of all views that have a gradient; see reduce_grads for what is raised."""
    ordered = sorted((view for view in views if view.grad is not None), key=lambda view: view.micro_batch)
    for view in ordered:
        check_view(view, num_rows, dim)
    capacity = sum(view.inverse.numel() for view in ordered)
    if capacity >= 2**31:
        raise ValueError(
            f"one update takes fewer than 2**31 positions; got {capacity}: use fewer or smaller micro-batches"
        )
    rows = torch.full((capacity,), num_rows, dtype=torch.int32, device=device)  # num_rows: a place without contribution
    sources = torch.zeros(capacity, dtype=torch.int64, device=device)
    has_factors = any(view.factors is not None for view in ordered)
    factors = torch.ones(capacity, dtype=torch.float32, device=device) if has_factors else None
    keep: list[Tensor] = []
    groups = [list(group) for _, group in groupby(ordered, key=lambda view: (view.stride, view.micro_batch))]
    bag_places = _bag_places(groups, device)
    first_bag = 0
    for group in groups:
        group_features, feature = sum(view.num_features for view in group), 0
        for view in group:
            places = bag_places[first_bag:]
            keep.append(_list_view(view, places, feature, group_features, rows, sources, factors))
            feature += view.num_features
        first_bag += group_features * group[0].stride
    sorted_rows, order = torch.sort(rows, stable=True)
    every_row = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
    starts = torch.searchsorted(sorted_rows, every_row, out_int32=True)
    aligned = all(grad.data_ptr() % 16 == 0 and grad.stride(0) % 4 == 0 for grad in keep)
    return DeviceGradLists(
        starts[:-1], starts[1:], sources[order], None if factors is None else factors[order], aligned, tuple(keep)
    )


def _bag_places(groups: Sequence[Sequence[RowGrad]], device: torch.device) -> Tensor:
    """Return the first place of each bag, int64: group after group, in each [samples, features]."""
    lengths = [
        torch.cat([view.offsets.diff().view(view.num_features, view.stride) for view in group]).t().reshape(-1)
        for group in groups
        if group[0].stride
    ]
    if not lengths:
        return torch.zeros(1, dtype=torch.int64, device=device)
    joined = torch.cat(lengths)
    return joined.cumsum(0) - joined


def _list_view(
    view: RowGrad,
    places: Tensor,
    feature: int,
    group_features: int,
    rows: Tensor,
    sources: Tensor,
    factors: Tensor | None,
) -> Tensor:
    """Write the contributions of one view to their places; returns the gradient that the addresses point into."""
    assert view.grad is not None
    grad = view.grad if view.grad.stride(1) == 1 else view.grad.contiguous()
    num_bags, num_positions = view.offsets.numel() - 1, view.inverse.numel()
    if num_bags == 0 or num_positions == 0:
        return grad
    own_factors = sources if view.factors is None else view.factors.detach().contiguous()
    launch(
        _list_view_kernel,
        (-(-num_positions // _POSITIONS),),
        *(view.inverse.contiguous(), view.offsets.contiguous(), places, own_factors),
        *(rows, sources, sources if factors is None else factors),
        *(num_positions, num_bags, num_bags.bit_length(), view.stride, feature, group_features),
        *(grad.data_ptr(), grad.stride(0) * 4),
        PER_POSITION=view.per_position,
        HAS_FACTORS=view.factors is not None,
        BLOCK=_POSITIONS,
        num_warps=4,
    )
    return grad


def cut_long_runs(lists: DeviceGradLists, dim: int) -> DeviceGradLists:
    """Return lists in which the sums of PIECE contributions stand for them, for rows with more than LONG_RUN.

    The form of the tree depends on the row's own list alone, so results are equal from run to run and for any batch
    around it, but they are not the plain left fold's bits.
    """
    listed = lists.sources.numel()
    num_pieces = 2 * listed // PIECE  # a bound: a row above LONG_RUN has fewer than twice its length / PIECE
    if listed <= LONG_RUN:
        return lists
    count = lists.last - lists.first
    pieces = torch.where(count > LONG_RUN, (count + PIECE - 1) // PIECE, 0)
    ends = pieces.cumsum(0)
    number = torch.arange(num_pieces, device=ends.device)
    row = torch.searchsorted(ends, number, right=True)
    is_used, row = row < ends.numel(), row.clamp(max=ends.numel() - 1)
    first = lists.first[row] + (number - (ends - pieces)[row]) * PIECE
    last = torch.minimum(first + PIECE, lists.last[row])
    zero = torch.zeros_like(first)
    first, last = torch.where(is_used, first, zero).int(), torch.where(is_used, last, zero).int()
    parts = reduce_lists(replace(lists, first=first, last=last), dim)
    is_cut = pieces > 0
    place = listed + ends - pieces
    factors = None if lists.factors is None else torch.cat((lists.factors, lists.factors.new_ones(num_pieces)))
    return DeviceGradLists(
        torch.where(is_cut, place, lists.first).int(),
        torch.where(is_cut, place + pieces, lists.last).int(),
        torch.cat((lists.sources, parts.data_ptr() + number * (4 * dim))),
        factors,
        lists.is_aligned and dim % 4 == 0,
        (*lists.keep, parts),
    )


def reduce_lists(lists: DeviceGradLists, dim: int) -> Tensor:
    """Return the fold of each list, float32 [U, dim]; zeros where the list is empty."""
    sums = torch.empty(lists.first.numel(), dim, dtype=torch.float32, device=lists.first.device)
    _launch_reduce(lists, dim, lists.first, sums, squares=False)
    return sums


def square_lists(lists: DeviceGradLists, rows: Tensor, dim: int) -> Tensor:
    """Return the sum of squares of each fold, float64 [U], in the lane order of lanes.py; 0 where rows[u] is -1."""
    squares = torch.empty(rows.numel(), dtype=torch.float64, device=rows.device)
    _launch_reduce(lists, dim, rows, squares, squares=True)
    return squares


def _launch_reduce(lists: DeviceGradLists, dim: int, rows: Tensor, out: Tensor, *, squares: bool) -> None:
    num_rows = lists.first.numel()
    block_n, block_d, num_warps = row_tile(dim)
    launch(
        _reduce_lists_kernel,
        (-(-num_rows // block_n),),
        *lists.kernel_args(),
        *(rows, out, num_rows, dim),
        HAS_FACTORS=lists.factors is not None,
        ALIGNED=lists.is_aligned,
        SQUARES=squares,
        N=block_n,
        BLOCK_D=block_d,
        num_warps=num_warps,
    )


@jit
def _list_view_kernel(
    inverse_ptr,
    offsets_ptr,
    places_ptr,
    own_factors_ptr,
    rows_ptr,
    sources_ptr,
    factors_ptr,
    num_positions,
    num_bags,
    num_halvings,
    stride,
    feature,
    group_features,
    grad,
    grad_step,
    PER_POSITION: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = p < num_positions
    bag = p * 0
    high = bag + num_bags
    for _ in range(num_halvings):  # the last n with offsets[n] <= p
        middle = (bag + high + 1) // 2
        is_before = tl.load(offsets_ptr + middle, mask=exists, other=0) <= p
        bag = tl.where(is_before, middle, bag)
        high = tl.where(is_before, high, middle - 1)
    start = tl.load(offsets_ptr + bag, mask=exists, other=0)
    inside = exists & (bag < num_bags) & (start <= p)
    u = tl.load(inverse_ptr + p, mask=inside, other=-1).to(tl.int32)
    listed = inside & (u >= 0)
    own_feature = bag // stride
    sample = bag - own_feature * stride
    at = sample * group_features + feature + own_feature
    place = tl.load(places_ptr + at, mask=listed, other=0) + (p - start)
    if PER_POSITION:
        source = grad + p * grad_step
    else:
        source = grad + bag * grad_step
    tl.store(rows_ptr + place, u, mask=listed)
    tl.store(sources_ptr + place, source, mask=listed)
    if HAS_FACTORS:
        tl.store(factors_ptr + place, tl.load(own_factors_ptr + p, mask=listed, other=1.0), mask=listed)


@jit
def _source_at(sources_ptr, c, last):
    return tl.load(sources_ptr + c, mask=c < last, other=0)


@jit
def _load_grad(source, c, last, cols, dim, ALIGNED: tl.constexpr):
    """Return the gradient rows [N, BLOCK_D] of contributions c; -0.0 past the end of a list, which adds nothing."""
    at = source.to(tl.pointer_type(tl.float32))
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    return tl.load(at[:, None] + cols[None, :], mask=(c < last)[:, None] & (cols < dim)[None, :], other=-0.0)


@jit
def _plus(total, grad, c, last, factors_ptr, HAS_FACTORS: tl.constexpr):
    if HAS_FACTORS:
        grad = tl.load(factors_ptr + c, mask=c < last, other=1.0)[:, None] * grad
    return total + grad


@jit
def fold_lists(
    first,
    last,
    sources_ptr,
    factors_ptr,
    cols,
    dim,
    HAS_FACTORS: tl.constexpr,
    ALIGNED: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return the left folds [N, BLOCK_D] of contributions first .. last - 1 (int64 [N]); zeros where there is none."""
    total = tl.full([N, BLOCK_D], -0.0, dtype=tl.float32)
    longest = tl.max(last - first, axis=0)
    in_fours = longest // 4 * 4  # pyright: ignore[reportOperatorIssue]
    for done in range(0, in_fours, 4):
        c0 = first + done
        c1, c2, c3 = c0 + 1, c0 + 2, c0 + 3
        s0 = _source_at(sources_ptr, c0, last)
        s1 = _source_at(sources_ptr, c1, last)
        s2 = _source_at(sources_ptr, c2, last)
        s3 = _source_at(sources_ptr, c3, last)
        g0 = _load_grad(s0, c0, last, cols, dim, ALIGNED)
        g1 = _load_grad(s1, c1, last, cols, dim, ALIGNED)
        g2 = _load_grad(s2, c2, last, cols, dim, ALIGNED)
        g3 = _load_grad(s3, c3, last, cols, dim, ALIGNED)
        total = _plus(total, g0, c0, last, factors_ptr, HAS_FACTORS)
        total = _plus(total, g1, c1, last, factors_ptr, HAS_FACTORS)
        total = _plus(total, g2, c2, last, factors_ptr, HAS_FACTORS)
        total = _plus(total, g3, c3, last, factors_ptr, HAS_FACTORS)
    for done in range(in_fours, longest):  # pyright: ignore[reportArgumentType]
        c = first + done
        grad = _load_grad(_source_at(sources_ptr, c, last), c, last, cols, dim, ALIGNED)
        total = _plus(total, grad, c, last, factors_ptr, HAS_FACTORS)
    return tl.where((last > first)[:, None] & (cols < dim)[None, :], total, 0.0)


@jit
def _reduce_lists_kernel(
    first_ptr,
    last_ptr,
    sources_ptr,
    factors_ptr,
    rows_ptr,
    out_ptr,
    num_rows,
    dim,
    HAS_FACTORS: tl.constexpr,
    ALIGNED: tl.constexpr,
    SQUARES: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    cols = tl.arange(0, BLOCK_D)
    exists = n < num_rows
    wanted = exists
    if SQUARES:
        wanted = tl.load(rows_ptr + n, mask=exists, other=-1) >= 0
    first = tl.load(first_ptr + n, mask=wanted, other=0).to(tl.int64)
    last = tl.load(last_ptr + n, mask=wanted, other=0).to(tl.int64)
    total = fold_lists(first, last, sources_ptr, factors_ptr, cols, dim, HAS_FACTORS, ALIGNED, N, BLOCK_D)
    if SQUARES:
        tl.store(out_ptr + n, square_sums(total, dim, N, BLOCK_D).to(tl.float64), mask=exists)
    else:
        tl.store(out_ptr + n[:, None] * dim + cols[None, :], total, mask=exists[:, None] & (cols < dim)[None, :])
