"""ORC: one unit per stripe, read whole.

Arrow offers no stream below a stripe, so an open lane holds one decoded stripe. Arrow's Python reader does not tell how many
rows a stripe has; the file's tail does. It is a protobuf message of which two levels are read here:

    FileTail { Footer footer = 2 { repeated StripeInformation stripes = 3 {
        uint64 offset = 1, indexLength = 2, dataLength = 3, footerLength = 4, numberOfRows = 5 } } }

Source: the ORC specification v1, https://orc.apache.org/specification/ORCv1/.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
from pyarrow import orc

from recis.errors import DataError
from recis.io.files import File, Unit

_BROKEN = "write the file again; it is damaged or not finished"
_DECODED_PER_ENCODED = 3  # rough growth of a stripe's bytes when decoded, where the types do not tell


class OrcFormat:
    """Reads stripes.

    Args:
        sources: columns that will be read, for the estimates of memory.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self._sources = frozenset(sources)

    def inspect(self, file: File) -> tuple[pa.Schema, list[Unit]]:
        """Return the schema of a file and its stripes that have rows."""
        with _errors(file, None), file.open_arrow() as handle:
            reader = orc.ORCFile(handle)
            schema, tail = reader.schema, reader.reader.serialized_file_tail()
            stripes = stripe_sizes(tail)
            if sum(rows for rows, _ in stripes) != reader.nrows or len(stripes) != reader.nstripes:
                raise DataError("the stripes of its tail do not add up to its rows", file=file.url, option=_BROKEN)
        needed = [field.type for field in schema if field.name in self._sources]
        fixed = sum(8 if not _is_nested(kind) else 0 for kind in needed)
        share = len(needed) / max(1, len(schema))
        units = []
        for index, (rows, data_bytes) in enumerate(stripes):
            decoded = max(rows * fixed, int(_DECODED_PER_ENCODED * data_bytes * share))
            label = f"stripe {index}"
            if rows:
                unit = Unit(file=file, index=index, label=label, rows=rows, decoded_bytes=decoded, open_bytes=decoded)
                units.append(unit)
        return schema, units

    def read(self, unit: Unit, sources: Sequence[str], *, first_row: int, batch_rows: int) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a stripe from `first_row` on, as slices of the decoded stripe."""
        with _errors(unit.file, unit.label), unit.file.open_arrow() as handle:
            stripe = orc.ORCFile(handle).read_stripe(unit.index, columns=list(sources))
        if stripe.num_rows != unit.rows:
            problem = f"{stripe.num_rows} rows read, {unit.rows} announced"
            raise DataError(problem, file=unit.file.url, unit=unit.label, option=_BROKEN)
        for start in range(first_row, stripe.num_rows, batch_rows):
            yield stripe.slice(start, batch_rows)


def stripe_sizes(tail: bytes) -> list[tuple[int, int]]:
    """Return (rows, encoded bytes) of each stripe from a serialized FileTail."""
    stripes = []
    for number, footer in _fields(tail):
        if number != 2 or not isinstance(footer, bytes):
            continue
        for inner, stripe in _fields(footer):
            if inner == 3 and isinstance(stripe, bytes):
                values = dict(_fields(stripe))
                stripes.append((_integer(values, 5), _integer(values, 3)))
    return stripes


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of a protobuf message: integers, or bytes of whatever has a length."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        wire = tag & 7
        if wire == 0:
            value, place = _varint(message, place)
            yield tag >> 3, value
        elif wire == 2:
            length, place = _varint(message, place)
            yield tag >> 3, message[place : place + length]
            place += length
        elif wire in (1, 5):
            place += 8 if wire == 1 else 4
        else:
            raise pa.ArrowInvalid(f"unknown wire type {wire} in the file's tail")


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(message):
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
    raise pa.ArrowInvalid("the file's tail ends inside a number")


def _integer(values: dict[int, int | bytes], number: int) -> int:
    value = values.get(number, 0)
    return value if isinstance(value, int) else 0


def _is_nested(kind: pa.DataType) -> bool:
    return kind.num_fields > 0 or pa.types.is_string(kind) or pa.types.is_binary(kind)


@contextmanager
def _errors(file: File, unit: str | None) -> Iterator[None]:
    """Name the file in what Arrow raises."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        problem = f"cannot be read as ORC: {str(error).splitlines()[0]}"
        raise DataError(problem, file=file.url, unit=unit, option=_BROKEN) from error
