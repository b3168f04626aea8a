"""A recipe that uses everything a resume must restore, on a few hundred samples: what the kill tests train.

Shuffled epochs, hashed and bag features, admission after two sightings, eviction after three steps, dropout, clipping,
two micro-batches per step, evaluation with a best checkpoint, training metrics, a schedule, asynchronous saves, deltas.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recis.embedding import AfterSightings, TableConfig, TtlSteps, Uniform
from recis.features import FeatureSpec, Hash
from recis.io import DataConfig, Dense, Group, Ids, Label, Strings
from recis.metrics import ExactAuc, Gauc, LogLoss
from recis.models.deepfm import DeepFMConfig
from recis.models.inputs import DenseInput
from recis.optim import Adam, Linear
from recis.trainer import DenseAdamW, Monitor, TrainConfig

MAX_STEPS = 24


def write_data(folder: Path, *, num_samples: int = 320, seed: int = 0) -> Path:
    """Write `clicks-*.parquet` with row groups of different sizes and return the folder."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    user = torch.randint(0, 30, (num_samples,), generator=generator)
    bags = [torch.randint(0, 60, (int(n),), generator=generator).tolist() for n in torch.arange(num_samples) % 4]
    price = torch.rand(num_samples, generator=generator)
    click = torch.rand(num_samples, generator=generator) < 0.2 + 0.6 * (user % 3 == 0)
    columns = {
        "user": [f"u{number}" for number in user.tolist()],
        "session": (user % 7).tolist(),
        "items": pa.array(bags, pa.list_(pa.int64())),
        "price": price.tolist(),
        "click": click.int().tolist(),
    }
    table = pa.table(columns)
    half = num_samples // 2
    pq.write_table(table.slice(0, half), folder / "clicks-0.parquet", row_group_size=37)
    pq.write_table(table.slice(half), folder / "clicks-1.parquet", row_group_size=53)
    return folder


def recipe(*, data: str | None, out: Path, delta_saves: int = 0, async_save: bool = True) -> TrainConfig:
    """Return the run; `data` is a folder that write_data made."""
    del out
    settings = {
        "optimizer": Adam(lr=0.05),
        "initializer": Uniform(-0.05, 0.05),
        "admission": AfterSightings(2),
        "eviction": (TtlSteps(3),),
        "embedding_dim": 5,
    }
    model = DeepFMConfig(
        tables=(
            TableConfig(name="user", features=("user",), **settings),
            TableConfig(name="item", features=("items",), **settings),
        ),
        dense=(DenseInput("price"),),
        hidden=(8,),
        dropout=0.2,
        seed=5,
    )
    columns = (
        Strings("user"),
        Group("session"),
        Ids("items"),
        Dense("price"),
        Label("click"),
    )
    files = DataConfig(
        paths=(str(data),),
        format="parquet",
        columns=columns,
        batch_size=32,
        num_lanes=4,
        shuffle_rows=64,
        seed=9,
        threads=1,
        prefetch_batches=2,
    )
    return TrainConfig(
        name="kill",
        model=model,
        train_data=files,
        eval_data=files,
        features=(
            FeatureSpec(name="user", kind="sparse", ops=(Hash("farm"),)),
            FeatureSpec(name="items", kind="sparse"),
            FeatureSpec(name="price", kind="dense"),
            FeatureSpec(name="session", kind="group"),
            FeatureSpec(name="click", kind="label"),
        ),
        metrics=(ExactAuc(), Gauc(), LogLoss()),
        dense_optimizer=DenseAdamW(lr=0.01),
        schedule=Linear(warmup_steps=4, total_steps=MAX_STEPS),
        max_steps=MAX_STEPS,
        accumulate_steps=2,
        clip_grad_norm=1.0,
        eval_every_steps=7,
        monitor=Monitor(metric="auc"),
        save_every_steps=3,
        keep_checkpoints=2,
        delta_saves=delta_saves,
        async_save=async_save,
        log_every_steps=2,
        seed=11,
    )
