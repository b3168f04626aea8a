"""Queries put together from a catalogue's own entities: stage A pairs for values that few shoppers typed.

    an item -> some of its values -> each in one of its spellings -> a text whose wanted values are known
    each spelling alone comes first, up to half of the queries: the shortest text that teaches it

A log of a few hundred queries names most values never, and a fresh encoder cannot know that "skillet" is a frying pan or
that "kartron" is a brand. No label and no test query is used: items, and the spellings that the schema declares.
This project's design.
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from recis.ebrm.entities import EntitySchema, Item, type_of, value_of
from recis.ebrm.synthetic_words import with_typo
from recis.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ComposeConfig:
    """How many queries to compose, and of what."""

    num_queries: int = 1_200
    name_share: float = 0.35
    """Chance of each type of the item to be named; the category is named nine times in ten."""
    either_share: float = 0.15
    """Chance of a named soft type to get a second value: "red or blue"."""
    typo_share: float = 0.05
    """Chance of a phrase to have a slip."""
    num_rivals: int = 5
    """Other items whose values are the query's candidates."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_queries < 0 or self.num_rivals < 1:
            raise ConfigError(
                f"num_queries must be at least 0 and num_rivals at least 1; got {self.num_queries}, {self.num_rivals}"
            )
        for name in ("name_share", "either_share", "typo_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in [0, 1]; got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ComposedQuery:
    """A text, what it names, and entities that it is to be told from."""

    text: str
    named: Mapping[str, tuple[str, ...]]
    """Type -> entity ids, any of which will do."""
    candidates: tuple[str, ...]
    """Entity ids of the item and its rivals."""


def compose_queries(
    items: Sequence[Item], schema: EntitySchema, config: ComposeConfig, *, category_type: str = "category"
) -> list[ComposedQuery]:
    """Return composed queries; the same items, schema and config give the same ones. Without entities there are none.

    Args:
        items: of the train part.
        schema: of the entities; its synonyms are the spellings.
        config: settings.
        category_type: half of the rivals share the item's value of it, so that they are hard to tell apart.
    """
    rng = random.Random(f"recis.ebrm.composed:{config.seed}")
    stated = [item for item in items if item.entities]
    if not stated:
        return []
    maker = _Maker(schema, config, rng, category_type, schema.spellings())
    of_category: defaultdict[str, list[Item]] = defaultdict(list)
    for item in stated:
        for entity in item.entities:
            if entity.type == category_type:
                of_category[entity.id].append(item)
    queries = []
    for spelling, entity in maker.dictionary(stated)[: config.num_queries // 2]:
        rivals = [rng.choice(stated) for _ in range(config.num_rivals)]
        queries.append(_query(spelling, {type_of(entity): (entity,)}, rivals))
    while len(queries) < config.num_queries:
        item = rng.choice(stated)
        own = next((entity.id for entity in item.entities if entity.type == category_type), None)
        near = of_category[own] if own else stated
        rivals = [rng.choice(near if place % 2 else stated) for place in range(config.num_rivals)]
        named = maker.named(item, rivals)
        queries.append(_query(maker.text(named), named, [item, *rivals]))
    return queries


def _query(text: str, named: Mapping[str, tuple[str, ...]], items: Iterable[Item]) -> ComposedQuery:
    candidates = dict.fromkeys(entity.id for item in items for entity in item.entities if not entity.is_none)
    return ComposedQuery(text=text, named=named, candidates=tuple(candidates))


@dataclass
class _Maker:
    """Draws what a query names, and spells it."""

    schema: EntitySchema
    config: ComposeConfig
    rng: random.Random
    category_type: str
    spellings: Mapping[str, tuple[str, ...]]

    def dictionary(self, items: Iterable[Item]) -> list[tuple[str, str]]:
        """Return all spellings of all values of items with their entity ids, in random order."""
        ids = dict.fromkeys(e.id for item in items for e in item.entities if not e.is_none)
        pairs = [(spelling, entity) for entity in ids for spelling in self.spelt(entity)]
        self.rng.shuffle(pairs)
        return pairs

    def named(self, item: Item, rivals: Iterable[Item]) -> dict[str, tuple[str, ...]]:
        by_type: defaultdict[str, list[str]] = defaultdict(list)
        for entity in item.entities:
            if not entity.is_none:
                by_type[entity.type].append(entity.id)
        others = [e.id for rival in rivals for e in rival.entities if not e.is_none]
        out: dict[str, tuple[str, ...]] = {}
        for kind, ids in by_type.items():
            share = 0.9 if kind == self.category_type else self.config.name_share
            if self.rng.random() < share:
                more = [entity for entity in others if type_of(entity) == kind]
                either = more and not self.schema.type(kind).hard and self.rng.random() < self.config.either_share
                drawn = (self.rng.choice(ids), *([self.rng.choice(more)] if either else []))
                out[kind] = tuple(dict.fromkeys(drawn))
        if not out:
            kind = self.rng.choice(sorted(by_type))
            out[kind] = (self.rng.choice(by_type[kind]),)
        return out

    def text(self, named: Mapping[str, Sequence[str]]) -> str:
        kinds = list(named)
        self.rng.shuffle(kinds)
        if self.rng.random() < 0.7:
            kinds.sort(key=lambda kind: kind == self.category_type)  # the noun mostly comes last
        phrases = []
        for kind in kinds:
            phrase = " or ".join(self.rng.choice(self.spelt(entity)) for entity in named[kind])
            phrases.append(with_typo(phrase, self.rng) if self.rng.random() < self.config.typo_share else phrase)
        return " ".join(phrases)

    def spelt(self, entity: str) -> list[str]:
        return [value_of(entity), *self.spellings.get(entity, ())]
