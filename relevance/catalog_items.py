"""Items of the generated catalogue, built so that a query gets the label that was drawn, and graded independently of that."""

from collections.abc import Callable, Mapping
from random import Random

from relevance.catalog_queries import QuerySpec
from relevance.catalog_rules import FAMILY_OF_NOUN, Wanted, category_verdict, decide
from relevance.catalog_words import ATTRIBUTES, CATEGORY_FAMILIES, CategoryFamily
from relevance.data import StepGold

Draft = tuple[str, dict[str, str], int]
"""Category, attributes and price of an item."""
_ATTRIBUTE_OF_VALUE = {value: name for name, values in ATTRIBUTES.items() for value in values if name != "waterproof"}
_MIN_STATED, _MAX_STATED = 3, 6


def grade(spec: QuerySpec, draft: Draft) -> StepGold:
    """Return the gold steps of a pair by the decision list; it knows nothing of how the item was built."""
    noun, attributes, price = draft
    verdicts = [_verdict(entry, attributes, price, spec.max_price) for entry in spec.wanted]
    return StepGold(
        category=category_verdict(spec.noun, noun),
        attributes={entry.name: verdict for entry, verdict in zip(spec.wanted, verdicts, strict=True)},
        rule=decide(spec.noun, noun, spec.wanted, verdicts),
        wanted={entry.name: entry.value for entry in spec.wanted},
    )


def _verdict(wanted: Wanted, attributes: Mapping[str, str], price: int, max_price: int | None) -> str:
    if wanted.role == "price":
        return "ok" if max_price is not None and price < max_price else "miss"
    if wanted.role == "negated":
        stated = attributes.get(_ATTRIBUTE_OF_VALUE[wanted.name])
        return "unknown" if stated is None else "miss" if stated == wanted.name else "ok"
    stated = attributes.get(wanted.name)
    return "unknown" if stated is None else "ok" if stated == wanted.value else "miss"


def build(label: int, spec: QuerySpec, rng: Random) -> Draft:
    """Return an item that is meant to get a label for a query."""
    return _BUILDERS[label - 1](spec, rng)


def _excellent(spec: QuerySpec, rng: Random) -> Draft:
    return _finished(spec, spec.noun, _fitting(spec, rng), rng)


def _related(spec: QuerySpec, rng: Random) -> Draft:
    attributes = _fitting(spec, rng)
    secondary = [entry.name for entry in spec.wanted if entry.role == "secondary"]
    stated = list(attributes)
    ways = ["substitute", *(["missed"] if secondary else []), *(["unknown"] if stated else [])]
    way = ways[int(rng.random() * len(ways))]
    if way == "substitute":
        nouns = _family(spec.noun).nouns
        return _finished(spec, nouns[nouns.index(spec.noun) ^ 1], attributes, rng)
    if way == "missed":
        name = secondary[int(rng.random() * len(secondary))]
        attributes[name] = _other(name, attributes[name], rng)
        return _finished(spec, spec.noun, attributes, rng)
    omitted = stated[int(rng.random() * len(stated))]
    del attributes[omitted]
    return _finished(spec, spec.noun, attributes, rng, omitted=omitted)


def _mismatch(spec: QuerySpec, rng: Random) -> Draft:
    attributes = _fitting(spec, rng)
    by_role = {role: [entry.name for entry in spec.wanted if entry.role == role] for role in _ROLES}
    ways = ["near", *(["primary"] if by_role["primary"] else []), *(["two"] if len(by_role["secondary"]) > 1 else [])]
    hard = [role for role in ("negated", "price") if by_role[role]]
    way = hard[0] if hard and rng.random() < 0.5 else ways[int(rng.random() * len(ways))]
    if way == "price":
        assert spec.max_price is not None
        return spec.noun, _filled(spec.noun, attributes, rng), int(spec.max_price * (1.05 + 0.5 * rng.random())) + 1
    if way == "near":
        nouns = _family(spec.noun).nouns
        first = 2 - nouns.index(spec.noun) // 2 * 2
        for name in list(attributes):
            if rng.random() < 0.5:
                attributes[name] = _other(name, attributes[name], rng)
        return _finished(spec, nouns[first + int(rng.random() * 2)], attributes, rng)
    if way == "negated":
        excluded = by_role["negated"][0]
        attributes[_ATTRIBUTE_OF_VALUE[excluded]] = excluded
    elif way == "primary":
        name = by_role["primary"][int(rng.random() * len(by_role["primary"]))]
        attributes[name] = _other(name, attributes[name], rng)
    else:
        for name in by_role["secondary"][:2]:
            attributes[name] = _other(name, attributes[name], rng)
    return _finished(spec, spec.noun, attributes, rng)


def _irrelevant(spec: QuerySpec, rng: Random) -> Draft:
    step = 1 + int(rng.random() * (len(CATEGORY_FAMILIES) - 1))
    family = CATEGORY_FAMILIES[(FAMILY_OF_NOUN[spec.noun] + step) % len(CATEGORY_FAMILIES)]
    noun = family.nouns[int(rng.random() * len(family.nouns))]
    return noun, _filled(noun, {}, rng), int(family.price * (0.5 + rng.random()))


_BUILDERS: tuple[Callable[[QuerySpec, Random], Draft], ...] = (_irrelevant, _mismatch, _related, _excellent)
_ROLES = ("primary", "secondary", "negated", "price")


def _fitting(spec: QuerySpec, rng: Random) -> dict[str, str]:
    """Return attributes that meet every constraint."""
    attributes = {}
    for entry in spec.wanted:
        if entry.role == "negated":
            name = _ATTRIBUTE_OF_VALUE[entry.name]
            attributes[name] = _other(name, entry.name, rng)
        elif entry.role != "price":
            attributes[entry.name] = entry.value
    return attributes


def _finished(
    spec: QuerySpec, noun: str, attributes: dict[str, str], rng: Random, *, omitted: str | None = None
) -> Draft:
    """Add further attributes and a price that is right."""
    if spec.max_price is None:
        price = int(_family(noun).price * (0.5 + rng.random()))
    else:
        price = max(1, int(spec.max_price * (0.5 + 0.45 * rng.random())))
    return noun, _filled(noun, attributes, rng, omitted), price


def _filled(noun: str, attributes: dict[str, str], rng: Random, omitted: str | None = None) -> dict[str, str]:
    """Return the attributes with random further ones of the family, 3 to 6 in all."""
    free = [name for name in _family(noun).attributes if name not in attributes and name != omitted]
    num_stated = _MIN_STATED + int(rng.random() * (_MAX_STATED - _MIN_STATED + 1))
    while free and len(attributes) < num_stated:
        name = free.pop(int(rng.random() * len(free)))
        attributes[name] = ATTRIBUTES[name][int(rng.random() * len(ATTRIBUTES[name]))]
    return attributes


def _other(name: str, value: str, rng: Random) -> str:
    others = [other for other in ATTRIBUTES[name] if other != value]
    return others[int(rng.random() * len(others))]


def _family(noun: str) -> CategoryFamily:
    return CATEGORY_FAMILIES[FAMILY_OF_NOUN[noun]]
