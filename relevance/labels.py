"""The relevance labels, the grammar of a graded answer, and the hard rules that an answer must not break.

    3<category>near</category><attribute>colour=red:ok</attribute><rule>S01</rule><verdict>3</verdict>

The label is the first character, the rationale follows as a fixed sequence of blocks: the profile. `render` writes such a
text, `grammar.parse` reads it strictly, `violations` checks what it says against itself and against the item record.
Source: four labels and the answer-first order, TaoSR1 arXiv:2508.12365 and DyKnow-RAG arXiv:2510.11122; tags, the wording
of the definitions and the hard rules are ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

from recis.errors import ConfigError, nearest

if TYPE_CHECKING:
    from relevance.data import Pair


class Label(IntEnum):
    """How relevant an item is to a query; 4 and 3 are the good side."""

    IRRELEVANT = 1
    """Unrelated category."""
    MISMATCH = 2
    """Near category, or a primary constraint violated."""
    RELATED = 3
    """Right category or accepted substitute, one secondary constraint missed or unverifiable."""
    EXCELLENT = 4
    """Category and all stated constraints met."""


CATEGORY_VERDICTS = ("match", "near", "mismatch")
ATTRIBUTE_VERDICTS = ("ok", "miss", "unknown")
CONTEXT_DECISIONS = ("adopt", "partial", "ignore", "none")
TAGS = ("query", "item", "category", "attribute", "rule", "context", "why", "verdict")
"""Every tag of the grammar."""
TEXT_TAGS = ("query", "item", "why")
"""Tags that hold free text of 1 to MAX_TEXT characters without "<" and ">"."""
MAX_TEXT, MAX_VALUE, MAX_NAME, MAX_COMPLETION = 200, 64, 32, 8192
HARD_RULES = ("H1", "H2", "H3", "H4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Which blocks an answer has, in which order."""

    name: str
    tags: tuple[str, ...]
    is_label_last: bool = False
    """Body first, label last: a baseline for SFT and greedy scoring, never for RL or prefill scoring."""

    def __post_init__(self) -> None:
        unknown = [tag for tag in self.tags if tag not in TAGS]
        if unknown or len(set(self.tags)) < len(self.tags):
            raise ConfigError(
                f"profile {self.name!r}: each tag at most once, out of {', '.join(TAGS)}; got {self.tags}"
            )

    @property
    def num_steps(self) -> int:
        """K: the label and one step per block."""
        return 1 + len(self.tags)

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the K steps: "label", then the tags."""
        return ("label", *self.tags)


PROFILES: Mapping[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(name="label_only", tags=()),
        Profile(name="post_cot", tags=("query", "item", "category", "attribute", "rule", "verdict")),
        Profile(name="compact", tags=("category", "attribute", "rule", "verdict")),
        Profile(name="dyknow", tags=("context", "why", "verdict")),
        Profile(name="dyknow_steps", tags=("context", "category", "attribute", "rule", "verdict")),
        Profile(name="think_first", tags=("category", "attribute", "rule", "verdict"), is_label_last=True),
    )
}


def find_profile(name: str) -> Profile:
    """Return a profile by its name.

    Raises:
        ConfigError: no such profile; the nearest name is told.
    """
    if name not in PROFILES:
        raise ConfigError(f"unknown profile {name!r}; {nearest(name, PROFILES)}")
    return PROFILES[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttributeVerdict:
    """One `name=value:verdict` of the attribute block: the constraint of the query and whether the item meets it."""

    name: str
    value: str
    verdict: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """What the blocks of an answer say; None = absent or malformed. Field names are the tag names."""

    query: str | None = None
    item: str | None = None
    category: str | None = None
    attribute: tuple[AttributeVerdict, ...] | None = None
    """Empty when the query states no constraint."""
    rule: str | None = None
    context: tuple[str, str | None] | None = None
    """Decision about the chunk, and the text behind it."""
    why: str | None = None
    verdict: int | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a completion: which rule, and the character it was found at."""

    kind: str
    at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """A completion as read by `grammar.parse`."""

    label: Label | None
    fields: Fields = field(default_factory=Fields)
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Characters of each well-formed block of the profile, tags included: first, one past the last."""
    errors: tuple[Fault, ...] = ()
    """In order of position, at most one per position."""

    @property
    def ok(self) -> bool:
        """Whether the text is exactly what the profile asks for."""
        return not self.errors


def render(label: int, fields: Fields, profile: Profile) -> str:
    """Write the completion of a profile, without the eos.

    `grammar.parse` gives label and fields back when every field is legal; fields of other profiles are left out.

    Raises:
        ValueError: a label outside 1 to 4, or a field of the profile is None.
    """
    body = "".join(f"<{tag}>{_block_text(tag, fields)}</{tag}>" for tag in profile.tags)
    digit = str(int(Label(label)))
    return body + digit if profile.is_label_last else digit + body


def _block_text(tag: str, fields: Fields) -> str:
    value = getattr(fields, tag)
    if value is None:
        raise ValueError(f"field {tag!r} is None, but the profile has this block")
    if tag == "attribute":
        return ";".join(f"{pair.name}={pair.value}:{pair.verdict}" for pair in value)
    if tag == "context":
        decision, text = value
        return decision if text is None else f"{decision}: {text}"
    return str(value)


def violations(parsed: Parsed, pair: "Pair") -> tuple[str, ...]:
    """Return the hard rules that an answer breaks, in the order H1 to H4 (ours, after the papers' rule adherence).

        H1  the verdict differs from the label: a hallucination, whatever the right label is
        H2  category mismatch, label 3 or 4
        H3  category match, no attribute missed or unknown, label 1 or 2
        H4  the item record states a value that the query excludes, label 3 or 4

    A missing field never fires a rule, and an answer without a label fires none.
    """
    label, fields = parsed.label, parsed.fields
    if label is None:
        return ()
    broken = []
    if fields.verdict is not None and fields.verdict != label:
        broken.append("H1")
    if fields.category == "mismatch" and label >= Label.RELATED:
        broken.append("H2")
    are_all_met = fields.attribute is not None and all(entry.verdict == "ok" for entry in fields.attribute)
    if fields.category == "match" and are_all_met and label <= Label.MISMATCH:
        broken.append("H3")
    if label >= Label.RELATED and pair.states_negated:
        broken.append("H4")
    return tuple(broken)
