"""Random words and hashes that depend on their arguments alone, not on order, device, threads, world size or time.

    hash64      MurmurHash3's 64-bit finaliser, a bijection; home group = top bits, owner slice = low 16
    key64       hash64(seed) XOR MurmurHash64A(utf8(table name), seed 0);  Philox key = (low 32, high 32)
    counter     (low 32 of id, high 32 of id, column div 4, stream);  word = Philox4x32-10(counter, key)[column mod 4]
    stream      initializer 0 + attempt | admission 2**30 + step mod 2**30 | stochastic rounding 2**31 + step mod 2**31

Each function exists twice: over tensors (any device, plain torch, the reference) and for one value inside numba loops
(names ending in `_one`, and `id_words`). Loops hold 32-bit words in uint64, so every product is exact.
Sources: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; Appleby, MurmurHash2 and MurmurHash3.
"""

import numpy as np
import torch
from torch import Tensor

from recis_kernels.dispatch import njit

ADMISSION_STREAM = 1 << 30
ROUNDING_STREAM = 1 << 31
_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
PHILOX_ROUNDS = 10
PHILOX_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEP = (0x9E3779B9, 0xBB67AE85)
_HASH_MULTIPLY = (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53)
_MURMUR_MULTIPLY = 0xC6A4A7935BD1E995


def to_signed(bits: int) -> int:
    """Return the int64 with the same low 64 bits, so that keys fit into tensors."""
    bits &= _MASK64
    return bits - (1 << 64) if bits >> 63 else bits


def hash64(ids: Tensor) -> Tensor:
    """Return MurmurHash3's finaliser of int64 ids (any shape), as the int64 with those bits."""
    if ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64; got {ids.dtype}")
    low31 = (1 << 31) - 1  # torch shifts int64 arithmetically; the mask makes it logical
    mixed = ids ^ ((ids >> 33) & low31)
    for factor in _HASH_MULTIPLY:
        mixed = mixed * to_signed(factor)
        mixed = mixed ^ ((mixed >> 33) & low31)
    return mixed


def hash64_of(value: int) -> int:
    """Return hash64 of one number, int64 or uint64, as the unsigned number: some microseconds less than by a tensor."""
    mixed = value & _MASK64
    mixed ^= mixed >> 33
    for factor in _HASH_MULTIPLY:
        mixed = mixed * factor & _MASK64
        mixed ^= mixed >> 33
    return mixed


def murmur64a(data: bytes, seed: int = 0) -> int:
    """Return MurmurHash64A of data as an unsigned 64-bit number."""
    mixed = (seed ^ (len(data) * _MURMUR_MULTIPLY)) & _MASK64
    whole = len(data) // 8 * 8
    for start in range(0, whole, 8):
        word = int.from_bytes(data[start : start + 8], "little") * _MURMUR_MULTIPLY & _MASK64
        word = (word ^ (word >> 47)) * _MURMUR_MULTIPLY & _MASK64
        mixed = (mixed ^ word) * _MURMUR_MULTIPLY & _MASK64
    if whole < len(data):
        mixed = (mixed ^ int.from_bytes(data[whole:], "little")) * _MURMUR_MULTIPLY & _MASK64
    mixed = (mixed ^ (mixed >> 47)) * _MURMUR_MULTIPLY & _MASK64
    return mixed ^ (mixed >> 47)


def table_key(seed: int, name: str) -> int:
    """Return key64 of a table as a signed int64, ready for a tensor of keys; `% 2**64` gives the unsigned form.

    Args:
        seed: of the model; any int64 or uint64.
        name: of the logical table.
    """
    hashed_seed = int(hash64(torch.tensor(to_signed(seed), dtype=torch.int64)))
    return to_signed(hashed_seed ^ murmur64a(name.encode()))


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Return the four words of Philox4x32-10, int64 [..., 4] in [0, 2**32).

    Args:
        counter: int64 [..., 4], each in [0, 2**32).
        key: int64 [..., 2], each in [0, 2**32); broadcasts against counter.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(PHILOX_ROUNDS):
        # The int64 product wraps, but its 64 bits are the exact unsigned product; the mask undoes the arithmetic shift.
        product0, product1 = c0 * PHILOX_MULTIPLY[0], c2 * PHILOX_MULTIPLY[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK32) ^ c1 ^ k0,
            product1 & _MASK32,
            ((product0 >> 32) & _MASK32) ^ c3 ^ k1,
            product0 & _MASK32,
        )
        k0, k1 = (k0 + PHILOX_KEY_STEP[0]) & _MASK32, (k1 + PHILOX_KEY_STEP[1]) & _MASK32
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)


