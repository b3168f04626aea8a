"""What a column of a file means: its kind, its name in the batch, and what happens to a null.

    kind       in the file                          in the batch
    Dense      number, or list of `width` numbers   float32 [B], or [B, width] where width > 1
    Ids        integer, or lists `depth` deep       JaggedTensor int64 (nested where depth > 1), with weights if named
    Floats     lists of numbers, `depth` deep       JaggedTensor float32
    Strings    string or bytes, or lists of them    byte-jagged JaggedTensor (under `depth` levels of lists)
    Label      number in [low, high]                float32 [B]; NaN where optional and missing
    Weight     number >= 0                          float32 [B]
    Group      integer                              int64 [B]
    Integer    integer, date or timestamp           int64 [B], in the unit of the file

Every kind raises on a null unless its default is given: data never changes silently. `source` is the column's name in the
file where it differs from the name in the batch. In CSV a list is one cell, cut at `Csv.list_separator`; an empty cell is an
empty list there, and a null everywhere else.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from recis.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True)
class Dense:
    """A number, or a list of exactly `width` numbers, per sample."""

    name: str
    _: KW_ONLY
    width: int = 1
    default: float | None = None
    """Value for a null (for all `width` numbers of a null list); None raises."""
    nonfinite: float | None = None
    """Value that replaces NaN and infinities; None raises."""
    source: str | None = None

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"column {self.name!r}: width must be at least 1; got {self.width}")


@dataclass(frozen=True, slots=True)
class Ids:
    """Integer ids: one per sample, a list, or lists of lists. Any 64-bit value is an id; unsigned ones keep their bits."""

    name: str
    _: KW_ONLY
    depth: int = 1
    """Levels of lists in the batch; at 1 the file may hold single integers, which become lists of one."""
    default: tuple[int, ...] | None = None
    """Ids for a null list or null integer; () makes it an empty list; None raises. Only () where depth > 1."""
    drop_nulls: bool = False
    """Whether a null inside a list is dropped; False raises."""
    weights: str | None = None
    """Column of the file with one weight per id, shaped like this one."""
    source: str | None = None

    def __post_init__(self) -> None:
        _check_depth(self.name, self.depth, self.default, least=1)
        if self.weights is not None and self.depth != 1:
            raise ConfigError(f"column {self.name!r}: weights need depth=1; got depth={self.depth}")
        if self.weights is not None and self.drop_nulls:
            raise ConfigError(f"column {self.name!r}: drop_nulls would part the ids from their weights; leave one out")
        if self.weights is not None and self.default:
            raise ConfigError(f"column {self.name!r}: default ids have no weights; use default=() or leave weights out")


@dataclass(frozen=True, slots=True)
class Floats:
    """Lists of numbers that belong to a sequence: prices, times, scores along ids."""

    name: str
    _: KW_ONLY
    depth: int = 1
    default: tuple[float, ...] | None = None
    """Numbers for a null list; () makes it an empty list; None raises. Only () where depth > 1."""
    nonfinite: float | None = None
    """Value that replaces NaN, infinities and nulls inside a list; None raises."""
    source: str | None = None

    def __post_init__(self) -> None:
        _check_depth(self.name, self.depth, self.default, least=1)


@dataclass(frozen=True, slots=True)
class Strings:
    """Strings as bytes: one per sample, or `depth` levels of lists of them."""

    name: str
    _: KW_ONLY
    depth: int = 0
    default: str | tuple[str, ...] | None = None
    """A string for a null where depth is 0, strings for a null list where it is 1, () deeper; None raises."""
    drop_nulls: bool = False
    """Whether a null inside a list is dropped; False raises."""
    utf8: bool = True
    """Whether bytes that are no UTF-8 raise; False takes any bytes."""
    source: str | None = None
    tokenizer: str | None = None
    """Folder with a tokenizer.json: the batch then has token ids, int64, made in the reader's threads. Needs depth 0."""
    max_tokens: int = 64
    """Tokens of a string that are kept, special ones included."""

    def __post_init__(self) -> None:
        if self.tokenizer is not None and (self.depth != 0 or not self.utf8 or self.max_tokens < 3):
            raise ConfigError(
                f"column {self.name!r}: a tokenizer needs depth=0, utf8=True and max_tokens of at least 3; got "
                f"depth={self.depth}, utf8={self.utf8}, max_tokens={self.max_tokens}"
            )
        if self.depth == 0 and isinstance(self.default, tuple):
            raise ConfigError(f"column {self.name!r}: the default of one string is a string; got {self.default!r}")
        if self.depth > 0 and isinstance(self.default, str):
            raise ConfigError(f"column {self.name!r}: the default of a list is a tuple; got {self.default!r}")
        _check_depth(self.name, self.depth, self.default if self.depth else None, least=0)


