"""Clicks on fashion items under a known logging policy: a click model, its honest intervals, and what it would be worth.

Logistic regression on dynamic tables of width 1, with FTRL: 8,200 impressions with about 40 clicks carry no more. The log is
cut by time: the first 60 % train (weighted by inverse propensity, so that the policy's favourites do not count more), the rest
tests. The recipe prints AUC, NE and PCOC with bootstrap intervals, and the click rate that the policy "show the item with the
highest predicted rate" would have had, by IPS and SNIPS. With so few clicks the intervals are wide; that is the result, and no
model should be chosen by such an AUC. Data: Open Bandit Dataset, small version (Saito et al., arXiv:2008.07146).
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from recis.embedding import Constant, TableConfig
from recis.errors import ConfigError
from recis.features import Bucketize, Cross, FeatureSpec, Hash
from recis.io import DataConfig, Dense, Ids, Label, Strings, Weight
from recis.io.batch import Batch
from recis.metrics import Calibration, ExactAuc, LogLoss, Metric, Ne, bootstrap, ips, snips
from recis.models.inputs import PooledInputs
from recis.optim import Ftrl
from recis.recipes.online_shoppers import find_data
from recis.trainer import DenseAdamW, TrainConfig, Trainer

TRAIN_SHARE = 0.6
EPOCHS = 5
BATCH = 128
USER_FEATURES = tuple(f"user_feature_{k}" for k in range(4))
ITEM_FEATURES = tuple(f"item_feature_{k}" for k in range(1, 4))
AFFINITY = "user-item_affinity_"
COLUMNS = (
    Ids("item_id"),
    Ids("position"),
    Dense("affinity"),
    *(Strings(name) for name in (*USER_FEATURES, *ITEM_FEATURES)),
    Label("click"),
    Weight("weight"),
)
FEATURES = (
    FeatureSpec(name="item_id", kind="sparse"),
    FeatureSpec(name="position", kind="sparse"),
    FeatureSpec(name="item_position", kind="sparse", ops=(Cross("item_id", "position"),)),
    FeatureSpec(name="affinity", kind="sparse", ops=(Bucketize((0.5, 1.5)),)),
    *(FeatureSpec(name=name, kind="sparse", ops=(Hash(),)) for name in (*USER_FEATURES, *ITEM_FEATURES)),
    FeatureSpec(name="click", kind="label"),
    FeatureSpec(name="weight", kind="weight"),
)


def open_bandit(
    *,
    data: str | None,
    out: Path,
    policy: Literal["random", "bts"] = "random",
    campaign: Literal["men", "women"] = "men",
    seed: int = 0,
) -> TrainConfig:
    """Return the run of one log.

    Args:
        data: the folder of the logs, or one log; None: `open_bandit` below RECIS_DATA.
        out: the run folder; the cut log goes to `out/data`.
        policy: which logging policy's log.
        campaign: which campaign's.
        seed: of the order of samples.
    """
    path = find_data(data, "open_bandit", f"{policy}_{campaign}.parquet")
    folder = out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    train, test, candidates = prepare(path)
    for name, table in (("train", train), ("test", test), ("candidates", candidates)):
        pq.write_table(table, folder / f"{name}.parquet")
    rate = float(np.average(train["click"].to_numpy(), weights=train["weight"].to_numpy()))
    sparse = tuple(spec.name for spec in FEATURES if spec.kind == "sparse")
    own = DataConfig(
        paths=(str(folder / "train.parquet"),),
        format="parquet",
        columns=COLUMNS,
        batch_size=BATCH,
        num_lanes=1,
        shuffle_rows=8_192,
        epochs=EPOCHS,
        seed=seed,
    )
    return TrainConfig(
        name="open_bandit",
        model=LogisticConfig(
            tables=tuple(
                TableConfig(
                    name=name,
                    features=(name,),
                    embedding_dim=1,
                    initializer=Constant(0.0),
                    optimizer=Ftrl(lr=0.05, l1=0.0, l2=20.0),
                )
                for name in sparse
            ),
            base_rate=rate,
        ),
        train_data=own,
        eval_data=replace(own, paths=(str(folder / "test.parquet"),), batch_size=4096, shuffle_rows=0, epochs=1),
        features=FEATURES,
        metrics=(ExactAuc(), LogLoss(), Ne(), Calibration()),
        dense_optimizer=DenseAdamW(lr=1e-3),
        epochs=EPOCHS,
        seed=seed,
        after=partial(print_intervals, test=folder / "test.parquet", candidates=folder / "candidates.parquet"),
    )


def prepare(path: Path) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Return the training and test part of a log, cut by time, and every (test impression, item) pair.

    The affinity is that of the shown item. weight = (1 / number of items) / propensity, 1 for a uniform log.
    """
    log = pq.read_table(path).sort_by("timestamp")
    items = pq.read_table(path.with_name(path.stem + "_items.parquet")).sort_by("item_id")
    missing = [
        n for n in ("item_id", "position", "click", "propensity_score", *USER_FEATURES) if n not in log.column_names
    ]
    if missing:
        raise ConfigError(f"--data {path}: has no column {missing[0]!r}")
    num_items = len(items)
    affinity = np.stack([log[f"{AFFINITY}{k}"].to_numpy() for k in range(num_items)], axis=1)
    shown = log["item_id"].to_numpy().astype(np.int64)
    cut = int(len(log) * TRAIN_SHARE)
    rows = np.arange(len(log))
    whole = _rows(log, items, rows, shown, affinity)
    later = np.repeat(rows[cut:], num_items)
    return (
        whole.slice(0, cut),
        whole.slice(cut),
        _rows(log, items, later, np.tile(np.arange(num_items), len(rows) - cut), affinity),
    )


