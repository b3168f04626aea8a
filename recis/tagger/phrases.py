"""Find phrases: n-grams whose tokens occur together more often than by chance.

    pmi(w) = min over cut points log( p(w) / (p(left) p(right)) ),   score = pmi * log(1 + count)

p is a count over all n-grams of that length. An n-gram is kept when its score reaches the 70th percentile of its length;
single tokens have no cut point and are kept by count alone. Ours; PMI is Church and Hanks 1990.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from recis.tagger.text import Text


@dataclass(frozen=True, kw_only=True, slots=True)
class PhraseConfig:
    """Which n-grams are phrases."""

    max_tokens: int = 5
    min_count: int = 3
    """Occurrences that an n-gram of two or more tokens needs."""
    min_count_token: int = 2
    percentile: float = 70.0
    """Of the scores of its length, 0 to 100."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1; got {self.max_tokens}")
        if not 0 <= self.percentile <= 100:
            raise ValueError(f"percentile must be in [0, 100]; got {self.percentile}")


def find_phrases(
    texts: Sequence[Text], config: PhraseConfig | None = None, *, field_values: Iterable[str] = ()
) -> dict[str, float]:
    """Return phrase -> score, best first, ties by phrase; field_values (catalogue values) are kept whatever their score."""
    config = config or PhraseConfig()
    counts: list[Counter[tuple[str, ...]]] = [Counter() for _ in range(config.max_tokens)]
    for text in texts:
        for size, counter in enumerate(counts, 1):
            counter.update(text.tokens[start : start + size] for start in range(len(text.tokens) - size + 1))
    totals = [max(1, counter.total()) for counter in counts]
    wanted = {tuple(value.split(" ")) for value in field_values}
    kept: dict[str, float] = {}
    for size, counter in enumerate(counts, 1):
        least = config.min_count_token if size == 1 else config.min_count
        scored = {
            gram: phrase_score(gram, counts, totals)
            for gram, count in counter.items()
            if count >= least or gram in wanted
        }
        floor = np.percentile(list(scored.values()), config.percentile) if size > 1 and scored else -math.inf
        kept.update({" ".join(gram): value for gram, value in scored.items() if value >= floor or gram in wanted})
    return dict(sorted(kept.items(), key=lambda item: (-item[1], item[0])))


def phrase_score(gram: tuple[str, ...], counts: Sequence[Counter[tuple[str, ...]]], totals: Sequence[int]) -> float:
    """Return the score of an n-gram from the counts of every length; for a single token log(1 + count)."""
    count = counts[len(gram) - 1][gram]
    weight = math.log1p(count)
    if len(gram) == 1:
        return weight
    together = count / totals[len(gram) - 1]
    cuts = [
        together
        / (counts[cut - 1][gram[:cut]] / totals[cut - 1])
        / (counts[len(gram) - cut - 1][gram[cut:]] / totals[len(gram) - cut - 1])
        for cut in range(1, len(gram))
    ]
    return math.log(min(cuts)) * weight


def occurrences(texts: Sequence[Text], phrases: Iterable[str]) -> dict[str, list[tuple[int, int, int]]]:
    """Return phrase -> its places (text number, start, end), in order of the texts."""
    found: dict[str, list[tuple[int, int, int]]] = {phrase: [] for phrase in phrases}
    sizes = sorted({phrase.count(" ") + 1 for phrase in found})
    for number, text in enumerate(texts):
        for start in range(len(text.tokens)):
            for size in sizes:
                if start + size <= len(text.tokens):
                    places = found.get(text.surface(start, start + size))
                    if places is not None:
                        places.append((number, start, start + size))
    return found
