"""Training samples of `online_retail`: one row per customer and cut-off, with the list of candidates to rank.

    cut-offs     split, split - 28, split - 42, ... (every 14 days)        split = end of the log - 28 days
    candidates   the NUM_CANDIDATES items the hand rule puts first, in its order
    target       which of them the customer buys in the 28 days from the cut-off on

A row holds StockCodes (candidates; own items, latest first, with their age in days), features `facts` [C * K] and `customer`
[K'], `bought` [C] and `num_bought`, all distinct items the customer buys then, candidates or not. One Parquet file per
cut-off; `summary.json`, written last, tells what is there, so a killed preparation is repeated and a whole one is not.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from recis.errors import ConfigError
from recis.recipes.retail_features import CUSTOMER, FEATURES, candidate_features
from recis.recipes.retail_history import History
from recis.recipes.retail_log import WINDOW_DAYS, PurchaseLog, active_customers

NUM_CANDIDATES = 150
HISTORY_ITEMS = 50
STRIDE_DAYS = 14
MIN_HISTORY_DAYS = 90  # of the log before the earliest cut-off
SUMMARY = "summary.json"
FACTS = tuple(name for name in FEATURES if name not in CUSTOMER)
ROW_GROUP = 128
STD_FLOOR = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What is ranked for some customers at one cut-off.

    Attributes:
        cutoff: days since 1970.
        customers: [N].
        candidates: [N, C] items in the rule's order.
        rule: [N, I] the rule's scores.
        facts: [N, C, K] float32, customer: [N, K'] float32.
        bought: [N, C] bool, num_bought: [N]; all 0 where the days after the cut-off are not known.
    """

    cutoff: float
    customers: np.ndarray
    candidates: np.ndarray
    rule: Tensor
    facts: np.ndarray
    customer: np.ndarray
    bought: np.ndarray
    num_bought: np.ndarray


def training_cutoffs(log: PurchaseLog, latest: float, most: int | None = None) -> tuple[float, ...]:
    """Return the cut-offs, latest first, at `latest` and every STRIDE_DAYS before it; the `most` latest of them.

    Raises:
        ConfigError: the log begins too late for even one.
    """
    earliest = float(log.day[0]) + MIN_HISTORY_DAYS
    cutoffs = tuple(float(day) for day in np.arange(latest, earliest, -STRIDE_DAYS))
    if not cutoffs:
        needed = MIN_HISTORY_DAYS + 2 * WINDOW_DAYS
        raise ConfigError(f"the log spans {log.end - log.day[0]:.0f} days; this recipe needs more than {needed}")
    return cutoffs[:most]


def take_snapshot(
    log: PurchaseLog, history: History, customers: np.ndarray, *, num_candidates: int = NUM_CANDIDATES
) -> Snapshot:
    """Return what `history` says about customers, each with a purchase in it; targets come from the log's next 28 days."""
    rule = history.rule(customers)
    candidates = torch.topk(rule, min(num_candidates, rule.shape[1]), dim=1).indices.numpy()
    features = candidate_features(history, customers, candidates, rule)
    bought = log.window(history.cutoff).bought(customers)
    of_customer = np.array([name in CUSTOMER for name in FEATURES])
    return Snapshot(
        cutoff=history.cutoff,
        customers=customers,
        candidates=candidates,
        rule=rule,
        facts=features[:, :, ~of_customer],
        customer=features[:, 0, of_customer],
        bought=np.take_along_axis(bought, candidates, axis=1),
        num_bought=bought.sum(1),
    )


def write_snapshot(snapshot: Snapshot, history: History, path: Path) -> None:
    """Write a snapshot as Parquet, one row per customer."""
    codes = pa.array(history.lines.stock_codes)
    items, ages = recent_items(history, snapshot.customers)
    table = pa.table(
        {
            "CustomerID": history.lines.customer_ids[snapshot.customers],
            "candidates": _lists([codes.take(pa.array(row)) for row in snapshot.candidates]),
            "history": _lists([codes.take(pa.array(row)) for row in items]),
            "history_age": _lists([pa.array(row.astype(np.float32)) for row in ages]),
            "facts": _fixed(snapshot.facts.reshape(len(snapshot.customers), -1)),
            "customer": _fixed(snapshot.customer),
            "bought": _fixed(snapshot.bought.astype(np.float32)),
            "num_bought": snapshot.num_bought.astype(np.float32),
        }
    )
    part = path.with_name(f".tmp-{path.name}")
    pq.write_table(table, part, row_group_size=ROW_GROUP, compression="zstd", compression_level=1)
    part.replace(path)


