"""Words of the generated catalogue: families, attributes, brands, concepts and how they are said. All of it is made up."""

from collections.abc import Mapping
from dataclasses import dataclass

ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "colour": ("red", "blue", "black", "white", "green", "grey"),
    "material": ("leather", "cotton", "wool", "nylon", "steel", "plastic"),
    "size": ("small", "medium", "large", "tall"),
    "closure": ("lace", "zip", "buckle", "velcro"),
    "audience": ("men", "women", "kids"),
    "style": ("classic", "sporty", "vintage", "minimal"),
    "function": ("running", "hiking", "gaming", "travel", "cooking", "office"),
    "waterproof": ("yes", "no"),
    "capacity": ("5 units", "10 units", "20 units", "40 units"),
    "season": ("summer", "winter", "spring", "autumn"),
}
"""Attribute -> values. Values are told apart without their attribute, except yes and no."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CategoryFamily:
    """Categories that count as near to each other, and what matters for them."""

    name: str
    nouns: tuple[str, str, str, str]
    """Its four categories. Each has one listed substitute: the first and second, and the third and fourth, of each other."""
    primary: tuple[str, str]
    secondary: tuple[str, ...]
    price: int
    """Typical price."""

    @property
    def attributes(self) -> tuple[str, ...]:
        """Attributes that its items may state."""
        return self.primary + self.secondary


CATEGORY_FAMILIES = (
    CategoryFamily(
        name="footwear",
        nouns=("sneakers", "trainers", "boots", "wellingtons"),
        primary=("size", "waterproof"),
        secondary=("colour", "closure", "material", "season"),
        price=80,
    ),
    CategoryFamily(
        name="electronics",
        nouns=("phone", "tablet", "laptop", "netbook"),
        primary=("capacity", "function"),
        secondary=("colour", "size", "style", "audience"),
        price=400,
    ),
    CategoryFamily(
        name="bags",
        nouns=("backpack", "rucksack", "suitcase", "trolley"),
        primary=("capacity", "function"),
        secondary=("colour", "material", "closure", "waterproof"),
        price=90,
    ),
    CategoryFamily(
        name="clothing",
        nouns=("jacket", "coat", "shirt", "blouse"),
        primary=("size", "season"),
        secondary=("colour", "material", "style", "closure"),
        price=60,
    ),
    CategoryFamily(
        name="kitchen",
        nouns=("pan", "skillet", "kettle", "teapot"),
        primary=("material", "capacity"),
        secondary=("colour", "style", "size", "function"),
        price=40,
    ),
    CategoryFamily(
        name="camping",
        nouns=("tent", "tarp", "hammock", "mat"),
        primary=("season", "waterproof"),
        secondary=("colour", "material", "size", "capacity"),
        price=120,
    ),
)
"""24 categories in 6 families."""

BRANDS = ("norvik", "alpenta", "corvo", "lumina", "tessel", "ostrava", "pelago", "quanta", "rivora", "solene")

CONCEPTS: Mapping[str, tuple[str, str]] = {
    "monsoon": ("waterproof", "yes"),
    "drizzle": ("waterproof", "yes"),
    "puddle": ("waterproof", "yes"),
    "typhoon": ("waterproof", "yes"),
    "canoe": ("waterproof", "yes"),
    "downpour": ("waterproof", "yes"),
    "blizzard": ("season", "winter"),
    "ski": ("season", "winter"),
    "igloo": ("season", "winter"),
    "heatwave": ("season", "summer"),
    "beach": ("season", "summer"),
    "harvest": ("season", "autumn"),
    "blossom": ("season", "spring"),
    "marathon": ("function", "running"),
    "jogger": ("function", "running"),
    "summit": ("function", "hiking"),
    "trail": ("function", "hiking"),
    "esports": ("function", "gaming"),
    "arcade": ("function", "gaming"),
    "layover": ("function", "travel"),
    "airport": ("function", "travel"),
    "banquet": ("function", "cooking"),
    "spreadsheet": ("function", "office"),
    "boardroom": ("function", "office"),
    "toddler": ("audience", "kids"),
    "groom": ("audience", "men"),
    "bride": ("audience", "women"),
    "goth": ("colour", "black"),
    "snowflake": ("colour", "white"),
    "firetruck": ("colour", "red"),
    "ocean": ("colour", "blue"),
    "forest": ("colour", "green"),
    "cowboy": ("material", "leather"),
    "sheep": ("material", "wool"),
    "rustproof": ("material", "steel"),
    "giant": ("size", "tall"),
    "pixie": ("size", "small"),
    "antique": ("style", "vintage"),
    "monk": ("style", "minimal"),
    "athlete": ("style", "sporty"),
}
"""Concept -> the constraint that it implies."""

QUESTIONS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("waterproof", "yes"): ("which {thing} keeps everything dry?", "what {thing} does not let water in?"),
    ("season", "winter"): ("which {thing} is right when it snows?", "what {thing} helps against frost?"),
    ("season", "summer"): ("which {thing} is good on hot days?", "what {thing} suits july?"),
    ("season", "spring"): ("which {thing} suits april?", "what {thing} is right in may?"),
    ("season", "autumn"): ("which {thing} suits october?", "what {thing} is right when leaves fall?"),
    ("function", "running"): ("which {thing} do fast feet need?", "what {thing} goes with a morning jog?"),
    ("function", "hiking"): ("which {thing} goes up a mountain?", "what {thing} is for long walks?"),
    ("function", "gaming"): ("which {thing} is for players?", "what {thing} is good for play?"),
    ("function", "travel"): ("which {thing} goes on a plane?", "what {thing} is for a trip?"),
    ("function", "cooking"): ("which {thing} helps to make dinner?", "what {thing} does a chef use?"),
    ("function", "office"): ("which {thing} is for desk work?", "what {thing} do clerks use?"),
    ("size", "small"): ("which {thing} needs little room?", "what {thing} is tiny?"),
    ("size", "large"): ("which {thing} is really big?", "what {thing} has much room?"),
    ("audience", "kids"): ("which {thing} is for a child?", "what {thing} fits my son of six?"),
    ("material", "steel"): ("which {thing} is of metal?", "what {thing} is magnetic?"),
}
"""(attribute, value) -> questions that ask for it; {thing} is the noun with its other constraints."""

SPOKEN_BEFORE = ("capacity", "style", "colour", "material")
"""Attributes that stand before the noun, in this order; the others follow it."""
SPOKEN_AFTER = ("size", "closure", "function", "season", "audience", "waterproof")


def spoken(attribute: str, value: str) -> str:
    """Return how a title or a query says a value."""
    if attribute == "waterproof":
        return "waterproof" if value == "yes" else "not waterproof"
    if attribute == "size":
        return f"size {value}"
    if attribute == "closure":
        return f"with {value}"
    if attribute in ("function", "season", "audience"):
        return f"for {value}"
    return value


def phrase(noun: str, attributes: Mapping[str, str]) -> str:
    """Return a noun with its attributes as a person would say them: "red leather boots size large waterproof"."""
    before = [spoken(name, attributes[name]) for name in SPOKEN_BEFORE if name in attributes]
    after = [spoken(name, attributes[name]) for name in SPOKEN_AFTER if name in attributes]
    return " ".join([*before, noun, *after])
