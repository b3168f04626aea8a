"""Text files of one row per line: byte ranges as units, whole lines inside them, faulty lines by number.

A unit is a range of 64 MiB; the lines that begin in it belong to it, so ranges meet at line ends without an index. Rows of
a unit are its lines that are not blank; they are counted once, when the reader is built, by reading the file through (the
order of samples needs the count; Parquet has it in its footer). A compressed file cannot be entered in the middle: it is
one unit, read as a stream. Lines are parsed in blocks of about 1 MiB, which is all the text a lane holds.

A line that cannot be parsed keeps its row number: it becomes a row of nulls with its fault beside it, and the reader raises
or skips it where it stands in the order.
"""

import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import IO, Protocol

import numpy as np
import pyarrow as pa

from recis.errors import DataError
from recis.io.arrow_types import FAULT_KEY
from recis.io.decode import Fault
from recis.io.files import MIB, File, Unit

RANGE_BYTES = 64 * MIB
BLOCK_BYTES = MIB
MAX_LINE_BYTES = 64 * MIB
_HELD_BYTES = 4 * BLOCK_BYTES  # a block, what is left of the one before, and the columns made of it


@dataclass(frozen=True, slots=True)
class Layout:
    """What the first bytes of a text file tell."""

    schema: pa.Schema
    """Types in which the needed columns are read."""
    first: int
    """Where the rows begin, behind a byte order mark and a header."""
    names: tuple[str, ...] = ()
    """All columns in the order of the cells, where the order matters."""


class Lines(Protocol):
    """How lines become columns: CSV and JSONL."""

    def begin(self, file: File, head: bytes) -> Layout:
        """Return the layout of a file, given its first bytes."""
        ...

    def parse(self, layout: Layout, block: bytes) -> pa.RecordBatch:
        """Return the rows of whole lines; pa.ArrowInvalid or UnicodeDecodeError when one of them is wrong."""
        ...

    def explain(self, layout: Layout, line: bytes, error: str) -> Fault:
        """Say what is wrong with a line that `parse` refused with this error."""
        ...


