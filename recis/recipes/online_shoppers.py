"""Will this session end with a purchase? Online Shoppers (UCI 468): 17 columns per session, 15.6 % purchases.

Five small DeepFM-like members are trained at once and their probabilities averaged: 10,000 sessions are few, and members
that start apart err apart. Numbers enter twice: as a quantile bin with an embedding, which lets the net bend at each
bin's edge, and as a logarithm. After training the recipe repeats the same run on each of five stratified folds (seed 0) and
prints mean AUC beside scikit-learn's HistGradientBoosting on the same folds. Bins, depth and epochs were chosen by
cross-validation inside the training part of fold 0 only (folds of seed 1).
"""

import math
import os
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from recis.embedding import Normal, TableConfig
from recis.errors import ConfigError
from recis.features import Bucketize, FeatureSpec, Hash
from recis.io import DataConfig, Dense, Ids, Label, Strings
from recis.io.batch import Batch
from recis.metrics import Calibration, ExactAuc, LogLoss, Ne
from recis.models.inputs import DenseInput, PooledInputs
from recis.optim import Adam, Cosine
from recis.trainer import DenseAdamW, TrainConfig, Trainer

NUMBERS = (
    "Administrative",
    "Administrative_Duration",
    "Informational",
    "Informational_Duration",
    "ProductRelated",
    "ProductRelated_Duration",
    "BounceRates",
    "ExitRates",
    "PageValues",
    "SpecialDay",
)
STRINGS = ("Month", "VisitorType")
CODES = ("OperatingSystems", "Browser", "Region", "TrafficType")
LABEL = "Revenue"
NUM_BINS = 6
NUM_MEMBERS = 5
FIELD_DIM = 9  # of a member: one linear weight and eight factors
EPOCHS = 20
BATCH = 128
NUM_FOLDS = 5
FOLD_SEED = 0


def online_shoppers(*, data: str | None, out: Path, folds: int = NUM_FOLDS, seed: int = 0) -> TrainConfig:
    """Return the run that trains on all sessions; `after` cross-validates it.

    Args:
        data: sessions.parquet or the folder it lies in; None: `online_shoppers` below RECIS_DATA.
        out: the run folder.
        folds: cross-validation folds; 0 leaves that out.
        seed: of the weights and the order of samples.
    """
    path = find_data(data, "online_shoppers", "sessions.parquet")
    table = pq.read_table(path)
    missing = [name for name in (*NUMBERS, *STRINGS, *CODES, "Weekend", LABEL) if name not in table.column_names]
    if missing:
        raise ConfigError(f"--data {path}: has no column {missing[0]!r}; it has {', '.join(table.column_names)}")
    after = partial(print_cross_validation, path=path, folds=folds) if folds else None
    return replace(make_config(path, table, seed=seed), after=after)


def find_data(data: str | None, folder: str, file: str) -> Path:
    """Return the file a recipe reads: what --data names (the file, or the folder it lies in), else RECIS_DATA's copy.

    Raises:
        ConfigError: neither names an existing file.
    """
    if data is not None:
        path = Path(data)
        path = path / file if path.is_dir() else path
    elif "RECIS_DATA" in os.environ:
        path = Path(os.environ["RECIS_DATA"]) / folder / file
    else:
        raise ConfigError(
            f"this recipe reads {file}: give --data PATH, or set RECIS_DATA to the folder of the public data"
        )
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give --data PATH of {file}")
    return path


def make_config(path: Path, table: pa.Table, *, seed: int) -> TrainConfig:
    """Return a run that trains on the file `path`, whose rows `table` fix the bins and the length of the schedule."""
    steps = EPOCHS * math.ceil(len(table) / BATCH)
    bins = tuple(
        FeatureSpec(name=f"{name}_bin", kind="sparse", source=name, ops=(_bins(table[name]),)) for name in NUMBERS
    )
    features = (
        *bins,
        *(FeatureSpec(name=name, kind="sparse", ops=(Hash(),)) for name in STRINGS),
        *(FeatureSpec(name=name, kind="sparse") for name in CODES),
        *(FeatureSpec(name=f"{name}_value", kind="dense", source=name) for name in (*NUMBERS, "Weekend")),
        FeatureSpec(name="purchase", kind="label", source=LABEL),
    )
    columns = (
        *(Dense(name) for name in (*NUMBERS, "Weekend")),
        *(Strings(name) for name in STRINGS),
        *(Ids(name) for name in CODES),
        Label(LABEL),
    )
    return TrainConfig(
        name="online_shoppers",
        model=ShoppersConfig(
            tables=tuple(
                TableConfig(
                    name=spec.name,
                    features=(spec.name,),
                    embedding_dim=NUM_MEMBERS * FIELD_DIM,
                    initializer=Normal(0.0, 0.01),
                    optimizer=Adam(lr=2e-3),
                )
                for spec in features
                if spec.kind == "sparse"
            ),
            dense=tuple(DenseInput(f"{name}_value") for name in (*NUMBERS, "Weekend")),
            statistics=_statistics(table),
            seed=seed,
        ),
        train_data=DataConfig(
            paths=(str(path),),
            format="parquet",
            columns=columns,
            batch_size=BATCH,
            num_lanes=1,
            shuffle_rows=16_384,
            epochs=EPOCHS,
            seed=seed,
        ),
        features=features,
        loss=member_loss,
        score=mean_probability,
        metrics=(ExactAuc(), LogLoss(), Ne(), Calibration()),
        dense_optimizer=DenseAdamW(lr=2e-3, weight_decay=1e-4),
        schedule=Cosine(total_steps=steps),
        epochs=EPOCHS,
        seed=seed,
    )


