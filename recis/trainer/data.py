"""From what a config calls data to the micro-batches of one step.

    DataConfig --Reader--> RawBatch --FeatureEngine--> Batch;   a Source of one's own delivers RawBatch or Batch itself

The features run in the training thread, so the reader's position is exactly that of the last batch trained on. Data in
time windows is read window after window.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from recis.distributed.batches import part_bounds, samples_of
from recis.errors import ConfigError
from recis.features import FeatureEngine
from recis.io.assemble import BadRow
from recis.io.batch import Batch, RawBatch
from recis.io.config import DataConfig
from recis.io.reader import Reader
from recis.trainer.config import Source

UNTIL_STOPPED = 2**31 - 1  # epochs of a run that max_steps ends


@dataclass(frozen=True, slots=True)
class Share:
    """Which parts of a step a rank has: p with p mod world_size = rank, of `parts`."""

    rank: int = 0
    world_size: int = 1
    parts: int = 1

    def parts_of(self, batch: Batch) -> list[Batch]:
        """Return this rank's parts of a batch that every rank has read, some of them perhaps empty."""
        bounds = part_bounds(batch.num_samples, self.parts)
        own = range(self.rank, self.parts, self.world_size)
        return [samples_of(batch, bounds[part], bounds[part + 1]) for part in own]


class StepStream:
    """The micro-batches of optimizer steps, with a position.

    Args:
        data: a DataConfig or a Source.
        engine: makes Batch of RawBatch; None when the source delivers Batch.
        micro_batches: per step. A RawBatch says itself whether it ends its step.
        epochs: in place of the DataConfig's own; None keeps it.
        share: which parts of each step to deliver. A Source of one's own is read whole by every rank, which keeps its parts
            of each batch; a Reader of several ranks is one already.

    Raises:
        ConfigError: `data` is neither, or a Reader of other ranks.
    """

    def __init__(
        self,
        data: Any,
        engine: FeatureEngine | None,
        *,
        micro_batches: int = 1,
        epochs: int | None = None,
        share: "Share | None" = None,
    ) -> None:
        self._engine = engine
        self._micro_batches = micro_batches
        share = Share() if share is None else share
        self._cut: Share | None = None
        self._opened: Reader | None = None
        self._behind: Callable[[], dict[str, Any]] | None = None
        if isinstance(data, DataConfig):
            if engine is None:
                raise ConfigError("data given as DataConfig needs `features`, which make a Batch of its columns")
            config = data if epochs is None else replace(data, epochs=epochs)
            self._source: Any = Reader(
                config,
                rank=share.rank,
                world_size=share.world_size,
                parts=share.parts,
                micro_batches=micro_batches,
            )
            self._opened = self._source
        elif isinstance(data, Source):
            self._source = data
            self._cut = share if share.parts > 1 and not _is_shared(data, share) else None
        else:
            raise ConfigError(
                f"data must be a DataConfig or a source with state_dict and load_state_dict; got {type(data).__name__}"
            )

    @property
    def bad_rows(self) -> tuple[BadRow, ...]:
        """Rows that were left out so far, the first 1000 (`on_bad_row="skip"`); none where the source does not tell."""
        return getattr(self._source, "bad_rows", ())

    def steps_ahead(self, num_steps: int | None = None) -> Iterator[tuple[list[Batch], list[Batch] | None]]:
        """Yield the micro-batches of one step after the other, and with them those of the next; None: there is none.

        The position stays behind the step that was yielded first. After num_steps of them no other is read.
        """
        steps, done = self.steps(), 1
        current = next(steps, None)
        while current is not None:
            self._behind = self._mark()
            is_last = num_steps is not None and done >= num_steps
            following = None if is_last else next(steps, None)
            yield current, following
            current, done = following, done + 1
        self._behind = None

    def _mark(self) -> Callable[[], dict[str, Any]]:
        if isinstance(self._source, Reader):
            return partial(self._source.state_at, self._source.mark())
        state = self._source.state_dict()
        return lambda: state

    def steps(self) -> Iterator[list[Batch]]:
        """Yield the micro-batches of one step after the other until the data ends."""
        waiting: list[Batch] = []
        taken = 0
        for raw in _all_windows(self._source):
            batch = _features(raw, self._engine)
            waiting += [batch] if self._cut is None else self._cut.parts_of(batch)
            taken += 1
            if raw.ends_step if isinstance(raw, RawBatch) else taken == self._micro_batches:
                yield waiting
                waiting, taken = [], 0
        if waiting:
            yield waiting

    def state_dict(self) -> dict[str, Any]:
        """Return the position behind the last batch that was taken; see steps_ahead."""
        return self._source.state_dict() if self._behind is None else self._behind()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the last batch that was taken when `state` was saved."""
        self._source.load_state_dict(state)

    def close(self) -> None:
        """Close what this object opened; a source of one's own stays open."""
        if self._opened is not None:
            self._opened.close()


