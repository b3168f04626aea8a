"""Read and write the files of `relevance/`: JSON lines, or Parquet with the same columns.

    pairs.jsonl     {"id": "p1", "query_id": "q1", "query": "red shoes", "item_id": "i1", "item": {"title": "..", ..}, ..}
    pairs.parquet   the same; maps (item.attributes, steps.attributes, steps.wanted) are map<string, string>

Every reader refuses unknown keys, missing keys and wrong types with file, line and key. The other files are rationales (for
SFT), samples (for pass@k and DPO), preference pairs and scores: one dataclass each, the columns are its fields.
"""

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from recis.errors import ConfigError, DataError, nearest
from relevance.data import Pair, check_pair, check_pairs

Row = TypeVar("Row")
_hints = lru_cache(typing.get_type_hints)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rationale:
    """A completion to learn from; files never contain the eos."""

    id: str
    """Pair id."""
    profile: str
    completion: str
    source: str = "oracle"
    """"oracle" or "model"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One of the completions that were sampled for a pair."""

    id: str
    """Pair id."""
    variant: str = "plain"
    """Which prompt: "plain", "with_chunk" or "guided"."""
    k: int
    """Number of the sample, from 0."""
    completion: str
    completion_ids: tuple[int, ...] = ()
    label: int | None = None
    ok: bool = False
    p: tuple[float, ...] = ()
    """P of the labels 1 to 4 at the first position."""
    checkpoint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """A pair of completions for DPO."""

    id: str
    prompt: str
    chosen: str
    rejected: str
    source: str = "own"
    """Where the chosen one comes from: "own" sample, or the "oracle"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a model says about a pair."""

    id: str
    label: int
    p: tuple[float, ...]
    tier: str
    b_cum: float
    rationale: str | None = None
    violations: tuple[str, ...] = ()
    model: str = ""


def read_pairs(path: str | Path, *, deciding_labels: Mapping[str, int] | None = None) -> list[Pair]:
    """Read and check pairs.

    Args:
        path: .jsonl or .parquet.
        deciding_labels: rule id -> label, to hold gold steps against the rule base; see `check_pair`.

    Raises:
        DataError: a row that cannot be used (file, line, column and value are named), a duplicate id, a query in two splits.
        ConfigError: neither .jsonl nor .parquet.
    """
    pairs = []
    for place, pair in _read(path, Pair):
        try:
            check_pair(pair, deciding_labels=deciding_labels)
        except DataError as error:
            raise _placed(error, path, place) from None
        pairs.append(pair)
    try:
        check_pairs(pairs)
    except DataError as error:
        raise _placed(error, path, None) from None
    return pairs


def iter_pairs(path: str | Path) -> Iterator[Pair | DataError]:
    """Yield the rows of a file one by one: a pair that passed `check_pair`, or what is wrong with the row.

    Nothing is compared between rows; for files that are scored, not trained on.
    """
    path = Path(path)
    rows = _parquet_rows(path, Pair) if _is_parquet(path) else _jsonl_rows(path)
    for place, make in rows:
        try:
            pair = from_json(Pair, make())
            check_pair(pair)
        except DataError as error:
            yield _placed(error, path, place)
        else:
            yield pair


def read_rows(path: str | Path, kind: type[Row]) -> list[Row]:
    """Read a file of rationales, samples, preferences or scores; raises as `read_pairs`."""
    return [row for _, row in _read(path, kind)]


def write_rows(path: str | Path, rows: Iterable[Any]) -> str:
    """Write dataclass rows as .jsonl or .parquet, and return the sha256 of the file.

    Raises:
        ConfigError: neither .jsonl nor .parquet, or no rows for a Parquet file (its columns come from the first).
    """
    path = Path(path)
    if _is_parquet(path):
        _write_parquet(path, list(rows))
    else:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in rows)
    return sha256_of(path)


