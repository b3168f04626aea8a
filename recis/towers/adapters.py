"""Layer-wise adapters: a frozen decoder looks at side features in each layer, through a gate that starts closed.

    V_l = F A_l B_l                                        F [n, d_v] side features, A [d_v, rank], B [rank, d]
    P_l = Q_l + softmax(Q_l V_l^T / sqrt d) V_l            Q_l [M, d] learned queries
    o   = causal_self_attention(h) + tanh(gamma_l) * softmax(q k(P_l)^T / sqrt d_h) v(P_l)        gamma_l per head, at first 0

k and v are the layer's own frozen projections. q and k(P) are taken after the q/k norm, without rotary embedding; KV heads are
repeated; the sum enters before the output projection. The text is not lengthened, and position t adds only what its own
query finds: the model stays causal.

How it gets in, with no line of the model changed: in each layer a forward hook on W_q notes what it gave, and a forward
pre-hook on the output projection adds the second term to its input. `remove` takes the hooks away.

The idea of layer-wise adapters is PUMGPT's (version 1), arXiv:2308.09568; the equations above are ours.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recis.errors import ConfigError
from recis.towers.attention_sites import AttentionSite, find_sites
from recis.towers.lora import add_lora, remove_lora, without_lora
from recis.towers.weights import lora_parameters, weights_hash

LORA_TARGETS = ("q_proj", "v_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """Sizes of the adapters."""

    side_width: int
    """d_v, width of a side feature."""
    num_queries: int = 10
    """M."""
    rank: int = 64
    """Of the projector A B."""
    first_layer: int = 1
    """Layers from this one on have an adapter; 1 leaves the first layer as it is."""
    init_std: float = 0.02
    """Of the normal draw of Q; A and B start so that V keeps about the scale of F."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("side_width", "num_queries", "rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"AdapterConfig: {name} must be at least 1; got {getattr(self, name)}")
        if self.first_layer < 0:
            raise ConfigError(f"AdapterConfig: first_layer counts from 0; got {self.first_layer}")


@dataclass(frozen=True, slots=True)
class _Side:
    features: Tensor  # [B or 1, n, d_v]
    mask: Tensor | None  # bool [B or 1, n]


