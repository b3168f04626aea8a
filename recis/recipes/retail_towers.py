"""Does the text of an item help to find its buyers? Two towers over all items of Online Retail, with and without titles.

    ids          user: pooled rows of three histories;  item: its row, zeros until its 6th sighting
    frozen       + the title's vector of a frozen encoder, as it is
    projected    + a trained projection of that vector
    joint        + the encoder's top layers trained in the same step, from kept states of the layers below

    loss = softmax over the batch's items and drawn ones, logits corrected for how often each is among them  (models.two_tower)

The customers, split and window are those of `online_retail`; but all items are ranked, so that a new item can be found. An
item's row is admitted late: until then the tower alone stands for it, in training as for a new item. A step of `joint`
updates the tables (Adam on rows), the two towers and gates (AdamW), and the title's tower (an AdamW of its own; the encoder's
layers at a twentieth of the projection's rate, without dropout, in bfloat16 where the processor multiplies it fast).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from recis.embedding import AfterSightings, Feature, Normal, TableConfig
from recis.errors import ConfigError
from recis.features import FeatureSpec
from recis.io import DataConfig, Ids, Weight
from recis.models.inputs import DenseInput
from recis.models.losses import softmax_loss
from recis.models.sampling import Catalogue, HardNegatives, UniformNegatives
from recis.models.two_tower import Tower, TwoTowerConfig, positive_score
from recis.optim import Adam, Cosine
from recis.recipes.item_text import title_encoder
from recis.recipes.online_retail import hide
from recis.recipes.online_shoppers import find_data
from recis.recipes.retail_baselines import rankings as baseline_rankings
from recis.recipes.retail_history import History
from recis.recipes.retail_log import WINDOW_DAYS, PurchaseLog, read_log
from recis.recipes.retail_purchases import HISTORIES, write_questions, write_samples
from recis.recipes.retail_ranks import Targets, group_quality, table, targets_at
from recis.recipes.retail_tower_lists import item_scores, items_batch, keep_source, recommend_file
from recis.towers import (
    ByPart,
    CutEncoder,
    CutTowerConfig,
    EmbeddingTowerConfig,
    Part,
    TextTowerConfig,
    WithTowers,
    memory_report,
    precompute,
)
from recis.trainer import DenseAdamW, TrainConfig, Trainer

__all__ = ["recommend_file", "retail_towers"]

Stage = Literal["ids", "frozen", "projected", "joint"]
STAGES: tuple[Stage, ...] = ("ids", "frozen", "projected", "joint")
LABELS = {
    "ids": "ids alone",
    "frozen": "+ frozen item tower",
    "projected": "+ trained projection",
    "joint": "+ joint top layers",
}
TITLE = "title"
DIM = 64
BATCH = 1024
MAX_TOKENS = 32
SAMPLE_DAYS = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What a run reads: files below `folder`, the log they came from, and where time is cut."""

    folder: Path
    data: Path
    hide_weeks: int
    num_samples: int
    encoder: Path
    num_layers: int

    def log(self) -> PurchaseLog:
        """Return the log, its last weeks left out where that was asked for."""
        return hide(read_log(self.data), self.hide_weeks)


def retail_towers(
    *,
    data: str | None,
    out: Path,
    stage: Literal["ids", "frozen", "projected", "joint"] = "joint",
    compare: bool = True,
    seeds: int = 1,
    epochs: int = 4,
    top_layers: int = 1,
    encoder: str = "auto",
    hide_weeks: int = 0,
    sample_days: int = SAMPLE_DAYS,
    seed: int = 0,
) -> TrainConfig:
    """Return the run of one stage; `after` trains the others beside it and prints the table.

    Args:
        data: transactions.parquet or the folder it lies in; None: `online_retail` below RECIS_DATA.
        out: the run folder; samples, vectors and the other stages' runs are kept in it.
        stage: what the run itself trains.
        compare: whether `after` trains the other stages and further seeds.
        seeds: runs of each stage; intervals are over customers, seeds averaged.
        epochs: passes over the samples.
        top_layers: layers of the encoder that `joint` trains.
        encoder: of titles: minilm, small, auto (MiniLM where it is installed), or a folder.
        hide_weeks: last weeks of the log that are left out as if they had not happened yet.
        sample_days: days before the split that samples are taken of.
        seed: of the first run.
    """
    if seeds < 1 or epochs < 1 or top_layers < 1:
        raise ConfigError(f"seeds, epochs and top_layers must be at least 1; got {seeds}, {epochs}, {top_layers}")
    path = find_data(data, "online_retail", "transactions.parquet").resolve()
    prepared = prepare(path, out, encoder=encoder, hide_weeks=hide_weeks, days=sample_days)
    config = stage_config(prepared, stage, epochs=epochs, top_layers=top_layers, seed=seed)
    after = partial(
        compare_stages, prepared=out, stage=stage, seeds=seeds if compare else 0, epochs=epochs, top_layers=top_layers,
        encoder=encoder, hide_weeks=hide_weeks, days=sample_days, data=path,
    )  # fmt: skip
    return replace(config, after=after)


