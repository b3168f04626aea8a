"""Entity logits -> truth of types and items, as a layer on the kernel `recis_kernels.soft_logic`.

    s_e = sigmoid(z_e)                    a shopper who typed the query accepts this value
    g_t = OR  over e in E_t of s_e        any acceptable value of a type suffices
    r   = AND over t of 1 - a_t (1 - g_t) no type may contradict the query; a_t in [0, 1] is learned and starts at 1

All in logs. Source: the split into (query, entity) scores from arXiv:2307.00370; operators, grouping and a_t are ours.
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from recis.ebrm.config import Logic
from recis.errors import ConfigError
from recis_kernels.soft_logic import SoftLogic, goedel_pool, lukasiewicz_pool, product_pool

POOLS: dict[str, Callable[..., SoftLogic]] = {
    "product": product_pool,
    "goedel": goedel_pool,
    "lukasiewicz": lukasiewicz_pool,
}
MAX_LOG_TRUTH = -1e-30  # what log r and log g count as at most where 1 - r is needed


class SoftLogicOutput(NamedTuple):
    """log r [I], log g [S], r [I]; logs are natural, each <= 0."""

    log_r: Tensor
    log_g: Tensor
    r: Tensor


class SoftLogicPool(nn.Module):
    """Entity logits -> per-type truth g_t and item truth r, in logs. The formula stands at the top of the file.

    Args:
        types: names of the entity types; their positions are the type ids.
        logic: which OR and AND.
        learn_relaxation: whether a_t gets gradients.
        hard: types whose a_t is 1 for ever: a contradiction of them always vetoes.

    Attributes:
        relaxation: a [T], a plain parameter. It is projected onto [0, 1] at the start of every forward, so after each
            step of an optimizer; give it a learning rate and a clip group of its own, because d log r / d a_t reaches
            1e17 at saturated logits.

    Raises:
        ConfigError: no or repeated types, an unknown logic, a hard type that is not among types.
    """

    def __init__(
        self,
        types: tuple[str, ...],
        *,
        logic: Logic = "product",
        learn_relaxation: bool = True,
        hard: Collection[str] = (),
    ) -> None:
        super().__init__()
        if not types or len(set(types)) < len(types):
            raise ConfigError(f"types must be at least one name, each once; got {types}")
        if logic not in POOLS:
            raise ConfigError(f"logic must be one of {', '.join(POOLS)}; got {logic!r}")
        if set(hard) - set(types):
            raise ConfigError(f"hard types must be among {types}; got {sorted(set(hard) - set(types))}")
        self.types, self.logic = types, logic
        self.relaxation = nn.Parameter(torch.ones(len(types)), requires_grad=learn_relaxation)
        self._hard: Tensor
        self.register_buffer("_hard", torch.tensor([name in hard for name in types]), persistent=False)
        self._pool = POOLS[logic]

    def extra_repr(self) -> str:
        """Return the settings, for print(module)."""
        return f"types={self.types}, logic={self.logic!r}"

    @torch.no_grad()
    def project_(self) -> None:
        """Project a onto [0, 1], and hard types onto 1. A NaN stays, so that a broken step shows."""
        self.relaxation.clamp_(0.0, 1.0).masked_fill_(self._hard, 1.0)

    def forward(
        self,
        entity_logits: Tensor,
        type_ids: Tensor,
        slot_offsets: Tensor,
        item_offsets: Tensor,
        *,
        confidence: Tensor | None = None,
        none_logits: Tensor | None = None,
    ) -> SoftLogicOutput:
        """Pool logits; differentiable in entity_logits, none_logits and the relaxation. Contents are checked.

        Args:
            entity_logits: [E] float32 or float64 (other floats are computed in float32).
            type_ids: [S] int64, the type of each slot.
            slot_offsets: [S + 1] int64; slot t holds entities slot_offsets[t]:slot_offsets[t + 1].
            item_offsets: [I + 1] int64, slots of each item, likewise. An item without slots has r = 1.
            confidence: [E] in (0, 1]: s' = c s + (1 - c) s_none. Needs none_logits.
            none_logits: [S], the logit of each slot's none entity.

        Raises:
            ValueError: a NaN logit (names the first index), malformed offsets, a type id outside types, an empty slot.
        """
        self._check(entity_logits, type_ids, slot_offsets, item_offsets)
        return self.combine(
            entity_logits, type_ids, slot_offsets, item_offsets, confidence=confidence, none_logits=none_logits
        )

    def combine(
        self,
        entity_logits: Tensor,
        type_ids: Tensor,
        slot_offsets: Tensor,
        item_offsets: Tensor,
        *,
        confidence: Tensor | None = None,
        none_logits: Tensor | None = None,
    ) -> SoftLogicOutput:
        """Do as `forward` does, trusting what the tensors hold: for callers that made them, and without host syncs."""
        self.project_()
        if entity_logits.dtype != torch.float64:
            entity_logits = entity_logits.float()
        dtype = entity_logits.dtype
        relaxation = torch.where(self._hard, self.relaxation.detach(), self.relaxation)[type_ids].to(dtype)
        log_r, log_g = self._pool(
            entity_logits,
            slot_offsets,
            item_offsets,
            relaxation=relaxation,
            confidence=None if confidence is None else confidence.to(dtype),
            none_logits=None if none_logits is None else none_logits.to(dtype),
        )
        return SoftLogicOutput(log_r, log_g, log_r.exp())

    def _check(self, logits: Tensor, type_ids: Tensor, slot_offsets: Tensor, item_offsets: Tensor) -> None:
        num_slots = slot_offsets.numel() - 1
        for name, offsets, last in (
            ("slot_offsets", slot_offsets, logits.numel()),
            ("item_offsets", item_offsets, num_slots),
        ):
            if offsets.ndim != 1 or offsets.numel() == 0 or offsets.dtype != torch.int64:
                raise ValueError(
                    f"{name} must be 1-D int64 from 0 to {last}; got {tuple(offsets.shape)} {offsets.dtype}"
                )
            ends_wrong = int(offsets[0]) != 0 or int(offsets[-1]) != last
            if ends_wrong or bool((offsets.diff() < 0).any()):
                raise ValueError(
                    f"{name} must ascend from 0 to {last}; got {offsets[:8].tolist()} .. {int(offsets[-1])}"
                )
        empty = (slot_offsets.diff() == 0).nonzero()
        if empty.numel():
            raise ValueError(
                f"slot {int(empty[0])} is empty: an item that states no value of a type has its none entity there, "
                "or leaves the slot out"
            )
        if type_ids.shape != (num_slots,) or type_ids.dtype != torch.int64:
            raise ValueError(f"type_ids must be [{num_slots}] int64; got {tuple(type_ids.shape)} {type_ids.dtype}")
        outside = ((type_ids < 0) | (type_ids >= len(self.types))).nonzero()
        if outside.numel():
            first = int(outside[0])
            raise ValueError(
                f"type_ids[{first}] is {int(type_ids[first])}; ids are 0 to {len(self.types) - 1} of types {self.types}"
            )
        if bool(logits.isnan().any()):
            raise ValueError(f"entity_logits[{int(logits.isnan().nonzero()[0])}] is NaN; find its (query, entity) pair")


def log1mexp(log_truth: Tensor) -> Tensor:
    """Return log(1 - e^x) for x <= 0, each branch with a safe input, so that no gradient is NaN. x counts as <= -1e-30."""
    x = log_truth.clamp(max=MAX_LOG_TRUTH)
    near = x > -0.6931471805599453
    above = torch.log(-torch.expm1(torch.where(near, x, -0.1)))
    return torch.where(near, above, torch.log1p(-torch.exp(torch.where(near, -1.0, x))))


def relevance_loss(log_r: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy [I] of labels in [0, 1] with r = e^log_r: -y log r - (1 - y) log(1 - r).

    log(1 - r) is finite and keeps its gradient for r above 1 - 1e-7 too: the worst false positives need it most.
    """
    return -labels * log_r - (1 - labels) * log1mexp(log_r)
