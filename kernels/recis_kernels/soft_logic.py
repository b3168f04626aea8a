"""Pool entity logits into truth of slots and items by fuzzy logic, in logs: OR over a slot's entities, AND over its slots.

    s_e = sigmoid(z_e);  with confidence c_e and the slot's none logit z0:  s_e = c_e sigmoid(z_e) + (1 - c_e) sigmoid(z0)
    g_t = OR over slot t of s_e;   h_t = 1 - a_t (1 - g_t);   r_i = AND over item i of h_t        a_t: relaxation

    product       OR: 1 - prod (1 - s)      AND: prod h
    goedel        OR: max s                 AND: min h
    lukasiewicz   OR: min(1, sum s)         AND: max(0, 1 - sum (1 - h))

All three keep u_t = log(1 - g_t), which holds a truth near 0 and one near 1 to full precision:

    product      u = sum log(1 - s),  log(1 - s) = -softplus(z);  mixed by confidence: log1p(-s) below s = 1/2, else
                 logaddexp(log c - softplus(z), log(1 - c) - softplus(z0))
    log h(u, a) = log(-expm1(u) + (1 - a) e^u) above -ln 2, log1p(-a e^u) below;   log g = log h(u, 1)

u counts as at most -1e-30, so a truth below 1e-30, an empty slot's too, has log -69.08 and no gradient to its entities;
so does an item's under lukasiewicz, where r is a difference of numbers near 1 (fp32 loses it below 1e-7). An item without
slots has r = 1. Of equal best entities or worst slots goedel takes the first. Reads every number once or twice: 8 bytes
an entity forward, 12 with gradients.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recis_kernels.contents import check_offsets, is_asked
from recis_kernels.dispatch import Impl, choose
from recis_kernels.soft_logic_cpu import pool_cpu, pool_grad_cpu
from recis_kernels.soft_logic_triton import pool_grad_triton, pool_triton

PRODUCT, GOEDEL, LUKASIEWICZ = 0, 1, 2  # as the loops and kernels know them
MAX_U = -1e-30


class SoftLogic(NamedTuple):
    """log r [I] of items and log g [S] of slots, natural logs, each <= 0, in the logits' dtype."""

    log_r: Tensor
    log_g: Tensor


def product_pool(
    entity_logits: Tensor,
    slot_offsets: Tensor,
    item_offsets: Tensor,
    *,
    relaxation: Tensor | None = None,
    confidence: Tensor | None = None,
    none_logits: Tensor | None = None,
    impl: Impl = "auto",
) -> SoftLogic:
    """Pool by product logic: every entity gets a gradient, and log r is a sum over slots.

    Differentiable in entity_logits, relaxation and none_logits.

    Args:
        entity_logits: [E] float32 or float64 (float64 on the CPU only).
        slot_offsets: [S + 1] int64; slot t holds entities slot_offsets[t]:slot_offsets[t + 1].
        item_offsets: [I + 1] int64, slots of each item, likewise.
        relaxation: a [S] in [0, 1], dtype of the logits; None is 1 everywhere: a false slot makes its item false.
        confidence: [E] in (0, 1], dtype of the logits; no gradient. Needs none_logits.
        none_logits: [S], the logit of "no value" of each slot, dtype of the logits.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; confidence without none_logits or the other way round;
            confidence wants a gradient; inside `checks()`, offsets that do not ascend from 0 to the number of entities
            and slots, a NaN logit, relaxation or confidence out of range (one host sync).
    """
    given = (entity_logits, slot_offsets, item_offsets, relaxation, confidence, none_logits)
    return _pool(given, PRODUCT, impl)


def goedel_pool(
    entity_logits: Tensor,
    slot_offsets: Tensor,
    item_offsets: Tensor,
    *,
    relaxation: Tensor | None = None,
    confidence: Tensor | None = None,
    none_logits: Tensor | None = None,
    impl: Impl = "auto",
) -> SoftLogic:
    """Pool by Goedel logic, largest and smallest: one entity of each item gets its gradient. As product_pool otherwise."""
    given = (entity_logits, slot_offsets, item_offsets, relaxation, confidence, none_logits)
    return _pool(given, GOEDEL, impl)


def lukasiewicz_pool(
    entity_logits: Tensor,
    slot_offsets: Tensor,
    item_offsets: Tensor,
    *,
    relaxation: Tensor | None = None,
    confidence: Tensor | None = None,
    none_logits: Tensor | None = None,
    impl: Impl = "auto",
) -> SoftLogic:
    """Pool by Lukasiewicz logic, bounded sums: no gradient where a bound is reached. As product_pool otherwise."""
    given = (entity_logits, slot_offsets, item_offsets, relaxation, confidence, none_logits)
    return _pool(given, LUKASIEWICZ, impl)


