"""First values of rows inside Triton kernels: the formulas of `row_init`, [rows, quads of columns] per program.

A lane owns a quad, one Philox counter, whose four words are four neighbouring columns; so a program draws no word twice and
writes each row in pieces of 16 bytes (8 in bf16). Constant and uniform values have the CPU's bits. Normals are computed in
float64 with a sine and cosine of our own, good to 2**-52 on [0, 2 pi]: the compiler's handle any angle and keep an
array in slow local memory for that. Rounded to float32 they are within one ulp of the CPU's.
A row costs its bytes, written once, and 16 bytes of (row, id) read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recis_kernels.dispatch import jit, launch, tl
from recis_kernels.philox_triton import bf16_bits, id_words
from recis_kernels.row_blocks import RowBlocks

if TYPE_CHECKING:
    from recis_kernels.row_init import InitSpec


def init_rows(
    blocks: RowBlocks, rows: Tensor, ids: Tensor, keys: Tensor, tables: Tensor, spec: InitSpec,
    state_values: Sequence[float], step: int, clock_s: int,
) -> None:  # fmt: skip
    """Do row_init.init_rows: one launch for weights and metadata, one for each state vector; no host sync."""
    layout, num_rows = blocks.layout, rows.numel()
    pointers, keys = blocks.device_pointers, keys.to(rows.device, non_blocking=True)
    store = (blocks.shift, layout.row_bytes)
    kind, *numbers = spec.loop_args()
    grid, tile = _tiles(num_rows, layout.dim)
    launch(
        _init_rows_kernel, grid,
        pointers, rows, ids, keys, tables, num_rows, 0 if tables.numel() == 1 else 1, *store, layout.dim,
        layout.id_offset, layout.clock_offset, *numbers, _as_int32(step), _as_int32(clock_s),
        KIND=kind, IS_BF16=layout.dtype == torch.bfloat16, **tile,
    )  # fmt: skip
    offset = layout.state_start
    for (_, width), value in zip(layout.state, state_values, strict=True):
        columns = min(64, 1 << (width - 1).bit_length())
        grid = (-(-num_rows // (1024 // columns)), -(-width // columns))
        launch(
            _init_state_kernel, grid,
            pointers, rows, num_rows, *store, offset, width, float(value), ROWS=1024 // columns, COLUMNS=columns,
        )  # fmt: skip
        offset += 4 * width


def initial_values(ids: Tensor, dim: int, keys: Tensor, tables: Tensor, spec: InitSpec) -> Tensor:
    """Return the first values of ids [N], float32 [N, dim]."""
    out = torch.empty(ids.numel(), dim, dtype=torch.float32, device=ids.device)
    kind, *numbers = spec.loop_args()
    grid, tile = _tiles(ids.numel(), dim)
    stride = 0 if tables.numel() == 1 else 1
    args = (ids, keys.to(ids.device, non_blocking=True), tables, out, ids.numel(), stride, dim, *numbers)
    launch(_initial_values_kernel, grid, *args, KIND=kind, **tile)
    return out


def draws(ids: Tensor, keys: Tensor, tables: Tensor, stream: int) -> Tensor:
    """Return the first word of each id in a stream as a number of [0, 1), float32 [N]."""
    out = torch.empty(ids.shape, dtype=torch.float32, device=ids.device)
    args = (
        ids,
        keys.to(ids.device, non_blocking=True),
        tables,
        out,
        ids.numel(),
        0 if tables.numel() == 1 else 1,
        stream,
    )
    launch(_draws_kernel, (-(-ids.numel() // 256),), *args, BLOCK=256)
    return out


def _tiles(num_rows: int, dim: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the grid and the block sizes that cover num_rows rows of dim columns: 128 quads per program."""
    quads = min(32, 1 << max(0, (dim - 1).bit_length() - 2))
    rows = 128 // quads
    return (-(-num_rows // rows), -(-dim // (4 * quads))), {"ROWS": rows, "QUADS": quads}


def _as_int32(number: int) -> int:
    """Return the int32 with the low 32 bits, as the CPU loop stores it."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)


@jit
def _interleave(first, second, third, fourth):
    """Return [rows, 4 * quads] with the four blocks [rows, quads] as columns 0 .. 3 of each quad."""
    return tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth))


@jit
def _sin_cos(angle):
    """Return the sine and cosine of float64 angles in [0, 2 pi] by Taylor's series within pi / 4 of a quadrant."""
    quadrant = (angle * 0.6366197723675814 + 0.5).to(tl.int32)
    turns = quadrant.to(tl.float64)
    # pi / 2 in two parts: 33 bits, whose product with a quadrant is exact, and the rest
    rest = (angle - turns * 1.5707963267341256) - turns * 6.077100506506192e-11
    square = rest * rest
    # -1 / 15!, 1 / 13!, ... and 1 / 16!, -1 / 14!, ...: the next terms are below 2**-54 at pi / 4
    sine = square * -7.647163731819816e-13 + 1.6059043836821613e-10
    sine = square * sine - 2.505210838544172e-08
    sine = square * sine + 2.7557319223985893e-06
    sine = square * sine - 0.0001984126984126984
    sine = square * sine + 0.008333333333333333
    sine = square * sine - 0.16666666666666666
    sine = rest + rest * (square * sine)
    cosine = square * 4.779477332387385e-14 - 1.1470745597729725e-11
    cosine = square * cosine + 2.08767569878681e-09
    cosine = square * cosine - 2.755731922398589e-07
    cosine = square * cosine + 2.48015873015873e-05
    cosine = square * cosine - 0.001388888888888889
    cosine = square * cosine + 0.041666666666666664
    cosine = 1.0 - (0.5 * square - square * square * cosine)
    turned = (quadrant & 1) == 1
    sine_out = tl.where(turned, cosine, sine)
    cosine_out = tl.where(turned, sine, cosine)
    sine_out = tl.where((quadrant & 2) == 2, -sine_out, sine_out)
    cosine_out = tl.where(((quadrant + 1) & 2) == 2, -cosine_out, cosine_out)
    return sine_out, cosine_out


@jit
def _normal_pair(word_a, word_b):
    """Return two standard normal float64 blocks from two blocks of words by Box-Muller."""
    radius = tl.sqrt(-2.0 * tl.log(((word_a >> 8).to(tl.float64) + 1.0) * 5.960464477539063e-08))
    sine, cosine = _sin_cos((word_b >> 8).to(tl.float64) * 5.960464477539063e-08 * 6.283185307179586)
    return radius * cosine, radius * sine


@jit
def _normals(key, ids, quads, stream):
    """Return z, float64 [rows, 4 * quads]."""
    word0, word1, word2, word3 = id_words(key, ids, quads, stream)
    first, second = _normal_pair(word0, word1)
    third, fourth = _normal_pair(word2, word3)
    return _interleave(first, second, third, fourth)


@jit
def _wide(number):
    """Return a number as float64 [1, 1]; by itself the interpreter would make it a float32."""
    return tl.full([1, 1], number, tl.float64)


@jit
def _values(key, ids, quads, a, b, bound, KIND: tl.constexpr):
    """Return the first float32 values [rows, 4 * quads] of columns 4 * quads of ids.

    Args:
        key, ids: int64 [rows, 1].  quads: int32 [1, quads].
        a, b, bound: float64 [1, 1], as InitSpec.loop_args gives them.
    """
    if KIND == 0:
        zeros = (ids + quads).to(tl.float32) * 0.0
        values = _interleave(zeros, zeros, zeros, zeros) + a.to(tl.float32)
    elif KIND == 1:
        word0, word1, word2, word3 = id_words(key, ids, quads, 0)
        words = _interleave(word0, word1, word2, word3)
        centred = (words >> 8).to(tl.int32) - 8388608
        values = a.to(tl.float32) + centred.to(tl.float32) * 1.1920928955078125e-07 * b.to(tl.float32)
    else:
        deviation = b * _normals(key, ids, quads, 0)
        if KIND == 3:
            attempt = 1
            outside = tl.abs(deviation) > bound
            while (attempt < 8) & (tl.max(outside.to(tl.int32)) > 0):  # pyright: ignore[reportOperatorIssue]
                deviation = tl.where(outside, b * _normals(key, ids, quads, attempt), deviation)
                outside = tl.abs(deviation) > bound
                attempt += 1
            deviation = tl.minimum(tl.maximum(deviation, -bound), bound)
        values = (a + deviation).to(tl.float32)
    return values


@jit
def _positions(rows_ptr, pointers_ptr, num_rows, shift, row_bytes, ROWS: tl.constexpr):
    """Return this program's places [ROWS] in the call, their mask, and the addresses of their rows."""
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.load(rows_ptr + place, mask=place < num_rows, other=-1)
    mask = row >= 0
    block = tl.load(pointers_ptr + (row >> shift), mask=mask, other=0)
    within = row - ((row >> shift) << shift)
    return place, mask, tl.multiple_of(block + within * row_bytes, 32)


@jit
def _init_rows_kernel(
    pointers_ptr, rows_ptr, ids_ptr, keys_ptr, tables_ptr, num_rows, stride, shift, row_bytes, dim, id_offset,
    clock_offset, a: tl.float64, b: tl.float64, bound: tl.float64, step, clock_s,  # pyright: ignore[reportInvalidTypeForm]
    KIND: tl.constexpr, IS_BF16: tl.constexpr, ROWS: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """Write the weights of rows [num_rows]; the programs of the first columns also id, last_seen, count and clock."""
    place, mask, address = _positions(rows_ptr, pointers_ptr, num_rows, shift, row_bytes, ROWS)
    ids = tl.load(ids_ptr + place, mask=mask, other=0)
    table = tl.load(tables_ptr + place * stride, mask=mask, other=0)
    key = tl.load(keys_ptr + table, mask=mask, other=0)
    quads = tl.program_id(1) * QUADS + tl.arange(0, QUADS)
    values = _values(key[:, None], ids[:, None], quads[None, :], _wide(a), _wide(b), _wide(bound), KIND)
    columns = tl.program_id(1) * (4 * QUADS) + tl.arange(0, 4 * QUADS)
    inside = mask[:, None] & (columns[None, :] < dim)
    if IS_BF16:
        at = (address[:, None] + 2 * columns[None, :]).to(tl.pointer_type(tl.uint16))
        tl.store(at, bf16_bits(values), mask=inside)
    else:
        tl.store((address[:, None] + 4 * columns[None, :]).to(tl.pointer_type(tl.float32)), values, mask=inside)
    if tl.program_id(1) == 0:
        zero = (table * 0).to(tl.int32)
        tl.store((address + id_offset).to(tl.pointer_type(tl.int64)), ids, mask=mask)
        tl.store((address + id_offset + 8).to(tl.pointer_type(tl.int32)), zero + step, mask=mask)
        tl.store((address + id_offset + 12).to(tl.pointer_type(tl.int32)), zero, mask=mask)
        if clock_offset >= 0:
            tl.store((address + clock_offset).to(tl.pointer_type(tl.int32)), zero + clock_s, mask=mask)


@jit
def _init_state_kernel(
    pointers_ptr, rows_ptr, num_rows, shift, row_bytes, offset, width, value, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Set `width` floats at byte `offset` of rows [num_rows] to one value."""
    _, mask, address = _positions(rows_ptr, pointers_ptr, num_rows, shift, row_bytes, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = mask[:, None] & (columns[None, :] < width)
    at = (address[:, None] + offset + 4 * columns[None, :]).to(tl.pointer_type(tl.float32))
    tl.store(at, tl.full([ROWS, COLUMNS], 0.0, tl.float32) + value, mask=inside)


@jit
def _initial_values_kernel(
    ids_ptr, keys_ptr, tables_ptr, out_ptr, num_ids, stride, dim,
    a: tl.float64, b: tl.float64, bound: tl.float64,  # pyright: ignore[reportInvalidTypeForm]
    KIND: tl.constexpr, ROWS: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """Write the first values of ids [num_ids] to out [num_ids, dim]."""
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = place < num_ids
    ids = tl.load(ids_ptr + place, mask=mask, other=0)
    key = tl.load(keys_ptr + tl.load(tables_ptr + place * stride, mask=mask, other=0), mask=mask, other=0)
    quads = tl.program_id(1) * QUADS + tl.arange(0, QUADS)
    values = _values(key[:, None], ids[:, None], quads[None, :], _wide(a), _wide(b), _wide(bound), KIND)
    columns = tl.program_id(1) * (4 * QUADS) + tl.arange(0, 4 * QUADS)
    at = out_ptr + place[:, None] * dim + columns[None, :]
    tl.store(at, values, mask=mask[:, None] & (columns[None, :] < dim))


@jit
def _draws_kernel(ids_ptr, keys_ptr, tables_ptr, out_ptr, num_ids, stride, stream, BLOCK: tl.constexpr):
    """Write one uniform float32 of [0, 1) per id: the first word of its first quad."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < num_ids
    ids = tl.load(ids_ptr + place, mask=mask, other=0)
    key = tl.load(keys_ptr + tl.load(tables_ptr + place * stride, mask=mask, other=0), mask=mask, other=0)
    word, _, _, _ = id_words(key, ids, ids * 0, stream)
    tl.store(out_ptr + place, (word >> 8).to(tl.float32) * 5.960464477539063e-08, mask=mask)
