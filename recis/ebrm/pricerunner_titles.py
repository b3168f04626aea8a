"""What a PriceRunner title states: the entities of an offer, from its title and category alone.

    'panasonic viera tx 32a400e led tv'   -> brand panasonic, series viera, model tx32a400e, size 32inch (from the code)
    'liebherr cufr 3311 freistehend rot'  -> brand liebherr, model cufr3311, form freestanding, colour red

and whether a title states a wanted value, a differing one, or neither (`TitleFacts.says`).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

from recis.ebrm.entities import Entity, EntitySchema, TypeConfig
from recis.ebrm.pricerunner_labels import NAMED_CATEGORIES, Dictionaries, model_forms
from recis.ebrm.pricerunner_text import (
    COLOURS,
    FORMS,
    Phrases,
    clocks_ghz,
    code_inches,
    codes_match,
    inches,
    is_code,
    is_unit,
    lenses,
    noun_of,
    plain_quantities,
    squash,
    storage_gb,
    tokens,
    without_country,
)

_T = TypeVar("_T")
Says = Literal["stated", "differs", "silent"]
MAX_RUN_TOKENS = 6
MIN_INSIDE_LENGTH = 6
"""A code this long counts as stated inside a longer token too ("ue55nu8070" in "ue55nu8070txxu")."""
MAX_NAME_TOKENS = 5
_CORES = re.compile(r"\b(quad|dual|six|eight|octa|hexa|twelve|\d+) (core|kern)\b")
_YEAR = re.compile("20[01]\\d")
_BEFORE_NO_CODE = frozenset({"serie", "series", "iq", "class", "socket", "lga"})
_UNIT_WORDS = frozenset(
    (
        "gb",
        "mb",
        "tb",
        "ghz",
        "mhz",
        "cm",
        "mm",
        "inch",
        "zoll",
        "l",
        "kg",
        "litre",
        "litres",
        "w",
        "watt",
        "rpm",
        "spin",
    )
)
_QUANTITY_WORDS = _UNIT_WORDS | frozenset(("place", "mp", "mpix", "core", "cores", "kern", "kerne", "threads"))
_COLOUR_PHRASES, _FORM_PHRASES = Phrases(COLOURS), Phrases(FORMS)


@dataclass(frozen=True, kw_only=True)
class TitleFacts:
    """What one title states, values as in labels; texts are normalised."""

    category: str
    words: tuple[str, ...]
    brands: tuple[str, ...]
    series: tuple[str, ...]
    models: tuple[str, ...]
    """Codes squashed, names with blanks."""
    secondary: dict[str, tuple[str, ...]]
    """Attribute of SECONDARY -> values."""
    extras: tuple[tuple[str, str], ...]
    """(entity type, value) that no label states: widths, volumes, loads, spin speeds."""

    @cached_property
    def runs(self) -> frozenset[str]:
        """All joined runs of up to 6 tokens: what a squashed code or name is looked for in."""
        parts = [squash(word) for word in self.words]
        return frozenset(
            "".join(parts[at:stop])
            for at in range(len(parts))
            for stop in range(at + 1, min(at + MAX_RUN_TOKENS, len(parts)) + 1)
        )

    @cached_property
    def joined(self) -> str:
        """All tokens, squashed and joined."""
        return "".join(map(squash, self.words))

    def values(self, attribute: str) -> tuple[str, ...]:
        """Return the stated values of "brand", "series", "model" or a secondary attribute."""
        named = {"brand": self.brands, "series": self.series, "model": self.models}
        return named[attribute] if attribute in named else self.secondary.get(attribute, ())

    def says(self, attribute: str, wanted: Sequence[str]) -> Says:
        """Return whether the title states one of the wanted values, only others, or none.

        A model is stated when its string, its code or its string without the series stands in the title, joined in any way.
        """
        if attribute == "model":
            if any(self._states(form) for model in wanted for form in model_forms(model)):
                return "stated"
            return "differs" if self.models else "silent"
        own = self.values(attribute)
        if attribute == "series" and any(value in self.words for value in wanted):
            return "stated"
        return "stated" if set(own) & set(wanted) else "differs" if own else "silent"

    def _states(self, form: str) -> bool:
        if len(form) >= MIN_INSIDE_LENGTH and any(map(str.isdigit, form)):
            if form in self.joined:
                return True
        elif form in self.runs:
            return True
        return any(codes_match(form, squash(own)) for own in self.models)


def title_facts(normal: str, category: str, known: Dictionaries) -> TitleFacts:
    """Return what a normalised title states, read with the dictionaries of the train part."""
    words = tokens(normal)
    spans = [span for span in known.brand_phrases.find(words) if span[0] == 0 or _anywhere(span[2])]
    models = tuple(_models(normal, category, known))
    return TitleFacts(
        category=category,
        words=tuple(words),
        brands=_distinct(brand for _, _, brand in spans),
        series=_distinct(word for word in words if word in known.series),
        models=models,
        secondary={name: values for name, values in _secondary(normal, words, models, category, known) if values},
        extras=_distinct(plain_quantities(normal)),
    )


def title_entities(facts: TitleFacts, schema: EntitySchema) -> tuple[Entity, ...]:
    """Return the entities of an offer: its category, and what its title states."""
    pairs = [("category", noun_of(facts.category))]
    for name in ("brand", "series", "model"):
        pairs += [(name, value) for value in facts.values(name)]
    pairs += [(name, value) for name, values in facts.secondary.items() for value in values]
    entities = [schema.entity(name, value, source="rule") for name, value in (*pairs, *facts.extras) if name in schema]
    return tuple({entity.id: entity for entity in entities}.values())


def pricerunner_schema() -> EntitySchema:
    """Return the ten types of the task; category, brand and model are hard."""
    kinds = {"model": "code", "capacity": "number", "size": "number", "speed": "number"}
    names = ("category", "brand", "series", "model", "capacity", "size", "speed", "colour", "form", "lens")
    hard = ("category", "brand", "model")
    return EntitySchema(
        types=tuple(TypeConfig(name=name, kind=kinds.get(name, "text"), hard=name in hard) for name in names)  # pyright: ignore[reportArgumentType]
    )


def _anywhere(brand: str) -> bool:
    return " " in brand or (len(brand) > 1 and brand not in COLOURS)


def _models(normal: str, category: str, known: Dictionaries) -> Iterable[str]:
    """Return codes and model names, each once, in order."""
    words = tokens(_CORES.sub(" ", normal))
    brand_stops = {stop for _, stop, _ in known.brand_phrases.find(words)}
    found: dict[str, None] = {}
    for at, word in enumerate(words):
        token = squash(word.split("/")[0])
        before, after = words[at - 1] if at else "", words[at + 1] if at + 1 < len(words) else ""
        if category in NAMED_CATEGORIES and (name := _name_from(words, at, at in brand_stops, known)):
            found[name] = None
        if before in _BEFORE_NO_CODE or not any(map(str.isdigit, token)) or is_unit(token):
            continue
        if (len(token) <= 4 and after in _QUANTITY_WORDS) or (before == "x" and at > 1 and words[at - 2][0].isdigit()):
            continue
        version = after if re.fullmatch(r"v\d", after) else ""
        prefix = before.isalpha() and len(before) <= 6 and (before in known.prefixes or at - 1 in brand_stops)
        split_code = re.fullmatch(r"[a-z]\d", before) and re.fullmatch(r"\d{3,}[a-z]*\d*", token)  # "e5 4610v3"
        if split_code or (prefix and len(before + token) >= (3 if category in NAMED_CATEGORIES else 4)):
            found[before + token + version] = None
        if is_code(token):
            found[without_country(token) + version] = None
    return found


def _name_from(words: list[str], at: int, after_brand: bool, known: Dictionaries) -> str | None:
    """Return the model name that opens at `at`: a series word, or a number right after the brand, and what follows it."""
    named = words[at] in known.series
    if not named and not (after_brand and any(map(str.isdigit, words[at])) and not is_unit(words[at])):
        return None
    stop = at + 1
    while stop < len(words) and stop - at <= MAX_NAME_TOKENS:
        word, after = words[stop], words[stop + 1] if stop + 1 < len(words) else ""
        number = any(map(str.isdigit, word)) and "." not in word and not is_unit(word) and after not in _QUANTITY_WORDS
        number = number and ((named and stop - at <= 3) or _YEAR.fullmatch(word) is not None)
        if not (number or word in known.suffixes or (named and stop == at + 1 and len(word) <= 2)):
            break
        stop += 1
    return " ".join(words[at:stop]) if stop > at + 1 or not named else None


def _secondary(
    normal: str, words: list[str], models: Sequence[str], category: str, known: Dictionaries
) -> Iterable[tuple[str, tuple[str, ...]]]:
    yield "colour", _distinct(value for _, _, value in _COLOUR_PHRASES.find(words))
    yield "form", _distinct(value for _, _, value in _FORM_PHRASES.find(words))
    if category == "Mobile Phones":
        size = storage_gb(normal)
        yield "capacity", () if size is None else (size,)
    elif category == "CPUs":
        yield "speed", tuple(clocks_ghz(normal))
    elif category == "Digital Cameras":
        yield "lens", tuple(lenses(normal, known.lenses))
    elif category == "TVs":
        yield "size", _screen_sizes(normal, words, models)


def _screen_sizes(normal: str, words: list[str], models: Sequence[str]) -> tuple[str, ...]:
    """Return written inches, else a bare 15 to 98, else the size in a model code."""
    written = inches(normal)
    bare = [f"{word}inch" for word in words if re.fullmatch(r"\d\d", word) and 15 <= int(word) <= 98]
    coded = [size for model in models if (size := code_inches(squash(model))) is not None]
    return _distinct(written or bare or coded)


def _distinct(values: Iterable[_T]) -> tuple[_T, ...]:
    return tuple(dict.fromkeys(values))