def words(ids: Tensor, dim: int, keys: Tensor, stream: int) -> Tensor:
    """Return the Philox words of columns 0 .. dim - 1 of each id, int64 [N, dim] in [0, 2**32).

    Args:
        ids: int64 [N].
        keys: key64 of each id's table, int64 [N] (or [1] for all).
        stream: 0 .. 2**32 - 1, see the head of this file.
    """
    quads = torch.arange((dim + 3) // 4, device=ids.device)
    low, high = (ids & _MASK32)[:, None], ((ids >> 32) & _MASK32)[:, None]
    counter = torch.stack(torch.broadcast_tensors(low, high, quads[None, :], quads.new_full((1, 1), stream)), dim=-1)
    key = torch.stack((keys & _MASK32, (keys >> 32) & _MASK32), dim=-1)[:, None, :]
    return philox4x32(counter, key).reshape(ids.numel(), quads.numel() * 4)[:, :dim]


def admission_stream(step: int) -> int:
    """Return the stream of the admission draws of a step."""
    return ADMISSION_STREAM + step % ADMISSION_STREAM


def rounding_stream(step: int) -> int:
    """Return the stream of the stochastic rounding of a step; pass it to loops as a whole number, not per row."""
    return ROUNDING_STREAM + step % ROUNDING_STREAM


# ---- for numba loops: uint64 throughout, because int64 and uint64 together would become float64

_U33 = np.uint64(33)
_U32 = np.uint64(32)
_LOW32 = np.uint64(_MASK32)
_HASH_A, _HASH_B = np.uint64(_HASH_MULTIPLY[0]), np.uint64(_HASH_MULTIPLY[1])
_MULTIPLY_A, _MULTIPLY_B = np.uint64(PHILOX_MULTIPLY[0]), np.uint64(PHILOX_MULTIPLY[1])
_STEP_A, _STEP_B = np.uint64(PHILOX_KEY_STEP[0]), np.uint64(PHILOX_KEY_STEP[1])


@njit
def hash64_one(value):
    """Return hash64 of one int64 or uint64 as uint64."""
    mixed = np.uint64(value)
    mixed ^= mixed >> _U33
    mixed *= _HASH_A
    mixed ^= mixed >> _U33
    mixed *= _HASH_B
    mixed ^= mixed >> _U33
    return mixed


@njit
def philox_one(c0, c1, c2, c3, k0, k1):
    """Return the four words (uint64 below 2**32) of one counter and key (uint64 below 2**32)."""
    for _ in range(PHILOX_ROUNDS):
        product0, product1 = c0 * _MULTIPLY_A, c2 * _MULTIPLY_B
        c0, c1, c2, c3 = (
            (product1 >> _U32) ^ c1 ^ k0,
            product1 & _LOW32,
            (product0 >> _U32) ^ c3 ^ k1,
            product0 & _LOW32,
        )
        k0 = (k0 + _STEP_A) & _LOW32
        k1 = (k1 + _STEP_B) & _LOW32
    return c0, c1, c2, c3


@njit
def id_words(key64, row_id, quad, stream):
    """Return the words (uint64) of columns 4 * quad .. 4 * quad + 3 of an id.

    Args:
        key64: int64 key of the table.  row_id: int64.  quad: column div 4.  stream: whole number below 2**32.
    """
    bits, key = np.uint64(row_id), np.uint64(key64)
    return philox_one(bits & _LOW32, bits >> _U32, np.uint64(quad), np.uint64(stream), key & _LOW32, key >> _U32)
