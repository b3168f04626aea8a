"""Run the ops that cut rows: Truncate, Sequence and Flatten.

Columns of one form (plain entries of one dtype, weighted or not) are cut in one call; nested ones share the call that
finds the cuts and are copied one by one.
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from recis.errors import ConfigError, DataError
from recis.features.graph import Node
from recis.features.ops import TICKS_PER_SECOND, Truncate
from recis.features.run import Inputs, Run
from recis.features.values import Value, at_level, take_bags, take_entries, with_level
from recis.jagged import JaggedTensor
from recis_kernels.columns import join
from recis_kernels.jagged import bag_of_value, jagged_to_padded, lengths_to_offsets, merge_offsets
from recis_kernels.ragged_distinct import ragged_distinct
from recis_kernels.ragged_truncate import Cut, keep_where, ragged_truncate, take_runs


def run_flatten(nodes: Sequence[Node], inputs: Inputs, run: Run) -> list[Value]:
    """Flatten: offsets of offsets; nothing is copied. Weights of the outer level pass to the inner entries."""
    out = []
    for (value,) in inputs:
        outer = _jagged(value)
        inner = outer.inner
        weights = inner.weights
        if outer.weights is not None:
            spread = outer.weights.repeat_interleave(inner.lengths, output_size=inner.num_values)
            weights = spread if weights is None else spread * weights
        offsets = inner.offsets.index_select(0, outer.offsets)
        out.append(Value(JaggedTensor(inner.values, offsets=offsets, weights=weights)))
    return out


def run_truncate(nodes: Sequence[Node], inputs: Inputs, run: Run) -> list[Value]:
    """Truncate, and Sequence(LastN), which is one."""
    parts = [at_level(_jagged(value), node.op.level) for node, (value,) in zip(nodes, inputs, strict=True)]
    rows = tuple(accumulate((part.num_bags for part in parts), initial=0))
    offsets = merge_offsets([part.offsets for part in parts])
    cut = ragged_truncate(offsets, rows, [node.op.keep for node in nodes], [node.op.drop for node in nodes])
    for node, (value,), (first, last) in zip(nodes, inputs, pairwise(rows), strict=True):
        if node.op.strict:
            dropped = cut.dropped[first:last]
            run.faults.check((dropped > 0).any(), partial(_strict_error, run, node, value, dropped))
    cuts = [_cut_of(cut, offsets, first, last) for first, last in pairwise(rows)]
    borders = lengths_to_offsets(cut.lengths)[list(rows)].tolist()
    made = _take(parts, cuts, [stop - start for start, stop in pairwise(borders)])
    out = []
    for node, (value,), part, (starts, lengths) in zip(nodes, inputs, made, cuts, strict=True):
        kept = value.kept
        if node.op.level == 0 and node.tracked:
            kept = (
                _run_positions(starts, lengths) if kept is None else take_runs(kept, starts, lengths, part.num_values)
            )
        part = _pad(part, node.op) if node.op.pad else part
        out.append(Value(with_level(_jagged(value), node.op.level, part), kept))
    return out


def _cut_of(cut: Cut, offsets: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Starts and lengths of one column's rows, counted from its own first entry."""
    return cut.starts[first:last] - offsets[first], cut.lengths[first:last]


def _take(parts: list[JaggedTensor], cuts: list[tuple[Tensor, Tensor]], totals: list[int]) -> list[JaggedTensor]:
    """Return the cut columns; totals: entries each keeps."""
    forms: dict[tuple, list[int]] = {}
    for index, part in enumerate(parts):
        if isinstance(part.values, Tensor):
            form = (part.values.dtype, part.values.shape[1:], part.weights is not None)
        else:
            form = (index,)
        forms.setdefault(form, []).append(index)
    out: dict[int, JaggedTensor] = {}
    for chosen in forms.values():
        some = [parts[i] for i in chosen], [cuts[i] for i in chosen], [totals[i] for i in chosen]
        out |= zip(chosen, _take_joined(*some), strict=True)
    return [out[index] for index in range(len(parts))]


