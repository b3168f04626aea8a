"""Values by hand (conformance A40, B25), against scikit-learn, against slow float64 definitions, and the edge rules."""

import math
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from recis.errors import ConfigError, DataError
from recis.metrics import BinnedAuc, Calibration, ExactAuc, Gauc, HitRate, LogLoss, Mrr, Ndcg, Ne, Recall, from_key
from recis.trainer.serialize import from_json, to_json

LABELS = torch.tensor([1.0, 0, 1, 0, 0])
SCORES = torch.tensor([0.8, 0.4, 0.4, 0.1, 0.6], dtype=torch.float64)


def value(metric, *rows, **named) -> float:
    metric.update(*rows, **named)
    return metric.compute()


def test_b25_point_metrics():
    assert value(ExactAuc(), SCORES, LABELS) == pytest.approx(0.75, abs=1e-12)
    weights = torch.tensor([1.0, 2, 1, 1, 3])
    assert value(ExactAuc(), SCORES, LABELS, weights) == pytest.approx(0.6666667, abs=1e-7)
    assert value(LogLoss(), SCORES, LABELS) == pytest.approx(0.5343822, abs=1e-7)
    assert value(Ne(), SCORES, LABELS) == pytest.approx(0.7940163, abs=1e-7)
    assert value(Calibration(), SCORES, LABELS) == pytest.approx(1.15, abs=1e-12)


def test_b25_ranking_metrics():
    relevance, scores, one = (
        torch.tensor([3.0, 0, 2, 1]),
        torch.tensor([0.2, 0.9, 0.5, 0.5]),
        torch.zeros(4, dtype=torch.int64),
    )
    assert value(Ndcg(3), scores, relevance, groups=one) == pytest.approx(0.2547475, abs=1e-7)
    assert value(HitRate(1), scores, relevance, groups=one) == 0
    assert value(HitRate(2), scores, relevance, groups=one) == 1
    assert value(Mrr(), scores, relevance, groups=one) == 0.5
    assert value(Recall(3), scores, relevance, groups=one) == pytest.approx(2 / 3)


def test_b25_gauc_over_batches_and_ranks():
    batches = [([0.3, 0.9], [1.0, 1], [7, -9]), ([0.2, 0.4, 0.1], [0.0, 0, 0], [7, 7, -9])]
    ranks = []
    straight = Gauc()
    for scores, labels, groups in batches:
        rank = Gauc()
        for metric in (rank, straight):
            metric.update(torch.tensor(scores), torch.tensor(labels), groups=torch.tensor(groups))
        ranks.append(rank)
    assert straight.compute() == pytest.approx(0.7, abs=1e-12)
    for first, second in ((0, 1), (1, 0)):
        merged = Gauc()
        merged.merge(ranks[first])
        merged.merge(ranks[second])
        assert merged.compute() == straight.compute()


def test_a40_gauc_ignores_groups_of_one_class():
    labels, scores = torch.tensor([1.0, 0, 1, 0, 1]), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    metric = Gauc()
    for _ in range(2):  # the batch, then cumulated
        assert value(metric, scores, labels, groups=torch.tensor([0, 1, 1, 1, 2])) == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_auc_and_log_loss_equal_sklearn(dtype, weighted):
    rng = np.random.default_rng(3)
    labels = torch.from_numpy((rng.random(1001) < 0.3).astype(np.float32))
    scores = torch.from_numpy(rng.random(1001)).to(dtype)  # bfloat16 has many ties
    weights = torch.from_numpy(rng.random(1001)) if weighted else None
    sample_weight = None if weights is None else weights.numpy()
    reference = scores.double().numpy()
    want = roc_auc_score(labels, reference, sample_weight=sample_weight)
    assert value(ExactAuc(), scores, labels, weights) == pytest.approx(want, abs=1e-12)
    want = log_loss(labels, reference.clip(1e-7, 1 - 1e-7), sample_weight=sample_weight)
    assert value(LogLoss(), scores, labels, weights) == pytest.approx(want, abs=1e-12)


