"""Write a config down as JSON, build it again, and list what differs between two.

    dataclass   {"$type": "recis.trainer.config:DenseAdamW", "lr": 0.001, ...}
    function    {"$function": "torch:sigmoid"}, {"$partial": {"$function": ...}, "args": [...], "kwargs": {...}}
    others      tuples and lists as lists, dtypes, paths and non-finite floats tagged, objects with `to_json()` by that

A source, a hook or another plain object is written by type and simple attributes: enough to compare two runs, not to
build the object again; `from_json` says so by name. `$type` builds dataclasses only.
"""

import dataclasses
import functools
import importlib
import json
import math
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from recis.errors import ConfigError


def to_json(value: Any) -> Any:
    """Return `value` as JSON-able data, every nested dataclass with its type.

    Raises:
        ConfigError: a tensor or module hangs in it; such data belongs into files.
    """
    return _to_json(value, "config")


def _to_json(value: Any, path: str) -> Any:
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: _to_json(getattr(value, f.name), f"{path}.{f.name}") for f in dataclasses.fields(value) if f.init
        }
        return {"$type": _name_of(type(value)), **fields}
    if isinstance(value, Mapping):
        return _mapping_to_json(value, path)
    if isinstance(value, list | tuple):
        return [_to_json(item, f"{path}.{index}") for index, item in enumerate(value)]
    if isinstance(value, set | frozenset):
        return {"$set": sorted((_to_json(item, path) for item in value), key=json.dumps)}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Path):
        return {"$path": str(value)}
    if isinstance(value, functools.partial):
        inner = _to_json(value.func, path)
        return {"$partial": inner, "args": _to_json(value.args, path), "kwargs": _to_json(value.keywords, path)}
    if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType | types.MethodType):
        return {"$function": _name_of(value)}
    if isinstance(value, torch.Tensor | torch.nn.Module):
        raise ConfigError(f"{path}: a config holds no {type(value).__name__}; give what builds it, or a file path")
    return _object_to_json(value, path)


def _mapping_to_json(value: Mapping[Any, Any], path: str) -> Any:
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {key: _to_json(item, f"{path}.{key}") for key, item in value.items()}
    return {"$items": [[_to_json(key, path), _to_json(item, f"{path}.{key}")] for key, item in value.items()]}


def _object_to_json(value: Any, path: str) -> Any:
    if hasattr(value, "to_json"):
        return {"$object": _name_of(type(value)), "json": value.to_json()}
    slots = [name for base in type(value).__mro__ for name in getattr(base, "__slots__", ())]
    names = [*vars(value)] if hasattr(value, "__dict__") else slots
    simple = {}
    for name in sorted(set(names)):
        item = getattr(value, name, None)
        if not name.startswith("_") and (item is None or isinstance(item, bool | int | float | str | tuple)):
            simple[name] = _to_json(item, f"{path}.{name}")
    return {"$object": _name_of(type(value)), **simple}


def _name_of(value: Any) -> str:
    name = value.__qualname__
    module = value.__module__
    if (
        getattr(torch, value.__name__, None) is value
    ):  # torch.sigmoid calls itself torch:_VariableFunctionsClass.sigmoid
        module, name = "torch", value.__name__
    return f"{module}:{name}"


def from_json(data: Any) -> Any:
    """Invert to_json: import and call the types and functions that are named; lists come back as tuples.

    Raises:
        ConfigError: a name cannot be imported (a function inside another, a changed module), or an object was
            written by its attributes only.
    """
    if isinstance(data, list):
        return tuple(from_json(item) for item in data)
    if not isinstance(data, dict):
        return data
    if "$type" in data:
        made: Any = _import(data["$type"])
        if not (isinstance(made, type) and dataclasses.is_dataclass(made)):
            raise ConfigError(f"the stored config names {data['$type']} as a config, which is no dataclass")
        return made(**{key: from_json(item) for key, item in data.items() if key != "$type"})
    if "$partial" in data:
        return functools.partial(from_json(data["$partial"]), *from_json(data["args"]), **from_json(data["kwargs"]))
    if "$object" in data:
        return _object_from_json(data)
    tagged = {
        "$function": lambda value: _import(value),
        "$float": float,
        "$dtype": lambda value: getattr(torch, value),
        "$path": Path,
        "$set": lambda value: frozenset(from_json(value)),
        "$items": lambda value: {from_json(key): from_json(item) for key, item in value},
    }
    for tag, build in tagged.items():
        if tag in data:
            return build(data[tag])
    return {key: from_json(item) for key, item in data.items()}


def _object_from_json(data: dict[str, Any]) -> Any:
    made = _import(data["$object"])
    if "json" in data and hasattr(made, "from_json"):
        return made.from_json(data["json"])
    raise ConfigError(
        f"a {data['$object']} cannot be built from the stored config: its state is not in it; "
        "name the recipe of the run, so that it makes the object"
    )


def _import(name: str) -> Any:
    module_name, _, qualname = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the stored config names {name}, which cannot be imported ({error}); "
            "name the recipe of the run, or move the function to the top level of a module"
        ) from error
    return found


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Return one line `a.b.c: old -> new` for each leaf where two `to_json` values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in [*old, *(key for key in new if key not in old)]:
            missing = "(absent)"
            lines += differences(old.get(key, missing), new.get(key, missing), f"{path}.{key}" if path else key)
        return lines
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for index, (a, b) in pairs for line in differences(a, b, f"{path}.{index}")]
    return [] if old == new else [f"{path}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
