"""Which rows of a store are in use, by which table, and which are free.

    owner[row] = number of the table that uses the row, -1 = free

Free rows are reused last in, first out; when none is left the next never-used row follows. The k-th requested row goes to
the k-th requester, so who gets which row is decided by the order of the request alone.
"""

import torch
from torch import Tensor

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


def grown(values: Tensor, num_entries: int, fill: int) -> Tensor:
    """Return values [N, ...] lengthened to at least num_entries by doubling, new entries `fill`."""
    if num_entries <= values.shape[0]:
        return values
    longer = values.new_full((max(num_entries, 2 * values.shape[0]), *values.shape[1:]), fill)
    longer[: values.shape[0]] = values
    return longer
