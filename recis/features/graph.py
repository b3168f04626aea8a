"""The graph of a feature engine: every distinct step once, and the groups of steps that run as one call.

A node is a source column or an op on other nodes. Equal ops on equal inputs are one node, whatever the features are
called, so identical chains run once. The level of a node is one more than that of its deepest input; the nodes of one
level with the same type of op are a group. Types are checked along the nodes by the rules of types.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from recis.errors import ConfigError, nearest
from recis.features import ops
from recis.features.spec import FeatureSpec
from recis.features.types import UNKNOWN, ValueType, aligned_columns_fit, check_output, result_type
from recis_kernels.multi_hash import LinearHash, linear_hashes


@dataclass(frozen=True, slots=True)
class Source:
    """A column as it comes, with the column of its weights."""

    column: str
    weights: str | None


@dataclass(frozen=True, slots=True)
class OneHash:
    """One output of a MultiHash."""

    op: ops.MultiHash
    linear: LinearHash


@dataclass(slots=True)
class Node:
    """One step. `features` are the features it works for, in order; `column` is the source at the head of its chain."""

    number: int
    op: Any
    inputs: tuple[int, ...]
    level: int
    column: str | None
    aligned: bool
    """Whether its outermost entries are still entries of the source column, in order."""
    tracked: bool = False
    """Whether a later op asks which entries of the source these are."""
    features: list[str] = field(default_factory=list)

    @property
    def where(self) -> str:
        """For messages: which feature, which op."""
        return f"feature {self.features[0]!r}: {name_of(self.op)}"


class Graph:
    """Nodes in the order of their levels' needs, and the node of every output.

    Raises:
        ConfigError: features repeat, refer to each other in a circle, or name an unknown column or label.
    """

    def __init__(self, features: Sequence[FeatureSpec]) -> None:
        self.features = tuple(features)
        self.nodes: list[Node] = []
        self._known: dict[Any, int] = {}  # (op, inputs) -> node
        self._ends: dict[FeatureSpec, tuple[int, ...]] = {}
        self._specs = _by_name(self.features)
        self._open: list[str] = []
        self.ends = [self._chain(spec) for spec in self.features]
        for node in reversed(self.nodes):  # inputs come before what they go into
            asks = node.tracked or (not isinstance(node.op, Source) and bool(columns_of(node.op)))
            for number in node.inputs:
                self.nodes[number].tracked |= asks

    def required_columns(self, features: Sequence[FeatureSpec]) -> tuple[str, ...]:
        """Return the columns that these features need, in order of first need."""
        columns: dict[str, None] = {}
        for number in sorted(self.needed(features)):
            columns |= dict.fromkeys(columns_of(self.nodes[number].op))
        return tuple(columns)

    def needed(self, features: Sequence[FeatureSpec]) -> set[int]:
        """Return the nodes that these features need."""
        wanted = set(features)
        waiting = [n for spec, ends in zip(self.features, self.ends, strict=True) if spec in wanted for n in ends]
        found: set[int] = set()
        while waiting:
            number = waiting.pop()
            if number not in found:
                found.add(number)
                waiting += self.nodes[number].inputs
        return found

    def groups(self, features: Sequence[FeatureSpec]) -> list[list[Node]]:
        """Return what these features need in an order that can run; each group is one type of op at one level."""
        grouped: dict[tuple[int, str], list[Node]] = {}
        for number in sorted(self.needed(features)):
            node = self.nodes[number]
            grouped.setdefault((node.level, name_of(node.op)), []).append(node)
        return [grouped[key] for key in sorted(grouped)]

    def check(self, columns: Mapping[str, ValueType], features: Sequence[FeatureSpec]) -> None:
        """Check every chain of these features against column types; columns that are left out are of unknown type.

        Raises:
            ConfigError: an op does not take what it is given, or a feature's kind what its chain makes.
        """
        needed = self.needed(features)
        types: dict[int, ValueType] = {}
        for node in self.nodes:
            if node.number in needed:
                types[node.number] = self._type_of(node, types, columns)
        wanted = set(features)
        for spec, ends in zip(self.features, self.ends, strict=True):
            for end in ends if spec in wanted else ():
                check_output(spec, types[end])

    def _type_of(self, node: Node, types: Mapping[int, ValueType], columns: Mapping[str, ValueType]) -> ValueType:
        if isinstance(node.op, Source):
            if node.op.weights is not None:
                weights = columns.get(node.op.weights, UNKNOWN)
                if weights.kind not in ("number", "any"):
                    raise ConfigError(
                        f"feature {node.features[0]!r}: weights column {node.op.weights!r} must hold numbers; it is {weights}"
                    )
            return columns.get(node.op.column, UNKNOWN)
        op = node.op.op if isinstance(node.op, OneHash) else node.op
        aligned_columns_fit(op, {name: columns.get(name, UNKNOWN) for name in ops.columns_of(op)}, node.where)
        return result_type(op, [types[number] for number in node.inputs], node.where)

    def _chain(self, spec: FeatureSpec) -> tuple[int, ...]:
        """Return the nodes at the end of a feature's chain: one, or one per hash of a MultiHash."""
        if spec in self._ends:
            return self._ends[spec]
        if spec.name in self._open:
            circle = " -> ".join([*self._open[self._open.index(spec.name) :], spec.name])
            raise ConfigError(f"features cross each other in a circle: {circle}")
        self._open.append(spec.name)
        chain = list(spec.ops)
        if spec.is_cross:
            cross = chain.pop(0)
            assert isinstance(cross, ops.Cross)
            end = self._add(replace(cross, a="", b=""), (self._side(cross.a, spec), self._side(cross.b, spec)), spec)
        else:
            end = self._add(Source(spec.column, spec.weights), (), spec)
        for op in chain:
            if isinstance(op, ops.MultiHash):
                ends = tuple(self._add(OneHash(op, one), (end,), spec) for one in linear_hashes(op.num_buckets))
                break
            end = self._add(_plain(op), (end,), spec)
        else:
            ends = (end,)
        self._open.pop()
        self._ends[spec] = ends
        return ends

    def _side(self, name: str, spec: FeatureSpec) -> int:
        """Return the node that a Cross means by a name: a feature's end, else a column."""
        other = self._specs.get(name) if name != spec.name else None  # a feature's own name means its column
        if other is None:
            return self._add(Source(name, None), (), spec)
        ends = self._chain(other)
        if len(ends) != 1:
            raise ConfigError(f"feature {spec.name!r}: Cross of {name!r}, which MultiHash makes {len(ends)} features")
        return ends[0]

    def _add(self, op: Any, inputs: tuple[int, ...], spec: FeatureSpec) -> int:
        key = (name_of(op), op, inputs)
        if key not in self._known:
            befores = [self.nodes[number] for number in inputs]
            column = op.column if isinstance(op, Source) else befores[0].column if len(befores) == 1 else None
            aligned = all(before.aligned for before in befores) and not _breaks_alignment(op)
            level = 1 + max((before.level for before in befores), default=-1)
            self._known[key] = len(self.nodes)
            self.nodes.append(Node(len(self.nodes), op, inputs, level, column, aligned))
        node = self.nodes[self._known[key]]
        if spec.name not in node.features:
            node.features.append(spec.name)
        if columns_of(op) and not all(self.nodes[number].aligned for number in inputs):
            raise ConfigError(
                f"{node.where} names aligned columns, but an op before it no longer keeps the entries of its column: "
                "put Sequence first"
            )
        return node.number


