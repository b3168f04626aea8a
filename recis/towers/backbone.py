"""Load a Hugging Face model and its tokenizer from a local folder, whole or not at all; nothing is fetched.

The pooler of BERT-like models is left out: it is not used, and where the file lacks it its weights would be random.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from recis.errors import ConfigError

_TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


class BackboneError(ConfigError):
    """A folder that holds no whole model, or a model and a tokenizer that do not belong together."""


def load_model(path: str | Path) -> Any:
    """Return the model of a folder in float32, in evaluation mode, without head and pooler.

    Raises:
        BackboneError: the folder holds no model, or a weight is missing or of another shape.
        ImportError: transformers is not installed.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise BackboneError(f"{folder}: no config.json here; a local folder with config and weights is needed")
    try:
        model, report = transformers_library().AutoModel.from_pretrained(
            str(folder), local_files_only=True, output_loading_info=True, dtype="float32"
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BackboneError(f"{folder}: the model cannot be loaded: {error}") from error
    except Exception as error:  # safetensors raises a class of its own for a damaged file
        if type(error).__name__ != "SafetensorError":
            raise
        raise BackboneError(f"{folder}: its weights are damaged: {error}") from error
    missing = sorted(name for name in report["missing_keys"] if "pooler." not in name)
    if missing or report["mismatched_keys"]:
        first = missing[0] if missing else str(sorted(map(str, report["mismatched_keys"]))[0])
        raise BackboneError(
            f"{folder}: {len(missing)} weights are missing and {len(report['mismatched_keys'])} have another shape than "
            f"config.json says, first {first}; the model would start with random weights there"
        )
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model.eval()


def load_tokenizer(path: str | Path, model: Any) -> Any:
    """Return the tokenizer of a folder, checked against the model it feeds.

    Raises:
        BackboneError: there is none, or it has tokens that the model has no embedding for.
    """
    if not any((Path(path) / name).is_file() for name in _TOKENIZER_FILES):
        # transformers would make an empty tokenizer of the model's kind, to which every word is unknown
        raise BackboneError(f"{path}: no tokenizer here; one of {', '.join(_TOKENIZER_FILES)} is needed")
    try:
        tokenizer = transformers_library().AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise BackboneError(f"{path}: the tokenizer cannot be loaded: {error}") from error
    num_rows = model.get_input_embeddings().num_embeddings
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= num_rows:
        raise BackboneError(
            f"{path}: the tokenizer's tokens go up to {highest}, the model {model.config.model_type!r} has {num_rows} "
            "token embeddings; give the folder of the model's own tokenizer"
        )
    return tokenizer


def layers_of(model: Any) -> nn.ModuleList:
    """Return the layers, first one first.

    Raises:
        BackboneError: the model has no list of config.num_hidden_layers modules.
    """
    num_layers = getattr(model.config, "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise BackboneError(f"{type(model).__name__}: no list of {num_layers} layers in it; freeze all of it, or none")


def freeze(model: Any, num_layers: int | None) -> None:
    """Stop the training of the embeddings and the first num_layers layers; None: of everything; 0: of nothing.

    Raises:
        ConfigError: the model has fewer layers.
    """
    if num_layers is None:
        model.requires_grad_(False)
        return
    if num_layers == 0:
        return
    layers = layers_of(model)
    if not 0 < num_layers <= len(layers):
        raise ConfigError(f"{type(model).__name__} has {len(layers)} layers; {num_layers} cannot be frozen")
    model.requires_grad_(False)
    kept = {id(value) for layer in layers[num_layers:] for value in layer.parameters()}
    frozen = {id(value) for layer in layers[:num_layers] for value in layer.parameters()}
    embeddings = {id(value) for value in _before_layers(model, layers)}
    for value in model.parameters():  # what follows the layers (a last norm) trains with them
        value.requires_grad_(id(value) in kept or id(value) not in frozen | embeddings)


def attention_of(device_type: str, *, bf16: bool, gradient_checkpointing: bool) -> AbstractContextManager[object]:
    """Return the context in which a backbone's attention runs.

    The backward pass of torch's fused attention takes 100 to 190 ms on a CPU in bfloat16 where plain products take 16 to 28
    (8 to 128 tokens, 12 heads; fp32 has no such gap), so a pass that trains in bfloat16 there takes the plain ones.
    With gradient_checkpointing layers run again outside of this context, and both runs must be of one kind: it is left alone.
    """
    if device_type == "cpu" and bf16 and not gradient_checkpointing and torch.is_grad_enabled():
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def _before_layers(model: Any, layers: nn.ModuleList) -> list[Tensor]:
    """Return the parameters that stand before the layers in the order of registration."""
    own = {id(value) for value in layers.parameters()}
    before: list[Tensor] = []
    for value in model.parameters():
        if id(value) in own:
            break
        before.append(value)
    return [*before, *model.get_input_embeddings().parameters()]


def transformers_library() -> Any:
    """Return the module transformers; ImportError with the way out where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("language and vision towers need transformers: pip install 'recis[hf]'") from error
    return transformers
