"""The CPU loops of soft_logic: one pass over items, slots and entities, in float64 whatever the dtype.

Gradients, E = e^u = 1 - g, with R and G the upstream gradients of log r and log g:

    product       -du = R a E / h + G E / g                            da = -R E / h
    goedel        the same, R only at the item's worst slot
    lukasiewicz   d sum s = R a / r + G / g,  R only where r > 0       da = -R E / r
    -du / dz_e    ds_e / (1 - s_e) for product and goedel's best entity
    ds_e / dz_e   c s (1 - s) of s = sigmoid(z_e);  (1 - c) s (1 - s) of s = sigmoid(z0) for the none logit

Product logic without confidence needs one exp per entity and two logs per slot: Q = e^-u - 1 = prod(1 + e^z) - 1 grows
by Q += e^z (1 + Q), which keeps the digits of a Q near 0; log g = -log1p(1 / Q). Past e^460 it goes over to the sum of
logs. du is 0 where u was clamped. Threads take items, so a slot must belong to one item, as offsets say.
"""

import math

import numpy as np
import torch
from torch import Tensor

from recis_kernels.dispatch import njit
from recis_kernels.threads import run_parts, split

_PRODUCT, _GOEDEL, _LUKASIEWICZ = 0, 1, 2
_MAX_U = -1e-30
_LOG_2 = math.log(2.0)
_HUGE = 1e200  # Q above it: sums of logs instead
_MIN_ITEMS = 512  # per thread


