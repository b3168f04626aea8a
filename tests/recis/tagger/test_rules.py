"""The rule language, the index that applies it, and voting."""

import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recis.tagger.conditions import shape_of, span_conditions, type_conditions
from recis.tagger.io import load_rules, save_rules
from recis.tagger.rules import Condition, Rule, RuleFormatError, RuleSet, RuleTagger, pair_rule, surface_rule
from recis.tagger.text import from_words, tokenize
from recis.tagger.vote import majority

WORDS = ("red", "shoes", "running", "64gb", "nike1")
TYPES = ("a", "b")
DICTIONARIES = {"names": frozenset({"nike1", "red shoes"})}


def all_conditions(words):
    """Every condition that holds for some span of these words, and two that hold nowhere."""
    text = from_words(words)
    spans = [(start, end) for start in range(len(words)) for end in range(start + 1, min(len(words), start + 3) + 1)]
    found = {c for span in spans for c in span_conditions(text, *span, dictionaries=DICTIONARIES)}
    return sorted({*found, Condition("prev", "nowhere"), Condition("suffix", "zzzz")})


texts = st.lists(st.sampled_from(WORDS), max_size=6)
pairs = st.lists(st.sampled_from(all_conditions([*WORDS, *WORDS])), min_size=2, max_size=2, unique=True)
rules = st.lists(
    st.one_of(
        st.builds(
            lambda name, words: surface_rule(name, " ".join(words)),
            st.sampled_from(TYPES),
            texts.filter(bool).map(lambda w: w[:3]),
        ),
        st.builds(
            lambda name, pair, length: pair_rule(name, pair[0], pair[1], length),
            st.sampled_from(TYPES),
            pairs,
            st.integers(1, 3),
        ),
    ),
    max_size=12,
    unique_by=lambda rule: rule.rule_id,
)


def tagger_of(found) -> RuleTagger:
    return RuleTagger(RuleSet(schema=TYPES, rules=tuple(found), dictionaries=DICTIONARIES))


def matches_by_scan(text, found):
    """span -> rules, the obvious way: every rule against every span."""
    fired = {}
    for start in range(len(text.tokens)):
        for end in range(start + 1, len(text.tokens) + 1):
            held = set(span_conditions(text, start, end, dictionaries=DICTIONARIES))
            here = [rule for rule in found if rule.length == end - start and set(rule.tests) <= held]
            if here:
                fired[start, end] = tuple(sorted(here, key=lambda rule: rule.rule_id))
    return fired


@settings(max_examples=300, deadline=None)
@given(texts, rules)
def test_an_and_fires_if_and_only_if_both_conditions_hold(words, found):
    text = from_words(words)
    assert tagger_of(found).matches(text) == matches_by_scan(text, found)


@settings(max_examples=100, deadline=None)
@given(texts, rules, rules)
def test_adding_rules_never_loses_a_covered_span_before_voting(words, some, more):
    text = from_words(words)
    both = {rule.rule_id: rule for rule in (*some, *more)}
    assert set(tagger_of(some).matches(text)) <= set(tagger_of(both.values()).matches(text))


@settings(max_examples=100, deadline=None)
@given(texts, rules, st.integers(0, 99))
def test_labels_do_not_depend_on_the_order_of_the_rules(words, found, seed):
    shuffled = random.Random(seed).sample(found, len(found))
    assert tagger_of(found).tag_text(from_words(words)) == tagger_of(shuffled).tag_text(from_words(words))


@settings(max_examples=100, deadline=None)
@given(texts, rules)
def test_spans_never_overlap_and_come_from_left_to_right(words, found):
    spans = tagger_of(found).tag_text(from_words(words))
    assert all(before.end <= after.start for before, after in itertools.pairwise(spans))
    assert all(0 < span.conf <= 1 for span in spans)


