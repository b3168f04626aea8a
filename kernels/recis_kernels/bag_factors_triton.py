"""Factors of means and their gradient on a GPU: a lane per bag, sums in float64 in ascending position. See bag_factors.py.

A lane walks its own bag twice; neighbouring bags lie side by side, so a cache line serves several steps. 12 bytes a position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recis_kernels.dispatch import jit, launch, tl

_BAGS = 128  # a program's lanes


def mean_factors(weights: Tensor, offsets: Tensor, mean: Tensor) -> Tensor:
    """Return the factors [L] of weights [L] float32; all contiguous, mean bool [F]."""
    factors = weights.clone()
    _launch(_mean_factors_kernel, offsets, mean, weights, factors)
    return factors


def mean_factor_grads(weights: Tensor, offsets: Tensor, mean: Tensor, factors: Tensor, grad: Tensor) -> Tensor:
    """Return d loss / d weights [L] from grad = d loss / d factors [L]; all contiguous."""
    pulled = grad.clone()
    _launch(_mean_factor_grads_kernel, offsets, mean, weights, factors, pulled)
    return pulled


def _launch(kernel, offsets: Tensor, mean: Tensor, *tensors: Tensor) -> None:
    num_bags = offsets.numel() - 1
    stride = num_bags // max(mean.numel(), 1)
    grid = (-(-num_bags // _BAGS),)
    launch(kernel, grid, offsets, mean.view(torch.uint8), *tensors, num_bags, stride, BLOCK=_BAGS, num_warps=4)


@jit
def _bags(offsets_ptr, mean_ptr, num_bags, stride, BLOCK: tl.constexpr):
    """Return (first, last) position of the program's bags; last = first where factors stay as they are."""
    bag = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = bag < num_bags
    exists = exists & (tl.load(mean_ptr + bag // stride, mask=exists, other=0) != 0)
    first = tl.load(offsets_ptr + bag, mask=exists, other=0)
    return first, tl.load(offsets_ptr + bag + 1, mask=exists, other=0)


@jit
def _mean_factors_kernel(offsets_ptr, mean_ptr, weights_ptr, factors_ptr, num_bags, stride, BLOCK: tl.constexpr):
    first, last = _bags(offsets_ptr, mean_ptr, num_bags, stride, BLOCK)
    longest = tl.max(last - first, axis=0)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for done in range(longest):  # pyright: ignore[reportArgumentType]
        p = first + done
        total = total + tl.load(weights_ptr + p, mask=p < last, other=0.0).to(tl.float64)
    divisor = tl.where(total == 0.0, 1.0, total)
    for done in range(longest):  # pyright: ignore[reportArgumentType]
        p = first + done
        weight = tl.load(weights_ptr + p, mask=p < last, other=0.0).to(tl.float64)
        factor = tl.where(total == 0.0, 0.0, weight / divisor)
        tl.store(factors_ptr + p, factor.to(tl.float32), mask=p < last)


@jit
def _mean_factor_grads_kernel(
    offsets_ptr, mean_ptr, weights_ptr, factors_ptr, grads_ptr, num_bags, stride, BLOCK: tl.constexpr
):
    first, last = _bags(offsets_ptr, mean_ptr, num_bags, stride, BLOCK)
    longest = tl.max(last - first, axis=0)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    pulled = tl.zeros([BLOCK], dtype=tl.float64)
    for done in range(longest):  # pyright: ignore[reportArgumentType]
        p = first + done
        total = total + tl.load(weights_ptr + p, mask=p < last, other=0.0).to(tl.float64)
        factor = tl.load(factors_ptr + p, mask=p < last, other=0.0).to(tl.float64)
        pulled = pulled + factor * tl.load(grads_ptr + p, mask=p < last, other=0.0).to(tl.float64)
    divisor = tl.where(total == 0.0, 1.0, total)
    for done in range(longest):  # pyright: ignore[reportArgumentType]
        p = first + done
        grad = tl.load(grads_ptr + p, mask=p < last, other=0.0).to(tl.float64)
        pulled_here = tl.where(total == 0.0, 0.0, (grad - pulled) / divisor)
        tl.store(grads_ptr + p, pulled_here.to(tl.float32), mask=p < last)
