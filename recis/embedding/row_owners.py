"""Which rows of a store are in use, by which table, and which are free.

    owner[row] = number of the table that uses the row, -1 = free

Free rows are reused last in, first out; when none is left the next never-used row follows. The k-th requested row goes to
the k-th requester, so who gets which row is decided by the order of the request alone.

`RowOwners` counts on the host. `DeviceRowOwners` deals the same rows with counters on a device: kernels take rows there
(`find_or_insert_rows`), and the host knows an upper bound of how many they took.
"""

import torch
from torch import Tensor

from recis.embedding.late_reading import LateReading
from recis_kernels.columns import to_device
from recis_kernels.row_allocator import NUM_FREE, NUM_FRESH, OVERFLOW, RowAllocator

FREE = -1
_MIN_CAPACITY = 1024


class RowOwners:
    """Row numbers 0, 1, 2, ... dealt to tables and taken back.

    Attributes:
        owner: int32 [capacity]; grows by doubling.
        num_fresh: rows 0 .. num_fresh - 1 have been used at least once.
    """

    def __init__(self) -> None:
        self.owner = torch.full((_MIN_CAPACITY,), FREE, dtype=torch.int32)
        self.num_fresh = 0
        self._free = torch.empty(_MIN_CAPACITY, dtype=torch.int64)  # a stack; its first _num_free entries count
        self._num_free = 0

    @property
    def num_used(self) -> int:
        """Rows in use."""
        return self.num_fresh - self._num_free

    def take(self, tables: Tensor) -> Tensor:
        """Return distinct free rows [N], the k-th for table number tables[k] (int32 [N])."""
        num_rows = tables.numel()
        reused = min(num_rows, self._num_free)
        self._num_free -= reused
        parts = [self._free[self._num_free : self._num_free + reused].flip(0)]
        if num_rows > reused:
            stop = self.num_fresh + num_rows - reused
            self._grow(stop)
            parts.append(torch.arange(self.num_fresh, stop))
            self.num_fresh = stop
        rows = torch.cat(parts)
        self.owner.numpy()[rows.numpy()] = tables.numpy()  # torch's indexing would wake OpenMP's workers
        return rows

    def release(self, rows: Tensor) -> None:
        """Make rows [N], distinct and in use, free again."""
        stop = self._num_free + rows.numel()
        if stop > self._free.numel():
            self._free = grown(self._free, stop, 0)
        self._free[self._num_free : stop] = rows
        self._num_free = stop
        self.owner.numpy()[rows.numpy()] = FREE

    def rows_of(self, wanted: Tensor) -> Tensor:
        """Return the rows used by tables with wanted[table] true (bool [T]), ascending: one pass over all rows."""
        owner = self.owner[: self.num_fresh]
        if owner.numel() == 0:
            return torch.empty(0, dtype=torch.int64)
        return ((owner >= 0) & wanted[owner.clamp(min=0).long()]).nonzero().squeeze(1)

    def _grow(self, num_rows: int) -> None:
        if num_rows > self.owner.numel():
            self.owner = grown(self.owner, num_rows, FREE)


class DeviceRowOwners:
    """RowOwners on a device. `take` and whatever reads a count wait for it; `own`, `note` and `release` do not.

    Attributes:
        allocator: what kernels take rows from.
        owner: int32 [more than capacity] on the device; the last entry is no row's: it takes what must not be kept.
    """

    def __init__(self, device: torch.device) -> None:
        self.allocator = RowAllocator(0, device=device)
        self.owner = torch.full((_MIN_CAPACITY,), FREE, dtype=torch.int32, device=device)
        self._num_fresh = 0  # at the last reading
        self._most_since = 0  # rows that calls since then can have taken
        self._reading = LateReading()

    @property
    def num_fresh(self) -> int:
        """Rows used at least once; a host sync on a GPU."""
        return self._counts()[0]

    @property
    def num_used(self) -> int:
        """Rows in use; a host sync on a GPU."""
        num_fresh, num_free = self._counts()
        return num_fresh - num_free

    @property
    def most_fresh(self) -> int:
        """An upper bound of num_fresh, by the last count that has arrived: no wait."""
        taken = self._reading.take()
        if taken is not None:
            state, included = taken[0].tolist(), taken[1]
            self._num_fresh = state[NUM_FRESH]
            self._most_since -= included
            if state[OVERFLOW]:
                self.allocator.check()  # no id is lost in silence, although room was made for all
        return self._num_fresh + self._most_since

    def note(self, num_rows: int) -> None:
        """Say that a kernel has been queued that takes at most so many rows; asks for the count behind it."""
        self._most_since += num_rows
        self._reading.start(self.allocator.state, self._most_since)

    def grow(self, num_rows: int) -> None:
        """Let there be at least so many rows."""
        if num_rows > self.allocator.capacity:
            self.allocator.grow(num_rows)
        have = self.owner.numel() - 1
        if num_rows > have:
            longer = self.owner.new_full((max(num_rows, 2 * have) + 1,), FREE)
            longer[:have] = self.owner[:have]
            self.owner = longer

    def take(self, tables: Tensor) -> Tensor:
        """Return distinct free rows [N], the k-th for table number tables[k] (int32 [N])."""
        num_rows = tables.numel()
        num_fresh, num_free = self._counts()
        reused = min(num_rows, num_free)
        stop = num_fresh + num_rows - reused
        self.grow(stop)
        freed = self.allocator.free[num_free - reused : num_free].flip(0)
        rows = torch.cat([freed, torch.arange(num_fresh, stop, device=freed.device)])
        moved = torch.zeros(self.allocator.state.numel(), dtype=torch.int64)
        moved[NUM_FRESH], moved[NUM_FREE] = stop - num_fresh, -reused
        self.allocator.state += to_device(moved, freed.device)
        self._num_fresh = stop
        self.own(rows, tables)
        return rows

    def own(self, rows: Tensor, tables: Tensor) -> None:
        """Write who owns rows [N], now in use; -1 is ignored. No host sync."""
        self.owner.index_put_((torch.where(rows >= 0, rows, self.owner.numel() - 1),), tables)

    def release(self, rows: Tensor) -> None:
        """Make rows [N], distinct and in use, free again. No host sync."""
        self.allocator.release(rows)
        self.owner.index_fill_(0, rows, FREE)

    def rows_of(self, wanted: Tensor) -> Tensor:
        """Return the rows used by tables with wanted[table] true (bool [T]), ascending; a host sync on a GPU."""
        owner = self.owner[: self.num_fresh]
        held = wanted.to(owner.device)[owner.clamp(min=0).long()]
        return ((owner >= 0) & held).nonzero().squeeze(1)

    def _counts(self) -> tuple[int, int]:
        num_fresh, num_free = self.allocator.state.tolist()[: NUM_FREE + 1]
        self._num_fresh, self._most_since = num_fresh, 0
        self._reading.drop()
        return num_fresh, num_free


def grown(values: Tensor, num_entries: int, fill: int) -> Tensor:
    """Return values [N, ...] lengthened to at least num_entries by doubling, new entries `fill`."""
    if num_entries <= values.shape[0]:
        return values
    longer = values.new_full((max(num_entries, 2 * values.shape[0]), *values.shape[1:]), fill)
    longer[: values.shape[0]] = values
    return longer
