"""Find the rules that fire on the spans of a text by looking conditions up, never by walking over the rules.

One look-up per token gives what the rules say of it: the trie of surfaces that begin with it, and its numbers as the
token before, behind, first in or last in a span. Each AND of two conditions lies under the one that is known first (start
of a span, then its end, then its inside): condition -> length -> other condition -> rules. So a text costs the conditions
of its positions that occur in some rule, however many rules there are. Rules with the same conditions are one bucket; what
a bucket, or several on one span, vote for is worked out once and looked up from then on.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from recis.tagger.conditions import shape_of
from recis.tagger.rules import AFFIX_CHARS, Condition, Rule, RuleSet, Span
from recis.tagger.text import BEGIN, END, Text
from recis.tagger.vote import Vote, place_votes, vote

Ids = tuple[int, ...]  # numbers of conditions
Buckets = tuple[int, ...]
Found = dict[tuple[int, int], Buckets]  # span -> buckets that fire on it
KNOWN = 1 << 16  # votes and surfaces that are remembered, each; real rule sets and vocabularies have some thousands

_START, _END, _INSIDE = 0, 1, 2
_SIDES = {"prev": _START, "first": _START, "left": _START, "next": _END, "last": _END, "right": _END}


class RuleIndex:
    """The enabled rules of a set, ordered for look-up."""

    def __init__(self, rules: RuleSet) -> None:
        enabled = sorted((rule for rule in rules.rules if rule.enabled), key=attrgetter("rule_id"))
        typed = {rule.rule_id for rule in enabled if any(test.kind in ("left", "right") for test in rule.tests)}
        self._plain = _Pass([rule for rule in enabled if rule.rule_id not in typed], rules)
        self._full = _Pass(enabled, rules) if typed else None

    def matches(self, text: Text) -> dict[tuple[int, int], tuple[Rule, ...]]:
        """Return span -> the rules that fire on it. Rules with `left` or `right` see the types the others gave."""
        last = self._full or self._plain
        found = self._plain.run(text, ()) if self._full is None else self._full.run(text, self._plain.tag(text, ()))
        return {span: last.rules_of(buckets) for span, buckets in found.items()}

    def tag(self, text: Text) -> list[Span]:
        """Return the spans after voting, left to right."""
        spans = self._plain.tag(text, ())
        return spans if self._full is None else self._full.tag(text, spans)


@dataclass(slots=True)
class _Word:
    """What the rules say of one token."""

    surfaces: dict[str, Any] | None = None
    """Trie of the tokens behind it; "" leads to the bucket of what ends there."""
    prev: Ids = ()
    next: Ids = ()
    first: Ids = ()
    last: Ids = ()
    long_prev: dict[int, dict[str, Ids]] = field(default_factory=dict)
    """Tokens -> n-gram that ends in this token -> its number as `prev`."""
    long_next: dict[int, dict[str, Ids]] = field(default_factory=dict)


@dataclass(slots=True)
class _Partners:
    """Rules under one condition, for spans of one length: other condition -> bucket, by where the other looks."""

    by_side: tuple[dict[int, Buckets], dict[int, Buckets], dict[int, Buckets]] = field(
        default_factory=lambda: ({}, {}, {})
    )


class _Pass:
    """One pass over a text with some rules."""

    def __init__(self, rules: list[Rule], rule_set: RuleSet) -> None:
        self._buckets: list[list[Rule]] = []
        self._votes: dict[Buckets, Vote | None] = {}
        self._inside: dict[str, Ids] = {}
        self._words: dict[str, _Word] = {}
        self._unknown = _Word()
        self._ids: dict[str, dict[str, Ids]] = defaultdict(dict)
        self._partners: tuple[dict[int, dict[int, _Partners]], ...] = ({}, {}, {})
        self._dictionaries = rule_set.dictionaries
        for rule in rules:
            if len(rule.tests) == 1:
                self._add_surface(rule)
            else:
                self._add_pair(rule)
        self._ids = dict(self._ids)
        self._lengths = sorted({length for table in self._partners[_INSIDE].values() for length in table})
        self._has_pairs = any(self._partners)
        self._has_long_prev = any(word.long_prev for word in self._words.values())
        self._has_long_next = any(word.long_next for word in self._words.values())

    def _word(self, token: str) -> _Word:
        return self._words.setdefault(token, _Word())

    def _add_surface(self, rule: Rule) -> None:
        first, *others = rule.tests[0].value.split(" ")
        word = self._word(first)
        node = word.surfaces = {} if word.surfaces is None else word.surfaces
        for token in others:
            node = node.setdefault(token, {})
        self._put(node, "", rule)  # no token is empty

    def _add_pair(self, rule: Rule) -> None:
        anchor, other = sorted(rule.tests, key=lambda test: (_SIDES.get(test.kind, _INSIDE), test))
        under = self._partners[_SIDES.get(anchor.kind, _INSIDE)].setdefault(self._id(anchor)[0], {})
        partners = under.setdefault(rule.length, _Partners())
        self._put(partners.by_side[_SIDES.get(other.kind, _INSIDE)], self._id(other)[0], rule)

    def _put(self, table: dict[Any, Any], key: str | int, rule: Rule) -> None:
        if key not in table:
            table[key] = (len(self._buckets),)
            self._buckets.append([])
        self._buckets[table[key][0]].append(rule)

    def _id(self, condition: Condition) -> Ids:
        kind, value = condition.kind, condition.value
        if value not in self._ids[kind]:
            number = self._ids[kind][value] = (sum(map(len, self._ids.values())),)
            if kind in ("prev", "next", "first", "last"):
                tokens = value.split(" ")
                if len(tokens) == 1:
                    setattr(self._word(value), kind, number)
                elif kind == "prev":
                    self._word(tokens[-1]).long_prev.setdefault(len(tokens), {})[value] = number
                else:
                    self._word(tokens[0]).long_next.setdefault(len(tokens), {})[value] = number
        return self._ids[kind][value]

    def tag(self, text: Text, spans: Iterable[Span]) -> list[Span]:
        """Return the spans after voting; spans are what an earlier pass gave."""
        votes = self._votes
        ballots: list[tuple[tuple[int, int], Vote | None]] = []
        for span, buckets in self.run(text, spans).items():
            if buckets not in votes:
                if len(votes) >= KNOWN:
                    votes.clear()
                votes[buckets] = vote(self.rules_of(buckets))
            ballots.append((span, votes[buckets]))
        return place_votes(text, ballots)

    def rules_of(self, buckets: Buckets) -> tuple[Rule, ...]:
        """Return the rules of some buckets, sorted by rule_id."""
        return tuple(sorted((rule for bucket in buckets for rule in self._buckets[bucket]), key=attrgetter("rule_id")))

    def run(self, text: Text, spans: Iterable[Span]) -> Found:
        """Return span -> buckets; spans are what an earlier pass gave."""
        found: Found = {}
        if text.tokens:
            known, unknown = self._words, self._unknown
            words = [known.get(token, unknown) for token in text.tokens]
            self._run_surfaces(text.tokens, words, found)
            if self._has_pairs:
                self._run_pairs(text, self._starts(text, words, spans), self._ends(text, words, spans), found)
        return found

    def _run_surfaces(self, tokens: tuple[str, ...], words: Sequence[_Word], found: Found) -> None:
        num_tokens = len(tokens)
        for start, word in enumerate(words):
            node, end = word.surfaces, start + 1
            while node is not None:
                if "" in node:
                    found[start, end] = node[""]
                if end == num_tokens or (len(node) == 1 and "" in node):
                    break
                node, end = node.get(tokens[end]), end + 1

    def _run_pairs(self, text: Text, starts: Sequence[Ids], ends: Sequence[Ids], found: Found) -> None:
        by_start, by_end, by_inside = self._partners
        num_tokens = len(starts)
        for start, anchors in enumerate(starts):
            for anchor in anchors:
                for length, partners in by_start.get(anchor, _NOTHING).items():
                    end = start + length
                    if end <= num_tokens:
                        at_start, at_end, inside = partners.by_side
                        if at_end and ends[end]:
                            _collect(at_end, ends[end], (start, end), found)
                        if at_start:
                            _collect(at_start, anchors, (start, end), found)
                        if inside:
                            _collect(inside, self._held(text, start, end), (start, end), found)
        if by_end:
            for end, anchors in enumerate(ends):
                for anchor in anchors:
                    for length, partners in by_end.get(anchor, _NOTHING).items():
                        if end >= length:
                            _, at_end, inside = partners.by_side
                            if at_end:
                                _collect(at_end, anchors, (end - length, end), found)
                            if inside:
                                _collect(inside, self._held(text, end - length, end), (end - length, end), found)
        for length in self._lengths:
            for start in range(num_tokens - length + 1):
                held = self._held(text, start, start + length)
                for anchor in held:
                    partners = by_inside.get(anchor, _NOTHING).get(length)
                    if partners is not None:
                        _collect(partners.by_side[_INSIDE], held, (start, start + length), found)

    def _starts(self, text: Text, words: Sequence[_Word], spans: Iterable[Span]) -> list[Ids]:
        """Return per token the conditions that hold for every span beginning there."""
        before = [self._words.get(BEGIN, self._unknown), *words[:-1]]
        found = [word.prev for word in before]
        if "first" in self._ids:
            found = [ids + word.first for ids, word in zip(found, words, strict=True)]
        if self._has_long_prev:
            padded = (BEGIN, *text.tokens)
            for start, word in enumerate(before):
                for size, table in word.long_prev.items():
                    if start + 1 >= size:
                        found[start] += table.get(" ".join(padded[start + 1 - size : start + 1]), ())
        if "left" in self._ids:
            for span in spans:
                if span.end < len(words):
                    found[span.end] += self._ids["left"].get(span.type, ())
        return found

    def _ends(self, text: Text, words: Sequence[_Word], spans: Iterable[Span]) -> list[Ids]:
        """Return per end 0 .. T the conditions that hold for every span ending there."""
        behind = [*words, self._words.get(END, self._unknown)]
        found = [word.next for word in behind]
        if "last" in self._ids:
            found[1:] = [ids + word.last for ids, word in zip(found[1:], words, strict=True)]
        if self._has_long_next:
            padded = (*text.tokens, END)
            for end, word in enumerate(behind):
                for size, table in word.long_next.items():
                    if end + size <= len(padded):
                        found[end] += table.get(" ".join(padded[end : end + size]), ())
        if "right" in self._ids:
            for span in spans:
                found[span.start] += self._ids["right"].get(span.type, ())
        found[0] = ()  # no span ends there
        return found

    def _held(self, text: Text, start: int, end: int) -> Ids:
        """Return the conditions that hold for the tokens of a span themselves."""
        surface = text.tokens[start] if end - start == 1 else " ".join(text.tokens[start:end])
        found = self._inside.get(surface)
        if found is None:
            if len(self._inside) >= KNOWN:
                self._inside.clear()
            values = [("surface", surface), ("shape", shape_of(surface))]
            values += [("prefix", surface[:size]) for size in AFFIX_CHARS if len(surface) >= size]
            values += [("suffix", surface[-size:]) for size in AFFIX_CHARS if len(surface) >= size]
            values += [
                ("dictionary", name) for name in self._ids.get("dictionary", ()) if surface in self._dictionaries[name]
            ]
            found = tuple(number for kind, value in values for number in self._ids.get(kind, {}).get(value, ()))
            self._inside[surface] = found
        return found


_NOTHING: dict[int, _Partners] = {}


def _collect(others: dict[int, Buckets], conditions: Ids, span: tuple[int, int], found: Found) -> None:
    for condition in conditions:
        bucket = others.get(condition)
        if bucket is not None:
            found[span] = found[span] + bucket if span in found else bucket
