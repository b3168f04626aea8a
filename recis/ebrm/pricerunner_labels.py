"""What a cluster label of PriceRunner states, and the dictionaries that are learned from the labels of the train part.

    'hp intel xeon e5-2670 v3 2.3ghz tray'  -> brands (hp, intel), model 'xeon e5-2670 v3', series xeon, clock 2.3ghz
    'smeg fab5rbl black'                    -> brand smeg, model 'fab5rbl', colour black

Labels say what an offer is; no model input is made from the label of an item. A label is read in this order: brand off the
front, trailing colours and "integrated" off the back, then what its category states (storage, clock, lens, screen size);
the rest is the model string, and its first word that occurs in enough train labels is the series.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

from recis.ebrm.entities import check_keys
from recis.ebrm.pricerunner_text import (
    COLOURS,
    Phrases,
    clocks_ghz,
    code_inches,
    is_code,
    lenses,
    squash,
    storage_gb,
)

SECONDARY = ("colour", "form", "capacity", "speed", "size", "lens")
"""Attributes of a label that are no brand, model or series, by entity type; speed is the clock, size the screen."""
ALIASES: dict[str, tuple[str, ...]] = {
    "hp": ("hewlett packard enterprise", "hewlett packard", "hpe", "hp"),
    "motorola": ("moto",),
    "fujifilm": ("fuji",),
}
SELLERS = frozenset({"hp", "ibm", "cisco", "fujitsu", "lenovo"})
CHIP_MAKERS = frozenset({"intel", "amd"})
MIN_SERIES_LABELS, MIN_SUFFIX_LABELS = 3, 2
NAMED_CATEGORIES = ("Mobile Phones", "Digital Cameras", "CPUs")
"""Categories whose models are names ("galaxy j7 pro", "eos 1200d", "core i3 4160") as often as codes."""
MIN_FOLLOWS_SHARE, MIN_LABEL_SHARE = 0.85, 0.80
_MODIFIERS = re.compile(
    r"\b((dual|quad|six|eight|twelve)-core|dual sim|upgrade|tray|box)\b|\bsocket [a-z0-9+-]+|\b\d+mhz( bus)?|\b\d+(\.\d+)? ?ghz"
)
_GB = re.compile(r"\b\d+ ?(gb|tb)( ram)?\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dictionaries:
    """What is learned from the labels and titles of the train part, and is stored with a model."""

    brands: frozenset[str]
    """Canonical names, one to three tokens ("smeg", "russell hobbs", "fisher & paykel")."""
    series: frozenset[str]
    prefixes: frozenset[str]
    """Words that open a code in labels, before a blank or hyphen and a digit ("tx", "cufr")."""
    suffixes: frozenset[str]
    """Words that follow a number in the model strings of labels ("pro", "plus", "ii")."""
    lenses: frozenset[str]
    secondary: frozenset[tuple[str, str]] = frozenset()
    """(category, attribute) that titles state often enough to be asked for."""
    brand_phrases: Phrases = field(init=False, repr=False, compare=False)
    """Brands by their names, names without "&", and aliases."""

    def __post_init__(self) -> None:
        names = sorted(self.brands | ALIASES.keys())
        spellings = {name: {name, name.replace(" & ", " "), *ALIASES.get(name, ())} for name in names}
        object.__setattr__(self, "brand_phrases", Phrases(spellings))

    def to_json(self) -> dict[str, Any]:
        """Return sorted lists, so that equal dictionaries give equal text."""
        return {
            "brands": sorted(self.brands),
            "series": sorted(self.series),
            "prefixes": sorted(self.prefixes),
            "suffixes": sorted(self.suffixes),
            "lenses": sorted(self.lenses),
            "secondary": sorted(map(list, self.secondary)),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Dictionaries":
        """Return what `to_json` wrote.

        Raises:
            DataError: unknown or missing keys.
        """
        names = ("brands", "series", "prefixes", "suffixes", "lenses", "secondary")
        check_keys(data, required=names, what="dictionaries")
        sets = {name: frozenset(data[name]) for name in names[:-1]}
        return Dictionaries(**sets, secondary=frozenset((c, a) for c, a in data["secondary"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelFacts:
    """What one label states; texts are normalised."""

    category: str
    brands: tuple[str, ...]
    """Either satisfies a query: two for processors that a server maker sells."""
    model: str
    """Model string as written; empty when the label has none."""
    series: str | None
    secondary: Mapping[str, str]
    """Attribute of SECONDARY -> value."""

    @property
    def code(self) -> str | None:
        """The model's code, squashed ("tx55fx600b"); None when the model is a name."""
        return model_code(self.model)


