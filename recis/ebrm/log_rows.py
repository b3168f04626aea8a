"""Stage A rows of any catalogue: what queries name, what was clicked, and which items state nothing.

    a query names a value when one of the value's spellings, or a number of its unit, stands in it; the longest phrase wins
    a word of 5 letters or more that nothing knows counts as the one known word that is a single slip away

The rules of labelling are those of `labels_from_logs`; this file counts what they need. The PriceRunner task has its own
reader of queries, `pricerunner_qe`.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from recis.ebrm.canonical import canonical_text, find_quantities
from recis.ebrm.composed_queries import ComposeConfig, compose_queries
from recis.ebrm.entities import EntitySchema, Item, type_of, value_of
from recis.ebrm.labels_from_logs import (
    EntityClicks,
    QERow,
    click_rows,
    free_rows,
    mention_rows,
    none_rows,
    none_shares,
    thinned,
)
from recis.ebrm.pairs import QIPairs
from recis.ebrm.slips import Slips
from recis.errors import DataError

COMPOSED = ComposeConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class Impressions:
    """N times an item was shown for a query; places in the queries and items of the pairs they go with.

    Raises:
        DataError: arrays of different lengths.
    """

    query: np.ndarray
    """int [N]."""
    item: np.ndarray
    """int [N]."""
    clicked: np.ndarray
    """bool [N]."""

    def __post_init__(self) -> None:
        shapes = {self.query.shape, self.item.shape, self.clicked.shape}
        if len(shapes) != 1 or self.query.ndim != 1:
            raise DataError(f"query, item and clicked of impressions must all be [N]; got {sorted(shapes)}")


class Mentions:
    """Reads from a query which values it names: all values of some items, in every spelling that the schema knows."""

    def __init__(self, schema: EntitySchema, items: Sequence[Item]) -> None:
        self._units = {unit: kind.name for kind in schema.types for unit in kind.units}
        phrases: defaultdict[tuple[str, ...], dict[str, None]] = defaultdict(dict)
        known = {entity.id: entity for item in items for entity in item.entities if not entity.is_none}
        for entity in known.values():
            phrases[tuple(entity.value.split())][entity.id] = None
        for kind in schema.types:
            for surface, value in kind.synonyms.items():
                phrases[tuple(surface.split())][f"{kind.name}:{value}"] = None
        self._phrases = {words: tuple(ids) for words, ids in phrases.items() if words}
        self._longest = max(map(len, self._phrases), default=0)
        plain = {word for item in items for word in canonical_text(item.title).split()}
        self._slips = Slips((word for words in self._phrases for word in words), known=plain)

    def read(self, query: str) -> dict[str, tuple[str, ...]]:
        """Return type -> entity ids that a query names, in the order of the query."""
        text = canonical_text(query)
        words = [self._slips.corrected(word) for word in text.split()]
        found: defaultdict[str, dict[str, None]] = defaultdict(dict)
        at = 0
        while at < len(words):
            length, ids = self._longest_at(words, at)
            for entity in ids:
                found[type_of(entity)][entity] = None
            at += length
        for quantity in find_quantities(text):
            if quantity.unit in self._units:
                kind = self._units[quantity.unit]
                found[kind][f"{kind}:{quantity.text()}"] = None
        return {kind: tuple(ids) for kind, ids in found.items()}

    def values(self, query: str) -> dict[str, tuple[str, ...]]:
        """Return type -> canonical values that a query names."""
        return {kind: tuple(map(value_of, ids)) for kind, ids in self.read(query).items()}

    def _longest_at(self, words: Sequence[str], at: int) -> tuple[int, tuple[str, ...]]:
        for length in range(min(self._longest, len(words) - at), 0, -1):
            ids = self._phrases.get(tuple(words[at : at + length]))
            if ids is not None:
                return length, ids
        return 1, ()


def rows_from_logs(
    pairs: QIPairs,
    schema: EntitySchema,
    impressions: Impressions | None = None,
    *,
    composed: ComposeConfig | None = COMPOSED,
    category_type: str = "category",
    keep_free_negatives: bool = False,
) -> list[QERow]:
    """Return stage A's rows: mentions, free types, clicks and `none`; the same arguments give the same rows.

    Args:
        pairs: of the train part; items of a query's pairs are where its other values come from. Labels enter through the
            shares of `none` alone.
        schema: of the entities.
        impressions: of the train part's queries; without them there are no click rows.
        composed: queries to compose from the pairs' items besides; None for none.
        category_type: clicks of queries that name one value of it are compared with all clicks of such queries; a query
            that names none still means one, so its values are never free.
        keep_free_negatives: keep negatives from clicks of types that the query names no value of. Where few items answer a
            query, their other properties look refused though nobody asked for them: see `pricerunner_qe.stage_a_rows`.
    """
    mentions = Mentions(schema, pairs.items)
    named = {place: mentions.read(pairs.queries[place]) for place, _ in pairs.by_query()}
    ids = [tuple(e.id for e in item.entities if not e.is_none) for item in pairs.items]
    types = [{type_of(entity) for entity in own} for own in ids]
    shares = none_shares(
        (named[query].keys(), types[item], int(label > 0.5))
        for query, item, label in zip(pairs.query.tolist(), pairs.item.tolist(), pairs.label.tolist(), strict=True)
    )
    rows: list[QERow] = []
    for place, own in pairs.by_query():
        candidates = dict.fromkeys(entity for item in pairs.item[own].tolist() for entity in ids[item])
        rows += text_rows(pairs.queries[place], named[place], candidates, schema, shares, (category_type,))
    used = [pairs.items[place] for place in np.unique(pairs.item).tolist()]
    for query in compose_queries(used, schema, composed, category_type=category_type) if composed else ():
        rows += text_rows(query.text, query.named, query.candidates, schema, shares, (category_type,))
    if impressions is not None:
        clicks = _click_rows(pairs, impressions, ids, named, category_type)
        rows += [row for row, place in clicks if row.y or keep_free_negatives or type_of(row.entity) in named[place]]
    return rows


def text_rows(
    query: str,
    named: Mapping[str, Sequence[str]],
    candidates: Iterable[str],
    schema: EntitySchema,
    shares: Mapping[str, float],
    always_meant: Sequence[str] = (),
) -> list[QERow]:
    """Return the rows that a query's text alone gives: what it names, what that rules out, free types, and `none`.

    Args:
        query: text.
        named: type -> entity ids.
        candidates: entity ids of the query's items; of each type a few are drawn, the same ones for the same query.
        schema: of the types.
        shares: see `none_rows`.
        always_meant: types that every query means one value of, named or not.
    """
    drawn = thinned(candidates, named, random.Random(f"recis.ebrm.log_rows:{query}"))
    free = free_rows(query, named, drawn, always_meant)
    return mention_rows(query, named, drawn) + free + none_rows(query, named, schema.names, shares, always_meant)


def _click_rows(
    pairs: QIPairs,
    impressions: Impressions,
    ids: Sequence[tuple[str, ...]],
    named: Mapping[int, Mapping[str, tuple[str, ...]]],
    category_type: str,
) -> list[tuple[QERow, int]]:
    """Return rows and the places of their queries."""
    shown = {place: Counter[str]() for place in named}
    clicked = {place: Counter[str]() for place in named}
    width = len(pairs.items)
    keys, inverse = np.unique(impressions.query.astype(np.int64) * width + impressions.item, return_inverse=True)
    num_shown = np.bincount(inverse, minlength=len(keys))
    num_clicked = np.bincount(inverse, weights=impressions.clicked, minlength=len(keys)).astype(np.int64)
    for key, seen, hits in zip(keys.tolist(), num_shown.tolist(), num_clicked.tolist(), strict=True):
        place, item = divmod(key, width)
        if place in named:
            for entity in ids[item]:
                shown[place][entity] += seen
                clicked[place][entity] += hits
    leaf = {place: own.get(category_type, ()) for place, own in named.items()}
    background = {group: Counter[str]() for group in leaf.values()}
    totals = {group: Counter[str]() for group in leaf.values()}
    for place, counts in clicked.items():
        for entity, hits in counts.items():
            background[leaf[place]][entity] += hits
            totals[leaf[place]][type_of(entity)] += hits
    rows: list[tuple[QERow, int]] = []
    for place, counts in shown.items():
        by_type: defaultdict[str, list[EntityClicks]] = defaultdict(list)
        for entity, seen in counts.items():
            kind = type_of(entity)
            total = totals[leaf[place]][kind]
            share = background[leaf[place]][entity] / total if total else 0.0
            hits = clicked[place][entity]
            by_type[kind].append(EntityClicks(entity=entity, impressions=seen, clicks=hits, background_share=share))
        rows += [(row, place) for values in by_type.values() for row in click_rows(pairs.queries[place], values)]
    return rows
