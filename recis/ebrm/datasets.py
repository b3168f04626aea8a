"""What training and evaluation read: the made-up catalogue, a file of offers, or a folder of our JSONL files.

    synthetic   made in memory (recis.ebrm.synthetic)
    offers      Parquet with the columns of the PriceRunner file (recis.ebrm.pricerunner)
    folder      items.jsonl, labels_train.jsonl, labels_dev.jsonl; where they are there: schema.json (else the default
                schema), clicks.jsonl, qe.jsonl

Test parts are never read for training.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np

from recis.ebrm.composed_queries import ComposeConfig
from recis.ebrm.config import ebrm_full
from recis.ebrm.entities import EntitySchema, Item
from recis.ebrm.evaluate import EvalPairs, tie_of
from recis.ebrm.files import LabelRow, read_clicks, read_items, read_labels, read_qe
from recis.ebrm.gold import QueryGold
from recis.ebrm.labels_from_logs import QERow
from recis.ebrm.log_rows import COMPOSED, Impressions, rows_from_logs
from recis.ebrm.pairs import QIPairs
from recis.ebrm.pricerunner import NUM_QUERIES, Part, Task, build_eval, build_task
from recis.ebrm.pricerunner_labels import Dictionaries
from recis.ebrm.pricerunner_qe import accepts, stage_a_rows
from recis.ebrm.pricerunner_split import read_catalogue
from recis.ebrm.pricerunner_titles import pricerunner_schema, title_entities, title_facts
from recis.ebrm.synthetic import SyntheticData
from recis.errors import ConfigError, DataError

IRRELEVANT, RELEVANT = 1, 4  # grades of labels without one
SCHEMA_NAME = "schema.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSet:
    """What a model learns from."""

    schema: EntitySchema
    qe_rows: Sequence[QERow]
    train: QIPairs
    dev: QIPairs
    texts: Sequence[str] = ()
    """Per item of train what a text model reads."""
    dictionaries: Dictionaries | None = None
    """Of the PriceRunner task: what its titles and queries are read with; kept with the model."""
    hashes: Mapping[str, str] = field(default_factory=dict)
    """File or generator -> what identifies its content."""
    dev_gold: Sequence[QueryGold] | None = None
    """What each dev query really asks for, where it is known: verdict thresholds are fitted on it."""

    def corpus(self) -> list[str]:
        """Return the texts of the train part that a fresh encoder learns its words from, sorted."""
        used = {int(place) for place in np.unique(self.train.item)}
        queries = {self.train.queries[place] for place in np.unique(self.train.query).tolist()}
        items = [self.train.items[place] for place in sorted(used)]
        entities = {f"{e.type} : {e.value}" for item in items for e in item.entities}
        others = {text for texts in self.schema.spellings().values() for text in texts}
        return sorted({*queries, *(item.title for item in items), *entities, *others, *self.schema.names})


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSet:
    """Pairs to score, and the truth about them."""

    pairs: QIPairs
    truth: EvalPairs
    texts: tuple[str, ...]
    """Per item what a text model reads."""


def synthetic_set(data: SyntheticData, *, composed: ComposeConfig | None = COMPOSED) -> TrainingSet:
    """Return the train and dev parts of a made-up catalogue; `composed` says how many queries stage A has besides."""
    train = synthetic_pairs(data, "train")
    clicks = Impressions(query=data.clicks.query, item=data.clicks.item, clicked=data.clicks.clicked)
    return TrainingSet(
        schema=data.schema,
        qe_rows=rows_from_logs(train, data.schema, clicks, composed=composed),
        train=train,
        dev=synthetic_pairs(data, "dev"),
        texts=tuple(item.title for item in data.items),
        hashes={"synthetic": json.dumps(data.config.generator(), sort_keys=True)},
        dev_gold=synthetic_gold(data),
    )


def synthetic_gold(data: SyntheticData) -> list[QueryGold]:
    """Return what each query of a made-up catalogue asks for."""
    return [
        QueryGold(frozenset(query.constraints), lambda entity, place=place: bool(data.gold_qe(place, entity)))
        for place, query in enumerate(data.queries)
    ]


def synthetic_pairs(data: SyntheticData, part: str) -> QIPairs:
    """Return the graded pairs of a part, rows as `data.pairs_of`."""
    rows = data.pairs_of(part)
    return QIPairs(
        queries=tuple(query.text for query in data.queries),
        items=data.items,
        query=data.pair_query[rows],
        item=data.pair_item[rows],
        label=(data.grades[rows] == RELEVANT).astype(np.float32),
    )


def synthetic_eval(data: SyntheticData, part: str) -> EvalSet:
    """Return a part of a made-up catalogue with its truth."""
    pairs = synthetic_pairs(data, part)
    return EvalSet(pairs=pairs, truth=data.eval_pairs(part), texts=tuple(item.title for item in data.items))


def offers_set(path: str | Path, *, num_queries: Mapping[str, int] = NUM_QUERIES, seed: int = 0) -> TrainingSet:
    """Return the train and dev parts of the PriceRunner task of a file; raises as `build_task`."""
    task = build_task(path, num_queries={**num_queries, "test": 0})
    return task_set(task, seed=seed, hashes={Path(path).name: sha256_of(Path(path))})


def task_set(task: Task, *, seed: int = 0, hashes: Mapping[str, str] = MappingProxyType({})) -> TrainingSet:
    """Return the train and dev parts of the PriceRunner task; `seed` is that of the drawn clicks."""
    train = task.parts["train"]
    return TrainingSet(
        schema=task.schema,
        qe_rows=stage_a_rows(task, train, seed=seed),
        train=_task_pairs(task, train),
        dev=_task_pairs(task, task.parts["dev"]),
        texts=_task_texts(task, train),
        dictionaries=task.dictionaries,
        hashes=hashes,
        dev_gold=task_gold(task.parts["dev"]),
    )


def task_gold(part: Part) -> list[QueryGold]:
    """Return what each query of a part of the PriceRunner task was drawn to ask for."""
    return [QueryGold(frozenset(q.constraints), partial(accepts, q.constraints)) for q in part.queries]


def offers_eval(path: str | Path, known: Dictionaries) -> EvalSet:
    """Return the task of unseen offers, read with the dictionaries of a model; raises as `read_catalogue`."""
    task = build_eval(read_catalogue(path), known)
    return task_eval(task, task.parts["eval"])


def task_eval(task: Task, part: Part) -> EvalSet:
    """Return a part of the PriceRunner task with its truth; texts are title and category noun."""
    return EvalSet(pairs=_task_pairs(task, part), truth=task.eval_pairs(part), texts=_task_texts(task, part))


def _task_texts(task: Task, part: Part) -> tuple[str, ...]:
    return tuple(map(task.item_text, np.unique(part.pairs.offer).tolist()))


def _task_pairs(task: Task, part: Part) -> QIPairs:
    offers, item = np.unique(part.pairs.offer, return_inverse=True)
    return QIPairs(
        queries=tuple(query.text for query in part.queries),
        items=tuple(task.item(offer) for offer in offers.tolist()),
        query=part.pairs.query,
        item=item.astype(np.int64),
        label=part.pairs.label.astype(np.float32),
    )


def offers_items(path: str | Path, known: Dictionaries) -> list[Item]:
    """Return the offers of a file as items, read with the dictionaries of a model; raises as `read_catalogue`."""
    catalogue, schema = read_catalogue(path), pricerunner_schema()
    return [
        Item(
            id=str(offer.product_id),
            title=offer.title,
            entities=title_entities(title_facts(offer.title, catalogue.categories[offer.cluster_id], known), schema),
        )
        for offer in catalogue.offers
    ]


def folder_set(folder: str | Path, *, composed: ComposeConfig | None = COMPOSED) -> TrainingSet:
    """Return what a folder of JSONL files holds; `composed` as for `synthetic_set`.

    Raises:
        ConfigError: a file is missing.
        DataError: as the readers of recis.ebrm.files; a label or click of an item that items.jsonl lacks.
    """
    home = Path(folder)
    names = ("items.jsonl", "labels_train.jsonl", "labels_dev.jsonl")
    missing = [name for name in names if not (home / name).is_file()]
    if missing:
        raise ConfigError(f"{home}: {', '.join(missing)} missing; a training folder holds {', '.join(names)}")
    schema = read_schema(home / SCHEMA_NAME) if (home / SCHEMA_NAME).is_file() else ebrm_full()
    items = tuple(read_items(home / names[0], schema))
    train, _ = _label_pairs(home / names[1], items)
    dev, _ = _label_pairs(home / names[2], items)
    has_qe, has_clicks = (home / "qe.jsonl").is_file(), (home / "clicks.jsonl").is_file()
    clicks = _impressions(home / "clicks.jsonl", train) if has_clicks else None
    rows = list(read_qe(home / "qe.jsonl")) if has_qe else []
    used = [*names, *(["qe.jsonl"] if has_qe else []), *(["clicks.jsonl"] if has_clicks else [])]
    return TrainingSet(
        schema=schema,
        qe_rows=rows + rows_from_logs(train, schema, clicks, composed=composed),
        train=train,
        dev=dev,
        hashes={name: sha256_of(home / name) for name in used},
    )


def labels_eval(path: str | Path, items: Sequence[Item]) -> EvalSet:
    """Return the graded pairs of a labels file; without a grade y = 1 counts as 4 and y = 0 as 1.

    Raises:
        DataError: as `read_labels`; a label of an item that is not among the items.
    """
    pairs, rows = _label_pairs(Path(path), tuple(items))
    grades = [row.grade if row.grade is not None else RELEVANT if row.y else IRRELEVANT for row in rows]
    truth = EvalPairs(
        query=pairs.query,
        grade=np.array(grades, dtype=np.int64),
        visible=np.array([row.visible for row in rows], dtype=bool),
        tie=np.array([tie_of(row.item) for row in rows], dtype=np.float64),
    )
    return EvalSet(pairs=pairs, truth=truth, texts=tuple(item.title for item in items))


def read_schema(path: Path) -> EntitySchema:
    """Return the schema of a JSON file.

    Raises:
        DataError: no JSON, or unknown or missing keys.
        ConfigError: a value breaks a rule.
    """
    try:
        return EntitySchema.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"not JSON: {error}", file=str(path)) from error


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _label_pairs(path: Path, items: tuple[Item, ...]) -> tuple[QIPairs, list[LabelRow]]:
    rows = list(read_labels(path))
    places = {item.id: place for place, item in enumerate(items)}
    unknown = next((row.item for row in rows if row.item not in places), None)
    if unknown is not None:
        raise DataError("a label names an item that is not in the items file", file=str(path), value=unknown)
    queries = {text: place for place, text in enumerate(dict.fromkeys(row.query for row in rows))}
    pairs = QIPairs(
        queries=tuple(queries),
        items=items,
        query=np.array([queries[row.query] for row in rows], dtype=np.int64),
        item=np.array([places[row.item] for row in rows], dtype=np.int64),
        label=np.array([row.y for row in rows], dtype=np.float32),
    )
    return pairs, rows


def _impressions(path: Path, pairs: QIPairs) -> Impressions:
    """Return the impressions of the pairs' queries; those of other queries are left out."""
    queries = {text: place for place, text in enumerate(pairs.queries)}
    places = {item.id: place for place, item in enumerate(pairs.items)}
    rows = [row for row in read_clicks(path) if row.query in queries]
    unknown = next((row.item for row in rows if row.item not in places), None)
    if unknown is not None:
        raise DataError("a click names an item that is not in the items file", file=str(path), value=unknown)
    return Impressions(
        query=np.array([queries[row.query] for row in rows], dtype=np.int64),
        item=np.array([places[row.item] for row in rows], dtype=np.int64),
        clicked=np.array([row.clicked for row in rows], dtype=bool),
    )
