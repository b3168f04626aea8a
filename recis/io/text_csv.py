"""CSV lines: a header or given names, cells typed by the columns that read them, lists cut at a separator.

A cell read as Ids, Floats, Strings(depth=1) or Dense(width > 1) is a list; an empty cell is an empty list. A cell read as a
number is null when empty; "nan" and "inf" are numbers, which the kinds refuse unless told otherwise. An Ids column whose
cells another kind reads as a single number is a single id.
"""

import csv
import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt
from pyarrow import csv as arrow_csv

from recis.errors import ConfigError, DataError
from recis.io.arrow_types import Field, check_names
from recis.io.columns import Dense, Floats, Group, Ids, Integer, Strings
from recis.io.config import Csv
from recis.io.decode import Fault
from recis.io.files import File
from recis.io.text import Layout

_BOM = b"\xef\xbb\xbf"


class CsvLines:
    """Parses CSV lines into the types that `fields` need."""

    def __init__(self, fields: Sequence[Field], options: Csv) -> None:
        self._options = options
        sources = dict.fromkeys(field.source for field in fields)
        self._types = {source: _csv_type(source, [f for f in fields if f.source == source]) for source in sources}
        self._schema = pa.schema(list(self._types.items()))

    def begin(self, file: File, head: bytes) -> Layout:
        """Return the types, where the rows begin, and the names of all cells."""
        names, first = self._header(file, head)
        check_names(list(self._types), names, file=file.url)
        return Layout(self._schema, first, tuple(names))

    def parse(self, layout: Layout, block: bytes) -> pa.RecordBatch:
        """Return the columns of whole lines."""
        names = list(layout.names)
        flat = {source: pa.string() if pt.is_list(kind) else kind for source, kind in self._types.items()}
        table = arrow_csv.read_csv(
            pa.BufferReader(block),
            read_options=arrow_csv.ReadOptions(column_names=names, use_threads=False, block_size=len(block) + 1),
            parse_options=arrow_csv.ParseOptions(delimiter=self._options.delimiter),
            convert_options=arrow_csv.ConvertOptions(
                column_types=flat, include_columns=list(flat), null_values=[""], strings_can_be_null=False
            ),
        )
        batch = table.combine_chunks().to_batches()[0]
        arrays = [self._typed(batch.column(source), kind) for source, kind in self._types.items()]
        return pa.RecordBatch.from_arrays(arrays, schema=self._schema)

    def explain(self, layout: Layout, line: bytes, error: str) -> Fault:
        """Say which cell of a line is wrong."""
        names = layout.names
        try:
            text = line.decode()
        except UnicodeDecodeError:
            return Fault(None, line[:80], "a line that is no UTF-8", "write the file as UTF-8")
        cells = next(csv.reader(io.StringIO(text.rstrip("\r\n")), delimiter=self._options.delimiter), [])
        if len(cells) != len(names):
            option = "quote cells that hold the delimiter; a line break inside a cell is not supported"
            return Fault(None, text.rstrip("\r\n"), f"{len(cells)} cells where the header has {len(names)}", option)
        for source, kind in self._types.items():
            cell = cells[names.index(source)]
            entries = cell.split(self._options.list_separator) if pt.is_list(kind) and cell else [cell]
            leaf = kind.value_type if pt.is_list(kind) else kind
            for entry in entries:
                if not _is_readable(entry, leaf, in_list=pt.is_list(kind)):
                    what = "integer" if pt.is_integer(leaf) else "number"
                    option = f"read it as Strings({source!r}), or put the value right"
                    return Fault(source, cell, f"{entry!r} is no {what}", option)
        return Fault(None, text.rstrip("\r\n"), error, None)

    def _typed(self, array: pa.Array, kind: pa.DataType) -> pa.Array:
        if not pt.is_list(kind):
            return array
        lists = pc.call_function("split_pattern", [array], pc.SplitPatternOptions(self._options.list_separator))
        no_entries = pa.scalar([], pa.list_(pa.string()))
        is_empty = pc.call_function("equal", [array, ""])
        return pc.call_function("if_else", [is_empty, no_entries, lists]).cast(kind)

    def _header(self, file: File, head: bytes) -> tuple[list[str], int]:
        bom = len(_BOM) if head.startswith(_BOM) else 0
        if self._options.column_names is not None:
            return list(self._options.column_names), bom
        end = head.find(b"\n")
        line = head[bom:] if end < 0 else head[bom:end]
        try:
            names = next(csv.reader(io.StringIO(line.decode().rstrip("\r")), delimiter=self._options.delimiter), [])
        except UnicodeDecodeError as error:
            raise DataError("the header is no UTF-8", file=file.url, option="write the file as UTF-8") from error
        if not any(names):
            raise DataError("no header in the first line", file=file.url, option="give Csv(column_names=...)")
        return names, len(head) if end < 0 else end + 1


def _csv_type(source: str, fields: Sequence[Field]) -> pa.DataType:
    """The type in which the cells of one column are parsed, given all that reads them."""
    columns = [field.column for field in fields]
    if any(isinstance(column, Strings) and not field.is_weights for column, field in zip(columns, fields, strict=True)):
        kinds = {
            pa.list_(pa.string()) if column.depth else pa.string() for column in columns if isinstance(column, Strings)
        }
        if len(kinds) > 1 or not all(isinstance(column, Strings) for column in columns):
            names = " and ".join(sorted({type(column).__name__ for column in columns}))
            raise ConfigError(f"column {source!r} of a CSV file cannot be read as {names} at once; write it twice")
        checked = all(isinstance(column, Strings) and column.utf8 for column in columns)
        return kinds.pop() if checked or columns[0].depth else pa.binary()  # type: ignore[union-attr]
    listy = [
        field.is_weights or isinstance(column, Floats) or (isinstance(column, Dense) and column.width > 1)
        for field, column in zip(fields, columns, strict=True)
    ]
    only_ids = [isinstance(column, Ids) and not field.is_weights for field, column in zip(fields, columns, strict=True)]
    integer = any(only_ids) or any(isinstance(column, Group | Integer) for column in columns)
    leaf = pa.int64() if integer else pa.float32()
    if any(listy):
        if not all(is_list or is_id for is_list, is_id in zip(listy, only_ids, strict=True)):
            raise ConfigError(
                f"column {source!r} of a CSV file cannot be a list and a single value at once; write it twice"
            )
        return pa.list_(leaf)
    return pa.list_(leaf) if all(only_ids) else leaf


def _is_readable(entry: str, leaf: pa.DataType, *, in_list: bool) -> bool:
    if not (pt.is_integer(leaf) or pt.is_floating(leaf)):
        return True
    if entry == "":
        return not in_list
    try:
        pa.array([entry]).cast(leaf)
    except pa.ArrowInvalid:
        return False
    return True
