"""Speed of tagging titles with rules alone, on one core.

    pytest benchmarks/test_tagger.py --benchmark-json=out.json

2,000 rules (1,000 surfaces, 1,000 ANDs) over generated titles of 4 to 14 words; the ANDs are of prev and next, or of any
two kinds that a rule may use. The same job by a scan over all rules on a few titles checks the index. Prints titles/s,
rules, spans, p50 and p99 per title, and the index's memory. The target is that of prev and next.
"""

import random
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch

from recis.bench.harness import compare
from recis.tagger.conditions import span_conditions
from recis.tagger.rules import Condition, RuleSet, RuleTagger, pair_rule, surface_rule
from recis.tagger.text import from_words, tokenize

NUM_TITLES = 2000
NUM_SCANNED = 5
TYPES = ("brand", "product", "colour", "size")
TITLES_PER_S_GOAL = 20_000


def vocabulary(rng: random.Random, num_words: int = 3000) -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return sorted({"".join(rng.choices(letters, k=rng.randint(3, 9))) for _ in range(num_words)})


def prev_and_next(tokens: tuple[str, ...], start: int, end: int, rng: random.Random) -> tuple[Condition, Condition]:
    padded = ("<s>", *tokens, "</s>")
    return Condition("prev", padded[start]), Condition("next", padded[end + 1])


def any_two(tokens: tuple[str, ...], start: int, end: int, rng: random.Random) -> tuple[Condition, Condition]:
    """Two conditions of different kinds that hold for the span, as distilling would pair them."""
    held = span_conditions(from_words(tokens), start, end, max_ngram=2)
    one = rng.choice([condition for condition in held if condition.kind != "surface"])
    return one, rng.choice([condition for condition in held if condition.kind not in ("surface", one.kind)])


def make_case(
    pair: Callable[[tuple[str, ...], int, int, random.Random], tuple[Condition, Condition]], seed: int = 0
) -> tuple[RuleSet, list[str]]:
    """Titles whose words follow a power law, and rules drawn from such titles, so that they fire as real ones do."""
    rng = random.Random(seed)
    words = vocabulary(rng)
    weights = [1 / (rank + 10) for rank in range(len(words))]
    titles = [" ".join(rng.choices(words, weights, k=rng.randint(4, 14))) for _ in range(NUM_TITLES)]
    rules = {}
    while len(rules) < 1000:
        tokens = rng.choice(titles).split()
        start, size = rng.randrange(len(tokens)), rng.choice((1, 1, 2, 3))
        rule = surface_rule(rng.choice(TYPES), " ".join(tokens[start : start + size]))
        rules[rule.rule_id] = rule
    while len(rules) < 2000:
        tokens, size = tuple(rng.choice(titles).split()), rng.choice((1, 1, 2))
        start = rng.randrange(len(tokens))
        if start + size <= len(tokens):
            rule = pair_rule(rng.choice(TYPES), *pair(tokens, start, start + size, rng), size)
            rules[rule.rule_id] = rule
    return RuleSet(schema=TYPES, rules=tuple(rules.values())), titles


def by_scan(rules: RuleSet, titles: list[str]) -> int:
    """Every rule against every span: what the index must agree with."""
    fired = 0
    for title in titles:
        text = tokenize(title)
        for start in range(len(text.tokens)):
            for end in range(start + 1, len(text.tokens) + 1):
                held = set(span_conditions(text, start, end))
                fired += sum(rule.length == end - start and held.issuperset(rule.tests) for rule in rules.rules)
    return fired


@pytest.mark.parametrize(
    ("kinds", "pair"), [("prev and next", prev_and_next), ("any kinds", any_two)], ids=["prev_next", "any_kinds"]
)
def test_titles_per_second(benchmark, capsys, kinds, pair):
    torch.set_num_threads(1)
    rules, titles = make_case(pair)
    tracemalloc.start()
    tagger = RuleTagger(rules)
    memory = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    few = titles[:NUM_SCANNED]
    assert sum(len(found) for title in few for found in tagger.matches(tokenize(title)).values()) == by_scan(rules, few)
    seconds = []
    for title in titles:
        began = time.perf_counter()
        tagger.tag(title)
        seconds.append(time.perf_counter() - began)
    p50, p99 = (float(value) * 1e6 for value in np.percentile(seconds, [50, 99]))
    spans = sum(map(len, tagger.tag_batch(titles)))
    told = compare(
        benchmark,
        case=f"{NUM_TITLES} titles of 4 to 14 words, {len(rules.rules)} rules, ANDs of {kinds}",
        ours="recis",
        impls={"recis": lambda: tagger.tag_batch(titles)},
        items=NUM_TITLES,
        targets={"items_per_s": TITLES_PER_S_GOAL} if pair is prev_and_next else {},
        extra={"p50_us": p50, "p99_us": p99, "index_bytes": memory, "spans": spans},
    )
    rate = told["results"]["recis"]["items_per_s"]
    with capsys.disabled():
        print(
            f"\nANDs of {kinds}: {rate:,.0f} titles/s, {len(rules.rules)} rules, {spans} spans, p50 {p50:.0f} us, "
            f"p99 {p99:.0f} us a title, index {memory / 1e6:.1f} MB"
        )
