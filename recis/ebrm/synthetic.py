"""A made-up catalogue with queries, gold labels and a click log: the demo's and the tests' data, no files needed.

    catalogue  category, brand, series, colour, form, size of 20 / 60 / 200 / 12 / 8 / 6 values, popular by Zipf(1.1); brand
               and series depend on the category; 10 % of an item's values are missing from its entities, not from its title
    query      the category, and of the other types some, at values of one item; surfaces, and a typo in 1 of 20 words
    gold QE    1 where the query does not constrain the entity's type or the value is among the wanted ones
    gold QI    1 where every constrained type has a wanted value, hidden values included
    clicks     see `click_model`, over each query's candidates

Same config, same data: one seed, own generators per stage, nothing from the environment. Titles use surface synonyms, so
that understanding a title is a task of its own.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from recis.ebrm.click_model import draw_sessions
from recis.ebrm.entities import Entity, EntitySchema, Item, TypeConfig
from recis.ebrm.evaluate import EvalPairs, tie_of
from recis.ebrm.files import LabelRow, write_rows
from recis.ebrm.pricerunner_grades import CONTRADICTED, MET, NEARLY, OTHER_CATEGORY
from recis.ebrm.synthetic_words import CATEGORIES, COLOURS, FILLERS, FORMS, SIZES, made_up_names, with_typo

GENERATOR, VERSION = "recis.ebrm.synthetic", 1
TYPES = ("category", "brand", "series", "colour", "form", "size")
HARD = ("category", "brand", "series")
NUM_BRANDS, NUM_SERIES, ZIPF = 60, 200, 1.1
BRANDS_PER_CATEGORY, SERIES_PER_CATEGORY = 12, 10
CONSTRAIN = {"brand": 0.6, "series": 0.3, "colour": 0.35, "form": 0.2, "size": 0.2}
MAX_OWN_CANDIDATES, NUM_SHOWN = 15, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticConfig:
    """How much to make; the same config makes the same data."""

    num_items: int = 2_000
    num_queries: int = 600
    num_impressions: int = 200_000
    num_candidates: int = 50
    """Graded items per query."""
    hidden_share: float = 0.10
    """Share of an item's values that its entities leave out."""
    typo_share: float = 0.05
    """Share of a query's phrases with a slip."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_items", "num_queries", "num_candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"synthetic data: {name} must be at least 1; got {getattr(self, name)}")
        if self.num_impressions < 0:
            raise ValueError(f"synthetic data: num_impressions must not be negative; got {self.num_impressions}")
        for name in ("hidden_share", "typo_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"synthetic data: {name} must lie in [0, 1]; got {getattr(self, name)}")

    def generator(self) -> dict[str, Any]:
        """Return what every file says of where it came from."""
        return {"name": GENERATOR, "version": VERSION, "seed": self.seed}


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticQuery:
    """A query with what it constrains: type -> values, any of which will do."""

    text: str
    part: str
    """train, dev or test."""
    constraints: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClickLog:
    """Impressions [N], a session's side by side."""

    query: np.ndarray
    """int32, position in the queries."""
    item: np.ndarray
    """int32, position in the items."""
    position: np.ndarray
    """int8 from 1."""
    clicked: np.ndarray
    """bool."""


