"""How good graded answers are: from labels, probabilities and parsed texts to numbers with intervals.

    F1_c = 2 tp / (2 tp + fp + fn)             macro-F1 = mean over the classes that occur
    kappa = 1 - sum w o / sum w e              w = (i - j)^2, quadratic
    ECE = sum |B| / N |acc(B) - conf(B)|       15 bins of equal width;  Brier = mean sum_c (P_c - 1[c])^2

Everything starts from arrays of the whole evaluation, so any slice is the same call on a subset. Source: kappa, Cohen 1968;
ECE, arXiv:1706.04599; bootstrap, Efron & Tibshirani 1993. Which classes count, and the order of draws, are ours.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from relevance.data import Pair
from relevance.labels import Parsed, Profile, violations
from relevance.rewards import attribute_f1
from relevance.sampling import pass_at_k
from relevance.verify import gold_verdicts

Array = np.ndarray


def confusion(gold: Array, predicted: Array, num_classes: int) -> Array:
    """Return the counts [num_classes, num_classes] int64, gold by predicted; classes are 0 .. num_classes - 1.

    A prediction of -1 (no answer) counts in an extra last column: [num_classes, num_classes + 1].
    """
    columns = num_classes + 1
    said = np.where(predicted < 0, num_classes, predicted)
    counts = np.bincount(gold.astype(np.int64) * columns + said.astype(np.int64), minlength=num_classes * columns)
    return counts.reshape(num_classes, columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class MacroF1:
    """Macro-F1 with its classes."""

    value: float
    """Mean of `per_class` over the classes that count; NaN without any."""
    per_class: tuple[float, ...]
    """F1; 0 for a class that is only predicted, NaN for one that is neither gold nor predicted."""
    left_out: tuple[int, ...]
    """Classes that are neither gold nor predicted, and count in no mean."""


def macro_f1(counts: Array) -> MacroF1:
    """Return macro-F1 from `confusion` counts."""
    num_classes = len(counts)
    right = counts[:, :num_classes].diagonal().astype(np.float64)
    total = counts.sum(1) + counts[:, :num_classes].sum(0)
    per_class = np.divide(2 * right, total, out=np.full(num_classes, np.nan), where=total > 0)
    value = float(np.nanmean(per_class)) if (total > 0).any() else math.nan
    return MacroF1(
        value=value, per_class=tuple(per_class.tolist()), left_out=tuple(np.flatnonzero(total == 0).tolist())
    )


def quadratic_kappa(counts: Array) -> float:
    """Return the quadratic weighted kappa of `confusion` counts; predictions without an answer are left out.

    NaN where all rows and all predictions are of one class: chance alone agrees fully there.
    """
    num_classes = len(counts)
    table = counts[:, :num_classes].astype(np.float64)
    if not table.sum():
        return math.nan
    places = np.arange(num_classes)
    weights = (places[:, None] - places[None, :]) ** 2
    expected = table.sum(1)[:, None] * table.sum(0)[None, :] / table.sum()
    chance = (weights * expected).sum()
    return float(1 - (weights * table).sum() / chance) if chance else math.nan


def label_metrics(gold: Array, predicted: Array) -> dict[str, float]:
    """Return accuracy, macro-F1, F1 per label, good-side F1 and kappa of labels 1 to 4; 0 predicted = no answer (wrong)."""
    counts = confusion(gold - 1, predicted - 1, 4)
    f1 = macro_f1(counts)
    good = macro_f1(confusion((gold >= 3).astype(int), (predicted >= 3).astype(int), 2))
    values = {
        "accuracy": float((gold == predicted).mean()) if len(gold) else math.nan,
        "macro_f1": f1.value,
        "good_f1": good.per_class[1],
        "kappa": quadratic_kappa(counts),
    }
    return values | {f"f1_{label}": f1.per_class[label - 1] for label in (1, 2, 3, 4)}


def calibration_metrics(probs: Tensor, gold: Array, *, num_bins: int = 15) -> dict[str, float]:
    """Return ECE of the most probable label and the Brier score of P [N, 4], label 1 first, against gold labels [N]."""
    table = probs.to(torch.float64).numpy(force=True)
    if not len(table):
        return {"ece": math.nan, "brier": math.nan}
    confidence, said = table.max(1), table.argmax(1) + 1
    bins = np.minimum((confidence * num_bins).astype(np.int64), num_bins - 1)
    gaps = np.bincount(bins, weights=(said == gold) - confidence, minlength=num_bins)
    hits = np.eye(4)[gold - 1]
    return {"ece": float(np.abs(gaps).sum() / len(gold)), "brier": float(((table - hits) ** 2).sum(1).mean())}


def text_metrics(parsed: Sequence[Parsed], pairs: Sequence[Pair], profile: Profile) -> dict[str, float]:
    """Return what the texts say about themselves and about the gold steps.

    hallucination_rate: share of texts with a verdict that differs from the label (H1), of all texts.
    rule_adherence: share of texts without a violated hard rule and with a label; parse_rate: without a fault.
    step_<name>: share of right steps among those with gold, faulty texts counting as wrong; attribute_f1 likewise a mean.
    """
    if not parsed:
        return {}
    broken = [violations(parse, pair) for parse, pair in zip(parsed, pairs, strict=True)]
    values = {
        "hallucination_rate": float(np.mean(["H1" in rules for rules in broken])),
        "rule_adherence": float(
            np.mean([parse.label is not None and not rules for parse, rules in zip(parsed, broken, strict=True)])
        ),
        "parse_rate": float(np.mean([parse.ok for parse in parsed])),
    }
    verdicts = gold_verdicts(parsed, pairs, profile).numpy()
    known = {
        "category": [pair.steps is not None and pair.steps.category is not None for pair in pairs],
        "attribute": [pair.steps is not None and pair.steps.attributes is not None for pair in pairs],
        "rule": [pair.steps is not None and pair.steps.rule is not None for pair in pairs],
    }
    for column, step in enumerate(profile.steps):
        if step in known:
            rows = np.nan_to_num(verdicts[known[step], column])
            values[f"step_{step}"] = float(rows.mean()) if len(rows) else math.nan
    if "attribute" in profile.tags:
        scores = [
            attribute_f1(parse.fields.attribute, pair.steps.attributes)
            for parse, pair in zip(parsed, pairs, strict=True)
            if pair.steps is not None and pair.steps.attributes is not None
        ]
        values["attribute_f1"] = float(np.mean(scores)) if scores else math.nan
    return values


def pass_curve(correct: Tensor, *, max_k: int) -> dict[str, float]:
    """Return pass@1 .. pass@max_k of samples [Q, N], means over the prompts."""
    counts = correct.long().sum(1)
    return {f"pass@{k}": float(pass_at_k(counts, correct.shape[1], k).mean()) for k in range(1, max_k + 1)}


def slices(pairs: Sequence[Pair]) -> dict[str, Array]:
    """Return name -> bool [N] of the slices by family, label and chunk kind that occur."""
    columns = {
        "family": [pair.family for pair in pairs],
        "label": [pair.label for pair in pairs],
        "chunk": [None if pair.chunk is None else pair.chunk.kind for pair in pairs],
    }
    found = {}
    for name, values in columns.items():
        for value in sorted({str(value) for value in values if value is not None}):
            found[f"{name}={value}"] = np.array([str(entry) == value for entry in values])
    return found


Statistic = Callable[[Mapping[str, Array]], float]
"""Columns of drawn rows -> number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedInterval:
    """A value over seeds with its percentile interval."""

    value: float
    """Mean over the seeds of the statistic on all rows."""
    low: float
    high: float
    level: float

    def overlaps(self, other: "SeedInterval") -> bool:
        """Return whether two intervals share a point; NaN overlaps everything."""
        return not (self.low > other.high or other.low > self.high)


