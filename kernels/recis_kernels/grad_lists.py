"""List the contributions to each row in fold order, and fold them: the loops under `row_grads`.

    starts = running count of contributions per row;  sources[starts[u]:starts[u + 1]] = addresses of its gradient rows

A counting sort: each thread counts its own range of samples, the counts become places, and each thread writes its
positions to its places in ascending (sample, feature, position). Then every row's contributions lie side by side, in
order, and the fold can fetch gradient rows ahead, which following links from one to the next could not.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from recis_kernels.address import load_float32, load_int32, load_int64
from recis_kernels.contents import check_offsets, check_range
from recis_kernels.dispatch import njit
from recis_kernels.lanes import fold_rows
from recis_kernels.prefetch import prefetch
from recis_kernels.threads import run_parts, split

if TYPE_CHECKING:
    from recis_kernels.row_grads import RowGrad

SOURCES_AHEAD = 8  # contributions ahead for which the gradient row is fetched
CONTRIBUTIONS_PER_ROW = 4  # a row costs about as much as this many contributions; for even shares of threads
MIN_POSITIONS_PER_THREAD = 16384


@dataclass(frozen=True, slots=True)
class GradLists:
    """The contributions of all positions, listed per distinct row in fold order.

    starts [U + 1] int32: row u has contributions starts[u] .. starts[u + 1] - 1.
    sources [L + SOURCES_AHEAD] int64: address of each contribution's gradient row; the rest is only fetched.
    factors [L] float32, empty when all are 1.
    keep: what owns the memory that the addresses point into.
    """

    starts: np.ndarray
    sources: np.ndarray
    factors: np.ndarray
    keep: tuple[Tensor, ...]

    @property
    def addresses(self) -> tuple[int, int]:
        """Addresses of sources and factors (0 = all 1): in the row loops arrays would count references."""
        return self.sources.ctypes.data, self.factors.ctypes.data if self.factors.size else 0

    def parts(self, min_items: int) -> list[tuple[int, int]]:
        """Cut the rows into a (start, stop) per thread of about equal work: a frequent id has most contributions."""
        num_rows = self.starts.size - 1

        def work(u: int) -> int:
            return int(self.starts[u]) + CONTRIBUTIONS_PER_ROW * u

        num_parts = len(split(work(num_rows), min_items=min_items))
        shares = [work(num_rows) * part // num_parts for part in range(1, num_parts)]
        bounds = [0, *(bisect_left(range(num_rows), share, key=work) for share in shares), num_rows]
        return list(pairwise(bounds))


def list_grads(views: Sequence["RowGrad"], num_rows: int, dim: int) -> GradLists:
    """List the contributions of all views that have a gradient; see reduce_grads for what is raised."""
    groups, keep, num_positions = _grouped([view for view in views if view.grad is not None], num_rows, dim)
    num_samples = sum(stride for _, stride in groups)
    num_parts = min(len(split(num_positions, min_items=MIN_POSITIONS_PER_THREAD)), max(num_samples, 1))
    cuts = [num_samples * part // num_parts for part in range(num_parts + 1)]
    cursors = np.zeros((num_parts, num_rows), dtype=np.int32)
    starts = np.empty(num_rows + 1, dtype=np.int32)
    has_factors = any(bool(features[:, _FACTORS].any()) for features, _ in groups)

    def each(loop: Callable[..., None], *rest: np.ndarray) -> None:
        def part(number: int, _: int) -> None:
            before = 0
            for features, stride in groups:
                low, high = max(cuts[number] - before, 0), min(cuts[number + 1] - before, stride)
                if low < high:
                    loop(features, low, high, cursors[number], *rest)
                before += stride

        run_parts(part, [(number, number + 1) for number in range(num_parts)])

    each(_count_loop)
    _start_loop(cursors, starts)
    num_sources = int(starts[-1])
    sources = np.empty(num_sources + SOURCES_AHEAD, dtype=np.int64)
    sources[num_sources:] = sources.ctypes.data  # what the last contributions fetch ahead: any address will do
    factors = np.empty(num_sources if has_factors else 0, dtype=np.float32)
    each(_list_loop, sources, factors)
    return GradLists(starts, sources, factors, tuple(keep))


# One line of int64 per feature of a view, what the list loops read.
_INVERSE, _INVERSE_IS_WIDE, _OFFSETS, _GRAD, _GRAD_STEP, _PER_POSITION, _FACTORS = range(7)


def _grouped(
    views: Sequence["RowGrad"], num_rows: int, dim: int
) -> tuple[list[tuple[np.ndarray, int]], list[Tensor], int]:
    """Return ([features [F, 7], stride] per group of views that are interleaved by sample, owners of memory, positions)."""
    groups: list[tuple[list[np.ndarray], int, int]] = []
    keep: list[Tensor] = []
    base = 0
    for view in sorted(views, key=lambda view: view.micro_batch):
        check_view(view, num_rows, dim)
        if not groups or groups[-1][1:] != (view.stride, view.micro_batch):
            groups.append(([], view.stride, view.micro_batch))
        groups[-1][0].append(_features(view, keep))
        base += view.inverse.numel()
    if base >= 2**31:
        raise ValueError(f"one update takes fewer than 2**31 positions; got {base}: use fewer or smaller micro-batches")
    return [(np.concatenate(parts), stride) for parts, stride, _ in groups], keep, base


def _features(view: "RowGrad", keep: list[Tensor]) -> np.ndarray:
    assert view.grad is not None
    grad = view.grad if view.grad.stride(1) == 1 else view.grad.contiguous()
    inverse, offsets = view.inverse.contiguous(), view.offsets.contiguous()
    step = grad.stride(0) * 4
    feature = np.arange(view.num_features)
    lines = np.zeros((view.num_features, 7), dtype=np.int64)
    lines[:, _INVERSE] = inverse.data_ptr()
    lines[:, _INVERSE_IS_WIDE] = inverse.dtype == torch.int64
    lines[:, _OFFSETS] = offsets.data_ptr() + feature * view.stride * 8
    lines[:, _GRAD] = grad.data_ptr() + (0 if view.per_position else feature * view.stride * step)
    lines[:, _GRAD_STEP] = step
    lines[:, _PER_POSITION] = view.per_position
    keep += [grad, inverse, offsets]
    if view.factors is not None:
        factors = view.factors.detach().contiguous()
        lines[:, _FACTORS] = factors.data_ptr()
        keep.append(factors)
    return lines


def check_view(view: "RowGrad", num_rows: int, dim: int) -> None:
    if view.inverse.ndim != 1 or view.inverse.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"inverse must be [L] int32 or int64; got {tuple(view.inverse.shape)} {view.inverse.dtype}")
    if view.offsets.ndim != 1 or view.offsets.numel() == 0 or view.offsets.dtype != torch.int64:
        raise ValueError(f"offsets must be [F * B + 1] int64; got {tuple(view.offsets.shape)} {view.offsets.dtype}")
    bags = view.offsets.numel() - 1
    if bags and (view.stride < 1 or bags % view.stride):
        raise ValueError(f"stride must divide the number of bags; got stride {view.stride} and {bags} bags")
    want = (view.inverse.numel() if view.per_position else bags, dim)
    if view.grad is None or tuple(view.grad.shape) != want or view.grad.dtype != torch.float32:
        got = None if view.grad is None else (tuple(view.grad.shape), view.grad.dtype)
        raise ValueError(f"grad must be {want} float32; got {got}")
    num_positions = view.inverse.numel()
    if view.factors is not None and (view.factors.shape != (num_positions,) or view.factors.dtype != torch.float32):
        raise ValueError(
            f"factors must be [{num_positions}] float32; got {tuple(view.factors.shape)} {view.factors.dtype}"
        )
    check_offsets(view.offsets, num_positions)
    check_range("inverse", view.inverse, -1, num_rows - 1)


@njit
def _count_loop(features, low, high, counts):
    """Count the contributions of samples low .. high - 1 per row."""
    for f in range(features.shape[0]):
        inverse, is_wide = features[f, 0], features[f, 1] != 0
        first, last = load_int64(features[f, 2] + 8 * low), load_int64(features[f, 2] + 8 * high)
        for p in range(first, last):
            u = load_int64(inverse + 8 * p) if is_wide else np.int64(load_int32(inverse + 4 * p))
            if u >= 0:
                counts[u] += 1


@njit
def _start_loop(cursors, starts):
    """Turn counts [T, U] of T consecutive parts into each part's first free place, and starts [U + 1]."""
    place = 0
    for u in range(cursors.shape[1]):
        starts[u] = place
        for part in range(cursors.shape[0]):
            count = cursors[part, u]
            cursors[part, u] = place
            place += count
    starts[cursors.shape[1]] = place


