"""LoRA inside a model, put in and taken out again; the weights themselves are peft's.

    y = W x + (alpha / rank) * B A x        B starts at 0, so the first output is the base's

Source: Hu et al. 2021, arXiv:2106.09685. Needs the extra `peft`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from recis.errors import ConfigError
from recis.towers.weights import lora_parameters


def add_lora(model: nn.Module, *, rank: int, targets: Sequence[str], alpha: float | None = None) -> None:
    """Wrap every linear layer whose name ends with one of `targets`; all other weights stop training.

    Args:
        model: changed in place; remove_lora undoes it.
        rank: at least 1.
        targets: last parts of names ("q_proj", "v_proj"); those the model lacks are passed over.
        alpha: scale times rank; None: 2 * rank.

    Raises:
        ConfigError: no target is in the model, rank is below 1, or the model has LoRA already.
        ImportError: peft is not installed.
    """
    if rank < 1:
        raise ConfigError(f"LoRA: rank must be at least 1; got {rank}")
    if lora_parameters(model):
        raise ConfigError("the model has LoRA layers already; remove them first")
    present = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = [name for name in targets if name in present]
    if not chosen:
        raise ConfigError(f"LoRA: no linear layer is called {' or '.join(targets)}; there are {sorted(present)}")
    config = _peft().LoraConfig(
        r=rank, lora_alpha=2 * rank if alpha is None else alpha, target_modules=chosen, bias="none"
    )
    _peft().inject_adapter_in_model(config, model)


def remove_lora(model: nn.Module) -> None:
    """Put the wrapped layers back as they were; the LoRA weights are gone."""
    for name, module in _lora_layers(model):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Run the base alone inside the `with` block."""
    layers = [module for _, module in _lora_layers(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    if not lora_parameters(model):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'recis[peft]', or leave lora_rank at 0") from error
    return peft
