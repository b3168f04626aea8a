"""All items scored for customers by two towers, and the lists that `recis recommend` writes for a run of `retail_towers`.

    score = <u, v>,  u of the customer's three histories,  v of every item: its row, and its title's tower where the run has one

The model is the run's own: its weights come from purchases before the split, 28 days before the log's end. The histories of
`recommend` go to the end of the log. An item that was never sold before the split has no row, and its title stands for it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from recis.errors import ConfigError
from recis.io import Batch
from recis.jagged import JaggedTensor, KeyedJaggedTensor
from recis.models.two_tower import TwoTower
from recis.recipes.online_retail import OUTPUT, hide, read_customers, write_recommendations
from recis.recipes.retail_history import History
from recis.recipes.retail_log import PurchaseLog, read_log
from recis.recipes.retail_purchases import HISTORIES, Baskets
from recis.towers import TowerRanker
from recis.trainer import Trainer

if TYPE_CHECKING:
    from recis.runs import Run

SOURCE = "source.json"
_BLOCK = 1024  # customers whose scores are in memory at once


def items_batch(items: np.ndarray | Tensor) -> Batch:
    """Return a batch of items by number, as the item tower reads it."""
    numbers = torch.as_tensor(items, dtype=torch.int64)
    return _batch({"item": JaggedTensor(numbers, torch.ones(len(numbers), dtype=torch.int64))}, len(numbers))


def users_batch(histories: Sequence[Sequence[Any]]) -> Batch:
    """Return a batch of customers from the lists of each of HISTORIES, as the user tower reads it."""
    columns = {name: JaggedTensor.from_lists(own) for name, own in zip(HISTORIES, histories, strict=True)}
    return _batch(columns, len(histories[0]))


def _batch(sparse: dict[str, JaggedTensor], size: int) -> Batch:
    return Batch(
        sparse=KeyedJaggedTensor.from_jagged(sparse, stride=size),
        dense=torch.zeros(size, 0),
        dense_keys=(),
        dense_widths=(),
        labels=torch.zeros(size, 0),
        label_mask=None,
        label_weights=None,
        weights=torch.ones(size),
        group_ids=None,
        extras={},
        num_samples=size,
    )


@torch.no_grad()
def item_scores(trainer: Trainer, histories: Sequence[Sequence[Any]], items: np.ndarray) -> Tensor:
    """Return the scores [N, I] of items [I] by number for customers with these lists of each of HISTORIES."""
    model = trainer.model
    towers = model.ranker if isinstance(model, TowerRanker) else model
    assert isinstance(towers, TwoTower)
    model.eval()
    return towers.user_vectors(users_batch(histories)) @ towers.item_vectors(items_batch(items)).T


# ---- recommendation


def keep_source(folder: Path, data: Path, hide_weeks: int) -> None:
    """Write down which log the run in a folder reads."""
    path = folder / SOURCE
    part = path.with_name(f".tmp-{path.name}")
    part.write_text(json.dumps({"data": str(data), "hide_weeks": hide_weeks}) + "\n")
    part.replace(path)


def kept_log(folder: Path) -> PurchaseLog:
    """Return the log that the run in a folder reads.

    Raises:
        ConfigError: the run does not say which.
    """
    path = folder / SOURCE
    if not path.is_file():
        raise ConfigError(
            f"{path}: is gone, or the run is of an older version, so its log is not known; train it again"
        )
    source = json.loads(path.read_text())
    return hide(read_log(Path(source["data"])), source["hide_weeks"])


def recommend(trainer: Trainer, log: PurchaseLog, customer_ids: np.ndarray, k: int) -> pa.Table:
    """Return OUTPUT rows: for each customer, in the order given, the k items of the log that score highest at its end.

    A score orders the items of one customer and means nothing beside. An unknown customer gets the items most customers
    bought in the last 30 days, with their share of the most popular one's buyers as score.
    """
    items = np.unique(log.item)
    k = min(k, len(items))
    asked = np.array(list(dict.fromkeys(customer_ids.tolist())), dtype=np.int64)
    number = np.searchsorted(log.customer_ids, asked).clip(max=log.num_customers - 1)
    known = (log.customer_ids[number] == asked) & np.isin(number, log.customer)
    popularity = History(log, log.end).popularity[items]
    popular = np.argsort(-popularity, kind="stable")[:k]
    chosen = np.tile(items[popular], (len(asked), 1))
    scores = np.tile(popularity[popular].astype(np.float32), (len(asked), 1))
    baskets = Baskets(log)
    for rows in np.array_split(np.flatnonzero(known), -(-int(known.sum()) // _BLOCK) or 1):
        if len(rows) == 0:
            continue
        ends = np.searchsorted(baskets.customer, number[rows], side="right")
        own = [histories for end in ends if (histories := baskets.histories(int(end), log.end)) is not None]
        found = item_scores(trainer, [[lists[at] for lists in own] for at in range(len(HISTORIES))], items)
        best, order = found.sort(dim=1, descending=True, stable=True)
        chosen[rows], scores[rows] = items[order[:, :k].numpy()], best[:, :k].numpy()
    return pa.table(
        [
            np.repeat(asked, k),
            np.tile(np.arange(1, k + 1, dtype=np.int32), len(asked)),
            pa.array(log.stock_codes).take(pa.array(chosen.reshape(-1))),
            scores.reshape(-1),
            np.repeat(~known, k),
        ],
        schema=OUTPUT,
    )


def recommend_file(run: "Run", users: Path, *, k: int, out: Path) -> tuple[int, int]:
    """Write the k best items of each customer in a file; returns rows and customers the log does not know."""
    log = kept_log(run.folder / "purchases")
    return write_recommendations(recommend(run.trainer, log, read_customers(users), k), out)
