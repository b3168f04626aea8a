"""The generated catalogue: mix, disjoint parts, gold that holds, chunks of the kind they say, prompts and rationales."""

import re
from collections import Counter
from functools import cache
from typing import Any

import pytest

from recis.errors import ConfigError, DataError
from relevance.catalog import Catalog, CatalogConfig, make_catalog, to_ebrm
from relevance.catalog_rules import Wanted, catalog_rules, decide
from relevance.catalog_words import ATTRIBUTES, CATEGORY_FAMILIES, CONCEPTS, QUESTIONS
from relevance.data import FAMILIES, HARD_FAMILIES, Chunk, Pair, check_pair, check_pairs
from relevance.grammar import parse
from relevance.labels import PROFILES, violations
from relevance.oracle import oracle
from relevance.prompts import PromptConfig, Prompts, guidance
from relevance.rules import Rule, RuleBase, always

SIZES: dict[str, Any] = {"num_train": 2000, "num_dev": 240, "num_test": 400}
RULES = catalog_rules()


@cache
def catalog(**options: Any) -> Catalog:
    return make_catalog(CatalogConfig(**SIZES, **options))


def chunk_of(pair: Pair) -> Chunk:
    assert pair.chunk is not None
    return pair.chunk


def steps_of(pair: Pair) -> Any:
    """Return the steps; typed loosely, for all parts are known here."""
    assert pair.steps is not None
    return pair.steps


def rag() -> Catalog:
    return catalog(omit_rate=0.3, with_chunks=True)


def everything(found: Catalog) -> list[Pair]:
    return [*found.train, *found.dev, *found.test]


def test_mix_and_sizes():
    found = catalog()
    assert [len(part) for part in (found.train, found.dev, found.test)] == [2000, 240, 400]
    for part in (found.train, found.dev, found.test):
        shares = Counter(pair.label for pair in part)
        for label, share in zip((1, 2, 3, 4), (0.09, 0.36, 0.05, 0.5), strict=True):
            assert abs(shares[label] - share * len(part)) <= 1
        assert set(Counter(pair.query_id for pair in part).values()) == {8}
        families = Counter(pair.family for pair in part)
        assert abs(families["plain"] - len(part) / 2) <= 8
        assert all(abs(families[family] - len(part) / 8) <= 8 for family in HARD_FAMILIES)
    assert set(families) == set(FAMILIES)


def test_parts_are_disjoint():
    found = catalog()
    check_pairs(everything(found))  # ids, queries by id and text, items
    concepts = [
        {pair.query.split()[0] for pair in part if pair.family == "knowledge"}
        for part in (found.train, found.dev, found.test)
    ]
    assert all(concepts)
    assert len(set.union(*concepts)) == sum(map(len, concepts))
    assert set.union(*concepts) <= CONCEPTS.keys()


def test_same_seed_same_catalog():
    assert make_catalog(CatalogConfig(**SIZES)).train == catalog().train
    assert make_catalog(CatalogConfig(**SIZES, seed=1)).train != catalog().train


def test_gold_holds_for_every_pair():
    for pair in everything(rag()):
        check_pair(pair, deciding_labels=RULES.deciding_labels)
        assert 3 <= len(pair.item.attributes) <= 6
        assert pair.steps is not None
        assert RULES.deciding_labels[steps_of(pair).rule] == pair.label
        for name, verdict in steps_of(pair).attributes.items():
            if name in pair.item.attributes:
                assert verdict == ("ok" if pair.item.attributes[name] == steps_of(pair).wanted[name] else "miss")
            elif name in ATTRIBUTES:
                assert verdict == "unknown"
    found = everything(rag())
    assert len({steps_of(pair).rule for pair in found if pair.steps}) > 30


def test_no_gold_rationale_fires_a_hard_rule_or_has_a_fault():
    for pair in everything(rag()):
        for profile in PROFILES.values():
            for with_chunk in (False, True):
                text = oracle(pair, profile, with_chunk=with_chunk)
                parsed = parse(text, profile, rule_ids=RULES.ids)
                assert parsed.errors == (), text
                assert violations(parsed, pair) == ()
                assert parsed.label == pair.label


def test_oracle_has_four_wordings_per_block():
    pairs = everything(rag())
    profile = PROFILES["dyknow"]
    whys = {}
    for pair in pairs:
        fields = parse(oracle(pair, profile, with_chunk=True), profile).fields
        assert fields.context is not None
        whys.setdefault(pair.label, set()).add(fields.why)
        whys.setdefault(fields.context[0], set()).add(fields.context[1])
    assert all(len(wordings) == 4 for wordings in whys.values())
    full = PROFILES["post_cot"]
    starts = {str(parse(oracle(pair, full), full).fields.query).split(pair.query)[0] for pair in pairs}
    assert len(starts) == 4