def test_auc_takes_logits_negative_and_infinite_scores():
    scores = torch.tensor([-3.0, math.inf, -math.inf, 0.0, -0.0, 2.5])
    labels = torch.tensor([0.0, 1, 0, 1, 0, 1])
    want = pair_auc(scores.tolist(), labels.tolist(), [1.0] * 6)
    assert value(ExactAuc(), scores, labels) == want
    assert value(ExactAuc(), scores, labels, torch.full((6,), 0.5)) == pytest.approx(want)


def pair_auc(scores, labels, weights) -> float:
    wins = total = 0.0
    for i, j in product(range(len(scores)), repeat=2):
        if labels[i] > labels[j]:
            weight = weights[i] * weights[j]
            total += weight
            wins += weight * (1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0)
    return wins / total if total else math.nan


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_rows", [1, 60, 500])
def test_gauc_equals_pairs_counted_per_group(num_rows, weighted):
    rng = np.random.default_rng(num_rows)
    scores, labels = rng.integers(0, 6, num_rows) / 5.0, (rng.random(num_rows) < 0.4).astype(float)
    groups = rng.choice([-(2**63), -1, 0, 5, 2**63 - 1, 123456789], num_rows)
    weights = rng.integers(0, 4, num_rows) / 2.0 if weighted else np.ones(num_rows)
    above = below = 0.0
    for group in np.unique(groups):
        rows = np.flatnonzero((groups == group) & (weights > 0))
        auc = pair_auc(scores[rows], labels[rows], weights[rows])
        if not math.isnan(auc):
            above, below = above + weights[rows].sum() * auc, below + weights[rows].sum()
    metric = Gauc()
    got = value(metric, scores, labels, weights if weighted else None, groups)
    assert got == pytest.approx(above / below if below else math.nan, abs=1e-12, nan_ok=True)
    parts = metric.per_group()
    assert parts["group"].tolist() == np.unique(groups[weights > 0]).tolist()
    both = ~parts["auc"].isnan()
    if below:
        assert float((parts["weight"] * parts["auc"])[both].sum() / parts["weight"][both].sum()) == pytest.approx(got)


def test_gauc_with_more_groups_than_the_first_table_and_two_threads():
    """Word and column paths agree, and so do one and two threads."""
    rng = np.random.default_rng(0)
    num_rows = 200_000
    groups = rng.integers(-(2**62), 2**62, 90_000)[rng.integers(0, 90_000, num_rows)]
    scores, labels = rng.random(num_rows, dtype=np.float32), (rng.random(num_rows) < 0.3).astype(np.float32)
    results = []
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            results.append(value(Gauc(), scores, labels, groups=groups))
    finally:
        torch.set_num_threads(threads)
    results.append(value(Gauc(), scores, labels, np.full(num_rows, 2.0), groups))
    assert results[0] == results[1]
    assert results[0] == pytest.approx(results[2], rel=1e-12)


