"""What a model looks like to its ranks: tables, which features are looked up together, and bytes of a row.

    ModelShape.lookups[l] = features of one lookup: those of one collection whose tables share a store
    one lookup of a step = one exchange of ids, of rows and of gradients

A shape is small and made of plain values, so that a recorded trace carries it along.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from recis.embedding.admission import AfterSightings, CountMin, WithProbability
from recis.embedding.config import TableConfig
from recis.embedding.eviction import CAPACITY_POLICIES, ByScore, LfuCapacity, LruCapacity, TtlSeconds
from recis.embedding.row_owners import RowOwners
from recis.errors import ConfigError
from recis_kernels.hash_probe import GROUP_SLOTS, SLOT_BYTES
from recis_kernels.row_blocks import RowLayout

_GROW_LOAD = 0.75  # of the hash index between steps
_TIMED = ("dense_s", "trainer_s", "features_s")
_SIGHTING_BYTES = 4 * 8 + 4  # id, count, last_seen, last_seen_s; owner
_FEWEST_OWNERS = RowOwners().owner.numel()


@dataclass(frozen=True, slots=True, kw_only=True)
class TableShape:
    """One table, as far as bytes and volumes go.

    Attributes:
        name: of the table.  dim, dtype, state, clock: as RowLayout takes them.  store: tables of one number share a store.
        admit_after: sightings before an id earns a row.
        capacity: most rows of all ranks together; None = no limit.
        sketch_bytes: of a CountMin, which every owner keeps whole; 0 with counts per id.
        upper_bound: why rows of this table are an upper bound ("" where they are not): a rule that is not replayed.
    """

    name: str
    dim: int
    dtype: str = "float32"
    state: tuple[tuple[str, int], ...] = ()
    clock: bool = False
    store: int = 0
    admit_after: int = 1
    capacity: int | None = None
    sketch_bytes: int = 0
    upper_bound: str = ""

    @property
    def layout(self) -> RowLayout:
        """Layout of a row."""
        return RowLayout(self.dim, getattr(torch, self.dtype), self.state, self.clock)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row: weights, optimizer state, id, counters, padding."""
        return self.layout.row_bytes

    def row_text(self) -> str:
        """Return where the bytes of a row come from, in words."""
        item = 2 if self.dtype == "bfloat16" else 4
        counters = 12 if self.clock else 8
        used = self.dim * item + 4 * self.layout.state_width + 8 + counters
        return (
            f"{self.dim} x {item} weights + {4 * self.layout.state_width} state + 8 id + {counters} counters + "
            f"{self.row_bytes - used} padding = {self.row_bytes} B"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Tables, lookups and the dense part of a model.

    Attributes:
        tables: in order; other places refer to them by number.
        features: feature -> number of its table.
        lookups: names of the features of each lookup, every feature in at least one.
        rows_item: bytes of a number of a row or gradient on its way between ranks.
        dense_parameters: trainable numbers of the dense part.
        optimizer_numbers: numbers that the dense optimizer keeps.
        dense_s: seconds of the dense part's forward, loss, backward and update: (fixed, per sample); zeros = not known.
        trainer_s: of what a trainer's step does besides: weights, seeds, metrics, gradients taken and put back; likewise.
        features_s: of making a Batch of the columns read; likewise.
        small_gathers: messages of a few numbers that a step gathers: weights, losses, and whether a hook stops the run.
        batch_size: samples of a step in the recipe; None = not known.
        overlap: whether the next step's ids travel while the dense part computes.
        dense_at_once: dense numbers that a rank gathers at most, where each keeps 1/W of them (`parallel.shard_dense`);
            None: every rank has all of them.
        dense_grads_whole: whether it then collects the gradients of several micro-batches whole, before they are dealt.
    """

    tables: tuple[TableShape, ...]
    features: Mapping[str, int]
    lookups: tuple[tuple[str, ...], ...]
    rows_item: int = 4
    dense_parameters: int = 0
    optimizer_numbers: int = 0
    dense_s: tuple[float, float] = (0.0, 0.0)
    trainer_s: tuple[float, float] = (0.0, 0.0)
    features_s: tuple[float, float] = (0.0, 0.0)
    small_gathers: int = 2
    batch_size: int | None = None
    overlap: bool = True
    dense_at_once: int | None = None
    dense_grads_whole: bool = False

    def table_of(self, feature: str) -> TableShape:
        """Return the table of a feature."""
        return self.tables[self.features[feature]]

    def dim_of(self, lookup: int) -> int:
        """Return the row width of a lookup; all of its tables have the same."""
        return self.table_of(self.lookups[lookup][0]).dim

    def tables_of(self, lookup: int) -> tuple[int, ...]:
        """Return the numbers of all tables of a lookup's store: the exchange counts pairs of each."""
        store = self.table_of(self.lookups[lookup][0]).store
        return tuple(number for number, table in enumerate(self.tables) if table.store == store)

    def row_item(self, lookup: int) -> int:
        """Return bytes of a number of a row on its way; rows of bfloat16 travel as such."""
        return 2 if self.table_of(self.lookups[lookup][0]).dtype == "bfloat16" else self.rows_item

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def shape_from_json(value: Mapping[str, Any]) -> ModelShape:
    """Return what `ModelShape.to_json` wrote.

    Raises:
        ConfigError: something is missing or unknown.
    """
    try:
        tables = tuple(
            TableShape(**{**table, "state": tuple((name, width) for name, width in table["state"])})
            for table in value["tables"]
        )
        lookups = tuple(tuple(lookup) for lookup in value["lookups"])
        rest = {key: one for key, one in value.items() if key not in ("tables", "lookups", *_TIMED)}
        timed: dict[str, Any] = {name: _seconds(value[name]) for name in _TIMED if name == "dense_s" or name in value}
        return ModelShape(tables=tables, lookups=lookups, **timed, **rest)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the trace's note of its tables cannot be read ({error!r}): written by another release; record it again"
        ) from error


