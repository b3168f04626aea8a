"""The feature engine: raw columns in, Batch out; one object for training, evaluation, prediction and export.

    features --graph.py--> distinct steps, in groups    forward: columns -> group after group -> pack.py -> Batch

Steps of one level and type run as one call over all their columns; equal steps run once. Inputs are never changed. The
engine has no state but its counters of unknown values, and a checkpoint keeps it as JSON. B = samples.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recis.errors import ConfigError, nearest
from recis.features import run_dense, run_ids, run_rows
from recis.features.graph import Graph, Node, Source, columns_of, name_of
from recis.features.ops import Bucketize, Lookup, Vocab
from recis.features.pack import pack
from recis.features.run import Faults, MissCount, Run
from recis.features.spec import LABEL_KINDS, FeatureSpec
from recis.features.types import ValueType, type_of_column, type_of_data
from recis.features.values import Data, Value
from recis.features.vocabulary import digests, open_vocabulary
from recis.io.batch import Batch, RawBatch
from recis.io.columns import Column
from recis.jagged import JaggedTensor
from recis_kernels.bucketize import Boundaries

_FORMAT, _VERSION = "recis-features", 1

_RUNNERS: Mapping[str, Callable[[Sequence[Node], Sequence[tuple[Value, ...]], Run], list[Value]]] = {
    "Hash": run_ids.run_hash,
    "Mod": run_ids.run_mod,
    "Bucketize": run_ids.run_bucketize,
    "Cross": run_ids.run_cross,
    "OneHash": run_ids.run_one_hash,
    "Vocab": run_ids.run_vocab,
    "Lookup": run_ids.run_vocab,
    "Truncate": run_rows.run_truncate,
    "Flatten": run_rows.run_flatten,
    "Sequence(Dedup)": run_rows.run_dedup,
    "Sequence(TimeWindow)": run_rows.run_time_window,
    "Log": run_dense.run_log,
    "Normalize": run_dense.run_normalize,
    "MinMax": run_dense.run_min_max,
    "Clip": run_dense.run_clip,
}


class FeatureEngine:
    """Makes the features of a run out of raw columns.

    Args:
        features: what to make; see FeatureSpec for what becomes of each kind.
        columns: the columns the reader delivers. Given, every chain is checked against them now; otherwise when data
            first arrives. What the chains alone show is checked now in any case.

    Raises:
        ConfigError: names repeat or are unknown (the text suggests near ones), a chain does not fit together, or a
            vocabulary file cannot be read.
    """

    def __init__(self, features: Sequence[FeatureSpec], *, columns: Sequence[Column] | None = None) -> None:
        self.features = tuple(features)
        for spec in self.features:
            if not isinstance(spec, FeatureSpec):
                raise ConfigError(f"features must be FeatureSpec; got {spec!r}")
        self._graph = Graph(self.features)
        self._inputs = tuple(spec for spec in self.features if spec.kind not in LABEL_KINDS)
        self._plans = {labels: self._graph.groups(self._wanted(labels)) for labels in (True, False)}
        self._columns = {labels: self._graph.required_columns(self._wanted(labels)) for labels in (True, False)}
        every = list(zip(self.features, self._graph.ends, strict=True))
        self._ends = {True: every, False: [(spec, ends) for spec, ends in every if spec.kind not in LABEL_KINDS]}
        self._checked: dict[bool, dict[str, ValueType]] = {}
        self._vocabularies = {
            node.number: open_vocabulary(node.op) for node in self._graph.nodes if isinstance(node.op, Vocab | Lookup)
        }
        self._boundaries = {
            node.number: Boundaries(node.op.boundaries) for node in self._graph.nodes if isinstance(node.op, Bucketize)
        }
        self._misses: dict[int, MissCount] = {}
        self._faults = Faults()
        known = {} if columns is None else {column.name: type_of_column(column) for column in columns}
        if columns is not None:
            self._require(known, True)
        self._graph.check(known, self.features)

    def forward(self, raw: RawBatch, *, labels: bool = True) -> Batch:
        """Return the features of a raw batch, on its device.

        Args:
            raw: columns of B samples; may hold more than required_columns().
            labels: False leaves labels, their masks and all weights out, for data that has none.

        Raises:
            ConfigError: a column is missing or not of the type its chains take.
            DataError: a value breaks an op's rule (on a GPU: raised by the next forward).
        """
        self._faults.raise_waiting()
        columns = self._take_columns(raw, labels)
        run = Run(raw, columns, self._vocabularies, self._boundaries, self._misses, self._faults)
        values: dict[int, Value] = {}
        for group in self._plans[labels]:
            if isinstance(group[0].op, Source):
                made = [_start(node, columns) for node in group]
            else:
                inputs = [tuple(values[number] for number in node.inputs) for node in group]
                made = _RUNNERS[name_of(group[0].op)](group, inputs, run)
            values |= zip((node.number for node in group), made, strict=True)
        ends = [(spec, [values[number].data for number in numbers]) for spec, numbers in self._ends[labels]]
        device = next((column.device for column in columns.values()), torch.device("cpu"))
        return pack(ends, raw.num_samples, device)

    __call__ = forward

    @property
    def sparse_keys(self) -> tuple[str, ...]:
        """Names of the sparse features, in batch order."""
        return tuple(name for spec in self.features if spec.kind == "sparse" for name in spec.outputs)

    @property
    def dense_keys(self) -> tuple[str, ...]:
        """Names of the dense features, in batch order."""
        return tuple(spec.name for spec in self.features if spec.kind == "dense")

    @property
    def label_keys(self) -> tuple[str, ...]:
        """Names of the labels, one per column of Batch.labels."""
        return tuple(spec.name for spec in self.features if spec.kind == "label")

    def required_columns(self, *, labels: bool = True) -> tuple[str, ...]:
        """Return the columns that forward needs, with or without labels and weights."""
        return self._columns[labels]

    def counters(self) -> dict[str, MissCount]:
        """Return per feature with a Vocab or Lookup how many values it looked up and how many were unknown, so far."""
        counts = {}
        for number, count in self._misses.items():
            read = MissCount(int(count.unknown), count.looked_up)
            counts |= dict.fromkeys(self._graph.nodes[number].features, read)
        return counts

    def reset_counters(self) -> None:
        """Set all counters to 0."""
        self._misses.clear()

    def to_json(self) -> dict[str, Any]:
        """Return the engine as JSON-able data, with the digests of its vocabulary files."""
        operations = [self._graph.nodes[number].op for number in self._vocabularies]
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "features": [spec.to_json() for spec in self.features],
            "vocabularies": digests(operations, list(self._vocabularies.values())),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any], *, columns: Sequence[Column] | None = None) -> "FeatureEngine":
        """Return the engine that to_json described.

        Raises:
            ConfigError: the data is of another format or a newer version, breaks a rule, or a vocabulary file has
                changed since.
        """
        if data.get("format") != _FORMAT or not isinstance(data.get("version"), int):
            raise ConfigError(f"this is no feature engine: format is {data.get('format')!r}, not {_FORMAT!r}")
        if data["version"] > _VERSION:
            raise ConfigError(
                f"the features are of version {data['version']}, this program knows up to {_VERSION}: update"
            )
        engine = FeatureEngine([FeatureSpec.from_json(spec) for spec in data["features"]], columns=columns)
        found = engine.to_json()["vocabularies"]
        for path, digest in data.get("vocabularies", {}).items():
            if found.get(path) != digest:
                raise ConfigError(f"vocabulary {path}: the file has changed since the features were saved; restore it")
        return engine

    def _wanted(self, labels: bool) -> tuple[FeatureSpec, ...]:
        return self.features if labels else self._inputs

    def _require(self, names: Mapping[str, Any], labels: bool) -> None:
        for name in self._columns[labels]:
            if name not in names:
                users = next(node.features for node in self._graph.nodes if name in columns_of(node.op))
                raise ConfigError(
                    f"feature {users[0]!r} needs column {name!r}, which is missing; {nearest(name, names)}"
                )

    def _take_columns(self, raw: RawBatch, labels: bool) -> dict[str, Data]:
        """Return the required columns in int64, after checking their types if those are new."""
        self._require(raw.columns, labels)
        columns = {name: _normal(raw.columns[name]) for name in self._columns[labels]}
        for name, column in columns.items():
            rows = column.shape[0] if isinstance(column, Tensor) else column.num_bags
            if rows != raw.num_samples:
                raise ConfigError(f"column {name!r} has {rows} rows; the batch has {raw.num_samples}")
        types = {name: type_of_data(column) for name, column in columns.items()}
        if self._checked.get(labels) != types:
            self._graph.check(types, self._wanted(labels))
            self._checked[labels] = types
        return columns


def _normal(data: Data) -> Data:
    """Return a column with ids and offsets in int64 (itself where they are)."""
    if isinstance(data, Tensor):
        return data if data.dtype.is_floating_point else data.to(torch.int64)
    values = data.values
    if isinstance(values, JaggedTensor):
        values = _normal(values)
    elif not values.is_floating_point() and values.dtype not in (torch.uint8, torch.int64):
        values = values.to(torch.int64)
    if values is data.values and data.offsets.dtype == torch.int64:
        return data
    return JaggedTensor(values, offsets=data.offsets.to(torch.int64), weights=data.weights)


def _start(node: Node, columns: Mapping[str, Data]) -> Value:
    """Return a source column, with the weights another column gives it."""
    data, name = columns[node.op.column], node.op.weights
    if name is None:
        return Value(data)
    weights = columns[name]
    where = f"feature {node.features[0]!r}: weights column {name!r}"
    if not isinstance(data, JaggedTensor) or not isinstance(weights, JaggedTensor):
        raise ConfigError(f"{where} and {node.op.column!r} must both be lists")
    if weights.num_values != data.num_values or not isinstance(weights.values, Tensor):
        raise ConfigError(f"{where} must hold one number per entry of {node.op.column!r}, {data.num_values} in all")
    return Value(data.with_values(data.values, weights.values.to(torch.float32)))
