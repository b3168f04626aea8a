"""Reduce the rows of each bag of a jagged tensor: sum, mean, max and softmax, with their gradients.

    bag b is values[offsets[b]:offsets[b + 1]], rows of D numbers; each of the D columns is reduced by itself
    sum, mean, max: [L, D] -> [B, D];   softmax: [L, D] -> [L, D], exp(v - max of bag) / sum over the bag

An empty bag gives zeros and gets no gradient. Of equal maxima the first takes the gradient. Sums are in fp32 (fp64 for
fp64 values) by a left fold in row order, so results do not depend on the number of threads; results have values.dtype.
Every row is read once per pass: the cost is memory traffic. What offsets holds is trusted.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from recis_kernels.dispatch import Impl, choose, njit
from recis_kernels.jagged import bag_of_value
from recis_kernels.threads import run_parts, split


def segment_sum(values: Tensor, offsets: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Sum values [L, D] per bag of offsets [B + 1] (int64, from 0 to L) into [B, D]. Differentiable in values.

    Raises:
        ValueError: values is not floating point [L, D], or offsets is not a non-empty 1-D int64 tensor.
    """
    _check(values, offsets)
    return choose(impl, values, numba=_sum_op, torch=_sum_torch, reference=_sum_reference)(values, offsets)


def segment_mean(values: Tensor, offsets: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Average values [L, D] per bag into [B, D]: the sum divided once by the bag size. As segment_sum otherwise."""
    _check(values, offsets)
    return choose(impl, values, numba=_mean_numba, torch=_mean_torch, reference=_mean_reference)(values, offsets)


def segment_max(values: Tensor, offsets: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Largest of values [L, D] per bag and column, [B, D]; NaN wins. As segment_sum otherwise."""
    _check(values, offsets)
    return choose(impl, values, numba=_max_numba, torch=_max_torch, reference=_max_reference)(values, offsets)


def segment_softmax(values: Tensor, offsets: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Softmax of values [L, D] over the rows of each bag, per column, [L, D]. As segment_sum otherwise."""
    _check(values, offsets)
    version = choose(impl, values, numba=_softmax_op, torch=_softmax_torch, reference=_softmax_reference)
    return version(values, offsets)


def _check(values: Tensor, offsets: Tensor) -> None:
    if values.ndim != 2 or not values.is_floating_point():
        raise ValueError(f"values must be floating point [L, D]; got {tuple(values.shape)} {values.dtype}")
    if offsets.ndim != 1 or offsets.numel() == 0 or offsets.dtype != torch.int64:
        raise ValueError(f"offsets must be [B + 1] int64; got {tuple(offsets.shape)} {offsets.dtype}")


# ---- reference: float64, one bag at a time, torch's own gradients


def _per_bag(values: Tensor, offsets: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    empty = values[:0].double().sum(0)  # zeros that autograd still knows
    bags = [reduce(values[lo:hi].double()) if hi > lo else empty for lo, hi in pairwise(offsets.tolist())]
    return torch.stack(bags).to(values.dtype) if bags else values[:0]


def _sum_reference(values: Tensor, offsets: Tensor) -> Tensor:
    return _per_bag(values, offsets, lambda bag: bag.sum(0))


def _mean_reference(values: Tensor, offsets: Tensor) -> Tensor:
    return _per_bag(values, offsets, lambda bag: bag.mean(0))


def _max_reference(values: Tensor, offsets: Tensor) -> Tensor:
    return _per_bag(values, offsets, lambda bag: bag.max(0).values)


def _softmax_reference(values: Tensor, offsets: Tensor) -> Tensor:
    bags = [values[lo:hi].double().softmax(0).to(values.dtype) for lo, hi in pairwise(offsets.tolist())]
    return torch.cat([values[:0], *bags])


# ---- torch: any device


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _sum_torch(values: Tensor, offsets: Tensor) -> Tensor:
    bag = bag_of_value(offsets, values.shape[0])
    wide = _wide(values)
    return wide.new_zeros(offsets.numel() - 1, values.shape[1]).index_add(0, bag, wide).to(values.dtype)


def _mean_torch(values: Tensor, offsets: Tensor) -> Tensor:
    sums = _sum_torch(_wide(values), offsets)
    return (sums / offsets.diff().clamp(min=1)[:, None]).to(values.dtype)


def _max_torch(values: Tensor, offsets: Tensor) -> Tensor:
    best = _bag_max(values.detach(), offsets)
    num_rows = values.shape[0]
    bag = bag_of_value(offsets, num_rows)
    row = torch.arange(num_rows, device=values.device)[:, None].expand_as(values)
    picked = best.index_select(0, bag)
    is_best = (values.detach() == picked) | (picked.isnan() & values.detach().isnan())
    first = torch.where(is_best, row, num_rows)
    index = bag[:, None].expand_as(values)
    argmax = row.new_full(best.shape, num_rows).scatter_reduce(0, index, first, "amin")
    padded = torch.cat([values, values.new_zeros(1, values.shape[1])])  # where an empty bag points
    return padded.gather(0, argmax)


def _bag_max(values: Tensor, offsets: Tensor) -> Tensor:
    bag = bag_of_value(offsets, values.shape[0])[:, None].expand_as(values)
    out = values.new_full((offsets.numel() - 1, values.shape[1]), -torch.inf)
    return out.scatter_reduce(0, bag, values, "amax")


def _softmax_torch(values: Tensor, offsets: Tensor) -> Tensor:
    bag = bag_of_value(offsets, values.shape[0])
    wide = _wide(values)
    top = _bag_max(wide.detach(), offsets).index_select(0, bag)
    power = (wide - top).exp()
    total = _sum_torch(power, offsets).index_select(0, bag)
    return (power / total).to(values.dtype)


# ---- numba: one loop over the bags, each thread a share of them; nodes of torch.compile and export


@torch.library.custom_op("recis::segment_sum", mutates_args=(), device_types="cpu")
def _sum_op(values: Tensor, offsets: Tensor) -> Tensor:
    wide = _wide(values).detach().contiguous()
    out = torch.zeros(offsets.numel() - 1, values.shape[1], dtype=wide.dtype)
    source, ends, target = wide.numpy(), offsets.numpy(), out.numpy()
    run_parts(lambda start, stop: _sum_loop(source, ends, target, start, stop), _bag_parts(values, offsets))
    return out.to(values.dtype)


@torch.library.custom_op("recis::segment_argmax", mutates_args=(), device_types="cpu")
def _argmax_op(values: Tensor, offsets: Tensor) -> Tensor:
    """Return row numbers [B, D] of the maxima; L for an empty bag."""
    wide = _wide(values).detach().contiguous()
    out = torch.full((offsets.numel() - 1, values.shape[1]), values.shape[0], dtype=torch.int64)
    source, ends, target = wide.numpy(), offsets.numpy(), out.numpy()
    run_parts(lambda start, stop: _argmax_loop(source, ends, target, start, stop), _bag_parts(values, offsets))
    return out


@torch.library.custom_op("recis::segment_softmax", mutates_args=(), device_types="cpu")
def _softmax_op(values: Tensor, offsets: Tensor) -> Tensor:
    wide = _wide(values).detach().contiguous()
    out = torch.empty_like(wide)
    source, ends, target = wide.numpy(), offsets.numpy(), out.numpy()
    run_parts(lambda start, stop: _softmax_loop(source, ends, target, start, stop), _bag_parts(values, offsets))
    return out.to(values.dtype)


@torch.library.custom_op("recis::segment_softmax_grad", mutates_args=(), device_types="cpu")
def _softmax_grad_op(softmax: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    wide, wide_grad = _wide(softmax).contiguous(), _wide(grad).contiguous()
    out = torch.empty_like(wide)
    arrays = wide.numpy(), wide_grad.numpy(), offsets.numpy(), out.numpy()
    run_parts(lambda start, stop: _softmax_grad_loop(*arrays, start, stop), _bag_parts(softmax, offsets))
    return out.to(softmax.dtype)


def _mean_numba(values: Tensor, offsets: Tensor) -> Tensor:
    sums = _sum_op(_wide(values), offsets)
    return (sums / offsets.diff().clamp(min=1)[:, None]).to(values.dtype)


def _max_numba(values: Tensor, offsets: Tensor) -> Tensor:
    rows = _argmax_op(values, offsets)
    return torch.cat([values, values.new_zeros(1, values.shape[1])]).gather(0, rows)


def _bag_parts(values: Tensor, offsets: Tensor) -> list[tuple[int, int]]:
    num_bags = offsets.numel() - 1
    return split(num_bags, min_items=max(1, 32768 * num_bags // max(1, values.numel())))


@_sum_op.register_fake
def _(values, offsets):
    return values.new_empty(offsets.shape[0] - 1, values.shape[1])


@_argmax_op.register_fake
def _(values, offsets):
    return offsets.new_empty(offsets.shape[0] - 1, values.shape[1])


@_softmax_op.register_fake
def _(values, offsets):
    return torch.empty_like(values, memory_format=torch.contiguous_format)


@_softmax_grad_op.register_fake
def _(softmax, grad, offsets):
    return torch.empty_like(softmax, memory_format=torch.contiguous_format)


def _sum_setup(ctx, inputs, output) -> None:
    values, offsets = inputs
    ctx.save_for_backward(offsets)
    ctx.num_rows = values.shape[0]


def _sum_backward(ctx, grad):
    (offsets,) = ctx.saved_tensors
    return grad.repeat_interleave(offsets.diff(), dim=0, output_size=ctx.num_rows), None


def _softmax_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(output, inputs[1])


def _softmax_backward(ctx, grad):
    softmax, offsets = ctx.saved_tensors
    return _softmax_grad_op(softmax, grad, offsets), None


_sum_op.register_autograd(_sum_backward, setup_context=_sum_setup)
_softmax_op.register_autograd(_softmax_backward, setup_context=_softmax_setup)


@njit
def _sum_loop(source, ends, target, start, stop):
    dim = source.shape[1]
    for bag in range(start, stop):
        for row in range(ends[bag], ends[bag + 1]):
            for column in range(dim):
                target[bag, column] += source[row, column]


# rows outside, columns inside: memory is read in its order, and a small buffer holds what each column has so far


@njit
def _argmax_loop(source, ends, target, start, stop):
    dim = source.shape[1]
    tops = np.empty(dim, dtype=source.dtype)
    for bag in range(start, stop):
        first, last = ends[bag], ends[bag + 1]
        if first == last:
            continue
        for column in range(dim):
            tops[column] = source[first, column]
            target[bag, column] = first
        for row in range(first + 1, last):
            for column in range(dim):
                value, top = source[row, column], tops[column]
                if value > top or (value != value and top == top):
                    tops[column] = value
                    target[bag, column] = row


@njit
def _softmax_loop(source, ends, target, start, stop):
    dim = source.shape[1]
    tops, totals = np.empty(dim, dtype=source.dtype), np.empty(dim, dtype=source.dtype)
    for bag in range(start, stop):
        first, last = ends[bag], ends[bag + 1]
        tops[:] = -np.inf
        totals[:] = 0
        for row in range(first, last):
            for column in range(dim):
                tops[column] = max(tops[column], source[row, column])
        for row in range(first, last):
            for column in range(dim):
                power = np.exp(source[row, column] - tops[column])
                target[row, column] = power
                totals[column] += power
        for row in range(first, last):
            for column in range(dim):
                target[row, column] /= totals[column]


@njit
def _softmax_grad_loop(softmax, grad, ends, target, start, stop):
    """d v = y * (g - sum over the bag of y * g)."""
    dim = softmax.shape[1]
    dots = np.empty(dim, dtype=softmax.dtype)
    for bag in range(start, stop):
        first, last = ends[bag], ends[bag + 1]
        dots[:] = 0
        for row in range(first, last):
            for column in range(dim):
                dots[column] += softmax[row, column] * grad[row, column]
        for row in range(first, last):
            for column in range(dim):
                target[row, column] = softmax[row, column] * (grad[row, column] - dots[column])
