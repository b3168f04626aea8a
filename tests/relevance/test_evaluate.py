"""Metrics against scikit-learn and by hand; texts, slices and intervals."""

import math

import numpy as np
import pytest
import torch
from graded_pairs import COMPACT, answer, make_pair, read

from relevance.data import Chunk
from relevance.evaluate import (
    calibration_metrics,
    confusion,
    label_metrics,
    macro_f1,
    pass_curve,
    quadratic_kappa,
    seed_bootstrap,
    slices,
    text_metrics,
)

RNG = np.random.Generator(np.random.Philox(2))


def test_label_metrics_match_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    gold = RNG.integers(1, 5, 500)
    said = np.where(RNG.random(500) < 0.6, gold, RNG.integers(1, 5, 500))
    found = label_metrics(gold, said)
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(gold, said, average="macro"))
    assert found["kappa"] == pytest.approx(metrics.cohen_kappa_score(gold, said, weights="quadratic"))
    assert found["good_f1"] == pytest.approx(metrics.f1_score(gold >= 3, said >= 3))
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(gold, said))
    assert [found[f"f1_{label}"] for label in (1, 2, 3, 4)] == pytest.approx(
        list(metrics.f1_score(gold, said, average=None))
    )


def test_macro_f1_of_absent_classes():
    predicted_only = macro_f1(confusion(np.array([0, 0]), np.array([0, 1]), 3))
    assert predicted_only.per_class[:2] == (pytest.approx(2 / 3), 0.0)
    assert predicted_only.left_out == (2,)
    assert predicted_only.value == pytest.approx(1 / 3)
    assert math.isnan(macro_f1(confusion(np.zeros(0, int), np.zeros(0, int), 2)).value)
    # no answer is wrong for its class, and no class of its own
    silent = macro_f1(confusion(np.array([0, 0, 1]), np.array([0, -1, 1]), 2))
    assert silent.per_class == (pytest.approx(2 / 3), 1.0)
    assert label_metrics(np.array([4, 4]), np.array([4, 0]))["accuracy"] == 0.5
    assert math.isnan(quadratic_kappa(confusion(np.array([1, 1]), np.array([1, 1]), 3)))
    assert math.isnan(quadratic_kappa(confusion(np.array([1]), np.array([-1]), 3)))


def test_calibration_by_hand():
    probs = torch.tensor([[0.1, 0.1, 0.1, 0.7], [0.7, 0.1, 0.1, 0.1]])
    found = calibration_metrics(probs, np.array([4, 4]))
    assert found["ece"] == pytest.approx(0.2)  # one bin: confidence .7, half right
    assert found["brier"] == pytest.approx((0.12 + 1.32) / 2)
    assert calibration_metrics(torch.eye(4)[[3]], np.array([4])) == {"ece": 0.0, "brier": 0.0}
    assert math.isnan(calibration_metrics(torch.zeros(0, 4), np.zeros(0, int))["ece"])


def test_text_metrics_by_hand():
    """Invariant 17: the hallucination rate comes from the texts alone."""
    gold = make_pair(4, attributes={"colour": "ok"})
    texts = [
        answer(4, attributes={"colour": "ok"}),
        answer(4, "near", {"colour": "ok"}, "A01", 3),
        "junk",
        answer(3, "mismatch"),
    ]
    found = text_metrics([read(text) for text in texts], [gold] * 4, COMPACT)
    assert found == {
        "hallucination_rate": 0.25,
        "rule_adherence": 0.25,
        "parse_rate": 0.75,
        "step_category": 0.25,
        "step_attribute": 0.5,
        "step_rule": 0.5,
        "attribute_f1": 0.5,
    }
    bare = text_metrics([read(texts[0])], [make_pair(4, has_steps=False)], COMPACT)
    assert bare["hallucination_rate"] == 0
    assert math.isnan(bare["step_rule"])
    assert math.isnan(bare["attribute_f1"])
    assert text_metrics([], [], COMPACT) == {}


def test_pass_curve_and_slices():
    correct = torch.tensor([[True, False], [False, False]])
    assert pass_curve(correct, max_k=2) == {"pass@1": 0.25, "pass@2": 0.5}
    pairs = [make_pair(4), make_pair(None, family="negation", chunk=Chunk(id="c", text="t", kind="helpful"))]
    assert {name: rows.tolist() for name, rows in slices(pairs).items()} == {
        "family=negation": [False, True],
        "family=plain": [True, False],
        "label=4": [True, False],
        "chunk=helpful": [False, True],
    }


def accuracy(columns):
    return float((columns["gold"] == columns["said"]).mean())


def test_intervals_over_seeds_and_queries():
    queries = np.repeat(np.arange(100), 4)
    gold = np.ones(400, int)
    runs = [{"gold": gold, "said": (RNG.random(400) < 0.7).astype(int)} for _ in range(3)]
    found = seed_bootstrap(runs, queries, accuracy, num_resamples=300)
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(np.mean([accuracy(run) for run in runs]))
    assert found == seed_bootstrap(runs, queries, accuracy, num_resamples=300)
    better = [{"gold": gold, "said": np.maximum(run["said"], RNG.random(400) < 0.5)} for run in runs]
    paired = seed_bootstrap(better, queries, accuracy, baseline=runs, num_resamples=300)
    assert paired.low > 0
    assert not paired.overlaps(seed_bootstrap(runs, queries, accuracy, baseline=runs, num_resamples=50))
    same = seed_bootstrap(runs, queries, accuracy, baseline=runs, num_resamples=50)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    # rows of a query fall together: whole queries of one answer give a wider interval than single rows
    clumped = [{"gold": gold, "said": np.repeat(RNG.random(100) < 0.7, 4).astype(int)}]
    wide = seed_bootstrap(clumped, queries, accuracy, num_resamples=300)
    narrow = seed_bootstrap(clumped, np.arange(400), accuracy, num_resamples=300)
    assert wide.high - wide.low > 1.4 * (narrow.high - narrow.low)
    with pytest.raises(ValueError, match="need runs"):
        seed_bootstrap([], queries, accuracy)
