"""The rows of input files as they are: every column, in the order in which a reader delivers them.

`recis predict` writes them out again beside the scores. A reader gives only the columns that a run needs, in the types that
a run needs, and says of each row which unit it came from; here the same units are read whole, so the two meet row by row.

Parquet and ORC files say what types their columns have. CSV and JSONL do not, so those are read twice: the first pass finds
a type that all values of a column have (an integer, else a number, else text), the second reads in these types. A line that
cannot be read is a row of nulls. Memory: one row group's pages, one ORC stripe, or one block of text.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.types as pt
from pyarrow import csv as arrow_csv
from pyarrow import json as arrow_json

from recis.errors import DataError
from recis.io.batch import RowOrigin
from recis.io.columns import Strings, source_of
from recis.io.config import Csv, DataConfig
from recis.io.decode import Fault
from recis.io.files import File, Format, Unit, resolve
from recis.io.orc import OrcFormat
from recis.io.parquet import ParquetFormat
from recis.io.text import Layout, TextFormat
from recis.io.text_csv import CsvLines
from recis.io.text_jsonl import JsonLines

BATCH_ROWS = 16_384
_RENAME = "rename all but one"
_APART = "give files with the same columns"


class InputRows:
    """All columns of the files of a config.

    Args:
        data: paths and format; which of the columns are strings decides how CSV cells are typed.

    Attributes:
        schema: names and types of all columns.
        num_rows: rows of all files.
        files: what is read, sorted by path.

    Raises:
        DataError: files that are not there, cannot be read or have different columns.
    """

    def __init__(self, data: DataConfig) -> None:
        files = self.files = resolve(data.paths, data.format)
        if data.format in ("csv", "jsonl"):
            self._format, self.schema, self._units = _text(data, files)
        else:
            self._format = ParquetFormat(()) if data.format == "parquet" else OrcFormat(())
            found = [self._format.inspect(file) for file in files]
            self.schema = found[0][0]
            for file, (schema, _) in zip(files, found, strict=True):
                _check_schema(file, schema, files[0], self.schema)
            self._units = [unit for _, units in found for unit in units]
        starts = np.cumsum([0, *(unit.rows or 0 for unit in self._units)])
        self._starts = starts[:-1]
        self.num_rows = int(starts[-1])

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield all rows in order, some thousands at a time."""
        names = self.schema.names
        for unit in self._units:
            for batch in self._format.read(unit, names, first_row=0, batch_rows=BATCH_ROWS):
                yield batch.select(names)

    def positions(self, origin: RowOrigin) -> np.ndarray:
        """Return the numbers, from 0 over all files, of the rows of a batch: [B] int64.

        Raises:
            DataError: the batch was read from other units: the files have changed in between.
        """
        units = [(unit.file.url, unit.label) for unit in self._units]
        if len(origin.units) != len(units) or origin.units[0] != units[0]:
            raise DataError("the files changed while they were read", file=units[0][0], option="predict again")
        return self._starts[origin.unit.numpy()] + origin.row.numpy()


def _check_schema(file: File, schema: pa.Schema, first: File, first_schema: pa.Schema) -> None:
    names = schema.names
    for name in names:
        if names.count(name) > 1:
            raise DataError("the file has several columns of this name", file=file.url, column=name, option=_RENAME)
    if not schema.equals(first_schema):
        other = next(name for name in (*first_schema.names, *names) if _type(schema, name) != _type(first_schema, name))
        raise DataError(
            f"{_type(schema, other) or 'missing'} here, {_type(first_schema, other) or 'missing'} in {first.url}",
            file=file.url,
            column=other,
            option=_APART,
        )


def _type(schema: pa.Schema, name: str) -> pa.DataType | None:
    return schema.field(name).type if name in schema.names else None


def _text(data: DataConfig, files: Sequence[File]) -> tuple[Format, pa.Schema, list[Unit]]:
    """Return a format that reads all columns of text files, their types, and the units."""
    texts = frozenset(source_of(column) for column in data.columns if isinstance(column, Strings))
    parse = _csv_table(data.csv) if data.format == "csv" else _json_table
    head: CsvLines | JsonLines = CsvLines((), data.csv) if data.format == "csv" else JsonLines(())
    finder = _Lines(head, parse, None, texts)
    units: list[Unit] = []
    for file in files:
        try:
            _, found = TextFormat(finder).inspect(file)
            for unit in found:
                for _ in TextFormat(finder).read(unit, (), first_row=0, batch_rows=BATCH_ROWS):
                    pass
        except _MixedTypes as error:
            raise DataError(str(error), file=file.url, column=error.column, option="write one type") from None
        units += found
    schema = pa.schema(list(finder.types.items()))
    return TextFormat(_Lines(head, parse, schema, texts)), schema, units


