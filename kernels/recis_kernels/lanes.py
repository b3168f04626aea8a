"""Sixteen floats at a time: the inner loops over rows that numba does not turn into good vector instructions by itself.

    fold_rows        total = f[0] x[0] + f[1] x[1] + ..., rows x given by their addresses, one addition after the other
    fold_words       the same for rows x of bf16 words
    square_sum       lane j = x[j]^2 + x[16 + j]^2 + ...;  sum = lanes folded in halves: 16 -> 8 -> 4 -> 2 -> 1
    lane_sum         the same of x itself
    scale_is_finite  x *= scale; is all of it finite?

A plain fp32 sum must run one element after another (fastmath, which would reorder it, is banned because results must be
equal on every machine); sixteen side by side are several times faster. The order is part of the result: changing it changes
bits. LLVM splits the sixteen lanes into what the machine has.
"""

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from recis_kernels.address import float32_at, load_bf16, load_float32, load_int64, uint16_at, uint32_at
from recis_kernels.dispatch import njit
from recis_kernels.prefetch import emit_prefetch, prefetch

__all__ = [
    "NUM_LANES",
    "fold_rows",
    "fold_words",
    "lane_scratch",
    "lane_sum",
    "scale_is_finite",
    "square_root",
    "square_sum",
    "square_sum_reference",
]

NUM_LANES = 16
_FLOAT, _INT32, _INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_LANES, _BITS = ir.VectorType(_FLOAT, NUM_LANES), ir.VectorType(_INT32, NUM_LANES)
_FLAGS = ir.VectorType(ir.IntType(1), NUM_LANES)


