"""(query, entity) labels of the PriceRunner task: gold ones for evaluation, and stage A's from queries and clicks.

Gold comes from the constraints that a query was drawn with; it is never a training signal. Stage A reads queries as text, with
the dictionaries of the train part, and clicks that the click model draws over the grades of the train part; to them it adds
queries composed from the entities of the train part's titles.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from recis.ebrm.click_model import draw_sessions
from recis.ebrm.composed_queries import ComposeConfig, compose_queries
from recis.ebrm.entities import Entity, type_of, value_of
from recis.ebrm.labels_from_logs import EntityClicks, QERow, click_rows, none_shares
from recis.ebrm.log_rows import text_rows
from recis.ebrm.pricerunner import Part, Task
from recis.ebrm.pricerunner_labels import model_forms
from recis.ebrm.pricerunner_queries import Constraints, parse_query
from recis.ebrm.pricerunner_text import codes_match, squash

COMPOSED = ComposeConfig(num_queries=2_000)
ALWAYS_MEANT = ("category",)  # three queries in ten name none and mean one all the same


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldQE:
    """Distinct (query, entity) pairs [N] of a part's candidates, without `none`, with gold labels: evaluation only."""

    query: np.ndarray
    """int32, position in the part's queries."""
    entity: tuple[str, ...]
    """Entity ids."""
    type: np.ndarray
    """str."""
    label: np.ndarray
    """int8: 1 where the type is free or the value is wanted."""


def accepts(constraints: Constraints, entity: Entity) -> bool:
    """Return whether constraints leave an entity's type free or want its value; codes may differ in a country suffix."""
    wanted = constraints.get(entity.type)
    if wanted is None:
        return True
    if entity.type == "model":
        own = squash(entity.value)
        return any(codes_match(form, own) for text in wanted for form in model_forms(text))
    return entity.value in wanted


def gold_qe(task: Task, part: Part) -> GoldQE:
    """Return the gold labels of a part."""
    rows: list[tuple[int, Entity]] = []
    for number, offers in _candidates(part):
        found = {entity.id: entity for offer in offers for entity in task.entities(offer)}
        rows += [(number, entity) for entity in found.values()]
    labels = [accepts(part.queries[number].constraints, entity) for number, entity in rows]
    return GoldQE(
        query=np.array([number for number, _ in rows], dtype=np.int32),
        entity=tuple(entity.id for _, entity in rows),
        type=np.array([entity.type for _, entity in rows]),
        label=np.array(labels, dtype=np.int8),
    )


def stage_a_rows(
    task: Task,
    part: Part,
    *,
    sessions_per_query: int = 40,
    seed: int = 0,
    composed: ComposeConfig | None = COMPOSED,
    keep_free_negatives: bool = False,
) -> list[QERow]:
    """Return stage A's labelled pairs: mentions, clicks and `none`.

    A query for one model gets its clicks on that model's colour, so clicks alone call other colours refused though nobody
    named a colour: on this task such negatives are wrong more often than right, and they are left out.

    Args:
        task: the task.
        part: its train part. Grades enter through drawn clicks and through the shares of `none` alone.
        sessions_per_query: drawn per query text.
        seed: of the clicks.
        composed: queries to compose from the items of the part's pairs besides; None for none.
        keep_free_negatives: keep negatives from clicks of types that the query's text names no value of.
    """
    read = [parse_query(query.text, task.dictionaries) for query in part.queries]
    candidates = dict(_candidates(part))
    shares = none_shares(
        (read[number].keys(), _types(task, offer), int(label))
        for number, offer, label in zip(
            part.pairs.query.tolist(), part.pairs.offer.tolist(), part.pairs.label.tolist(), strict=True
        )
    )
    rows: list[QERow] = []
    for number, query in enumerate(part.queries):
        entities = {e.id: e for offer in candidates.get(number, ()) for e in task.entities(offer)}
        wanted = _named(read[number], list(entities.values()))
        rows += text_rows(query.text, wanted, entities, task.schema, shares, ALWAYS_MEANT)
    rows += _composed_rows(task, part, composed, shares) if composed else []
    named = {query.text: read[number].keys() for number, query in enumerate(part.queries)}
    clicks = _click_rows(task, part, sessions_per_query, seed)
    return rows + [row for row in clicks if row.y or keep_free_negatives or type_of(row.entity) in named[row.query]]


