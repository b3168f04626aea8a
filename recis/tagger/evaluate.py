"""Score spans against gold ones, and read BIO labels.

    exact span micro F1   a span counts when its type and both boundaries agree
    word accuracy         share of words whose type (`O` outside spans) agrees

precision = correct / predicted, recall = correct / gold, F1 = 2 correct / (predicted + gold); 0 where there is nothing.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from recis.tagger.rules import Span

Typed = tuple[int, int, str]  # start, end, type


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Spans that agree, that were predicted and that are gold."""

    correct: int
    predicted: int
    gold: int

    @property
    def precision(self) -> float:
        return self.correct / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        return self.correct / self.gold if self.gold else 0.0

    @property
    def f1(self) -> float:
        both = self.predicted + self.gold
        return 2 * self.correct / both if both else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanScores:
    """Scores of a set of texts."""

    micro: Counts
    per_type: Mapping[str, Counts]
    word_accuracy: float

    def flat(self) -> dict[str, float]:
        """Return the figures under flat names, as the commands print them."""
        total = {"precision": self.micro.precision, "recall": self.micro.recall, "micro_f1": self.micro.f1}
        return {
            **total,
            "word_accuracy": self.word_accuracy,
            **{f"f1.{name}": counts.f1 for name, counts in sorted(self.per_type.items())},
        }


def score_spans(
    gold: Sequence[Sequence[Typed]], predicted: Sequence[Iterable[Typed | Span]], num_words: Sequence[int]
) -> SpanScores:
    """Compare spans text by text; num_words holds the number of words of each text.

    Raises:
        ValueError: the three differ in length.
    """
    if not len(gold) == len(predicted) == len(num_words):
        raise ValueError(
            f"gold, predicted and num_words must be as long; got {len(gold)}, {len(predicted)}, {len(num_words)}"
        )
    correct, seen, there = Counter[str](), Counter[str](), Counter[str]()
    right_words = 0
    for truth, guess, width in zip(gold, predicted, num_words, strict=True):
        true = set(truth)
        guessed = {(span.start, span.end, span.type) if isinstance(span, Span) else span for span in guess}
        there.update(name for _, _, name in true)
        seen.update(name for _, _, name in guessed)
        correct.update(name for _, _, name in true & guessed)
        right_words += sum(a == b for a, b in zip(_words(true, width), _words(guessed, width), strict=True))
    per_type = {
        name: Counts(correct=correct[name], predicted=seen[name], gold=there[name]) for name in sorted({*seen, *there})
    }
    micro = Counts(correct=correct.total(), predicted=seen.total(), gold=there.total())
    return SpanScores(micro=micro, per_type=per_type, word_accuracy=right_words / max(1, sum(num_words)))


def _words(spans: Iterable[Typed], width: int) -> list[str]:
    types = ["O"] * width
    for start, end, name in spans:
        types[start:end] = [name] * (end - start)
    return types


def bio_spans(
    labels: Sequence[str], *, text_id: str = "", types: Iterable[str] | None = None, repair_bio: bool = False
) -> tuple[list[Typed], int]:
    """Return the spans of BIO labels and how many labels were repaired: a stray I- becomes B- with repair_bio.

    Raises:
        ValueError: a label is not O, B-type or I-type, its type is not among `types`, or I- follows nothing of its type.
    """
    spans: list[Typed] = []
    repaired = 0
    known = None if types is None else set(types)
    for place, name in enumerate(labels):
        head, _, kind = name.partition("-")
        if name != "O" and (head not in ("B", "I") or not kind):
            raise ValueError(f"text {text_id!r}, word {place}: label must be O, B-type or I-type; got {name!r}")
        if kind and known is not None and kind not in known:
            raise ValueError(f"text {text_id!r}, word {place}: type {kind!r} is not in the schema {sorted(known)}")
        if head == "I":
            if spans and spans[-1][1] == place and spans[-1][2] == kind:
                spans[-1] = (spans[-1][0], place + 1, kind)
                continue
            if not repair_bio:
                raise ValueError(
                    f"text {text_id!r}, word {place}: {name!r} follows no {kind} span; repair_bio=True reads it as B-{kind}"
                )
            repaired += 1
        if name != "O":
            spans.append((place, place + 1, kind))
    return spans, repaired


def bio_labels(spans: Iterable[Typed | Span], num_words: int) -> list[str]:
    """Return the BIO labels of spans that do not overlap."""
    labels = ["O"] * num_words
    for span in spans:
        start, end, kind = (span.start, span.end, span.type) if isinstance(span, Span) else span
        labels[start:end] = [f"B-{kind}", *[f"I-{kind}"] * (end - start - 1)]
    return labels


def check_spans(spans: Iterable[Typed], num_words: int, *, text_id: str, types: Iterable[str] | None = None) -> None:
    """Accept gold spans, or say what is wrong.

    Raises:
        ValueError: a span lies outside the text, is empty, overlaps another, or has a type outside `types`.
    """
    known = None if types is None else set(types)
    end_before = 0
    for start, end, kind in sorted(spans):
        if not 0 <= start < end <= num_words:
            raise ValueError(f"text {text_id!r}: span [{start}, {end}) must lie inside its {num_words} tokens")
        if start < end_before:
            raise ValueError(f"text {text_id!r}: span [{start}, {end}) overlaps one that ends at {end_before}")
        if known is not None and kind not in known:
            raise ValueError(f"text {text_id!r}: type {kind!r} is not in the schema {sorted(known)}")
        end_before = end
