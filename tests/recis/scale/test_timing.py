"""What a step takes beside its tables: each delay that is put in is found where it belongs, and nowhere else."""

import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from recis.embedding import EmbeddingBagCollection, TableConfig
from recis.features import FeatureEngine, FeatureSpec
from recis.io import DataConfig, Dense, Ids, Label
from recis.metrics import LogLoss
from recis.models.losses import binary_loss
from recis.models.synthetic import SyntheticClicks
from recis.scale import timing
from recis.scale.timing import feature_times, line_through, step_times
from recis.trainer import TrainConfig

DELAY_S = 0.05


class OneTable(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = EmbeddingBagCollection([TableConfig(name="user", features=("user_id",), embedding_dim=4)], seed=0)
        self.top = nn.Linear(4, 1)

    def forward(self, batch):
        return self.top(self.rows(batch.sparse)["user_id"])


class SlowTable(OneTable):
    def __init__(self):
        super().__init__()
        look_up = self.rows.forward

        def slow(batch):
            time.sleep(DELAY_S)
            return look_up(batch)

        self.rows.forward = slow


def slow_loss(logits, batch):
    time.sleep(DELAY_S)
    return binary_loss(logits, batch)


def slow_score(logits):
    time.sleep(DELAY_S)
    return torch.sigmoid(logits)


@pytest.fixture
def batch():
    return next(iter(SyntheticClicks(num_samples=64, batch_size=64, num_users=20)))


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setattr(timing, "_ROUNDS", 3)
    return TrainConfig(
        name="one", model=OneTable, train_data=SyntheticClicks(), tasks=("click",), metrics=(LogLoss(),), max_steps=1
    )


@pytest.mark.parametrize(
    ("changes", "where"),
    [({"loss": slow_loss}, "dense"), ({"score": slow_score}, "trainer"), ({"model": SlowTable}, "neither")],
    ids=["loss", "score", "lookups"],
)
def test_a_delay_is_found_where_it_belongs(config, batch, changes, where):
    times = step_times(replace(config, **changes), batch)
    found = {name: fixed + 64 * each for name, (fixed, each) in (("dense", times.dense), ("trainer", times.trainer))}
    for name, seconds in found.items():
        assert (seconds > 0.9 * DELAY_S) == (name == where), found
    assert times.optimizer_numbers == 2 * 5  # AdamW's two moments of weights and bias


def test_features_of_files_and_of_batches(config, batch, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "_LIMIT_S", 0.2)
    table = {"user": [1, 2, 3, 4] * 10, "price": [0.5] * 40, "click": [0, 1] * 20}
    lines = ["user,price,click", *(",".join(map(str, row)) for row in zip(*table.values(), strict=True))]
    (tmp_path / "clicks.csv").write_text("\n".join(lines) + "\n")
    files = DataConfig(
        paths=(str(tmp_path / "clicks.csv"),),
        format="csv",
        columns=(Ids("user"), Dense("price"), Label("click")),
        batch_size=20,
    )
    engine = FeatureEngine(
        (
            FeatureSpec(name="user", kind="sparse"),
            FeatureSpec(name="price", kind="dense"),
            FeatureSpec(name="click", kind="label"),
        )
    )
    seen = []
    make = engine.forward

    def slow(raw):
        seen.append(raw.num_samples)
        time.sleep(1e-3 * raw.num_samples)
        return make(raw)

    monkeypatch.setattr(engine, "forward", slow)
    fixed, per_sample = feature_times(files, engine, None)
    assert set(seen) == {5, 20}
    assert fixed + 20 * per_sample >= 0.02
    assert feature_times(None, None, batch)[1] < 1e-3  # cutting a batch
    assert feature_times(None, None, None) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("sizes", "seconds", "want"),
    [
        ((2, 8), (3.0, 9.0), (1.0, 1.0)),
        ((2, 8), (9.0, 8.0), (8.0, 0.0)),  # noise: no batch is quicker than a smaller one
        ((2, 8), (1.0, 8.0), (0.0, 1.0)),  # nor dearer per sample
        ((5, 5), (2.0, 2.5), (0.0, 0.5)),
    ],
)
def test_a_line_through_two_times(sizes, seconds, want):
    assert line_through(sizes, seconds) == pytest.approx(want)