def _seconds(value: Sequence[Any]) -> tuple[float, float]:
    fixed, per_sample = value
    return float(fixed), float(per_sample)


def table_shape(config: TableConfig, *, store: int = 0) -> TableShape:
    """Return the shape of a configured table."""
    admit_after, sketch_bytes, unknown = 1, 0, []
    if isinstance(config.admission, AfterSightings):
        admit_after = config.admission.n
        counter = config.admission.counter
        if isinstance(counter, CountMin):
            sketch_bytes = 8 * counter.width * counter.depth
    elif isinstance(config.admission, WithProbability):
        unknown.append("WithProbability admits each id here")
    capacities = [] if config.max_rows is None else [config.max_rows]
    capacities += [rule.rows for rule in config.eviction if isinstance(rule, LruCapacity | LfuCapacity | ByScore)]
    if any(not isinstance(policy, CAPACITY_POLICIES) for policy in config.eviction):
        unknown.append("rows that time or norm would evict stay here")
    return TableShape(
        name=config.name,
        dim=config.embedding_dim,
        dtype=config.dtype,
        state=tuple(config.optimizer.state_spec(config.embedding_dim)),
        clock=any(isinstance(policy, TtlSeconds) for policy in config.eviction),
        store=store,
        admit_after=admit_after,
        capacity=min(capacities, default=None),
        sketch_bytes=sketch_bytes,
        upper_bound="; ".join(unknown),
    )


def plain_shape(features: Sequence[str], *, dim: int) -> ModelShape:
    """Return the shape of a trace that says nothing of tables: one per feature, of row-wise Adagrad, all in one store."""
    tables = tuple(table_shape(TableConfig(name=name, features=(name,), embedding_dim=dim)) for name in features)
    return ModelShape(
        tables=tables, features={name: number for number, name in enumerate(features)}, lookups=(tuple(features),)
    )


def index_bytes(num_rows: int) -> int:
    """Return bytes of a hash index of one table with num_rows ids: slots double above load 0.75."""
    if num_rows == 0:
        return 0
    slots = GROUP_SLOTS
    while num_rows > _GROW_LOAD * slots:
        slots *= 2
    return slots * SLOT_BYTES


def owners_bytes(num_rows: int) -> int:
    """Return most bytes of the list of who uses each row of a store: 4 per row, doubling."""
    return 4 * max(_FEWEST_OWNERS, 1 << max(0, num_rows - 1).bit_length())


def sightings_bytes(num_ids: int) -> int:
    """Return bytes of exact counts of num_ids ids of one table that have no row."""
    return index_bytes(num_ids) + _SIGHTING_BYTES * num_ids
