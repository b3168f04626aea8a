"""Turn the rules that fired into one type per span, and overlapping spans into a set without overlaps.

    type      the one that most rules name; a tie abstains       share   its votes / all votes
    overlaps  longest span first, then the larger share, then leftmost

Nothing here depends on the order of the rules.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from recis.tagger.rules import Rule, Span
from recis.tagger.text import Text


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


def label(text: Text, matches: Mapping[tuple[int, int], Sequence[Rule]]) -> list[Span]:
    """Return the spans that the firing rules agree on, left to right.

    conf of a span is its vote share times the largest measured precision among the rules that won.
    """
    voted: list[tuple[int, float, int, str, Sequence[Rule]]] = []
    for (start, end), rules in matches.items():
        name, share = (rules[0].type, 1.0) if len(rules) == 1 else majority([rule.type for rule in rules])
        if name is not None:
            voted.append((start - end, -share, start, name, rules))
    if len(voted) > 1:
        voted.sort(key=lambda item: item[:3])
    taken = bytearray(len(text.tokens))
    spans: list[Span] = []
    for negative_length, negative_share, start, name, rules in voted:
        end = start - negative_length
        if 1 in taken[start:end]:
            continue
        taken[start:end] = b"\x01" * (end - start)
        winners = rules if len(rules) == 1 else [rule for rule in rules if rule.type == name]
        spans.append(
            Span(
                start=start,
                end=end,
                type=name,
                conf=-negative_share * max(rule.precision for rule in winners),
                rules=tuple(sorted(rule.rule_id for rule in winners)),
                char_start=text.starts[start],
                char_end=text.ends[end - 1],
                surface=text.surface(start, end),
            )
        )
    spans.sort(key=lambda span: span.start)
    return spans
