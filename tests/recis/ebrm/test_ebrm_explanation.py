"""Explanations: slopes, identities and forced values of section 9, in agreement with the model; verdicts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recis.ebrm import EBRM, EBRMConfig, EntitySchema, Item, Override, QEScorer, TypeConfig, explain, verdicts
from recis.ebrm.calibrate import NotCalibratedError, VerdictThresholds
from recis.ebrm.explanation import LOGICS, Case, evaluate, forced, others_product, slopes_of
from recis.errors import ConfigError

SCHEMA = EntitySchema(types=(TypeConfig(name="category"), TypeConfig(name="brand"), TypeConfig(name="colour")))
TRUTHS = {
    "category:running shoes": 0.9,
    "category:sneakers": 0.7,
    "brand:nike": 0.95,
    "colour:red": 0.2,
    "colour:black": 0.6,
    "category:none": 0.05,
    "brand:none": 0.1,
    "colour:none": 0.8,
}
QUERY = "nike running shoes"
ITEM_X = Item(id="x", entities=tuple(SCHEMA.entity(*name.split(":")) for name in list(TRUTHS)[:5]))
X = [np.array([0.9, 0.7]), np.array([0.95]), np.array([0.2, 0.6])]


def case_of(logic="product", truths=X, relaxation=(1.0, 1.0, 1.0)) -> Case:
    slots = [slot.copy() for slot in truths]
    return Case(truths=slots, relaxation=list(relaxation), rules=[None] * len(slots), logic=LOGICS[logic])


def model_of(**options) -> EBRM:
    logits = {(QUERY, name): float(np.log(s / (1 - s))) for name, s in TRUTHS.items()}
    return EBRM(EBRMConfig(schema=SCHEMA, **options), QEScorer.table(logits))


def test_slopes_and_interventions_of_the_spec():
    r, g, _ = evaluate(case_of())
    assert (r, g) == (pytest.approx(0.62662, abs=1e-6), pytest.approx([0.97, 0.95, 0.68]))
    slopes = np.concatenate(slopes_of(case_of()))
    assert slopes.tolist() == pytest.approx([0.1938, 0.0646, 0.6596, 0.3686, 0.7372], abs=1e-6)
    assert forced(case_of(), 2, 0, 1.0) == pytest.approx(0.9215)
    for logic, black_gone in (("product", 0.1843), ("goedel", 0.2), ("lukasiewicz", 0.15)):
        assert forced(case_of(logic), 2, 1, 0.0) == pytest.approx(black_gone)
        assert forced(case_of(logic), 1, 0, 0.0) == 0.0
    for a, relaxed in ((1.0, 0.62662), (0.5, 0.77406), (0.0, 0.9215)):
        assert evaluate(case_of(relaxation=(1, 1, a)))[0] == pytest.approx(relaxed, abs=1e-6)


def test_effects_in_two_types_do_not_add():
    both = case_of(truths=[X[0], np.array([0.5]), np.array([1.0, 0.6])])
    assert evaluate(both)[0] == pytest.approx(0.4850)
    slopes = slopes_of(case_of())
    assert 0.62662 + 0.8 * slopes[2][0] + (0.5 - 0.95) * slopes[1][0] == pytest.approx(0.6247, abs=1e-4)


def test_products_of_the_others_need_no_division():
    assert others_product(np.array([0.0, 2.0, 3.0])).tolist() == [6.0, 0.0, 0.0]
    assert others_product(np.array([0.0, 2.0, 0.0])).tolist() == [0.0, 0.0, 0.0]
    assert others_product(np.array([5.0])).tolist() == [1.0]
    certain = case_of(truths=[np.array([1.0, 0.5]), np.array([0.0])], relaxation=(1.0, 1.0))
    assert [slope.tolist() for slope in slopes_of(certain)] == [[0.0, 0.0], [1.0]]


slots = st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=4), min_size=1, max_size=5)


@settings(max_examples=100, deadline=None)
@given(truths=slots, a=st.lists(st.floats(0, 1), min_size=5, max_size=5), v=st.floats(0, 1), where=st.integers(0, 999))
def test_identities(truths, a, v, where):
    """One override: r' = r + (v - s) dr/ds. Slopes of every logic are differences over small steps where they exist."""
    arrays = [np.array(slot) for slot in truths]
    case = case_of(truths=arrays, relaxation=a[: len(arrays)])
    r, _, h = evaluate(case)
    slopes = slopes_of(case)
    position = where % len(arrays)
    place = where % len(arrays[position])
    predicted = r + (v - arrays[position][place]) * slopes[position][place]
    assert forced(case, position, place, v) == pytest.approx(predicted, abs=1e-6)
    with np.errstate(divide="ignore"):
        assert np.log(r) == pytest.approx(np.log(h).sum(), abs=1e-6) or r == 0
    for logic in ("goedel", "lukasiewicz"):
        other = case._replace(logic=LOGICS[logic])
        s, step = arrays[position][place], 1e-7
        up, down = (forced(other, position, place, s + sign * step) for sign in (1, -1))
        now = evaluate(other)[0]
        left, right = (now - down) / step, (up - now) / step
        if abs(left - right) < 1e-5:  # no corner here
            assert slopes_of(other)[position][place] == pytest.approx(left, abs=1e-5)


