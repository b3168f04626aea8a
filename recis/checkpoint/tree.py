"""Take a nested state (optimizer, metrics, random generators) apart into JSON and tensors, and put it together again.

    {"step": 3, "sums": tensor}  <->  JSON {"step": 3, "sums": {"$tensor": "sums"}}  +  {"sums": tensor}

Dicts, lists, tuples, None, bool, int, float (NaN and infinities too), str, bytes, tensors and numpy arrays survive with
their types; dict keys may be str or int. Anything else is refused by path, so that no state is saved that could not be
loaded.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recis.errors import CheckpointError


def pack(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return (JSON value, tensors by their path in `value`). Tensors are not copied.

    Raises:
        CheckpointError: something in `value` has a type that cannot be saved; the text names its path.
    """
    tensors: dict[str, Tensor] = {}
    return _pack(value, "", tensors), tensors


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Invert pack. The tensors are those given, not copies."""
    if isinstance(packed, list):
        return [unpack(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return packed
    if "$tensor" in packed:
        return tensors[packed["$tensor"]]
    if "$array" in packed:
        return tensors[packed["$array"]].numpy()
    if "$float" in packed:
        return float(packed["$float"])
    if "$bytes" in packed:
        return bytes.fromhex(packed["$bytes"])
    if "$tuple" in packed:
        return tuple(unpack(item, tensors) for item in packed["$tuple"])
    if "$items" in packed:
        return {key: unpack(item, tensors) for key, item in packed["$items"]}
    return {key: unpack(item, tensors) for key, item in packed.items()}


def to_text(packed: Any) -> str:
    """Return packed JSON as one canonical line."""
    return json.dumps(packed, sort_keys=True, separators=(",", ":"), allow_nan=False)


def from_text(text: str) -> Any:
    """Invert to_text."""
    return json.loads(text)


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int) and type(value) is int:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, Tensor):
        return {"$tensor": _keep(value.detach(), path, tensors)}
    if isinstance(value, np.ndarray):
        return {"$array": _keep(torch.from_numpy(value), path, tensors)}
    if isinstance(value, np.generic):
        return _pack(value.item(), path, tensors)
    if isinstance(value, bytes):
        return {"$bytes": value.hex()}
    if isinstance(value, Mapping):
        return _pack_mapping(value, path, tensors)
    if isinstance(value, list | tuple):
        items = [_pack(item, _join(path, str(index)), tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    raise CheckpointError(
        f"state {path or 'value'!r}: a {type(value).__name__} cannot be saved; "
        "keep tensors, numbers, text, lists and dicts"
    )


def _pack_mapping(value: Mapping[Any, Any], path: str, tensors: dict[str, Tensor]) -> Any:
    plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
    for key in value:
        if type(key) is not str and type(key) is not int:
            raise CheckpointError(f"state {path!r}: key {key!r} must be str or int to be saved")
    packed = [(key, _pack(item, _join(path, str(key)), tensors)) for key, item in value.items()]
    if plain:
        return dict(packed)
    return {"$items": [[key, item] for key, item in packed]}


def _keep(tensor: Tensor, path: str, tensors: dict[str, Tensor]) -> str:
    name = path or "value"
    while name in tensors:  # {"a.b": t} beside {"a": {"b": t}}
        name += "'"
    tensors[name] = tensor
    return name


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
