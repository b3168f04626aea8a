"""Metrics by hand and against scikit-learn; baselines that need no training."""

import math
from functools import partial

import numpy as np
import pytest

from recis.ebrm.baselines import bm25_scores, category_scores, hand_rule_accept, hand_rule_scores, text_logistic
from recis.ebrm.evaluate import (
    EvalPairs,
    best_threshold,
    difference,
    ece,
    evaluate,
    f1_at,
    metrics_table,
    ndcg,
    pr_auc,
    qe_roc_auc,
    roc_auc,
)
from recis.ebrm.pricerunner_labels import Dictionaries
from recis.ebrm.pricerunner_queries import parse_query
from recis.ebrm.pricerunner_titles import pricerunner_schema


def pairs_of(query, grade, *, visible=None, tie=None):
    query, grade = np.array(query), np.array(grade)
    return EvalPairs(
        query=query,
        grade=grade,
        visible=np.ones(len(query), dtype=bool) if visible is None else np.array(visible),
        tie=np.linspace(0, 0.9, len(query)) if tie is None else np.array(tie),
    )


def random_pairs(num=400, seed=0):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=num).round(1)  # many ties
    return pairs_of(rng.integers(0, 25, num), rng.integers(1, 5, num), visible=rng.random(num) < 0.8), scores


def test_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    pairs, scores = random_pairs()
    assert roc_auc(scores, pairs.label) == pytest.approx(metrics.roc_auc_score(pairs.label, scores), abs=1e-12)
    assert pr_auc(scores, pairs.label) == pytest.approx(metrics.average_precision_score(pairs.label, scores), abs=1e-12)
    assert f1_at(scores, pairs.label, 0.3) == pytest.approx(metrics.f1_score(pairs.label, scores >= 0.3), abs=1e-12)
    best = best_threshold(scores, pairs.label)
    assert f1_at(scores, pairs.label, best) == max(f1_at(scores, pairs.label, t) for t in np.unique(scores))


def test_ndcg_by_hand():
    pairs = pairs_of([0, 0, 0, 1, 1], [4, 1, 3, 1, 1])  # query 1 has no grade above 1: it does not count
    scores = np.array([0.1, 0.9, 0.5, 0.3, 0.2])
    gained = 0 / math.log2(2) + 3 / math.log2(3) + 7 / math.log2(4)
    best = 7 / math.log2(2) + 3 / math.log2(3)
    assert ndcg(pairs, scores) == pytest.approx(gained / best, abs=1e-12)


def test_ties_follow_the_item_not_the_rows():
    scores = np.zeros(3)
    first = ndcg(pairs_of([0, 0, 0], [4, 1, 1], tie=[0.1, 0.5, 0.9]), scores)
    last = ndcg(pairs_of([0, 0, 0], [4, 1, 1], tie=[0.9, 0.5, 0.1]), scores)
    moved = ndcg(pairs_of([0, 0, 0], [1, 1, 4], tie=[0.5, 0.1, 0.9]), scores)
    assert first == 1.0
    assert last == moved == pytest.approx(1 / math.log2(4))


def test_ece_by_hand():
    # bin 0.2: mean p .25, mean y .5, 2 rows; bin 0.9: mean p .95, y 1, 1 row
    assert ece(np.array([0.2, 0.3, 0.95]), np.array([0, 1, 1])) == pytest.approx((1 * 0.2 + 1 * 0.7 + 1 * 0.05) / 3)
    assert ece(np.array([0.22, 0.28, 0.95]), np.array([0, 1, 1])) == pytest.approx((2 * 0.25 + 0.05) / 3)
    assert math.isnan(ece(np.array([]), np.array([])))


def test_all_and_visible_pairs():
    pairs, scores = random_pairs()
    probabilities = 1 / (1 + np.exp(-scores))
    found = evaluate(pairs, scores, probabilities=probabilities, threshold=0.2)
    seen = pairs.at(np.flatnonzero(pairs.visible))
    again = evaluate(seen, scores[pairs.visible], probabilities=probabilities[pairs.visible], threshold=0.2)
    for name in ("roc_auc", "pr_auc", "f1", "ndcg@10", "ece"):
        assert found[f"visible.{name}"] == again[name] == again[f"visible.{name}"]
    without = evaluate(pairs, scores)
    assert math.isnan(without["f1"])
    assert math.isnan(without["ece"])
    assert "roc_auc" in metrics_table({"model": without})


