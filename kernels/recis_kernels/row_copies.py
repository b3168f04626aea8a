"""Copy whole rows between stores of one layout, and read rows some of which lie in another store as copies.

    copy_rows     target row places[n] = source row rows[n]
    read_either   fields of row rows[n], or of the copy places[n] where that is >= 0

What a save needs of rows that training is about to change. Each row is visited once, whatever its number of fields: one wait
on memory instead of one per field. Cost: row_bytes read and written per row.
"""

import numpy as np
import torch
from torch import Tensor

from recis_kernels.address import uint16_at
from recis_kernels.dispatch import njit
from recis_kernels.prefetch import prefetch
from recis_kernels.row_blocks import RowBlocks
from recis_kernels.threads import run_parts, split

_AHEAD = 8
_MIN_PER_THREAD = 8192


def copy_rows(source: RowBlocks, rows: Tensor, target: RowBlocks, places: Tensor) -> None:
    """Make target rows places [N] (distinct) equal to source rows [N], all bytes; both int64.

    Raises:
        ValueError: the layouts differ, shapes or dtypes do not fit, or a row lies outside its store.
    """
    if source.layout != target.layout:
        raise ValueError(f"rows can be copied within one layout; got {source.layout} and {target.layout}")
    if rows.shape != places.shape:
        raise ValueError(f"rows and places must have one shape; got {tuple(rows.shape)} and {tuple(places.shape)}")
    _check(rows, source, "rows", 0)
    _check(places, target, "places", 0)
    if source.device.type != "cpu" or target.device.type != "cpu":
        target.write(places, source.read(rows))
        return
    where, there = rows.contiguous().numpy(), places.contiguous().numpy()
    row_bytes = source.layout.row_bytes
    args = (source.pointers.numpy(), source.shift, target.pointers.numpy(), target.shift, row_bytes, where, there)
    run_parts(lambda start, stop: _copy_loop(*args, start, stop), split(rows.numel(), min_items=_MIN_PER_THREAD))


def read_either(blocks: RowBlocks, rows: Tensor, copies: RowBlocks, places: Tensor) -> dict[str, Tensor]:
    """Return all fields of rows [N] as RowBlocks.read does, taken from copies' rows places [N] where those are >= 0.

    Raises:
        ValueError: the layouts differ, shapes or dtypes do not fit, or a row lies outside its store.
    """
    if blocks.layout != copies.layout:
        raise ValueError(f"copies must have the rows' layout; got {copies.layout} and {blocks.layout}")
    if rows.shape != places.shape:
        raise ValueError(f"rows and places must have one shape; got {tuple(rows.shape)} and {tuple(places.shape)}")
    _check(rows, blocks, "rows", 0)
    _check(places, copies, "places", -1)
    if blocks.device.type != "cpu":
        return _read_apart(blocks, rows, copies, places)
    out, lines = {}, []
    for name, (offset, width, dtype) in blocks.layout.fields().items():
        out[name] = torch.empty((rows.numel(), width) if width else (rows.numel(),), dtype=dtype)
        lines.append((offset, max(width, 1) * out[name].element_size(), out[name].data_ptr()))
    fields, where, there = np.array(lines, np.int64), rows.contiguous().numpy(), places.contiguous().numpy()
    stores = (blocks.pointers.numpy(), blocks.shift, copies.pointers.numpy(), copies.shift, blocks.layout.row_bytes)
    cuts = split(rows.numel(), min_items=_MIN_PER_THREAD)
    run_parts(lambda start, stop: _read_loop(*stores, where, there, fields, start, stop), cuts)
    return out


def _read_apart(blocks: RowBlocks, rows: Tensor, copies: RowBlocks, places: Tensor) -> dict[str, Tensor]:
    fields, copied = blocks.read(rows), (places >= 0).nonzero().squeeze(1)
    for name, values in copies.read(places[copied]).items():
        fields[name][copied] = values
    return fields


def _check(rows: Tensor, store: RowBlocks, name: str, least: int) -> None:
    if rows.ndim != 1 or rows.dtype != torch.int64:
        raise ValueError(f"{name} must be [N] int64; got {tuple(rows.shape)} {rows.dtype}")
    if rows.numel() and not (int(rows.min()) >= least and int(rows.max()) < store.capacity):
        raise ValueError(f"{name} must lie in [{least}, {store.capacity}); got {int(rows.min())}..{int(rows.max())}")


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
