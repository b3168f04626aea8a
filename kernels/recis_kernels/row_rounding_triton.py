"""Stochastic rounding of row tiles to bfloat16 inside Triton kernels: the bits of row_rounding.py.

One Philox call gives the noise of four columns, so a tile [N, D] makes [N, D / 4] calls and interleaves their words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recis_kernels.dispatch import jit, launch, tl
from recis_kernels.philox_triton import id_words
from recis_kernels.row_blocks_triton import TILE, next_power_of_2


def round_rows(values: Tensor, ids: Tensor, keys: Tensor, stream: int) -> Tensor:
    """Return bfloat16 [N, D] of float32 values [N, D]; ids [N] and keys [N] or [1] int64, all contiguous."""
    num_rows, dim = values.shape
    out = torch.empty(num_rows, dim, dtype=torch.bfloat16, device=values.device)
    block_d = min(max(next_power_of_2(dim), 4), TILE)
    block_n = TILE // block_d
    launch(
        _round_rows_kernel,
        (-(-num_rows // block_n), -(-dim // block_d)),
        *(values, ids, keys, out.view(torch.int16), num_rows, dim, stream),
        ONE_KEY=keys.numel() == 1,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return out


@jit
def column_noise(key64, row_id, stream, first_quad, N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the noise, int32 [N, BLOCK_D] in 0 .. 65535, of columns 4 * first_quad and on of rows with keys and ids [N]."""
    quads = first_quad + tl.arange(0, BLOCK_D // 4)
    word0, word1, word2, word3 = id_words(key64[:, None], row_id[:, None], quads[None, :], stream)
    even, odd = tl.join(word0, word2), tl.join(word1, word3)
    words = tl.reshape(tl.join(even, odd), [N, BLOCK_D])
    return (words & 0xFFFF).to(tl.int32)


@jit
def bf16_with_noise(values, noise):
    """Return float32 values with noise added below the kept bits, as bf16 bits in int16; Inf and NaN as they are."""
    bits = values.to(tl.int32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    quiet = tl.where((bits & 0x7FFFFF) != 0, 0x400000, 0)  # keeps a NaN whose mark lies in the low 16 bits
    return (tl.where(finite, bits + noise, bits | quiet) >> 16).to(tl.int16)


@jit
def _round_rows_kernel(
    values_ptr,
    ids_ptr,
    keys_ptr,
    out_ptr,
    num_rows,
    dim,
    stream,
    ONE_KEY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * BLOCK_D
    cols = first + tl.arange(0, BLOCK_D)
    exists = n < num_rows
    row_id = tl.load(ids_ptr + n, mask=exists, other=0)
    if ONE_KEY:
        key64 = tl.load(keys_ptr) + row_id * 0
    else:
        key64 = tl.load(keys_ptr + n, mask=exists, other=0)
    mask = exists[:, None] & (cols < dim)[None, :]
    at = n[:, None] * dim + cols[None, :]
    values = tl.load(values_ptr + at, mask=mask, other=0.0)
    noise = column_noise(key64, row_id, stream, first // 4, BLOCK_N, BLOCK_D)
    tl.store(out_ptr + at, bf16_with_noise(values, noise), mask=mask)
