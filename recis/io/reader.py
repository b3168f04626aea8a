"""Deliver the samples of a source in batches, from where it stands, each exactly once.

    units --deal--> lanes --workers--> chunks --shuffle--> steps of the global sequence --workers--> RawBatch

`recis.io.lanes` fixes what a step holds; threads, prefetch and ranks change when things happen, never what is delivered. The
position counts delivered batches only. Time windows are entered one after the other by `advance_window`; a watched folder
is read in rounds of new files.
"""

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from recis.errors import CheckpointError, ConfigError
from recis.io.assemble import BadRow, Made
from recis.io.batch import RawBatch
from recis.io.config import DataConfig
from recis.io.feed import Feed, Split, is_stream
from recis.io.files import check_same_files, fingerprint, resolve
from recis.io.follow import Watcher
from recis.io.lanes import check_split
from recis.io.position import FORMAT, VERSION, check_micro_batch, check_state, lane_places, order_of
from recis.io.source import FileSource, Source, bytes_per_row
from recis.io.windows import WindowSource, paths_of

_log = logging.getLogger("recis.io")

MAX_LISTED_BAD_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a Reader stood; `Reader.state_at` makes a position of it."""

    epoch: int
    rows: int
    source: Source | None
    micro_batch: int
    window: Any
    num_bad_rows: int
    num_bad_rows_kept: int


class Reader:
    """Iterates over the micro-batches of one rank; `ends_step` marks the last one of each optimizer step.

    Args:
        config: what to read and how.
        rank: this process among world_size; it reads the lanes with lane mod world_size = rank.
        world_size: number of processes.
        micro_batches: micro-batches per optimizer step and part.
        parts: parts that a step is cut into by lane, a multiple of world_size (see Split); None: one per rank.
        source: read this instead of the files of the config (see `from_hf`).
        clock: seconds that only grow; for `follow`.
        sleep: waits for some seconds; for `follow`. The default wakes up when the reader is closed.

    Raises:
        ConfigError: settings that do not go together, or do not fit the memory limit.
        DataError: files that cannot be read (see FileSource). Iterating raises it for the batch it is met in.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        micro_batches: int = 1,
        parts: int | None = None,
        source: Source | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        parts = world_size if parts is None else parts
        size = check_split(
            batch_size=config.batch_size,
            num_lanes=config.num_lanes,
            rank=rank,
            world_size=parts,
            micro_batches=micro_batches,
        )
        if parts % world_size:
            raise ConfigError(f"parts must be a multiple of the ranks; got parts={parts}, world_size={world_size}")
        if config.format == "huggingface" and source is None:
            raise ConfigError("format 'huggingface' has no files to open; use recis.io.from_hf(dataset, ...)")
        if config.follow is not None and world_size > 1:
            raise ConfigError(f"follow reads in one process: {world_size} could see different files; use world_size=1")
        self.config = config
        self.split = Split(
            rank=rank, world_size=world_size, parts=parts, micro_batches=micro_batches, micro_batch_size=size
        )
        self._closing = threading.Event()
        self._pool = ThreadPoolExecutor(config.threads, thread_name_prefix="recis-read")
        self._finalizer = weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        self._base = source  # what windows by a column are cut from
        self._source: Source | None = None
        self._row_bytes = 1.0
        self._feed: Feed | None = None
        self._watcher: Watcher | None = None
        self._window = 0
        self._epoch = self._rows = self._rows_after = self._micro_batch = 0
        self._ready: deque[Made] = deque()
        self._bad_rows: list[BadRow] = []
        self._num_bad_rows = 0
        try:
            self._begin(clock, sleep)
        except BaseException:
            self.close()
            raise

    def _begin(self, clock: Callable[[], float], sleep: Callable[[float], object] | None) -> None:
        if self.config.follow is not None:
            self._watcher = Watcher(self.config, clock=clock, sleep=lambda seconds: self._sleep(sleep, seconds))
        elif self.config.window is not None:
            self._enter_window(0)
        else:
            self._set_source(self._base or FileSource(self.config))
            self._seek(0, 0)

    # -- what it is reading

    @property
    def epoch(self) -> int:
        """Epoch of the last delivered batch, from 0; of a watched folder, the round."""
        return self._epoch

    @property
    def window(self) -> int | None:
        """Number of the current time window; None without windows."""
        return None if self.config.window is None else self._window

    @property
    def num_samples(self) -> int | None:
        """Rows of one epoch over all ranks; None where that is not known: streams, watched folders."""
        if self._source is None or self._watcher is not None or is_stream(self._source):
            return None
        return _num_rows(self._source)

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps of one epoch, the same on every rank; None where that is not known."""
        total, size = self.num_samples, self.config.batch_size
        return None if total is None else (total // size if self.config.drop_last else -(-total // size))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the file list being read; equal on all ranks, or they must not train together."""
        return fingerprint([] if self._source is None else self._source.files())

    @property
    def micro_batch_size(self) -> int:
        """Most samples of a batch: batch_size / (ranks * micro-batches)."""
        return self.split.micro_batch_size

    @property
    def num_bad_rows(self) -> int:
        """Rows left out so far on this rank (`on_bad_row="skip"`)."""
        return self._num_bad_rows

    @property
    def bad_rows(self) -> tuple[BadRow, ...]:
        """The first 1000 of them."""
        return tuple(self._bad_rows)

    # -- iteration

    def __iter__(self) -> Iterator[RawBatch]:
        return self

    def __next__(self) -> RawBatch:
        while not self._ready:
            self._fetch_step()
        batch, bad = self._ready.popleft()
        self._note(bad)
        self._micro_batch += 1
        if not self._ready:
            self._rows, self._micro_batch = self._rows_after, 0
        return batch

    def _fetch_step(self) -> None:
        """Get the micro-batches of the next step ready; StopIteration at the end."""
        if self._closing.is_set():
            raise ConfigError("the reader is closed; build a new one")
        step = None if self._feed is None else self._feed.next_step()
        if step is None:
            if self._watcher is None:
                raise StopIteration
            self._next_round(self._watcher)
            return
        self._epoch, self._rows, self._rows_after = step.epoch, step.rows_before, step.rows_after
        if self.split.parts == 1 and all(batch.num_samples == 0 for batch, _ in step.made):
            for _, bad in step.made:  # all of its rows were bad: there is nothing to train on
                self._note(bad)
            self._rows = step.rows_after
            return
        self._ready.extend(step.made)

    def _note(self, bad: list[BadRow]) -> None:
        self._num_bad_rows += len(bad)
        self._bad_rows += bad[: max(0, MAX_LISTED_BAD_ROWS - len(self._bad_rows))]

    # -- windows and rounds

    def advance_window(self) -> bool:
        """Go on to the next time window that has rows; False when there is none.

        What the current window still holds is given up. Windows without rows are passed over and logged.
        """
        if self.config.window is None:
            raise ConfigError("this reader has no windows; set DataConfig(window=TimeWindow(...))")
        return self._enter_window(self._window + 1)

    def _enter_window(self, first: int) -> bool:
        window = self.config.window
        assert window is not None
        self._set_source(None)
        for number in range(first, window.num_windows):
            self._window = number
            source = self._window_source(number)
            if source is not None and source.units:
                self._set_source(source)
                self._seek(0, 0)
                return True
            begin, end = window.bounds(number)
            _log.info("window %d has no rows and is passed over: seconds %d to %d", number, begin, end)
        self._window = window.num_windows
        self._epoch = self._rows = 0
        return False

    def _window_source(self, number: int) -> Source | None:
        window = self.config.window
        assert window is not None
        if window.column is None:
            files = resolve(paths_of(window, self.config.paths, number), self.config.format, missing_ok=True)
            return FileSource(self.config, files, allow_empty=True) if files else None
        if self._base is None:
            self._base = FileSource(self.config)
        return WindowSource(self._base, *window.bounds(number))

    def _next_round(self, watcher: Watcher) -> None:
        """Wait for new files of the watched folder and begin to read them."""
        next_epoch = self._epoch
        if self._source is not None:
            watcher.consume(path for path, _, _ in self._source.files())
            next_epoch = self._epoch + 1
            self._set_source(None)
        files = watcher.wait()
        if self._closing.is_set() or not files:
            raise StopIteration
        source = FileSource(self.config, files, allow_empty=True)
        with_rows = {unit.file.url for unit in source.units}
        watcher.consume(file.url for file in files if file.url not in with_rows)
        if source.units:
            self._set_source(source)
            self._seek(next_epoch, 0)

    def _sleep(self, sleep: Callable[[float], object] | None, seconds: float) -> bool:
        """Wait; True when the reader was closed meanwhile."""
        if sleep is None:
            return self._closing.wait(seconds)
        sleep(seconds)
        return self._closing.is_set()

    def _set_source(self, source: Source | None) -> None:
        self._drop_feed()
        self._source = source
        if source is not None:
            self._row_bytes = bytes_per_row(source)

    def _seek(self, epoch: int, rows: int) -> None:
        """Read from (epoch, rows) of the current source on."""
        self._drop_feed()
        self._epoch, self._rows, self._micro_batch = epoch, rows, 0
        if self._source is not None:
            last_epoch = epoch if self._watcher is not None else self.config.epochs - 1
            self._feed = Feed(
                self._source,
                self.config,
                self.split,
                pool=self._pool,
                row_bytes=self._row_bytes,
                epoch=epoch,
                rows=rows,
                last_epoch=last_epoch,
            )

    def _drop_feed(self) -> None:
        self._ready.clear()
        if self._feed is not None:
            self._feed.close()
            self._feed = None

    # -- position

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last delivered batch, JSON-able.

        Between steps it is the same on every rank, but for `bad_rows`, which each rank counts for its own lanes.
        """
        return self.state_at(self.mark())

    def mark(self) -> Mark:
        """Return what `state_at` needs to tell later where the reader stands now; it costs next to nothing."""
        return Mark(
            self._epoch,
            self._rows,
            self._source,
            self._micro_batch,
            self.window,
            self._num_bad_rows,
            len(self._bad_rows),
        )

    def state_at(self, mark: Mark) -> dict[str, Any]:
        """Return what `state_dict` returned when `mark` was made; not of a watched folder, which may have moved on."""
        epoch, rows, files = mark.epoch, mark.rows, [] if mark.source is None else mark.source.files()
        consumed = [] if self._watcher is None else self._watcher.consumed
        if self._watcher is not None and mark.source is not None and rows == _num_rows(mark.source):
            consumed = sorted({*consumed, *(path for path, _, _ in files)})
            epoch, rows, files = epoch + 1, 0, []
        source = mark.source if files else None
        first = [asdict(row) for row in self._bad_rows[: mark.num_bad_rows_kept]]
        return {
            "format": FORMAT,
            "version": VERSION,
            "epoch": epoch,
            "rows": rows,
            "micro_batch": mark.micro_batch,
            "split": self._split_numbers(),
            "order": order_of(self.config),
            "lanes": [] if source is None else lane_places(source, self.config, epoch, rows),
            "files": files,
            "window": mark.window,
            "consumed": consumed,
            "bad_rows": {"count": mark.num_bad_rows, "first": first},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the last batch that was delivered when `state` was saved; any number of ranks can.

        Raises:
            CheckpointError: not a reader's state, or its lanes stand elsewhere than its rows say.
            ConfigError: num_lanes, shuffle_rows or seed differ, or it was saved inside a step that is split otherwise.
            DataError: the files differ; the text names the first difference.
        """
        check_state(state, self.config)
        delivered = check_micro_batch(state, self._split_numbers())
        epoch, rows = int(state["epoch"]), int(state["rows"])
        self._restore_source(state)
        mine = [] if self._source is None else self._source.files()
        check_same_files(mine, state["files"], whose="the checkpoint")
        lanes = [] if self._source is None else lane_places(self._source, self.config, epoch, rows)
        if lanes != [list(place) for place in state["lanes"]]:
            raise CheckpointError("the lanes of the saved position are not where its rows lead; it was altered")
        self._seek(epoch, rows)
        for _ in range(delivered):
            next(self)
        self._num_bad_rows = int(state["bad_rows"]["count"])
        self._bad_rows = [BadRow(**row) for row in state["bad_rows"]["first"]]

    def _split_numbers(self) -> list[int]:
        """What a position inside a step depends on."""
        split = self.split
        parts = [] if split.parts == split.world_size else [split.parts]
        return [self.config.batch_size, split.world_size, split.micro_batches, *parts]

    def _restore_source(self, state: Mapping[str, Any]) -> None:
        """Open the window or the round of files that a state was saved in."""
        if self._watcher is not None:
            self._watcher.restore(state["consumed"])
            paths = [path for path, _, _ in state["files"]]
            self._set_source(FileSource(self.config, resolve(paths, self.config.format)) if paths else None)
        elif self.config.window is not None and state["window"] != self._window:
            self._set_source(None)
            self._window = int(state["window"])
            source = self._window_source(self._window) if self._window < self.config.window.num_windows else None
            self._set_source(source if source is not None and source.units else None)

    def reset(self) -> None:
        """Go back to the first sample (of the current window), as evaluation does each time."""
        if self._watcher is not None:
            raise ConfigError("a watched folder is read once; build a new reader to read it again")
        self._seek(0, 0)

    # -- end

    def close(self) -> None:
        """Stop the threads and close the files; iterating raises from here on. Closing twice is fine."""
        self._closing.set()
        self._drop_feed()
        self._finalizer.detach()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _num_rows(source: Source) -> int:
    return sum(unit.rows or 0 for unit in source.units)
