"""Losses: loss(logits, batch) -> the weighted *sum* over samples, a scalar; the trainer divides by the global weight.

    multi-task   sum_b w_b sum_t c_t m_bt u_bt loss_t(logit_bt, y_bt)
                 w = sample weight, c = the task's weight, m = 1 where the label is present, u = weight per label
    softmax      - sum_b w_b y_b log softmax(logits_b)_0        column 0 is the positive, the others are negatives

Because sums add, micro-batches of any size give the gradient of the whole batch. A masked label may hold anything, NaN
included.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from recis.errors import ConfigError

if TYPE_CHECKING:
    from recis.io.batch import Batch

PointLoss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -(y ln p + (1 - y) ln(1 - p)) elementwise, p = sigmoid(logit); labels may be soft."""
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none")


def squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return (output - y)^2 elementwise, for labels that are amounts."""
    return (outputs - labels).square()


def poisson(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return exp(output) - y * output elementwise, for labels that are counts; exp(output) is the expected count."""
    return outputs.exp() - labels * outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """How one column of the labels enters the loss."""

    loss: PointLoss = cross_entropy
    """Elementwise (outputs [B], labels [B]) -> [B]."""
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ConfigError(f"Task: weight must be finite and not negative; got {self.weight}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiTaskLoss:
    """Weighted sum over samples and tasks; `tasks` has one entry per label column."""

    tasks: tuple[Task, ...]

    def __call__(self, logits: Tensor, batch: "Batch") -> Tensor:
        """Return the scalar sum of logits [B, T].

        Raises:
            ValueError: logits or labels do not have one column per task.
        """
        shape = (batch.labels.shape[0], len(self.tasks))
        if logits.shape != shape or batch.labels.shape != shape:
            raise ValueError(
                f"{len(self.tasks)} tasks need logits and labels {list(shape)}; "
                f"got {list(logits.shape)} and {list(batch.labels.shape)}"
            )
        labels = batch.labels
        if batch.label_mask is not None:
            labels = torch.where(batch.label_mask, labels, 0.0)
        columns = [
            task.weight * task.loss(outputs.float(), targets)
            for task, outputs, targets in zip(self.tasks, logits.unbind(1), labels.unbind(1), strict=True)
        ]
        losses = torch.stack(columns, dim=1)
        if batch.label_weights is not None:
            losses = losses * batch.label_weights
        if batch.label_mask is not None:
            losses = torch.where(batch.label_mask, losses, 0.0)
        return (losses.sum(1) * batch.weights).sum()


def binary_loss(logits: Tensor, batch: "Batch") -> Tensor:
    """Return the summed cross-entropy of logits [B, T], every task alike."""
    return MultiTaskLoss(tasks=(Task(),) * logits.shape[1])(logits, batch)


def softmax_loss(logits: Tensor, batch: "Batch") -> Tensor:
    """Return the summed softmax loss of logits [B, 1 + N] whose column 0 is the positive; -inf marks no candidate.

    A sample counts by its weight times its label (all 1 when the batch has no labels).
    """
    weights = batch.weights if batch.labels.shape[1] == 0 else batch.weights * batch.labels[:, 0]
    return -(logits.float().log_softmax(1)[:, 0] * weights).sum()