def lane_scratch(dim: int, num_rows: int) -> np.ndarray:
    """Return zeros [num_rows, dim padded to whole lanes], float32, for one call of a loop.

    Loops that work by address are given their memory: numba frees an array of its own once only its address is in use.
    """
    return np.zeros((num_rows, -(-dim // NUM_LANES) * NUM_LANES), np.float32)


def square_sum_reference(rows: Tensor) -> Tensor:
    """Return sum of squares of rows [U, D] float32 in the order above, [U] float32; any D."""
    padded = torch.nn.functional.pad(rows.float(), (0, -rows.shape[1] % NUM_LANES))
    lanes = torch.zeros(rows.shape[0], NUM_LANES, dtype=torch.float32, device=rows.device)
    for part in padded.square().split(NUM_LANES, dim=1):
        lanes = lanes + part
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def _steps(builder: Any, size: Any) -> Any:
    """Loop over the distances in bytes of every sixteen of `size` floats."""
    return cgutils.for_range_slice(builder, _INT64(0), builder.mul(size, _INT64(4)), _INT64(4 * NUM_LANES))


def _pointer(builder: Any, address: Any, distance: Any) -> Any:
    return builder.inttoptr(builder.add(address, distance), ir.PointerType(_LANES))


def _load(builder: Any, pointer: Any) -> Any:
    part = builder.load(pointer, typ=_LANES)
    part.align = 4
    return part


def _splat(builder: Any, value: Any) -> Any:
    lanes = builder.insert_element(ir.Constant(_LANES, ir.Undefined), value, _INT32(0))
    return builder.shuffle_vector(lanes, lanes, ir.Constant(_BITS, [0] * NUM_LANES))


def _halves(builder: Any, lanes: Any, half: int) -> Any:
    index = ir.VectorType(_INT32, half)
    low = builder.shuffle_vector(lanes, lanes, ir.Constant(index, list(range(half))))
    high = builder.shuffle_vector(lanes, lanes, ir.Constant(index, list(range(half, 2 * half))))
    return builder.fadd(low, high)


def _summed(builder: Any, args: Any, *, square: bool) -> Any:
    lanes = cgutils.alloca_once_value(builder, ir.Constant(_LANES, [0.0] * NUM_LANES))
    with _steps(builder, args[1]) as (distance, _):
        part = _load(builder, _pointer(builder, args[0], distance))
        term = builder.fmul(part, part) if square else part
        builder.store(builder.fadd(builder.load(lanes), term), lanes)
    total = builder.load(lanes)
    half = NUM_LANES // 2
    while half:
        total = _halves(builder, total, half)
        half //= 2
    return builder.extract_element(total, _INT32(0))


def _lane_sum(typingctx, address, size):
    del typingctx

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        return _summed(builder, args, square=False)

    return types.float32(types.int64, types.int64), codegen


def _square_sum(typingctx, address, size):
    del typingctx

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        return _summed(builder, args, square=True)

    return types.float32(types.int64, types.int64), codegen


def _scale_is_finite(typingctx, address, size, scale):
    del typingctx

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        factor = _splat(builder, args[2])
        exponent = ir.Constant(_BITS, [0x7F800000] * NUM_LANES)
        bad = cgutils.alloca_once_value(builder, ir.Constant(_FLAGS, [0] * NUM_LANES))
        with _steps(builder, args[1]) as (distance, _):
            pointer = _pointer(builder, args[0], distance)
            product = builder.fmul(_load(builder, pointer), factor)
            builder.store(product, pointer).align = 4
            worst = builder.icmp_unsigned("==", builder.and_(builder.bitcast(product, _BITS), exponent), exponent)
            builder.store(builder.or_(builder.load(bad), worst), bad)
        flags = builder.bitcast(builder.load(bad), ir.IntType(NUM_LANES))
        return builder.icmp_unsigned("==", flags, ir.IntType(NUM_LANES)(0))

    return types.boolean(types.int64, types.int64, types.float32), codegen


def _square_root(typingctx, value):
    del typingctx

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        return builder.call(builder.module.declare_intrinsic("llvm.sqrt", [_FLOAT]), args)

    return types.float32(types.float32), codegen


def _fold(width: int, *, is_bf16: bool, is_weighted: bool) -> Any:
    """Return the intrinsic that folds `width` times sixteen columns, kept in registers over all rows."""
    item_bytes = 2 if is_bf16 else 4

    def fold(typingctx, sources, factors, count, total, column, ahead):
        del typingctx

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            del signature
            sources, factors, count, total, column, ahead = args
            start, total_start = builder.mul(column, _INT64(item_bytes)), builder.mul(column, _INT64(4))
            places = [builder.add(start, _INT64(item_bytes * NUM_LANES * part)) for part in range(width)]
            pointers = [
                _pointer(builder, total, builder.add(total_start, _INT64(4 * NUM_LANES * part)))
                for part in range(width)
            ]
            sums = [cgutils.alloca_once_value(builder, _load(builder, pointer)) for pointer in pointers]
            lines = [builder.add(start, _INT64(line)) for line in range(0, item_bytes * NUM_LANES * width, 64)]
            lines.append(builder.add(start, _INT64(item_bytes * NUM_LANES * width - item_bytes)))
            with cgutils.for_range(builder, count, intp=_INT64) as loop:
                source_at = builder.add(sources, builder.mul(loop.index, _INT64(8)))
                source = builder.load(builder.inttoptr(source_at, ir.PointerType(_INT64)), typ=_INT64)
                later_at = builder.add(source_at, builder.mul(ahead, _INT64(8)))
                later = builder.load(builder.inttoptr(later_at, ir.PointerType(_INT64)), typ=_INT64)
                for line in lines:
                    emit_prefetch(builder, builder.add(later, line))
                factor = _factor(builder, factors, loop.index) if is_weighted else None
                for place, sum_at in zip(places, sums, strict=True):
                    pointer = _pointer(builder, source, place)
                    term = _load_words(builder, pointer) if is_bf16 else _load(builder, pointer)
                    term = term if factor is None else builder.fmul(term, factor)
                    builder.store(builder.fadd(builder.load(sum_at), term), sum_at)
            for pointer, sum_at in zip(pointers, sums, strict=True):
                builder.store(builder.load(sum_at), pointer).align = 4
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return intrinsic(fold)


def _load_words(builder: Any, pointer: Any) -> Any:
    """Load sixteen bf16 words as floats."""
    words = builder.load(pointer, typ=ir.VectorType(ir.IntType(16), NUM_LANES))
    words.align = 2
    bits = builder.shl(builder.zext(words, _BITS), ir.Constant(_BITS, [16] * NUM_LANES))
    return builder.bitcast(bits, _LANES)


def _factor(builder: Any, factors: Any, index: Any) -> Any:
    """Return the factor of one row in all lanes."""
    address = builder.add(factors, builder.mul(index, _INT64(4)))
    return _splat(builder, builder.load(builder.inttoptr(address, ir.PointerType(_FLOAT)), typ=_FLOAT))


_fold_64: Any = _fold(4, is_bf16=False, is_weighted=False)
_fold_16: Any = _fold(1, is_bf16=False, is_weighted=False)
_fold_weighted_64: Any = _fold(4, is_bf16=False, is_weighted=True)
_fold_weighted_16: Any = _fold(1, is_bf16=False, is_weighted=True)
_fold_words_64: Any = _fold(4, is_bf16=True, is_weighted=False)
_fold_words_16: Any = _fold(1, is_bf16=True, is_weighted=False)
_fold_weighted_words_64: Any = _fold(4, is_bf16=True, is_weighted=True)
_fold_weighted_words_16: Any = _fold(1, is_bf16=True, is_weighted=True)


@njit
def fold_rows(sources, factors, count, total, dim, started, ahead):
    """Put the left fold of `count` >= 1 rows of `dim` floats into the floats at `total`; numba loops only.

    sources: address of the rows' addresses, int64, count + ahead of them.  factors: address of their float32 factors,
    0 = all 1.  started: whether `total` holds the fold of earlier rows, to be continued.
    ahead: with each row the one so many places further is fetched, line by line as this one is read: a burst of fetches
    stalls as soon as the processor's list of open misses (some twenty) is full.
    """
    if not started:
        _fetch_row(load_int64(sources + 8 * ahead), 4 * dim)
        sums, row = float32_at(total, dim), float32_at(load_int64(sources), dim)
        factor = load_float32(factors) if factors != 0 else np.float32(1.0)
        for i in range(dim):
            sums[i] = factor * row[i]
        sources += 8
        factors += 4 if factors != 0 else 0
        count -= 1
    _fold_rest(sources, factors, count, total, dim, ahead, False)


@njit
def fold_words(sources, factors, count, total, dim, ahead):
    """Put the left fold of `count` >= 1 rows of `dim` bf16 words into the floats at `total`, as fold_rows does."""
    _fetch_row(load_int64(sources + 8 * ahead), 2 * dim)
    sums, words = uint32_at(total, dim), uint16_at(load_int64(sources), dim)
    for i in range(dim):
        sums[i] = np.uint32(words[i]) << np.uint32(16)
    if factors != 0:
        scaled, factor = float32_at(total, dim), load_float32(factors)
        for i in range(dim):
            scaled[i] = factor * scaled[i]
        factors += 4
    sources += 8
    count -= 1
    _fold_rest(sources, factors, count, total, dim, ahead, True)


@njit
def _fold_rest(sources, factors, count, total, dim, ahead, is_bf16):
    """Go on with the fold at `total` over `count` more rows: 64, 16, then single columns at a time."""
    if count == 0:
        return
    column = 0
    while column + 4 * NUM_LANES <= dim:
        if is_bf16:
            if factors != 0:
                _fold_weighted_words_64(sources, factors, count, total, column, ahead)
            else:
                _fold_words_64(sources, factors, count, total, column, ahead)
        elif factors != 0:
            _fold_weighted_64(sources, factors, count, total, column, ahead)
        else:
            _fold_64(sources, factors, count, total, column, ahead)
        column += 4 * NUM_LANES
    while column + NUM_LANES <= dim:
        if is_bf16:
            if factors != 0:
                _fold_weighted_words_16(sources, factors, count, total, column, ahead)
            else:
                _fold_words_16(sources, factors, count, total, column, ahead)
        elif factors != 0:
            _fold_weighted_16(sources, factors, count, total, column, ahead)
        else:
            _fold_16(sources, factors, count, total, column, ahead)
        column += NUM_LANES
    if column == dim:
        return
    sums, item_bytes = float32_at(total + 4 * column, dim - column), 2 if is_bf16 else 4
    for c in range(count):
        row_at = load_int64(sources + 8 * c) + item_bytes * column
        prefetch(load_int64(sources + 8 * (c + ahead)) + item_bytes * column)
        factor = load_float32(factors + 4 * c) if factors != 0 else np.float32(1.0)
        if is_bf16:
            for i in range(sums.size):
                sums[i] += factor * load_bf16(row_at + 2 * i)
        else:
            row = float32_at(row_at, dim - column)
            for i in range(sums.size):
                sums[i] += factor * row[i]


@njit
def _fetch_row(address, num_bytes):
    for line in range(0, num_bytes, 64):
        prefetch(address + line)


lane_sum: Any = intrinsic(_lane_sum)
"""lane_sum(address, size): sum of `size` floats (a multiple of 16, pad with zeros) at an address; numba loops only."""

square_sum: Any = intrinsic(_square_sum)
"""square_sum(address, size): the same of their squares."""

scale_is_finite: Any = intrinsic(_scale_is_finite)
"""scale_is_finite(address, size, scale): multiply `size` floats (a multiple of 16) by scale; are all products finite?"""

square_root: Any = intrinsic(_square_root)
"""square_root(value): correctly rounded square root of one float; np.sqrt of a single float is a call into libm."""
