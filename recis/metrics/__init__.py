"""Metrics that merge: over batches, ranks and resumed runs in any order, with the bytes of one process.

ExactAuc, BinnedAuc, Gauc                 ranking of positives over negatives
LogLoss, Ne, Calibration                  probabilities
Recall, Ndcg, HitRate, Mrr                ranked lists, one per group
bootstrap, ips, snips                     intervals, and the value of another policy
from_key                                  the metric that a name like "ndcg@10" means
"""

from recis.errors import ConfigError, nearest
from recis.metrics.auc import BinnedAuc, ExactAuc
from recis.metrics.calibration import Calibration
from recis.metrics.gauc import Gauc
from recis.metrics.intervals import Interval, bootstrap
from recis.metrics.logloss import LogLoss, Ne
from recis.metrics.metric import Metric
from recis.metrics.propensity import PolicyValue, ips, snips
from recis.metrics.ranking import HitRate, Mrr, Ndcg, Recall

__all__ = [
    "Metric",
    "ExactAuc",
    "BinnedAuc",
    "Gauc",
    "LogLoss",
    "Ne",
    "Calibration",
    "Recall",
    "Ndcg",
    "HitRate",
    "Mrr",
    "Interval",
    "bootstrap",
    "PolicyValue",
    "ips",
    "snips",
    "from_key",
]

_PLAIN = {
    "auc": ExactAuc,
    "binned_auc": BinnedAuc,
    "gauc": Gauc,
    "logloss": LogLoss,
    "ne": Ne,
    "pcoc": Calibration,
    "mrr": Mrr,
}
_AT_K = {"recall": Recall, "ndcg": Ndcg, "hit_rate": HitRate}


def from_key(key: str) -> Metric:
    """Return the metric whose `key` this is, with default settings: "auc", "recall@20", ...

    Raises:
        ConfigError: there is no such metric, or its k is not a number; near names are given.
    """
    name, at, k = key.partition("@")
    if not at and name in _PLAIN:
        return _PLAIN[name]()
    if name in _AT_K and k.isascii() and k.isdigit():
        return _AT_K[name](int(k))
    raise ConfigError(f"unknown metric {key!r}; {nearest(key, [*_PLAIN, *(f'{name}@10' for name in _AT_K)])}")