# ---- what is read


def prepare(data: Path, out: Path, *, encoder: str, hide_weeks: int, days: int) -> Prepared:
    """Write samples, questions, items and the titles' vectors below `out`, those that are there left as they are."""
    folder = out / "purchases"
    folder.mkdir(parents=True, exist_ok=True)
    log = hide(read_log(data), hide_weeks)
    split = log.end - WINDOW_DAYS
    titles = titles_of(log)
    if not (folder / "samples.parquet").exists():
        write_samples(log, split, days, titles, folder / "samples.parquet")
    if not (folder / "questions.parquet").exists():
        write_questions(log, split, targets_at(log, split).customers, folder / "questions.parquet")
    keep_source(folder, data, hide_weeks)
    chosen = title_encoder(titles, out / "encoder", name=encoder)
    tower = TextTowerConfig(name=TITLE, column="item", path=str(chosen), max_tokens=MAX_TOKENS).build().eval()
    precompute(tower, np.arange(log.num_items), titles, out / "vectors")
    return Prepared(
        folder=out,
        data=data,
        hide_weeks=hide_weeks,
        num_samples=pq.read_metadata(folder / "samples.parquet").num_rows,
        encoder=chosen,
        num_layers=tower.model.config.num_hidden_layers,
    )


def titles_of(log: PurchaseLog) -> list[str]:
    """Return the text of each item number: its description in lower case, blanks single."""
    return [" ".join(text.lower().split()) for text in log.descriptions]


def catalogue(samples: str) -> Catalogue:
    """Return the items of a file of samples, to draw negatives from: none that was not yet sold."""
    items = np.unique(pq.read_table(samples, columns=["item"])["item"].to_numpy())
    return Catalogue(items_batch(items), "item")


# ---- what is trained


