"""Read completions strictly: one pass over the text, every fault named with its place, no exception for any text.

    completion = label body                                    the eos is cut off before
    label      = "1" | "2" | "3" | "4"                         first character of the text, nothing before it
    body       = one <tag>..</tag> per tag of the profile, in its order, nothing between them
    attribute  = [ pair { ";" pair } ]                         pair = name "=" value ":" ("ok" | "miss" | "unknown")
    context    = ("adopt" | "partial" | "ignore" | "none") [ ": " text ]
    category   = "match" | "near" | "mismatch";   rule = [A-Z][0-9]{2,3};   verdict = "1" | "2" | "3" | "4"

Faults, one per position: `empty`, `no_label`, `label_run_on`, `missing_tag`, `extra_tag`, `unknown_tag`, `duplicate_tag`,
`out_of_order`, `unclosed`, `nested`, `bad_category`, `bad_pair`, `duplicate_attribute`, `bad_rule`, `bad_context`,
`bad_verdict`, `bad_text`, `stray_text`, `too_long`, `truncated`. A block inside another is not read: its text belongs to the
outer one, which is faulty. The grammar is ours.
"""

import re
from bisect import bisect_left
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any

from relevance.labels import (
    ATTRIBUTE_VERDICTS,
    CATEGORY_VERDICTS,
    CONTEXT_DECISIONS,
    MAX_COMPLETION,
    MAX_NAME,
    MAX_TEXT,
    MAX_VALUE,
    TAGS,
    TEXT_TAGS,
    AttributeVerdict,
    Fault,
    Fields,
    Label,
    Parsed,
    Profile,
)

FAULTS = (
    "empty", "no_label", "label_run_on", "missing_tag", "extra_tag", "unknown_tag", "duplicate_tag", "out_of_order",
    "unclosed", "nested", "bad_category", "bad_pair", "duplicate_attribute", "bad_rule", "bad_context", "bad_verdict",
    "bad_text", "stray_text", "too_long", "truncated",
)  # fmt: skip
"""Every kind of fault."""
_MARKUP = re.compile(r"<(/?)([^<>]*)>")
_RULE_ID = re.compile(r"[A-Z][0-9]{2,3}", re.ASCII)
_NAME = re.compile(rf"[a-z_]{{1,{MAX_NAME}}}", re.ASCII)
_VALUE = re.compile(rf"[^=:;<>]{{1,{MAX_VALUE}}}")
_REPLACEMENT = "\ufffd"  # what decoding puts in place of bytes that are no UTF-8


def parse(text: Any, profile: Profile, *, terminated: bool = True, rule_ids: Container[str] | None = None) -> Parsed:
    """Read a completion; never raises, and anything that is no str is read as "".

    Args:
        text: the completion without its eos.
        profile: the blocks it must have.
        terminated: False when generation met the length limit before an eos: the fault `truncated`.
        rule_ids: the ids of the rule base; an id outside it is `bad_rule`. None checks the form alone.

    Returns:
        Label, fields, spans and faults. A label is set whenever the label itself is well formed, whatever else is wrong.
    """
    if not isinstance(text, str):
        text = ""
    scan = _Scan(text=text[:MAX_COMPLETION], profile=profile, rule_ids=rule_ids)
    if len(text) > MAX_COMPLETION:
        scan.fault("too_long", MAX_COMPLETION)
    if not text:
        scan.fault("empty", 0)
    else:
        replaced = scan.text.find(_REPLACEMENT)
        if replaced >= 0:
            scan.fault("stray_text", replaced)
        if profile.is_label_last:
            scan.read_label_last()
        else:
            scan.read_label_first()
    if not terminated:
        scan.fault("truncated", len(scan.text))
    if text:
        # before the missing blocks: a cut explains them, and only the first fault of a position is kept
        scan.check_missing()
    return scan.result()


