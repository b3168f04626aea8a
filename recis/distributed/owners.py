"""Deal the distinct (table, id) pairs of a lookup to the ranks that own them.

    slice = hash64(id) & 0xffff;   rank r owns the slices slice_bounds(W)[r] .. slice_bounds(W)[r + 1] - 1

`recis_kernels.ids_partition` does this for ids of one table; a lookup has pairs of many, so its distinct pairs are dealt
here: by owner, then by table, inside of that in the order they come, one counting sort over U pairs.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recis_kernels.dispatch import njit
from recis_kernels.ids_partition import slice_bounds
from recis_kernels.philox import hash64_one


@dataclass(frozen=True, slots=True)
class Dealt:
    """Pairs by owner.

    Attributes:
        ids: int64 [U], tables: int32 [U], sightings: int32 [U]; of the pairs in the order they are sent.
        place: int32 [U], pair -> its place in that order.
        counts: int64 [W, T], pairs for each owner of each table.
    """

    ids: Tensor
    tables: Tensor
    sightings: Tensor
    place: Tensor
    counts: Tensor

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
    """

    def __init__(self, world_size: int, num_tables: int, *, own: int | None = None) -> None:
        self._shape = (world_size, num_tables)
        ranks = [rank for rank in range(world_size) if rank != own] + ([] if own is None else [own])
        self._turns = np.argsort(ranks).astype(np.int32)  # rank -> when its pairs come
        bounds = slice_bounds(world_size)
        self._owner_of_slice = torch.repeat_interleave(torch.arange(world_size), bounds.diff()).to(torch.int32).numpy()

    def deal(self, ids: Tensor, tables: Tensor, sightings: Tensor) -> Dealt:
        """Deal distinct pairs: ids [U] int64 of tables [U] int32, seen sightings [U] int32 times, on the CPU."""
        moved, place = [torch.empty_like(values) for values in (ids, tables, sightings)], torch.empty_like(tables)
        counts = np.zeros(self._shape, np.int64)
        pairs = ids.numpy(), tables.numpy(), sightings.numpy()
        to = moved[0].numpy(), moved[1].numpy(), moved[2].numpy()
        _deal(pairs, self._owner_of_slice, self._turns, counts, to, place.numpy())
        return Dealt(moved[0], moved[1], moved[2], place, torch.from_numpy(counts))

    def of(self, ids: Tensor) -> Tensor:
        """Return the owner of each id [N], int32 [N]."""
        out = np.empty(ids.numel(), np.int32)
        _owners(ids.numpy(), self._owner_of_slice, out)
        return torch.from_numpy(out)


@njit
def _owners(ids, owner_of_slice, out):
    for u in range(ids.size):
        out[u] = owner_of_slice[np.int64(hash64_one(ids[u]) & np.uint64(0xFFFF))]


@njit
def _deal(pairs, owner_of_slice, turns, counts, moved, place):
    """Counting sort by (turn of the owner, table); `place` holds each pair's cell = owner * T + table between the passes."""
    ids, tables, sightings = pairs
    num_ranks, num_tables = counts.shape
    for u in range(ids.size):
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
    moved_ids, moved_tables, moved_sightings = moved
    for u in range(ids.size):
        cell = place[u]
        at = cursor[cell]
        cursor[cell] += 1
        moved_ids[at], moved_tables[at], moved_sightings[at] = ids[u], tables[u], sightings[u]
        place[u] = at


@njit
def _places(place, inverse, out):
    for p in range(inverse.size):
        out[p] = place[inverse[p]] if inverse[p] >= 0 else -1
