"""Which gradients reach which rows: what a training lookup leaves behind for the row update, and sums of it.

    sum[u] = sum over micro-batches, samples, features, positions p with inverse[p] == u of factors[p] * grad[bag of p]

A lookup finds U distinct rows for L positions. Its views say how the positions were used (pooled into bags, or one vector
each), and backward puts the upstream gradient into each view. Nothing of size [L, D] is made: contributions are listed
per row (a counting sort) in ascending (micro-batch, sample, feature, position). The sum is a left fold in fp32 in that
order, starting from the first contribution, so it depends neither on threads nor on how a batch was cut into
micro-batches. Cost: two passes over the positions for the lists, then the upstream rows once per position. On a GPU the lists
come from a stable sort (grad_lists_triton.py) and the sums have the same bits; nothing waits for the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from recis_kernels.address import float32_at
from recis_kernels.contents import check_range
from recis_kernels.dispatch import Impl, choose, njit
from recis_kernels.grad_lists import MIN_POSITIONS_PER_THREAD, GradLists, check_view, fold_row, list_grads
from recis_kernels.grad_lists_triton import list_grads_on_device, reduce_lists, square_lists
from recis_kernels.lanes import lane_scratch, square_sum
from recis_kernels.threads import run_parts
from recis_kernels.unique_ids import unique_ids


@dataclass(slots=True, eq=False)
class RowGrad:
    """One view of a lookup's positions, key-major: bag f * stride + b holds feature f of sample b.

    Args:
        inverse: [L] int32 or int64; position -> index into the lookup's distinct rows, -1 = no row (padding).
        offsets: [F * stride + 1] int64; bag n holds positions offsets[n] .. offsets[n + 1] - 1 of inverse.
        stride: samples B, at least 1 unless offsets has one entry.
        factors: float32, what the row of each position in a bag was multiplied with when pooled; None = 1.
        per_position: False: grad is [F * stride, D], one row per bag (pooled).
            True: grad is [L, D], one row per position (sequence and tile features).
        micro_batch: lookups of the same collection since the last update before this one: 0, 1, ... Views of equal
            micro_batch and stride are interleaved by sample, others follow one another.
        grad: float32, set by backward (added to when backward runs twice); None until then: no gradient reached it.
    """

    inverse: Tensor
    offsets: Tensor
    stride: int
    factors: Tensor | None = None
    per_position: bool = False
    micro_batch: int = 0
    grad: Tensor | None = None

    def add_grad(self, grad: Tensor) -> None:
        """Set or add to the upstream gradient; called in backward."""
        self.grad = grad.detach() if self.grad is None else self.grad + grad.detach()

    @property
    def num_features(self) -> int:
        """F; 0 where there is no bag."""
        return (self.offsets.numel() - 1) // self.stride if self.stride else 0


@dataclass(slots=True, eq=False)
class PendingLookup:
    """One training lookup in one row store, kept until the next update.

    Args:
        rows: [U] int64, distinct row numbers; -1 = no row (unadmitted, full), any number of them.
        table_of_row: [U] int32; index of the row's logical table in the store.
        counts: [U] int32; sightings = positions of the row's id in this lookup, whether or not a gradient reaches them.
        views: how the positions were used.
        scale: what the sums are multiplied with before the update (clipping, one over a loss scale); 1 = as they are. A
            tensor of one element stays on its device: no host sync.
    """

    rows: Tensor
    table_of_row: Tensor
    counts: Tensor
    views: list[RowGrad] = field(default_factory=list)
    scale: float | Tensor = 1.0


def merge_lookups(lookups: Sequence[PendingLookup], *, impl: Impl = "auto") -> PendingLookup:
    """Return one lookup over the union of the rows: counts added, views pointed at the union.

    One lookup is returned as it is. Lookups of unequal scale get it through the factors of their views. On a GPU the
    union is ascending and padded with -1 to the rows given, so that nothing waits for its size.

    Raises:
        ValueError: no lookup given.
    """
    if not lookups:
        raise ValueError("merge_lookups needs at least one lookup; got none")
    if len(lookups) == 1:
        return lookups[0]
    given = torch.cat([lookup.rows for lookup in lookups])
    rows, index = choose(impl, given, numba=_union_numba, torch=_union_sorted)(given)
    table_of_row = rows.new_zeros(rows.numel(), dtype=torch.int32)
    table_of_row[index] = torch.cat([lookup.table_of_row for lookup in lookups])
    counts = torch.zeros_like(rows)
    counts.index_add_(0, index, torch.cat([lookup.counts for lookup in lookups]).long())
    same_scale = all(_same_scale(lookup.scale, lookups[0].scale) for lookup in lookups)
    views = []
    for lookup, part in zip(lookups, index.split([lookup.rows.numel() for lookup in lookups]), strict=True):
        # one entry more than rows: inverse -1 picks the last one and stays -1
        to_union = torch.cat((part, part.new_full((1,), -1)))
        for view in lookup.views:
            check_range("inverse", view.inverse, -1, lookup.rows.numel() - 1)
            factors = view.factors
            if not same_scale:
                ones = view.inverse.new_ones(view.inverse.numel(), dtype=torch.float32) if factors is None else factors
                factors = (ones * lookup.scale).float()
            views.append(replace(view, inverse=to_union[view.inverse.long()], factors=factors))
    scale = lookups[0].scale if same_scale else 1.0
    return PendingLookup(rows, table_of_row, counts.clamp(max=2**31 - 1).to(torch.int32), views, scale)


def _same_scale(one: float | Tensor, other: float | Tensor) -> bool:
    """Whether two scales are known to be equal without reading a tensor."""
    return one is other if isinstance(one, Tensor) or isinstance(other, Tensor) else one == other


def _union_numba(rows: Tensor) -> tuple[Tensor, Tensor]:
    union = unique_ids(rows)
    return union.ids, union.inverse.long()


def _union_sorted(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return (distinct rows ascending, padded with -1 to the length given; index of each row among them)."""
    ascending, order = rows.sort(stable=True)
    starts = torch.ones_like(ascending)
    starts[1:] = ascending[1:] != ascending[:-1]
    number = starts.cumsum(0) - 1
    index = torch.empty_like(order).scatter_(0, order, number)
    return torch.full_like(rows, -1).scatter_(0, index, rows), index


