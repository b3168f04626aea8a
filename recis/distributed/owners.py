"""Deal the distinct (table, id) pairs of a lookup to the ranks that own them.

    slice = hash64(id) & 0xffff;   rank r owns the slices slice_bounds(W)[r] .. slice_bounds(W)[r + 1] - 1

A table may belong to one rank as a whole instead. `recis_kernels.ids_partition` does this for ids of one table; a lookup has
pairs of many, so its distinct pairs are dealt here: by owner, then by table, inside of that in the order they come, one
counting sort over U pairs. Pairs of which this rank has a copy go to nobody and come last.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recis_kernels.dispatch import njit
from recis_kernels.ids_partition import slice_bounds
from recis_kernels.philox import hash64_one

_NO_SLOTS = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class Dealt:
    """Pairs by owner.

    Attributes:
        ids: int64 [U], tables: int32 [U], sightings: int32 [U]; of the pairs in the order they are sent, copied ones last.
        place: int32 [U], pair -> its place in that order.
        counts: int64 [W, T], pairs for each owner of each table.
        slots: int64 [C], where the copies of the last C pairs are.
    """

    ids: Tensor
    tables: Tensor
    sightings: Tensor
    place: Tensor
    counts: Tensor
    slots: Tensor

    def places_of(self, inverse: Tensor) -> Tensor:
        """Return int32 [L]: position -> place in the order sent, where inverse [L] int32 says position -> pair."""
        out = np.empty(inverse.numel(), np.int32)
        _places(self.place.numpy(), inverse.numpy(), out)
        return torch.from_numpy(out)


class Owners:
    """Who owns which id among W ranks; T tables share a store.

    Args:
        world_size: W.
        num_tables: T.
        own: the rank whose pairs come last, behind those of all others by rank: they stay where they are. None: by rank.
        whole: tables that one rank owns, by number.
    """

    def __init__(
        self, world_size: int, num_tables: int, *, own: int | None = None, whole: Mapping[int, int] | None = None
    ) -> None:
        self._shape = (world_size, num_tables)
        self.whole = dict(whole or {})
        self._owner_of_table = np.array([self.whole.get(table, -1) for table in range(num_tables)], np.int32)
        ranks = [rank for rank in range(world_size) if rank != own] + ([] if own is None else [own])
        self._turns = np.argsort(ranks).astype(np.int32)  # rank -> when its pairs come
        bounds = slice_bounds(world_size)
        self._owner_of_slice = torch.repeat_interleave(torch.arange(world_size), bounds.diff()).to(torch.int32).numpy()

    def deal(self, ids: Tensor, tables: Tensor, sightings: Tensor, *, slots: Tensor | None = None) -> Dealt:
        """Deal distinct pairs: ids [U] int64 of tables [U] int32, seen sightings [U] int32 times, on the CPU.

        slots: int64 [U], where this rank has a copy of a pair; -1 = it has none. None: of none of them.
        """
        moved, place = [torch.empty_like(values) for values in (ids, tables, sightings)], torch.empty_like(tables)
        counts = np.zeros(self._shape, np.int64)
        copied = _NO_SLOTS if slots is None else slots.numpy()
        num_copied = 0 if slots is None else int((copied >= 0).sum())
        pairs = ids.numpy(), tables.numpy(), sightings.numpy()
        to = moved[0].numpy(), moved[1].numpy(), moved[2].numpy()
        owners = self._owner_of_slice, self._owner_of_table, self._turns
        moved_slots = np.empty(num_copied, np.int64)
        _deal(pairs, copied, owners, counts, to, moved_slots, place.numpy())
        return Dealt(moved[0], moved[1], moved[2], place, torch.from_numpy(counts), torch.from_numpy(moved_slots))

    def of(self, ids: Tensor) -> Tensor:
        """Return the owner of each id [N] of a table that is dealt by slice, int32 [N]."""
        out = np.empty(ids.numel(), np.int32)
        _owners(ids.numpy(), self._owner_of_slice, out)
        return torch.from_numpy(out)


@njit
def _owners(ids, owner_of_slice, out):
    for u in range(ids.size):
        out[u] = owner_of_slice[np.int64(hash64_one(ids[u]) & np.uint64(0xFFFF))]


@njit
def _deal(pairs, copied, owners, counts, moved, moved_slots, place):
    """Counting sort by (turn of the owner, table); `place` holds each pair's cell = owner * T + table between the passes.

    Copied pairs have cell -1 and are put behind all others, in the order they come.
    """
    ids, tables, sightings = pairs
    owner_of_slice, owner_of_table, turns = owners
    num_ranks, num_tables = counts.shape
    for u in range(ids.size):
        if copied.size and copied[u] >= 0:
            place[u] = -1
            continue
        owner = np.int64(owner_of_table[tables[u]])
        if owner < 0:
            owner = np.int64(owner_of_slice[np.int64(hash64_one(ids[u]) & np.uint64(0xFFFF))])
        place[u] = owner * num_tables + tables[u]
        counts[owner, tables[u]] += 1
    cursor = np.empty(counts.size, np.int64)
    rank_at = np.empty(num_ranks, np.int64)
    for rank in range(num_ranks):
        rank_at[turns[rank]] = rank
    first = 0
    for turn in range(num_ranks):
        for table in range(num_tables):
            cursor[rank_at[turn] * num_tables + table] = first
            first += counts[rank_at[turn], table]
    last = first
    moved_ids, moved_tables, moved_sightings = moved
    for u in range(ids.size):
        cell = place[u]
        if cell < 0:
            at = last
            moved_slots[at - first] = copied[u]
            last += 1
        else:
            at = cursor[cell]
            cursor[cell] += 1
        moved_ids[at], moved_tables[at], moved_sightings[at] = ids[u], tables[u], sightings[u]
        place[u] = at


@njit
def _places(place, inverse, out):
    for p in range(inverse.size):
        out[p] = place[inverse[p]] if inverse[p] >= 0 else -1