def test_one_class_and_no_rows():
    assert math.isnan(roc_auc(np.array([1.0]), np.array([1])))
    assert math.isnan(pr_auc(np.array([1.0]), np.array([0])))
    assert math.isnan(pr_auc(np.array([]), np.array([])))
    assert math.isnan(f1_at(np.array([1.0]), np.array([0]), 0.5))
    with pytest.raises(ValueError, match="at least one positive"):
        best_threshold(np.array([1.0]), np.array([0]))
    with pytest.raises(ValueError, match="all arrays"):
        EvalPairs(query=np.zeros(2), grade=np.zeros(1), visible=np.zeros(2), tie=np.zeros(2))
    with pytest.raises(ValueError, match="NaN"):
        evaluate(pairs_of([0, 0], [4, 1]), np.array([math.nan, 0.0]))


def test_qe_auc_by_type():
    types = np.array(["brand", "brand", "colour", "colour", "size"])
    found = qe_roc_auc(types, np.array([0.9, 0.1, 0.2, 0.8, 0.5]), np.array([1, 0, 1, 0, 1]))
    assert (found["brand"], found["colour"]) == (1.0, 0.0)
    assert math.isnan(found["size"])
    assert found["all"] == pytest.approx(4 / 6)  # of 6 (positive, negative) pairs: .9 beats both, .2 and .5 one each


def test_difference_of_equal_and_of_better_scores():
    pairs, scores = random_pairs()
    same = difference(pairs, scores, scores, num_resamples=50)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    better = difference(pairs, scores + 3.0 * pairs.label, scores, num_resamples=100)
    assert better.low > 0
    assert better == difference(pairs, scores + 3.0 * pairs.label, scores, num_resamples=100)


KNOWN = Dictionaries(
    brands=frozenset({"smeg", "lec"}),
    series=frozenset(),
    prefixes=frozenset(),
    suffixes=frozenset(),
    lenses=frozenset(),
    secondary=frozenset({("Fridges", "colour")}),
)
READ = partial(parse_query, known=KNOWN)


def test_hand_rules_order_items_as_grades_do():
    schema = pricerunner_schema()
    items = [
        [("category", "fridge"), ("brand", "smeg"), ("colour", "black")],
        [("category", "fridge"), ("brand", "smeg")],
        [("category", "fridge"), ("brand", "smeg"), ("colour", "red")],
        [("category", "fridge"), ("brand", "lec"), ("colour", "black")],
        [("category", "freezer"), ("brand", "lec"), ("colour", "red")],
    ]
    entities = {n: [schema.entity(kind, value) for kind, value in own] for n, own in enumerate(items)}
    query, item = np.zeros(5, dtype=int), np.arange(5)
    scores = hand_rule_scores(["black smeg fridge"], entities, schema, READ, query, item)
    assert sorted(scores, reverse=True) == scores.tolist()
    assert len(set(scores.tolist())) == 5
    free = 0.98  # the seven types that the query leaves free
    assert scores[0] == pytest.approx(10 * math.log(free))
    assert scores[2] == pytest.approx(9 * math.log(free) + math.log(0.10))


def test_hand_rules_know_codes():
    schema = pricerunner_schema()
    wanted = {"model": ("viera tx-55fx600b",)}
    same, other = schema.entity("model", "tx55fx600b"), schema.entity("model", "tx55fx700b")
    assert hand_rule_accept(wanted, same) > 0.9 > 0.1 > hand_rule_accept(wanted, other)
    assert (
        hand_rule_accept(wanted, other)
        < hand_rule_accept(wanted, schema.none("model"))
        < hand_rule_accept(wanted, same)
    )


def test_bm25_scores_of_pairs():
    scores = bm25_scores(["red hat", "shoe"], ["red hat", "blue shoe"], np.array([0, 0, 1, 0]), np.array([0, 1, 1, 0]))
    assert scores[0] == scores[3] > scores[1] == 0.0
    assert scores[2] > 0
    assert bm25_scores(["a"], ["a"], np.zeros(0, dtype=int), np.zeros(0, dtype=int)).shape == (0,)


def test_category_scores():
    wanted = [{"category": ("tv",)}, {"category": ("tv",)}, {}]
    assert category_scores(wanted, ["tv", "fridge", "tv"]).tolist() == [1.0, 0.0, 0.5]


def test_text_logistic_finds_a_word_that_decides():
    pytest.importorskip("sklearn")
    texts = ["good thing", "bad thing"] * 20
    scores = text_logistic(texts, np.array([1, 0] * 20), ["good one", "bad one"])
    assert scores[0] > 0 > scores[1]
