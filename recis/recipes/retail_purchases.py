"""Purchases as samples of retrieval: who bought what on a day, and what that customer had bought until then.

    item       number of the bought item in the log's stock codes
    last_day   items of the customer's last shopping day before;  lately, earlier: of up to, and beyond, RECENT_DAYS before
    weight     1 / sqrt(items the customer bought that day): a wholesaler's basket should not outweigh a hundred customers'

One sample per customer, day and item, in the order of time, of the last `days` days before a cut-off; a customer's first
shopping day gives none. `write_questions` writes one row per customer at the cut-off, with the same histories.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recis.errors import ConfigError
from recis.recipes.retail_log import PurchaseLog

HISTORIES = ("last_day", "lately", "earlier")
RECENT_DAYS = 60
MAX_ITEMS = 40  # of each history, the latest
ROW_GROUP = 4096
_BLOCK_DAYS = 7  # samples that are in memory at once


class Baskets:
    """The log as shopping days: one basket per customer and day, those of a customer one after the other.

    Attributes:
        customer, day: [K] of each basket, ascending by customer and then day (whole days since 1970).
        offsets: [K + 1]; items: [offsets[-1]] distinct item numbers of each basket.
    """

    def __init__(self, log: PurchaseLog) -> None:
        day = np.floor(log.day).astype(np.int64)
        width = log.num_items
        keys = np.unique((log.customer * 100_000 + day) * width + log.item)
        owner = keys // width
        first = np.concatenate([[True], owner[1:] != owner[:-1]]) if len(keys) else np.zeros(0, dtype=bool)
        starts = np.flatnonzero(first)
        self.items = keys % width
        self.offsets = np.concatenate([starts, [len(keys)]])
        self.customer, self.day = owner[starts] // 100_000, owner[starts] % 100_000

    def of(self, basket: int) -> np.ndarray:
        """Return the items of a basket."""
        return self.items[self.offsets[basket] : self.offsets[basket + 1]]

    def histories(self, before: int, now: float) -> list[np.ndarray] | None:
        """Return HISTORIES of the customer of basket `before - 1` as of day `now`, from that basket and those before it.

        None where there is no such basket. Of each history the latest MAX_ITEMS distinct items.
        """
        last = before - 1
        if last < 0:
            return None
        first = int(np.searchsorted(self.customer, self.customer[last]))
        cut = first + int(np.searchsorted(self.day[first : last + 1], now - RECENT_DAYS))
        spans = ((last, before), (max(first, cut), last), (first, min(cut, last)))
        return [_latest(self.items[self.offsets[low] : self.offsets[max(low, high)]]) for low, high in spans]


def _latest(items: np.ndarray) -> np.ndarray:
    """Return the distinct items, latest first, at most MAX_ITEMS; `items` stand in the order of time."""
    turned = items[::-1]
    return turned[np.sort(np.unique(turned, return_index=True)[1])][:MAX_ITEMS]


def write_samples(log: PurchaseLog, cutoff: float, days: int, titles: list[str], path: Path) -> int:
    """Write the samples of the last `days` days before a cut-off and return how many there are.

    Raises:
        ConfigError: there are none.
    """
    baskets = Baskets(log.before(cutoff))
    chosen = np.flatnonzero(baskets.day >= cutoff - days)
    chosen = chosen[(chosen > 0) & (baskets.customer[chosen] == baskets.customer[chosen - 1])]
    if len(chosen) == 0:
        raise ConfigError(f"nobody shops a second time in the {days} days before the cut-off; take more days")
    chosen = chosen[np.argsort(baskets.day[chosen], kind="stable")]
    part, num_rows = path.with_name(f".tmp-{path.name}"), 0
    with pq.ParquetWriter(part, _schema(sample=True), compression="zstd", compression_level=1) as writer:
        for block in _blocks(chosen, baskets.day):
            table = _samples(baskets, block, titles)
            writer.write_table(table, row_group_size=ROW_GROUP)
            num_rows += len(table)
    part.replace(path)
    return num_rows


def write_questions(log: PurchaseLog, cutoff: float, customers: np.ndarray, path: Path) -> None:
    """Write one row per customer [N], each with a purchase before the cut-off: its histories, and an item of none (-1)."""
    baskets = Baskets(log.before(cutoff))
    ends = np.searchsorted(baskets.customer, customers, side="right")
    rows = [baskets.histories(int(end), cutoff) for end in ends]
    part = path.with_name(f".tmp-{path.name}")
    columns = {name: [row[at] for row in rows if row is not None] for at, name in enumerate(HISTORIES)}
    pq.write_table(pa.table(columns, schema=_schema(sample=False)), part, row_group_size=ROW_GROUP)
    part.replace(path)


def _schema(*, sample: bool) -> pa.Schema:
    histories = [(name, pa.list_(pa.int64())) for name in HISTORIES]
    own = [("item", pa.int64()), ("title", pa.string()), ("weight", pa.float32())]
    return pa.schema([*own, *histories] if sample else histories)


def _blocks(chosen: np.ndarray, day: np.ndarray) -> Iterator[np.ndarray]:
    """Yield baskets, ascending by day, in runs of _BLOCK_DAYS days."""
    week = day[chosen] // _BLOCK_DAYS
    yield from np.split(chosen, np.flatnonzero(np.diff(week)) + 1)


def _samples(baskets: Baskets, block: np.ndarray, titles: list[str]) -> pa.Table:
    columns: dict[str, list] = {name: [] for name in ("item", "title", "weight", *HISTORIES)}
    for basket in block.tolist():
        items = baskets.of(basket).tolist()
        histories = baskets.histories(basket, float(baskets.day[basket]))
        assert histories is not None
        columns["item"] += items
        columns["title"] += [titles[item] for item in items]
        columns["weight"] += [len(items) ** -0.5] * len(items)
        for name, history in zip(HISTORIES, histories, strict=True):
            columns[name] += [history] * len(items)
    return pa.table(columns, schema=_schema(sample=True))
