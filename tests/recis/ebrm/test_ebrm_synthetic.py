"""The made-up catalogue: same seed, same bytes; gold against a slow restatement; the click model against its formula."""

from dataclasses import replace

import numpy as np
import pytest

from recis.ebrm.click_model import click_chance, draw_sessions
from recis.ebrm.datasets import read_schema
from recis.ebrm.evaluate import evaluate
from recis.ebrm.files import read_header, read_items, read_labels
from recis.ebrm.synthetic import CONSTRAIN, TYPES, SyntheticConfig, make_data
from recis.ebrm.synthetic_words import CATEGORIES, COLOURS, FORMS, SIZES, made_up_names, with_typo

SMALL = SyntheticConfig(num_items=300, num_queries=80, num_impressions=4_000, num_candidates=20, seed=3)


@pytest.fixture(scope="module")
def data():
    return make_data(SMALL)


def test_same_seed_same_data(data, tmp_path):
    again = make_data(SMALL)
    data.write(tmp_path / "a")
    again.write(tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    parts = ["labels_dev.jsonl", "labels_test.jsonl", "labels_train.jsonl"]
    assert names == ["clicks.jsonl", "items.jsonl", *parts, "schema.json"]
    assert read_schema(tmp_path / "a" / "schema.json") == data.schema
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for name in names[:-1]:
        assert read_header(tmp_path / "a" / name) == {"name": "recis.ebrm.synthetic", "version": 1, "seed": 3}
    assert make_data(replace(SMALL, seed=4)).items != data.items


def test_files_are_read_again(data, tmp_path):
    data.write(tmp_path)
    assert tuple(read_items(tmp_path / "items.jsonl", data.schema)) == data.items
    rows = {part: list(read_labels(tmp_path / f"labels_{part}.jsonl")) for part in ("train", "dev", "test")}
    assert sum(map(len, rows.values())) == len(data.pair_query)
    texts = {part: {query.text for query in data.queries if query.part == part} for part in rows}
    for part, own in rows.items():
        assert {row.query for row in own} <= texts[part]
        assert all(row.y == (row.grade == 4) for row in own)


def test_eval_pairs_are_the_rows_of_a_part(data):
    rows = data.pairs_of("train")
    pairs = data.eval_pairs("train")
    assert pairs.grade.tolist() == data.grades[rows].tolist()
    assert [data.queries[query].part for query in pairs.query.tolist()] == ["train"] * len(rows)
    assert ((pairs.tie >= 0) & (pairs.tie < 1)).all()
    perfect = evaluate(pairs, pairs.grade.astype(float))
    assert (perfect["roc_auc"], perfect["ndcg@10"]) == (1.0, 1.0)


def test_gold_restated(data):
    for row in range(0, len(data.pair_query), 7):
        query, item = int(data.pair_query[row]), int(data.pair_item[row])
        wanted = data.queries[query].constraints
        met = {kind: bool(set(values) & set(data.values[item].get(kind, ()))) for kind, values in wanted.items()}
        assert data.gold_qi(query, item) == int(all(met.values()))
        unmet = {kind for kind, ok in met.items() if not ok}
        want = (
            4
            if not unmet
            else 1
            if "category" in unmet
            else 3
            if len(unmet) == 1 and unmet <= {"colour", "form", "size"}
            else 2
        )
        assert data.grade(query, item) == want == data.grades[row]
        for entity in data.items[item].entities:
            assert data.gold_qe(query, entity) == int(entity.type not in wanted or entity.value in wanted[entity.type])


def test_gold_qe_and_entities_give_gold_qi_where_nothing_is_hidden():
    data = make_data(replace(SMALL, hidden_share=0.0))
    for query, item in zip(data.pair_query.tolist(), data.pair_item.tolist(), strict=True):
        slots = data.schema.slots(data.items[item].entities)
        by_type = all(any(data.gold_qe(query, entity) for entity in slot) for slot in slots)
        assert by_type == bool(data.gold_qi(query, item))
        assert data.visible(query, item)


def test_sizes_and_shares():
    data = make_data(SyntheticConfig(num_impressions=20_000))
    assert (len(data.items), len(data.queries), len(data.clicks.query)) == (2_000, 600, 20_000)
    assert len(set(data.pair_query.tolist())) == 600
    values = {kind: {v for own in data.values for v in own.get(kind, ())} for kind in TYPES}
    assert {kind: len(found) for kind, found in values.items()} | {"brand": 60, "series": 200} == {
        "category": 20, "brand": 60, "series": 200, "colour": 12, "form": 8, "size": 6,
    }  # fmt: skip
    assert len(values["brand"]) <= 60
    assert len(values["series"]) <= 200
    all_values = sum(len(own.get(kind, ())) for own in data.values for kind in TYPES)
    listed = sum(len(item.entities) for item in data.items)
    assert 1 - listed / all_values == pytest.approx(0.10, abs=0.015)
    assert all("category" in query.constraints for query in data.queries)
    for kind, chance in CONSTRAIN.items():
        has = np.mean([kind in own for own in data.values]) if kind in ("form", "size") else 1.0
        share = np.mean([kind in query.constraints for query in data.queries])
        assert share == pytest.approx(chance * has, abs=0.06)
    parts = [np.mean([query.part == part for query in data.queries]) for part in ("train", "dev", "test")]
    np.testing.assert_allclose(parts, [0.70, 0.15, 0.15], atol=0.05)


def test_category_decides_brand_and_series(data):
    brands = {own["category"]: set() for own in data.values}
    series = {own["category"]: set() for own in data.values}
    for own in data.values:
        brands[own["category"]] |= set(own["brand"])
        series[own["category"]] |= set(own["series"])
    assert max(map(len, brands.values())) <= 12
    found = [value for values in series.values() for value in values]
    assert len(found) == len(set(found))  # a series belongs to one category


def test_titles_hold_a_spelling_of_every_value(data):
    spellings = {kind: {v: {v} for own in data.values for v in own.get(kind, ())} for kind in TYPES}
    for kind in TYPES:
        for spelling, value in data.schema.type(kind).synonyms.items():
            spellings[kind].setdefault(value, {value}).add(spelling)
    plain = 0
    for item, own in zip(data.items, data.values, strict=True):
        for kind, values in own.items():
            for value in values:
                assert any(f" {s} " in f" {item.title} " for s in spellings[kind][value])
                plain += f" {value} " in f" {item.title} "
    assert plain < 0.9 * sum(len(v) for own in data.values for v in own.values())  # synonyms are really used


def test_every_query_has_a_relevant_item_and_candidates_once(data):
    for number in range(len(data.queries)):
        own = data.pair_item[data.pair_query == number]
        assert len(set(own.tolist())) == len(own) == SMALL.num_candidates
        assert (data.grades[data.pair_query == number] == 4).any()


def test_clicks_come_from_candidates_and_follow_gold(data):
    log = data.clicks
    pairs = set(zip(data.pair_query.tolist(), data.pair_item.tolist(), strict=True))
    assert set(zip(log.query.tolist(), log.item.tolist(), strict=True)) <= pairs
    assert log.position.min() == 1
    assert log.position.max() == 10
    gold = np.array([data.gold_qi(q, i) for q, i in zip(log.query.tolist(), log.item.tolist(), strict=True)])
    assert log.clicked[gold == 1].mean() > 5 * log.clicked[gold == 0].mean()


def test_click_model_by_hand():
    np.testing.assert_allclose(click_chance(np.array([1.0, 0.0, 1.0]), np.array([1, 1, 5])), [0.57, 0.02, 0.285])
    rng = np.random.default_rng(0)
    gold = np.array([1.0, 0.0, 0.0, 1.0, 0.0])
    sessions = draw_sessions(gold, 20_000, rng)
    assert sessions.shown.shape == (20_000, 5)
    assert (np.sort(sessions.shown, axis=1) == np.arange(5)).all()
    first = sessions.shown[:, 0]
    for item in (0, 1):
        rows = first == item
        want = 0.57 if gold[item] else 0.02
        error = 4 * np.sqrt(want * (1 - want) / rows.sum())
        assert abs(sessions.clicked[rows, 0].mean() - want) < error
    # P(gold + noise of one relevant item beats one other) = Phi(1 / (0.7 sqrt 2)) = 0.8438
    ahead = np.argsort(sessions.shown, axis=1)
    assert (ahead[:, 0] < ahead[:, 1]).mean() == pytest.approx(0.8438, abs=0.012)
    assert draw_sessions(np.zeros(0), 2, rng).shown.shape == (2, 0)
    with pytest.raises(ValueError, match="gold must be"):
        draw_sessions(np.array([2.0]), 1, rng)


def test_words_belong_to_one_value():
    for table in (CATEGORIES, COLOURS, FORMS, SIZES):
        spellings = [spelling for value in table for spelling in value]
        assert len(spellings) == len(set(spellings))
        assert all(1 <= len(value) <= 3 for value in table)
    assert [len(table) for table in (CATEGORIES, COLOURS, FORMS, SIZES)] == [20, 12, 8, 6]


def test_names_and_typos():
    import random

    taken = {"bana"}
    names = made_up_names(50, 2, random.Random(0), taken)
    assert len({name for spellings in names for name in spellings}) == sum(map(len, names))
    rng = random.Random(1)
    slips = [with_typo("trainers", rng) for _ in range(200)]
    assert all(abs(len(slip) - 8) <= 1 for slip in slips)
    assert np.mean([slip != "trainers" for slip in slips]) > 0.9
    assert with_typo("xl", rng) == "xl"


@pytest.mark.parametrize(
    "kwargs", [{"num_items": 0}, {"num_impressions": -1}, {"hidden_share": 1.5}, {"typo_share": -0.1}], ids=str
)
def test_configs_out_of_range(kwargs):
    with pytest.raises(ValueError, match="synthetic data"):
        SyntheticConfig(**kwargs)


def test_one_item_and_no_clicks():
    data = make_data(SyntheticConfig(num_items=1, num_queries=1, num_impressions=0, num_candidates=1))
    assert (len(data.items), len(data.clicks.query), data.grades.tolist()) == (1, 0, [4])
