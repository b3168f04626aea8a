"""A set of units with one schema: what lanes read from.

A source knows its units, how many rows each has, and the types its columns have inside the reader; it holds no position and
no open file, so any number of lanes read from it at once. Everything that can be known to be wrong without reading the data
is an error here, before the first batch: missing and mistyped columns, damaged files, row groups above the memory limit.
"""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from recis.errors import DataError
from recis.io.arrow_types import (
    FAULT_KEY,
    ROW_KEY,
    UNIT_KEY,
    Field,
    cast,
    check_names,
    fields_of,
    has_negative_lengths,
    target_type,
)
from recis.io.columns import Integer
from recis.io.config import DataConfig
from recis.io.files import MIB, File, FileList, Format, Unit, file_list, resolve
from recis.io.orc import OrcFormat
from recis.io.parquet import ParquetFormat
from recis.io.text import TextFormat
from recis.io.text_csv import CsvLines
from recis.io.text_jsonl import JsonLines

TIME_KEY = "__recis_time__"  # int64 nanoseconds: the time column, where windows are cut by one
_NANOSECONDS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
_PROBE_ROWS = 1024


class Source(Protocol):
    """Units of rows, ready to be dealt to lanes."""

    @property
    def units(self) -> Sequence[Unit]:
        """The units, in order. `rows` is None only where there is a single unit, a stream."""
        ...

    @property
    def schema(self) -> pa.Schema:
        """Names and types of chunks."""
        ...

    @property
    def places(self) -> Sequence[tuple[str, str]]:
        """(file, unit in words) that the unit numbers in chunks stand for."""
        ...

    def files(self) -> FileList:
        """Return what a resumed run is checked against."""
        ...

    def chunks(self, unit: int, *, first_row: int, batch_rows: int) -> Generator[pa.RecordBatch]:
        """Yield the rows of a unit from `first_row` on, about `batch_rows` at a time, in the types of `schema`."""
        ...

    def times(self, unit: int) -> Iterator[pa.Array]:
        """Yield the time column of a unit, int64 nanoseconds; only where the config has a window with a column."""
        ...


class Typing:
    """The arrays of chunks and their types, made from the batches of any format.

    Args:
        config: for its columns and the time column of its window.
        has_faults: whether batches bring FAULT_KEY, as text formats do.
    """

    def __init__(self, config: DataConfig, *, has_faults: bool) -> None:
        fields = fields_of(config.columns)
        self._integer_scale = 1
        if config.window is not None and config.window.column is not None:
            fields = (*fields, Field(TIME_KEY, config.window.column, Integer(TIME_KEY)))
            self._integer_scale = _NANOSECONDS[config.window.unit]
        self.fields = fields
        self.sources = tuple(dict.fromkeys(field.source for field in fields))
        self._has_faults = has_faults
        self._types: list[pa.DataType] = []
        self._first: tuple[str, pa.Schema] | None = None
        self.schema = pa.schema([])

    @property
    def time_scale(self) -> int:
        """Nanoseconds per unit of a time column that holds integers."""
        return self._integer_scale

    def add(self, file: str, found: pa.Schema) -> None:
        """Take in the types of one more file, which must lead to the same types as the first one's.

        Raises:
            DataError: a column is missing, cannot be read as its kind, or does not go with the first file.
        """
        check_names(self.sources, found.names, file=file)
        here = [target_type(field, found.field(field.source).type, file=file) for field in self.fields]
        if self._first is None:
            self._first, self._types = (file, found), here
            names = [*zip((field.key for field in self.fields), here, strict=True)]
            names += [(UNIT_KEY, pa.int32()), (ROW_KEY, pa.int64())]
            self.schema = pa.schema([*names, (FAULT_KEY, pa.string())] if self._has_faults else names)
        for field, first, this in zip(self.fields, self._types, here, strict=True):
            if first != this:
                before, kind = self._first[1].field(field.source).type, found.field(field.source).type
                problem = f"type {kind} here does not go with {before} in {self._first[0]}"
                raise DataError(problem, file=file, column=field.source, option="write both with one type")

    def chunk(self, batch: pa.RecordBatch, *, unit: int, first_row: int, place: tuple[str, str]) -> pa.RecordBatch:
        """Return a batch of a unit in the types of `schema`, its rows numbered from `first_row`."""
        columns = zip(self.fields, self._types, strict=True)
        arrays = [self._array(batch.column(field.source), field, kind, place) for field, kind in columns]
        arrays.append(pa.array(np.full(batch.num_rows, unit, dtype=np.int32)))
        arrays.append(pa.array(np.arange(first_row, first_row + batch.num_rows)))
        if self._has_faults:
            arrays.append(batch.column(FAULT_KEY))
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)

    def times(self, batch: pa.RecordBatch, *, place: tuple[str, str]) -> pa.Array:
        """Return the time column of a batch, int64 nanoseconds."""
        return self._array(batch.column(self.fields[-1].source), self.fields[-1], self._types[-1], place)

    def _array(self, array: pa.Array, field: Field, kind: pa.DataType, place: tuple[str, str]) -> pa.Array:
        file, unit = place
        try:
            typed = cast(array, kind)
        except pa.ArrowException as error:
            problem = f"type {array.type} cannot be read as {kind}: {str(error).splitlines()[0]}"
            raise DataError(problem, file=file, unit=unit, column=field.source) from error
        if has_negative_lengths(typed):
            option = "write the file again; its offsets are damaged"
            raise DataError("a list of negative length", file=file, unit=unit, column=field.source, option=option)
        if field.key != TIME_KEY:
            return typed
        scale = _NANOSECONDS[array.type.unit] if pt.is_timestamp(array.type) else self._integer_scale
        nulls = typed.is_null().to_numpy(zero_copy_only=False)
        return pa.array(typed.fill_null(0).to_numpy() * scale, mask=nulls)


