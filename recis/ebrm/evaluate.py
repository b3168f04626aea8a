"""Metrics of relevance scores over graded (query, item) pairs, the same for every model.

    roc_auc, pr_auc    ranking of grade 4 over the rest, all pairs in one list
    f1                 at a threshold that was fixed on another part
    ndcg@10            per query, gain 2^(grade - 1) - 1, mean over queries that have a grade above 1
    ece                |mean p - mean y| per bin of p, weighted by rows; only for probabilities

`visible.` before a name: over the pairs whose grade the title shows. Ties of a ranking are broken by sha256 of the item's
id, never by the order of the rows. Differences of two models: bootstrap over queries, both on the same draws.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from recis.ebrm.pricerunner_grades import MET
from recis.metrics import Calibration, ExactAuc, Interval, Ndcg, bootstrap

ECE_BINS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalPairs:
    """What all models are measured on, N pairs.

    Raises:
        ValueError: arrays of different lengths.
    """

    query: np.ndarray
    """int [N]: which query."""
    grade: np.ndarray
    """int [N], 1 to 4; 4 is the positive class."""
    visible: np.ndarray
    """bool [N]."""
    tie: np.ndarray
    """float [N]: who comes first among equal scores of a query, from the item's id."""

    def __post_init__(self) -> None:
        shapes = {name: getattr(self, name).shape for name in ("query", "grade", "visible", "tie")}
        if len(set(shapes.values())) != 1 or self.query.ndim != 1:
            raise ValueError(f"all arrays of EvalPairs must be [N]; got {shapes}")

    @property
    def label(self) -> np.ndarray:
        """int [N], 1 for grade 4."""
        return (self.grade == MET).astype(np.int64)

    def at(self, rows: np.ndarray) -> "EvalPairs":
        """Return some of the pairs."""
        return EvalPairs(query=self.query[rows], grade=self.grade[rows], visible=self.visible[rows], tie=self.tie[rows])


def tie_of(item_id: str | int) -> float:
    """Return a number in [0, 1) from sha256 of an item's id: who comes first among equal scores."""
    return int(hashlib.sha256(str(item_id).encode()).hexdigest()[:13], 16) / 2**52


def evaluate(
    pairs: EvalPairs,
    scores: np.ndarray,
    *,
    probabilities: np.ndarray | None = None,
    threshold: float | None = None,
) -> dict[str, float]:
    """Return the metrics over all pairs, and again over the visible ones with `visible.` before the name.

    Args:
        pairs: N pairs.
        scores: [N], higher = more relevant.
        probabilities: [N] in [0, 1], where the model is calibrated; without them ece is NaN.
        threshold: a pair is called relevant when its score is at least this; without it f1 is NaN.

    Raises:
        DataError: a NaN score, or a probability outside [0, 1].
        ValueError: lengths differ.
    """
    visible = np.flatnonzero(pairs.visible)
    out = _metrics(pairs, scores, probabilities, threshold)
    seen = _metrics(
        pairs.at(visible), scores[visible], None if probabilities is None else probabilities[visible], threshold
    )
    return out | {f"visible.{name}": value for name, value in seen.items()}


def _metrics(
    pairs: EvalPairs, scores: np.ndarray, probabilities: np.ndarray | None, threshold: float | None
) -> dict[str, float]:
    return {
        "roc_auc": roc_auc(scores, pairs.label),
        "pr_auc": pr_auc(scores, pairs.label),
        "f1": math.nan if threshold is None else f1_at(scores, pairs.label, threshold),
        "ndcg@10": ndcg(pairs, scores),
        "ece": math.nan if probabilities is None else ece(probabilities, pairs.label),
    }


def roc_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the area under the ROC curve, ties counted half; NaN while one class is missing."""
    metric = ExactAuc()
    metric.update(np.asarray(scores, dtype=np.float64), labels)
    return metric.compute()


def pr_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return average precision: sum over distinct scores of precision * gained recall; NaN without positives."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(labels[order])
    ends = np.flatnonzero(np.append(scores[order][1:] != scores[order][:-1], True)) if len(order) else order
    if not len(order) or hits[-1] == 0:
        return math.nan
    precision = hits[ends] / (ends + 1)
    return float(np.sum(precision * np.diff(np.append(0, hits[ends]))) / hits[-1])


def f1_at(scores: np.ndarray, labels: np.ndarray, threshold: float) -> float:
    """Return F1 of "score >= threshold"; 0 when nothing is found, NaN without positives."""
    called = scores >= threshold
    positives, true_positives = int(labels.sum()), int((labels * called).sum())
    return 2 * true_positives / (int(called.sum()) + positives) if positives else math.nan


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the score that gives the largest F1 as a threshold; the largest such score on a tie.

    Raises:
        ValueError: no positive pair.
    """
    if not labels.any():
        raise ValueError("best_threshold needs at least one positive pair; got none")
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    hits = np.cumsum(labels[order])
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + labels.sum())
    f1[np.append(ordered[1:] == ordered[:-1], False)] = -1.0  # equal scores stand on the same side
    return float(ordered[np.argmax(f1)])


def ndcg(pairs: EvalPairs, scores: np.ndarray) -> float:
    """Return NDCG@10 with gain 2^(grade - 1) - 1, mean over queries with a grade above 1."""
    order = np.argsort(pairs.tie, kind="stable")  # equal scores keep this order
    metric = Ndcg(10)
    metric.update(np.asarray(scores, dtype=np.float64)[order], pairs.grade[order] - 1, groups=pairs.query[order])
    return metric.compute()


def ece(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the expected calibration error over 10 bins of equal width; NaN without rows."""
    metric = Calibration(num_bins=ECE_BINS)
    metric.update(np.asarray(probabilities, dtype=np.float64), labels.astype(np.float64))
    curve = metric.curve()
    weight = curve["weight"]
    if weight.sum() == 0:
        return math.nan
    gap = (curve["prediction"] - curve["label"]).abs()
    return float(torch.nansum(gap * weight) / weight.sum())


def qe_roc_auc(types: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the ROC-AUC of QE scores per entity type, and over all types as "all".

    Args:
        types: str [N], type of each (query, entity) pair.
        scores: [N].
        labels: [N], 1 where a shopper who typed the query would accept the entity. Gold, for evaluation only.
    """
    out = {str(name): roc_auc(scores[types == name], labels[types == name]) for name in np.unique(types)}
    return out | {"all": roc_auc(scores, labels)}


def difference(
    pairs: EvalPairs, ours: np.ndarray, theirs: np.ndarray, *, num_resamples: int = 1000, seed: int = 0
) -> Interval:
    """Return ROC-AUC of `ours` less that of `theirs`, with its 95 % interval over draws of whole queries."""

    def statistic(rows: np.ndarray) -> float:
        labels = pairs.label[rows]
        return roc_auc(ours[rows], labels) - roc_auc(theirs[rows], labels)

    return bootstrap(statistic, len(ours), groups=pairs.query, num_resamples=num_resamples, seed=seed)


def metrics_table(rows: Mapping[str, Mapping[str, float]], *, names: tuple[str, ...] | None = None) -> str:
    """Return one line per model, columns as in `evaluate`."""
    names = names or tuple(next(iter(rows.values()), {}))
    width = max([len(model) for model in rows] + [5])
    lines = [f"{'model':{width}} " + " ".join(f"{name:>16}" for name in names)]
    for model, values in rows.items():
        cells = ("-" if math.isnan(values[name]) else f"{values[name]:.4f}" for name in names)
        lines.append(f"{model:{width}} " + " ".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)
