"""Count, for every rule that could be written about a set of texts, how often it matches and how often it is right.

All spans of at most max_span_tokens tokens are listed once with the conditions that hold for them; a candidate rule is one
surface or a pair of conditions with a length. Which spans a candidate matches depends on the texts alone, so it is kept as
one sorted array; a round then only counts labels. Pairs with a neighbour's type are counted anew, since types are learnt.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from recis.tagger.conditions import STATIC_KINDS, span_conditions
from recis.tagger.rules import Condition
from recis.tagger.text import Text

LEFT, RIGHT = "left", "right"


@dataclass(frozen=True, slots=True)
class Candidates:
    """Rules and the spans they match: candidate c matches spans[offsets[c]:offsets[c + 1]]."""

    keys: np.ndarray  # [C, 3] int64: condition, other condition (-1: a single surface), length
    offsets: np.ndarray  # [C + 1]
    spans: np.ndarray  # [sum of matches]

    @property
    def matched(self) -> np.ndarray:
        """Number of matched spans per candidate [C]."""
        return np.diff(self.offsets)

    def counts(self, is_counted: np.ndarray) -> np.ndarray:
        """Return how many matched spans of each candidate are marked in is_counted [S] bool."""
        total = np.concatenate([[0], np.cumsum(is_counted[self.spans], dtype=np.int64)])
        return total[self.offsets[1:]] - total[self.offsets[:-1]]

    def of(self, candidate: int) -> np.ndarray:
        """Return the spans that a candidate matches, in order."""
        return self.spans[self.offsets[candidate] : self.offsets[candidate + 1]]


class SpanTable:
    """All short spans of some texts, their conditions, and the candidate rules that match at least min_support of them."""

    def __init__(
        self,
        texts: Sequence[Text],
        types: Sequence[str],
        *,
        max_span_tokens: int,
        min_support: int,
        kinds: Collection[str] = STATIC_KINDS,
        max_ngram: int = 3,
        dictionaries: Mapping[str, frozenset[str]] | None = None,
    ) -> None:
        self.texts = texts
        self.types = tuple(types)
        self.min_support = min_support
        self.places: list[tuple[int, int, int]] = []  # text number, start, end
        static = [kind for kind in kinds if kind not in (LEFT, RIGHT)]
        self._use_types = LEFT in kinds, RIGHT in kinds
        ids: dict[Condition, int] = {}
        flat: list[int] = []
        sizes: list[int] = []
        for number, text in enumerate(texts):
            for start in range(len(text.tokens)):
                for end in range(start + 1, min(start + max_span_tokens, len(text.tokens)) + 1):
                    found = span_conditions(
                        text, start, end, kinds=static, max_ngram=max_ngram, dictionaries=dictionaries
                    )
                    self.places.append((number, start, end))
                    flat.extend([ids.setdefault(condition, len(ids)) for condition in found])
                    sizes.append(len(found))
        self.number_of = {place: number for number, place in enumerate(self.places)}
        self.conditions = [*ids, *(Condition(side, name) for side in (LEFT, RIGHT) for name in self.types)]
        self.length = np.array([end - start for _, start, end in self.places], dtype=np.int64)
        self._kind_of = np.array([_KINDS.index(condition.kind) for condition in self.conditions], dtype=np.int64)
        self._span_of, self._condition_of = self._frequent(
            np.repeat(np.arange(len(sizes)), sizes), np.array(flat, np.int64)
        )
        self.static = self._static_candidates()

    def _frequent(self, span_of: np.ndarray, condition_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Leave out conditions that hold too rarely to be part of an accepted rule."""
        keep = np.bincount(condition_of, minlength=len(self.conditions))[condition_of] >= self.min_support
        return span_of[keep], condition_of[keep]

    def _static_candidates(self) -> Candidates:
        surface = _KINDS.index("surface")
        is_surface = self._kind_of[self._condition_of] == surface
        single = self._condition_of[is_surface]
        keys = [np.stack([single, np.full_like(single, -1), self.length[self._span_of[is_surface]]], axis=1)]
        spans = [self._span_of[is_surface]]
        span_of, condition_of = self._span_of[~is_surface], self._condition_of[~is_surface]
        num_conditions = np.bincount(span_of, minlength=len(self.places))
        begins = np.concatenate([[0], np.cumsum(num_conditions)])
        for size in np.unique(num_conditions[num_conditions > 1]):
            rows = np.flatnonzero(num_conditions == size)
            held = condition_of[begins[rows][:, None] + np.arange(size)]
            one, two = np.triu_indices(size, 1)
            keys.append(self._keys(held[:, one].ravel(), held[:, two].ravel(), np.repeat(rows, len(one))))
            spans.append(np.repeat(rows, len(one)))
        return self._group(np.concatenate(keys), np.concatenate(spans))

    def typed(self, label: np.ndarray) -> Candidates:
        """Return the candidates with a neighbour's type; label [S] is the type number of each span, -1 for none."""
        ending: dict[tuple[int, int], int] = {}
        beginning: dict[tuple[int, int], int] = {}
        for number in np.flatnonzero(label >= 0):
            text, start, end = self.places[number]
            ending[text, end] = beginning[text, start] = int(label[number])
        first = len(self.conditions) - 2 * len(self.types)
        keys, spans = [np.zeros((0, 3), np.int64)], [np.zeros(0, np.int64)]
        dynamic: list[np.ndarray] = []
        for side, known in enumerate((ending, beginning)):
            neighbour = np.array(
                [known.get((text, (start, end)[side]), -1) for text, start, end in self.places], np.int64
            )
            held = np.where(neighbour >= 0, first + side * len(self.types) + neighbour, -1)
            dynamic.append(held if self._use_types[side] else np.full_like(held, -1))
            chosen = dynamic[side][self._span_of] >= 0
            keys.append(
                self._keys(self._condition_of[chosen], dynamic[side][self._span_of[chosen]], self._span_of[chosen])
            )
            spans.append(self._span_of[chosen])
        both = np.flatnonzero((dynamic[0] >= 0) & (dynamic[1] >= 0))
        keys.append(self._keys(dynamic[0][both], dynamic[1][both], both))
        return self._group(np.concatenate(keys), np.concatenate([*spans, both]))

    def _keys(self, one: np.ndarray, two: np.ndarray, spans: np.ndarray) -> np.ndarray:
        """Return [N, 3] keys; two conditions of one kind are no rule (one prefix says what the shorter one says)."""
        same = self._kind_of[one] == self._kind_of[two]
        keys = np.stack([np.minimum(one, two), np.maximum(one, two), self.length[spans]], axis=1)
        keys[same] = -2
        return keys

    def _group(self, keys: np.ndarray, spans: np.ndarray) -> Candidates:
        wide = len(self.conditions) + 1
        packed = (keys[:, 0] * wide + keys[:, 1] + 1) * 64 + keys[:, 2]
        keep = keys[:, 0] >= 0
        packed, spans = packed[keep], spans[keep]
        order = np.lexsort((spans, packed))
        packed, spans = packed[order], spans[order]
        values, begins, counts = np.unique(packed, return_index=True, return_counts=True)
        often = counts >= self.min_support
        values, begins, counts = values[often], begins[often], counts[often]
        inside = np.repeat(begins - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts) if len(counts) else begins
        picked = spans[np.arange(counts.sum()) + inside]
        pair = values // 64
        found = np.stack([pair // wide, pair % wide - 1, values % 64], axis=1)
        return Candidates(found, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), picked)


_KINDS = (*STATIC_KINDS, LEFT, RIGHT)
