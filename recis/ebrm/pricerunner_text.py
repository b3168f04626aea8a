"""Words of the PriceRunner offers: normal form, tokens, colours, forms, numbers with a unit.

    normalise('55" Kühlschrank, WEISS/Schwarz.')   -> '55 inch kuhlschrank weiss/schwarz'
    tokens('c17ur02n0b/c17ur02n0b 8kg/5kg f/4')    -> ['c17ur02n0b', 'c17ur02n0b', '8kg', '5kg', 'f/4']
    squash('TX-55FX600B')                          -> 'tx55fx600b'

The merchants' titles have lost their umlauts and hyphens ("wei", "gr n", "tx 55fx600b"), so the German words are listed in
the damaged spelling too, and codes are compared squashed. Rules: section "Data" of the EBRM contract; the word lists are ours.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence

NOUNS = {
    "Mobile Phones": "mobile phone",
    "TVs": "tv",
    "CPUs": "processor",
    "Digital Cameras": "digital camera",
    "Microwaves": "microwave",
    "Dishwashers": "dishwasher",
    "Washing Machines": "washing machine",
    "Freezers": "freezer",
    "Fridge Freezers": "fridge freezer",
    "Fridges": "fridge",
}
# colour -> how labels and titles write it; the first of each is what trails in labels
COLOURS: dict[str, tuple[str, ...]] = {
    "stainless steel": (
        "stainless steel",
        "stainless",
        "s/steel",
        "s steel",
        "st steel",
        "st/steel",
        "s/st",
        "br steel",
        "brushed steel",
        "steel",
        "inox",
        "edelstahl",
        "ed",
    ),
    "white": ("white", "weiss", "wei", "polar white"),
    "black": ("black", "schwarz"),
    "silver": ("silver", "silber"),
    "red": ("red", "rot", "burgundy"),
    "cream": ("cream", "creme"),
    "green": ("green", "gr n", "grun"),
    "blue": ("blue", "blau"),
    "grey": ("grey", "gray", "grau", "anthracite", "anthrazit"),
    "brown": ("brown", "braun", "umbra"),
    "orange": ("orange",),
    "pink": ("pink", "rosa"),
    "graphite": ("graphite",),
    "yellow": ("yellow", "gelb"),
    "gold": ("gold", "golden"),
    "purple": ("purple", "lila", "violet"),
    "beige": ("beige", "champagne"),
}
FORMS: dict[str, tuple[str, ...]] = {
    "integrated": (
        "integrated",
        "built in",
        "builtin",
        "built under",
        "einbau",
        "eingebaut",
        "integrierbar",
        "integriert",
        "vollintegrierbar",
        "vollintegriert",
        "teilintegriert",
        "integ",
        "einbauk",
        "einbaumikrowelle",
    ),
    "freestanding": ("freestanding", "free standing", "freistehend", "standger t", "standgerat", "stand"),
}
_INCH_MARK = re.compile(r"[\"“”″]|''")
_NOT_KEPT = re.compile(r"[^a-z0-9.+/&-]+")
_LOOSE_DOT = re.compile(r"(?<!\d)\.|\.(?!\d)")
_UNIT_TOKEN = re.compile(
    r"\d+(\.\d+)?(gb|tb|mb|kb|ghz|mhz|hz|mm|cm|kg|rpm|inch|in|mp|mpix|mah|lt|ltr|litre|litres|liter|watt|watts|zoll|mb/s)"
    r"|\d{1,3}(\.\d+)?(l|g|v|x|m|a)|\d{3,4}w|(240|360|480|576|720|768|1080|1440|2160)[pi]|[2348][dk]"
)
_STANDARD = re.compile(
    r"(fc)?lga\d+|ddr\d\w?|ip\d\d|am\d\+?|usb\d|hdr\d+|mp\d|\d+(st|nd|rd|th)|\d+core|\d+series|\d+in1"
)
_SALES_SUFFIX = re.compile(r"(?<=\w{7})[a-z]{0,2}(xxu|xzg|xeu)$")
_NUMBER = r"(?<![\w.])(\d+(?:\.\d+)?)"
_GB = re.compile(_NUMBER + r" ?(gb|tb)\b")
_GHZ = re.compile(_NUMBER + r" ?ghz\b")
_INCH = re.compile(_NUMBER + r" ?(?:inch|inches|in|zoll)\b")
_CM = re.compile(_NUMBER + r" ?cm\b")
_LITRE = re.compile(_NUMBER + r" ?(?:l|lt|ltr|litre|litres|liter)\b")
_KG = re.compile(_NUMBER + r" ?kg\b")
_RPM = re.compile(_NUMBER + r" ?(?:rpm|spin|u/min)\b")
_LENS = re.compile(r"(?<![\d.])(\d{1,3})[ -](\d{2,3}) ?mm\b")
_LENS_BARE = re.compile(r"(?<![\d.])(\d{1,3})[ -/](\d{2,3})(?![\d.])")


def normalise(text: str) -> str:
    """Return text without accents, lower case, only `[a-z0-9.+/&-]`, dots only between digits, inch marks as a word."""
    plain = _INCH_MARK.sub(" inch ", text)
    if not plain.isascii():
        plain = "".join(c for c in unicodedata.normalize("NFKD", plain) if not unicodedata.combining(c))
    plain = plain.lower()
    return " ".join(_LOOSE_DOT.sub(" ", _NOT_KEPT.sub(" ", plain)).split())


def noun_of(category: str) -> str:
    """Return the noun that a query and an item text use for a category of a file."""
    return NOUNS[category] if category in NOUNS else normalise(category)


def tokens(normal: str) -> list[str]:
    """Return the tokens of a normalised text; `a/b` becomes two where both parts are words, quantities or long codes."""
    out: list[str] = []
    for token in normal.split():
        parts = [part for part in token.split("/") if part]
        if len(parts) > 1 and all(_stands_alone(part) for part in parts):
            out += parts
        elif stripped := token.strip("/-."):
            out.append(stripped)
    return out


def _stands_alone(part: str) -> bool:
    return len(part) >= 4 or (part.isalpha() and len(part) >= 3) or _UNIT_TOKEN.fullmatch(part) is not None


def squash(text: str) -> str:
    """Return only the letters and digits, with "+" as "plus": what two spellings of a code or name share."""
    return re.sub(r"[^a-z0-9]", "", text.replace("+", "plus"))


def without_country(code: str) -> str:
    """Return a squashed code without the sales suffix that Samsung's titles carry ("ue55nu8070txxu" -> "ue55nu8070")."""
    return _SALES_SUFFIX.sub("", code)


