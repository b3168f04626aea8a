"""The model: item X of section 9, the cache in front of the scorer, confidence, overrides, errors, save and load."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recis.ebrm import EBRM, EBRMConfig, EntitySchema, Item, Override, QEScorer, TypeConfig
from recis.ebrm.cache import round_logits
from recis.ebrm.calibrate import NotCalibratedError
from recis.ebrm.config import with_comparators
from recis.ebrm.fallback import TypePriors, fit_affine_cosine
from recis.ebrm.segment import CacheVersionError
from recis.errors import ConfigError

SCHEMA = EntitySchema(
    types=(TypeConfig(name="category", hard=True), TypeConfig(name="brand", hard=True), TypeConfig(name="colour"))
)
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


def entity(name: str, **options):
    kind, value = name.split(":")
    return SCHEMA.entity(kind, value, **options)


def item_of(*names: str, id: str = "x") -> Item:
    return Item(id=id, entities=tuple(map(entity, names)))


ITEM_X = item_of(*list(TRUTHS)[:5])


def table(truths=TRUTHS, queries: Sequence[str] = (QUERY, "shoes")) -> dict[tuple[str, str], float]:
    return {(query, name): float(np.log(s / (1 - s))) for query in queries for name, s in truths.items()}


def model_of(scorer=None, **options) -> EBRM:
    return EBRM(EBRMConfig(schema=SCHEMA, **options), scorer or QEScorer.table(table()))


class Broken(QEScorer):
    """A scorer that fails on some entities, gives odd logits for others, and counts what it is asked."""

    def __init__(self, fails=(), odd=None) -> None:
        super().__init__()
        self.fails, self.odd, self.asked = set(fails), dict(odd or {}), []

    def forward(self, pairs):
        if any(name in self.fails for _, name in pairs):
            raise RuntimeError("out of memory")
        self.asked += pairs
        return torch.tensor([self.odd.get(name, 1.0) for _, name in pairs])


class Slow(Broken):
    """Takes its time: moves the clock of the test."""

    def __init__(self, clock: list[float]) -> None:
        super().__init__()
        self.clock = clock

    def forward(self, pairs):
        self.clock[0] += 1.0
        return super().forward(pairs)


@pytest.mark.parametrize(
    ("logic", "g", "r"),
    [
        ("product", [0.97, 0.95, 0.68], 0.62662),
        ("goedel", [0.9, 0.95, 0.6], 0.6),
        ("lukasiewicz", [1.0, 0.95, 0.8], 0.75),
    ],
)
def test_item_x(logic, g, r):
    """Cached logits are rounded to fp16, which is 3 decimals of s at worst."""
    scores = model_of(logic=logic).score("  Nike running SHOES", [ITEM_X])
    assert np.exp(scores.log_g[0]) == pytest.approx(g, abs=5e-4)
    assert scores.r[0] == pytest.approx(r, abs=5e-4)
    assert (scores.query, scores.item_ids, scores.types) == (QUERY, ("x",), SCHEMA.names)


def test_the_encoder_is_called_once_per_distinct_uncached_pair():
    scorer = QEScorer.table(table())
    model = model_of(scorer)
    other = item_of("brand:nike", "colour:red", id="y")
    first = model.score(QUERY, [ITEM_X, other])
    assert first.encoder_calls == scorer.calls == 6  # five of X, category:none of y
    again = model.score(QUERY, [other, item_of(id="z")])
    assert again.encoder_calls == 2  # brand:none and colour:none of z
    both = model.score_many([("shoes", [ITEM_X]), ("shoes", [other]), (QUERY, [ITEM_X])])
    assert [scores.encoder_calls for scores in both] == [5, 1, 0]
    assert scorer.calls == model.counts.encoder_calls == 14
    assert model.score("shoes", [ITEM_X, other]).encoder_calls == 0


def test_cold_and_warm_and_batched_answers_are_equal_bits():
    items = [ITEM_X, item_of("brand:nike", id="y"), item_of(id="z")]
    model = model_of()
    cold, warm = model.score(QUERY, items), model.score(QUERY, items)
    packed = model.pack(items)
    packed_warm = model.score(QUERY, packed)
    picked = model.score(QUERY, packed.select(np.array([2, 0])))
    for name in ("r", "log_r", "log_g", "approximate"):
        assert getattr(cold, name).tobytes() == getattr(warm, name).tobytes() == getattr(packed_warm, name).tobytes()
        assert (getattr(picked, name) == getattr(cold, name)[[2, 0]]).all()
    assert picked.item_ids == ("z", "x")
    assert cold.approximate.tolist() == [False, False, True]  # z states nothing


def test_a_selection_equals_packing_it_anew():
    model = model_of()
    items = [
        Item(id="a", entities=(entity("brand:nike", conf=0.5),)),
        ITEM_X,
        Item(id="b", entities=(entity("colour:red"), entity("colour:black", conf=0.25))),
        item_of(id="c"),
    ]
    packed = model.pack(items)
    for places in ([], [1], [3, 0], [0, 1, 2, 3], [2, 2]):
        chosen = packed.select(np.array(places, np.int64))
        anew = model.pack([items[place] for place in places])
        scores = model.score(QUERY, chosen), model.score(QUERY, anew)
        assert scores[0].r.tolist() == scores[1].r.tolist()
        assert scores[0].item_ids == scores[1].item_ids
    assert packed.select(np.array([1])).distinct == tuple(
        name for name in packed.distinct if name in {e.id for e in ITEM_X.entities} or name.endswith(":none")
    )
    with pytest.raises(ValueError, match="places must be 0 to 3"):
        packed.select(np.array([4]))


def test_confidence_mixes_with_none():
    model = model_of()
    unsure = Item(id="u", entities=(*ITEM_X.entities[:2], entity("brand:nike", conf=0.25), *ITEM_X.entities[3:]))
    scores = model.score(QUERY, [unsure])
    s = {name: 1 / (1 + np.exp(-float(round_logits(np.array([z]))[0]))) for (_, name), z in table().items()}
    want = (1 - 0.1 * 0.3) * (0.25 * s["brand:nike"] + 0.75 * s["brand:none"]) * (1 - 0.8 * 0.4)
    assert scores.r[0] == pytest.approx(want, abs=1e-3)
    assert scores.r[0] < 0.3 * model.score(QUERY, [ITEM_X]).r[0] / 0.6


def test_forward_agrees_with_score_and_trains_both_scorers():
    schema = with_comparators(
        EntitySchema(types=(TypeConfig(name="brand"), TypeConfig(name="capacity", kind="number", units=("gb",)))),
        ("capacity",),
    )
    pairs = {("lg 64gb", "brand:lg"): 2.0, ("lg 64gb", "brand:none"): -1.0}
    model = EBRM(EBRMConfig(schema=schema), QEScorer.table(pairs))
    items = [
        Item(id="a", entities=(schema.entity("brand", "LG", conf=0.5), schema.entity("capacity", "64 GB"))),
        Item(id="b", entities=(schema.entity("brand", "lg"),)),
    ]
    out = model(["lg 64gb"] * 2, items)
    scores = model.score("LG 64gb", items)
    assert out.r.tolist() == pytest.approx(scores.r.tolist(), abs=1e-6)
    assert out.log_g.detach().numpy() == pytest.approx(scores.log_g.ravel(), abs=1e-6)
    assert scores.encoder_calls == 2  # capacity is compared
    out.log_r.sum().backward()
    assert model.comparators.logits.grad is not None
    assert (model.comparators.logits.grad != 0).tolist() == [[True, False, False, True]]
    assert model.qe_logits([]).shape == (0,)


def test_changed_weights_empty_the_cache(tmp_path):
    model = model_of()
    before = model.version
    model.score(QUERY, [ITEM_X])
    with torch.no_grad():
        model.pool.relaxation[2] = 0.5  # not part of s
    assert model.version == before
    assert model.score(QUERY, [ITEM_X]).encoder_calls == 0
    schema = with_comparators(EntitySchema(types=(TypeConfig(name="model", kind="code"),)), ("model",))
    compared = EBRM(EBRMConfig(schema=schema), QEScorer.table({}))
    items = [Item(id="a", entities=(schema.entity("model", "ik1620"),))]
    first = compared.score("liebherr ik 1620", items).r
    with torch.no_grad():
        compared.comparators.logits[0, 0] = -1.0
    assert compared.score("liebherr ik 1620", items).r < first
    compared.open_cache(tmp_path / "cache")
    compared.score("liebherr ik 1620", items)
    with torch.no_grad():
        compared.comparators.logits[0, 0] = 1.0
    with pytest.raises(CacheVersionError, match="open it with rebuild=True"):
        compared.score("liebherr ik 1620", items)


def test_a_failing_pair_is_isolated_flagged_and_not_asked_again(monkeypatch):
    scorer = Broken(fails={"colour:red"})
    model = model_of(scorer)
    model.fallback = TypePriors({"colour": -2.0})
    other = item_of("brand:nike", id="y")
    scores = model.score(QUERY, [ITEM_X, other])
    assert scores.approximate.tolist() == [True, False]
    assert scores.encoder_calls == len(scorer.asked) == 6
    assert model.counts.failed_pairs == 1
    s = 1 / (1 + np.exp([-1.0, 2.0]))  # 1 everywhere, the prior for red
    want = (1 - (1 - s[0]) ** 2) * s[0] * (1 - (1 - s[0]) * (1 - s[1]))
    assert scores.r[0] == pytest.approx(want, abs=1e-6)
    scorer.fails.clear()
    again = model.score(QUERY, [ITEM_X])
    assert (again.encoder_calls, again.approximate.tolist()) == (0, [True])  # a tombstone
    clock = model.cache._clock() + 31
    monkeypatch.setattr(model.cache, "_clock", lambda: clock)
    healed = model.score(QUERY, [ITEM_X])
    assert (healed.encoder_calls, healed.approximate.tolist()) == (1, [False])


def test_what_is_not_encoded_in_time_gets_a_stand_in_and_is_not_cached(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("recis.ebrm.model.time.monotonic", lambda: clock[0])
    scorer = Slow(clock)
    model = model_of(scorer, encode_timeout_ms=1500.0, encode_batch_pairs=2)
    scores = model.score(QUERY, [ITEM_X])
    assert scores.encoder_calls == 4  # two batches of one second
    assert model.counts.late_pairs == 1
    assert scores.approximate.tolist() == [True]
    assert model.cache.num_pairs == 4


def test_stand_ins_from_cosines():
    fallback = fit_affine_cosine(
        lambda query, names: np.array([0.5] * len(names)), np.array([0.0, 0.5, 1.0]), np.array([-2.0, 0.0, 2.0])
    )
    assert fallback(QUERY, ["brand:nike"]).tolist() == pytest.approx([0.0], abs=1e-6)
    assert fallback.slope == pytest.approx(4.0)
    with pytest.raises(ValueError, match="two different cosines"):
        fit_affine_cosine(fallback, np.array([1.0]), np.array([1.0]))


def test_odd_logits():
    model = model_of(Broken(odd={"brand:nike": torch.inf, "colour:red": -torch.inf}))
    scores = model.score(QUERY, [ITEM_X])
    assert model.counts.clamped_logits == 2
    assert np.isfinite(scores.log_r).all()
    assert sorted(set(model.cache.get_row(next(iter(model.cache._delta))).logits.tolist())) == [-12.0, 1.0, 12.0]
    broken = model_of(Broken(odd={"colour:red": torch.nan}))
    with pytest.raises(ValueError, match=r"query 'nike running shoes', entity 'colour:red' is NaN"):
        broken.score(QUERY, [ITEM_X])
    assert broken.cache.num_pairs == 0


def test_bad_requests():
    model = model_of()
    for query in ("", " \t "):
        with pytest.raises(ValueError, match="query must not be empty"):
            model.score(query, [ITEM_X])
    skipped, scored = model.score_many([(" ", [ITEM_X]), (QUERY, [ITEM_X])], on_empty="skip")
    assert skipped.is_empty_query
    assert (skipped.r.tolist(), skipped.log_g.shape, skipped.encoder_calls) == ([0.0], (1, 3), 0)
    assert not scored.is_empty_query
    with pytest.raises(ValueError, match="item 'x' comes twice with different entities"):
        model.score(QUERY, [ITEM_X, item_of("brand:nike")])
    assert model.score(QUERY, [ITEM_X, ITEM_X]).r.shape == (2,)
    odd = EntitySchema(types=(TypeConfig(name="taste"),)).entity("taste", "sweet")
    with pytest.raises(ValueError, match="unknown entity type 'taste'; declared are category, brand, colour"):
        model.score(QUERY, [Item(id="t", entities=(odd,))])
    dropped = model.score(QUERY, [Item(id="t", entities=(odd,))], on_unknown="drop")
    assert (dropped.approximate.tolist(), model.counts.dropped_entities) == ([True], 1)
    with pytest.raises(ValueError, match="pack them again"):
        model.score(QUERY, model_of().pack([ITEM_X]))
    assert model.score(QUERY, []).r.shape == (0,)
    with pytest.raises(ConfigError, match="no logit of query 'boots'"):
        model.score("boots", [ITEM_X])


def test_an_item_with_500_entities():
    scorer = QEScorer.table({}, default=-5.0)
    item = Item(id="big", entities=tuple(SCHEMA.entity("colour", f"c{n}") for n in range(500)))
    scores = model_of(scorer).score(QUERY, [item])
    assert np.exp(scores.log_g[0, 2]) == pytest.approx(1 - (1 - 1 / (1 + np.exp(5.0))) ** 500, abs=1e-5)
    assert scores.encoder_calls == 502


def test_probabilities_need_a_calibrator():
    model = model_of()
    with pytest.raises(NotCalibratedError, match="fit_calibrator"):
        model.score(QUERY, [ITEM_X]).p  # noqa: B018
    model.fit_calibrator(np.log([0.9, 0.8, 0.3, 0.1, 0.7, 0.2]), np.array([1, 1, 0, 0, 0, 1]))
    assert 0 < model.score(QUERY, [ITEM_X]).p[0] < 1


def add(model, **options):
    given: dict[str, Any] = {"op": "set", "owner": "merch", **options}
    return model.overrides.add(Override(**given))


def test_interventions_of_the_spec():
    model = model_of(QEScorer.table(table()))
    base = model.score(QUERY, [ITEM_X])
    rule = add(model, query_regex="^nike", entity="colour:red", value=1.0)
    red = model.score(QUERY, [ITEM_X])
    assert red.r[0] == pytest.approx(0.9215, abs=5e-4)
    assert red.overrides == (rule.id,)
    nike = add(model, entity="brand:nike", value=0.5)
    assert model.score(QUERY, [ITEM_X]).r[0] == pytest.approx(0.4850, abs=5e-4)  # not .6247: effects do not add
    add(model, query=QUERY, entity="colour:red", op="max", value=0.0)  # exact beats regex
    assert model.score(QUERY, [ITEM_X]).r[0] == pytest.approx(0.97 * 0.5 * 0.6, abs=5e-4)
    assert model.score("shoes", [ITEM_X]).overrides == (nike.id,)
    model.overrides.remove(nike.version, owner="merch")
    assert model.score("shoes", [ITEM_X]).r.tobytes() == base.r.tobytes()  # cached values stayed clean
    assert model.score("shoes", [item_of("brand:nike", id="y")]).overrides == ()


@pytest.mark.parametrize("logic", ["product", "goedel", "lukasiewicz"])
def test_overrides_of_types(logic):
    model = model_of(logic=logic)
    items = [ITEM_X, item_of("category:sneakers", "brand:nike", id="y")]
    base = model.score(QUERY, items)
    rule = add(model, type="colour", value=0.7, op="max")
    capped = model.score(QUERY, items)
    assert np.exp(capped.log_g[:, 2]) == pytest.approx(np.minimum(0.7, np.exp(base.log_g[:, 2])), abs=1e-6)
    assert (capped.log_g[:, :2] == base.log_g[:, :2]).all()
    assert capped.overrides == (rule.id,)
    red = add(model, entity="colour:red", value=0.0)  # entity beats type, in the slots that have it
    both = model.score(QUERY, items)
    black = np.exp(round_logits(np.array([table()[QUERY, "colour:black"]])))[0]
    assert np.exp(both.log_g[0, 2]) == pytest.approx(black / (1 + black), abs=1e-6)
    assert both.log_g[1, 2] == capped.log_g[1, 2]
    assert both.overrides == (rule.id, red.id)
    add(model, query=QUERY, type="colour", value=1.0)  # an exact query beats both
    assert np.exp(model.score(QUERY, items).log_g[:, 2]) == pytest.approx([1.0, 1.0])


def test_overrides_with_confidence():
    model = model_of()
    item = Item(id="u", entities=(entity("brand:nike", conf=0.25), entity("colour:red", conf=0.5)))
    add(model, entity="brand:nike", value=1.0)
    assert np.exp(model.score(QUERY, [item]).log_g[0, 1]) == pytest.approx(1.0)
    add(model, entity="colour:none", value=0.0)  # changes what red is mixed with
    assert np.exp(model.score(QUERY, [item]).log_g[0, 2]) == pytest.approx(0.5 * 0.2, abs=1e-4)
    add(model, type="colour", value=0.25)
    scores = model.score(QUERY, [item])
    assert np.exp(scores.log_g[0, 2]) == pytest.approx(0.25)
    assert scores.overrides == ("o1", "o2", "o3")


def test_save_and_load(tmp_path):
    model = model_of(logic="goedel")
    model.fallback = TypePriors({"colour": -1.5})
    with torch.no_grad():
        model.pool.relaxation[2] = 0.25
    model.fit_calibrator(np.log([0.9, 0.8, 0.3, 0.1]), np.array([1, 0, 1, 0]))
    add(model, entity="colour:red", value=0.5)
    model.save(tmp_path)
    loaded = EBRM.load(tmp_path)
    want, got = model.score(QUERY, [ITEM_X]), loaded.score(QUERY, [ITEM_X])
    assert (got.r.tolist(), got.p.tolist(), got.overrides) == (want.r.tolist(), want.p.tolist(), want.overrides)
    assert loaded.version == model.version
    assert loaded.fallback == model.fallback
    add(loaded, entity="colour:black", value=0.5)
    loaded.save(tmp_path)  # again: overrides stay
    loaded.open_cache(tmp_path / "cache")
    loaded.score(QUERY, [ITEM_X])
    loaded.cache.flush()
    last = EBRM.load(tmp_path)
    assert len(last.overrides) == 2
    assert last.score(QUERY, [ITEM_X]).encoder_calls == 0
    with pytest.raises(ConfigError, match="has overrides of its own"):
        model.save(tmp_path)
    assert not list(tmp_path.glob(".tmp-*"))


def test_damaged_and_missing_models(tmp_path):
    with pytest.raises(ConfigError, match="no EBRM model at"):
        EBRM.load(tmp_path / "nowhere")
    model_of().save(tmp_path)
    (tmp_path / "model" / "table.json").write_text('{"pairs": [], "default": 0.0}')
    with pytest.raises(ConfigError, match="is damaged: its weights are of version"):
        EBRM.load(tmp_path)
    (tmp_path / "model" / "weights.safetensors").write_bytes(b"12")
    with pytest.raises(ConfigError, match=r"weights.safetensors cannot be read"):
        EBRM.load(tmp_path)
    (tmp_path / "model" / "table.json").unlink()
    with pytest.raises(ConfigError, match="holds no scorer"):
        EBRM.load(tmp_path)


NAMES = [name for name in TRUTHS if not name.endswith(":none")]


@settings(max_examples=40, deadline=None)
@given(
    sets=st.lists(st.lists(st.sampled_from(NAMES), max_size=5), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_order_and_cache_change_nothing(sets, seed):
    items = [item_of(*names, id=str(place)) for place, names in enumerate(sets)]
    model = model_of()
    whole = model.score(QUERY, items)
    order = np.random.default_rng(seed).permutation(len(items))
    shuffled = [Item(id=items[place].id, entities=items[place].entities[::-1]) for place in order]
    again = model.score(QUERY, shuffled)
    fresh = copy.deepcopy(model_of()).score(QUERY, shuffled)
    assert again.r.tolist() == pytest.approx(whole.r[order].tolist(), abs=1e-6)
    assert again.r.tobytes() == fresh.r.tobytes()
    alone = [float(model.score(QUERY, [item]).r[0]) for item in items]
    assert alone == whole.r.tolist()
