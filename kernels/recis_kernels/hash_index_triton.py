"""Find, insert, erase and rebuild on a GPU: a block of ids probes its home groups together, 16 slots of each per load.

    find      hit = any key equal; stop = any EMPTY; else the next group, at most as many as the segment has
    insert    publish   CAS the id into the first EMPTY slot of its sequence; a CAS that failed looks again
              ticket    atomic_min of -2 - position on the slot's row: the last of equal ids has the smallest
              store     who finds the own ticket there writes the row
    erase     find, ticket position - N - 1 on the slot's row (the first of equal ids has the smallest), clear

Slots are filled in the order that `hash_probe` states, so its loops and these kernels work on the same segments in turn. A
CAS publishes the key alone and rows follow in a later launch: lanes of a program run in lock-step, so none may wait for
another. Between the launches of an insert a row holds a ticket, below -1. The side cell of the id EMPTY is a row like
any other: a place is the address of a slot, 0 = none, or -1 - segment for that segment's side cell.
A find reads the home group, 256 bytes; an insert reads it, swaps 8 bytes and touches the row's sector three times.
"""

# pyright: reportOperatorIssue=false
# (triton types its reductions as a tensor or a tuple)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recis_kernels import hash_probe as probe
from recis_kernels.calibration import current
from recis_kernels.dispatch import jit, launch, tl, triton
from recis_kernels.philox_triton import hash64

_KEYS = 32  # ids per program of what changes slots; the cost of a program is that of its slowest id


def _constant(value: int) -> Any:
    """Return a number that kernels may read as a global of this file."""
    return value if triton is None else tl.constexpr(value)


EMPTY = _constant(probe.EMPTY)
LIVE, DEAD, SIDE, LOST = map(_constant, (probe.LIVE, probe.DEAD, probe.SIDE, probe.LOST))


def find(table: Tensor, slots: Sequence[Tensor], ids: Tensor, segments: Tensor) -> Tensor:
    """Return the row of each id, -1 where absent; one launch."""
    del slots  # reached through the table
    rows = torch.empty_like(ids)
    keys = current().find_keys_per_program
    _launch(_hash_find_kernel, table, ids, segments, rows, rows, PLACES=False, keys=keys)
    return rows


def insert(table: Tensor, slots: Sequence[Tensor], ids: Tensor, segments: Tensor, rows: Tensor) -> None:
    """Give each id its row; the room has been made. Three launches."""
    del slots
    places = publish(table, ids, segments)
    _launch(_hash_insert_ticket_kernel, table, places, segments)
    _launch(_hash_store_kernel, table, places, rows)


def erase(table: Tensor, slots: Sequence[Tensor], ids: Tensor, segments: Tensor) -> Tensor:
    """Remove ids and return the rows they had. Three launches."""
    del slots
    rows, places = torch.empty_like(ids), torch.empty_like(ids)
    _launch(_hash_find_kernel, table, ids, segments, rows, places, PLACES=True)
    _launch(_hash_erase_ticket_kernel, table, places, rows)
    _launch(_hash_clear_kernel, table, places, segments, rows)
    return rows


def publish(table: Tensor, ids: Tensor, segments: Tensor, num_ids: Tensor | None = None) -> Tensor:
    """Put absent ids into slots, dead until a row is stored, and return the place of each, int64 [N].

    Args:
        num_ids: int64 [1], ids before that count; None = all.
    """
    places = torch.empty_like(ids)
    idle = _idle_slots(table.device)
    count = ids if num_ids is None else num_ids  # not read without a count
    _launch(_hash_publish_kernel, table, ids, segments, places, idle, count, CAPPED=num_ids is not None)
    return places


