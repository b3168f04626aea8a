"""Candidates of a query of the PriceRunner task: offers of its own part, easy and hard ones of every grade, shuffled.

    grade 4: up to 4 offers of the query's cluster and 4 others;  3: 4 + 4;  2: 4 + 2;  1: 2 + 2
    first number: hardest by BM25, second: drawn at random

The order is shuffled by the query's own generator, because a candidate order or a stable sort would leak the label.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from recis.ebrm.bm25 import BM25
from recis.ebrm.pricerunner_grades import CONTRADICTED, MET, NEARLY, OTHER_CATEGORY, GradeTable, is_visible
from recis.ebrm.pricerunner_labels import Dictionaries, LabelFacts
from recis.ebrm.pricerunner_queries import Constraints, Query, draw_query, query_rng
from recis.ebrm.pricerunner_titles import TitleFacts

MAX_OWN, MAX_OTHERS = 4, 4
HARD_AND_RANDOM = {NEARLY: (4, 4), CONTRADICTED: (4, 2), OTHER_CATEGORY: (2, 2)}
_TIE = 1e-6  # far below a difference of two BM25 scores, far above their rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """(query, offer) pairs [N] of one part, those of a query side by side."""

    query: np.ndarray
    """int32, position in the part's queries."""
    offer: np.ndarray
    """int32, position in the offers that the task was built from."""
    grade: np.ndarray
    """int8, 1 to 4."""
    visible: np.ndarray
    """bool."""

    def __len__(self) -> int:
        return len(self.query)

    @property
    def label(self) -> np.ndarray:
        """int8, 1 for grade 4: the label that EBRM learns."""
        return (self.grade == MET).astype(np.int8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The offers M that a part's pairs may hold, position by position: no generic titles."""

    offers: np.ndarray
    """int64 [M], positions in all offers."""
    cluster_ids: np.ndarray
    """int64 [M]."""
    titles: Sequence[TitleFacts]
    texts: Sequence[Sequence[str]]
    """Words of title and category noun, for BM25."""
    tie: np.ndarray
    """float64 [M] in [0, 1), from the product ids: which of two equally hard offers comes first."""


def draw_pairs(
    part: str, num_queries: int, pool: Pool, facts: Mapping[int, LabelFacts], known: Dictionaries
) -> tuple[tuple[Query, ...], Pairs]:
    """Return the first `num_queries` queries of a part and their pairs.

    Args:
        part: name; it seeds the generators.
        num_queries: more queries leave those before them as they are.
        pool: offers of the part.
        facts: cluster id -> label facts, of the part's clusters alone.
        known: dictionaries of the train part.
    """
    clusters = sorted(facts)
    table = GradeTable(clusters, facts)
    row_of = {cluster: row for row, cluster in enumerate(clusters)}
    rows = np.array([row_of[cluster] for cluster in pool.cluster_ids.tolist()], dtype=np.int64)
    index = BM25(pool.texts)
    queries: list[Query] = []
    found: list[list[tuple[int, int]]] = []
    for number in range(num_queries):
        rng = query_rng(part, number)
        query = draw_query(part, number, clusters, facts, known, rng)
        grades = table.grades(query.constraints, query.cluster_id)[rows]
        hardness = index.scores(query.text.split()) + _TIE * pool.tie
        picked = _candidates(grades, hardness, pool.cluster_ids == query.cluster_id, rng)
        queries.append(query)
        found.append([(member, int(grades[member])) for member in picked])
    return tuple(queries), _pairs(queries, found, pool, facts)


def _pairs(
    queries: Sequence[Query], found: Sequence[Sequence[tuple[int, int]]], pool: Pool, facts: Mapping[int, LabelFacts]
) -> Pairs:
    members = [member for picked in found for member, _ in picked]
    grades = [grade for picked in found for _, grade in picked]
    constraints: list[Constraints] = [
        query.constraints for query, picked in zip(queries, found, strict=True) for _ in picked
    ]
    cluster_ids = pool.cluster_ids.tolist()
    visible = [
        is_visible(wanted, grade, facts[cluster_ids[member]], pool.titles[member])
        for wanted, member, grade in zip(constraints, members, grades, strict=True)
    ]
    return Pairs(
        query=np.repeat(np.arange(len(queries), dtype=np.int32), [len(picked) for picked in found]),
        offer=pool.offers[np.array(members, dtype=np.int64)].astype(np.int32),
        grade=np.array(grades, dtype=np.int8),
        visible=np.array(visible, dtype=bool),
    )


def _candidates(grades: np.ndarray, hardness: np.ndarray, is_own: np.ndarray, rng: random.Random) -> list[int]:
    """Return the picked pool members, shuffled."""
    own, others = np.flatnonzero(is_own), np.flatnonzero((grades == MET) & ~is_own)
    picked = [*_sample(own, MAX_OWN, rng), *_sample(others, MAX_OTHERS, rng)]
    for value, (num_hard, num_random) in HARD_AND_RANDOM.items():
        members = np.flatnonzero(grades == value)
        is_hard = _hardest(hardness[members], num_hard)
        picked += [*members[is_hard].tolist(), *_sample(members[~is_hard], num_random, rng)]
    rng.shuffle(picked)
    return picked


def _hardest(hardness: np.ndarray, count: int) -> np.ndarray:
    """Return bool [M], True for the `count` largest; no two are equal, so that no way of sorting changes the set."""
    if len(hardness) <= count:
        return np.ones(len(hardness), dtype=bool)
    chosen = np.zeros(len(hardness), dtype=bool)
    chosen[np.argpartition(-hardness, count)[:count]] = True
    return chosen


def _sample(members: np.ndarray, count: int, rng: random.Random) -> list[int]:
    return [int(members[at]) for at in rng.sample(range(len(members)), min(count, len(members)))]
