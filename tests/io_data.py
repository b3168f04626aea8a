"""Files and small read loops for the tests of recis.io: every row carries its own number, so order and loss show at once."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv, orc

from recis.io import DataConfig, Dense, Ids, Label, Reader, Strings

ROW_COLUMNS = (Ids("row"), Ids("history"), Dense("price"), Label("click"), Strings("word"))


def rows_table(first: int, num_rows: int) -> pa.Table:
    """Rows first .. first + num_rows - 1; each column is a function of the row number alone."""
    rows = np.arange(first, first + num_rows)
    return pa.table(
        {
            "row": rows,
            "history": pa.array([[int(row) * 10 + k for k in range(row % 4)] for row in rows], pa.list_(pa.int64())),
            "price": rows / 4,
            "click": (rows % 3 == 0).astype(np.int64),
            "word": pa.array([f"w{row}" for row in rows], pa.string()),
        }
    )


def write_row_groups(folder: Path, files: Sequence[Sequence[int]]) -> Path:
    """One Parquet file per entry, with row groups of the given sizes; rows are numbered through all files."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for number, groups in enumerate(files):
        with pq.ParquetWriter(folder / f"part-{number:03d}.parquet", rows_table(0, 0).schema) as writer:
            for num_rows in groups:
                writer.write_table(rows_table(first, num_rows), row_group_size=max(1, num_rows))
                first += num_rows
    return folder


def write_format(path: Path, table: pa.Table, format_name: str) -> Path:
    """Write a table of `rows_table` in any format the reader knows."""
    if format_name == "parquet":
        pq.write_table(table, path, row_group_size=7)
    elif format_name == "orc":
        orc.write_table(table, path, stripe_size=1024, batch_size=5)
    elif format_name == "csv":
        history = ["|".join(map(str, entry)) for entry in table["history"].to_pylist()]
        flat = table.set_column(table.schema.get_field_index("history"), "history", pa.array(history))
        csv.write_csv(flat, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    return path


def make_config(path: Path | str, **changes: Any) -> DataConfig:
    """Parquet, 4 lanes, batches of 8, unless told otherwise."""
    fields: dict[str, Any] = {
        "paths": (str(path),),
        "format": "parquet",
        "columns": (Ids("row"),),
        "batch_size": 8,
        "num_lanes": 4,
    }
    return DataConfig(**{**fields, **changes})


def rows_of(batch: Any) -> list[int]:
    """The row numbers in a batch, in order."""
    return batch.jagged("row").flat_values.tolist()


def read_all(
    config: DataConfig, *, state: Any = None, stop: int | None = None, **place: Any
) -> tuple[list[list[int]], Any]:
    """Row numbers per batch, up to `stop` batches, and the state behind the last one after a trip through JSON."""
    batches: list[list[int]] = []
    with Reader(config, **place) as reader:
        if state is not None:
            reader.load_state_dict(state)
        while stop is None or len(batches) < stop:
            batch = next(reader, None)
            if batch is None:
                break
            batches.append(rows_of(batch))
        return batches, json.loads(json.dumps(reader.state_dict()))


def read_and_save(folder: str, out: str, world_size: int) -> None:
    """Go on from `out`/state.json, and replace it after every step: rows of all steps so far, and the position.

    The target of a process that is killed; all ranks live in it, so that one file holds a step of the whole job.
    """
    config = make_config(folder, shuffle_rows=40, epochs=2, prefetch_batches=4)
    state_file = Path(out) / "state.json"
    saved = json.loads(state_file.read_text()) if state_file.exists() else {"steps": [], "state": None}
    readers = [Reader(config, rank=rank, world_size=world_size) for rank in range(world_size)]
    for reader in readers:
        if saved["state"] is not None:
            reader.load_state_dict(saved["state"])
    while True:
        rows: list[int] = []
        ended = True
        for reader in readers:
            while (batch := next(reader, None)) is not None:
                rows, ended = rows + rows_of(batch), False
                if batch.ends_step:
                    break
        if ended:
            break
        saved["steps"].append(rows)
        (Path(out) / "state.tmp").write_text(json.dumps({"steps": saved["steps"], "state": readers[0].state_dict()}))
        (Path(out) / "state.tmp").replace(state_file)
    (Path(out) / "finished").touch()


def read_steps(config: DataConfig, **place: Any) -> list[list[int]]:
    """Row numbers per optimizer step of one rank, its micro-batches joined."""
    steps: list[list[int]] = [[]]
    with Reader(config, **place) as reader:
        for batch in reader:
            assert batch.num_samples <= reader.micro_batch_size
            steps[-1] += rows_of(batch)
            if batch.ends_step:
                steps.append([])
    assert steps.pop() == []
    return steps
