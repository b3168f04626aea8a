"""What the training lookups of one optimizer step found, kept until the step ends.

    tally      per table: distinct ids of the step by outcome (found, inserted, rejected, full)
    unplaced   the distinct ids that ended without a row, with all their sightings of the step

Within one lookup ids are distinct already. Over several lookups of a step an id counts as what it was first. Ids with a row
are told apart by the row (a tag per row, no sort); ids without one by a sort of those alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recis_kernels.hash_probe import count_loop
from recis_kernels.row_grads import PendingLookup

if TYPE_CHECKING:
    from recis.embedding.rows import RowStore

FOUND, INSERTED, REJECTED, FULL = range(4)
NUM_OUTCOMES = 4


@dataclass(slots=True, eq=False)
class StoreLookup:
    """One lookup of L positions in a store.

    Attributes:
        store: where.
        ids: [U] int64, distinct within their table.
        tables: [U] int32, table number in the store.
        counts: [U] int32, positions of the id.
        inverse: [L]; position -> index into the fields above (positions that share a trained default row share an index).
        row_numbers: [U] int64, -1 = no row.
        read_rows: [U] int64, the same with default rows in place of -1 where the table has one.
        outcome: [U] uint8 when training, None when all were found or when not training.
        grads: what SparseOptimizer gets; None when not training.
        first: [U] bool, whether this is the id's first lookup of the step (of ids with a row); None = all.
        applied: whether the optimizer has consumed the gradients, or the step has ended: backward comes too late.
        is_booked: whether last_seen and count of the rows are written (the optimizer does it on its way).
        source: who asked (a collection or a table); its lookups since the last update are numbered as micro-batches.
    """

    store: "RowStore"
    ids: Tensor
    tables: Tensor
    counts: Tensor
    inverse: Tensor
    row_numbers: Tensor
    read_rows: Tensor
    outcome: Tensor | None = None
    grads: PendingLookup | None = None
    first: Tensor | None = None
    applied: bool = False
    is_booked: bool = False
    source: object = None

    @property
    def has_gradient(self) -> bool:
        """Whether backward left a gradient that no optimizer step has consumed."""
        return not self.applied and self.grads is not None and any(view.grad is not None for view in self.grads.views)

    def extend(self, ids: Tensor, tables: Tensor, counts: Tensor, rows: Tensor) -> int:
        """Add pairs [M] that it has not looked up and that have a row, seen counts times; return the first one's index."""
        first = self.ids.numel()
        self.ids, self.tables = torch.cat([self.ids, ids]), torch.cat([self.tables, tables])
        self.counts = torch.cat([self.counts, counts])
        self.row_numbers, self.read_rows = torch.cat([self.row_numbers, rows]), torch.cat([self.read_rows, rows])
        if self.outcome is not None:
            self.outcome = torch.cat([self.outcome, self.outcome.new_full((ids.numel(),), FOUND)])
        if self.grads is not None:
            self.grads.rows = torch.cat([self.grads.rows, rows])
            self.grads.table_of_row, self.grads.counts = self.tables, self.counts
        return first

    def drop_table(self, table: int) -> None:
        """Make as if the ids of this table had not been looked up; the gather that was done stays valid."""
        keep = self.tables != table
        numbers = keep.long().cumsum(0) - 1
        numbers[~keep] = -1
        numbers = torch.cat([numbers, numbers.new_full((1,), -1)])  # inverse -1 (padding) picks this one and stays -1
        self.inverse = numbers[self.inverse.long()]
        self.ids, self.tables, self.counts = self.ids[keep], self.tables[keep], self.counts[keep]
        self.row_numbers, self.read_rows = self.row_numbers[keep], self.read_rows[keep]
        self.outcome = None if self.outcome is None else self.outcome[keep]
        self.first = None if self.first is None else self.first[keep]
        if self.grads is not None:
            self.grads.rows, self.grads.table_of_row = self.grads.rows[keep], self.tables
            self.grads.counts = self.counts
            for view in self.grads.views:
                view.inverse = numbers[view.inverse.long()]


def summed_counts(counts: Tensor, inverse: Tensor, num_ids: int) -> Tensor:
    """Return the sightings of each distinct id, int32 [num_ids], where position l stands for counts[l] of them."""
    return torch.zeros(num_ids, dtype=torch.int32, device=counts.device).index_add_(0, inverse.long(), counts)


def tally(records: Sequence[StoreLookup], num_tables: int) -> Tensor:
    """Return distinct ids of the step per table and outcome, int64 [T, 4]."""
    totals = torch.zeros(num_tables, NUM_OUTCOMES, dtype=torch.int64)
    for record in records:
        tables, outcome = record.tables, record.outcome
        if len(records) > 1:
            first = record.row_numbers >= 0 if record.first is None else (record.row_numbers >= 0) & record.first
            tables, outcome = tables[first], None if outcome is None else outcome[first]
        totals[:, FOUND] += _count(tables, num_tables)
        if outcome is not None:
            _move_from_found(totals, tables, outcome)
    if len(records) > 1:
        without = unplaced(records)
        totals[:, FOUND] += _count(without.tables, num_tables)
        _move_from_found(totals, without.tables, without.outcome)
    return totals


def _count(tables: Tensor, num_tables: int) -> Tensor:
    counts = torch.zeros(num_tables, dtype=torch.int64)
    count_loop(tables.numpy(), counts.numpy())
    return counts


def _move_from_found(totals: Tensor, tables: Tensor, outcome: Tensor) -> None:
    """Correct totals [T, 4] that counted all ids as found: most are, so only the others are looked at one by one."""
    others = outcome.nonzero().squeeze(1)
    code = tables[others].long() * NUM_OUTCOMES + outcome[others]
    counts = torch.bincount(code, minlength=totals.numel()).view(totals.shape)
    totals += counts
    totals[:, FOUND] -= counts.sum(1)


@dataclass(frozen=True, slots=True)
class Unplaced:
    """Distinct ids [N] that ended a step without a row: their tables, sightings (int64) and outcomes (uint8)."""

    ids: Tensor
    tables: Tensor
    counts: Tensor
    outcome: Tensor


def unplaced(records: Sequence[StoreLookup]) -> Unplaced:
    """Return the distinct ids of the records that have no row, each with its sightings in all of them."""
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for record in records:
        if record.outcome is not None:
            at = (record.outcome >= REJECTED).nonzero().squeeze(1)
            parts.append((record.ids[at], record.tables[at], record.counts[at].long(), record.outcome[at]))
    if not parts:
        none = torch.empty(0, dtype=torch.int64)
        return Unplaced(none, none.int(), none, none.to(torch.uint8))
    ids, tables, counts, outcome = (torch.cat(column) for column in zip(*parts, strict=True))
    if len(parts) == 1 or ids.numel() == 0:
        return Unplaced(ids, tables, counts, outcome)
    order = ids.argsort(stable=True)
    order = order[tables[order].argsort(stable=True)]
    ids, tables = ids[order], tables[order]
    starts = torch.ones(ids.numel(), dtype=torch.bool)
    starts[1:] = (ids[1:] != ids[:-1]) | (tables[1:] != tables[:-1])
    group = starts.cumsum(0) - 1
    summed = torch.zeros(int(group[-1]) + 1, dtype=torch.int64).index_add_(0, group, counts[order])
    return Unplaced(ids[starts], tables[starts], summed, outcome[order][starts])
