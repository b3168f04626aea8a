"""Runs: what one is, one train step, evaluation, checkpoints and resuming, hooks, the run folder.

    TrainConfig, Monitor, InitFrom             a run as a value that a recipe returns
    DenseAdamW, DenseAdagrad, DenseSgd         optimizers of the dense parameters
    Trainer, StepOutput                        what runs it
    RunState                                   where a run stands; what hooks see
    Logger, EarlyStop, Checkpoint, Evict, TensorBoard, Profiler, Progress    hooks
    to_json, from_json, differences            configs as JSON; recis.trainer.override sets their fields from text

Names are imported on first use: a config can be made without pyarrow.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recis.trainer.config import (
        DenseAdagrad,
        DenseAdamW,
        DenseOptimizer,
        DenseSgd,
        InitFrom,
        ModelConfig,
        Monitor,
        Source,
        TrainConfig,
    )
    from recis.trainer.hooks import Checkpoint, EarlyStop, Evict, Logger, Profiler, TensorBoard
    from recis.trainer.progress import Progress
    from recis.trainer.serialize import differences, from_json, to_json
    from recis.trainer.state import RunState
    from recis.trainer.trainer import NonFiniteLossError, StepOutput, Trainer

_CONFIG = (
    "DenseAdagrad",
    "DenseAdamW",
    "DenseOptimizer",
    "DenseSgd",
    "InitFrom",
    "ModelConfig",
    "Monitor",
    "Source",
    "TrainConfig",
)
_HOME = {
    **dict.fromkeys(_CONFIG, "config"),
    **dict.fromkeys(("Checkpoint", "EarlyStop", "Evict", "Logger", "Profiler", "TensorBoard"), "hooks"),
    "Progress": "progress",
    **dict.fromkeys(("differences", "from_json", "to_json"), "serialize"),
    "RunState": "state",
    **dict.fromkeys(("NonFiniteLossError", "StepOutput", "Trainer"), "trainer"),
}

__all__ = [
    "TrainConfig",
    "Monitor",
    "InitFrom",
    "ModelConfig",
    "Source",
    "DenseOptimizer",
    "DenseAdamW",
    "DenseAdagrad",
    "DenseSgd",
    "Trainer",
    "StepOutput",
    "NonFiniteLossError",
    "RunState",
    "Logger",
    "EarlyStop",
    "Checkpoint",
    "Evict",
    "TensorBoard",
    "Profiler",
    "Progress",
    "to_json",
    "from_json",
    "differences",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'recis.trainer' has no attribute {name!r}; it has: {', '.join(__all__)}")
    return getattr(import_module(f"recis.trainer.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
