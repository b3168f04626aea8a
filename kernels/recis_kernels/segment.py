"""Reduce the rows of each bag of a jagged tensor: sum, mean, max and softmax, with their gradients.

    bag b is values[offsets[b]:offsets[b + 1]], rows of D numbers; each of the D columns is reduced by itself
    sum, mean, max: [L, D] -> [B, D];   softmax: [L, D] -> [L, D], exp(v - max of bag) / sum over the bag

An empty bag gives zeros and gets no gradient. Of equal maxima the first takes the gradient. Sums are in fp32 (fp64 for
fp64 values) by a left fold in row order, so results do not depend on the number of threads; results have values.dtype.
Every row is read once per pass (softmax reads three times): the cost is memory traffic. What offsets holds is trusted.
The CPU's loops are in segment_loops.py, the Triton versions in segment_triton.py.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from recis_kernels import segment_triton
from recis_kernels.contents import check_offsets
from recis_kernels.dispatch import Impl, choose
from recis_kernels.jagged import as_words, bag_of_value, is_traced
from recis_kernels.segment_loops import max_loop, place_loop, softmax_grad_loop, softmax_loop, spread_loop, sum_loop
from recis_kernels.threads import run_parts, split


def segment_sum(values: Tensor, offsets: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Sum values [L, D] per bag of offsets [B + 1] (int64, from 0 to L) into [B, D]. Differentiable in values.

    Raises:
        ValueError: values is not floating point [L, D], or offsets is not a non-empty 1-D int64 tensor.
    """
    _check(values, offsets)
    node = partial(_sum_op if is_traced(values) else _sum, impl=impl)
    return choose(impl, values, triton=node, numba=node, torch=_sum_torch, reference=_sum_reference)(values, offsets)


