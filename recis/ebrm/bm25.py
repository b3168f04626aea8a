"""BM25: how well the words of a text answer a query, from counts alone.

    score(q, d) = sum over terms t of q: idf(t) * tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(d) / mean len))
    idf(t)      = ln(1 + (N - n(t) + 0.5) / (n(t) + 0.5))                n(t) texts of N hold t

Source: Robertson & Zaragoza 2009, "The Probabilistic Relevance Framework", with the idf that is never negative.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np


class BM25:
    """An index over N texts, given as their words.

    Raises:
        ValueError: no texts, k1 below 0, or b outside [0, 1].
    """

    def __init__(self, texts: Sequence[Sequence[str]], *, k1: float = 1.2, b: float = 0.75) -> None:
        if not texts:
            raise ValueError("BM25 needs at least one text; got none")
        if k1 < 0 or not 0 <= b <= 1:
            raise ValueError(f"BM25: k1 must be at least 0 and b in [0, 1]; got {k1}, {b}")
        self.num_texts = len(texts)
        lengths = np.array([len(words) for words in texts], dtype=np.float64)
        norm = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-12))
        postings: dict[str, tuple[list[int], list[int]]] = {}
        for position, words in enumerate(texts):
            for term, count in Counter(words).items():
                texts_of, counts_of = postings.setdefault(term, ([], []))
                texts_of.append(position)
                counts_of.append(count)
        self._postings: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for term, (positions, counts) in postings.items():
            at, tf = np.array(positions, dtype=np.int64), np.array(counts, dtype=np.float64)
            idf = np.log1p((self.num_texts - len(at) + 0.5) / (len(at) + 0.5))
            self._postings[term] = (at, idf * tf * (k1 + 1) / (tf + norm[at]))

    def scores(self, words: Sequence[str]) -> np.ndarray:
        """Return the scores of all texts for a query's words, float64 [N]; a word that occurs twice counts twice."""
        out = np.zeros(self.num_texts)
        for word in words:
            if word in self._postings:
                at, weights = self._postings[word]
                out[at] += weights
        return out