def name_of(op: Any) -> str:
    """Return what ops of one call have in common: the type of the op, and of the rule of a Sequence."""
    return f"Sequence({type(op.rule).__name__})" if isinstance(op, ops.Sequence) else type(op).__name__


def _plain(op: ops.Op) -> ops.Op:
    """LastN is a Truncate: one call cuts for both."""
    if isinstance(op, ops.Sequence) and isinstance(op.rule, ops.LastN):
        return ops.Truncate(op.rule.n, drop="left")
    return op


def _breaks_alignment(op: Any) -> bool:
    return isinstance(op, ops.Cross | ops.Flatten) or (isinstance(op, ops.Truncate) and op.pad)


def columns_of(op: Any) -> tuple[str, ...]:
    """Return the columns that a node with this op reads itself."""
    if isinstance(op, Source):
        return (op.column,) if op.weights is None else (op.column, op.weights)
    return () if isinstance(op, OneHash) else ops.columns_of(op)


def _by_name(features: Sequence[FeatureSpec]) -> dict[str, FeatureSpec]:
    """Return the features that Cross can name; masks and weights of a label bear the label's name."""
    named: dict[str, FeatureSpec] = {}
    outputs: dict[str, str] = {}
    labels = [spec.name for spec in features if spec.kind == "label"]
    attached: set[tuple[str, str]] = set()
    for spec in features:
        if spec.kind in ("label_mask", "label_weight"):
            if spec.name not in labels:
                raise ConfigError(f"{spec.kind} {spec.name!r} belongs to no label; {nearest(spec.name, labels)}")
            if (spec.kind, spec.name) in attached:
                raise ConfigError(f"label {spec.name!r} has two features of kind {spec.kind}; remove one")
            attached.add((spec.kind, spec.name))
            continue
        for output in spec.outputs:
            if output in outputs:
                raise ConfigError(f"two features are called {output!r} ({outputs[output]} and {spec.kind}); rename one")
            outputs[output] = spec.kind
        named[spec.name] = spec
    for kind in ("weight", "group"):
        names = [spec.name for spec in features if spec.kind == kind]
        if len(names) > 1:
            raise ConfigError(f"a batch has one {kind}; got {len(names)}: {', '.join(map(repr, names))}")
    return named