def _composed_rows(task: Task, part: Part, config: ComposeConfig, shares: Mapping[str, float]) -> list[QERow]:
    items = [task.item(offer) for offer in np.unique(part.pairs.offer).tolist()]
    known = {entity.id: entity for item in items for entity in item.entities}
    rows: list[QERow] = []
    for query in compose_queries(items, task.schema, config):
        entities = [known[id] for id in query.candidates]
        wanted = {kind: tuple(map(value_of, ids)) for kind, ids in query.named.items()}
        rows += text_rows(query.text, _named(wanted, entities), query.candidates, task.schema, shares, ALWAYS_MEANT)
    return rows


def _named(constraints: Constraints, entities: Sequence[Entity]) -> dict[str, list[str]]:
    """Return type -> ids of what a query names; a model in every spelling that the candidates have."""
    named: dict[str, list[str]] = {}
    for kind, values in constraints.items():
        same = [entity.id for entity in entities if entity.type == kind and accepts({kind: values}, entity)]
        named[kind] = same or [f"{kind}:{value}" for value in values]
    return named


def _click_rows(task: Task, part: Part, sessions_per_query: int, seed: int) -> Iterator[QERow]:
    rng = np.random.Generator(np.random.Philox(seed))
    shown: dict[str, Counter[str]] = {}
    clicked: dict[str, Counter[str]] = {}
    leaf: dict[str, str] = {}
    background: dict[str, Counter[str]] = {}
    starts = np.searchsorted(part.pairs.query, np.arange(len(part.queries) + 1))
    for number, query in enumerate(part.queries):
        rows = slice(int(starts[number]), int(starts[number + 1]))
        offers, gold = part.pairs.offer[rows].tolist(), part.pairs.label[rows].astype(np.float64)
        sessions = draw_sessions(gold, sessions_per_query, rng)
        seen = np.bincount(sessions.shown.ravel(), minlength=len(offers))
        hits = np.bincount(sessions.shown[sessions.clicked], minlength=len(offers))
        own_shown, own_clicked = shown.setdefault(query.text, Counter()), clicked.setdefault(query.text, Counter())
        for offer, num_shown, num_clicked in zip(offers, seen.tolist(), hits.tolist(), strict=True):
            for entity in task.entities(offer):
                own_shown[entity.id] += num_shown
                own_clicked[entity.id] += num_clicked
        leaf[query.text] = task.facts[query.cluster_id].category
        background.setdefault(leaf[query.text], Counter()).update(own_clicked)
    totals = {category: _totals(counts) for category, counts in background.items()}
    for text, own_shown in shown.items():
        yield from _rows_of_query(text, own_shown, clicked[text], background[leaf[text]], totals[leaf[text]])


def _totals(counts: Mapping[str, int]) -> Counter[str]:
    """Return type -> clicks of all its values."""
    totals = Counter[str]()
    for entity, count in counts.items():
        totals[type_of(entity)] += count
    return totals


def _rows_of_query(
    text: str,
    shown: Mapping[str, int],
    clicked: Mapping[str, int],
    background: Mapping[str, int],
    totals: Mapping[str, int],
) -> Iterator[QERow]:
    by_type: dict[str, list[EntityClicks]] = {}
    for entity, impressions in shown.items():
        total = totals[type_of(entity)]
        value = EntityClicks(
            entity=entity,
            impressions=impressions,
            clicks=clicked[entity],
            background_share=background[entity] / total if total else 0.0,
        )
        by_type.setdefault(type_of(entity), []).append(value)
    for values in by_type.values():
        yield from click_rows(text, values)


def _candidates(part: Part) -> Iterator[tuple[int, list[int]]]:
    starts = np.searchsorted(part.pairs.query, np.arange(len(part.queries) + 1))
    for number in range(len(part.queries)):
        yield number, part.pairs.offer[starts[number] : starts[number + 1]].tolist()


def _types(task: Task, offer: int) -> set[str]:
    return {entity.type for entity in task.entities(offer)}
