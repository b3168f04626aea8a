"""The declarative ops of feature chains: what is done to a column, as frozen values that write themselves down as JSON.

    Hash       strings or ids -> ids                      Log, Normalize, MinMax, Clip    numbers -> numbers
    Mod        ids -> ids, unsigned                       Truncate, Sequence, Flatten     rows of any kind -> rows
    Bucketize  numbers -> ids                             Vocab, Lookup                   strings or ids -> ids
    Cross      two id features -> ids                     MultiHash                       ids -> up to four id features

An op holds its parameters and checks them; it neither runs nor knows a column. recis_kernels holds the loops, types.py
says which op may follow which.
"""

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Literal

from recis.errors import ConfigError
from recis_kernels.bucketize import Boundaries
from recis_kernels.id_hash import KINDS, HashKind
from recis_kernels.multi_hash import linear_hashes

_INT64 = (-(2**63), 2**63 - 1)
TICKS_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


@dataclass(frozen=True, slots=True)
class Hash:
    """Hash strings (their bytes) or ids (8 bytes, little endian): "farm" = Fingerprint64, "murmur" = MurmurHash64A.

    Drops the byte level of a string column; lists and weights stay.
    """

    kind: HashKind = "farm"
    num_buckets: int | None = None
    """None: the raw 64 bits, signed. 0: AND 2**63 - 1. n > 0: unsigned mod n."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"Hash: kind must be one of {', '.join(KINDS)}; got {self.kind!r}")
        _check_buckets("Hash", self.num_buckets)


@dataclass(frozen=True, slots=True)
class Mod:
    """Unsigned 64-bit modulo: negative ids count from 2**64."""

    n: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= _INT64[1]:
            raise ConfigError(f"Mod: n must be in [1, 2**63); got {self.n}")


@dataclass(frozen=True, slots=True)
class Bucketize:
    """Number of boundaries <= x: a value on a boundary goes up, NaN to the last bucket."""

    boundaries: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "boundaries", tuple(self.boundaries))
        try:
            Boundaries(self.boundaries)
        except ValueError as error:
            raise ConfigError(f"Bucketize: {error}") from None


@dataclass(frozen=True, slots=True)
class Cross:
    """Ids of all pairs (distinct a) x (distinct b) of a sample, a-major; weights multiply. Stands first in its chain.

    `a` and `b` name features of the engine (their finished ids, `hidden` ones too), else columns.
    """

    a: str
    b: str
    num_buckets: int | None = None
    """As in Hash."""

    def __post_init__(self) -> None:
        _check_buckets("Cross", self.num_buckets)


@dataclass(frozen=True, slots=True)
class Truncate:
    """Keep `keep` entries per row; "left" drops the oldest, "right" the newest. Weights are cut alike."""

    keep: int
    _: KW_ONLY
    drop: Literal["left", "right"] = "left"
    level: int = 0
    """Which level of a nested column, 0 = outermost (whole inner rows are cut)."""
    pad: bool = False
    """Append empty inner rows (weight 0) up to `keep`."""
    strict: bool = False
    """Raise DataError instead of cutting."""

    def __post_init__(self) -> None:
        if self.keep < 0 or self.level < 0:
            raise ConfigError(f"Truncate: keep and level must be at least 0; got {self.keep} and {self.level}")
        if self.drop not in ("left", "right"):
            raise ConfigError(f'Truncate: drop must be "left" or "right"; got {self.drop!r}')


@dataclass(frozen=True, slots=True)
class Flatten:
    """Join the two outermost levels of a nested column: a sample's bag then holds all inner entries, in order."""


@dataclass(frozen=True, slots=True)
class MultiHash:
    """Up to four linear hashes of each id; a feature `f` gives `f_multi_hash_0`, ... Stands last in its chain."""

    num_buckets: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_buckets", tuple(self.num_buckets))
        try:
            linear_hashes(self.num_buckets)
        except ValueError as error:
            raise ConfigError(f"MultiHash: {error}") from None


@dataclass(frozen=True, slots=True)
class Vocab:
    """Line number (from 0) of the equal line of a UTF-8 text file; for id columns the lines are integers.

    A value without a line becomes `unknown` and is counted (`FeatureEngine.counters()`), never dropped. With unknown = 0
    the file's first line stands for unknown values: keep it for a word like `<unknown>`.
    """

    path: str
    unknown: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(self.path))
        _check_int64("Vocab: unknown", self.unknown)


@dataclass(frozen=True, slots=True)
class Lookup:
    """Index of the equal key of a map, whose keys are all strings or all integers; else `unknown`, counted."""

    map: Mapping[str, int] | Mapping[int, int] | tuple[tuple[str | int, int], ...]
    """Given as a mapping or as pairs; kept as pairs."""
    unknown: int = 0

    @property
    def pairs(self) -> tuple[tuple[str | int, int], ...]:
        """(key, index) in the order given."""
        pairs = self.map.items() if isinstance(self.map, Mapping) else self.map
        return tuple((key, index) for key, index in pairs)

    def __post_init__(self) -> None:
        pairs = self.pairs
        object.__setattr__(self, "map", pairs)
        keys = [key for key, _ in pairs]
        if not all(isinstance(key, str) for key in keys) and not all(type(key) is int for key in keys):
            raise ConfigError("Lookup: the keys of map must be all strings or all integers")
        if len(set(keys)) != len(keys):
            raise ConfigError(
                f"Lookup: a key stands twice in map: {next(key for key in keys if keys.count(key) > 1)!r}"
            )
        for number in (self.unknown, *(value for _, value in pairs), *(key for key in keys if type(key) is int)):
            _check_int64("Lookup: a number", number)