def seed_bootstrap(
    runs: Sequence[Mapping[str, Array]],
    query_ids: Array,
    statistic: Statistic,
    *,
    baseline: Sequence[Mapping[str, Array]] | None = None,
    num_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> SeedInterval:
    """Return a statistic over seeds with its interval: every draw takes seeds with replacement, then whole queries.

    Args:
        runs: one set of columns [N] per seed, over the same rows.
        query_ids: [N] int: rows of a query are drawn together.
        statistic: number of some columns; see Statistic.
        baseline: runs of another model with the same seeds: the value is the difference, drawn in pairs.
        num_resamples: draws.
        level: confidence in (0, 1).
        seed: of the draws.

    Raises:
        ValueError: no runs, or a baseline with another number of seeds.
    """
    if not runs or (baseline is not None and len(baseline) != len(runs)):
        raise ValueError(f"need runs, and as many of the baseline; got {len(runs)} and {baseline and len(baseline)}")
    order = np.argsort(query_ids, kind="stable")
    _, starts = np.unique(query_ids[order], return_index=True)
    groups = np.split(order, starts[1:])

    def value(number: int, rows: Array) -> float:
        mine = statistic({name: column[rows] for name, column in runs[number].items()})
        if baseline is None:
            return mine
        return mine - statistic({name: column[rows] for name, column in baseline[number].items()})

    rng = np.random.Generator(np.random.Philox(seed))
    draws = []
    for _ in range(num_resamples):
        rows = np.concatenate([groups[number] for number in rng.integers(0, len(groups), len(groups))])
        draws.append(np.mean([value(number, rows) for number in rng.integers(0, len(runs), len(runs))]))
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2]).tolist()
    everything = np.arange(len(query_ids))
    whole = float(np.mean([value(number, everything) for number in range(len(runs))]))
    return SeedInterval(value=whole, low=low, high=high, level=level)
