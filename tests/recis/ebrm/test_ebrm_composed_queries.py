"""Composed queries, slips of spelling, and the rows that a query's text gives."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recis.ebrm import EntitySchema, Item, TypeConfig
from recis.ebrm.composed_queries import ComposeConfig, compose_queries
from recis.ebrm.entities import type_of
from recis.ebrm.labels_from_logs import MAX_FREE, MAX_OTHERS, free_rows, thinned
from recis.ebrm.log_rows import Mentions, rows_from_logs, text_rows
from recis.ebrm.slips import Slips, is_one_slip
from recis.ebrm.synthetic import SyntheticConfig, make_data
from recis.ebrm.synthetic_words import with_typo
from recis.errors import ConfigError

SCHEMA = EntitySchema(
    types=(
        TypeConfig(name="category", hard=True, synonyms={"skillet": "frying pan"}),
        TypeConfig(name="brand", hard=True),
        TypeConfig(name="colour", synonyms={"schwarz": "black"}),
    )
)


def item(id: str, **values: str) -> Item:
    return Item(
        id=id,
        entities=tuple(SCHEMA.entity(kind, value) for kind, value in values.items()),
        title=" ".join(values.values()),
    )


ITEMS = (
    item("a", category="frying pan", brand="smegar", colour="black"),
    item("b", category="kettle", brand="lagostina", colour="red"),
    item("c", category="kettle", brand="smegar", colour="white"),
    Item(id="d"),
)


def test_composed_queries_name_what_they_say():
    config = ComposeConfig(num_queries=60, typo_share=0.0)
    queries = compose_queries(ITEMS, SCHEMA, config)
    assert queries == compose_queries(ITEMS, SCHEMA, config) != compose_queries(ITEMS, SCHEMA, replace(config, seed=1))
    assert len(queries) == 60
    mentions = Mentions(SCHEMA, ITEMS)
    for query in queries:
        assert {kind: set(ids) for kind, ids in mentions.read(query.text).items()} == {
            kind: set(ids) for kind, ids in query.named.items()
        }
    alone = {query.text for query in queries[:9]}  # every spelling of every value comes alone, once
    assert alone == {"frying pan", "skillet", "kettle", "smegar", "lagostina", "black", "schwarz", "red", "white"}
    assert any(" or " in query.text for query in queries)
    assert not any(
        " or " in query.text and len(query.named["brand"]) > 1 for query in queries if "brand" in query.named
    )
    assert compose_queries(ITEMS[3:], SCHEMA, config) == []
    assert len(compose_queries(ITEMS, SCHEMA, replace(config, num_queries=4))) == 4
    with pytest.raises(ConfigError, match="typo_share must lie in"):
        ComposeConfig(typo_share=1.5)


def test_free_types_give_weak_positives_of_real_values():
    rows = free_rows("skillet", {"category"}, ["category:kettle", "brand:smegar", "brand:none", "colour:red"])
    assert [(row.entity, row.y, row.w) for row in rows] == [("brand:smegar", 1.0, 0.5), ("colour:red", 1.0, 0.5)]


def test_a_text_gives_every_kind_of_row_once():
    named = {"category": ("category:frying pan",)}
    candidates = ["category:kettle", "brand:smegar", "colour:red"]
    rows = text_rows("skillet", named, candidates, SCHEMA, {"category": 0.25})
    assert {(row.entity, row.y, row.w) for row in rows} == {
        ("category:frying pan", 1.0, 1.0),
        ("category:kettle", 0.0, 1.0),
        ("brand:smegar", 1.0, 0.5),
        ("colour:red", 1.0, 0.5),
        ("category:none", 0.25, 1.0),
        ("brand:none", 1.0, 0.5),
        ("colour:none", 1.0, 0.5),
    }


def test_a_type_that_is_always_meant_is_never_free():
    """ "smegar" names no category and wants one: neither every category nor an item without one will do."""
    candidates = ["category:kettle", "brand:smegar", "colour:red"]
    rows = text_rows("smegar", {"brand": ("brand:smegar",)}, candidates, SCHEMA, {"category": 0.25}, ("category",))
    assert {(row.entity, row.y, row.w) for row in rows} == {
        ("brand:smegar", 1.0, 1.0),
        ("colour:red", 1.0, 0.5),
        ("category:none", 0.25, 1.0),
        ("colour:none", 1.0, 0.5),
    }


def test_few_others_of_each_type_are_kept():
    candidates = [f"brand:{n}" for n in range(20)] + [f"colour:{n}" for n in range(20)]
    kept = thinned(candidates, {"brand": ["brand:7", "brand:8"]}, random.Random(0))
    assert {"brand:7", "brand:8"} <= set(kept)
    assert sum(type_of(entity) == "brand" for entity in kept) == 2 + MAX_OTHERS
    assert sum(type_of(entity) == "colour" for entity in kept) == MAX_FREE
    assert len(set(kept)) == len(kept)


WORDS = ("kettle", "backpack", "duvet", "smegar")


@pytest.mark.parametrize(
    ("word", "want"),
    [
        ("ketle", "kettle"),  # left out; swapped; doubled; changed
        ("kettel", "kettle"),
        ("kettlle", "kettle"),
        ("kettla", "kettle"),
        ("kettle", "kettle"),
        ("ketel", "ketel"),  # two slips
        ("metal", "metal"),
        ("ik16200", "ik16200"),  # codes are never corrected
        ("duve", "duve"),  # four letters
        ("smegars", "smegar"),
    ],
)
def test_slips(word, want):
    assert Slips(WORDS).corrected(word) == want


def test_what_is_known_or_close_to_two_stays():
    assert Slips(WORDS, known={"kettel"}).corrected("kettel") == "kettel"
    assert Slips(("brands", "brandy")).corrected("brandx") == "brandx"


@given(st.text("abcd", max_size=7), st.integers(0, 8), st.sampled_from("abcd"))
def test_one_slip_is_found_from_both_sides(word, at, letter):
    at = min(at, len(word))
    for other in (word[:at] + letter + word[at:], word[:at] + letter + word[at + 1 :]):
        assert is_one_slip(word, other) == is_one_slip(other, word) == (word != other)
    assert not is_one_slip(word, word + "ab")
    assert not is_one_slip(word, word)


def test_mentions_read_through_slips():
    mentions = Mentions(SCHEMA, ITEMS)
    rng = random.Random(0)
    assert mentions.read("smegra schwarz skilet") == {
        "brand": ("brand:smegar",),
        "colour": ("colour:black",),
        "category": ("category:frying pan",),
    }
    assert mentions.values("red ketttle") == {"colour": ("red",), "category": ("kettle",)}
    assert sum("brand" in mentions.read(with_typo("lagostina", rng)) for _ in range(50)) == 50


def test_stage_a_rows_of_a_generated_catalogue_agree_with_gold():
    """What text and clicks say of the made-up queries is right almost always; the composed ones are right by making."""
    from recis.ebrm.datasets import synthetic_set

    made = make_data(SyntheticConfig(num_items=200, num_queries=120, num_impressions=20_000, num_candidates=20))
    data = synthetic_set(made)
    places = {query.text: place for place, query in enumerate(made.queries)}
    entities = {e.id: e for item in made.items for e in item.entities}
    hits = {True: [], False: []}
    for row in data.qe_rows:
        if row.query in places and row.entity in entities:
            free = type_of(row.entity) not in made.queries[places[row.query]].constraints
            hits[free].append(made.gold_qe(places[row.query], entities[row.entity]) == (row.y > 0.5))
    assert min(map(len, hits.values())) > 500
    assert min(sum(own) / len(own) for own in hits.values()) > 0.97
    without = rows_from_logs(data.train, data.schema, composed=None)
    assert {row.query for row in without} < {row.query for row in data.qe_rows}
