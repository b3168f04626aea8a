"""Read and write memory by address from numba loops: rows and slots lie in many blocks, reached through pointer tables.

An address is an int64 count of bytes, as `Tensor.data_ptr()` gives it. Nothing is checked: a wrong address ends the
process. `float32_at(address, n)` is a numpy array over the n floats there; its slices vectorise like those of any other
array. The scalar loads and stores compile to one instruction each and need natural alignment.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from recis_kernels.dispatch import njit

__all__ = [
    "float32_at",
    "load_bf16",
    "load_float32",
    "load_float64",
    "load_int32",
    "load_int64",
    "load_uint16",
    "store_float32",
    "store_int32",
    "store_int64",
    "store_uint16",
    "uint8_at",
    "uint16_at",
    "uint32_at",
]


def _pointer(typingctx, address):
    del typingctx

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        return builder.inttoptr(args[0], ir.PointerType(ir.IntType(8)))

    return types.voidptr(types.int64), codegen


_as_pointer: Any = intrinsic(_pointer)


def _typed_load(builder: Any, address: Any, width: ir.Type, num_bytes: int) -> Any:
    value = builder.load(builder.inttoptr(address, ir.PointerType(width)), typ=width)
    value.align = num_bytes
    return value


def _load(numba_type: Any, width: ir.Type, num_bytes: int) -> Any:
    def load(typingctx, address):
        del typingctx

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            del context, signature
            return _typed_load(builder, args[0], width, num_bytes)

        return numba_type(types.int64), codegen

    return intrinsic(load)


def _store(numba_type: Any, width: ir.Type, num_bytes: int) -> Any:
    def store(typingctx, address, value):
        del typingctx

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            del signature
            instruction = builder.store(args[1], builder.inttoptr(args[0], ir.PointerType(width)))
            instruction.align = num_bytes
            return context.get_dummy_value()

        return types.void(types.int64, numba_type), codegen

    return intrinsic(store)


def _load_word(typingctx, address):
    del typingctx

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        word = builder.zext(_typed_load(builder, args[0], ir.IntType(16), 2), ir.IntType(32))
        return builder.bitcast(builder.shl(word, ir.IntType(32)(16)), ir.FloatType())

    return types.float32(types.int64), codegen


load_bf16: Any = intrinsic(_load_word)
load_int64 = _load(types.int64, ir.IntType(64), 8)
load_int32 = _load(types.int32, ir.IntType(32), 4)
load_uint16 = _load(types.uint16, ir.IntType(16), 2)
load_float32 = _load(types.float32, ir.FloatType(), 4)
load_float64 = _load(types.float64, ir.DoubleType(), 8)
store_int64 = _store(types.int64, ir.IntType(64), 8)
store_int32 = _store(types.int32, ir.IntType(32), 4)
store_uint16 = _store(types.uint16, ir.IntType(16), 2)
store_float32 = _store(types.float32, ir.FloatType(), 4)


@njit
def float32_at(address, num_floats):
    """Return the float32 array of num_floats that starts at `address`; shares the memory."""
    return numba.carray(_as_pointer(address), (num_floats,), np.float32)


@njit
def uint16_at(address, num_words):
    """Return the uint16 array (bf16 bits) of num_words that starts at `address`; shares the memory."""
    return numba.carray(_as_pointer(address), (num_words,), np.uint16)


@njit
def uint32_at(address, num_words):
    """Return the uint32 array of num_words that starts at `address`; shares the memory."""
    return numba.carray(_as_pointer(address), (num_words,), np.uint32)


@njit
def uint8_at(address, num_bytes):
    """Return the uint8 array of num_bytes that starts at `address`; shares the memory."""
    return numba.carray(_as_pointer(address), (num_bytes,), np.uint8)
