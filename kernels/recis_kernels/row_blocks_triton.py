"""Copy one field of many rows between row blocks and a dense tensor on a GPU, and find rows for the other row kernels.

    address(row) = pointers[row >> shift] + (row & (2**shift - 1)) * row_bytes + offset

A field is copied as words of 4 bytes where its place and size allow, else of 2: words have no number format, so NaNs keep
their bits. A program takes a tile of rows and words; rows are random, so a row costs whole sectors of 32 bytes.
Traffic: 8 bytes of row number and twice the field per row.
"""

from __future__ import annotations  # tl is absent where triton is: annotations must not be looked up

import torch
from torch import Tensor

from recis_kernels.dispatch import jit, launch, tl

TILE = 512  # elements of a program's tile: four warps of four elements a lane
MAX_TILE_WORDS = 256


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is at least `number`, at least 1."""
    return 1 << max(number - 1, 0).bit_length()


def field_words(values: Tensor, offset: int) -> tuple[Tensor, int]:
    """Return contiguous values [N, ...], N >= 1, of a field at byte `offset` as flat words, and how many a row has."""
    num_bytes = values[0].numel() * values.element_size()
    wide = num_bytes % 4 == 0 and offset % 4 == 0
    return values.view(-1).view(torch.int32 if wide else torch.int16), num_bytes // (4 if wide else 2)


def copy_field(
    pointers: Tensor, shift: int, row_bytes: int, offset: int, rows: Tensor, values: Tensor, *, to_rows: bool
) -> None:
    """Copy values [N, ...] to or from the field at byte `offset` of rows [N] (all present, in range).

    Args:
        pointers: int64 [num_blocks], block addresses, on the device of rows and values; both contiguous.
        offset: byte of the field within a row.
        to_rows: whether values are written to the rows (distinct then), or read from them.
    """
    num_rows = rows.numel()
    words, num_words = field_words(values, offset)
    block_w = min(next_power_of_2(num_words), MAX_TILE_WORDS)
    block_n = max(TILE // block_w, 1)
    grid = (-(-num_rows // block_n), -(-num_words // block_w))
    launch(
        _copy_field_kernel,
        grid,
        *(pointers, rows, words, num_rows, num_words, shift, row_bytes, offset),
        TO_ROWS=to_rows,
        WIDE=words.element_size() == 4,
        ALIGNED=offset % 16 == 0,  # rows start at multiples of 32: whole vectors of 16 bytes can be loaded
        BLOCK_N=block_n,
        BLOCK_W=block_w,
        num_warps=4,
    )


@jit
def row_address(pointers_ptr, row, present, shift, row_bytes):
    """Return the int64 address of each int64 row; 0 + a distance that must not be used where it is not present."""
    block = row >> shift
    base = tl.load(pointers_ptr + block, mask=present, other=0)
    return base + (row - (block << shift)) * row_bytes


@jit
def _copy_field_kernel(
    pointers_ptr,
    rows_ptr,
    words_ptr,
    num_rows,
    num_words,
    shift,
    row_bytes,
    offset,
    TO_ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    word = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    present = n < num_rows
    row = tl.load(rows_ptr + n, mask=present, other=0)
    address = row_address(pointers_ptr, row, present, shift, row_bytes) + offset
    if WIDE:
        field = address.to(tl.pointer_type(tl.int32))
    else:
        field = address.to(tl.pointer_type(tl.int16))
    if ALIGNED:
        field = tl.multiple_of(field, 16)
    mask = present[:, None] & (word < num_words)[None, :]
    in_rows = field[:, None] + word[None, :]
    in_values = words_ptr + n[:, None] * num_words + word[None, :]
    if TO_ROWS:
        tl.store(in_rows, tl.load(in_values, mask=mask, other=0), mask=mask)
    else:
        tl.store(in_values, tl.load(in_rows, mask=mask, other=0), mask=mask)
