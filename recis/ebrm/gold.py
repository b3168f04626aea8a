"""Gold labels of what queries accept, and what a model says of the same slots: what verdict thresholds are fitted on.

gold      per query: the types it constrains, and which entities it accepts. For evaluation and for cuts, not for weights
slots     per (query, item, type) with a stated value: g_t of the model, and whether the query accepts one of the values
nones     per (query, type): s of the type's none entity, and whether the query leaves the type free
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from recis.ebrm.calibrate import VerdictThresholds, fit_verdict_thresholds
from recis.ebrm.entities import Entity, Item
from recis.ebrm.model import EBRM
from recis.ebrm.pairs import BATCH_QUERIES, QIPairs
from recis.errors import DataError

MAX_QUERIES = 300  # a cut on one number does not get better with more


@dataclass(frozen=True, slots=True)
class QueryGold:
    """What a query really asks for."""

    constrained: frozenset[str]
    """Types that it constrains."""
    accepts: Callable[[Entity], bool]
    """Whether it accepts an entity; True for types that it leaves free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotTruths:
    """Truths of a model beside gold.

    Attributes:
        type: str [N], of slots in which the item states a value and that the query constrains, or that are of the category.
        g: [N], g_t in [0, 1].
        met: bool [N], whether the query accepts one of the slot's entities.
        s_none: [M], s of the none entity of each query and type, the category left out.
        is_free: bool [M], whether the query leaves the type free.
    """

    type: np.ndarray
    g: np.ndarray
    met: np.ndarray
    s_none: np.ndarray
    is_free: np.ndarray


def slot_truths(
    model: EBRM, pairs: QIPairs, gold: Sequence[QueryGold], *, max_queries: int = MAX_QUERIES
) -> SlotTruths:
    """Return the model's truths and gold of the pairs of the first queries, through the model's cache.

    Args:
        model: scored with; overrides in force count, so fit before there are any.
        pairs: of development queries.
        gold: one per query of the pairs.
        max_queries: queries used.

    Raises:
        DataError: not one gold per query.
        ValueError: as `EBRM.score`.
    """
    if len(gold) != len(pairs.queries):
        raise DataError(f"gold must be one per query; got {len(gold)} for {len(pairs.queries)} queries")
    schema, category = model.config.schema, model.config.category_type
    packed = model.pack([*pairs.items, Item(id="without entities")])
    groups = list(pairs.by_query())[:max_queries]
    slots: list[tuple[str, float, bool]] = []
    nones: list[tuple[float, bool]] = []
    for first in range(0, len(groups), BATCH_QUERIES):
        part = groups[first : first + BATCH_QUERIES]
        places = [np.append(pairs.item[rows], len(pairs.items)) for _, rows in part]
        requests = [(pairs.queries[query], packed.select(own)) for (query, _), own in zip(part, places, strict=True)]
        for (query, _), own, scores in zip(part, places, model.score_many(requests), strict=True):
            g = np.exp(scores.log_g.astype(np.float64))  # its last row is of no entities: s of each none
            for position, name in enumerate(schema.names):
                if name != category:
                    nones.append((float(g[-1, position]), name not in gold[query].constrained))
            for row, item in enumerate(own[:-1].tolist()):
                slots += _stated(model, pairs.items[item], g[row], gold[query])
    return SlotTruths(
        type=np.array([name for name, _, _ in slots], dtype=str),
        g=np.array([g for _, g, _ in slots], dtype=np.float64),
        met=np.array([met for _, _, met in slots], dtype=bool),
        s_none=np.array([s for s, _ in nones], dtype=np.float64),
        is_free=np.array([free for _, free in nones], dtype=bool),
    )


def fit_thresholds(model: EBRM, pairs: QIPairs, gold: Sequence[QueryGold]) -> VerdictThresholds:
    """Fit and keep the verdict thresholds of a model by `fit_verdict_thresholds`; raises as `slot_truths`."""
    truths = slot_truths(model, pairs, gold)
    is_category = truths.type == model.config.category_type
    model.thresholds = fit_verdict_thresholds(
        g=truths.g[~is_category],
        met=truths.met[~is_category],
        category_g=truths.g[is_category],
        category_met=truths.met[is_category],
        s_none=truths.s_none,
        is_free=truths.is_free,
    )
    return model.thresholds


def _stated(model: EBRM, item: Item, g: np.ndarray, gold: QueryGold) -> list[tuple[str, float, bool]]:
    """Return type, g and gold of an item's slots that have a value and that a verdict is given of."""
    schema = model.config.schema
    out = []
    for position, slot in enumerate(schema.slots(item.entities, on_unknown="drop")):
        name = slot[0].type
        if not slot[0].is_none and (name in gold.constrained or name == model.config.category_type):
            out.append((name, float(g[position]), any(map(gold.accepts, slot))))
    return out
