"""Canonical forms of texts and numbers: what makes two spellings one entity, or one query.

    text     NFKC, casefold, white space trimmed and collapsed                    " Running  Shoes" -> "running shoes"
    number   a decimal with a unit, in the base unit of its family                "1 TB" -> "1024gb", "3,60 GHz" -> "3.6ghz"

A decimal comma is read as a point; a comma before exactly three digits separates thousands. Numbers are decimals, not
floats, so that one quantity has one text. Inches are not turned into centimetres: shops quote screens in the one and
fridges in the other, and a person reads the id.
"""

import re
import unicodedata
from decimal import Decimal
from typing import NamedTuple

from recis.errors import DataError

# unit -> base unit of its family, factor
UNITS: dict[str, tuple[str, Decimal]] = {
    "tb": ("gb", Decimal(1024)),
    "gb": ("gb", Decimal(1)),
    "mb": ("gb", Decimal(1) / Decimal(1024)),
    "ghz": ("ghz", Decimal(1)),
    "mhz": ("ghz", Decimal("0.001")),
    "m": ("cm", Decimal(100)),
    "cm": ("cm", Decimal(1)),
    "mm": ("cm", Decimal("0.1")),
    "inch": ("inch", Decimal(1)),
    "inches": ("inch", Decimal(1)),
    "in": ("inch", Decimal(1)),
    '"': ("inch", Decimal(1)),
    "zoll": ("inch", Decimal(1)),
    "l": ("l", Decimal(1)),
    "litre": ("l", Decimal(1)),
    "liter": ("l", Decimal(1)),
    "litres": ("l", Decimal(1)),
    "ml": ("l", Decimal("0.001")),
    "kg": ("kg", Decimal(1)),
    "g": ("kg", Decimal("0.001")),
    "w": ("w", Decimal(1)),
    "kw": ("w", Decimal(1000)),
    "rpm": ("rpm", Decimal(1)),
    "mp": ("mp", Decimal(1)),
    "megapixel": ("mp", Decimal(1)),
    "mah": ("mah", Decimal(1)),
}
_SURROGATE = re.compile("[\ud800-\udfff]")
_NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:[.,]\d+)?"
_UNIT = "|".join(sorted(map(re.escape, UNITS), key=len, reverse=True))
_QUANTITY = re.compile(rf"(?<![\w.,])({_NUMBER})[\s-]?({_UNIT})(?![a-z0-9])")
_WHOLE = re.compile(rf"({_NUMBER})\s*({_UNIT})?")


class Quantity(NamedTuple):
    """A number in the base unit of its family; unit "" where none was given."""

    value: Decimal
    unit: str

    def text(self) -> str:
        """Return the canonical text: no exponent, no trailing zeros, at most 6 digits behind the point."""
        digits = f"{round(self.value, 6):f}"
        return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + self.unit


def canonical_text(text: str) -> str:
    """Return `text` in NFKC, case folded, with white space trimmed and collapsed to single blanks.

    Raises:
        DataError: the text holds a lone surrogate, so it has no UTF-8 form: it was decoded from broken bytes.
    """
    if not text.isascii() and _SURROGATE.search(text):
        raise DataError(
            "not valid Unicode, so it has no UTF-8 form", value=text, option="decode its bytes with errors='replace'"
        )
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def parse_quantity(text: str) -> Quantity | None:
    """Return the quantity that a canonical text is, as a whole; None when it is none."""
    match = _WHOLE.fullmatch(text)
    return None if match is None else _quantity(match[1], match[2])


def find_quantities(text: str) -> tuple[Quantity, ...]:
    """Return the numbers with a unit in a canonical text, in order."""
    return tuple(_quantity(match[1], match[2]) for match in _QUANTITY.finditer(text))


def split_at_quantities(text: str) -> list[str]:
    """Return what stands between the numbers with a unit in a canonical text."""
    return _QUANTITY.split(text)[:: _QUANTITY.groups + 1]


def canonical_number(text: str) -> str:
    """Return the canonical text of a number with its unit; a text that is no number stays a canonical text."""
    plain = canonical_text(text)
    quantity = parse_quantity(plain)
    return plain if quantity is None else quantity.text()


def _quantity(number: str, unit: str | None) -> Quantity:
    thousands = re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", number) is not None
    value = Decimal(number.replace(",", "") if thousands else number.replace(",", "."))
    if not unit:
        return Quantity(value, "")
    base, factor = UNITS[unit]
    return Quantity(value * factor, base)
