"""Keep rows of a few columns and give them back in sorted order, in bounded memory: an external merge sort.

Rows are buffered; a full buffer is sorted and spilled to an unnamed temporary file (a *run*), which the system removes even
after kill -9. Reading merges the runs: of each, one block is in memory; all rows up to the smallest last row of these
blocks are complete, so they are cut off, sorted together and given out. The order is by the first column, then the second
and so on, which leaves equal rows as the only ties: rows that came in any order, split and merged in any way, come out as
the same bytes. Memory stays below `memory_mib` (plus what the caller keeps); a row is read and written once beyond it.
"""

import tempfile
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
import torch
from torch import Tensor

Columns = tuple[np.ndarray, ...]

_ITEM_BYTES = 8  # columns are float64 or int64
_COPIES = 11  # what is alive at once while sorting: the rows, their concatenation, orders, ranks, the sorted rows
_MIN_BLOCK_ROWS = 256


def sort_columns(columns: Columns) -> Columns:
    """Return rows in ascending order of the first column, then the second, ...; columns hold no NaN."""
    order = _order(columns)
    return tuple(column[order] for column in columns)


def _order(columns: Columns) -> np.ndarray:
    """Return the order [N] of the rows. numpy's vectorised sort of one column is some ten times faster than its lexsort."""
    order = np.argsort(columns[0])
    first = columns[0][order]
    tie = first[1:] == first[:-1]
    if len(columns) == 1 or not tie.any():
        return order
    tied = np.flatnonzero(np.append(tie, False) | np.append(False, tie))
    rows = order[tied]
    place = np.append(0, np.cumsum(~tie))[tied]
    words = place << 32 | _ranks(columns[1][rows])  # one word orders like (first column, second column) does
    order[tied] = rows[_order((words, *(column[rows] for column in columns[2:])))]
    return order


def _ranks(column: np.ndarray) -> np.ndarray:
    """Return the rank int64 [N] of each entry among the distinct ones, from 0."""
    order = np.argsort(column)
    sorted_column = column[order]
    ranks = np.empty(column.size, np.int64)
    ranks[order] = np.append(0, np.cumsum(sorted_column[1:] != sorted_column[:-1]))
    return ranks