@dataclass(slots=True, kw_only=True)
class _Scan:
    """State of one pass over a text."""

    text: str
    profile: Profile
    rule_ids: Container[str] | None
    label: Label | None = None
    values: dict[str, Any] = field(default_factory=dict)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    furthest: int = -1
    """Largest profile position of a block so far."""
    faults: dict[int, str] = field(default_factory=dict)

    def fault(self, kind: str, at: int) -> None:
        self.faults.setdefault(at, kind)

    def result(self) -> Parsed:
        errors = tuple(Fault(self.faults[at], at) for at in sorted(self.faults))
        return Parsed(label=self.label, fields=Fields(**self.values), spans=self.spans, errors=errors)

    def read_label_first(self) -> None:
        if self.text[0] not in "1234":
            self.fault("no_label", 0)
            self.read_body(0, len(self.text), is_start_known=False)
            return
        if self._runs_on(1):
            self.fault("label_run_on", 1)
        else:
            self.label = Label(int(self.text[0]))
        self.read_body(1, len(self.text), is_start_known=self.label is not None)

    def _runs_on(self, at: int) -> bool:
        after = self.text[at : at + 1]
        return after.isalnum() or after in {".", ",", "-", "/", "%"}

    def read_label_last(self) -> None:
        end = len(self.text)
        if self.text[-1] not in "1234":
            self.fault("no_label", end - 1)
            self.read_body(0, end)
            return
        before = self.text[-2:-1]
        if before.isalnum() or before in {".", ",", "-", "/"}:
            self.fault("label_run_on", end - 1)
            end = self.text.rfind(">") + 1
        else:
            self.label = Label(int(self.text[-1]))
            end -= 1
        self.read_body(0, end)

    def read_body(self, start: int, end: int, *, is_start_known: bool = True) -> None:
        """Read the blocks of text[start:end]; with is_start_known=False what stands before the first tag has its fault."""
        markup = list(_MARKUP.finditer(self.text, start, end))
        closings: dict[str, list[int]] = {}
        for number, match in enumerate(markup):
            if match[1]:
                closings.setdefault(match[2], []).append(number)
        at, number, is_skipping = start, 0, not is_start_known
        while number < len(markup):
            match = markup[number]
            if match.start() > at and not is_skipping:
                self.fault("stray_text", at)
            is_skipping = False
            name, closing = match[2], None
            if not match[1]:
                ends = closings.get(name, ())
                place = bisect_left(ends, number)
                closing = ends[place] if place < len(ends) else None
            if name not in TAGS:
                self.fault("unknown_tag", match.start())
            elif match[1]:
                self.fault("stray_text", match.start())  # it closes nothing
            elif closing is None:
                self.fault("unclosed", match.start())
                self.seen.add(name)
            else:
                self.read_block(name, match.end(), markup[number : closing + 1])
            if closing is None:
                is_skipping = not match[1]  # the text behind a tag without an end has its fault already
            number = number + 1 if closing is None else closing + 1
            at = markup[number - 1].end()
        if at < end and not is_skipping:
            self.fault("stray_text", at)

    def read_block(self, name: str, start: int, markup: Sequence[re.Match[str]]) -> None:
        """Read one block whose opening and closing tags are the first and last of `markup`."""
        at, end = markup[0].start(), markup[-1].start()
        if name in self.seen:
            self.fault("duplicate_tag", at)
            return
        self.seen.add(name)
        if name not in self.profile.tags:
            self.fault("extra_tag", at)
            return
        position = self.profile.tags.index(name)
        if position < self.furthest:
            self.fault("out_of_order", at)
        self.furthest = max(self.furthest, position)
        if len(markup) > 2:
            self.fault("nested", markup[1].start())
            return
        value = self.read_value(name, start, self.text[start:end])
        if value is not None:
            self.values[name] = value
            self.spans[name] = (at, markup[-1].end())

    def read_value(self, name: str, at: int, text: str) -> Any:
        """Return the value of a block's text, or None with a fault."""
        if name in TEXT_TAGS:
            return self._checked(text, _is_text(text), "bad_text", at)
        if name == "category":
            return self._checked(text, text in CATEGORY_VERDICTS, "bad_category", at)
        if name == "attribute":
            return self.read_pairs(at, text)
        if name == "rule":
            is_known = self.rule_ids is None or text in self.rule_ids
            return self._checked(text, _RULE_ID.fullmatch(text) is not None and is_known, "bad_rule", at)
        if name == "context":
            decision, separator, tail = text.partition(": ")
            is_legal = decision in CONTEXT_DECISIONS and (not separator or _is_text(tail))
            return self._checked((decision, tail if separator else None), is_legal, "bad_context", at)
        is_digit = len(text) == 1 and text in "1234"
        return self._checked(int(text) if is_digit else 0, is_digit, "bad_verdict", at)

    def _checked(self, value: Any, is_legal: bool, kind: str, at: int) -> Any:
        if is_legal:
            return value
        self.fault(kind, at)
        return None

    def read_pairs(self, at: int, text: str) -> tuple[AttributeVerdict, ...] | None:
        pairs: dict[str, AttributeVerdict] = {}
        is_legal = True
        for part in text.split(";") if text else ():
            name, equals, rest = part.partition("=")
            value, colon, verdict = rest.partition(":")
            if not (equals and colon and _NAME.fullmatch(name) and _VALUE.fullmatch(value)) or (
                verdict not in ATTRIBUTE_VERDICTS
            ):
                self.fault("bad_pair", at)
                is_legal = False
            elif name in pairs:
                self.fault("duplicate_attribute", at)
                is_legal = False
            else:
                pairs[name] = AttributeVerdict(name=name, value=value, verdict=verdict)
            at += len(part) + 1
        return tuple(pairs.values()) if is_legal else None

    def check_missing(self) -> None:
        if any(tag not in self.seen for tag in self.profile.tags):
            self.fault("missing_tag", len(self.text))


def _is_text(text: str) -> bool:
    return 1 <= len(text) <= MAX_TEXT and "<" not in text and ">" not in text
