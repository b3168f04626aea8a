"""One step of training, for both stages: AdamW, warm-up, linear decay, and a gradient clip per group.

    rate(step) = (step + 1) / rising          while step < rising = warmup_share * num_steps
                 (num_steps - step) / (num_steps - rising)      afterwards

A group is clipped by its own norm. With one clip over all, a relaxation a_t, whose gradient reaches 1e17 at saturated
logits, would scale every other gradient to nothing.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recis.errors import ConfigError

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepConfig:
    """What both stages share; a stage adds its own fields."""

    epochs: int = 3
    lr: float = 3e-4
    """Of the scorer: 3e-4 for fresh weights, 3e-5 for pretrained ones."""
    small_lr: float = 1e-2
    """Of the relaxation and of the comparators' logits: a handful of numbers."""
    batch_pairs: int = 256
    warmup_share: float = 0.06
    weight_decay: float = 0.01
    """Of the scorer; the handful has none."""
    clip_norm: float = 1.0
    precision: Precision = "fp32"
    """bf16 lets matrix products of the encoder take bf16 inputs (autocast); weights, losses and updates stay fp32. Either way
    one seed gives the same weights on one machine; see `fast_precision`."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch_pairs < 1:
            raise ConfigError(
                f"epochs must be at least 0 and batch_pairs at least 1; got {self.epochs}, {self.batch_pairs}"
            )
        if not (self.lr > 0 and self.small_lr > 0 and self.clip_norm > 0 and self.weight_decay >= 0):
            raise ConfigError(
                "lr, small_lr and clip_norm must be above 0, weight_decay at least 0; got "
                f"{self.lr}, {self.small_lr}, {self.clip_norm}, {self.weight_decay}"
            )
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(f"precision must be fp32 or bf16; got {self.precision!r}")
        if not 0 <= self.warmup_share < 1:
            raise ConfigError(f"warmup_share must lie in [0, 1); got {self.warmup_share}")


def fast_precision() -> Precision:
    """Return bf16 where the CPU multiplies tiles of it (AMX) or a GPU does, else fp32: plain CPUs emulate bf16, slowly."""
    has_tiles = torch.cpu._is_amx_tile_supported()
    return "bf16" if has_tiles or (torch.cuda.is_available() and torch.cuda.is_bf16_supported()) else "fp32"


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Return the context in which a model's forward pass runs at a precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


class Descent:
    """AdamW over groups of parameters; each group has its own rate and its own clip.

    Args:
        scorer: parameters that get lr and weight decay.
        small: further groups, each clipped alone; they get small_lr.
        config: rates.
        num_steps: how many steps there will be.
    """

    def __init__(
        self,
        scorer: Iterable[nn.Parameter],
        small: Sequence[Iterable[nn.Parameter]],
        config: StepConfig,
        num_steps: int,
    ) -> None:
        self._clip_norm = config.clip_norm
        rates = [(list(scorer), config.lr, config.weight_decay)]
        rates += [(list(group), config.small_lr, 0.0) for group in small]
        self._groups = [group for group, _, _ in rates if group]
        self._optimizer = torch.optim.AdamW(
            [{"params": group, "lr": lr, "weight_decay": decay} for group, lr, decay in rates if group],
            fused=True,  # one pass per tensor: a tenth of a small encoder's step on a CPU
        )
        rising = max(1, round(config.warmup_share * num_steps))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: rate(step, num_steps=num_steps, rising=rising)
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state of optimizer and schedule."""
        return {"optimizer": self._optimizer.state_dict(), "schedule": self._schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])

    def step(self, loss: Tensor) -> float:
        """Go one step down a loss and return it.

        Raises:
            ValueError: the loss or a gradient is NaN or infinite.
        """
        value = float(loss.detach())
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {value}: lower the learning rate, or look for broken weights")
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in self._groups:
            clip_(group, self._clip_norm)
        self._optimizer.step()
        for group in self._groups:
            torch.autograd.graph.increment_version(group)  # the fused update does not, and the cache looks at it
        self._schedule.step()
        return value


def rate(step: int, *, num_steps: int, rising: int) -> float:
    """Return the share of the learning rate at a step from 0."""
    if step < rising:
        return (step + 1) / rising
    return max(0.0, (num_steps - step) / max(1, num_steps - rising))


@torch.no_grad()
def clip_(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Scale the gradients of one group so that their norm is at most max_norm; return the norm before.

    The norm is taken in float64, where the square of 1e30 is a number.

    Raises:
        ValueError: a gradient is NaN or infinite.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return 0.0
    norm = float(torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads]).norm())
    if not norm < float("inf"):
        raise ValueError(f"the norm of a gradient is {norm}: lower the learning rate, or look for broken weights")
    if norm > max_norm:
        for grad in grads:
            grad.mul_(max_norm / norm)
    return norm