@settings(max_examples=50, deadline=None)
@given(texts, rules)
def test_a_loaded_file_tags_as_the_saved_rules_did(tmp_path_factory, words, found):
    path = tmp_path_factory.mktemp("rules") / "rules.json"
    before = tagger_of(found)
    save_rules(before.rules, path)
    after = RuleTagger.load(path)
    assert after.rules == before.rules
    assert after.tag_text(from_words(words)) == before.tag_text(from_words(words))


@settings(max_examples=50, deadline=None)
@given(texts, texts, rules)
def test_what_is_remembered_of_earlier_texts_changes_nothing(words, others, found):
    text, fresh = from_words(words), tagger_of(found).tag_text(from_words(words))
    used = tagger_of(found)
    for seen in (others, words, others):
        used.tag_text(from_words(seen))
    assert used.tag_text(text) == fresh


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr("recis.tagger.match.KNOWN", 2)
    found = [pair_rule("a", Condition("prefix", "runn"), Condition("suffix", "ning"), 1), surface_rule("b", "red")]
    tagger = tagger_of(found)
    for _ in range(2):
        spans = tagger.tag("red running blue green running black")
        assert [(span.start, span.type) for span in spans] == [(0, "b"), (1, "a"), (4, "a")]
    (inside, votes) = tagger._index._plain._inside, tagger._index._plain._votes
    assert len(inside) <= 2
    assert len(votes) <= 2


@given(st.lists(st.sampled_from("abc"), max_size=8))
def test_a_tie_abstains(types):
    name, share = majority(types)
    counts = sorted((types.count(kind) for kind in set(types)), reverse=True)
    if not counts or counts[:2] == [counts[0]] * 2:
        assert name is None
    else:
        assert types.count(name) == counts[0]
        assert share == counts[0] / len(types)


def test_longest_first_then_larger_share_then_leftmost():
    found = [
        surface_rule("a", "running shoes"),
        surface_rule("b", "shoes"),
        surface_rule("a", "red"),
        surface_rule("b", "red running"),
        pair_rule("a", Condition("first", "red"), Condition("last", "running"), 2),
        pair_rule("b", Condition("prev", "<s>"), Condition("last", "running"), 2),
    ]
    spans = tagger_of(found).tag("red running shoes")
    # "red running" has two of three votes, "running shoes" all of one
    assert [(span.start, span.end, span.type, span.conf) for span in spans] == [(0, 1, "a", 1.0), (1, 3, "a", 1.0)]


def test_left_and_right_see_the_types_that_other_rules_gave():
    found = [
        surface_rule("a", "nike"),
        pair_rule("b", Condition("left", "a"), Condition("next", "for"), 1),
        pair_rule("b", Condition("right", "a"), Condition("prev", "<s>"), 1),
    ]
    spans = tagger_of(found).tag("red nike cap for men")
    assert [(span.start, span.type) for span in spans] == [(0, "b"), (1, "a"), (2, "b")]
    assert [span.start for span in tagger_of(found[1:]).tag("red nike cap for men")] == []


def test_spans_carry_characters_of_the_text():
    (span,) = tagger_of([surface_rule("a", "64 gb", precision=0.5)]).tag("iPhone  64GB")
    assert ("iPhone  64GB"[span.char_start : span.char_end], span.conf) == ("64GB", 0.5)


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_a_text_of_white_space_has_no_spans(text):
    tagger = tagger_of(
        [surface_rule("a", "red"), pair_rule("a", Condition("prev", "<s>"), Condition("next", "</s>"), 1)]
    )
    assert tagger.tag(text) == []
    assert tagger.tag_batch([text, "red"])[0] == []