@dataclass(frozen=True, kw_only=True)
class SyntheticData:
    """Catalogue, queries, graded pairs and click log."""

    config: SyntheticConfig
    schema: EntitySchema
    items: tuple[Item, ...]
    values: tuple[Mapping[str, tuple[str, ...]], ...]
    """Per item all its values by type, hidden ones included: for gold alone."""
    queries: tuple[SyntheticQuery, ...]
    pair_query: np.ndarray
    """int32 [P]: graded pairs, those of a query side by side, shuffled within it."""
    pair_item: np.ndarray
    """int32 [P]."""
    clicks: ClickLog

    def gold_qi(self, query: int, item: int) -> int:
        """Return 1 when the item meets every constraint of the query, else 0."""
        return int(all(self._meets(query, item, kind) for kind in self.queries[query].constraints))

    def gold_qe(self, query: int, entity: Entity) -> int:
        """Return 1 when the query accepts the entity: its type is free, or its value is wanted. `none` is never wanted."""
        wanted = self.queries[query].constraints.get(entity.type)
        return int(wanted is None or entity.value in wanted)

    def grade(self, query: int, item: int) -> int:
        """Return 4 all met; 1 another category; 3 only one of colour, form, size missed; else 2."""
        unmet = [kind for kind in self.queries[query].constraints if not self._meets(query, item, kind)]
        if not unmet:
            return MET
        if "category" in unmet:
            return OTHER_CATEGORY
        return NEARLY if len(unmet) == 1 and unmet[0] not in HARD else CONTRADICTED

    def visible(self, query: int, item: int) -> bool:
        """Return whether the item's entities alone give the gold label."""
        own = {(entity.type, entity.value) for entity in self.items[item].entities}
        seen = all(any((kind, v) in own for v in wanted) for kind, wanted in self.queries[query].constraints.items())
        return seen == bool(self.gold_qi(query, item))

    def _meets(self, query: int, item: int, kind: str) -> bool:
        wanted = self.queries[query].constraints[kind]
        return any(value in wanted for value in self.values[item].get(kind, ()))

    @cached_property
    def grades(self) -> np.ndarray:
        """int8 [P]."""
        pairs = zip(self.pair_query.tolist(), self.pair_item.tolist(), strict=True)
        return np.array([self.grade(query, item) for query, item in pairs], dtype=np.int8)

    def pairs_of(self, part: str) -> np.ndarray:
        """Return the rows [.] of the graded pairs of a part's queries."""
        of_part = np.array([query.part == part for query in self.queries])
        return np.flatnonzero(of_part[self.pair_query])

    def eval_pairs(self, part: str) -> EvalPairs:
        """Return what the scores of a part's pairs are measured on, rows as `pairs_of`."""
        rows = self.pairs_of(part)
        query, item = self.pair_query[rows], self.pair_item[rows]
        visible = [self.visible(q, i) for q, i in zip(query.tolist(), item.tolist(), strict=True)]
        return EvalPairs(
            query=query,
            grade=self.grades[rows],
            visible=np.array(visible, dtype=bool),
            tie=np.array([tie_of(self.items[i].id) for i in item.tolist()], dtype=np.float64),
        )

    def label_rows(self, part: str) -> Iterable[LabelRow]:
        """Yield the graded pairs of a part."""
        for row in self.pairs_of(part).tolist():
            query, item = int(self.pair_query[row]), int(self.pair_item[row])
            grade = int(self.grades[row])
            yield LabelRow(
                query=self.queries[query].text,
                item=self.items[item].id,
                y=int(grade == MET),
                grade=grade,
                visible=self.visible(query, item),
            )

    def write(self, folder: str | Path) -> None:
        """Write items.jsonl, labels_<part>.jsonl, clicks.jsonl and schema.json; JSONL opens with generator and seed."""
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        about = self.config.generator()
        (out / "schema.json").write_text(json.dumps(self.schema.to_json(), indent=1), encoding="utf-8")
        write_rows(out / "items.jsonl", (item.to_json() for item in self.items), generator=about)
        for part in ("train", "dev", "test"):
            rows = (row.to_json() for row in self.label_rows(part))
            write_rows(out / f"labels_{part}.jsonl", rows, generator=about)
        log = self.clicks
        columns = (log.query.tolist(), log.item.tolist(), log.position.tolist(), log.clicked.tolist())
        shown = (
            {"query": self.queries[q].text, "item": self.items[i].id, "position": at, "clicked": hit}
            for q, i, at, hit in zip(*columns, strict=True)
        )
        write_rows(out / "clicks.jsonl", shown, generator=about)


def make_data(config: SyntheticConfig) -> SyntheticData:
    """Return the data of a config; the default takes a few seconds."""
    world = _World(_rng(config, "world"))
    items, values = _items(config, world, _rng(config, "items"))
    queries = _queries(config, world, values, _rng(config, "queries"))
    data = SyntheticData(
        config=config,
        schema=world.schema,
        items=items,
        values=values,
        queries=queries,
        pair_query=np.zeros(0, dtype=np.int32),
        pair_item=np.zeros(0, dtype=np.int32),
        clicks=_no_clicks(),
    )
    candidates = _candidates(data, _rng(config, "candidates"))
    return replace(
        data,
        pair_query=np.repeat(np.arange(len(queries), dtype=np.int32), [len(own) for own in candidates]),
        pair_item=np.array([item for own in candidates for item in own], dtype=np.int32),
        clicks=_clicks(data, candidates),
    )


