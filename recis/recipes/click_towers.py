"""How much of an unknown item does its title tell? The demo's DeepFM with and without a text tower, on a log with titles.

In the log of `click_log` with text most of an item's quality comes from hidden weights of the words in its title; users'
clicks are drawn from known probabilities. The tower is a small encoder that starts from nothing and learns in the same step
as tables and ranker; titles are tokenised in the reader's threads. Measured on the last day:

    share of the gap = (AUC with tower - AUC of ids alone) / (AUC of the true probabilities - AUC of ids alone)

for all samples, items with fewer than 10 impressions in the training days, and items with none.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from recis.features import FeatureSpec
from recis.io import DataConfig, Strings
from recis.metrics import ExactAuc, Gauc, LogLoss
from recis.models.deepfm import DeepFMConfig
from recis.models.inputs import DenseInput
from recis.optim.schedule import Constant
from recis.recipes.click_log import ClickLogConfig
from recis.recipes.demo import COLUMNS, FEATURES, demo_tables, log_days
from recis.recipes.item_text import fresh_encoder
from recis.towers import ByPart, Part, TextTowerConfig, WithTowers, memory_report
from recis.trainer import DenseAdamW, TrainConfig, Trainer

TITLE = "title"
MAX_TOKENS = 24
WIDTH = 8
FEW = 10
RANKER = DenseAdamW(lr=2e-3)


def click_towers(
    *,
    data: str | None,
    out: Path,
    num_samples: int = 300_000,
    num_items: int = 6_000,
    tower: bool = True,
    compare: bool = True,
    seed: int = 0,
) -> TrainConfig:
    """Return the run with a tower; `after` trains the ranker without it and prints both beside the optimum.

    Args:
        data: a folder with a log with titles that `recis.recipes.click_log` wrote; None generates one in `out/data`.
        out: the run folder.
        num_samples: impressions in the generated log.
        num_items: items that exist at its end.
        tower: whether this run has the tower.
        compare: whether `after` trains the ranker without the tower.
        seed: of the log, the weights and the order of samples.
    """
    log = ClickLogConfig(num_samples=num_samples, num_items=num_items, text=True, seed=seed)
    days = log_days(data, out, log)
    folder = out / "encoder"
    if tower and not (folder / "config.json").exists():
        fresh_encoder(_titles(days[:-1]), folder, hidden=64, num_layers=1, seed=seed)
    config = run_config(days, folder if tower else None, seed=seed)
    return replace(config, after=partial(compare_with_ids, days=tuple(days), compare=compare and tower))


def run_config(days: list[Path], encoder: Path | None, *, seed: int) -> TrainConfig:
    """Return a run on all days but the last; without an encoder the ranker has no tower."""
    titles = () if encoder is None else (Strings(TITLE, tokenizer=str(encoder), max_tokens=MAX_TOKENS),)
    train = DataConfig(
        paths=tuple(str(day) for day in days[:-1]),
        format="parquet",
        columns=(*COLUMNS, *titles),
        batch_size=1024,
        num_lanes=8,
        shuffle_rows=65_536,
        seed=seed,
    )
    dense = (DenseInput("log_price"), DenseInput("log_age"))
    ranker = DeepFMConfig(tables=demo_tables(), dense=dense, hidden=(128, 64), seed=seed)
    config = TrainConfig(
        name="click_ids",
        model=ranker,
        train_data=train,
        eval_data=replace(train, paths=(str(days[-1]),), shuffle_rows=0),
        features=FEATURES,
        metrics=(ExactAuc(), Gauc(), LogLoss()),
        dense_optimizer=RANKER,
        seed=seed,
    )
    if encoder is None:
        return config
    text = TextTowerConfig(
        name=TITLE,
        column=TITLE,
        path=str(encoder),
        out_width=WIDTH,
        max_tokens=MAX_TOKENS,
        frozen_layers=0,
        lr_scale=1.0,
        micro_batch_tokens=16_384,
        seed=seed,
    )
    own = Part(name=TITLE, optimizer=DenseAdamW(lr=3e-3, weight_decay=1e-2), schedule=Constant(warmup_steps=20))
    return replace(
        config,
        name="click_towers",
        model=WithTowers(ranker=replace(ranker, dense=(*dense, DenseInput(TITLE, WIDTH))), towers=(text,)),
        features=(*FEATURES, FeatureSpec(name=TITLE, kind="extra")),
        dense_optimizer=ByPart(rest=RANKER, parts=(own,)),
    )


def _titles(days: list[Path]) -> list[str]:
    """Return the distinct titles of some days."""
    found = [pq.read_table(day, columns=[TITLE])[TITLE].combine_chunks().unique().to_pylist() for day in days]
    return list(dict.fromkeys(title for titles in found for title in titles))


def compare_with_ids(trainer: Trainer, out: Path | None, *, days: tuple[Path, ...], compare: bool) -> None:
    """Print the memory; train the ranker without the tower in `out/ids`, and print both beside the optimum."""
    print(memory_report(trainer.model, trainer.dense_optimizer, trainer.tables))
    if not compare or out is None:
        return
    folder = out / "ids"
    without = Trainer(run_config(list(days), None, seed=trainer.config.seed), folder, resume=folder.exists())
    without.train()
    print(comparison(scores_of(without), scores_of(trainer), list(days)))


def scores_of(trainer: Trainer) -> np.ndarray:
    """Return the scores [N] of the last day, in the order of its rows."""
    return torch.cat(list(trainer.predict(trainer.config.eval_data)))[:, 0].double().numpy()


def comparison(ids: np.ndarray, tower: np.ndarray, days: list[Path]) -> str:
    """Return the table of AUCs of the last day: scores [N] of ids alone and with the tower."""
    seen = np.concatenate([pq.read_table(day, columns=["item_id"])["item_id"].to_numpy() for day in days[:-1]])
    known, counts = np.unique(seen, return_counts=True)
    last = pq.read_table(days[-1], columns=["item_id", "click", "true_probability"])
    items, clicks, truth = (last[name].to_numpy() for name in last.column_names)
    place = np.searchsorted(known, items).clip(max=len(known) - 1)
    impressions = np.where(known[place] == items, counts[place], 0)
    groups = {
        "all items": impressions >= 0,
        f"< {FEW} impressions before": impressions < FEW,
        "never seen before": impressions == 0,
    }
    lines = [f"  {'last day':<24}{'samples':>9}{'ids alone':>11}{'+ tower':>9}{'optimum':>9}{'share of the gap':>18}"]
    for name, chosen in groups.items():
        values = [_auc(scores[chosen], clicks[chosen]) for scores in (ids, tower, truth)]
        closed = (values[1] - values[0]) / (values[2] - values[0])
        shown = f"{values[0]:>11.4f}{values[1]:>9.4f}{values[2]:>9.4f}{closed:>18.1%}"
        lines.append(f"  {name:<24}{int(chosen.sum()):>9,}{shown}")
    return "\n".join(lines)


def _auc(scores: np.ndarray, clicks: np.ndarray) -> float:
    metric = ExactAuc()
    metric.update(scores=torch.tensor(scores), labels=torch.tensor(clicks).float())
    return float(metric.compute())
