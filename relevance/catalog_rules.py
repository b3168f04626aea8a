"""The decision list of the generated catalogue, and its 36 rules as a rule base.

    C01 category mismatch 1 | N01 excluded value stated 2 | P01-P12 primary constraint missed 2 | B01 over the price 2
    S01-S06 near, listed substitute, all primary ok 3 | C02 near otherwise 2
    A01 two or more secondary missed 2 | A02-A13 one secondary missed, or any unknown 3 | E01 none of these 4

The first that fires decides. P, S and A02 to A13 are specialised per category family. The list is ours.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from relevance.catalog_words import ATTRIBUTES, CATEGORY_FAMILIES, CategoryFamily
from relevance.data import Pair
from relevance.rules import Rule, RuleBase, always

_WORD = re.compile(r"[a-z0-9]+")
_NEGATIONS = frozenset({"without", "not", "no"})
FAMILY_OF_NOUN = {noun: number for number, family in enumerate(CATEGORY_FAMILIES) for noun in family.nouns}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One constraint of a query."""

    name: str
    """Attribute; the excluded value itself for a negated one; "price"."""
    value: str
    """Wanted value; "none" for a negated one; "under N" for a price."""
    role: str
    """"primary", "secondary", "negated" or "price"."""


def category_verdict(wanted_noun: str, noun: str) -> str:
    """Return match, near (same family) or mismatch."""
    if noun == wanted_noun:
        return "match"
    return "near" if FAMILY_OF_NOUN[noun] == FAMILY_OF_NOUN[wanted_noun] else "mismatch"


def is_substitute(wanted_noun: str, noun: str) -> bool:
    """Return whether a near category is listed as a substitute."""
    nouns = CATEGORY_FAMILIES[FAMILY_OF_NOUN[wanted_noun]].nouns
    return noun in nouns and noun != wanted_noun and nouns.index(noun) // 2 == nouns.index(wanted_noun) // 2


def decide(noun: str, item_noun: str, wanted: Sequence[Wanted], verdicts: Sequence[str]) -> str:
    """Return the id of the rule that decides.

    Args:
        noun: category that the query asks for.
        item_noun: category of the item.
        wanted: constraints of the query.
        verdicts: ok, miss or unknown per constraint.
    """
    family_number = FAMILY_OF_NOUN[noun]
    family = CATEGORY_FAMILIES[family_number]
    category = category_verdict(noun, item_noun)
    if category == "mismatch":
        return "C01"
    missed = [entry for entry, verdict in zip(wanted, verdicts, strict=True) if verdict == "miss"]
    if any(entry.role == "negated" for entry in missed):
        return "N01"
    for entry in missed:
        if entry.role == "primary":
            return f"P{2 * family_number + family.primary.index(entry.name) + 1:02d}"
    if any(entry.role == "price" for entry in missed):
        return "B01"
    if category == "near":
        are_primary_ok = all(
            verdict == "ok" for entry, verdict in zip(wanted, verdicts, strict=True) if entry.role == "primary"
        )
        return f"S{family_number + 1:02d}" if is_substitute(noun, item_noun) and are_primary_ok else "C02"
    if len(missed) >= 2:
        return "A01"
    if missed:
        return f"A{2 * family_number + 2:02d}"
    return f"A{2 * family_number + 3:02d}" if "unknown" in verdicts else "E01"


@dataclass(frozen=True, slots=True)
class _QueryView:
    """What the words of a query show: families of its nouns, attributes it may state, operators."""

    families: frozenset[int]
    attributes: frozenset[str]
    has_negation: bool
    has_price: bool


@lru_cache(maxsize=65536)
def _view(query: str) -> _QueryView:
    words = set(_WORD.findall(query.lower()))
    attributes = {name for name, values in ATTRIBUTES.items() if any(value.split()[0] in words for value in values)}
    attributes |= words & ATTRIBUTES.keys()
    families = frozenset(FAMILY_OF_NOUN[word] for word in words & FAMILY_OF_NOUN.keys())
    return _QueryView(families, frozenset(attributes), bool(words & _NEGATIONS), "cheaper" in words)


def _family_rule(number: int, attribute: str | None = None) -> Callable[[Pair], bool]:
    def applies(pair: Pair) -> bool:
        view = _view(pair.query)
        return number in view.families and (attribute is None or attribute in view.attributes)

    return applies


def _has_negation(pair: Pair) -> bool:
    return _view(pair.query).has_negation


def _has_price(pair: Pair) -> bool:
    return _view(pair.query).has_price


def catalog_rules() -> RuleBase:
    """Return the rule base of the generated catalogue, in the order in which the rules decide."""
    families = list(enumerate(CATEGORY_FAMILIES))
    rules = [
        Rule(id="C01", text="other kind of thing", decides=1, applies=always),
        Rule(id="N01", text="has what the query excludes", decides=2, applies=_has_negation),
    ]
    rules += [rule for number, family in families for rule in _primary_rules(number, family)]
    rules.append(Rule(id="B01", text="costs more than the reference", decides=2, applies=_has_price))
    rules += [
        Rule(id=f"S{number + 1:02d}", text=_substitutes(family), decides=3, applies=_family_rule(number))
        for number, family in families
    ]
    rules += [
        Rule(id="C02", text="only near kind of thing", decides=2, applies=always),
        Rule(id="A01", text="two wishes missed", decides=2, applies=always),
    ]
    for number, family in families:
        one, unknown = f"A{2 * number + 2:02d}", f"A{2 * number + 3:02d}"
        in_family = _family_rule(number)
        rules.append(Rule(id=one, text=f"{family.name}, one wish missed", decides=3, applies=in_family))
        rules.append(Rule(id=unknown, text=f"{family.name}, a wish unknown", decides=3, applies=in_family))
    rules.append(Rule(id="E01", text="all met", decides=4, applies=always))
    return RuleBase(tuple(rules))


def _primary_rules(number: int, family: CategoryFamily) -> list[Rule]:
    return [
        Rule(
            id=f"P{2 * number + place + 1:02d}",
            text=f"{family.name}, {attribute} missed",
            decides=2,
            applies=_family_rule(number, attribute),
        )
        for place, attribute in enumerate(family.primary)
    ]


def _substitutes(family: CategoryFamily) -> str:
    first, second, third, fourth = family.nouns
    return f"{first} for {second}, {third} for {fourth}"
