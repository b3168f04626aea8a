"""What a grading language model is worth to a ranker: as columns, as soft targets, as both, against labels alone.

    labels alone        DeepFM on words of query and title; y = 1 where the grade is 3 or 4; labelled rows
    + teacher columns   and log p_1 .. log p_4, expected grade, entropy: the teacher is asked while serving; labelled rows
    + soft targets      (1 - w) own loss + w T^2 KL to the teacher's P(grade >= 3), also where a row has no label
    + both              the columns, and soft targets

Labels are dear and the teacher's grades are not: `num_labelled` rows keep their label, the others have the teacher alone.

`data` is a folder with two files that the package relevance writes: pairs.parquet (`relevance data`) and teacher.parquet
(`relevance export --part dev test`, which refuses queries that the teacher was trained on). The ranker learns on the part dev
and is measured on the part test, so no query and no item is known to teacher or ranker. Source: distillation, arXiv:1503.02531.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recis.embedding import Feature, Normal, TableConfig
from recis.errors import ConfigError, DataError
from recis.features import FeatureSpec
from recis.io import DataConfig, Dense, Group, Ids, Label
from recis.metrics import ExactAuc, Gauc, LogLoss, Ne
from recis.models.deepfm import DeepFMConfig
from recis.models.inputs import DenseInput
from recis.models.losses import binary_loss
from recis.optim import Adam
from recis.recipes.ebrm_log import id_of
from recis.recipes.ebrm_ranker import comparison_table
from recis.towers.distill import Distilled
from recis.trainer import DenseAdamW, TrainConfig, Trainer

TEACHER = ("log_p_1", "log_p_2", "log_p_3", "log_p_4", "expected_grade", "entropy")
GOOD_GRADE = 3
LR = 5e-3
RANKERS: Mapping[str, tuple[bool, bool]] = {
    "labels alone": (False, False),
    "+ teacher columns": (True, False),
    "+ soft targets": (False, True),
    "+ both": (True, True),
}
"""Name -> whether it reads the teacher's columns, whether it learns from the teacher's probabilities."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the rankers share; see `teacher_ranker`."""

    folder: Path
    """With the files of `write_rows`."""
    weight: float = 0.5
    temperature: float = 2.0
    epochs: int = 4
    labelled_epochs: int = 12


def teacher_ranker(
    *,
    data: str | None,
    out: Path,
    num_labelled: int = 400,
    weight: float = 0.5,
    temperature: float = 2.0,
    epochs: int = 4,
    labelled_epochs: int = 12,
    seeds: int = 3,
    seed: int = 0,
) -> TrainConfig:
    """Return the run with soft targets; `after` compares all four rankers.

    Args:
        data: folder with pairs.parquet and teacher.parquet.
        out: the run folder.
        num_labelled: train rows that keep their label.
        weight: of the teacher in the loss, in [0, 1].
        temperature: of both sides of the divergence.
        epochs: passes over all train rows, of the rankers with soft targets.
        labelled_epochs: passes over the labelled rows, of the others.
        seeds: seeds that the rankers are compared over; 0 leaves the comparison out.
        seed: of the first.

    Raises:
        ConfigError: no folder, or a file is missing.
        DataError: a pair of dev or test has no teacher row, or a part has no pair with a label.
    """
    folder = Path(data or "")
    if data is None or not all((folder / name).is_file() for name in ("pairs.parquet", "teacher.parquet")):
        raise ConfigError(
            f"--data {data}: recipe 'teacher_ranker' needs a folder with pairs.parquet (relevance data) and teacher.parquet "
            "(relevance export --part dev test)"
        )
    settings = Settings(
        folder=out / "data", weight=weight, temperature=temperature, epochs=epochs, labelled_epochs=labelled_epochs
    )
    write_rows(folder, settings.folder, num_labelled=num_labelled)
    after = partial(print_comparison, settings=settings, seeds=seeds)
    return replace(ranker_run("+ soft targets", settings, seed=seed), after=after if seeds else None)