def test_oracle_names_what_is_missing():
    pair = catalog().train[0]
    hidden = Pair(id="x", query_id="q", query="x", item_id="i", item=pair.item, label=4)
    assert oracle(hidden, PROFILES["label_only"]) == "4"
    with pytest.raises(DataError, match=r"pair 'x', column 'steps.category': the oracle needs it"):
        oracle(hidden, PROFILES["compact"])
    with pytest.raises(DataError, match="column 'label'"):
        oracle(Pair(id="x", query_id="q", query="x", item_id="i", item=pair.item), PROFILES["label_only"])


@pytest.mark.parametrize(
    ("noun", "item", "wanted", "verdicts", "rule"),
    [
        ("boots", "phone", [], [], "C01"),
        ("boots", "boots", [("lace", "negated"), ("size", "primary")], ["miss", "miss"], "N01"),
        ("boots", "boots", [("size", "primary")], ["miss"], "P01"),
        ("boots", "boots", [("waterproof", "primary"), ("price", "price")], ["miss", "miss"], "P02"),
        ("boots", "boots", [("price", "price")], ["miss"], "B01"),
        ("boots", "wellingtons", [("colour", "secondary")], ["miss"], "S01"),
        ("boots", "wellingtons", [("size", "primary")], ["unknown"], "C02"),
        ("boots", "sneakers", [], [], "C02"),
        ("boots", "boots", [("colour", "secondary"), ("closure", "secondary")], ["miss", "miss"], "A01"),
        ("boots", "boots", [("colour", "secondary"), ("size", "primary")], ["miss", "unknown"], "A02"),
        ("mat", "mat", [("size", "secondary")], ["unknown"], "A13"),
        ("boots", "boots", [("size", "primary")], ["ok"], "E01"),
    ],
)  # fmt: skip
def test_decision_list_by_hand(noun, item, wanted, verdicts, rule):
    constraints = [Wanted(name=name, value="x", role=role) for name, role in wanted]
    assert decide(noun, item, constraints, verdicts) == rule


def test_words_are_what_the_rules_rely_on():
    values = [value for name, options in ATTRIBUTES.items() if name != "waterproof" for value in options]
    assert len(set(values)) == len(values)  # an excluded value names its attribute
    nouns = [noun for family in CATEGORY_FAMILIES for noun in family.nouns]
    assert len(set(nouns)) == 24
    assert len(RULES.rules) == 36
    assert all(
        len(family.attributes) == 6 and set(family.attributes) <= ATTRIBUTES.keys() for family in CATEGORY_FAMILIES
    )
    assert all(value in ATTRIBUTES[name] for name, value in [*CONCEPTS.values(), *QUESTIONS])


def test_chunks_are_of_their_kind():
    pairs = rag().train
    shares = Counter(chunk_of(pair).kind for pair in pairs)
    for kind, share in zip(("helpful", "partial", "irrelevant", "misleading"), (0.45, 0.1, 0.25, 0.2), strict=True):
        assert abs(shares[kind] - share * len(pairs)) <= 1
    for pair in pairs:
        facts = stated(chunk_of(pair).text)
        record = pair.item.attributes
        right = [record.get(name) == value for name, value in facts]
        if chunk_of(pair).kind == "helpful":
            concept = CONCEPTS.get(pair.query.split()[0])
            assert right == [True] or facts == [concept]
        elif chunk_of(pair).kind == "misleading":
            assert right == [False]
        elif chunk_of(pair).kind == "partial":
            assert sorted(right) == [False, True]
        else:
            assert pair.item.brand not in chunk_of(pair).text
    omitted = [
        pair for pair in pairs if len(pair.item.attributes) > sum(word in pair.item.title for word in shown(pair))
    ]
    assert len(omitted) > len(pairs) / 2


def shown(pair):
    return [value for value in pair.item.attributes.values() if value not in ("yes", "no")]


def stated(text):
    """Return the (attribute, value) of each sentence of a chunk."""
    found = []
    for sentence in re.findall(r"[^.]+\.", text):
        name = next(name for name in ATTRIBUTES if re.search(rf"\b{name}\b", sentence))
        value = next(value for value in ATTRIBUTES[name] if re.search(rf"\b{name}\b.*\b{value}\b", sentence))
        found.append((name, value))
    return found


def test_noise_and_hidden_steps():
    found = catalog(label_noise=0.2, step_gold_rate=0.5)
    wrong = sum(pair.label != RULES.deciding_labels[str(found.hidden_steps[pair.id].rule)] for pair in found.train)
    assert 0.15 < wrong / 2000 < 0.25
    assert 0.45 < sum(pair.steps is None for pair in found.train) / 2000 < 0.55
    assert all(pair.steps == found.hidden_steps[pair.id] for pair in found.test)
    wrongs: list[dict[str, Any]] = [{"label_mix": (0.5, 0.5, 0.5, 0.5)}, {"omit_rate": 2.0}, {"items_per_query": 0}]
    for wrong in wrongs:
        with pytest.raises(ConfigError):
            CatalogConfig(**wrong)


