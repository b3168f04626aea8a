"""What another policy would have earned, from a log of actions whose probabilities were logged.

    ratio = target probability / logged probability of the logged action                  per row
    IPS   = mean(ratio * reward)                                  unbiased where the log could take every action of the target
    SNIPS = sum(ratio * reward) / sum(ratio)                      self-normalised: a little bias, far less variance

Intervals are normal: IPS with the standard error of its mean, SNIPS by the delta method on the quotient. `num_effective` =
(sum ratio)^2 / sum ratio^2 says how many rows the estimate really rests on; below about a hundred trust neither. With rare
rewards use `recis.metrics.bootstrap` beside it. Sources: Horvitz & Thompson 1952; Swaminathan & Joachims 2015.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recis.errors import DataError
from recis.metrics.intervals import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyValue:
    """Expected reward per action of the target policy."""

    interval: Interval
    num_effective: float
    """Effective number of rows."""
    num_clipped: int
    """Rows whose ratio was cut to max_ratio."""


def ips(
    rewards: Tensor | np.ndarray,
    logged: Tensor | np.ndarray,
    target: Tensor | np.ndarray,
    *,
    max_ratio: float | None = None,
    level: float = 0.95,
) -> PolicyValue:
    """Return the inverse-propensity estimate.

    Args:
        rewards: [N] finite.
        logged: [N] probability with which the log took the action, in (0, 1].
        target: [N] probability with which the target policy takes it, in [0, 1].
        max_ratio: larger ratios are cut to this, which lowers variance and value; None keeps them.
        level: confidence in (0, 1).

    Raises:
        DataError: a probability outside its range or a reward that is not finite, with row and value.
        ValueError: lengths differ, there are no rows, level or max_ratio is outside its range.
    """
    reward, ratio, clipped = _ratios(rewards, logged, target, max_ratio, level)
    terms = ratio * reward
    return _estimate(float(terms.mean()), terms - terms.mean(), ratio, clipped, level)


def snips(
    rewards: Tensor | np.ndarray,
    logged: Tensor | np.ndarray,
    target: Tensor | np.ndarray,
    *,
    max_ratio: float | None = None,
    level: float = 0.95,
) -> PolicyValue:
    """Return the self-normalised estimate; arguments and errors as `ips`. NaN when all ratios are 0."""
    reward, ratio, clipped = _ratios(rewards, logged, target, max_ratio, level)
    mean_ratio = ratio.mean()
    value = float((ratio * reward).mean() / mean_ratio) if mean_ratio else math.nan
    residuals = ratio * (reward - value) / mean_ratio if mean_ratio else np.full_like(ratio, math.nan)
    return _estimate(value, residuals, ratio, clipped, level)


def _estimate(value: float, residuals: np.ndarray, ratio: np.ndarray, clipped: int, level: float) -> PolicyValue:
    """Interval of a mean with these residuals; one row says nothing about spread, so its interval is NaN."""
    num_rows = len(residuals)
    error = math.sqrt(float((residuals**2).sum()) / (num_rows - 1) / num_rows) if num_rows > 1 else math.nan
    half = NormalDist().inv_cdf((1 + level) / 2) * error
    squares = float((ratio**2).sum())
    return PolicyValue(
        interval=Interval(value=value, low=value - half, high=value + half, level=level),
        num_effective=float(ratio.sum()) ** 2 / squares if squares else 0.0,
        num_clipped=clipped,
    )


def _ratios(
    rewards: Any, logged: Any, target: Any, max_ratio: float | None, level: float
) -> tuple[np.ndarray, np.ndarray, int]:
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1); got {level}")
    if max_ratio is not None and not max_ratio > 0:
        raise ValueError(f"max_ratio must be above 0 or None; got {max_ratio}")
    columns = [torch.as_tensor(column).detach().cpu().double().numpy() for column in (rewards, logged, target)]
    if any(column.shape != (len(columns[0]),) for column in columns) or not len(columns[0]):
        raise ValueError(f"rewards, logged and target must be [N], N > 0; got {[column.shape for column in columns]}")
    reward, taken, wanted = columns
    _refuse(~np.isfinite(reward), "reward", reward, "a reward must be finite")
    _refuse(~((taken > 0) & (taken <= 1)), "logged", taken, "a logged probability must lie in (0, 1]")
    _refuse(~((wanted >= 0) & (wanted <= 1)), "target", wanted, "a target probability must lie in [0, 1]")
    ratio = wanted / taken
    clipped = 0
    if max_ratio is not None:
        clipped = int((ratio > max_ratio).sum())
        ratio = ratio.clip(max=max_ratio)
    return reward, ratio, clipped


def _refuse(bad: np.ndarray, column: str, values: np.ndarray, rule: str) -> None:
    if bad.any():
        row = int(bad.argmax())
        raise DataError(rule, row=row, column=column, value=float(values[row]), option="leave such rows out")
