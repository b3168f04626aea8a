"""JSONL lines: one JSON object per line, keys typed by the columns that read them.

Keys that no column reads are passed over, and may change their type. A key that a line lacks is a null there; a column that
none of the first lines has is an error, because it is most likely misspelt. Whether an Ids column holds lists or single
integers is read off the same lines.
"""

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.types as pt
from pyarrow import json as arrow_json

from recis.errors import ConfigError, DataError, nearest
from recis.io.arrow_types import Field
from recis.io.columns import Dense, Floats, Group, Ids, Integer, Strings
from recis.io.decode import Fault
from recis.io.files import File
from recis.io.text import Layout

_SAMPLE_LINES = 100
_BOM = b"\xef\xbb\xbf"


class JsonLines:
    """Parses JSON objects into the types that `fields` need."""

    def __init__(self, fields: Sequence[Field]) -> None:
        self._fields = tuple(fields)

    def begin(self, file: File, head: bytes) -> Layout:
        """Return the types, and where the rows begin."""
        known: dict[str, bool] = {}  # key -> whether the sample shows lists in it
        for line in head.removeprefix(_BOM).split(b"\n")[:_SAMPLE_LINES]:
            try:
                row = json.loads(line)
            except ValueError:  # blank, cut off by the end of the sample, or faulty: the reader gets to it
                continue
            for key, value in row.items() if isinstance(row, dict) else ():
                known[key] = known.get(key, False) or isinstance(value, list)
        types: dict[str, pa.DataType] = {}
        for field in self._fields:
            if field.source not in known:
                if known:
                    problem = f"none of the first lines has this key; {nearest(field.source, known)}"
                    raise DataError(problem, file=file.url, column=field.source)
                raise DataError(
                    "none of the first lines is a JSON object", file=file.url, option="write one object per line"
                )
            kind = _json_type(field, is_list=known[field.source])
            before = types.setdefault(field.source, kind)
            if before != kind:
                if pt.is_integer(before) and pt.is_floating(kind):
                    continue  # integers can be read as numbers too
                if not (pt.is_floating(before) and pt.is_integer(kind)):
                    raise ConfigError(
                        f"key {field.source!r} of a JSONL file cannot be read as {before} and {kind} at once"
                    )
                types[field.source] = kind
        return Layout(pa.schema(list(types.items())), len(_BOM) if head.startswith(_BOM) else 0)

    def parse(self, layout: Layout, block: bytes) -> pa.RecordBatch:
        """Return the columns of whole lines."""
        schema = layout.schema
        table = arrow_json.read_json(
            pa.BufferReader(block),
            read_options=arrow_json.ReadOptions(use_threads=False, block_size=len(block) + 1),
            parse_options=arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
        return table.select(schema.names).combine_chunks().to_batches()[0]

    def explain(self, layout: Layout, line: bytes, error: str) -> Fault:
        """Say which key of a line is wrong."""
        schema = layout.schema
        shown = line[:80].decode(errors="replace").rstrip("\r\n")
        try:
            row = json.loads(line)
        except UnicodeDecodeError:
            return Fault(None, shown, "a line that is no UTF-8", "write the file as UTF-8")
        except ValueError as failure:
            return Fault(None, shown, f"no JSON: {failure}", "put the line right")
        if not isinstance(row, dict):
            return Fault(None, shown, f"a JSON object is needed, not {type(row).__name__}", "write one object per line")
        for name in schema.names:
            kind = schema.field(name).type
            if not _fits(row.get(name), kind):
                return Fault(
                    name, row[name], f"cannot be read as {kind}", "put the value right, or read it as another kind"
                )
        return Fault(None, shown, error, None)


def _json_type(field: Field, *, is_list: bool) -> pa.DataType:
    column = field.column
    if field.is_weights:
        return pa.list_(pa.float32())
    if isinstance(column, Ids):
        return _wrap(pa.int64(), column.depth if is_list or column.depth > 1 else 0)
    if isinstance(column, Floats):
        return _wrap(pa.float32(), column.depth)
    if isinstance(column, Strings):
        return _wrap(pa.string(), column.depth)
    if isinstance(column, Group | Integer):
        return pa.int64()
    return _wrap(pa.float32(), int(isinstance(column, Dense) and column.width > 1))


def _wrap(leaf: pa.DataType, depth: int) -> pa.DataType:
    for _ in range(depth):
        leaf = pa.list_(leaf)
    return leaf


def _fits(value: Any, kind: pa.DataType) -> bool:
    if value is None:
        return True
    if pt.is_list(kind):
        return isinstance(value, list) and all(_fits(entry, kind.value_type) for entry in value)
    if pt.is_integer(kind):
        return type(value) is int and -(2**63) <= value < 2**63
    if pt.is_floating(kind):
        return type(value) in (int, float)
    return isinstance(value, str)