def stage_config(prepared: Prepared, stage: Stage, *, epochs: int, top_layers: int, seed: int) -> TrainConfig:
    """Return a run of one stage.

    Raises:
        ConfigError: the encoder has no more than `top_layers` layers.
    """
    samples = prepared.folder / "purchases" / "samples.parquet"
    steps = epochs * max(1, math.ceil(prepared.num_samples / BATCH))
    tower = _tower(prepared, stage, top_layers, seed)
    dense = () if tower is None else (DenseInput(TITLE, _width(prepared, stage)),)
    ranker = TwoTowerConfig(
        tables=(
            _table("item", "item", admit_after=6),
            _table("history", *(Feature(name, "mean") for name in HISTORIES), admit_after=1),
        ),
        user=Tower(features=HISTORIES, hidden=(128,)),
        item=Tower(features=("item",), dense=dense, hidden=(128,)),
        item_key="item",
        out_width=DIM,
        negatives=HardNegatives(128, pool=UniformNegatives(256)),
        catalogue=partial(catalogue, str(samples)),
        seed=seed,
    )
    rest = DenseAdamW(lr=2e-3, weight_decay=1e-2)
    own = Part(
        name=TITLE, optimizer=rest
    )  # as the projection learns without the layers, so that they alone are the difference
    return TrainConfig(
        name=f"retail_towers_{stage}",
        model=ranker if tower is None else WithTowers(ranker=ranker, towers=(tower,)),
        train_data=DataConfig(
            paths=(str(samples),),
            format="parquet",
            columns=(Ids("item"), *(Ids(name) for name in HISTORIES), Weight("weight")),
            batch_size=BATCH,
            num_lanes=4,
            shuffle_rows=65_536,
            epochs=epochs,
            seed=seed,
        ),
        features=(
            *(FeatureSpec(name=name, kind="sparse") for name in ("item", *HISTORIES)),
            FeatureSpec(name="weight", kind="weight"),
        ),
        loss=softmax_loss,
        score=positive_score,
        dense_optimizer=ByPart(rest=rest, parts=(own,) if stage == "joint" else ()),
        schedule=Cosine(total_steps=steps, warmup_steps=min(steps - 1, max(1, steps // 10))),
        evaluate=partial(validate, folder=prepared.folder, data=prepared.data, hide_weeks=prepared.hide_weeks),
        epochs=epochs,
        seed=seed,
    )


def _table(name: str, *features: str | Feature, admit_after: int) -> TableConfig:
    return TableConfig(
        name=name,
        features=features,
        embedding_dim=DIM,
        initializer=Normal(0.0, 0.05),
        optimizer=Adam(lr=2e-3),
        admission=AfterSightings(admit_after),
    )


def _width(prepared: Prepared, stage: Stage) -> int:
    if stage != "frozen":
        return DIM
    from recis.towers import open_vectors

    return open_vectors(prepared.folder / "vectors").width


def _tower(prepared: Prepared, stage: Stage, top_layers: int, seed: int) -> Any:
    """Return the config of a stage's tower; None for ids alone."""
    if stage == "ids":
        return None
    vectors = str(prepared.folder / "vectors")
    if stage != "joint":
        width = None if stage == "frozen" else DIM
        return EmbeddingTowerConfig(name=TITLE, column="item", path=vectors, out_width=width, seed=seed)
    if not top_layers < prepared.num_layers:
        raise ConfigError(f"the encoder has {prepared.num_layers} layers; top_layers must be fewer, got {top_layers}")
    text = TextTowerConfig(
        name=TITLE,
        column="item",
        path=str(prepared.encoder),
        out_width=DIM,
        max_tokens=MAX_TOKENS,
        frozen_layers=prepared.num_layers - top_layers,
        lr_scale=0.05,
        bf16=has_fast_bfloat16(),
        dropout=False,
        seed=seed,
    )
    states = prepared.folder / f"states-{top_layers}"
    log = prepared.log()
    precompute(CutEncoder(text.build()), np.arange(log.num_items), titles_of(log), states)
    return CutTowerConfig(tower=text, path=str(states))


def has_fast_bfloat16() -> bool:
    """Return whether this processor multiplies bfloat16 matrices in hardware (AMX), where they take a tenth of the time."""
    return bool(torch.cpu._is_amx_tile_supported())


# ---- what comes of it


def scores_of(trainer: Trainer, folder: Path, num_items: int) -> Tensor:
    """Return the model's scores [N, I] of all items for the questions of a run."""
    questions = pq.read_table(folder / "purchases" / "questions.parquet")
    return item_scores(trainer, [questions[name].to_pylist() for name in HISTORIES], np.arange(num_items))


def validate(trainer: Trainer, *, folder: Path, data: Path, hide_weeks: int) -> dict[str, float]:
    """Return recall@20 and ndcg@20 over all items at the split."""
    log = hide(read_log(data), hide_weeks)
    targets = targets_at(log, log.end - WINDOW_DAYS)
    found = group_quality(scores_of(trainer, folder, log.num_items), targets, "all items", within=False)
    return {"recall@20": float(found.recall.mean()), "ndcg@20": float(found.ndcg.mean())}


def compare_stages(
    trainer: Trainer,
    out: Path | None,
    *,
    prepared: Path,
    stage: Stage,
    seeds: int,
    epochs: int,
    top_layers: int,
    encoder: str,
    hide_weeks: int,
    days: int,
    data: Path,
) -> None:
    """Print where the memory went; train the other stages and seeds in folders of their own, and print all beside baselines."""
    print(memory_report(trainer.model, trainer.dense_optimizer, trainer.tables))
    if seeds == 0:
        return
    ready = prepare(data, prepared, encoder=encoder, hide_weeks=hide_weeks, days=days)
    log = ready.log()
    targets = targets_at(log, log.end - WINDOW_DAYS)
    found: dict[str, list[Tensor]] = {LABELS[name]: [] for name in STAGES}
    for name in STAGES:
        for seed in range(trainer.config.seed, trainer.config.seed + seeds):
            if name == stage and seed == trainer.config.seed:
                found[LABELS[name]].append(scores_of(trainer, ready.folder, log.num_items))
                continue
            config = stage_config(ready, name, epochs=epochs, top_layers=top_layers, seed=seed)
            other = Trainer(config, ready.folder / f"{name}-{seed}", resume=(ready.folder / f"{name}-{seed}").exists())
            other.train()
            found[LABELS[name]].append(scores_of(other, ready.folder, log.num_items))
    print(comparison(found, targets, log))


def comparison(found: dict[str, list[Tensor]], targets: Targets, log: PurchaseLog) -> str:
    """Return the table of the stages below two rankings that need no training."""
    history = History(log, log.end - WINDOW_DAYS)
    plain = baseline_rankings(history, targets.customers)
    rows: dict[str, Sequence[Tensor]] = {name: [plain[name]] for name in ("own 20 most frequent", "hand rule")}
    first = np.datetime64(int(log.end - WINDOW_DAYS), "D")
    head = (
        f"{len(targets.customers):,} customers, {WINDOW_DAYS} days from {first} on, {log.num_items:,} items, "
        f"{max(map(len, found.values()))} seed(s); 95 % intervals"
    )
    return f"{head}\n{table({**rows, **found}, targets)}"
