"""JSONL files of EBRM: items, graded pairs, labelled (query, entity) pairs, override rules. UTF-8, one object per line.

    item  {"id": "i1", "title": "..", "entities": [{"type": "brand", "value": "nike", "conf": 0.98}]}
    label {"query": "nike running shoes", "item": "i1", "y": 1, "grade": 4, "visible": true}
    click {"query": "nike running shoes", "item": "i1", "position": 1, "clicked": false}
    qe    {"query": "..", "entity": "brand:adidas", "y": 0, "w": 0.8, "src": "mention"}
    rule  {"match": {"query_regex": "^gift", "type": "colour"}, "op": "set", "value": 1.0, "owner": "..", "expires": ".."}

Unknown keys are refused: a misspelt key would be dropped in silence. The first line may be `{"generator": {...}}`, which
says what wrote the file. Errors name file and line.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from recis.ebrm.entities import EntitySchema, Item, OnUnknown, check_keys, item_from_json
from recis.ebrm.labels_from_logs import QERow
from recis.errors import DataError, RecisError

HEADER = "generator"
OPS = ("set", "min", "max")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelRow:
    """One graded (query, item) pair."""

    query: str
    item: str
    """Item id."""
    y: int
    """1 relevant, 0 not."""
    grade: int | None = None
    """1 to 4, where there are grades."""
    visible: bool = True
    """Whether the item's text shows why."""

    def to_json(self) -> dict[str, Any]:
        """Return the row as one object of a labels file."""
        out: dict[str, Any] = {"query": self.query, "item": self.item, "y": self.y, "visible": self.visible}
        return out if self.grade is None else out | {"grade": self.grade}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClickRow:
    """One item shown for a query."""

    query: str
    item: str
    """Item id."""
    clicked: bool
    position: int = 1
    """From 1, where the log says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleRow:
    """One override rule as people write it; `recis.ebrm.overrides` gives it a version and checks what it matches."""

    match: Mapping[str, str]
    """Some of query, query_regex, entity, type."""
    op: str
    value: float
    owner: str
    reason: str = ""
    expires: str | None = None
    """Last day, YYYY-MM-DD."""

    def to_json(self) -> dict[str, Any]:
        """Return the rule as one object of a rules file."""
        out: dict[str, Any] = {"match": dict(self.match), "op": self.op, "value": self.value, "owner": self.owner}
        out |= {"reason": self.reason} if self.reason else {}
        return out | ({"expires": self.expires} if self.expires is not None else {})


def read_items(path: str | Path, schema: EntitySchema, *, on_unknown: OnUnknown = "raise") -> Iterator[Item]:
    """Yield the items of a file.

    Raises:
        DataError: file, line and fault: no UTF-8, no JSON object, unknown or missing keys, an id twice, a value that breaks
            a rule of entities.
    """
    seen: set[str] = set()

    def parse(data: Mapping[str, Any]) -> Item:
        item = item_from_json(data, schema, on_unknown=on_unknown)
        if item.id in seen:
            raise DataError("the item id occurs twice", value=item.id, option="give every item its own id")
        seen.add(item.id)
        return item

    return _rows(path, parse)


def read_labels(path: str | Path) -> Iterator[LabelRow]:
    """Yield the graded pairs of a file; raises DataError as `read_items`."""
    return _rows(path, _label)


def read_qe(path: str | Path) -> Iterator[QERow]:
    """Yield the labelled (query, entity) pairs of a file; raises DataError as `read_items`."""
    return _rows(path, _qe)


def read_clicks(path: str | Path) -> Iterator[ClickRow]:
    """Yield the impressions of a click log; raises DataError as `read_items`."""
    return _rows(path, _click)


def read_rules(path: str | Path) -> Iterator[RuleRow]:
    """Yield the override rules of a file; raises DataError as `read_items`."""
    return _rows(path, _rule)


def read_header(path: str | Path) -> Mapping[str, Any] | None:
    """Return what the file says of its generator; None when it says nothing."""
    for _, data in _objects(path):
        return data[HEADER] if data.keys() == {HEADER} else None
    return None


def write_rows(
    path: str | Path, rows: Iterable[Mapping[str, Any]], *, generator: Mapping[str, Any] | None = None
) -> int:
    """Write objects, after a generator line if one is given; return their number. The file appears whole or not at all."""
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    num_rows = 0
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        if generator is not None:
            file.write(json.dumps({HEADER: dict(generator)}, ensure_ascii=False) + "\n")
        for row in rows:
            file.write(json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n")
            num_rows += 1
    partial.replace(target)
    return num_rows


def qe_to_json(row: QERow) -> dict[str, Any]:
    """Return the row as one object of a qe file."""
    return {"query": row.query, "entity": row.entity, "y": row.y, "w": row.w, "src": row.src}


def _rows(path: str | Path, parse: Callable[[Mapping[str, Any]], _T]) -> Iterator[_T]:
    for number, data in _objects(path):
        if number == 1 and data.keys() == {HEADER}:
            continue
        try:
            row = parse(data)
        except (RecisError, TypeError, AttributeError) as error:
            raise DataError(str(error), file=str(path), unit=f"line {number}") from error
        yield row


def _objects(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object), empty lines left out."""
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                data = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(f"not UTF-8: {error.reason}", file=str(path), unit=f"line {number}") from error
            except json.JSONDecodeError as error:
                raise DataError(f"not JSON: {error.msg}", file=str(path), unit=f"line {number}") from error
            if not isinstance(data, dict):
                raise DataError("every line must be a JSON object", file=str(path), unit=f"line {number}", value=data)
            yield number, data


