"""Reorder, join and cut the bags of jagged tensors: copies of runs of rows.

    packed[offsets[r] + i] = values[starts[r] + i]     0 <= i < offsets[r + 1] - offsets[r]
    permute_bags: bag b of the result is the old bag order[b]
    concat_bags: bag b of the result is bag b of the first tensor, then bag b of the second;  split_bags cuts it again

gather_runs reads runs that lie apart, scatter_runs writes them; each is the gradient of the other, as concat and split are.
Runs of one call must not overlap. Offsets are [R + 1] int64 or int32, from 0, and trusted. Cost: one read and one write
per value; on a GPU one launch per op (two for concat and split).
"""

from itertools import pairwise

import torch
from torch import Tensor

from recis_kernels import jagged_triton
from recis_kernels.contents import check_distinct, check_offsets, check_range, check_runs
from recis_kernels.dispatch import Impl, choose
from recis_kernels.jagged import bag_parts, check_offsets_form, is_traced, lengths_to_offsets, on_host
from recis_kernels.jagged_copy import reorder_offsets, runs_from_packed, runs_to_packed
from recis_kernels.threads import run_parts


def gather_runs(values: Tensor, starts: Tensor, offsets: Tensor, num_taken: int, *, impl: Impl = "auto") -> Tensor:
    """Return the runs values[starts[r] : starts[r] + size of r] one after another, [num_taken, ...].

    Args:
        values: [L, ...] of any dtype. Differentiable.
        starts: int64 [R].
        offsets: [R + 1] of the result's runs; offsets[R] = num_taken.

    Raises:
        ValueError: starts is not int64 [R], or offsets are malformed.
    """
    _check_runs(starts, offsets, num_taken, values.shape[0])
    if impl == "reference":  # autograd's own gradient, not the node's
        return torch.cat([values[:0], *(values[one] for one in _runs(starts, offsets))])
    return (_gather_op if is_traced(values) else _gather)(values, starts, offsets, num_taken, impl)


def scatter_runs(packed: Tensor, starts: Tensor, offsets: Tensor, num_rows: int, *, impl: Impl = "auto") -> Tensor:
    """Return [num_rows, ...]: zeros, but run r = packed[offsets[r]:offsets[r + 1]] at starts[r]. As gather_runs else."""
    _check_runs(starts, offsets, packed.shape[0], num_rows)
    if impl == "reference":
        return _scatter_reference(packed, starts, offsets, num_rows)
    return (_scatter_op if is_traced(packed) else _scatter)(packed, starts, offsets, num_rows, impl)


