"""The strict parser: every fault by hand, the inverse of render, any text, linear time."""

import inspect
import re

import pytest
from graded_pairs import COMPACT, answer, make_pair
from hypothesis import given, settings
from hypothesis import strategies as st

from recis.errors import ConfigError
from relevance import grammar
from relevance.grammar import FAULTS, parse
from relevance.labels import (
    CONTEXT_DECISIONS,
    PROFILES,
    TAGS,
    AttributeVerdict,
    Fields,
    Label,
    Profile,
    find_profile,
    render,
    violations,
)

GOOD = "3<category>near</category><attribute>colour=red:ok</attribute><rule>S01</rule><verdict>3</verdict>"
LABEL_ONLY, DYKNOW, THINK = PROFILES["label_only"], PROFILES["dyknow"], PROFILES["think_first"]


def kinds(text, profile=COMPACT, **options):
    return [fault.kind for fault in parse(text, profile, **options).errors]


def test_by_hand():
    parsed = parse(GOOD, COMPACT)
    assert parsed.ok
    assert parsed.label == 3
    assert parsed.fields == Fields(
        category="near",
        attribute=(AttributeVerdict(name="colour", value="red", verdict="ok"),),
        rule="S01",
        verdict=3,
    )
    assert GOOD[slice(*parsed.spans["rule"])] == "<rule>S01</rule>"
    assert list(parsed.spans) == list(COMPACT.tags)


@pytest.mark.parametrize("text", ["", None, 4, b"4", 4.0, ["4"]])
def test_nothing_to_read_is_empty(text):
    assert parse(text, COMPACT).errors[0].kind == "empty"
    assert kinds(text) == ["empty"]


@pytest.mark.parametrize("text", [" 4", "\n4", "Label: 4", "５", "４", "0", "5", "9", "a", "<category>", "²"])
def test_no_label(text):
    parsed = parse(text, LABEL_ONLY)
    assert parsed.label is None
    assert parsed.errors[0].kind == "no_label"


@pytest.mark.parametrize("text", ["42<category>", "4.5", "4,", "44", "4a", "4/4", "4-"])
def test_label_run_on(text):
    parsed = parse(text, LABEL_ONLY)
    assert parsed.label is None
    assert parsed.errors[0].kind == "label_run_on"
    assert parsed.errors[0].at == 1


def swap(old, new):
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (swap("<rule>S01</rule>", ""), ["missing_tag"]),
        (swap("<verdict>", "<query>q</query><verdict>"), ["extra_tag"]),
        (swap("<verdict>", "<foo>q</foo><verdict>"), ["unknown_tag"]),
        (swap("<verdict>", "<foo><verdict>"), ["unknown_tag"]),
        (swap("<verdict>", "</foo><verdict>"), ["unknown_tag"]),
        (swap("<verdict>", "<rule>S01</rule><verdict>"), ["duplicate_tag"]),
        (swap("<rule>S01</rule><verdict>3</verdict>", "<verdict>3</verdict><rule>S01</rule>"), ["out_of_order"]),
        (swap("</verdict>", ""), ["unclosed"]),
        (swap("S01", "<verdict>S01"), ["nested"]),
        (swap(">S01<", "><b>S01</b><"), ["nested"]),
        (swap("near", "Near"), ["bad_category"]),
        (swap("near", " near"), ["bad_category"]),
        (swap("near", ""), ["bad_category"]),
        (swap("colour=red:ok", "colour:ok"), ["bad_pair"]),
        (swap("colour=red:ok", "colour=red"), ["bad_pair"]),
        (swap("colour=red:ok", "=red:ok"), ["bad_pair"]),
        (swap("colour=red:ok", "colour=:ok"), ["bad_pair"]),
        (swap("colour=red:ok", "colour=red:yes"), ["bad_pair"]),
        (swap("colour=red:ok", "colour=red:ok;"), ["bad_pair"]),
        (swap("colour=red:ok", "Colour=red:ok"), ["bad_pair"]),
        (swap("colour=red:ok", "colour=a=b:ok"), ["bad_pair"]),
        (swap("colour=red:ok", "c" * 33 + "=red:ok"), ["bad_pair"]),
        (swap("colour=red:ok", "colour=" + "r" * 65 + ":ok"), ["bad_pair"]),
        (swap("colour=red:ok", "colour=red:ok;colour=blue:miss"), ["duplicate_attribute"]),
        (swap("S01", "s01"), ["bad_rule"]),
        (swap("S01", "S1"), ["bad_rule"]),
        (swap("S01", "S0123"), ["bad_rule"]),
        (swap(">3<", ">5<"), ["bad_verdict"]),
        (swap(">3<", "><"), ["bad_verdict"]),
        (swap(">3<", ">33<"), ["bad_verdict"]),
        (swap("<rule>", " <rule>"), ["stray_text"]),
        (swap("3<category>", "3 <category>"), ["stray_text"]),
        (GOOD + " ", ["stray_text"]),
        (swap("<rule>", "</attribute><rule>"), ["stray_text"]),
        (swap("red", "r\ufffdd"), ["stray_text"]),
        (swap("<rule>", "> <rule>"), ["stray_text"]),
        (swap("near", "Near").replace("S01", "x"), ["bad_category", "bad_rule"]),
        ("4", ["missing_tag"]),
    ],
)  # fmt: skip
def test_one_fault_each(text, wanted):
    parsed = parse(text, COMPACT)
    assert [fault.kind for fault in parsed.errors] == wanted
    assert parsed.label == int(text[0])
    assert [fault.at for fault in parsed.errors] == sorted({fault.at for fault in parsed.errors})


