"""Grow rules from seeds: label, put what is trusted into a pool, distil new rules from the pool, and again.

    score = F / N * log2 F      N spans matched by a candidate rule, F of them with its type in the pool

Accepted are, per type, the best k with F >= min_support and F / N >= precision_floor; k grows by one a round. Only the new
rules label (the working set); every rule ever used is exported. Source: the loop of arXiv:2210.02768, the score and the
growing k of arXiv:2107.02282; stopping, held-out agreement and numbers are ours.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import numpy as np

from recis.tagger.conditions import STATIC_KINDS
from recis.tagger.pool import GateConfig, Pool, PoolEntry, Vectors, gate_scores, hashed_vectors
from recis.tagger.rules import Rule, RuleSet, RuleTagger, Span, pair_rule, surface_rule
from recis.tagger.span_table import Candidates, SpanTable
from recis.tagger.text import TOKENIZER, Text
from recis.tagger.vote import label


@dataclass(frozen=True, kw_only=True, slots=True)
class DistilConfig:
    """How rules are grown."""

    max_span_tokens: int = 4
    max_ngram: int = 3
    """Tokens of the longest prev or next condition."""
    kinds: tuple[str, ...] = (*STATIC_KINDS, "left", "right")
    min_support: int = 3
    """Least F of an accepted rule."""
    precision_floor: float = 0.9
    top_k: int = 20
    top_k_step: int = 1
    max_top_k: int = 80
    max_rounds: int = 20
    min_growth: float = 0.01
    """Growth of the pool in a round, as a share, under which distillation stops."""
    max_agreement_drop: float = 0.03
    confident_share: float = 0.7
    """Share of a neural tagger's spans per type, surest first, that count as labels."""
    held_out: float = 0.1
    """Share of the pool, by text, that a neural tagger does not see and is compared on."""
    gate: GateConfig = field(default_factory=GateConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.precision_floor <= 1:
            raise ValueError(f"precision_floor must be in [0, 1]; got {self.precision_floor}")
        if self.min_support < 1 or self.top_k < 1 or self.max_rounds < 1:
            raise ValueError(
                "min_support, top_k and max_rounds must be at least 1; "
                f"got {self.min_support}, {self.top_k}, {self.max_rounds}"
            )


class PoolTagger(Protocol):
    """A tagger that learns from a pool: recis.tagger.neural has one."""

    def fit(self, texts: Sequence[Text], spans: Sequence[Sequence[Span]]) -> None:
        """Train on spans; words outside them are unknown, not empty."""
        ...

    def predict(self, texts: Sequence[Text]) -> list[list[Span]]:
        """Return spans with confidences."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """What one round did."""

    number: int
    accepted: int
    pool: int
    waiting: int
    """Labelled spans not yet like the pool."""
    agreement: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Distilled:
    """The result: rules to export, the pool, and the rounds with the reason for the end."""

    rules: RuleSet
    pool: Pool
    rounds: tuple[Round, ...]
    stop: str


def rule_score(right: int, matched: int) -> float:
    """Return F / N * log2 F, the order in which candidates are taken; 0 when nothing is right."""
    return right / matched * math.log2(right) if right else 0.0


def distil(
    texts: Sequence[Text],
    text_ids: Sequence[str],
    types: Sequence[str],
    seeds: Sequence[Rule],
    config: DistilConfig | None = None,
    *,
    tokenizer: str = TOKENIZER,
    dictionaries: Mapping[str, frozenset[str]] | None = None,
    vectors: Vectors | None = None,
    tagger: PoolTagger | None = None,
) -> Distilled:
    """Grow rules from seed (and human) rules over unlabelled texts.

    Human rules label in the first pass with the seeds and are exported as they are. The same arguments give the same rules.

    Raises:
        ValueError: texts and text_ids differ in length, an id is there twice, or a seed has a type outside `types`.
    """
    if len(texts) != len(text_ids) or len(set(text_ids)) != len(text_ids):
        raise ValueError(f"each of {len(texts)} texts needs an id of its own; got {len(set(text_ids))} different ids")
    base = RuleSet(schema=tuple(types), rules=tuple(seeds), tokenizer=tokenizer, dictionaries=dictionaries or {})
    return _Distiller(texts, text_ids, base, config or DistilConfig(), vectors, tagger).run()


class _Distiller:
    """State of one distillation."""

    def __init__(
        self,
        texts: Sequence[Text],
        text_ids: Sequence[str],
        base: RuleSet,
        config: DistilConfig,
        vectors: Vectors | None,
        tagger: PoolTagger | None,
    ) -> None:
        self.texts, self.text_ids, self.base, self.config, self.tagger = texts, text_ids, base, config, tagger
        self.vectors: Vectors = vectors or partial(hashed_vectors, texts)
        self.rng = np.random.default_rng(config.seed)
        self.pool = Pool()
        self.covered: list[set[int]] = [set() for _ in texts]
        self.waiting: dict[tuple[int, int, int], Span] = {}
        self.rules: dict[str, Rule] = {rule.rule_id: rule for rule in base.rules}
        self.table = SpanTable(
            texts,
            base.schema,
            max_span_tokens=config.max_span_tokens,
            min_support=config.min_support,
            kinds=config.kinds,
            max_ngram=config.max_ngram,
            dictionaries=base.dictionaries,
        )

    def run(self) -> Distilled:
        seeded = RuleTagger(self.base)
        for number, text in enumerate(self.texts):
            for span in seeded.tag_text(text):
                self._admit(number, span, 0, 1.0)
        self._measure_seeds()
        rounds, stop, best = [Round(number=0, accepted=len(self.rules), pool=len(self.pool), waiting=0)], "", 0.0
        for number in range(1, self.config.max_rounds + 1):
            extra, agreement = self._ask_tagger()
            best = max(best, agreement or 0.0)
            if agreement is not None and agreement < best - self.config.max_agreement_drop:
                stop = f"agreement with the tagger fell from {best:.3f} to {agreement:.3f}"
                break
            working = self._accept(number, extra)
            before = len(self.pool)
            self._grow(number, working)
            rounds.append(
                Round(
                    number=number,
                    accepted=len(working),
                    pool=len(self.pool),
                    waiting=len(self.waiting),
                    agreement=agreement,
                )
            )
            if not working:
                stop = "no rule accepted"
                break
            if len(self.pool) - before < self.config.min_growth * before:
                stop = f"the pool grew by less than {self.config.min_growth:.0%}"
                break
        ordered = tuple(self.rules[key] for key in sorted(self.rules, key=lambda key: (self.rules[key].round, key)))
        rules = replace(self.base, rules=ordered)
        return Distilled(
            rules=rules, pool=self.pool, rounds=tuple(rounds), stop=stop or f"{self.config.max_rounds} rounds"
        )

    def _admit(self, number: int, span: Span, round_number: int, score: float) -> bool:
        """Put a span into the pool unless it overlaps one that is in."""
        words = range(span.start, span.end)
        if not self.covered[number].isdisjoint(words):
            return False
        self.covered[number].update(words)
        return self.pool.add(
            PoolEntry(
                text_id=self.text_ids[number],
                start=span.start,
                end=span.end,
                type=span.type,
                rules=span.rules,
                round=round_number,
                score=score,
            )
        )

    def _measure_seeds(self) -> None:
        """Give seed rules the figures the pool shows. Occurrences inside a longer span are not theirs to label."""
        types = {name: number for number, name in enumerate(self.base.schema)}
        right, matched = defaultdict[str, int](int), defaultdict[str, int](int)
        index = RuleTagger(self.base)
        for number, text in enumerate(self.texts):
            for (start, end), rules in index.matches(text).items():
                name = self.pool.type_of(self.text_ids[number], start, end)
                if name is None and not self.covered[number].isdisjoint(range(start, end)):
                    continue
                for rule in rules:
                    matched[rule.rule_id] += 1
                    right[rule.rule_id] += name == rule.type and name in types
        for key, rule in self.rules.items():
            if rule.source != "human" and matched[key]:
                self.rules[key] = replace(rule, precision=right[key] / matched[key], support=right[key], rule_id="")

    def _labels(self, extra: Mapping[tuple[int, int, int], str]) -> np.ndarray:
        """Return the type number of every span of the table, -1 where neither pool nor tagger gives one."""
        types = {name: number for number, name in enumerate(self.base.schema)}
        found = np.full(len(self.table.places), -1, dtype=np.int64)
        for place, name in extra.items():
            if place in self.table.number_of:
                found[self.table.number_of[place]] = types[name]
        numbers = {text_id: number for number, text_id in enumerate(self.text_ids)}
        for entry in self.pool.entries:  # the pool has the last word
            place = (numbers[entry.text_id], entry.start, entry.end)
            if place in self.table.number_of:
                found[self.table.number_of[place]] = types[entry.type]
        return found

    def _accept(self, round_number: int, extra: Mapping[tuple[int, int, int], str]) -> list[tuple[Rule, np.ndarray]]:
        """Return the best new rules per type with the spans they match, and export them."""
        config = self.config
        labels = self._labels(extra)
        tables = [self.table.static]
        if {"left", "right"} & set(config.kinds):
            tables.append(self.table.typed(labels))
        limit = min(config.max_top_k, config.top_k + config.top_k_step * (round_number - 1))
        accepted: list[tuple[Rule, np.ndarray]] = []
        for number, name in enumerate(self.base.schema):
            found: list[tuple[float, Rule, np.ndarray]] = []
            for table in tables:
                found += self._scored(table, labels == number, name, round_number)
            found.sort(key=lambda item: (-item[0], item[1].rule_id))
            accepted += [(rule, spans) for _, rule, spans in found[:limit]]
        self.rules.update((rule.rule_id, rule) for rule, _ in accepted)
        return accepted

    def _scored(
        self, table: Candidates, is_right: np.ndarray, name: str, round_number: int
    ) -> list[tuple[float, Rule, np.ndarray]]:
        right, matched = table.counts(is_right), table.matched
        passed = (right >= self.config.min_support) & (right >= self.config.precision_floor * matched - 1e-9)
        found: list[tuple[float, Rule, np.ndarray]] = []
        for candidate in np.flatnonzero(passed):
            hits, total = int(right[candidate]), int(matched[candidate])
            one, two, length = (int(part) for part in table.keys[candidate])
            rule = self._rule(name, one, two, length, hits, total, round_number)
            if rule.rule_id not in self.rules:
                found.append((rule_score(hits, total), rule, table.of(int(candidate))))
        return found

    def _rule(self, name: str, one: int, two: int, length: int, right: int, matched: int, round_number: int) -> Rule:
        made: Callable[..., Rule]
        conditions = [self.table.conditions[number] for number in (one, two) if number >= 0]
        if two < 0:
            made = partial(surface_rule, name, conditions[0].value)
        else:
            made = partial(pair_rule, name, *conditions, length)
        return made(precision=right / matched, support=right, source="distilled", round=round_number)

    def _grow(self, round_number: int, working: Collection[tuple[Rule, np.ndarray]]) -> None:
        """Label with the working rules; put what is like the pool in, and let the rest wait."""
        matches: dict[int, dict[tuple[int, int], list[Rule]]] = defaultdict(lambda: defaultdict(list))
        for rule, spans in working:
            for span in spans:
                number, start, end = self.table.places[span]
                matches[number][start, end].append(rule)
        for number in sorted(matches):
            for span in label(self.texts[number], matches[number]):
                self.waiting.setdefault((number, span.start, span.end), span)
        self.waiting = {
            place: span
            for place, span in self.waiting.items()
            if self.covered[place[0]].isdisjoint(range(place[1], place[2]))
        }
        by_type: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
        for place, span in self.waiting.items():
            by_type[span.type].append(place)
        for name in sorted(by_type):
            places = sorted(by_type[name])
            scores, floor = self._gate(name, places, round_number)
            for place, score in zip(places, scores, strict=True):
                if score >= floor:
                    self._admit(place[0], self.waiting.pop(place), round_number, float(score))

    def _gate(self, name: str, places: Sequence[tuple[int, int, int]], round_number: int) -> tuple[np.ndarray, float]:
        numbers = {text_id: number for number, text_id in enumerate(self.text_ids)}
        members = [(numbers[e.text_id], e.start, e.end) for e in self.pool.entries if e.type == name]
        if round_number == 1 or not members:
            return np.ones(len(places)), 0.0
        return gate_scores(self.vectors(places), self.vectors(members), self.rng, self.config.gate)

    def _ask_tagger(self) -> tuple[dict[tuple[int, int, int], str], float | None]:
        """Train the tagger on most of the pool; return its surest spans and its agreement on the rest of the pool."""
        if self.tagger is None:
            return {}, None
        by_text: dict[str, list[Span]] = defaultdict(list)
        for entry in self.pool.entries:
            by_text[entry.text_id].append(Span(start=entry.start, end=entry.end, type=entry.type, conf=entry.score))
        labelled = [number for number, text_id in enumerate(self.text_ids) if text_id in by_text]
        shuffled = np.random.default_rng(self.config.seed).permutation(len(labelled))
        held = {labelled[int(place)] for place in shuffled[: int(self.config.held_out * len(labelled))]}
        seen = [number for number in labelled if number not in held]
        self.tagger.fit([self.texts[n] for n in seen], [by_text[self.text_ids[n]] for n in seen])
        predicted = self.tagger.predict(self.texts)
        surest: dict[str, list[tuple[float, tuple[int, int, int]]]] = defaultdict(list)
        for number, spans in enumerate(predicted):
            for span in spans:
                surest[span.type].append((-span.conf, (number, span.start, span.end)))
        extra = {
            place: name
            for name, ranked in surest.items()
            for _, place in sorted(ranked)[: int(self.config.confident_share * len(ranked))]
        }
        same = total = 0
        for number in held:
            guessed = {(span.start, span.end, span.type) for span in predicted[number]}
            wanted = {(span.start, span.end, span.type) for span in by_text[self.text_ids[number]]}
            same, total = same + len(guessed & wanted), total + len(wanted)
        return extra, same / total if total else None
