"""One lane as the reader's own thread sees it: rows that are ready, and one chunk being read by a worker.

Only one read per lane is under way at a time and it alone touches the lane's stream, so a lane's order cannot depend on how
many workers there are or when they run.
"""

from collections import deque
from collections.abc import Generator
from concurrent.futures import Executor, Future, wait

import pyarrow as pa


class Lane:
    """Rows of one lane in one epoch.

    Args:
        stream: its chunks, in order.
        skip: rows at the start of the first chunk that were delivered before (inside a shuffle block).
        pool: where chunks are read.
    """

    def __init__(self, stream: Generator[pa.RecordBatch], *, skip: int, pool: Executor) -> None:
        self._stream = stream
        self._skip = skip
        self._pool = pool
        self._ready: deque[pa.RecordBatch] = deque()
        self._num_ready = 0
        self._future: Future[pa.RecordBatch | None] | None = None
        self._is_ended = False

    def request(self) -> None:
        """Have the next chunk read, unless one is on its way or one is waiting behind the one in use."""
        if len(self._ready) < 2:
            self._submit()

    def has(self, num_rows: int) -> bool:
        """Return whether `num_rows` (or all that is left) can be taken without waiting; if not, have them read."""
        while self._num_ready < num_rows and not self._is_ended:
            self._submit()
            assert self._future is not None
            if not self._future.done() or self._future.exception() is not None:
                return False  # take() raises what went wrong when these rows are due, not before
            self._collect()
        return True

    def take(self, num_rows: int) -> list[pa.RecordBatch]:
        """Return the next `num_rows` rows, fewer at the end of the stream, as slices; waits for them.

        Raises:
            whatever reading raised; it is raised again by the next call.
        """
        while self._num_ready < num_rows and not self._is_ended:
            self._collect()
        taken = []
        while num_rows > 0 and self._ready:
            first = self._ready[0]
            part = first.slice(0, num_rows)
            taken.append(part)
            num_rows -= part.num_rows
            self._num_ready -= part.num_rows
            if part.num_rows == first.num_rows:
                self._ready.popleft()
            else:
                self._ready[0] = first.slice(part.num_rows)
        self.request()
        return taken

    def close(self) -> None:
        """Drop what is held and close the files; waits for a read that is under way."""
        if self._future is not None and not self._future.cancel():
            wait([self._future])
        self._ready.clear()
        self._num_ready, self._is_ended, self._future = 0, True, None
        self._stream.close()

    def _submit(self) -> None:
        if self._future is None and not self._is_ended:
            self._future = self._pool.submit(next, self._stream, None)

    def _collect(self) -> None:
        """Wait for the next chunk and take it in."""
        self._submit()
        assert self._future is not None
        chunk = self._future.result()
        self._future = None
        if chunk is None:
            self._is_ended = True
            return
        skipped = min(self._skip, chunk.num_rows)
        self._skip -= skipped
        if chunk.num_rows > skipped:
            self._ready.append(chunk.slice(skipped))
            self._num_ready += chunk.num_rows - skipped