def test_faults_of_text_context_and_label_only():
    good = "4<context>adopt: it says so</context><why>fits</why><verdict>4</verdict>"
    assert parse(good, DYKNOW).fields.context == ("adopt", "it says so")
    assert parse(good.replace("adopt: it says so", "none"), DYKNOW).fields.context == ("none", None)
    for wrong in ("Adopt", "adopt:", "adopt:x", "adopt: ", "", "maybe", "adopt: " + "x" * 201):
        assert kinds(good.replace("adopt: it says so", wrong), DYKNOW) == ["bad_context"]
    for wrong in ("", "x" * 201, "a < b", "a > b"):
        assert kinds(good.replace("fits", wrong), DYKNOW) == ["bad_text"]
    assert kinds("4", LABEL_ONLY) == []
    assert kinds("4<verdict>4</verdict>", LABEL_ONLY) == ["extra_tag"]


def test_rule_must_be_in_the_rule_base():
    assert kinds(GOOD, rule_ids={"S01"}) == []
    assert kinds(GOOD, rule_ids={"S02"}) == ["bad_rule"]


def test_length_and_termination():
    assert kinds(GOOD, terminated=False) == ["truncated"]
    assert kinds(GOOD[:-10], terminated=False) == ["unclosed", "truncated"]
    assert parse("4" + "<" * 8192, LABEL_ONLY).errors[-1].kind == "too_long"
    assert kinds("4" + "x" * 8191, LABEL_ONLY) == ["label_run_on"]


def test_label_last():
    body = GOOD[1:]
    assert parse(body + "3", THINK).ok
    assert parse(body + "3", THINK).fields == parse(GOOD, COMPACT).fields
    assert kinds(GOOD, THINK) == ["stray_text", "no_label"]
    assert kinds(body + "33", THINK) == ["label_run_on"]
    assert kinds("3", THINK) == ["missing_tag"]


def test_every_fault_that_is_given_is_in_the_list():
    given_kinds = set(re.findall(r'"([a-z]+_?[a-z_]*)"', inspect.getsource(grammar._Scan) + inspect.getsource(parse)))
    assert set(FAULTS) <= given_kinds
    assert len(set(FAULTS)) == len(FAULTS)


def test_profiles_by_name():
    assert find_profile("post_cot").num_steps == 7
    assert find_profile("label_only").steps == ("label",)
    with pytest.raises(ConfigError, match="did you mean 'compact'"):
        find_profile("compct")
    with pytest.raises(ConfigError, match="each tag at most once"):
        Profile(name="twice", tags=("rule", "rule"))