@dataclass(frozen=True, slots=True)
class Label:
    """What a task learns; outside [low, high] raises. None leaves that side open."""

    name: str
    _: KW_ONLY
    low: float | None = 0.0
    high: float | None = 1.0
    optional: bool = False
    """Whether a null is a missing label, NaN in the batch, which the feature engine masks; False raises."""
    source: str | None = None

    def __post_init__(self) -> None:
        if self.low is not None and self.high is not None and not self.low <= self.high:
            raise ConfigError(f"column {self.name!r}: low must not be above high; got {self.low} and {self.high}")


@dataclass(frozen=True, slots=True)
class Weight:
    """A sample weight: finite and not negative."""

    name: str
    _: KW_ONLY
    default: float | None = None
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """The integer id of the query, user or session that grouped metrics rank within."""

    name: str
    _: KW_ONLY
    default: int | None = None
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Integer:
    """An integer that is no id: a row number, an action, a date or time in the file's own unit."""

    name: str
    _: KW_ONLY
    default: int | None = None
    source: str | None = None


Column = Dense | Ids | Floats | Strings | Label | Weight | Group | Integer

KINDS: tuple[type, ...] = (Dense, Ids, Floats, Strings, Label, Weight, Group, Integer)


def source_of(column: Column) -> str:
    """Return the column's name in the file."""
    return column.source or column.name


def sources_of(columns: Sequence[Column]) -> tuple[str, ...]:
    """Return the distinct names in the file that the columns need, in order."""
    names: dict[str, None] = {}
    for column in columns:
        names[source_of(column)] = None
        if isinstance(column, Ids) and column.weights is not None:
            names[column.weights] = None
    return tuple(names)


def check_columns(columns: Sequence[Column]) -> None:
    """Raise ConfigError unless the columns are of known kinds and their names are distinct and not empty."""
    if not columns:
        raise ConfigError("columns must name at least one column of the data")
    seen: set[str] = set()
    for column in columns:
        if not isinstance(column, KINDS):
            kinds = ", ".join(kind.__name__ for kind in KINDS)
            raise ConfigError(f"columns must be {kinds}; got {column!r}")
        if not column.name or source_of(column).startswith("__recis_"):
            raise ConfigError(f"a column's name must not be empty or begin with '__recis_'; got {column!r}")
        if column.name in seen:
            raise ConfigError(
                f"column {column.name!r} is given twice; rename one: {type(column).__name__}(name, source=...)"
            )
        seen.add(column.name)


def to_json(column: Column) -> dict[str, Any]:
    """Return the column as JSON-able data: its kind and the fields that differ from their defaults."""
    fields = {
        field.name: value
        for field in dataclasses.fields(column)
        if (value := getattr(column, field.name)) != field.default
    }
    return {"kind": type(column).__name__, **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}}


def from_json(data: Mapping[str, Any]) -> Column:
    """Return the column that `to_json` described.

    Raises:
        ConfigError: the kind or a field is unknown.
    """
    kinds = {kind.__name__: kind for kind in KINDS}
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    kind = fields.pop("kind", None)
    if kind not in kinds:
        raise ConfigError(f"no column kind {kind!r}; {nearest(str(kind), kinds)}")
    known = [field.name for field in dataclasses.fields(kinds[kind])]
    for name in fields:
        if name not in known:
            raise ConfigError(f"column kind {kind} has no field {name!r}; {nearest(name, known)}")
    return kinds[kind](**fields)


def _check_depth(name: str, depth: int, default: object, *, least: int) -> None:
    if depth < least:
        raise ConfigError(f"column {name!r}: depth must be at least {least}; got {depth}")
    if depth > 1 and default:
        raise ConfigError(f"column {name!r}: a nested list's default can only be (); got {default!r}")
