"""What happened to the ids of a table, so that nothing is dropped in silence.

    found + inserted + rejected + full == distinct ids, summed over the training steps

An id that is looked up several times within one optimizer step (micro-batches, two features, two collections on one
table) counts once, as what it was at its first lookup of that step. Hence the counters of k micro-batches equal those of
the one big batch.
"""

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TableCounters:
    """Totals of one table since it was built or cleared; they are part of a checkpoint.

    Attributes:
        found: distinct ids per training step that had a row.
        inserted: distinct ids per training step that got a row.
        rejected: distinct ids per training step that admission turned away.
        full: distinct ids per training step that were admitted but met `max_rows`.
        evicted: rows taken away by eviction policies and `evict_older_than` (not by `remove` or `clear`).
        default_reads: positions of read-only lookups whose id had no row: they read zeros or the default row.
        size: rows now.
        capacity: rows the table can have: `max_rows`, or those allocated in its store, which grows as needed.
    """

    found: int = 0
    inserted: int = 0
    rejected: int = 0
    evicted: int = 0
    full: int = 0
    default_reads: int = 0
    size: int = 0
    capacity: int = 0

    def __sub__(self, earlier: "TableCounters") -> "TableCounters":
        """Return what was added since `earlier`; size and capacity stay as they are now."""
        if not isinstance(earlier, TableCounters):
            return NotImplemented
        now, before = asdict(self), asdict(earlier)
        moved = {name: now[name] - before[name] for name in now if name not in ("size", "capacity")}
        return TableCounters(**moved, size=self.size, capacity=self.capacity)

    def to_dict(self) -> dict[str, int]:
        """Return the totals by name."""
        return asdict(self)
