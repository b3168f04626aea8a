"""Move between the forms of a jagged tensor: lengths, offsets, flat values and padded rows.

    offsets[b] = lengths[0] + ... + lengths[b - 1]                      bag b is values[offsets[b]:offsets[b + 1]]
    padded[b, t] = values[offsets[b] + t] if t < lengths[b] else fill   longer bags keep their head

Lengths [B] and offsets [B + 1] are int64, or int32 and then stay int32. What they hold is trusted, as in every op here:
reading it would stall a GPU. Running sums are numpy's on the CPU and torch.cumsum elsewhere; bag numbers, padding and its
inverse are one pass each (jagged_triton.py on a GPU), one read and one write of each value. Each of padding and its
inverse is the gradient of the other. Reordering, joining and cutting bags: jagged_runs.py.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from recis_kernels import jagged_triton
from recis_kernels.contents import check_offsets, check_range
from recis_kernels.dispatch import Impl, choose, njit
from recis_kernels.jagged_copy import bags_to_padded, padded_to_bags, running_sums, short_running_sums
from recis_kernels.jagged_triton import words
from recis_kernels.threads import run_parts, split


def lengths_to_offsets(lengths: Tensor) -> Tensor:
    """Return the running sums [B + 1] of lengths [B], from 0, in the dtype of lengths."""
    _check_index(lengths, "lengths")
    check_range("lengths", lengths, 0, None)
    if on_host(lengths):
        lengths = lengths.contiguous()
        offsets = lengths.new_empty(lengths.shape[0] + 1)
        sums = running_sums if lengths.dtype == torch.int64 else short_running_sums
        sums(lengths.data_ptr(), lengths.shape[0], offsets.data_ptr())
        return offsets
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=lengths.dtype)])


def offsets_to_lengths(offsets: Tensor) -> Tensor:
    """Return the bag sizes [B] of offsets [B + 1]."""
    check_offsets_form(offsets)
    check_offsets(offsets, None)
    return offsets.diff()


def bag_of_value(offsets: Tensor, num_values: int, *, impl: Impl = "auto") -> Tensor:
    """Return the bag number of each of the num_values values, int64 [num_values]; offsets must end at num_values."""
    check_offsets_form(offsets)
    check_offsets(offsets, num_values, whole=True)
    return (_bags_op if torch.compiler.is_compiling() else _bags)(offsets, num_values, impl)


def merge_offsets(parts: Sequence[Tensor]) -> Tensor:
    """Return the offsets of the concatenated jagged tensors: (0, 2, 5) and (0, 3, 6) give (0, 2, 5, 8, 11).

    Raises:
        ValueError: there is no part, or a part is not [B + 1] int32 or int64.
    """
    if not parts:
        raise ValueError("merge_offsets needs at least one part; an empty batch has the offsets [0]")
    for number, part in enumerate(parts):
        check_offsets_form(part)
        check_offsets(part, None, whole=True, name=f"parts[{number}]")
    if len(parts) == 1:
        return parts[0]
    if all(on_host(part) for part in parts):
        return _merge_on_host(parts)
    return lengths_to_offsets(torch.cat([part.diff() for part in parts]))


def _merge_on_host(parts: Sequence[Tensor]) -> Tensor:
    dtype = torch.int64 if any(part.dtype == torch.int64 for part in parts) else torch.int32
    merged = torch.empty(sum(part.numel() - 1 for part in parts) + 1, dtype=dtype)
    target, at = merged.numpy(), 0
    target[0] = 0
    for part in parts:
        source = part.numpy()
        np.add(source[1:], target[at], out=target[at + 1 : at + source.size])
        at += source.size - 1
    return merged


def jagged_to_padded(
    values: Tensor, offsets: Tensor, max_length: int, *, fill: float = 0, impl: Impl = "auto"
) -> Tensor:
    """Return values [L] or [L, D] as rows [B, T] or [B, T, D], T = max_length; rows keep their first T values.

    Differentiable in values. `fill` stands where a bag has ended.

    Raises:
        ValueError: values is not 1-D or 2-D, offsets are malformed, or max_length is negative.
    """
    if values.ndim not in (1, 2):
        raise ValueError(f"values must be [L] or [L, D]; got shape {tuple(values.shape)}")
    check_offsets_form(offsets)
    check_offsets(offsets, None, whole=True)
    check_offsets(offsets, values.shape[0])  # values past the last bag are in no row
    if max_length < 0:
        raise ValueError(f"max_length must be at least 0; got {max_length}")
    if impl == "reference":  # autograd's own gradient, not the node's
        return _padded_reference(values, offsets, max_length, fill)
    run = _padded_op if is_traced(values) else _padded
    return run(values, offsets, max_length, float(fill), impl)


def padded_to_jagged(padded: Tensor, offsets: Tensor, num_values: int, *, impl: Impl = "auto") -> Tensor:
    """Return the values [L] or [L, D] of rows [B, T] or [B, T, D]: the inverse of jagged_to_padded.

    Bag b takes the first offsets[b + 1] - offsets[b] entries of row b; entries past T are 0. Differentiable in padded.
    """
    if padded.ndim not in (2, 3):
        raise ValueError(f"padded must be [B, T] or [B, T, D]; got shape {tuple(padded.shape)}")
    check_offsets_form(offsets)
    if offsets.numel() != padded.shape[0] + 1:
        raise ValueError(f"padded has {padded.shape[0]} rows, so offsets must be [{padded.shape[0] + 1}]")
    check_offsets(offsets, num_values, whole=True)
    if impl == "reference":
        return _flat_reference(padded, offsets, num_values)
    return (_flat_op if is_traced(padded) else _flat)(padded, offsets, num_values, impl)


def trimmed_lengths(padded: Tensor, invalid: float) -> Tensor:
    """Return per row of padded [B, T] or [B, T, D] the length without trailing `invalid` entries, int64 [B].

    An entry of a [B, T, D] tensor is invalid when all of its D numbers are.
    """
    valid = padded != invalid
    if padded.ndim == 3:
        valid = valid.any(dim=2)
    position = torch.arange(1, padded.shape[1] + 1, device=padded.device)
    if padded.shape[1] == 0:
        return torch.zeros(padded.shape[0], dtype=torch.int64, device=padded.device)
    return (valid * position).amax(dim=1)


def check_offsets_form(offsets: Tensor) -> None:
    """Raise ValueError unless offsets is a non-empty 1-D int32 or int64 tensor."""
    if offsets.ndim != 1 or offsets.numel() == 0 or offsets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"offsets must be [B + 1] int64 or int32; got {tuple(offsets.shape)} {offsets.dtype}")


def is_traced(*tensors: Tensor) -> bool:
    """Whether torch.compile, export or autograd must see a call: else it may skip its registered op, about 20 us."""
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def as_words(tensor: Tensor) -> np.ndarray:
    """Return a view of a contiguous CPU tensor as flat integers of its item size (numpy has no bf16)."""
    return words(tensor).numpy().reshape(-1)


def on_host(tensor: Tensor) -> bool:
    """Whether numpy may do the work: one thread is faster than waking OpenMP's for a batch's worth of offsets."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_index(lengths: Tensor, name: str) -> None:
    if lengths.ndim != 1 or lengths.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be [B] int64 or int32; got {tuple(lengths.shape)} {lengths.dtype}")


