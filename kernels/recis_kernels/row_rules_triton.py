"""The equations of row_rules.py on tiles of rows inside Triton kernels, in fp32 with one rounding per operation.

w, g and vector states are float32 [N, BLOCK_D], zero (g) or unused beyond the row's columns; k [N] points at each row's line of
fold_scalars, float64, of which every number is rounded to float32 as the CPU loops do. Division and square root are the
correctly rounded ones and nothing is contracted, so given equal scalars every rule has the CPU's bits. One exception: a row's
own step count takes powers of beta by repeated squaring in float64 where the CPU calls pow: the corrections then differ by
1 ulp of float32 in about one count of 10,000, and so may the weight; m and v do not.
"""

from __future__ import annotations

from recis_kernels.dispatch import jit, tl
from recis_kernels.lanes_triton import square_sums


@jit
def _wide(k, column, go):
    """Return one scalar of each row, float64 [N]; 0.5 where the row is left, by which all may be divided."""
    return tl.load(k + column, mask=go, other=0.5)


@jit
def _scalar(k, column, go):
    """Return one scalar of each row, float32 [N, 1]."""
    return _wide(k, column, go).to(tl.float32)[:, None]


@jit
def _with_decay(g, w, k, column, go):
    """Return g + weight decay * w; g itself where the decay is 0, whatever w is."""
    decay = _wide(k, column, go)[:, None]
    return tl.where(decay != 0.0, g + decay.to(tl.float32) * w, g)


@jit
def sgd(w, g, k, go):
    """Return new weights."""
    return w - _scalar(k, 0, go) * _with_decay(g, w, k, 1, go)


@jit
def sgd_momentum(w, m, g, k, go):
    """Return new (weights, momentum)."""
    m = _scalar(k, 2, go) * m + _with_decay(g, w, k, 1, go)
    return w - _scalar(k, 0, go) * m, m


@jit
def adagrad(w, h, g, k, go):
    """Return new (weights, sums of squares)."""
    g = _with_decay(g, w, k, 1, go)
    h = h + g * g
    return w - tl.div_rn(_scalar(k, 0, go) * g, tl.sqrt_rn(h) + _scalar(k, 2, go)), h


@jit
def row_wise_adagrad(w, h, g, k, go, dim, N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return new (weights, sum of mean squares [N])."""
    g = _with_decay(g, w, k, 1, go)
    width = tl.zeros([N], dtype=tl.float32) + dim
    h = h + tl.div_rn(square_sums(g, dim, N, BLOCK_D), width)
    step = tl.div_rn(_wide(k, 0, go).to(tl.float32), tl.sqrt_rn(h) + _wide(k, 2, go).to(tl.float32))
    return w - step[:, None] * g, h


@jit
def adam(w, m, v, t, g, k, go, ROW_STEPS: tl.constexpr):
    """Return new (weights, m, v) of all forms of Adam; t [N] float32, the row's count with this update, if ROW_STEPS."""
    g = _with_decay(g, w, k, 0, go)
    beta1, beta2 = _wide(k, 2, go), _wide(k, 3, go)
    m = beta1.to(tl.float32)[:, None] * m + (1.0 - beta1).to(tl.float32)[:, None] * g
    v = beta2.to(tl.float32)[:, None] * v + (1.0 - beta2).to(tl.float32)[:, None] * (g * g)
    step, root = _scalar(k, 5, go), _scalar(k, 6, go)
    if ROW_STEPS:
        first, second = 1.0 - _power(beta1, t), tl.sqrt(1.0 - _power(beta2, t))
        lr, is_corrected = _wide(k, 7, go), _wide(k, 8, go) != 0.0
        step = tl.where(is_corrected, lr / first, lr * second / first).to(tl.float32)[:, None]
        root = tl.where(is_corrected, 1.0 / second, 1.0).to(tl.float32)[:, None]
    return _scalar(k, 1, go) * w - tl.div_rn(step * m, tl.sqrt_rn(v) * root + _scalar(k, 4, go)), m, v


@jit
def _power(beta, t):
    """Return beta ** t in float64 for whole t below 2**24, the largest count that float32 holds."""
    count = t.to(tl.int32)
    power = beta * 0.0 + 1.0
    for bit in range(24):
        power = tl.where(((count >> bit) & 1) != 0, power * beta, power)
        beta = beta * beta
    return power


@jit
def ftrl(w, n, z, g, k, go):
    """Return new (weights, n, z)."""
    lr, beta, l1, l2 = _scalar(k, 0, go), _scalar(k, 1, go), _scalar(k, 2, go), _scalar(k, 3, go)
    square = g * g
    grown = n + square
    root = tl.sqrt_rn(grown)
    roots = root + tl.sqrt_rn(n)
    safe = tl.where(roots > 0.0, roots, 1.0)
    sigma = tl.where(roots > 0.0, tl.div_rn(tl.div_rn(square, safe), lr), 0.0)
    moved = z + (g - sigma * w)
    shrunk = tl.where(moved > 0.0, moved - l1, moved + l1)
    bottom = tl.div_rn(beta + root, lr) + l2
    return tl.where(tl.abs(moved) <= l1, 0.0, tl.div_rn(-shrunk, bottom)), grown, moved
