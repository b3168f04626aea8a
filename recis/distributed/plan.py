"""What a rank of W needs: memory and time, the place of each table, and whether it fits, with the arithmetic.

    rows      rows x row bytes of the fullest rank's share, its index, lists and sightings
    dense     parameters: weights, gradients and the optimizer's state, and four flat copies in which gradients travel;
              with parallel.shard_dense 1/W of them, and what is gathered at once
    exchange  what a lookup holds until the step ends: rows and sums of gradients, of its own ids and of those it serves
    program   what the process holds before any of it

Rows when training ends come from `id_statistics`, or the user says how many. Volumes and time are those of a simulated step.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recis.distributed.costs import Costs
from recis.distributed.id_statistics import IdStatistics
from recis.distributed.placement import Placement, Use, place_table
from recis.distributed.shape import ModelShape, TableShape, index_bytes, owners_bytes, sightings_bytes
from recis.distributed.simulate import Simulation
from recis.errors import ConfigError
from recis_kernels.ids_partition import NUM_SLICES

GIGA = 1e9
_FLAT_COPIES = 4
_FLOAT_BYTES = 4
_PAIR_BYTES = 12  # an id and its sightings; packed and unpacked
_SIGMAS = 3  # by which the fullest rank's rows lie above the mean, besides its slices


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of the memory account: bytes of the fullest rank, and the arithmetic."""

    name: str
    num_bytes: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A plan for W ranks.

    Attributes:
        fits: whether the fullest rank stays within the limit; None without one.
        least_world: ranks that would fit, 0 if none would, None if it fits or there is no limit.
    """

    name: str
    world_size: int
    simulation: Simulation
    statistics: Mapping[str, IdStatistics]
    lines_of_memory: tuple[Line, ...]
    placements: tuple[Placement, ...]
    memory_limit: float | None
    least_world: int | None
    notes: tuple[str, ...]

    @property
    def memory_bytes(self) -> int:
        """Bytes of the fullest rank."""
        return sum(line.num_bytes for line in self.lines_of_memory)

    @property
    def fits(self) -> bool | None:
        """Whether it stays within the limit."""
        return None if self.memory_limit is None else self.memory_bytes <= self.memory_limit


def make_plan(
    name: str,
    simulation: Simulation,
    statistics: Mapping[str, IdStatistics],
    *,
    rows: Mapping[str, tuple[int, str]],
    program_bytes: int,
    memory_limit: float | None,
    notes: Sequence[str] = (),
) -> Plan:
    """Return the plan of a simulated recipe.

    Args:
        name: of the recipe.
        simulation: of its sample over W ranks, with costs.
        statistics: of each table by name.
        rows: table -> (rows when training ends, how that came).
        program_bytes: what a process holds before the tables.
        memory_limit: bytes per rank; None = no limit.
        notes: what else to say.

    Raises:
        ConfigError: a limit that is not above 0, rows of a table there is none of, or a simulation without costs.
    """
    if memory_limit is not None and not (memory_limit > 0 and math.isfinite(memory_limit)):
        raise ConfigError(f"--memory-per-rank must be above 0 GB; got {memory_limit / GIGA:g}")
    shape, ranks, costs = simulation.shape, simulation.world_size, simulation.costs
    if costs is None:
        raise ConfigError("a plan needs costs: recis simulate --measure")
    sliced = [*_table_lines(shape, rows, ranks), *_dealt_lines(shape, ranks)]
    fixed = [
        *_dense_lines(shape, ranks),
        *_exchange_lines(simulation),
        Line(
            name="program",
            num_bytes=program_bytes,
            text="this process now: Python, torch, compiled loops, the model's code",
        ),
    ]
    held = sum(line.num_bytes for line in (*sliced, *fixed))
    least = None
    if memory_limit is not None and held > memory_limit:
        room = memory_limit - sum(line.num_bytes for line in fixed)
        least = math.ceil(ranks * sum(line.num_bytes for line in sliced) / room) if room > 0 else 0
    placements = _placements(simulation, rows, costs, None if memory_limit is None else memory_limit - held)
    return Plan(
        name=name,
        world_size=ranks,
        simulation=simulation,
        statistics=statistics,
        lines_of_memory=(*sliced, *fixed),
        placements=placements,
        memory_limit=memory_limit,
        least_world=least,
        notes=tuple(notes),
    )


def fullest_rows(rows: int, world_size: int) -> int:
    """Return the rows of the fullest rank: its slices' share, and three standard deviations of ids that fall at random."""
    mean = rows * -(-NUM_SLICES // world_size) / NUM_SLICES
    spread = _SIGMAS * math.sqrt(mean * (1 - 1 / world_size))
    return min(rows, math.ceil(mean + spread))


def _capped(table: TableShape, rows: int, text: str) -> tuple[int, str]:
    if table.capacity is not None and rows > table.capacity:
        return table.capacity, f"{text}, held to {table.capacity:,} by its capacity"
    return rows, text


def _table_lines(shape: ModelShape, rows: Mapping[str, tuple[int, str]], ranks: int) -> list[Line]:
    found, stores = [], dict.fromkeys((table.store for table in shape.tables), 0)
    for table in shape.tables:
        whole, text = _capped(table, *rows[table.name])
        most = fullest_rows(whole, ranks)
        stores[table.store] += most
        bound = f"; an upper bound: {table.upper_bound}" if table.upper_bound else ""
        how = (
            f"{most:,} rows of the fullest rank x {table.row_text()}"
            if ranks > 1
            else f"{most:,} rows x {table.row_text()}"
        )
        found.append(
            Line(name=f"rows of {table.name!r}", num_bytes=most * table.row_bytes, text=f"{how}; {text}{bound}")
        )
        held = index_bytes(most)
        found.append(
            Line(name=f"index of {table.name!r}", num_bytes=held, text=f"{held // 16:,} slots x 16 B, at most 3/4 full")
        )
        if table.sketch_bytes:
            found.append(
                Line(name=f"sketch of {table.name!r}", num_bytes=table.sketch_bytes, text="whole on every owner")
            )
        elif table.admit_after > 1:  # at worst every id of the data waits, besides those that have rows
            seen = fullest_rows(rows[table.name][0], ranks)
            found.append(
                Line(
                    name=f"sightings of {table.name!r}",
                    num_bytes=sightings_bytes(seen),
                    text=f"{seen:,} ids x 36 B and their index, if none has earned its row",
                )
            )
    held = sum(owners_bytes(count) for count in stores.values())
    found.append(Line(name="who uses each row", num_bytes=held, text=f"4 B x rows, doubling, of {len(stores)} stores"))
    return found


def _dense_lines(shape: ModelShape, ranks: int) -> list[Line]:
    numbers, kept = shape.dense_parameters, shape.optimizer_numbers
    if shape.dense_at_once is not None and ranks > 1:
        return _gathered_lines(shape, shape.dense_at_once)
    own = _FLOAT_BYTES * (2 * numbers + kept)
    return [
        Line(
            name="dense part",
            num_bytes=own,
            text=f"{numbers:,} weights and gradients, {kept:,} of the optimizer, x 4 B",
        ),
        Line(
            name="dense gradients, flat",
            num_bytes=_FLAT_COPIES * numbers * _FLOAT_BYTES,
            text=f"{_FLAT_COPIES} copies x {numbers:,} x 4 B: taken, stacked, received, summed",
        ),
    ]


def _dealt_lines(shape: ModelShape, ranks: int) -> list[Line]:
    """Return what a rank holds of a dense part that is dealt: like rows of tables, the less the more ranks there are."""
    if shape.dense_at_once is None or ranks == 1:
        return []
    numbers, kept = shape.dense_parameters, shape.optimizer_numbers
    return [
        Line(
            name="dense part, dealt",
            num_bytes=_FLOAT_BYTES * -(-(2 * numbers + kept) // ranks),
            text=f"({numbers:,} weights and gradients, {kept:,} of the optimizer) / {ranks:,} ranks x 4 B",
        )
    ]


def _gathered_lines(shape: ModelShape, at_once: int) -> list[Line]:
    """Return what of a dense part that is dealt is whole on a rank while it computes."""
    travelling = min(at_once, shape.dense_parameters)
    grads = shape.dense_parameters if shape.dense_grads_whole else travelling
    return [
        Line(
            name="dense weights, gathered",
            num_bytes=_FLOAT_BYTES * at_once,
            text=f"{at_once:,} x 4 B: what is in no unit, and two units",
        ),
        Line(
            name="dense gradients, whole",
            num_bytes=_FLOAT_BYTES * (grads + travelling),
            text=f"({grads:,} before they are dealt + {travelling:,} on their way) x 4 B",
        ),
    ]


def _exchange_lines(simulation: Simulation) -> list[Line]:
    """Return what the busiest rank's exchanges hold; of one process nothing travels."""
    shape, ranks, found = simulation.shape, simulation.world_size, []
    if ranks == 1:
        return []
    for number, volumes in enumerate(simulation.most_of_lookups):
        dim, tables = shape.dim_of(number), len(shape.tables_of(number))
        asked, served = volumes["asked"], volumes["served"]
        row = _FLOAT_BYTES * dim
        narrow = sum(item * dim for item in (shape.row_item(number), shape.rows_item) if item != _FLOAT_BYTES)
        kept = (asked + served) * 2 * row  # rows and the sums of their gradients
        room, travel = kept // 4, (asked + served) * narrow
        ids, counts = 2 * _PAIR_BYTES * (asked + served), 2 * 8 * tables * ranks
        found.append(
            Line(
                name=f"exchange of lookup {number}",
                num_bytes=kept + room + travel + ids + counts,
                text=(
                    f"({asked:,} ids asked + {served:,} served to others) x 2 x {row} B (row, gradient) + a quarter spare"
                    f"{f' + {travel:,} B as they travel' if travel else ''} + ids {ids:,} B + numbers 2 x {ranks:,} x {tables} "
                    f"x 8 = {counts:,} B"
                ),
            )
        )
    return found


def _placements(
    simulation: Simulation, rows: Mapping[str, tuple[int, str]], costs: Costs, spare: float | None
) -> tuple[Placement, ...]:
    shape, ranks, found = simulation.shape, simulation.world_size, []
    for number, table in enumerate(shape.tables):
        lookups = [k for k, names in enumerate(shape.lookups) if number in {shape.features[name] for name in names}]
        whole, _ = _capped(table, *rows[table.name])
        use = Use(
            rows=whole,
            asked=simulation.asked_per_table[number],
            tables_beside=len({shape.features[f] for f in shape.lookups[lookups[0]]}),
            travel_item=shape.row_item(lookups[0]),
        )
        share = fullest_rows(whole, ranks) / max(1, whole)
        own = share * whole * table.row_bytes
        free = None if spare is None else spare + own
        found.append(place_table(table, use, world_size=ranks, share=share, costs=costs, free_bytes=free))
    return tuple(found)


# ---- what is printed


def lines(plan: Plan) -> Iterator[str]:
    """Yield a plan as lines of text."""
    result = plan.simulation
    yield f"{plan.name} on {plan.world_size:,} ranks, {result.batch:,} samples per rank and step"
    yield "ids in the sample:"
    for table, seen in plan.statistics.items():
        skew = "too few to tell their skew" if math.isnan(seen.zipf) else f"counts ~ rank^-{seen.zipf:.2f}"
        yield (
            f"  table {table!r}: {seen.positions:,} ids in {seen.samples:,} samples, {seen.distinct:,} distinct, {skew}, "
            f"the most frequent one {seen.most:.1%}"
        )
    yield (
        f"per rank and step: {result.positions:,.1f} ids, {result.asked:,.1f} distinct; sent "
        f"{result.plain.link_bytes.mean:,.0f} B (most {result.plain.link_bytes.most:,.0f} B)"
    )
    yield "memory of the fullest rank:"
    for line in plan.lines_of_memory:
        yield f"  {line.name:<28}{_size(line.num_bytes):>12}   {line.text}"
    yield f"  {'in all':<28}{_size(plan.memory_bytes):>12}"
    yield "time of a step, slowest rank of each phase:"
    for name, (seconds, mean, _) in result.plain.phases.items():
        moved = f"{mean:,.0f} B sent" if mean else ""
        yield f"  {name:<28}{seconds * 1e3:>9,.3f} ms   {moved}"
    if result.plain.hidden_s:
        yield f"  {'beside the dense part':<28}{-result.plain.hidden_s * 1e3:>9,.3f} ms   numbers and ids of the next step"
    assert result.plain.step_s is not None
    assert result.costs is not None
    samples = plan.world_size * result.batch / result.plain.step_s
    yield f"  {'step':<28}{result.plain.step_s * 1e3:>9,.3f} ms   {samples:,.0f} samples/s"
    yield f"  {result.costs.describe()}"
    yield "placement, by exchange per step and memory of the fullest rank:"
    for placement in plan.placements:
        yield from placement.lines()
    for note in plan.notes:
        yield f"note: {note}"
    yield _verdict(plan)


def _verdict(plan: Plan) -> str:
    if plan.memory_limit is None:
        return "no limit given: --memory-per-rank GB says whether it fits"
    held, limit = plan.memory_bytes, plan.memory_limit
    if plan.fits:
        return f"fits: {_size(held)} of {_size(limit)} per rank"
    largest = max(plan.lines_of_memory, key=lambda line: line.num_bytes)
    if plan.least_world == 0:
        way_out = "what every rank holds alone is more: no number of ranks helps"
    else:
        way_out = f"about {plan.least_world:,} ranks would fit it"
    return (
        f"REFUSED: {_size(held)} per rank is {_size(held - limit)} more than {_size(limit)}; the largest part is "
        f"{largest.name}, {_size(largest.num_bytes)}; {way_out}; or max_rows, eviction, dtype='bfloat16', a smaller batch"
    )


def _size(num_bytes: float) -> str:
    if num_bytes >= GIGA:
        return f"{num_bytes / GIGA:,.2f} GB"
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:,.1f} kB"


def metrics(plan: Plan) -> dict[str, float]:
    """Return the figures of a plan, flat."""
    result = plan.simulation
    assert result.plain.step_s is not None
    found: dict[str, float] = {
        "world_size": plan.world_size,
        "memory_bytes": plan.memory_bytes,
        "step_s": result.plain.step_s,
        "sent_bytes_mean": result.plain.link_bytes.mean,
        "asked_mean": result.asked,
        "ids_mean": result.positions,
    }
    if plan.memory_limit is not None:
        found |= {"memory_limit_bytes": plan.memory_limit, "fits": float(bool(plan.fits))}
    return found


def to_json(plan: Plan) -> dict[str, Any]:
    """Return the account, line by line, and the placements."""
    return {
        "memory": [
            {"name": line.name, "bytes": line.num_bytes, "arithmetic": line.text} for line in plan.lines_of_memory
        ],
        "placements": {
            one.table: {
                "proposed": one.proposed.name,
                "setting": one.setting,
                "places": {
                    place.name: {"seconds": place.seconds, "bytes": place.memory_bytes, "arithmetic": place.text}
                    for place in one.places
                },
            }
            for one in plan.placements
        },
        "notes": list(plan.notes),
        "verdict": _verdict(plan),
    }
