"""All tables of a model: grouped into row stores by signature, and stepped together.

Several collections may be built on one TableSet; their features then share its tables, and a step ends once for all.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recis.embedding.config import Feature, TableConfig
from recis.embedding.rows import RowStore
from recis.embedding.snapshot import StoreSnapshot, TableSnapshot
from recis.embedding.step_clock import StepClock
from recis.embedding.table import HashTable
from recis.errors import ConfigError, nearest


class TableSet:
    """Tables by name.

    Args:
        tables: their configs; names differ, and each feature belongs to one table.
        seed: of all random draws, together with the table's name.
        device: where rows lie.
        deterministic: new ids take rows in ascending order, and gradients of a row are added in one fixed order.
        clock: seconds since the epoch, for TtlSeconds; None: the system's clock.
        on_evict: called as on_evict(table name, ids ascending) after each eviction.
        block_rows: rows per block of memory, a power of two; None: about 32 MiB.

    Attributes:
        tables: name -> HashTable, in the order given.
        stores: the RowStores behind them.
        features: feature name -> (Feature, HashTable).
        seed, deterministic: as given.

    Raises:
        ConfigError: a table or feature name repeats, or two configs of one name have different signatures.
    """

    def __init__(
        self,
        tables: Sequence[TableConfig],
        *,
        seed: int,
        device: torch.device | str = "cpu",
        deterministic: bool = True,
        clock: Callable[[], float] | None = None,
        on_evict: Callable[[str, Tensor], None] | None = None,
        block_rows: int | None = None,
    ) -> None:
        _check_names(tables)
        if block_rows is not None and (block_rows < 1 or block_rows & (block_rows - 1)):
            raise ConfigError(f"block_rows must be a power of two; got {block_rows}")
        self.seed = seed
        self.deterministic = deterministic
        self.device = torch.device(device)
        self.clock = StepClock(clock)
        groups: dict[tuple[object, ...], list[TableConfig]] = {}
        for config in tables:
            groups.setdefault(config.store_key, []).append(config)
        self.stores = [
            RowStore(
                configs,
                seed=seed,
                device=device,
                deterministic=deterministic,
                block_shift=None if block_rows is None else block_rows.bit_length() - 1,
                clock=self.clock,
                on_evict=on_evict,
            )
            for configs in groups.values()
        ]
        found = {
            config.name: HashTable(store, number)
            for store in self.stores
            for number, config in enumerate(store.configs)
        }
        self.tables: dict[str, HashTable] = {config.name: found[config.name] for config in tables}
        self.features: dict[str, tuple[Feature, HashTable]] = {
            feature.name: (feature, table) for table in self.tables.values() for feature in table.config.feature_list()
        }

    def __repr__(self) -> str:
        return f"TableSet({len(self.tables)} tables in {len(self.stores)} stores, seed {self.seed})"

    def __getitem__(self, name: str) -> HashTable:
        """Return a table by name; KeyError suggests near ones."""
        if name not in self.tables:
            raise KeyError(f"no table {name!r}; {nearest(name, self.tables)}")
        return self.tables[name]

    def __iter__(self) -> Iterator[HashTable]:
        return iter(self.tables.values())

    def __len__(self) -> int:
        return len(self.tables)

    @property
    def step(self) -> int:
        """The last step that ended; 0 before the first."""
        return max((store.step for store in self.stores), default=1) - 1

    def end_step(self, step: int) -> None:
        """End optimizer step `step`: metadata, counters, sightings, then eviction, for all tables.

        Several collections on one set may each call it: after the first call for a step the others find nothing to do.

        Raises:
            ValueError: gradients wait that no update has applied, or the step is not the one under way (see RowStore).
        """
        for store in self.stores:
            if not store.has_ended(step):
                store.end_step(step)

    def load_step(self, step: int) -> None:
        """Set the last step that ended, as a resumed run does after loading its tables.

        Raises:
            ValueError: lookups of a step under way would be lost.
        """
        for store in self.stores:
            store.require_boundary("loading a step")
            store.step = step + 1

    def set_deterministic(self, enabled: bool) -> None:
        """Choose whether new ids take rows in ascending order, from the next lookup on; a Trainer sets what its config says."""
        self.deterministic = enabled
        for store in self.stores:
            store.deterministic = enabled

    def snapshot(self, *, memory_mib: int = 1024, since_step: int | None = None) -> dict[str, TableSnapshot]:
        """Freeze all tables as they are at this boundary, by name; training may go on while a thread reads them.

        Args:
            memory_mib: most memory for copies of rows that training changes meanwhile, shared by the stores by size.
            since_step: only rows changed since that base, as in HashTable.export.

        Raises:
            ValueError: a snapshot is open, or a step is under way.
        """
        for store in self.stores:
            if store.snapshot is not None:
                raise ValueError(
                    "a snapshot of these tables is still open: wait for its writer, one save runs at a time"
                )
            store.require_boundary("a snapshot")
        total = sum(store.num_bytes for store in self.stores)
        for store in self.stores:
            share = memory_mib if total == 0 else -(-memory_mib * store.num_bytes // total)
            store.snapshot = StoreSnapshot(store, memory_mib=max(1, share))
        return {name: table.snapshot(since_step) for name, table in self.tables.items()}

    def state(self) -> dict[str, Any]:
        """Return the last step that ended and the clock's log, JSON-able."""
        return {"step": self.step, "clock": self.clock.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Set what `state` returned."""
        self.clock.load(state["clock"])
        self.load_step(int(state["step"]))


def _check_names(tables: Sequence[TableConfig]) -> None:
    by_name: dict[str, TableConfig] = {}
    for config in tables:
        other = by_name.get(config.name)
        if other is not None and other.store_key != config.store_key:
            raise ConfigError(f"table {config.name!r} is given twice, with different signatures: {other} and {config}")
        if other is not None:
            raise ConfigError(f"table {config.name!r} is given twice; name all its features in one TableConfig")
        by_name[config.name] = config
    owners: dict[str, str] = {}
    for name, feature in ((config.name, feature) for config in tables for feature in config.feature_list()):
        other_name = owners.setdefault(feature.name, name)
        if other_name != name:
            raise ConfigError(
                f"feature {feature.name!r} is in tables {other_name!r} and {name!r}; a feature has one table per "
                "TableSet: look it up in the second by a collection of its own, or give it two names"
            )