# ---- nodes of torch.compile


def _bags(offsets: Tensor, num_values: int, impl: str) -> Tensor:
    cpu = {"numba": _bags_numba, "torch": _bags_torch, "reference": _bags_reference}
    return choose(impl, offsets, triton=jagged_triton.bags_of_values, **cpu)(offsets, num_values)  # type: ignore[arg-type]


def _padded(values: Tensor, offsets: Tensor, max_length: int, fill: float, impl: str) -> Tensor:
    cpu = {"numba": _padded_numba, "torch": _padded_torch}
    return choose(impl, values, triton=jagged_triton.pad, **cpu)(values.detach(), offsets, max_length, fill)  # type: ignore[arg-type]


def _flat(padded: Tensor, offsets: Tensor, num_values: int, impl: str) -> Tensor:
    cpu = {"numba": _flat_numba, "torch": _flat_torch}
    return choose(impl, padded, triton=_flat_triton, **cpu)(padded.detach(), offsets, num_values)  # type: ignore[arg-type]


_bags_op = torch.library.custom_op("recis::bag_of_value", _bags, mutates_args=())
_padded_op = torch.library.custom_op("recis::jagged_to_padded", _padded, mutates_args=())
_flat_op = torch.library.custom_op("recis::padded_to_jagged", _flat, mutates_args=())