class _World:
    """The values that exist, how they are spelt, and how popular they are."""

    def __init__(self, rng: random.Random) -> None:
        taken = {spelling for kind in (CATEGORIES, COLOURS, FORMS, SIZES) for value in kind for spelling in value}
        brands, series = made_up_names(NUM_BRANDS, 2, rng, taken), made_up_names(NUM_SERIES, 3, rng, taken)
        tables = (CATEGORIES, brands, series, COLOURS, FORMS, SIZES)
        self.surfaces = {
            kind: {spellings[0]: tuple(spellings) for spellings in table}
            for kind, table in zip(TYPES, tables, strict=True)
        }
        order = [names[0] for names in series]
        self.values = {kind: tuple(self.surfaces[kind]) for kind in TYPES}
        self.of_category: dict[str, dict[str, tuple[str, ...]]] = {}
        for at, category in enumerate(self.values["category"]):
            own = order[at * SERIES_PER_CATEGORY : (at + 1) * SERIES_PER_CATEGORY]
            brand_pool = rng.sample(self.values["brand"], BRANDS_PER_CATEGORY)
            self.of_category[category] = {"brand": tuple(brand_pool), "series": tuple(own)}
        synonyms = {
            kind: {spelling: value for value, spellings in table.items() for spelling in spellings[1:]}
            for kind, table in self.surfaces.items()
        }
        self.schema = EntitySchema(
            types=tuple(TypeConfig(name=kind, hard=kind in HARD[:2], synonyms=synonyms[kind]) for kind in TYPES)
        )

    def draw(self, kind: str, category: str, rng: random.Random) -> str:
        """Return a value, popular ones more often."""
        values = self.of_category[category].get(kind) or self.values[kind]
        return rng.choices(values, cum_weights=_zipf(len(values)))[0]

    def spell(self, kind: str, value: str, rng: random.Random) -> str:
        """Return one of the value's spellings."""
        return rng.choice(self.surfaces[kind][value])


def _zipf(count: int) -> list[float]:
    return list(accumulate(rank**-ZIPF for rank in range(1, count + 1)))


def _rng(config: SyntheticConfig, stage: str) -> random.Random:
    return random.Random(f"{GENERATOR}:{VERSION}:{config.seed}:{stage}")


def _items(
    config: SyntheticConfig, world: _World, rng: random.Random
) -> tuple[tuple[Item, ...], tuple[dict[str, tuple[str, ...]], ...]]:
    items, all_values = [], []
    for number in range(config.num_items):
        category = rng.choices(world.values["category"], cum_weights=_zipf(len(CATEGORIES)))[0]
        own: dict[str, tuple[str, ...]] = {"category": (category,)}
        for kind in TYPES[1:]:
            count = {"colour": rng.choice((1, 2)), "form": rng.choice((0, 1)), "size": rng.choice((0, 1))}.get(kind, 1)
            drawn = tuple(dict.fromkeys(world.draw(kind, category, rng) for _ in range(count)))
            if drawn:
                own[kind] = drawn
        pairs = [(kind, value) for kind, values in own.items() for value in values]
        listed = [pair for pair in pairs if rng.random() >= config.hidden_share]
        entities = tuple(world.schema.entity(kind, value, source="synthetic") for kind, value in listed)
        items.append(Item(id=f"s{number}", entities=entities, title=_title(pairs, world, rng)))
        all_values.append(own)
    return tuple(items), tuple(all_values)


def _title(pairs: Sequence[tuple[str, str]], world: _World, rng: random.Random) -> str:
    """Return brand and series first, then the rest in any order, each in one of its spellings, with a filler or two."""
    front = [world.spell(kind, value, rng) for kind, value in pairs if kind in ("brand", "series")]
    rest = [world.spell(kind, value, rng) for kind, value in pairs if kind not in ("brand", "series")]
    rest += rng.sample(FILLERS, rng.choice((0, 1, 2)))
    rng.shuffle(rest)
    return " ".join((*front, *rest))


