"""The rule language: conditions on a span of tokens, rules that give it a type, and the tagger that applies a rule file.

A rule is either one `surface` condition, or an AND of two conditions together with the span's length in tokens:

    surface     the span's tokens, joined by blanks           prefix, suffix   its first or last 4 to 6 characters
    first, last its first or last token                       prev, next       the 1 to 3 tokens before or behind it
    shape       digits|letters|mixed:short|medium|long        dictionary       name of a dictionary that holds the surface
    left, right type of the span that ends before it or begins behind it, given in an earlier pass

Before the first and behind the last token stand `<s>` and `</s>`. Source: rules as weak supervision, arXiv:2210.02768 and
arXiv:2107.02282; the condition kinds, ids and file format are ours.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from recis.errors import RecisError
from recis.tagger.text import TOKENIZER, TOKENIZERS, Text, tokenize

KINDS = ("surface", "prefix", "suffix", "shape", "prev", "next", "first", "last", "dictionary", "left", "right")
LENGTH = "length"
SOURCES = ("seed", "distilled", "human")
MAX_NGRAM = 3
MAX_SPAN_TOKENS = 5
AFFIX_CHARS = (4, 5, 6)


class RuleFormatError(RecisError, ValueError):
    """A rule file of another format or of another tokenizer than this version reads."""


@dataclass(frozen=True, slots=True, order=True)
class Condition:
    """One test of a span: its kind and the value it must have. A length is written in digits."""

    kind: str
    value: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """All conditions hold for a span -> it has type. precision and support are measured on the pool, not promised.

    Raises:
        ValueError: a condition kind is unknown, the conditions form no rule, or a figure is out of range; with the rule_id.
    """

    type: str
    conditions: tuple[Condition, ...]
    precision: float = 1.0
    support: int = 0
    source: str = "seed"
    round: int = 0
    """Pass of the distillation that accepted it; 0 for seeds and for rules of a person."""
    enabled: bool = True
    note: str = ""
    rule_id: str = field(default="", compare=False)
    """First 12 hex of sha256 over type and sorted conditions; made here, a given one must agree."""

    def __post_init__(self) -> None:
        made = make_rule_id(self.type, self.conditions)
        if self.rule_id not in ("", made):
            raise ValueError(f"rule {self.rule_id}: its type and conditions have the id {made}; leave rule_id out")
        object.__setattr__(self, "rule_id", made)
        object.__setattr__(self, "conditions", tuple(sorted(self.conditions)))
        _check(self)

    @property
    def length(self) -> int:
        """Tokens of a span that the rule can match."""
        for condition in self.conditions:
            if condition.kind == LENGTH:
                return int(condition.value)
        return len(self.conditions[0].value.split(" "))

    @property
    def tests(self) -> tuple[Condition, ...]:
        """The conditions without the length: one surface, or two."""
        return tuple(condition for condition in self.conditions if condition.kind != LENGTH)


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Tokens [start, end) and characters [char_start, char_end) of a text, with a type and how sure it is."""

    start: int
    end: int
    type: str
    conf: float = 1.0
    rules: tuple[str, ...] = ()
    char_start: int = -1
    char_end: int = -1
    surface: str = ""
    """The tokens, joined by blanks."""


def make_rule_id(kind: str, conditions: Iterable[Condition]) -> str:
    """Return the id that type and conditions give, whatever their order."""
    parts = [kind, *(f"{condition.kind}={condition.value}" for condition in sorted(conditions))]
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:12]


def surface_rule(
    kind: str,
    surface: str,
    *,
    precision: float = 1.0,
    support: int = 0,
    source: str = "seed",
    round: int = 0,
    enabled: bool = True,
    note: str = "",
) -> Rule:
    """Return the rule `surface -> type`."""
    return Rule(
        type=kind,
        conditions=(Condition("surface", surface),),
        precision=precision,
        support=support,
        source=source,
        round=round,
        enabled=enabled,
        note=note,
    )


def pair_rule(
    kind: str,
    one: Condition,
    two: Condition,
    length: int,
    *,
    precision: float = 1.0,
    support: int = 0,
    source: str = "seed",
    round: int = 0,
) -> Rule:
    """Return the rule `one AND two AND length -> type`."""
    conditions = (one, two, Condition(LENGTH, str(length)))
    return Rule(type=kind, conditions=conditions, precision=precision, support=support, source=source, round=round)


