"""The ranker with EBRM: its rows, the layer against the formula by hand, and a small run that features must help."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from recis.ebrm import EBRM, EBRMConfig, QEScorer
from recis.ebrm.synthetic import TYPES, SyntheticConfig, make_data
from recis.embedding import TableSet
from recis.errors import ConfigError
from recis.io.batch import Batch
from recis.jagged import JaggedTensor, KeyedJaggedTensor
from recis.recipes import find_recipe
from recis.recipes.ebrm_log import id_of, parted, ranker_rows, write_log
from recis.recipes.ebrm_ranker import (
    DIM,
    DONE,
    FEATURE_KEYS,
    LAYER_KEYS,
    RANKERS,
    LayerConfig,
    SoftLogicLayer,
    comparison_table,
    ebrm_ranker,
    ids_alone,
    print_comparison,
    ranker_run,
    ranker_tables,
    with_features,
    with_layer,
)
from recis.trainer import Trainer

SMALL = SyntheticConfig(num_items=150, num_queries=120, num_impressions=12_000, num_candidates=20, seed=1)


@pytest.fixture(scope="module")
def data():
    return parted(make_data(SMALL))


@pytest.fixture(scope="module")
def model(data):
    """An EBRM whose every logit is gold."""
    entities = {e.id: e for item in data.items for slot in data.schema.slots(item.entities) for e in slot}
    logits = {
        (query.text, name): 3.0 if data.gold_qe(place, entity) else -3.0
        for place, query in enumerate(data.queries)
        for name, entity in entities.items()
    }
    return EBRM(EBRMConfig(schema=data.schema), QEScorer.table(logits, default=0.0))


@pytest.fixture(scope="module")
def folder(data, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    write_log(data, model, folder)
    (folder / DONE).write_text("{}")
    return folder


def test_nobody_is_tested_on_what_he_learned(data):
    parts = {query.part for query in data.queries}
    assert parts == {"train", "ranker", "dev", "test"}
    rows = {part: set(data.clicks.query[ranker_rows(data, part)].tolist()) for part in parts}
    assert sum(map(len, rows.values())) == len(set().union(*rows.values()))  # no query in two parts
    assert len(rows["ranker"]) > 2 * len(rows["train"])


def test_a_row_of_the_log_says_what_the_model_and_the_catalogue_say(data, model, folder):
    table = pq.read_table(folder / "test.parquet")
    places = ranker_rows(data, "test")
    assert len(table) == len(places)
    row = table.slice(7, 1).to_pylist()[0]
    query, item = data.queries[int(data.clicks.query[places[7]])], data.items[int(data.clicks.item[places[7]])]
    assert row["query_words"] == [id_of(word) for word in query.text.split()]
    assert row["item_id"] == id_of(item.id)
    slots = data.schema.slots(item.entities)
    assert row["entities"] == [id_of(entity.id) for slot in slots for entity in slot]
    assert row["slot_lengths"] == [len(slot) for slot in slots]
    assert [row[name] for name in TYPES] == [[id_of(entity.id) for entity in slot] for slot in slots]
    scored = model.score(query.text, [item])
    assert row["ebrm_r"] == scored.r[0]
    assert [row[f"ebrm_log_g_{name}"] for name in TYPES] == pytest.approx(np.maximum(scored.log_g[0], -20).tolist())
    assert row["click"] == data.clicks.clicked[places[7]]
    met = data.gold_qi(int(data.clicks.query[places[7]]), int(data.clicks.item[places[7]]))
    assert row["true_probability"] == pytest.approx((0.02 + 0.55 * met) / (1 + 0.25 * (row["position"] - 1)))


def hand_batch() -> Batch:
    """Two samples: words {1, 2} and {3}; entities by type with two in the fourth type of sample 0."""
    lengths = [[1, 1, 1, 2, 1, 1], [1] * len(TYPES)]
    entities = torch.arange(10, 10 + sum(map(sum, lengths)))
    sparse = {
        "query_word_list": JaggedTensor(torch.tensor([1, 2, 3]), lengths=torch.tensor([2, 1])),
        "entities": JaggedTensor(entities, lengths=torch.tensor([7, 6])),
    }
    return Batch(
        sparse=KeyedJaggedTensor.from_jagged(sparse),
        dense=torch.tensor(lengths, dtype=torch.float32),
        dense_keys=("slot_lengths",),
        dense_widths=(len(TYPES),),
        labels=torch.zeros(2, 1),
        label_mask=None,
        label_weights=None,
        weights=torch.ones(2),
        group_ids=None,
        extras={},
        num_samples=2,
    )


def test_the_layer_is_the_formula_on_products_of_rows():
    torch.manual_seed(0)
    layer = SoftLogicLayer(TableSet(ranker_tables(), seed=3), LayerConfig())
    with torch.no_grad():
        layer.bias.copy_(torch.linspace(-1, 1, len(TYPES)))
        layer.none.normal_()
    batch = hand_batch()
    columns = layer(batch)
    rows = layer.rows(batch.sparse)
    words, entities = rows["query_word_list"].flat_values, rows["entities"].flat_values
    assert words.shape == (3, DIM)
    queries = [words[0] + words[1], words[2]]
    at, want = 0, []
    for sample, sizes in enumerate(batch.dense.long().tolist()):
        g = []
        for kind, size in enumerate(sizes):
            wanted = queries[sample] @ layer.by_type[kind] + layer.none
            s = torch.sigmoid(entities[at : at + size] @ wanted + layer.bias[kind])
            g.append(1 - (1 - s).prod())
            at += size
        g = torch.stack(g)
        want.append(torch.cat([g.prod()[None], g.prod().log()[None], g.log()]))
    torch.testing.assert_close(columns, torch.stack(want), rtol=1e-5, atol=1e-5)
    assert columns.shape[1] == len(LAYER_KEYS)
    columns.sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in (layer.by_type, layer.none, layer.bias))


def test_features_help_and_the_layer_trains(folder):
    runs = {}
    for ranker in (ids_alone, with_features, with_layer):
        run = Trainer(ranker_run(ranker, folder, epochs=2, seed=0), quiet=True)
        before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
        run.train()
        runs[ranker.__name__] = run.state.metrics
        moved = {name for name, value in run.model.named_parameters() if not torch.equal(value, before[name])}
        assert ranker is not with_layer or {"layer.by_type", "layer.bias", "layer.pool.relaxation"} <= moved
    assert runs["with_features"]["auc"] > runs["ids_alone"]["auc"] + 0.05  # its logits are gold
    assert runs["with_features"]["ne"] < runs["ids_alone"]["ne"]
    assert runs["with_layer"]["auc"] > 0.5


def test_the_recipe_compares_all_rankers(folder, model, tmp_path, capsys):
    assert find_recipe("ebrm_ranker") is ebrm_ranker
    (tmp_path / "data").symlink_to(folder)
    config = ebrm_ranker(data=None, out=tmp_path, seeds=0)
    assert config.after is None
    assert config.model == with_features(ranker_tables(), 0)
    trainer = Trainer(replace(config, max_steps=2), quiet=True)
    print_comparison(trainer, None, folder=folder, epochs=1, seeds=1)
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in RANKERS)
    assert "best possible AUC 0." in out
    with pytest.raises(ConfigError, match="makes its own data and cannot read log"):
        ebrm_ranker(data="log", out=tmp_path)
    model.save(tmp_path / "other")
    settings = json.loads((tmp_path / "other" / "model" / "model.json").read_text())
    assert settings["version"] == model.version
    with pytest.raises(ConfigError, match="other entity types"):  # of another catalogue: other synonyms
        ebrm_ranker(data=None, out=tmp_path / "new", ebrm=str(tmp_path / "other"), num_queries=20, num_impressions=100)


def test_gains_are_means_over_seeds():
    results = {
        "ids alone": [{"auc": 0.6, "gauc": 0.5, "ne": 0.9}, {"auc": 0.7, "gauc": 0.5, "ne": 0.8}],
        "+ EBRM features": [{"auc": 0.7, "gauc": 0.6, "ne": 0.8}, {"auc": 0.76, "gauc": 0.7, "ne": 0.8}],
    }
    last = comparison_table(results).splitlines()[-1]
    auc, gauc, ne = "0.7300 (0.7000-0.7600) +0.0800", "0.6500 (0.6000-0.7000) +0.1500", "0.8000 (0.8000-0.8000) -0.0500"
    assert " ".join(last.split()) == f"+ EBRM features {auc} {gauc} {ne}"
    assert len(FEATURE_KEYS) == 3 + len(TYPES)