class FromStart:
    """Data that is read from its beginning each time, once and in file order, as evaluation and prediction do.

    A Source of one's own is put back to where it stood when this object was made, afterwards too; a DataConfig is opened
    anew.

    Args:
        data, engine: as in StepStream.
        labels: whether labels and weights are needed; without, their columns need not be in the data.

    Attributes:
        bad_rows: rows that the last reading left out, the first 1000.
    """

    def __init__(self, data: Any, engine: FeatureEngine | None, *, labels: bool = True) -> None:
        self._engine = engine
        self._labels = labels
        self._data: Any = data
        self._start: dict[str, Any] | None = None
        self.bad_rows: tuple[BadRow, ...] = ()
        if isinstance(data, DataConfig):
            if engine is None:
                raise ConfigError("data given as DataConfig needs `features`, which make a Batch of its columns")
            needed = engine.required_columns(labels=labels)
            columns = tuple(column for column in data.columns if column.name in needed)
            self._data = replace(data, columns=columns, shuffle_rows=0, num_lanes=1, epochs=1, drop_last=False)
        elif isinstance(data, Source):
            self._start = data.state_dict()
        else:
            raise ConfigError(f"data must be a DataConfig or a source; got {type(data).__name__}")

    def batches(self) -> Iterator[tuple[RawBatch | Batch, Batch]]:
        """Yield what the data delivers and the Batch made of it, one pair after the other."""
        if self._start is not None:
            self._data.load_state_dict(self._start)
            try:
                yield from self._pairs(self._data)
            finally:
                self._data.load_state_dict(self._start)
            return
        with Reader(self._data) as reader:
            try:
                yield from self._pairs(reader)
            finally:
                self.bad_rows = reader.bad_rows

    def _pairs(self, source: Any) -> Iterator[tuple[RawBatch | Batch, Batch]]:
        for raw in _all_windows(source):
            yield raw, _features(raw, self._engine, labels=self._labels)


def _is_shared(source: Any, share: Share) -> bool:
    """Whether a source delivers this rank's samples alone.

    Raises:
        ConfigError: it delivers those of another rank.
    """
    if not isinstance(source, Reader) or source.split.parts == 1:
        return False
    split = source.split
    if (split.rank, split.world_size, split.parts) != (share.rank, share.world_size, share.parts):
        raise ConfigError(
            f"the Reader given as train_data is that of rank {split.rank} of {split.world_size} with {split.parts} parts, "
            f"this is rank {share.rank} of {share.world_size} with {share.parts}: give a Reader of one process, or a "
            "DataConfig, and it is shared out here"
        )
    return True


def _all_windows(source: Any) -> Iterator[RawBatch | Batch]:
    """Yield all batches; of a reader with time windows those of one window after the other."""
    yield from source
    if isinstance(source, Reader) and source.config.window is not None:
        while source.advance_window():
            yield from source


def _features(raw: RawBatch | Batch, engine: FeatureEngine | None, *, labels: bool = True) -> Batch:
    if isinstance(raw, Batch):
        return raw
    if engine is None:
        raise ConfigError("the source delivers RawBatch; give `features`, which make a Batch of its columns")
    return engine.forward(raw, labels=labels)
