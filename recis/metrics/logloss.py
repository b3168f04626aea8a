"""Cross-entropy of predicted probabilities, plain and normalised.

    LogLoss = - sum w (y ln p + (1 - y) ln(1 - p)) / sum w          p clipped to [1e-7, 1 - 1e-7], natural log
    NE      = LogLoss / H(r),  r = sum w y / sum w,  H(r) = - r ln r - (1 - r) ln(1 - r)

NE below 1 means better than always predicting the base rate r (He et al. 2014, "Practical lessons from predicting clicks
on ads at Facebook"). Sums are exact, so neither order nor split changes a bit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from recis.metrics.exact_sum import ExactSum
from recis.metrics.metric import Metric, Rows

CLIP = 1e-7
_SUMS = ("loss", "label", "weight")


@dataclass
class LogLoss(Metric):
    """Weighted mean cross-entropy; labels may be anything in [0, 1]; NaN without weight."""

    uses_weights: ClassVar[bool] = True
    binary_labels: ClassVar[bool] = False
    probabilities: ClassVar[bool] = True

    @property
    def key(self) -> str:
        return "logloss"

    def reset(self) -> None:
        self._sums = {name: ExactSum() for name in _SUMS}

    def compute(self) -> float:
        weight = self._sums["weight"].value()
        return self._sums["loss"].value() / weight if weight else math.nan

    def _add(self, rows: Rows) -> None:
        weight, label = rows.weights(), rows.label.astype(np.float64)
        p = rows.score.clip(CLIP, 1 - CLIP)
        loss = -(label * np.log(p) + (1 - label) * np.log1p(-p))
        for name, numbers in zip(_SUMS, (weight * loss, weight * label, weight), strict=True):
            self._sums[name].add(numbers)

    def _merge(self, other: Self) -> None:
        for name in _SUMS:
            self._sums[name].merge(other._sums[name])

    def _state(self) -> dict[str, Any]:
        return {name: self._sums[name].state() for name in _SUMS}

    def _load(self, state: Mapping[str, Any]) -> None:
        for name in _SUMS:
            self._sums[name].load(state[name])


@dataclass
class Ne(LogLoss):
    """Normalised entropy; NaN where the mean label is 0 or 1, whose entropy is 0."""

    @property
    def key(self) -> str:
        return "ne"

    def compute(self) -> float:
        weight = self._sums["weight"].value()
        rate = self._sums["label"].value() / weight if weight else math.nan
        if not 0 < rate < 1:
            return math.nan
        entropy = -rate * math.log(rate) - (1 - rate) * math.log1p(-rate)
        return self._sums["loss"].value() / weight / entropy
