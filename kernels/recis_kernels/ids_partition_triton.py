"""Owner slices on a GPU: the slice of each distinct id, and every position's place after the sort by slice.

Distinct ids come from `unique_ids`; two stable sorts, by unsigned id and then by slice, order them. Both kernels stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recis_kernels.dispatch import jit, launch, tl
from recis_kernels.philox_triton import hash64

_BLOCK = 256


def order_by_slice(ids: Tensor, by_hash: bool) -> tuple[Tensor, Tensor]:
    """Return the permutation int64 [U] that sorts ids by (slice, unsigned id), and the slices in that order, int32."""
    slices, keys = torch.empty_like(ids, dtype=torch.int32), torch.empty_like(ids)
    grid = (-(-ids.numel() // _BLOCK),)
    launch(_partition_slice_kernel, grid, ids, slices, keys, ids.numel(), BY_HASH=by_hash, BLOCK=_BLOCK)
    by_id = keys.argsort(stable=True)
    slices, by_slice = slices[by_id].sort(stable=True)
    return by_id[by_slice], slices


def through(inverse: Tensor, order: Tensor) -> Tensor:
    """Return the place in `order` int64 [U] of what each position's inverse int32 [L] points to, int32 [L]."""
    place = torch.empty_like(order, dtype=torch.int32)
    out = torch.empty_like(inverse)
    size, num_ids = order.numel(), inverse.numel()
    launch(_partition_place_kernel, (-(-size // _BLOCK),), order, place, size, BLOCK=_BLOCK)
    launch(_partition_through_kernel, (-(-num_ids // _BLOCK),), inverse, place, out, num_ids, BLOCK=_BLOCK)
    return out


@jit
def _positions(size, BLOCK: tl.constexpr):
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return position, position < size


@jit
def _partition_slice_kernel(ids_ptr, slices_ptr, keys_ptr, size, BY_HASH: tl.constexpr, BLOCK: tl.constexpr):
    """Write the owner slice of each id, and the id with its sign bit flipped: its signed order is the unsigned one."""
    position, mask = _positions(size, BLOCK)
    ids = tl.load(ids_ptr + position, mask=mask, other=0)
    if BY_HASH:
        bits = hash64(ids)
    else:
        bits = ids.to(tl.uint64, bitcast=True)
    tl.store(slices_ptr + position, (bits & 0xFFFF).to(tl.int32), mask=mask)
    tl.store(keys_ptr + position, ids ^ -9223372036854775808, mask=mask)


@jit
def _partition_place_kernel(order_ptr, place_ptr, size, BLOCK: tl.constexpr):
    """Write the inverse of a permutation."""
    position, mask = _positions(size, BLOCK)
    tl.store(place_ptr + tl.load(order_ptr + position, mask=mask, other=0), position.to(tl.int32), mask=mask)


@jit
def _partition_through_kernel(inverse_ptr, place_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """Write place[inverse] of each position."""
    position, mask = _positions(size, BLOCK)
    pair = tl.load(inverse_ptr + position, mask=mask, other=0)
    tl.store(out_ptr + position, tl.load(place_ptr + pair, mask=mask, other=0), mask=mask)
