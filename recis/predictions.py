"""Write scores beside the rows they belong to: of a file a user gives, and of a run's own evaluation data.

A file of predictions appears whole under its name or not at all: it is written beside it, flushed to the disk and renamed.
Memory: one batch and one row group of the output, whatever the size of the input.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recis.errors import CheckpointError, ConfigError, DataError
from recis.input_rows import InputRows
from recis.io.batch import RawBatch
from recis.io.config import DataConfig
from recis.io.files import SUFFIXES

if TYPE_CHECKING:
    from recis.runs import Run
    from recis.trainer import Trainer

EVAL_PREDICTIONS = Path("predictions") / "eval.parquet"
PREDICTION = "prediction"
ROW_GROUP_ROWS = 65_536
ROW_GROUP_BYTES = 64 * 2**20


def write_predictions(run: "Run", path: str, out: Path) -> int:
    """Write the rows of a file in their order, with a column `prediction` (one `prediction.<task>` each with several).

    Labels and weights need not be in the file. A row that the reader leaves out (`on_bad_row="skip"`) keeps its place
    and has a null for a prediction. Returns the number of rows.

    Raises:
        ConfigError: the file already has such a column, or no file can be at `out`.
        DataError: the file cannot be read.
        CheckpointError: the output cannot be written; nothing of it is left.
    """
    tasks = run.trainer.tasks
    names = [PREDICTION] if len(tasks) <= 1 else [f"{PREDICTION}.{task}" for task in tasks]
    data = run.data(path)
    check_output(out)
    rows = InputRows(data)
    taken = [name for name in names if name in rows.schema.names]
    if taken:
        raise ConfigError(f"{path} already has a column {taken[0]!r}; rename it")
    if out.exists() and any(file.is_local and out.samefile(file.path) for file in rows.files):
        raise ConfigError(f"--out {out}: is the input; name another file")
    schema = pa.schema([*rows.schema, *(pa.field(name, pa.float32()) for name in names)])
    chunks = _Chunks(rows.batches())
    done = 0
    with _whole_file(out, schema) as writer:
        for at, scores in _scores(run, data, rows, len(names)):
            stop = int(at[-1]) + 1 if len(at) else rows.num_rows
            for batch in _with_scores(chunks.take(stop - done), schema, at, scores, done):
                writer.add(batch)
            done = stop
    return rows.num_rows


def _scores(run: "Run", data: DataConfig, rows: InputRows, num_tasks: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield row numbers [N], ascending, and scores [N, T] batch by batch, and an empty batch at the end."""
    for raw, scores in run.trainer.predict_raw(data):
        if scores.shape[1] != num_tasks:
            tasks = ", ".join(run.trainer.tasks)
            raise ConfigError(f"the model gives {scores.shape[1]} scores per row for the {num_tasks} tasks ({tasks})")
        if not isinstance(raw, RawBatch) or raw.origin is None:
            raise DataError("the source does not say where its rows came from", option="predict from files")
        if raw.num_samples:
            yield rows.positions(raw.origin), scores.cpu().numpy()
    yield np.zeros(0, dtype=np.int64), np.zeros((0, num_tasks), dtype=np.float32)


def check_output(out: Path) -> None:
    """Raise ConfigError where no Parquet file can be written at `out`."""
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: {out.parent} is no folder; make it first, or name a file in another")
    if out.is_dir():
        raise ConfigError(f"--out {out}: is a folder; name a file")
    if any(
        out.name.endswith(suffix) for kind, suffixes in SUFFIXES.items() if kind != "parquet" for suffix in suffixes
    ):
        raise ConfigError(f"--out {out}: the output is a Parquet file; name it {out.stem}.parquet")


def _with_scores(
    pieces: Iterator[pa.RecordBatch], schema: pa.Schema, at: np.ndarray, scores: np.ndarray, start: int
) -> Iterator[pa.RecordBatch]:
    """Yield the rows from number `start` on with the scores [N, T] of rows `at` [N], ascending; the others get nulls."""
    for piece in pieces:
        stop = start + piece.num_rows
        low, high = np.searchsorted(at, (start, stop))
        here = at[low:high] - start
        missing = np.ones(piece.num_rows, dtype=bool)
        missing[here] = False
        columns = []
        for task in range(scores.shape[1]):
            values = np.zeros(piece.num_rows, dtype=np.float32)
            values[here] = scores[low:high, task]
            columns.append(pa.array(values, mask=missing))
        yield pa.RecordBatch.from_arrays([*piece.columns, *columns], schema=schema)
        start = stop


class _Chunks:
    """Rows in the order of a stream of batches, as many at a time as are asked for."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches = batches
        self._held: pa.RecordBatch | None = None

    def take(self, num_rows: int) -> Iterator[pa.RecordBatch]:
        """Yield the next rows, `num_rows` in all, in pieces."""
        while num_rows > 0:
            held = next(self._batches, None) if self._held is None else self._held
            if held is None:
                raise DataError("the input ended early: it changed while it was read", option="predict again")
            piece = held.slice(0, num_rows)
            self._held = held.slice(num_rows) if held.num_rows > num_rows else None
            num_rows -= piece.num_rows
            yield piece


class _Writer:
    """Collects rows into row groups of a file."""

    def __init__(self, file: pq.ParquetWriter, schema: pa.Schema) -> None:
        self._file = file
        self._schema = schema
        self._waiting: list[pa.RecordBatch] = []
        self._num_rows = self._num_bytes = 0

    def add(self, batch: pa.RecordBatch) -> None:
        """Add rows behind those that were added before."""
        self._waiting.append(batch)
        self._num_rows += batch.num_rows
        self._num_bytes += batch.nbytes
        if self._num_rows >= ROW_GROUP_ROWS or self._num_bytes >= ROW_GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits as one row group."""
        if self._waiting:
            self._file.write_table(pa.Table.from_batches(self._waiting, self._schema))
        self._waiting, self._num_rows, self._num_bytes = [], 0, 0


@contextmanager
def _whole_file(out: Path, schema: pa.Schema) -> Iterator[_Writer]:
    """Give a writer whose file appears as `out` when the block ends well; else nothing is left.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    part = out.with_name(f".tmp-{out.name}")
    try:
        with pq.ParquetWriter(part, schema) as file:
            writer = _Writer(file, schema)
            yield writer
            writer.flush()
        with part.open("rb+") as written:
            os.fsync(written.fileno())
        part.replace(out)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise CheckpointError(f"--out {out}: cannot be written ({reason}); free space, or name another file") from error
    finally:
        if part.parent.is_dir():
            part.unlink(missing_ok=True)


def write_eval_predictions(trainer: "Trainer", out: Path) -> None:
    """Write prediction, label, weight and group of each evaluated sample of the first task, for the report.

    Raises:
        CheckpointError: it cannot be written.
    """
    batches = trainer.scored(trainer.config.eval_data)
    first = next(batches, None)
    if first is None or not first[0].labels.shape[1]:
        return
    out.parent.mkdir(exist_ok=True)
    schema = _eval_rows(*first).schema
    with _whole_file(out, schema) as writer:
        writer.add(_eval_rows(*first))
        for batch, scores in batches:
            writer.add(_eval_rows(batch, scores))


def _eval_rows(batch: Any, scores: Any) -> pa.RecordBatch:
    present = {"prediction": scores[:, 0], "label": batch.labels[:, 0], "weight": batch.weights}
    if batch.group_ids is not None:
        present["group"] = batch.group_ids
    keep = slice(None) if batch.label_mask is None else batch.label_mask[:, 0]
    return pa.record_batch({name: values[keep].cpu().numpy() for name, values in present.items()})
