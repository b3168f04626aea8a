"""Find the self-attention layers of a decoder that expose their projections, and run their key and value side.

    q = norm_q(W_q h)    k(x) = norm_k(W_k x)    v(x) = W_v x        norm only where the model has one (Qwen3, OLMo 2, Gemma 3)

Known modules: `q_proj`, `k_proj`, `v_proj`, an output projection (`o_proj`, `out_proj` or `dense`) and, where there are any,
`q_norm` and `k_norm` over one head or over all heads. An attention with other weights computes something these equations
do not say (fused projections, latent attention, output gates), so it is refused and not guessed at.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from recis.errors import ConfigError

OUT_NAMES = ("o_proj", "out_proj", "dense")
_KNOWN = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", *OUT_NAMES)


class UnsupportedDecoderError(ConfigError):
    """The model's attention is not one that the adapters know."""


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """One self-attention layer. The projections are read from `module` at each call: LoRA may have wrapped them since."""

    layer: int
    name: str
    """Path of `module` inside the model."""
    module: nn.Module
    out_name: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def query_projection(self) -> nn.Module:
        """W_q, with LoRA if it has any."""
        return self.module.get_submodule("q_proj")

    @property
    def out_projection(self) -> nn.Module:
        """What reads the heads' outputs side by side, [B, T, H * d_h]."""
        return self.module.get_submodule(self.out_name)

    def queries(self, projected: Tensor) -> Tensor:
        """Return q [B, T, H, d_h] from what W_q gave [B, T, H * d_h]: after the norm, before any rotary embedding."""
        return self._normed("q_norm", projected, self.num_heads)

    def keys(self, inputs: Tensor) -> Tensor:
        """Return k(inputs) [B, M, H, d_h] of inputs [B, M, d], each KV head repeated for the heads that share it."""
        keys = self._normed("k_norm", self.module.get_submodule("k_proj")(inputs), self.num_kv_heads)
        return keys.repeat_interleave(self.num_heads // self.num_kv_heads, dim=2)

    def values(self, inputs: Tensor) -> Tensor:
        """Return v(inputs) [B, M, H, d_h] of inputs [B, M, d], KV heads repeated."""
        values = self.module.get_submodule("v_proj")(inputs).unflatten(-1, (self.num_kv_heads, self.head_dim))
        return values.repeat_interleave(self.num_heads // self.num_kv_heads, dim=2)

    def _normed(self, name: str, flat: Tensor, num_heads: int) -> Tensor:
        norm = getattr(self.module, name, None)
        if norm is None:
            return flat.unflatten(-1, (num_heads, self.head_dim))
        if norm.weight.numel() == self.head_dim:
            return norm(flat.unflatten(-1, (num_heads, self.head_dim)))
        return norm(flat).unflatten(-1, (num_heads, self.head_dim))


def find_sites(model: nn.Module) -> list[AttentionSite]:
    """Return the attention layers of a decoder, first layer first.

    Args:
        model: a Hugging Face decoder, with or without a language-model head.

    Raises:
        UnsupportedDecoderError: it is no decoder, or its attention differs from the equations above; the text says where.
    """
    config: Any = getattr(model, "config", None)
    kind = type(model).__name__
    if config is None or not hasattr(config, "num_hidden_layers") or not hasattr(config, "num_attention_heads"):
        raise UnsupportedDecoderError(
            f"{kind} has no config with num_hidden_layers and num_attention_heads; give a Hugging Face decoder"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedDecoderError(f"{kind} is an encoder-decoder; layer-wise adapters need a decoder alone")
    found = [(name, module) for name, module in model.named_modules() if _has_projections(module)]
    if len(found) != config.num_hidden_layers:
        raise UnsupportedDecoderError(
            f"{kind} has {config.num_hidden_layers} layers, and {len(found)} attention modules with q_proj, k_proj and "
            "v_proj; layer-wise adapters need one per layer (Qwen3, Llama and their like); fused projections are not read"
        )
    return [_site(kind, config, layer, name, module) for layer, (name, module) in enumerate(found)]


def _has_projections(module: nn.Module) -> bool:
    names = dict(module.named_children())
    return all(name in names for name in ("q_proj", "k_proj", "v_proj"))


def _site(kind: str, config: Any, layer: int, name: str, module: nn.Module) -> AttentionSite:
    children = dict(module.named_children())
    where = f"{kind}.{name}"
    unknown = [
        child
        for child, part in children.items()
        if child not in _KNOWN and ("norm" in child or next(part.parameters(), None) is not None)
    ]
    own = [parameter for parameter, _ in module.named_parameters(recurse=False)]
    if unknown or own:
        raise UnsupportedDecoderError(
            f"{where}: its attention also uses {', '.join([*unknown, *own])}, which the adapters' equations do not know"
        )
    out_names = [out for out in OUT_NAMES if out in children]
    if len(out_names) != 1:
        raise UnsupportedDecoderError(
            f"{where}: needs one output projection of {', '.join(OUT_NAMES)}; has {out_names}"
        )
    if not getattr(module, "is_causal", True):
        raise UnsupportedDecoderError(f"{where}: its attention is not causal; layer-wise adapters need a decoder")
    num_heads = config.num_attention_heads
    head_dim = getattr(module, "head_dim", None) or config.hidden_size // num_heads
    widths = {projection: _weight(children[projection]).shape for projection in ("q_proj", "k_proj", "v_proj")}
    key_width, value_width = widths["k_proj"][0], widths["v_proj"][0]
    num_kv_heads = key_width // head_dim
    if widths["q_proj"][0] != num_heads * head_dim:
        raise UnsupportedDecoderError(
            f"{where}: q_proj gives {widths['q_proj'][0]} values, not {num_heads} heads of {head_dim}"
        )
    if key_width != value_width or key_width != num_kv_heads * head_dim or num_heads % max(1, num_kv_heads):
        raise UnsupportedDecoderError(
            f"{where}: k_proj gives {key_width} values and v_proj {value_width}; both must be a number of heads of "
            f"{head_dim} that divides {num_heads}"
        )
    for norm, width in (("q_norm", widths["q_proj"][0]), ("k_norm", key_width)):
        size = _weight(children[norm]).numel() if norm in children else head_dim
        if size not in (head_dim, width):
            raise UnsupportedDecoderError(f"{where}: {norm} has {size} weights; known are {head_dim} and {width}")
    return AttentionSite(
        layer=layer,
        name=name,
        module=module,
        out_name=out_names[0],
        hidden_size=widths["q_proj"][1],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
    )


def _weight(module: nn.Module) -> Tensor:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise UnsupportedDecoderError(f"{type(module).__name__} has no weight that its width could be read from")
    return weight
