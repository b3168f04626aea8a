"""WordPiece vocabularies: by hand, against a slow reference that counts anew, and whatever the order of the words."""

import random
from collections import Counter
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from recis.ebrm.wordpiece import joined, learn_pieces, split

WORDS = st.dictionaries(st.text("abc", min_size=1, max_size=7), st.integers(1, 5), max_size=12)


def reference(word_counts: dict[str, int], max_pieces: int) -> list[str]:
    """All pairs counted from scratch before each join."""
    words = {word: split(word) for word in word_counts}
    singles = Counter(part for word, parts in words.items() for part in parts for _ in range(word_counts[word]))
    pieces = sorted(singles, key=lambda piece: (-singles[piece], piece))[:max_pieces]
    while len(pieces) < max_pieces:
        pairs = Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                pairs[pair] += word_counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if joined(best) not in pieces:
            pieces.append(joined(best))
        for parts in words.values():
            at = 0
            while at < len(parts) - 1:
                if (parts[at], parts[at + 1]) == best:
                    parts[at : at + 2] = [joined(best)]
                at += 1
    return pieces


def test_by_hand():
    # (h, ##u) 7 times, (hu, ##g) 5 times; then (##u, ##n), (hu, ##t) and (p, ##u) twice each, in this order by spelling
    assert learn_pieces({"hug": 5, "hut": 2, "pun": 2}, 100)[:6] == ["##u", "h", "##g", "##n", "##t", "p"]
    assert learn_pieces({"hug": 5, "hut": 2, "pun": 2}, 100)[6:] == ["hu", "hug", "##un", "hut", "pun"]
    assert learn_pieces({}, 5) == []
    assert learn_pieces({"ab": 1, "b": 3}, 2) == ["b", "##b"]


@settings(max_examples=60, deadline=None)
@given(WORDS, st.integers(0, 30), st.randoms(use_true_random=False))
def test_matches_reference_in_any_order(counts: dict[str, int], max_pieces: int, rng: random.Random):
    words = list(counts)
    rng.shuffle(words)
    assert learn_pieces({word: counts[word] for word in words}, max_pieces) == reference(counts, max_pieces)
