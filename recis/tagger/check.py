"""Measure a rule file on labelled texts, list what a person should look at, and compare two rule files."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from recis.tagger.io import Labelled
from recis.tagger.rules import RuleSet, RuleTagger, Span
from recis.tagger.text import Text


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """A rule file with measured figures, and what was found."""

    rules: RuleSet
    """The same rules in the same order; precision and support are those of the labelled texts."""
    under_floor: tuple[str, ...]
    """Ids of enabled rules whose precision is under the floor."""
    silent: tuple[str, ...]
    """Ids of enabled rules that matched nothing; their figures stay as they were."""
    conflicts: tuple[tuple[str, str], ...]
    """Pairs of ids of rules with equal conditions and different types: they vote and tie."""


def check(rules: RuleSet, labelled: Sequence[Labelled], *, floor: float) -> Checked:
    """Count, for each enabled rule, its matches N and those with its type F: precision F / N, support F.

    A match of a surface rule inside a longer gold span is not counted: the longer span would be taken first.
    """
    tagger = RuleTagger(rules)
    right, matched = Counter[str](), Counter[str]()
    for row in labelled:
        type_of = {(start, end): name for start, end, name in row.spans}
        inside = {word for start, end, _ in row.spans for word in range(start, end) if end - start > 1}
        for (start, end), fired in tagger.matches(row.text).items():
            hidden = (start, end) not in type_of and all(word in inside for word in range(start, end))
            for rule in fired:
                if hidden and len(rule.tests) == 1:
                    continue
                matched[rule.rule_id] += 1
                right[rule.rule_id] += type_of.get((start, end)) == rule.type
    measured = tuple(
        replace(rule, precision=right[rule.rule_id] / matched[rule.rule_id], support=right[rule.rule_id])
        if matched[rule.rule_id]
        else rule
        for rule in rules.rules
    )
    by_conditions: dict[object, list[str]] = defaultdict(list)
    for rule in rules.rules:
        by_conditions[rule.conditions].append(rule.rule_id)
    return Checked(
        rules=replace(rules, rules=measured),
        under_floor=tuple(r.rule_id for r in measured if r.enabled and matched[r.rule_id] and r.precision < floor),
        silent=tuple(r.rule_id for r in measured if r.enabled and not matched[r.rule_id]),
        conflicts=tuple(
            (one, two) for ids in by_conditions.values() for place, one in enumerate(ids) for two in ids[place + 1 :]
        ),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """Spans of one text that only one of two taggers gives."""

    text_id: str
    lost: tuple[Span, ...]
    new: tuple[Span, ...]


def diff(old: RuleSet, new: RuleSet, text_ids: Sequence[str], texts: Sequence[Text]) -> list[Change]:
    """Return the texts whose spans change, by boundaries and type."""
    before, after = RuleTagger(old), RuleTagger(new)
    changes: list[Change] = []
    for text_id, text in zip(text_ids, texts, strict=True):
        one = {(span.start, span.end, span.type): span for span in before.tag_text(text)}
        two = {(span.start, span.end, span.type): span for span in after.tag_text(text)}
        lost = tuple(span for key, span in one.items() if key not in two)
        gained = tuple(span for key, span in two.items() if key not in one)
        if lost or gained:
            changes.append(Change(text_id=text_id, lost=lost, new=gained))
    return changes
