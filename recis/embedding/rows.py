"""Physical storage of tables with one signature: row blocks, the index of all their ids, and the step under way.

    lookup      unique -> find -> (admit -> take rows -> insert -> initialise): `exact_lookups`, or `padded_lookups` on a GPU
    pending     what backward left for the optimizer
    end_step    metadata of rows no update has touched, counters, sightings, then eviction

A row is in use by one table, named in `owners`. Tables differ inside a store by their number, which is also the index's
segment, and by what a config adds to the signature: admission, eviction, limits and default rows are arrays over tables.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from recis.embedding.admission_control import AdmissionControl
from recis.embedding.config import TableConfig
from recis.embedding.counters import TableCounters
from recis.embedding.default_rows import DefaultRows
from recis.embedding.eviction import TtlSeconds
from recis.embedding.exact_lookups import ExactLookups
from recis.embedding.late_reading import LateFaults
from recis.embedding.lookups import StoreLookup
from recis.embedding.padded_lookups import PaddedLookups
from recis.embedding.row_eviction import RowEviction
from recis.embedding.row_log import ChangeLog
from recis.embedding.row_owners import DeviceRowOwners, RowOwners
from recis.embedding.snapshot import StoreSnapshot
from recis.embedding.step_clock import StepClock, from_low_seconds, low_second, low_seconds
from recis.embedding.totals import StoreTotals
from recis_kernels.columns import to_device
from recis_kernels.hash_index import HashIndex
from recis_kernels.philox import table_key
from recis_kernels.row_blocks import RowBlocks, RowLayout
from recis_kernels.row_grads import PendingLookup
from recis_kernels.row_init import init_rows
from recis_kernels.unique_ids import order_by_segment_and_id


class Asked(Protocol):
    """A lookup that waits for its turn while its ids travel: recis.distributed.stages.Asked."""

    def start_ids(self) -> None: ...

    def look_up(self, *, train: bool, source: object) -> StoreLookup: ...

    def drop(self) -> None: ...


class Exchange(Protocol):
    """How the rows of a store are shared with other processes: recis.distributed.exchange.TableExchange."""

    def ask(self, ranges: tuple[Tensor, Tensor, Tensor]) -> Asked: ...

    def lookup(self, ranges: tuple[Tensor, Tensor, Tensor], *, train: bool, source: object) -> StoreLookup: ...

    def bring_gradients(self) -> None: ...

    def drop_gradients(self) -> None: ...

    def has_unsent(self) -> bool: ...

    def sum_of_squares(self, squares: Tensor) -> Tensor: ...

    def total(self, sizes: np.ndarray) -> np.ndarray: ...

    def among_lowest(self, scores: Tensor, last_seen: Tensor, ids: Tensor, num_rows: int) -> Tensor: ...

    @property
    def num_copies(self) -> int: ...

    def slices_of(self, table: int) -> tuple[int, int]: ...

    def settle(self) -> None: ...

    def end_step(self) -> None: ...

    def forget_copies(self) -> None: ...

    def finish(self) -> None: ...


class RowStore:
    """Rows of T tables of one signature.

    Attributes:
        configs: of the tables, by number.
        keys: int64 [T], key64 of (seed, name) of each table; seeds its random draws.
        layout, blocks: where rows lie.  index: (table, id) -> row.  owners: row -> table.
        is_padded: whether lookups leave the number of ids on the device, as a GPU needs.  lookups: how they are done.
        t: int64 [T], CPU; optimizer steps of each table so far.
        faults: what went wrong on the device and is named a step later.
        step: the step under way: lookups belong to it, updates write it as last_seen.
        clock: of eviction by seconds, shared by all stores of a table set; has_clock: whether this store needs it.
        on_evict: called with (table name, ascending ids) after an eviction.
        snapshot: the save under way, if any.
        exchange: with whom the rows are shared; None: this process has them all.
    """

    def __init__(
        self,
        configs: Sequence[TableConfig],
        *,
        seed: int,
        device: torch.device | str = "cpu",
        deterministic: bool = True,
        block_shift: int | None = None,
        clock: StepClock | None = None,
        on_evict: Callable[[str, Tensor], None] | None = None,
        padded: bool | None = None,
    ) -> None:
        """Build an empty store.

        Args:
            padded: see `is_padded`; None: where the device is not the CPU. Tests ask for it there.
        """
        first = configs[0]
        self.seed = seed
        self.configs = tuple(configs)
        self.optimizer = first.optimizer
        self._init_spec = first.initializer.spec()
        self._state_values = first.optimizer.initial_state()
        self.device = torch.device(device)
        self.deterministic = deterministic
        self.is_padded = self.device.type != "cpu" if padded is None else padded
        self.keys = torch.tensor([table_key(seed, config.name) for config in configs]).to(self.device)
        self.has_clock = any(isinstance(policy, TtlSeconds) for config in configs for policy in config.eviction)
        self.layout = RowLayout(
            dim=first.embedding_dim,
            dtype=first.torch_dtype,
            state=tuple(first.optimizer.state_spec(first.embedding_dim)),
            clock=self.has_clock,
        )
        self.blocks = RowBlocks(self.layout, device=device, shift=block_shift)
        self.index = HashIndex(device)
        for _ in configs:
            self.index.add_segment()
        self.owners = DeviceRowOwners(self.device) if self.is_padded else RowOwners()
        self.admission = AdmissionControl(self.configs, self.keys)
        self.logs = [ChangeLog() for _ in configs]
        self.totals = StoreTotals(self.configs)
        self.defaults = DefaultRows(self.configs, self.device)
        self.eviction = RowEviction(self)
        self.t = torch.zeros(len(configs), dtype=torch.int64)
        self.step = 1
        self.clock = StepClock() if clock is None else clock
        self.on_evict = on_evict
        self.snapshot: StoreSnapshot | None = None
        self.faults = LateFaults()
        self.lookups = PaddedLookups(self) if self.is_padded else ExactLookups(self)
        self.exchange: Exchange | None = None
        self._records: list[StoreLookup] = []
        tables = self.defaults.tables
        if tables.numel():
            self.defaults.rows[tables] = self.owners.take(torch.full_like(tables, self.reserved, dtype=torch.int32))
            self.initialise_default_rows(tables)

    @property
    def num_tables(self) -> int:
        """T."""
        return len(self.configs)

    @property
    def sizes(self) -> np.ndarray:
        """Rows of each table, int64 [T]; a host sync on a GPU."""
        return self.index.sizes().numpy()

    @property
    def most_rows(self) -> int:
        """Rows that limits let the store have, default rows included; the largest int64 where a table has none."""
        return min(sum(self.totals.limits.tolist()) + self.defaults.tables.numel(), int(np.iinfo(np.int64).max))

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows in use."""
        return self.owners.num_used * self.layout.row_bytes

    @property
    def reserved(self) -> int:
        """Owner number of default rows: they belong to no table's export, size or eviction."""
        return len(self.configs)

    def initialise_default_rows(self, tables: Tensor) -> None:
        """Set the default rows of tables [K], which have one, to their first values and state."""
        rows = self.defaults.rows[tables]
        keys = torch.tensor([table_key(self.seed, f"{config.name}/default") for config in self.configs])
        self.initialise(rows, torch.zeros_like(rows), tables, keys=keys.to(self.device))

    # ---- lookups

    def one_range(self, ids: Tensor, table: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (ids, offsets, tables) that say: all of ids are of one table."""
        if ids.ndim != 1 or ids.dtype != torch.int64:
            name = repr(self.configs[table].name)
            raise ValueError(f"table {name}: ids must be int64 [L]; got {ids.dtype} {tuple(ids.shape)}")
        tables = to_device(torch.tensor([table], dtype=torch.int32), self.device)
        return ids, to_device(torch.tensor([0, ids.numel()]), self.device), tables

    def lookup(self, ranges: tuple[Tensor, Tensor, Tensor], *, train: bool, source: object) -> StoreLookup:
        """Look up ids [L] of ranges: positions offsets[r]:offsets[r + 1] are of table tables[r].

        Args:
            ranges: ids [L] int64, offsets [R + 1] int64, tables [R] int32.
            train: whether unknown ids may earn rows and the step's bookkeeping counts this lookup.
            source: who asks; numbers micro-batches.
        """
        if self.exchange is not None:
            return self.exchange.lookup(ranges, train=train, source=source)
        return self.look_up_own(ranges, train=train, source=source)

    def look_up_own(
        self,
        ranges: tuple[Tensor, Tensor, Tensor],
        *,
        train: bool,
        source: object,
        counts: Tensor | None = None,
    ) -> StoreLookup:
        """Do `lookup` among the rows that lie here; counts int32 [L]: sightings that each position stands for, None = 1."""
        found = self.lookups.look_up(ranges, train=train, source=source, counts=counts)
        if train:
            if self._records:
                self.lookups.mark_first(found, self._records)
            self._records.append(found)
        return found

    def extended(self) -> None:
        """Say that training lookups of the step under way were extended (StoreLookup.extend) on the CPU."""
        if len(self._records) > 1:
            assert isinstance(self.lookups, ExactLookups)
            self.lookups.mark_again(self._records)

    def place(self, ids: Tensor, tables: Tensor) -> Tensor:
        """Give absent ids [N] of tables int32 [N] fresh rows, in this order; return the rows."""
        rows = self.owners.take(tables)
        self.initialise(rows, ids, tables)
        self.index.insert(ids, tables, rows)
        self.eviction.inserted(rows, tables)
        return rows

    def initialise(self, rows: Tensor, ids: Tensor, tables: Tensor, *, keys: Tensor | None = None) -> None:
        """Write first weight, first state and fresh metadata into rows [N]."""
        self.blocks.grow(self.owners.num_fresh)
        self.write_first(rows, ids, tables, keys=keys)

    def write_first(self, rows: Tensor, ids: Tensor, tables: Tensor, *, keys: Tensor | None = None) -> None:
        """Do `initialise` for rows [N] that the blocks have room for; -1 is ignored."""
        self.before_write(rows)
        init_rows(
            self.blocks,
            rows,
            ids,
            self.keys if keys is None else keys,
            self._init_spec,
            tables=tables,
            state_values=self._state_values,
            step=self.step,
            clock_s=low_second(self.clock.seconds),
        )

    # ---- what the optimizer needs

    def pending(self) -> list[PendingLookup]:
        """Return the training lookups since the last update that a gradient has reached, in the order they were made.

        Of rows that ranks share it is a collective when gradients wait to be exchanged.
        """
        if self.exchange is not None:
            self.exchange.bring_gradients()
        return [record.grads for record in self._records if record.has_gradient and record.grads is not None]

    def micro_batch(self, source: object) -> int:
        """Return how many lookups `source` has made since the last update, the newest one not counted."""
        return sum(record.source is source and not record.applied for record in self._records) - 1

    def before_write(self, rows: Tensor) -> None:
        """Call before any write to rows [N] (-1 is ignored): a snapshot under way keeps what they hold now."""
        snapshot = self.snapshot  # the writer's thread may close it meanwhile
        if snapshot is not None:
            snapshot.keep(rows)

    def mark_applied(self) -> None:
        """Say that an update has consumed `pending()` and written last_seen = step and count += counts for its rows."""
        for record in self._records:
            if record.has_gradient:
                record.applied = record.is_booked = True

    def drop_gradients(self) -> None:
        """Forget gradients that no update has consumed (zero_grad); the lookups still count as sightings."""
        if self.exchange is not None:
            self.exchange.drop_gradients()
        for record in self._records:
            if record.grads is not None:
                for view in record.grads.views:
                    view.grad = None

    # ---- the boundary of a step

    def begin_step(self, step: int) -> None:
        """Say that the lookups to come belong to `step`. Lookups of an earlier step are settled, without eviction.

        Raises:
            ValueError: the step is before the one under way, or gradients of that one were not applied.
        """
        if step == self.step:
            return
        if step < self.step - 1 or (self._records and step < self.step):
            raise ValueError(f"steps do not go back: step {step} after {self.describe()} were in step {self.step}")
        self.settle()
        self.step = step

    def settle(self) -> None:
        """Book the lookups of the step under way: metadata, counters, sightings. Rows stay.

        Raises:
            ValueError: a gradient waits that no optimizer step has applied.
        """
        unsent = self.exchange is not None and self.exchange.has_unsent()
        if unsent or any(record.has_gradient for record in self._records):
            raise ValueError(
                f"step {self.step} of {self.describe()} ends with gradients that no update has applied: call "
                "SparseOptimizer.step() before end_step, or zero_grad() to drop them"
            )
        if self.exchange is not None:
            self.exchange.settle()
        records, self._records = self._records, []
        for record in records:
            self._write_metadata(record)
            record.applied = True
        self.lookups.book(records)
        self.totals.warn_if_full()

    def book_last_seen(self) -> None:
        """Write the metadata of lookups of the step under way now; counters and sightings wait for its end."""
        for record in self._records:
            self._write_metadata(record)

    def forget_lookups(self, table: int) -> None:
        """Drop one table from the lookups of the step under way (the table was cleared)."""
        for record in self._records:
            record.drop_table(table)

    def _write_metadata(self, record: StoreLookup) -> None:
        if record.is_booked and not self.has_clock:
            return
        if not record.is_booked:
            self.lookups.write_metadata(record)
        if self.has_clock:
            rows = record.row_numbers[(record.row_numbers >= 0).nonzero().squeeze(1)]
            self.before_write(rows)
            self.write_clock(rows, torch.full_like(rows, self.clock.seconds))
        record.is_booked = True

    def write_clock(self, rows: Tensor, seconds: Tensor) -> None:
        """Write last_seen_s int64 [N]."""
        self.blocks.write(rows, {"last_seen_s": low_seconds(seconds)})

    def read_clock(self, rows: Tensor) -> Tensor:
        """Return last_seen_s of rows [N], int64 [N]."""
        return from_low_seconds(self.blocks.read(rows, ("last_seen_s",))["last_seen_s"])

    def end_step(self, step: int, *, tables: Sequence[int] | None = None) -> None:
        """Settle `step`, then evict from these tables (None: all). The step under way is then step + 1.

        Raises:
            ValueError: gradients wait, lookups were made in another step, or the step is before one that has ended.
        """
        if step != self.step and (self._records or step < self.step - 1):
            raise ValueError(
                f"end_step({step}) of {self.describe()}, but the step under way is {self.step}: steps count from 1 and up "
                "by one per update; after loading, set the last step that ended with TableSet.load_step"
            )
        self.step = step
        self.faults.raise_found()
        if self.has_clock:
            self.clock.at(step)
        self.settle()
        self.admission.expire(step=step, clock_s=self.clock.seconds)
        self.eviction.run(step, self.clock.seconds, tables)
        self.index.maintain()
        if self.exchange is not None:
            self.exchange.end_step()
        self.step = step + 1

    def has_ended(self, step: int) -> bool:
        """Whether `step` is the last one that ended and nothing was looked up since."""
        return step == self.step - 1 and not self._records

    def require_boundary(self, what: str) -> None:
        """Raise ValueError when training lookups wait for their end_step."""
        if self._records:
            raise ValueError(
                f"{what} needs the boundary of a step: call end_step({self.step}) of {self.describe()} first"
            )

    def counters(self, table: int) -> TableCounters:
        """Return the totals of one table, the step under way included."""
        self.lookups.pull_totals()
        now = self.lookups.outcomes(self._records)[table] if self._records else None
        size = int(self.sizes[table])
        return self.totals.counters(table, now, size=size, allocated=self.blocks.capacity)

    # ---- taking rows away

    def changed_by_hand(self) -> None:
        """Say that rows are about to be written or removed by hand: processes that share them copy none any more.

        Raises:
            ValueError: lookups of a step under way have read from copies.
        """
        if self.exchange is not None and self.exchange.num_copies:
            self.require_boundary("writing or removing rows by hand, of which every rank has copies,")
            self.exchange.forget_copies()

    def evict(self, rows: Tensor) -> Tensor:
        """Take rows [N] away as an eviction: counted and reported; return their ids in (table, id) order."""
        if rows.numel() == 0:
            return rows
        ids, per_table = self.free(rows)
        self.totals.add_evicted(per_table)
        if self.on_evict is not None:
            evicted = per_table.nonzero().squeeze(1)
            for table, part in zip(evicted.tolist(), ids.split(per_table[evicted].tolist()), strict=True):
                self.on_evict(self.configs[table].name, part)
        return ids

    def free(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Take rows [N], in use and distinct, from their tables; return ids [N] in (table, id) order and rows [T]."""
        ids, tables = self.blocks.read(rows, ("id",))["id"], self.owners.owner[rows]
        order = order_by_segment_and_id(ids, tables, self.num_tables)
        rows, ids, tables = rows[order], ids[order], tables[order]
        self.index.erase(ids, tables)
        self.owners.release(rows)
        per_table = torch.bincount(tables.long(), minlength=self.num_tables).cpu()
        for record in self._records:  # a row freed inside a step must not be updated by it
            for numbers in (record.row_numbers, None if record.grads is None else record.grads.rows):
                if numbers is not None:
                    numbers[torch.isin(numbers, rows)] = -1
        touched = per_table.nonzero().squeeze(1)
        for table, part in zip(touched.tolist(), ids.split(per_table[touched].tolist()), strict=True):
            self.logs[table].removed(part)
        return ids, per_table

    def describe(self) -> str:
        """Name the tables, for messages."""
        names = [config.name for config in self.configs[:3]]
        more = f" and {self.num_tables - 3} more" if self.num_tables > 3 else ""
        return f"table {', '.join(map(repr, names))}{more}"