def test_a_text_of_600_tokens_is_processed_in_full():
    assert tagger_of([surface_rule("a", "red")]).tag("x " * 599 + "red")[0].start == 599


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ((), "needs 1 to 3 conditions; got 0"),
        (tuple(Condition("prev", value) for value in "abcd"), "needs 1 to 3 conditions; got 4"),
        ((Condition("colour", "x"),), "condition kind 'colour' is not known"),
        ((Condition("prev", "x"),), "must be one surface condition, or two different ones and a length"),
        ((Condition("prev", "x"), Condition("next", "y")), "must be one surface condition"),
        (
            (Condition("prev", "x"), Condition("next", "y"), Condition("length", "9")),
            "length must be 1 to 5 tokens; got '9'",
        ),
        ((Condition("surface", ""),), "the value of surface is empty"),
    ],
)
def test_conditions_that_form_no_rule_are_refused_with_the_rule_id(conditions, message):
    with pytest.raises(ValueError, match=rf"rule [0-9a-f]{{12}}: .*{message}"):
        Rule(type="a", conditions=conditions)


@pytest.mark.parametrize("precision", [-0.1, 1.5, float("nan")])
def test_precision_outside_0_to_1_is_refused(precision):
    with pytest.raises(ValueError, match="precision must be in"):
        surface_rule("a", "red", precision=precision)


def test_a_rule_of_an_unknown_type_is_refused():
    with pytest.raises(ValueError, match=r"rule [0-9a-f]{12}: type 'c' is not in the schema"):
        tagger_of([surface_rule("c", "red")])


def test_equal_conditions_with_different_types_vote_and_tie():
    assert tagger_of([surface_rule("a", "red"), surface_rule("b", "red")]).tag("red") == []


def test_a_disabled_rule_does_not_fire():
    assert tagger_of([surface_rule("a", "red", enabled=False)]).tag("red") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2; this version reads format 1"),
        ({"tokenizer": "x-9"}, "tokenizer 'x-9'; this version has recis-tok-1"),
    ],
)
def test_a_file_of_another_version_is_refused_with_both_versions(tmp_path, change, message):
    content = {"format": 1, "schema": ["a"], "tokenizer": "recis-tok-1", "rules": [], **change}
    (tmp_path / "r.json").write_text(json.dumps(content))
    with pytest.raises(RuleFormatError, match=message):
        load_rules(tmp_path / "r.json")


def test_a_file_written_by_hand_needs_only_type_and_conditions(tmp_path):
    rule = {
        "type": "a",
        "conditions": [
            {"kind": "length", "value": 1},
            {"kind": "prev", "value": "<s>"},
            {"kind": "next", "value": "cap"},
        ],
    }
    (tmp_path / "r.json").write_text(
        json.dumps({"format": 1, "schema": ["a"], "tokenizer": "recis-tok-1", "rules": [rule]})
    )
    tagger = RuleTagger.load(tmp_path / "r.json")
    assert tagger.rules.rules[0].source == "human"
    assert [span.start for span in tagger.tag("nike cap")] == [0]


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "r.json").write_text('{"format": 1, "rules": [')
    with pytest.raises(ValueError, match=r"r\.json: is no JSON"):
        load_rules(tmp_path / "r.json")
    (tmp_path / "r.json").write_text(
        '{"format": 1, "tokenizer": "recis-tok-1", "schema": [], "rules": [{"type": "a"}]}'
    )
    with pytest.raises(ValueError, match="a field is missing"):
        load_rules(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("surface", "shape"),
    [("64", "digits:short"), ("1,000", "digits:medium"), ("red", "letters:short"), ("iphone12pro", "mixed:long")],
)
def test_shapes(surface, shape):
    assert shape_of(surface) == shape


def test_conditions_of_a_span_by_hand():
    found = span_conditions(tokenize("red running shoes"), 1, 2, max_ngram=2)
    assert {(c.kind, c.value) for c in found} == {
        ("surface", "running"),
        ("prefix", "runn"),
        ("prefix", "runni"),
        ("prefix", "runnin"),
        ("suffix", "ning"),
        ("suffix", "nning"),
        ("suffix", "unning"),
        ("shape", "letters:medium"),
        ("prev", "red"),
        ("prev", "<s> red"),
        ("next", "shoes"),
        ("next", "shoes </s>"),
        ("first", "running"),
        ("last", "running"),
    }
    assert type_conditions(1, 2, {1: "a"}, {2: "b"}) == [Condition("left", "a"), Condition("right", "b")]
