"""Hugging Face `datasets` as a source: the same columns, order, position and errors as for files.

A map-style dataset has random access: its units are ranges of 8192 rows, dealt to lanes like row groups. An iterable
dataset can only be read from its start: it is a stream, of one lane, which every rank reads whole and keeps its share of;
after a restart the samples that were delivered before are passed over with `skip`. An iterable dataset must give the same
samples each time it is iterated, which it does unless it was made from something random.

Nothing is imported from `datasets`; the object that is passed in brings what is needed.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import Any, Literal

import fsspec
import pyarrow as pa

from recis.errors import ConfigError, DataError
from recis.io.columns import Column
from recis.io.config import DataConfig, TimeWindow
from recis.io.files import File, FileList, Unit
from recis.io.reader import Reader
from recis.io.source import Source, Typing

UNIT_ROWS = 8192
_STREAM_HELD_BYTES = 1 << 20  # what the iterator of a stream holds beside the rows it gave


def from_hf(
    dataset: Any,
    columns: tuple[Column, ...],
    *,
    batch_size: int,
    num_lanes: int = 64,
    shuffle_rows: int = 0,
    seed: int = 0,
    epochs: int = 1,
    memory_limit_mib: int = 2048,
    prefetch_batches: int = 4,
    threads: int = 2,
    drop_last: bool = False,
    on_bad_row: Literal["raise", "skip"] = "raise",
    window: TimeWindow | None = None,
    rank: int = 0,
    world_size: int = 1,
    micro_batches: int = 1,
) -> Reader:
    """Return a reader of a `datasets.Dataset` or `datasets.IterableDataset`; settings as in DataConfig and Reader.

    Raises:
        ConfigError: not a dataset, or settings that do not go together.
        DataError: a column is missing or of a type that its kind cannot be read from.
    """
    config = DataConfig(
        paths=(),
        format="huggingface",
        columns=columns,
        batch_size=batch_size,
        num_lanes=num_lanes,
        shuffle_rows=shuffle_rows,
        seed=seed,
        epochs=epochs,
        memory_limit_mib=memory_limit_mib,
        prefetch_batches=prefetch_batches,
        threads=threads,
        drop_last=drop_last,
        on_bad_row=on_bad_row,
        window=window,
    )
    return Reader(
        config, rank=rank, world_size=world_size, micro_batches=micro_batches, source=hf_source(dataset, config)
    )


def hf_source(dataset: Any, config: DataConfig) -> Source:
    """Return the source of a dataset, for `Reader(config, source=...)`.

    Raises:
        ConfigError: the object has neither rows by number nor an iterator of tables.
    """
    if not hasattr(dataset, "with_format"):
        raise ConfigError(f"from_hf needs a datasets.Dataset or datasets.IterableDataset; got {type(dataset).__name__}")
    return _Rows(dataset, config) if hasattr(dataset, "__len__") else _Stream(dataset, config)


class _Rows:
    """A map-style dataset: units are ranges of rows."""

    def __init__(self, dataset: Any, config: DataConfig) -> None:
        self._typing = Typing(config, has_faults=False)
        name = _name_of(dataset)
        self._typing.add(name, dataset.features.arrow_schema)
        self._data = dataset.select_columns(list(self._typing.sources)).with_format("arrow")
        num_rows = len(dataset)
        if num_rows == 0:
            raise DataError("the dataset has no rows", file=name)
        file = File(name, name, 0, fsspec.filesystem("memory"))
        row_bytes = max(1, self._data.data.nbytes // max(1, self._data.data.num_rows))
        starts = range(0, num_rows, UNIT_ROWS)
        self._units = tuple(_row_range(file, index, start, num_rows, row_bytes) for index, start in enumerate(starts))

    @property
    def units(self) -> Sequence[Unit]:
        return self._units

    @property
    def schema(self) -> pa.Schema:
        return self._typing.schema

    @property
    def places(self) -> Sequence[tuple[str, str]]:
        return [(unit.file.url, unit.label) for unit in self._units]

    def files(self) -> FileList:
        return [[self._units[0].file.url, 0, sum(unit.rows or 0 for unit in self._units)]]

    def chunks(self, unit: int, *, first_row: int, batch_rows: int) -> Generator[pa.RecordBatch]:
        place = self.places[unit]
        row = first_row
        for batch in self._batches(self._units[unit], first_row, batch_rows):
            yield self._typing.chunk(batch, unit=unit, first_row=row, place=place)
            row += batch.num_rows

    def times(self, unit: int) -> Iterator[pa.Array]:
        for batch in self._batches(self._units[unit], 0, UNIT_ROWS):
            yield self._typing.times(batch, place=self.places[unit])

    def _batches(self, unit: Unit, first_row: int, batch_rows: int) -> Iterator[pa.RecordBatch]:
        assert unit.stop is not None
        for start in range(unit.start + first_row, unit.stop, batch_rows):
            yield from _batches_of(self._data[start : min(start + batch_rows, unit.stop)])


class _Stream:
    """An iterable dataset: one unit, read from its start."""

    def __init__(self, dataset: Any, config: DataConfig) -> None:
        if config.window is not None:
            raise ConfigError("windows need a map-style dataset: the rows of a stream cannot be counted beforehand")
        self._typing = Typing(config, has_faults=False)
        name = _name_of(dataset)
        first = next(iter(dataset.with_format("arrow").iter(batch_size=1)), None)
        if first is None:
            raise DataError("the dataset has no rows", file=name)
        self._typing.add(name, first.schema)
        self._data = dataset.select_columns(list(self._typing.sources))
        self._unit = Unit(
            file=File(name, name, 0, fsspec.filesystem("memory")),
            index=0,
            label="the stream",
            rows=None,
            decoded_bytes=0,
            open_bytes=_STREAM_HELD_BYTES,
        )

    @property
    def units(self) -> Sequence[Unit]:
        return (self._unit,)

    @property
    def schema(self) -> pa.Schema:
        return self._typing.schema

    @property
    def places(self) -> Sequence[tuple[str, str]]:
        return [(self._unit.file.url, self._unit.label)]

    def files(self) -> FileList:
        return [[self._unit.file.url, 0, None]]

    def chunks(self, unit: int, *, first_row: int, batch_rows: int) -> Generator[pa.RecordBatch]:
        row, place = first_row, self.places[0]
        data = self._data.skip(first_row) if first_row else self._data
        for table in data.with_format("arrow").iter(batch_size=batch_rows):
            for batch in _batches_of(table):
                yield self._typing.chunk(batch, unit=unit, first_row=row, place=place)
                row += batch.num_rows

    def times(self, unit: int) -> Iterator[pa.Array]:
        raise ConfigError("windows need a map-style dataset")


def _batches_of(table: pa.Table) -> list[pa.RecordBatch]:
    return table.combine_chunks().to_batches()


def _row_range(file: File, index: int, start: int, num_rows: int, row_bytes: int) -> Unit:
    stop = min(start + UNIT_ROWS, num_rows)
    return Unit(
        file=file,
        index=index,
        label=f"rows {start}:{stop}",
        rows=stop - start,
        decoded_bytes=(stop - start) * row_bytes,
        open_bytes=0,
        start=start,
        stop=stop,
    )


def _name_of(dataset: Any) -> str:
    """A name that is the same in every process: builder and split, as far as the dataset knows them."""
    info = getattr(dataset, "info", None)
    builder = getattr(info, "dataset_name", None) or getattr(info, "builder_name", None) or "dataset"
    split = getattr(dataset, "split", None)
    return f"huggingface:{builder}" + (f":{split}" if split is not None else "")
