"""Turn a lookup's rows into what a model sees, and keep the gradient that comes back.

    pool      out[bag] = sum over positions p of the bag of factors[p] * row of p
    gather    out[p] = row of p
    tile      out[b, k] = row of the k-th position of bag b, zeros past its end, k < n

Backward changes no row: it puts the upstream gradient into the lookup (`RowGrad`), and the optimizer reads it from there. A
gradient for the factors, that is for feature weights, is returned as usual.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recis.embedding.lookups import StoreLookup
from recis_kernels.columns import to_device
from recis_kernels.embedding_bag import embedding_bag, factor_grads, row_gather, tile_positions
from recis_kernels.row_grads import RowGrad


def pool(found: StoreLookup, offsets: Tensor, stride: int, factors: Tensor | None) -> Tensor:
    """Return bags of the lookup's first positions, [N, D] float32.

    Args:
        offsets: [N + 1] int64, key-major with `stride` samples.
        factors: [L] float32 or None for ones; differentiable.
    """
    fixed = None if factors is None else factors.detach()
    view = _view(found, found.inverse, offsets, stride, factors=fixed)
    return _Rows.apply(_anchor(found), factors, found, view)


def gather(found: StoreLookup, offsets: Tensor | None = None, stride: int = 1) -> Tensor:
    """Return the row of each position, [L, D] float32; offsets None: all positions are one bag."""
    if offsets is None:
        offsets = to_device(torch.tensor([0, found.inverse.numel()]), found.inverse.device)
    view = _view(found, found.inverse, offsets, stride, per_position=True)
    return _Rows.apply(_anchor(found), None, found, view)


def tile(found: StoreLookup, offsets: Tensor, num_kept: int, weights: Tensor | None) -> Tensor:
    """Return the first num_kept rows of each bag, [B, num_kept, D] float32; weights [L] multiply them if given.

    Args:
        offsets: [B + 1] int64, positions of the lookup; they need not start at 0.
    """
    positions = tile_positions(offsets, num_kept)
    stride = offsets.numel() - 1
    present = positions >= 0
    inverse = torch.where(present, found.inverse[positions.clamp(min=0)] if found.inverse.numel() else positions, -1)
    bags = torch.arange(stride + 1, device=offsets.device) * num_kept
    view = _view(found, inverse, bags, stride, per_position=True)
    rows = _Rows.apply(_anchor(found), None, found, view)
    if weights is not None and weights.numel():
        rows = rows * torch.where(present, weights[positions.clamp(min=0)], 0)[:, None]
    return rows.view(stride, num_kept, rows.shape[1])


def _view(found: StoreLookup, inverse: Tensor, offsets: Tensor, stride: int, **kind: Any) -> RowGrad:
    """Return the view for these positions; a training lookup keeps it for the optimizer."""
    view = RowGrad(inverse=inverse, offsets=offsets, stride=stride, **kind)
    if found.grads is not None:
        view.micro_batch = found.store.micro_batch(found.source)
        found.grads.views.append(view)
    return view


def _anchor(found: StoreLookup) -> Tensor | None:
    """Return what makes autograd call backward although no input of ours is a parameter; None when not training."""
    return None if found.grads is None else torch.empty(0, requires_grad=True)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor | None, factors: Tensor | None, found: StoreLookup, view: RowGrad) -> Tensor:
        ctx.found, ctx.view = found, view
        blocks, rows = found.store.blocks, found.read_rows
        if view.per_position:
            return row_gather(blocks, rows, view.inverse)
        return embedding_bag(blocks, rows, view.inverse, view.offsets, view.factors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        found, view = ctx.found, ctx.view
        grad = grads[0].contiguous()
        of_factors = None
        if ctx.needs_input_grad[1]:
            of_factors = factor_grads(found.store.blocks, found.read_rows, view.inverse, view.offsets, grad)
        if found.grads is not None:
            if found.applied:
                raise RuntimeError(
                    "backward through a lookup whose step is over: an update has used its gradients, or end_step came "
                    "first; call backward before SparseOptimizer.step() and end_step, and look the batch up anew after"
                )
            view.add_grad(grad)
        return None, of_factors, None, None
