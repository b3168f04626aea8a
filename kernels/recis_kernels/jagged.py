"""Move between the forms of a jagged tensor: lengths, offsets, flat values and padded rows.

    offsets[b] = lengths[0] + ... + lengths[b - 1]                      bag b is values[offsets[b]:offsets[b + 1]]
    padded[b, t] = values[offsets[b] + t] if t < lengths[b] else fill   longer bags keep their head

Lengths [B] and offsets [B + 1] are int64, or int32 and then stay int32. What they hold is trusted, as in every op here:
reading it would stall a GPU. Sums and index tables run as a few torch ops whose cost is the memory they touch; padding
and its gradient are copies, one read and one write of each value.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from recis_kernels.dispatch import Impl, choose, njit
from recis_kernels.threads import run_parts, split


def lengths_to_offsets(lengths: Tensor) -> Tensor:
    """Return the running sums [B + 1] of lengths [B], from 0, in the dtype of lengths."""
    _check_index(lengths, "lengths")
    if _on_host(lengths):
        offsets = lengths.new_empty(lengths.numel() + 1)
        target = offsets.numpy()
        target[0] = 0
        np.cumsum(lengths.numpy(), out=target[1:])
        return offsets
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=lengths.dtype)])


def offsets_to_lengths(offsets: Tensor) -> Tensor:
    """Return the bag sizes [B] of offsets [B + 1]."""
    check_offsets_form(offsets)
    return offsets.diff()


def bag_of_value(offsets: Tensor, num_values: int) -> Tensor:
    """Return the bag number of each of the num_values values, int64 [num_values]; offsets must end at num_values."""
    check_offsets_form(offsets)
    bags = torch.arange(offsets.numel() - 1, device=offsets.device)
    return bags.repeat_interleave(offsets.diff(), output_size=num_values)


def merge_offsets(parts: Sequence[Tensor]) -> Tensor:
    """Return the offsets of the concatenated jagged tensors: (0, 2, 5) and (0, 3, 6) give (0, 2, 5, 8, 11).

    Raises:
        ValueError: there is no part, or a part is not [B + 1] int32 or int64.
    """
    if not parts:
        raise ValueError("merge_offsets needs at least one part; an empty batch has the offsets [0]")
    for part in parts:
        check_offsets_form(part)
    if len(parts) == 1:
        return parts[0]
    if all(_on_host(part) for part in parts):
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


def permute_bags(values: Tensor, offsets: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Return (values [L, ...], offsets [B + 1]) with bag b = the old bag order[b]; order [B] is a permutation, int64.

    Differentiable in values.
    """
    check_offsets_form(offsets)
    lengths = offsets.diff().index_select(0, order)
    new_offsets = lengths_to_offsets(lengths)
    shift = offsets[:-1].index_select(0, order) - new_offsets[:-1]
    num_values = values.shape[0]
    source = torch.arange(num_values, device=values.device)
    source += shift.repeat_interleave(lengths, output_size=num_values)
    return values.index_select(0, source), new_offsets


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
    if max_length < 0:
        raise ValueError(f"max_length must be at least 0; got {max_length}")
    version = choose(impl, values, numba=_padded_op, torch=_padded_torch, reference=_padded_reference)
    return version(values, offsets, max_length, float(fill))


def padded_to_jagged(padded: Tensor, offsets: Tensor, num_values: int, *, impl: Impl = "auto") -> Tensor:
    """Return the values [L] or [L, D] of rows [B, T] or [B, T, D]: the inverse of jagged_to_padded.

    Bag b takes the first offsets[b + 1] - offsets[b] entries of row b; entries past T are 0. Differentiable in padded.
    """
    if padded.ndim not in (2, 3):
        raise ValueError(f"padded must be [B, T] or [B, T, D]; got shape {tuple(padded.shape)}")
    check_offsets_form(offsets)
    if offsets.numel() != padded.shape[0] + 1:
        raise ValueError(f"padded has {padded.shape[0]} rows, so offsets must be [{padded.shape[0] + 1}]")
    version = choose(impl, padded, numba=_flat_op, torch=_flat_torch, reference=_flat_reference)
    return version(padded, offsets, num_values)


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