class _MixedTypes(Exception):
    def __init__(self, column: str, types: str) -> None:
        super().__init__(f"holds values of different types: {types}")
        self.column = column


class _Lines:
    """Lines with all their columns: finds the types while `schema` is None, then reads in those of `schema`."""

    def __init__(
        self,
        head: CsvLines | JsonLines,
        parse: Callable[[Layout, bytes, pa.Schema | None], pa.Table],
        schema: pa.Schema | None,
        texts: frozenset[str],
    ) -> None:
        self.types: dict[str, pa.DataType] = {}
        self._first: tuple[str, tuple[str, ...]] | None = None
        self._head, self._parse, self._schema, self._texts = head, parse, schema, texts

    def begin(self, file: File, head: bytes) -> Layout:
        """Return where the rows begin, and the columns that `parse` gives."""
        layout = self._head.begin(file, head)
        first, names = self._first = self._first or (file.url, layout.names)
        for name in layout.names:
            if layout.names.count(name) > 1:
                raise DataError("the file has several columns of this name", file=file.url, column=name, option=_RENAME)
        if set(layout.names) != set(names):
            other = next(iter(set(layout.names) ^ set(names)))
            raise DataError(
                f"the column is in this file or in {first}, not in both", file=file.url, column=other, option=_APART
            )
        schema = pa.schema([("row", pa.int8())]) if self._schema is None else self._schema
        return Layout(schema, layout.first, layout.names)

    def parse(self, layout: Layout, block: bytes) -> pa.RecordBatch:
        """Return the rows of whole lines, or while finding types only as many rows."""
        table = self._parse(layout, block, self._schema)
        if self._schema is None:
            for field in table.schema:
                kind = pa.string() if field.name in self._texts and not pt.is_nested(field.type) else field.type
                self.types[field.name] = _wider(field.name, self.types.get(field.name, kind), kind)
            return pa.record_batch({"row": pa.nulls(table.num_rows, pa.int8())})
        return table.select(self._schema.names).combine_chunks().to_batches()[0]

    def explain(self, layout: Layout, line: bytes, error: str) -> Fault:
        """Say that a line is left empty; the reader says why."""
        return Fault(None, None, error, None)


def _csv_table(options: Csv) -> Callable[[Layout, bytes, pa.Schema | None], pa.Table]:
    def parse(layout: Layout, block: bytes, schema: pa.Schema | None) -> pa.Table:
        return arrow_csv.read_csv(
            pa.BufferReader(block),
            read_options=arrow_csv.ReadOptions(
                column_names=list(layout.names), use_threads=False, block_size=len(block) + 1
            ),
            parse_options=arrow_csv.ParseOptions(delimiter=options.delimiter),
            convert_options=arrow_csv.ConvertOptions(
                column_types=schema, null_values=[""], strings_can_be_null=False, check_utf8=True
            ),
        )

    return parse


def _json_table(layout: Layout, block: bytes, schema: pa.Schema | None) -> pa.Table:
    return arrow_json.read_json(
        pa.BufferReader(block),
        read_options=arrow_json.ReadOptions(use_threads=False, block_size=len(block) + 1),
        parse_options=arrow_json.ParseOptions(
            explicit_schema=schema, unexpected_field_behavior="infer" if schema is None else "ignore"
        ),
    )


def _wider(name: str, one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """Return a type that holds the values of both: equal ones, a number for integers and numbers, else text."""
    if one.equals(other):
        return one
    with suppress(pa.ArrowException):
        both = [pa.schema([(name, kind)]) for kind in (one, other)]
        return pa.unify_schemas(both, promote_options="permissive").field(name).type
    if pt.is_nested(one) or pt.is_nested(other):
        raise _MixedTypes(name, f"{one} and {other}")
    return pa.binary() if pt.is_binary(one) or pt.is_binary(other) else pa.string()