class TextFormat:
    """Reads byte ranges of text files through a parser of lines."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines

    def inspect(self, file: File) -> tuple[pa.Schema, list[Unit]]:
        """Return the types of the columns and the ranges of the file, their lines counted."""
        with _errors(file, None), file.open_bytes() as handle:
            layout = self._lines.begin(file, handle.read(BLOCK_BYTES))
            if file.compression is not None:
                ranges: list[tuple[int, int | None]] = [(0, None)]
            else:
                starts = range(0, file.size, RANGE_BYTES)
                ranges = [(start, min(start + RANGE_BYTES, file.size)) for start in starts]
            units = []
            for index, (start, stop) in enumerate(ranges):
                blocks = line_blocks(
                    handle, file.url, start=start, stop=stop, first=layout.first, block_bytes=BLOCK_BYTES
                )
                rows = sum(count_rows(block) for block in blocks)
                label = f"bytes {start}:{'' if stop is None else stop}"
                if rows:
                    held = min(_HELD_BYTES, 4 * file.size)
                    unit = Unit(
                        file=file,
                        index=index,
                        label=label,
                        rows=rows,
                        decoded_bytes=held,
                        open_bytes=held,
                        start=start,
                        stop=stop,
                    )
                    units.append(unit)
        return layout.schema, units

    def read(self, unit: Unit, sources: Sequence[str], *, first_row: int, batch_rows: int) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a range from `first_row` on, with the faults of their lines in FAULT_KEY."""
        file = unit.file
        with _errors(file, unit.label), file.open_bytes() as handle:
            layout = self._lines.begin(file, handle.read(BLOCK_BYTES))
            blocks = line_blocks(
                handle, file.url, start=unit.start, stop=unit.stop, first=layout.first, block_bytes=BLOCK_BYTES
            )
            seen = 0
            for raw in blocks:
                block = without_blank_lines(raw)
                rows = count_rows(block)
                if seen + rows > first_row:
                    batch = self._parse(layout, block, rows).slice(max(0, first_row - seen))
                    for start in range(0, batch.num_rows, batch_rows):
                        yield batch.slice(start, batch_rows)
                seen += rows
            if seen != unit.rows:
                raise DataError(f"{seen} lines now, {unit.rows} when first read", file=file.url, unit=unit.label)

    def _parse(self, layout: Layout, block: bytes, rows: int) -> pa.RecordBatch:
        pieces = list(self._pieces(layout, block, rows))
        if len(pieces) == 1:
            return pieces[0]
        return pa.Table.from_batches(pieces).combine_chunks().to_batches()[0]

    def _pieces(self, layout: Layout, block: bytes, rows: int) -> Iterator[pa.RecordBatch]:
        """Parse lines; where that fails, halves of them, down to the faulty lines."""
        error = "several rows on one line, or one on several"
        try:
            batch = self._lines.parse(layout, block)
            if batch.num_rows == rows:
                yield batch.append_column(FAULT_KEY, pa.nulls(rows, pa.string()))
                return
        except (pa.ArrowInvalid, UnicodeDecodeError) as failure:
            error = str(failure).splitlines()[0]
        if rows == 1:
            fault = self._lines.explain(layout, block, error)
            nulls = [pa.nulls(1, field.type) for field in layout.schema]
            text = json.dumps(asdict(fault), default=str)
            yield pa.RecordBatch.from_arrays([*nulls, pa.array([text])], names=[*layout.schema.names, FAULT_KEY])
            return
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1
        cut = int(ends[rows // 2 - 1])
        yield from self._pieces(layout, block[:cut], rows // 2)
        yield from self._pieces(layout, block[cut:], rows - rows // 2)


def line_blocks(
    handle: IO[bytes], url: str, *, start: int, stop: int | None, first: int, block_bytes: int
) -> Iterator[bytes]:
    """Yield blocks of whole lines: all lines that begin in [max(start, first), stop).

    Args:
        handle: the file.
        url: its name, for the error.
        start: first byte of the range.
        stop: its end; None reads to the end of the file.
        first: where rows begin in the file (behind a header).
        block_bytes: how much is read at once; blocks are about as large.

    Raises:
        DataError: a line is longer than MAX_LINE_BYTES.
    """
    skipping = start > first  # the line that covers `start` began before it, unless a line end lies just before
    position = start - 1 if skipping else first
    handle.seek(position)
    held = b""
    while data := handle.read(block_bytes):
        held += data
        if skipping:
            end = held.find(b"\n") + 1
            skipping = end == 0
            dropped = end or len(held)
            position, held = position + dropped, held[dropped:]
        if stop is not None and position >= stop:
            return
        if stop is not None and position + len(held) >= stop:
            end = held.find(b"\n", stop - 1 - position) + 1
            if end:
                yield held[:end]
                return
        elif end := held.rfind(b"\n") + 1:
            yield held[:end]
            position, held = position + end, held[end:]
        if len(held) > MAX_LINE_BYTES:
            raise DataError(f"a line is longer than {MAX_LINE_BYTES // MIB} MiB, from byte {position} on", file=url)
    if held:
        yield held


def count_rows(block: bytes) -> int:
    """Return how many lines of a block of whole lines are not blank."""
    block = without_blank_lines(block)
    return block.count(b"\n") + (len(block) > 0 and not block.endswith(b"\n"))


def without_blank_lines(block: bytes) -> bytes:
    """Return the block without lines that are empty or hold only spaces; the same object when there are none."""
    suspicious = (b"\n\n", b"\n\r\n", b"\n ")
    if not (block[:1] in (b"\n", b"\r", b" ") or any(mark in block for mark in suspicious)):
        return block
    kept = [line for line in block.split(b"\n") if line.strip(b" \r")]
    return b"\n".join(kept) + b"\n" if kept else b""


@contextmanager
def _errors(file: File, unit: str | None) -> Iterator[None]:
    """Name the file when its bytes cannot be read."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        problem = f"cannot be read: {error}"
        raise DataError(problem, file=file.url, unit=unit, option="write the file again; it is damaged") from error
