"""The toy corpus of fifteen titles: texts, gold spans, and recorded answers of two templates."""

from recis.tagger.evaluate import Typed
from recis.tagger.experts import TableExpert
from recis.tagger.text import Text, tokenize

BRAND, PRODUCT, COLOR = "Brand", "Product", "Color"
TYPES = (BRAND, PRODUCT, COLOR)
TITLES = (
    "nike running shoes for men",
    "adidas running shoes for women",
    "puma running shoes for kids",
    "red nike hoodie for men",
    "blue adidas hoodie for women",
    "black puma jacket for men",
    "zara dress for women",
    "red zara dress for kids",
    "nike cap for men",
    "new balance running shoes for women",
    "asics running shoes for men",
    "green asics jacket for women",
    "blue new balance hoodie for men",
    "puma cap for kids",
    "shoes rack for home",
)
GOLD = {
    BRAND: ("nike", "adidas", "puma", "zara", "new balance", "asics"),
    PRODUCT: ("running shoes", "hoodie", "jacket", "dress", "cap", "shoes rack"),
    COLOR: ("red", "blue", "black", "green"),
}
ANSWERS = {
    **dict.fromkeys(("nike", "adidas", "puma"), (BRAND, BRAND)),
    **dict.fromkeys(("running shoes", "hoodie", "jacket", "dress", "shoes"), (PRODUCT, PRODUCT)),
    **dict.fromkeys(("red", "blue"), (COLOR, COLOR)),
    **dict.fromkeys(("men", "women", "for", "running", "new", "balance", "new balance"), ("none", "none")),
    "zara": (PRODUCT, BRAND),
    "kids": (BRAND, "none"),
    "cap": (PRODUCT, "none"),
    "asics": (BRAND, "none"),
}


def toy_texts() -> list[Text]:
    return [tokenize(title) for title in TITLES]


def toy_expert() -> TableExpert:
    return TableExpert({phrase: {"T1": one, "T2": two} for phrase, (one, two) in ANSWERS.items()})


def toy_gold() -> list[list[Typed]]:
    """Every occurrence of a gold phrase, the longer one where two begin at a word."""
    type_of = {phrase: name for name, phrases in GOLD.items() for phrase in phrases}
    found: list[list[Typed]] = []
    for text in toy_texts():
        spans: list[Typed] = []
        start = 0
        while start < len(text.tokens):
            ends = [
                end for end in (start + 2, start + 1) if text.surface(start, end) in type_of and end <= len(text.tokens)
            ]
            if ends:
                spans.append((start, ends[0], type_of[text.surface(start, ends[0])]))
            start = ends[0] if ends else start + 1
        found.append(spans)
    return found
