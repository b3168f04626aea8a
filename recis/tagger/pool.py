"""Keep the labelled spans that distillation trusts, and say which new ones are like them. The pool only grows.

    score(span) = sqrt(global * local)       enters when score >= 0.8 * threshold of its type
    global      mean over 50 draws of the cosine to the mean of 3 random members of the type
    local       largest cosine to a member
    threshold   smallest leave-one-out score among 100 sampled members

Vectors count hashed character n-grams of the span (3 to 5, with ends marked) and its two neighbours, so cosines are >= 0.
Source of choosing instances by global and local similarity: arXiv:2107.02282; vectors and numbers are ours.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from recis.tagger.text import BEGIN, END, Text

VECTOR_DIM = 512
NGRAM_CHARS = (3, 4, 5)

Place = tuple[int, int, int]  # text number, start, end
Vectors = Callable[[Sequence[Place]], np.ndarray]  # places -> [P, D], rows of length 1


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolEntry:
    """One labelled span of the pool."""

    text_id: str
    start: int
    end: int
    type: str
    rules: tuple[str, ...]
    round: int
    score: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """How like the pool a span must be."""

    draws: int = 50
    members_per_draw: int = 3
    threshold_members: int = 100
    slack: float = 0.8


class Pool:
    """Labelled spans by (text, start, end). The first label stays; nothing is taken out."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, int, int], PoolEntry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: tuple[str, int, int]) -> bool:
        return key in self._entries

    @property
    def entries(self) -> tuple[PoolEntry, ...]:
        """All entries in the order they came."""
        return tuple(self._entries.values())

    def type_of(self, text_id: str, start: int, end: int) -> str | None:
        """Return the type of a span, None when it is not in the pool."""
        entry = self._entries.get((text_id, start, end))
        return None if entry is None else entry.type

    def add(self, entry: PoolEntry) -> bool:
        """Put a span in; returns False, and changes nothing, when that span is in already."""
        key = (entry.text_id, entry.start, entry.end)
        if key in self._entries:
            return False
        self._entries[key] = entry
        return True


def hashed_vectors(texts: Sequence[Text], places: Sequence[Place]) -> np.ndarray:
    """Return [P, VECTOR_DIM] float32 with rows of length 1: character n-grams of the span and its two neighbours."""
    out = np.zeros((len(places), VECTOR_DIM), dtype=np.float32)
    for row, (number, start, end) in enumerate(places):
        text = texts[number]
        padded = (BEGIN, *text.tokens, END)
        word = f"^{text.surface(start, end)}$"
        grams = [word[at : at + size] for size in NGRAM_CHARS for at in range(max(1, len(word) - size + 1))]
        grams += [f"prev {padded[start]}", f"next {padded[end + 1]}"]
        for gram in grams:
            out[row, zlib.crc32(gram.encode()) % VECTOR_DIM] += 1
    return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)


def gate_scores(
    candidates: np.ndarray, members: np.ndarray, rng: np.random.Generator, config: GateConfig | None = None
) -> tuple[np.ndarray, float]:
    """Return the score of each candidate [C] and the score it must reach.

    Args:
        candidates: [C, D] rows of length 1.
        members: [M, D] the pool's vectors of the same type, M >= 1.
        rng: draws members; the same state gives the same scores.
    """
    config = config or GateConfig()
    means = np.stack([_draw(members, rng, config) for _ in range(config.draws)])
    scores = _score(candidates @ means.T, candidates @ members.T)
    if len(members) < 2:
        return scores, 0.0  # nothing to leave out: a single member cannot say what is usual
    sampled = rng.choice(len(members), size=min(config.threshold_members, len(members)), replace=False)
    left_out = []
    for member in sampled:
        rest = np.delete(members, member, axis=0)
        centres = np.stack([_draw(rest, rng, config) for _ in range(config.draws)])
        left_out.append(float(_score(members[member][None] @ centres.T, members[member][None] @ rest.T)[0]))
    return scores, config.slack * min(left_out)


def _draw(members: np.ndarray, rng: np.random.Generator, config: GateConfig) -> np.ndarray:
    mean = members[rng.integers(0, len(members), config.members_per_draw)].mean(axis=0)
    return mean / max(float(np.linalg.norm(mean)), 1e-12)


def _score(to_means: np.ndarray, to_members: np.ndarray) -> np.ndarray:
    return np.sqrt(np.clip(to_means.mean(axis=1), 0, None) * np.clip(to_members.max(axis=1), 0, None))