def rebuild(table: Tensor, segments: Tensor, old: Tensor, largest: int) -> None:
    """Move the live ids of old slots into the new, empty slots of segments [K]; one launch.

    Args:
        segments: int64 [K].  old: int64 [K, 2], address and number of the old slots.  largest: of those numbers.
    """
    idle = _idle_slots(table.device)
    grid = (-(-largest // _KEYS), segments.numel())
    launch(_hash_rebuild_kernel, grid, table, segments, old, idle, KEYS=_KEYS)


def _launch(
    kernel: Any, table: Tensor, per_id: Tensor, other: Tensor, *args: Tensor, keys: int = _KEYS, **options: bool
) -> None:
    """Launch a kernel over the positions of per_id [N]; `other` is [N] too, or [1] for all."""
    stride = 0 if other.numel() == 1 else 1
    grid = (-(-per_id.numel() // keys),)
    launch(kernel, grid, table, per_id, other, *args, per_id.numel(), stride, KEYS=keys, **options)


def _idle_slots(device: torch.device) -> Tensor:
    """Return 16 empty slots for the CAS of lanes that have nothing to do: they swap EMPTY for EMPTY."""
    return torch.full((2 * probe.GROUP_SLOTS,), probe.EMPTY, dtype=torch.int64, device=device)


# ---- inside kernels


@jit
def _ids_of(ids_ptr, segments_ptr, num_ids, stride, KEYS: tl.constexpr):
    """Return this program's positions [KEYS], their mask, ids and segments."""
    position = tl.program_id(0).to(tl.int64) * KEYS + tl.arange(0, KEYS)
    mask = position < num_ids
    ids = tl.load(ids_ptr + position, mask=mask, other=0)
    segment = tl.load(segments_ptr + position * stride, mask=mask, other=0).to(tl.int64)
    return position, mask, ids, segment


@jit
def _home_of(table_ptr, ids, segment, mask):
    """Return the address of the slots, the home slot and the number of groups; a segment without slots has one."""
    columns = table_ptr + segment * 8
    address = tl.load(columns, mask=mask, other=0)
    shift = tl.load(columns + 1, mask=mask, other=60)
    groups = tl.load(columns + 2, mask=mask, other=0) >> 4
    home = (hash64(ids) >> shift.to(tl.uint64)).to(tl.int64)
    return address, home, tl.maximum(groups, 1)


@jit
def _group_keys(base, mask, VOLATILE: tl.constexpr):
    """Return the keys [KEYS, 16] of the groups at addresses base; volatile where other programs fill them meanwhile."""
    slot = tl.arange(0, 16)
    at = (base[:, None] + 16 * slot[None, :]).to(tl.pointer_type(tl.int64))
    return tl.load(at, mask=mask[:, None], other=0, volatile=VOLATILE)  # pyright: ignore[reportArgumentType]


@jit
def _next(group, groups):
    following = group + 1
    return tl.where(following >= groups, following - groups, following)


@jit
def _find_slots(table_ptr, ids, segment, mask):
    """Return the address of the slot that holds each id, 0 where absent."""
    address, home, groups = _home_of(table_ptr, ids, segment, mask)
    number = tl.arange(0, 16)[None, :] + 1
    group = home >> 4
    found = ids * 0
    searching = mask
    steps = tl.max(tl.where(mask, groups, 0))
    while (steps > 0) & (tl.max(searching.to(tl.int32)) > 0):
        base = address + group * 256
        keys = _group_keys(base, searching, VOLATILE=False)
        hit = tl.max(tl.where(keys == ids[:, None], number, 0), axis=1)
        is_end = tl.max((keys == EMPTY).to(tl.int32), axis=1) > 0
        found = tl.where(searching & (hit > 0), base + (hit - 1) * 16, found)
        searching = searching & (hit == 0) & (is_end == 0)
        group = _next(group, groups)
        steps -= 1
    return found


@jit
def _claim_slots(table_ptr, idle_ptr, ids, segment, mask, KEYS: tl.constexpr):
    """Return the slot that holds each id after putting absent ones in, and who did; counts ids that found no slot.

    A CAS fails only when another took the slot, at most 16 times in a group, so the loop ends.
    """
    address, home, groups = _home_of(table_ptr, ids, segment, mask)
    number = tl.arange(0, 16)[None, :]
    empty = tl.full([KEYS], EMPTY, tl.int64)
    idle = idle_ptr.to(tl.int64) + (tl.arange(0, KEYS) & 15) * 16
    group = home >> 4
    found = ids * 0
    has_won = mask & (found != 0)
    searching = mask
    steps = tl.max(tl.where(mask, groups, 0)) * 17
    while (steps > 0) & (tl.max(searching.to(tl.int32)) > 0):
        base = address + group * 256
        keys = _group_keys(base, searching, VOLATILE=True)
        hit = tl.max(tl.where(keys == ids[:, None], number + 1, 0), axis=1)
        away = (number - home[:, None]) & 15  # from the home slot on and round to just before it
        first = tl.min(tl.where(keys == EMPTY, away, 16), axis=1)
        is_trying = searching & (hit == 0) & (first < 16)
        target = base + ((home + first) & 15) * 16
        at = tl.where(is_trying, target, idle).to(tl.pointer_type(tl.int64))
        before = tl.atomic_cas(at, empty, tl.where(is_trying, ids, empty), sem="relaxed")
        won = is_trying & (before == empty)
        is_there = won | (is_trying & (before == ids))
        found = tl.where(searching & (hit > 0), base + (hit - 1) * 16, tl.where(is_there, target, found))
        has_won = has_won | won
        is_full = searching & (hit == 0) & (first == 16)
        searching = searching & (hit == 0) & (is_there == 0)
        group = tl.where(is_full, _next(group, groups), group)
        steps -= 1
    tl.atomic_add(table_ptr + segment * 8 + LOST, segment * 0 + 1, mask=searching, sem="relaxed")
    return found, has_won


@jit
def _row_at(table_ptr, place):
    """Return pointers to the rows of places; a place 0 must be masked."""
    side = table_ptr.to(tl.int64) + (-1 - place) * 64 + 8 * SIDE
    return tl.where(place < 0, side, place + 8).to(tl.pointer_type(tl.int64))


@jit
def _add(table_ptr, segment, stride, mask, amount, COLUMN: tl.constexpr):
    """Add `amount` to a count of each lane's segment; lanes of one segment add up first."""
    if stride == 0:
        total = tl.sum(mask.to(tl.int64)) * amount
        tl.atomic_add(table_ptr + tl.max(segment) * 8 + COLUMN, total, mask=total != 0, sem="relaxed")
    else:
        tl.atomic_add(table_ptr + segment * 8 + COLUMN, segment * 0 + amount, mask=mask, sem="relaxed")


# ---- kernels


@jit
def _hash_find_kernel(
    table_ptr, ids_ptr, segments_ptr, rows_ptr, places_ptr, num_ids, stride, PLACES: tl.constexpr, KEYS: tl.constexpr
):
    """Write the row of each id, -1 where absent, and if asked its place."""
    position, mask, ids, segment = _ids_of(ids_ptr, segments_ptr, num_ids, stride, KEYS)
    is_side = mask & (ids == EMPTY)
    slot = _find_slots(table_ptr, ids, segment, mask & (is_side == 0))
    place = tl.where(is_side, -1 - segment, slot)
    rows = tl.load(_row_at(table_ptr, place), mask=place != 0, other=-1)
    tl.store(rows_ptr + position, rows, mask=mask)
    if PLACES:
        tl.store(places_ptr + position, place, mask=mask)


@jit
def _hash_publish_kernel(
    table_ptr, ids_ptr, segments_ptr, places_ptr, idle_ptr, count_ptr, num_ids, stride,
    CAPPED: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Put absent ids into dead slots and write the place of each id; 0 at and after count[0]."""
    position, mask, ids, segment = _ids_of(ids_ptr, segments_ptr, num_ids, stride, KEYS)
    taken = mask
    if CAPPED:
        taken = mask & (position < tl.load(count_ptr))
    is_side = taken & (ids == EMPTY)
    slot, won = _claim_slots(table_ptr, idle_ptr, ids, segment, taken & (is_side == 0), KEYS)
    tl.store(places_ptr + position, tl.where(is_side, -1 - segment, slot), mask=mask)
    _add(table_ptr, segment, stride, won, 1, DEAD)


@jit
def _hash_insert_ticket_kernel(table_ptr, places_ptr, segments_ptr, num_ids, stride, KEYS: tl.constexpr):
    """Take a ticket for each id; the first to touch a dead slot counts it as live."""
    position, mask, place, segment = _ids_of(places_ptr, segments_ptr, num_ids, stride, KEYS)
    mask = mask & (place != 0)
    before = tl.atomic_min(_row_at(table_ptr, place), -2 - position, mask=mask, sem="relaxed")
    revived = mask & (before == -1) & (place > 0)
    _add(table_ptr, segment, stride, revived, 1, LIVE)
    _add(table_ptr, segment, stride, revived, -1, DEAD)


@jit
def _hash_store_kernel(table_ptr, places_ptr, rows_ptr, num_ids, stride, KEYS: tl.constexpr):
    """Write the row of every id that holds the ticket of its slot."""
    position, mask, place, _ = _ids_of(places_ptr, rows_ptr, num_ids, stride, KEYS)
    at = _row_at(table_ptr, place)
    mine = mask & (place != 0)
    mine = mine & (tl.load(at, mask=mine, other=0) == -2 - position)
    tl.store(at, tl.load(rows_ptr + position, mask=mine, other=-1), mask=mine)


@jit
def _hash_erase_ticket_kernel(table_ptr, places_ptr, rows_ptr, num_ids, stride, KEYS: tl.constexpr):
    """Take a ticket for each id that has a row."""
    position, mask, place, row = _ids_of(places_ptr, rows_ptr, num_ids, stride, KEYS)
    has_row = mask & (place != 0) & (row >= 0)
    tl.atomic_min(_row_at(table_ptr, place), position - num_ids - 1, mask=has_row, sem="relaxed")


@jit
def _hash_clear_kernel(table_ptr, places_ptr, segments_ptr, rows_ptr, num_ids, stride, KEYS: tl.constexpr):
    """Make the slots of ticket holders dead; all other ids have had no row."""
    position, mask, place, segment = _ids_of(places_ptr, segments_ptr, num_ids, stride, KEYS)
    row = tl.load(rows_ptr + position, mask=mask, other=-1)
    at = _row_at(table_ptr, place)
    mine = mask & (place != 0) & (row >= 0)
    mine = mine & (tl.load(at, mask=mine, other=0) == position - num_ids - 1)
    tl.store(at, row * 0 - 1, mask=mine)
    tl.store(rows_ptr + position, tl.where(mine, row, -1), mask=mask)
    _add(table_ptr, segment, stride, mine & (place > 0), -1, LIVE)
    _add(table_ptr, segment, stride, mine & (place > 0), 1, DEAD)


@jit
def _hash_rebuild_kernel(table_ptr, segments_ptr, old_ptr, idle_ptr, KEYS: tl.constexpr):
    """Move the live ids of one piece of old slots to their segment's new slots; ids are distinct, so rows go along."""
    number = tl.program_id(1)
    source, num_slots = tl.load(old_ptr + 2 * number), tl.load(old_ptr + 2 * number + 1)
    position = tl.program_id(0).to(tl.int64) * KEYS + tl.arange(0, KEYS)
    mask = position < num_slots
    at = source + position * 16
    ids = tl.load(at.to(tl.pointer_type(tl.int64)), mask=mask, other=0)
    row = tl.load((at + 8).to(tl.pointer_type(tl.int64)), mask=mask, other=-1)
    mask = mask & (row >= 0) & (ids != EMPTY)
    segment = tl.load(segments_ptr + number) + position * 0
    slot, _ = _claim_slots(table_ptr, idle_ptr, ids, segment, mask, KEYS)
    tl.store((slot + 8).to(tl.pointer_type(tl.int64)), row, mask=mask & (slot != 0))
