"""Say which conditions hold for a span: what rules are made of when they are distilled, and the plain meaning of each kind."""

from collections.abc import Collection, Mapping

from recis.tagger.rules import AFFIX_CHARS, MAX_NGRAM, Condition
from recis.tagger.text import BEGIN, END, Text

CONTEXT_KINDS = ("prev", "next")
STATIC_KINDS = ("surface", "prefix", "suffix", "shape", "prev", "next", "first", "last", "dictionary")
"""Kinds that depend on the text alone; `left` and `right` also depend on the types given so far."""

SHORT_CHARS, MEDIUM_CHARS = 3, 7


def span_conditions(
    text: Text,
    start: int,
    end: int,
    *,
    kinds: Collection[str] = STATIC_KINDS,
    max_ngram: int = MAX_NGRAM,
    dictionaries: Mapping[str, frozenset[str]] | None = None,
) -> list[Condition]:
    """Return the conditions of the given kinds that hold for tokens [start, end); prev and next up to max_ngram tokens."""
    surface = text.surface(start, end)
    found: list[Condition] = []
    if "surface" in kinds:
        found.append(Condition("surface", surface))
    for size in AFFIX_CHARS:
        if len(surface) >= size:
            found += [Condition("prefix", surface[:size])] if "prefix" in kinds else []
            found += [Condition("suffix", surface[-size:])] if "suffix" in kinds else []
    if "shape" in kinds:
        found.append(Condition("shape", shape_of(surface)))
    padded = (BEGIN, *text.tokens, END)  # token t stands at t + 1; only one pad, so that no n-gram is counted twice
    for size in range(1, max_ngram + 1):
        if "prev" in kinds and start + 1 >= size:
            found.append(Condition("prev", " ".join(padded[start + 1 - size : start + 1])))
        if "next" in kinds and end + size < len(padded):
            found.append(Condition("next", " ".join(padded[end + 1 : end + 1 + size])))
    if "first" in kinds:
        found.append(Condition("first", text.tokens[start]))
    if "last" in kinds:
        found.append(Condition("last", text.tokens[end - 1]))
    if "dictionary" in kinds and dictionaries:
        found += [Condition("dictionary", name) for name, values in sorted(dictionaries.items()) if surface in values]
    return found


def type_conditions(
    start: int, end: int, type_ending: Mapping[int, str], type_beginning: Mapping[int, str]
) -> list[Condition]:
    """Return the `left` and `right` conditions of a span, from the types of spans ending and beginning at a token."""
    found = [Condition("left", type_ending[start])] if start in type_ending else []
    if end in type_beginning:
        found.append(Condition("right", type_beginning[end]))
    return found


def shape_of(surface: str) -> str:
    """Return what a surface is made of and how long it is: "digits:short" for "64"."""
    digits = sum(char.isdigit() for char in surface)
    letters = sum(char.isalpha() for char in surface)
    made = "letters" if digits == 0 else "mixed" if letters else "digits"
    size = "short" if len(surface) <= SHORT_CHARS else "medium" if len(surface) <= MEDIUM_CHARS else "long"
    return f"{made}:{size}"
