"""Turn the rules that fired into one type per span, and overlapping spans into a set without overlaps.

    type      the one that most rules name; a tie abstains       share   its votes / all votes
    overlaps  longest span first, then the larger share, then leftmost

Nothing here depends on the order of the rules.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from recis.tagger.rules import Rule, Span
from recis.tagger.text import Text

Place = tuple[int, int]  # start, end


@dataclass(frozen=True, slots=True)
class Vote:
    """What the rules that fire on one span say together."""

    type: str
    share: float
    conf: float
    """Share times the largest measured precision among the rules that won."""
    rules: tuple[str, ...]
    """Ids of the rules that won, sorted."""


def majority(types: Sequence[str]) -> tuple[str | None, float]:
    """Return the type with most votes and its share of them; None on a tie, and without votes."""
    if types and types.count(types[0]) == len(types):
        return types[0], 1.0
    if len(types) == 2:
        return None, 0.0
    ranked = Counter(types).most_common(2)
    if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return None, 0.0
    return ranked[0][0], ranked[0][1] / len(types)


def vote(rules: Sequence[Rule]) -> Vote | None:
    """Return what the rules that fire on one span give it; None when they tie."""
    name, share = majority([rule.type for rule in rules])
    if name is None:
        return None
    winners = [rule for rule in rules if rule.type == name]
    conf = share * max(rule.precision for rule in winners)
    return Vote(name, share, conf, tuple(sorted(rule.rule_id for rule in winners)))


def label(text: Text, matches: Mapping[Place, Sequence[Rule]]) -> list[Span]:
    """Return the spans that the firing rules agree on, left to right."""
    return place_votes(text, ((place, vote(rules)) for place, rules in matches.items()))


def place_votes(text: Text, votes: Iterable[tuple[Place, Vote | None]]) -> list[Span]:
    """Return the spans that stay where votes overlap, left to right. No place is there twice; ties are passed over."""
    # length and start tell any two places apart, so the sort never compares two votes
    ranked = [(start - end, -found.share, start, found) for (start, end), found in votes if found is not None]
    ranked.sort()  # pyright: ignore[reportCallIssue]
    taken = 0  # bit t: token t is inside a span
    kept: list[tuple[int, int, Vote]] = []
    for negative_length, _, start, found in ranked:
        words = ((1 << -negative_length) - 1) << start
        if not taken & words:
            taken |= words
            kept.append((start, start - negative_length, found))
    kept.sort()  # pyright: ignore[reportCallIssue]
    tokens, starts, ends = text.tokens, text.starts, text.ends
    return [
        Span(
            start=start,
            end=end,
            type=found.type,
            conf=found.conf,
            rules=found.rules,
            char_start=starts[start],
            char_end=ends[end - 1],
            surface=tokens[start] if end - start == 1 else " ".join(tokens[start:end]),
        )
        for start, end, found in kept
    ]
