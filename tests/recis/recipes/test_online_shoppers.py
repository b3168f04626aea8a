"""The shoppers recipe: folds, features by hand, members that do not see each other, and a fold of the real data."""

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recis.errors import ConfigError
from recis.recipes import online_shoppers as recipe
from recis.recipes.online_shoppers import (
    CODES,
    LABEL,
    NUM_MEMBERS,
    NUMBERS,
    STRINGS,
    MemberLinear,
    cross_validate,
    log_features,
    mean_probability,
    stratified_folds,
)
from recis.trainer import Trainer


def made_sessions(num_rows, seed=0):
    """Sessions whose purchase depends on PageValues and Month, with the columns of the real file."""
    rng = np.random.default_rng(seed)
    columns = {name: rng.exponential(2.0, num_rows).round(2) for name in NUMBERS}
    columns["Month"] = rng.choice(["Nov", "May", "Mar"], num_rows)
    columns["VisitorType"] = rng.choice(["New_Visitor", "Returning_Visitor"], num_rows)
    columns |= {name: rng.integers(1, 5, num_rows) for name in CODES}
    columns["Weekend"] = rng.random(num_rows) < 0.3
    logit = columns["PageValues"] + 2.0 * (columns["Month"] == "Nov") - 4.0
    columns[LABEL] = rng.random(num_rows) < 1 / (1 + np.exp(-logit))
    return pa.table(columns)


@pytest.fixture
def sessions(tmp_path):
    path = tmp_path / "sessions.parquet"
    pq.write_table(made_sessions(3000), path)
    return path


def test_folds_are_stratified_and_fixed():
    label = np.array([0] * 83 + [1] * 17)
    fold_of = stratified_folds(label, 5)
    assert np.array_equal(fold_of, stratified_folds(label, 5))
    assert np.bincount(fold_of[label == 1]).tolist() == [4, 4, 3, 3, 3]
    assert np.bincount(fold_of[label == 0]).tolist() == [17, 17, 17, 16, 16]


def test_log_features_by_hand():
    row = torch.tensor([[3.0, 60.0, 0.0, 0.0, 10.0, 500.0, 0.02, 0.04, 7.0, 0.4]], dtype=torch.float64)
    got = log_features(row)[0].tolist()
    assert got[:6] == pytest.approx([math.log1p(v) for v in (3, 60, 0, 0, 10, 500)])
    assert got[6:10] == pytest.approx([math.log1p(2.0), math.log1p(4.0), math.log1p(7.0), math.log1p(0.4)])
    assert got[10:] == pytest.approx(
        [math.log1p(50), math.log1p(20), 1.0, math.log1p(13), math.log1p(560), math.log1p(20), math.log1p(40)]
    )


def test_members_are_independent():
    layer = MemberLinear(3, 2)
    x = torch.randn(NUM_MEMBERS, 4, 3)
    out = layer(x)
    for member in range(NUM_MEMBERS):
        want = x[member] @ layer.weight[member] + layer.bias[member]
        torch.testing.assert_close(out[member], want)
    (grad,) = torch.autograd.grad(out[1].sum(), layer.weight)
    assert [bool(grad[member].any()) for member in range(NUM_MEMBERS)] == [False, True, False, False, False]


def test_mean_probability_is_the_mean_of_probabilities():
    logits = torch.tensor([[0.0, 100.0, -100.0, 0.0, 0.0]])
    assert mean_probability(logits).tolist() == [[pytest.approx(0.5)]]


def test_learns_and_cross_validates(sessions, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "EPOCHS", 12)
    result = cross_validate(sessions, folds=2, seed=0, scratch=tmp_path)
    assert len(result["recis"]) == 2
    assert min(result["recis"]) > 0.75
    assert set(result) == {"recis", "HistGradientBoosting", "HGB, categories"}


def test_missing_column_and_missing_file_are_named(sessions, tmp_path):
    pq.write_table(pq.read_table(sessions).drop_columns([STRINGS[0]]), tmp_path / "less.parquet")
    with pytest.raises(ConfigError, match="has no column 'Month'"):
        recipe.online_shoppers(data=str(tmp_path / "less.parquet"), out=tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        recipe.online_shoppers(data=str(tmp_path / "absent.parquet"), out=tmp_path)


@pytest.mark.data
def test_one_fold_of_the_real_data(data_dir, tmp_path):
    """A quarter of the epochs on one fold is well above chance already; the five full folds are in benchmarks/results."""
    path = data_dir / "online_shoppers" / "sessions.parquet"
    table = pq.read_table(path)
    fold_of = stratified_folds(table[LABEL].to_numpy().astype(np.int64), 5)
    for name, rows in (("train", fold_of != 0), ("test", fold_of == 0)):
        pq.write_table(table.filter(pa.array(rows)), tmp_path / f"{name}.parquet")
    config = recipe.make_config(tmp_path / "train.parquet", pq.read_table(tmp_path / "train.parquet"), seed=0)
    config = replace(config, epochs=5)
    trainer = Trainer(config, quiet=True)
    trainer.train()
    test = replace(config.train_data, paths=(str(tmp_path / "test.parquet"),), batch_size=4096)
    assert trainer.evaluate(test)["auc"] > 0.915
