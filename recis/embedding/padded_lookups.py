"""Lookups on a GPU: arrays as long as the batch, because the number of distinct ids stays on the device.

    find -> (admit -> insert and take rows -> initialise); or, where all ids are admitted, insert at once
    entries from the number of distinct ids on are padding: count 0, row -1, no position

Room is made before the number of new ids is known, for all of them. Counters of a step lie on the device and are looked at
late. So nothing waits, except where a rule of a table needs the host: see `AdmissionControl.counts_sightings` and
`RowEviction.watches_inserts`. On the CPU tests run this code beside `exact_lookups`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from recis.embedding.exact_lookups import book_sightings
from recis.embedding.late_reading import LateReading
from recis.embedding.lookups import FOUND, FULL, INSERTED, NUM_OUTCOMES, REJECTED, StoreLookup, summed_counts
from recis.embedding.row_owners import DeviceRowOwners, grown
from recis_kernels.hash_probe import LIVE, SIDE
from recis_kernels.row_allocator import find_or_insert_rows
from recis_kernels.row_grads import PendingLookup
from recis_kernels.sparse_update import fused_update_flags
from recis_kernels.unique_ids import unique_ids_padded

if TYPE_CHECKING:
    from recis.embedding.rows import RowStore

_NUM_COUNTS = NUM_OUTCOMES + 1  # the outcomes, then default reads
_DEFAULT_READS = NUM_OUTCOMES
_SPREAD = 64  # counters of each number: a batch of one table would else add a million times to one address


class PaddedLookups:
    """Look up and book the ids of one store. `missing` is bool [L]: ids, padding left out, without a row.

    Args:
        store: its owners are DeviceRowOwners.
    """

    def __init__(self, store: "RowStore") -> None:
        self._store = store
        self._tags = torch.zeros(0, dtype=torch.int32, device=store.device)
        self._tag = 0
        self._limits = torch.from_numpy(store.totals.limits).to(store.device)
        # counts per (table, number) so far; the last line takes what is not to be counted
        shape = (store.num_tables * _NUM_COUNTS + 1, _SPREAD)
        self._counts = torch.zeros(shape, dtype=torch.int64, device=store.device)
        self._reading = LateReading()

    @property
    def _owners(self) -> DeviceRowOwners:
        owners = self._store.owners
        assert isinstance(owners, DeviceRowOwners)
        return owners

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
        unique = unique_ids_padded(ids, tables, self._whole(ids, offsets))
        pairs, is_real = (unique.ids, unique.segments), unique.counts > 0
        outcome = None
        if not train:
            rows = torch.where(is_real, store.index.find(*pairs), -1)
        elif store.admission.admits_all and not store.totals.has_limits:
            rows, is_new = self._insert(*pairs, unique.num_unique)
            outcome = torch.where(is_new, INSERTED, torch.where(is_real & (rows < 0), FULL, FOUND)).to(torch.uint8)
        else:
            known = torch.where(is_real, store.index.find(*pairs), -1)
            outcome = self._admitted(*pairs, is_real & (known < 0))
            rows = self._insert_some(*pairs, outcome == INSERTED, known)
        seen = unique.counts if counts is None else summed_counts(counts, unique.inverse, unique.ids.numel())
        found = StoreLookup(store, *pairs, seen, unique.inverse, rows, rows, outcome, source=source)
        missing, update_rows = is_real & (rows < 0), rows
        if not train:
            self._add(self._counts, found.tables, _DEFAULT_READS, missing, amounts=found.counts)
        if store.defaults.tables.numel():
            update_rows = store.defaults.redirect_padded(found, missing, train=train)
        if train:
            found.grads = PendingLookup(update_rows, found.tables, found.counts)
        return found

    def _whole(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Return offsets that end at the last id; those of the batch are looked at later, because to look is to wait."""
        num_ids, store = ids.numel(), self._store
        if offsets.numel() > 1:
            store.faults.ask(
                offsets[-1:] - num_ids,
                lambda more: ValueError(
                    f"the offsets of a batch looked up in {store.describe()} end at {num_ids + more}, and there are "
                    f"{num_ids} ids: on a GPU they must end where the ids do; cut the values to match"
                ),
            )
        return torch.cat([offsets[:-1], offsets.new_full((1,), num_ids)])

    # ---- new ids

    def _admitted(self, ids: Tensor, tables: Tensor, missing: Tensor) -> Tensor:
        """Return what becomes of ids [L]: the missing ones are INSERTED, REJECTED or FULL, all others FOUND."""
        outcome = torch.where(missing, INSERTED, FOUND).to(torch.uint8)
        admitted = self._decide(ids, tables, missing)
        if admitted is not None:
            outcome = torch.where(missing & ~admitted, REJECTED, outcome)
        if self._store.totals.has_limits:
            outcome = torch.where(self._is_past_limit(ids, tables, outcome == INSERTED), FULL, outcome)
        return outcome

    def _decide(self, ids: Tensor, tables: Tensor, missing: Tensor) -> Tensor | None:
        store = self._store
        if not store.admission.counts_sightings:
            return store.admission.decide(ids, tables, store.step)
        at = missing.nonzero().squeeze(1)  # sightings are counted on the host: this waits
        decided = store.admission.decide(ids[at].cpu(), tables[at].cpu(), store.step)
        admitted = torch.ones(ids.numel(), dtype=torch.bool)
        if decided is not None:
            admitted[at.cpu()] = decided
        return admitted.to(store.device)

    def _is_past_limit(self, ids: Tensor, tables: Tensor, wanted: Tensor) -> Tensor:
        """Return which admissions find max_rows reached, bool [L]; the smaller ids of a lookup come first."""
        num_tables, table = self._store.num_tables, self._store.index.kernel_table
        segments = torch.where(wanted, tables, num_tables)
        order = ids.argsort(stable=True)
        order = order[segments[order].argsort(stable=True)]
        places = torch.arange(order.numel(), device=order.device)
        ordered = segments[order].long()
        starts = torch.searchsorted(ordered, torch.arange(num_tables + 1, device=order.device))
        rank = torch.empty_like(order).index_put_((order,), places - starts[ordered])
        room = self._limits - table[:, LIVE] - (table[:, SIDE] >= 0).long()
        return wanted & (rank >= room[tables.long()])

    def _insert_some(self, ids: Tensor, tables: Tensor, wanted: Tensor, known: Tensor) -> Tensor:
        """Insert the wanted ids, bool [L], and return the rows [L]: those, and the known ones of all others."""
        # wanted ids first, in their order, because an insert takes the ids before a count
        order = (~wanted).to(torch.uint8).argsort(stable=True)
        rows, _ = self._insert(ids[order], tables[order], wanted.sum().view(1))
        return known.index_put((order,), torch.where(rows >= 0, rows, known[order]))

    def _insert(self, ids: Tensor, tables: Tensor, num_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return (rows [L], who is new) of the ids before num_ids [1], after giving rows to those without."""
        store, most_ids = self._store, ids.numel()
        self._make_room(most_ids)
        rows, is_new = find_or_insert_rows(
            store.index,
            ids,
            tables if store.num_tables > 1 else 0,
            self._owners.allocator,
            num_ids=num_ids,
            deterministic=store.deterministic,
        )
        self._owners.note(most_ids)
        fresh = torch.where(is_new, rows, -1)
        self._owners.own(fresh, tables)
        store.write_first(fresh, ids, tables)
        if store.eviction.watches_inserts:
            store.eviction.inserted(rows[is_new], tables[is_new])
        return rows, is_new

    def _make_room(self, most_ids: int) -> None:
        """Let there be rows for most_ids new ids whatever is under way; max_rows of all tables bounds them too."""
        store, owners = self._store, self._owners
        need = min(owners.most_fresh + most_ids, store.most_rows)
        store.blocks.grow(need)
        if need > owners.allocator.capacity:
            owners.grow(store.blocks.capacity)

    # ---- the end of a step

    def mark_first(self, found: StoreLookup, records: Sequence[StoreLookup]) -> None:
        """Mark which rows of a further lookup the step had not seen; records: those before, at least one."""
        nobody = self._owners.owner.numel() - 1
        self._tags = grown(self._tags, nobody + 1, 0)
        if len(records) == 1:
            self._tag += 1
            earlier = records[0].row_numbers
            self._tags.index_fill_(0, torch.where(earlier >= 0, earlier, nobody), self._tag)
        at = torch.where(found.row_numbers >= 0, found.row_numbers, nobody)
        found.first = self._tags[at] != self._tag
        self._tags.index_fill_(0, at, self._tag)

    def write_metadata(self, record: StoreLookup) -> None:
        """Write last_seen and count of a lookup's rows: an update without gradients does."""
        store, rule = self._store, self._store.optimizer.rule
        store.before_write(record.row_numbers)
        nothing = torch.zeros(store.num_tables, len(rule.scalars), dtype=torch.float64)
        seen = PendingLookup(record.row_numbers, record.tables, record.counts)
        fused_update_flags(store.blocks, [seen], rule, nothing, step=store.step, keys=store.keys)

    def book(self, records: Sequence[StoreLookup]) -> None:
        """Add the lookups of a step that ended to the totals and the sightings."""
        store = self._store
        taken = self._reading.take()
        if taken is not None:
            store.totals.set_late(taken[0].numpy())
        if records:
            self._add_outcomes(self._counts, records)
            self._reading.start(self._sums(self._counts))
        if store.admission.counts_sightings:
            book_sightings(store, [_on_host(record) for record in records])

    def outcomes(self, records: Sequence[StoreLookup]) -> np.ndarray:
        """Return distinct ids of the records per table and outcome, int64 [T, 4]; a host sync on a GPU."""
        counts = torch.zeros_like(self._counts)
        self._add_outcomes(counts, records)
        return self._sums(counts)[:, :NUM_OUTCOMES].cpu().numpy()

    def pull_totals(self) -> None:
        """Make the totals exact; a host sync on a GPU."""
        self._reading.drop()
        self._store.totals.set_late(self._sums(self._counts).cpu().numpy())

    def _sums(self, counts: Tensor) -> Tensor:
        return counts.sum(1)[:-1].view(self._store.num_tables, _NUM_COUNTS)

    def _add_outcomes(self, counts: Tensor, records: Sequence[StoreLookup]) -> None:
        """Add distinct ids by outcome; over several records an id counts as what it was first, see lookups.tally."""
        for record in records:
            counted = record.counts > 0
            if len(records) > 1:
                counted = record.row_numbers >= 0
                counted = counted if record.first is None else counted & record.first
            assert record.outcome is not None
            self._add(counts, record.tables, record.outcome, counted)
        if len(records) > 1:
            self._add_unplaced(counts, records)

    def _add_unplaced(self, counts: Tensor, records: Sequence[StoreLookup]) -> None:
        without = torch.cat([(record.row_numbers < 0) & (record.counts > 0) for record in records])
        nobody = self._store.num_tables
        tables = torch.where(without, torch.cat([record.tables for record in records]), nobody)
        outcome = torch.cat([record.outcome for record in records if record.outcome is not None])
        pairs = unique_ids_padded(torch.cat([record.ids for record in records]), tables)
        positions = torch.arange(tables.numel(), device=tables.device)
        last = torch.full_like(positions, max(tables.numel() - 1, 0))
        first = last.scatter_reduce(0, pairs.inverse.long(), positions, "amin")
        self._add(counts, pairs.segments, outcome[first], (pairs.counts > 0) & (pairs.segments < nobody))

    def _add(
        self, counts: Tensor, tables: Tensor, numbers: Tensor | int, counted: Tensor, *, amounts: Tensor | None = None
    ) -> None:
        """Add 1 (or amounts [L]) to the count of (tables [L], numbers [L]) where counted."""
        line = torch.where(counted, tables.long() * _NUM_COUNTS + numbers, counts.shape[0] - 1)
        column = torch.arange(line.numel(), device=line.device) % _SPREAD
        more = torch.ones_like(line) if amounts is None else amounts.long()
        counts.view(-1).scatter_add_(0, line * _SPREAD + column, more)


def _on_host(record: StoreLookup) -> StoreLookup:
    """Return what bookkeeping on the host reads of a record, without padding: a host sync on a GPU."""
    at = (record.counts > 0).nonzero().squeeze(1)
    assert record.outcome is not None
    ids, tables, counts, rows, outcome = (
        part[at].cpu() for part in (record.ids, record.tables, record.counts, record.row_numbers, record.outcome)
    )
    none = torch.empty(0, dtype=torch.int64)
    return StoreLookup(record.store, ids, tables, counts, none, rows, rows, outcome=outcome)
