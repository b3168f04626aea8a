"""Philox4x32-10 for eight counters at once, inside numba loops: the words of 32 columns of one row.

numba's vectoriser leaves the 32 x 32 -> 64 bit products scalar (20 multiplications of one per cycle each: 9 ns a counter).
Written as eight-lane vectors they become the machine's own widening multiply, 2 to 3 ns a counter with AVX-512.
The words are those of `philox.id_words`.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from recis_kernels.philox import PHILOX_KEY_STEP, PHILOX_MULTIPLY, PHILOX_ROUNDS

COLUMNS = 32  # columns that one call writes
_LANES = COLUMNS // 4
_INT32, _INT64 = ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_INT64, _LANES)
_LOW32 = 0xFFFFFFFF


def _constant(values: list[int]) -> ir.Constant:
    return ir.Constant(_VECTOR, [_INT64(value) for value in values])


def _splat(builder: Any, value: Any) -> Any:
    """Return a vector with `value` in every lane."""
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    lane0 = builder.insert_element(undefined, value, _INT32(0))
    return builder.shuffle_vector(lane0, undefined, ir.Constant(ir.VectorType(_INT32, _LANES), [_INT32(0)] * _LANES))


def _rounds(builder: Any, counter: list[Any], key: list[Any]) -> list[Any]:
    mask, shift = _constant([_LOW32] * _LANES), _constant([32] * _LANES)
    c0, c1, c2, c3 = counter
    for _ in range(PHILOX_ROUNDS):
        product0 = builder.mul(c0, _constant([PHILOX_MULTIPLY[0]] * _LANES))
        product1 = builder.mul(c2, _constant([PHILOX_MULTIPLY[1]] * _LANES))
        c0, c1, c2, c3 = (
            builder.xor(builder.xor(builder.lshr(product1, shift), c1), _splat(builder, key[0])),
            builder.and_(product1, mask),
            builder.xor(builder.xor(builder.lshr(product0, shift), c3), _splat(builder, key[1])),
            builder.and_(product0, mask),
        )
        stepped = [builder.add(half, _INT64(step)) for half, step in zip(key, PHILOX_KEY_STEP, strict=True)]
        key = [builder.and_(half, _INT64(_LOW32)) for half in stepped]
    return [c0, c1, c2, c3]


def _store_words(typingctx, key64, row_id, quad, stream, address):
    del typingctx

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del signature
        key, bits, first, number, where = args
        low, high, lanes = _INT64(_LOW32), _INT64(32), _constant(list(range(_LANES)))
        quads = builder.and_(builder.add(_splat(builder, first), lanes), _constant([_LOW32] * _LANES))
        counter = [
            _splat(builder, builder.and_(bits, low)),
            _splat(builder, builder.lshr(bits, high)),
            quads,
            _splat(builder, builder.and_(number, low)),
        ]
        words = _rounds(builder, counter, [builder.and_(key, low), builder.lshr(key, high)])
        narrow = [builder.trunc(word, ir.VectorType(_INT32, _LANES)) for word in words]
        # Lane q of the four results is quad q: interleave them so that memory holds the columns in order.
        both = ir.Constant(ir.VectorType(_INT32, 2 * _LANES), [_INT32(k) for k in range(2 * _LANES)])
        front = builder.shuffle_vector(narrow[0], narrow[1], both)
        back = builder.shuffle_vector(narrow[2], narrow[3], both)
        order = [_INT32(q + _LANES * word) for q in range(_LANES) for word in range(4)]
        row_type = ir.VectorType(_INT32, COLUMNS)
        row = builder.shuffle_vector(front, back, ir.Constant(row_type, order))
        store = builder.store(row, builder.inttoptr(where, ir.PointerType(row_type)))
        store.align = 4
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


store_words: Any = intrinsic(_store_words)
"""store_words(key64, row_id, quad, stream, address): write the 32 uint32 words of columns 4 * quad .. 4 * quad + 31."""