def permute_bags(values: Tensor, offsets: Tensor, order: Tensor, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """Return (values [L, ...], offsets [B + 1]) with bag b = the old bag order[b]; order [B] is a permutation, int64.

    Differentiable in values.

    Raises:
        ValueError: order is not int64 [B] or (seen on the CPU only) no permutation, or offsets are malformed.
    """
    check_offsets_form(offsets)
    if order.dtype != torch.int64 or order.shape != (offsets.shape[0] - 1,):
        raise ValueError(f"order must be int64 [{offsets.shape[0] - 1}]; got {tuple(order.shape)} {order.dtype}")
    check_offsets(offsets, values.shape[0], whole=True)
    check_range("order", order, 0, order.shape[0] - 1)
    check_distinct("order", order)
    if on_host(offsets):
        new_offsets, starts = torch.empty_like(offsets), torch.empty(order.shape, dtype=torch.int64)
        if not reorder_offsets(offsets.numpy(), order.numpy(), new_offsets.numpy(), starts.numpy()):
            raise ValueError(f"order must hold each of 0 to {order.shape[0] - 1} once; got {order.tolist()[:8]}")
    else:
        new_offsets = lengths_to_offsets(offsets.diff().index_select(0, order))
        starts = offsets[:-1].index_select(0, order).to(torch.int64)
    return gather_runs(values, starts, new_offsets, values.shape[0], impl=impl), new_offsets


def concat_bags(
    first: Tensor, first_offsets: Tensor, second: Tensor, second_offsets: Tensor, *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Return (values, offsets) whose bag b is bag b of first [L, ...] followed by bag b of second [M, ...].

    Differentiable in first and second.

    Raises:
        ValueError: the numbers of bags, the row shapes or the dtypes differ, or offsets are malformed.
    """
    _check_pair(first_offsets, second_offsets)
    if first.shape[1:] != second.shape[1:] or first.dtype != second.dtype:
        raise ValueError(
            f"both values must have rows of one shape and dtype; got {tuple(first.shape)} {first.dtype} "
            f"and {tuple(second.shape)} {second.dtype}"
        )
    check_offsets(first_offsets, first.shape[0], whole=True, name="first_offsets")
    check_offsets(second_offsets, second.shape[0], whole=True, name="second_offsets")
    if impl == "reference":
        pairs = zip(_bags(first, first_offsets), _bags(second, second_offsets), strict=True)
        return torch.cat([first[:0], *(bag for pair in pairs for bag in pair)]), first_offsets + second_offsets
    run = _concat_op if is_traced(first, second) else _concat
    return run(first, first_offsets, second, second_offsets, impl), first_offsets + second_offsets


def split_bags(
    values: Tensor, first_offsets: Tensor, second_offsets: Tensor, num_first: int, *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Return the values (first [num_first, ...], second) that concat_bags joined; first_offsets ends at num_first.

    Differentiable in values.

    Raises:
        ValueError: the numbers of bags differ, num_first is not in [0, L], or offsets are malformed.
    """
    _check_pair(first_offsets, second_offsets)
    if not 0 <= num_first <= values.shape[0]:
        raise ValueError(f"num_first must be in [0, {values.shape[0]}]; got {num_first}")
    check_offsets(first_offsets, num_first, whole=True, name="first_offsets")
    check_offsets(second_offsets, values.shape[0] - num_first, whole=True, name="second_offsets")
    if impl == "reference":
        bags, sizes = _bags(values, first_offsets + second_offsets), first_offsets.diff().tolist()
        heads = [bag[:size] for bag, size in zip(bags, sizes, strict=True)]
        tails = [bag[size:] for bag, size in zip(bags, sizes, strict=True)]
        return torch.cat([values[:0], *heads]), torch.cat([values[:0], *tails])
    return (_split_op if is_traced(values) else _split)(values, first_offsets, second_offsets, num_first, impl)


def _check_runs(starts: Tensor, offsets: Tensor, num_packed: int, num_rows: int) -> None:
    check_offsets_form(offsets)
    if starts.dtype != torch.int64 or starts.shape != (offsets.numel() - 1,):
        raise ValueError(f"starts must be int64 [{offsets.numel() - 1}]; got {tuple(starts.shape)} {starts.dtype}")
    check_offsets(offsets, num_packed, whole=True)
    check_runs(starts, offsets, num_rows)


def _check_pair(first_offsets: Tensor, second_offsets: Tensor) -> None:
    check_offsets_form(first_offsets)
    check_offsets_form(second_offsets)
    if first_offsets.numel() != second_offsets.numel():
        raise ValueError(
            f"both must have the same bags; got {first_offsets.numel() - 1} and {second_offsets.numel() - 1}"
        )


# ---- nodes of torch.compile


def _copy(packed: Tensor, other: Tensor, starts: Tensor, offsets: Tensor, impl: str, *, to_packed: bool) -> None:
    version = choose(impl, packed, triton=jagged_triton.copy_runs, numba=_copy_numba)  # type: ignore[arg-type]
    version(packed, other, starts, offsets, to_packed=to_packed)


def _gather(values: Tensor, starts: Tensor, offsets: Tensor, num_taken: int, impl: str) -> Tensor:
    out = values.new_empty((num_taken, *values.shape[1:]))
    _copy(out, values.detach().contiguous(), starts, offsets, impl, to_packed=True)
    return out


def _scatter(packed: Tensor, starts: Tensor, offsets: Tensor, num_rows: int, impl: str) -> Tensor:
    out = packed.new_zeros((num_rows, *packed.shape[1:]))
    _copy(packed.detach().contiguous(), out, starts, offsets, impl, to_packed=False)
    return out


def _concat(first: Tensor, first_offsets: Tensor, second: Tensor, second_offsets: Tensor, impl: str) -> Tensor:
    out = first.new_empty((first.shape[0] + second.shape[0], *first.shape[1:]))
    first_starts, second_starts = _pair_starts(first_offsets, second_offsets)
    _copy(first.detach().contiguous(), out, first_starts, first_offsets, impl, to_packed=False)
    _copy(second.detach().contiguous(), out, second_starts, second_offsets, impl, to_packed=False)
    return out


def _split(
    values: Tensor, first_offsets: Tensor, second_offsets: Tensor, num_first: int, impl: str
) -> tuple[Tensor, Tensor]:
    source = values.detach().contiguous()
    first = values.new_empty((num_first, *values.shape[1:]))
    second = values.new_empty((values.shape[0] - num_first, *values.shape[1:]))
    first_starts, second_starts = _pair_starts(first_offsets, second_offsets)
    _copy(first, source, first_starts, first_offsets, impl, to_packed=True)
    _copy(second, source, second_starts, second_offsets, impl, to_packed=True)
    return first, second


def _pair_starts(first_offsets: Tensor, second_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the parts of each joined bag start, int64 [B] each."""
    joined = first_offsets[:-1] + second_offsets[:-1]
    return joined.to(torch.int64), (first_offsets[1:] + second_offsets[:-1]).to(torch.int64)


_gather_op = torch.library.custom_op("recis::gather_runs", _gather, mutates_args=())
_scatter_op = torch.library.custom_op("recis::scatter_runs", _scatter, mutates_args=())
_concat_op = torch.library.custom_op("recis::concat_bags", _concat, mutates_args=())
_split_op = torch.library.custom_op("recis::split_bags", _split, mutates_args=())


@_gather_op.register_fake
def _(values, starts, offsets, num_taken, impl):
    return values.new_empty((num_taken, *values.shape[1:]))


@_scatter_op.register_fake
def _(packed, starts, offsets, num_rows, impl):
    return packed.new_empty((num_rows, *packed.shape[1:]))


@_concat_op.register_fake
def _(first, first_offsets, second, second_offsets, impl):
    return first.new_empty((first.shape[0] + second.shape[0], *first.shape[1:]))


@_split_op.register_fake
def _(values, first_offsets, second_offsets, num_first, impl):
    rest = values.shape[1:]
    return values.new_empty((num_first, *rest)), values.new_empty((values.shape[0] - num_first, *rest))


def _gather_setup(ctx, inputs, output) -> None:
    values, starts, offsets, _, ctx.impl = inputs
    ctx.save_for_backward(starts, offsets)
    ctx.num_rows = values.shape[0]


def _gather_backward(ctx, grad):
    return _scatter_op(grad, *ctx.saved_tensors, ctx.num_rows, ctx.impl), None, None, None, None


def _scatter_setup(ctx, inputs, output) -> None:
    packed, starts, offsets, _, ctx.impl = inputs
    ctx.save_for_backward(starts, offsets)
    ctx.num_rows = packed.shape[0]


def _scatter_backward(ctx, grad):
    return _gather_op(grad, *ctx.saved_tensors, ctx.num_rows, ctx.impl), None, None, None, None


def _concat_setup(ctx, inputs, output) -> None:
    first, first_offsets, _, second_offsets, ctx.impl = inputs
    ctx.save_for_backward(first_offsets, second_offsets)
    ctx.num_first = first.shape[0]


def _concat_backward(ctx, grad):
    first, second = _split_op(grad, *ctx.saved_tensors, ctx.num_first, ctx.impl)
    return first, None, second, None, None


def _split_setup(ctx, inputs, output) -> None:
    _, first_offsets, second_offsets, _, ctx.impl = inputs
    ctx.save_for_backward(first_offsets, second_offsets)


def _split_backward(ctx, first_grad, second_grad):
    first_offsets, second_offsets = ctx.saved_tensors
    return _concat_op(first_grad, first_offsets, second_grad, second_offsets, ctx.impl), None, None, None, None


_gather_op.register_autograd(_gather_backward, setup_context=_gather_setup)
_scatter_op.register_autograd(_scatter_backward, setup_context=_scatter_setup)
_concat_op.register_autograd(_concat_backward, setup_context=_concat_setup)
_split_op.register_autograd(_split_backward, setup_context=_split_setup)


# ---- reference: slices, with torch's own gradients


def _runs(starts: Tensor, offsets: Tensor) -> list[slice]:
    sizes = offsets.diff().tolist()
    return [slice(start, start + size) for start, size in zip(starts.tolist(), sizes, strict=True)]


def _bags(values: Tensor, offsets: Tensor) -> list[Tensor]:
    return [values[start:stop] for start, stop in pairwise(offsets.tolist())]


def _scatter_reference(packed: Tensor, starts: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
    out = packed.new_zeros((num_rows, *packed.shape[1:]))
    for place, bag in zip(_runs(starts, offsets), _bags(packed, offsets), strict=True):
        out[place] = bag
    return out


# ---- numba


def _copy_numba(packed: Tensor, other: Tensor, starts: Tensor, offsets: Tensor, *, to_packed: bool) -> None:
    if packed.numel() == 0:
        return
    num_bytes = packed.numel() * packed.element_size()
    row_bytes = num_bytes // packed.shape[0]
    arguments = packed.data_ptr(), other.data_ptr(), starts.numpy(), offsets.numpy(), row_bytes
    loop = runs_to_packed if to_packed else runs_from_packed
    run_parts(lambda start, stop: loop(*arguments, start, stop), bag_parts(starts.shape[0], num_bytes))