def codes_match(one: str, other: str) -> bool:
    """Return whether squashed codes are equal, or equal up to a country suffix of 2 with 7 characters or more in common."""
    short, long = sorted((one, other), key=len)
    return one == other or (len(short) >= 7 and len(long) - len(short) <= 2 and long.startswith(short))


class Phrases:
    """Spellings of values, found in token lists.

    Args:
        values: value -> its spellings, each one or more tokens with blanks between them.
    """

    def __init__(self, values: Mapping[str, Iterable[str]]) -> None:
        self._by_first: dict[str, list[tuple[tuple[str, ...], str]]] = {}
        for value, spellings in values.items():
            for words in map(tuple, map(str.split, spellings)):
                self._by_first.setdefault(words[0], []).append((words, value))
        for entries in self._by_first.values():
            entries.sort(key=lambda entry: -len(entry[0]))

    def find(self, words: Sequence[str]) -> list[tuple[int, int, str]]:
        """Return (start, stop, value) of the spellings in words, left to right, longest first, without overlap."""
        found, free = [], 0
        for at, word in enumerate(words):
            if word in self._by_first and at >= free:
                for spelling, value in self._by_first[word]:
                    free = at + len(spelling)
                    if len(spelling) == 1 or tuple(words[at:free]) == spelling:
                        found.append((at, free, value))
                        break
                else:
                    free = at + 1
        return found

    def __contains__(self, word: object) -> bool:
        return word in self._by_first


def is_unit(token: str) -> bool:
    """Return whether a token is a number with a unit, a resolution or a dimension: no model code ("1080p", "4k", "177x54")."""
    return (
        _UNIT_TOKEN.fullmatch(token) is not None
        or re.fullmatch(r"\d+(\.\d+)?(x\d+(\.\d+)?)+[a-z]{0,2}", token) is not None
    )


def is_code(token: str) -> bool:
    """Return whether a squashed token of 4 characters or more mixes letters and digits and is no unit or standard."""
    return (
        len(token) >= 4
        and any(map(str.isdigit, token))
        and any(map(str.isalpha, token))
        and not is_unit(token)
        and _STANDARD.fullmatch(token) is None
    )


def storage_gb(normal: str) -> str | None:
    """Return the largest `<n>gb` that does not stand next to "ram", as "64gb"; None without one."""
    sizes = []
    for match in _GB.finditer(normal):
        before, after = normal[: match.start()].split()[-1:], normal[match.end() :].split()[:1]
        if "ram" not in (*before, *after):
            sizes.append(float(match[1]) * (1024 if match[2] == "tb" else 1))
    return f"{max(sizes):g}gb" if sizes else None


def clocks_ghz(normal: str) -> list[str]:
    """Return the clock rates as "3.6ghz", in order, each once; MHz is the bus."""
    found = [f"{float(match[1]):g}ghz" for match in _GHZ.finditer(normal)]
    return list(dict.fromkeys(found))


def inches(normal: str) -> list[str]:
    """Return written screen sizes as "55inch", rounded, each once."""
    return list(dict.fromkeys(f"{float(match[1]):.0f}inch" for match in _INCH.finditer(normal)))


def code_inches(code: str) -> str | None:
    """Return the size that the model code of a TV opens its digits with ("ue75nu8000" -> "75inch"), if it is 15 to 98."""
    match = re.search(r"\d\d", code)
    return f"{match[0]}inch" if match is not None and 15 <= int(match[0]) <= 98 else None


def lenses(normal: str, known: frozenset[str] = frozenset()) -> list[str]:
    """Return zoom ranges as "18-55mm", each once; without "mm" only the known ones."""
    found = [f"{a}-{b}mm" for a, b in _ascending(_LENS, normal)]
    found += [f"{a}-{b}mm" for a, b in _ascending(_LENS_BARE, normal) if f"{a}-{b}mm" in known]
    return list(dict.fromkeys(found))


def _ascending(pattern: re.Pattern[str], normal: str) -> Iterator[tuple[int, int]]:
    for match in pattern.finditer(normal):
        if int(match[1]) < int(match[2]):
            yield int(match[1]), int(match[2])


def plain_quantities(normal: str) -> list[tuple[str, str]]:
    """Return (entity type, value) of widths, volumes, loads and spin speeds: ("size", "40cm"), ("capacity", "294l"), ..."""
    patterns = (("size", _CM, "cm"), ("capacity", _LITRE, "l"), ("capacity", _KG, "kg"), ("speed", _RPM, "rpm"))
    return [(kind, f"{float(m[1]):g}{unit}") for kind, pattern, unit in patterns for m in pattern.finditer(normal)]