class LayerAdapter(nn.Module):
    """Q, A, B and gamma of one layer."""

    def __init__(self, config: AdapterConfig, site: AttentionSite, generator: torch.Generator) -> None:
        super().__init__()
        hidden = site.hidden_size

        def normal(rows: int, columns: int, std: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns, generator=generator) * std)

        self.queries = normal(config.num_queries, hidden, config.init_std)
        self.down = normal(config.side_width, config.rank, config.side_width**-0.5)
        self.up = normal(config.rank, hidden, config.rank**-0.5)
        self.gate = nn.Parameter(torch.zeros(site.num_heads))

    def prompts(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """Return P [B, M, d] of features [B, n, d_v]; features whose mask [B, n] is False are not looked at."""
        values = features.to(self.down.dtype) @ self.down @ self.up
        scores = self.queries @ values.transpose(1, 2) / math.sqrt(values.shape[-1])  # [B, M, n]
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
            scores = scores.masked_fill(~mask.any(1)[:, None, None], 0.0)  # such a sample is left alone, see `mix`
        return self.queries + scores.softmax(-1) @ values

    def mix(self, site: AttentionSite, projected: Tensor, side: _Side) -> Tensor:
        """Return what is added to the heads' outputs, [B, T, H * d_h], zeros for samples without side features."""
        prompts = self.prompts(side.features, side.mask).to(projected.dtype)
        queries, keys, values = site.queries(projected), site.keys(prompts), site.values(prompts)
        keys, values = (part.expand(len(projected), -1, -1, -1) for part in (keys, values))
        scores = torch.einsum("bthd,bmhd->bhtm", queries, keys) / math.sqrt(site.head_dim)
        mixed = torch.einsum("bhtm,bmhd->bthd", scores.float().softmax(-1).to(values.dtype), values)
        mixed = self.gate.tanh().to(mixed.dtype)[:, None] * mixed
        if side.mask is not None:
            mixed = mixed * side.mask.any(1)[:, None, None, None]
        return mixed.flatten(2)


class LayerwiseAdapters(nn.Module):
    """Adapters on a frozen decoder; the parameters of this module are Q, A, B and gamma, not the decoder's.

    Inside `with adapters.side(F):` the decoder looks at F. Outside it runs as without adapters.

    Args:
        base: a Hugging Face decoder (Qwen3, Llama and their like). Its weights stop training; `remove` restores that too.
        config: sizes.

    Attributes:
        base: the decoder; no submodule, so `state_dict()` holds the adapters alone.
        sites: the layers that have an adapter.
        layers: their adapters.

    Raises:
        UnsupportedDecoderError: see find_sites; nothing is changed then.
        ConfigError: first_layer leaves no layer, or the decoder has adapters already.
    """

    base: nn.Module

    def __init__(self, base: nn.Module, config: AdapterConfig) -> None:
        super().__init__()
        sites = find_sites(base)[config.first_layer :]
        if not sites:
            raise ConfigError(
                f"AdapterConfig: first_layer {config.first_layer} leaves no layer of {type(base).__name__}"
            )
        if any(_is_hooked(site) for site in sites):
            raise ConfigError(f"{type(base).__name__} has adapters already; remove them first")
        object.__setattr__(self, "base", base)
        self.config = config
        self.sites = sites
        generator = torch.Generator().manual_seed(config.seed)
        self.layers = nn.ModuleList(LayerAdapter(config, site, generator).to(_device_of(site)) for site in sites)
        self.lora_rank = 0
        self._side: _Side | None = None
        self._projected: dict[int, Tensor] = {}
        self._trained = {name: value.requires_grad for name, value in base.named_parameters()}
        base.requires_grad_(False)
        self._hooks: list[Any] = []
        self._attach()

    @contextmanager
    def side(self, features: Tensor, mask: Tensor | None = None) -> Iterator[None]:
        """Let the decoder look at side features inside the `with` block; keep the backward pass inside it too.

        Args:
            features: [n, d_v], one set for all samples, or [B, n, d_v]; finite.
            mask: bool [B, n], False where there is no feature; a sample with none at all gives the base's output.

        Raises:
            ValueError: a shape does not fit, n is 0, or a feature is not finite.
        """
        before = self._side
        self._side = self._checked(features, mask)
        try:
            yield
        finally:
            self._side = before
            self._projected.clear()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Run the base alone, without adapters and without LoRA, inside the `with` block."""
        before, self._side = self._side, None
        try:
            with without_lora(self.base):
                yield
        finally:
            self._side = before

    def add_lora(self, rank: int = 16) -> None:
        """Begin stage 2: LoRA on W_q and W_v of all layers. Its weights lie in the base and start without effect.

        Raises:
            ConfigError, ImportError: see recis.towers.lora.add_lora.
        """
        self._detach()  # the hook on W_q must be on what LoRA wraps around it
        try:
            add_lora(self.base, rank=rank, targets=LORA_TARGETS)
            self.lora_rank = rank
        finally:
            self._attach()

    def param_groups(self, *, lr: float = 1e-3, lora_lr: float = 2e-4) -> list[dict[str, Any]]:
        """Return an optimizer's param_groups: Q, A, B and gamma at lr; in stage 2 the LoRA weights at lora_lr."""
        groups: list[dict[str, Any]] = [{"params": list(self.parameters()), "lr": lr}]
        if self.lora_rank:
            groups.append({"params": list(lora_parameters(self.base).values()), "lr": lora_lr})
        return groups

    def num_parameters(self) -> dict[str, int]:
        """Return how many weights there are by kind: projectors (A and B), queries (Q), gates (gamma)."""
        kinds = {"projectors": ("down", "up"), "queries": ("queries",), "gates": ("gate",)}
        return {
            kind: sum(layer.get_parameter(name).numel() for layer in self.layers for name in names)
            for kind, names in kinds.items()
        }

    def base_hash(self) -> str:
        """Return the hash of the base's own weights; reads them all."""
        return weights_hash(self.base)

    def remove(self) -> None:
        """Give the base back as it was: no hooks, no LoRA, the weights training that were. These adapters are done with."""
        self._detach()
        remove_lora(self.base)
        self.lora_rank = 0
        for name, value in self.base.named_parameters():
            value.requires_grad_(self._trained[name])

    def _attach(self) -> None:
        for site, adapter in zip(self.sites, self.layers, strict=True):
            assert isinstance(adapter, LayerAdapter)
            note = _NoteQuery(self, site)
            self._hooks += [
                site.query_projection.register_forward_hook(note),
                site.out_projection.register_forward_pre_hook(_AddSide(self, site, adapter)),
            ]

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _checked(self, features: Tensor, mask: Tensor | None) -> _Side:
        if features.ndim == 2:
            features = features.unsqueeze(0)
        if features.ndim != 3 or features.shape[-1] != self.config.side_width or features.shape[1] == 0:
            raise ValueError(
                f"side features must be [n, {self.config.side_width}] or [B, n, {self.config.side_width}] with n of at "
                f"least 1; got shape {tuple(features.shape)}; of a sample without any, set the mask to False"
            )
        if mask is not None and (mask.dtype != torch.bool or mask.shape != features.shape[:2]):
            raise ValueError(f"the mask must be bool {tuple(features.shape[:2])}; got {mask.dtype} {tuple(mask.shape)}")
        if not bool(torch.isfinite(features).all()):  # NaN would pass even a closed gate: 0 * NaN is NaN
            raise ValueError("side features must be finite; some are NaN or infinite")
        return _Side(features, mask)


class _NoteQuery:
    """Forward hook on W_q: keep what it gave until the output projection is reached."""

    def __init__(self, owner: LayerwiseAdapters, site: AttentionSite) -> None:
        self.owner, self.site = owner, site

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if self.owner._side is not None:
            self.owner._projected[self.site.layer] = output


class _AddSide:
    """Forward pre-hook on the output projection: add the adapter's term to its input."""

    def __init__(self, owner: LayerwiseAdapters, site: AttentionSite, adapter: LayerAdapter) -> None:
        self.owner, self.site, self.adapter = owner, site, adapter

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        side = self.owner._side
        if side is None:
            return None
        attended, projected = inputs[0], self.owner._projected.pop(self.site.layer)
        if attended.shape != projected.shape:
            raise ConfigError(
                f"{self.site.name}: the output projection reads {tuple(attended.shape)}, W_q gave "
                f"{tuple(projected.shape)}; this attention is not one the adapters know"
            )
        if len(side.features) not in (1, len(attended)):
            raise ValueError(f"there are side features for {len(side.features)} samples, and {len(attended)} samples")
        return (attended + self.adapter.mix(self.site, projected, side).to(attended.dtype), *inputs[1:])


def _is_hooked(site: AttentionSite) -> bool:
    return any(isinstance(hook, _AddSide) for hook in site.out_projection._forward_pre_hooks.values())


def _device_of(site: AttentionSite) -> torch.device:
    return next(site.out_projection.parameters()).device
