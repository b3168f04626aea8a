"""Run the ops on numbers: all columns of a group side by side in one matrix (or one flat tensor), one torch op over it.

Integers are computed in float64, so that a time in milliseconds keeps its digits until its mean is taken off.
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from recis.errors import DataError
from recis.features.graph import Node
from recis.features.run import Inputs, Run
from recis.features.values import Value, flat, with_flat
from recis.jagged import JaggedTensor
from recis_kernels.columns import join
from recis_kernels.jagged import bag_of_value


def run_log(nodes: Sequence[Node], inputs: Inputs, run: Run) -> list[Value]:
    """Log; x + offset <= 0 is a fault of that sample."""

    def compute(numbers: Tensor, chosen: Sequence[Node], values: Sequence[Value], offset: Tensor) -> Tensor:
        shifted = numbers + offset
        run.faults.check((shifted <= 0).any(), partial(_log_error, run, chosen, values))
        return shifted.log()

    return _run(nodes, inputs, compute, ("offset",))


def run_normalize(nodes: Sequence[Node], inputs: Inputs, run: Run) -> list[Value]:
    """Normalize."""
    return _run(nodes, inputs, lambda numbers, _, __, mean, std: (numbers - mean) / std, ("mean", "std"))


def run_min_max(nodes: Sequence[Node], inputs: Inputs, run: Run) -> list[Value]:
    """MinMax."""
    return _run(nodes, inputs, lambda numbers, _, __, low, high: (numbers - low) / (high - low), ("low", "high"))


def run_clip(nodes: Sequence[Node], inputs: Inputs, run: Run) -> list[Value]:
    """Clip."""
    return _run(nodes, inputs, lambda numbers, _, __, low, high: numbers.clamp(low, high), ("low", "high"))


_OPEN = {"low": -math.inf, "high": math.inf}  # what None means


def _run(nodes: Sequence[Node], inputs: Inputs, compute, parameters: Sequence[str]) -> list[Value]:
    """Call compute(numbers, nodes, values, *parameters) once per form and dtype of the columns."""
    values = [value for (value,) in inputs]
    forms: dict[tuple[bool, torch.dtype], list[int]] = {}
    for index, value in enumerate(values):
        forms.setdefault((isinstance(value.data, Tensor), _dtype(value)), []).append(index)
    out: dict[int, Value] = {}
    for (is_matrix, dtype), chosen in forms.items():
        arguments = [nodes[index] for index in chosen], [values[index] for index in chosen]
        made = (_matrix if is_matrix else _flat)(*arguments, dtype, compute, parameters)
        out |= zip(chosen, made, strict=True)
    return [out[index] for index in range(len(nodes))]


def _dtype(value: Value) -> torch.dtype:
    dtype = flat(value.data).dtype
    return (
        dtype
        if dtype in (torch.float32, torch.float64)
        else torch.float32
        if dtype.is_floating_point
        else torch.float64
    )


def _matrix(nodes, values: Sequence[Value], dtype: torch.dtype, compute, parameters: Sequence[str]) -> list[Value]:
    """Columns of one entry, or `width`, per sample: [B, sum of widths]."""
    data = [value.data for value in values if isinstance(value.data, Tensor)]
    columns = [column if column.ndim == 2 else column[:, None] for column in data]
    numbers = torch.cat(columns, dim=1).to(dtype)
    widths = [column.shape[1] for column in columns]
    made = compute(numbers, nodes, values, *_parameters(nodes, parameters, widths, numbers))
    return [Value(part.reshape(column.shape)) for column, part in zip(data, made.split(widths, dim=1), strict=True)]


def _flat(nodes, values: Sequence[Value], dtype: torch.dtype, compute, parameters: Sequence[str]) -> list[Value]:
    """Columns of lists: [L]."""
    entries, ends = join([flat(value.data) for value in values])
    lengths = [stop - start for start, stop in pairwise(ends)]
    entries = entries.to(dtype)
    made = compute(entries, nodes, values, *_parameters(nodes, parameters, lengths, entries))
    return [
        Value(with_flat(value.data, made[start:stop]), value.kept)
        for value, (start, stop) in zip(values, pairwise(ends), strict=True)
    ]


def _parameters(nodes: Sequence[Node], names: Sequence[str], repeats: Sequence[int], like: Tensor) -> list[Tensor]:
    out = []
    for name in names:
        numbers = [getattr(node.op, name) for node in nodes]
        numbers = [_OPEN[name] if number is None else number for number in numbers]
        parts = [like.new_full((count,), number) for number, count in zip(numbers, repeats, strict=True)]
        out.append(torch.cat(parts))
    return out


def _log_error(run: Run, nodes: Sequence[Node], values: Sequence[Value]) -> DataError:
    """Find the first feature and sample with x + offset <= 0."""
    for node, value in zip(nodes, values, strict=True):
        entries = flat(value.data)
        wrong = (entries.to(_dtype(value)) + node.op.offset <= 0).nonzero()
        if wrong.numel():
            position = int(wrong[0])
            return run.error(
                node,
                sample_of(value, position),
                f"Log needs x + offset above 0; the offset is {node.op.offset:g}",
                value=entries[position].item(),
                option=f"put Clip(low=...) above {-node.op.offset:g} before it, or use a larger offset",
            )
    raise AssertionError("the flag was set, so a column holds such a number")


def sample_of(value: Value, position: int) -> int:
    """Return the sample of the innermost entry at a position of flat(value.data)."""
    data = value.data
    if isinstance(data, Tensor):
        return position // max(1, data.numel() // max(1, data.shape[0]))
    levels: list[JaggedTensor] = [data]
    while isinstance(levels[-1].values, JaggedTensor):
        levels.append(levels[-1].values)
    for level in reversed(levels):
        position = int(bag_of_value(level.offsets, level.num_values)[position])
    return position
