"""Where a training stands, on disk: a killed run goes on behind its last saved step, to the same losses and weights.

    training/settings.json       what the run was started with
    training/<stage>.pt          the stage's weights, optimizer, random state, history and steps done

Orders of data are drawn from seeds and are replayed up to the step, so they are not saved. A file appears whole or not at all.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recis.ebrm.descent import Descent
from recis.errors import ConfigError

TRAINING_NAME, SETTINGS_NAME = "training", "settings.json"
MIN_SECONDS = 10.0
"""Between two saves inside a stage; its end is always saved."""


@dataclass(kw_only=True)
class Progress:
    """The folder that says how far a run is. Without a folder nothing is kept.

    Args:
        folder: of the run.
        every_s: seconds between saves inside a stage; 0 saves at every step.
        clock: seconds.
    """

    folder: Path | None = None
    every_s: float = MIN_SECONDS
    clock: Callable[[], float] = time.monotonic
    _last: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._last = self.clock()

    def load(self, stage: str) -> dict[str, Any] | None:
        """Return what was saved of a stage, or None.

        Raises:
            ConfigError: the file is damaged.
        """
        path = self._path(stage)
        if path is None or not path.is_file():
            return None
        try:
            return torch.load(path, weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            raise ConfigError(f"{path} cannot be read ({error}); remove it to repeat the stage") from error

    def is_due(self) -> bool:
        """Return whether a stage should save now."""
        return self.folder is not None and self.clock() - self._last >= self.every_s

    def save(self, stage: str, state: dict[str, Any]) -> None:
        """Keep a stage's state."""
        path = self._path(stage)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        with part.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
        self._last = self.clock()

    def _path(self, stage: str) -> Path | None:
        return None if self.folder is None else self.folder / TRAINING_NAME / f"{stage}.pt"


def state_of(module: nn.Module, descent: Descent, step: int) -> dict[str, Any]:
    """Return what every stage keeps: weights, optimizer, torch's random state, steps done."""
    device = next(module.parameters()).device
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {
        "step": step,
        "weights": module.state_dict(),
        "descent": descent.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": cuda,
    }


def restore(state: dict[str, Any], module: nn.Module, descent: Descent) -> int:
    """Put a kept state back and return the steps done. Call it inside `seeded`, whose generators it sets."""
    module.load_state_dict(state["weights"])
    descent.load_state_dict(state["descent"])
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"], next(module.parameters()).device)
    return state["step"]


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Keep what a run is started with."""
    home = folder / TRAINING_NAME
    home.mkdir(parents=True, exist_ok=True)
    part = home / f"{SETTINGS_NAME}.part"
    part.write_text(json.dumps(settings, indent=1, sort_keys=True))
    part.replace(home / SETTINGS_NAME)


def read_settings(folder: Path) -> dict[str, Any]:
    """Return what a run was started with.

    Raises:
        ConfigError: no training was started there, or it is finished.
    """
    path = folder / TRAINING_NAME / SETTINGS_NAME
    if not path.is_file():
        raise ConfigError(f"{folder} holds no unfinished training: {TRAINING_NAME}/{SETTINGS_NAME} is missing")
    return json.loads(path.read_text(encoding="utf-8"))
