"""The PriceRunner task as graded pairs: queries, candidates, grades and parts as `recis.ebrm.pricerunner` builds them.

    pairs = pricerunner_pairs(build_task("offers.parquet"))        [Pair], parts train, dev, test by the column split

The model reads title and category noun, as every text model of that task. Gold steps hold the query's drawn constraints against
what the title states: ok, miss, or unknown where it is silent; the category matches or not, near is never gold there. Labels
come from the structure of the data, not from people (`recis.ebrm.pricerunner.NOISE`). Where a title states every constraint and
the grade says otherwise, label and steps contradict each other: such a pair keeps its label and has no steps.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from recis.ebrm.pricerunner_grades import CONTRADICTED, OTHER_CATEGORY, grade
from recis.ebrm.pricerunner_text import noun_of
from relevance.chunks import DECISION_OF_KIND
from relevance.data import SPLITS, Chunk, Item, Pair, StepGold, gold_fields
from relevance.labels import MAX_VALUE, Label, Parsed, violations
from relevance.rules import Rule, RuleBase, always

if TYPE_CHECKING:
    from recis.ebrm.entities import EntitySchema
    from recis.ebrm.entities import Item as EbrmItem
    from recis.ebrm.pricerunner import Task
    from recis.ebrm.pricerunner_labels import Dictionaries

HARD = ("brand", "model", "series")
VERDICT_OF = {"stated": "ok", "differs": "miss", "silent": "unknown"}
CHUNK_SHARES = (("helpful", 0.5), ("misleading", 0.25), ("irrelevant", 0.25))


def pricerunner_rules() -> RuleBase:
    """Return the five rules of the grades, in the order in which they decide."""
    texts = (
        ("C01", "another category", 1),
        ("P01", "brand, model or series differs", 2),
        ("A01", "two or more other wishes missed", 2),
        ("A02", "one other wish missed", 3),
        ("E01", "all wishes met", 4),
    )
    return RuleBase(tuple(Rule(id=name, text=text, decides=label, applies=always) for name, text, label in texts))


def pricerunner_pairs(task: "Task", *, with_chunks: bool = False, seed: int = 0) -> list[Pair]:
    """Return the pairs of all parts; a query whose text an earlier kept part (test, dev, train) has is left out.

    Args:
        task: with parts among train, dev and test.
        with_chunks: give every pair a chunk: another title of its cluster (helpful), its own title under another brand
            (misleading), or a title of another category (irrelevant).
        seed: of the chunks.
    """
    taken: set[str] = set()
    pairs: list[Pair] = []
    for name in reversed(SPLITS):  # the test part keeps its queries, so no train query can be one of its
        part = task.parts.get(name)
        if part is None:
            continue
        kept = [query.text not in taken for query in part.queries]
        taken |= {query.text for query in part.queries}
        titles = _Titles(task, part.offers) if with_chunks else None
        for row in range(len(part.pairs)):
            place, offer = int(part.pairs.query[row]), int(part.pairs.offer[row])
            if kept[place]:
                pair = _pair(task, name, part.queries[place], offer, int(part.pairs.grade[row]))
                if titles is not None:
                    pair = _with_chunk(pair, titles, offer, seed)
                pairs.append(pair)
    return pairs


def visible_flags(task: "Task", name: str) -> dict[str, bool]:
    """Return pair id -> whether the title alone shows why the pair has its grade, for slices."""
    part = task.parts[name]
    return {
        _pair_id(part.queries[query].id, task.catalogue.offers[offer].product_id): bool(visible)
        for query, offer, visible in zip(
            part.pairs.query.tolist(), part.pairs.offer.tolist(), part.pairs.visible.tolist(), strict=True
        )
    }


def _pair(task: "Task", split: str, query: Any, offer: int, value: int) -> Pair:
    own = task.catalogue.offers[offer]
    facts = task.titles[offer]
    brand = facts.brands[0] if facts.brands else ""
    attributes = {name: values[0] for name, values in facts.secondary.items() if values}
    attributes |= {name: values[0] for name, values in (("model", facts.models), ("series", facts.series)) if values}
    item = Item(
        category=noun_of(task.catalogue.categories[own.cluster_id]),
        brand=brand,
        attributes=attributes,
        title=task.item_text(offer),
    )
    pair = Pair(
        id=_pair_id(query.id, own.product_id),
        query_id=query.id,
        query=query.text,
        item_id=str(own.product_id),
        item=item,
        label=value,
        steps=_steps(task, query, offer, value),
        split=split,
    )
    assert pair.steps is not None
    said = Parsed(label=Label(value), fields=gold_fields(pair.steps))
    return replace(pair, steps=None) if violations(said, pair) else pair


def _pair_id(query_id: str, product_id: int) -> str:
    return f"{query_id}:{product_id}"


def _steps(task: "Task", query: Any, offer: int, value: int) -> StepGold:
    """Return the query's constraints against what the title states."""
    facts = task.titles[offer]
    named = {name: values for name, values in query.constraints.items() if name != "category"}
    return StepGold(
        category="mismatch" if value == OTHER_CATEGORY else "match",
        attributes={name: VERDICT_OF[facts.says(name, values)] for name, values in named.items()},
        rule=_rule(task, query.constraints, offer, value),
        wanted={name: _plain(values[0]) for name, values in named.items()},
    )


