"""The folder of a run: config.json, metrics.jsonl, step_%09d/, predictions/, and who may write into it.

A new run wants an empty folder; `--resume` wants the same config, but for settings that change no value. A lock (flock on
`.lock`, freed by the system when its process dies) keeps two processes out of one folder.
"""

import fcntl
import json
import os
from pathlib import Path
from typing import Any, TextIO

from recis.checkpoint.folder import clean, sync_folder
from recis.checkpoint.manifest import TMP_PREFIX
from recis.checkpoint.tensors import storage_error
from recis.errors import ConfigError
from recis.trainer.serialize import differences

CONFIG_NAME = "config.json"
LOG_NAME = "metrics.jsonl"
_LOCK_NAME = ".lock"
_SHOWN_DIFFERENCES = 12
_FREE = ("overlap", "places", "timeline_steps", "link_delay_ms", "timeout_s", "shard_dense", "unit_parameters")
FREE_ON_RESUME = tuple(f"parallel.{name}" for name in _FREE)
"""Settings that change no value: a run may go on with other ones than it was started with, and then has the new ones. The last
two change the order of sums, in runs alone that are not deterministic."""


class RunFolder:
    """A locked run folder, ready to be written.

    Args:
        path: the folder; made when missing.
        config: the run's config as JSON text, kept in config.json.
        resume: go on with the run that is there. A folder in which no run has begun is taken as it is.

    Raises:
        ConfigError: the folder is not empty and resume is off; or the run there has another config; or another
            process is writing into it.
        CheckpointError: it cannot be made or written.
    """

    def __init__(self, path: Path, config: str, *, resume: bool) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            names = [item.name for item in path.iterdir()]
            taken = sorted(name for name in names if name != _LOCK_NAME and not name.startswith(TMP_PREFIX))
            if taken and not resume:
                raise ConfigError(
                    f"{path}: the folder is not empty (it has {taken[0]}); add --resume to go on with the run there, "
                    "or name another --out"
                )
            self._lock = _lock(path / _LOCK_NAME)
            if resume:
                _check_same(path, config)
            clean(path)
            if not (path / CONFIG_NAME).exists():
                _write_durably(path / CONFIG_NAME, config)
        except OSError as error:
            raise storage_error(error, path) from error

    @property
    def log_path(self) -> Path:
        """metrics.jsonl of the run."""
        return self.path / LOG_NAME

    def close(self) -> None:
        """Let other processes in."""
        self._lock.close()


def read_config(run: Path) -> Any:
    """Return the config of a run as JSON; ConfigError when the folder holds no run."""
    path = run / CONFIG_NAME
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{run}: no run here, {CONFIG_NAME} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not whole JSON ({error}); copy config.json from a checkpoint of the run") from error


def _check_same(path: Path, config: str) -> None:
    if not (path / CONFIG_NAME).exists():
        return
    lines = differences(_bound(read_config(path)), _bound(json.loads(config)))
    if lines:
        more = f"; and {len(lines) - _SHOWN_DIFFERENCES} more" if len(lines) > _SHOWN_DIFFERENCES else ""
        raise ConfigError(
            f"{path}: the run there has another config: {'; '.join(lines[:_SHOWN_DIFFERENCES])}{more}. "
            f"Resume with the config it was started with ({', '.join(FREE_ON_RESUME)} may differ), or start a new run with "
            "init_from"
        )


def _bound(config: Any) -> Any:
    """Return a config without the settings that a run is not bound to."""
    free = {name.partition(".")[2] for name in FREE_ON_RESUME}
    kept = {name: value for name, value in (config.get("parallel") or {}).items() if name not in free}
    return {**config, "parallel": kept}


def _lock(path: Path) -> TextIO:
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(
            f"{path.parent}: another process is writing this run; wait for it, or name another --out"
        ) from None
    return file


def _write_durably(path: Path, text: str) -> None:

    part = path.with_name(f".tmp-{path.name}")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)