def sha256_of(path: str | Path) -> str:
    """Return the sha256 of a file, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def from_json(kind: type[Row], data: Any, *, column: str = "") -> Row:
    """Return the dataclass of a JSON object.

    Raises:
        DataError: not an object, unknown or missing keys, a value of another type; the column is named.
    """
    if not isinstance(data, Mapping):
        raise DataError("must be an object", column=column or None, value=data)
    fields = {entry.name: entry for entry in dataclasses.fields(kind)}  # type: ignore[arg-type]
    prefix = f"{column}." if column else ""
    for key in data:
        if key not in fields:
            raise DataError(f"unknown key; {nearest(str(key), fields)}", column=f"{prefix}{key}")
    hints = _hints(kind)
    values = {}
    for name, entry in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], f"{prefix}{name}")
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise DataError("this key is missing", column=f"{prefix}{name}")
    return kind(**values)


def _value(hint: Any, data: Any, column: str) -> Any:
    """Return `data` as the type that a field declares."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:  # only `X | None` is used
        return None if data is None else _value(arguments[0], data, column)
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast(type[Any], hint), data, column=column)
    if origin is tuple and isinstance(data, list | tuple):
        return tuple(_value(arguments[0], entry, column) for entry in data)
    if origin is Mapping and isinstance(data, Mapping):
        return {str(key): _value(arguments[1], entry, f"{column}.{key}") for key, entry in data.items()}
    if hint is float and isinstance(data, int | float) and not isinstance(data, bool):
        return float(data)
    if hint in (str, int, bool) and type(data) is hint:
        return data
    raise DataError(f"must be of type {getattr(hint, '__name__', hint)}", column=column, value=data)


def _read(path: str | Path, kind: type[Row]) -> Iterator[tuple[str, Row]]:
    """Yield (place, row)."""
    path = Path(path)
    rows = _parquet_rows(path, kind) if _is_parquet(path) else _jsonl_rows(path)
    for place, make in rows:
        try:
            yield place, from_json(kind, make())
        except DataError as error:
            raise _placed(error, path, place) from None


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"line {number}", lambda line=line: _loads(line)


def _loads(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except ValueError as error:  # of the JSON or of the UTF-8
        raise DataError(f"not a JSON object in UTF-8: {error}", value=line[:80]) from None


def _parquet_rows(path: Path, kind: type[Row]) -> Iterator[tuple[str, Callable[[], Any]]]:
    import pyarrow.parquet as pq  # a reader of JSON lines needs no pyarrow

    with pq.ParquetFile(path) as file:
        schema, number = file.schema_arrow, 0
        for batch in file.iter_batches():
            for row in batch.to_pylist(maps_as_pydicts="strict"):
                yield f"row {number}", lambda row=row: _without_nulls(kind, row, set(schema.names))
                number += 1


def _without_nulls(kind: type[Any], row: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Leave out nulls of fields that have another default: a Parquet row has every column of its file."""
    kept = {}
    for name, value in row.items():
        if value is None and name in names and not _is_optional(kind, name):
            continue
        hint = _hints(kind).get(name)
        inner = typing.get_args(hint)[0] if typing.get_origin(hint) is types.UnionType else hint
        if isinstance(value, dict) and dataclasses.is_dataclass(inner):
            value = _without_nulls(typing.cast(type[Any], inner), value, set(value))
        kept[name] = value
    return kept


def _is_optional(kind: type[Any], name: str) -> bool:
    return typing.get_origin(_hints(kind).get(name)) is types.UnionType


def _write_parquet(path: Path, rows: Sequence[Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not rows:
        raise ConfigError(f"{path}: a Parquet file takes its columns from its rows, and there are none; write .jsonl")
    schema = pa.schema([(name, _arrow(hint)) for name, hint in _hints(type(rows[0])).items()])
    pq.write_table(pa.Table.from_pylist([dataclasses.asdict(row) for row in rows], schema=schema), path)


def _arrow(hint: Any) -> Any:
    """Return the Arrow type of a declared type."""
    import pyarrow as pa

    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return _arrow(arguments[0])
    if dataclasses.is_dataclass(hint):
        return pa.struct([(name, _arrow(inner)) for name, inner in _hints(hint).items()])
    if origin is tuple:
        return pa.list_(_arrow(arguments[0]))
    if origin is Mapping:
        return pa.map_(pa.string(), _arrow(arguments[1]))
    return {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}[hint]


def _is_parquet(path: Path) -> bool:
    if path.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(f"{path}: files end in .jsonl or .parquet")
    return path.suffix == ".parquet"


def _placed(error: DataError, path: str | Path, place: str | None) -> DataError:
    unit = ", ".join(part for part in (place, error.unit) if part)
    return DataError(
        error.problem, file=str(path), unit=unit or None, column=error.column, value=error.value, option=error.option
    )
