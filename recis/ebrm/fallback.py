"""What a pair counts as when the encoder failed or had no time left: a logit that costs almost nothing, never cached."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from recis.ebrm.entities import type_of

Fallback = Callable[[str, Sequence[str]], np.ndarray]
"""(canonical query, entity ids [N]) -> logits [N]."""


@dataclass(frozen=True, slots=True)
class TypePriors:
    """One logit per type: how often a shopper accepts a value of it at all. Fitted in stage A; 0 where not given."""

    logits: dict[str, float] = field(default_factory=dict)

    def __call__(self, query: str, entities: Sequence[str]) -> np.ndarray:
        """Return logits [N]; the query plays no part."""
        return np.array([self.logits.get(type_of(entity), 0.0) for entity in entities], np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class AffineCosine:
    """slope * cosine + bias, of a bi-encoder whose entity vectors are at hand."""

    cosine: Fallback
    slope: float
    bias: float

    def __call__(self, query: str, entities: Sequence[str]) -> np.ndarray:
        """Return logits [N]."""
        return (self.slope * np.asarray(self.cosine(query, entities)) + self.bias).astype(np.float32)


def fit_affine_cosine(cosine: Fallback, cosines: np.ndarray, logits: np.ndarray) -> AffineCosine:
    """Return the affine map that fits logits [N] of the encoder to cosines [N] of the same pairs by least squares.

    Raises:
        ValueError: fewer than two different cosines.
    """
    if len(np.unique(cosines)) < 2:
        raise ValueError(f"an affine map needs at least two different cosines; got {len(cosines)} pairs")
    slope, bias = np.polyfit(np.asarray(cosines, np.float64), np.asarray(logits, np.float64), 1)
    return AffineCosine(cosine=cosine, slope=float(slope), bias=float(bias))
