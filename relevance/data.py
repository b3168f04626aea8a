"""Graded (query, item) pairs: what a row is, and what must hold within and between rows.

A pair carries the item's record, and, where they are known, the gold label, the gold steps behind it and one retrieved
chunk. Everything but query and item may be absent: a model is scored on pairs without a label, trained on pairs with one.
The columns are ours; `files.py` reads and writes them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from recis.errors import DataError, nearest
from relevance.labels import (
    ATTRIBUTE_VERDICTS,
    CATEGORY_VERDICTS,
    CONTEXT_DECISIONS,
    AttributeVerdict,
    Fields,
    Label,
    Parsed,
    violations,
)

Family = Literal["plain", "negation", "alternative", "question", "knowledge"]
FAMILIES = ("plain", "negation", "alternative", "question", "knowledge")
HARD_FAMILIES = FAMILIES[1:]
"""The hard ones; source: DyKnow-RAG arXiv:2510.11122."""
SPLITS = ("train", "dev", "test")
CHUNK_KINDS = ("helpful", "partial", "irrelevant", "misleading")
STEP_SOURCES = ("gold", "human", "ebrm", "rm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """The item's record: what the label follows. The title is what the model is shown, and may say less."""

    category: str = ""
    brand: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    price: float = 0.0
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepGold:
    """The right steps of a pair; each part may be None where it is not known, and is then not scored."""

    category: str | None = None
    attributes: Mapping[str, str] | None = None
    """Constraint of the query -> ok, miss or unknown; empty when the query states none."""
    rule: str | None = None
    """Id of the rule that decides."""
    wanted: Mapping[str, str] = field(default_factory=dict)
    """Constraint -> the value that the query asks for; only the oracle's rationales show it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A retrieved text about the pair. Kind and decision are for measuring: no prompt and no reward sees them."""

    id: str
    text: str
    score: float = 0.0
    kind: str | None = None
    decision: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A query with one item."""

    id: str
    query_id: str
    query: str
    item_id: str
    item: Item
    label: int | None = None
    family: str = "plain"
    steps: StepGold | None = None
    steps_source: str = "gold"
    negated: tuple[str, ...] = ()
    """Attribute values that the query excludes ("lace")."""
    chunk: Chunk | None = None
    split: str = "train"

    @property
    def states_negated(self) -> bool:
        """Whether the item record states a value that the query excludes."""
        return bool(self.negated) and any(value in self.negated for value in self.item.attributes.values())


def check_pair(pair: Pair, *, deciding_labels: Mapping[str, int] | None = None) -> None:
    """Refuse a pair with a value outside its set, or with gold steps that contradict its label.

    Args:
        pair: the pair.
        deciding_labels: rule id -> the label that this rule gives (`RuleBase.deciding_labels`); None leaves rules unchecked.

    Raises:
        DataError: names the pair, the column, the value and the rule.
    """
    _check_in(pair, "split", pair.split, SPLITS)
    _check_in(pair, "family", pair.family, FAMILIES)
    _check_in(pair, "steps_source", pair.steps_source, STEP_SOURCES)
    if pair.label is not None and (isinstance(pair.label, bool) or pair.label not in tuple(Label)):
        raise _refusal(pair, "label", pair.label, "a label is 1, 2, 3 or 4, or null")
    for column in ("id", "query_id", "query", "item_id"):
        if not getattr(pair, column):
            raise _refusal(pair, column, "", "must not be empty")
    if not pair.item.title:
        raise _refusal(pair, "item.title", "", "must not be empty: it is what the model is shown")
    if pair.chunk is not None:
        _check_in(pair, "chunk.kind", pair.chunk.kind, CHUNK_KINDS, is_optional=True)
        _check_in(pair, "chunk.decision", pair.chunk.decision, CONTEXT_DECISIONS, is_optional=True)
        if not pair.chunk.text:
            raise _refusal(pair, "chunk.text", "", "must not be empty; leave the chunk null")
    if pair.steps is not None:
        _check_steps(pair, pair.steps, deciding_labels)


def _check_steps(pair: Pair, steps: StepGold, deciding_labels: Mapping[str, int] | None) -> None:
    _check_in(pair, "steps.category", steps.category, CATEGORY_VERDICTS, is_optional=True)
    for name, verdict in (steps.attributes or {}).items():
        _check_in(pair, f"steps.attributes.{name}", verdict, ATTRIBUTE_VERDICTS)
    if deciding_labels is not None and steps.rule is not None:
        if steps.rule not in deciding_labels:
            raise _refusal(pair, "steps.rule", steps.rule, f"no such rule; {nearest(steps.rule, deciding_labels)}")
        decided = deciding_labels[steps.rule]
        if pair.label is not None and decided != pair.label:
            raise _refusal(
                pair, "steps.rule", steps.rule, f"this rule gives label {decided}, the pair has {pair.label}"
            )
    if pair.label is not None:
        broken = violations(Parsed(label=Label(pair.label), fields=gold_fields(steps)), pair)
        if broken:
            raise _refusal(
                pair, "steps", steps, f"the gold steps contradict label {pair.label}: they break {broken[0]}"
            )


def gold_fields(steps: StepGold) -> Fields:
    """Return the gold steps as the fields of an answer; a constraint whose wanted value is not known shows "any"."""
    attribute = None
    if steps.attributes is not None:
        attribute = tuple(
            AttributeVerdict(name=name, value=steps.wanted.get(name, "any"), verdict=verdict)
            for name, verdict in steps.attributes.items()
        )
    return Fields(category=steps.category, attribute=attribute, rule=steps.rule)


def check_pairs(pairs: Iterable[Pair]) -> None:
    """Refuse a duplicate pair id, and a query or item that occurs in two splits.

    A query is looked for by its id and by its text.

    Raises:
        DataError: names the pair, the column and both splits.
    """
    ids: set[str] = set()
    homes: dict[tuple[str, str], str] = {}
    for pair in pairs:
        if pair.id in ids:
            raise _refusal(pair, "id", pair.id, "a pair id occurs once")
        ids.add(pair.id)
        for column, value in (("query_id", pair.query_id), ("query", pair.query), ("item_id", pair.item_id)):
            home = homes.setdefault((column, value), pair.split)
            if home != pair.split:
                raise _refusal(pair, column, value, f"is in the splits {home!r} and {pair.split!r}")


def count_missing(pairs: Sequence[Pair]) -> dict[str, int]:
    """Return how many pairs lack each part that a recipe may need: label, category, attributes, rule, chunk.

    A recipe that trains on a part holds its share against `RewardConfig.max_missing`: see `check_missing`.
    """
    counts: dict[str, int] = dict.fromkeys(("label", "category", "attributes", "rule", "chunk"), 0)
    for pair in pairs:
        counts["label"] += pair.label is None
        counts["chunk"] += pair.chunk is None
        for part in ("category", "attributes", "rule"):
            counts[part] += pair.steps is None or getattr(pair.steps, part) is None
    return counts


def check_missing(pairs: Sequence[Pair], needed: Sequence[str], *, max_missing: float = 0.5) -> dict[str, int]:
    """Return the counts of the needed parts, or refuse data where too many pairs lack one.

    Args:
        pairs: the training data.
        needed: parts that the recipe uses, out of the keys of `count_missing`.
        max_missing: largest share of pairs that may lack a part.

    Raises:
        DataError: no pair at all, or a part is missing in a larger share; names part, counts and limit.
    """
    if not pairs:
        raise DataError("there is no pair to train on")
    counts = count_missing(pairs)
    for part in needed:
        if counts[part] > max_missing * len(pairs):
            raise DataError(
                f"{counts[part]} of {len(pairs)} pairs lack {part!r}, more than the share {max_missing}",
                option="give them, raise max_missing, or train a recipe that does not use this part",
            )
    return {part: counts[part] for part in needed}


def _check_in(pair: Pair, column: str, value: Any, known: Sequence[str], *, is_optional: bool = False) -> None:
    if value is None and is_optional:
        return
    if value not in known:
        raise _refusal(pair, column, value, f"is one of {', '.join(known)}")


def _refusal(pair: Pair, column: str, value: object, problem: str) -> DataError:
    return DataError(problem, unit=f"pair {pair.id!r}", column=column, value=value)