class FileSource:
    """The files of a config, inspected.

    Args:
        config: formats, columns and limits.
        files: what to read; `resolve(config.paths, ...)` unless a window or a watched folder says otherwise.
        allow_empty: whether no rows at all is fine.

    Raises:
        DataError: no rows, a file that cannot be read, a missing or mistyped column, a unit above the memory limit.
    """

    def __init__(self, config: DataConfig, files: Sequence[File] | None = None, *, allow_empty: bool = False) -> None:
        self._typing = Typing(config, has_faults=config.format in ("csv", "jsonl"))
        self._format = _format(config, self._typing)
        found = resolve(config.paths, config.format) if files is None else list(files)
        with ThreadPoolExecutor(config.threads, thread_name_prefix="recis-inspect") as pool:
            inspected = list(pool.map(self._format.inspect, found))
        for file, (schema, _) in zip(found, inspected, strict=True):
            self._typing.add(file.url, schema)
        self._units = tuple(unit for _, units in inspected for unit in units)
        if not self._units and not allow_empty:
            shown = f"{len(found)} files, the first is {found[0].url}" if found else "no files"
            raise DataError(f"no rows at all in {shown}", option="check paths")
        check_unit_sizes(self._units, config.memory_limit_mib)
        self._places = tuple((unit.file.url, unit.label) for unit in self._units)

    @property
    def units(self) -> Sequence[Unit]:
        """Row groups, stripes or byte ranges, sorted by (path, index)."""
        return self._units

    @property
    def schema(self) -> pa.Schema:
        """Names and types of chunks."""
        return self._typing.schema

    @property
    def places(self) -> Sequence[tuple[str, str]]:
        """(file, unit in words) of each unit."""
        return self._places

    def files(self) -> FileList:
        """Return [path, bytes, rows] per file."""
        return file_list(self._units)

    def chunks(self, unit: int, *, first_row: int, batch_rows: int) -> Generator[pa.RecordBatch]:
        """Yield the rows of a unit from `first_row` on."""
        row, place = first_row, self._places[unit]
        sources = self._typing.sources
        for batch in self._format.read(self._units[unit], sources, first_row=first_row, batch_rows=batch_rows):
            yield self._typing.chunk(batch, unit=unit, first_row=row, place=place)
            row += batch.num_rows

    def times(self, unit: int) -> Iterator[pa.Array]:
        """Yield the time column of a unit, reading nothing else where the format allows."""
        sources = (self._typing.fields[-1].source,)
        for batch in self._format.read(self._units[unit], sources, first_row=0, batch_rows=65536):
            yield self._typing.times(batch, place=self._places[unit])


def check_unit_sizes(units: Sequence[Unit], memory_limit_mib: int) -> None:
    """Raise DataError for a unit that is larger than everything the reader may hold."""
    for unit in units:
        if unit.decoded_bytes > memory_limit_mib * MIB:
            needed = unit.decoded_bytes / MIB
            raise DataError(
                f"its columns take about {needed:.1f} MiB in memory; memory_limit_mib={memory_limit_mib}",
                file=unit.file.url,
                unit=unit.label,
                option=f"set memory_limit_mib={int(needed) + 1} or more, or write smaller row groups",
            )


def bytes_per_row(source: Source) -> float:
    """Return about how much memory a decoded row takes: the files' own figures, or a probe of the first rows if more."""
    rows = sum(unit.rows or 0 for unit in source.units)
    told = sum(unit.decoded_bytes for unit in source.units if unit.rows) / max(1, rows)
    chunks = source.chunks(0, first_row=0, batch_rows=_PROBE_ROWS)
    probe = next(chunks, None)
    chunks.close()
    measured = probe.nbytes / probe.num_rows if probe is not None and probe.num_rows else 0.0
    return max(told if measured == 0.0 else min(told, 4 * measured), measured, 1.0)


def _format(config: DataConfig, typing: Typing) -> Format:
    if config.format == "parquet":
        time_column = config.window.column if config.window is not None else None
        return ParquetFormat(typing.sources, time_column=time_column, time_scale=typing.time_scale)
    if config.format == "orc":
        return OrcFormat(typing.sources)
    return TextFormat(CsvLines(typing.fields, config.csv) if config.format == "csv" else JsonLines(typing.fields))
