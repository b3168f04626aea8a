"""Find rows that are due for eviction without looking at every row after every step.

A row's last_seen only rises. So one full pass may list the rows that can fall due within the next quarter of the time to
live; until that is over only the listed ones are looked at again. A table with time to live n holds at most what n steps
touched, hence a pass every n / 4 steps costs each step about four times the rows it touches, whatever n is.

Capacity works alike: a pass lists the lowest rows and remembers the border. As scores only rise and new rows are watched
beside the list, the lowest of both are the lowest of the table for as long as they stay at or below that border.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from recis.embedding.eviction import lowest
from recis.embedding.row_owners import DeviceRowOwners, RowOwners

_HORIZON_SHARE = 4
_LISTED_PER_VICTIM = 32

ReadRows = Callable[[Tensor], Tensor]


class TtlQueue:
    """Rows of the tables with one time to live; time is a step or a clock reading in seconds.

    Args:
        ttl: rows with now - last_seen >= ttl are due.
        wanted: bool [T], the tables it holds for.
        owners: of the rows.
        read_last_seen: rows [N] -> int64 [N], on the same time scale.
    """

    def __init__(self, ttl: int, wanted: Tensor, owners: RowOwners | DeviceRowOwners, read_last_seen: ReadRows) -> None:
        self.ttl = ttl
        self.wanted = wanted
        self._owners = owners
        self._read = read_last_seen
        self._next_pass: int | None = None
        self._listed = torch.empty(0, dtype=torch.int64, device=owners.owner.device)

    def reset(self) -> None:
        """Forget the list: rows were written by hand, or time was set back."""
        self._next_pass = None

    def due(self, now: int) -> Tensor:
        """Return the rows that are due, int64 [N] ascending."""
        horizon = max(1, self.ttl // _HORIZON_SHARE)
        if self._next_pass is None or now >= self._next_pass:
            rows = self._owners.rows_of(self.wanted)
            self._listed = rows[self._read(rows) < now + horizon - self.ttl]
            self._next_pass = now + horizon
        elif self._listed.numel():
            owner = self._owners.owner[self._listed]
            held = (owner >= 0) & self.wanted[owner.clamp(min=0).long()]
            self._listed = self._listed[held]
        if self._listed.numel() == 0:
            return self._listed
        due = self._read(self._listed) <= now - self.ttl
        rows, self._listed = self._listed[due], self._listed[~due]
        return rows


class CapacityQueue:
    """Lowest rows of one table by (score, last_seen, id), where a row's score never falls while it lives.

    Args:
        table: its number.  owners: of the rows.
        read: rows [N] -> (scores [N], last_seen [N], ids [N]).
    """

    def __init__(
        self, table: int, owners: RowOwners | DeviceRowOwners, read: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    ) -> None:
        self.table = table
        self._owners = owners
        self.read = read
        self._watched = torch.empty(0, dtype=torch.int64, device=owners.owner.device)
        self._border: tuple[int, int, int] | None = None

    def reset(self) -> None:
        """Forget the list: rows were written or removed by hand."""
        self._border = None

    @property
    def is_listing(self) -> bool:
        """Whether there is a list that new rows must be told to."""
        return self._border is not None

    def inserted(self, rows: Tensor) -> None:
        """Watch rows that the table got since the last pass."""
        self._watched = torch.cat([self._watched, rows])

    def lowest(self, num_rows: int) -> Tensor:
        """Return the num_rows lowest rows of the table (all, if it has fewer); the caller removes them."""
        if self._border is not None:
            self._watched = self._watched[self._owners.owner[self._watched] == self.table].unique()
            picked, key = self._pick(self._watched, num_rows)
            if key is not None and key <= self._border:
                return picked
        owner = self._owners.owner[: self._owners.num_fresh]
        rows = (owner == self.table).nonzero().squeeze(1)
        self._watched, self._border = self._pick(rows, min(rows.numel(), _LISTED_PER_VICTIM * num_rows))
        return self._pick(self._watched, num_rows)[0]

    def _pick(self, rows: Tensor, num_rows: int) -> tuple[Tensor, tuple[int, int, int] | None]:
        """Return the lowest rows and the key of the highest of them; key None when there are too few."""
        scores, last_seen, ids = self.read(rows)
        picked = lowest(scores, last_seen, ids, num_rows)
        if picked.numel() < num_rows or num_rows == 0:
            return rows[picked], None
        top = lowest(-scores[picked], -last_seen[picked], ~ids[picked], 1)
        top = picked[top]
        return rows[picked], (int(scores[top]), int(last_seen[top]), int(ids[top]))
