"""Scores of codes and numbers without an encoder: compare the entity with the codes and numbers found in the query.

    code_match     the entity's letters and digits equal those of a run of query words, or all but a country suffix
    number_match   same unit, within 2 percent

Both say one of four things, and each type has a learned logit for each: the query names this value (EQUAL), it names another
(DIFFERENT), it names none (QUERY_SILENT), or it names one and the item has none (ITEM_SILENT). Comparators are our design.
"""

import re
from collections.abc import Sequence
from decimal import Decimal
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from recis.ebrm.canonical import Quantity, find_quantities, parse_quantity, split_at_quantities
from recis.ebrm.entities import NONE, EntitySchema, TypeConfig, type_of, value_of

EQUAL, DIFFERENT, QUERY_SILENT, ITEM_SILENT = 0, 1, 2, 3
START_LOGITS = (4.0, -4.0, 4.0, -1.0)  # untrained: accept what is equal or not asked for, doubt what is not stated
MAX_WORDS = 5  # words of a query that one code may spread over
MIN_CODE_CHARS = 4
MIN_COMMON_CHARS = 7  # codes that share this many characters may differ in a country suffix
MAX_SUFFIX_CHARS = 2
TOLERANCE = Decimal("0.02")
_WORD = re.compile(r"[a-z0-9]+(?:[./+-][a-z0-9]+)*")
_NO_CODE = re.compile(r"\d+(?:[.,]\d+)?(?:p|k|x\d+\w*|[a-z]{1,2})|\d+x\d+\w*|(?:19|20)\d\d")  # 1080p, 4k, 177x54, 60hz


class QueryFacts(NamedTuple):
    """What a canonical query says in codes and numbers."""

    codes: frozenset[str]
    """Alphanumeric cores of its codes: words of letters and digits, or a word and the number behind it."""
    runs: frozenset[str]
    """Cores of all runs of up to MAX_WORDS words."""
    quantities: tuple[Quantity, ...]


def core_of(text: str) -> str:
    """Return the letters and digits of a text, joined."""
    return "".join(character for character in text if character.isalnum())


@lru_cache(maxsize=4096)
def query_facts(query: str) -> QueryFacts:
    """Return the codes and numbers of a canonical query."""
    quantities = find_quantities(query)
    words = [core_of(word) for word in _WORD.findall(query)]
    codes = set()
    for part in split_at_quantities(query):  # "tv 55 inch" names no code tv55
        plain = [core_of(word) for word in _WORD.findall(part)]
        codes.update(word for word in plain if _is_code(word))
        codes.update(before + after for before, after in pairwise(plain) if _is_numbered(before, after))
    runs = {
        "".join(words[first:last])
        for first in range(len(words))
        for last in range(first + 1, min(first + MAX_WORDS, len(words)) + 1)
    }
    return QueryFacts(frozenset(codes), frozenset(runs), quantities)


def code_match(facts: QueryFacts, value: str) -> int:
    """Compare a code, a canonical value or `none`, with those of a query."""
    if value == NONE:
        return ITEM_SILENT if facts.codes else QUERY_SILENT
    core = core_of(value)
    if core in facts.runs or any(_same_but_country(core, code) for code in facts.codes):
        return EQUAL
    return DIFFERENT if facts.codes else QUERY_SILENT


def number_match(facts: QueryFacts, value: str, units: tuple[str, ...] = ()) -> int:
    """Compare a number with its unit, a canonical value or `none`, with those of a query.

    A value that is no number says nothing, so it counts as `none`. `units` are those that the type's values have.
    """
    quantity = None if value == NONE else parse_quantity(value)
    if quantity is None:
        asked = any(number.unit in units for number in facts.quantities)
        return ITEM_SILENT if asked else QUERY_SILENT
    asked_for = [number.value for number in facts.quantities if number.unit == quantity.unit]
    if any(abs(number - quantity.value) <= TOLERANCE * max(number, quantity.value) for number in asked_for):
        return EQUAL
    return DIFFERENT if asked_for else QUERY_SILENT


class Comparators(nn.Module):
    """Learned logits of the four outcomes, per compared type of a schema.

    Attributes:
        names: the compared types.
        logits: [C, 4], one row per compared type.
    """

    def __init__(self, schema: EntitySchema) -> None:
        super().__init__()
        self.types = {config.name: config for config in schema.types if config.scorer == "comparator"}
        self.names = tuple(self.types)
        self._rows = {name: row for row, name in enumerate(self.names)}
        self.logits = nn.Parameter(torch.tensor([START_LOGITS] * len(self.names)).reshape(-1, 4))

    def outcomes(self, pairs: Sequence[tuple[str, str]]) -> Tensor:
        """Return the outcome [P] int64 of pairs (canonical query, entity id) of compared types."""
        return torch.tensor(
            [outcome(self.types[type_of(entity)], query, value_of(entity)) for query, entity in pairs],
            dtype=torch.int64,
        )

    def forward(self, pairs: Sequence[tuple[str, str]]) -> Tensor:
        """Return logits [P] of pairs (canonical query, entity id) of compared types; differentiable in `logits`."""
        rows = torch.tensor([self._rows[type_of(entity)] for _, entity in pairs], dtype=torch.int64)
        return self.logits[rows, self.outcomes(pairs)]


def outcome(config: TypeConfig, query: str, value: str) -> int:
    """Return what comparing a canonical query with a value of a type says."""
    facts = query_facts(query)
    return code_match(facts, value) if config.kind == "code" else number_match(facts, value, config.units)


def _is_code(word: str) -> bool:
    has_both = any(c.isdigit() for c in word) and any(c.isalpha() for c in word)
    return has_both and len(word) >= MIN_CODE_CHARS and not _is_quantity(word) and _NO_CODE.fullmatch(word) is None


def _is_quantity(word: str) -> bool:
    quantity = parse_quantity(word)
    return quantity is not None and quantity.unit != ""


def _is_numbered(word: str, number: str) -> bool:
    """Whether two words are one code: "ik 1620", "galaxy j7"; but not "tv 4k", "fridge 2017"."""
    has_digit = any(character.isdigit() for character in number)
    return word.isalpha() and has_digit and _NO_CODE.fullmatch(number) is None and _is_code(word + number)


def _same_but_country(a: str, b: str) -> bool:
    short, long = sorted((a, b), key=len)
    suffix = long[len(short) :]
    fits = len(short) >= MIN_COMMON_CHARS and long.startswith(short)
    return fits and (not suffix or (len(suffix) <= MAX_SUFFIX_CHARS and suffix.isalpha()))