def reduce_lookups(
    lookups: Sequence[PendingLookup], dim: int, *, out: Tensor | None = None, impl: Impl = "auto"
) -> PendingLookup:
    """Return a lookup in which every row occurs once, with its summed gradient [U, D] as the one view.

    Rows that no gradient reached keep none (inverse -1). Updating from the result gives the bits of updating from
    `lookups`. `out`: float32 [U, D], contiguous, on the CPU: where the sums go; None = new memory.
    """
    merged = merge_lookups(lookups)
    num_rows = merged.rows.numel()
    if out is not None and (tuple(out.shape) != (num_rows, dim) or out.dtype != torch.float32):
        raise ValueError(f"out must be {(num_rows, dim)} float32; got {tuple(out.shape)} {out.dtype}")
    version = choose(impl, merged.rows, triton=_sums_triton, numba=_sums_numba)
    if version is _sums_numba:
        sums, reached = _sums_numba(merged.views, num_rows, dim, out)
    else:
        sums, reached = version(merged.views, num_rows, dim)
        sums = sums if out is None else out.copy_(sums)
    order = torch.arange(num_rows + 1, device=reached.device)
    view = RowGrad(
        inverse=torch.where(reached, order[:-1], -1), offsets=order, stride=num_rows, per_position=True, grad=sums
    )
    return PendingLookup(merged.rows, merged.table_of_row, merged.counts, [view], merged.scale)


