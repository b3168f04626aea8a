"""From what a config calls data to the micro-batches of one step.

    DataConfig --Reader--> RawBatch --FeatureEngine--> Batch;   a Source of one's own delivers RawBatch or Batch itself

The features run in the training thread, so the reader's position is exactly that of the last batch trained on.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

from recis.errors import ConfigError
from recis.features import FeatureEngine
from recis.io.batch import Batch, RawBatch
from recis.io.config import DataConfig
from recis.io.reader import Reader
from recis.trainer.config import Source

UNTIL_STOPPED = 2**31 - 1  # epochs of a run that max_steps ends


class StepStream:
    """The micro-batches of optimizer steps, with a position.

    Args:
        data: a DataConfig or a Source.
        engine: makes Batch of RawBatch; None when the source delivers Batch.
        micro_batches: per step.
        epochs: in place of the DataConfig's own; None keeps it.
        shuffle: whether the DataConfig's shuffle buffer is used; evaluation and prediction read in file order.

    Raises:
        ConfigError: `data` is neither, or a Source is asked for another number of epochs.
    """

    def __init__(
        self,
        data: Any,
        engine: FeatureEngine | None,
        *,
        micro_batches: int = 1,
        epochs: int | None = None,
        shuffle: bool = True,
    ) -> None:
        self._engine = engine
        self._micro_batches = micro_batches
        if isinstance(data, DataConfig):
            if engine is None:
                raise ConfigError("data given as DataConfig needs `features`, which make a Batch of its columns")
            config = data if epochs is None else replace(data, epochs=epochs)
            if not shuffle:
                config = replace(config, shuffle_rows=0, num_lanes=1, drop_last=False)
            self._source = cast(Source, Reader(config, micro_batches=micro_batches))
            self._opened = True
        elif isinstance(data, Source):
            self._source = data
            self._opened = False
        else:
            raise ConfigError(
                f"data must be a DataConfig or a source with state_dict and load_state_dict; got {type(data).__name__}"
            )

    def steps(self) -> Iterator[list[Batch]]:
        """Yield the micro-batches of one step after the other until the data ends."""
        waiting: list[Batch] = []
        for raw in self._source:
            waiting.append(self._features(raw))
            ends = raw.ends_step if self._opened else len(waiting) == self._micro_batches
            if ends:
                yield waiting
                waiting = []
        if waiting:
            yield waiting

    def batches(self) -> Iterator[Batch]:
        """Yield batch by batch."""
        for raw in self._source:
            yield self._features(raw)

    def state_dict(self) -> dict[str, Any]:
        """Return the position behind the last batch that was taken."""
        return self._source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the last batch that was taken when `state` was saved."""
        self._source.load_state_dict(state)

    def close(self) -> None:
        """Close what this object opened; a source of one's own stays open."""
        if self._opened:
            cast(Reader, self._source).close()

    def _features(self, raw: RawBatch | Batch) -> Batch:
        if isinstance(raw, Batch):
            return raw
        if self._engine is None:
            raise ConfigError("the source delivers RawBatch; give `features`, which make a Batch of its columns")
        return self._engine.forward(raw)


class FromStart:
    """A source that is read from its beginning each time, as evaluation does.

    A Source of one's own is put back to where it stood when this object was made; a DataConfig is opened anew.
    """

    def __init__(self, data: Any, engine: FeatureEngine | None) -> None:
        self._data = data
        self._engine = engine
        self._start = None if isinstance(data, DataConfig) or not isinstance(data, Source) else data.state_dict()

    def batches(self) -> Iterator[Batch]:
        """Yield all batches once, in file order."""
        if self._start is not None:
            self._data.load_state_dict(self._start)
        stream = StepStream(self._data, self._engine, epochs=1, shuffle=False)
        try:
            yield from stream.batches()
        finally:
            stream.close()
