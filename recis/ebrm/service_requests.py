"""Reading the JSON objects that a client sends: what breaks a rule is a BadRequestError, one line that names key and value."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from recis.ebrm.entities import EntitySchema, Item, OnUnknown, item_from_json
from recis.ebrm.overrides import Override
from recis.errors import RecisError

MAX_TEXT_CHARS = 2048  # of owner, reason, entity
MAX_REGEX_CHARS = 200


class BadRequestError(RecisError, ValueError):
    """A request that cannot be answered as asked. Attributes: status (of HTTP)."""

    def __init__(self, problem: str, *, status: int = 422) -> None:
        self.status = status
        super().__init__(problem)


def read_item(entry: object, name: str, schema: EntitySchema, *, on_unknown: OnUnknown = "raise") -> tuple[Item, int]:
    """Return the item of one object of a request, and how many of its entities are of undeclared types.

    Raises:
        BadRequestError: a value has the wrong type or breaks a rule of items; `name` says which item.
    """
    check(isinstance(entry, dict), f"{name} must be an object", entry)
    assert isinstance(entry, dict)
    entities = entry.get("entities", [])
    objects = isinstance(entities, list) and all(isinstance(entity, dict) for entity in entities)
    check(objects, f"{name}: entities must be a list of objects", entities)
    _check_texts(entry, ("id", "title"), name)
    for entity in entities:
        _check_texts(entity, ("type", "value", "id", "source"), name)
    num_unknown = sum(entity.get("type") not in schema for entity in entities)
    try:
        return item_from_json(entry, schema, on_unknown=on_unknown), num_unknown
    except (RecisError, TypeError) as error:
        raise BadRequestError(f"{name}: {error}") from error


def read_override(data: Mapping[str, Any]) -> Override:
    """Return the override of one object in the form of a rules file.

    Raises:
        BadRequestError, ConfigError, DataError: a key or a value breaks a rule.
    """
    match = read_object(data, "match")
    for owner, keys in ((data, ("op", "owner", "reason", "expires")), (match, tuple(match))):
        for key in keys:
            if key in owner:
                read_text(owner, key, MAX_REGEX_CHARS if key == "query_regex" else MAX_TEXT_CHARS)
    return Override.from_json(data)


@contextmanager
def callers_fault() -> Iterator[None]:
    """Turn what the library refuses into the caller's fault: for the part of a request that only looks at it."""
    try:
        yield
    except BadRequestError:
        raise
    except (RecisError, ValueError, TypeError) as error:
        raise BadRequestError(" ".join(str(error).split())) from error


def read_object(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = data.get(key)
    if not isinstance(value, dict):
        raise BadRequestError(f"{key} must be an object; got {shown(value)}")
    return value


def read_text(data: Mapping[str, Any], key: str, max_chars: int, default: str | None = None) -> str:
    value = data.get(key, default)
    if not isinstance(value, str):
        raise BadRequestError(f"{key} must be a text; got {shown(value)}")
    if len(value) > max_chars:
        raise BadRequestError(f"{key} must have at most {max_chars} characters; got {len(value)}")
    return value


def check(holds: bool, rule: str, value: object) -> None:
    if not holds:
        raise BadRequestError(f"{rule}; got {shown(value)}")


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_texts(owner: Mapping[str, Any], keys: tuple[str, ...], name: str) -> None:
    for key in keys:
        check(isinstance(owner.get(key, ""), str), f"{name}: {key} must be a text", owner.get(key))
