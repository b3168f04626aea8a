"""Queries of the generated catalogue: what is asked for, and how it is said.

Families: `plain` states its constraints; `negation` excludes a value; `alternative` wants it cheaper than a reference;
`question` asks for a property by what it does; `knowledge` names a concept that implies one. The families are DyKnow-RAG's
(arXiv:2510.11122) and TaoSR1's, the words are ours.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from relevance.catalog_rules import Wanted
from relevance.catalog_words import ATTRIBUTES, BRANDS, CATEGORY_FAMILIES, CONCEPTS, QUESTIONS, CategoryFamily, phrase

_NAME = re.compile(r"[a-z_]+")
MAX_TRIES = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class QuerySpec:
    """A query and what it means."""

    text: str
    family: str
    noun: str
    wanted: tuple[Wanted, ...]
    concept: str | None = None
    max_price: int | None = None
    """Reference price of an alternative; the item must cost less."""

    @property
    def negated(self) -> tuple[str, ...]:
        """Excluded values."""
        return tuple(entry.name for entry in self.wanted if entry.role == "negated")


def make_query(family: str, rng: Random, concepts: Sequence[str], is_taken: Callable[[str], bool]) -> QuerySpec:
    """Return a query of a family whose text is not taken.

    Raises:
        RuntimeError: every try gave a taken text: more queries are asked for than these words can make.
    """
    for _ in range(MAX_TRIES):
        spec = _MAKERS[family](rng, concepts)
        if not is_taken(spec.text):
            return spec
    raise RuntimeError(f"no new {family!r} query in {MAX_TRIES} tries: ask for fewer pairs, or more items per query")


def _pick(rng: Random, values: Sequence[str]) -> str:
    return values[int(rng.random() * len(values))]


def _category(rng: Random) -> tuple[CategoryFamily, str]:
    family = CATEGORY_FAMILIES[int(rng.random() * len(CATEGORY_FAMILIES))]
    return family, family.nouns[int(rng.random() * 4)]


def _constraints(
    rng: Random, family: CategoryFamily, shares: Sequence[float], without: Sequence[str] = ()
) -> dict[str, str]:
    """Return attribute -> wanted value; shares[k] is the chance of at most k constraints."""
    draw = rng.random()
    num_wanted = next((number for number, share in enumerate(shares) if draw < share), len(shares))
    names = [name for name in family.attributes if name not in without]
    rng.shuffle(names)
    # nobody asks for a thing that lets water in
    return {name: "yes" if name == "waterproof" else _pick(rng, ATTRIBUTES[name]) for name in names[:num_wanted]}


def _wanted(family: CategoryFamily, attributes: dict[str, str]) -> tuple[Wanted, ...]:
    return tuple(
        Wanted(name=name, value=value, role="primary" if name in family.primary else "secondary")
        for name, value in attributes.items()
    )


def _plain(rng: Random, concepts: Sequence[str]) -> QuerySpec:
    family, noun = _category(rng)
    attributes = _constraints(rng, family, (0.05, 0.35, 0.7))
    text = phrase(noun, attributes)
    return QuerySpec(text=text, family="plain", noun=noun, wanted=_wanted(family, attributes))


def _negation(rng: Random, concepts: Sequence[str]) -> QuerySpec:
    family, noun = _category(rng)
    names = [name for name in family.attributes if _NAME.fullmatch(ATTRIBUTES[name][0]) and name != "waterproof"]
    excluded_attribute = _pick(rng, names)
    excluded = _pick(rng, ATTRIBUTES[excluded_attribute])
    attributes = _constraints(rng, family, (0.2, 0.7), without=(excluded_attribute,))
    thing = phrase(noun, attributes)
    word = "without" if excluded_attribute in ("closure", "material") else "not"
    text = _pick(rng, (f"{thing} {word} {excluded}", f"{thing}, no {excluded}"))
    wanted = (*_wanted(family, attributes), Wanted(name=excluded, value="none", role="negated"))
    return QuerySpec(text=text, family="negation", noun=noun, wanted=wanted)


def _alternative(rng: Random, concepts: Sequence[str]) -> QuerySpec:
    family, noun = _category(rng)
    attributes = _constraints(rng, family, (0.3, 0.8))
    price = int(family.price * (0.6 + rng.random()))
    brand, thing = _pick(rng, BRANDS), phrase(noun, attributes)
    text = _pick(rng, (f"{thing} cheaper than {brand} at {price}", f"cheaper than {price} {brand}: {thing}"))
    wanted = (*_wanted(family, attributes), Wanted(name="price", value=f"under {price}", role="price"))
    return QuerySpec(text=text, family="alternative", noun=noun, wanted=wanted, max_price=price)


def _question(rng: Random, concepts: Sequence[str]) -> QuerySpec:
    family, noun = _category(rng)
    asked = [key for key in QUESTIONS if key[0] in family.attributes]
    attribute, value = asked[int(rng.random() * len(asked))]
    others = _constraints(rng, family, (0.2, 0.7), without=(attribute,))
    text = _pick(rng, QUESTIONS[attribute, value]).format(thing=phrase(noun, others))
    return QuerySpec(text=text, family="question", noun=noun, wanted=_wanted(family, {attribute: value, **others}))


def _knowledge(rng: Random, concepts: Sequence[str]) -> QuerySpec:
    while True:
        family, noun = _category(rng)
        known = [concept for concept in concepts if CONCEPTS[concept][0] in family.attributes]
        if known:
            break
    concept = _pick(rng, known)
    attribute, value = CONCEPTS[concept]
    others = _constraints(rng, family, (0.2, 0.7), without=(attribute,))
    text = f"{concept} {phrase(noun, others)}"
    wanted = _wanted(family, {attribute: value, **others})
    return QuerySpec(text=text, family="knowledge", noun=noun, wanted=wanted, concept=concept)


_MAKERS: Mapping[str, Callable[[Random, Sequence[str]], QuerySpec]] = {
    "plain": _plain,
    "negation": _negation,
    "alternative": _alternative,
    "question": _question,
    "knowledge": _knowledge,
}