def reduce_grads(views: Sequence[RowGrad], num_rows: int, dim: int, *, impl: Impl = "auto") -> Tensor:
    """Return the summed gradient of each distinct row, [num_rows, dim] float32; zeros where no gradient came.

    Args:
        views: of one lookup (or merged), each inverse pointing into the same num_rows distinct rows.

    Raises:
        ValueError: shapes or dtypes of a view do not fit together; with `checks()`, also a wrong content.
    """
    if torch.compiler.is_compiling():
        return _reduce_op(*split_views(views), num_rows, dim, impl)
    probe = views[0].inverse if views else torch.empty(0)
    return choose(impl, probe, triton=_triton, numba=_numba, reference=_reference)(views, num_rows, dim)


# ---- views as a registered op takes them: only those with a gradient, part by part

SplitViews = tuple[list[Tensor], list[Tensor], list[Tensor | None], list[Tensor], list[int], list[bool], list[int]]


def split_views(views: Sequence[RowGrad]) -> SplitViews:
    """Return (inverses, offsets, factors, grads, strides, per_position, micro_batches) of the views with a gradient."""
    used = [view for view in views if view.grad is not None]
    return (
        [view.inverse for view in used],
        [view.offsets for view in used],
        [view.factors for view in used],
        [view.grad for view in used if view.grad is not None],
        [view.stride for view in used],
        [view.per_position for view in used],
        [view.micro_batch for view in used],
    )


def join_views(
    inverses: Sequence[Tensor],
    offsets: Sequence[Tensor],
    factors: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    strides: Sequence[int],
    per_position: Sequence[bool],
    micro_batches: Sequence[int],
) -> list[RowGrad]:
    """Return the views that split_views took apart."""
    parts = zip(inverses, offsets, strides, factors, per_position, micro_batches, grads, strict=True)
    return [RowGrad(*part) for part in parts]


@torch.library.custom_op("recis::reduce_grads", mutates_args=())
def _reduce_op(
    inverses: Sequence[Tensor],
    offsets: Sequence[Tensor],
    factors: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    strides: Sequence[int],
    per_position: Sequence[bool],
    micro_batches: Sequence[int],
    num_rows: int,
    dim: int,
    impl: str,
) -> Tensor:
    views = join_views(inverses, offsets, factors, grads, strides, per_position, micro_batches)
    return reduce_grads(views, num_rows, dim, impl=impl)  # type: ignore[arg-type]


@_reduce_op.register_fake
def _(inverses, offsets, factors, grads, strides, per_position, micro_batches, num_rows, dim, impl):
    like = inverses[0] if inverses else torch.empty(0)
    return like.new_empty((num_rows, dim), dtype=torch.float32)


def _reference(views: Sequence[RowGrad], num_rows: int, dim: int) -> Tensor:
    return _wide_sums(views, num_rows, dim).float()


def _wide_sums(views: Sequence[RowGrad], num_rows: int, dim: int) -> Tensor:
    sums = torch.zeros(num_rows, dim, dtype=torch.float64)
    for view in views:
        if view.grad is None:
            continue
        check_view(view, num_rows, dim)
        for bag in range(view.offsets.numel() - 1):
            for p in range(int(view.offsets[bag]), int(view.offsets[bag + 1])):
                u = int(view.inverse[p])
                if u >= 0:
                    factor = 1.0 if view.factors is None else view.factors[p].double()
                    sums[u] += factor * view.grad[p if view.per_position else bag].double()
    return sums


def _triton(views: Sequence[RowGrad], num_rows: int, dim: int) -> Tensor:
    return _sums_triton(views, num_rows, dim)[0]


def _numba(views: Sequence[RowGrad], num_rows: int, dim: int) -> Tensor:
    return _sums(list_grads(views, num_rows, dim), dim)


def _sums_triton(views: Sequence[RowGrad], num_rows: int, dim: int) -> tuple[Tensor, Tensor]:
    device = views[0].inverse.device if views else torch.device("cpu")
    lists = list_grads_on_device(views, num_rows, dim, device)
    return reduce_lists(lists, dim), lists.last > lists.first


