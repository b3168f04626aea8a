"""The PriceRunner relevance task: queries, candidate offers and grades, built from the structure of a file of offers.

    task = build_task("offers.parquet")                    # parts train, dev, test; dictionaries from train
    part = task.parts["test"]
    part.queries[0].text, task.item_text(part.pairs.offer[0]), part.pairs.grade[0]

    eval_part = build_eval(read_catalogue("unseen.parquet"), dictionaries)      # every row is used, no split

There is no human-graded text here. Labels are derived from cluster labels; the inputs of a model are the offer's title and
category only. What the labels measure is whether constraints are met, not taste; and they are noisy (NOISE).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from recis.ebrm.entities import Entity, EntitySchema, Item
from recis.ebrm.evaluate import EvalPairs, tie_of
from recis.ebrm.pricerunner_labels import SECONDARY, Dictionaries, LabelFacts, label_facts, learn_dictionaries
from recis.ebrm.pricerunner_pairs import Pairs, Pool, draw_pairs
from recis.ebrm.pricerunner_queries import Query
from recis.ebrm.pricerunner_split import PARTS, Catalogue, groups, offers_of, parts, read_catalogue
from recis.ebrm.pricerunner_text import noun_of
from recis.ebrm.pricerunner_titles import TitleFacts, pricerunner_schema, title_entities, title_facts

NUM_QUERIES: Mapping[str, int] = {"train": 12_000, "dev": 2_000, "test": 2_000}
MAX_EVAL_QUERIES = 2_000
MIN_STATED, MAX_CONTRADICTED, MIN_OFFERS = 0.50, 0.10, 20
NOISE = (
    "Labels are derived from structure: merchant titles sit in wrong clusters, Bosch / Siemens twins share model codes, "
    "colour is often in the model code only, near categories (fridge, fridge freezer, freezer) count as irrelevant, an "
    "unknown brand in a generic title is graded by its label. They measure constraint matching, not taste."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Queries of one part and their graded pairs."""

    name: str
    queries: tuple[Query, ...]
    pairs: Pairs
    clusters: tuple[int, ...]
    offers: tuple[int, ...]
    """Positions in the catalogue's offers, those with generic titles included."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A catalogue read with dictionaries, and what was built from it."""

    catalogue: Catalogue
    dictionaries: Dictionaries
    schema: EntitySchema
    facts: Mapping[int, LabelFacts]
    """Cluster id -> what its label states. For grading; never an input of a model."""
    titles: tuple[TitleFacts, ...]
    """One per offer."""
    parts: Mapping[str, Part]
    _entities: dict[int, tuple[Entity, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def item_text(self, offer: int) -> str:
        """Return title and category noun: what every text model scores."""
        own = self.catalogue.offers[offer]
        return f"{own.title} {noun_of(self.catalogue.categories[own.cluster_id])}"

    def entities(self, offer: int) -> tuple[Entity, ...]:
        """Return the entities of an offer: its category, and what its title states."""
        if offer not in self._entities:
            self._entities[offer] = title_entities(self.titles[offer], self.schema)
        return self._entities[offer]

    def item(self, offer: int) -> Item:
        """Return an offer as an item; its id is the product id."""
        own = self.catalogue.offers[offer]
        return Item(id=str(own.product_id), entities=self.entities(offer), title=own.title)

    def eval_pairs(self, part: Part) -> EvalPairs:
        """Return what the scores of a part's pairs are measured on; ties are broken by sha256 of the product id."""
        pairs = part.pairs
        tie = [tie_of(self.catalogue.offers[offer].product_id) for offer in pairs.offer.tolist()]
        return EvalPairs(
            query=pairs.query, grade=pairs.grade, visible=pairs.visible, tie=np.array(tie, dtype=np.float64)
        )


def build_task(path: str | Path, *, num_queries: Mapping[str, int] = NUM_QUERIES) -> Task:
    """Return the task with its parts train, dev and test; a few seconds per 10,000 offers and queries.

    Args:
        path: Parquet file with the columns of `pricerunner_split.COLUMNS`.
        num_queries: part -> queries; fewer give the first ones of the full task.

    Raises:
        DataError: as `read_catalogue`.
        ConfigError: as `schema.entity`.
    """
    catalogue = read_catalogue(path)
    clusters = parts(groups(catalogue))
    known, facts, titles = _learn(catalogue, clusters["train"])
    task = Task(
        catalogue=catalogue, dictionaries=known, schema=pricerunner_schema(), facts=facts, titles=titles, parts={}
    )
    built = {name: _part(task, name, clusters[name], num_queries.get(name, 0)) for name in PARTS}
    return replace(task, parts=built)


def build_eval(catalogue: Catalogue, known: Dictionaries) -> Task:
    """Return the task of unseen offers: one part, "eval", of all rows, read with the dictionaries of a model.

    A brand of a label that the dictionaries do not hold falls back to the label's first token.
    """
    facts = {
        cluster: label_facts(catalogue.labels[cluster], catalogue.categories[cluster], known)
        for cluster in catalogue.labels
    }
    titles = _titles(catalogue, known)
    task = Task(
        catalogue=catalogue, dictionaries=known, schema=pricerunner_schema(), facts=facts, titles=titles, parts={}
    )
    clusters = tuple(sorted(catalogue.labels))
    return replace(task, parts={"eval": _part(task, "eval", clusters, min(MAX_EVAL_QUERIES, len(clusters)))})


def _titles(catalogue: Catalogue, known: Dictionaries) -> tuple[TitleFacts, ...]:
    return tuple(title_facts(own.title, catalogue.categories[own.cluster_id], known) for own in catalogue.offers)


def _learn(
    catalogue: Catalogue, train: Sequence[int]
) -> tuple[Dictionaries, dict[int, LabelFacts], tuple[TitleFacts, ...]]:
    """Return dictionaries from the train clusters alone, and all labels and titles read with them."""
    train_offers = offers_of(catalogue, train)
    known = learn_dictionaries(
        [(catalogue.categories[cluster], catalogue.labels[cluster]) for cluster in train],
        (catalogue.offers[offer].title for offer in train_offers),
    )
    facts = {
        cluster: label_facts(catalogue.labels[cluster], catalogue.categories[cluster], known)
        for cluster in catalogue.labels
    }
    titles = _titles(catalogue, known)
    pairs = [(facts[catalogue.offers[offer].cluster_id], titles[offer]) for offer in train_offers]
    return replace(known, secondary=usable_attributes(pairs)), facts, titles


def usable_attributes(pairs: Sequence[tuple[LabelFacts, TitleFacts]]) -> frozenset[tuple[str, str]]:
    """Return the (category, attribute) that titles state in half of the offers or more and contradict in a tenth or less.

    Args:
        pairs: label and title of the train offers.
    """
    counts: dict[tuple[str, str], list[int]] = {}
    for fact, title in pairs:
        for name in SECONDARY:
            if name in fact.secondary:
                says = title.says(name, (fact.secondary[name],))
                total = counts.setdefault((fact.category, name), [0, 0, 0])
                total[0] += 1
                total[1] += says == "stated"
                total[2] += says == "differs"
    return frozenset(
        key
        for key, (num, stated, differs) in counts.items()
        if num >= MIN_OFFERS and stated >= MIN_STATED * num and differs <= MAX_CONTRADICTED * num
    )


def _part(task: Task, name: str, clusters: tuple[int, ...], num_queries: int) -> Part:
    catalogue, generic = task.catalogue, task.catalogue.generic_titles()
    offers = offers_of(catalogue, clusters)
    used = [offer for offer in offers if catalogue.offers[offer].title not in generic]
    pool = Pool(
        offers=np.array(used, dtype=np.int64),
        cluster_ids=np.array([catalogue.offers[offer].cluster_id for offer in used], dtype=np.int64),
        titles=[task.titles[offer] for offer in used],
        texts=[task.item_text(offer).split() for offer in used],
        tie=np.array([tie_of(catalogue.offers[offer].product_id) for offer in used]),
    )
    facts = {cluster: task.facts[cluster] for cluster in clusters}
    queries, pairs = draw_pairs(name, num_queries, pool, facts, task.dictionaries)
    return Part(name=name, queries=queries, pairs=pairs, clusters=clusters, offers=offers)
