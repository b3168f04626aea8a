"""Measure a finished model on labelled pairs: labels from the prompt alone, texts from greedy decoding, intervals, slices.

    report = judge(scorer, pairs, num_texts=200)      {"macro_f1": .., "interval": {..}, "slices": {..}, "greedy_agreement": ..}

Text metrics come from the first num_texts pairs, because a text costs fifty passes where a label costs one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recis.errors import DataError
from relevance.data import Pair
from relevance.evaluate import (
    calibration_metrics,
    confusion,
    label_metrics,
    macro_f1,
    seed_bootstrap,
    slices,
    text_metrics,
)
from relevance.scoring import TIERS, cumpt, tier_of_label
from relevance.serve import Scorer

Columns = Mapping[str, np.ndarray]


def judge(
    scorer: Scorer, pairs: Sequence[Pair], *, num_texts: int = 200, num_bootstrap: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Return the metrics of a model on labelled pairs.

    Args:
        scorer: the model.
        pairs: those without a label are left out.
        num_texts: pairs that are answered in full, greedily; 0 leaves the text metrics out.
        num_bootstrap: resamples of whole queries for the intervals.
        seed: of the resamples.

    Raises:
        DataError: no labelled pair.
    """
    pairs = [pair for pair in pairs if pair.label is not None]
    if not pairs:
        raise DataError("no pair has a label", column="label", option="give labelled pairs to evaluate on")
    probs = scorer.probs(pairs)
    gold = np.array([pair.label for pair in pairs])
    said = (probs.argmax(1) + 1).numpy()
    said[probs.sum(1).numpy() == 0] = 0  # a label-last text without a label
    report: dict[str, Any] = {"num_pairs": len(pairs), "model": scorer.model, **label_metrics(gold, said)}
    report |= calibration_metrics(probs, gold)
    report["tier_macro_f1"] = macro_f1(confusion(_tiers(gold), cumpt(probs, scorer.b_cum).numpy(), len(TIERS))).value
    report["b_cum"] = scorer.b_cum
    columns = {"gold": gold, "said": said}
    queries = np.unique([pair.query_id for pair in pairs], return_inverse=True)[1]
    report["interval"] = {
        name: [interval.low, interval.high]
        for name in ("macro_f1", "accuracy")
        for interval in [seed_bootstrap([columns], queries, statistic(name), num_resamples=num_bootstrap, seed=seed)]
    }
    report["slices"] = {
        name: {"num_pairs": int(rows.sum()), **_few(label_metrics(gold[rows], said[rows]))}
        for name, rows in slices(pairs).items()
    }
    if num_texts:
        first = pairs[:num_texts]
        _, parsed = scorer.texts(first)
        report |= text_metrics(parsed, first, scorer.task.profile)
        labels = np.array([int(parse.label or 0) for parse in parsed])
        report["greedy_agreement"] = float((labels == said[: len(first)]).mean())
        report["num_texts"] = len(first)
    return report


def statistic(name: str) -> Any:
    """Return the statistic of a label metric over columns gold and said."""
    return lambda columns: label_metrics(columns["gold"], columns["said"])[name]


def predictions(scorer: Scorer, pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
    """Return the columns of an evaluation: gold and said labels [N] and P [N, 4]."""
    probs = scorer.probs(pairs)
    said = (probs.argmax(1) + 1).numpy()
    said[probs.sum(1).numpy() == 0] = 0
    return {"gold": np.array([pair.label for pair in pairs]), "said": said, "p": probs.numpy()}


def _few(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: metrics[name] for name in ("accuracy", "macro_f1")}


def _tiers(gold: np.ndarray) -> np.ndarray:
    import torch

    return tier_of_label(torch.from_numpy(gold)).numpy()