def write_rows(folder: Path, out: Path, *, num_labelled: int) -> None:
    """Join pairs and teacher by query and item, and write the ranker's files.

    train.parquet has the part dev, of which num_labelled rows, evenly spread, keep their label; labelled.parquet has those
    alone; test.parquet has the part test.
    """
    out.mkdir(parents=True, exist_ok=True)
    pairs = pq.read_table(
        folder / "pairs.parquet", columns=["id", "query_id", "query", "item_id", "item", "label", "split"]
    )
    teacher = pq.read_table(folder / "teacher.parquet")
    keys = zip(teacher["query_id"].to_pylist(), teacher["item_id"].to_pylist(), strict=True)
    place_of = {key: place for place, key in enumerate(keys)}
    columns = np.stack([teacher[name].to_numpy() for name in TEACHER], axis=1)
    for name, part in (("train", "dev"), ("test", "test")):
        own = [row for row in pairs.to_pylist() if row["split"] == part and row["label"] is not None]
        if not own:
            raise DataError(
                f"no pair of the part {part!r} has a label", file=str(folder / "pairs.parquet"), column="label"
            )
        missing = next((row for row in own if (row["query_id"], row["item_id"]) not in place_of), None)
        if missing is not None:
            raise DataError(
                f"pair {missing['id']!r} of the part {part!r} has no row", file=str(folder / "teacher.parquet")
            )
        said = columns[[place_of[row["query_id"], row["item_id"]] for row in own]]
        table = {
            "query_words": pa.array([[id_of(word) for word in row["query"].split()] for row in own]),
            "title_words": pa.array([[id_of(word) for word in row["item"]["title"].split()] for row in own]),
            "query": np.array([id_of(row["query_id"]) for row in own]),
            "good": np.array([row["label"] >= GOOD_GRADE for row in own], np.int8),
            "teacher": np.exp(said[:, GOOD_GRADE - 1 : 4]).sum(1).clip(0.0, 1.0),
            **{column: said[:, at] for at, column in enumerate(TEACHER)},
        }
        if name == "train":
            kept = np.unique(np.linspace(0, len(own) - 1, min(num_labelled, len(own)), dtype=np.int64))
            pq.write_table(pa.table(table).take(kept), out / "labelled.parquet", row_group_size=128)
            hidden = np.ones(len(own), bool)
            hidden[kept] = False
            table["good"] = pa.array(table["good"], mask=hidden)
        pq.write_table(pa.table(table), out / f"{name}.parquet", row_group_size=512)


def ranker_run(name: str, settings: Settings, *, seed: int) -> TrainConfig:
    """Return the run of one of RANKERS on the rows of a folder."""
    has_columns, is_taught = RANKERS[name]
    rows, epochs = ("train", settings.epochs) if is_taught else ("labelled", settings.labelled_epochs)
    columns = (
        Ids("query_words"), Ids("title_words"), *(Dense(column) for column in TEACHER),
        Dense("teacher"), Label("good", optional=True), Group("query"),
    )  # fmt: skip
    features = (
        FeatureSpec(name="query_words", kind="sparse"),
        FeatureSpec(name="title_words", kind="sparse"),
        *(FeatureSpec(name=column, kind="dense") for column in TEACHER),
        FeatureSpec(name="teacher", kind="extra"),
        FeatureSpec(name="good", kind="label"),
        FeatureSpec(name="query", kind="group"),
    )
    train = DataConfig(
        paths=(str(settings.folder / f"{rows}.parquet"),), format="parquet", columns=columns, batch_size=64,
        shuffle_rows=16_384, epochs=epochs, seed=seed,
    )  # fmt: skip
    # one table for both: a word of the query and the same word of a title have one row, so their product starts above 0
    table = TableConfig(
        name="word",
        features=(Feature("query_words", "sum"), Feature("title_words", "sum")),
        embedding_dim=17,
        initializer=Normal(0.0, 0.05),
        optimizer=Adam(lr=LR),
    )
    dense = tuple(map(DenseInput, TEACHER)) if has_columns else ()
    distilled = Distilled(column="teacher", weight=settings.weight, temperature=settings.temperature)
    return TrainConfig(
        name="teacher_ranker",
        model=DeepFMConfig(tables=(table,), dense=dense, hidden=(64, 32), seed=seed),
        train_data=train,
        eval_data=replace(
            train, paths=(str(settings.folder / "test.parquet"),), shuffle_rows=0, batch_size=2048, epochs=1
        ),
        features=features,
        loss=distilled if is_taught else binary_loss,
        metrics=(ExactAuc(), Gauc(), LogLoss(), Ne()),
        dense_optimizer=DenseAdamW(lr=LR),
        epochs=epochs,
        seed=seed,
    )


def print_comparison(trainer: Trainer, out: Path | None, *, settings: Settings, seeds: int) -> None:
    """Train all rankers with each seed and print their metrics on the test part, and the teacher's own."""
    del out
    first = trainer.config.seed
    results: dict[str, list[Mapping[str, float]]] = {}
    for name in RANKERS:
        for seed in range(first, first + seeds):
            run = Trainer(ranker_run(name, settings, seed=seed), quiet=True)
            run.train()
            results.setdefault(name, []).append(run.state.metrics)
    test = pq.read_table(settings.folder / "test.parquet", columns=["good", "teacher"])
    teacher = ExactAuc()
    teacher.update(torch.tensor(test["teacher"].to_numpy()), torch.tensor(test["good"].to_numpy()).float())
    num_rows, num_labelled = (
        pq.read_metadata(settings.folder / f"{name}.parquet").num_rows for name in ("train", "labelled")
    )
    print(
        f"{num_rows:,} train rows, {num_labelled:,} of them labelled; {len(test):,} test rows of other queries; "
        f"the teacher alone: AUC {teacher.compute():.4f}"
    )
    print(comparison_table(results))