def _rows(log: pa.Table, items: pa.Table, rows: np.ndarray, item: np.ndarray, affinity: np.ndarray) -> pa.Table:
    propensity = log["propensity_score"].to_numpy()[rows]
    columns = {
        "item_id": item,
        "position": log["position"].to_numpy()[rows].astype(np.int64),
        "affinity": affinity[rows, item],
        "click": log["click"].to_numpy()[rows],
        "propensity_score": propensity,
        "weight": 1.0 / len(items) / propensity,
    }
    columns |= {name: log[name].take(pa.array(rows)) for name in USER_FEATURES}
    columns |= {name: items[name].take(pa.array(item)) for name in ITEM_FEATURES}
    return pa.table(columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogisticConfig:
    """Tables of width 1, and the click rate at which the bias starts."""

    tables: tuple[TableConfig, ...]
    base_rate: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.base_rate < 1:
            raise ConfigError(
                f"LogisticConfig: base_rate must lie in (0, 1); got {self.base_rate}: the log needs both classes"
            )

    def build(self) -> nn.Module:
        """Return the model with zero weights."""
        return Logistic(self)


class Logistic(nn.Module):
    """logit = bias + sum of the weights of all ids; forward(batch) -> [B, 1]."""

    def __init__(self, config: LogisticConfig) -> None:
        super().__init__()
        self.inputs = PooledInputs(config.tables, seed=config.seed)
        self.bias = nn.Parameter(torch.logit(torch.tensor([config.base_rate])))

    def forward(self, batch: Batch) -> Tensor:
        return self.bias + self.inputs.fields(batch).sum(1)


def print_intervals(trainer: Trainer, out: Path | None, *, test: Path, candidates: Path) -> None:
    """Print metrics with 95 % bootstrap intervals, and the value of the greedy policy."""
    table = pq.read_table(test)
    data = trainer.config.eval_data
    scores = torch.cat(list(trainer.predict(data)))[:, 0]
    labels = torch.from_numpy(table["click"].to_numpy().astype(np.float64))
    print(f"test impressions {len(table):,}, clicks {int(labels.sum())}; 95 % bootstrap intervals over impressions")
    metrics: tuple[Metric, ...] = (ExactAuc(), Ne(), Calibration())
    for metric in metrics:
        interval = bootstrap(partial(_value, metric, scores, labels), len(labels), num_resamples=500)
        print(f"  {metric.key:<6} {interval}")
    pairs = torch.cat(list(trainer.predict(replace(data, paths=(str(candidates),)))))[:, 0]
    best = pairs.view(len(table), -1).argmax(1)
    target = (best == torch.from_numpy(table["item_id"].to_numpy().copy())).double()
    logged = torch.from_numpy(table["propensity_score"].to_numpy().copy())
    print(f"  click rate as logged      {float(labels.mean()):.4f}")
    values = {"IPS": ips(labels, logged, target), "SNIPS": snips(labels, logged, target)}
    for name, value in values.items():
        print(f"  greedy policy by {name:<6}  {value.interval}   ({value.num_effective:.0f} effective impressions)")
    if not bool((target * labels).any()):  # no reward, no spread: the intervals above have no width and say nothing
        bound = 1.0 - 0.05 ** (1.0 / max(values["SNIPS"].num_effective, 1.0))
        print(f"  none of those was clicked: all that is known is a rate below {bound:.4f} (exact binomial, 95 %)")


def _value(metric: Metric, scores: Tensor, labels: Tensor, rows: np.ndarray) -> float:
    fresh = metric.fresh()
    fresh.update(scores=scores[rows], labels=labels[rows])
    return fresh.compute()