def _sums_numba(views: Sequence[RowGrad], num_rows: int, dim: int, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    lists = list_grads(views, num_rows, dim)
    return _sums(lists, dim, out), torch.from_numpy(np.diff(lists.starts) > 0)


def _sums(lists: GradLists, dim: int, out: Tensor | None = None) -> Tensor:
    sums = torch.empty(lists.starts.size - 1, dim, dtype=torch.float32) if out is None else out

    def loop(start: int, stop: int) -> None:
        _reduce_loop(lists.starts, *lists.addresses, sums.data_ptr(), dim, start, stop)

    run_parts(loop, lists.parts(MIN_POSITIONS_PER_THREAD))
    return sums


def row_square_sums(lookup: PendingLookup, dim: int, *, impl: Impl = "auto") -> Tensor:
    """Return the squared norm of each row's summed and scaled gradient, [U] float64; 0 where no row or no gradient is.

    Raises:
        ValueError: as reduce_grads.
    """
    if torch.compiler.is_compiling():
        norms = _square_op(lookup.rows, *split_views(lookup.views), dim, impl)
    else:
        norms = _squares(lookup.rows, lookup.views, dim, impl)
    scale = lookup.scale.double() if isinstance(lookup.scale, Tensor) else lookup.scale
    return norms * scale**2


def _squares(rows: Tensor, views: Sequence[RowGrad], dim: int, impl: Impl) -> Tensor:
    version = choose(impl, rows, triton=_squares_triton, numba=_squares_numba, reference=_squares_reference)
    return version(rows.contiguous(), views, dim)


@torch.library.custom_op("recis::row_square_sums", mutates_args=())
def _square_op(
    rows: Tensor,
    inverses: Sequence[Tensor],
    offsets: Sequence[Tensor],
    factors: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    strides: Sequence[int],
    per_position: Sequence[bool],
    micro_batches: Sequence[int],
    dim: int,
    impl: str,
) -> Tensor:
    views = join_views(inverses, offsets, factors, grads, strides, per_position, micro_batches)
    return _squares(rows, views, dim, impl)  # type: ignore[arg-type]


@_square_op.register_fake
def _(rows, inverses, offsets, factors, grads, strides, per_position, micro_batches, dim, impl):
    return rows.new_empty(rows.shape, dtype=torch.float64)


def _squares_reference(rows: Tensor, views: Sequence[RowGrad], dim: int) -> Tensor:
    return torch.where(rows >= 0, _wide_sums(views, rows.numel(), dim).square().sum(1), 0.0)


def _squares_triton(rows: Tensor, views: Sequence[RowGrad], dim: int) -> Tensor:
    return square_lists(list_grads_on_device(views, rows.numel(), dim, rows.device), rows, dim)


def _squares_numba(rows: Tensor, views: Sequence[RowGrad], dim: int) -> Tensor:
    lists = list_grads(views, rows.numel(), dim)
    norms = torch.zeros(rows.numel(), dtype=torch.float64)

    def loop(start: int, stop: int) -> None:
        scratch = lane_scratch(dim, 1)
        _square_loop(lists.starts, *lists.addresses, rows.numpy(), dim, scratch, norms.numpy(), start, stop)

    run_parts(loop, lists.parts(MIN_POSITIONS_PER_THREAD))
    return norms


@njit
def _reduce_loop(starts, sources, factors, sums, dim, start, stop):
    for u in range(start, stop):
        if starts[u + 1] > starts[u]:
            fold_row(starts[u], starts[u + 1], sources, factors, sums + 4 * dim * u, dim)
        else:
            row = float32_at(sums + 4 * dim * u, dim)
            for d in range(dim):
                row[d] = 0.0


@njit
def _square_loop(starts, sources, factors, rows, dim, scratch, norms, start, stop):
    g = scratch.ctypes.data
    for u in range(start, stop):
        if rows[u] >= 0 and starts[u + 1] > starts[u]:
            fold_row(starts[u], starts[u + 1], sources, factors, g, dim)
            norms[u] = square_sum(g, scratch.size)
