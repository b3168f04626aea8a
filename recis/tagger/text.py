"""Split a text into tokens that rules can compare, and keep where each came from.

    recis-tok-1    NFKC, casefold, split on white space, around , ; | and brackets, and between a number and its unit
    recis-words-1  NFKC, casefold, split on white space only: for data whose words are given

A token never holds white space, so n-grams of tokens are written as one string with blanks. Offsets count characters of
the text as given, before normalising. No part of speech, no parser.
"""

import re
import unicodedata
from dataclasses import dataclass
from itertools import accumulate

TOKENIZER = "recis-tok-1"
WORDS = "recis-words-1"
TOKENIZERS = (TOKENIZER, WORDS)
BEGIN, END = "<s>", "</s>"  # what stands before the first and behind the last token

_UNITS = (
    "gb|tb|mb|kb|ghz|mhz|hz|mah|wh|kwh|w|kw|v|a|mm|cm|m|km|in|inch|inches|ft|yd|ml|cl|l|ltr|oz|lb|lbs|g|kg|mg|ct|pk|"
    "pcs|mp|fps|rpm|btu|k|p|x|\"|''|'"
)
_APART = r",;|()\[\]{}"
_TOKEN = re.compile(
    rf"\d+(?:[.,]\d+)*(?=(?:{_UNITS})(?:[\s{_APART}]|$))"  # a number whose unit follows without a blank
    rf"|[{_APART}]"
    rf"|(?:[^\s{_APART}]|(?<=\d),(?=\d))+"
)
_WORD = re.compile(r"\S+")
_MAY_SPLIT = re.compile(rf"[0-9{_APART}]").search  # a word of ASCII without any of these is one token


@dataclass(frozen=True, slots=True)
class Text:
    """A text and its tokens; token t is characters starts[t]:ends[t] of `text`."""

    text: str
    tokens: tuple[str, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]

    def surface(self, start: int, end: int) -> str:
        """Return tokens [start, end) as one string."""
        return " ".join(self.tokens[start:end])


def tokenize(text: str, tokenizer: str = TOKENIZER) -> Text:
    """Split a text; an empty one, or one of white space, has no tokens.

    Raises:
        ValueError: the tokenizer is not one of TOKENIZERS.
    """
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"tokenizer {tokenizer!r} is not known; there are {', '.join(TOKENIZERS)}")
    if text.isascii():
        lowered = text.lower()
        tokens = lowered.split()
        if tokenizer == TOKENIZER and _MAY_SPLIT(lowered):
            # what splits a word never looks beyond it, so words are looked at one by one
            tokens = [piece for word in tokens for piece in (_TOKEN.findall(word) if _MAY_SPLIT(word) else (word,))]
        if " ".join(tokens) == lowered:
            ends = [letters + blanks for blanks, letters in enumerate(accumulate(map(len, tokens)))]
            starts = [0, *[end + 1 for end in ends[:-1]]] if ends else []
        else:
            starts, ends = _places(lowered, tokens)
        return Text(text, tuple(tokens), tuple(starts), tuple(ends))
    pattern = _TOKEN if tokenizer == TOKENIZER else _WORD
    folded, origins = _fold(text)
    pieces = [
        (match.group(), origins[match.start()][0], origins[match.end() - 1][1]) for match in pattern.finditer(folded)
    ]
    return Text(text, *_columns(pieces))


def _places(lowered: str, tokens: list[str]) -> tuple[list[int], list[int]]:
    starts: list[int] = []
    ends: list[int] = []
    end = 0
    for token in tokens:  # each begins behind the one before, so a search from there finds it
        start = lowered.find(token, end)
        end = start + len(token)
        starts.append(start)
        ends.append(end)
    return starts, ends


def from_words(words: list[str] | tuple[str, ...]) -> Text:
    """Return the text of given words, joined by one blank, with exactly these words as tokens.

    Raises:
        ValueError: a word is empty or holds white space.
    """
    for place, word in enumerate(words):
        if not word or any(char.isspace() for char in word):
            raise ValueError(f"word {place} must be text without white space; got {word!r}")
    starts, position = [], 0
    for word in words:
        starts.append(position)
        position += len(word) + 1
    ends = tuple(start + len(word) for start, word in zip(starts, words, strict=True))
    return Text(" ".join(words), tuple(_normal(word) for word in words), tuple(starts), ends)


def _columns(pieces: list[tuple[str, int, int]]) -> tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...]]:
    return tuple(p[0] for p in pieces), tuple(p[1] for p in pieces), tuple(p[2] for p in pieces)


def _normal(word: str) -> str:
    if word.isascii():
        return word.lower()
    # some letters come apart into a blank and a mark; a token has no blank
    return "".join(unicodedata.normalize("NFKC", word).casefold().split()) or word


def _fold(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Return the normalised text and, per character of it, the characters of `text` it stands for."""
    folded: list[str] = []
    origins: list[tuple[int, int]] = []
    start = 0
    while start < len(text):
        end = start + 1
        while end < len(text) and unicodedata.combining(text[end]):
            end += 1  # a letter and its marks are one
        piece = text[start:end]
        normal = " " if piece.isspace() else _normal(piece)
        folded.append(normal)
        origins.extend([(start, end)] * len(normal))
        start = end
    return "".join(folded), origins
