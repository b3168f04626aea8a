"""A recipe of a few hundred samples on files, for tests of the commands: `click_recipe:clicks`, and data for it."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch

from recis.embedding import TableConfig
from recis.features import FeatureSpec, Hash, Log
from recis.io import DataConfig, Dense, Group, Ids, Label, Strings
from recis.io.columns import Column
from recis.metrics import ExactAuc, LogLoss
from recis.models.deepfm import DeepFMConfig
from recis.models.inputs import DenseInput
from recis.models.multitask import MmoeConfig
from recis.optim import Adam
from recis.trainer import DenseAdamW, Monitor, TrainConfig

COLUMNS: tuple[Column, ...] = (
    Ids("user"),
    Group("session", source="user"),
    Ids("items"),
    Strings("brand"),
    Dense("price"),
    Label("click"),
)
FEATURES = (
    FeatureSpec(name="user", kind="sparse"),
    FeatureSpec(name="items", kind="sparse"),
    FeatureSpec(name="brand", kind="sparse", ops=(Hash(),)),
    FeatureSpec(name="price", kind="dense", ops=(Log(1.0),)),
    FeatureSpec(name="session", kind="group"),
    FeatureSpec(name="click", kind="label"),
)
TABLES = tuple(
    TableConfig(name=name, features=(name,), embedding_dim=4, optimizer=Adam(lr=0.01))
    for name in ("user", "items", "brand")
)


def table(num_rows: int = 256, *, seed: int = 0, **columns: Any) -> pa.Table:
    """Return rows for the recipe; `columns` replace or join its own."""
    generator = torch.Generator().manual_seed(seed)
    user = torch.randint(-20, 20, (num_rows,), generator=generator)
    made: dict[str, Any] = {
        "user": user.tolist(),
        "items": [list(range(int(n) % 4)) for n in user],
        "brand": [f"b{int(n) % 5}" for n in user],
        "price": torch.rand(num_rows, generator=generator).tolist(),
        "click": (torch.rand(num_rows, generator=generator) < 0.2 + 0.6 * (user > 0)).int().tolist(),
    }
    return pa.table({**made, **columns})


def write(path: Path, rows: pa.Table, *, row_group_size: int = 100) -> Path:
    """Write a Parquet file, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, path, row_group_size=row_group_size)
    return path


def clicks(
    *, data: str | None, out: Path, evaluated: bool = True, monitored: bool = False, batch: int = 32
) -> TrainConfig:
    """Return a run over the file or folder `data`, in order.

    Args:
        data: what `write` wrote.
        out: the run folder.
        evaluated: evaluate on the same data.
        monitored: evaluate every 4 steps and remember the largest loss as the best, which is that of the first.
        batch: samples per step.
    """
    del out
    files = DataConfig(paths=(str(data),), format="parquet", columns=COLUMNS, batch_size=batch, num_lanes=1, threads=1)
    return TrainConfig(
        name="clicks",
        model=DeepFMConfig(tables=TABLES, dense=(DenseInput("price"),), hidden=(8,), seed=1),
        train_data=files,
        eval_data=files if evaluated else None,
        features=FEATURES,
        metrics=(ExactAuc(), LogLoss()),
        dense_optimizer=DenseAdamW(lr=0.01),
        eval_every_steps=4 if monitored else None,
        monitor=Monitor(metric="loss") if monitored else None,
        save_every_steps=3,
        log_every_steps=2,
    )


def two_tasks(*, data: str | None, out: Path) -> TrainConfig:
    """Return a run that learns click and buy."""
    del out
    files = DataConfig(
        paths=(str(data),),
        format="parquet",
        columns=(*COLUMNS, Label("buy", optional=True)),
        batch_size=32,
        num_lanes=1,
        threads=1,
    )
    return TrainConfig(
        name="two_tasks",
        model=MmoeConfig(tables=TABLES, dense=(DenseInput("price"),), num_tasks=2, seed=1),
        train_data=files,
        eval_data=files,
        features=(*FEATURES, FeatureSpec(name="buy", kind="label")),
        metrics=(ExactAuc(),),
    )
