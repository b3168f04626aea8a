"""A run as the commands see it: which recipe made it with which settings, and the trainer in its folder.

`recipe.json` in the run folder names recipe, data and settings, so that a later command can build the same model again:

    start_run("demo", data=None, out=folder, settings=("max_steps=100",), resume=False).train()
    open_run(folder).evaluate("clicks.parquet")
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from recis.errors import CheckpointError, ConfigError
from recis.io import DataConfig
from recis.predictions import EVAL_PREDICTIONS, write_eval_predictions
from recis.recipes import call_recipe, find_recipe
from recis.trainer import TrainConfig, Trainer
from recis.trainer.serialize import differences

RECIPE_NAME = "recipe.json"
SUFFIXES = {".parquet": "parquet", ".orc": "orc", ".csv": "csv", ".jsonl": "jsonl"}


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder with its config and trainer."""

    folder: Path
    recipe: str
    config: TrainConfig
    trainer: Trainer

    def train(self) -> dict[str, float]:
        """Train to the end, keep the scores of the evaluation data for the report, and return the last metrics."""
        metrics = self.trainer.train()
        if self.config.eval_data is not None:
            write_eval_predictions(self.trainer, self.folder / EVAL_PREDICTIONS)
        return metrics

    def data(self, path: str) -> DataConfig:
        """Return how this run reads a file: its own columns, the format by the file's suffix, in order, no shuffling.

        Raises:
            ConfigError: the run reads no files, or the path has none of the known suffixes and the run's format no file.
        """
        own = self.config.eval_data if isinstance(self.config.eval_data, DataConfig) else self.config.train_data
        if not isinstance(own, DataConfig):
            raise ConfigError(f"recipe {self.recipe!r} reads no files, so it cannot read {path}; evaluate it in Python")
        return replace(
            own,
            paths=(path,),
            format=SUFFIXES.get(Path(path).suffix, own.format),
            window=None,
            follow=None,
            shuffle_rows=0,
            num_lanes=1,
            epochs=1,
            drop_last=False,
        )

    def evaluate(self, path: str) -> tuple[int, dict[str, float]]:
        """Return how many samples a file has, and loss and metrics of the newest whole checkpoint on them."""
        own = getattr(import_module(find_recipe(self.recipe).__module__), "evaluate_file", None)
        if own is not None:
            return own(self, path)
        num_samples = 0
        for batch, _ in self.trainer.scored(self.data(path)):
            num_samples += batch.num_samples
        return num_samples, self.trainer.evaluate(self.data(path))

    def recommend(self, users: Path, *, k: int, out: Path) -> tuple[int, int]:
        """Write the k best items of each user in a file; returns rows written and users the model does not know.

        Raises:
            ConfigError: the recipe recommends nothing, or k is below 1.
        """
        if k < 1:
            raise ConfigError(f"--k must be at least 1; got {k}")
        own = getattr(import_module(find_recipe(self.recipe).__module__), "recommend_file", None)
        if own is None:
            raise ConfigError(f"recipe {self.recipe!r} scores given pairs and recommends nothing; use recis predict")
        return own(self, users, k=k, out=out)

    def bad_rows(self) -> list[str]:
        """Return one line per input row that was left out (on_bad_row="skip")."""
        return [str(row) for row in self.trainer.bad_rows]


def start_run(recipe: str, *, data: str | None, out: Path | None, settings: Sequence[str], resume: bool) -> Run:
    """Return a run ready to train, new or resumed.

    Raises:
        ConfigError: the folder is not empty and resume is off; the run there came from another recipe, data or settings.
    """
    if resume and out is None:
        raise ConfigError("--resume needs --out: the folder of the run to go on with")
    folder = out or Path("runs") / f"{recipe.replace(':', '.')}-{datetime.now():%Y%m%d-%H%M%S}"
    asked = {"recipe": recipe, "data": data, "settings": list(settings)}
    kept = folder / RECIPE_NAME
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder}: is a file; name a folder")
    if not resume and folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--out {folder}: the folder is not empty; add --resume to go on, or name another")
    if resume and kept.exists():
        lines = differences(json.loads(kept.read_text()), asked)
        if lines:
            raise ConfigError(f"--resume {folder}: the run there was started otherwise: {'; '.join(lines)}")
    find_recipe(recipe)  # a wrong name must not leave a folder behind
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config = call_recipe(recipe, data=data, out=folder, settings=settings)
        kept.write_text(json.dumps(asked, indent=1) + "\n")
    except ConfigError:
        if not any(folder.iterdir()):
            folder.rmdir()
        raise
    except OSError as error:
        raise CheckpointError(f"--out {folder}: cannot be written ({error.strerror}); name another folder") from error
    trainer = Trainer(config, folder, resume=True, quiet=False)
    return Run(folder, recipe, config, trainer)


def open_run(folder: Path) -> Run:
    """Return a finished or stopped run with the weights of its newest whole checkpoint, for reading only.

    Raises:
        ConfigError: the folder holds no run that the command `recis train` started.
        CheckpointError: it has no whole checkpoint.
    """
    kept = folder / RECIPE_NAME
    try:
        asked: dict[str, Any] = json.loads(kept.read_text())
    except OSError as error:
        raise ConfigError(f"--run {folder}: no run here, {RECIPE_NAME} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"--run {folder}: {RECIPE_NAME} is not whole JSON ({error})") from error
    config = call_recipe(asked["recipe"], data=asked["data"], out=folder, settings=asked["settings"])
    trainer = Trainer(config, None, quiet=True)
    trainer.load(folder)
    return Run(folder, asked["recipe"], config, trainer)
