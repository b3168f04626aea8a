"""Pairs and files: what is refused and how it is named, both formats, defaults, what a recipe misses."""

import json

import pytest
from graded_pairs import make_pair

from recis.errors import ConfigError, DataError
from relevance.data import Chunk, Item, Pair, StepGold, check_missing, check_pair, check_pairs, count_missing
from relevance.files import (
    Preference,
    Rationale,
    Sample,
    Score,
    from_json,
    read_pairs,
    read_rows,
    sha256_of,
    write_rows,
)

FULL = Pair(
    id="p1",
    query_id="q1",
    query="schuhe ohne Schnürsenkel",
    item_id="i1",
    item=Item(
        category="boots", brand="norvik", attributes={"colour": "red", "closure": "zip"}, price=12.5, title="a\nb"
    ),
    label=4,
    family="negation",
    steps=StepGold(category="match", attributes={"lace": "ok"}, rule="E01", wanted={"lace": "none"}),
    negated=("lace",),
    chunk=Chunk(id="c1", text="zip.", score=0.5, kind="helpful", decision="adopt"),
    split="test",
)
BARE = Pair(id="p2", query_id="q2", query="x", item_id="i2", item=Item(title="t"))
NO_STEPS = Pair(id="p3", query_id="q3", query="y", item_id="i3", item=Item(title="t"), steps=StepGold(category="near"))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_round_trip(tmp_path, suffix):
    path = tmp_path / f"pairs.{suffix}"
    digest = write_rows(path, [FULL, BARE, NO_STEPS])
    assert read_pairs(path) == [FULL, BARE, NO_STEPS]
    assert digest == sha256_of(path)
    assert len(digest) == 64
    rows = {
        Rationale: [Rationale(id="p1", profile="compact", completion="4")],
        Sample: [Sample(id="p1", k=0, completion="4", completion_ids=(5, 6), label=4, ok=True, p=(0.0, 0.0, 0.0, 1.0))],
        Preference: [Preference(id="p1", prompt="p\n", chosen="4", rejected="3")],
        Score: [Score(id="p1", label=4, p=(0.1, 0.2, 0.3, 0.4), tier="Good", b_cum=0.5, violations=("H1",))],
    }
    for kind, entries in rows.items():
        write_rows(path, entries)
        assert read_rows(path, kind) == entries


def test_the_documented_row_reads(tmp_path):
    row = {
        "id": "p1", "query_id": "q1", "query": "red boots", "item_id": "i1", "item": {"title": "red boots", "price": 30},
        "label": 4, "family": "plain", "steps": None, "steps_source": "human", "negated": [], "chunk": None, "split": "dev",
    }  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row) + "\n\n")
    (pair,) = read_pairs(path)
    assert pair.item.price == 30.0
    assert pair.steps_source == "human"


def test_the_bare_minimum_reads(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"id": "a", "query_id": "q", "query": "x", "item_id": "i", "item": {"title": "t"}}\n')
    assert read_pairs(path) == [Pair(id="a", query_id="q", query="x", item_id="i", item=Item(title="t"))]


GOOD = {"id": "p", "query_id": "q", "query": "x", "item_id": "i", "item": {"title": "t"}}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (GOOD | {"lable": 4}, r"line 1, column 'lable': unknown key; did you mean 'label'"),
        (GOOD | {"item": {"title": "t", "colour": "red"}}, r"column 'item.colour': unknown key"),
        ({key: GOOD[key] for key in GOOD if key != "query"}, r"column 'query': this key is missing"),
        (GOOD | {"label": "4"}, r"column 'label', value '4': must be of type int"),
        (GOOD | {"label": True}, r"column 'label', value True: must be of type int"),
        (GOOD | {"negated": "lace"}, r"column 'negated', value 'lace': must be of type"),
        (GOOD | {"item": {"title": "t", "attributes": {"a": 1}}}, r"column 'item.attributes.a', value 1"),
        (GOOD | {"item": "boots"}, r"column 'item', value 'boots': must be an object"),
        (GOOD | {"label": 5}, r"line 1, pair 'p', column 'label', value 5: a label is 1, 2, 3 or 4"),
        (GOOD | {"family": "riddle"}, r"column 'family', value 'riddle': is one of plain"),
        (GOOD | {"split": "val"}, r"column 'split'"),
        (GOOD | {"query": ""}, r"column 'query', value '': must not be empty"),
        (GOOD | {"item": {"title": ""}}, r"column 'item.title'"),
        (GOOD | {"chunk": {"id": "c", "text": ""}}, r"column 'chunk.text'"),
        (GOOD | {"chunk": {"id": "c", "text": "t", "kind": "good"}}, r"column 'chunk.kind', value 'good'"),
        (GOOD | {"steps": {"category": "same"}}, r"column 'steps.category', value 'same'"),
        (GOOD | {"steps": {"attributes": {"colour": "yes"}}}, r"column 'steps.attributes.colour', value 'yes'"),
        (GOOD | {"label": 4, "steps": {"category": "mismatch"}}, r"the gold steps contradict label 4: they break H2"),
        (GOOD | {"label": 4, "steps": {"rule": "X99"}}, r"column 'steps.rule', value 'X99': no such rule"),
        (GOOD | {"label": 4, "steps": {"rule": "C01"}}, r"this rule gives label 1, the pair has 4"),
        ([1], r"line 1, value \[1\]: must be an object"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(tmp_path, row, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(DataError, match=message) as caught:
        read_pairs(path, deciding_labels={"C01": 1, "E01": 4})
    assert str(path) in str(caught.value)


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(DataError, match="not a JSON object in UTF-8"):
        read_pairs(path)
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD))
    with pytest.raises(DataError, match=r"pair 'p', column 'id', value 'p': a pair id occurs once"):
        read_pairs(path)
    with pytest.raises(ConfigError, match=r"files end in \.jsonl or \.parquet"):
        read_pairs(tmp_path / "pairs.csv")
    with pytest.raises(ConfigError, match="a Parquet file takes its columns from its rows"):
        write_rows(tmp_path / "a.parquet", [])
    with pytest.raises(DataError, match="must be an object"):
        from_json(Item, 3)


def test_a_query_or_item_lies_in_one_split():
    first = make_pair(4, id="a", query_id="q1")
    same_text = make_pair(4, id="b", query_id="q2", split="dev")
    with pytest.raises(DataError, match=r"column 'query', value 'red boots': is in the splits 'train' and 'dev'"):
        check_pairs([first, same_text])
    check_pairs([first, make_pair(4, id="c", query_id="q1")])


def test_what_is_missing_is_counted():
    pairs = [FULL, BARE, NO_STEPS, make_pair(None, id="p4")]
    assert count_missing(pairs) == {"label": 3, "category": 1, "attributes": 2, "rule": 2, "chunk": 3}
    assert check_missing(pairs, ("rule",)) == {"rule": 2}
    with pytest.raises(DataError, match=r"3 of 4 pairs lack 'chunk', more than the share 0.5; give them"):
        check_missing(pairs, ("category", "chunk"))
    assert check_missing(pairs, ("chunk",), max_missing=0.75) == {"chunk": 3}
    with pytest.raises(DataError, match="no pair to train on"):
        check_missing([], ())


def test_gold_steps_that_break_no_rule_pass():
    check_pair(FULL, deciding_labels={"E01": 4})
    check_pair(make_pair(None, category="mismatch"))