def recent_items(history: History, customers: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return per customer the distinct own items, latest first, at most HISTORY_ITEMS, and their ages in days."""
    owner = history.keys // history.num_items
    order = np.lexsort((history.last_age, owner))
    starts = np.searchsorted(owner[order], customers)
    stops = np.minimum(np.searchsorted(owner[order], customers, side="right"), starts + HISTORY_ITEMS)
    pairs = [order[start:stop] for start, stop in zip(starts, stops, strict=True)]
    return [history.keys[row] % history.num_items for row in pairs], [history.last_age[row] for row in pairs]


def _lists(rows: Sequence[Any]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.concat_arrays(list(rows)))


def _fixed(values: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1).astype(np.float32)), values.shape[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The snapshots of a run.

    Attributes:
        folder: where they lie.
        data: the purchase log they were made of.
        end: midnight after the log's last line that was used, days since 1970; the split lies 28 days before.
        num_candidates: C.
        rows: {file name: rows}, one per cut-off, latest (the split) first.
        mean, std: of each of FACTS and then CUSTOMER over the snapshots before the split.
    """

    folder: Path
    data: Path
    end: float
    num_candidates: int
    rows: dict[str, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def split(self) -> float:
        """The cut-off of the validation."""
        return self.end - WINDOW_DAYS

    @property
    def validation_file(self) -> Path:
        """The snapshot at the split."""
        return self.folder / file_name(self.split)

    def training_files(self, latest: float) -> tuple[Path, ...]:
        """Return the snapshots at cut-offs up to `latest`, whose targets end 28 days later."""
        return tuple(self.folder / name for name in self.rows if name <= file_name(latest))

    def num_rows(self, files: Sequence[Path]) -> int:
        """Return the rows of some of the files together."""
        return sum(self.rows[file.name] for file in files)


def file_name(cutoff: float) -> str:
    """Return the name of the snapshot at a cut-off; names sort as cut-offs do."""
    return f"cutoff-{np.datetime64(int(cutoff), 'D')}.parquet"


def cutoff_of(name: str) -> float:
    """Return the cut-off of a snapshot by the name of its file."""
    return float(np.datetime64(name.removeprefix("cutoff-").removesuffix(".parquet"), "D").astype(np.int64))


def prepare(log: PurchaseLog, data: Path, folder: Path, *, num_cutoffs: int | None = None) -> Prepared:
    """Write the snapshots of a log into a folder and return what is there.

    Args:
        log: all that may be read.
        data: the file it came from.
        folder: made when missing.
        num_cutoffs: how many of the cut-offs to learn from before the split, the latest ones; None takes all.

    Raises:
        ConfigError: the log is too short.
    """
    split = log.end - WINDOW_DAYS
    earlier = training_cutoffs(log, split - WINDOW_DAYS, num_cutoffs)
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, int] = {}
    count, total, squares = 0, 0.0, 0.0
    num_candidates = min(NUM_CANDIDATES, log.num_items)
    between = tuple(day for day in training_cutoffs(log, split) if day > earlier[0])  # for the final model alone
    for cutoff in (*between, *earlier):
        history = History(log, cutoff)
        customers = active_customers(log, cutoff)
        if len(customers) == 0:
            continue
        snapshot = take_snapshot(log, history, customers)
        name = file_name(cutoff)
        write_snapshot(snapshot, history, folder / name)
        rows[name] = len(customers)
        if cutoff in earlier:
            width = snapshot.candidates.shape[1]
            repeated = np.repeat(snapshot.customer[:, None], width, axis=1)
            values = np.concatenate([snapshot.facts, repeated], axis=2).reshape(-1, len(FEATURES)).astype(np.float64)
            count, total, squares = count + len(values), total + values.sum(0), squares + np.square(values).sum(0)
    if count == 0 or file_name(split) not in rows:
        raise ConfigError(f"{data}: no customer seen before buys again in the windows this recipe learns from")
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - np.square(mean), 0)) + STD_FLOOR
    prepared = Prepared(
        folder=folder,
        data=data,
        end=log.end,
        num_candidates=num_candidates,
        rows=rows,
        mean=tuple(np.asarray(mean).tolist()),
        std=tuple(np.asarray(std).tolist()),
    )
    text = json.dumps({**asdict(prepared), "folder": "", "data": str(data), "features": FEATURES}, indent=1)
    part = folder / f".tmp-{SUMMARY}"
    part.write_text(text + "\n")
    part.replace(folder / SUMMARY)
    return prepared


def read_summary(folder: Path) -> Prepared | None:
    """Return what `prepare` left in a folder; None where it did not come to its end, or made other features."""
    path = folder / SUMMARY
    if not path.is_file():
        return None
    kept = json.loads(path.read_text())
    if kept.pop("features") != list(FEATURES):
        return None
    lists = {name: tuple(kept[name]) for name in ("mean", "std")}
    return Prepared(**{**kept, **lists, "folder": folder, "data": Path(kept["data"])})