@_bags_op.register_fake
def _(offsets, num_values, impl):
    return offsets.new_empty(num_values, dtype=torch.int64)


@_padded_op.register_fake
def _(values, offsets, max_length, fill, impl):
    return values.new_empty((offsets.shape[0] - 1, max_length, *values.shape[1:]))


@_flat_op.register_fake
def _(padded, offsets, num_values, impl):
    return padded.new_empty((num_values, *padded.shape[2:]))


def _padded_setup(ctx, inputs, output) -> None:
    values, offsets, _, _, ctx.impl = inputs
    ctx.save_for_backward(offsets)
    ctx.num_values = values.shape[0]


def _padded_backward(ctx, grad):
    (offsets,) = ctx.saved_tensors
    return _flat_op(grad, offsets, ctx.num_values, ctx.impl), None, None, None, None


def _flat_setup(ctx, inputs, output) -> None:
    padded, offsets, _, ctx.impl = inputs
    ctx.save_for_backward(offsets)
    ctx.max_length = padded.shape[1]


def _flat_backward(ctx, grad):
    (offsets,) = ctx.saved_tensors
    return _padded_op(grad, offsets, ctx.max_length, 0.0, ctx.impl), None, None, None


# both directions are copies, so each is the gradient of the other; autograd itself would scatter-add
_padded_op.register_autograd(_padded_backward, setup_context=_padded_setup)
_flat_op.register_autograd(_flat_backward, setup_context=_flat_setup)


# ---- reference


def _bags_reference(offsets: Tensor, num_values: int) -> Tensor:
    ends = offsets.tolist()
    bags = [bag for bag in range(len(ends) - 1) for _ in range(ends[bag + 1] - ends[bag])]
    return torch.tensor(bags, dtype=torch.int64, device=offsets.device)


def _padded_reference(values: Tensor, offsets: Tensor, max_length: int, fill: float) -> Tensor:
    ends = offsets.tolist()
    out = values.new_full((len(ends) - 1, max_length, *values.shape[1:]), fill)
    for bag, start in enumerate(ends[:-1]):
        head = values[start : min(ends[bag + 1], start + max_length)]
        out[bag, : head.shape[0]] = head
    return out


def _flat_reference(padded: Tensor, offsets: Tensor, num_values: int) -> Tensor:
    ends = offsets.tolist()
    out = padded.new_zeros((num_values, *padded.shape[2:]))
    for bag, start in enumerate(ends[:-1]):
        size = min(ends[bag + 1] - start, padded.shape[1])
        out[start : start + size] = padded[bag, :size]
    return out


# ---- torch: any device


def _bags_torch(offsets: Tensor, num_values: int) -> Tensor:
    bags = torch.arange(offsets.numel() - 1, device=offsets.device)
    return bags.repeat_interleave(offsets.diff(), output_size=num_values)


def _padded_torch(values: Tensor, offsets: Tensor, max_length: int, fill: float) -> Tensor:
    shape = (offsets.numel() - 1, max_length, *values.shape[1:])
    if values.shape[0] == 0 or max_length == 0:
        return values.new_full(shape, fill)
    position = torch.arange(max_length, device=values.device)
    inside = position < offsets.diff()[:, None]
    source = torch.where(inside, offsets[:-1, None] + position, 0)
    rows = values.index_select(0, source.reshape(-1)).view(shape)
    return torch.where(inside.view(*inside.shape, *[1] * (values.ndim - 1)), rows, fill).to(values.dtype)


