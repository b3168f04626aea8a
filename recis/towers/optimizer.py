"""Learning rates per group of weights: a tower marks its parameters, and this optimizer reads the marks.

    lr of a parameter = lr of the run * the parameter's scale (1 where nothing was marked)

The trainer hands optimizers the parameters without names, so the mark is an attribute of the parameter.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn

_MARK = "recis_lr_scale"


def set_lr_scale(module: nn.Module, scale: float) -> None:
    """Mark all parameters of a module to learn at `scale` times the learning rate of the run."""
    for parameter in module.parameters():
        setattr(parameter, _MARK, float(scale))


def lr_scale(parameter: nn.Parameter) -> float:
    """Return the scale a parameter is marked with; 1 without a mark."""
    return getattr(parameter, _MARK, 1.0)


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
