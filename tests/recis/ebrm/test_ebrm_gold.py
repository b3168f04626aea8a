"""Verdict thresholds: fitted on gold by hand, kept with the model, and used by verdicts."""

import numpy as np
import pytest

from recis.ebrm import EBRM, EBRMConfig, EntitySchema, Item, QEScorer, TypeConfig, explain, verdicts
from recis.ebrm.calibrate import VerdictThresholds, fit_verdict_thresholds
from recis.ebrm.datasets import synthetic_gold, synthetic_pairs, synthetic_set
from recis.ebrm.gold import QueryGold, fit_thresholds, slot_truths
from recis.ebrm.pairs import QIPairs
from recis.ebrm.synthetic import SyntheticConfig, make_data
from recis.errors import DataError

SCHEMA = EntitySchema(
    types=(TypeConfig(name="category", hard=True), TypeConfig(name="colour"), TypeConfig(name="size"))
)
QUERY = "black fridge"
TRUTHS = {  # an unsure model: all its colours lie below the default cut of 0.5
    "category:fridge": 0.7,
    "category:freezer": 0.45,
    "category:sofa": 0.1,
    "category:none": 0.2,
    "colour:black": 0.4,
    "colour:anthracite": 0.3,
    "colour:red": 0.1,
    "colour:white": 0.06,
    "colour:none": 0.6,
    "size:60cm": 0.9,
    "size:none": 0.8,
}
ACCEPTED = {"category:fridge", "colour:black", "colour:anthracite"}
GOLD = [QueryGold(frozenset({"category", "colour"}), lambda e: e.id in ACCEPTED or e.type == "size")]


def item(id: str, category: str, *values: str) -> Item:
    return Item(id=id, entities=tuple(SCHEMA.entity(*text.split(":")) for text in (f"category:{category}", *values)))


ITEMS = (
    item("a", "fridge", "colour:black", "size:60cm"),
    item("b", "fridge", "colour:anthracite"),
    item("c", "fridge", "colour:red"),
    item("d", "freezer", "colour:white"),
    item("e", "sofa"),
)


def model_of() -> EBRM:
    table = {(QUERY, entity): float(np.log(s / (1 - s))) for entity, s in TRUTHS.items()}
    return EBRM(EBRMConfig(schema=SCHEMA), QEScorer.table(table))


def pairs_of() -> QIPairs:
    rows = np.arange(len(ITEMS))
    return QIPairs(queries=(QUERY,), items=ITEMS, query=rows * 0, item=rows, label=(rows < 2).astype(np.float32))


def test_truths_stand_beside_gold():
    truths = slot_truths(model_of(), pairs_of(), GOLD)
    told = sorted(zip(truths.type.tolist(), truths.g.round(3).tolist(), truths.met.tolist(), strict=True))
    assert told == [
        ("category", 0.1, False),
        ("category", 0.45, False),
        ("category", 0.7, True),
        ("category", 0.7, True),
        ("category", 0.7, True),
        ("colour", 0.06, False),
        ("colour", 0.1, False),
        ("colour", 0.3, True),
        ("colour", 0.4, True),
    ]  # sizes are not asked for, and the sofa states no colour
    nones = zip(truths.s_none.round(2).tolist(), truths.is_free.tolist(), strict=True)
    assert sorted(nones) == [(0.6, False), (0.8, True)]
    with pytest.raises(DataError, match="got 0 for 1 queries"):
        slot_truths(model_of(), pairs_of(), [])


def test_cuts_lie_between_the_gold_classes_and_verdicts_use_them(tmp_path):
    model = model_of()
    unfitted = verdicts(explain(model, QUERY, ITEMS[1]))
    assert unfitted == ("match", {})  # the none colour has 0.6: by default nobody asks for a colour
    cuts = fit_thresholds(model, pairs_of(), GOLD)
    # colours: between red's .1 and anthracite's .3; categories: between .45 and .7; none: between .6 and .8
    assert (cuts.ok, cuts.match, cuts.constrained) == pytest.approx((0.2, 0.575, 0.7), abs=1e-3)
    assert cuts.near == pytest.approx(0.575, abs=1e-3)  # the met categories' 5 % quantile is .7: at most match
    model.save(tmp_path)
    loaded = EBRM.load(tmp_path)
    assert loaded.thresholds == cuts
    told = [verdicts(explain(loaded, QUERY, own)) for own in ITEMS]
    assert told == [
        ("match", {"colour": "ok"}),
        ("match", {"colour": "ok"}),
        ("match", {"colour": "miss"}),
        ("mismatch", {"colour": "miss"}),
        ("mismatch", {"colour": "unknown"}),
    ]


def test_near_lets_one_met_category_in_twenty_go():
    g = np.linspace(0.05, 1.0, 20)  # of met categories
    far = np.array([0.01, 0.3, 0.6])
    cuts = fit_verdict_thresholds(
        g=np.zeros(0),
        met=np.zeros(0),
        category_g=np.append(g, far),
        category_met=np.append(np.ones(20), np.zeros(3)),
        s_none=np.zeros(0),
        is_free=np.zeros(0),
    )
    assert cuts.near == pytest.approx(0.05)  # the lowest of twenty
    assert cuts.near <= cuts.match
    assert (cuts.ok, cuts.constrained) == (0.5, 0.5)  # nothing to fit on: the defaults


def test_one_class_keeps_the_default():
    same = np.array([0.3, 0.4])
    cuts = fit_verdict_thresholds(
        g=same, met=np.ones(2), category_g=same, category_met=np.zeros(2), s_none=same, is_free=np.ones(2)
    )
    assert cuts == VerdictThresholds()


def test_gold_of_the_generated_catalogue_separates_a_model_that_knows_it():
    data = make_data(SyntheticConfig(num_items=60, num_queries=40, num_impressions=500, num_candidates=10, seed=3))
    entities = {e.id: e for own in data.items for e in own.entities}
    entities |= {data.schema.none(name).id: data.schema.none(name) for name in data.schema.names}
    logits = {
        (query.text, name): 1.0 if data.gold_qe(place, entity) else -1.0
        for place, query in enumerate(data.queries)
        for name, entity in entities.items()
    }
    model = EBRM(EBRMConfig(schema=data.schema), QEScorer.table(logits, default=0.0))
    pairs = synthetic_pairs(data, "dev")
    truths = slot_truths(model, pairs, synthetic_gold(data))
    assert truths.met.any()
    assert not truths.met.all()
    # two colours of -1 each make g = 1 - .731^2 = .466 < sigmoid(1) = .731: the cut lies between
    assert 0.466 <= fit_thresholds(model, pairs, synthetic_gold(data)).ok <= 0.731
    assert synthetic_set(data).dev_gold is not None