def _pool(given: tuple[Tensor | None, ...], logic: int, impl: Impl) -> SoftLogic:
    _check(*given)  # type: ignore[arg-type]
    if impl == "reference":
        _check_content(*given[:5])  # type: ignore[arg-type]
        return _reference(*given, logic)  # type: ignore[arg-type]
    return SoftLogic(*_pool_op(*given, logic, impl)[:2])


def _check(
    logits: Tensor,
    slot_offsets: Tensor,
    item_offsets: Tensor,
    relaxation: Tensor | None,
    confidence: Tensor | None,
    none_logits: Tensor | None,
) -> None:
    if logits.ndim != 1 or logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"entity_logits must be [E] float32 or float64; got {tuple(logits.shape)} {logits.dtype}: call .float()"
        )
    for name, offsets, axis in (("slot_offsets", slot_offsets, "S"), ("item_offsets", item_offsets, "I")):
        if offsets.ndim != 1 or offsets.numel() == 0 or offsets.dtype != torch.int64:
            raise ValueError(f"{name} must be [{axis} + 1] int64; got {tuple(offsets.shape)} {offsets.dtype}")
    slots = torch.Size([slot_offsets.shape[0] - 1])
    named = (("relaxation", relaxation, slots), ("none_logits", none_logits, slots))
    for name, tensor, shape in (*named, ("confidence", confidence, logits.shape)):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != logits.dtype):
            raise ValueError(f"{name} must be {list(shape)} {logits.dtype}; got {tuple(tensor.shape)} {tensor.dtype}")
    given = [
        tensor for tensor in (slot_offsets, item_offsets, relaxation, confidence, none_logits) if tensor is not None
    ]
    if any(tensor.device != logits.device for tensor in given):
        raise ValueError(
            f"all tensors must lie on one device; entity_logits are on {logits.device}, others on "
            f"{sorted({str(tensor.device) for tensor in given})}: move them together"
        )
    if (confidence is None) != (none_logits is None):
        raise ValueError(
            "confidence and none_logits go together: what is not the entity's belongs to `none`; give both"
        )
    if confidence is not None and confidence.requires_grad:
        raise ValueError("confidence gets no gradient; pass confidence.detach()")


def _check_content(
    logits: Tensor,
    slot_offsets: Tensor,
    item_offsets: Tensor,
    relaxation: Tensor | None,
    confidence: Tensor | None,
) -> None:
    if not is_asked():
        return
    check_offsets(slot_offsets, logits.shape[0], whole=True, name="slot_offsets")
    check_offsets(item_offsets, slot_offsets.shape[0] - 1, whole=True, name="item_offsets")
    if bool(logits.isnan().any()):
        raise ValueError(
            f"entity_logits[{int(logits.isnan().nonzero()[0])}] is NaN; score this entity again or drop it"
        )
    if relaxation is not None and not bool(((relaxation >= 0) & (relaxation <= 1)).all()):
        raise ValueError(f"relaxation must be in [0, 1]; got {relaxation.min().item()} to {relaxation.max().item()}")
    if confidence is not None and not bool(((confidence > 0) & (confidence <= 1)).all()):
        raise ValueError(f"confidence must be in (0, 1]; got {confidence.min().item()} to {confidence.max().item()}")


# ---- reference: float64, one slot and one item at a time, torch's own gradients


def _log1mexp(u: Tensor, relaxation: Tensor | None = None) -> Tensor:
    """log(1 - a e^u) for u < 0; a = 1 without relaxation. Each branch has a safe input, so that no gradient is NaN."""
    a = torch.ones_like(u) if relaxation is None else relaxation
    near = u > -0.6931471805599453
    near_u, far_u = torch.where(near, u, -0.1), torch.where(near, -1.0, u)
    above = torch.log(-torch.expm1(near_u) + (1 - a) * torch.exp(near_u))
    return torch.where(near, above, torch.log1p(-a * torch.exp(far_u)))


