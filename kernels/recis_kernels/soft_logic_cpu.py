"""The CPU loops of soft_logic: one pass over items, slots and entities, in float64 whatever the dtype.

Gradients, E = e^u, h = 1 - a E, g = 1 - E, with R and G the upstream gradients of log r and log g:

    product       du = -R a E / h - G E / g                     da = -R E / h
    goedel        the same, R only at the item's worst slot
    lukasiewicz   du = -R a E / r - G E / g,  R only if r > 0   da = -R E / r
    du/dz_e       -d s_e / (1 - s_e) product and goedel's best entity;   -d s_e / (1 - sum s) lukasiewicz
    d s_e / dz_e = c s (1 - s) of s = sigmoid(z_e);  the rest of 1 goes to the none logit likewise

du is 0 where u was clamped. Threads take items, so a slot must belong to one item, as offsets say.
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
            u, _ = _u_of_slot(logits, confidence, none, slot_offsets[slot], slot_offsets[slot + 1], logic)
            us[slot] = u
            u = _clamped(np.float64(us[slot]))  # as backward reads it
            a = np.float64(relaxation[slot]) if relaxation.size else 1.0
            log_g[slot] = _log_one_minus(u, 1.0)
            if logic == _PRODUCT:
                total += _log_one_minus(u, a)
            elif logic == _GOEDEL:
                log_h = _log_one_minus(u, a)
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
            raw_u = np.float64(us[slot])
            u = _clamped(raw_u)
            power = math.exp(u)
            a = np.float64(relaxation[slot]) if relaxation.size else 1.0
            share = np.float64(of_r[item])
            if logic != _LUKASIEWICZ:
                share /= -math.expm1(u) + (1.0 - a) * power
                if logic == _GOEDEL and slot != worst:
                    share = 0.0
            else:
                share = share / (1.0 - misses) if 1.0 - misses > -_MAX_U else 0.0
            of_relaxation[slot] = -share * power
            # per E, so that lukasiewicz divides by 1 - sum s only once
            of_miss = -share * a + np.float64(of_g[slot]) / math.expm1(u)
            if raw_u > _MAX_U or raw_u == -np.inf:
                continue
            none = np.float64(none_logits[slot]) if none_logits.size else 0.0
            _grad_slot(
                logits,
                confidence,
                none,
                slot_offsets[slot],
                slot_offsets[slot + 1],
                logic,
                of_miss,
                raw_u,
                of_logits,
                of_none,
                slot,
            )


@njit
def _grad_slot(logits, confidence, none, first, last, logic, of_miss, u, of_logits, of_none, slot):
    """of_miss is the gradient of E = 1 - g."""
    best = first
    if logic == _GOEDEL:
        _, best = _u_of_slot(logits, confidence, none, first, last, logic)
    total = 0.0
    for entity in range(first, last):
        if logic == _GOEDEL and entity != best:
            continue
        sure = np.float64(confidence[entity]) if confidence.size else 1.0
        z = np.float64(logits[entity])
        rest = 0.0
        if logic != _LUKASIEWICZ:
            # dE = -E ds / (1 - s), and s (1 - s) / (1 - s mixed) without dividing by a rounded 0
            miss = _log_miss(z, sure, none)
            of_truth = -of_miss * math.exp(u)
            own = _sigmoid(z) * math.exp(math.log(sure) - _softplus(z) - miss)
            if sure < 1.0:
                rest = _sigmoid(none) * math.exp(math.log(1.0 - sure) - _softplus(none) - miss)
        else:
            of_truth = -of_miss
            own = sure * _sigmoid(z) * _sigmoid(-z)
            if sure < 1.0:
                rest = (1.0 - sure) * _sigmoid(none) * _sigmoid(-none)
        of_logits[entity] = of_truth * own
        total += of_truth * rest
    of_none[slot] = total
