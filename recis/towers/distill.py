"""Learn from a teacher's scores too: the run's own loss, plus how far the student's probability is from the teacher's.

    loss = (1 - w) * own loss + w * T^2 * sum_b w_b KL(teacher_b ; sigmoid(z_b / T))        over samples that have a teacher

A teacher's column holds a probability in [0, 1] per sample, NaN where it said nothing; such a sample learns from its label
alone, with weight 1. `read_scores` makes that column of the score files of relevance: p = [p1 .. pn] over grades 1 .. n gives
the probability of a grade of at least `from_grade`. T^2 keeps the gradient's size as T grows (Hinton et al. 2015,
arXiv:1503.02531).
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recis.errors import ConfigError, DataError, nearest
from recis.models.losses import binary_loss

if TYPE_CHECKING:
    from recis.io.batch import Batch

SCORE_KEYS = frozenset(("id", "label", "p", "tier", "b_cum", "rationale", "violations", "model"))
_SUM_TOLERANCE = 1e-3  # of a teacher's probabilities


@dataclass(frozen=True, slots=True, kw_only=True)
class Distilled:
    """loss(logits, batch) -> scalar, summed over samples by their weights; for TrainConfig.loss."""

    column: str
    """Of the teacher's probabilities, in batch.extras."""
    weight: float = 0.5
    """w."""
    temperature: float = 1.0
    """T."""
    own: Callable[[Tensor, Any], Tensor] = binary_loss
    """The loss that labels have; reads batch.weights."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1 or not 0 < self.temperature < math.inf:
            raise ConfigError(
                f"Distilled: weight must lie in [0, 1], temperature above 0; got {self.weight}, {self.temperature}"
            )

    def __call__(self, logits: Tensor, batch: "Batch") -> Tensor:
        """Return the scalar; the student's logit is column 0 of logits [B, T].

        Raises:
            ConfigError: the batch has no such column.
            DataError: a probability is not in [0, 1].
        """
        from dataclasses import replace

        teacher = batch.extras.get(self.column)
        if not isinstance(teacher, Tensor):
            raise ConfigError(
                f"Distilled: batch.extras has no column {self.column!r}; {nearest(self.column, batch.extras)}"
            )
        teacher = teacher.reshape(-1).float()
        has = teacher.isfinite()
        wrong = has & ((teacher < 0) | (teacher > 1)) | teacher.isinf()
        if teacher.device.type == "cpu" and bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise DataError(
                "a teacher's probability must lie in [0, 1], or be NaN for none",
                row=row, column=self.column, value=float(teacher[row]),
            )  # fmt: skip
        share = torch.where(has, self.weight, 0.0)
        own = self.own(logits, replace(batch, weights=batch.weights * (1 - share)))
        target = torch.where(has, teacher, 0.5)
        apart = _divergence(logits[:, 0].float() / self.temperature, target)
        return own + self.temperature**2 * (apart * batch.weights * share).sum()


def _divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Return KL(target ; sigmoid(logit)) elementwise [B]; 0 where they agree."""
    entropy = -torch.special.xlogy(target, target) - torch.special.xlogy(1 - target, 1 - target)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none") - entropy


def read_scores(path: str | Path, *, from_grade: int = 3) -> dict[str, float]:
    """Return {pair id: probability that the grade is at least from_grade} of a JSONL score file.

    Raises:
        DataError: a line is no such record, has an unknown key, repeats an id, or its p is no distribution over grades.
    """
    found: dict[str, float] = {}
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            name, p = _record(line, str(path), number)
            if name in found:
                raise DataError("a pair is scored twice", file=str(path), row=number, column="id", value=name)
            if not 1 <= from_grade <= len(p):
                raise ConfigError(f"from_grade must lie in [1, {len(p)}], the grades of {path}; got {from_grade}")
            found[name] = min(1.0, sum(p[from_grade - 1 :]))
    return found


def _record(line: str, file: str, number: int) -> tuple[str, list[float]]:
    try:
        record = json.loads(line)
        unknown = sorted(record.keys() - SCORE_KEYS)
        name, p = record["id"], [float(value) for value in record["p"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"is no score record: {error!r}", file=file, row=number) from error
    if unknown:
        raise DataError(
            "an unknown key", file=file, row=number, column=unknown[0], option=nearest(unknown[0], SCORE_KEYS)
        )
    if not isinstance(name, str) or not p or min(p) < 0 or not abs(sum(p) - 1) <= _SUM_TOLERANCE:
        raise DataError(
            "id must be a string, p probabilities that sum to 1", file=file, row=number, column="p", value=p
        )
    return name, p
