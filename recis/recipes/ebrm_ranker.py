"""A ranker with and without EBRM, on one split of the generated click log.

    ids alone            DeepFM on ids: words of the query, item, its entities by type, position on the page
    + EBRM features      and r, log r, log g of each type, approximate, of an EBRM that was trained before, as dense columns
    + soft-logic layer   and r, log r, log g of a SoftLogicPool whose logits are products of the ranker's own rows of words
                         and entities: no encoder, trained with the ranker on clicks
    + both

    z_e = <W_t q, v_e> + <w, v_e> + b_t      q [D] = sum of the query's word rows, v_e [D] = row of entity e, t its type

The run that is kept is the one with features. When it is over, all rankers are trained with each of `seeds` seeds and
compared on the test queries, which neither the EBRM nor a ranker has seen. How queries are parted
is said in recis.recipes.ebrm_log.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from recis.ebrm import EBRM, SoftLogicPool
from recis.ebrm.datasets import synthetic_set
from recis.ebrm.descent import StepConfig
from recis.ebrm.runs import FRESH_LR, RunConfig, fit_model, save_run
from recis.ebrm.synthetic import TYPES, SyntheticConfig, make_data
from recis.ebrm.train import QIConfig
from recis.embedding import EmbeddingCollection, Feature, Normal, TableConfig, TableSet
from recis.errors import ConfigError
from recis.features import FeatureSpec
from recis.io import DataConfig, Dense, Group, Ids, Label
from recis.io.batch import Batch
from recis.metrics import ExactAuc, Gauc, LogLoss, Ne
from recis.models.deepfm import DeepFM, DeepFMConfig
from recis.models.inputs import DenseInput
from recis.optim import Adam
from recis.recipes.ebrm_log import parted, write_log
from recis.trainer import DenseAdamW, TrainConfig, Trainer
from recis_kernels.segment import segment_sum

if TYPE_CHECKING:
    from recis.ebrm.synthetic import SyntheticData

DIM = 17  # one linear weight and 16 factors
LR = (
    5e-3  # chosen for AUC on the dev queries' impressions, as the rows' first width was; for ids alone as for the layer
)
MIN_LOG = -20.0  # logs below tell a ranker nothing more
FEATURE_KEYS = ("ebrm_r", "ebrm_log_r", *(f"ebrm_log_g_{name}" for name in TYPES), "ebrm_approximate")
LAYER_KEYS = ("layer_r", "layer_log_r", *(f"layer_log_g_{name}" for name in TYPES))
METRICS = ("auc", "gauc", "ne")
DONE = "log.json"  # written when the log is whole


@dataclass(frozen=True, slots=True, kw_only=True)
class RankerConfig:
    """A DeepFM, and a soft-logic layer whose columns it reads, or None."""

    deepfm: DeepFMConfig
    layer: "LayerConfig | None" = None

    def build(self) -> nn.Module:
        """Return the model with fresh weights."""
        tables = TableSet(self.deepfm.tables, seed=self.deepfm.seed)
        return DeepFM(self.deepfm, tables) if self.layer is None else LayerRanker(self.deepfm, self.layer, tables)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """Which features the soft-logic layer reads: words and entities share their tables with the DeepFM."""

    types: tuple[str, ...] = TYPES
    words: str = "query_word_list"
    entities: str = "entities"
    slot_lengths: str = "slot_lengths"


class LayerRanker(nn.Module):
    """forward(batch) -> logits [B, 1]: the layer's columns go behind the batch's dense ones, and a DeepFM reads all."""

    def __init__(self, deepfm: DeepFMConfig, layer: LayerConfig, tables: TableSet) -> None:
        super().__init__()
        self.layer = SoftLogicLayer(tables, layer)
        self.ranker = DeepFM(replace(deepfm, dense=(*deepfm.dense, *map(DenseInput, LAYER_KEYS))), tables)

    def forward(self, batch: Batch) -> Tensor:
        columns = self.layer(batch)
        return self.ranker(
            replace(
                batch,
                dense=torch.cat([batch.dense, columns], dim=1),
                dense_keys=(*batch.dense_keys, *LAYER_KEYS),
                dense_widths=(*batch.dense_widths, *([1] * len(LAYER_KEYS))),
            )
        )


class SoftLogicLayer(nn.Module):
    """forward(batch) -> r, log r, log g of each type, [B, 2 + T], from rows of the query's words and the item's entities."""

    def __init__(self, tables: TableSet, config: LayerConfig) -> None:
        super().__init__()
        self.config = config
        self.rows = EmbeddingCollection(tables, features=[config.words, config.entities])
        dim = self.rows.embedding_dims[config.entities]
        num_types = len(config.types)
        self.by_type = nn.Parameter(torch.empty(num_types, dim, dim).normal_(std=dim**-0.5))
        self.none = nn.Parameter(torch.zeros(dim))  # what an entity is worth to any query
        self.bias = nn.Parameter(torch.zeros(num_types))  # 0: a positive start would accept everything
        self.pool = SoftLogicPool(config.types)

    def forward(self, batch: Batch) -> Tensor:
        rows = self.rows(batch.sparse)
        words, entities = rows[self.config.words], rows[self.config.entities]
        query = segment_sum(words.flat_values, words.offsets)
        wanted = torch.einsum("bd,tde->bte", query, self.by_type) + self.none
        lengths = batch.dense_feature(self.config.slot_lengths).long().flatten()  # [B * T], none of them 0
        slot_offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        num_types = len(self.config.types)
        types = torch.arange(num_types, device=lengths.device).repeat(batch.num_samples)
        slot_of = torch.repeat_interleave(lengths, output_size=entities.num_values)
        logits = (wanted.flatten(0, 1)[slot_of] * entities.flat_values).sum(1) + self.bias[types[slot_of]]
        item_offsets = torch.arange(0, len(lengths) + 1, num_types, device=lengths.device)
        out = self.pool.combine(logits, types, slot_offsets, item_offsets)
        logs = torch.cat([out.log_r[:, None], out.log_g.reshape(-1, num_types)], dim=1).clamp(min=MIN_LOG)
        return torch.cat([out.r[:, None], logs], dim=1)


def ids_alone(tables: tuple[TableConfig, ...], seed: int) -> RankerConfig:
    """Return a DeepFM on ids."""
    return RankerConfig(deepfm=DeepFMConfig(tables=tables, hidden=(64, 32), seed=seed))


def with_features(tables: tuple[TableConfig, ...], seed: int) -> RankerConfig:
    """Return a DeepFM on ids and the columns of an EBRM."""
    plain = ids_alone(tables, seed)
    return replace(plain, deepfm=replace(plain.deepfm, dense=tuple(map(DenseInput, FEATURE_KEYS))))


def with_layer(tables: tuple[TableConfig, ...], seed: int) -> RankerConfig:
    """Return a DeepFM on ids and a soft-logic layer that is trained with it."""
    return replace(ids_alone(tables, seed), layer=LayerConfig())


def with_both(tables: tuple[TableConfig, ...], seed: int) -> RankerConfig:
    """Return a DeepFM on ids, the columns of an EBRM and a soft-logic layer."""
    return replace(with_features(tables, seed), layer=LayerConfig())


RANKERS: Mapping[str, Callable[[tuple[TableConfig, ...], int], RankerConfig]] = {
    "ids alone": ids_alone,
    "+ EBRM features": with_features,
    "+ soft-logic layer": with_layer,
    "+ both": with_both,
}


def ebrm_ranker(
    *,
    data: str | None,
    out: Path,
    ebrm: str | None = None,
    num_queries: int = 1200,
    num_items: int = 2000,
    num_impressions: int = 200_000,
    ebrm_epochs: int = 1,
    ebrm_rows: int = 20_000,
    epochs: int = 1,
    seeds: int = 3,
    seed: int = 0,
) -> TrainConfig:
    """Return the run with EBRM features; `after` compares it with the others.

    Args:
        data: must be None: the log is generated, in `out/data`.
        out: the run folder.
        ebrm: folder of a trained EBRM for this catalogue; None trains one in `out/ebrm`, which takes the most time.
        num_queries: queries of the catalogue; .175 teach the EBRM, .525 the ranker, .15 are dev, .15 test.
        num_items: items of the catalogue.
        num_impressions: rows of the log, of all queries.
        ebrm_epochs: of each stage of the EBRM.
        ebrm_rows: rows of its first stage, drawn from all: what bounds the time of this recipe.
        epochs: passes of a ranker over its rows.
        seeds: seeds that the rankers are compared over; 0 leaves the comparison out.
        seed: of catalogue, EBRM and the first ranker.
    """
    if data is not None:
        raise ConfigError(f"recipe 'ebrm_ranker' makes its own data and cannot read {data}; leave --data out")
    made = SyntheticConfig(num_items=num_items, num_queries=num_queries, num_impressions=num_impressions, seed=seed)
    folder = out / "data"
    if not (folder / DONE).exists():
        begin = time.monotonic()
        catalogue = parted(make_data(made))
        model = _train_ebrm(catalogue, out / "ebrm", ebrm_epochs, ebrm_rows, seed) if ebrm is None else EBRM.load(ebrm)
        if model.config.schema != catalogue.schema:
            raise ConfigError(f"--set ebrm={ebrm}: that model has other entity types than the generated catalogue")
        write_log(catalogue, model, folder)
        (folder / DONE).write_text(json.dumps({"model_version": model.version, "seed": seed}))
        print(f"catalogue, EBRM {model.version} and log: {time.monotonic() - begin:.0f} s")
    config = ranker_run(with_features, folder, epochs=epochs, seed=seed)
    return replace(
        config, after=partial(print_comparison, folder=folder, epochs=epochs, seeds=seeds) if seeds else None
    )


def _train_ebrm(data: "SyntheticData", folder: Path, epochs: int, num_rows: int, seed: int) -> EBRM:
    taught = synthetic_set(data)
    drawn = np.random.default_rng(seed).permutation(len(taught.qe_rows))[:num_rows]
    taught = replace(taught, qe_rows=[taught.qe_rows[place] for place in sorted(drawn.tolist())])
    config = RunConfig(
        pretrain=StepConfig(epochs=epochs, lr=FRESH_LR, seed=seed),
        train=QIConfig(epochs=epochs, lr=FRESH_LR, seed=seed),
        seed=seed,
    )
    trained = fit_model(taught, config, say=print)
    if not folder.exists():
        save_run(trained, taught, config, folder)
    return trained.model


def ranker_run(
    ranker: Callable[[tuple[TableConfig, ...], int], RankerConfig], folder: Path, *, epochs: int, seed: int
) -> TrainConfig:
    """Return the run of one of RANKERS on the log of a folder."""
    columns = (
        Ids("query_words"),
        Ids("item_id"),
        *(Ids(name) for name in TYPES),
        Ids("entities"),
        Ids("position"),
        Dense("slot_lengths", width=len(TYPES)),
        *(Dense(name) for name in FEATURE_KEYS),
        Label("click"),
        Group("query"),
    )
    features = (
        FeatureSpec(name="query_words", kind="sparse"),
        FeatureSpec(name="query_word_list", kind="sparse", source="query_words"),
        FeatureSpec(name="item_id", kind="sparse"),
        *(FeatureSpec(name=name, kind="sparse") for name in TYPES),
        FeatureSpec(name="entities", kind="sparse"),
        FeatureSpec(name="position", kind="sparse"),
        FeatureSpec(name="slot_lengths", kind="dense"),
        *(FeatureSpec(name=name, kind="dense") for name in FEATURE_KEYS),
        FeatureSpec(name="click", kind="label"),
        FeatureSpec(name="query", kind="group"),
    )
    train = DataConfig(
        paths=(str(folder / "train.parquet"),),
        format="parquet",
        columns=columns,
        batch_size=512,
        num_lanes=4,
        shuffle_rows=32_768,
        epochs=epochs,
        seed=seed,
    )
    return TrainConfig(
        name="ebrm_ranker",
        model=ranker(ranker_tables(), seed),
        train_data=train,
        eval_data=replace(train, paths=(str(folder / "test.parquet"),), shuffle_rows=0, batch_size=4096, epochs=1),
        features=features,
        metrics=(ExactAuc(), Gauc(), LogLoss(), Ne()),
        dense_optimizer=DenseAdamW(lr=LR),
        epochs=epochs,
        seed=seed,
    )


def ranker_tables() -> tuple[TableConfig, ...]:
    """Return the tables; words and entities serve the DeepFM pooled and the layer one by one."""

    def table(name: str, *features: Feature | str) -> TableConfig:
        return TableConfig(
            name=name, features=features, embedding_dim=DIM, initializer=Normal(0.0, 0.05), optimizer=Adam(lr=LR)
        )

    return (
        table("word", Feature("query_words", "sum"), Feature("query_word_list", "none")),
        table("item", "item_id"),
        table("entity", *(Feature(name, "mean") for name in TYPES), Feature("entities", "none")),
        table("position", "position"),
    )


def print_comparison(trainer: Trainer, out: Path | None, *, folder: Path, epochs: int, seeds: int) -> None:
    """Train all rankers with each seed and print their metrics on the test queries."""
    del out
    first = trainer.config.seed
    results: dict[str, list[Mapping[str, float]]] = {}
    for name, ranker in RANKERS.items():
        for seed in range(first, first + seeds):
            run = Trainer(ranker_run(ranker, folder, epochs=epochs, seed=seed), quiet=True)
            run.train()
            results.setdefault(name, []).append(run.state.metrics)
    test = pq.read_table(folder / "test.parquet", columns=["click", "true_probability"])
    optimum = ExactAuc()
    optimum.update(torch.tensor(test["true_probability"].to_numpy()), torch.tensor(test["click"].to_numpy()).float())
    rows = pq.read_metadata(folder / "train.parquet").num_rows
    print(f"{rows:,} train rows, {len(test):,} test rows of other queries; best possible AUC {optimum.compute():.4f}")
    print(comparison_table(results))


def comparison_table(results: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Return a line per ranker: mean and range of each metric over seeds, and the mean gain over the first ranker."""
    base = next(iter(results))
    lines = [f"{'ranker':<20}" + "".join(f"{name.upper():>26}{'gain':>9}" for name in METRICS)]
    for ranker, runs in results.items():
        cells = []
        for name in METRICS:
            values = np.array([run[name] for run in runs])
            gain = float(np.mean(values - np.array([run[name] for run in results[base]])))
            spread = f"{values.mean():.4f} ({values.min():.4f}-{values.max():.4f})"
            cells.append(f"{spread:>26}" + (f"{gain:>+9.4f}" if ranker != base else f"{'':>9}"))
        lines.append(f"{ranker:<20}" + "".join(cells))
    return "\n".join(lines)
