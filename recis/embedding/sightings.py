"""Count sightings of ids that have no row: exactly, in an index of their own, or in count-min sketches.

    Exact       (table, id) -> slot of (id, count, last_seen, last_seen_s)
    CountMin    cell[d, (hash64(id xor salt_d) mod 2**32) * width div 2**32] += sightings, d = 0 .. depth - 1
                estimate = min over d

Both serve all tables of a store at once. Counts change between steps only.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from recis.embedding.admission import CountMin
from recis.embedding.eviction import lowest
from recis.embedding.expiry import TtlQueue
from recis.embedding.row_owners import RowOwners, grown
from recis_kernels.hash_index import HashIndex
from recis_kernels.philox import hash64

_LOW32 = 0xFFFFFFFF


class ExactSightings:
    """Sightings per (table, id).

    Args:
        num_tables: T.
        max_ids: int64 [T], most ids per table.
    """

    def __init__(self, num_tables: int, max_ids: Tensor) -> None:
        self._max_ids = max_ids
        self._index = HashIndex()
        for _ in range(num_tables):
            self._index.add_segment()
        self.owners = RowOwners()
        size = self.owners.owner.numel()
        self._ids = torch.zeros(size, dtype=torch.int64)
        self._counts = torch.zeros(size, dtype=torch.int64)
        self._last_seen = torch.zeros(size, dtype=torch.int64)
        self._last_seen_s = torch.zeros(size, dtype=torch.int64)

    def deal_limits(self, parts: Sequence[int], whole: int) -> None:
        """Keep parts[t] of `whole` equal shares of the max_ids of each table t here; at least one id."""
        for table, limit in enumerate(self._max_ids.tolist()):
            if limit < torch.iinfo(torch.int64).max:
                self._max_ids[table] = max(1, limit * parts[table] // whole)

    def counts(self, ids: Tensor, tables: Tensor) -> Tensor:
        """Return the sightings in earlier steps of (tables [N], ids [N]), int64 [N]."""
        slots = self._index.find(ids, tables)
        return torch.where(slots >= 0, self._counts[slots.clamp(min=0)], 0)

    def add(self, ids: Tensor, tables: Tensor, counts: Tensor, step: int, clock_s: int) -> None:
        """Add counts [N] to distinct (tables, ids) and mark them as seen in this step."""
        slots = self._index.find(ids, tables)
        new = (slots < 0).nonzero().squeeze(1)
        if new.numel():
            slots[new] = self._take(ids[new], tables[new])
        self._counts[slots] += counts
        self._last_seen[slots] = step
        self._last_seen_s[slots] = clock_s

    def _take(self, ids: Tensor, tables: Tensor) -> Tensor:
        slots = self.owners.take(tables)
        size = self.owners.owner.numel()
        for name in ("_ids", "_counts", "_last_seen", "_last_seen_s"):
            setattr(self, name, grown(getattr(self, name), size, 0))
        self._ids[slots] = ids
        self._counts[slots] = 0
        self._index.insert(ids, tables, slots)
        return slots

    def forget(self, ids: Tensor, tables: Tensor) -> None:
        """Set the sightings of (tables, ids) back to 0; ids that were never counted are ignored."""
        slots = self._index.erase(ids, tables)
        self.owners.release(slots[slots >= 0])

    def _forget_slots(self, slots: Tensor) -> None:
        if slots.numel():
            self.forget(self._ids[slots], self.owners.owner[slots])

    def trim(self) -> None:
        """Forget the ids seen longest ago (then the smaller id) of tables that hold more than max_ids."""
        sizes = torch.bincount(self.owners.owner[: self.owners.num_fresh] + 1, minlength=self._max_ids.numel() + 1)[1:]
        for table in (sizes > self._max_ids).nonzero().squeeze(1):
            slots = (self.owners.owner == table).nonzero().squeeze(1)
            excess = int(sizes[table] - self._max_ids[table])
            self._forget_slots(slots[lowest(self._last_seen[slots], self._last_seen[slots], self._ids[slots], excess)])

    def ttl_queue(self, ttl: int, wanted: Tensor, *, clock: bool) -> TtlQueue:
        """Return the queue of entries of the wanted tables (bool [T]) with this time to live, in steps or seconds."""
        return TtlQueue(ttl, wanted, self.owners, self._read_clock if clock else self._read_step)

    def _read_step(self, slots: Tensor) -> Tensor:
        return self._last_seen[slots]

    def _read_clock(self, slots: Tensor) -> Tensor:
        return self._last_seen_s[slots]

    def expire(self, queue: TtlQueue, now: int) -> None:
        """Forget the entries that are due."""
        self._forget_slots(queue.due(now))

    def maintain(self) -> None:
        """Between steps: give back the index slots of forgotten ids."""
        self._index.maintain()

    def clear(self, table: int) -> None:
        """Forget all of one table."""
        self.owners.release((self.owners.owner == table).nonzero().squeeze(1))
        self._index.clear(table)

    def state(self, table: int) -> dict[str, Tensor]:
        """Return ids (ascending), counts, last_seen and last_seen_s of one table, int64 [n] each."""
        ids, slots = self._index.export(table)
        return {
            "sightings.ids": ids,
            "sightings.counts": self._counts[slots],
            "sightings.last_seen": self._last_seen[slots],
            "sightings.last_seen_s": self._last_seen_s[slots],
        }

    def load(self, table: int, state: Mapping[str, Tensor], *, merge: bool) -> None:
        """Set, or with merge add to, what `state` returned; a merged entry keeps the later last_seen."""
        if not merge:
            self.clear(table)
        ids = state["sightings.ids"]
        tables = torch.full((ids.numel(),), table, dtype=torch.int32)
        slots = self._index.find(ids, tables)
        new = (slots < 0).nonzero().squeeze(1)
        if new.numel():
            slots[new] = self._take(ids[new], tables[new])
            self._last_seen[slots[new]] = 0
            self._last_seen_s[slots[new]] = 0
        self._counts[slots] += state["sightings.counts"]
        for name in ("last_seen", "last_seen_s"):
            kept = getattr(self, f"_{name}")
            kept[slots] = torch.maximum(kept[slots], state[f"sightings.{name}"])


class SketchSightings:
    """Count-min sketches of some tables of a store, in one flat tensor.

    Args:
        sketches: by table number; None = the table has none.

    Attributes:
        totals: int64 [T], sightings counted (the N of the error bound).
    """

    def __init__(self, sketches: list[CountMin | None]) -> None:
        widths = [0 if sketch is None else sketch.width for sketch in sketches]
        depths = [0 if sketch is None else sketch.depth for sketch in sketches]
        self._widths, self._depths = torch.tensor(widths), torch.tensor(depths)
        cells = self._widths * self._depths
        self._starts = cells.cumsum(0) - cells
        self._cells = torch.zeros(int(cells.sum()), dtype=torch.int64)
        self._max_depth = max(depths, default=0)
        self.totals = torch.zeros(len(sketches), dtype=torch.int64)

    def _addresses(self, ids: Tensor, tables: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return per depth: which of the N ids have that depth (bool [N]), and their cells (int64 [N], 0 elsewhere)."""
        tables = tables.long()
        width, start, depth = self._widths[tables], self._starts[tables], self._depths[tables]
        found = []
        for d in range(self._max_depth):
            mixed = hash64(ids ^ hash64(torch.tensor(d + 1))) & _LOW32
            cell = start + d * width + ((mixed * width) >> 32)
            has = d < depth
            found.append((has, torch.where(has, cell, 0)))
        return found

    def counts(self, ids: Tensor, tables: Tensor) -> Tensor:
        """Return the estimated sightings in earlier steps, int64 [N]; 0 in tables without a sketch."""
        most = torch.iinfo(torch.int64).max
        estimate = torch.full((ids.numel(),), most)
        for has, cell in self._addresses(ids, tables):
            estimate = torch.where(has, torch.minimum(estimate, self._cells[cell]), estimate)
        return torch.where(estimate == most, 0, estimate)

    def add(self, ids: Tensor, tables: Tensor, counts: Tensor) -> None:
        """Add counts [N] to the ids of tables [N] that have a sketch."""
        counts = torch.where(self._depths[tables.long()] > 0, counts.long(), 0)
        for has, cell in self._addresses(ids, tables):
            self._cells.index_add_(0, cell, torch.where(has, counts, 0))
        self.totals.index_add_(0, tables.long(), counts)

    def clear(self, table: int) -> None:
        """Set one table's sketch to zero."""
        self._view(table).zero_()
        self.totals[table] = 0

    def _view(self, table: int) -> Tensor:
        start, depth, width = int(self._starts[table]), int(self._depths[table]), int(self._widths[table])
        return self._cells[start : start + depth * width].view(depth, width)

    def state(self, table: int) -> dict[str, Tensor]:
        """Return sketch [depth, width] and sketch_total [1], int64."""
        return {"sketch": self._view(table).clone(), "sketch_total": self.totals[table : table + 1].clone()}

    def load(self, table: int, state: Mapping[str, Tensor], *, merge: bool) -> None:
        """Set, or with merge add to, what `state` returned.

        Raises:
            ValueError: the sketch has another depth or width, that is other eps or delta.
        """
        view, sketch = self._view(table), state["sketch"]
        if sketch.shape != view.shape:
            raise ValueError(
                f"the sketch is {tuple(sketch.shape)} [depth, width], this table's CountMin makes {tuple(view.shape)}: "
                "use the eps and delta it was made with, or leave admission state out"
            )
        if not merge:
            self.clear(table)
        view.add_(sketch)
        self.totals[table] += int(state["sketch_total"])
