"""Learning-rate schedules: one factor per step, for the dense optimizer and for every table alike.

    lr(step) = lr of the config * warm-up(step) * shape(step)            step = 1 for the first update

    warm-up    step / warmup_steps up to 1                     linear, so that the first update is small but not nothing
    Constant   1
    Linear     1 -> final, evenly over the steps after the warm-up, final from total_steps on
    Cosine     final + (1 - final) * (1 + cos(pi * progress)) / 2

`build_schedule` gives an object with step, state_dict and load_state_dict that drives several optimizers; torch's
schedulers work as well, `LambdaLR(optimizer, schedule.after)` too: all optimizers read `lr` from their param groups.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from recis.errors import CheckpointError, ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Base of the schedules: a warm-up, then the factor 1."""

    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ConfigError(f"{type(self).__name__}: warmup_steps must be at least 0; got {self.warmup_steps}")

    def factor(self, step: int) -> float:
        """Return what the config's learning rate is multiplied with at update `step`, which counts from 1."""
        warm = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        return warm * self.shape(step)

    def after(self, num_updates: int) -> float:
        """Return the factor of the next update: `torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.after)`."""
        return self.factor(num_updates + 1)

    def shape(self, step: int) -> float:
        """Return the factor without the warm-up."""
        return 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant(Schedule):
    """The config's learning rate after the warm-up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decay(Schedule):
    total_steps: int
    """Update at which `final` is reached."""
    final: float = 0.0
    """Factor from then on."""

    def __post_init__(self) -> None:
        Schedule.__post_init__(self)
        if self.total_steps <= self.warmup_steps:
            raise ConfigError(
                f"{type(self).__name__}: total_steps must be above warmup_steps; got {self.total_steps} and {self.warmup_steps}"
            )
        if not 0 <= self.final <= 1:
            raise ConfigError(f"{type(self).__name__}: final must lie in [0, 1]; got {self.final}")

    def progress(self, step: int) -> float:
        """Return 0 at the end of the warm-up, 1 from total_steps on."""
        return min(1.0, max(0.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear(_Decay):
    """An even descent to `final`."""

    def shape(self, step: int) -> float:
        return 1.0 + (self.final - 1.0) * self.progress(step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cosine(_Decay):
    """Half a cosine down to `final`."""

    def shape(self, step: int) -> float:
        return self.final + (1.0 - self.final) * (1.0 + math.cos(math.pi * self.progress(step))) / 2.0


class ScheduledOptimizers:
    """Sets `lr` of every param group of some optimizers; call `step()` after each update.

    Args:
        schedule: the factor per step.
        optimizers: whose groups follow it; a group's lr at this moment is its base.
    """

    def __init__(self, schedule: Schedule, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._schedule = schedule
        self._optimizers = tuple(optimizers)
        self._bases = [float(group["lr"]) for group in self._groups()]
        self._step = 0
        self._apply()

    def _groups(self) -> list[dict[str, Any]]:
        """The groups as they are now: torch's load_state_dict puts new ones in their place."""
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        """Say that an update is done: the groups get the learning rate of the next one."""
        self._step += 1
        self._apply()

    def _apply(self) -> None:
        factor = self._schedule.factor(self._step + 1)
        for group, base in zip(self._groups(), self._bases, strict=True):
            group["lr"] = base * factor

    def state_dict(self) -> dict[str, Any]:
        """Return the updates so far and the base rates."""
        return {"step": self._step, "bases": list(self._bases)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where state_dict was taken.

        Raises:
            CheckpointError: it was saved for another number of param groups.
        """
        if len(state["bases"]) != len(self._bases):
            raise CheckpointError(
                f"the saved schedule drives {len(state['bases'])} param groups, this run has {len(self._bases)}"
            )
        self._step, self._bases = state["step"], list(state["bases"])
        self._apply()


def build_schedule(schedule: Schedule | None, optimizers: Sequence[torch.optim.Optimizer]) -> ScheduledOptimizers:
    """Return what drives the learning rates of the optimizers; None keeps them as they are.

    Raises:
        ConfigError: `schedule` is no Schedule.
    """
    if schedule is not None and not isinstance(schedule, Schedule):
        raise ConfigError(f"schedule must be Constant, Linear or Cosine of recis.optim; got {type(schedule).__name__}")
    return ScheduledOptimizers(Constant() if schedule is None else schedule, optimizers)
