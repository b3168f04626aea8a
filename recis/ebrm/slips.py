"""Find the known word that an unknown one is a single slip away from: a letter too many, too few, wrong or swapped.

    kettel, ketle, kettlle, kettlo -> kettle

Both words are cut by one letter at every place; words within one slip share such a cut. Words that are close to two known
ones stay as they are.
Source: deletion neighbourhoods as in Mor & Fraenkel 1982; distance: Damerau 1964, restricted to one operation.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable

MIN_LETTERS = 5  # of both words: a shorter one is close to too many


class Slips:
    """Known words by their cuts.

    Args:
        words: what an unknown word may stand for; those shorter than 5 letters, or not of letters alone, never are it.
        known: further words that are right as they are.
    """

    def __init__(self, words: Iterable[str], *, known: Collection[str] = ()) -> None:
        targets = dict.fromkeys(words)
        self._known = {*targets, *known}
        self._targets: defaultdict[str, dict[str, None]] = defaultdict(dict)
        for word in targets:
            if _fits(word):
                for cut in _cuts(word):
                    self._targets[cut][word] = None

    def corrected(self, word: str) -> str:
        """Return the one known word within a slip of an unknown one; the word itself where there is none or several."""
        if word in self._known or not _fits(word):
            return word
        near = {target for cut in _cuts(word) for target in self._targets.get(cut, ()) if is_one_slip(word, target)}
        return near.pop() if len(near) == 1 else word


def is_one_slip(a: str, b: str) -> bool:
    """Return whether one letter left out, put in, changed, or swapped with its neighbour makes a of b."""
    short, long = sorted((a, b), key=len)
    if a == b or len(long) - len(short) > 1:
        return False
    first = next((place for place, (x, y) in enumerate(zip(short, long, strict=False)) if x != y), len(short))
    if len(short) < len(long):
        return short[first:] == long[first + 1 :]
    rest = short[first + 1 :] == long[first + 1 :]
    swapped = short[first : first + 2] == long[first : first + 2][::-1] and short[first + 2 :] == long[first + 2 :]
    return rest or swapped


def _fits(word: str) -> bool:
    return len(word) >= MIN_LETTERS and word.isalpha()


def _cuts(word: str) -> set[str]:
    return {word, *(word[:place] + word[place + 1 :] for place in range(len(word)))}