def binned_reference(scores, labels, num_thresholds, smooth) -> float:
    thresholds = [-1e-7, *(k / (num_thresholds - 1) for k in range(1, num_thresholds - 1)), 1 + 1e-7]
    points = []
    for threshold in thresholds:
        tp = sum(1 for s, y in zip(scores, labels, strict=True) if y and s > threshold)
        fp = sum(1 for s, y in zip(scores, labels, strict=True) if not y and s > threshold)
        positives, negatives = sum(labels), len(labels) - sum(labels)
        points.append((fp / (negatives + smooth), (tp + smooth) / (positives + smooth)))
    return sum((a[0] - b[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points))


@pytest.mark.parametrize("num_thresholds", [2, 3, 11, 200])
@pytest.mark.parametrize("smooth", [0.0, 1e-6])
def test_binned_auc_equals_counts_by_threshold(num_thresholds, smooth):
    rng = np.random.default_rng(5)
    on_thresholds = rng.integers(0, num_thresholds, 60) / (num_thresholds - 1)
    scores = np.concatenate([rng.random(60), on_thresholds, [0.0, 1.0]])
    labels = (rng.random(122) < 0.5 * scores + 0.2).astype(float)
    metric = BinnedAuc(num_thresholds, smooth)
    want = binned_reference(scores.tolist(), labels.tolist(), num_thresholds, smooth)
    assert value(metric, scores, labels) == pytest.approx(want, abs=1e-12)
    counts = metric.state_dict()["counts"]
    assert counts.dtype == torch.int64
    assert counts.shape == (4, num_thresholds)
    assert (counts.sum(0) == 122).all()


def ranking_reference(scores, labels, groups, k) -> dict[str, float]:
    recall, ndcg, hit, mrr = [], [], [], []
    for group in set(groups):
        rows = [i for i in range(len(groups)) if groups[i] == group]
        rows.sort(key=lambda i: -scores[i])  # stable: ties keep input order
        relevance = [labels[i] for i in rows]
        relevant = sum(r > 0 for r in relevance)
        if relevant:
            recall.append(sum(r > 0 for r in relevance[:k]) / min(k, relevant))
            gains = [
                sum((2**r - 1) / math.log2(place + 2) for place, r in enumerate(order[:k]))
                for order in (relevance, sorted(relevance, reverse=True))
            ]
            ndcg.append(gains[0] / gains[1])
            hit.append(any(r > 0 for r in relevance[:k]))
            mrr.append(1 / (1 + next(place for place, r in enumerate(relevance) if r > 0)))
    return {
        name: sum(found) / len(found) if found else math.nan
        for name, found in (("recall", recall), ("ndcg", ndcg), ("hit_rate", hit), ("mrr", mrr))
    }


@pytest.mark.parametrize("k", [1, 3, 100])
@pytest.mark.parametrize("num_rows", [1, 40, 400])
def test_ranking_equals_sorted_lists(num_rows, k):
    rng = np.random.default_rng(num_rows + k)
    scores, labels = rng.integers(0, 9, num_rows) / 8.0, rng.integers(0, 4, num_rows) * (rng.random(num_rows) < 0.3)
    groups = rng.integers(-20, 20, num_rows)
    want = ranking_reference(scores.tolist(), labels.tolist(), groups.tolist(), k)
    for name, metric in (("recall", Recall(k)), ("ndcg", Ndcg(k)), ("hit_rate", HitRate(k)), ("mrr", Mrr())):
        for start in range(0, num_rows, 17):  # groups span batches
            part = slice(start, start + 17)
            metric.update(scores[part], labels[part].astype(float), groups=groups[part])
        assert metric.compute() == pytest.approx(want[name], abs=1e-12, nan_ok=True), name


@pytest.mark.parametrize(
    "metric", [ExactAuc(), Gauc(), BinnedAuc(), Ne(), Calibration(), Recall(5), Ndcg(5), HitRate(5), Mrr()], ids=repr
)
def test_undefined_is_nan(metric):
    """No rows at all, and (where it matters) no positive row."""
    groups = torch.tensor([1, 1, 2]) if metric.uses_groups else None
    empty = torch.empty(0)
    assert math.isnan(metric.compute())
    metric.update(empty, empty, groups=torch.empty(0, dtype=torch.int64) if metric.uses_groups else None)
    assert math.isnan(metric.compute())
    metric.update(torch.tensor([0.2, 0.3, 0.9]), torch.zeros(3), groups=groups)
    assert math.isnan(metric.compute())


def test_log_loss_clips_and_takes_soft_labels():
    assert value(LogLoss(), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])) == pytest.approx(-math.log(1e-7))
    soft = -(0.25 * math.log(0.75) + 0.75 * math.log(0.25))
    assert value(LogLoss(), torch.tensor([0.75]), torch.tensor([0.25])) == pytest.approx(soft)
    assert math.isnan(LogLoss().compute())


def test_calibration_curve():
    metric = Calibration(num_bins=4)
    metric.update(torch.tensor([0.0, 0.2, 0.25, 1.0]), torch.tensor([0.0, 1, 1, 1]), torch.tensor([1.0, 3, 2, 1]))
    curve = metric.curve()
    assert curve["weight"].tolist() == [4, 2, 0, 1]
    torch.testing.assert_close(curve["prediction"], torch.tensor([0.15, 0.25, math.nan, 1.0]).double(), equal_nan=True)
    torch.testing.assert_close(curve["label"], torch.tensor([0.75, 1.0, math.nan, 1.0]).double(), equal_nan=True)


