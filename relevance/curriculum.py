"""Which prompts come in which stage, which are diverse enough, and which are uncertain enough for the pool.

    diversity    drop a prompt whose 8 labels have entropy < .54 bits, unless its step verdicts show 2 patterns
    stages       outcome only at logged accuracy .4-.9; steps at .1-.9; steps at .01-.5, hard families
    pool         hard families; prompts with max P(c|x) < .7 first; families, labels and decisions levelled by turns

All three are functions of files that were logged before RL, so workers and restarts agree. Source: diversity and stages are
named by TaoSR-SHE arXiv:2510.07972, the rules and numbers here are ours; the pool is that of DyKnow-RAG arXiv:2510.11122
(about 50,000 there), the disagreement key and its size here are ours.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recis.errors import ConfigError
from relevance.data import FAMILIES, HARD_FAMILIES, Pair
from relevance.sampling import AccuracyRange, level_round_robin

MIN_ENTROPY_BITS = 0.54
"""Just below the entropy of 7 equal labels of 8, .5436 bits (ours)."""


def label_entropy_bits(labels: Tensor) -> Tensor:
    """Return the entropy of the labels [Q, G] of each prompt, in bits, float64 [Q]; 0 stands for "no label" and counts."""
    shares = torch.stack([(labels == label).to(torch.float64).mean(1) for label in range(5)], dim=1)
    return torch.special.entr(shares).sum(1) / math.log(2)


def keep_diverse(
    labels: Tensor, step_rewards: Tensor | None = None, *, min_entropy_bits: float = MIN_ENTROPY_BITS
) -> Tensor:
    """Return [Q] bool: the labels [Q, G] vary enough, or the step verdicts [Q, G, K] show at least 2 patterns.

    NaN verdicts are equal to each other.
    """
    kept = label_entropy_bits(labels) >= min_entropy_bits
    if step_rewards is None:
        return kept
    patterns = step_rewards.nan_to_num(2.0)
    return kept | (patterns != patterns[:, :1]).any(-1).any(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage of the curriculum."""

    accuracy: AccuracyRange
    reward: str
    """"outcome" or "steps"."""
    share: float
    """Share of the run's steps."""
    families: tuple[str, ...] = FAMILIES

    def admits(self, pair: Pair, accuracy: float) -> bool:
        """Return whether a prompt with this logged accuracy belongs to the stage."""
        is_inside = bool(self.accuracy.contains(torch.tensor(accuracy, dtype=torch.float64)))
        return is_inside and pair.family in self.families


STAGES = (
    Stage(accuracy=AccuracyRange(low=0.4, high=0.9, closed=True), reward="outcome", share=0.3),
    Stage(accuracy=AccuracyRange(low=0.1, high=0.9, closed=True), reward="steps", share=0.4),
    Stage(accuracy=AccuracyRange(low=0.01, high=0.5, closed=True), reward="steps", share=0.3, families=HARD_FAMILIES),
)


def stage_at(step: int, num_steps: int, stages: Sequence[Stage] = STAGES) -> int:
    """Return the stage of a step, from the shares of the stages.

    Raises:
        ConfigError: the shares do not sum to 1.
    """
    if abs(sum(stage.share for stage in stages) - 1) > 1e-6:
        raise ConfigError(f"shares of the stages must sum to 1; got {[stage.share for stage in stages]}")
    end = 0.0
    for number, stage in enumerate(stages):
        end += stage.share
        if step < end * num_steps - 1e-9:
            return number
    return len(stages) - 1


def stage_positions(pairs: Sequence[Pair], accuracies: Sequence[float], stage: Stage) -> list[int]:
    """Return the positions of the pairs that a stage trains on, from their logged accuracies (NaN = not logged: left out)."""
    return [
        position
        for position, (pair, accuracy) in enumerate(zip(pairs, accuracies, strict=True))
        if stage.admits(pair, accuracy)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """The pool of uncertain prompts."""

    max_confidence: float = 0.7
    """Prompts whose most probable label has less than this come first."""
    families: tuple[str, ...] = HARD_FAMILIES
    size: int = 6000

    def __post_init__(self) -> None:
        unknown = [family for family in self.families if family not in FAMILIES]
        if unknown or self.size < 1 or not 0 < self.max_confidence <= 1:
            raise ConfigError(
                f"pool: families out of {', '.join(FAMILIES)}, size >= 1, max_confidence in (0, 1]; got {self.families}, "
                f"{self.size}, {self.max_confidence}"
            )


def uncertainty_pool(
    pairs: Sequence[Pair],
    probs: Tensor,
    *,
    config: PoolConfig | None = None,
    disagreement: Tensor | None = None,
    seed: int = 0,
) -> list[int]:
    """Return the positions of the pool in its order: uncertain prompts before confident ones, each levelled by turns.

    Args:
        pairs: train pairs.
        probs: [N, 4] label probabilities of the frozen SFT checkpoint.
        config: see its fields.
        disagreement: [N], |p of another model - P(label 4)|: the larger, the earlier within a turn. None orders by confidence.
        seed: of ties.

    Turns go over (family, label, annotated context decision).
    """
    config = config or PoolConfig()
    if probs.shape != (len(pairs), 4):
        raise ValueError(f"probs must be [{len(pairs)}, 4]; got {tuple(probs.shape)}")
    confidence = probs.amax(1).tolist()
    priority = [-value for value in confidence] if disagreement is None else disagreement.tolist()
    chosen = [number for number, pair in enumerate(pairs) if pair.family in config.families]
    pool: list[int] = []
    for is_first in (True, False):
        part = [number for number in chosen if (confidence[number] < config.max_confidence) == is_first]
        keys = [(pairs[n].family, pairs[n].label, _decision(pairs[n])) for n in part]
        order = level_round_robin(keys, [priority[n] for n in part], config.size - len(pool), seed=seed)
        pool.extend(part[place] for place in order)
    return pool


def _decision(pair: Pair) -> str | None:
    return None if pair.chunk is None else pair.chunk.decision


def pool_summary(pairs: Sequence[Pair], positions: Sequence[int]) -> dict[str, dict[str, int]]:
    """Return how often each family and each label occurs in a pool, for the log."""
    return {
        "family": dict(Counter(pairs[number].family for number in positions)),
        "label": dict(Counter(str(pairs[number].label) for number in positions)),
    }