def _bins(column: pa.ChunkedArray) -> Bucketize:
    inner = np.linspace(0, 1, NUM_BINS + 1)[1:-1]
    return Bucketize(tuple(float(edge) for edge in np.unique(np.quantile(column.to_numpy(), inner))))


def log_features(numbers: Tensor) -> Tensor:
    """Return 17 columns from the 10 numbers [B, 10]: logs, seconds per page, totals, and whether any page had a value."""
    scale = numbers.new_tensor([1, 1, 1, 1, 1, 1, 100, 100, 1, 1])
    pages, seconds = numbers[:, 0:6:2], numbers[:, 1:6:2]
    per_page = seconds / pages.clamp(min=1)
    extra = (
        torch.log1p(per_page[:, 2]),
        torch.log1p(per_page[:, 0]),
        (numbers[:, 8] > 0).to(numbers.dtype),
        torch.log1p(pages.sum(1)),
        torch.log1p(seconds.sum(1)),
        torch.log1p(numbers[:, 6] * 1000),
        torch.log1p(numbers[:, 7] * 1000),
    )
    return torch.cat([torch.log1p(numbers.clamp(min=0) * scale), torch.stack(extra, dim=1)], dim=1)


def _statistics(table: pa.Table) -> tuple[tuple[float, float], ...]:
    numbers = torch.from_numpy(np.stack([table[name].to_numpy().astype(np.float64) for name in NUMBERS], axis=1))
    columns = log_features(numbers)
    return tuple((float(c.mean()), float(c.std(unbiased=False)) + 1e-6) for c in columns.unbind(1))


@dataclass(frozen=True, slots=True, kw_only=True)
class ShoppersConfig:
    """Tables whose rows hold all members side by side, dense inputs, and (mean, std) of each log feature."""

    tables: tuple[TableConfig, ...]
    dense: tuple[DenseInput, ...]
    statistics: tuple[tuple[float, float], ...]
    hidden: tuple[int, ...] = (128, 64)
    dropout: float = 0.3
    seed: int = 0

    def build(self) -> nn.Module:
        """Return the model with fresh weights."""
        return ShoppersModel(self)