def _reference(
    entity_logits: Tensor,
    slot_offsets: Tensor,
    item_offsets: Tensor,
    relaxation: Tensor | None,
    confidence: Tensor | None,
    none_logits: Tensor | None,
    logic: int,
) -> SoftLogic:
    logits = entity_logits.double()
    log_miss, truth = -F.softplus(logits), torch.sigmoid(logits)
    if confidence is not None and none_logits is not None:
        slot = torch.arange(none_logits.shape[0], device=logits.device).repeat_interleave(slot_offsets.diff())
        sure, none = confidence.double(), none_logits.double()[slot]
        truth = sure * truth + (1 - sure) * torch.sigmoid(none)
        mixed = torch.logaddexp(sure.log() + log_miss, (1 - sure).log() - F.softplus(none))
        low = truth < 0.5
        log_miss = torch.where(low, torch.log1p(-torch.where(low, truth, 0.0)), mixed)
    nothing = logits[:0].sum()  # 0 that autograd still knows
    us = []
    for lo, hi in pairwise(slot_offsets.tolist()):
        if hi == lo:
            u = nothing
        elif logic == PRODUCT:
            u = log_miss[lo:hi].sum()
        elif logic == GOEDEL:
            u = log_miss[lo + int(log_miss[lo:hi].argmin())]
        else:
            total = truth[lo:hi].sum()
            u = torch.log1p(-total) if total < 1 else nothing - torch.inf
        us.append(u.clamp(max=MAX_U))
    u = torch.stack(us) if us else logits[:0]
    a = torch.ones_like(u) if relaxation is None else relaxation.double()
    log_h, and_of = _log1mexp(u, a), (_and_product, _and_goedel, _and_lukasiewicz)[logic]
    items = [and_of(log_h[lo:hi], a[lo:hi] * u[lo:hi].exp()) for lo, hi in pairwise(item_offsets.tolist())]
    log_r = torch.stack(items) if items else log_h[:0]
    return SoftLogic(log_r.to(entity_logits.dtype), _log1mexp(u).to(entity_logits.dtype))


def _and_product(log_h: Tensor, misses: Tensor) -> Tensor:
    del misses
    return log_h.sum()


def _and_goedel(log_h: Tensor, misses: Tensor) -> Tensor:
    del misses
    return log_h[int(log_h.argmin())] if log_h.numel() else log_h.sum()


def _and_lukasiewicz(log_h: Tensor, misses: Tensor) -> Tensor:
    del log_h
    truth = 1 - misses.sum()
    return truth.log() if truth > -MAX_U else truth * 0 + torch.tensor(-MAX_U, dtype=truth.dtype).log()


# ---- numba and Triton: nodes of torch.compile and export


@torch.library.custom_op("recis::soft_logic", mutates_args=())
def _pool_op(
    entity_logits: Tensor,
    slot_offsets: Tensor,
    item_offsets: Tensor,
    relaxation: Tensor | None,
    confidence: Tensor | None,
    none_logits: Tensor | None,
    logic: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log r [I], log g [S] and u [S], which the gradient needs."""
    tensors = (entity_logits, slot_offsets, item_offsets, relaxation, confidence, none_logits)
    _check_content(*tensors[:5])  # type: ignore[arg-type]
    given = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    return _version(entity_logits, impl, pool_cpu, pool_triton)(*given, logic)


@torch.library.custom_op("recis::soft_logic_grad", mutates_args=())
def _grad_op(
    entity_logits: Tensor,
    slot_offsets: Tensor,
    item_offsets: Tensor,
    relaxation: Tensor | None,
    confidence: Tensor | None,
    none_logits: Tensor | None,
    u: Tensor,
    of_r: Tensor,
    of_g: Tensor,
    logic: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of entity_logits [E], relaxation and none_logits [S] from those of log r and log g."""
    tensors = (entity_logits, slot_offsets, item_offsets, relaxation, confidence, none_logits, u, of_r, of_g)
    given = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    return _version(entity_logits, impl, pool_grad_cpu, pool_grad_triton)(*given, logic)


def _version(logits: Tensor, impl: str, cpu: Callable, triton: Callable) -> Callable:
    return choose(impl, logits, numba=cpu, triton=triton)  # type: ignore[arg-type]


@_pool_op.register_fake
def _(entity_logits, slot_offsets, item_offsets, relaxation, confidence, none_logits, logic, impl):
    slots = entity_logits.new_empty(slot_offsets.shape[0] - 1)
    return entity_logits.new_empty(item_offsets.shape[0] - 1), slots, torch.empty_like(slots)


@_grad_op.register_fake
def _(entity_logits, slot_offsets, item_offsets, relaxation, confidence, none_logits, u, of_r, of_g, logic, impl):
    return entity_logits.new_empty(entity_logits.shape), torch.empty_like(u), torch.empty_like(u)


def _setup(ctx, inputs, output) -> None:
    *tensors, logic, impl = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.logic, ctx.impl = logic, impl


def _backward(ctx, of_r, of_g, of_u):
    *tensors, u = ctx.saved_tensors
    of_logits, of_relaxation, of_none = _grad_op(*tensors, u, of_r, of_g, ctx.logic, ctx.impl)
    relaxation, none = tensors[3], tensors[5]
    return (
        of_logits,
        None,
        None,
        None if relaxation is None else of_relaxation,
        None,
        None if none is None else of_none,
        None,
        None,
    )


_pool_op.register_autograd(_backward, setup_context=_setup)
