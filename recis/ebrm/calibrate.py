"""From r to a probability, and from g to a verdict: small fits on labelled development pairs.

    p = sigmoid(a logit(r) + b),   logit(r) = log r - log(1 - r),   a > 0

Every further type makes r smaller even where all is well, so no cut on r itself means anything.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from recis.errors import ConfigError, RecisError

MAX_NEWTON_STEPS = 200
NEAR_SHARE = 0.05  # of met categories, which may lie below `near`
_MAX_LOG = -1e-30
_RIDGE = 1e-6  # keeps a and b finite where the labels can be separated
_LOG_2 = float(np.log(2.0))


class NotCalibratedError(RecisError, RuntimeError):
    """A probability was asked of a model whose calibrator was not fitted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibrator:
    """p = sigmoid(a logit(r) + b)."""

    a: float
    b: float

    def __post_init__(self) -> None:
        if not (0 < self.a < float("inf")) or not np.isfinite(self.b):
            raise ConfigError(f"calibrator: a must be above 0 and b finite; got a={self.a}, b={self.b}")

    def probability(self, log_r: np.ndarray) -> np.ndarray:
        """Return p [I] float64 of log r [I]."""
        z = self.a * logit_of(log_r) + self.b
        return np.exp(-np.logaddexp(0.0, -z))

    def to_json(self) -> dict[str, float]:
        """Return a and b."""
        return asdict(self)


def logit_of(log_r: np.ndarray) -> np.ndarray:
    """Return logit(r) [I] float64 of log r [I]; r = 1 counts as log r = -1e-30, which gives 69.1."""
    x = np.minimum(np.asarray(log_r, np.float64), _MAX_LOG)
    near = x > -_LOG_2
    other = np.where(near, np.log(-np.expm1(np.where(near, x, -1.0))), np.log1p(-np.exp(np.where(near, -1.0, x))))
    return x - other


def fit_calibrator(log_r: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> Calibrator:
    """Fit a and b by logistic regression of labels in {0, 1} on logit(r): Newton with halved steps.

    Raises:
        ValueError: shapes differ, a NaN, only one class, or scores that fall as labels rise (a would be <= 0).
    """
    x, y = logit_of(log_r), np.asarray(labels, np.float64)
    w = np.ones_like(y) if weights is None else np.asarray(weights, np.float64)
    if x.ndim != 1 or x.shape != y.shape or y.shape != w.shape:
        raise ValueError(f"log_r, labels and weights must be [N]; got {x.shape}, {y.shape}, {w.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and np.isfinite(w).all()):
        raise ValueError("log_r, labels and weights must be finite; find the NaN among the pairs")
    if not (w[y > 0.5].sum() > 0 and w[y <= 0.5].sum() > 0):
        raise ValueError(
            f"a calibrator needs relevant and irrelevant pairs; got {int((y > 0.5).sum())} of {len(y)} relevant"
        )
    design = np.stack([x, np.ones_like(x)], axis=1)
    ridge = _RIDGE * w.sum()
    theta = np.array([1.0, 0.0])
    loss = _loss(design, y, w, theta, ridge)
    for _ in range(MAX_NEWTON_STEPS):
        p = np.exp(-np.logaddexp(0.0, -(design @ theta)))
        gradient = design.T @ (w * (p - y)) + ridge * theta
        hessian = (design * (w * p * (1 - p))[:, None]).T @ design + ridge * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        scale = 1.0
        while scale > 1e-10 and _loss(design, y, w, theta - scale * step, ridge) > loss:
            scale /= 2
        theta = theta - scale * step
        before, loss = loss, _loss(design, y, w, theta, ridge)
        if before - loss <= 1e-12 * (1 + abs(loss)):
            break
    if theta[0] <= 0:
        raise ValueError(
            f"r falls where labels rise (a = {theta[0]:.3g}): the model is worse than chance on these pairs"
        )
    return Calibrator(a=float(theta[0]), b=float(theta[1]))


def _loss(design: np.ndarray, y: np.ndarray, w: np.ndarray, theta: np.ndarray, ridge: float) -> float:
    z = design @ theta
    return float((w * (np.logaddexp(0.0, z) - y * z)).sum() + ridge * (theta @ theta) / 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class VerdictThresholds:
    """Cuts that make verdicts of g; the defaults are those of an unfitted model."""

    ok: float = 0.5
    """g from which a constrained type is met."""
    match: float = 0.5
    near: float = 0.2
    """Of the category type."""
    constrained: float = 0.5
    """A type counts as constrained when s of its none entity is below."""

    def __post_init__(self) -> None:
        if not (0 <= self.near <= self.match <= 1 and 0 <= self.ok <= 1 and 0 <= self.constrained <= 1):
            raise ConfigError(f"thresholds must be in [0, 1], near at most match; got {asdict(self)}")

    def to_json(self) -> dict[str, float]:
        """Return the cuts."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "VerdictThresholds":
        """Return the thresholds that `to_json` wrote."""
        return VerdictThresholds(**data)


def fit_verdict_thresholds(
    *,
    g: np.ndarray,
    met: np.ndarray,
    category_g: np.ndarray,
    category_met: np.ndarray,
    s_none: np.ndarray,
    is_free: np.ndarray,
) -> VerdictThresholds:
    """Return the cuts that gold labels ask for; a cut whose labels are all of one kind keeps its default.

        ok, match     the most balanced accuracy on g of constrained types, and on g of the category
        constrained   likewise on s of the none entities: below it a type counts as constrained
        near          at most one met category in 20 lies below: "mismatch" is said of those alone; at most `match`

    Args:
        g: [N], g_t of slots that state a value of a constrained type.
        met: [N] in {0, 1}, whether the query accepts one of the values.
        category_g: [C], g of the category.
        category_met: [C] in {0, 1}.
        s_none: [M], s of none entities.
        is_free: [M] in {0, 1}, whether the query leaves the type free.
    """
    default = VerdictThresholds()
    match = _cut(category_g, category_met, default.match)
    near = min(default.near, match)
    if np.any(category_met):
        near = min(match, float(np.quantile(category_g[np.asarray(category_met) > 0.5], NEAR_SHARE, method="lower")))
    return VerdictThresholds(
        ok=_cut(g, met, default.ok), match=match, near=near, constrained=_cut(s_none, is_free, default.constrained)
    )


def _cut(g: np.ndarray, labels: np.ndarray, default: float) -> float:
    positive = np.asarray(labels) > 0.5
    return fit_threshold(g, positive) if positive.any() and not positive.all() else default


def fit_threshold(g: np.ndarray, labels: np.ndarray) -> float:
    """Return the cut on g [N] with the most balanced accuracy on gold labels [N]: the middle between two neighbours.

    Raises:
        ValueError: only one class.
    """
    order = np.argsort(g, kind="stable")
    g, positive = np.asarray(g, np.float64)[order], np.asarray(labels)[order] > 0.5
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative:
        raise ValueError(f"a threshold needs met and unmet labels; got {num_positive} of {len(g)} met")
    # cut k: the first k count as unmet; only cuts between different values exist
    kept = (
        np.concatenate([[0], np.cumsum(~positive)]) / num_negative
        + np.concatenate([[num_positive], num_positive - np.cumsum(positive)]) / num_positive
    )
    exists = np.concatenate([[True], g[1:] > g[:-1], [True]])
    best = int(np.argmax(np.where(exists, kept, -1.0)))
    low = g[best - 1] if best else 0.0
    high = g[best] if best < len(g) else 1.0
    return float((low + high) / 2)
