"""Area under the ROC curve, exact and binned.

    AUC = P(score+ > score-) + 1/2 P(score+ = score-)         for a random positive and a random negative row

`ExactAuc` keeps every row (16 bytes) and sorts: exact, weighted, memory bounded by spilling to disk. `BinnedAuc` keeps
four counts per threshold, so its state has a fixed size whatever the number of rows; its error is what happens in a bin.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch

from recis.errors import ConfigError
from recis.metrics.metric import Metric, Rows
from recis.metrics.pairs import auc_of, close_pass, fold_rows, new_carry, packed_counts
from recis.metrics.runs import SortedRuns


def signed_rows(rows: Rows) -> tuple[np.ndarray, ...]:
    """Return ((group [N],) score [N], signed weight [N]), new arrays; the sign of a weight is the label.

    Rows of weight 0 are left out.
    """
    signed = rows.label.astype(np.float64)
    signed *= 2.0
    signed -= 1.0
    score = rows.score if rows.owns_score else rows.score.copy()
    score += 0.0  # makes -0.0 a plain 0
    columns = [score, signed]
    if rows.group is not None:
        columns.insert(0, rows.group.copy())
    if rows.weight is not None:
        signed *= rows.weight
        kept = rows.weight > 0
        columns = [column[kept] for column in columns]
    return tuple(columns)


@dataclass
class ExactAuc(Metric):
    """Weighted AUC with ties counted half; NaN while one class is missing."""

    memory_mib: int = 512
    """Memory for rows; beyond it sorted runs go to the temporary folder."""

    uses_weights: ClassVar[bool] = True

    @property
    def key(self) -> str:
        return "auc"

    def reset(self) -> None:
        self._runs = SortedRuns((("score", np.float64), ("signed_weight", np.float64)), memory_mib=self.memory_mib)

    def compute(self) -> float:
        if not self._runs.is_spilled:
            packed = packed_counts(None, *self._runs.buffered())
            if packed is not None:
                return float(auc_of(packed[1])[0])
        carry = new_carry()
        for scores, signed in self._runs.sorted():
            fold_rows(scores, signed, 0, len(scores), carry)
        return float(auc_of(close_pass(carry)[None])[0])

    def _add(self, rows: Rows) -> None:
        self._runs.append(signed_rows(rows))

    def _merge(self, other: Self) -> None:
        self._runs.extend(other._runs)

    def _state(self) -> dict[str, Any]:
        return self._runs.export()

    def _load(self, state: Mapping[str, Any]) -> None:
        self._runs.load(dict(state))


@dataclass
class BinnedAuc(Metric):
    """AUC by the trapezoid rule over (FPR, TPR) at T thresholds -1e-7, k / (T - 1), 1 + 1e-7.

    A score above the threshold is positive. With `smooth` s: TPR = (tp + s) / (tp + fn + s), FPR = fp / (fp + tn + s);
    s = 1e-6 is TensorFlow's and RecIS's. With s = 0 and one class missing the value is NaN. Unweighted: counts are whole.
    """

    num_thresholds: int = 200
    smooth: float = 0.0

    probabilities: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.num_thresholds < 2:
            raise ConfigError(f"BinnedAuc: num_thresholds must be at least 2; got {self.num_thresholds}")
        if not 0 <= self.smooth < math.inf:
            raise ConfigError(f"BinnedAuc: smooth must be finite and not negative; got {self.smooth}")
        self.reset()

    @property
    def key(self) -> str:
        return "binned_auc"

    @property
    def thresholds(self) -> np.ndarray:
        """Ascending, float64 [T]."""
        inner = np.arange(1, self.num_thresholds - 1) / (self.num_thresholds - 1)
        return np.concatenate([[-1e-7], inner, [1 + 1e-7]])

    def reset(self) -> None:
        self._counts = np.zeros((4, self.num_thresholds), dtype=np.int64)  # tp, fp, tn, fn

    def compute(self) -> float:
        tp, fp, tn, fn = self._counts.astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            recall = (tp + self.smooth) / (tp + fn + self.smooth)
            fall_out = fp / (fp + tn + self.smooth)
        return float(((fall_out[:-1] - fall_out[1:]) * (recall[:-1] + recall[1:]) / 2).sum())

    def _add(self, rows: Rows) -> None:
        # a score lies between two thresholds that multiplication finds up to rounding; two comparisons settle it exactly
        guess = np.minimum((rows.score * (self.num_thresholds - 1)).astype(np.int64), self.num_thresholds - 2)
        thresholds = self.thresholds
        passed = guess + (thresholds[guess] < rows.score) + (thresholds[guess + 1] < rows.score)
        cells = np.bincount(2 * passed + (rows.label > 0), minlength=2 * (self.num_thresholds + 1)).reshape(-1, 2)
        for label, (above, below) in ((1, (0, 3)), (0, (1, 2))):
            histogram = cells[:, label]
            self._counts[above] += histogram[::-1].cumsum()[::-1][1:]  # rows that passed threshold t: passed > t
            self._counts[below] += histogram.cumsum()[:-1]

    def _merge(self, other: Self) -> None:
        self._counts += other._counts

    def _state(self) -> dict[str, Any]:
        return {"counts": torch.from_numpy(self._counts.copy())}

    def _load(self, state: Mapping[str, Any]) -> None:
        counts = state["counts"].cpu().numpy()
        if counts.shape != self._counts.shape or counts.dtype != np.int64:
            raise ValueError(
                f"counts of a BinnedAuc must be int64 {self._counts.shape}; got {counts.dtype} {counts.shape}"
            )
        self._counts = counts.copy()