@dataclass(frozen=True, slots=True)
class Log:
    """ln(x + offset); x + offset <= 0 raises DataError naming feature and row (put a Clip before it)."""

    offset: float = 1.0

    def __post_init__(self) -> None:
        _check_finite("Log", offset=self.offset)


@dataclass(frozen=True, slots=True)
class Normalize:
    """(x - mean) / std."""

    mean: float
    std: float

    def __post_init__(self) -> None:
        _check_finite("Normalize", mean=self.mean, std=self.std)
        if not self.std > 0:
            raise ConfigError(f"Normalize: std must be above 0; got {self.std}: leave a constant column out")


@dataclass(frozen=True, slots=True)
class MinMax:
    """(x - low) / (high - low): [low, high] becomes [0, 1]; what lies outside stays outside (add Clip(0, 1))."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_finite("MinMax", low=self.low, high=self.high)
        if not self.high > self.low:
            raise ConfigError(f"MinMax: high must be above low; got {self.low} and {self.high}")


@dataclass(frozen=True, slots=True)
class Clip:
    """Limit x to [low, high]; None leaves a side open."""

    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        bounds = {"low": self.low, "high": self.high}
        _check_finite("Clip", **{name: bound for name, bound in bounds.items() if bound is not None})
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ConfigError(f"Clip: low must not be above high; got {self.low} and {self.high}")


@dataclass(frozen=True, slots=True)
class LastN:
    """Keep the last n entries of a sequence."""

    n: int

    def __post_init__(self) -> None:
        if self.n < 0:
            raise ConfigError(f"LastN: n must be at least 0; got {self.n}")


@dataclass(frozen=True, slots=True)
class Dedup:
    """Keep one of equal entries. `by` names the aligned id column that decides; None: the sequence's own ids."""

    by: str | None = None
    keep: Literal["first", "last"] = "last"

    def __post_init__(self) -> None:
        if self.keep not in ("first", "last"):
            raise ConfigError(f'Dedup: keep must be "first" or "last"; got {self.keep!r}')


@dataclass(frozen=True, slots=True)
class TimeWindow:
    """Keep the entries at most `seconds` before `now`, drop older and later ones (a later one would be the future)."""

    seconds: float
    _: KW_ONLY
    time: str
    """The aligned column of entry times."""
    now: str
    """The column with the time of the sample itself."""
    unit: Literal["s", "ms", "us", "ns"] = "s"
    """Unit of both columns."""

    def __post_init__(self) -> None:
        if not (self.seconds >= 0 and math.isfinite(self.seconds)):
            raise ConfigError(f"TimeWindow: seconds must be at least 0; got {self.seconds}")
        if self.unit not in TICKS_PER_SECOND:
            raise ConfigError(f"TimeWindow: unit must be one of {', '.join(TICKS_PER_SECOND)}; got {self.unit!r}")


@dataclass(frozen=True, slots=True)
class Sequence:
    """Cut a sequence by a rule. Aligned sequences (one entry per event each) that get the same rules stay aligned.

    The columns a rule names must be aligned with the column at the head of the chain; they are cut by the Sequence and
    Truncate ops that stand before in the chain, so rules can follow one another.
    """

    rule: LastN | Dedup | TimeWindow

    def __post_init__(self) -> None:
        if not isinstance(self.rule, LastN | Dedup | TimeWindow):
            raise ConfigError(f"Sequence: rule must be LastN, Dedup or TimeWindow; got {self.rule!r}")


Op = (
    Hash | Mod | Bucketize | Cross | Truncate | Flatten | MultiHash | Vocab | Lookup
    | Log | Normalize | MinMax | Clip | Sequence
)  # fmt: skip
OPS: tuple[type, ...] = (
    Hash, Mod, Bucketize, Cross, Truncate, Flatten, MultiHash, Vocab, Lookup,
    Log, Normalize, MinMax, Clip, Sequence,
)  # fmt: skip
RULES: tuple[type, ...] = (LastN, Dedup, TimeWindow)


def columns_of(op: Op) -> tuple[str, ...]:
    """Return the columns an op reads besides the one its chain runs on (Cross names features or columns instead)."""
    if not isinstance(op, Sequence):
        return ()
    rule = op.rule
    if isinstance(rule, TimeWindow):
        return (rule.time, rule.now)
    return (rule.by,) if isinstance(rule, Dedup) and rule.by is not None else ()


def _check_buckets(name: str, num_buckets: int | None) -> None:
    if num_buckets is not None and not 0 <= num_buckets <= _INT64[1]:
        raise ConfigError(f"{name}: num_buckets must be None or in [0, 2**63); got {num_buckets}")


def _check_int64(name: str, number: int) -> None:
    if type(number) is not int or not _INT64[0] <= number <= _INT64[1]:
        raise ConfigError(f"{name} must be an int64; got {number!r}")


def _check_finite(name: str, **numbers: float) -> None:
    for field, number in numbers.items():
        if not math.isfinite(number):
            raise ConfigError(f"{name}: {field} must be finite; got {number}")