def _flat_torch(padded: Tensor, offsets: Tensor, num_values: int) -> Tensor:
    if padded.shape[0] == 0 or padded.shape[1] == 0:
        return padded.new_zeros((num_values, *padded.shape[2:]))
    place = torch.arange(num_values, dtype=offsets.dtype, device=padded.device)
    bag = torch.searchsorted(offsets[1:].contiguous(), place, right=True).clamp_(max=padded.shape[0] - 1)
    position = place - offsets[:-1].index_select(0, bag)
    inside = (position < padded.shape[1]) & (place < offsets[-1])  # gradients of values past the last bag are 0
    out = padded[bag, torch.where(inside, position, 0)]
    return torch.where(inside.view(-1, *[1] * (out.ndim - 1)), out, 0).to(padded.dtype)


# ---- Triton (the kernels are in jagged_triton.py)


def _flat_triton(padded: Tensor, offsets: Tensor, num_values: int) -> Tensor:
    out = padded.new_empty((num_values, *padded.shape[2:]))
    max_length = padded.shape[1]
    starts = torch.arange(padded.shape[0], device=padded.device) * max_length
    jagged_triton.copy_runs(out, padded.contiguous(), starts, offsets, to_packed=True, limit=max_length)
    return out


# ---- numba (the loops of copies are in jagged_copy.py)

_BYTES_PER_THREAD = 1 << 20  # one thread nearly fills the memory's bandwidth: a second is worth waking for much only


def bag_parts(num_bags: int, num_bytes: int) -> list[tuple[int, int]]:
    """Return the shares of the bags that threads copy, when all of them together hold num_bytes."""
    return split(num_bags, min_items=max(1, _BYTES_PER_THREAD * num_bags // max(1, num_bytes)))


def _bags_numba(offsets: Tensor, num_values: int) -> Tensor:
    out = torch.empty(num_values, dtype=torch.int64)
    ends, target = offsets.numpy(), out.numpy()
    parts = bag_parts(offsets.shape[0] - 1, 8 * num_values)
    run_parts(lambda start, stop: _fill_bags(ends, target, start, stop), parts)
    return out


def _padded_numba(values: Tensor, offsets: Tensor, max_length: int, fill: float) -> Tensor:
    num_bags = offsets.shape[0] - 1
    out = values.new_empty((num_bags, max_length, *values.shape[1:]))
    if out.numel() == 0:
        return out
    values = values.contiguous()  # kept by this name while the loops read it by address
    size, ends = out.element_size(), offsets.numpy()
    row_bytes = out.numel() // (num_bags * max_length) * size
    pattern = np.uint64(0)
    if fill != 0:
        pattern = words(torch.full((8 // size,), fill).to(values.dtype)).view(torch.uint8).numpy().view(np.uint64)[0]
    arguments = values.data_ptr(), out.data_ptr(), ends, row_bytes, max_length, pattern
    run_parts(lambda start, stop: bags_to_padded(*arguments, start, stop), bag_parts(num_bags, out.numel() * size))
    return out


def _flat_numba(padded: Tensor, offsets: Tensor, num_values: int) -> Tensor:
    out = padded.new_empty((num_values, *padded.shape[2:]))
    if out.numel() == 0:
        return out
    padded, ends = padded.contiguous(), offsets.numpy()
    if ends[-1] < num_values:
        out[int(ends[-1]) :] = 0  # gradients of values past the last bag
    row_bytes = out.numel() // num_values * out.element_size()
    arguments = padded.data_ptr(), out.data_ptr(), ends, row_bytes, padded.shape[1]
    parts = bag_parts(padded.shape[0], num_values * row_bytes)
    run_parts(lambda start, stop: padded_to_bags(*arguments, start, stop), parts)
    return out


@njit
def _fill_bags(ends, target, start, stop):
    for bag in range(start, stop):
        for place in range(ends[bag], ends[bag + 1]):
            target[place] = bag