class SortedRuns:
    """Rows of named columns, each float64 or int64, that come out sorted.

    Args:
        columns: (name, dtype) in order of sorting.
        memory_mib: bound on the memory for rows, MiB; beyond it they go to temporary files.
    """

    def __init__(
        self,
        columns: Sequence[tuple[str, type[np.float64] | type[np.int64]]],
        *,
        memory_mib: int,
    ) -> None:
        if memory_mib < 1:
            raise ValueError(f"memory_mib must be at least 1; got {memory_mib}")
        self._names = tuple(name for name, _ in columns)
        self._dtypes = tuple(np.dtype(dtype) for _, dtype in columns)
        self._max_rows = (memory_mib << 20) // (_ITEM_BYTES * len(columns) * _COPIES)
        self._chunks: list[Columns] = []
        self._buffered = 0
        self._runs: list[_Run] = []

    @property
    def num_rows(self) -> int:
        """Rows held in all."""
        return self._buffered + sum(run.num_rows for run in self._runs)

    @property
    def is_spilled(self) -> bool:
        """Whether some rows lie on disk."""
        return bool(self._runs)

    def append(self, columns: Columns) -> None:
        """Take rows; the arrays [N] are kept, so they must be the caller's to give away."""
        for start in range(0, len(columns[0]), self._max_rows):
            piece = tuple(column[start : start + self._max_rows] for column in columns)
            if self._buffered + len(piece[0]) > self._max_rows:
                self._spill()
            self._chunks.append(piece)
            self._buffered += len(piece[0])

    def extend(self, other: "SortedRuns") -> None:
        """Take all rows of another holder, which keeps them."""
        for columns in other.unsorted():
            self.append(tuple(column.copy() for column in columns))

    def unsorted(self) -> Iterator[Columns]:
        """Yield all rows in no particular order, a bounded number at a time."""
        for run in self._runs:
            for start in range(0, run.num_rows, self._max_rows):
                yield run.read(start, min(start + self._max_rows, run.num_rows))
        yield from self._chunks

    def buffered(self) -> Columns:
        """Return the rows in memory, not sorted, as one piece; all rows when nothing is spilled."""
        if len(self._chunks) != 1:
            self._chunks = [self._joined()]
        return self._chunks[0]

    def sorted(self) -> Iterator[Columns]:
        """Yield all rows in order, a bounded number at a time."""
        if self._buffered:
            self._chunks = [sort_columns(self._joined())]
        if not self._runs:
            yield from self._chunks
            return
        budget = self._max_rows // (len(self._runs) + 1)
        blocks = [_Block(run, max(_MIN_BLOCK_ROWS, budget)) for run in (*self._runs, *map(_Memory, self._chunks))]
        while blocks:
            lasts = [block.last() for block in blocks if not block.is_final]
            parts = [block.take_up_to(min(lasts) if lasts else None) for block in blocks]
            yield sort_columns(tuple(np.concatenate(column) for column in zip(*parts, strict=True)))
            blocks = [block for block in blocks if block.fill()]

    def export(self) -> dict[str, Tensor]:
        """Return all rows in order, one tensor [N] per column; those of a spilled holder are mapped from a file."""
        if not self._runs:
            joined = sort_columns(self._joined())
            return {name: torch.from_numpy(column) for name, column in zip(self._names, joined, strict=True)}
        total = _Run(self.num_rows, self._dtypes)
        start = 0
        for columns in self.sorted():
            total.write(start, columns)
            start += len(columns[0])
        return {name: torch.from_numpy(total.mapped(index)) for index, name in enumerate(self._names)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Replace all rows by those of `export`, which need not be sorted."""
        self.clear()
        arrays = [state[name].cpu().numpy() for name in self._names]
        for name, array, dtype in zip(self._names, arrays, self._dtypes, strict=True):
            if array.dtype != dtype or array.shape != arrays[0].shape or array.ndim != 1:
                raise ValueError(f"column {name!r} of a state must be {dtype} {arrays[0].shape}; got {array.dtype}")
        for start in range(0, len(arrays[0]), self._max_rows):
            self.append(tuple(array[start : start + self._max_rows].copy() for array in arrays))

    def clear(self) -> None:
        """Forget all rows."""
        self._chunks, self._buffered, self._runs = [], 0, []

    def _joined(self) -> Columns:
        if not self._chunks:
            return tuple(np.empty(0, dtype) for dtype in self._dtypes)
        if len(self._chunks) == 1:
            return self._chunks[0]
        return tuple(np.concatenate(column) for column in zip(*self._chunks, strict=True))

    def _spill(self) -> None:
        rows = sort_columns(self._joined())
        run = _Run(self._buffered, self._dtypes)
        run.write(0, rows)
        self._runs.append(run)
        self._chunks, self._buffered = [], 0


class _Run:
    """Sorted rows in an unnamed temporary file, column after column."""

    def __init__(self, num_rows: int, dtypes: tuple[np.dtype, ...]) -> None:
        self.num_rows = num_rows
        self._dtypes = dtypes
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="recis-metric-")  # noqa: SIM115 - lives as long as the run

    def write(self, start: int, columns: Columns) -> None:
        try:
            for index, column in enumerate(columns):
                self._file.seek((index * self.num_rows + start) * _ITEM_BYTES)
                self._file.write(np.ascontiguousarray(column).data)
            self._file.flush()
        except OSError as error:
            raise OSError(
                error.errno,
                f"{tempfile.gettempdir()}: cannot write {self.num_rows * len(columns) * _ITEM_BYTES / 1e6:.0f} MB of metric "
                f"rows ({error.strerror}); free space, name another folder by TMPDIR, or raise the metric's memory_mib",
            ) from error

    def read(self, start: int, stop: int) -> Columns:
        columns = []
        for index, dtype in enumerate(self._dtypes):
            self._file.seek((index * self.num_rows + start) * _ITEM_BYTES)
            columns.append(np.fromfile(self._file, dtype=dtype, count=stop - start))
        return tuple(columns)

    def mapped(self, index: int) -> np.ndarray:
        offset = index * self.num_rows * _ITEM_BYTES
        return np.memmap(self._file, self._dtypes[index], mode="c", offset=offset, shape=(self.num_rows,))


class _Memory:
    """Sorted rows in memory, read like a run."""

    def __init__(self, columns: Columns) -> None:
        self.num_rows = len(columns[0])
        self._columns = columns

    def read(self, start: int, stop: int) -> Columns:
        return tuple(column[start:stop] for column in self._columns)


class _Block:
    """The part of a run that a merge has in memory."""

    def __init__(self, run: "_Run | _Memory", max_rows: int) -> None:
        self._run = run
        self._max_rows = max_rows
        self._read = 0
        self._columns = run.read(0, 0)
        self.fill()

    @property
    def is_final(self) -> bool:
        return self._read == self._run.num_rows

    def fill(self) -> bool:
        """Read the next block when this one is used up; return whether there are rows."""
        if len(self._columns[0]) == 0 and not self.is_final:
            stop = min(self._read + self._max_rows, self._run.num_rows)
            self._columns = self._run.read(self._read, stop)
            self._read = stop
        return len(self._columns[0]) > 0

    def last(self) -> tuple[np.generic, ...]:
        return tuple(column[-1] for column in self._columns)

    def take_up_to(self, bound: tuple[np.generic, ...] | None) -> Columns:
        """Cut off and return the rows that are not after `bound`, all of them when it is None."""
        first, stop = 0, len(self._columns[0])
        for column, value in zip(self._columns, bound or (), strict=False):
            inside = column[first:stop]
            first, stop = (
                first + np.searchsorted(inside, value, "left"),
                first + np.searchsorted(inside, value, "right"),
            )
        taken = tuple(column[:stop] for column in self._columns)
        self._columns = tuple(column[stop:] for column in self._columns)
        return taken
