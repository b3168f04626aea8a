"""A run as the commands see it: which recipe made it with which settings, and the trainer in its folder.

    start_run("demo", data=None, out=folder, settings=("max_steps=100",), resume=False).train()
    open_run(folder).measure("clicks.parquet")

Two files of the run folder say what it is. `recipe.json` names recipe, data and settings as they were asked for, so that
`--resume` can be held against them. `config.json` is the config that came of it; a run is opened by this one alone, so
evaluation and prediction have the model and the features it was trained with, whatever has become of the recipe since.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from recis.checkpoint.manifest import MANIFEST_NAME, TMP_PREFIX, Manifest, step_folder
from recis.distributed.launch import Job, versions
from recis.distributed.ranks import Ranks
from recis.errors import CheckpointError, ConfigError, DataError, RecisError
from recis.io import DataConfig
from recis.io.files import COMPRESSED, SUFFIXES
from recis.predictions import EVAL_PREDICTIONS, check_output, write_eval_predictions
from recis.recipes import call_recipe, find_recipe
from recis.trainer import TrainConfig, Trainer, from_json, to_json
from recis.trainer.log import read_log
from recis.trainer.override import override
from recis.trainer.report import write_report
from recis.trainer.run_folder import FREE_ON_RESUME, LOG_NAME, read_config
from recis.trainer.serialize import differences

RECIPE_NAME = "recipe.json"
LOCK_NAME = ".lock"
# what training alone needs, and what may hang on things that are gone: left out when a run is opened to be read
TRAINING_ONLY: Mapping[str, Any] = {"init_from": None, "monitor": None, "hooks": [], "evaluate": None, "after": None}
# fields that decide what is scored and how
SCORING = ("model", "features", "tasks", "score", "bf16_autocast", "train_data.columns", "eval_data.columns")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run folder with its config and trainer."""

    folder: Path
    recipe: str | None
    """Name of the recipe; None when the run was started from Python."""
    config: TrainConfig
    trainer: Trainer
    reading: tuple[str, ...] = ()
    """Settings `name=value` of the DataConfig that other files are read with."""
    is_new: bool = False
    """Whether this process made what is in the folder."""
    weights: str = ""
    """Where the weights of an opened run come from, in words."""

    def train(self) -> dict[str, float]:
        """Train to the end, write the scores of the evaluation data and the report, and return the last metrics.

        A run that fails before its first step leaves its folder as it was found.
        """
        is_first = self.trainer.ranks.rank == 0
        try:
            metrics = self.trainer.train()
        except (RecisError, OSError):
            if self.is_new and is_first and self.trainer.state.step == 0:
                _empty(self.folder)
            raise
        if self.config.eval_data is not None:
            if is_first:
                write_eval_predictions(self.trainer, self.folder / EVAL_PREDICTIONS)
            else:  # rows lie with their owners: every rank takes part in scoring
                for _ in self.trainer.scored(self.config.eval_data):
                    pass
        if is_first and read_log(self.folder / LOG_NAME):
            write_report(self.folder)
        return metrics

    def data(self, path: str) -> DataConfig:
        """Return how this run reads a file: its own columns, the format by the file's suffix, in order, no shuffling.

        Raises:
            ConfigError: the run reads no files, there is no such file, or a setting of `reading` is wrong.
        """
        own = next((d for d in (self.config.eval_data, self.config.train_data) if isinstance(d, DataConfig)), None)
        if own is None:
            raise ConfigError(f"run {self.folder} reads no files, so it cannot read {path}; evaluate it in Python")
        if "://" not in path and not any(mark in path for mark in "*?[") and not Path(path).exists():
            raise ConfigError(f"--data {path}: no such file or folder")
        skips = any(
            isinstance(data, DataConfig) and data.on_bad_row == "skip"
            for data in (self.config.train_data, self.config.eval_data)
        )
        data = replace(
            own,
            paths=(path,),
            format=_format_of(path, own.format),
            on_bad_row="skip" if skips else "raise",
            window=None,
            follow=None,
            shuffle_rows=0,
            num_lanes=1,
            epochs=1,
            drop_last=False,
        )
        return override(data, self.reading)

    def measure(self, path: str) -> tuple[int, dict[str, float]]:
        """Return how many samples a file has, and loss and metrics of the loaded checkpoint on them."""
        own = self._hook("evaluate_file")
        return self.trainer.measure(self.data(path)) if own is None else own(self, path)

    def recommend(self, users: Path, *, k: int, out: Path) -> tuple[int, int]:
        """Write the k best items of each user in a file; returns rows written and users the model does not know.

        Raises:
            ConfigError: the recipe recommends nothing, k is below 1, there is no file of users, or none can be at `out`.
        """
        own = self._hook("recommend_file")
        if own is None:
            raise ConfigError(f"recipe {self.recipe!r} scores given pairs and recommends nothing; use recis predict")
        if k < 1:
            raise ConfigError(f"--k must be at least 1; got {k}")
        if not users.is_file():
            raise ConfigError(f"--users {users}: no such file; give CSV, Parquet or text with the users' ids")
        check_output(out)
        return own(self, users, k=k, out=out)

    def bad_rows(self) -> list[str]:
        """Return one line per input row that was left out (on_bad_row="skip")."""
        return [
            str(DataError(row.problem, file=row.file, unit=row.unit, row=row.row, column=row.column))
            for row in self.trainer.bad_rows
        ]

    def _hook(self, name: str) -> Any:
        """Return a function of the recipe's module; None where it has none of that name."""
        if self.recipe is None:
            return None
        return getattr(import_module(find_recipe(self.recipe).__module__), name, None)


