"""One output of the feature engine: its name, its kind, the column it starts from and its chain of ops; and as JSON.

kind          becomes, in the Batch                          from
sparse        a feature of `sparse`, [F, B] ids              ids, or strings and numbers that a chain makes ids
dense         columns of `dense`                             numbers [B] or [B, width], integers
label         a column of `labels`, task after task          a number per sample; NaN = missing, masked
label_mask    the column of `label_mask` of that label       0 or 1 per sample
label_weight  the column of `label_weights` of that label    a number per sample
weight        `weights`                                      a number per sample
group         `group_ids`                                    an id per sample
extra         an entry of `extras`                           anything
hidden        nothing; for Cross to refer to                 anything
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from recis.errors import ConfigError, nearest
from recis.features.ops import OPS, RULES, Cross, MultiHash, Op

Kind = Literal[
    "sparse", "dense", "label", "label_mask", "label_weight", "weight", "group", "extra", "hidden"
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)
LABEL_KINDS: tuple[Kind, ...] = ("label", "label_mask", "label_weight", "weight")  # absent when only predicting


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSpec:
    """One feature."""

    name: str
    kind: Kind
    source: str | None = None
    """Column the chain starts from; None: the column called like the feature (none where the chain starts with Cross)."""
    ops: tuple[Op, ...] = ()
    weights: str | None = None
    """Column of one weight per entry, shaped like the source; None: the weights that came with the source, if any."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ops", tuple(self.ops))
        where = f"feature {self.name!r}"
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"a feature's name must be a non-empty string; got {self.name!r}")
        if self.kind not in KINDS:
            raise ConfigError(f"{where}: no kind {self.kind!r}; {nearest(str(self.kind), KINDS)}")
        for position, op in enumerate(self.ops):
            if not isinstance(op, OPS):
                raise ConfigError(f"{where}: op {position} is {op!r}; {nearest(type(op).__name__, _names(OPS))}")
            if isinstance(op, Cross) and position > 0:
                raise ConfigError(
                    f"{where}: Cross makes ids of two features, so it stands first; it stands at {position}"
                )
            if isinstance(op, MultiHash) and position < len(self.ops) - 1:
                raise ConfigError(f"{where}: MultiHash has several outputs, so it stands last; it stands at {position}")
        if self.is_cross and (self.source is not None or self.weights is not None):
            raise ConfigError(f"{where}: Cross names its inputs itself; leave source and weights out")
        if self.ops and isinstance(self.ops[-1], MultiHash) and self.kind != "sparse":
            raise ConfigError(f"{where}: MultiHash makes sparse features; the kind is {self.kind!r}")

    @property
    def is_cross(self) -> bool:
        """Whether the chain starts with Cross."""
        return bool(self.ops) and isinstance(self.ops[0], Cross)

    @property
    def column(self) -> str:
        """The column the chain starts from (meaningless where is_cross)."""
        return self.source or self.name

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what the chain makes: the feature's own, or one per hash of a MultiHash."""
        if self.ops and isinstance(self.ops[-1], MultiHash):
            return tuple(f"{self.name}_multi_hash_{k}" for k in range(len(self.ops[-1].num_buckets)))
        return (self.name,)

    def to_json(self) -> dict[str, Any]:
        """Return the feature as JSON-able data; from_json gives an equal one."""
        data: dict[str, Any] = {"name": self.name, "kind": self.kind}
        data |= {key: value for key in ("source", "weights") if (value := getattr(self, key)) is not None}
        return data | {"ops": [_op_to_json(op) for op in self.ops]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "FeatureSpec":
        """Return the feature that to_json described.

        Raises:
            ConfigError: a field, an op or its parameter is unknown, missing or breaks its rule.
        """
        fields = {**data, "ops": tuple(_op_from_json(op, OPS) for op in data.get("ops", ()))}
        return _build(FeatureSpec, fields, f"feature {data.get('name')!r}")


def _op_to_json(op: Any) -> dict[str, Any]:
    fields = {field.name: getattr(op, field.name) for field in dataclasses.fields(op)}
    return {"op": type(op).__name__, **{name: _field_to_json(value) for name, value in fields.items()}}


def _field_to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _op_to_json(value)
    return [_field_to_json(entry) for entry in value] if isinstance(value, tuple) else value


def _op_from_json(data: Mapping[str, Any], types: tuple[type, ...]) -> Any:
    by_name = {kind.__name__: kind for kind in types}
    name = str(data.get("op"))
    if name not in by_name:
        raise ConfigError(f"no op {name!r}; {nearest(name, by_name)}")
    fields = {key: _field_from_json(value) for key, value in data.items() if key != "op"}
    return _build(by_name[name], fields, f"op {name}")


def _field_from_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _op_from_json(value, RULES)
    return tuple(_field_from_json(entry) for entry in value) if isinstance(value, list) else value


def _build(kind: type, fields: Mapping[str, Any], where: str) -> Any:
    known = [field.name for field in dataclasses.fields(kind)]
    for name in fields:
        if name not in known:
            raise ConfigError(f"{where} has no field {name!r}; {nearest(name, known)}")
    try:
        return kind(**fields)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None


def _names(types: tuple[type, ...]) -> list[str]:
    return [kind.__name__ for kind in types]
