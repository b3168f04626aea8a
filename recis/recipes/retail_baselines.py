"""What `online_retail` is measured against, and how: five rankings over all items, Recall@20 and NDCG@20 per customer.

    popular      buyers in the last 30 days
    own items    lines of the item on the customer's invoices; equal ones and the rest by popularity
    item-kNN     own decayed history times cosine similarity (see retail_history)
    hand rule    see retail_history
    boosted      scikit-learn's HistGradientBoosting on 18 features over the rule's candidates, trained on the same snapshots

    Recall@20 = hits / min(20, n);   NDCG@20 = sum of 1 / log2(rank + 1) over hits / the same of min(20, n) first ranks

n = distinct items a customer buys in the window. Means are over customers; the interval of a ratio of two means comes from a
bootstrap over customers, both rankings drawn together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from recis.recipes.retail_features import CUSTOMER
from recis.recipes.retail_history import History
from recis.recipes.retail_log import PurchaseLog
from recis.recipes.retail_snapshots import FACTS

TOP = 20
TIE = 1e-6  # weight of popularity among equals
RESAMPLES = 2000
BOOSTED_FEATURES = (
    "rule", "lines_90d", "lines_30d", "invoices", "last", "first", "gap", "overdue", "share_of_days", "buyers_7d",
    "buyers_30d", "buyers_90d", "trend_30d", "item_return", "knn", "knn_90d", "days", "day_last",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Quality:
    """Recall@20 and NDCG@20 of each customer, [N]."""

    recall: np.ndarray
    ndcg: np.ndarray


def popular(history: History, customers: np.ndarray) -> Tensor:
    """Return [N, I]: the same order for all."""
    return torch.from_numpy(history.popularity).float().expand(len(customers), -1)


def own_items(history: History, customers: np.ndarray) -> Tensor:
    """Return [N, I]: how many lines of the item the customer has."""
    return history.matrix(history.pair_sum())[torch.from_numpy(customers)] + TIE * popular(history, customers)


def rankings(history: History, customers: np.ndarray) -> dict[str, Tensor]:
    """Return the scores [N, I] of the baselines that need no training, by name."""
    return {
        "20 most popular of the last 30 days": popular(history, customers),
        "own 20 most frequent": own_items(history, customers),
        "item-kNN": history.knn(customers),
        "hand rule": history.rule(customers),
    }


def top_hits(scores: Tensor, bought: np.ndarray) -> np.ndarray:
    """Return bool [N, 20]: whether the item at each rank is among those bought, [N, I]; equal scores by item number."""
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :TOP].numpy()
    return np.take_along_axis(bought, order, axis=1)


def quality(hits: np.ndarray, num_bought: np.ndarray) -> Quality:
    """Return the metrics of rankings, hits bool [N, at most 20] by rank, customers with num_bought >= 1."""
    possible = np.minimum(TOP, num_bought)
    discount = 1 / np.log2(np.arange(TOP) + 2)
    best = np.concatenate([[0], np.cumsum(discount)])[possible]
    return Quality(hits.sum(1) / possible, (hits * discount[: hits.shape[1]]).sum(1) / best)


def ratio_interval(ours: np.ndarray, theirs: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of mean(ours) / mean(theirs), values per customer [N]."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(ours), size=(RESAMPLES, len(ours)))
    ratios = ours[picks].mean(1) / theirs[picks].mean(1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)


def measure_baselines(log: PurchaseLog, cutoff: float, customers: np.ndarray) -> dict[str, Quality]:
    """Return the quality of each untrained baseline on the window after a cut-off."""
    history = History(log, cutoff)
    bought = log.window(cutoff).bought(customers)
    found = rankings(history, customers)
    return {name: quality(top_hits(scores, bought), bought.sum(1)) for name, scores in found.items()}


def boosted_hits(train: Sequence[Path], test: Path, *, seed: int = 0) -> np.ndarray | None:
    """Return hits [N, 20] of boosted trees over the candidates of a snapshot; None without scikit-learn."""
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
    except ImportError:
        return None
    parts = [_features_and_bought(file) for file in train]
    features = np.concatenate([part[0].reshape(-1, len(BOOSTED_FEATURES)) for part in parts])
    bought = np.concatenate([part[1].reshape(-1) for part in parts])
    trees = HistGradientBoostingClassifier(
        max_iter=150,
        learning_rate=0.06,
        max_leaf_nodes=31,
        min_samples_leaf=100,
        l2_regularization=5,
        random_state=seed,
    ).fit(features, bought)
    features, bought = _features_and_bought(test)
    scores = trees.predict_proba(features.reshape(-1, len(BOOSTED_FEATURES)))[:, 1].reshape(bought.shape)
    return top_hits(torch.from_numpy(scores), bought)


def _features_and_bought(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return [N, C, 18] features and bool [N, C] targets of a snapshot file."""
    table = pq.read_table(file, columns=["facts", "customer", "bought"])
    columns = {name: _matrix(table, name) for name in table.column_names}
    bought = columns["bought"] > 0
    facts = columns["facts"].reshape(*bought.shape, len(FACTS))
    customer = np.repeat(columns["customer"][:, None], bought.shape[1], axis=1)
    chosen = [
        facts[:, :, FACTS.index(name)] if name in FACTS else customer[:, :, CUSTOMER.index(name)]
        for name in BOOSTED_FEATURES
    ]
    return np.stack(chosen, axis=2), bought


def _matrix(table: Mapping, name: str) -> np.ndarray:
    column = table[name].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