def test_items_go_to_ebrm():
    entities = pytest.importorskip("recis.ebrm.entities")
    schema, items = to_ebrm(catalog().dev)
    assert len(items) == 240
    assert schema.names == ("category", "brand", *ATTRIBUTES)
    item = catalog().dev[0].item
    ids = {entity.id for entity in items[0].entities}
    assert ids == {f"{name}:{schema.canonical(name, value)}" for name, value in item.attributes.items()} | {
        f"category:{item.category}", f"brand:{item.brand}",
    }  # fmt: skip
    assert len(schema.slots(items[0].entities)) == 12
    assert entities.type_of(next(iter(ids))) in schema


def test_prompts_share_their_start_within_a_query():
    prompts = Prompts(rules=RULES)
    for first, second in zip(catalog().train[:80:8], catalog().train[7:80:8], strict=True):
        assert prompts.shared(first) == prompts.shared(second)
        assert prompts.plain(second).startswith(prompts.shared(first))
        assert prompts.plain(first).endswith("\nlabel:\n")
        assert len(RULES.rules_for(first)) <= 6


def test_prompt_variants():
    prompts = Prompts(rules=RULES)
    pair = rag().train[0]
    bare = Pair(id="x", query_id="q", query=pair.query, item_id="i", item=pair.item)
    assert prompts.with_chunk(bare) == prompts.plain(bare) == prompts.guided(bare, 3)
    assert prompts.with_chunk(pair).replace(f"context: {chunk_of(pair).text}\n", "") == prompts.plain(pair)
    assert prompts.guided(pair, 1).replace(f"hint: {guidance(pair, 1)}\n", "") == prompts.plain(pair)
    for pair in rag().train[:200]:  # neither kind nor decision nor label reach the model
        text = prompts.with_chunk(pair)
        assert not re.search(
            r"\b(helpful|partial|irrelevant|misleading|adopt|ignore)\b", text.replace(chunk_of(pair).text, "")
        )


def test_guidance_never_states_the_label():
    for pair in rag().train:
        for level in (1, 2, 3):
            hint = guidance(pair, level)
            assert not re.search(
                r"\b[1-4]\b|excellent|related|mismatch(?! *;|$)|irrelevant", hint.replace("category mismatch", "")
            )
    pair = catalog().train[0]
    assert guidance(pair, 1) == f"category {steps_of(pair).category}"
    assert guidance(pair, 3).startswith(guidance(pair, 2))
    assert guidance(pair, 3).endswith(f"rule {steps_of(pair).rule}")
    with pytest.raises(ValueError, match="guidance levels are"):
        guidance(pair, 0)


def test_long_prompts_are_cut_chunk_first():
    pair = next(pair for pair in rag().train if chunk_of(pair).kind == "partial")
    whole = Prompts(rules=RULES)
    length = len(whole.with_chunk(pair).split())

    def cut(limit):
        return Prompts(rules=RULES, config=PromptConfig(max_prompt_tokens=limit)).with_chunk(pair)

    assert cut(length) == whole.with_chunk(pair)
    shorter = cut(length - 2)
    assert shorter.split("context:")[0] == whole.with_chunk(pair).split("context:")[0]
    assert len(shorter.split()) == length - 2
    num_chunk = len(chunk_of(pair).text.split()) + 1
    assert cut(length - num_chunk) == whole.plain(pair)
    item_cut = cut(length - num_chunk - 1)
    assert item_cut.startswith(whole.shared(pair))
    assert item_cut.endswith("label:\n")
    with pytest.raises(DataError, match=rf"pair '{pair.id}', column 'query'.*more than 20 tokens before the item"):
        cut(20)
    short = Prompts(rules=RULES, config=PromptConfig(max_chunk_tokens=2)).with_chunk(pair)
    assert f"context: {' '.join(chunk_of(pair).text.split()[:2])}\n" in short


def test_rule_base_is_checked():
    rule = Rule(id="C01", text="x", decides=1, applies=always)
    with pytest.raises(ConfigError, match="rule 'C01' is in the rule base twice"):
        RuleBase((rule, rule))
    wrongs: list[dict[str, Any]] = [{"id": "c01"}, {"id": "C1"}, {"decides": 5}, {"text": ""}]
    for wrong in wrongs:
        with pytest.raises(ConfigError, match="rule"):
            Rule(**({"id": "C01", "text": "x", "decides": 1, "applies": always} | wrong))
    assert RULES.rules_for(catalog().train[0], max_rules=2)[0].id == "C01"
