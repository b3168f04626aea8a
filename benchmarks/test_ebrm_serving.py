"""Speed of EBRM serving with cached scores: query and candidates in, relevance of each out, on one core.

    make bench, or: pytest benchmarks/test_ebrm_serving.py --benchmark-json=out.json

Items have 8 entities in 6 types; the row of the query in the cache holds at most 2,000 pairs. The whole path is timed:
canonical query, row lookup, logits of the candidates' entities, overrides, soft logic, exp. Beside it the same with one
override that fires, with candidates picked from a packed catalogue, and with items that are laid out per request.
"""

from functools import partial

import numpy as np
import pytest

from recis.bench.harness import at_threads, compare
from recis.ebrm import EBRM, EBRMConfig, EntitySchema, Item, Override, QEScorer, TypeConfig

CANDIDATES = [50, 200, 1000, 5000]
TYPES = ("category", "brand", "series", "colour", "form", "size")
VALUES = (20, 60, 800, 12, 8, 6)
PER_ITEM = (1, 1, 1, 2, 2, 1)
ITEMS_PER_S = 300_000  # the target, at 5,000 candidates: with few, the fixed cost of a request counts
QUERY = "black smeg fridge"
CATALOGUE = 20_000


def _items(num_items: int) -> list[Item]:
    generator = np.random.default_rng(0)
    schema = _schema()
    values = [
        [schema.entity(name, f"{name}{value}") for value in range(count)]
        for name, count in zip(TYPES, VALUES, strict=True)
    ]
    return [
        Item(
            id=str(number),
            entities=tuple(
                pool[value]
                for pool, count in zip(values, PER_ITEM, strict=True)
                for value in generator.choice(len(pool), count, replace=False)
            ),
        )
        for number in range(num_items)
    ]


def _schema() -> EntitySchema:
    return EntitySchema(types=tuple(TypeConfig(name=name) for name in TYPES))


def _model() -> EBRM:
    generator = np.random.default_rng(1)
    entities = [f"{name}:{name}{value}" for name, count in zip(TYPES, VALUES, strict=True) for value in range(count)]
    table = {
        (QUERY, entity): float(logit)
        for entity, logit in zip(entities, generator.normal(0, 3, len(entities)), strict=True)
    }
    return EBRM(EBRMConfig(schema=_schema()), QEScorer.table(table))


@pytest.mark.parametrize("num_candidates", CANDIDATES)
def test_cached(benchmark, num_candidates):
    model, overruled = _model(), _model()
    items = _items(CATALOGUE)
    catalogue = model.pack(items)
    places = np.random.default_rng(2).choice(CATALOGUE, num_candidates, replace=False)
    chosen = [items[place] for place in places]
    packed = model.pack(chosen)
    ruled = overruled.pack(chosen)
    first = model.score(QUERY, catalogue)
    overruled.score(QUERY, ruled)
    overruled.overrides.add(Override(entity="colour:colour1", op="set", value=0.5, owner="bench"))
    ours = at_threads(1, partial(model.score, QUERY, packed))
    warm = model.score(QUERY, packed)
    assert warm.encoder_calls == 0
    assert (warm.r == first.r[places]).all()
    compare(
        benchmark,
        case=f"{num_candidates} cached candidates of 8 entities, row of {model.cache.num_pairs} pairs",
        ours="packed",
        impls={
            "packed": ours,
            "packed, one override": at_threads(1, partial(overruled.score, QUERY, ruled)),
            "picked from a catalogue": at_threads(1, lambda: model.score(QUERY, catalogue.select(places))),
            "laid out per request": at_threads(1, partial(model.score, QUERY, chosen)),
        },
        items=num_candidates,
        targets={"items_per_s": ITEMS_PER_S} if num_candidates == max(CANDIDATES) else None,
        extra={"cache_bytes_per_pair": 6, "row_pairs": model.cache.num_pairs},
    )
