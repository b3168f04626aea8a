"""Run the ops that make ids: one kernel call for all nodes of a group (one per dtype where columns differ).

Every function takes the nodes of a group and their inputs, and returns their values in the same order.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from recis.features.graph import Node
from recis.features.run import Inputs, MissCount, Run
from recis.features.values import Data, Value, as_bags, flat, strings, with_flat, without_strings
from recis.jagged import JaggedTensor
from recis_kernels.bucketize import bucketize
from recis_kernels.columns import join
from recis_kernels.feature_cross import feature_cross
from recis_kernels.id_hash import hash_ids, hash_strings
from recis_kernels.id_mod import id_mod
from recis_kernels.jagged import merge_offsets
from recis_kernels.multi_hash import multi_hash
from recis_kernels.vocab_lookup import lookup_ids, lookup_strings


def run_hash(nodes: Sequence[Node], inputs: Inputs, run: Run) -> list[Value]:
    """Hash; string columns in one call, id columns in another."""

    def call(chosen: Sequence[int], entries: Tensor, offsets: Tensor | None, ends: tuple[int, ...]) -> Tensor:
        kinds = [nodes[index].op.kind for index in chosen]
        buckets = [nodes[index].op.num_buckets for index in chosen]
        if offsets is None:
            return hash_ids(entries, ends, kinds, buckets)
        return hash_strings(entries, offsets, ends, kinds, buckets)

    return _map_entries([value for (value,) in inputs], call)


def run_vocab(nodes: Sequence[Node], inputs: Inputs, run: Run) -> list[Value]:
    """Vocab and Lookup; string columns in one call, id columns in another. Counts what no entry equals."""

    def call(chosen: Sequence[int], entries: Tensor, offsets: Tensor | None, ends: tuple[int, ...]) -> Tensor:
        known = [run.vocabularies[nodes[index].number] for index in chosen]
        if offsets is None:
            found = lookup_ids(entries, ends, [one.ids for one in known])
        else:
            found = lookup_strings(entries, offsets, ends, [one.strings for one in known])
        mapped = []
        for index, one, (start, stop) in zip(chosen, known, pairwise(ends), strict=True):
            part = found[start:stop]
            count = run.misses.setdefault(nodes[index].number, MissCount())
            count.unknown = count.unknown + (part < 0).sum()
            count.looked_up += stop - start
            mapped.append(one.indices_of(part))
        return torch.cat(mapped)

    return _map_entries([value for (value,) in inputs], call)


def run_mod(nodes: Sequence[Node], inputs: Inputs, run: Run) -> list[Value]:
    """Mod, in one call."""
    moduli = [node.op.n for node in nodes]
    return _map_flat([value for (value,) in inputs], lambda entries, ends: id_mod(entries, ends, moduli))


def run_bucketize(nodes: Sequence[Node], inputs: Inputs, run: Run) -> list[Value]:
    """Bucketize; one call per dtype of the columns."""
    by_dtype: dict[torch.dtype, list[int]] = {}
    for index, (value,) in enumerate(inputs):
        by_dtype.setdefault(flat(value.data).dtype, []).append(index)
    out: dict[int, Value] = {}
    for chosen in by_dtype.values():
        out |= zip(chosen, _bucketize([nodes[i] for i in chosen], [inputs[i][0] for i in chosen], run), strict=True)
    return [out[index] for index in range(len(nodes))]


def _bucketize(nodes: Sequence[Node], values: list[Value], run: Run) -> list[Value]:
    boundaries = [run.boundaries[node.number] for node in nodes]
    return _map_flat(values, lambda entries, ends: bucketize(_countable(entries), ends, boundaries))


def run_one_hash(nodes: Sequence[Node], inputs: Inputs, run: Run) -> list[Value]:
    """The outputs of MultiHash: a column that has several is read once."""
    columns: dict[int, list[int]] = {}
    for index, node in enumerate(nodes):
        columns.setdefault(node.inputs[0], []).append(index)
    firsts = [inputs[chosen[0]][0] for chosen in columns.values()]
    entries, ends = join([flat(value.data) for value in firsts])
    hashed = multi_hash(entries, ends, [[nodes[index].op.linear for index in chosen] for chosen in columns.values()])
    out: dict[int, Value] = {}
    for value, chosen, rows in zip(firsts, columns.values(), hashed, strict=True):
        out |= {index: Value(with_flat(value.data, row), value.kept) for index, row in zip(chosen, rows, strict=True)}
    return [out[index] for index in range(len(nodes))]


def run_cross(nodes: Sequence[Node], inputs: Inputs, run: Run) -> list[Value]:
    """Cross; pairs with weights in one call, pairs without in another."""
    pairs = [(as_bags(a.data), as_bags(b.data)) for a, b in inputs]
    weighted = [index for index, pair in enumerate(pairs) if any(side.weights is not None for side in pair)]
    plain = [index for index in range(len(pairs)) if index not in set(weighted)]
    out: dict[int, Value] = {}
    for chosen in (weighted, plain):
        if chosen:
            made = _cross([pairs[index] for index in chosen], [nodes[index].op.num_buckets for index in chosen])
            out |= {index: Value(data) for index, data in zip(chosen, made, strict=True)}
    return [out[index] for index in range(len(nodes))]


def _cross(pairs: list[tuple[JaggedTensor, JaggedTensor]], num_buckets: list[int | None]) -> list[JaggedTensor]:
    sides = [_joined([pair[side] for pair in pairs]) for side in (0, 1)]
    rows = [0]
    for a, _ in pairs:
        rows.append(rows[-1] + a.num_bags)
    (a, a_offsets, a_weights), (b, b_offsets, b_weights) = sides
    crossed = feature_cross(a, a_offsets, b, b_offsets, rows, num_buckets, a_weights=a_weights, b_weights=b_weights)
    lengths, ends = crossed.offsets.diff(), crossed.offsets[rows].tolist()
    out = []
    for (first, last), (start, stop) in zip(pairwise(rows), pairwise(ends), strict=True):
        weights = None if crossed.weights is None else crossed.weights[start:stop]
        out.append(JaggedTensor(crossed.values[start:stop], lengths=lengths[first:last], weights=weights))
    return out


def _joined(columns: list[JaggedTensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    entries, _ = join([column.flat_values for column in columns])
    offsets = merge_offsets([column.offsets for column in columns])
    if all(column.weights is None for column in columns):
        return entries, offsets, None
    weights = [
        torch.ones(column.num_values, device=entries.device) if column.weights is None else column.weights.float()
        for column in columns
    ]
    return entries, offsets, torch.cat(weights)


Call = Callable[[Sequence[int], Tensor, Tensor | None, tuple[int, ...]], Tensor]


def _map_entries(values: list[Value], call: Call) -> list[Value]:
    """Map strings and ids to ids: call(chosen, entries, byte offsets or None, column_offsets) -> ids."""
    is_text = [_is_text(value.data) for value in values]
    out: dict[int, Value] = {}
    texts = [index for index, text in enumerate(is_text) if text]
    if texts:
        levels = [strings(_as_jagged(values[index].data)) for index in texts]
        data, _ = join([level.flat_values for level in levels])
        ends = [0]
        for level in levels:
            ends.append(ends[-1] + level.num_bags)
        made = call(texts, data, merge_offsets([level.offsets for level in levels]), tuple(ends))
        for index, (start, stop) in zip(texts, pairwise(ends), strict=True):
            value = values[index]
            out[index] = Value(without_strings(_as_jagged(value.data), made[start:stop]), value.kept)
    numbers = [index for index, text in enumerate(is_text) if not text]
    if numbers:
        entries, column_offsets = join([flat(values[index].data) for index in numbers])
        made = call(numbers, entries, None, column_offsets)
        for index, (start, stop) in zip(numbers, pairwise(column_offsets), strict=True):
            out[index] = Value(with_flat(values[index].data, made[start:stop]), values[index].kept)
    return [out[index] for index in range(len(values))]


def _map_flat(values: list[Value], call: Callable[[Tensor, tuple[int, ...]], Tensor]) -> list[Value]:
    """Map the innermost entries of values of one dtype: call(entries, column_offsets) -> one new entry for each."""
    entries, ends = join([flat(value.data) for value in values])
    made = call(entries, ends)
    return [
        Value(with_flat(value.data, made[start:stop]), value.kept)
        for value, (start, stop) in zip(values, pairwise(ends), strict=True)
    ]


def _countable(entries: Tensor) -> Tensor:
    known = (torch.float32, torch.float64, torch.int64)
    return entries if entries.dtype in known else entries.float()


def _is_text(data: Data) -> bool:
    return isinstance(data, JaggedTensor) and data.flat_values.dtype == torch.uint8


def _as_jagged(data: Data) -> JaggedTensor:
    assert isinstance(data, JaggedTensor)
    return data
