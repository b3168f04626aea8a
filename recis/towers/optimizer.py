"""An optimizer for each part of a model: ranker, towers, gates, each with its own rule, schedule and accumulation.

    lr of a parameter at step t = lr of its part's optimizer * its mark * schedule of the run (t) * schedule of its part (t)

A tower marks its parameters: with the name of the part they belong to (`set_part`; TowerRanker does it), and with a share of
the learning rate (`set_lr_scale`; 1 where nothing was marked). The trainer hands optimizers the parameters without names, so
a mark is an attribute of the parameter. `ByPart` is one torch optimizer to the trainer, its schedule and its checkpoints.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from recis.errors import ConfigError, nearest
from recis.optim.schedule import Constant, Schedule
from recis.trainer.config import DenseAdamW, DenseOptimizer

_LR_MARK, _PART_MARK = "recis_lr_scale", "recis_part"
_STEP, _SUM = "recis_step", "recis_sum"


def set_lr_scale(module: nn.Module, scale: float) -> None:
    """Mark all parameters of a module to learn at `scale` times the learning rate of the run."""
    for parameter in module.parameters():
        setattr(parameter, _LR_MARK, float(scale))


def lr_scale(parameter: nn.Parameter) -> float:
    """Return the scale a parameter is marked with; 1 without a mark."""
    return getattr(parameter, _LR_MARK, 1.0)


def set_part(module: nn.Module, name: str) -> None:
    """Mark all parameters of a module as the part `name`."""
    for parameter in module.parameters():
        setattr(parameter, _PART_MARK, name)


def part_of(parameter: nn.Parameter) -> str | None:
    """Return the part a parameter is marked with; None without a mark."""
    return getattr(parameter, _PART_MARK, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedAdamW:
    """torch.optim.AdamW whose param_groups follow the marks; the order of the parameters is kept."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer over `parameters`: a group per run of equal marks."""
        groups: list[dict[str, Any]] = [
            {"params": list(run), "lr": self.lr * scale} for scale, run in groupby(parameters, key=lr_scale)
        ]
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """How one part of the model learns."""

    name: str
    """Of the tower, as WithTowers names it; `gates` for the gates of all towers."""
    optimizer: DenseOptimizer
    schedule: Schedule = Constant()  # noqa: RUF009  frozen
    """Factor by step, on top of the run's own schedule."""
    every_steps: int = 1
    """Steps whose gradients are averaged into one update of this part."""

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ConfigError(f"part {self.name!r}: every_steps must be at least 1; got {self.every_steps}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ByPart:
    """Optimizers by part; marks of lr_scale hold in each of them."""

    rest: DenseOptimizer = DenseAdamW()  # noqa: RUF009  frozen
    """Of all that belongs to no part."""
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if len(set(names)) < len(names):
            raise ConfigError(f"ByPart: each part has one optimizer; got {names}")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer over `parameters`.

        Raises:
            ConfigError: no parameter belongs to one of the parts.
        """
        return PartOptimizer(self, list(parameters))


class PartOptimizer(torch.optim.Optimizer):
    """Several optimizers as one. State and groups are those of all of them; `step` updates the parts that are due.

    A part with every_steps > 1 keeps its gradients' sum in its state under `recis_sum`, so it survives a checkpoint.
    """

    def __init__(self, config: ByPart, parameters: list[nn.Parameter]) -> None:
        if not parameters:
            raise ConfigError("ByPart: there is nothing to train")
        by_name = {part.name: part for part in config.parts}
        marked = {part_of(parameter) for parameter in parameters}
        for name in by_name:
            if name not in marked:
                known = sorted(str(mark) for mark in marked if mark is not None)
                raise ConfigError(f"ByPart: no trained parameter belongs to part {name!r}; {nearest(name, known)}")
        self._rest = Part(name="", optimizer=config.rest)
        self._members: list[tuple[Part, torch.optim.Optimizer]] = []
        groups: list[dict[str, Any]] = []
        for (name, scale), run in groupby(parameters, key=lambda value: (part_of(value), lr_scale(value))):
            part = by_name.get(name or "", self._rest)
            member = part.optimizer.build(list(run))
            for group in member.param_groups:
                group["lr"] *= scale
                group[_STEP] = 0
            self._members.append((part, member))
            groups += member.param_groups
        super().__init__(groups, {})
        for _, member in self._members:
            self.state.update(member.state)  # Adagrad makes its state when it is built
        self._join()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every part that is due; gradients of the others are kept for when they are."""
        if closure is not None:
            raise ValueError("PartOptimizer: step takes no closure; compute the gradients first")
        for part, member in self._members:
            step = member.param_groups[0][_STEP] + 1
            if part.every_steps > 1 and not self._gather(part, member, step):
                self._count(member, step)
                continue
            factor = part.schedule.factor(step)
            rates = [group["lr"] for group in member.param_groups]
            for group, rate in zip(member.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            member.step()
            for group, rate in zip(member.param_groups, rates, strict=True):
                group["lr"] = rate
            self._count(member, step)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Take up a state_dict, and hand every member its own."""
        super().load_state_dict(dict(state_dict))
        self._join()

    def _join(self) -> None:
        """Let the members work on this object's groups and state: torch puts new ones in their place when it loads."""
        first = 0
        for _, member in self._members:
            count = len(member.param_groups)
            member.param_groups = self.param_groups[first : first + count]
            first += count
            member.state = self.state

    def _gather(self, part: Part, member: torch.optim.Optimizer, step: int) -> bool:
        """Add this step's gradients to the sums; when the part is due, put their mean in place and return True."""
        due = step % part.every_steps == 0
        for group in member.param_groups:
            for parameter in group["params"]:
                total: Tensor | None = self.state[parameter].get(_SUM) if parameter in self.state else None
                if parameter.grad is not None:
                    total = parameter.grad.clone() if total is None else total.add_(parameter.grad)
                if due:
                    if parameter in self.state:
                        self.state[parameter].pop(_SUM, None)
                        if not self.state[parameter]:
                            del self.state[parameter]  # optimizers begin with a parameter that has no state at all
                    parameter.grad = None if total is None else total / part.every_steps
                elif total is not None:
                    self.state[parameter][_SUM] = total
        return due

    @staticmethod
    def _count(member: torch.optim.Optimizer, step: int) -> None:
        for group in member.param_groups:
            group[_STEP] = step
