"""Which prompts are worth training on, from how many of their sampled answers are right.

    pass@k = 1 - C(n - c, k) / C(n, k)                  c of n samples right
    difficulty: 0 < c < gamma, or an accuracy range     a group that is all right or all wrong teaches nothing
    class balance: every label as often as the rarest   queries are kept or dropped whole as far as it goes

Everything looks at raw correctness, never at a shaped or normalised reward; all draws come from a seed and none depends on the
number of workers. Source: pass@k, arXiv:2107.03374; the difficulty filter, class balance and their reason, TaoSR1
arXiv:2508.12365; the range .01 to .9, DyKnow-RAG arXiv:2510.11122; the ties and the order of draws are ours.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recis.errors import ConfigError
from relevance.data import Pair


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyRange:
    """Which group accuracies are kept."""

    low: float = 0.0
    high: float = 1.0
    closed: bool = False
    """Keep the ends too."""

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ConfigError(f"an accuracy range needs 0 <= low <= high <= 1; got {self.low}, {self.high}")

    def contains(self, accuracy: Tensor) -> Tensor:
        """Return bool, shaped as `accuracy`; NaN is outside."""
        if self.closed:  # 9 of 10 right is .9, whatever the division gives
            return (accuracy >= self.low - 1e-9) & (accuracy <= self.high + 1e-9)
        return (accuracy > self.low + 1e-9) & (accuracy < self.high - 1e-9)


MIXED = AccuracyRange()
"""Some right, some wrong: 0 < c < G."""
DYKNOW_RANGE = AccuracyRange(low=0.01, high=0.9, closed=True)


def pass_at_k(num_correct: Tensor, num_samples: int, k: int) -> Tensor:
    """Return the chance that k of n samples, drawn without putting back, hold a right one, float64, shaped as num_correct.

    Raises:
        ValueError: k outside 1..n, or counts outside 0..n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k must lie in 1..{num_samples}; got {k}")
    if num_correct.numel() and not 0 <= int(num_correct.min()) <= int(num_correct.max()) <= num_samples:
        raise ValueError(f"num_correct must lie in 0..{num_samples}")
    table = [1 - math.comb(num_samples - c, k) / math.comb(num_samples, k) for c in range(num_samples + 1)]
    return torch.tensor(table, dtype=torch.float64, device=num_correct.device)[num_correct.long()]


def keep_difficulty(correct: Tensor, *, gamma: int | None = None, accuracy: AccuracyRange = MIXED) -> Tensor:
    """Return [Q] bool: groups whose number of right rollouts c is in range.

    Args:
        correct: [Q, G] bool, raw correctness.
        gamma: keep 0 < c < gamma as well as the range; None = G.
        accuracy: range of c / G.
    """
    if correct.ndim != 2 or correct.shape[1] < 1:
        raise ValueError(f"correct must be [Q, G]; got {tuple(correct.shape)}")
    group_size = correct.shape[1]
    right = correct.long().sum(1)
    kept = accuracy.contains(right.to(torch.float64) / group_size)
    return kept if gamma is None else kept & (right > 0) & (right < gamma)


def keep_two_groups(without: Tensor, with_chunk: Tensor, *, accuracy: AccuracyRange = DYKNOW_RANGE) -> Tensor:
    """Return [Q] bool: the accuracy over both groups [Q, n] together is in range; each alone may be unanimous."""
    return keep_difficulty(torch.cat([without, with_chunk], dim=1), accuracy=accuracy)


def coefficient_of_variation(counts: Sequence[int]) -> float:
    """Return population std over mean of label counts; 0 = balanced."""
    table = np.asarray(counts, dtype=np.float64)
    return float(table.std() / table.mean()) if table.size and table.mean() else 0.0


def balance_labels(pairs: Sequence[Pair], *, seed: int) -> list[int]:
    """Return the positions of pairs that are kept so that each label occurs as often as the rarest one that occurs.

    Queries are visited in an order drawn from the seed; of each query those pairs are kept whose label still has room. A
    query never crosses a split: call it per split, before any filter. Unlabelled pairs are dropped.
    """
    if len({pair.split for pair in pairs}) > 1:
        raise ValueError("balance_labels takes the pairs of one split: a query must not be on both sides")
    counts: dict[int, int] = {}
    by_query: dict[str, list[int]] = {}
    for position, pair in enumerate(pairs):
        if pair.label is not None:
            counts[pair.label] = counts.get(pair.label, 0) + 1
            by_query.setdefault(pair.query_id, []).append(position)
    room = dict.fromkeys(counts, min(counts.values(), default=0))
    rng = np.random.Generator(np.random.Philox(seed))
    queries = list(by_query.values())
    kept = []
    for number in rng.permutation(len(queries)):
        for position in queries[number]:
            label = pairs[position].label
            if label is not None and room[label]:
                room[label] -= 1
                kept.append(position)
    return sorted(kept)


def level_round_robin(keys: Sequence[object], priority: Sequence[float], num_kept: int, *, seed: int) -> list[int]:
    """Return positions, taken in turn from every distinct key, within a key by falling priority; ties by seed.

    Stops at num_kept, or when all are taken. The order returned is the order of taking.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    ties = rng.permutation(len(keys))
    queues: dict[object, list[int]] = {}
    for position in sorted(range(len(keys)), key=lambda row: (-priority[row], ties[row])):
        queues.setdefault(keys[position], []).append(position)
    order = sorted(queues.values(), key=lambda queue: str(keys[queue[0]]))
    taken: list[int] = []
    depth = 0
    while len(taken) < num_kept and any(depth < len(queue) for queue in order):
        taken.extend(queue[depth] for queue in order if depth < len(queue))
        depth += 1
    return taken[:num_kept]


def label_histogram(labels: Sequence[int | None]) -> Mapping[int, int]:
    """Return label -> how many have it; None is left out."""
    counts: dict[int, int] = {}
    for label in labels:
        if label is not None:
            counts[label] = counts.get(label, 0) + 1
    return dict(sorted(counts.items()))
