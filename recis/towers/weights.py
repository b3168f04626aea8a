"""What names a model's weights: one hash over every parameter and buffer, which versions vectors and adapters.

    sha256 over, in ascending order of names: name, dtype, shape, bytes

LoRA weights and the wrappers they bring are left out, so a base has one hash with and without them.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def weights_hash(model: nn.Module) -> str:
    """Return 64 hex digits; the same weights in another dtype or under other names give another hash.

    Reads every weight once: about a second per GB.

    Raises:
        ValueError: a weight lies on the meta device and so has no values.
    """
    return state_hash(base_state(model))


def state_hash(state: Mapping[str, Tensor]) -> str:
    """Return the hash of named tensors, as at the head of this module.

    Raises:
        ValueError: one lies on the meta device and so has no values.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        if tensor.device.type == "meta":
            raise ValueError(f"{name} has no values (meta device), so it has no hash; load the weights first")
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Return state_dict() as it was before any LoRA: without its weights, under the old names."""
    return {
        name.replace(".base_layer.", "."): value for name, value in model.state_dict().items() if not _is_lora(name)
    }


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the LoRA weights inside a model by name."""
    return {name: value for name, value in model.named_parameters() if _is_lora(name)}


def _is_lora(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


@dataclass(frozen=True, slots=True)
class FrozenState:
    """Weights that do not train, so a checkpoint need not hold them.

    Attributes:
        names: of their entries in the state_dict() of the module that has them.
        digest: uint8 [32], the hash that stands for them.
    """

    names: frozenset[str]
    digest: Tensor


def frozen_state(model: nn.Module, *, prefix: str = "") -> FrozenState:
    """Return the parameters that do not train and the buffers of a model, named with a prefix, and their hash.

    Reads them all: about a second per GB.
    """
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    state = {name: value for name, value in model.state_dict().items() if name not in trained}
    digest = torch.frombuffer(bytearray(bytes.fromhex(state_hash(state))), dtype=torch.uint8)
    return FrozenState(frozenset(prefix + name for name in state), digest)
