"""Set single fields of a config from text, as `recis train --set a.b=c` does.

    override(config, ["max_steps=100", "model.tables.0.embedding_dim=32", "dense_optimizer.betas=0.9,0.99"])

The config is frozen, so a changed copy is built from the inside out; each dataclass on the way checks itself again.
"""

import dataclasses
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from recis.errors import ConfigError, nearest

T = TypeVar("T")


def override(config: T, settings: Sequence[str]) -> T:
    """Return `config` with fields set from text: `["max_steps=100", "model.tables.0.embedding_dim=32"]`.

    A name walks through dataclass fields, a number through a tuple. The value is read as the field's type says:
    numbers, true/false, none, text, and comma-separated tuples of these.

    Raises:
        ConfigError: no such field (with the nearest names), a value of another type, or one that the config refuses.
    """
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {setting!r}: write it as name=value, such as max_steps=100")
        config = _set(config, name.split("."), text, setting)
    return config


def parse_option(setting: str, hint: Any, default: Any, text: str) -> Any:
    """Return `text` as a value of the type `hint` (or of `default`, where the hint says nothing), as `override` reads it.

    Raises:
        ConfigError: text is no such value; `setting` is quoted in the message.
    """
    try:
        return _parse(text, hint, default)
    except ValueError as error:
        raise ConfigError(f"--set {setting!r}: {error}") from None


def _set(value: Any, parts: list[str], text: str, setting: str, hint: Any = None) -> Any:
    if not parts:
        try:
            return _parse(text, hint, value)
        except ValueError as error:
            raise ConfigError(f"--set {setting!r}: {error}") from None
    name, rest = parts[0], parts[1:]
    if isinstance(value, tuple):
        if not name.isdigit() or int(name) >= len(value):
            raise ConfigError(f"--set {setting!r}: {name!r} must be a position from 0 to {len(value) - 1}")
        position = int(name)
        item = _set(value[position], rest, text, setting, _item_hint(hint))
        return (*value[:position], item, *value[position + 1 :])
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        raise ConfigError(f"--set {setting!r}: {name!r} asks for a field of a {type(value).__name__}, which has none")
    fields = {field.name for field in dataclasses.fields(value)}
    if name not in fields:
        raise ConfigError(f"--set {setting!r}: {type(value).__name__} has no field {name!r}; {nearest(name, fields)}")
    changed = _set(getattr(value, name), rest, text, setting, _field_hint(type(value), name))
    try:
        return dataclasses.replace(value, **{name: changed})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--set {setting!r}: {error}") from error


def _field_hint(owner: type, name: str) -> Any:
    """Return the type of one field; the annotations of the others may name what is imported for type checkers only."""
    for base in owner.__mro__:
        hint = vars(base).get("__annotations__", {}).get(name)
        if isinstance(hint, str):
            try:
                return eval(hint, vars(sys.modules[base.__module__]))
            except NameError:  # the value there must do
                return None
        if hint is not None:
            return hint
    return None


def _item_hint(hint: Any) -> Any:
    for choice in _choices(hint):
        args = get_args(choice)
        if get_origin(choice) is tuple and args:
            return args[0]
    return None


def _choices(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _parse(text: str, hint: Any, current: Any) -> Any:
    choices = [choice for choice in _choices(hint) if choice is not None and choice is not Any]
    if not choices:
        choices = [type(current)]
    if text.lower() == "none" and type(None) in choices:
        return None
    problems = []
    order = [bool, int, float]  # the narrowest first; text takes anything and comes last
    for choice in sorted(choices, key=lambda c: (c is str, order.index(c) if c in order else -1)):
        try:
            return _parse_as(text, choice)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError(" or ".join(dict.fromkeys(problem for problem in problems if problem)))


def _parse_as(text: str, choice: Any) -> Any:
    if choice is bool:
        values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in values:
            raise ValueError(f"{text!r} is not true or false")
        return values[text.lower()]
    if choice is int:
        number = _number(text)
        if number != int(number):
            raise ValueError(f"{text!r} is not a whole number")
        return int(text) if text.lstrip("+-").isdigit() else int(number)
    if choice is float:
        return float(_number(text))
    if choice is str:
        return text
    if choice is Path:
        return Path(text)
    if choice is type(None):
        raise ValueError("")
    if get_origin(choice) is Literal:
        for allowed in get_args(choice):
            if str(allowed) == text:
                return allowed
        raise ValueError(f"{text!r} is not one of {', '.join(map(str, get_args(choice)))}")
    if choice is tuple or get_origin(choice) is tuple:
        args = get_args(choice)
        items = [item.strip() for item in text.strip("()[]").split(",") if item.strip()]
        if args and args[-1] is not Ellipsis and len(args) != len(items):
            raise ValueError(f"{text!r} must have {len(args)} values separated by commas")
        hints = [args[0]] * len(items) if args and args[-1] is Ellipsis else list(args) or [None] * len(items)
        return tuple(_parse(item, item_hint, item) for item, item_hint in zip(items, hints, strict=True))
    raise ValueError(f"a {getattr(choice, '__name__', choice)} cannot be given as text; set its fields")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
