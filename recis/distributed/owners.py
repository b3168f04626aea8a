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
        order: int64 [U], the pairs in the order they are sent.
        place: int32 [U], pair -> its place in that order.
        counts: int64 [W, T], pairs for each owner of each table.
    """

    order: Tensor
    place: Tensor
    counts: Tensor


class Owners:
    """Who owns which id among W ranks; T tables share a store.

    Args:
        world_size: W.
        num_tables: T.
    """

    def __init__(self, world_size: int, num_tables: int) -> None:
        self._num_cells = world_size * num_tables
        self._shape = (world_size, num_tables)
        bounds = slice_bounds(world_size)
        self._owner_of_slice = torch.repeat_interleave(torch.arange(world_size), bounds.diff()).to(torch.int32).numpy()

    def deal(self, ids: Tensor, tables: Tensor) -> Dealt:
        """Deal distinct pairs: ids [U] int64 of tables [U] int32, on the CPU."""
        order, place = np.empty(ids.numel(), np.int64), np.empty(ids.numel(), np.int32)
        counts = np.zeros(self._num_cells, np.int64)
        _deal(ids.numpy(), tables.numpy(), self._owner_of_slice, self._shape[1], counts, order, place)
        return Dealt(torch.from_numpy(order), torch.from_numpy(place), torch.from_numpy(counts).view(self._shape))

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
def _deal(ids, tables, owner_of_slice, num_tables, counts, order, place):
    """Counting sort by cell = owner * T + table; `place` holds each pair's cell between the two passes."""
    for u in range(ids.size):
        owner = owner_of_slice[np.int64(hash64_one(ids[u]) & np.uint64(0xFFFF))]
        cell = np.int64(owner) * num_tables + tables[u]
        place[u] = cell
        counts[cell] += 1
    cursor = np.cumsum(counts) - counts
    for u in range(ids.size):
        cell = place[u]
        order[cursor[cell]] = u
        place[u] = cursor[cell]
        cursor[cell] += 1
