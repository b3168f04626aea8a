"""Round fp32 rows to bfloat16 at random, so that the expected value is the fp32 value.

    bits = fp32 bits + (word & 0xffff), low 16 cleared;  word = Philox(id, column, table, step), stream 2**31 + step

A small update to a large bf16 weight is lost by rounding to nearest; added noise keeps it on average. The noise depends on
(seed, table, id, column, step) only, so every device and order gives the same bits. Inf and NaN pass unchanged.
"""

import numpy as np
import torch
from torch import Tensor

from recis_kernels.address import uint16_at, uint32_at
from recis_kernels.dispatch import Impl, choose, njit
from recis_kernels.philox import rounding_stream, words
from recis_kernels.philox_vector import COLUMNS, store_words
from recis_kernels.row_rounding_triton import round_rows

NOISE_BYTES = 4 * COLUMNS
_EXPONENT = 0x7F800000


def round_stochastic(values: Tensor, ids: Tensor, keys: Tensor, step: int, *, impl: Impl = "auto") -> Tensor:
    """Return bfloat16 [N, D] from float32 values [N, D] of rows `ids` [N] int64.

    Args:
        keys: key64 of each row's table, int64 [N] (or [1] for all).
        step: of the update.

    Raises:
        ValueError: values, ids or keys have another shape or dtype.
    """
    if values.ndim != 2 or values.dtype != torch.float32:
        raise ValueError(f"values must be [N, D] float32; got {tuple(values.shape)} {values.dtype}")
    num_rows = values.shape[0]
    if ids.ndim != 1 or ids.shape[0] != num_rows or ids.dtype != torch.int64:
        raise ValueError(f"ids must be [{num_rows}] int64; got {tuple(ids.shape)} {ids.dtype}")
    if keys.ndim != 1 or keys.shape[0] not in (1, num_rows) or keys.dtype != torch.int64:
        raise ValueError(f"keys must be [{num_rows}] or [1] int64; got {tuple(keys.shape)} {keys.dtype}")
    return _round_op(values, ids, keys, step, impl)


@torch.library.custom_op("recis::round_stochastic", mutates_args=())
def _round_op(values: Tensor, ids: Tensor, keys: Tensor, step: int, impl: str) -> Tensor:
    version = choose(impl, values, triton=round_rows, torch=_torch, reference=_torch)  # type: ignore[arg-type]
    return version(values.contiguous(), ids.contiguous(), keys.contiguous(), rounding_stream(step))


@_round_op.register_fake
def _(values, ids, keys, step, impl):
    return values.new_empty(values.shape, dtype=torch.bfloat16)


def _torch(values: Tensor, ids: Tensor, keys: Tensor, stream: int) -> Tensor:
    """Whole numbers throughout: the reference and the version for any device are one."""
    return add_noise(values, words(ids, values.shape[1], keys, stream) & 0xFFFF)


def add_noise(values: Tensor, noise: Tensor) -> Tensor:
    """Return bfloat16 of float32 values with noise (int64, 0 .. 65535, same shape) added below the kept bits."""
    bits = values.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    finite = (bits & _EXPONENT) != _EXPONENT
    quiet = torch.where((bits & 0x7FFFFF) != 0, 0x400000, 0)  # keeps a NaN whose mark lies in the low 16 bits
    rounded = torch.where(finite, bits + noise, bits | quiet) >> 16
    return rounded.to(torch.int32).to(torch.uint16).view(torch.bfloat16)


# ---- for numba loops, by address


@njit
def widen_row(stored, wide, dim):
    """Put `dim` bf16 words at `stored` into floats at `wide`."""
    words, bits = uint16_at(stored, dim), uint32_at(wide, dim)
    for i in range(dim):
        bits[i] = np.uint32(words[i]) << np.uint32(16)


@njit
def round_row(wide, stored, dim, key64, row_id, stream, noise):
    """Round `dim` floats at `wide` into bf16 words at `stored`, as round_stochastic does; noise: scratch of NOISE_BYTES."""
    exponent, mark, low = np.uint32(_EXPONENT), np.uint32(0x7FFFFF), np.uint32(0xFFFF)
    drawn = uint32_at(noise, COLUMNS)
    for start in range(0, dim, COLUMNS):
        store_words(key64, row_id, start // 4, stream, noise)
        count = min(COLUMNS, dim - start)
        bits, words = uint32_at(wide + 4 * start, count), uint16_at(stored + 2 * start, count)
        for i in range(count):
            value = bits[i]
            quiet = np.uint32(0x400000) if value & mark != np.uint32(0) else np.uint32(0)
            moved = value + (drawn[i] & low) if value & exponent != exponent else value | quiet
            words[i] = np.uint16(moved >> np.uint32(16))