def _rule(task: "Task", constraints: Mapping[str, tuple[str, ...]], offer: int, value: int) -> str:
    if value != CONTRADICTED:
        return {1: "C01", 3: "A02", 4: "E01"}[value]
    fact = task.facts[task.catalogue.offers[offer].cluster_id]
    hard = {name: values for name, values in constraints.items() if name == "category" or name in HARD}
    return "P01" if grade(hard, fact) == CONTRADICTED else "A01"


def _plain(value: str) -> str:
    """Return a value as it may stand in an attribute block."""
    return "".join(" " if letter in "=:;<>" else letter for letter in value)[:MAX_VALUE]


class _Titles:
    """Titles of a part's offers by cluster and by category, and its brands."""

    def __init__(self, task: "Task", offers: Sequence[int]) -> None:
        self.task = task
        self.by_cluster: dict[int, list[int]] = {}
        self.by_category: dict[str, list[int]] = {}
        brands: set[str] = set()
        for offer in offers:
            cluster = task.catalogue.offers[offer].cluster_id
            self.by_cluster.setdefault(cluster, []).append(offer)
            self.by_category.setdefault(task.catalogue.categories[cluster], []).append(offer)
            brands.update(task.titles[offer].brands[:1])
        self.brands = sorted(brands)


def _with_chunk(pair: Pair, titles: _Titles, offer: int, seed: int) -> Pair:
    """Return the pair with a chunk drawn by its id."""
    digest = hashlib.blake2b(f"{seed}|{pair.id}".encode(), digest_size=8).digest()
    rng = Random(int.from_bytes(digest, "big"))
    kind = rng.choices([name for name, _ in CHUNK_SHARES], [share for _, share in CHUNK_SHARES])[0]
    task = titles.task
    own = task.catalogue.offers[offer]
    category = task.catalogue.categories[own.cluster_id]
    others = [other for other in titles.by_cluster[own.cluster_id] if other != offer]
    if kind == "helpful" and not others:
        kind = "irrelevant"
    if kind == "helpful":
        text = task.catalogue.offers[rng.choice(others)].title
    elif kind == "misleading" and pair.item.brand and len(titles.brands) > 1:
        brand = rng.choice([brand for brand in titles.brands if brand != pair.item.brand])
        text = own.title.replace(pair.item.brand, brand)
    else:
        kind = "irrelevant"
        foreign = [name for name in sorted(titles.by_category) if name != category] or [category]
        text = task.catalogue.offers[rng.choice(titles.by_category[rng.choice(foreign)])].title
    chunk = Chunk(id=pair.id, text=text, kind=kind, decision=DECISION_OF_KIND[kind])
    return replace(pair, chunk=chunk)


def ebrm_items(pairs: Sequence[Pair], known: "Dictionaries", schema: "EntitySchema") -> dict[str, "EbrmItem"]:
    """Return item id -> entities read from the titles of pairs, with the dictionaries of an EBRM trained on offers."""
    from recis.ebrm.entities import Item as Entities
    from recis.ebrm.pricerunner_text import NOUNS
    from recis.ebrm.pricerunner_titles import title_entities, title_facts

    category_of = {noun: category for category, noun in NOUNS.items()}
    items: dict[str, EbrmItem] = {}
    for pair in pairs:
        if pair.item_id not in items and pair.item.category in category_of:
            title = pair.item.title.removesuffix(f" {pair.item.category}")
            facts = title_facts(title, category_of[pair.item.category], known)
            items[pair.item_id] = Entities(id=pair.item_id, entities=title_entities(facts, schema), title=title)
    return items


def read_pricerunner(
    path: str | Path, *, num_queries: Mapping[str, int] | None = None, with_chunks: bool = False
) -> list[Pair]:
    """Return the pairs of a file of offers; raises as `recis.ebrm.pricerunner.build_task`."""
    from recis.ebrm.pricerunner import NUM_QUERIES, build_task

    return pricerunner_pairs(build_task(path, num_queries=num_queries or NUM_QUERIES), with_chunks=with_chunks)
