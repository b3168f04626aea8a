"""Types of values between ops: what an op takes, what it gives, and the error when a chain does not fit together.

    kind    "string" (byte-jagged), "id" (int64), "number" (float), "any" (not known yet)
    depth   levels of lists per sample; 0 = one per sample (or `width` of them); None = not known yet

A chain is checked twice with the same rules: when the engine is built, against the declared columns if they are given, and
when columns of a new shape first arrive. Only kinds and depths are compared, never contents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from recis.errors import ConfigError
from recis.features import ops
from recis.features.spec import FeatureSpec
from recis.io import columns as io
from recis.jagged import JaggedTensor


@dataclass(frozen=True, slots=True)
class ValueType:
    """Type of a column or of an op's result."""

    kind: Literal["string", "id", "number", "any"]
    depth: int | None
    width: int = 1
    """Entries per sample where depth is 0."""

    def __str__(self) -> str:
        if self.kind == "any":
            return "a column of unknown type"
        if self.depth is None:
            return f"{self.kind}s"
        if self.depth == 0:
            return f"one {self.kind} per sample" if self.width == 1 else f"{self.width} {self.kind}s per sample"
        return "lists of " * self.depth + f"{self.kind}s"


UNKNOWN = ValueType("any", None)


def type_of_column(column: io.Column) -> ValueType:
    """Return the type that a declared column has in the batch."""
    if isinstance(column, io.Dense):
        return ValueType("number", 0, column.width)
    if isinstance(column, io.Ids):
        return ValueType("id", column.depth)
    if isinstance(column, io.Floats):
        return ValueType("number", column.depth)
    if isinstance(column, io.Strings):
        return ValueType("string", column.depth) if column.tokenizer is None else ValueType("id", 1)
    return ValueType("id" if isinstance(column, io.Group | io.Integer) else "number", 0)


def type_of_data(data: Tensor | JaggedTensor) -> ValueType:
    """Return the type of a column as it arrived, from dtypes and nesting alone."""
    if isinstance(data, Tensor):
        return ValueType("number" if data.is_floating_point() else "id", 0, data.shape[1] if data.ndim == 2 else 1)
    depth, level = 1, data
    while isinstance(level.values, JaggedTensor):
        depth, level = depth + 1, level.values
    if level.is_strings:
        return ValueType("string", depth - 1)
    return ValueType("number" if level.flat_values.is_floating_point() else "id", depth)


def result_type(op: ops.Op, inputs: Sequence[ValueType], where: str) -> ValueType:
    """Return what `op` gives for these inputs (two for Cross, one otherwise).

    Raises:
        ConfigError: it does not take them; `where` names feature and position.
    """
    (first, *others) = inputs
    match op:
        case ops.Hash() | ops.Vocab() | ops.Lookup():
            _need(first, ("string", "id"), where, "Bucketize makes ids of numbers")
            if isinstance(op, ops.Lookup) and op.pairs and first.kind != "any":
                key = "string" if isinstance(op.pairs[0][0], str) else "id"
                _need(first, (key,), where, "the keys of its map must be of the column's kind")
            return replace(first, kind="id")
        case ops.Mod() | ops.MultiHash():
            _need(first, ("id",), where, "put a Hash before it")
            return replace(first, kind="id")
        case ops.Bucketize():
            _need(first, ("number", "id"), where, "strings have no order here; Hash makes ids of them")
            return replace(first, kind="id")
        case ops.Log() | ops.Normalize() | ops.MinMax() | ops.Clip():
            _need(first, ("number", "id"), where, "it takes numbers")
            return replace(first, kind="number")
        case ops.Cross():
            for side in (first, *others):
                _need(side, ("id",), where, "put a Hash into the feature that it crosses")
                if side.depth is not None and side.depth > 1:
                    raise ConfigError(f"{where} takes one list of ids per sample, not {side}; add Flatten() there")
            return ValueType("id", 1)
        case ops.Flatten():
            _need_depth(first, 2, where)
            return first if first.depth is None else replace(first, depth=first.depth - 1)
        case ops.Truncate():
            _need_depth(first, op.level + 1, where)
            if op.pad and first.kind != "string":
                _need_depth(first, op.level + 2, f"{where} with pad=True")
            return first
        case ops.Sequence():
            _need_depth(first, 1, where)
            if isinstance(op.rule, ops.Dedup) and op.rule.by is None:
                _need(first, ("id",), where, "put a Hash before it, or name an id column: Dedup(by=...)")
                if first.depth is not None and first.depth > 1:
                    raise ConfigError(f"{where} compares ids, not {first}; name an id column: Dedup(by=...)")
            return first


def check_output(spec: FeatureSpec, found: ValueType) -> None:
    """Raise ConfigError unless a feature of this kind can be of this type."""
    where = f"feature {spec.name!r} ({spec.kind})"
    match spec.kind:
        case "sparse":
            _need(found, ("id",), where, "end the chain with Hash, Vocab, Lookup or Bucketize")
            if found.depth is not None and found.depth > 1:
                raise ConfigError(f"{where} takes one list of ids per sample, not {found}; add Flatten()")
        case "dense":
            _need(found, ("number", "id"), where, "make it a sparse feature")
            _need_single(found, where, any_width=True)
        case "group":
            _need(found, ("id",), where, "end the chain with Hash")
            _need_single(found, where)
        case "label" | "label_mask" | "label_weight" | "weight":
            _need(found, ("number", "id"), where, "it is a number per sample")
            _need_single(found, where)
        case "extra" | "hidden":
            pass


def aligned_columns_fit(op: ops.Op, columns: dict[str, ValueType], where: str) -> None:
    """Raise ConfigError unless the columns a Sequence rule names have the types it needs."""
    if not isinstance(op, ops.Sequence):
        return
    if isinstance(op.rule, ops.Dedup) and op.rule.by is not None:
        found = columns[op.rule.by]
        _need(found, ("id",), f"{where}: column {op.rule.by!r}", "name a column of ids")
        if found.depth not in (1, None):
            raise ConfigError(f"{where}: column {op.rule.by!r} must be lists of ids; it is {found}")
    if isinstance(op.rule, ops.TimeWindow):
        time, now = columns[op.rule.time], columns[op.rule.now]
        for name, found in ((op.rule.time, time), (op.rule.now, now)):
            _need(found, ("number", "id"), f"{where}: column {name!r}", "times are numbers")
        if time.depth not in (1, None):
            raise ConfigError(f"{where}: column {op.rule.time!r} must be lists of times; it is {time}")
        _need_single(now, f"{where}: column {op.rule.now!r}")


def _need(found: ValueType, kinds: tuple[str, ...], where: str, way_out: str) -> None:
    if found.kind != "any" and found.kind not in kinds:
        raise ConfigError(f"{where} takes {' or '.join(kinds)}s, not {found}; {way_out}")


def _need_depth(found: ValueType, depth: int, where: str) -> None:
    if found.depth is not None and found.depth < depth:
        raise ConfigError(f"{where} needs {'lists of ' * depth}values per sample, not {found}; leave it out")


def _need_single(found: ValueType, where: str, *, any_width: bool = False) -> None:
    if found.depth not in (0, None):
        raise ConfigError(f"{where} takes one value per sample, not {found}")
    if found.depth == 0 and found.width != 1 and not any_width:
        raise ConfigError(f"{where} takes one value per sample, not {found}")
