"""Adapters in a file of their own: Q, A, B, gamma, and the LoRA weights of stage 2; never the base.

One safetensors file. Its metadata names format, sizes and the hash of the base, which is compared before anything is built.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from recis.errors import CheckpointError
from recis.towers.adapters import AdapterConfig, LayerwiseAdapters
from recis.towers.weights import lora_parameters, weights_hash

FORMAT, FORMAT_VERSION = "recis-adapters", 1
_LORA = "lora."


class AdapterBaseError(CheckpointError):
    """The adapters were trained on another base than the one they are to be put on."""


def save_adapters(adapters: LayerwiseAdapters, path: str | Path) -> None:
    """Write the adapters under another name and rename; a file that is there is replaced whole."""
    tensors = {name: value.detach().contiguous() for name, value in adapters.state_dict().items()}
    tensors |= {_LORA + name: value.detach().contiguous() for name, value in lora_parameters(adapters.base).items()}
    metadata = {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "base": adapters.base_hash(),
        "base_class": type(adapters.base).__name__,
        "config": json.dumps(asdict(adapters.config), sort_keys=True),
        "lora_rank": str(adapters.lora_rank),
    }
    target = Path(path)
    part = target.with_name(f".tmp-{target.name}")
    save_file(tensors, part, metadata=metadata)
    part.replace(target)


def load_adapters(base: nn.Module, path: str | Path) -> LayerwiseAdapters:
    """Put saved adapters on the base they were trained on. If anything fails the base is left as it was.

    Raises:
        AdapterBaseError: the base has other weights.
        CheckpointError: the file is no adapter file, is damaged, or holds other tensors than its sizes ask for.
    """
    metadata, tensors = _read(path)
    try:
        config = AdapterConfig(**json.loads(metadata["config"]))
        lora_rank = int(metadata["lora_rank"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its metadata cannot be used: {error}") from error
    found = weights_hash(base)
    if metadata.get("base") != found:
        raise AdapterBaseError(
            f"{path}: the adapters belong to a {metadata.get('base_class')} with hash {str(metadata.get('base'))[:12]}; "
            f"this {type(base).__name__} has hash {found[:12]}; load the base they were trained on, in the same dtype"
        )
    adapters = LayerwiseAdapters(base, config)
    try:
        if lora_rank:
            adapters.add_lora(lora_rank)
        wanted: dict[str, Tensor] = dict(adapters.named_parameters())
        wanted |= {_LORA + name: value for name, value in lora_parameters(base).items()}
        _check_tensors(path, {name: tuple(value.shape) for name, value in wanted.items()}, tensors)
        with torch.no_grad():
            for name, value in wanted.items():
                value.copy_(tensors[name])
    except BaseException:
        adapters.remove()
        raise
    return adapters


def _read(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(str(path), framework="pt") as file:  # type: ignore[no-untyped-call]
            metadata: dict[str, str] = file.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("version") != str(FORMAT_VERSION):
                raise CheckpointError(
                    f"{path}: is no adapter file of version {FORMAT_VERSION}; its metadata says "
                    f"{metadata.get('format')!r}, version {metadata.get('version')!r}"
                )
            return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from error


def _check_tensors(path: str | Path, wanted: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if found != wanted:
        odd = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise CheckpointError(
            f"{path}: {len(odd)} tensors do not fit, first {odd[0]}: the file has {found.get(odd[0])}, "
            f"the sizes ask for {wanted.get(odd[0])}"
        )
