"""Find the rules that fire on the spans of a text by looking conditions up, never by walking over the rules.

Surface rules lie in a trie of tokens. Each AND of two conditions lies under the one that is known first (start of a span,
then its end, then its inside): condition -> length -> other condition -> rules. So a text costs the conditions of its
positions that occur in some rule, however many rules there are.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from recis.tagger.conditions import shape_of
from recis.tagger.rules import AFFIX_CHARS, Condition, Rule, RuleSet, Span
from recis.tagger.text import BEGIN, END, Text
from recis.tagger.vote import label

Found = dict[tuple[int, int], list[Rule]]
Partners = dict[int, dict[int, dict[int, tuple[Rule, ...]]]]  # condition -> length -> other condition -> rules

_NOTHING: dict[int, dict[int, tuple[Rule, ...]]] = {}
_START, _END, _INSIDE = 0, 1, 2
_SIDES = {"prev": _START, "first": _START, "left": _START, "next": _END, "last": _END, "right": _END}


class RuleIndex:
    """The enabled rules of a set, ordered for look-up."""

    def __init__(self, rules: RuleSet) -> None:
        enabled = sorted((rule for rule in rules.rules if rule.enabled), key=lambda rule: rule.rule_id)
        typed = [rule for rule in enabled if any(test.kind in ("left", "right") for test in rule.tests)]
        self._plain = _Pass([rule for rule in enabled if rule not in typed], rules)
        self._full = _Pass(enabled, rules) if typed else None

    def matches(self, text: Text) -> dict[tuple[int, int], tuple[Rule, ...]]:
        """Return span -> the rules that fire on it. Rules with `left` or `right` see the types the others gave."""
        return {
            span: tuple(sorted(rules, key=lambda rule: rule.rule_id)) for span, rules in self._matches(text).items()
        }

    def tag(self, text: Text) -> list[Span]:
        """Return the spans after voting, left to right."""
        return label(text, self._matches(text))

    def _matches(self, text: Text) -> Found:
        found = self._plain.run(text, ())
        return found if self._full is None else self._full.run(text, label(text, found))


class _Pass:
    """One pass over a text with some rules."""

    def __init__(self, rules: list[Rule], rule_set: RuleSet) -> None:
        self._surfaces: dict[str, Any] = {}
        self._ids: dict[str, dict[str, int]] = defaultdict(dict)
        self._partners: tuple[Partners, Partners, Partners] = ({}, {}, {})
        self._dictionaries = rule_set.dictionaries
        for rule in rules:
            if len(rule.tests) == 1:
                self._add_surface(rule)
            else:
                self._add_pair(rule)
        self._sizes = {kind: sorted({value.count(" ") + 1 for value in self._ids[kind]}) for kind in ("prev", "next")}
        self._ids = dict(self._ids)
        self._has_pairs = any(self._partners)
        self._has_inside = any(_SIDES.get(kind, _INSIDE) == _INSIDE for kind in self._ids)

    def _add_surface(self, rule: Rule) -> None:
        node = self._surfaces
        for token in rule.tests[0].value.split(" "):
            node = node.setdefault(token, {})
        node[""] = (*node.get("", ()), rule)  # no token is empty

    def _add_pair(self, rule: Rule) -> None:
        anchor, other = sorted(rule.tests, key=lambda test: (_SIDES.get(test.kind, _INSIDE), test))
        table = self._partners[_SIDES.get(anchor.kind, _INSIDE)]
        others = table.setdefault(self._id(anchor), {}).setdefault(rule.length, {})
        others[self._id(other)] = (*others.get(self._id(other), ()), rule)

    def _id(self, condition: Condition) -> int:
        number = sum(map(len, self._ids.values()))
        return self._ids[condition.kind].setdefault(condition.value, number)

    def run(self, text: Text, spans: Iterable[Span]) -> Found:
        """Return span -> rules; spans are what an earlier pass gave."""
        found: Found = {}
        self._run_surfaces(text.tokens, found)
        if self._has_pairs and text.tokens:
            self._run_pairs(text, spans, found)
        return found

    def _run_surfaces(self, tokens: tuple[str, ...], found: Found) -> None:
        surfaces, num_tokens = self._surfaces, len(tokens)
        for start, token in enumerate(tokens):
            if token not in surfaces:
                continue
            node, end = surfaces[token], start + 1
            while node is not None:
                if "" in node:
                    found[start, end] = list(node[""])
                if end == num_tokens or (len(node) == 1 and "" in node):
                    break
                node, end = node.get(tokens[end]), end + 1

    def _run_pairs(self, text: Text, spans: Iterable[Span], found: Found) -> None:
        tokens = text.tokens
        num_tokens = len(tokens)
        begins, ends = self._starts(tokens, spans), self._ends(tokens, spans)
        by_start, by_end, by_inside = self._partners
        inside: dict[tuple[int, int], list[int]] = {}
        for start in range(num_tokens):
            for anchor in begins[start]:
                for length, others in by_start.get(anchor, _NOTHING).items():
                    end = start + length
                    if end <= num_tokens:
                        if ends[end]:
                            _collect(others, ends[end], (start, end), found)
                        if len(begins[start]) > 1:
                            _collect(others, begins[start], (start, end), found)
                        if self._has_inside:
                            _collect(others, self._inside(text, start, end, inside), (start, end), found)
        if by_end:
            for end in range(1, num_tokens + 1):
                for anchor in ends[end]:
                    for length, others in by_end.get(anchor, _NOTHING).items():
                        if end >= length:
                            here = self._inside(text, end - length, end, inside) if self._has_inside else ()
                            _collect(others, (*ends[end], *here), (end - length, end), found)
        if by_inside:
            lengths = sorted({length for table in by_inside.values() for length in table})
            for start in range(num_tokens):
                for length in lengths:
                    if start + length <= num_tokens:
                        here = self._inside(text, start, start + length, inside)
                        for anchor in here:
                            others = by_inside.get(anchor, {}).get(length)
                            if others:
                                _collect(others, here, (start, start + length), found)

    def _starts(self, tokens: tuple[str, ...], spans: Iterable[Span]) -> list[list[int]]:
        """Return per token the conditions that hold for every span beginning there."""
        padded = (BEGIN, *tokens)
        found: list[list[int]] = [[] for _ in tokens]
        prev, first, left = (self._ids.get(kind) for kind in ("prev", "first", "left"))
        if prev:
            for size in self._sizes["prev"]:
                if size == 1:
                    for start, value in enumerate(padded[:-1]):
                        if value in prev:
                            found[start].append(prev[value])
                    continue
                for start in range(size - 1, len(tokens)):
                    value = " ".join(padded[start + 1 - size : start + 1])
                    if value in prev:
                        found[start].append(prev[value])
        if first:
            for start, token in enumerate(tokens):
                if token in first:
                    found[start].append(first[token])
        if left:
            for span in spans:
                if span.end < len(tokens) and span.type in left:
                    found[span.end].append(left[span.type])
        return found

    def _ends(self, tokens: tuple[str, ...], spans: Iterable[Span]) -> list[list[int]]:
        """Return per end 0 .. T the conditions that hold for every span ending there."""
        padded = (*tokens, END)
        found: list[list[int]] = [[] for _ in padded]
        following, last, right = (self._ids.get(kind) for kind in ("next", "last", "right"))
        if following:
            for size in self._sizes["next"]:
                if size == 1:
                    for end, value in enumerate(padded):
                        if value in following:
                            found[end].append(following[value])
                    continue
                for end in range(1, len(padded) - size + 1):
                    value = " ".join(padded[end : end + size])
                    if value in following:
                        found[end].append(following[value])
        if last:
            for end, token in enumerate(tokens, 1):
                if token in last:
                    found[end].append(last[token])
        if right:
            for span in spans:
                if span.type in right:
                    found[span.start].append(right[span.type])
        return found

    def _inside(self, text: Text, start: int, end: int, known: dict[tuple[int, int], list[int]]) -> list[int]:
        """Return the conditions that hold for the tokens of a span themselves."""
        found = known.get((start, end))
        if found is None:
            surface, ids = text.surface(start, end), self._ids
            values = [("surface", surface), ("shape", shape_of(surface))]
            values += [("prefix", surface[:size]) for size in AFFIX_CHARS if len(surface) >= size]
            values += [("suffix", surface[-size:]) for size in AFFIX_CHARS if len(surface) >= size]
            values += [
                ("dictionary", name) for name in ids.get("dictionary", ()) if surface in self._dictionaries[name]
            ]
            found = [ids[kind][value] for kind, value in values if value in ids.get(kind, ())]
            known[start, end] = found
        return found


def _collect(
    others: dict[int, tuple[Rule, ...]], conditions: Iterable[int], span: tuple[int, int], found: Found
) -> None:
    for condition in conditions:
        rules = others.get(condition)
        if rules:
            found.setdefault(span, []).extend(rules)
