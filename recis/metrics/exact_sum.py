"""Sum float64 numbers exactly, so that the result does not depend on their order or on how they were split.

    limbs[j] counts units of 2^(32 j - 1074);   sum = limbs[0] 2^-1074 + limbs[1] 2^-1042 + ...

Every float64 is a whole multiple of 2^-1074, so an integer wide enough for all of them holds any sum without rounding: a
"superaccumulator" (Kulisch; the small form is Neal 2015, arXiv:1505.05571). `value` rounds once, to nearest. Two ranks
that merge in either order, or one process that saw all rows, end in the same bytes. Costs about 3 ns per number.
"""

import numpy as np
import torch
from torch import Tensor

from recis_kernels.dispatch import njit

NUM_LIMBS = 70  # 2098 bits of float64 range, and 2^64 addends more
_LIMB_BITS = 32
_MAX_ADDENDS = 1 << 28  # each adds below 2^32 to a limb, which has 2^31 of head room before carries are moved up


class ExactSum:
    """A running sum of finite float64 numbers."""

    def __init__(self) -> None:
        self._limbs = np.zeros(NUM_LIMBS, dtype=np.int64)

    def add(self, numbers: np.ndarray) -> None:
        """Add numbers [N], float64 and finite (others are not noticed)."""
        bits = np.ascontiguousarray(numbers, dtype=np.float64).view(np.int64)
        for start in range(0, len(bits), _MAX_ADDENDS):
            _add_all(bits[start : start + _MAX_ADDENDS], self._limbs)

    def merge(self, other: "ExactSum") -> None:
        """Add what another sum holds."""
        self._limbs += other._limbs
        _carry(self._limbs)

    def value(self) -> float:
        """Return the sum, rounded once to the nearest float64."""
        total = sum(int(limb) << (_LIMB_BITS * index) for index, limb in enumerate(self._limbs))
        return total / (1 << 1074)  # division of Python ints rounds correctly

    def state(self) -> Tensor:
        """Return the limbs, int64 [70]: equal sums give equal bytes."""
        return torch.from_numpy(self._limbs.copy())

    def load(self, state: Tensor) -> None:
        """Replace the sum by what `state` returned."""
        if state.shape != (NUM_LIMBS,) or state.dtype != torch.int64:
            raise ValueError(f"state of a sum must be int64 [{NUM_LIMBS}]; got {tuple(state.shape)} {state.dtype}")
        self._limbs = state.cpu().numpy().copy()


@njit
def _add_all(bits, limbs):
    for word in bits:
        exponent = (word >> 52) & 2047
        mantissa = word & ((np.int64(1) << 52) - 1)
        if exponent == 0:
            exponent = 1  # subnormal: no hidden bit
        else:
            mantissa |= np.int64(1) << 52
        position = exponent - 1
        limb = position >> 5
        shift = position & 31
        # mantissa << shift has up to 84 bits: cut it into three limbs without leaving 64 bits
        low = (mantissa & 0xFFFFFFFF) << shift
        high = ((mantissa >> 32) << shift) + (low >> 32)
        low &= 0xFFFFFFFF
        middle = high & 0xFFFFFFFF
        high >>= 32
        if word < 0:
            limbs[limb] -= low
            limbs[limb + 1] -= middle
            limbs[limb + 2] -= high
        else:
            limbs[limb] += low
            limbs[limb + 1] += middle
            limbs[limb + 2] += high
    _carry(limbs)


@njit
def _carry(limbs):
    """Move carries up: all limbs but the last end in [0, 2^32), which makes the form unique."""
    carry = np.int64(0)
    for index in range(limbs.size - 1):
        total = limbs[index] + carry
        carry = total >> 32
        limbs[index] = total - (carry << 32)
    limbs[limbs.size - 1] += carry
