"""Find seed rules: phrases that two differently worded questions to an expert put into the same type.

A template's answer for a phrase is the type most of its occurrences get. A phrase becomes the rule `surface = phrase ->
type` when both answers are the same type, each is given by >= 80 % of the occurrences, and beats its runner-up by >= 1
nat in the mean. Source of the two-template agreement: arXiv:2210.02768; the thresholds are ours.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from recis.tagger.experts import NONE, TEMPLATES, Answer, CachedExpert, Expert, ExpertTimeout
from recis.tagger.phrases import occurrences
from recis.tagger.rules import Rule, surface_rule
from recis.tagger.text import Text


class NoSeedsError(ValueError):
    """No phrase survived; the text says how many fell to which test, by type."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedConfig:
    """What makes a seed."""

    max_occurrences: int = 20
    """Occurrences of a phrase that are asked about, drawn by the seed."""
    min_agreement: float = 0.8
    min_margin: float = 1.0
    """Nats between the answer and its runner-up, mean over the occurrences."""
    top_per_type: int = 20
    max_skipped: float = 0.2
    """Share of the phrases that may time out."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.min_agreement <= 1:
            raise ValueError(f"min_agreement must be in (0, 1]; got {self.min_agreement}")
        if self.max_occurrences < 1 or self.top_per_type < 1:
            raise ValueError(
                f"max_occurrences and top_per_type must be at least 1; got {self.max_occurrences}, {self.top_per_type}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Seeds:
    """Seed rules, best first within a type, and why the other phrases gave none."""

    rules: tuple[Rule, ...]
    rejected: Mapping[str, Counter[str]]
    """reason (disagreement, none, low agreement, low margin, over top) -> type of the first template -> phrases"""
    skipped: int
    """Phrases whose expert timed out."""
    empty: int
    """Questions that got no answer."""


def find_seeds(
    texts: Sequence[Text],
    phrases: Iterable[str],
    expert: Expert,
    types: Sequence[str],
    config: SeedConfig | None = None,
) -> Seeds:
    """Ask about every phrase and keep those that pass.

    Raises:
        NoSeedsError: none passed.
        RuntimeError: more than max_skipped of the phrases timed out.
        ValueError: an answer holds NaN or a type outside `types`.
    """
    config = config or SeedConfig()
    asked = expert if isinstance(expert, CachedExpert) else CachedExpert(expert, types)
    places = {phrase: found for phrase, found in occurrences(texts, phrases).items() if found}
    empty_before, skipped = asked.empty, 0
    rejected: dict[str, Counter[str]] = defaultdict(Counter)
    passed: dict[str, list[tuple[float, Rule]]] = defaultdict(list)
    for phrase in sorted(places):
        drawn = _sample(phrase, places[phrase], config)
        try:
            verdicts = [
                _verdict([asked.type_scores(texts[n], (start, end), template) for n, start, end in drawn])
                for template in TEMPLATES
            ]
        except ExpertTimeout:
            skipped += 1
            continue
        reason = _rejection(verdicts, config)
        name = verdicts[0][0]
        if reason:
            rejected[reason][name] += 1
        else:
            margin = min(verdict[2] for verdict in verdicts)
            passed[name].append((margin, surface_rule(name, phrase, support=len(places[phrase]), source="seed")))
    if skipped > config.max_skipped * max(1, len(places)):
        raise RuntimeError(
            f"the expert timed out on {skipped} of {len(places)} phrases; at most {config.max_skipped:.0%} may"
        )
    rules: list[Rule] = []
    for name in sorted(passed):
        ranked = sorted(passed[name], key=lambda item: (-item[0], item[1].rule_id))
        rules += [rule for _, rule in ranked[: config.top_per_type]]
        rejected["over top"][name] += max(0, len(ranked) - config.top_per_type)
    if not rules:
        told = "; ".join(f"{reason}: {dict(sorted(counts.items()))}" for reason, counts in sorted(rejected.items()))
        raise NoSeedsError(f"no phrase of {len(places)} became a seed ({told or 'no phrase occurs in the texts'})")
    return Seeds(rules=tuple(rules), rejected=dict(rejected), skipped=skipped, empty=asked.empty - empty_before)


def _sample(phrase: str, places: list[tuple[int, int, int]], config: SeedConfig) -> list[tuple[int, int, int]]:
    if len(places) <= config.max_occurrences:
        return places
    return random.Random(f"{config.seed} {phrase}").sample(places, config.max_occurrences)


def _verdict(answers: Sequence[Answer]) -> tuple[str, float, float]:
    """Return the answer most occurrences get (ties: first by name), its share, and its mean margin to the runner-up."""
    best = Counter(max(sorted(answer), key=answer.__getitem__) for answer in answers)
    name = min(best, key=lambda key: (-best[key], key))
    margins = [answer[name] - max(score for other, score in answer.items() if other != name) for answer in answers]
    return name, best[name] / len(answers), sum(margins) / len(margins)


def _rejection(verdicts: Sequence[tuple[str, float, float]], config: SeedConfig) -> str:
    names = {name for name, _, _ in verdicts}
    if len(names) > 1:
        return "disagreement"
    if names == {NONE}:
        return "none"
    if any(share < config.min_agreement for _, share, _ in verdicts):
        return "low agreement"
    if any(margin < config.min_margin for _, _, margin in verdicts):
        return "low margin"
    return ""
