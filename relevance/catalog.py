"""A generated catalogue in which every label has a known reason: queries, items, gold labels, steps and chunks.

    make_catalog(CatalogConfig(num_train=20000))        seeded, no downloads, > 20,000 pairs/s

A pair is made to order: the label is drawn from the mix, an item is built for it, and the decision list of `catalog_rules.py`
then says what the pair's label and rule really are. Queries, concepts of the family `knowledge` and items are disjoint between
the parts. Source: the label mix 50/5/36/9 % is TaoSR1's test mix (arXiv:2508.12365, as told by others), the families and the
chunk kinds DyKnow-RAG's (arXiv:2510.11122); the catalogue is ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from recis.errors import ConfigError
from relevance.catalog_items import Draft, build, grade
from relevance.catalog_queries import make_query
from relevance.catalog_rules import catalog_rules
from relevance.catalog_words import ATTRIBUTES, BRANDS, CONCEPTS, phrase
from relevance.chunks import make_chunk
from relevance.data import CHUNK_KINDS, FAMILIES, HARD_FAMILIES, SPLITS, Item, Pair, StepGold
from relevance.rules import RuleBase

if TYPE_CHECKING:
    from recis.ebrm.entities import EntitySchema
    from recis.ebrm.entities import Item as EbrmItem

_CONCEPT_SHARES = (0.6, 0.2, 0.2)


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogConfig:
    """Size and mix of a generated catalogue."""

    seed: int = 0
    num_train: int = 20000
    num_dev: int = 2000
    num_test: int = 4000
    items_per_query: int = 8
    hard_share: float = 0.5
    """Share of queries of the hard families, in equal parts."""
    label_mix: tuple[float, float, float, float] = (0.09, 0.36, 0.05, 0.5)
    """Shares of the labels 1 to 4."""
    label_noise: float = 0.0
    """Share of train labels that are replaced by another one; steps stay."""
    step_gold_rate: float = 1.0
    """Share of train pairs that keep their gold steps."""
    omit_rate: float = 0.0
    """Chance that an attribute of the record is left out of the title; .3 in the RAG task."""
    with_chunks: bool = False
    """Give every pair a chunk: the RAG task."""
    chunk_mix: tuple[float, float, float, float] = (0.45, 0.10, 0.25, 0.20)
    """Shares of helpful, partial, irrelevant and misleading chunks."""

    def __post_init__(self) -> None:
        for name, mix in (("label_mix", self.label_mix), ("chunk_mix", self.chunk_mix)):
            if min(mix) < 0 or abs(sum(mix) - 1) > 1e-9:
                raise ConfigError(f"{name} must be four shares with sum 1; got {mix}")
        for name in ("hard_share", "label_noise", "step_gold_rate", "omit_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in [0, 1]; got {getattr(self, name)}")
        if self.items_per_query < 1 or min(self.num_train, self.num_dev, self.num_test) < 0:
            raise ConfigError("items_per_query must be at least 1 and the numbers of pairs at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """The pairs of a generated catalogue."""

    train: tuple[Pair, ...]
    dev: tuple[Pair, ...]
    test: tuple[Pair, ...]
    rules: RuleBase
    hidden_steps: Mapping[str, StepGold]
    """Pair id -> true steps of all pairs, also where `step_gold_rate` hides them: for a noisy oracle and for measuring."""
    config: CatalogConfig


def make_catalog(config: CatalogConfig | None = None) -> Catalog:
    """Return the catalogue of a config; equal configs give equal catalogues.

    Raises:
        RuntimeError: more queries are asked for than the words can make.
    """
    config = config or CatalogConfig()
    concepts = _split_concepts(Random(config.seed * 8 + 7))
    taken: set[str] = set()
    hidden: dict[str, StepGold] = {}
    parts = []
    for number, (split, num_pairs) in enumerate(
        zip(SPLITS, (config.num_train, config.num_dev, config.num_test), strict=True)
    ):
        rng = Random(config.seed * 8 + number)  # a part does not change with the size of another, but for taken queries
        parts.append(_make_part(split, num_pairs, concepts[number], taken, hidden, rng, config))
    train, dev, test = parts
    return Catalog(train=train, dev=dev, test=test, rules=catalog_rules(), hidden_steps=hidden, config=config)


def _split_concepts(rng: Random) -> list[list[str]]:
    """Return disjoint concepts per part, each part with some of several attributes."""
    names = list(CONCEPTS)
    rng.shuffle(names)
    first, second = (round(len(names) * share) for share in (_CONCEPT_SHARES[0], sum(_CONCEPT_SHARES[:2])))
    return [names[:first], names[first:second], names[second:]]


def _quota(total: int, shares: tuple[float, ...], rng: Random) -> list[int]:
    """Return `total` numbers 0 .. len(shares) - 1 in these shares, shuffled."""
    ends, sum_ = [], 0.0
    for share in shares:
        sum_ += share
        ends.append(round(sum_ * total))
    ends[-1] = total
    values = [number for number, end in enumerate(ends) for _ in range(end - (ends[number - 1] if number else 0))]
    rng.shuffle(values)
    return values


def _make_part(
    split: str,
    num_pairs: int,
    concepts: list[str],
    taken: set[str],
    hidden: dict[str, StepGold],
    rng: Random,
    config: CatalogConfig,
) -> tuple[Pair, ...]:
    num_queries = -(-num_pairs // config.items_per_query)
    hard = config.hard_share / len(HARD_FAMILIES)
    families = _quota(num_queries, (1 - config.hard_share, *[hard] * len(HARD_FAMILIES)), rng)
    labels = _quota(num_pairs, config.label_mix, rng)
    kinds = _quota(num_pairs, config.chunk_mix, rng) if config.with_chunks else []
    deciding = catalog_rules().deciding_labels
    pairs: list[Pair] = []
    for query, family in enumerate(families):
        spec = make_query(FAMILIES[family], rng, concepts, taken.__contains__)
        taken.add(spec.text)
        first = query * config.items_per_query
        for number in range(first, min(first + config.items_per_query, num_pairs)):
            draft = build(labels[number] + 1, spec, rng)
            steps = grade(spec, draft)
            assert steps.rule is not None
            name = f"{split}-{number}"
            hidden[name] = steps
            item, shown = _make_item(draft, rng, config.omit_rate)
            label, known = deciding[steps.rule], steps
            if split == "train":
                if config.label_noise and rng.random() < config.label_noise:
                    label = (label + int(rng.random() * 3)) % 4 + 1  # one of the three others
                if config.step_gold_rate < 1 and rng.random() >= config.step_gold_rate:
                    known = None
            pair = Pair(
                id=name,
                query_id=f"{split}-q{query}",
                query=spec.text,
                item_id=f"{split}-i{number}",
                item=item,
                label=label,
                family=spec.family,
                steps=known,
                negated=spec.negated,
                chunk=make_chunk(CHUNK_KINDS[kinds[number]], name, item, shown, spec, rng) if kinds else None,
                split=split,
            )
            pairs.append(pair)
    return tuple(pairs)


def _make_item(draft: Draft, rng: Random, omit_rate: float) -> tuple[Item, dict[str, str]]:
    """Return the item, and the attributes that its title states."""
    noun, attributes, price = draft
    brand = BRANDS[int(rng.random() * len(BRANDS))]
    shown = attributes
    if omit_rate:
        shown = {name: value for name, value in attributes.items() if rng.random() >= omit_rate}
    title = f"{brand} {phrase(noun, shown)}"
    return Item(category=noun, brand=brand, attributes=attributes, price=float(price), title=title), shown


def to_ebrm(pairs: Sequence[Pair]) -> "tuple[EntitySchema, list[EbrmItem]]":
    """Return the entity schema of the catalogue and the items of pairs, for `recis.ebrm`.

    Types: category, brand and the ten attributes. An attribute that the record does not state is left to the schema's none.
    """
    from recis.ebrm.entities import EntitySchema, TypeConfig
    from recis.ebrm.entities import Item as EbrmItem

    schema = EntitySchema(types=tuple(TypeConfig(name=name) for name in ("category", "brand", *ATTRIBUTES)))
    items = []
    for item_id, item in {pair.item_id: pair.item for pair in pairs}.items():
        stated = {"category": item.category, "brand": item.brand, **item.attributes}
        entities = tuple(schema.entity(name, value) for name, value in stated.items())
        items.append(EbrmItem(id=item_id, entities=entities, title=item.title))
    return schema, items
