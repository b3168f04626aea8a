"""Rows for new ids on a GPU: an insert whose rows are numbered on the device between its launches.

    publish   ids into slots, dead while they have no row              (hash_index_triton)
    claim     atomic_min of position - N - 1 on the row of every id without one: the first position is new
    mark      who holds the ticket of its slot is new
    rank      new ids by (segment, signed id) with two stable sorts, or by position with a prefix sum
    assign    rank -> freed row, fresh row or -1, written where the ticket was
    gather    every id reads the row of its slot; one program moves the counters on

Six launches and the ranking, on arrays of U; nothing is read by the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recis_kernels.dispatch import jit, launch, tl
from recis_kernels.hash_index_triton import DEAD, LIVE, _add, _row_at, publish

_BLOCK = 128


def find_or_insert_rows(
    table: Tensor, slots: Sequence[Tensor], state: Tensor, free: Tensor, ids: Tensor, segments: Tensor,
    num_ids: Tensor | None, deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Do row_allocator.find_or_insert_rows; the room has been made."""
    del slots  # reached through the table
    if ids.numel() == 0:
        return ids.clone(), torch.zeros(0, dtype=torch.bool, device=ids.device)
    size, grid = ids.numel(), (-(-ids.numel() // _BLOCK),)
    places = publish(table, ids, segments, num_ids)
    is_new = torch.empty(size, dtype=torch.uint8, device=ids.device)
    launch(_rows_claim_kernel, grid, table, places, size, BLOCK=_BLOCK)
    launch(_rows_mark_kernel, grid, table, places, is_new, size, BLOCK=_BLOCK)
    ends = is_new.cumsum(0, dtype=torch.int64)
    ranks = ends - 1
    if deterministic:
        ranks = _ranks_by_pair(ids, segments, is_new)
    rows = torch.empty_like(ids)
    stride = 0 if segments.numel() == 1 else 1
    args = (table, places, is_new, segments, ranks, state, free, size, stride)
    launch(_rows_assign_kernel, grid, *args, BLOCK=_BLOCK)
    launch(_rows_gather_kernel, grid, table, places, is_new, rows, ends, state, size, BLOCK=_BLOCK)
    return rows, is_new.view(torch.bool)


def _ranks_by_pair(ids: Tensor, segments: Tensor, is_new: Tensor) -> Tensor:
    """Return the rank of each new id among them by (segment, signed id), int64 [U]; others come after."""
    by_id = ids.argsort(stable=True)
    last = torch.iinfo(torch.int32).max
    segment = torch.where(is_new == 1, segments, last)
    order = by_id[segment[by_id].argsort(stable=True)]
    return torch.empty_like(order).index_put_((order,), torch.arange(ids.numel(), device=ids.device))


@jit
def _places(places_ptr, size, BLOCK: tl.constexpr):
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = position < size
    place = tl.load(places_ptr + position, mask=mask, other=0)
    return position, mask, place, mask & (place != 0)


@jit
def _rows_claim_kernel(table_ptr, places_ptr, size, BLOCK: tl.constexpr):
    """Take a ticket for each id without a row; a row below 0 is a dead slot or a ticket."""
    position, _, place, has_place = _places(places_ptr, size, BLOCK)
    at = _row_at(table_ptr, place)
    is_absent = has_place & (tl.load(at, mask=has_place, other=0) < 0)
    tl.atomic_min(at, position - size - 1, mask=is_absent, sem="relaxed")


@jit
def _rows_mark_kernel(table_ptr, places_ptr, is_new_ptr, size, BLOCK: tl.constexpr):
    """Write 1 for every id that holds the ticket of its slot, else 0."""
    position, mask, place, has_place = _places(places_ptr, size, BLOCK)
    row = tl.load(_row_at(table_ptr, place), mask=has_place, other=0)
    tl.store(is_new_ptr + position, (has_place & (row == position - size - 1)).to(tl.uint8), mask=mask)


@jit
def _rows_assign_kernel(
    table_ptr, places_ptr, is_new_ptr, segments_ptr, ranks_ptr, state_ptr, free_ptr, size, stride, BLOCK: tl.constexpr
):
    """Write the row of each new id into its slot: the k-th freed row from the end, then fresh ones, then -1."""
    position, mask, place, _ = _places(places_ptr, size, BLOCK)
    is_new = tl.load(is_new_ptr + position, mask=mask, other=0) == 1
    segment = tl.load(segments_ptr + position * stride, mask=mask, other=0).to(tl.int64)
    rank = tl.load(ranks_ptr + position, mask=is_new, other=0)
    num_fresh, num_free, capacity = tl.load(state_ptr), tl.load(state_ptr + 1), tl.load(state_ptr + 2)
    is_reused = is_new & (rank < num_free)
    freed = tl.load(free_ptr + num_free - 1 - rank, mask=is_reused, other=-1)
    fresh = num_fresh + rank - num_free
    row = tl.where(is_reused, freed, tl.where(fresh < capacity, fresh, -1))
    tl.store(_row_at(table_ptr, place), row, mask=is_new)
    revived = is_new & (row >= 0) & (place > 0)
    _add(table_ptr, segment, stride, revived, 1, LIVE)
    _add(table_ptr, segment, stride, revived, -1, DEAD)


@jit
def _rows_gather_kernel(table_ptr, places_ptr, is_new_ptr, rows_ptr, ends_ptr, state_ptr, size, BLOCK: tl.constexpr):
    """Write the row of every id; new is who got one. The first program books what was taken."""
    position, mask, place, has_place = _places(places_ptr, size, BLOCK)
    row = tl.load(_row_at(table_ptr, place), mask=has_place, other=-1)
    is_new = tl.load(is_new_ptr + position, mask=mask, other=0)
    tl.store(rows_ptr + position, row, mask=mask)
    tl.store(is_new_ptr + position, tl.where(row >= 0, is_new, is_new * 0), mask=mask)
    if tl.program_id(0) == 0:
        wanted = tl.load(ends_ptr + size - 1)
        num_fresh, num_free, capacity = tl.load(state_ptr), tl.load(state_ptr + 1), tl.load(state_ptr + 2)
        reused = tl.minimum(wanted, num_free)
        fresh = tl.minimum(wanted - reused, capacity - num_fresh)
        tl.store(state_ptr, num_fresh + fresh)
        tl.store(state_ptr + 1, num_free - reused)
        tl.store(state_ptr + 3, tl.load(state_ptr + 3) + wanted - reused - fresh)