def start_run(
    recipe: str,
    *,
    data: str | None,
    out: Path | None,
    settings: Sequence[str],
    resume: bool,
    job: Job | None = None,
) -> Run:
    """Return a run ready to train, new or resumed. What resuming leaves out (data, settings) is as it was.

    Args:
        recipe, data, out, settings, resume: as the command says them.
        job: the processes that train together, each of which calls this; None: this process alone.

    Raises:
        ConfigError: the folder is not empty and resume is off; the run there came from another recipe, data or settings;
            a setting is wrong; another rank runs something else. A new run leaves its folder as it was found.
        CheckpointError: the folder cannot be written.
    """
    if job is not None:
        return _start_in_job(job, recipe, data=data, out=out, settings=settings, resume=resume)
    started = _prepare(recipe, data=data, out=out, settings=settings, resume=resume)
    return started.run(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Started:
    """A run folder that is ready, and the config of its run."""

    folder: Path
    recipe: str
    config: TrainConfig
    is_new: bool

    def run(self, ranks: Ranks | None) -> Run:
        """Return the run with its trainer; where that cannot be built a new folder is left as it was found."""
        try:
            trainer = Trainer(self.config, self.folder, resume=True, quiet=False, ranks=ranks)
        except (RecisError, OSError):
            if self.is_new:
                _empty(self.folder)
            raise
        return Run(folder=self.folder, recipe=self.recipe, config=self.config, trainer=trainer, is_new=self.is_new)


def _prepare(recipe: str, *, data: str | None, out: Path | None, settings: Sequence[str], resume: bool) -> _Started:
    """Make the folder of a run, or compare what is asked for with the run that is there, and call the recipe."""
    if resume and out is None:
        raise ConfigError("--resume needs --out: the folder of the run to go on with")
    find_recipe(recipe)  # a wrong name must not touch a folder
    folder = out or Path("runs") / f"{recipe.replace(':', '.')}-{datetime.now():%Y%m%d-%H%M%S}"
    asked = {"recipe": recipe, "data": data, "settings": list(settings)}
    try:
        is_new = not folder.exists() or (folder.is_dir() and not _content(folder))
        if is_new:
            folder.mkdir(parents=True, exist_ok=True)
            _write_whole(folder / RECIPE_NAME, json.dumps(asked, indent=1) + "\n")
        else:
            asked = _resumed(folder, asked, resume)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CheckpointError(
            f"--out {folder}: cannot be written ({reason}); free space, or name another folder"
        ) from error
    try:
        config = call_recipe(recipe, data=asked["data"], out=folder, settings=asked["settings"])
    except (RecisError, OSError):
        if is_new:
            _empty(folder)
        raise
    return _Started(folder=folder, recipe=recipe, config=config, is_new=is_new)


def _start_in_job(
    job: Job, recipe: str, *, data: str | None, out: Path | None, settings: Sequence[str], resume: bool
) -> Run:
    """Let rank 0 prepare the folder (and the recipe its data), the others follow, and compare what all would run."""

    def prepare() -> _Started:
        if job.rank == 0:
            started = _prepare(recipe, data=data, out=out, settings=settings, resume=resume)
            job.tell("folder", str(started.folder.resolve()))
            return started
        folder = Path(job.hear("folder"))
        kept = _read_asked(folder) if folder.is_dir() else None
        if kept is None:
            raise ConfigError(
                f"--out {folder}: rank {job.rank} does not see the run that rank 0 has begun there: name a folder that all "
                "ranks share (NFS, a mounted bucket)"
            )
        config = call_recipe(
            recipe,
            data=kept["data"] if data is None else data,
            out=folder if out is None else out,
            settings=_settings(kept["settings"], settings),
        )
        return _Started(folder=folder, recipe=recipe, config=config, is_new=False)

    started = job.rank_0_first(prepare)
    try:
        config = started.config
        job.check_same({"versions": versions(), "config": json.loads(json.dumps(to_json(config)))}, differences)
        config.parallel.parts_over(job.world_size)
        ranks = job.connect(config.parallel.timeout_s)
    except (RecisError, OSError):
        if started.is_new:
            _empty(started.folder)
        raise
    return started.run(ranks)


def open_run(folder: Path, *, settings: Sequence[str] = ()) -> Run:
    """Return a run with the weights of its newest whole checkpoint (or of the checkpoint `folder`), for reading only.

    Args:
        folder: a run, or one of its checkpoints.
        settings: `train_data.name=value`, how other files are read.

    Raises:
        ConfigError: the folder holds no run, its recipe now makes another model or other features, or a setting is wrong.
        CheckpointError: it has no whole checkpoint, or `folder` is a damaged one.
    """
    if not folder.is_dir():
        raise ConfigError(f"--run {folder}: no such folder; give the folder of a run")
    home = folder.resolve().parent if (folder / MANIFEST_NAME).exists() else folder
    stored = read_config(folder)
    asked = _read_asked(home)
    config = _rebuilt(stored, asked, home)
    trainer = Trainer(config, None, quiet=True)
    loaded = trainer.load(folder)
    recipe = None if asked is None else asked["recipe"]
    return Run(
        folder=home,
        recipe=recipe,
        config=config,
        trainer=trainer,
        reading=_reading(settings),
        weights=_weights(loaded.path, loaded.manifest),
    )


def _weights(checkpoint: Path, manifest: Manifest) -> str:
    best = (manifest.trainer or {}).get("run", {}).get("best_step")
    if best is None or best == manifest.step:
        return f"weights of {checkpoint}"
    better = checkpoint.with_name(step_folder(best))
    return f"weights of {checkpoint}; the best evaluation was that of {better}: give it as --run to use those"


def _resumed(folder: Path, asked: dict[str, Any], resume: bool) -> dict[str, Any]:
    """Return recipe, data and settings of the run in a folder, after comparing what was asked for now."""
    if not folder.is_dir():
        raise ConfigError(f"--out {folder}: is a file; name a folder")
    if not resume:
        raise ConfigError(
            f"--out {folder}: the folder is not empty (it has {_content(folder)[0]}); add --resume to go on with the run "
            "there, or name another"
        )
    kept = _read_asked(folder)
    if kept is None:
        raise ConfigError(f"--resume {folder}: no run here, it has no {RECIPE_NAME}; name the folder of a run")
    given: dict[str, Any] = {
        "recipe": asked["recipe"],
        "data": kept["data"] if asked["data"] is None else asked["data"],
        "settings": _settings(kept["settings"], asked["settings"]),
    }
    lines = differences(_bound(kept), _bound(given))
    if lines:
        raise ConfigError(
            f"--resume {folder}: the run there was started otherwise: {'; '.join(lines)}; leave --data and --set out to "
            f"go on as it was (--set may name {', '.join(FREE_ON_RESUME)}), or start a new run"
        )
    return given


def _settings(kept: Sequence[str], asked: Sequence[str]) -> list[str]:
    """Return the settings to go on with: those that a run is not bound to as asked for, the others as kept if none is asked."""
    bound = [setting for setting in asked if not _is_free(setting)]
    free = _by_name([*filter(_is_free, kept), *filter(_is_free, asked)])
    bound = bound or [setting for setting in kept if not _is_free(setting)]
    return [*bound, *(f"{name}={value}" for name, value in free.items())]


def _bound(asked: Mapping[str, Any]) -> dict[str, Any]:
    bound = [setting for setting in asked["settings"] if not _is_free(setting)]
    return {**asked, "settings": _by_name(bound)}


def _is_free(setting: str) -> bool:
    name = setting.partition("=")[0]
    return any(name == free or name.startswith(f"{free}.") for free in FREE_ON_RESUME)


def _by_name(settings: Sequence[str]) -> dict[str, str]:
    pairs = (setting.partition("=") for setting in settings)
    return {name: value for name, _, value in pairs}


def _rebuilt(stored: Mapping[str, Any], asked: Mapping[str, Any] | None, home: Path) -> TrainConfig:
    """Return the stored config; where it names what cannot be imported, the recipe's, if that scores in the same way."""
    try:
        return from_json({**stored, **TRAINING_ONLY})
    except (ConfigError, TypeError) as error:  # TypeError: a field that this version does not have
        if asked is None:
            raise ConfigError(f"{home}: its config.json cannot be built again: {error}") from error
    config: TrainConfig = call_recipe(
        asked["recipe"], data=asked["data"], out=home.resolve(), settings=asked["settings"]
    )
    made = json.loads(json.dumps(to_json(config)))
    lines = [line for name in SCORING for line in differences(_field(stored, name), _field(made, name), name)]
    if lines:
        raise ConfigError(
            f"{home}: recipe {asked['recipe']!r} now makes another model or other features than the run was trained with: "
            f"{'; '.join(lines[:6])}; put the recipe back"
        )
    return replace(config, init_from=None, monitor=None, hooks=(), evaluate=None, after=None)


def _field(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def _reading(settings: Sequence[str]) -> tuple[str, ...]:
    """Return the settings without the name of the data they belong to."""
    bare = []
    for setting in settings:
        where, dot, rest = setting.partition(".")
        if where not in ("train_data", "eval_data") or not dot:
            raise ConfigError(
                f"--set {setting!r}: a finished run takes only settings of how files are read, such as "
                "train_data.on_bad_row=skip"
            )
        bare.append(rest)
    return tuple(bare)


def _format_of(path: str, own: str) -> Any:
    name = path.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return next((kind for kind, suffixes in SUFFIXES.items() if name.endswith(suffixes)), own)


def _content(folder: Path) -> list[str]:
    """Return what a folder holds, but for the lock and what a killed process left half-written."""
    names = [item.name for item in folder.iterdir()]
    return sorted(name for name in names if name != LOCK_NAME and not name.startswith(TMP_PREFIX))


def _empty(folder: Path) -> None:
    """Remove what a new run has put into its folder, which was empty or not there before, and the folder."""
    for item in folder.iterdir():
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item, ignore_errors=True)
        else:
            item.unlink(missing_ok=True)
    with suppress(OSError):  # a mount point, or where the user stands
        folder.rmdir()


def _read_asked(folder: Path) -> dict[str, Any] | None:
    """Return recipe, data and settings of a run; None where it was not started by the command."""
    path = folder / RECIPE_NAME
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: is not whole JSON ({error}); write recipe, data and settings into it") from error


def _write_whole(path: Path, text: str) -> None:
    part = path.with_name(f".tmp-{path.name}")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
