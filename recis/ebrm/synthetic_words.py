"""Words of the synthetic catalogue: values with their surface synonyms, and made-up names for brands and series.

The first spelling of a value is its canonical one; the others mean the same to a shopper. No spelling belongs to two values
of a type.
"""

import random

CATEGORIES: tuple[tuple[str, ...], ...] = (
    ("running shoes", "trainers", "joggers"),
    ("sandals", "summer shoes"),
    ("boots", "hiking boots"),
    ("jacket", "coat", "parka"),
    ("trousers", "pants", "slacks"),
    ("shirt", "blouse"),
    ("backpack", "rucksack", "daypack"),
    ("suitcase", "trolley case", "luggage"),
    ("umbrella", "brolly"),
    ("headphones", "headset", "earphones"),
    ("loudspeaker", "speaker"),
    ("keyboard", "computer keyboard"),
    ("desk lamp", "reading light", "table lamp"),
    ("kettle", "water boiler"),
    ("frying pan", "skillet"),
    ("sofa", "couch", "settee"),
    ("bookcase", "bookshelf"),
    ("duvet", "quilt", "comforter"),
    ("bicycle", "bike", "push bike"),
    ("tent", "camping shelter"),
)
COLOURS: tuple[tuple[str, ...], ...] = (
    ("black", "jet black", "schwarz"),
    ("white", "snow white", "weiss"),
    ("red", "scarlet", "rot"),
    ("blue", "azure", "blau"),
    ("green", "emerald", "grun"),
    ("grey", "gray", "grau"),
    ("brown", "chestnut", "braun"),
    ("yellow", "lemon", "gelb"),
    ("pink", "rose"),
    ("orange", "tangerine"),
    ("purple", "violet", "lilac"),
    ("silver", "metallic"),
)
FORMS: tuple[tuple[str, ...], ...] = (
    ("foldable", "folding", "collapsible"),
    ("compact", "space saving"),
    ("lightweight", "ultra light"),
    ("waterproof", "water resistant"),
    ("insulated", "thermal"),
    ("wireless", "cordless"),
    ("adjustable", "variable"),
    ("padded", "cushioned"),
)
SIZES: tuple[tuple[str, ...], ...] = (
    ("xs", "extra small"),
    ("s", "small"),
    ("m", "medium"),
    ("l", "large"),
    ("xl", "extra large"),
    ("xxl", "double extra large"),
)
FILLERS = ("new", "original", "in", "with warranty", "online offer", "model 2026", "for everyday use", "free delivery")
_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "kr", "tr", "st")
_VOWELS = ("a", "e", "i", "o", "u")
_ENDS = ("", "n", "r", "x", "l", "s")


def made_up_names(count: int, num_syllables: int, rng: random.Random, taken: set[str]) -> list[tuple[str, ...]]:
    """Return `count` distinct names that are not in `taken`, and add them to it; each has one spelling, some two.

    Args:
        count: names.
        num_syllables: of each; 2 gives 540,000 names, so that few are drawn twice.
        rng: source of the draw.
        taken: names that are in use.
    """
    names: list[tuple[str, ...]] = []
    while len(names) < count:
        parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_ENDS) for _ in range(num_syllables)]
        name = "".join(parts)
        spaced = " ".join(parts)
        if name in taken or spaced in taken:
            continue
        taken |= {name, spaced}
        names.append((name, spaced) if rng.random() < 0.3 else (name,))
    return names


def with_typo(text: str, rng: random.Random) -> str:
    """Return text with one slip: two letters swapped, one left out or one doubled; texts under 4 letters stay."""
    if len(text) < 4:
        return text
    at = rng.randrange(len(text) - 1)
    slip = rng.randrange(3)
    if slip == 0:
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return text[:at] + text[at + 1 :] if slip == 1 else text[:at] + text[at] + text[at:]