class ShoppersModel(nn.Module):
    """forward(batch) -> logits [B, members]."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ShoppersConfig) -> None:
        super().__init__()
        self.inputs = PooledInputs(config.tables, config.dense, seed=config.seed)
        statistics = torch.tensor(config.statistics)
        self.register_buffer("mean", statistics[:, 0])
        self.register_buffer("std", statistics[:, 1])
        num_dense = len(config.statistics) + 1
        widths = (len(config.tables) * (FIELD_DIM - 1) + num_dense, *config.hidden, 1)
        self.linear = MemberLinear(num_dense, 1)
        self.layers = nn.ModuleList(MemberLinear(before, after) for before, after in pairwise(widths))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, batch: Batch) -> Tensor:
        rows = self.inputs.fields(batch).unflatten(2, (NUM_MEMBERS, FIELD_DIM)).permute(2, 0, 1, 3)  # [M, B, F, D]
        values = self.inputs.dense(batch)
        dense = torch.cat([(log_features(values[:, :-1]) - self.mean) / self.std, values[:, -1:]], dim=1)
        dense = dense.expand(NUM_MEMBERS, -1, -1)
        linear, factors = rows[..., :1].sum(2), rows[..., 1:]
        pairs = (factors.sum(2).square() - factors.square().sum(2)).sum(2, keepdim=True) / 2  # factorization machine
        hidden = torch.cat([factors.flatten(2), dense], dim=2)
        for layer in self.layers[:-1]:
            hidden = torch.relu(layer(self.dropout(hidden)))
        logits = linear + pairs + self.linear(dense) + self.layers[-1](self.dropout(hidden))
        return logits.squeeze(2).t()


class MemberLinear(nn.Module):
    """One linear layer per member in a single product: [M, B, in] -> [M, B, out]; starts like nn.Linear."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(num_in)
        self.weight = nn.Parameter(torch.empty(NUM_MEMBERS, num_in, num_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(NUM_MEMBERS, 1, num_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


def member_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Return the cross-entropy of every member, summed: members do not see each other."""
    labels = batch.labels.expand_as(logits)
    return (binary_cross_entropy_with_logits(logits, labels, reduction="none") * batch.weights[:, None]).sum()


def mean_probability(logits: Tensor) -> Tensor:
    """Return the members' mean probability, [B, 1]."""
    return torch.sigmoid(logits).mean(1, keepdim=True)


def print_cross_validation(trainer: Trainer, out: Path | None, *, path: Path, folds: int) -> None:
    """Train and test on each fold, print AUC per fold and its mean beside HistGradientBoosting's."""
    result = cross_validate(path, folds=folds, seed=trainer.config.seed, scratch=out or path.parent)
    print(f"AUC on {folds} stratified folds (seed {FOLD_SEED}):")
    for name, values in result.items():
        print(f"  {name:<22} {np.mean(values):.4f}   ({'  '.join(f'{value:.4f}' for value in values)})")


def cross_validate(path: Path, *, folds: int, seed: int, scratch: Path) -> dict[str, list[float]]:
    """Return AUC per fold of this recipe and, where scikit-learn is installed, of HistGradientBoosting."""
    table = pq.read_table(path)
    label = table[LABEL].to_numpy().astype(np.int64)
    fold_of = stratified_folds(label, folds)
    result: dict[str, list[float]] = {"recis": []}
    folder = scratch / "folds"
    folder.mkdir(exist_ok=True)
    for fold in range(folds):
        parts = {"train": table.filter(pa.array(fold_of != fold)), "test": table.filter(pa.array(fold_of == fold))}
        for name, part in parts.items():
            pq.write_table(part, folder / f"{fold}-{name}.parquet")
        config = make_config(folder / f"{fold}-train.parquet", parts["train"], seed=seed)
        fold_trainer = Trainer(config, quiet=True)
        fold_trainer.train()
        test = replace(config.train_data, paths=(str(folder / f"{fold}-test.parquet"),), batch_size=4096, epochs=1)
        result["recis"].append(fold_trainer.evaluate(test)["auc"])
        for name, value in _boosting(parts["train"], parts["test"]).items():
            result.setdefault(name, []).append(value)
    return result


def stratified_folds(label: np.ndarray, folds: int) -> np.ndarray:
    """Return the fold of each row: every class is shuffled by FOLD_SEED and dealt out evenly."""
    rng = np.random.default_rng(FOLD_SEED)
    fold_of = np.empty(len(label), dtype=np.int64)
    for value in np.unique(label):
        rows = rng.permutation(np.flatnonzero(label == value))
        fold_of[rows] = np.arange(len(rows)) % folds
    return fold_of


def _boosting(train: pa.Table, test: pa.Table) -> dict[str, float]:
    """Return test AUC of HistGradientBoosting, with the categorical columns declared as such and as plain codes."""
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
        from sklearn.metrics import roc_auc_score
    except ImportError:
        print("  (scikit-learn is not installed: no gradient boosting beside)")
        return {}
    words = {name: sorted(set(train[name].to_pylist()) | set(test[name].to_pylist())) for name in STRINGS}

    def matrix(part: pa.Table) -> np.ndarray:
        columns: list[Any] = [part[name].to_numpy().astype(np.float64) for name in (*NUMBERS, *CODES, "Weekend")]
        columns += [np.array([words[name].index(value) for value in part[name].to_pylist()], float) for name in STRINGS]
        return np.stack(columns, axis=1)

    y_train, y_test = (part[LABEL].to_numpy().astype(np.int64) for part in (train, test))
    first = len(NUMBERS)
    declared = list(range(first, first + len(CODES) + 1 + len(STRINGS)))
    scores = {}
    for name, categorical in (("HistGradientBoosting", None), ("HGB, categories", declared)):
        model = HistGradientBoostingClassifier(random_state=0, categorical_features=categorical)  # type: ignore[arg-type]
        model.fit(matrix(train), y_train)
        scores[name] = float(roc_auc_score(y_test, model.predict_proba(matrix(test))[:, 1]))
    return scores
