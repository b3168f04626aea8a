"""Comparators of codes and numbers: outcomes by hand, and their learned logits."""

from typing import Any

import pytest
import torch

from recis.ebrm import EntitySchema, TypeConfig
from recis.ebrm.comparators import (
    DIFFERENT,
    EQUAL,
    ITEM_SILENT,
    QUERY_SILENT,
    START_LOGITS,
    Comparators,
    code_match,
    number_match,
    query_facts,
)
from recis.ebrm.config import EBRMConfig, ebrm_fast, ebrm_full, with_comparators
from recis.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("query", "value", "outcome"),
    [
        ("bosch kgn34vb35g fridge", "kgn34vb35g", EQUAL),
        ("bosch kgn34vb35 fridge", "kgn34vb35g", EQUAL),  # country suffix
        ("bosch kgn34v", "kgn34vb35g", DIFFERENT),
        ("liebherr ik 1620", "ik1620", EQUAL),
        ("samsung galaxy j7 pro", "galaxy j7 pro", EQUAL),
        ("samsung galaxy j7 pro", "galaxy s8", DIFFERENT),
        ("apple iphone 8 64gb", "iphone 8", EQUAL),
        ("apple iphone 8 64gb", "iphone 7", DIFFERENT),
        ("black smeg fridge", "fab5rbl", QUERY_SILENT),
        ("black smeg fridge", "none", QUERY_SILENT),
        ("smeg fab5rbl", "none", ITEM_SILENT),
        ("samsung tv 55 inch 4k 1080p", "ue55mu6400", QUERY_SILENT),  # sizes and resolutions are no codes
        ("ab12 fridge", "ab12ee", DIFFERENT),  # too short to differ in a suffix
    ],
)
def test_codes(query, value, outcome):
    assert code_match(query_facts(query), value) == outcome


@pytest.mark.parametrize(
    ("query", "value", "outcome"),
    [
        ("intel 3.6ghz processor", "3.6ghz", EQUAL),
        ("intel 3.6 ghz processor", "3.65ghz", EQUAL),  # within 2 percent
        ("intel 3.6ghz processor", "3.8ghz", DIFFERENT),
        ("iphone 1 tb", "1024gb", EQUAL),
        ("iphone 64gb", "none", ITEM_SILENT),
        ("55 inch tv", "none", QUERY_SILENT),
        ("55 inch tv", "64gb", QUERY_SILENT),
        ("iphone 64gb", "large", ITEM_SILENT),  # a value that is no number says nothing
    ],
)
def test_numbers(query, value, outcome):
    assert number_match(query_facts(query), value, ("gb",)) == outcome


def test_logits_are_learned_per_type():
    comparators = Comparators(ebrm_fast())
    assert comparators.names == ("model", "capacity", "size", "speed")
    pairs = [("fridge ik1620", "model:ik1620"), ("fridge ik1620", "model:none"), ("55 inch tv", "size:40inch")]
    logits = comparators(pairs)
    assert logits.tolist() == [START_LOGITS[EQUAL], START_LOGITS[ITEM_SILENT], START_LOGITS[DIFFERENT]]
    logits.sum().backward()
    assert comparators.logits.grad is not None
    want = torch.zeros(4, 4)
    want[0, EQUAL] = want[0, ITEM_SILENT] = want[2, DIFFERENT] = 1
    assert torch.equal(comparators.logits.grad, want)
    assert Comparators(ebrm_full())([]).shape == (0,)


def test_config_round_trips_and_refuses():
    config = EBRMConfig(schema=ebrm_fast(), logic="goedel", encode_timeout_ms=50)
    assert EBRMConfig.from_json(config.to_json()) == config
    options: dict[str, Any]
    for options, message in (
        ({"encode_timeout_ms": 0}, "encode_timeout_ms must be above 0"),
        ({"retry_after_s": float("nan")}, "retry_after_s must be at least 0"),
        ({"max_delta_pairs": 0}, "must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            EBRMConfig(schema=ebrm_full(), **options)
    with pytest.raises(DataError, match="unknown keys"):
        EBRMConfig.from_json({**config.to_json(), "depth": 3})
    with pytest.raises(ConfigError, match="a text needs"):
        with_comparators(EntitySchema(types=(TypeConfig(name="brand"),)), ("brand",))