def segment_mean(values: Tensor, offsets: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Average values [L, D] per bag into [B, D]: the sum divided once by the bag size. As segment_sum otherwise."""
    _check(values, offsets)
    node = partial(_mean, impl=impl)
    return choose(impl, values, triton=node, numba=node, torch=_mean_torch, reference=_mean_reference)(values, offsets)


def segment_max(values: Tensor, offsets: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Largest of values [L, D] per bag and column, [B, D]; NaN wins. As segment_sum otherwise."""
    _check(values, offsets)
    node = partial(_max, impl=impl)
    return choose(impl, values, triton=node, numba=node, torch=_max_torch, reference=_max_reference)(values, offsets)


def segment_softmax(values: Tensor, offsets: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Softmax of values [L, D] over the rows of each bag, per column, [L, D]. As segment_sum otherwise."""
    _check(values, offsets)
    node = partial(_softmax_op if is_traced(values) else _softmax, impl=impl)
    version = choose(impl, values, triton=node, numba=node, torch=_softmax_torch, reference=_softmax_reference)
    return version(values, offsets)


def _check(values: Tensor, offsets: Tensor) -> None:
    if values.ndim != 2 or not values.is_floating_point():
        raise ValueError(f"values must be floating point [L, D]; got {tuple(values.shape)} {values.dtype}")
    if offsets.ndim != 1 or offsets.numel() == 0 or offsets.dtype != torch.int64:
        raise ValueError(f"offsets must be [B + 1] int64; got {tuple(offsets.shape)} {offsets.dtype}")
    check_offsets(offsets, values.shape[0], whole=True)


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


# ---- nodes of torch.compile and export; `impl` goes along, so that a gradient runs the version of its forward pass


def _sum(values: Tensor, offsets: Tensor, impl: str) -> Tensor:
    return choose(impl, values, triton=segment_triton.sum_bags, numba=_sum_numba)(values.detach(), offsets)  # type: ignore[arg-type]


def _spread(bags: Tensor, offsets: Tensor, num_rows: int, impl: str) -> Tensor:
    version = choose(impl, bags, triton=segment_triton.spread, numba=_spread_numba)  # type: ignore[arg-type]
    return version(bags.detach(), offsets, num_rows)


def _max_and_rows(values: Tensor, offsets: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return choose(impl, values, triton=segment_triton.max_bags, numba=_max_numba)(values.detach(), offsets)  # type: ignore[arg-type]


def _place(bags: Tensor, rows: Tensor, num_rows: int, impl: str) -> Tensor:
    version = choose(impl, bags, triton=segment_triton.place_at_rows, numba=_place_numba)  # type: ignore[arg-type]
    return version(bags.detach(), rows, num_rows)


def _softmax(values: Tensor, offsets: Tensor, impl: str) -> Tensor:
    return choose(impl, values, triton=segment_triton.softmax_bags, numba=_softmax_numba)(values.detach(), offsets)  # type: ignore[arg-type]


def _softmax_grad(softmax: Tensor, grad: Tensor, offsets: Tensor, impl: str) -> Tensor:
    version = choose(impl, softmax, triton=segment_triton.softmax_grad, numba=_softmax_grad_numba)  # type: ignore[arg-type]
    return version(softmax.detach(), grad.detach(), offsets)


def _mean(values: Tensor, offsets: Tensor, impl: str) -> Tensor:
    sums = (_sum_op if is_traced(values) else _sum)(_wide(values), offsets, impl)
    return (sums / offsets.diff().clamp(min=1)[:, None]).to(values.dtype)


def _max(values: Tensor, offsets: Tensor, impl: str) -> Tensor:
    return (_max_op if is_traced(values) else _max_and_rows)(values, offsets, impl)[0]


_sum_op = torch.library.custom_op("recis::segment_sum", _sum, mutates_args=())
_spread_op = torch.library.custom_op("recis::segment_spread", _spread, mutates_args=())
_max_op = torch.library.custom_op("recis::segment_max", _max_and_rows, mutates_args=())
_place_op = torch.library.custom_op("recis::segment_place", _place, mutates_args=())
_softmax_op = torch.library.custom_op("recis::segment_softmax", _softmax, mutates_args=())
_softmax_grad_op = torch.library.custom_op("recis::segment_softmax_grad", _softmax_grad, mutates_args=())


@_sum_op.register_fake
def _(values, offsets, impl):
    return values.new_empty(offsets.shape[0] - 1, values.shape[1])


@_spread_op.register_fake
def _(bags, offsets, num_rows, impl):
    return bags.new_empty(num_rows, bags.shape[1])


@_max_op.register_fake
def _(values, offsets, impl):
    shape = offsets.shape[0] - 1, values.shape[1]
    return values.new_empty(shape), offsets.new_empty(shape)


@_place_op.register_fake
def _(bags, rows, num_rows, impl):
    return bags.new_empty(num_rows, bags.shape[1])


@_softmax_op.register_fake
def _(values, offsets, impl):
    return torch.empty_like(values, memory_format=torch.contiguous_format)


@_softmax_grad_op.register_fake
def _(softmax, grad, offsets, impl):
    return torch.empty_like(softmax, memory_format=torch.contiguous_format)


def _sum_setup(ctx, inputs, output) -> None:
    values, offsets, ctx.impl = inputs
    ctx.save_for_backward(offsets)
    ctx.num_rows = values.shape[0]


def _sum_backward(ctx, grad):
    return _spread_op(grad, *ctx.saved_tensors, ctx.num_rows, ctx.impl), None, None


def _spread_setup(ctx, inputs, output) -> None:
    _, offsets, _, ctx.impl = inputs
    ctx.save_for_backward(offsets)


def _spread_backward(ctx, grad):
    return _sum_op(grad, *ctx.saved_tensors, ctx.impl), None, None, None


def _max_setup(ctx, inputs, output) -> None:
    values, _, ctx.impl = inputs
    ctx.save_for_backward(output[1])
    ctx.num_rows = values.shape[0]


def _max_backward(ctx, grad, grad_rows):
    return _place_op(grad, *ctx.saved_tensors, ctx.num_rows, ctx.impl), None, None


def _softmax_setup(ctx, inputs, output) -> None:
    _, offsets, ctx.impl = inputs
    ctx.save_for_backward(output, offsets)


def _softmax_backward(ctx, grad):
    softmax, offsets = ctx.saved_tensors
    return _softmax_grad_op(softmax, grad, offsets, ctx.impl), None, None


_sum_op.register_autograd(_sum_backward, setup_context=_sum_setup)
_spread_op.register_autograd(_spread_backward, setup_context=_spread_setup)
_max_op.register_autograd(_max_backward, setup_context=_max_setup)
_softmax_op.register_autograd(_softmax_backward, setup_context=_softmax_setup)


# ---- numba: one loop over the bags, each thread a share of them


def _sum_numba(values: Tensor, offsets: Tensor) -> Tensor:
    wide = _wide(values).contiguous()
    out = wide.new_empty(offsets.numel() - 1, values.shape[1])
    source, ends, target = wide.numpy(), offsets.numpy(), out.numpy()
    run_parts(lambda start, stop: sum_loop(source, ends, target, start, stop), _bag_parts(values, offsets))
    return out.to(values.dtype)


def _spread_numba(bags: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
    out = bags.new_empty(num_rows, bags.shape[1])
    source, ends = as_words(bags).reshape(bags.shape), offsets.numpy()
    target = as_words(out).reshape(out.shape)
    run_parts(lambda start, stop: spread_loop(source, ends, target, start, stop), _bag_parts(out, offsets))
    return out


def _max_numba(values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    wide = _wide(values).contiguous()
    shape = offsets.numel() - 1, values.shape[1]
    out, rows = wide.new_empty(shape), offsets.new_empty(shape)
    arrays = wide.numpy(), offsets.numpy(), out.numpy(), rows.numpy()
    run_parts(lambda start, stop: max_loop(*arrays, start, stop), _bag_parts(values, offsets))
    return out.to(values.dtype), rows


def _place_numba(bags: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    out = bags.new_zeros(num_rows, bags.shape[1])
    place_loop(as_words(bags).reshape(bags.shape), rows.contiguous().numpy(), as_words(out).reshape(out.shape))
    return out


def _softmax_numba(values: Tensor, offsets: Tensor) -> Tensor:
    wide = _wide(values).contiguous()
    out = torch.empty_like(wide)
    source, ends, target = wide.numpy(), offsets.numpy(), out.numpy()
    run_parts(lambda start, stop: softmax_loop(source, ends, target, start, stop), _bag_parts(values, offsets))
    return out.to(values.dtype)


def _softmax_grad_numba(softmax: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    wide, wide_grad = _wide(softmax).contiguous(), _wide(grad).contiguous()
    out = torch.empty_like(wide)
    arrays = wide.numpy(), wide_grad.numpy(), offsets.numpy(), out.numpy()
    run_parts(lambda start, stop: softmax_grad_loop(*arrays, start, stop), _bag_parts(softmax, offsets))
    return out.to(softmax.dtype)


def _bag_parts(values: Tensor, offsets: Tensor) -> list[tuple[int, int]]:
    num_bags = offsets.numel() - 1
    return split(num_bags, min_items=max(1, 32768 * num_bags // max(1, values.numel())))
