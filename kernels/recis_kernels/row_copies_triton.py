"""Copies of whole rows between row blocks, and reads from either of two stores, on a GPU: the kernels under `row_copies`.

    address(row) = pointers[row >> shift] + (row & (2**shift - 1)) * row_bytes, in the store that the row is taken from

Words of 4 bytes (of 2 where a field's place or size asks for it) have no number format, so NaNs keep their bits. A program
takes a tile of rows and words. A copy is one launch; a read is one launch per field. Traffic: 16 bytes of row numbers, and
twice what is copied, per row.
"""

from __future__ import annotations  # tl is absent where triton is: annotations must not be looked up

from torch import Tensor

from recis_kernels.dispatch import jit, launch, tl
from recis_kernels.row_blocks_triton import MAX_TILE_WORDS, TILE, field_words, next_power_of_2, row_address


def _tile(num_rows: int, num_words: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the grid, and the tile of a program as options of its kernel."""
    block_w = min(next_power_of_2(num_words), MAX_TILE_WORDS)
    block_n = max(TILE // block_w, 1)
    grid = (-(-num_rows // block_n), -(-num_words // block_w))
    return grid, {"BLOCK_N": block_n, "BLOCK_W": block_w, "num_warps": 4}


def copy_whole_rows(
    pointers: Tensor,
    shift: int,
    target_pointers: Tensor,
    target_shift: int,
    row_bytes: int,
    rows: Tensor,
    places: Tensor,
) -> None:
    """Make target rows places [N] equal to source rows [N]: all present, in range, and places distinct.

    Args:
        pointers, target_pointers: int64, block addresses of the source and of the target.
        row_bytes: of both, a multiple of 32.
        rows, places: int64, contiguous, on the device of the pointers.
    """
    num_words = row_bytes // 4
    grid, options = _tile(rows.numel(), num_words)
    stores = pointers, shift, target_pointers, target_shift
    launch(_copy_rows_kernel, grid, *stores, row_bytes, rows, places, rows.numel(), num_words, **options)


def read_field_of_either(
    pointers: Tensor,
    shift: int,
    copy_pointers: Tensor,
    copy_shift: int,
    row_bytes: int,
    offset: int,
    rows: Tensor,
    places: Tensor,
    values: Tensor,
) -> None:
    """Fill values [N, ...] with the field at byte `offset` of rows [N], or of the copies' rows places [N] where >= 0."""
    words, num_words = field_words(values, offset)
    grid, options = _tile(rows.numel(), num_words)
    launch(
        _read_either_kernel,
        grid,
        *(pointers, shift, copy_pointers, copy_shift, row_bytes, offset, rows, places, words, rows.numel(), num_words),
        WIDE=words.element_size() == 4,
        ALIGNED=offset % 16 == 0,  # rows start at multiples of 32: whole vectors of 16 bytes can be loaded
        **options,
    )


@jit
def _copy_rows_kernel(
    pointers_ptr,
    shift,
    target_pointers_ptr,
    target_shift,
    row_bytes,
    rows_ptr,
    places_ptr,
    num_rows,
    num_words,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    word = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    present = n < num_rows
    row = tl.load(rows_ptr + n, mask=present, other=0)
    place = tl.load(places_ptr + n, mask=present, other=0)
    source = row_address(pointers_ptr, row, present, shift, row_bytes).to(tl.pointer_type(tl.int32))
    target = row_address(target_pointers_ptr, place, present, target_shift, row_bytes).to(tl.pointer_type(tl.int32))
    source, target = tl.multiple_of(source, 16), tl.multiple_of(target, 16)  # rows start at multiples of 32
    mask = present[:, None] & (word < num_words)[None, :]
    moved = tl.load(source[:, None] + word[None, :], mask=mask, other=0)
    tl.store(target[:, None] + word[None, :], moved, mask=mask)


@jit
def _read_either_kernel(
    pointers_ptr,
    shift,
    copy_pointers_ptr,
    copy_shift,
    row_bytes,
    offset,
    rows_ptr,
    places_ptr,
    words_ptr,
    num_rows,
    num_words,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    word = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    present = n < num_rows
    row = tl.load(rows_ptr + n, mask=present, other=0)
    place = tl.load(places_ptr + n, mask=present, other=-1)
    is_copied = place >= 0
    own = row_address(pointers_ptr, row, present & (place < 0), shift, row_bytes)
    copied = row_address(copy_pointers_ptr, place, present & is_copied, copy_shift, row_bytes)
    address = tl.where(is_copied, copied, own) + offset
    if WIDE:
        field = address.to(tl.pointer_type(tl.int32))
    else:
        field = address.to(tl.pointer_type(tl.int16))
    if ALIGNED:
        field = tl.multiple_of(field, 16)
    mask = present[:, None] & (word < num_words)[None, :]
    found = tl.load(field[:, None] + word[None, :], mask=mask, other=0)
    tl.store(words_ptr + n[:, None] * num_words + word[None, :], found, mask=mask)