def _take_joined(parts: list[JaggedTensor], cuts: list[tuple[Tensor, Tensor]], totals: list[int]) -> list[JaggedTensor]:
    """Cut plain columns of one form together, or a single nested one."""
    if len(parts) == 1:
        (part,), ((starts, lengths),), (total,) = parts, cuts, totals
        weights = None if part.weights is None else take_runs(part.weights, starts, lengths, total)
        return [JaggedTensor(take_entries(part.values, starts, lengths, total), lengths=lengths, weights=weights)]
    entries, ends = join([part.flat_values for part in parts])
    starts = torch.cat([starts + first for (starts, _), first in zip(cuts, ends, strict=False)])
    lengths = torch.cat([lengths for _, lengths in cuts])
    taken = take_runs(entries, starts, lengths, sum(totals))
    weights = [part.weights for part in parts if part.weights is not None]
    taken_weights = take_runs(join(weights)[0], starts, lengths, sum(totals)) if weights else None
    out = []
    for (_, part_lengths), (first, last) in zip(cuts, pairwise(accumulate(totals, initial=0)), strict=True):
        part_weights = None if taken_weights is None else taken_weights[first:last]
        out.append(JaggedTensor(taken[first:last], lengths=part_lengths, weights=part_weights))
    return out


def _run_positions(starts: Tensor, lengths: Tensor) -> Tensor:
    offsets = lengths_to_offsets(lengths)
    total = int(offsets[-1])
    shift = (starts - offsets[:-1]).repeat_interleave(lengths, output_size=total)
    return torch.arange(total, device=starts.device) + shift


def _pad(part: JaggedTensor, op: Truncate) -> JaggedTensor:
    """Append empty inner rows, of weight 0, so that every row has op.keep."""
    inner = part.inner
    lengths = jagged_to_padded(inner.lengths, part.offsets, op.keep).reshape(-1)
    weights = None if part.weights is None else jagged_to_padded(part.weights, part.offsets, op.keep).reshape(-1)
    offsets = torch.arange(part.num_bags + 1, device=lengths.device) * op.keep
    padded = JaggedTensor(inner.values, lengths=lengths, weights=inner.weights)
    return JaggedTensor(padded, offsets=offsets, weights=weights)


def _strict_error(run: Run, node: Node, value: Value, dropped: Tensor) -> DataError:
    row = int((dropped > 0).nonzero()[0])
    length = node.op.keep + int(dropped[row])
    sample = row
    for level in range(node.op.level - 1, -1, -1):
        outer = at_level(_jagged(value), level)
        sample = int(bag_of_value(outer.offsets, outer.num_values)[sample])
    return run.error(
        node,
        sample,
        f"a row has {length} entries and Truncate(strict=True) allows {node.op.keep}",
        value=length,
        option="raise keep, or use strict=False to cut",
    )


def run_dedup(nodes: Sequence[Node], inputs: Inputs, run: Run) -> list[Value]:
    """Sequence(Dedup): features that are cut by the same column in the same state share one result."""
    number_of: dict[tuple, int] = {}  # what decides a cut -> its number
    cut_of: list[int] = []
    ids, offsets, keeps = [], [], []
    for index, (node, (value,)) in enumerate(zip(nodes, inputs, strict=True)):
        rule = node.op.rule
        if rule.by is None:
            deciding, key = _jagged(value).flat_values, (index,)
        else:
            deciding = _aligned(node, value, rule.by, run)
            key = (rule, None if value.kept is None else id(value.kept))
        if key not in number_of:
            number_of[key] = len(ids)
            ids.append(deciding)
            offsets.append(_jagged(value).offsets)
            keeps.append(rule.keep)
        cut_of.append(number_of[key])
    rows = tuple(accumulate((one.numel() - 1 for one in offsets), initial=0))
    positions, ends = ragged_distinct(join(ids)[0], merge_offsets(offsets), rows, keeps)
    kept = _split(positions, ends, rows, [one.shape[0] for one in ids])
    return [_keep(value, *kept[number]) for (value,), number in zip(inputs, cut_of, strict=True)]


