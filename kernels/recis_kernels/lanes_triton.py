"""Sums inside Triton kernels in the order of `lanes`: sixteen lanes side by side, then folded in halves.

    lane j = x[j] + x[16 + j] + ...;   sum = lanes folded 16 -> 8 -> 4 -> 2 -> 1

A reduction of a Triton tile along an axis has no promised order. Here only two numbers are ever reduced at once, or one
number and zeros, so the order is the stated one and the bits are the CPU's.
"""

from __future__ import annotations

from recis_kernels.dispatch import jit, tl


@jit
def fold_lanes(lanes, N: tl.constexpr):
    """Return the sums [N] of lanes [N, 16] float32, folded in halves."""
    lanes = tl.sum(tl.reshape(lanes, [N, 2, 8]), axis=1)
    lanes = tl.sum(tl.reshape(lanes, [N, 2, 4]), axis=1)
    lanes = tl.sum(tl.reshape(lanes, [N, 2, 2]), axis=1)
    return tl.sum(lanes, axis=1)


@jit
def square_sums(values, dim, N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the sums of squares [N] of values [N, BLOCK_D] float32 that are zero from column `dim` on.

    BLOCK_D is a multiple of 16.
    """
    PARTS: tl.constexpr = BLOCK_D // 16
    squares = tl.reshape(values * values, [N, PARTS, 16])
    number = tl.arange(0, PARTS)[None, :, None]
    lanes = tl.zeros([N, 16], dtype=tl.float32)
    for part in range((dim + 15) // 16):
        lanes = lanes + tl.sum(tl.where(number == part, squares, 0.0), axis=1)  # one part and zeros: exact
    return fold_lanes(lanes, N)
