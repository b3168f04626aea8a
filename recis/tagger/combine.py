"""Tag with rules and a neural tagger together, and open either by path.

Spans of both are taken; where two overlap, the rules' span wins only when its conf is at least 0.95, otherwise the neural one.
"""

from pathlib import Path
from typing import Protocol

from recis.errors import DataError
from recis.tagger.rules import RuleTagger, Span
from recis.tagger.text import Text

RULES_WIN_FROM = 0.95
RULES_FILE = "rules.json"


class TextTagger(Protocol):
    """What tags a text: rules, a neural tagger, or both."""

    def tag_text(self, text: Text) -> list[Span]: ...


class CombinedTagger:
    """Rules or neural."""

    def __init__(self, rules: TextTagger, neural: TextTagger) -> None:
        self.rules, self.neural = rules, neural

    def tag_text(self, text: Text) -> list[Span]:
        """Return the spans of both, left to right, none overlapping."""
        return combine(self.rules.tag_text(text), self.neural.tag_text(text))


def combine(by_rules: list[Span], by_neural: list[Span]) -> list[Span]:
    """Merge two sets of spans of one text."""
    sure = [span for span in by_rules if span.conf >= RULES_WIN_FROM]
    kept = [span for span in by_neural if not any(_overlap(span, other) for other in sure)]
    rest = [
        span for span in by_rules if span.conf < RULES_WIN_FROM and not any(_overlap(span, other) for other in kept)
    ]
    return sorted([*sure, *kept, *rest], key=lambda span: span.start)


def _overlap(one: Span, two: Span) -> bool:
    return one.start < two.end and two.start < one.end


def load_tagger(path: str | Path) -> tuple[TextTagger, str]:
    """Return the tagger at a path, and the name of its tokenizer.

    A file is read as rules. A folder may hold a neural tagger, rules.json, or both.

    Raises:
        ValueError: there is no tagger, or its two parts read texts with different tokenizers.
    """
    folder = Path(path)
    if folder.is_file():
        rules = RuleTagger.load(folder)
        return rules, rules.rules.tokenizer
    has_rules, has_neural = (folder / RULES_FILE).is_file(), (folder / "model.json").is_file()
    if not has_rules and not has_neural:
        raise DataError(
            f"holds no tagger: give a rule file, or a folder with {RULES_FILE} or model.json", file=str(path)
        )
    if not has_neural:
        return load_tagger(folder / RULES_FILE)
    from recis.tagger.neural import TaggerModel

    neural = TaggerModel.load(folder)
    if not has_rules:
        return neural, neural.tokenizer
    rules = RuleTagger.load(folder / RULES_FILE)
    if rules.rules.tokenizer != neural.tokenizer:
        raise DataError(
            f"rules are for tokenizer {rules.rules.tokenizer!r}, the neural tagger for {neural.tokenizer!r}",
            file=str(path),
        )
    return CombinedTagger(rules, neural), neural.tokenizer
