"""One logical table: ids to rows, over a physical store that it may share with other tables.

    lookup       rows of ids; when training, unknown ids may earn a row
    end_step     the boundary of an optimizer step: metadata, counters, sightings, then eviction
    export, import_rows, state, admission_state    what a checkpoint writes and reads

Any int64 is a legal id. Row numbers are unique and stable while an id lives; nothing else about them is promised.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from recis.embedding import transfer
from recis.embedding.config import TableConfig, setting_to_json
from recis.embedding.counters import TableCounters
from recis.embedding.pooling import gather
from recis.embedding.rows import RowStore
from recis.embedding.snapshot import TableSnapshot
from recis.errors import CheckpointError


class HashTable:
    """A view of one table in a TableSet; built by it, see `TableSet.tables`.

    Attributes:
        config: as given.
        store: the RowStore that holds its rows; store.tables[number] is this table.
        number: its place in the store.
    """

    def __init__(self, store: RowStore, number: int) -> None:
        self.config: TableConfig = store.configs[number]
        self.store = store
        self.number = number

    def __repr__(self) -> str:
        return f"HashTable({self.name!r}, {self.size} rows of {self.config.embedding_dim} {self.config.dtype})"

    @property
    def name(self) -> str:
        """Name of the table."""
        return self.config.name

    @property
    def size(self) -> int:
        """Rows now."""
        return int(self.store.sizes[self.number])

    def __len__(self) -> int:
        return self.size

    @property
    def slices(self) -> tuple[int, int] | None:
        """The slices [first, stop) of its ids whose rows lie here; None where the rows are not shared with other processes."""
        exchange = self.store.exchange
        return None if exchange is None else exchange.slices_of(self.number)

    # ---- training

    def lookup(self, ids: Tensor, *, train: bool, step: int) -> tuple[Tensor, Tensor]:
        """Return the rows of ids [L]: weights [L, D] float32, differentiable when training, and row numbers [L] int64.

        Row number -1: the id has no row (it reads zeros, or the table's default row). With train=True unknown ids are
        admitted by the table's rule, all positions count as sightings of `step`, and a backward pass leaves gradients for
        SparseOptimizer. With train=False nothing changes but the counter default_reads.

        A training lookup of a later step books the step before (counters, sightings, metadata) if `end_step` has not; rows
        are evicted by `end_step` alone.

        Raises:
            ValueError: ids are not [L] int64, the step is before the one under way, or gradients of that one wait.
        """
        if train:
            self.store.begin_step(step)
        found = self.store.lookup(self.store.one_range(ids, self.number), train=train, source=self)
        return gather(found), found.row_numbers[found.inverse]

    def end_step(self, step: int) -> None:
        """End optimizer step `step` for this table alone: metadata and counters, then eviction.

        A TableSet or a collection ends a step for all its tables at once; this is for a table used by hand.

        Raises:
            ValueError: gradients wait that no SparseOptimizer applied, or the step is not after the one before.
        """
        self.store.end_step(step, tables=[self.number])

    def evict_older_than(self, step: int) -> Tensor:
        """Remove rows with last_seen < step, strictly, and return their ids, ascending int64."""
        return transfer.evict_older_than(self.store, self.number, step)

    # ---- by hand

    def find(self, ids: Tensor) -> Tensor:
        """Return row numbers [L] int64 of ids [L], -1 where there is none; inserts nothing, counts nothing."""
        return self.store.index.find(self.store.one_range(ids, self.number)[0], self.number)

    def insert(self, ids: Tensor, rows: Tensor, state: Mapping[str, Tensor] | None = None) -> None:
        """Give ids [L] a row by force, whatever admission says, and set the weights.

        Args:
            ids: int64; of duplicates the last one's values stay. An id that has a row keeps it and gets the new values.
            rows: [L, D] weights, converted to the table's dtype.
            state: {"m": [L, width], ...} optimizer state; None or left out: the initial state (existing rows keep theirs).

        Raises:
            ValueError: a shape does not fit, a state is unknown, or max_rows would be passed.
        """
        transfer.insert(self.store, self.number, ids, rows, state)

    def remove(self, ids: Tensor) -> int:
        """Take the rows of these ids away and return how many there were; their sightings are forgotten too."""
        return transfer.remove(self.store, self.number, ids)

    def clear(self) -> None:
        """Make the table as new: no rows, sightings, counters or optimizer steps. The removed ids count as tombstones."""
        transfer.clear(self.store, self.number)

    def reserve(self, num_rows: int) -> None:
        """Make room for num_rows rows in all, so that no lookup has to grow the index or the store on the way."""
        transfer.reserve(self.store, self.number, num_rows)

    def ids(self) -> Tensor:
        """Return the ids that have a row, ascending signed int64."""
        return self.store.index.export(self.number)[0]

    def counters(self) -> TableCounters:
        """Return the totals so far, the lookups of the step under way included."""
        return self.store.counters(self.number)

    @property
    def t(self) -> int:
        """Optimizer steps of this table so far."""
        return int(self.store.t[self.number])

    # ---- checkpoint

    def export(self, *, since_step: int | None = None) -> dict[str, Tensor]:
        """Return copies of the rows, by ascending id.

        Returns:
            ids [n] int64, weight [n, D], state.<name> [n, width] float32, last_seen [n] and count [n] int32, and
            last_seen_s [n] int64 in a store with a clock.

        Args:
            since_step: only rows that a training step after this one has touched, or that were inserted or imported by
                hand since `mark_base`: what a delta holds. None: all.
        """
        return transfer.export(self.store, self.number, since_step)

    def import_rows(self, fields: Mapping[str, Tensor]) -> None:
        """Write rows as `export` returns them; ids that have a row are overwritten, all others get one.

        State that is left out is initial; rows whose last_seen, count or last_seen_s is left out count as seen now, in the
        step under way, 0 times.
        `clear()` first to replace the content.

        Raises:
            ValueError: ids repeat, a field is unknown or does not fit the table; the text names table, field and shapes.
        """
        transfer.import_rows(self.store, self.number, fields)

    def state(self) -> dict[str, Any]:
        """Return what the table knows beside its rows, JSON-able: t and counters."""
        return transfer.table_state(self.store, self.number)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Set what `state` returned, and take what was loaded for the base of the next delta.

        Load rows first and admission state last: it may continue the log of changes since an earlier base.
        """
        try:
            transfer.load_table_state(self.store, self.number, state)
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"table {self.name!r}: state lacks or garbles {error}; it has {sorted(state)}"
            ) from error

    def admission_state(self) -> dict[str, Tensor]:
        """Return what is known of ids without a row, and the rest of the table that is tensors; {} where there is none.

        Exact: sightings.ids, .counts, .last_seen, .last_seen_s, int64 [k]. CountMin: sketch [depth, width] int64 and
        sketch_total [1]. Default row: default.weight [1, D], default.state.*. With a base: log.removed and log.written,
        the ids a delta needs. Empty tensors are left out.
        """
        return transfer.tensor_state(self.store, self.number)

    def load_admission_state(self, state: Mapping[str, Tensor], *, merge: bool = False) -> None:
        """Set what admission_state returned; merge=True adds counts to those there are (parts of several ranks)."""
        transfer.load_tensor_state(self.store, self.number, state, merge=merge)

    def mark_base(self) -> None:
        """Start a new delta: forget tombstones and hand-made changes so far. Called once a checkpoint is the new base."""
        self.store.logs[self.number].start()

    def tombstones(self) -> Tensor:
        """Return ids evicted or removed since mark_base, ascending int64, each once, even if they have a row again."""
        return transfer.tombstones(self.store, self.number)

    def apply_delta(self, tombstones: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Apply a delta: take the tombstones' rows away, then write the rows. Doing it twice changes nothing more."""
        self.remove(tombstones)
        self.import_rows(rows)

    def snapshot(self, since_step: int | None) -> TableSnapshot:
        """Return this table's part of a snapshot; called by TableSet.snapshot, which protects the stores first."""
        protection = self.store.snapshot
        if protection is None:
            raise ValueError(f"table {self.name!r} has no snapshot under way: call TableSet.snapshot()")
        ids, rows = transfer.changed_rows(self.store, self.number, since_step, ordered=False)
        has_base = self.store.logs[self.number].started
        return TableSnapshot(
            name=self.name,
            ids=ids,
            rows=rows,
            protection=protection,
            store=self.store,
            state=self.state(),
            signature=self.signature(),
            admission=self.admission_state(),
            tombstones=self.tombstones() if has_base else ids[:0],
            slices=self.slices,
        )

    def signature(self) -> dict[str, Any]:
        """Return dim, dtype, optimizer and initializer as JSON-able data, for a manifest."""
        return {
            "dim": self.config.embedding_dim,
            "dtype": self.config.dtype,
            "optimizer": setting_to_json(self.config.optimizer),
            "initializer": setting_to_json(self.config.initializer),
        }

    @property
    def state_widths(self) -> dict[str, int]:
        """Width of each optimizer state vector, in row order."""
        return dict(self.store.layout.state)

    @property
    def default_row(self) -> Tensor:
        """The row that ids without one read, [D] float32, a copy; ValueError where they read zeros."""
        row = self.store.defaults.rows[self.number : self.number + 1]
        if int(row) < 0:
            raise ValueError(
                f"table {self.name!r} has no default row; it needs unadmitted='default_row' in its TableConfig"
            )
        return self.store.blocks.read(row, ("weight",))["weight"][0].float()
