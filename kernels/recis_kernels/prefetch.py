"""Ask the CPU for a cache line before a loop needs it.

A random row or slot costs about 100 ns from memory; a loop that asks 16 rows (gather) or 24 keys (hash find) ahead
overlaps those waits. A prefetch of an address that is not mapped does nothing; reading a list past its end to compute
that address is still an error.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

__all__ = ["emit_prefetch", "prefetch", "prefetch_write"]

_READ, _WRITE = 0, 1
_KEEP_IN_ALL_LEVELS = 3
_DATA_CACHE = 1


def emit_prefetch(builder: Any, address: Any, access: int = _READ) -> None:
    """Write the prefetch of an address (an LLVM int64) into a function that is being built."""
    pointer_type = ir.PointerType(ir.IntType(8))
    int32 = ir.IntType(32)
    function = builder.module.declare_intrinsic(
        "llvm.prefetch.p0", (), ir.FunctionType(ir.VoidType(), [pointer_type, int32, int32, int32])
    )
    pointer = builder.inttoptr(address, pointer_type)
    builder.call(function, [pointer, int32(access), int32(_KEEP_IN_ALL_LEVELS), int32(_DATA_CACHE)])


def _read_ahead(typingctx, address):
    del typingctx

    def codegen(context, builder, signature, args):
        del signature
        emit_prefetch(builder, args[0], _READ)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def _write_ahead(typingctx, address):
    del typingctx

    def codegen(context, builder, signature, args):
        del signature
        emit_prefetch(builder, args[0], _WRITE)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


prefetch: Any = intrinsic(_read_ahead)
"""prefetch(address): load the cache line at `address` (int64) for reading; numba loops only."""

prefetch_write: Any = intrinsic(_write_ahead)
"""prefetch_write(address): load the cache line at `address` (int64) for writing; numba loops only."""
