"""Running totals of the tables of one store, and the warning that a table is full."""

import warnings
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from recis.embedding.config import TableConfig
from recis.embedding.counters import TableCounters
from recis.embedding.lookups import FOUND, FULL, INSERTED, NUM_OUTCOMES, REJECTED

_EVICTED, _DEFAULT_READS = NUM_OUTCOMES, NUM_OUTCOMES + 1
_SAVED = ("found", "inserted", "rejected", "full", "evicted", "default_reads")


class StoreTotals:
    """Counters of T tables: what the host counted, and on a GPU what was last read of the device's counts.

    Attributes:
        limits: int64 [T] numpy, max_rows; the largest int64 where there is none.
    """

    def __init__(self, configs: Sequence[TableConfig]) -> None:
        self._configs = configs
        self._totals = np.zeros(
            (len(configs), len(_SAVED)), dtype=np.int64
        )  # columns: outcomes, evicted, default_reads
        self._late = np.zeros_like(self._totals)  # counted on a device, see set_late
        self._warned = np.zeros(len(configs), dtype=np.int64)
        none = np.iinfo(np.int64).max
        self.limits = np.array([none if config.max_rows is None else config.max_rows for config in configs])
        self.has_limits = any(config.max_rows is not None for config in configs)

    def deal_limits(self, parts: Sequence[int], whole: int) -> None:
        """Keep parts[t] of `whole` equal shares of the limit of each table t here; at least one row."""
        for table in np.flatnonzero(self.limits < np.iinfo(np.int64).max).tolist():
            self.limits[table] = max(1, int(self.limits[table]) * parts[table] // whole)

    def add_step(self, outcomes: np.ndarray) -> None:
        """Add distinct ids of a step that ended, per table and outcome, int64 [T, 4]."""
        self._totals[:, :NUM_OUTCOMES] += outcomes

    def set_late(self, counts: np.ndarray) -> None:
        """Set what a device has counted so far, int64 [T, 5] (outcomes, default reads); older readings change nothing."""
        columns = [*range(NUM_OUTCOMES), _DEFAULT_READS]
        self._late[:, columns] = np.maximum(self._late[:, columns], counts)

    def add_default_reads(self, reads: Tensor) -> None:
        """Add positions [T] that read-only lookups found no row for."""
        self._totals[:, _DEFAULT_READS] += reads.numpy()

    def add_evicted(self, rows: Tensor) -> None:
        """Add rows [T] that eviction took."""
        self._totals[:, _EVICTED] += rows.numpy()

    def warn_if_full(self) -> None:
        """Warn of ids that met max_rows: at the first, then whenever their number has more than doubled."""
        full = self._totals[:, FULL] + self._late[:, FULL]
        for table in np.flatnonzero(full > 2 * self._warned).tolist():
            config = self._configs[table]
            warnings.warn(
                f"table {config.name!r} is full: {full[table]} ids met max_rows={config.max_rows} so far and read as if "
                "they were not admitted; raise max_rows, admit later (AfterSightings) or evict (LruCapacity, TtlSteps)",
                RuntimeWarning,
                stacklevel=2,
            )
            self._warned[table] = full[table]

    def counters(self, table: int, under_way: np.ndarray | None, *, size: int, allocated: int) -> TableCounters:
        """Return the totals of one table with outcomes [4] of the step under way; allocated: rows of the store."""
        now = self._totals[table] + self._late[table]
        if under_way is not None:
            now[:NUM_OUTCOMES] += under_way
        return TableCounters(
            found=int(now[FOUND]),
            inserted=int(now[INSERTED]),
            rejected=int(now[REJECTED]),
            full=int(now[FULL]),
            evicted=int(now[_EVICTED]),
            default_reads=int(now[_DEFAULT_READS]),
            size=size,
            capacity=min(int(self.limits[table]), allocated),
        )

    def clear(self, table: int) -> None:
        """Set one table's totals to zero."""
        self._totals[table] = -self._late[table]
        self._warned[table] = 0

    def state(self, table: int) -> dict[str, int]:
        """Return the totals of one table by name."""
        counters = self.counters(table, None, size=0, allocated=0)
        return {name: getattr(counters, name) for name in _SAVED}

    def load(self, table: int, state: dict[str, int]) -> None:
        """Set what `state` returned."""
        columns = {
            "found": FOUND,
            "inserted": INSERTED,
            "rejected": REJECTED,
            "full": FULL,
            "evicted": _EVICTED,
            "default_reads": _DEFAULT_READS,
        }
        for name, column in columns.items():
            self._totals[table, column] = state[name] - self._late[table, column]
        self._warned[table] = state["full"]
