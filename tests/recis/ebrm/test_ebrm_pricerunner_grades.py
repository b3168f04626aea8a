"""Grades by hand, one rule after the other, and candidates of a made-up pool."""

import random

import numpy as np
import pytest

from recis.ebrm.bm25 import BM25
from recis.ebrm.evaluate import tie_of
from recis.ebrm.pricerunner_grades import GradeTable, grade, is_visible
from recis.ebrm.pricerunner_labels import Dictionaries, label_facts
from recis.ebrm.pricerunner_pairs import Pool, draw_pairs
from recis.ebrm.pricerunner_queries import draw_query, query_rng
from recis.ebrm.pricerunner_titles import title_facts

KNOWN = Dictionaries(
    brands=frozenset({"smeg", "lec", "intel", "hp"}),
    series=frozenset({"xeon"}),
    prefixes=frozenset(),
    suffixes=frozenset(),
    lenses=frozenset(),
    secondary=frozenset({("Fridges", "colour"), ("Fridges", "form"), ("CPUs", "speed")}),
)
WANTED = {"category": ("fridge",), "brand": ("smeg",), "colour": ("black",)}


@pytest.mark.parametrize(
    ("label", "category", "want"),
    [
        ("smeg fab5 black", "Fridges", 4),
        ("smeg fab5 red", "Fridges", 3),
        ("lec fab5 black", "Fridges", 2),
        ("lec fab5 red", "Fridges", 2),
        ("smeg fab5 black", "Freezers", 1),
        ("smeg fab5", "Fridges", 0),  # the label states no colour
    ],
)
def test_one_rule_each(label, category, want):
    assert grade(WANTED, label_facts(label, category, KNOWN)) == want


def test_two_secondary_differences_make_a_contradiction():
    wanted = {"category": ("processor",), "speed": ("2ghz",), "size": ("3inch",)}
    facts = label_facts("intel xeon x1 3ghz", "CPUs", KNOWN)
    assert grade({**wanted, "size": ()}, facts) == 0
    assert grade({"category": ("processor",), "speed": ("2ghz",)}, facts) == 3
    two = {"category": ("fridge",), "colour": ("red",), "form": ("freestanding",)}
    assert grade(two, label_facts("smeg x1 black integrated", "Fridges", KNOWN)) == 2


def test_either_brand_of_a_processor_satisfies():
    facts = label_facts("hp intel xeon e5 2ghz tray", "CPUs", KNOWN)
    for brand in ("hp", "intel"):
        assert grade({"category": ("processor",), "brand": (brand,)}, facts) == 4
    assert grade({"category": ("processor",), "brand": ("amd",)}, facts) == 2


def test_the_own_cluster_is_met_whatever_its_label_lacks():
    facts = {1: label_facts("smeg fab5", "Fridges", KNOWN), 2: label_facts("smeg fab6 black", "Fridges", KNOWN)}
    table = GradeTable([1, 2], facts)
    assert table.grades(WANTED, 1).tolist() == [4, 4]
    assert table.grades(WANTED, None).tolist() == [0, 4]


def test_visible():
    red = label_facts("smeg fab5 red", "Fridges", KNOWN)
    black = label_facts("smeg fab5 black", "Fridges", KNOWN)
    assert is_visible(WANTED, 1, red, title_facts("", "Fridges", KNOWN))
    assert is_visible(WANTED, 4, black, title_facts("smeg fab5 schwarz", "Fridges", KNOWN))
    assert not is_visible(WANTED, 4, black, title_facts("smeg fab5", "Fridges", KNOWN))
    assert is_visible(WANTED, 3, red, title_facts("smeg in rot", "Fridges", KNOWN))
    assert not is_visible(WANTED, 3, red, title_facts("smeg fab5", "Fridges", KNOWN))
    # the title names another brand, but the label has the right one: that is not what the grade is about
    assert not is_visible(WANTED, 3, red, title_facts("lec fab5", "Fridges", KNOWN))


