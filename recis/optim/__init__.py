"""Row optimizers, learning-rate schedules and gradient clipping.

Sgd, Adagrad, RowWiseAdagrad, Adam, AdamW, AdamWTF, Ftrl    what a TableConfig's `optimizer` can be
SparseOptimizer                                             updates the touched rows of all tables
clip_grad_norm                                              one norm over dense and sparse gradients
RowGradBuffer                                               sums row gradients by hand
Constant, Linear, Cosine                                    schedules for dense and sparse optimizers alike
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recis.optim.accumulate import RowGradBuffer, mean_over_contributors, sum_over_ranks
    from recis.optim.apply import SparseOptimizer
    from recis.optim.clip import clip_grad_norm
    from recis.optim.config import Adagrad, Adam, AdamW, AdamWTF, Ftrl, RowOptimizer, RowWiseAdagrad, Sgd
    from recis.optim.schedule import Constant, Cosine, Linear, Schedule, build_schedule

_HOME = {
    "RowGradBuffer": "accumulate",
    "mean_over_contributors": "accumulate",
    "sum_over_ranks": "accumulate",
    "SparseOptimizer": "apply",
    "clip_grad_norm": "clip",
    "Adagrad": "config",
    "Adam": "config",
    "AdamW": "config",
    "AdamWTF": "config",
    "Ftrl": "config",
    "RowOptimizer": "config",
    "RowWiseAdagrad": "config",
    "Sgd": "config",
    "Constant": "schedule",
    "Cosine": "schedule",
    "Linear": "schedule",
    "Schedule": "schedule",
    "build_schedule": "schedule",
}

__all__ = [
    "Adagrad",
    "Adam",
    "AdamW",
    "AdamWTF",
    "Ftrl",
    "RowOptimizer",
    "RowWiseAdagrad",
    "Sgd",
    "SparseOptimizer",
    "clip_grad_norm",
    "RowGradBuffer",
    "mean_over_contributors",
    "sum_over_ranks",
    "Constant",
    "Cosine",
    "Linear",
    "Schedule",
    "build_schedule",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'recis.optim' has no attribute {name!r}; it has: {', '.join(__all__)}")
    return getattr(import_module(f"recis.optim.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