def learn_brands(labels: Iterable[str], titles: Iterable[str]) -> frozenset[str]:
    """Return the brands of normalised labels: one token, two that belong together, or `x & y`.

    Two belong together when the second follows the first in 85 % of its occurrences in titles and in 80 % of the labels
    that open with the first: "russell hobbs", "de dietrich", not "apple iphone". Seen in one label only, nobody can tell;
    nor can one tell whether a first token with a digit is a brand or a model ("x4 dual sim") from one label.
    """
    opened = [label.split() for label in labels if label]
    firsts = Counter(words[0] for words in opened)
    pairs = Counter((words[0], words[1]) for words in opened if len(words) > 1)
    seen, follows = Counter[str](), Counter[tuple[str, str]]()
    for title in titles:
        words = title.split()
        seen.update(words)
        follows.update(pairwise(words))
    together = {
        pair
        for pair, count in pairs.items()
        if count >= max(2, MIN_LABEL_SHARE * firsts[pair[0]])
        and pair[1].isalpha()
        and follows[pair] >= MIN_FOLLOWS_SHARE * max(1, seen[pair[1]])
    }
    brands = set()
    for words in opened:
        if len(words) > 2 and words[1] == "&":
            brands.add(" ".join(words[:3]))
        elif tuple(words[:2]) in together:
            brands.add(" ".join(words[:2]))
        elif firsts[words[0]] > 1 or not any(map(str.isdigit, words[0])):
            brands.add(_canonical_brand(words[0]))
    return frozenset(brands)


def learn_dictionaries(labels: Sequence[tuple[str, str]], titles: Iterable[str]) -> Dictionaries:
    """Return the dictionaries of the train part, still without `secondary` (that needs titles beside their labels).

    Args:
        labels: (category, normalised label) of each cluster.
        titles: normalised titles.
    """
    found = Dictionaries(
        brands=learn_brands((label for _, label in labels), titles),
        series=frozenset(),
        prefixes=frozenset(),
        suffixes=frozenset(),
        lenses=frozenset(),
    )
    facts = [label_facts(label, category, found) for category, label in labels]
    words = Counter(word for fact in facts if (word := _first_word(fact.model)))
    prefixes = Counter(
        match[1] for fact in facts for match in re.finditer(r"(?<![a-z0-9])([a-z]{1,6})[ -](?=[a-z]*\d)", fact.model)
    )
    suffixes = Counter(
        word
        for fact in facts
        if fact.category in NAMED_CATEGORIES
        for before, word in pairwise(fact.model.split())
        if word.isalpha() and any(map(str.isdigit, before)) and word not in COLOURS
    )
    return Dictionaries(
        brands=found.brands,
        series=frozenset(word for word, count in words.items() if count >= MIN_SERIES_LABELS),
        prefixes=frozenset(prefixes),
        suffixes=frozenset(word for word, count in suffixes.items() if count >= MIN_SUFFIX_LABELS),
        lenses=frozenset(fact.secondary["lens"] for fact in facts if "lens" in fact.secondary),
    )


def label_facts(label: str, category: str, known: Dictionaries) -> LabelFacts:
    """Return what a normalised label states; a brand that is not in the dictionaries falls back to the first token."""
    brands, rest = _split_brand(label, category, known)
    secondary: dict[str, str] = {}
    rest = _strip_back(rest, secondary)
    if category == "Mobile Phones":
        size = storage_gb(rest)
        if size is not None:
            secondary["capacity"] = size
        rest = _GB.sub(" ", rest)
    elif category == "CPUs":
        clocks = clocks_ghz(rest)
        if clocks:
            secondary["speed"] = clocks[0]
    elif category == "Digital Cameras":
        zooms = lenses(rest)
        if zooms:
            secondary["lens"] = zooms[0]
        rest = f"{rest} ".split(" + ")[0]
    rest = " ".join(_MODIFIERS.sub(" ", rest).split()).strip(" -/&")
    rest = _strip_back(rest, secondary)
    if category == "TVs" and (size := code_inches(model_code(rest) or "")) is not None:
        secondary["size"] = size
    word = _first_word(rest)
    series = word if word in known.series else None
    return LabelFacts(category=category, brands=brands, model=rest, series=series, secondary=secondary)


