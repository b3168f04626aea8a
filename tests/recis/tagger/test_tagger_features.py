"""Tags as inputs of a ranker."""

import pytest
import torch

from recis.ebrm import EntitySchema, TypeConfig
from recis.errors import ConfigError
from recis.io.batch import Batch
from recis.jagged import KeyedJaggedTensor
from recis.tagger.features import TagFeatures
from recis.tagger.rules import RuleSet, RuleTagger, surface_rule

TYPES = ("brand", "colour")
RULES = [surface_rule("brand", "nike"), surface_rule("brand", "new balance")] + [
    surface_rule("colour", value) for value in ("red", "schwarz", "black")
]
TAGGER = RuleTagger(RuleSet(schema=TYPES, rules=tuple(RULES)))
QUERIES = TAGGER.tag_batch(["red nike shoes", "nike black", "shoes", "red red black cap"])
ITEMS = TAGGER.tag_batch(["Nike runner red", "new balance schwarz", "nike cap", "black cap"])


def batch_of(num_samples: int) -> Batch:
    return Batch(
        sparse=KeyedJaggedTensor.from_lists({"user": [[place] for place in range(num_samples)]}),
        dense=torch.arange(num_samples, dtype=torch.float32)[:, None],
        dense_keys=("price",),
        dense_widths=(1,),
        labels=torch.zeros(num_samples, 1),
        label_mask=None,
        label_weights=None,
        weights=torch.ones(num_samples),
        group_ids=None,
        extras={},
        num_samples=num_samples,
    )


def test_matches_and_conflicts_by_hand():
    features = TagFeatures(TYPES)
    assert features.dense_keys == ("tag_match_brand", "tag_match_colour", "tag_conflict_brand", "tag_conflict_colour")
    assert features.dense(QUERIES, ITEMS).tolist() == [[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]]
    with_synonyms = EntitySchema(
        types=(TypeConfig(name="brand"), TypeConfig(name="colour", synonyms={"schwarz": "black"}))
    )
    known = TagFeatures(TYPES, canonical=with_synonyms.canonical)
    assert known.dense(QUERIES, ITEMS)[1].tolist() == [0, 1, 1, 0]  # schwarz is black, the brands still differ


def test_ids_stand_for_type_and_value_on_either_side():
    ids = TagFeatures(TYPES).sparse(QUERIES, ITEMS)
    assert ids.keys == ("tag_query_brand", "tag_query_colour", "tag_item_brand", "tag_item_colour")
    assert ids["tag_query_brand"].lengths.tolist() == [1, 1, 0, 0]
    assert ids["tag_query_colour"].lengths.tolist() == [1, 1, 0, 2]  # red stands once though the query says it twice
    (nike,), (also_nike,), (), () = ids["tag_query_brand"].to_lists()
    (on_item,), (other,), (again,), () = ids["tag_item_brand"].to_lists()
    assert nike == also_nike == on_item == again != other
    assert min(ids.values.tolist()) >= 0
    as_colour = TagFeatures(("colour",)).sparse(TAGGER.tag_batch(["red"]), [[]]).values.tolist()
    renamed = RuleTagger(RuleSet(schema=("brand",), rules=(surface_rule("brand", "red"),)))
    assert as_colour != TagFeatures(("brand",)).sparse(renamed.tag_batch(["red"]), [[]]).values.tolist()


def test_a_batch_is_extended_behind_what_it_has():
    features = TagFeatures(TYPES)
    batch = features.extend(batch_of(4), QUERIES, ITEMS)
    assert batch.sparse.keys == ("user", *features.sparse_keys)
    assert batch.sparse["user"].to_lists() == [[0], [1], [2], [3]]
    assert batch.sparse["tag_item_colour"].lengths.tolist() == [1, 1, 0, 1]
    assert batch.dense_feature("price").flatten().tolist() == [0, 1, 2, 3]
    assert batch.dense_feature("tag_conflict_brand").flatten().tolist() == [0, 1, 0, 0]
    with pytest.raises(ConfigError, match=r"has features .* already"):
        features.extend(batch, QUERIES, ITEMS)
    with pytest.raises(ValueError, match="a batch of 3 samples needs as many queries; got 4"):
        features.extend(batch_of(3), QUERIES, ITEMS)


def test_an_empty_batch_has_the_features_too():
    batch = TagFeatures(TYPES).extend(batch_of(0), [], [])
    assert batch.sparse.keys == ("user", "tag_query_brand", "tag_query_colour", "tag_item_brand", "tag_item_colour")
    assert batch.dense.shape == (0, 5)


def test_pairs_and_types_are_checked():
    with pytest.raises(ValueError, match="got 4 queries and 1 items"):
        TagFeatures(TYPES).dense(QUERIES, ITEMS[:1])
    with pytest.raises(ValueError, match="each once"):
        TagFeatures(("brand", "brand"))
