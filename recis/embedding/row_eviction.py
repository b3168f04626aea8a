"""Apply the eviction policies of a store's tables after a step.

Time and norm first, for all tables at once; then the capacity policies of each table that holds too many rows, in the order
its config gives them. Deciding costs about what the step touched (see `recis.embedding.expiry`), except for MinNorm and
ByScore, which read the table.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recis.embedding.eviction import (
    CAPACITY_POLICIES,
    ByScore,
    LfuCapacity,
    LruCapacity,
    MinNorm,
    RowMeta,
    TtlSeconds,
    TtlSteps,
    lowest,
)
from recis.embedding.expiry import CapacityQueue, TtlQueue

if TYPE_CHECKING:
    from recis.embedding.rows import RowStore

_ROWS_PER_READ = 65536
Keys = tuple[Tensor, Tensor, Tensor]  # scores, last_seen, ids


class RowEviction:
    """Eviction of the tables of one store."""

    def __init__(self, store: "RowStore") -> None:
        self._store = store
        self._ttl: dict[tuple[int, bool], TtlQueue] = {}
        self._norms: list[tuple[int, MinNorm]] = []
        self._capacity: list[tuple[int, LruCapacity | LfuCapacity | ByScore, CapacityQueue | None]] = []
        for number, config in enumerate(store.configs):
            for policy in config.eviction:
                if isinstance(policy, TtlSteps | TtlSeconds):
                    self._ttl_queue(policy).wanted[number] = True
                elif isinstance(policy, MinNorm):
                    self._norms.append((number, policy))
                elif isinstance(policy, CAPACITY_POLICIES):
                    self._capacity.append((number, policy, self._capacity_queue(number, policy)))
        self._capacity_tables = np.array([number for number, _, _ in self._capacity], dtype=np.int64)
        self._capacity_rows = np.array([policy.rows for _, policy, _ in self._capacity], dtype=np.int64)

    def _ttl_queue(self, policy: TtlSteps | TtlSeconds) -> TtlQueue:
        store, is_clock = self._store, isinstance(policy, TtlSeconds)
        key = (policy.n, is_clock)
        if key not in self._ttl:
            wanted = torch.zeros(store.num_tables + 1, dtype=torch.bool, device=store.device)
            read = store.read_clock if is_clock else self._read_last_seen
            self._ttl[key] = TtlQueue(policy.n, wanted, store.owners, read)
        return self._ttl[key]

    def _capacity_queue(self, number: int, policy: LruCapacity | LfuCapacity | ByScore) -> CapacityQueue | None:
        if isinstance(policy, ByScore):
            return None
        read = self._read_lru if isinstance(policy, LruCapacity) else self._read_lfu
        return CapacityQueue(number, self._store.owners, read)

    def _read_last_seen(self, rows: Tensor) -> Tensor:
        return self._store.blocks.read(rows, ("last_seen",))["last_seen"].long()

    def _read_lru(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        read = self._store.blocks.read(rows, ("id", "last_seen"))
        return read["last_seen"], read["last_seen"], read["id"]

    def _read_lfu(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        read = self._store.blocks.read(rows, ("id", "last_seen", "count"))
        return read["count"], read["last_seen"], read["id"]

    @property
    def watches_inserts(self) -> bool:
        """Whether `inserted` must be told of new rows now."""
        return any(queue is not None and queue.is_listing for _, _, queue in self._capacity)

    def inserted(self, rows: Tensor, tables: Tensor) -> None:
        """Take note of new rows [N] of tables [N]."""
        for number, _, queue in self._capacity:
            if queue is not None and queue.is_listing:
                queue.inserted(rows[tables == number])

    def reset(self) -> None:
        """Forget what was listed: rows or their metadata were written by hand."""
        for queue in self._ttl.values():
            queue.reset()
        for _, _, queue in self._capacity:
            if queue is not None:
                queue.reset()

    def run(self, step: int, clock_s: int, tables: Sequence[int] | None) -> None:
        """Evict what is due after `step` from these tables (None: all)."""
        store = self._store
        for (_, is_clock), queue in self._ttl.items():
            rows = queue.due(clock_s if is_clock else step)
            if tables is not None and rows.numel():
                given = torch.tensor(list(tables), dtype=torch.int32).to(rows.device)
                of_tables = torch.isin(store.owners.owner[rows], given)
                rows = rows[of_tables]
                queue.reset()  # rows of other tables were due too: list them again
            store.evict(rows)
        for number, policy in self._norms:
            if step % policy.every_steps == 0 and (tables is None or number in tables):
                rows = self._rows_of(number)
                store.evict(rows[self.norms(rows) < policy.l2])
        if self._capacity:
            self._to_capacity(tables)

    def _to_capacity(self, tables: Sequence[int] | None) -> None:
        store, exchange = self._store, self._store.exchange
        over = self._everywhere(store.sizes[self._capacity_tables]) > self._capacity_rows
        for place in np.flatnonzero(over).tolist():
            number, policy, queue = self._capacity[place]
            excess = (
                int(self._everywhere(store.sizes[[number]])[0]) - policy.rows
            )  # an earlier policy may have made room
            if excess <= 0 or not (tables is None or number in tables):
                continue
            here = min(excess, int(store.sizes[number]))
            if queue is None:
                rows, keys = self._by_score(number, policy, here)
            else:
                rows = queue.lowest(here)
                keys = None if exchange is None else queue.read(rows)
            if exchange is not None and keys is not None:
                rows = rows[exchange.among_lowest(*keys, excess)]
            store.evict(rows)

    def _everywhere(self, sizes: np.ndarray) -> np.ndarray:
        """Return rows of tables over all processes that share the store."""
        return sizes if self._store.exchange is None else self._store.exchange.total(sizes)

    def _by_score(self, number: int, policy: Any, excess: int) -> tuple[Tensor, Keys]:
        """Return the lowest rows of a table and their (scores, last_seen, ids)."""
        assert isinstance(policy, ByScore)
        ids, rows = self._store.index.export(number)
        read = self._store.blocks.read(rows, ("last_seen", "count"))
        scores = policy.fn(RowMeta(ids=ids, norm=self.norms(rows), **read))
        if scores.shape != ids.shape:
            name = self._store.configs[number].name
            raise ValueError(
                f"table {name!r}: the score of ByScore must be [{ids.numel()}], one per row; got {tuple(scores.shape)}"
            )
        picked = lowest(scores, read["last_seen"], ids, excess)
        return rows[picked], (scores[picked], read["last_seen"][picked], ids[picked])

    def _rows_of(self, number: int) -> Tensor:
        return self._store.index.export(number)[1]

    def norms(self, rows: Tensor) -> Tensor:
        """Return the L2 norm of the weights of rows [N], float64 [N], a chunk of rows at a time."""
        parts = [
            self._store.blocks.read(part, ("weight",))["weight"].double().norm(dim=1)
            for part in rows.split(_ROWS_PER_READ)
        ]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64, device=rows.device)