@pytest.mark.parametrize("logic", list(LOGICS))
def test_explanations_agree_with_scores(logic):
    model = model_of(logic=logic)
    unsure = Item(id="u", entities=(*ITEM_X.entities[:3], SCHEMA.entity("colour", "red", conf=0.25)))
    bare = Item(id="b")
    steps = (
        {},
        {"entity": "colour:red", "value": 0.9},
        {"entity": "colour:none", "value": 0.3, "op": "max"},
        {"type": "brand", "value": 0.5, "op": "max"},
        {"type": "colour", "value": 0.75},
    )
    for options in steps:
        if options:
            model.overrides.add(Override(**{"op": "set", "owner": "o", **options}))
        for item in (ITEM_X, unsure, bare):
            scores, explanation = model.score(QUERY, [item]), explain(model, QUERY, item)
            assert explanation.r == pytest.approx(float(scores.r[0]), abs=1e-6)
            g = [truth.g for truth in explanation.types]
            assert g == pytest.approx(np.exp(scores.log_g[0].astype(np.float64)).tolist(), abs=1e-6)
            assert explanation.overrides == scores.overrides
            assert explanation.is_approximate == bool(scores.approximate[0])


def test_what_an_explanation_says():
    model = model_of()
    red = model.overrides.add(Override(entity="colour:red", op="set", value=1.0, owner="o"))
    explanation = explain(model, "Nike  running shoes", ITEM_X)
    colour, brand = explanation.type("colour"), explanation.type("brand")
    assert [(entity.id, entity.override) for entity in colour.entities] == [
        ("colour:red", red.id),
        ("colour:black", None),
    ]
    assert (colour.best, colour.override, colour.is_constrained) == ("colour:red", None, False)
    assert brand.is_constrained
    assert brand.s_none == pytest.approx(0.1, abs=1e-3)
    assert explanation.log_r == pytest.approx(sum(truth.log_h for truth in explanation.types), abs=1e-6)
    entity = colour.entities[0]
    assert (entity.s, entity.r_if_1) == (1.0, explanation.r)
    assert explanation.r + (0 - entity.s) * entity.slope == pytest.approx(entity.r_if_0, abs=1e-6)
    printed = str(explanation)
    assert "colour: g 1.0000" in printed
    assert red.id in printed
    with pytest.raises(NotCalibratedError):
        explanation.p  # noqa: B018
    model.fit_calibrator(np.log([0.9, 0.8, 0.3, 0.1]), np.array([1, 0, 1, 0]))
    assert explain(model, QUERY, ITEM_X).p == pytest.approx(float(model.score(QUERY, [ITEM_X]).p[0]), abs=1e-6)
    with pytest.raises(ValueError, match="query must not be empty"):
        explain(model, " ", ITEM_X)


def test_verdicts():
    model = model_of()
    assert verdicts(explain(model, QUERY, ITEM_X)) == ("match", {"brand": "ok"})
    assert verdicts(explain(model, QUERY, Item(id="b"))) == ("mismatch", {"brand": "unknown"})
    named = explain(model, QUERY, ITEM_X, query_types=("colour",))
    assert verdicts(named) == ("match", {"brand": "ok", "colour": "ok"})
    model.thresholds = VerdictThresholds(ok=0.7, match=0.99, near=0.9)
    strict = explain(model, QUERY, ITEM_X, query_types=("colour",))
    assert verdicts(strict) == ("near", {"brand": "ok", "colour": "miss"})
    no_category = model_of(category_type="leaf")
    assert verdicts(explain(no_category, QUERY, ITEM_X)).category is None


def test_what_only_doubtful_tags_say_is_unknown_and_no_miss():
    model = model_of()
    model.thresholds = VerdictThresholds(ok=0.7, match=0.99, near=0.9)

    def said(*colours, **floor):
        item = Item(id="x", entities=(SCHEMA.entity("brand", "nike"), *colours))
        return verdicts(explain(model, QUERY, item, query_types=("colour",)), **floor).attributes["colour"]

    doubtful = SCHEMA.entity("colour", "red", source="tagger", conf=0.6)
    assert said(doubtful) == "miss"
    assert said(doubtful, tagger_floor=0.9) == "unknown"
    assert said(doubtful, tagger_floor=0.6) == "miss"  # at the floor it counts
    assert said(SCHEMA.entity("colour", "red", conf=0.6), tagger_floor=0.9) == "miss"  # the catalogue is believed
    sure = SCHEMA.entity("colour", "black", source="tagger", conf=0.95)
    assert said(doubtful, sure, tagger_floor=0.9) == said(doubtful, sure) == "ok"  # one sure value is enough


@pytest.mark.parametrize(
    "trial",
    [
        Override(query=QUERY, entity="colour:Red", op="set", value=1, owner="o"),
        Override(query_regex="^nike", entity="colour:none", op="max", value=0.1, owner="o"),
        Override(entity="brand:nike", op="min", value=1, owner="o"),  # of lower rank than the rule in force
        Override(query=QUERY, type="colour", op="max", value=0.25, owner="o"),
    ],
)
def test_a_trial_shows_what_adding_the_override_would_do_and_keeps_nothing(trial):
    model, item = model_of(), Item(id="y", entities=(*ITEM_X.entities[:4], SCHEMA.entity("colour", "black", conf=0.5)))
    model.overrides.add(Override(query=QUERY, entity="brand:nike", op="set", value=0.7, owner="o"))
    before = explain(model, QUERY, item)
    tried = explain(model, QUERY, item, trial=trial)
    assert explain(model, QUERY, item) == before
    assert len(model.overrides) == model.overrides.version == 1
    model.overrides.add(trial)
    added = explain(model, QUERY, item)
    assert (tried.r, tried.types) == (added.r, added.types)
    assert model.score(QUERY, [item]).r[0] == pytest.approx(tried.r, abs=1e-6)
    changes = trial.entity != "brand:nike"
    assert (tried.r != before.r) is changes


def test_a_trial_of_an_undeclared_type_is_refused():
    with pytest.raises(ConfigError, match="unknown entity type 'taste'"):
        explain(model_of(), QUERY, ITEM_X, trial=Override(entity="taste:sweet", op="set", value=1, owner="o"))
