"""How sure a measured value is: percentile bootstrap intervals, over rows or over whole groups.

    draw the units (rows, or groups with all their rows) again with replacement, compute the statistic, take quantiles

Rows of one user are not independent, so an interval over rows is too narrow for anything measured per user: give `groups`.
A difference of two models is best put into one statistic, so that both see the same draws. Cost: num_resamples calls of the
statistic. Source: Efron & Tibshirani 1993, chapter 13.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A value with its confidence interval."""

    value: float
    """The statistic over all rows."""
    low: float
    high: float
    level: float
    """Confidence, 0.95 = 95 %."""

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    num_rows: int,
    *,
    groups: Tensor | np.ndarray | None = None,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the statistic with its percentile interval.

    Args:
        statistic: takes row numbers int64 [M] (with repeats) and returns a number; NaN draws (a class missing) are left out.
        num_rows: N; the value is statistic(0 .. N - 1).
        groups: [N] integer ids; whole groups are drawn. None draws rows.
        num_resamples: draws.
        level: confidence in (0, 1).
        seed: equal seeds give equal intervals.

    Returns:
        The interval; low and high are NaN when more than half of the draws were NaN.

    Raises:
        ValueError: no rows, fewer than 2 resamples, a level outside (0, 1), groups of another length.
    """
    if num_rows < 1:
        raise ValueError(f"bootstrap needs at least one row; got {num_rows}")
    if num_resamples < 2:
        raise ValueError(f"num_resamples must be at least 2; got {num_resamples}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1); got {level}")
    draw = _row_draws(num_rows) if groups is None else _group_draws(num_rows, torch.as_tensor(groups).cpu().numpy())
    rng = np.random.Generator(np.random.Philox(seed))
    draws = np.array([statistic(draw(rng)) for _ in range(num_resamples)], dtype=np.float64)
    draws = draws[~np.isnan(draws)]
    low = high = math.nan
    if 2 * len(draws) >= num_resamples:
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return Interval(value=float(statistic(np.arange(num_rows))), low=low, high=high, level=level)


def _row_draws(num_rows: int) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda rng: rng.integers(0, num_rows, num_rows)


def _group_draws(num_rows: int, groups: np.ndarray) -> Callable[[np.random.Generator], np.ndarray]:
    if groups.shape != (num_rows,):
        raise ValueError(f"groups must be [{num_rows}], one per row; got {groups.shape}")
    order = np.argsort(groups, kind="stable")
    _, starts = np.unique(groups[order], return_index=True)
    lengths = np.diff(np.append(starts, num_rows))

    def draw(rng: np.random.Generator) -> np.ndarray:
        picked = rng.integers(0, len(starts), len(starts))
        sizes = lengths[picked]
        inside = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return order[np.repeat(starts[picked], sizes) + inside]

    return draw
