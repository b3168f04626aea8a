"""Where a run stands: what hooks see, and what of it a checkpoint keeps."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recis.embedding import HashTable

_KEPT = ("step", "samples", "best", "best_step", "bad_evals", "last_eval_step")


@dataclass(slots=True, kw_only=True)
class RunState:
    """Position and results of a run. Hooks read it; `stop_reason` is the one thing they may set.

    Attributes:
        step: optimizer updates so far.
        max_steps: updates in all, None where the data decides.
        samples: samples trained on so far.
        loss_tensor: mean loss of the last step, weighted; on the model's device.
        window_loss: float64 scalar, sum of the steps' losses since the last log line, and `window_steps` how many.
        metrics: values of the newest evaluation.
        best: value of the monitored metric at its best, and `best_step` the step it was found at.
        bad_evals: evaluations since the best one.
        last_eval_step: step of the newest evaluation.
        evaluation_s: seconds that evaluations of this process have taken; rates of training leave them out.
        stop_reason: why training ends before its time; None while it goes on. A resumed run starts without one.
        run: the run's folder, None where nothing is kept.
        checkpoint: the newest checkpoint that is whole.
        model: the model that is trained.
        tables: its embedding tables by name.
    """

    step: int = 0
    max_steps: int | None = None
    samples: int = 0
    loss_tensor: Tensor | None = None
    window_loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    window_steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    best_step: int | None = None
    bad_evals: int = 0
    last_eval_step: int | None = None
    evaluation_s: float = 0.0
    stop_reason: str | None = None
    run: Path | None = None
    checkpoint: Path | None = None
    model: nn.Module | None = None
    tables: dict[str, HashTable] = field(default_factory=dict)

    @property
    def loss(self) -> float | None:
        """Loss of the last step as a number; reading it waits for the device."""
        return None if self.loss_tensor is None else float(self.loss_tensor)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: nothing that depends on time or place."""
        kept: dict[str, Any] = {name: getattr(self, name) for name in _KEPT}
        return {**kept, "window_loss": float(self.window_loss), "window_steps": self.window_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what state_dict returned."""
        for name in _KEPT:
            setattr(self, name, state[name])
        self.window_loss = torch.tensor(state["window_loss"], dtype=torch.float64)
        self.window_steps = state["window_steps"]
