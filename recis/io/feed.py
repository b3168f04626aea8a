"""Steps of one source from one position on: plan on the caller's thread, read and decode on workers.

The caller's thread takes slices from lanes and hands them to workers, a few steps ahead of the one it delivers. What a step
holds is fixed by `recis.io.lanes`; workers only decide when it is ready. Nothing waits for a row while a step that was
planned before is still to be delivered.

A stream (one unit of unknown length) is read whole by every rank, which keeps its share of each step.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from recis.io.assemble import Made, Recipe, assemble_parts
from recis.io.config import DataConfig
from recis.io.lane import Lane
from recis.io.lanes import deal_units, micro_batches_of_step, rows_given
from recis.io.memory import block_rows, plan_memory
from recis.io.shuffle import lane_chunks, shuffled
from recis.io.source import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How the steps of a job are shared out: which rank this is, and how large its micro-batches are.

    A step is cut into `parts`, part p being the lanes with lane mod parts = p; a rank has the parts p with
    p mod world_size = rank, and delivers micro-batch 0 of each of them in ascending p, then micro-batch 1, ...
    """

    rank: int
    world_size: int
    parts: int
    micro_batches: int
    micro_batch_size: int

    @property
    def own_parts(self) -> range:
        """The parts of this rank."""
        return range(self.rank, self.parts, self.world_size)


@dataclass(frozen=True, slots=True)
class Step:
    """The micro-batches of one step on this rank, and where the job stands before and after it."""

    made: list[Made]
    epoch: int
    rows_before: int
    rows_after: int


