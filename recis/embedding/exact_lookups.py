"""Lookups on the CPU: arrays of just the distinct ids, because their number is known at once.

    find -> (admit -> take rows -> insert -> initialise); one loop each for all tables

What `padded_lookups` does on a GPU in arrays as long as the batch; both leave the same rows, ids and counters.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from recis.embedding.lookups import FOUND, FULL, INSERTED, REJECTED, StoreLookup, summed_counts, tally, unplaced
from recis.embedding.row_owners import grown
from recis_kernels.row_grads import PendingLookup
from recis_kernels.unique_ids import order_by_segment_and_id, unique_ids

if TYPE_CHECKING:
    from recis.embedding.rows import RowStore


class ExactLookups:
    """Look up and book the ids of one store. `missing` are positions [M] int64 of found.ids without a row."""

    def __init__(self, store: "RowStore") -> None:
        self._store = store
        self._tags = torch.zeros(0, dtype=torch.int32)
        self._tag = 0

    def look_up(
        self,
        ranges: tuple[Tensor, Tensor, Tensor],
        *,
        train: bool,
        source: object,
        counts: Tensor | None = None,
    ) -> StoreLookup:
        """Do RowStore.look_up_own, up to what the step remembers."""
        ids, offsets, tables = ranges
        store = self._store
        unique = unique_ids(ids, tables, offsets)
        rows = store.index.find(unique.ids, unique.segments)
        seen = unique.counts if counts is None else summed_counts(counts, unique.inverse, unique.ids.numel())
        found = StoreLookup(store, unique.ids, unique.segments, seen, unique.inverse, rows, rows, source=source)
        # numpy, because a comparison by torch would wake OpenMP's workers
        missing = torch.from_numpy(np.flatnonzero(rows.numpy() < 0))
        if train:
            missing = self._admit(found, missing)
        elif missing.numel():
            reads = torch.bincount(found.tables[missing].long(), found.counts[missing].double(), store.num_tables)
            store.totals.add_default_reads(reads.long())
        update_rows = rows
        if missing.numel() and store.defaults.tables.numel():
            update_rows = store.defaults.redirect(found, missing, train=train)
        if train:
            found.grads = PendingLookup(update_rows, found.tables, found.counts)
        return found

    def _admit(self, found: StoreLookup, missing: Tensor) -> Tensor:
        """Give rows to the missing ids that may have one; return those that stay without."""
        if missing.numel() == 0:
            return missing
        store = self._store
        ids, tables = found.ids[missing], found.tables[missing]
        outcome = torch.full((missing.numel(),), INSERTED, dtype=torch.uint8)
        admitted = store.admission.decide(ids, tables, store.step)
        if admitted is not None:
            outcome[~admitted] = REJECTED
        if store.totals.has_limits:
            self._mark_full(ids, tables, outcome)
        new = (outcome == INSERTED).nonzero().squeeze(1)
        if new.numel():
            if store.deterministic:
                new = new[order_by_segment_and_id(ids[new], tables[new], store.num_tables)]
            found.row_numbers[missing[new]] = store.place(ids[new], tables[new])
        found.outcome = torch.full((found.ids.numel(),), FOUND, dtype=torch.uint8)
        found.outcome[missing] = outcome
        return missing[outcome != INSERTED]

    def _mark_full(self, ids: Tensor, tables: Tensor, outcome: Tensor) -> None:
        """Turn admissions past max_rows into FULL; the smaller ids of a lookup come first."""
        store = self._store
        wanted = torch.bincount(tables[outcome == INSERTED].long(), minlength=store.num_tables).numpy()
        limits, sizes = store.totals.limits, store.sizes
        for table in np.flatnonzero((sizes + wanted > limits) & (wanted > 0)).tolist():
            asking = ((tables == table) & (outcome == INSERTED)).nonzero().squeeze(1)
            room = max(0, int(limits[table] - sizes[table]))
            outcome[asking[ids[asking].argsort()][room:]] = FULL

    def mark_first(self, found: StoreLookup, records: Sequence[StoreLookup]) -> None:
        """Mark which rows of a further lookup the step had not seen; records: those before, at least one."""
        self._tags = grown(self._tags, self._store.owners.owner.numel(), 0)
        if len(records) == 1:
            self._tag += 1
            earlier = records[0].row_numbers
            self._tags[earlier[earlier >= 0]] = self._tag
        rows = found.row_numbers
        found.first = self._tags[rows.clamp(min=0)] != self._tag
        self._tags[rows[rows >= 0]] = self._tag

    def mark_again(self, records: Sequence[StoreLookup]) -> None:
        """Do `mark_first` for all lookups of the step: some were extended."""
        self._tags = grown(self._tags, self._store.owners.owner.numel(), 0)
        self._tag += 1
        for record in records:
            rows = record.row_numbers.numpy()
            record.first = torch.from_numpy(self._tags.numpy()[np.maximum(rows, 0)] != self._tag)
            self._tags.numpy()[rows[rows >= 0]] = self._tag

    def write_metadata(self, record: StoreLookup) -> None:
        """Write last_seen and count of a lookup's rows."""
        store = self._store
        at = (record.row_numbers >= 0).nonzero().squeeze(1)
        rows = record.row_numbers[at]
        store.before_write(rows)
        count = store.blocks.read(rows, ("count",))["count"] + record.counts[at]
        store.blocks.write(rows, {"count": count, "last_seen": torch.full_like(count, store.step)})

    def book(self, records: Sequence[StoreLookup]) -> None:
        """Add the lookups of a step that ended to the totals and the sightings."""
        store = self._store
        if records:
            store.totals.add_step(self.outcomes(records))
        if store.admission.counts_sightings:
            book_sightings(store, records)

    def outcomes(self, records: Sequence[StoreLookup]) -> np.ndarray:
        """Return distinct ids of the records per table and outcome, int64 [T, 4]."""
        return tally(records, self._store.num_tables).numpy()

    def pull_totals(self) -> None:
        """Make the totals exact, which they are."""


def book_sightings(store: "RowStore", records: Sequence[StoreLookup]) -> None:
    """Count the sightings of ids that ended the step without a row, and forget those of ids that got one."""
    without = unplaced(records)
    store.admission.add(without.ids, without.tables, without.counts, step=store.step, clock_s=store.clock.seconds)
    for record in records:
        if record.outcome is not None:
            placed = (record.outcome == INSERTED).nonzero().squeeze(1)
            store.admission.forget(record.ids[placed], record.tables[placed])