def run_time_window(nodes: Sequence[Node], inputs: Inputs, run: Run) -> list[Value]:
    """Sequence(TimeWindow); times and limits in int64 stay exact."""
    insides, sizes, offsets = [], [], []
    for node, (value,) in zip(nodes, inputs, strict=True):
        rule, data = node.op.rule, _jagged(value)
        times, now = _aligned(node, value, rule.time, run), run.columns[rule.now]
        if not isinstance(now, Tensor) or now.ndim != 1:
            raise ConfigError(f"{node.where}: column {rule.now!r} must hold one time per sample")
        exact = not times.is_floating_point() and not now.is_floating_point()
        dtype = torch.int64 if exact else torch.float64
        age = now.to(dtype).index_select(0, bag_of_value(data.offsets, data.num_values)) - times.to(dtype)
        ticks = rule.seconds * TICKS_PER_SECOND[rule.unit]
        inside = (age >= 0) & (age <= (int(ticks) if exact else ticks))
        insides.append(inside)
        sizes.append(data.num_values)
        offsets.append(data.offsets)
    rows = tuple(accumulate((one.numel() - 1 for one in offsets), initial=0))
    positions, ends = keep_where(join(insides)[0], merge_offsets(offsets))
    return [_keep(value, *kept) for (value,), kept in zip(inputs, _split(positions, ends, rows, sizes), strict=True)]


def _aligned(node: Node, value: Value, name: str, run: Run) -> Tensor:
    """Return the entries of an aligned column that the value still holds."""
    column = run.columns[name]
    source = run.columns[node.column] if node.column is not None else None
    if not isinstance(column, JaggedTensor) or not isinstance(column.values, Tensor):
        raise ConfigError(f"{node.where}: column {name!r} must hold one list per sample")
    assert isinstance(source, JaggedTensor)
    if name != node.column:
        differs = (column.offsets != source.offsets).any()
        run.faults.check(differs, partial(_alignment_error, run, node, name, column, source))
    return column.values if value.kept is None else column.values.index_select(0, value.kept)


def _alignment_error(run: Run, node: Node, name: str, column: JaggedTensor, source: JaggedTensor) -> DataError:
    row = int((column.lengths != source.lengths).nonzero()[0])
    return run.error(
        node,
        row,
        f"column {name!r} has {int(column.lengths[row])} entries where {node.column!r} has {int(source.lengths[row])}",
        option="sequences that are cut together need one entry per event each",
    )


def _split(positions: Tensor, ends: Tensor, rows: Sequence[int], sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Return per column the positions that stay, from its own first entry, and how many per row."""
    lengths, borders = ends.diff(), ends[list(rows)].tolist()
    firsts = accumulate(sizes, initial=0)
    return [
        (positions[start:stop] - first, lengths[row:last_row])
        for (start, stop), (row, last_row), first in zip(pairwise(borders), pairwise(rows), firsts, strict=False)
    ]


def _keep(value: Value, positions: Tensor, lengths: Tensor) -> Value:
    """Return the value with only these outermost entries."""
    data = _jagged(value)
    if isinstance(data.values, Tensor):
        entries = data.values.index_select(0, positions)
    else:
        entries = take_bags(data.values, positions, torch.ones_like(positions), positions.numel())
    weights = None if data.weights is None else data.weights.index_select(0, positions)
    kept = positions if value.kept is None else value.kept.index_select(0, positions)
    return Value(JaggedTensor(entries, lengths=lengths, weights=weights), kept)


def _jagged(value: Value) -> JaggedTensor:
    assert isinstance(value.data, JaggedTensor)
    return value.data
