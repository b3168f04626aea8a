"""Parquet: one unit per row group, read as a stream of batches.

Reading holds, per column, one data page and one dictionary page, not the column chunk: Arrow reads through a small buffer
and decodes as many rows as a batch needs. That is what lets many lanes keep a large row group open each. Files are not
memory-mapped: mapped pages would count as resident memory and stay.
"""

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

import pyarrow as pa
import pyarrow.parquet as pq

from recis.errors import DataError
from recis.io.files import File, Unit

READ_BUFFER = 64 * 1024  # bytes read at once per column; smaller pages than this are read as they are
PAGE_BYTES = 1024 * 1024  # what writers aim at for a data page and for a dictionary page
FOOTER_BYTES = 4 * 1024 * 1024  # footers kept, as they are in the files
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 8, "FLOAT": 4, "DOUBLE": 8, "FIXED_LEN_BYTE_ARRAY": 16}
_BROKEN = "write the file again; it is damaged or not finished"


class ParquetFormat:
    """Reads row groups.

    Args:
        sources: columns that will be read, for the estimates of memory.
        time_column: column whose least and greatest value per row group are wanted.
        time_scale: nanoseconds per unit of that column, where it holds integers.
    """

    def __init__(self, sources: Sequence[str], *, time_column: str | None = None, time_scale: int = 1) -> None:
        self._sources = frozenset(sources)
        self._time_column = time_column
        self._time_scale = time_scale
        self._footers: OrderedDict[str, pq.FileMetaData] = OrderedDict()
        self._footers_lock = Lock()

    def inspect(self, file: File) -> tuple[pa.Schema, list[Unit]]:
        """Return the schema of a file and its row groups that have rows."""
        with _errors(file, None), file.open_arrow() as handle:
            parquet = pq.ParquetFile(handle)
            schema, metadata = parquet.schema_arrow, parquet.metadata
            groups = [self._unit(file, metadata.row_group(index), index) for index in range(metadata.num_row_groups)]
        return schema, [unit for unit in groups if unit.rows]

    def _unit(self, file: File, group: pq.RowGroupMetaData, index: int) -> Unit:
        decoded = opened = 0
        times = None
        for place in range(group.num_columns):
            column = group.column(place)
            name = column.path_in_schema.split(".", 1)[0]
            if column.path_in_schema == self._time_column and column.statistics is not None:
                times = _bounds(column.statistics, self._time_scale)
            if name not in self._sources and column.path_in_schema not in self._sources:
                continue
            encoded = column.total_uncompressed_size
            width = _WIDTHS.get(column.physical_type)
            # offsets cost 4 bytes per row; the size of dictionary-encoded strings is only known from below
            decoded += 4 * group.num_rows + (column.num_values * width if width else encoded + 4 * column.num_values)
            pages = PAGE_BYTES * (2 if column.has_dictionary_page else 1)
            opened += min(encoded, pages) + min(column.total_compressed_size, READ_BUFFER)
        label = f"row group {index}"
        return Unit(
            file=file,
            index=index,
            label=label,
            rows=group.num_rows,
            decoded_bytes=decoded,
            open_bytes=opened,
            times=times,
        )

    def read(self, unit: Unit, sources: Sequence[str], *, first_row: int, batch_rows: int) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a row group from `first_row` on."""
        with _errors(unit.file, unit.label), unit.file.open_arrow() as handle:
            parquet = pq.ParquetFile(
                handle,
                metadata=self._footer(unit.file),
                buffer_size=READ_BUFFER,
                pre_buffer=False,
                page_checksum_verification=True,
            )
            self._keep_footer(unit.file, parquet.metadata)
            batches = parquet.iter_batches(
                batch_size=batch_rows, row_groups=[unit.index], columns=list(sources), use_threads=False
            )
            seen = 0
            for batch in batches:
                if seen + batch.num_rows > first_row:
                    yield batch.slice(max(0, first_row - seen))
                seen += batch.num_rows
            if seen != unit.rows:
                raise DataError(
                    f"{seen} rows read, {unit.rows} announced", file=unit.file.url, unit=unit.label, option=_BROKEN
                )

    def _footer(self, file: File) -> pq.FileMetaData | None:
        """The footer of a file, if it is kept: parsed, it is many times its size, and lanes often read one file at once."""
        with self._footers_lock:
            footer = self._footers.get(file.url)
            if footer is not None:
                self._footers.move_to_end(file.url)
            return footer

    def _keep_footer(self, file: File, footer: pq.FileMetaData) -> None:
        """Keep the footers used last, FOOTER_BYTES of them and always one."""
        with self._footers_lock:
            self._footers[file.url] = footer
            self._footers.move_to_end(file.url)
            while len(self._footers) > 1 and sum(f.serialized_size for f in self._footers.values()) > FOOTER_BYTES:
                self._footers.popitem(last=False)


@contextmanager
def _errors(file: File, unit: str | None) -> Iterator[None]:
    """Name the file in what Arrow raises."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        problem = f"cannot be read as Parquet: {str(error).splitlines()[0]}"
        raise DataError(problem, file=file.url, unit=unit, option=_BROKEN) from error


def _bounds(statistics: pq.Statistics, integer_scale: int) -> tuple[int, int] | None:
    """Least and greatest time in nanoseconds; None when not known."""
    if not statistics.has_min_max or statistics.null_count:
        return None
    least, greatest = statistics.min_raw, statistics.max_raw
    if not (isinstance(least, int) and isinstance(greatest, int)):
        return None
    logical = json.loads(statistics.logical_type.to_json())
    if logical["Type"] in ("None", "Int"):
        scale = integer_scale
    elif logical["Type"] == "Timestamp":
        scale = {"milliseconds": 10**6, "microseconds": 10**3, "nanoseconds": 1}[logical["timeUnit"]]
    else:
        return None
    return least * scale, greatest * scale
