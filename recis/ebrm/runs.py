"""A training run of EBRM: both stages in order, and the folder that keeps the model with its manifest.

model/            see recis.ebrm.persist
manifest.json     seed, settings, hashes of the data, versions, history, the threshold of F1
dictionaries.json what titles of the PriceRunner task are read with, where the model was trained on offers
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from recis.ebrm.calibrate import Calibrator
from recis.ebrm.config import COMPARED, EBRMConfig, Logic, with_comparators
from recis.ebrm.datasets import EvalSet, TrainingSet, sha256_of
from recis.ebrm.descent import StepConfig
from recis.ebrm.entities import EntitySchema
from recis.ebrm.evaluate import best_threshold, evaluate
from recis.ebrm.gold import fit_thresholds
from recis.ebrm.model import EBRM
from recis.ebrm.pairs import score_pairs
from recis.ebrm.pretrain import pretrain
from recis.ebrm.pricerunner_labels import Dictionaries
from recis.ebrm.resume import Progress
from recis.ebrm.scorer import QEScorer
from recis.ebrm.train import History, QIConfig, train
from recis.errors import ConfigError, DataError

MANIFEST_NAME, DICTIONARIES_NAME = "manifest.json", "dictionaries.json"
FRESH_LR, PRETRAINED_LR = 1e-3, 3e-5
PRETRAIN_BATCH_PAIRS = 128  # smaller steps teach a fresh encoder more at the same cost, until overhead eats the gain


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Settings of a run."""

    scorer: str = "small"
    """small, minilm, or the folder of a Hugging Face encoder."""
    fast: bool = False
    """Compare codes and numbers instead of encoding them."""
    logic: Logic = "product"
    pretrain: StepConfig | None = field(default_factory=StepConfig)
    """Stage A; None leaves it out."""
    train: QIConfig = field(default_factory=QIConfig)
    """Stage B."""
    seed: int = 0
    """Of the scorer's fresh weights; the stages have their own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What a run made."""

    model: EBRM
    history: History
    pretrain_losses: tuple[float, ...]
    f1_threshold: float
    """log r from which a pair is called relevant: the best F1 on dev."""


def fit_model(
    data: TrainingSet,
    config: RunConfig,
    *,
    say: Callable[[str], None] = lambda _: None,
    progress: Progress | None = None,
) -> Trained:
    """Train a model: stage A, stage B, calibrator, thresholds. `say` is told of the progress, a line at a time.

    `progress` keeps where the run stands, and goes on from there: to the same weights as a run that was never killed.

    Raises:
        ConfigError: an encoder that is not there, a type that cannot be compared.
        DataError: no rows or pairs to learn from.
    """
    model = EBRM(
        EBRMConfig(schema=schema_of(data.schema, fast=config.fast), logic=config.logic), make_scorer(data, config)
    )
    losses: list[float] = []
    if config.pretrain is not None:
        say(f"stage A: {len(data.qe_rows):,} labelled (query, entity) rows")
        losses = pretrain(
            model,
            data.qe_rows,
            config.pretrain,
            on_epoch=lambda epoch, loss: say(f"  epoch {epoch}: loss {loss:.4f}"),
            progress=progress,
        )
    say(f"stage B: {len(data.train):,} labelled (query, item) pairs")
    history = train(
        model,
        data.train,
        data.dev,
        data.qe_rows,
        config.train,
        on_measure=lambda m: say(f"  step {m.step}: loss {m.loss:.4f}, dev ROC-AUC {m.dev_roc_auc:.4f}"),
        progress=progress,
    )
    if data.dev_gold is not None:
        cuts = fit_thresholds(model, data.dev, data.dev_gold)
        say("verdict thresholds: " + ", ".join(f"{name} {value:.3f}" for name, value in cuts.to_json().items()))
    log_r, _ = score_pairs(model, data.dev)
    return Trained(
        model=model,
        history=history,
        pretrain_losses=tuple(losses),
        f1_threshold=best_threshold(log_r, data.dev.label),
    )