def _pool(num_clusters: int = 40):
    colours, brands = ("black", "red", "white"), ("smeg", "lec")
    labels = {
        n: (f"{brands[n % 2]} fab{n}x {colours[n % 3]}", "Fridges" if n % 4 else "Freezers")
        for n in range(num_clusters)
    }
    facts = {n: label_facts(label, category, KNOWN) for n, (label, category) in labels.items()}
    rows = [(n, copy) for n in labels for copy in range(6)]
    titles = [title_facts(labels[n][0], labels[n][1], KNOWN) for n, _ in rows]
    return facts, Pool(
        offers=np.arange(len(rows)),
        cluster_ids=np.array([n for n, _ in rows]),
        titles=titles,
        texts=[list(title.words) for title in titles],
        tie=np.array([tie_of(row) for row in range(len(rows))]),
    )


def test_candidates_hold_the_counts_and_no_offer_twice():
    facts, pool = _pool()
    queries, pairs = draw_pairs("t", 30, pool, facts, KNOWN)
    table = GradeTable(sorted(facts), facts)
    for number, query in enumerate(queries):
        rows = pairs.query == number
        offers, grades = pairs.offer[rows], pairs.grade[rows]
        assert len(set(offers.tolist())) == len(offers)
        own = (pool.cluster_ids[offers] == query.cluster_id) & (grades == 4)
        assert own.sum() == 4
        assert ((grades == 4) & ~own).sum() <= 4
        assert (grades == 3).sum() <= 8
        assert (grades == 2).sum() <= 6
        assert (grades == 1).sum() == 4
        assert grades.tolist() == table.grades(query.constraints, query.cluster_id)[pool.cluster_ids[offers]].tolist()


def test_fewer_queries_are_the_first_ones_and_runs_repeat():
    facts, pool = _pool()
    queries, pairs = draw_pairs("t", 10, pool, facts, KNOWN)
    fewer, fewer_pairs = draw_pairs("t", 4, pool, facts, KNOWN)
    assert queries[:4] == fewer
    assert pairs.offer[pairs.query < 4].tolist() == fewer_pairs.offer.tolist()
    assert draw_pairs("u", 4, pool, facts, KNOWN)[0] != fewer


def test_the_order_of_candidates_tells_nothing():
    facts, pool = _pool()
    _, pairs = draw_pairs("t", 400, pool, facts, KNOWN)
    first = np.append(True, pairs.query[1:] != pairs.query[:-1])
    share = pairs.label.mean()
    assert abs(pairs.label[first].mean() - share) < 4 * np.sqrt(share * (1 - share) / 400)


def test_the_hardest_of_a_grade_are_picked():
    facts, pool = _pool()
    queries, pairs = draw_pairs("t", 20, pool, facts, KNOWN)
    index = BM25(pool.texts)
    table = GradeTable(sorted(facts), facts)
    for number, query in enumerate(queries):
        grades = table.grades(query.constraints, query.cluster_id)[pool.cluster_ids]
        hardness = index.scores(query.text.split()) + 1e-6 * pool.tie
        members = np.flatnonzero(grades == 2)
        hardest = members[np.argsort(-hardness[members])[:4]]
        assert set(hardest.tolist()) <= set(pairs.offer[pairs.query == number].tolist())


def test_a_query_without_constraints_is_drawn_again_or_refused():
    facts, _ = _pool()
    for number in range(50):
        assert len(draw_query("t", number, sorted(facts), facts, KNOWN, query_rng("t", number)).constraints) > 1
    empty = {1: label_facts("", "Fridges", KNOWN)}
    with pytest.raises(ValueError, match="no constraint but the category"):
        draw_query("t", 0, [1], empty, KNOWN, random.Random(0))


def test_bm25_by_hand():
    index = BM25([["red", "shoe"], ["red", "red", "hat"], ["hat"]])
    idf = np.log1p((3 - 2 + 0.5) / (2 + 0.5))
    lengths = np.array([2.0, 3.0])
    tf = np.array([1.0, 2.0])
    want = idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * lengths / 2.0))
    np.testing.assert_allclose(index.scores(["red", "unknown"]), [*want, 0.0], rtol=1e-12)
    np.testing.assert_allclose(index.scores(["red", "red"]), 2 * index.scores(["red"]), rtol=1e-12)
    assert index.scores([]).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kwargs", [{"k1": -1.0}, {"b": 1.5}], ids=str)
def test_bm25_refuses(kwargs):
    with pytest.raises(ValueError, match="BM25"):
        BM25([["a"]], **kwargs)
    with pytest.raises(ValueError, match="at least one text"):
        BM25([])
