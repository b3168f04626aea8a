"""The generated catalogue's click log as a ranker reads it: one row per impression, with or without an EBRM's opinion.

Queries are parted so that nobody is tested on what he learned: of the train queries every fourth one teaches the EBRM, the
others' impressions train the ranker, dev chooses the EBRM's step, and the test queries' impressions test all rankers.

    query_words list<int64>   item_id int64   <type> list<int64>, the none entity where the item states no value
    entities list<int64>      of all types, in schema order;  slot_lengths: how many of each type, T per row
    position int64            query int64, for grouped metrics   click int8   true_probability float64
    ebrm_* float32            the columns of recis.ebrm.EBRMFeatures
"""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recis.ebrm import EBRM, EBRMFeatures
from recis.ebrm.click_model import click_chance
from recis.ebrm.synthetic import SyntheticData

ROW_GROUP_ROWS = 4096
TEACHES_ONE_IN = 4  # train queries


def parted(data: SyntheticData) -> SyntheticData:
    """Return the data with the part "ranker" made of three train queries in four; `synthetic_set` of it teaches the EBRM."""
    queries = tuple(
        replace(query, part="ranker") if query.part == "train" and place % TEACHES_ONE_IN else query
        for place, query in enumerate(data.queries)
    )
    return replace(data, queries=queries)


def ranker_rows(data: SyntheticData, part: str) -> np.ndarray:
    """Return the places of the impressions of a part's queries."""
    of_part = np.array([query.part == part for query in data.queries])
    return np.flatnonzero(of_part[data.clicks.query])


def write_log(data: SyntheticData, model: EBRM, folder: Path) -> dict[str, Path]:
    """Write the impressions of the ranker's queries and of the test queries as Parquet; returns the paths of train and test.

    Args:
        data: as `parted` returns it.
        model: scores each (query, item) pair of the log once.
        folder: that the files are put in; made when absent.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, part in (("train", "ranker"), ("test", "test")):
        paths[name] = folder / f"{name}.parquet"
        pq.write_table(_table(data, model, ranker_rows(data, part)), paths[name], row_group_size=ROW_GROUP_ROWS)
    return paths


def _table(data: SyntheticData, model: EBRM, rows: np.ndarray) -> pa.Table:
    query, item = data.clicks.query[rows], data.clicks.item[rows]
    position = data.clicks.position[rows].astype(np.int64)
    pairs, place = np.unique(np.stack([query, item], axis=1), axis=0, return_inverse=True)
    place = place.reshape(-1)
    gold = np.array([data.gold_qi(q, i) for q, i in pairs.tolist()], np.float64)[place]
    columns: dict[str, pa.Array | np.ndarray] = {
        "query_words": pa.array([[id_of(word) for word in own.text.split()] for own in data.queries]).take(
            pa.array(query)
        ),
        "item_id": np.array([id_of(own.id) for own in data.items], np.int64)[item],
        **_entity_columns(data, item),
        "position": position,
        "query": query.astype(np.int64),
        "click": data.clicks.clicked[rows].astype(np.int8),
        "true_probability": click_chance(gold, position),
    }
    features = EBRMFeatures(model)
    texts, items = [data.queries[q].text for q in pairs[:, 0]], [data.items[i] for i in pairs[:, 1]]
    opinions = features.named_columns(texts, items)
    columns |= {name: values.numpy()[place] for name, values in opinions.items()}
    return pa.table(columns)


def _entity_columns(data: SyntheticData, item: np.ndarray) -> dict[str, pa.Array]:
    slots = [data.schema.slots(own.entities) for own in data.items]
    of_row = pa.array(item)
    columns = {
        name: pa.array([[id_of(entity.id) for entity in own[at]] for own in slots]).take(of_row)
        for at, name in enumerate(data.schema.names)
    }
    columns["entities"] = pa.array([[id_of(entity.id) for slot in own for entity in slot] for own in slots]).take(
        of_row
    )
    columns["slot_lengths"] = pa.array([[float(len(slot)) for slot in own] for own in slots]).take(of_row)
    return columns


def id_of(text: str) -> int:
    """Return a 64-bit id of a text: its blake2b."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
