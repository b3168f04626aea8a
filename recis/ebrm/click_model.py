"""Clicks drawn from gold relevance: a noisy ranker shows ten items, shoppers click by relevance and by position.

shown = top 10 of the candidates by gold + N(0, 0.7)
P(click at position k) = (0.02 + 0.55 * gold) / (1 + 0.25 (k - 1))          k from 1
"""

from dataclasses import dataclass

import numpy as np

NUM_SHOWN, NOISE_SCALE = 10, 0.7
BASE_RATE, GAIN, POSITION_DECAY = 0.02, 0.55, 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Sessions:
    """What S sessions of one query showed and got, K = min(10, candidates) items each."""

    shown: np.ndarray
    """int64 [S, K]: positions in the candidates, in display order."""
    clicked: np.ndarray
    """bool [S, K]."""


def draw_sessions(gold: np.ndarray, num_sessions: int, rng: np.random.Generator) -> Sessions:
    """Return sessions over candidates [C] of one query with gold relevance in [0, 1].

    Raises:
        ValueError: gold is not 1-D or outside [0, 1], or num_sessions is negative.
    """
    if gold.ndim != 1 or (len(gold) and not (gold.min() >= 0 and gold.max() <= 1)):
        raise ValueError(f"gold must be [C] in [0, 1]; got shape {gold.shape}")
    if num_sessions < 0:
        raise ValueError(f"num_sessions must not be negative; got {num_sessions}")
    noisy = gold + rng.normal(0.0, NOISE_SCALE, (num_sessions, len(gold)))
    shown = np.argsort(-noisy, axis=1, kind="stable")[:, :NUM_SHOWN]
    chance = click_chance(gold[shown], np.arange(1, shown.shape[1] + 1))
    return Sessions(shown=shown, clicked=rng.random(shown.shape) < chance)


def click_chance(gold: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Return P(click) for items of given gold relevance at positions from 1; shapes broadcast."""
    return (BASE_RATE + GAIN * gold) / (1 + POSITION_DECAY * (position - 1))
