"""The whole loop on the toy corpus, number by number."""

import pytest
import tagger_titles

from recis.tagger.distil import DistilConfig, Distilled, distil, rule_score
from recis.tagger.evaluate import score_spans
from recis.tagger.experts import NONE, TableExpert
from recis.tagger.io import save_rules
from recis.tagger.rules import Rule, RuleSet, RuleTagger, surface_rule
from recis.tagger.seeds import NoSeedsError, Seeds, find_seeds
from recis.tagger.text import tokenize

TOY = DistilConfig(
    max_span_tokens=2,
    max_ngram=1,
    kinds=("prev", "next"),
    min_support=2,
    precision_floor=0.6,
    top_k=3,
    top_k_step=0,
)
IDS = [str(number) for number in range(len(tagger_titles.TITLES))]


def toy_seeds() -> Seeds:
    return find_seeds(tagger_titles.toy_texts(), tagger_titles.ANSWERS, tagger_titles.toy_expert(), tagger_titles.TYPES)


def toy_distilled(seeds: tuple[Rule, ...] | None = None) -> Distilled:
    rules = toy_seeds().rules if seeds is None else seeds
    return distil(tagger_titles.toy_texts(), IDS, tagger_titles.TYPES, rules, TOY)


def scores(rules: RuleSet):
    texts = tagger_titles.toy_texts()
    tagger = RuleTagger(rules)
    return score_spans(
        tagger_titles.toy_gold(), [tagger.tag_text(text) for text in texts], [len(text.tokens) for text in texts]
    ).micro


def test_exactly_ten_phrases_become_seeds():
    assert len(tagger_titles.ANSWERS) == 21
    found = {name: {r.tests[0].value for r in toy_seeds().rules if r.type == name} for name in tagger_titles.TYPES}
    assert found == {
        "Brand": {"nike", "adidas", "puma"},
        "Product": {"running shoes", "hoodie", "jacket", "dress", "shoes"},
        "Color": {"red", "blue"},
    }


def test_four_phrases_fall_to_disagreement():
    rejected = toy_seeds().rejected
    assert rejected["disagreement"] == {"Product": 2, "Brand": 2}  # zara and cap; kids and asics
    assert rejected["none"] == {NONE: 7}


def test_seeds_label_25_spans_of_which_24_are_right():
    micro = scores(RuleSet(schema=tagger_titles.TYPES, rules=toy_seeds().rules))
    assert (micro.correct, micro.predicted, micro.gold) == (24, 25, 35)
    assert micro.precision == pytest.approx(0.96)
    assert micro.recall == pytest.approx(0.6857, abs=5e-5)
    assert micro.f1 == pytest.approx(0.80)


def test_the_one_error_of_the_seeds_is_shoes_in_shoes_rack():
    tagger = RuleTagger(RuleSet(schema=tagger_titles.TYPES, rules=toy_seeds().rules))
    assert [(span.start, span.end, span.type) for span in tagger.tag("shoes rack for home")] == [(0, 1, "Product")]


def test_first_distilled_rules_with_their_counts_and_scores():
    new = [rule for rule in toy_distilled().rules.rules if rule.round == 1]
    found = {
        (rule.type, tuple(sorted((test.kind, test.value) for test in rule.tests)), rule.length): rule for rule in new
    }
    one = ("Brand", (("next", "running"), ("prev", "<s>")), 1)
    two = ("Brand", (("next", "cap"), ("prev", "<s>")), 1)
    three = ("Product", (("next", "for"), ("prev", "zara")), 1)
    assert set(found) == {one, two, three}
    counts = {key: (rule.support, round(rule.support / rule.precision)) for key, rule in found.items()}
    assert counts == {one: (3, 4), two: (2, 2), three: (2, 2)}
    assert [round(rule_score(*counts[key]), 3) for key in (one, two, three)] == [1.189, 1.0, 1.0]


def test_after_a_round_asics_is_a_brand_and_the_next_round_ends():
    result = toy_distilled()
    micro = scores(result.rules)
    assert (micro.correct, micro.predicted, micro.gold) == (25, 26, 35)
    assert micro.precision == pytest.approx(0.9615, abs=5e-5)
    assert micro.recall == pytest.approx(0.7143, abs=5e-5)
    assert micro.f1 == pytest.approx(0.8197, abs=5e-5)
    new = [entry for entry in result.pool.entries if entry.round == 1]
    assert [(entry.text_id, entry.start, entry.end, entry.type) for entry in new] == [("10", 0, 1, "Brand")]
    assert result.stop == "no rule accepted"
    assert [(r.number, r.accepted, r.pool) for r in result.rounds] == [(0, 10, 25), (1, 3, 26), (2, 0, 26)]


@pytest.mark.parametrize(
    ("right", "matched", "score"), [(9, 10, 2.853), (4, 5, 1.6), (2, 2, 1.0), (1, 1, 0.0), (0, 3, 0.0)]
)
def test_support_beats_perfect_precision(right, matched, score):
    assert rule_score(right, matched) == pytest.approx(score, abs=5e-4)


def test_same_seed_gives_the_same_bytes_whatever_the_order_of_the_seeds(tmp_path):
    save_rules(toy_distilled().rules, tmp_path / "a.json")
    save_rules(toy_distilled(tuple(reversed(toy_seeds().rules))).rules, tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_a_human_rule_stays_as_it_was_written():
    human = surface_rule("Brand", "zara", source="human", precision=0.5, support=1, note="asked the buyer")
    result = toy_distilled((*toy_seeds().rules, human))
    assert human in result.rules.rules
    assert next(rule for rule in result.rules.rules if rule.rule_id == human.rule_id).note == "asked the buyer"


def test_distillation_refuses_equal_ids():
    texts = [tokenize("red shoes"), tokenize("blue shoes")]
    with pytest.raises(ValueError, match="each of 2 texts needs an id of its own; got 1"):
        distil(texts, ["a", "a"], tagger_titles.TYPES, toy_seeds().rules)


def test_disagreement_of_the_templates_yields_no_seed():
    expert = TableExpert({"nike": {"T1": "Brand", "T2": "Product"}, "hoodie": {"T1": "none", "T2": "none"}})
    with pytest.raises(NoSeedsError, match=r"disagreement: \{'Brand': 1\}; none: \{'none': 1\}"):
        find_seeds(tagger_titles.toy_texts(), ["nike", "hoodie"], expert, tagger_titles.TYPES)