def pool_cpu(
    logits: Tensor,
    slot_offsets: Tensor,
    item_offsets: Tensor,
    relaxation: Tensor | None,
    confidence: Tensor | None,
    none_logits: Tensor | None,
    logic: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log r [I], log g [S] and u [S], unclamped."""
    num_items, num_slots = item_offsets.numel() - 1, slot_offsets.numel() - 1
    log_r, log_g, u = logits.new_empty(num_items), logits.new_empty(num_slots), logits.new_empty(num_slots)
    inputs = _arrays(logits, slot_offsets, item_offsets, relaxation, confidence, none_logits)
    outputs = log_r.numpy(), log_g.numpy(), u.numpy()
    run_parts(lambda start, stop: _pool_loop(*inputs, logic, *outputs, start, stop), _parts(num_items))
    return log_r, log_g, u


def pool_grad_cpu(
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
    of_logits, of_relaxation, of_none = torch.zeros_like(logits), torch.zeros_like(u), torch.zeros_like(u)
    inputs = _arrays(logits, slot_offsets, item_offsets, relaxation, confidence, none_logits)
    given = u.numpy(), of_r.numpy(), of_g.numpy()
    outputs = of_logits.numpy(), of_relaxation.numpy(), of_none.numpy()
    parts = _parts(item_offsets.numel() - 1)
    run_parts(lambda start, stop: _grad_loop(*inputs, logic, *given, *outputs, start, stop), parts)
    return of_logits, of_relaxation, of_none


def _parts(num_items: int) -> list[tuple[int, int]]:
    return split(num_items, min_items=_MIN_ITEMS)


def _arrays(logits: Tensor, slot_offsets: Tensor, item_offsets: Tensor, *optional: Tensor | None) -> tuple:
    empty = logits.new_empty(0)  # an array without elements stands for "not given"
    rest = ((empty if tensor is None else tensor).detach().numpy() for tensor in optional)
    return logits.detach().numpy(), slot_offsets.numpy(), item_offsets.numpy(), *rest


@njit
def _clamped(u):
    return _MAX_U if u > _MAX_U else u  # NaN stays


@njit
def _softplus(z):
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))


@njit
def _sigmoid(z):
    power = math.exp(-abs(z))
    return (1.0 if z >= 0 else power) / (1.0 + power)


@njit
def _log_one_minus(u, a):
    """log(1 - a e^u) for u <= 0."""
    if u > -_LOG_2:
        if a == 1.0:
            return math.log(-math.expm1(u))
        return math.log(-math.expm1(u) + (1.0 - a) * math.exp(u))
    return math.log1p(-a * math.exp(u))


@njit
def _truth(z, sure, none):
    """s, mixed by confidence."""
    if sure == 1.0:
        return _sigmoid(z)
    return sure * _sigmoid(z) + (1.0 - sure) * _sigmoid(none)


@njit
def _log_miss(z, sure, none):
    """log(1 - s)."""
    if sure == 1.0:
        return -_softplus(z)
    truth = _truth(z, sure, none)
    if truth < 0.5:
        return math.log1p(-truth)
    own, other = math.log(sure) - _softplus(z), math.log(1.0 - sure) - _softplus(none)
    top = max(own, other)
    return top + math.log1p(math.exp(min(own, other) - top))


@njit
def _odds_of_slot(logits, first, last):
    """Return Q = prod (1 + e^z) - 1 of entities first:last: the odds that one of them is true."""
    odds = 0.0
    for entity in range(first, last):
        odds += math.exp(logits[entity]) * (1.0 + odds)
        if odds > _HUGE:
            break
    return odds


@njit
def _u_of_slot(logits, confidence, none, first, last, logic):
    """Return u of entities first:last, unclamped, and the place of the best one."""
    total, best = 0.0, first
    for entity in range(first, last):
        sure = np.float64(confidence[entity]) if confidence.size else 1.0
        z = np.float64(logits[entity])
        if logic == _PRODUCT:
            total += _log_miss(z, sure, none)
        elif logic == _GOEDEL:
            miss = _log_miss(z, sure, none)
            if entity == first or miss < total or miss != miss:
                total, best = miss, entity
        else:
            total += _truth(z, sure, none)
    if logic != _LUKASIEWICZ:
        return total, best
    if total >= 1.0:
        return -np.inf, best
    return math.log1p(-total), best


@njit
def _pool_loop(
    logits,
    slot_offsets,
    item_offsets,
    relaxation,
    confidence,
    none_logits,
    logic,
    log_r,
    log_g,
    us,
    start,
    stop,
):
    for item in range(start, stop):
        total = 0.0
        for slot in range(item_offsets[item], item_offsets[item + 1]):
            none = np.float64(none_logits[slot]) if none_logits.size else 0.0
            first, last = slot_offsets[slot], slot_offsets[slot + 1]
            a = np.float64(relaxation[slot]) if relaxation.size else 1.0
            odds = np.inf
            if logic == _PRODUCT and confidence.size == 0:
                odds = _odds_of_slot(logits, first, last)
            if not odds > _HUGE:
                u = -math.log1p(odds)
                log_h = -math.log1p(1.0 / -_clamped(-odds))
            else:
                u, _ = _u_of_slot(logits, confidence, none, first, last, logic)
                log_h = _log_one_minus(_clamped(u), 1.0)
            us[slot] = u
            u = _clamped(u)
            log_g[slot] = log_h
            if a != 1.0:
                log_h = _log_one_minus(u, a)
            if logic == _PRODUCT:
                total += log_h
            elif logic == _GOEDEL:
                if log_h < total or log_h != log_h:
                    total = log_h
            else:
                total += a * math.exp(u)
        if logic != _LUKASIEWICZ:
            log_r[item] = total
        else:
            log_r[item] = math.log(-_clamped(total - 1.0))


@njit
def _grad_loop(
    logits,
    slot_offsets,
    item_offsets,
    relaxation,
    confidence,
    none_logits,
    logic,
    us,
    of_r,
    of_g,
    of_logits,
    of_relaxation,
    of_none,
    start,
    stop,
):
    for item in range(start, stop):
        first_slot, last_slot = item_offsets[item], item_offsets[item + 1]
        worst, lowest, misses = first_slot, np.inf, 0.0
        if logic != _PRODUCT:
            for slot in range(first_slot, last_slot):
                u = _clamped(np.float64(us[slot]))
                a = np.float64(relaxation[slot]) if relaxation.size else 1.0
                misses += a * math.exp(u)
                log_h = _log_one_minus(u, a)
                if log_h < lowest:
                    worst, lowest = slot, log_h
        for slot in range(first_slot, last_slot):
            u = np.float64(us[slot])
            odds = math.expm1(-_clamped(u))  # E / g = 1 / odds, E / h = 1 / (odds + 1 - a)
            a = np.float64(relaxation[slot]) if relaxation.size else 1.0
            share = np.float64(of_r[item])
            if logic != _LUKASIEWICZ:
                share /= odds + (1.0 - a)
                if logic == _GOEDEL and slot != worst:
                    share = 0.0
                of_truth = share * a + np.float64(of_g[slot]) / odds
            else:
                share = share / (1.0 - misses) if 1.0 - misses > -_MAX_U else 0.0
                of_truth = share * a + np.float64(of_g[slot]) * (1.0 + 1.0 / odds)
                share /= 1.0 + odds
            of_relaxation[slot] = -share
            if u > _MAX_U or u == -np.inf:
                continue
            none = np.float64(none_logits[slot]) if none_logits.size else 0.0
            _grad_slot(
                logits,
                confidence,
                none,
                slot_offsets[slot],
                slot_offsets[slot + 1],
                logic,
                of_truth,
                of_logits,
                of_none,
                slot,
            )


@njit
def _grad_slot(logits, confidence, none, first, last, logic, of_truth, of_logits, of_none, slot):
    """of_truth: minus the gradient of u for product and goedel, of the sum of s for lukasiewicz."""
    best = first
    if logic == _GOEDEL:
        _, best = _u_of_slot(logits, confidence, none, first, last, logic)
    total = 0.0
    for entity in range(first, last):
        if logic == _GOEDEL and entity != best:
            continue
        sure = np.float64(confidence[entity]) if confidence.size else 1.0
        if sure == 1.0:
            own = _sigmoid(logits[entity])
            if logic == _LUKASIEWICZ:
                own *= _sigmoid(-logits[entity])
            of_logits[entity] = of_truth * own
            continue
        z = np.float64(logits[entity])
        if logic != _LUKASIEWICZ:  # ds / (1 - s) without dividing by a rounded 0
            miss = _log_miss(z, sure, none)
            own = _sigmoid(z) * math.exp(math.log(sure) - _softplus(z) - miss)
            rest = _sigmoid(none) * math.exp(math.log(1.0 - sure) - _softplus(none) - miss)
        else:
            own = sure * _sigmoid(z) * _sigmoid(-z)
            rest = (1.0 - sure) * _sigmoid(none) * _sigmoid(-none)
        of_logits[entity] = of_truth * own
        total += of_truth * rest
    of_none[slot] = total
