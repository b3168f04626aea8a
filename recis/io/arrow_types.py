"""From the type a column has in a file to the one type it has inside the reader.

Files of one set may store a column as int32 here and int64 there, dictionary-encoded or not, in large or fixed-size lists.
Each column kind has one Arrow type that chunks are cast to before they are shuffled and joined:

    Dense, Label, Weight   float32, or list<float32> of `width`      Group, Integer   int64
    Ids                    int64, or `depth` lists of int64          Floats           `depth` lists of float32
    Strings                `depth` lists of binary                   weights of Ids   list<float32>

What cannot be cast without a change of meaning (text to numbers, floats to ids) is a DataError that names the kind to use.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from recis.errors import DataError, nearest
from recis.io.columns import Column, Dense, Floats, Group, Ids, Integer, Strings, source_of

UNIT_KEY = "__recis_unit__"  # int32: which unit a row came from
ROW_KEY = "__recis_row__"  # int64: its number in that unit
FAULT_KEY = "__recis_fault__"  # string, text formats only: why a line could not be read, as JSON; null for a good one
WEIGHTS_KEY = "__recis_weights__"  # prefix of the weights of an Ids column


@dataclass(frozen=True, slots=True)
class Field:
    """One array of a chunk: a column, or the weights of an Ids column."""

    key: str
    """Its name in chunks."""
    source: str
    """Its name in the file."""
    column: Column
    is_weights: bool = False


def fields_of(columns: Sequence[Column]) -> tuple[Field, ...]:
    """Return the arrays that the columns need, in order."""
    fields = []
    for column in columns:
        fields.append(Field(column.name, source_of(column), column))
        if isinstance(column, Ids) and column.weights is not None:
            fields.append(Field(WEIGHTS_KEY + column.name, column.weights, column, is_weights=True))
    return tuple(fields)


def check_names(sources: Sequence[str], found: Sequence[str], *, file: str) -> None:
    """Raise DataError unless each source is the name of exactly one column found in the file."""
    for source in sources:
        count = found.count(source) if isinstance(found, list) else list(found).count(source)
        if count == 0:
            raise DataError(f"the file has no such column; {nearest(source, found)}", file=file, column=source)
        if count > 1:
            raise DataError(
                f"the file has {count} columns of this name", file=file, column=source, option="rename them"
            )


def target_type(field: Field, found: pa.DataType, *, file: str) -> pa.DataType:
    """Return the type that `field` has inside the reader, given its type in a file.

    Raises:
        DataError: the found type cannot be read as this kind; the text names a kind that can.
    """
    depth, leaf = _peel(found)
    kind = type(field.column).__name__
    if field.is_weights:
        wanted, leaf_ok, target = 1, _is_number(leaf), pa.float32()
    elif isinstance(field.column, Ids):
        wanted, leaf_ok, target = field.column.depth, pt.is_integer(leaf), pa.int64()
        if wanted == 1 and depth == 0:
            wanted = 0
    elif isinstance(field.column, Floats):
        wanted, leaf_ok, target = field.column.depth, _is_number(leaf), pa.float32()
    elif isinstance(field.column, Strings):
        wanted, leaf_ok, target = field.column.depth, _is_bytes(leaf), pa.binary()
    elif isinstance(field.column, Group):
        wanted, leaf_ok, target = 0, pt.is_integer(leaf), pa.int64()
    elif isinstance(field.column, Integer):
        wanted, leaf_ok, target = 0, pt.is_integer(leaf) or pt.is_timestamp(leaf) or pt.is_date(leaf), pa.int64()
    else:
        width = field.column.width if isinstance(field.column, Dense) else 1
        wanted, leaf_ok, target = int(width > 1), _is_number(leaf), pa.float32()
    if pt.is_null(leaf):  # a column of nulls only: its defaults, or the error, decide
        return _wrap(target, wanted)
    if not leaf_ok or depth != wanted:
        problem = f"{kind} cannot be read from type {found}"
        raise DataError(problem, file=file, column=field.source, option=_way_out(field, depth, leaf))
    return _wrap(target, depth)


def cast(array: pa.Array, target: pa.DataType) -> pa.Array:
    """Return the array in the target type; unsigned 64-bit integers keep their bits, dates become days."""
    if array.type == target:
        return array
    if pt.is_date32(array.type):
        array = array.cast(pa.int32())
    return pc.cast(array, target, safe=False)  # safe casts refuse 2**63 ids and numbers that float32 rounds


def has_negative_lengths(array: pa.Array) -> bool:
    """Return whether the offsets of a list or binary array descend at some level."""
    while pt.is_list(array.type) or pt.is_binary(array.type):
        offsets = list_offsets(array)
        if len(array) and int(np.diff(offsets).min()) < 0:
            return True
        if pt.is_binary(array.type):
            return False
        array = array.values
    return False


def list_offsets(array: pa.Array) -> np.ndarray:
    """Return the offsets [n + 1] int32 of a list or binary array into its full child, not copied."""
    buffer = array.buffers()[1]
    if len(array) == 0 or buffer is None:
        return np.zeros(1, dtype=np.int32)
    return np.frombuffer(buffer, dtype=np.int32, count=len(array) + 1, offset=4 * array.offset)


def is_listy(data_type: pa.DataType) -> bool:
    """Return whether the type is any of Arrow's list types."""
    return (
        pt.is_list(data_type)
        or pt.is_large_list(data_type)
        or pt.is_fixed_size_list(data_type)
        or pt.is_list_view(data_type)
        or pt.is_large_list_view(data_type)
    )


def _peel(data_type: pa.DataType) -> tuple[int, pa.DataType]:
    depth = 0
    while is_listy(data_type) or pt.is_dictionary(data_type):
        depth += not pt.is_dictionary(data_type)
        data_type = data_type.value_type
    return depth, data_type


def _wrap(leaf: pa.DataType, depth: int) -> pa.DataType:
    for _ in range(depth):
        leaf = pa.list_(leaf)
    return leaf


def _is_number(leaf: pa.DataType) -> bool:
    return pt.is_integer(leaf) or pt.is_floating(leaf) or pt.is_boolean(leaf) or pt.is_decimal(leaf)


def _is_bytes(leaf: pa.DataType) -> bool:
    return (
        pt.is_string(leaf)
        or pt.is_large_string(leaf)
        or pt.is_string_view(leaf)
        or pt.is_binary(leaf)
        or pt.is_large_binary(leaf)
        or pt.is_binary_view(leaf)
        or pt.is_fixed_size_binary(leaf)
    )


def _way_out(field: Field, depth: int, leaf: pa.DataType) -> str:
    """Name the kind that reads what was found."""
    name = repr(field.source)
    if field.is_weights:
        return "weights must be lists of numbers, one per id"
    if _is_bytes(leaf):
        return f"read it as Strings({name}{f', depth={depth}' if depth else ''}) and hash it, or rewrite the file"
    if pt.is_integer(leaf):
        return (
            f"read it as {f'Ids({name}, depth={depth})' if depth else f'Ids({name}), Integer({name}) or Dense({name})'}"
        )
    if _is_number(leaf):
        return f"read it as {f'Floats({name}, depth={depth})' if depth else f'Dense({name})'}"
    if pt.is_timestamp(leaf) or pt.is_date(leaf):
        return f"read it as Integer({name})"
    return "no column kind reads this type; rewrite the file"
