"""Copy whole rows between stores of one layout, and read rows some of which lie in another store as copies.

    copy_rows     target row places[n] = source row rows[n]
    read_either   fields of row rows[n], or of the copy places[n] where that is >= 0

What a save needs of rows that training is about to change. The loop visits each row once, whatever its number of fields: one
wait on memory instead of one per field. Cost: row_bytes read and written per row. All versions copy bits.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from recis_kernels.address import uint16_at
from recis_kernels.dispatch import Impl, choose, njit
from recis_kernels.prefetch import prefetch
from recis_kernels.row_blocks import RowBlocks, RowLayout, layout_of_key
from recis_kernels.row_copies_triton import copy_whole_rows, read_field_of_either
from recis_kernels.threads import run_parts, split

_AHEAD = 8
_MIN_PER_THREAD = 8192


def copy_rows(source: RowBlocks, rows: Tensor, target: RowBlocks, places: Tensor, *, impl: Impl = "auto") -> None:
    """Make target rows places [N] (distinct) equal to source rows [N], all bytes; both int64.

    Looks at rows and places, two host syncs on a GPU. Stores of two devices are copied by RowBlocks.read and write.

    Raises:
        ValueError: the layouts differ, shapes or dtypes do not fit, or a row lies outside its store.
    """
    if source.layout != target.layout:
        raise ValueError(f"rows can be copied within one layout; got {source.layout} and {target.layout}")
    _check_forms(rows, places)
    if torch.compiler.is_compiling():
        store = source.blocks, source.layout_key, source.shift
        _copy_op(*store, rows, target.blocks, target.shift, places, impl)
    else:
        _copy(source, rows, target, places, impl)


def read_either(
    blocks: RowBlocks, rows: Tensor, copies: RowBlocks, places: Tensor, *, impl: Impl = "auto"
) -> dict[str, Tensor]:
    """Return all fields of rows [N] as RowBlocks.read does, taken from copies' rows places [N] where those are >= 0.

    Looks at rows and places as copy_rows does.

    Raises:
        ValueError: the layouts differ, shapes or dtypes do not fit, or a row lies outside its store.
    """
    if blocks.layout != copies.layout:
        raise ValueError(f"copies must have the rows' layout; got {copies.layout} and {blocks.layout}")
    _check_forms(rows, places)
    if torch.compiler.is_compiling():
        store = blocks.blocks, blocks.layout_key, blocks.shift
        fields = _read_op(*store, rows, copies.blocks, copies.shift, places, impl)
        return dict(zip(blocks.layout.fields(), fields, strict=True))
    return _read(blocks, rows, copies, places, impl)


def _check_forms(rows: Tensor, places: Tensor) -> None:
    if rows.shape != places.shape:
        raise ValueError(f"rows and places must have one shape; got {tuple(rows.shape)} and {tuple(places.shape)}")
    for name, numbers in (("rows", rows), ("places", places)):
        if numbers.ndim != 1 or numbers.dtype != torch.int64:
            raise ValueError(f"{name} must be [N] int64; got {tuple(numbers.shape)} {numbers.dtype}")


def _check_range(numbers: Tensor, store: RowBlocks, name: str, least: int) -> None:
    if numbers.numel() and not (int(numbers.min()) >= least and int(numbers.max()) < store.capacity):
        found = f"{int(numbers.min())}..{int(numbers.max())}"
        raise ValueError(f"{name} must lie in [{least}, {store.capacity}); got {found}")


def _copy(source: RowBlocks, rows: Tensor, target: RowBlocks, places: Tensor, impl: Impl) -> None:
    _check_range(rows, source, "rows", 0)
    _check_range(places, target, "places", 0)
    version = choose(impl, rows, triton=_copy_triton, numba=_copy_numba, reference=_copy_reference)
    if source.device != target.device:
        version = _copy_apart
    if rows.numel():
        version(source, rows.contiguous(), target, places.contiguous())


def _read(blocks: RowBlocks, rows: Tensor, copies: RowBlocks, places: Tensor, impl: Impl) -> dict[str, Tensor]:
    _check_range(rows, blocks, "rows", 0)
    _check_range(places, copies, "places", -1)
    out = _empty_fields(blocks.layout, rows)
    version = choose(impl, rows, triton=_read_triton, numba=_read_numba, reference=_read_reference)
    if blocks.device != copies.device:
        version = _read_apart
    if rows.numel():
        version(blocks, rows.contiguous(), copies, places.contiguous(), out)
    return out


def _empty_fields(layout: RowLayout, rows: Tensor) -> dict[str, Tensor]:
    num_rows = rows.shape[0]
    return {
        name: rows.new_empty((num_rows, width) if width else (num_rows,), dtype=dtype)
        for name, (_, width, dtype) in layout.fields().items()
    }


# ---- nodes of torch.compile and export: they take the block tensors themselves


@torch.library.custom_op("recis::copy_rows", mutates_args=("target_blocks",))
def _copy_op(
    blocks: Sequence[Tensor],
    layout: str,
    shift: int,
    rows: Tensor,
    target_blocks: Sequence[Tensor],
    target_shift: int,
    places: Tensor,
    impl: str,
) -> None:
    source = RowBlocks.over(layout_of_key(layout), shift, blocks, rows.device)
    target = RowBlocks.over(source.layout, target_shift, target_blocks, rows.device)
    _copy(source, rows, target, places, impl)  # type: ignore[arg-type]


@torch.library.custom_op("recis::read_either", mutates_args=())
def _read_op(
    blocks: Sequence[Tensor],
    layout: str,
    shift: int,
    rows: Tensor,
    copy_blocks: Sequence[Tensor],
    copy_shift: int,
    places: Tensor,
    impl: str,
) -> list[Tensor]:
    store = RowBlocks.over(layout_of_key(layout), shift, blocks, rows.device)
    copies = RowBlocks.over(store.layout, copy_shift, copy_blocks, rows.device)
    return list(_read(store, rows, copies, places, impl).values())  # type: ignore[arg-type]


@_read_op.register_fake
def _(blocks, layout, shift, rows, copy_blocks, copy_shift, places, impl):
    return list(_empty_fields(layout_of_key(layout), rows).values())


# ---- reference: one row after another;  apart: for stores of two devices


def _copy_reference(source: RowBlocks, rows: Tensor, target: RowBlocks, places: Tensor) -> None:
    for row, place in zip(rows.tolist(), places.tolist(), strict=True):
        block = source.blocks[row >> source.shift]
        target.blocks[place >> target.shift][place % (1 << target.shift)] = block[row % (1 << source.shift)]


def _read_reference(blocks: RowBlocks, rows: Tensor, copies: RowBlocks, places: Tensor, out: dict[str, Tensor]) -> None:
    for n, place in enumerate(places.tolist()):
        store, row = (blocks, rows[n : n + 1]) if place < 0 else (copies, places[n : n + 1])
        for name, values in store.read(row, impl="reference").items():
            out[name][n] = values[0]


def _copy_apart(source: RowBlocks, rows: Tensor, target: RowBlocks, places: Tensor) -> None:
    target.write(places.to(target.device), source.read(rows.to(source.device)))


def _read_apart(blocks: RowBlocks, rows: Tensor, copies: RowBlocks, places: Tensor, out: dict[str, Tensor]) -> None:
    copied = (places >= 0).nonzero().squeeze(1)
    for name, values in blocks.read(rows.to(blocks.device)).items():
        out[name].copy_(values)
    for name, values in copies.read(places[copied].to(copies.device)).items():
        out[name][copied] = values.to(out[name].device)


# ---- Triton (the kernels are in row_copies_triton.py)


def _copy_triton(source: RowBlocks, rows: Tensor, target: RowBlocks, places: Tensor) -> None:
    stores = source.device_pointers, source.shift, target.device_pointers, target.shift
    copy_whole_rows(*stores, source.layout.row_bytes, rows, places)


def _read_triton(blocks: RowBlocks, rows: Tensor, copies: RowBlocks, places: Tensor, out: dict[str, Tensor]) -> None:
    stores = blocks.device_pointers, blocks.shift, copies.device_pointers, copies.shift, blocks.layout.row_bytes
    for name, (offset, _, _) in blocks.layout.fields().items():
        read_field_of_either(*stores, offset, rows, places, out[name])


# ---- numba


def _copy_numba(source: RowBlocks, rows: Tensor, target: RowBlocks, places: Tensor) -> None:
    stores = source.pointers.numpy(), source.shift, target.pointers.numpy(), target.shift, source.layout.row_bytes
    args = (*stores, rows.numpy(), places.numpy())
    run_parts(lambda start, stop: _copy_loop(*args, start, stop), split(rows.numel(), min_items=_MIN_PER_THREAD))


def _read_numba(blocks: RowBlocks, rows: Tensor, copies: RowBlocks, places: Tensor, out: dict[str, Tensor]) -> None:
    lines = [
        (offset, max(width, 1) * dtype.itemsize, out[name].data_ptr())
        for name, (offset, width, dtype) in blocks.layout.fields().items()
    ]
    fields, where, there = np.array(lines, np.int64), rows.numpy(), places.numpy()
    stores = (blocks.pointers.numpy(), blocks.shift, copies.pointers.numpy(), copies.shift, blocks.layout.row_bytes)
    cuts = split(rows.numel(), min_items=_MIN_PER_THREAD)
    run_parts(lambda start, stop: _read_loop(*stores, where, there, fields, start, stop), cuts)


@njit
def _address(pointers, shift, row_bytes, row):
    return pointers[row >> shift] + (row & ((1 << shift) - 1)) * row_bytes


@njit
def _copy_loop(pointers, shift, target_pointers, target_shift, row_bytes, rows, places, start, stop):
    for n in range(start, stop):
        soon = _address(pointers, shift, row_bytes, rows[min(n + _AHEAD, stop - 1)])
        for line in range(0, row_bytes, 64):
            prefetch(soon + line)
        source = uint16_at(_address(pointers, shift, row_bytes, rows[n]), row_bytes // 2)
        target = uint16_at(_address(target_pointers, target_shift, row_bytes, places[n]), row_bytes // 2)
        for k in range(row_bytes // 2):
            target[k] = source[k]


@njit
def _read_loop(pointers, shift, copy_pointers, copy_shift, row_bytes, rows, places, fields, start, stop):
    """Copy each field of each row; fields: (offset in a row, bytes, address of the output) a line."""
    for n in range(start, stop):
        soon = min(n + _AHEAD, stop - 1)
        if places[soon] >= 0:
            ahead = _address(copy_pointers, copy_shift, row_bytes, places[soon])
        else:
            ahead = _address(pointers, shift, row_bytes, rows[soon])
        for line in range(0, row_bytes, 64):
            prefetch(ahead + line)
        if places[n] >= 0:
            base = _address(copy_pointers, copy_shift, row_bytes, places[n])
        else:
            base = _address(pointers, shift, row_bytes, rows[n])
        for f in range(fields.shape[0]):
            num_words = fields[f, 1] // 2
            source = uint16_at(base + fields[f, 0], num_words)
            target = uint16_at(fields[f, 2] + n * fields[f, 1], num_words)
            for k in range(num_words):
                target[k] = source[k]
