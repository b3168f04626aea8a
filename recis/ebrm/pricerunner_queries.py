"""Queries of the PriceRunner task: drawn from labels with their constraints, and read back from text.

    draw: a cluster; what the shopper knows (model .40, attribute .45, series .15); which words are kept; their order
    constraints = the values that the kept words state, by entity type; category is always one of them

`parse_query` finds constraints in a query's text with the dictionaries of the train part. Stage A's mention rows and the
hand rules read queries that way; the drawn constraints themselves are gold for evaluation only.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from recis.ebrm.pricerunner_labels import SECONDARY, Dictionaries, LabelFacts
from recis.ebrm.pricerunner_split import VERSION
from recis.ebrm.pricerunner_text import COLOURS, FORMS, NOUNS, Phrases, normalise, noun_of, tokens

Constraints = Mapping[str, tuple[str, ...]]
"""Entity type -> values, any of which satisfies; a type that is not there is not constrained."""
KIND_SHARES = (("model", 0.40), ("attribute", 0.45), ("series", 0.15))
_COLOUR_PHRASES, _FORM_PHRASES, _NOUN_PHRASES = (
    Phrases(COLOURS),
    Phrases(FORMS),
    Phrases({c: (n,) for c, n in NOUNS.items()}),
)
_QUANTITIES = (
    ("lens", re.compile(r"(?<!\S)\d{1,3}-\d{2,3}mm(?!\S)")),
    ("capacity", re.compile(r"(?<!\S)\d+gb(?!\S)")),
    ("speed", re.compile(r"(?<!\S)\d+(\.\d+)?ghz(?!\S)")),
    ("size", re.compile(r"(?<!\S)\d+ ?inch(?!\S)")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One drawn query."""

    part: str
    number: int
    """From 0 in its part; the RNG of a query depends on both alone."""
    text: str
    kind: str
    cluster_id: int
    constraints: Constraints

    @property
    def id(self) -> str:
        """Return a name that no other query of the task has."""
        return f"{self.part}:{self.number}"


def query_rng(part: str, number: int) -> random.Random:
    """Return the generator of a query: first its words, then its candidates are drawn from it."""
    return random.Random(f"{VERSION}:{part}:{number}")


def draw_query(
    part: str,
    number: int,
    clusters: Sequence[int],
    facts: Mapping[int, LabelFacts],
    known: Dictionaries,
    rng: random.Random,
    *,
    max_draws: int = 1000,
) -> Query:
    """Return the query `number` of a part, drawn with its generator.

    A query that constrains nothing but the category is drawn again.

    Raises:
        ValueError: max_draws queries in a row constrained nothing: no label has a brand or a model.
    """
    for _ in range(max_draws):
        cluster = rng.choice(clusters)
        fact = facts[cluster]
        kind = rng.choices([name for name, _ in KIND_SHARES], [share for _, share in KIND_SHARES])[0]
        if (kind == "series" and fact.series is None) or (kind == "model" and not fact.model):
            kind = "attribute"
        words, constraints = _draw_words(kind, fact, known, rng)
        if len(constraints) > 1:
            rng.shuffle(words)
            return Query(
                part=part,
                number=number,
                text=" ".join(words),
                kind=kind,
                cluster_id=cluster,
                constraints=constraints,
            )
    raise ValueError(f"part {part!r}: {max_draws} draws gave no constraint but the category; give labels with brands")


def _draw_words(
    kind: str, fact: LabelFacts, known: Dictionaries, rng: random.Random
) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Return the kept phrases in label order, and what they constrain."""
    is_model = kind == "model"
    words: list[str] = []
    constraints: dict[str, tuple[str, ...]] = {"category": (noun_of(fact.category),)}
    if fact.brands and rng.random() < (0.8 if is_model else 0.9):
        brand = rng.choice(fact.brands)
        words.append(brand)
        constraints["brand"] = (brand,)
    if is_model:
        words.append(fact.model)
        constraints["model"] = (fact.model,)
    elif kind == "series" and fact.series is not None:
        words.append(fact.series)
        constraints["series"] = (fact.series,)
    for name in SECONDARY:
        value = fact.secondary.get(name)
        if value is not None and (fact.category, name) in known.secondary and rng.random() < (0.5 if is_model else 0.8):
            words.append(value.replace("inch", " inch"))
            constraints[name] = (value,)
    if not is_model or rng.random() < 0.3:
        words.append(noun_of(fact.category))
    return words, constraints


def parse_query(text: str, known: Dictionaries) -> Constraints:
    """Return what a query's text constrains, as far as the dictionaries tell.

    Quantities, the noun, the brand, colours and forms are taken out; a single series word that is left constrains the
    series, anything else that is left the model.
    """
    normal = normalise(text)
    found: dict[str, tuple[str, ...]] = {}
    for name, pattern in _QUANTITIES:
        values = [match[0].replace(" ", "") for match in pattern.finditer(normal)]
        if values:
            found[name] = tuple(values)
            normal = pattern.sub(" ", normal)
    words = tokens(normal)
    categories, words = _take(words, _NOUN_PHRASES)
    if categories:
        found["category"] = (noun_of(categories[0]),)
    for name, phrases in (("brand", known.brand_phrases), ("colour", _COLOUR_PHRASES), ("form", _FORM_PHRASES)):
        if name in SECONDARY and categories and (categories[0], name) not in known.secondary:
            continue  # "xeon silver 4112 processor": no colour where colours are never asked for
        values, words = _take(words, phrases)
        if values:
            found[name] = tuple(dict.fromkeys(values))
    if len(words) == 1 and words[0] in known.series:
        found["series"] = (words[0],)
    elif words:
        found["model"] = (" ".join(words),)
    return found


def _take(words: list[str], phrases: Phrases) -> tuple[list[str], list[str]]:
    """Return the values found in words, and the words that are left."""
    spans = phrases.find(words)
    taken = {at for start, stop, _ in spans for at in range(start, stop)}
    return [value for _, _, value in spans], [word for at, word in enumerate(words) if at not in taken]