def model_code(model: str) -> str | None:
    """Return the code in a model string, squashed: the longest token of 4 or more that mixes letters and digits.

    Without one, the first number with the word before it ("ik 1620" -> "ik1620"). A version belongs to the code
    ("e5-2670 v3" -> "e52670v3").
    """
    words = [squash(word) for word in model.split()]
    long = [at for at, word in enumerate(words) if is_code(word)]
    if long:
        at = max(long, key=lambda i: len(words[i]))
        code = words[at]
    else:
        pairs = [i for i in range(1, len(words)) if words[i - 1].isalpha() and any(map(str.isdigit, words[i]))]
        if not pairs:
            return None
        at = pairs[0]
        code = words[at - 1] + words[at]
    if at + 1 < len(words) and re.fullmatch(r"v\d", words[at + 1]):
        code += words[at + 1]
    return code if len(code) > 3 else None


@lru_cache(maxsize=1 << 16)
def model_forms(model: str) -> tuple[str, ...]:
    """Return what counts as this model when it stands joined in a title, most complete first.

    Its string, its code, its string less the first word, less Samsung's "sm-" number, and the code less its prefix
    ("dsc-wx220" -> "wx220", "ue65nu7400" -> "65nu7400"): titles often leave these out.
    """
    code, first = model_code(model) or "", _first_word(model)
    rest = squash(model.removeprefix(first)) if first else ""
    forms = [squash(model), code, rest if len(rest) >= 4 and any(map(str.isdigit, rest)) else ""]
    if (match := re.fullmatch(r"(.*\d.*) sm-\w+", model)) is not None:
        forms.append(squash(match[1]))
    forms += [part for part in map(squash, re.split(r"[ -]", model)) if is_code(part)]
    if (match := re.fullmatch(r"[a-z]{2}(\d\d[a-z]\w{3,})", code)) is not None:
        forms.append(match[1])
    return tuple(dict.fromkeys(form for form in forms if form))


def _first_word(model: str) -> str | None:
    """Return the first purely alphabetic word of 3 letters or more before any token with a digit."""
    for word in model.split():
        if any(map(str.isdigit, word)):
            return None
        if word.isalpha() and len(word) > 2:
            return word
    return None


def _canonical_brand(word: str) -> str:
    return next((brand for brand, spellings in ALIASES.items() if word in spellings), word)


def _split_brand(label: str, category: str, known: Dictionaries) -> tuple[tuple[str, ...], str]:
    words = label.split()
    if not words:
        return (), ""
    found = known.brand_phrases.find(words[:3])
    brand, length = (found[0][2], found[0][1]) if found and found[0][0] == 0 else (words[0], 1)
    brands, rest = [brand], words[length:]
    while rest and rest[0] == brands[0]:
        rest = rest[1:]
    if category == "CPUs" and brands[0] in SELLERS:
        makers = [word for word in rest if word in CHIP_MAKERS]
        rest = [word for word in rest if word not in CHIP_MAKERS]
        brands += makers[:1]
    return tuple(brands), " ".join(rest)


def _strip_back(text: str, secondary: dict[str, str]) -> str:
    """Take trailing colours and "integrated" off a label's text and note them; the outermost colour counts."""
    words = text.split()
    while words:
        if words[-1] == "integrated":
            secondary["form"] = words.pop()
            continue
        tail = next((n for n in (2, 1) if " ".join(words[-n:]) in COLOURS), 0)
        if not tail:
            break
        secondary.setdefault("colour", " ".join(words[-tail:]))
        words = words[:-tail]
    return " ".join(words)
