"""Write scores beside the rows they belong to: of a file a user gives, and of a run's own evaluation data."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.json
import pyarrow.parquet as pq

from recis.errors import ConfigError

if TYPE_CHECKING:
    from recis.runs import Run
    from recis.trainer import Trainer

EVAL_PREDICTIONS = Path("predictions") / "eval.parquet"


def write_predictions(run: "Run", path: str, out: Path) -> int:
    """Write the rows of a file in their order, with a column `prediction` (one `prediction.<task>` each with several).

    Labels and weights need not be in the file. The output appears whole or not at all. Returns the number of rows.

    Raises:
        ConfigError: the file already has such a column, or the output cannot be written there.
    """
    tasks = run.config.tasks
    names = ["prediction"] if len(tasks) == 1 else [f"prediction.{task}" for task in tasks]
    data = run.data(path)
    rows = _rows_of(path, data.format)
    _check_output(out, names, path, rows.schema)
    schema = rows.schema
    for name in names:
        schema = schema.append(pa.field(name, pa.float32()))
    part = out.with_name(f".tmp-{out.name}")
    count = 0
    left: Iterator[pa.RecordBatch] = iter(rows.batches())
    buffered: list[pa.RecordBatch] = []
    try:
        with pq.ParquetWriter(part, schema) as writer:
            for scores in run.trainer.predict(data):
                table, buffered = _take(left, buffered, len(scores), rows.schema)
                for column, name in enumerate(names):
                    table = table.append_column(name, pa.array(scores[:, column].cpu().numpy()))
                writer.write_table(table)
                count += len(scores)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return count


class _Rows:
    """The rows of a file as they are, in order."""

    def __init__(self, schema: pa.Schema, batches: Any) -> None:
        self.schema = schema
        self.batches = batches


def _rows_of(path: str, format_name: str) -> _Rows:
    if format_name == "jsonl":
        table = pa.json.read_json(path)
        return _Rows(table.schema, table.to_batches)
    dataset = ds.dataset(path, format=format_name)
    return _Rows(dataset.schema, lambda: dataset.to_batches())


def _check_output(out: Path, names: list[str], path: str, schema: pa.Schema) -> None:
    taken = [name for name in names if name in schema.names]
    if taken:
        raise ConfigError(f"{path} already has a column {taken[0]!r}; rename it")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: the folder {out.parent} does not exist; make it first")
    if out.is_dir():
        raise ConfigError(f"--out {out}: is a folder; name a file")


def _take(
    left: Iterator[pa.RecordBatch], buffered: list[pa.RecordBatch], count: int, schema: pa.Schema
) -> tuple[pa.Table, list[pa.RecordBatch]]:
    """Return the next `count` rows as a table, and what is left of the batches they came from."""
    have = sum(len(batch) for batch in buffered)
    while have < count:
        batch = next(left)
        buffered.append(batch)
        have += len(batch)
    table = pa.Table.from_batches(buffered, schema)
    rest = table.slice(count).to_batches()
    return table.slice(0, count), rest


def write_eval_predictions(trainer: "Trainer", out: Path) -> None:
    """Write prediction, label, weight and group of each evaluated sample of the first task, for the report."""
    columns: dict[str, list[np.ndarray]] = {}
    for batch, scores in trainer.scored(trainer.config.eval_data):
        present = {
            "prediction": scores[:, 0],
            "label": batch.labels[:, 0],
            "weight": batch.weights,
            "group": batch.group_ids,
        }
        keep = slice(None) if batch.label_mask is None else batch.label_mask[:, 0]
        for name, values in present.items():
            if values is not None:
                columns.setdefault(name, []).append(values[keep].cpu().numpy())
    out.parent.mkdir(exist_ok=True)
    part = out.with_name(f".tmp-{out.name}")
    pq.write_table(pa.table({name: np.concatenate(parts) for name, parts in columns.items()}), part)
    part.replace(out)