def _label(data: Mapping[str, Any]) -> LabelRow:
    check_keys(data, required=("query", "item", "y"), optional=("grade", "visible"), what="label")
    _check(data["y"] in (0, 1) and not isinstance(data["y"], float), "y must be 0 or 1", data["y"])
    grade = data.get("grade")
    _check(grade is None or (isinstance(grade, int) and 1 <= grade <= 4), "grade must be 1 to 4", grade)
    _check(isinstance(data.get("visible", True), bool), "visible must be true or false", data.get("visible"))
    for name in ("query", "item"):
        _check(isinstance(data[name], str) and bool(data[name]), f"{name} must be a text that is not empty", data[name])
    return LabelRow(
        query=data["query"], item=data["item"], y=int(data["y"]), grade=grade, visible=data.get("visible", True)
    )


def _qe(data: Mapping[str, Any]) -> QERow:
    check_keys(data, required=("query", "entity", "y", "src"), optional=("w",), what="qe row")
    for name in ("query", "entity", "src"):
        _check(isinstance(data[name], str) and bool(data[name]), f"{name} must be a text that is not empty", data[name])
    for name in ("y", "w"):
        _check(_is_number(data.get(name, 1.0)), f"{name} must be a number", data.get(name))
    _check(":" in data["entity"], "entity must be '<type>:<value>'", data["entity"])
    return QERow(
        query=data["query"], entity=data["entity"], y=float(data["y"]), w=float(data.get("w", 1.0)), src=data["src"]
    )


def _click(data: Mapping[str, Any]) -> ClickRow:
    check_keys(data, required=("query", "item", "clicked"), optional=("position",), what="click")
    for name in ("query", "item"):
        _check(isinstance(data[name], str) and bool(data[name]), f"{name} must be a text that is not empty", data[name])
    _check(isinstance(data["clicked"], bool), "clicked must be true or false", data["clicked"])
    position = data.get("position", 1)
    _check(isinstance(position, int) and position >= 1, "position must be an integer from 1", position)
    return ClickRow(query=data["query"], item=data["item"], clicked=data["clicked"], position=position)


def _rule(data: Mapping[str, Any]) -> RuleRow:
    check_keys(data, required=("match", "op", "value", "owner"), optional=("reason", "expires"), what="rule")
    match = data["match"]
    _check(isinstance(match, dict) and bool(match), "match must be an object that is not empty", match)
    check_keys(match, required=(), optional=("query", "query_regex", "entity", "type"), what="match")
    _check(data["op"] in OPS, f"op must be one of {', '.join(OPS)}", data["op"])
    _check(_is_number(data["value"]) and 0 <= data["value"] <= 1, "value must lie in [0, 1]", data["value"])
    _check(
        isinstance(data["owner"], str) and bool(data["owner"]), "owner must be a text that is not empty", data["owner"]
    )
    return RuleRow(
        match=match,
        op=data["op"],
        value=float(data["value"]),
        owner=data["owner"],
        reason=data.get("reason", ""),
        expires=data.get("expires"),
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check(holds: bool, rule: str, value: object) -> None:
    if not holds:
        raise DataError(rule, value=value)