def schema_of(schema: EntitySchema, *, fast: bool) -> EntitySchema:
    """Return the schema, with comparators for its codes and numbers among model, capacity, size and speed if `fast`."""
    comparable = tuple(kind.name for kind in schema.types if kind.name in COMPARED and kind.kind != "text")
    return with_comparators(schema, comparable) if fast else schema


def make_scorer(data: TrainingSet, config: RunConfig) -> QEScorer:
    """Return a fresh scorer; raises ConfigError where its encoder is missing."""
    spellings = data.schema.spellings()
    if config.scorer == "small":
        return QEScorer.small(data.corpus(), seed=config.seed, spellings=spellings)
    if config.scorer == "minilm":
        return QEScorer.minilm(seed=config.seed, spellings=spellings)
    return QEScorer.from_encoder(config.scorer, seed=config.seed, spellings=spellings)


def save_run(trained: Trained, data: TrainingSet, config: RunConfig, folder: Path) -> None:
    """Write a run's folder."""
    trained.model.save(folder)
    if data.dictionaries is not None:
        (folder / DICTIONARIES_NAME).write_text(json.dumps(data.dictionaries.to_json(), indent=1))
    names = ("recis", "torch", "transformers", "tokenizers", "numpy")
    manifest = {
        "format": 1,
        "seed": config.seed,
        "config": asdict(config),
        "data": dict(data.hashes),
        "num_qe_rows": len(data.qe_rows),
        "num_pairs": {"train": len(data.train), "dev": len(data.dev)},
        "pretrain_losses": list(trained.pretrain_losses),
        "measures": [asdict(measure) for measure in trained.history.measures],
        "best_step": trained.history.best.step,
        "f1_threshold_log_r": trained.f1_threshold,
        "model_version": trained.model.version,
        "encoder_sha256": _encoder_hashes(config.scorer),
        "versions": {name: version(name) for name in names} | {"python": sys.version.split()[0]},
    }
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1, sort_keys=True))


def _encoder_hashes(name: str) -> dict[str, str]:
    """Return the sha256 of each weight file that a pretrained encoder started from."""
    from recis.ebrm.scorer import minilm_path

    if name == "small":
        return {}
    home = minilm_path() if name == "minilm" else Path(name)
    return {path.name: sha256_of(path) for path in sorted(home.iterdir()) if path.suffix in (".safetensors", ".bin")}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a run's manifest; empty for a model that was saved without one.

    Raises:
        DataError: it is no JSON.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"not JSON: {error}", file=str(path)) from error


def read_dictionaries(folder: Path) -> Dictionaries:
    """Return the dictionaries of a model that was trained on offers.

    Raises:
        ConfigError: it was trained on something else.
    """
    path = folder / DICTIONARIES_NAME
    if not path.is_file():
        raise ConfigError(
            f"{folder} has no {DICTIONARIES_NAME}: only a model trained on offers can read a file of offers; "
            "give items and labels as JSONL"
        )
    return Dictionaries.from_json(json.loads(path.read_text(encoding="utf-8")))


def measure(model: EBRM, data: EvalSet, *, f1_threshold: float | None = None) -> tuple[dict[str, float], int]:
    """Return the metrics of recis.ebrm.evaluate and how many pairs were encoded.

    Args:
        model: calibrated, or ece is NaN.
        data: pairs and truth.
        f1_threshold: log r from which a pair counts as relevant; None: where the calibrated probability is 0.5.
    """
    log_r, num_calls = score_pairs(model, data.pairs)
    calibrator = model.calibrator
    if f1_threshold is None and calibrator is not None:
        f1_threshold = log_r_at_half(calibrator)
    p = None if calibrator is None else calibrator.probability(log_r)
    return evaluate(data.truth, log_r, probabilities=p, threshold=f1_threshold), num_calls


def log_r_at_half(calibrator: Calibrator) -> float:
    """Return the log r whose probability is 0.5: logit(r) = -b / a."""
    return float(-np.logaddexp(0.0, calibrator.b / calibrator.a))


def finite_or_none(metrics: dict[str, float]) -> dict[str, float | None]:
    """Return metrics as JSON has them: NaN is null."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}
