"""FarmHash Fingerprint64 and MurmurHash64A of one byte string, for numba loops: the string is an address and a size.

Addresses are int64 byte counts, as `Tensor.data_ptr()` gives them, and need no alignment. All arithmetic is in uint64,
because numba makes int64 and uint64 together float64. Bytes are read as little-endian words, so the values are those of
every x86 and ARM machine. id_hash.py holds the ops over columns and a reference written apart from this file.
Sources: Pike, FarmHash 1.1 (Fingerprint64 is farmhashna::Hash64); Appleby, MurmurHash64A.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from recis_kernels.dispatch import njit


def _unaligned(numba_type: Any, bits: int) -> Any:
    def load(typingctx, address):
        del typingctx

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            del context, signature
            width = ir.IntType(bits)
            value = builder.load(builder.inttoptr(args[0], ir.PointerType(width)), typ=width)
            value.align = 1
            return value if bits == 64 else builder.zext(value, ir.IntType(64))

        return numba_type(types.int64), codegen

    return intrinsic(load)


_u64: Any = _unaligned(types.uint64, 64)
_u32: Any = _unaligned(types.uint64, 32)
_u8: Any = _unaligned(types.uint64, 8)
_K0, _K1, _K2 = np.uint64(0xC3A5C85C97CB3127), np.uint64(0xB492B66FBE98F273), np.uint64(0x9AE16A3B2F90404F)
_M = np.uint64(0xC6A4A7935BD1E995)
_S47 = np.uint64(47)


@njit
def _rot(bits, by):
    return (bits >> np.uint64(by)) | (bits << np.uint64(64 - by))


@njit
def _mix16(u, v, mul):
    a = (u ^ v) * mul
    a ^= a >> _S47
    b = (v ^ a) * mul
    b ^= b >> _S47
    return b * mul


@njit
def _farm16(s, size):
    mul = _K2 + np.uint64(2 * size)
    if size >= 8:
        a, b = _u64(s) + _K2, _u64(s + size - 8)
        return _mix16(_rot(b, 37) * mul + a, (_rot(a, 25) + b) * mul, mul)
    if size >= 4:
        return _mix16(np.uint64(size) + (_u32(s) << np.uint64(3)), _u32(s + size - 4), mul)
    if size > 0:
        low = _u8(s) + (_u8(s + (size >> 1)) << np.uint64(8))
        high = np.uint64(size) + (_u8(s + size - 1) << np.uint64(2))
        mixed = low * _K2 ^ high * _K0
        return (mixed ^ (mixed >> _S47)) * _K2
    return _K2


@njit
def _farm64(s, size):
    mul = _K2 + np.uint64(2 * size)
    a = _u64(s) * (_K1 if size <= 32 else _K2)
    b, c, d = _u64(s + 8), _u64(s + size - 8) * mul, _u64(s + size - 16) * _K2
    y = _rot(a + b, 43) + _rot(c, 30) + d
    z = _mix16(y, a + _rot(b + _K2, 18) + c, mul)
    if size <= 32:
        return z
    e, f = _u64(s + 16) * mul, _u64(s + 24)
    g, h = (y + _u64(s + size - 32)) * mul, (z + _u64(s + size - 24)) * mul
    return _mix16(_rot(e + f, 43) + _rot(g, 30) + h, e + _rot(f + a, 18) + g, mul)


@njit
def _weak32(s, a, b):
    fourth = _u64(s + 24)
    a += _u64(s)
    b = _rot(b + a + fourth, 21)
    total = a + _u64(s + 8) + _u64(s + 16)
    return total + fourth, b + _rot(total, 44) + a


@njit
def _farm_block(s, x, y, z, v0, v1, w0, w1, mul, nine):
    x = _rot(x + y + v0 + _u64(s + 8), 37) * mul
    y = _rot(y + v1 + _u64(s + 48), 42) * mul
    x ^= w1 * nine
    y += v0 * nine + _u64(s + 40)
    z = _rot(z + w0, 33) * mul
    v0, v1 = _weak32(s, v1 * mul, x + w0)
    w0, w1 = _weak32(s + 32, z + w1, y + _u64(s + 16))
    return z, y, x, v0, v1, w0, w1


@njit
def farm_one(s, size):
    """Return FarmHash Fingerprint64 of the `size` bytes at address s, uint64."""
    if size <= 16:
        return _farm16(s, size)
    if size <= 64:
        return _farm64(s, size)
    zero, one, nine = np.uint64(0), np.uint64(1), np.uint64(9)
    x = np.uint64(81) * _K2 + _u64(s)
    y = np.uint64(81) * _K1 + np.uint64(113)
    z = y * _K2 + np.uint64(113)
    z = (z ^ (z >> _S47)) * _K2
    v0, v1, w0, w1 = zero, zero, zero, zero
    tail = (size - 1) & 63
    for at in range(0, size - 1 - tail, 64):
        x, y, z, v0, v1, w0, w1 = _farm_block(s + at, x, y, z, v0, v1, w0, w1, _K1, one)
    mul = _K1 + ((z & np.uint64(255)) << one)
    w0 += np.uint64(tail)
    v0 += w0
    w0 += v0
    x, y, z, v0, v1, w0, w1 = _farm_block(s + size - 64, x, y, z, v0, v1, w0, w1, mul, nine)
    first = _mix16(v0, w0, mul) + (y ^ (y >> _S47)) * _K0 + z
    return _mix16(first, _mix16(v1, w1, mul) + x, mul)


@njit
def murmur_one(s, size):
    """Return MurmurHash64A (seed 0) of the `size` bytes at address s, uint64."""
    mixed = np.uint64(size) * _M
    whole = size & ~7
    for at in range(0, whole, 8):
        mixed = murmur_word(mixed, _u64(s + at))
    if size > whole:
        word = np.uint64(0)
        for i in range(size - whole):
            word |= _u8(s + whole + i) << np.uint64(8 * i)
        mixed = (mixed ^ word) * _M
    return murmur_end(mixed)


@njit
def farm_id(value):
    """Return Fingerprint64 of the 8 little-endian bytes of an int64, uint64."""
    word, mul = np.uint64(value), _K2 + np.uint64(16)
    a = word + _K2
    return _mix16(_rot(word, 37) * mul + a, (_rot(a, 25) + word) * mul, mul)


@njit
def murmur_id(value):
    """Return MurmurHash64A of the 8 little-endian bytes of an int64, uint64."""
    return murmur_end(murmur_word(np.uint64(8) * _M, np.uint64(value)))


@njit
def murmur_pair(first, second):
    """Return MurmurHash64A of the 16 bytes of two int64, little endian, first before second, uint64."""
    return murmur_end(murmur_word(murmur_word(np.uint64(16) * _M, np.uint64(first)), np.uint64(second)))


@njit
def murmur_word(mixed, word):
    """Return the running state after 8 more bytes."""
    word *= _M
    return (mixed ^ (word ^ (word >> _S47)) * _M) * _M


@njit
def murmur_end(mixed):
    """Return the hash of a finished state."""
    mixed = (mixed ^ (mixed >> _S47)) * _M
    return mixed ^ (mixed >> _S47)