@njit
def _list_loop(features, low, high, cursor, sources, factors):
    """Put the contributions of samples low .. high - 1 into their rows' lists, in fold order."""
    for sample in range(low, high):
        for f in range(features.shape[0]):
            inverse, is_wide, factor_at = features[f, 0], features[f, 1] != 0, features[f, 6]
            grad, grad_step, per_position = features[f, 3], features[f, 4], features[f, 5] != 0
            offset = features[f, 2] + 8 * sample
            for p in range(load_int64(offset), load_int64(offset + 8)):
                u = load_int64(inverse + 8 * p) if is_wide else np.int64(load_int32(inverse + 4 * p))
                if u < 0:
                    continue
                place = cursor[u]
                cursor[u] = place + 1
                sources[place] = grad + (p if per_position else sample) * grad_step
                if factors.size != 0:
                    factors[place] = load_float32(factor_at + 4 * p) if factor_at != 0 else np.float32(1.0)


@njit
def fetch_source(contribution, sources, dim):
    """Ask for the gradient row of a contribution, which may lie SOURCES_AHEAD past the last; sources is an address."""
    ahead = load_int64(sources + 8 * contribution)
    for line in range(0, 4 * dim, 64):
        prefetch(ahead + line)


@njit
def fold_row(first, last, sources, factors, total, dim):
    """Put the left fold of contributions first .. last - 1, at least one, into floats `total` [dim].

    All but counts are addresses. Gradient rows are fetched some contributions ahead, into the lists of the rows that follow.
    """
    fold_rows(
        sources + 8 * first, factors + 4 * first if factors != 0 else 0, last - first, total, dim, False, SOURCES_AHEAD
    )
