"""One window of time of a source: the rows whose time lies in it, counted before they are read.

The order of samples needs the rows of every unit. Row groups whose least and greatest time lie outside a window are left
out and those inside are taken whole, both by the file's own statistics; of the others the time column alone is read once to
count. Windows hold rows with begin <= time < end.
"""

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from recis.errors import DataError
from recis.io.config import TimeWindow
from recis.io.files import FileList, Unit
from recis.io.source import TIME_KEY, Source

_NS = 10**9


def paths_of(window: TimeWindow, paths: Sequence[str], number: int) -> tuple[str, ...]:
    """Return the paths of window `number`: each pattern filled in with the window's begin, UTC."""
    begin, _ = window.bounds(number)
    return tuple(time.strftime(path, time.gmtime(begin)) for path in paths)


class WindowSource:
    """The rows of `base` with begin <= time < end.

    Args:
        base: a source with a time column.
        begin: seconds since 1970.
        end: seconds since 1970.

    Raises:
        DataError: a row has no time.
    """

    def __init__(self, base: Source, begin: int, end: int) -> None:
        self._base = base
        self._begin, self._end = begin * _NS, end * _NS
        self._base_units: list[int] = []
        self._is_whole: list[bool] = []
        units = []
        for number, unit in enumerate(base.units):
            times = unit.times
            if times is not None and (times[1] < self._begin or times[0] >= self._end):
                continue
            whole = times is not None and times[0] >= self._begin and times[1] < self._end
            rows = unit.rows if whole else self._count(number, unit)
            if rows:
                units.append(replace(unit, rows=rows))
                self._base_units.append(number)
                self._is_whole.append(whole)
        self._units = tuple(units)

    @property
    def units(self) -> Sequence[Unit]:
        """Units with rows in the window; `rows` counts those."""
        return self._units

    @property
    def schema(self) -> pa.Schema:
        """Names and types of chunks."""
        return self._base.schema

    @property
    def places(self) -> Sequence[tuple[str, str]]:
        """(file, unit in words) of each unit of the whole source."""
        return self._base.places

    def files(self) -> FileList:
        """Return [path, bytes, rows] per file of the whole source."""
        return self._base.files()

    def chunks(self, unit: int, *, first_row: int, batch_rows: int) -> Generator[pa.RecordBatch]:
        """Yield the rows of a unit that lie in the window, from the `first_row`-th of them on."""
        base_unit = self._base_units[unit]
        if self._is_whole[unit]:
            yield from self._base.chunks(base_unit, first_row=first_row, batch_rows=batch_rows)
            return
        to_skip = first_row
        for chunk in self._base.chunks(base_unit, first_row=0, batch_rows=batch_rows):
            kept = chunk.filter(pa.array(self._inside(chunk.column(TIME_KEY))))
            if kept.num_rows > to_skip:
                yield kept.slice(to_skip)
            to_skip = max(0, to_skip - kept.num_rows)

    def times(self, unit: int) -> Iterator[pa.Array]:
        """Yield the times of all rows of a unit, also of those outside the window."""
        return self._base.times(self._base_units[unit])

    def _count(self, number: int, unit: Unit) -> int:
        rows = place = 0
        for times in self._base.times(number):
            if times.null_count:
                row = place + int(np.flatnonzero(times.is_null().to_numpy(zero_copy_only=False))[0])
                option = "write a time for each row, or read without a window"
                raise DataError("a row without a time", file=unit.file.url, unit=unit.label, row=row, option=option)
            rows += int(self._inside(times).sum())
            place += len(times)
        return rows

    def _inside(self, times: pa.Array) -> np.ndarray:
        values = times.to_numpy(zero_copy_only=False)
        return (values >= self._begin) & (values < self._end)
