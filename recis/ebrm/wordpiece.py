"""Learn a WordPiece vocabulary: the same counts give the same pieces, on every machine and in every run.

    "fridge" -> f ##r ##i ##d ##g ##e; again and again the two neighbours that stand together most often become one piece

Among pairs of one count the first by spelling is joined. The trainer of the tokenizers library leaves that choice to the
order of its hash tables, which changes from run to run; a model version must not.
Source: pairs are joined by count as in byte-pair encoding, Sennrich et al. 2016, arXiv:1508.07909; `##` marks as in BERT.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping
from itertools import pairwise

INSIDE = "##"
_Pair = tuple[str, str]


def learn_pieces(word_counts: Mapping[str, int], max_pieces: int) -> list[str]:
    """Return at most `max_pieces` pieces, in order of arrival: single characters first, frequent ones before rare ones.

    Args:
        word_counts: word -> how often it occurs; the order of the words plays no part.
        max_pieces: with fewer than there are characters, the rarest characters are left out.
    """
    words = [(split(word), word_counts[word]) for word in sorted(word_counts) if word]
    singles = Counter[str]()
    for parts, count in words:
        for part in parts:
            singles[part] += count
    pieces = dict.fromkeys(sorted(singles, key=lambda piece: (-singles[piece], piece))[:max_pieces])
    counts, homes = _pairs_of(words)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    while heap and len(pieces) < max_pieces:
        negative, pair = heapq.heappop(heap)
        if counts[pair] != -negative:  # counted anew since it was put here
            continue
        pieces[joined(pair)] = None
        for changed in sorted(_join(pair, words, counts, homes)):
            if counts[changed] > 0:
                heapq.heappush(heap, (-counts[changed], changed))
    return list(pieces)


def split(word: str) -> list[str]:
    """Return a word's characters, all but the first marked as inside a word."""
    return [word[0], *(INSIDE + character for character in word[1:])]


def joined(pair: _Pair) -> str:
    """Return the piece that two neighbours make."""
    return pair[0] + pair[1].removeprefix(INSIDE)


def _pairs_of(words: list[tuple[list[str], int]]) -> tuple[Counter[_Pair], dict[_Pair, set[int]]]:
    """Return how often each pair of neighbours occurs, and in which words."""
    counts, homes = Counter[_Pair](), defaultdict[_Pair, set[int]](set)
    for place, (parts, count) in enumerate(words):
        for pair in pairwise(parts):
            counts[pair] += count
            homes[pair].add(place)
    return counts, homes


def _join(
    pair: _Pair, words: list[tuple[list[str], int]], counts: Counter[_Pair], homes: dict[_Pair, set[int]]
) -> set[_Pair]:
    """Join a pair in all words and keep the counts; return the pairs whose counts have changed."""
    changed: set[_Pair] = set()
    for place in homes.pop(pair):
        parts, count = words[place]
        for old in pairwise(parts):
            counts[old] -= count
            changed.add(old)
        parts[:] = _with_joined(parts, pair)
        for new in pairwise(parts):
            counts[new] += count
            homes[new].add(place)
            changed.add(new)
    return changed - {pair}


def _with_joined(parts: list[str], pair: _Pair) -> list[str]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] = joined(pair)
        else:
            out.append(part)
    return out
