"""Retrieved texts of known kind about a generated pair.

    helpful      a fact of the record that the title omits, or what the query's concept means    adopt
    partial      one right sentence and one wrong one                                           partial
    irrelevant   a fact about another thing                                                     ignore
    misleading   contradicts the record, best where the title shows it                          ignore

The label follows the record, never the chunk. Source: one chunk per pair and the decisions adopt, partial and ignore,
DyKnow-RAG arXiv:2510.11122; the kinds and the texts are ours.
"""

from collections.abc import Mapping, Sequence
from random import Random

from relevance.catalog_queries import QuerySpec
from relevance.catalog_rules import FAMILY_OF_NOUN
from relevance.catalog_words import ATTRIBUTES, BRANDS, CATEGORY_FAMILIES, CONCEPTS
from relevance.data import Chunk, Item

DECISION_OF_KIND: Mapping[str, str] = {
    "helpful": "adopt",
    "partial": "partial",
    "irrelevant": "ignore",
    "misleading": "ignore",
}
_FACTS = (
    "{brand} {noun}: {name} is {value}.",
    "review: the {name} of the {brand} {noun} is {value}.",
    "shop note on the {brand} {noun}: {name} {value}.",
    "{name} {value}, says the maker of the {brand} {noun}.",
)
_MEANINGS = (
    "{concept} means {name} {value}.",
    "lexicon: {concept} stands for {name} {value}.",
    "who says {concept} wants {name} {value}.",
    "for {concept} take {name} {value}.",
)


def make_chunk(kind: str, chunk_id: str, item: Item, shown: Mapping[str, str], spec: QuerySpec, rng: Random) -> Chunk:
    """Return a chunk of a kind.

    Args:
        kind: one of CHUNK_KINDS.
        chunk_id: id of the chunk; chunks are made per pair.
        item: with its full record, at least 2 attributes.
        shown: attributes that the title states.
        spec: the query; constraints are preferred topics.
        rng: of the wording.
    """
    wanted = {entry.name for entry in spec.wanted}
    if kind == "helpful":
        text = _helpful(item, shown, wanted, spec, rng)
    elif kind == "partial":
        first, second = _ranked(item.attributes, [wanted, set(item.attributes) - set(shown)], rng)[:2]
        right = _fact(item.brand, item.category, first, item.attributes[first], rng)
        sentences = [right, _wrong(item, second, rng)]
        rng.shuffle(sentences)
        text = " ".join(sentences)
    elif kind == "irrelevant":
        text = _irrelevant(item, rng)
    else:
        text = _wrong(item, _ranked(item.attributes, [set(shown), wanted], rng)[0], rng)
    return Chunk(id=chunk_id, text=text, score=round(rng.random(), 3), kind=kind, decision=DECISION_OF_KIND[kind])


def _helpful(item: Item, shown: Mapping[str, str], wanted: set[str], spec: QuerySpec, rng: Random) -> str:
    omitted = set(item.attributes) - set(shown)
    if spec.concept is not None and not omitted & wanted:
        name, value = CONCEPTS[spec.concept]
        return _pick(rng, _MEANINGS).format(concept=spec.concept, name=name, value=value)
    name = _ranked(item.attributes, [omitted, wanted], rng)[0]
    return _fact(item.brand, item.category, name, item.attributes[name], rng)


def _ranked(names: Mapping[str, str], preferred: Sequence[set[str]], rng: Random) -> list[str]:
    """Return names, those in the earlier sets first, ties in random order."""
    order = list(names)
    rng.shuffle(order)
    return sorted(order, key=lambda name: [name not in group for group in preferred])


def _fact(brand: str, noun: str, name: str, value: str, rng: Random) -> str:
    return _pick(rng, _FACTS).format(brand=brand, noun=noun, name=name, value=value)


def _wrong(item: Item, name: str, rng: Random) -> str:
    others = [value for value in ATTRIBUTES[name] if value != item.attributes[name]]
    return _fact(item.brand, item.category, name, _pick(rng, others), rng)


def _irrelevant(item: Item, rng: Random) -> str:
    number = FAMILY_OF_NOUN[item.category]
    family = CATEGORY_FAMILIES[(number + 1 + int(rng.random() * (len(CATEGORY_FAMILIES) - 1))) % len(CATEGORY_FAMILIES)]
    name = _pick(rng, family.attributes)
    brand = _pick(rng, [brand for brand in BRANDS if brand != item.brand])
    return _fact(brand, _pick(rng, family.nouns), name, _pick(rng, ATTRIBUTES[name]), rng)


def _pick(rng: Random, values: Sequence[str]) -> str:
    return values[int(rng.random() * len(values))]
