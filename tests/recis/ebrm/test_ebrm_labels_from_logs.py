"""Stage A labels: the worked click case, each rule by hand, and the Beta quantile against scipy."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recis.ebrm.labels_from_logs import (
    EntityClicks,
    QERow,
    beta_cdf,
    beta_quantile,
    click_rows,
    mention_rows,
    none_rows,
    none_shares,
)


def values(*rows: tuple[str, int, int, float]) -> list[EntityClicks]:
    return [
        EntityClicks(entity=f"brand:{name}", impressions=n, clicks=c, background_share=share)
        for name, n, c, share in rows
    ]


NIKE = values(
    ("nike", 800, 120, 0.06), ("adidas", 150, 3, 0.2), ("puma", 120, 1, 0.1), ("asics", 8, 1, 0.1), ("li-ning", 30, 0, 0.01)
)  # fmt: skip


def test_worked_case():
    rows = {row.entity: row for row in click_rows("nike running shoes", NIKE)}
    assert {entity: row.y for entity, row in rows.items()} == {
        "brand:nike": 1.0,
        "brand:adidas": 0.0,
        "brand:puma": 0.0,
    }
    assert {row.w for row in rows.values()} == {1.0}
    assert {row.src for row in rows.values()} == {"clicks"}


def test_figures_of_the_worked_case():
    best = NIKE[0]
    assert best.clicks / sum(value.clicks for value in NIKE) == pytest.approx(0.960)
    assert 0.960 / best.background_share == pytest.approx(16.0)
    ratios = [value.highest_rate / best.rate for value in NIKE[1:]]
    assert ratios == pytest.approx([0.302, 0.224, 1.09, 0.395], abs=0.005)


@pytest.mark.parametrize(
    ("rows", "labels"),
    [
        ([("a", 20, 4, 0.1), ("b", 100, 0, 0.1)], {"brand:b": 0}),  # 4 clicks are too few for a positive
        ([("a", 100, 50, 0.51), ("b", 100, 0, 0.1)], {"brand:b": 0}),  # lift 1.96
        ([("a", 100, 50, 0.5), ("b", 19, 0, 0.1)], {"brand:a": 1}),  # n = 19 is too few for a negative
        ([("a", 100, 9, 0.1), ("b", 100, 10, 0.1), ("c", 500, 2, 0.1)], {"brand:a": 1, "brand:b": 1}),  # c: no 1.96 x
        ([("a", 100, 0, 0.1), ("b", 100, 0, 0.1)], {}),  # no click at all
        ([("a", 100, 50, 0.0)], {"brand:a": 1}),  # never clicked elsewhere: lift without bound
        ([], {}),
    ],
)
def test_thresholds(rows, labels):
    assert {row.entity: row.y for row in click_rows("q", values(*rows))} == labels


def test_weight_is_the_impressions_up_to_100():
    rows = click_rows("q", values(("a", 50, 40, 0.1), ("b", 400, 0, 0.1)))
    assert [(row.entity, row.w) for row in rows] == [("brand:a", 0.5), ("brand:b", 1.0)]


def test_spread_clicks_make_every_value_a_weak_positive():
    spread = values(*((name, 40, 10, 0.2) for name in "abcde"), ("f", 3, 0, 0.1), ("g", 0, 0, 0.0))
    rows = click_rows("q", spread)
    assert [(row.entity, row.y, row.w) for row in rows] == [(f"brand:{name}", 1.0, 0.5) for name in "abcdef"]
    thirds = click_rows("q", values(*((name, 40, 10, 0.1) for name in "abc")))  # a share of a third is not spread
    assert [(row.y, row.w) for row in thirds] == [(1.0, 0.4)] * 3


def test_a_long_tail_is_not_spread():
    # largest share .29 but most values without a click: entropy below 0.8 of its maximum
    skewed = values(*((name, 50, 10, 0.1) for name in "abcd"), *((f"z{n}", 50, 0, 0.0) for n in range(60)))
    assert all(row.w != 0.5 for row in click_rows("q", skewed))


def test_mentions():
    rows = mention_rows(
        "red nike shoes",
        {"brand": ["brand:nike"], "colour": ["colour:red"]},
        ["brand:nike", "brand:puma", "brand:puma", "brand:none", "size:m", "colour:blue"],
    )
    assert [(row.entity, row.y) for row in rows] == [
        ("brand:nike", 1.0), ("colour:red", 1.0), ("brand:puma", 0.0), ("colour:blue", 0.0),
    ]  # fmt: skip
    assert {(row.w, row.src) for row in rows} == {(1.0, "mention")}
    assert mention_rows("q", {}, ["brand:nike"]) == []


def test_none_is_the_share_of_relevant_silent_items():
    shares = none_shares([(["brand"], [], 1), (["brand"], [], 0), (["brand"], ["brand"], 1), (["size"], ["brand"], 0)])
    assert shares == {"brand": 0.5, "size": 0.0}
    rows = none_rows("q", ["brand", "colour"], ["brand", "colour", "size"], shares)
    assert [(row.entity, row.y, row.w) for row in rows] == [("brand:none", 0.5, 1.0), ("size:none", 1.0, 0.5)]


@pytest.mark.parametrize(
    "kwargs", [{"y": 1.5}, {"y": math.nan}, {"w": 0.0}, {"w": math.inf}, {"src": "guess"}], ids=str
)
def test_rows_out_of_range_are_refused(kwargs):
    with pytest.raises(ValueError, match="qe row"):
        QERow(**{"query": "q", "entity": "brand:a", "y": 1.0} | kwargs)


def test_more_clicks_than_impressions_are_refused():
    with pytest.raises(ValueError, match="clicks must lie"):
        EntityClicks(entity="brand:a", impressions=1, clicks=2, background_share=0.1)


@pytest.mark.parametrize("a", [0.3, 1.0, 4.0, 500.0])
@pytest.mark.parametrize("b", [0.7, 19.0, 166.0, 2e5])
def test_beta_against_scipy(a, b):
    stats = pytest.importorskip("scipy.stats")
    for p in (0.01, 0.5, 0.95):
        assert beta_quantile(p, a, b) == pytest.approx(stats.beta.ppf(p, a, b), rel=1e-7)
        x = stats.beta.ppf(p, a, b)
        assert beta_cdf(x, a, b) == pytest.approx(p, abs=1e-9)


def test_beta_by_hand():
    assert beta_cdf(0.3, 1.0, 1.0) == pytest.approx(0.3, abs=1e-14)
    assert beta_cdf(0.3, 2.0, 1.0) == pytest.approx(0.09, abs=1e-14)
    assert (beta_cdf(0.0, 2.0, 3.0), beta_cdf(1.0, 2.0, 3.0)) == (0.0, 1.0)
    with pytest.raises(ValueError, match="beta_quantile"):
        beta_quantile(1.0, 1.0, 1.0)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300), st.floats(0, 1)), max_size=8))
def test_no_value_gets_two_labels_and_order_does_not_matter(counts):
    rows = [(str(n), max(a, b), min(a, b), share) for n, (a, b, share) in enumerate(counts)]
    labels = {row.entity: (row.y, row.w) for row in click_rows("q", values(*rows))}
    assert len(click_rows("q", values(*rows))) == len(labels)
    clicks = [row[2] for row in rows]
    if clicks and clicks.count(max(clicks)) == 1:  # with a tie for the best value, order decides which rate is the best
        assert {row.entity: (row.y, row.w) for row in click_rows("q", values(*rows[::-1]))} == labels
