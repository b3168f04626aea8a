"""The Triton kernels of soft_logic: a lane per slot walks its entities, a lane per item walks its slots.

Forward: entities -> u and log g of slots; slots -> log r of items. Backward: slots of items -> gradient of E = e^u;
slots -> entities. Formulas as in soft_logic_cpu.py, in fp32. log1p and expm1 are short series instead of the hardware's
log, whose error near 1 is absolute: a truth of 1e-17 must keep its digits.
"""

import torch
from torch import Tensor

from recis_kernels.dispatch import jit, launch, tl, triton

_BLOCK = 128


def pool_triton(
    logits: Tensor,
    slot_offsets: Tensor,
    item_offsets: Tensor,
    relaxation: Tensor | None,
    confidence: Tensor | None,
    none_logits: Tensor | None,
    logic: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log r [I], log g [S] and u [S], unclamped."""
    _check_dtype(logits)
    num_items, num_slots = item_offsets.numel() - 1, slot_offsets.numel() - 1
    log_r, log_g, u = logits.new_empty(num_items), logits.new_empty(num_slots), logits.new_empty(num_slots)
    mixing = _mixing(logits, confidence, none_logits)
    launch(
        _slot_truth_kernel,
        _grid(num_slots),
        logits,
        slot_offsets,
        *mixing,
        log_g,
        u,
        num_slots,
        **_slot(confidence, logic),
    )
    a = u if relaxation is None else relaxation
    launch(_item_truth_kernel, _grid(num_items), item_offsets, a, u, log_r, num_items, **_item(relaxation, logic))
    return log_r, log_g, u


def pool_grad_triton(
    logits: Tensor,
    slot_offsets: Tensor,
    item_offsets: Tensor,
    relaxation: Tensor | None,
    confidence: Tensor | None,
    none_logits: Tensor | None,
    u: Tensor,
    of_r: Tensor,
    of_g: Tensor,
    logic: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of logits [E], relaxation [S] and none_logits [S]."""
    _check_dtype(logits)
    num_items, num_slots = item_offsets.numel() - 1, slot_offsets.numel() - 1
    of_logits, of_relaxation, of_none = torch.zeros_like(logits), torch.zeros_like(u), torch.zeros_like(u)
    of_miss = torch.zeros_like(u)
    a = u if relaxation is None else relaxation
    tensors = item_offsets, a, u, of_r, of_g, of_miss, of_relaxation
    launch(_item_grad_kernel, _grid(num_items), *tensors, num_items, **_item(relaxation, logic))
    tensors = logits, slot_offsets, *_mixing(logits, confidence, none_logits), u, of_miss, of_logits, of_none
    launch(_slot_grad_kernel, _grid(num_slots), *tensors, num_slots, **_slot(confidence, logic))
    return of_logits, of_relaxation, of_none


def _check_dtype(logits: Tensor) -> None:
    if logits.dtype != torch.float32:
        raise ValueError(f"the Triton version computes in float32; got {logits.dtype} entity_logits: call .float()")


def _grid(num_lanes: int) -> tuple[int]:
    return (triton.cdiv(num_lanes, _BLOCK),)


def _mixing(logits: Tensor, confidence: Tensor | None, none_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    return logits if confidence is None else confidence, logits if none_logits is None else none_logits


def _slot(confidence: Tensor | None, logic: int) -> dict[str, int | bool]:
    return {"MIXED": confidence is not None, "LOGIC": logic, "BLOCK": _BLOCK, "num_warps": 4}


def _item(relaxation: Tensor | None, logic: int) -> dict[str, int | bool]:
    return {"RELAXED": relaxation is not None, "LOGIC": logic, "BLOCK": _BLOCK, "num_warps": 4}


@jit
def _log1p(y):
    """log(1 + y) for y in [-1/2, 1]: 2 atanh(y / (2 + y)), |y / (2 + y)| <= 1/3."""
    t = y / (2.0 + y)
    square = t * t
    series = 1.0 / 11.0 + square * (1.0 / 13.0)
    series = 1.0 / 7.0 + square * (1.0 / 9.0 + square * series)
    series = 1.0 / 3.0 + square * (1.0 / 5.0 + square * series)
    return 2.0 * t * (1.0 + square * series)


@jit
def _expm1(u):
    """e^u - 1 for u <= 0: Taylor above -ln 2."""
    near = tl.maximum(u, -0.7)
    series = 1.0 + near * (1.0 / 9.0) * (1.0 + near * (1.0 / 10.0))
    series = 1.0 + near * (1.0 / 7.0) * (1.0 + near * (1.0 / 8.0) * series)
    series = 1.0 + near * (1.0 / 5.0) * (1.0 + near * (1.0 / 6.0) * series)
    series = 1.0 + near * (1.0 / 3.0) * (1.0 + near * (1.0 / 4.0) * series)
    series = near * (1.0 + near * 0.5 * series)
    return tl.where(u > -0.6931471805599453, series, tl.exp(u) - 1.0)


@jit
def _clamped(u):
    return tl.where(u > -1e-30, -1e-30, u)  # NaN stays


@jit
def _log_one_minus(u, a):
    """log(1 - a e^u) for u <= 0."""
    power = tl.exp(u)
    above = tl.log(-_expm1(u) + (1.0 - a) * power)
    below = _log1p(-tl.minimum(a * power, 0.5))
    return tl.where(u > -0.6931471805599453, above, tl.where(u != u, u, below))


@jit
def _softplus(z):
    return tl.maximum(z, 0.0) + _log1p(tl.exp(-tl.abs(z)))


@jit
def _sigmoid(z):
    power = tl.exp(-tl.abs(z))
    return tl.where(z >= 0.0, 1.0, power) / (1.0 + power)


@jit
def _truth(z, sure, none, MIXED: tl.constexpr):
    """s, mixed by confidence."""
    truth = _sigmoid(z)
    if MIXED:
        truth = sure * truth + (1.0 - sure) * _sigmoid(none)
    return truth


@jit
def _log_miss(z, sure, none, MIXED: tl.constexpr):
    """log(1 - s)."""
    miss = -_softplus(z)
    if MIXED:
        truth = _truth(z, sure, none, MIXED)
        own, other = tl.log(sure) + miss, tl.log(1.0 - sure) - _softplus(none)
        top = tl.maximum(own, other)
        mixed = top + _log1p(tl.exp(tl.minimum(own, other) - top))
        mixed = tl.where(truth < 0.5, _log1p(-tl.minimum(truth, 0.5)), mixed)
        miss = tl.where(sure == 1.0, miss, mixed)
    return miss


@jit
def _slot_truth_kernel(
    logits_ptr,
    offsets_ptr,
    confidence_ptr,
    none_ptr,
    log_g_ptr,
    u_ptr,
    num_slots,
    MIXED: tl.constexpr,
    LOGIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slots = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = slots < num_slots
    first = tl.load(offsets_ptr + slots, mask=inside, other=0)
    last = tl.load(offsets_ptr + slots + 1, mask=inside, other=0)
    none = tl.zeros([BLOCK], dtype=tl.float32)
    sure = none + 1.0
    if MIXED:
        none = tl.load(none_ptr + slots, mask=inside, other=0.0)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for step in range(tl.max(last - first, axis=0)):  # type: ignore[arg-type]
        entity = first + step
        mask = entity < last
        z = tl.load(logits_ptr + entity, mask=mask, other=0.0)
        if MIXED:
            sure = tl.load(confidence_ptr + entity, mask=mask, other=1.0)
        if LOGIC == 2:
            total += tl.where(mask, _truth(z, sure, none, MIXED), 0.0)
        else:
            miss = tl.where(mask, _log_miss(z, sure, none, MIXED), 0.0)
            if LOGIC == 0:
                total += miss
            else:  # an entity never has log(1 - s) above 0
                total = tl.where((miss < total) | (miss != miss), miss, total)
    u = total
    if LOGIC == 2:
        low = _log1p(-tl.minimum(total, 0.5))
        u = tl.where(total < 0.5, low, tl.log(tl.maximum(1.0 - total, 0.0)))
        u = tl.where(total != total, total, u)
    tl.store(u_ptr + slots, u, mask=inside)
    tl.store(log_g_ptr + slots, _log_one_minus(_clamped(u), 1.0), mask=inside)


@jit
def _item_truth_kernel(
    offsets_ptr,
    relaxation_ptr,
    u_ptr,
    log_r_ptr,
    num_items,
    RELAXED: tl.constexpr,
    LOGIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    items = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = items < num_items
    first = tl.load(offsets_ptr + items, mask=inside, other=0)
    last = tl.load(offsets_ptr + items + 1, mask=inside, other=0)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    a = total + 1.0
    for step in range(tl.max(last - first, axis=0)):  # type: ignore[arg-type]
        slot = first + step
        mask = slot < last
        u = _clamped(tl.load(u_ptr + slot, mask=mask, other=-1.0))
        if RELAXED:
            a = tl.load(relaxation_ptr + slot, mask=mask, other=1.0)
        if LOGIC == 2:
            total += tl.where(mask, a * tl.exp(u), 0.0)
        else:
            log_h = tl.where(mask, _log_one_minus(u, a), 0.0)
            if LOGIC == 0:
                total += log_h
            else:
                total = tl.where((log_h < total) | (log_h != log_h), log_h, total)
    if LOGIC == 2:
        total = tl.log(-_clamped(total - 1.0))
    tl.store(log_r_ptr + items, total, mask=inside)


@jit
def _item_grad_kernel(
    offsets_ptr,
    relaxation_ptr,
    u_ptr,
    of_r_ptr,
    of_g_ptr,
    of_miss_ptr,
    of_relaxation_ptr,
    num_items,
    RELAXED: tl.constexpr,
    LOGIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient of E = e^u and of the relaxation of every slot."""
    items = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = items < num_items
    first = tl.load(offsets_ptr + items, mask=inside, other=0)
    last = tl.load(offsets_ptr + items + 1, mask=inside, other=0)
    of_r = tl.load(of_r_ptr + items, mask=inside, other=0.0)
    longest = tl.max(last - first, axis=0)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    a = total + 1.0
    worst = first
    lowest = total + 1.0
    if LOGIC != 0:
        for step in range(longest):  # type: ignore[arg-type]
            slot = first + step
            mask = slot < last
            u = _clamped(tl.load(u_ptr + slot, mask=mask, other=-1.0))
            if RELAXED:
                a = tl.load(relaxation_ptr + slot, mask=mask, other=1.0)
            if LOGIC == 2:
                total += tl.where(mask, a * tl.exp(u), 0.0)
            else:
                log_h = tl.where(mask, _log_one_minus(u, a), 2.0)
                worst = tl.where(log_h < lowest, slot, worst)
                lowest = tl.minimum(log_h, lowest)
    for step in range(longest):  # type: ignore[arg-type]
        slot = first + step
        mask = slot < last
        u = _clamped(tl.load(u_ptr + slot, mask=mask, other=-1.0))
        if RELAXED:
            a = tl.load(relaxation_ptr + slot, mask=mask, other=1.0)
        power = tl.exp(u)
        if LOGIC == 2:
            truth = 1.0 - total
            share = tl.where(truth > 1e-30, of_r / tl.maximum(truth, 1e-30), 0.0)
        else:
            share = of_r / (-_expm1(u) + (1.0 - a) * power)
            if LOGIC == 1:
                share = tl.where(slot == worst, share, 0.0)
        tl.store(of_relaxation_ptr + slot, -share * power, mask=mask)
        of_g = tl.load(of_g_ptr + slot, mask=mask, other=0.0)
        tl.store(of_miss_ptr + slot, of_g / _expm1(u) - share * a, mask=mask)


@jit
def _slot_grad_kernel(
    logits_ptr,
    offsets_ptr,
    confidence_ptr,
    none_ptr,
    u_ptr,
    of_miss_ptr,
    of_logits_ptr,
    of_none_ptr,
    num_slots,
    MIXED: tl.constexpr,
    LOGIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slots = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = slots < num_slots
    first = tl.load(offsets_ptr + slots, mask=inside, other=0)
    last = tl.load(offsets_ptr + slots + 1, mask=inside, other=0)
    u = tl.load(u_ptr + slots, mask=inside, other=-1.0)
    of_truth = -tl.load(of_miss_ptr + slots, mask=inside, other=0.0)
    if LOGIC != 2:
        of_truth *= tl.exp(u)
    of_truth = tl.where((u > -1e-30) | (u == float("-inf")), 0.0, of_truth)
    none = tl.zeros([BLOCK], dtype=tl.float32)
    sure = none + 1.0
    of_none = none
    if MIXED:
        none = tl.load(none_ptr + slots, mask=inside, other=0.0)
    longest = tl.max(last - first, axis=0)
    best = first
    if LOGIC == 1:
        lowest = tl.zeros([BLOCK], dtype=tl.float32) + 1.0
        for step in range(longest):  # type: ignore[arg-type]
            entity = first + step
            mask = entity < last
            z = tl.load(logits_ptr + entity, mask=mask, other=0.0)
            if MIXED:
                sure = tl.load(confidence_ptr + entity, mask=mask, other=1.0)
            miss = tl.where(mask, _log_miss(z, sure, none, MIXED), 2.0)
            best = tl.where(miss < lowest, entity, best)
            lowest = tl.minimum(miss, lowest)
    for step in range(longest):  # type: ignore[arg-type]
        entity = first + step
        mask = entity < last
        z = tl.load(logits_ptr + entity, mask=mask, other=0.0)
        if MIXED:
            sure = tl.load(confidence_ptr + entity, mask=mask, other=1.0)
        miss = z
        if LOGIC == 2:
            own = sure * _sigmoid(z) * _sigmoid(-z)
        else:
            miss = _log_miss(z, sure, none, MIXED)
            own = _sigmoid(z)
            if MIXED:
                own *= tl.exp(tl.log(sure) - _softplus(z) - miss)
        grad = of_truth * own
        counts = mask
        if LOGIC == 1:
            counts = mask & (entity == best)
        grad = tl.where(counts, grad, 0.0)
        tl.store(of_logits_ptr + entity, grad, mask=mask)
        if MIXED:
            if LOGIC == 2:
                rest = (1.0 - sure) * _sigmoid(none) * _sigmoid(-none)
            else:
                rest = _sigmoid(none) * tl.exp(tl.log(1.0 - sure) - _softplus(none) - miss)
            of_none += tl.where(counts, of_truth * rest, 0.0)
    if MIXED:
        tl.store(of_none_ptr + slots, of_none, mask=inside)
