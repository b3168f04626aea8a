"""Hashes and Philox words inside Triton kernels: the bits of `philox`, one lane per value.

    hash64       MurmurHash3's finaliser in uint64, which wraps
    philox4x32   ten rounds in uint32: the high half of a product by umulhi, the low half by a wrapping product
    id_words     counter (low 32 of id, high 32 of id, column div 4, stream), key (low 32, high 32) of the table

A round is two multiplications wide, two narrow, four XORs and two additions: about 100 instructions for four words.
"""

from __future__ import annotations

from recis_kernels.dispatch import jit, tl


@jit
def hash64(values):
    """Return hash64 of an int64 or uint64 block as uint64."""
    mixed = values.to(tl.uint64, bitcast=True)
    mixed = (mixed ^ (mixed >> 33)) * 0xFF51AFD7ED558CCD
    mixed = (mixed ^ (mixed >> 33)) * 0xC4CEB9FE1A85EC53
    return mixed ^ (mixed >> 33)


@jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Return the four uint32 words of uint32 counters and keys; the six blocks have one shape."""
    multiply_a = tl.full(c0.shape, 0xD2511F53, tl.uint32)
    multiply_b = tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):  # pyright: ignore[reportGeneralTypeIssues]
        high_a, low_a = tl.umulhi(c0, multiply_a), c0 * multiply_a
        high_b, low_b = tl.umulhi(c2, multiply_b), c2 * multiply_b
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0 = k0 + tl.full(c0.shape, 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full(c0.shape, 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@jit
def id_words(key64, row_id, quad, stream):
    """Return the four uint32 words of columns 4 * quad .. 4 * quad + 3 of ids; arguments broadcast.

    Args:
        key64: int64 block, key of the table.  row_id: int64 block.  quad: integer block, column div 4.
        stream: whole number below 2**32, or a block of such.
    """
    like = key64 * 0 + row_id * 0 + quad.to(tl.int64) * 0
    bits, key = (row_id + like).to(tl.uint64), (key64 + like).to(tl.uint64)
    quads = (quad.to(tl.int64) + like).to(tl.uint32)
    streams = (like + stream).to(tl.uint32)
    low_id, high_id = (bits & 0xFFFFFFFF).to(tl.uint32), (bits >> 32).to(tl.uint32)
    low_key, high_key = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    return philox4x32(low_id, high_id, quads, streams, low_key, high_key)


@jit
def bf16_bits(values):
    """Return float32 values as bfloat16 bits (uint16), finite ones rounded to nearest even; an infinity stays."""
    bits = values.to(tl.uint32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
