"""What flows along the edges of a feature graph, and how to reach and replace its parts.

A value is a Tensor [B] or [B, width] (depth 0) or a JaggedTensor; a string value at depth 0 is byte-jagged itself. While
only Sequence and Truncate have cut it, a value also remembers which entries of its source it still holds, so that columns
aligned with the source can be cut the same way.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from recis.jagged import JaggedTensor
from recis_kernels.jagged import lengths_to_offsets
from recis_kernels.ragged_truncate import take_runs

Data = Tensor | JaggedTensor


@dataclass(frozen=True, slots=True)
class Value:
    """A column on its way through a chain."""

    data: Data
    kept: Tensor | None = None
    """Positions [L] in the source of the outermost entries, int64; None: all of them."""


def flat(data: Data) -> Tensor:
    """Return all innermost entries, 1-D, in order."""
    return data.reshape(-1) if isinstance(data, Tensor) else data.flat_values


def with_flat(data: Data, entries: Tensor) -> Data:
    """Return the same structure over other innermost entries, one for each of flat(data)."""
    if isinstance(data, Tensor):
        return entries.view(data.shape)
    if isinstance(data.values, Tensor):
        return data.with_values(entries, data.weights)
    return data.with_values(_jagged(with_flat(data.values, entries)), data.weights)


def strings(data: JaggedTensor) -> JaggedTensor:
    """Return the byte level of a string value."""
    return data if data.is_strings else strings(data.inner)


def without_strings(data: JaggedTensor, entries: Tensor) -> Data:
    """Return a string value with one entry in place of each string; the byte level goes, lists and weights stay."""
    if data.is_strings:
        return entries
    if data.inner.is_strings:
        return data.with_values(entries, data.weights)
    return data.with_values(_jagged(without_strings(data.inner, entries)), data.weights)


def at_level(data: JaggedTensor, level: int) -> JaggedTensor:
    """Return the jagged tensor `level` levels below the outermost."""
    return data if level == 0 else at_level(data.inner, level - 1)


def with_level(data: JaggedTensor, level: int, part: JaggedTensor) -> JaggedTensor:
    """Return data with another jagged tensor, of as many bags, at that level."""
    if level == 0:
        return part
    return data.with_values(with_level(data.inner, level - 1, part), data.weights)


def as_bags(data: Data) -> JaggedTensor:
    """Return a flat id or number value as bags: one entry, or `width`, per sample at depth 0."""
    if isinstance(data, JaggedTensor):
        return data
    width = 1 if data.ndim == 1 else data.shape[1]
    offsets = torch.arange(data.shape[0] + 1, device=data.device) * width
    return JaggedTensor(data.reshape(-1), offsets=offsets)


def take_bags(data: JaggedTensor, starts: Tensor, lengths: Tensor, num_taken: int) -> JaggedTensor | Tensor:
    """Return the runs of bags data[starts[r] : starts[r] + lengths[r]], whole, one run after another.

    starts, lengths: int64 [R], runs ascending and disjoint; num_taken: the sum of lengths.
    """
    inner = take_runs(data.lengths.to(torch.int64), starts, lengths, num_taken)
    offsets = lengths_to_offsets(inner)
    first = data.offsets.index_select(0, starts)
    sizes = data.offsets.index_select(0, starts + lengths) - first
    weights = None if data.weights is None else take_runs(data.weights, first, sizes, int(offsets[-1]))
    return JaggedTensor(take_entries(data.values, first, sizes, int(offsets[-1])), offsets=offsets, weights=weights)


def take_entries(values: Data, starts: Tensor, lengths: Tensor, num_taken: int) -> Data:
    """Return runs of entries, which are rows of a tensor or bags of a nested level; arguments as take_bags."""
    if isinstance(values, Tensor):
        return take_runs(values, starts, lengths, num_taken)
    return take_bags(values, starts, lengths, num_taken)


def _jagged(data: Data) -> JaggedTensor:
    assert isinstance(data, JaggedTensor)
    return data