class Feed:
    """The steps of a source from (epoch, rows) to the end of the last epoch.

    Args:
        source: where rows come from.
        config: the order and size of steps.
        split: this rank's part.
        pool: workers; shared with other feeds, closed by its owner.
        row_bytes: about how much memory a decoded row takes.
        epoch: where to begin.
        rows: rows of that epoch that were delivered before, over all ranks.
        last_epoch: the epoch to end with.

    Raises:
        ConfigError: the source does not fit the memory limit.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        split: Split,
        *,
        pool: Executor,
        row_bytes: float,
        epoch: int,
        rows: int,
        last_epoch: int,
    ) -> None:
        self._source, self._config, self._split, self._pool = source, config, split, pool
        self._row_bytes = row_bytes
        self._last_epoch = last_epoch
        self._recipe = Recipe(
            columns=config.columns,
            schema=source.schema,
            places=source.places,
            skip_bad_rows=config.on_bad_row == "skip",
        )
        self._is_stream = is_stream(source)
        self._lanes: dict[int, Lane] = {}
        self._pending: deque[tuple[Future[list[Made]], int, int, int]] = deque()
        self._open_epoch(epoch, rows)

    def next_step(self) -> Step | None:
        """Return the next step, waiting for it; None at the end.

        Raises:
            DataError: what reading or decoding this step raised; again at every call.
        """
        self._top_up()
        if not self._pending:
            return None
        future, epoch, before, after = self._pending[0]
        step = Step(future.result(), epoch, before, after)
        self._pending.popleft()
        return step

    def close(self) -> None:
        """Give up what was planned and close the files."""
        for future, *_ in self._pending:
            future.cancel()
        self._pending.clear()
        for lane in self._lanes.values():
            lane.close()
        self._lanes.clear()

    def _top_up(self) -> None:
        while len(self._pending) < self._prefetch_steps:
            counts = self._next_counts()
            if counts is None:
                return
            mine = {number: int(counts[number]) for number in self._lanes if counts[number]}
            if self._pending and not all(self._lanes[number].has(rows) for number, rows in mine.items()):
                return
            taken = {number: self._lanes[number].take(rows) for number, rows in mine.items()}
            total = int(counts.sum())
            if self._is_stream:
                whole = [part for slices in taken.values() for part in slices]
                total = sum(part.num_rows for part in whole)
                self._stream_ended = total < self._config.batch_size
                if total == 0 or (self._stream_ended and self._config.drop_last):
                    continue
                shares, counts = self._shares_of_stream(whole, total)
            else:
                self._given += counts
                shares = self._shares_of_lanes(taken)
            job = partial(
                assemble_parts,
                shares,
                self._recipe,
                micro_batches=micro_batches_of_step(
                    counts,
                    world_size=self._split.parts,
                    micro_batches=self._split.micro_batches,
                    micro_batch_size=self._split.micro_batch_size,
                ),
                micro_batch_size=self._split.micro_batch_size,
            )
            self._pending.append((self._pool.submit(job), self._epoch, self._rows, self._rows + total))
            self._rows += total

    def _next_counts(self) -> np.ndarray | None:
        """Rows that each lane gives to the next step, not yet taken; None at the end of the last epoch."""
        size = self._config.batch_size
        while True:
            if self._is_stream:
                if not self._stream_ended:
                    return np.array([size])
            else:
                taken = min(size, int(self._lane_rows.sum()) - self._rows)
                if taken == size or (taken and not self._config.drop_last):
                    return rows_given(self._lane_rows, self._rows + taken) - self._given
            if self._epoch >= self._last_epoch:
                return None
            self._open_epoch(self._epoch + 1, 0)

    def _open_epoch(self, epoch: int, rows: int) -> None:
        """Open this rank's lanes where they stand after `rows` rows of an epoch."""
        for lane in self._lanes.values():
            lane.close()
        config, split = self._config, self._split
        self._epoch, self._rows, self._stream_ended = epoch, rows, False
        dealt = deal(self._source, config, epoch)
        mine = [0] if self._is_stream else range(split.rank, len(dealt), split.world_size)
        if not self._is_stream:
            self._lane_rows = rows_of_lanes(self._source, dealt)
            self._given = rows_given(self._lane_rows, rows)
        step_rows = config.batch_size if self._is_stream else -(-config.batch_size // split.world_size)
        plan = plan_memory(
            config, self._source, [dealt[number] for number in mine], step_rows=step_rows, row_bytes=self._row_bytes
        )
        self._prefetch_steps = plan.prefetch_steps
        given = [rows] if self._is_stream else self._given.tolist()
        self._lanes = {n: self._open_lane(n, dealt[n], given[n], plan.chunk_rows) for n in mine if dealt[n]}
        for lane in self._lanes.values():
            lane.request()

    def _open_lane(self, number: int, units: Sequence[int], delivered: int, chunk_rows: int) -> Lane:
        if not self._config.shuffle_rows:
            chunks = lane_chunks(self._source, units, first_row=delivered, batch_rows=chunk_rows)
            return Lane(chunks, skip=0, pool=self._pool)
        block = block_rows(self._config)
        first = delivered // block
        chunks = lane_chunks(self._source, units, first_row=first * block, batch_rows=chunk_rows)
        stream = shuffled(
            chunks,
            block_rows=block,
            first_block=first,
            chunk_rows=chunk_rows,
            seed=self._config.seed,
            epoch=self._epoch,
            lane=number,
        )
        return Lane(stream, skip=delivered - first * block, pool=self._pool)

    def _shares_of_lanes(self, taken: dict[int, list[pa.RecordBatch]]) -> list[list[pa.RecordBatch]]:
        """Return the rows of each part of this rank, lane after lane."""
        return [
            [part for number in sorted(taken) if number % self._split.parts == own for part in taken[number]]
            for own in self._split.own_parts
        ]

    def _shares_of_stream(
        self, slices: list[pa.RecordBatch], total: int
    ) -> tuple[list[list[pa.RecordBatch]], np.ndarray]:
        """Return the rows of each part of this rank in a step that it has read whole, and the rows of every part."""
        bounds = np.arange(self._split.parts + 1) * total // self._split.parts
        whole = pa.Table.from_batches(slices, self._source.schema)
        shares = []
        for own in self._split.own_parts:
            start, stop = int(bounds[own]), int(bounds[own + 1])
            shares.append(whole.slice(start, stop - start).to_batches())
        return shares, np.diff(bounds)


def is_stream(source: Source) -> bool:
    """Return whether the source is one unit whose rows are not known before they are read."""
    return any(unit.rows is None for unit in source.units)


def deal(source: Source, config: DataConfig, epoch: int) -> list[list[int]]:
    """Return the units of each lane of an epoch, in reading order; a stream has one lane."""
    num_lanes = 1 if is_stream(source) else config.num_lanes
    return deal_units(len(source.units), num_lanes, seed=config.seed, epoch=epoch, shuffle=config.shuffle_rows > 0)


def rows_of_lanes(source: Source, dealt: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the rows of each lane, [N] int64."""
    return np.array([sum(source.units[unit].rows or 0 for unit in units) for units in dealt], dtype=np.int64)
