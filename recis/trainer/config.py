"""What one training run is: a frozen value that a recipe function returns.

    def my_run(*, data: str | None, out: Path) -> TrainConfig: ...

Everything a run needs is a field here or a field of a dataclass that hangs here, so `recis.trainer.serialize` can write
the run down as JSON and compare two runs field by field, and `recis.trainer.override` change one field from the command
line. The seed is the only source of randomness: torch, numpy and random are seeded from it.

Step means one optimizer update, of `accumulate_steps` micro-batches, everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from recis.distributed.config import Parallel
from recis.errors import ConfigError
from recis.models.losses import binary_loss
from recis.optim.schedule import Schedule

if TYPE_CHECKING:
    from recis.trainer.trainer import Trainer


@runtime_checkable
class Source(Protocol):
    """Anything that delivers batches and can say where it stands; `recis.io.Reader` is one."""

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@runtime_checkable
class ModelConfig(Protocol):
    """A frozen config that builds its module."""

    def build(self) -> nn.Module: ...


@runtime_checkable
class DenseOptimizer(Protocol):
    """A frozen config that builds the torch optimizer of the dense parameters."""

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseAdamW:
    """torch.optim.AdamW on the dense parameters."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer over `parameters`."""
        return torch.optim.AdamW(
            list(parameters), lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseAdagrad:
    """torch.optim.Adagrad on the dense parameters."""

    lr: float = 1e-2
    eps: float = 1e-10
    weight_decay: float = 0.0

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer over `parameters`."""
        return torch.optim.Adagrad(list(parameters), lr=self.lr, eps=self.eps, weight_decay=self.weight_decay)


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseSgd:
    """torch.optim.SGD on the dense parameters."""

    lr: float = 1e-2
    momentum: float = 0.0
    weight_decay: float = 0.0

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer over `parameters`."""
        return torch.optim.SGD(list(parameters), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)


@dataclass(frozen=True, slots=True, kw_only=True)
class Monitor:
    """Which evaluation metric decides what is best, and when to stop."""

    metric: str = "auc"
    """Key of the dictionary that an evaluation returns."""
    higher_is_better: bool = True
    min_delta: float = 0.0
    """How much better than the best so far counts as better."""
    patience_evals: int | None = None
    """Evaluations in a row without a better one before training stops; None never stops early."""

    def __post_init__(self) -> None:
        if self.patience_evals is not None and self.patience_evals < 1:
            raise ConfigError(f"Monitor: patience_evals must be at least 1 or None; got {self.patience_evals}")
        if self.min_delta < 0:
            raise ConfigError(f"Monitor: min_delta must not be negative; got {self.min_delta}")

    def is_better(self, value: float, best: float | None) -> bool:
        """Return whether `value` beats `best`; NaN never does, anything else beats None."""
        if value != value:
            return False
        if best is None:
            return True
        gain = value - best if self.higher_is_better else best - value
        return gain > self.min_delta


@dataclass(frozen=True, slots=True, kw_only=True)
class InitFrom:
    """Start from what another run learned: one full checkpoint, then its deltas in order."""

    paths: tuple[str, ...]
    """A full checkpoint (or a run folder: its newest whole one) and then deltas on it, oldest first."""
    tables: tuple[tuple[str, str], ...] | None = None
    """(name here, name there) of the tables to take; None takes every table that both have, by name."""
    parts: tuple[Literal["weights", "optimizer", "dense"], ...] = ("weights", "optimizer", "dense")
    strict: bool = True
    """Whether a table or dense tensor that only one side has is an error."""
    cast: bool = False
    """Whether rows of another dtype are converted."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise ConfigError("InitFrom: paths must name at least one checkpoint; got none")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One training run. A field's text says its unit; a wrong value raises ConfigError when the config is made."""

    name: str
    model: ModelConfig | Callable[[], nn.Module]
    """What makes the module: forward(batch: Batch) -> logits [B, T], embedding collections anywhere inside."""
    train_data: Any
    """A recis.io.DataConfig, or any Source. A Source delivers RawBatch when `features` is given, else Batch."""
    features: tuple[Any, ...] = ()
    """Feature specs for recis.features.FeatureEngine; the same engine serves training, evaluation and prediction."""
    eval_data: Any = None
    """As train_data; read from its start at each evaluation. None: no evaluation."""
    tasks: tuple[str, ...] = ()
    """One name per label column; of several, metrics are `<task>.<metric>`. (): the names of the label features."""
    loss: Callable[[Any, Any], Tensor] = binary_loss
    """loss(output of the model, batch) -> scalar, *summed* over samples by their weights."""
    score: Callable[[Any], Tensor] = torch.sigmoid
    """Output of the model -> what metrics and predictions see, [B, T]."""
    metrics: tuple[Any, ...] = ()
    """Metric objects of recis.metrics; copied, never changed."""

    dense_optimizer: DenseOptimizer = DenseAdamW()
    schedule: Schedule | None = None
    """Constant, Linear or Cosine of recis.optim: scales every learning rate by step. None keeps them."""
    max_steps: int | None = None
    """Optimizer updates in all, those before a resume included; None: until the data ends."""
    epochs: int | None = None
    """Passes over train_data, in place of its own `epochs`. None: that, or with max_steps as many as it takes."""
    accumulate_steps: int = 1
    """Micro-batches per step."""
    clip_grad_norm: float | None = None
    """Largest global norm of dense and summed row gradients together; None does not clip."""
    bf16_autocast: bool = False
    """Run the dense part in bfloat16 autocast; rows, loss and optimizer states keep their types."""
    compile_dense: bool = False
    """Pass the model through torch.compile; the embedding ops stay opaque nodes."""
    init_from: InitFrom | None = None

    eval_every_steps: int | None = None
    """Steps between evaluations; None: once, at the end, if there is eval_data."""
    monitor: Monitor | None = None
    """What decides best checkpoint and early stop; None keeps neither."""
    save_every_steps: int | None = None
    """Steps between checkpoints; None: only one at the end."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept; the best one is kept besides."""
    delta_saves: int = 0
    """Checkpoints between two full ones that hold only what changed; 0 writes full ones alone."""
    async_save: bool = True
    """Write checkpoints on a thread while training goes on; what is saved is the state at the step's end."""
    snapshot_memory_mib: int = 1024
    """Extra memory for blocks copied during such a save; beyond it training waits and says so."""
    log_every_steps: int = 50

    parallel: Parallel = Parallel()  # noqa: RUF009  frozen
    """How the run is spread over the processes of torchrun."""
    seed: int = 0
    deterministic: bool = True
    """Equal bytes for equal runs, at any number of threads."""
    hooks: tuple[Any, ...] = ()
    """Plain objects with any of on_train_start, on_step_end, on_evaluate_end, on_checkpoint, on_train_end."""
    evaluate: Callable[[Trainer], Mapping[str, float]] | None = None
    """Extra evaluation; what it returns joins the metrics of each evaluation."""
    after: Callable[[Trainer, Path | None], None] | None = None
    """Called once when training is over, with the best weights *not* reloaded; recipes print baselines here."""

    def __post_init__(self) -> None:
        where = f"TrainConfig {self.name!r}"
        if not self.name:
            raise ConfigError("TrainConfig: name must not be empty; it names the run in logs and reports")
        if len(set(self.tasks)) != len(self.tasks):
            raise ConfigError(f"{where}: tasks must be distinct names; got {self.tasks}")
        for field in ("max_steps", "epochs", "eval_every_steps", "save_every_steps"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ConfigError(f"{where}: {field} must be at least 1 or None; got {value}")
        for field in ("accumulate_steps", "keep_checkpoints", "snapshot_memory_mib", "log_every_steps"):
            value = getattr(self, field)
            if value < 1:
                raise ConfigError(f"{where}: {field} must be at least 1; got {value}")
        if self.delta_saves < 0:
            raise ConfigError(f"{where}: delta_saves must not be negative; got {self.delta_saves}")
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise ConfigError(f"{where}: clip_grad_norm must be above 0 or None; got {self.clip_grad_norm}")
        if self.monitor is not None and self.eval_data is None and self.evaluate is None:
            raise ConfigError(f"{where}: monitor needs eval_data (or evaluate); set one, or monitor=None")
