"""Where a table could lie, what each place costs, and which one is proposed.

    sliced          every rank owns a slice of the ids; ids, rows and gradients of a lookup are exchanged
    table-wise      one rank owns the whole table and serves all ranks
    data-parallel   owners by slice, and every rank has copies of all rows: gradients to the owners, new rows to everyone

Compared are microseconds of exchange per step at the busiest rank, and bytes of memory at the fullest. Proposed is the
quickest that fits; a table stays sliced unless another place saves a tenth. `parallel.places` of a run sets it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from recis.distributed.costs import Costs
from recis.distributed.shape import TableShape

SLICED, TABLE_WISE, DATA_PARALLEL = "sliced", "table-wise", "data-parallel"
_SETTINGS = {TABLE_WISE: "table_wise", DATA_PARALLEL: "data_parallel"}
_WORTH = 0.9  # of the time of the sliced table, at most
_COLLECTIVES = 4  # of a lookup: numbers, ids, rows, gradients
_ID_BYTES = 12  # an id and its sightings
_COPY_COLLECTIVES = 2  # of a step: gradients of copies, their new rows
_FLOAT_BYTES = 4
_SIGHTINGS_BYTES = 4
_COPY_ROOM = 3  # rows that a copy takes: itself, and its sums on their way out and in


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """How a table is used in a step.

    Attributes:
        rows: of all ranks together when training ends.
        asked: distinct ids that a rank asks for.
        tables_beside: tables of its lookup, itself included, which share the messages of an exchange.
        travel_item: bytes of a number of a row on its way.
    """

    rows: int
    asked: float
    tables_beside: int
    travel_item: int


@dataclass(frozen=True, slots=True)
class Place:
    """One way to place a table: its name, seconds of exchange per step, bytes of the fullest rank, and how that came."""

    name: str
    seconds: float
    memory_bytes: int
    text: str


@dataclass(frozen=True, slots=True)
class Placement:
    """The places compared, and the one proposed."""

    table: str
    places: tuple[Place, ...]
    proposed: Place

    @property
    def setting(self) -> str | None:
        """What `--set` takes to place the table so; None: nothing, it is what a run does."""
        name = _SETTINGS.get(self.proposed.name)
        return None if name is None else f"parallel.places.{name}={self.table}"

    def lines(self) -> Iterator[str]:
        """Yield the comparison."""
        note = "" if self.setting is None else f" (--set {self.setting})"
        yield f"  table {self.table!r}: {self.proposed.name}{note}"
        for place in self.places:
            yield (
                f"    {place.name:<14}{place.seconds * 1e6:>12,.1f} us  {place.memory_bytes / 1e6:>12,.1f} MB   {place.text}"
            )


def place_table(
    table: TableShape,
    use: Use,
    *,
    world_size: int,
    share: float,
    costs: Costs,
    free_bytes: float | None,
) -> Placement:
    """Return where a table could lie.

    Args:
        table: its shape.
        use: its rows and what a step asks of it.
        world_size: W.
        share: rows of the fullest rank over all rows, when sliced.
        costs: of the link.
        free_bytes: memory of a rank beside everything but this table; None: no limit.
    """
    others = world_size - 1
    per_byte = 1 / (costs.link.gb_per_s * 1e9)
    pair = _ID_BYTES + 2 * table.dim * use.travel_item
    messages_s = _COLLECTIVES * others * costs.link.latency_s / use.tables_beside
    whole = use.rows * table.row_bytes

    away = others / world_size
    sliced_bytes = away * use.asked * pair
    sliced = Place(
        SLICED,
        messages_s + sliced_bytes * per_byte,
        int(share * whole),
        f"{use.asked:,.0f} ids asked x {away:.3f} away x {pair} B = {sliced_bytes:,.0f} B"
        f" + {_COLLECTIVES} x {others} messages / {use.tables_beside} tables",
    )
    served = others * use.asked * pair
    table_wise = Place(
        TABLE_WISE,
        messages_s + served * per_byte,
        whole,
        f"{others} ranks x {use.asked:,.0f} ids x {pair} B = {served:,.0f} B at its owner, which holds all rows",
    )
    copy = 2 * table.dim * use.travel_item + _SIGHTINGS_BYTES
    copied = away * use.rows * copy
    parallel = Place(
        DATA_PARALLEL,
        copied * per_byte + _COPY_COLLECTIVES * others * costs.link.latency_s / use.tables_beside,
        int(share * whole + _COPY_ROOM * use.rows * table.dim * _FLOAT_BYTES),
        f"{away:.3f} x {use.rows:,} rows x {copy} B = {copied:,.0f} B + {_COPY_COLLECTIVES} x {others} messages / "
        f"{use.tables_beside} tables; copies and room for their sums beside the owner's rows",
    )
    places = (sliced, table_wise, parallel)
    if world_size == 1:
        return Placement(table.name, places, sliced)
    fitting = [one for one in (table_wise, parallel) if free_bytes is None or one.memory_bytes <= free_bytes]
    best = min(fitting, key=lambda one: one.seconds, default=sliced)
    return Placement(table.name, places, best if best.seconds < _WORTH * sliced.seconds else sliced)