TEXT = st.text(st.characters(blacklist_characters="<>\ufffd", blacklist_categories=["Cs"]), min_size=1, max_size=200)
VALUE = st.text(st.characters(blacklist_characters="=:;<>\ufffd", blacklist_categories=["Cs"]), min_size=1, max_size=64)
PAIR = st.builds(
    AttributeVerdict,
    name=st.from_regex(r"[a-z_]{1,32}", fullmatch=True),
    value=VALUE,
    verdict=st.sampled_from(["ok", "miss", "unknown"]),
)
FIELDS = st.builds(
    Fields,
    query=TEXT,
    item=TEXT,
    category=st.sampled_from(["match", "near", "mismatch"]),
    attribute=st.lists(PAIR, max_size=4, unique_by=lambda pair: pair.name).map(tuple),
    rule=st.from_regex(r"[A-Z][0-9]{2,3}", fullmatch=True).filter(str.isascii),
    context=st.tuples(st.sampled_from(CONTEXT_DECISIONS), st.none() | TEXT),
    why=TEXT,
    verdict=st.integers(1, 4),
)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4), FIELDS, st.sampled_from(list(PROFILES.values())))
def test_parse_is_the_inverse_of_render(label, fields, profile):
    parsed = parse(render(label, fields, profile), profile)
    assert parsed.errors == ()
    assert parsed.label == label
    for tag in TAGS:
        assert getattr(parsed.fields, tag) == (getattr(fields, tag) if tag in profile.tags else None)


PIECES = st.sampled_from(
    [
        *"1234",
        " ",
        "<",
        ">",
        "</",
        "x",
        "=",
        ":",
        ";",
        "\ufffd",
        "é",
        "<foo>",
        "near",
        "colour=red:ok",
        "E01",
        "adopt: a",
    ]
    + [f"<{tag}>" for tag in TAGS]
    + [f"</{tag}>" for tag in TAGS]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=30).map("".join), st.sampled_from(list(PROFILES.values())), st.booleans())
def test_what_is_accepted_is_exactly_what_render_writes(text, profile, terminated):
    parsed = parse(text, profile, terminated=terminated)
    places = [fault.at for fault in parsed.errors]
    assert places == sorted(set(places))
    assert all(fault.kind in FAULTS and 0 <= fault.at <= len(text) for fault in parsed.errors)
    if parsed.ok:
        assert parsed.label is not None
        assert render(parsed.label, parsed.fields, profile) == text
    violations(parsed, make_pair(negated=("red",), record={"colour": "red"}))


def test_time_is_linear_in_the_text():
    # 8,192 characters of tags each; quadratic reading would take minutes
    for piece in ("<rule>", "</rule>", "<rule></rule>", "<a>", "<", "a=b:ok;", "<why><rule>"):
        text = "4" + piece * (8191 // len(piece))
        assert not parse(text, COMPACT).ok


def test_hard_rules():
    pair, lace = make_pair(), make_pair(negated=("lace",), record={"closure": "lace"})

    def broken(text, of=pair):
        return violations(parse(text, COMPACT), of)

    assert broken(answer(4)) == ()
    assert broken(answer(4, verdict=3)) == ("H1",)
    assert broken(answer(3, "mismatch")) == ("H2",)
    assert broken(answer(2, "match", {"colour": "ok"})) == ("H3",)
    assert broken(answer(1, "match")) == ("H3",)
    assert broken(answer(2, "match", {"colour": "unknown"})) == ()
    assert broken(answer(2, "near", {"colour": "ok"})) == ()
    assert broken(answer(4), lace) == ("H4",)
    assert broken(answer(2, "match", {"lace": "miss"}), lace) == ()
    assert broken(answer(4, "mismatch", verdict=1), lace) == ("H1", "H2", "H4")
    assert broken("") == ()  # nothing said, nothing broken
    assert broken("4") == ()
    assert broken("4", make_pair(negated=("lace",), record={"closure": "zip"})) == ()


def test_render_needs_the_fields_of_its_profile():
    with pytest.raises(ValueError, match="'category' is None"):
        render(4, Fields(verdict=4), COMPACT)
    with pytest.raises(ValueError, match="5 is not a valid Label"):
        render(5, Fields(), LABEL_ONLY)
    assert render(Label.EXCELLENT, Fields(), LABEL_ONLY) == "4"
