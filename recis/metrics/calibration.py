"""Whether predicted probabilities are right on average: PCOC, and the curve over bins of the prediction.

    PCOC = sum w p / sum w y            1 = calibrated, above 1 = predicts too many
    bin b: mean prediction and mean label of the rows with p in [b / N, (b + 1) / N); 1 belongs to the last bin

Sums are exact, so neither order nor split changes a bit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from recis.errors import ConfigError
from recis.metrics.exact_sum import ExactSum
from recis.metrics.metric import Metric, Rows


@dataclass
class Calibration(Metric):
    """PCOC: predicted over observed positives; NaN without positives. `curve()` gives the same per bin."""

    num_bins: int = 20
    """Bins of `curve()`, of equal width over [0, 1]."""

    uses_weights: ClassVar[bool] = True
    binary_labels: ClassVar[bool] = False
    probabilities: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.num_bins < 1:
            raise ConfigError(f"Calibration: num_bins must be at least 1; got {self.num_bins}")
        self.reset()

    @property
    def key(self) -> str:
        return "pcoc"

    def reset(self) -> None:
        self._bins = [(ExactSum(), ExactSum(), ExactSum()) for _ in range(self.num_bins)]  # weight, prediction, label

    def compute(self) -> float:
        total = [ExactSum(), ExactSum(), ExactSum()]
        for sums in self._bins:
            for all_rows, of_bin in zip(total, sums, strict=True):
                all_rows.merge(of_bin)
        positives = total[2].value()
        return total[1].value() / positives if positives else math.nan

    def curve(self) -> dict[str, Tensor]:
        """Return float64 [num_bins] each: `weight`, and `prediction` and `label`, means that are NaN in an empty bin."""
        values = np.array([[column.value() for column in sums] for sums in self._bins])
        with np.errstate(invalid="ignore"):
            means = values[:, 1:] / values[:, :1]
        columns = {"weight": values[:, 0], "prediction": means[:, 0], "label": means[:, 1]}
        return {name: torch.from_numpy(column.copy()) for name, column in columns.items()}

    def _add(self, rows: Rows) -> None:
        weight = rows.weights()
        bins = np.minimum((rows.score * self.num_bins).astype(np.int64), self.num_bins - 1)
        order = np.argsort(bins)
        stops = np.searchsorted(bins[order], np.arange(self.num_bins + 1))
        columns = [column[order] for column in (weight, weight * rows.score, weight * rows.label)]
        for number, sums in enumerate(self._bins):
            if stops[number] < stops[number + 1]:
                for total, column in zip(sums, columns, strict=True):
                    total.add(column[stops[number] : stops[number + 1]])

    def _merge(self, other: Self) -> None:
        for sums, more in zip(self._bins, other._bins, strict=True):
            for total, addend in zip(sums, more, strict=True):
                total.merge(addend)

    def _state(self) -> dict[str, Any]:
        return {"bins": torch.stack([total.state() for sums in self._bins for total in sums])}

    def _load(self, state: Mapping[str, Any]) -> None:
        bins = state["bins"]
        if len(bins) != 3 * self.num_bins:
            raise ValueError(f"state of a Calibration must have {3 * self.num_bins} sums; got {len(bins)}")
        for number, sums in enumerate(self._bins):
            for column, total in enumerate(sums):
                total.load(bins[3 * number + column])
