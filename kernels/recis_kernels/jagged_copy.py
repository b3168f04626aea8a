"""Copies of bags on the CPU, by address: numba loops that move each bag's bytes with one memcpy, whatever their dtype.

Addresses are int64 byte counts, as `Tensor.data_ptr()` gives them; the tensors behind them must be contiguous and outlive
the call. Whole numbers instead of arrays also make a call of a loop cheap, about 1 us, which counts where batches are small.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from recis_kernels.address import load_int32, load_int64, store_int32, store_int64
from recis_kernels.dispatch import njit


def _copy(typingctx, target, source, num_bytes):
    del typingctx, target, source, num_bytes

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del signature
        target, source = (builder.inttoptr(address, ir.PointerType(ir.IntType(8))) for address in args[:2])
        cgutils.raw_memcpy(builder, target, source, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def _clear(typingctx, address, num_bytes):
    del typingctx, address, num_bytes

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del signature
        target = builder.inttoptr(args[0], ir.PointerType(ir.IntType(8)))
        cgutils.memset(builder, target, args[1], 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _store(typingctx, address, word):
    del typingctx, address, word

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del signature
        instruction = builder.store(args[1], builder.inttoptr(args[0], ir.PointerType(ir.IntType(64))))
        instruction.align = 1
        return context.get_dummy_value()

    return types.void(types.int64, types.uint64), codegen


def _store_byte(typingctx, address, word):
    del typingctx, address, word

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del signature
        low = builder.trunc(args[1], ir.IntType(8))
        builder.store(low, builder.inttoptr(args[0], ir.PointerType(ir.IntType(8))))
        return context.get_dummy_value()

    return types.void(types.int64, types.uint64), codegen


_copy_bytes: Any = intrinsic(_copy)
_clear_bytes: Any = intrinsic(_clear)
_store_word: Any = intrinsic(_store)
_store_low_byte: Any = intrinsic(_store_byte)


@njit
def _fill(address, num_bytes, pattern):
    """Write the 8 bytes of `pattern`, little endian, again and again."""
    if pattern == 0:
        _clear_bytes(address, num_bytes)
        return
    whole = num_bytes & ~7
    for at in range(0, whole, 8):
        _store_word(address + at, pattern)
    for at in range(whole, num_bytes):
        _store_low_byte(address + at, pattern >> np.uint64(8 * (at - whole)))


@njit
def bags_to_padded(values, padded, ends, row_bytes, max_length, pattern, start, stop):
    """Copy bags start .. stop - 1 to rows of max_length entries of row_bytes; `pattern` fills what is left."""
    for bag in range(start, stop):
        first = np.int64(ends[bag])
        size = min(np.int64(ends[bag + 1]) - first, max_length)
        at = padded + bag * max_length * row_bytes
        _copy_bytes(at, values + first * row_bytes, size * row_bytes)
        _fill(at + size * row_bytes, (max_length - size) * row_bytes, pattern)


@njit
def padded_to_bags(padded, values, ends, row_bytes, max_length, start, stop):
    """Copy rows back to bags; entries past max_length are 0."""
    for bag in range(start, stop):
        first, last = np.int64(ends[bag]), np.int64(ends[bag + 1])
        size = min(last - first, max_length)
        at = values + first * row_bytes
        _copy_bytes(at, padded + bag * max_length * row_bytes, size * row_bytes)
        _fill(at + size * row_bytes, (last - first - size) * row_bytes, np.uint64(0))


@njit
def runs_to_packed(packed, other, firsts, ends, row_bytes, start, stop):
    """Copy runs that start at rows firsts[r] of other one after another."""
    for run in range(start, stop):
        first = np.int64(ends[run])
        num_bytes = (np.int64(ends[run + 1]) - first) * row_bytes
        _copy_bytes(packed + first * row_bytes, other + firsts[run] * row_bytes, num_bytes)


@njit
def runs_from_packed(packed, other, firsts, ends, row_bytes, start, stop):
    """Copy packed runs to where they belong: the inverse of runs_to_packed."""
    for run in range(start, stop):
        first = np.int64(ends[run])
        num_bytes = (np.int64(ends[run + 1]) - first) * row_bytes
        _copy_bytes(other + firsts[run] * row_bytes, packed + first * row_bytes, num_bytes)


@njit
def reorder_offsets(ends, order, new_ends, starts):
    """Write the offsets of bags taken in this order, and where each of them starts; False: order is no permutation."""
    new_ends[0] = 0
    for bag in range(order.size):
        if order[bag] < 0 or order[bag] >= order.size:
            return False
        first = ends[order[bag]]
        starts[bag] = first
        new_ends[bag + 1] = new_ends[bag] + ends[order[bag] + 1] - first
    return new_ends[order.size] == ends[order.size]  # else some bag stands twice, and copies would not fit


@njit
def running_sums(lengths, num_lengths, ends):
    """Write the offsets of int64 lengths: both addresses."""
    total = 0
    store_int64(ends, total)
    for bag in range(num_lengths):
        total += load_int64(lengths + 8 * bag)
        store_int64(ends + 8 * bag + 8, total)


@njit
def short_running_sums(lengths, num_lengths, ends):
    """The same of int32."""
    total = 0
    store_int32(ends, total)
    for bag in range(num_lengths):
        total += load_int32(lengths + 4 * bag)
        store_int32(ends + 4 * bag + 4, total)
