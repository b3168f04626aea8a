"""Purchase lines of each customer as a sequence, beside the lists of `retail_snapshots`: what a sequence model reads.

    items    StockCode of each line before the cut-off, oldest first, the latest MAX_LINES
    times    minutes from 1970 to each line, int64;   now = minutes to the cut-off

One Parquet file per cut-off again: the snapshot's columns and these. They are written after the snapshots, each file whole or
not at all, so a killed preparation goes on where it stopped.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recis.recipes.retail_log import PurchaseLog
from recis.recipes.retail_snapshots import ROW_GROUP, Prepared, cutoff_of

MAX_LINES = 256
MINUTES_PER_DAY = 24 * 60


def write_lines(log: PurchaseLog, prepared: Prepared, folder: Path) -> None:
    """Write a file with lines for every snapshot of a run, those that are there already left as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in prepared.rows:
        if not (folder / name).is_file():
            add_lines(log.before(cutoff_of(name)), cutoff_of(name), prepared.folder / name, folder / name)


def add_lines(lines: PurchaseLog, cutoff: float, snapshot: Path, path: Path) -> None:
    """Write a snapshot file again at `path` with `items`, `times` and `now`.

    Args:
        lines: what was bought before the cut-off.
        cutoff: days since 1970.
        snapshot: the file of the lists; its CustomerIDs say whose lines are wanted.
        path: what to write.
    """
    table = pq.read_table(snapshot)
    customers = np.searchsorted(lines.customer_ids, table["CustomerID"].to_numpy())
    chosen = latest_lines(lines, customers)
    offsets = np.concatenate([[0], np.cumsum([len(rows) for rows in chosen])]).astype(np.int32)
    flat = np.concatenate([np.zeros(0, dtype=np.int64), *chosen])
    codes = pa.array(lines.stock_codes).take(pa.array(lines.item[flat]))
    times = pa.array(np.floor(lines.day[flat] * MINUTES_PER_DAY).astype(np.int64))
    now = pa.array(np.full(len(table), int(cutoff * MINUTES_PER_DAY)))
    for column, values in (("items", codes), ("times", times)):
        table = table.append_column(column, pa.ListArray.from_arrays(pa.array(offsets), values))
    part = path.with_name(f".tmp-{path.name}")
    pq.write_table(
        table.append_column("now", now), part, row_group_size=ROW_GROUP, compression="zstd", compression_level=1
    )
    part.replace(path)


def latest_lines(lines: PurchaseLog, customers: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """Return per customer the numbers of its lines, oldest first, at most MAX_LINES, the latest."""
    order = np.argsort(lines.customer, kind="stable")  # lines are in the order of time
    owner = lines.customer[order]
    stops = np.searchsorted(owner, customers, side="right")
    starts = np.maximum(np.searchsorted(owner, customers), stops - MAX_LINES)
    return [order[start:stop] for start, stop in zip(starts, stops, strict=True)]