def _check(rule: Rule) -> None:
    name = f"rule {rule.rule_id}"
    if not 1 <= len(rule.conditions) <= 3:
        raise ValueError(f"{name}: needs 1 to 3 conditions; got {len(rule.conditions)}")
    for condition in rule.conditions:
        if condition.kind not in (*KINDS, LENGTH):
            raise ValueError(f"{name}: condition kind {condition.kind!r} is not known; there are {', '.join(KINDS)}")
        if not condition.value:
            raise ValueError(f"{name}: the value of {condition.kind} is empty")
    lengths = [condition.value for condition in rule.conditions if condition.kind == LENGTH]
    if any(not value.isascii() or not value.isdigit() or not 1 <= int(value) <= MAX_SPAN_TOKENS for value in lengths):
        raise ValueError(f"{name}: length must be 1 to {MAX_SPAN_TOKENS} tokens; got {lengths[0]!r}")
    tests = rule.tests
    is_surface = len(tests) == 1 and not lengths and tests[0].kind == "surface"
    is_pair = len(tests) == 2 and len(lengths) == 1 and tests[0] != tests[1]
    if not is_surface and not is_pair:
        raise ValueError(f"{name}: must be one surface condition, or two different ones and a length; got {tests}")
    if not 0 <= rule.precision <= 1:
        raise ValueError(f"{name}: precision must be in [0, 1]; got {rule.precision}")
    if rule.support < 0:
        raise ValueError(f"{name}: support must be at least 0; got {rule.support}")
    if rule.source not in SOURCES:
        raise ValueError(f"{name}: source must be one of {', '.join(SOURCES)}; got {rule.source!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleSet:
    """What a rule file holds.

    Raises:
        ValueError: a rule's type is not in the schema, two rules are the same, or a dictionary is missing.
        RuleFormatError: the tokenizer is not known here.
    """

    schema: tuple[str, ...]
    rules: tuple[Rule, ...]
    tokenizer: str = TOKENIZER
    dictionaries: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """name -> surfaces, for `dictionary` conditions"""

    def __post_init__(self) -> None:
        if self.tokenizer not in TOKENIZERS:
            raise RuleFormatError(
                f"rules are for tokenizer {self.tokenizer!r}; this version has {', '.join(TOKENIZERS)}"
            )
        seen: set[str] = set()
        for rule in self.rules:
            if rule.type not in self.schema:
                raise ValueError(f"rule {rule.rule_id}: type {rule.type!r} is not in the schema {list(self.schema)}")
            if rule.rule_id in seen:
                raise ValueError(f"rule {rule.rule_id} is there twice; remove one")
            seen.add(rule.rule_id)
            for condition in rule.tests:
                if condition.kind in ("left", "right") and condition.value not in self.schema:
                    raise ValueError(
                        f"rule {rule.rule_id}: {condition.kind} type {condition.value!r} is not in the schema"
                    )
                if condition.kind == "dictionary" and condition.value not in self.dictionaries:
                    raise ValueError(
                        f"rule {rule.rule_id}: there is no dictionary {condition.value!r} in the rule file"
                    )


class RuleTagger:
    """Applies a rule set to texts: `tag` one, `tag_batch` many. Holds an index; look-ups do not scan the rules."""

    def __init__(self, rules: RuleSet) -> None:
        from recis.tagger.match import RuleIndex

        self.rules = rules
        self._index = RuleIndex(rules)

    @classmethod
    def load(cls, path: str | Path) -> "RuleTagger":
        """Read a rule file; see recis.tagger.io.load_rules for its errors."""
        from recis.tagger.io import load_rules

        return cls(load_rules(path))

    def tag(self, text: str) -> list[Span]:
        """Return the spans of a text, left to right, none overlapping; an empty text has none."""
        return self.tag_text(tokenize(text, self.rules.tokenizer))

    def tag_text(self, text: Text) -> list[Span]:
        """Return the spans of a text whose tokens are given."""
        return self._index.tag(text)

    def tag_batch(self, texts: Iterable[str]) -> list[list[Span]]:
        """Return the spans of each text."""
        return [self.tag(text) for text in texts]

    def matches(self, text: Text) -> dict[tuple[int, int], tuple[Rule, ...]]:
        """Return every span that a rule fires on, before voting, with the rules that fired, sorted by rule_id."""
        return self._index.matches(text)