def _on_host(tensor: Tensor) -> bool:
    """Whether numpy may do the work: one thread is faster than waking OpenMP's for a batch's worth of offsets."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_index(lengths: Tensor, name: str) -> None:
    if lengths.ndim != 1 or lengths.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be [B] int64 or int32; got {tuple(lengths.shape)} {lengths.dtype}")


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


def _padded_torch(values: Tensor, offsets: Tensor, max_length: int, fill: float) -> Tensor:
    shape = (offsets.numel() - 1, max_length, *values.shape[1:])
    if values.shape[0] == 0 or max_length == 0:
        empty = values.new_full(shape, fill)
        return empty + values[:0].sum() if values.requires_grad else empty  # a zero gradient rather than none
    position = torch.arange(max_length, device=values.device)
    inside = position < offsets.diff()[:, None]
    source = torch.where(inside, offsets[:-1, None] + position, 0)
    rows = values.index_select(0, source.reshape(-1)).view(shape)
    return torch.where(inside.view(*inside.shape, *[1] * (values.ndim - 1)), rows, fill).to(values.dtype)


def _flat_torch(padded: Tensor, offsets: Tensor, num_values: int) -> Tensor:
    bag = bag_of_value(offsets, num_values)
    position = torch.arange(num_values, device=padded.device) - offsets[:-1].index_select(0, bag)
    if padded.shape[1] == 0:
        return padded.new_zeros((num_values, *padded.shape[2:]))
    inside = position < padded.shape[1]
    out = padded[bag, torch.where(inside, position, 0)]
    return torch.where(inside.view(-1, *[1] * (out.ndim - 1)), out, 0).to(padded.dtype)


@torch.library.custom_op("recis::jagged_to_padded", mutates_args=(), device_types="cpu")
def _padded_op(values: Tensor, offsets: Tensor, max_length: int, fill: float) -> Tensor:
    out = values.new_full((offsets.numel() - 1, max_length, *values.shape[1:]), fill)
    if out.numel() and values.numel():
        _run_copy(values.detach(), out, offsets, values_to_padded=True)
    return out


@torch.library.custom_op("recis::padded_to_jagged", mutates_args=(), device_types="cpu")
def _flat_op(padded: Tensor, offsets: Tensor, num_values: int) -> Tensor:
    out = padded.new_zeros((num_values, *padded.shape[2:]))
    if out.numel() and padded.numel():
        _run_copy(out, padded.detach(), offsets, values_to_padded=False)
    return out


@_padded_op.register_fake
def _(values, offsets, max_length, fill):
    return values.new_empty((offsets.shape[0] - 1, max_length, *values.shape[1:]))


@_flat_op.register_fake
def _(padded, offsets, num_values):
    return padded.new_empty((num_values, *padded.shape[2:]))


def _padded_setup(ctx, inputs, output) -> None:
    values, offsets, _, _ = inputs
    ctx.save_for_backward(offsets)
    ctx.num_values = values.shape[0]


def _padded_backward(ctx, grad):
    (offsets,) = ctx.saved_tensors
    return _flat_op(grad, offsets, ctx.num_values), None, None, None


def _flat_setup(ctx, inputs, output) -> None:
    padded, offsets, _ = inputs
    ctx.save_for_backward(offsets)
    ctx.max_length = padded.shape[1]


def _flat_backward(ctx, grad):
    (offsets,) = ctx.saved_tensors
    return _padded_op(grad, offsets, ctx.max_length, 0.0), None, None


# both directions are copies, so each is the gradient of the other; autograd itself would scatter-add
_padded_op.register_autograd(_padded_backward, setup_context=_padded_setup)
_flat_op.register_autograd(_flat_backward, setup_context=_flat_setup)


def _run_copy(values: Tensor, padded: Tensor, offsets: Tensor, *, values_to_padded: bool) -> None:
    """Copy bytes between the flat and the padded form, so one loop serves every dtype."""
    flat = as_words(values)
    rows = as_words(padded).reshape(padded.shape[0], -1)
    width = flat.size // values.shape[0] if values.shape[0] else 1
    ends = offsets.numpy()
    loop = _to_padded if values_to_padded else _to_flat
    parts = split(padded.shape[0], min_items=max(1, 65536 // max(1, rows.shape[1])))
    run_parts(lambda start, stop: loop(flat, rows, ends, width, start, stop), parts)


def as_words(tensor: Tensor) -> np.ndarray:
    """Return a view of a contiguous tensor as flat words of its item size (numpy has no bf16; a copy needs none)."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(words).numpy().reshape(-1)


@njit
def _to_padded(flat, rows, ends, width, start, stop):
    limit = rows.shape[1]
    for bag in range(start, stop):
        first = np.int64(ends[bag]) * width
        size = min(np.int64(ends[bag + 1]) * width - first, limit)
        for i in range(size):
            rows[bag, i] = flat[first + i]


@njit
def _to_flat(flat, rows, ends, width, start, stop):
    limit = rows.shape[1]
    for bag in range(start, stop):
        first = np.int64(ends[bag]) * width
        size = min(np.int64(ends[bag + 1]) * width - first, limit)
        for i in range(size):
            flat[first + i] = rows[bag, i]
