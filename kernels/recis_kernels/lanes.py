"""Sixteen floats at a time: the steps of a row update that numba does not turn into vector instructions by itself.

    square_sum       lane j = x[j]^2 + x[16 + j]^2 + ...;  sum = lanes folded in halves: 16 -> 8 -> 4 -> 2 -> 1
    lane_sum         the same of x itself
    scale_is_finite  x *= scale; is all of it finite?

A plain fp32 sum must run one element after another (fastmath, which would reorder it, is banned because results must be
equal on every machine): 19 ns for 64 floats against 3 ns here. The order is part of the result: changing it changes bits.
LLVM splits the sixteen lanes into what the machine has.
"""

from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

__all__ = ["NUM_LANES", "lane_sum", "scale_is_finite", "square_root", "square_sum", "square_sum_reference"]

NUM_LANES = 16
_FLOAT, _INT32, _INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_LANES, _BITS = ir.VectorType(_FLOAT, NUM_LANES), ir.VectorType(_INT32, NUM_LANES)
_FLAGS = ir.VectorType(ir.IntType(1), NUM_LANES)


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
        factor = builder.insert_element(ir.Constant(_LANES, ir.Undefined), args[2], _INT32(0))
        factor = builder.shuffle_vector(factor, factor, ir.Constant(_BITS, [0] * NUM_LANES))
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


lane_sum: Any = intrinsic(_lane_sum)
"""lane_sum(address, size): sum of `size` floats (a multiple of 16, pad with zeros) at an address; numba loops only."""

square_sum: Any = intrinsic(_square_sum)
"""square_sum(address, size): the same of their squares."""

scale_is_finite: Any = intrinsic(_scale_is_finite)
"""scale_is_finite(address, size, scale): multiply `size` floats (a multiple of 16) by scale; are all products finite?"""

square_root: Any = intrinsic(_square_root)
"""square_root(value): correctly rounded square root of one float; np.sqrt of a single float is a call into libm."""