def _queries(
    config: SyntheticConfig, world: _World, values: Sequence[Mapping[str, tuple[str, ...]]], rng: random.Random
) -> tuple[SyntheticQuery, ...]:
    queries = []
    for number in range(config.num_queries):
        target = rng.choice(values)
        wanted = {"category": target["category"]}
        for kind, chance in CONSTRAIN.items():
            if rng.random() < chance and kind in target:
                more = kind == "colour" and rng.random() < 0.5
                extra = [world.draw(kind, target["category"][0], rng)] if more else []
                wanted[kind] = tuple(dict.fromkeys((rng.choice(target[kind]), *extra)))
        phrases = [
            with_typo(phrase, rng) if rng.random() < config.typo_share else phrase
            for kind in sorted(wanted, key=lambda kind: (kind == "category", TYPES.index(kind)))
            for phrase in [" or ".join(world.spell(kind, value, rng) for value in wanted[kind])]
        ]
        queries.append(SyntheticQuery(text=" ".join(phrases), part=_part(config, number), constraints=wanted))
    return tuple(queries)


def _part(config: SyntheticConfig, number: int) -> str:
    digest = hashlib.sha256(f"{GENERATOR}:{VERSION}:{config.seed}:{number}".encode()).hexdigest()
    u = int(digest[:8], 16) / 2**32
    return "train" if u < 0.70 else "dev" if u < 0.85 else "test"


def _candidates(data: SyntheticData, rng: random.Random) -> list[list[int]]:
    """Return per query up to 15 relevant items, then half of its category and half of any, each once, shuffled."""
    of_category: dict[str, list[int]] = {}
    for number, own in enumerate(data.values):
        of_category.setdefault(own["category"][0], []).append(number)
    out = []
    for number, query in enumerate(data.queries):
        near = of_category[query.constraints["category"][0]]
        relevant = [item for item in near if data.gold_qi(number, item)]
        picked = dict.fromkeys(rng.sample(relevant, min(MAX_OWN_CANDIDATES, data.config.num_candidates, len(relevant))))
        others = [item for item in near if item not in set(relevant)]
        num_near = min(len(others), (data.config.num_candidates - len(picked)) // 2)
        picked |= dict.fromkeys(rng.sample(others, num_near))
        far = rng.sample(range(len(data.items)), min(len(data.items), 2 * data.config.num_candidates))
        picked |= dict.fromkeys(
            [item for item in far if item not in picked][: data.config.num_candidates - len(picked)]
        )
        order = list(picked)
        rng.shuffle(order)
        out.append(order)
    return out


def _no_clicks() -> ClickLog:
    empty = np.zeros(0, dtype=np.int32)
    return ClickLog(query=empty, item=empty, position=empty.astype(np.int8), clicked=empty.astype(bool))


def _clicks(data: SyntheticData, candidates: Sequence[Sequence[int]]) -> ClickLog:
    """Return the log: sessions go to queries by Zipf popularity, impressions stop at the wanted number."""
    config = data.config
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([VERSION, config.seed])))
    weight = np.arange(1, len(candidates) + 1, dtype=np.float64) ** -ZIPF
    num_sessions = -(-config.num_impressions // NUM_SHOWN)
    sessions = rng.multinomial(num_sessions, weight / weight.sum())
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    for number, (own, count) in enumerate(zip(candidates, sessions.tolist(), strict=True)):
        gold = np.array([data.gold_qi(number, item) for item in own], dtype=np.float64)
        drawn = draw_sessions(gold, count, rng)
        items = np.array(own, dtype=np.int32)[drawn.shown]
        position = np.broadcast_to(np.arange(1, items.shape[1] + 1, dtype=np.int8), items.shape)
        parts.append(
            (np.full(items.size, number, dtype=np.int32), items.ravel(), position.ravel(), drawn.clicked.ravel())
        )
    query, item, position, clicked = (
        np.concatenate(columns)[: config.num_impressions] for columns in zip(*parts, strict=True)
    )
    return ClickLog(query=query, item=item, position=position, clicked=clicked)