@pytest.mark.parametrize(
    "metric", [ExactAuc(), Gauc(), LogLoss(), Ne(), Calibration(), BinnedAuc(), Ndcg(3), Mrr()], ids=repr
)
def test_bad_rows_are_named(metric):
    groups = {"groups": torch.tensor([1, 1])} if metric.uses_groups else {}
    with pytest.raises(DataError, match=rf"row 1, column 'score', value nan: {metric.key}: a score must be a number"):
        metric.update(torch.tensor([0.5, math.nan]), torch.tensor([0.0, 1.0]), **groups)
    with pytest.raises(DataError, match=rf"row 0, column 'label', value -1.0: {metric.key}: a .* must"):
        metric.update(torch.tensor([0.5, 0.5]), torch.tensor([-1.0, 1.0]), **groups)
    with pytest.raises(DataError, match="column 'label', value nan"):
        metric.update(torch.tensor([0.5, 0.5]), torch.tensor([1.0, math.nan]), **groups)
    if metric.uses_weights:
        with pytest.raises(DataError, match=r"row 1, column 'weight', value inf: .*finite and not negative"):
            metric.update(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, math.inf]), **groups)
    else:
        with pytest.raises(ValueError, match="has no weighted form"):
            metric.update(torch.tensor([0.5]), torch.tensor([1.0]), torch.tensor([1.0]), **groups)
    if metric.probabilities:
        with pytest.raises(DataError, match=r"value 1\.5: .*probability in \[0, 1\]; apply sigmoid"):
            metric.update(torch.tensor([0.5, 1.5]), torch.tensor([0.0, 1.0]), **groups)
    if metric.uses_groups:
        with pytest.raises(ValueError, match="needs groups"):
            metric.update(torch.tensor([0.5]), torch.tensor([1.0]))
        with pytest.raises(ValueError, match="groups must be integers"):
            metric.update(torch.tensor([0.5]), torch.tensor([1.0]), groups=torch.tensor([1.0]))
    with pytest.raises(ValueError, match="2 scores need as many labels; got 1"):
        metric.update(torch.tensor([0.5, 0.5]), torch.tensor([1.0]), **groups)
    with pytest.raises(ValueError, match=r"scores must be 1-D \[N\]; got shape \(2, 1\)"):
        metric.update(torch.zeros(2, 1), torch.zeros(2, 1), **groups)
    assert math.isnan(metric.compute())  # nothing of a refused batch stays


def test_binary_metrics_refuse_soft_labels():
    for metric in (ExactAuc(), BinnedAuc()):
        with pytest.raises(DataError, match=r"value 0\.5: .*must be 0 or 1"):
            metric.update(torch.tensor([0.5]), torch.tensor([0.5]))
    with pytest.raises(DataError, match="a label must lie in"):
        LogLoss().update(torch.tensor([0.5]), torch.tensor([2.0]))
    with pytest.raises(DataError, match="a relevance must lie in"):
        Ndcg(3).update(torch.tensor([0.5]), torch.tensor([2000.0]), groups=torch.tensor([0]))


def test_keys_and_settings():
    for key in ("auc", "binned_auc", "gauc", "logloss", "ne", "pcoc", "recall@20", "ndcg@10", "hit_rate@5", "mrr"):
        assert from_key(key).key == key
        assert from_json(to_json(from_key(key))) == from_key(key)
    for wrong in ("aux", "recall", "recall@x", "auc@3", ""):
        with pytest.raises(ConfigError, match="unknown metric"):
            from_key(wrong)
    assert Recall(20) == Recall(20) != Recall(10)
    assert "k=10" in repr(Ndcg(10))
    for make in (
        lambda: Recall(0),
        lambda: BinnedAuc(1),
        lambda: BinnedAuc(smooth=-1.0),
        lambda: Calibration(num_bins=0),
    ):
        with pytest.raises(ConfigError):
            make()
