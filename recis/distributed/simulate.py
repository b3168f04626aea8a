"""Replay a trace over up to 4096 ranks that do not exist: load balance, bytes, memory and the time of a step.

    trace --Replay--> volumes per rank --phases_of_step--> seconds per rank;  means over all steps but the first

The first step makes nearly all rows and chooses the hot ids, so it counts in the growth of memory alone (unless it is the
only one). What the estimate leaves out: reading, logs, evaluation and checkpoints, waiting for a slow machine; its error
against real runs is measured by `benchmarks/simulate_error.py`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from recis.distributed.costs import OPS, Costs, LinkCost, OpCost
from recis.distributed.replay import VOLUMES, Replay, ReplayedStep, Volumes
from recis.distributed.shape import ModelShape
from recis.distributed.step_time import Phase, hidden_s, phases_of_step
from recis.distributed.trace import Trace
from recis.errors import ConfigError

KILO, MEGA = 1e3, 1e6


@dataclass(frozen=True, slots=True)
class Balance:
    """Something per rank: mean, most, and the most over the mean."""

    mean: float
    most: float

    @property
    def ratio(self) -> float:
        """Most over mean; 1 where there is nothing."""
        return self.most / self.mean if self.mean else 1.0


@dataclass(frozen=True, slots=True)
class Growth:
    """After a step: rows of all ranks, bytes of tables of the fullest rank and of the mean one."""

    step: int
    rows: int
    most_bytes: int
    mean_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """Means over steps, without or with copies of hot ids.

    Attributes:
        balance: name -> Balance, per rank and step.
        phases: phase -> (seconds, bytes that a rank sends: mean, most), in order.
        link_bytes: per rank and step, sent, all phases: Balance.
        hidden_s: seconds of the phases that pass while another computes.
        step_s: seconds of a step, without these; None without costs.
    """

    balance: Mapping[str, Balance]
    phases: Mapping[str, tuple[float, float, float]]
    link_bytes: Balance
    hidden_s: float
    step_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What a replay found. `lines` shows it; `metrics` is flat, for --json.

    Attributes:
        batch: samples of a rank in a step.
        num_steps, counted_steps: replayed, and those that the means are over.
        plain, hot: without and with copies of hot ids.
        hot_per_table: int64 [T].
        rows: int64 [T, W], under the tables' capacities, at the end.
        growth: after each step.
        parts_of_bytes: of the fullest rank at the end.
        positions, asked: ids and distinct ids of a rank in a step.
        asked_per_table: distinct ids of each table that a rank asks for in a step.
        most_of_lookups: of each lookup, name of a volume -> the most that a rank had in a counted step; "served": pairs
            that other ranks asked it for.
    """

    shape: ModelShape
    world_size: int
    batch: int
    num_steps: int
    counted_steps: int
    plain: Side
    hot: Side | None
    hot_per_table: np.ndarray
    rows: np.ndarray
    growth: tuple[Growth, ...]
    parts_of_bytes: Mapping[str, int]
    positions: float
    asked: float
    asked_per_table: tuple[float, ...]
    most_of_lookups: tuple[Mapping[str, int], ...]
    costs: Costs | None


def simulate(
    trace: Trace,
    *,
    world_size: int,
    batch: int | None = None,
    hot_ids: int = 0,
    max_steps: int | None = None,
    costs: Costs | None = None,
    cores: int | None = None,
    skip_steps: int = 1,
) -> Simulation:
    """Replay a trace.

    Args:
        trace: its ids and tables.
        world_size: ranks, 1 to 4096.
        batch: samples of a rank in a step; None: the batch size that the trace notes, else 256.
        hot_ids: pairs that every rank keeps a copy of.
        max_steps: steps to replay; None: all the trace has.
        costs: of ops and link; None gives no times.
        cores: that all ranks share; None: each has its own.
        skip_steps: steps at the beginning that the means leave out; fewer where the trace has no more.

    Raises:
        ConfigError: a number out of range, fewer samples than one step takes, hot ids with one step.
    """
    batch = (trace.shape.batch_size or 256) if batch is None else batch
    for name, value in (("--batch", batch), ("--steps", max_steps), ("--cores", cores)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1; got {value}")
    replay = Replay(trace.shape, world_size, hot_ids=hot_ids)
    num_samples = batch * world_size
    if trace.num_samples < num_samples:
        raise ConfigError(
            f"{trace.path}: {trace.num_samples:,} samples are less than one step of {world_size:,} ranks x {batch:,} "
            f"samples; give --batch {max(1, trace.num_samples // world_size)} or less, fewer ranks, or a longer trace"
        )
    whole_steps = trace.num_samples // num_samples
    num_steps = whole_steps if max_steps is None else min(whole_steps, max_steps)
    if hot_ids and num_steps < 2:
        raise ConfigError(
            f"--hot-ids {hot_ids} are chosen in the first step and copied from the second on; the trace has one step of "
            f"{num_samples:,} samples: lower --batch or give a longer trace"
        )
    sums = {"plain": _Sums(trace.shape, batch, costs, cores), "hot": _Sums(trace.shape, batch, costs, cores)}
    growth: list[Growth] = []
    asked = np.zeros(len(trace.shape.tables), np.int64)
    most_of: list[dict[str, int]] = [{} for _ in trace.shape.lookups]
    for number, ids in enumerate(trace.steps(num_samples), start=1):
        step = replay.step(ids)
        growth.append(_growth(number, replay))
        if number > min(skip_steps, num_steps - 1):
            _add(sums, step, replay.hot_per_table)
            asked += step.asked_per_table
            for found, one in zip(most_of, step.plain, strict=True):
                for name in VOLUMES:
                    found[name] = max(found.get(name, 0), int(getattr(one, name).max()))
                found["served"] = max(found.get("served", 0), int((one.received - one.own).max()))
        if number == num_steps:
            break
    rows = replay.capped_rows()
    plain = sums["plain"].side(rows)
    return Simulation(
        shape=trace.shape,
        world_size=world_size,
        batch=batch,
        num_steps=num_steps,
        counted_steps=sums["plain"].count,
        plain=plain,
        hot=sums["hot"].side(rows) if hot_ids else None,
        hot_per_table=replay.hot_per_table,
        rows=rows,
        growth=tuple(growth),
        parts_of_bytes=_fullest(replay),
        positions=plain.balance["ids looked up"].mean,
        asked=plain.balance["distinct ids asked for"].mean,
        asked_per_table=tuple((asked / (world_size * sums["plain"].count)).tolist()),
        most_of_lookups=tuple(most_of),
        costs=costs,
    )


def _add(sums: Mapping[str, "_Sums"], step: ReplayedStep, hot_per_table: np.ndarray) -> None:
    sums["plain"].add(step.plain, None)
    if step.hot is not None:
        sums["hot"].add(step.hot, hot_per_table)


def _growth(number: int, replay: Replay) -> Growth:
    held = replay.table_bytes()
    return Growth(number, int(replay.capped_rows().sum()), int(held.max()), float(held.mean()))


def _fullest(replay: Replay) -> dict[str, int]:
    rank = int(replay.table_bytes().argmax())
    return {name: int(held[rank]) for name, held in replay.parts_of_bytes().items()}


class _Sums:
    """Adds up steps of one side."""

    def __init__(self, shape: ModelShape, batch: int, costs: Costs | None, cores: int | None) -> None:
        self._shape, self._batch, self._costs, self._cores = shape, batch, costs, cores
        self._volumes: dict[str, np.ndarray] = {}
        self._sent: dict[str, np.ndarray] = {}
        self._seconds: dict[str, float] = {}
        self._most: dict[str, float] = {}
        self.count = 0

    def add(self, volumes: tuple[Volumes, ...], hot_per_table: np.ndarray | None) -> None:
        """Add one step."""
        self.count += 1
        for name in ("positions", "asked", "received", "local"):
            total = np.sum([getattr(one, name) for one in volumes], axis=0)
            self._volumes[name] = self._volumes.get(name, 0) + total
            self._most[name] = self._most.get(name, 0.0) + float(np.max(total))
        costs = self._costs if self._costs is not None else _FREE
        for phase in phases_of_step(self._shape, volumes, costs, batch=self._batch, hot_per_table=hot_per_table):
            self._add_phase(phase)

    def _add_phase(self, phase: Phase) -> None:
        self._sent[phase.name] = self._sent.get(phase.name, 0) + phase.sent
        self._seconds[phase.name] = self._seconds.get(phase.name, 0.0) + phase.wall_s(self._cores)

    def side(self, rows: np.ndarray) -> Side:
        """Return the means."""
        count = max(1, self.count)
        link = sum(self._sent.values()) / count
        labels = {
            "positions": "ids looked up",
            "asked": "distinct ids asked for",
            "received": "ids served as owner",
            "local": "ids served from copies",
        }
        balance = {"rows": Balance(float(rows.sum(0).mean()), float(rows.sum(0).max()))}
        for name, label in labels.items():
            balance[label] = Balance(float(self._volumes[name].mean()) / count, self._most[name] / count)
        phases = {
            name: (self._seconds[name] / count, float(sent.mean()) / count, float(sent.max()) / count)
            for name, sent in self._sent.items()
        }
        hidden = hidden_s(self._shape, {name: seconds / count for name, seconds in self._seconds.items()})
        step_s = sum(self._seconds.values()) / count - hidden if self._costs is not None else None
        return Side(
            balance=balance,
            phases=phases,
            link_bytes=Balance(float(np.mean(link)), float(np.max(link))),
            hidden_s=hidden,
            step_s=step_s,
        )


def _no_costs() -> Costs:
    return Costs(
        machine="",
        measured_at="",
        threads=1,
        load_average=(0.0, 0.0),
        copy_gb_per_s=1.0,
        roofline_at="",
        ops=dict.fromkeys(OPS, OpCost()),
        link=LinkCost(latency_s=0.0, gather_latency_s=0.0, gb_per_s=1.0, between=""),
    )


_FREE = _no_costs()  # volumes without times


# ---- what is printed


def metrics(result: Simulation) -> dict[str, float]:
    """Return the figures of a simulation, flat."""
    found: dict[str, float] = {
        "world_size": result.world_size,
        "batch": result.batch,
        "steps": result.num_steps,
        "steps_counted": result.counted_steps,
        "rows_in_all": int(result.rows.sum()),
        "table_bytes_most": result.growth[-1].most_bytes,
        "table_bytes_mean": result.growth[-1].mean_bytes,
    }
    sides = {"": result.plain} if result.hot is None else {"": result.plain, "hot_": result.hot}
    for prefix, side in sides.items():
        for name, balance in side.balance.items():
            found[f"{prefix}{_snake(name)}_mean"] = balance.mean
            found[f"{prefix}{_snake(name)}_max_over_mean"] = balance.ratio
        found[f"{prefix}sent_bytes_mean"] = side.link_bytes.mean
        found[f"{prefix}sent_bytes_max_over_mean"] = side.link_bytes.ratio
        for name, (seconds, mean, _) in side.phases.items():
            found[f"{prefix}{_snake(name)}_sent_bytes"] = mean
            if side.step_s is not None:
                found[f"{prefix}{_snake(name)}_s"] = seconds
        if side.step_s is not None:
            found[f"{prefix}hidden_s"] = side.hidden_s
            found[f"{prefix}step_s"] = side.step_s
    if result.hot is not None:
        found["hot_pairs"] = int(result.hot_per_table.sum())
    return found


def _snake(name: str) -> str:
    return name.replace(" ", "_")


def lines(result: Simulation) -> Iterator[str]:
    """Yield a simulation as lines of text."""
    ranks, batch = result.world_size, result.batch
    yield f"{ranks:,} ranks x {batch:,} samples = {ranks * batch:,} per step; {result.num_steps:,} steps replayed"
    if result.counted_steps < result.num_steps:
        yield f"per rank and step, means over the last {result.counted_steps:,}:"
    else:
        yield "per rank, in the one step there is (it makes all rows, so inserts weigh more than in later steps):"
    for side, title in ((result.plain, ""), (result.hot, f"with copies of {result.hot_per_table.sum():,} hot ids:")):
        if side is not None:
            if title:
                yield title
            yield from _side_lines(side)
    yield from _memory_lines(result)
    if result.costs is None:
        yield "no times: give --costs, or measure this machine once with recis simulate --measure"
        return
    yield result.costs.describe()
    if result.hot is not None and result.hot.step_s and result.plain.step_s:
        yield (
            f"step: {_ms(result.plain.step_s)} without copies, {_ms(result.hot.step_s)} with: "
            f"{result.plain.step_s / result.hot.step_s:.2f}x (--set parallel.places.hot_ids={result.hot_per_table.sum()})"
        )
    if result.shape.dense_s == (0.0, 0.0):
        yield "what is not tables has no time in this trace and counts as 0; recis simulate --record notes it"


def _side_lines(side: Side) -> Iterator[str]:
    yield f"  {'':<26}{'mean':>14}{'most':>14}{'most/mean':>11}"
    for name, balance in side.balance.items():
        if name == "ids served from copies" and not balance.most:
            continue
        yield f"  {name:<26}{balance.mean:>14,.1f}{balance.most:>14,.1f}{balance.ratio:>11.3f}"
    link = side.link_bytes
    yield f"  {'bytes sent':<26}{link.mean:>14,.0f}{link.most:>14,.0f}{link.ratio:>11.3f}"
    yield f"  {'phase':<26}{'bytes sent':>14}{'most':>14}{'time':>11}"
    for name, (seconds, mean, most) in side.phases.items():
        shown = "" if side.step_s is None else _ms(seconds)
        yield f"  {name:<26}{mean:>14,.0f}{most:>14,.0f}{shown:>11}"
    if side.step_s is not None:
        if side.hidden_s:
            yield f"  {'beside the dense part':<54}{_ms(-side.hidden_s):>11}"
        yield f"  {'step':<54}{_ms(side.step_s):>11}"


def _memory_lines(result: Simulation) -> Iterator[str]:
    growth = result.growth
    shown = sorted({0, len(growth) // 4, len(growth) // 2, 3 * len(growth) // 4, len(growth) - 1})
    yield f"  {'tables after step':<26}{'rows in all':>14}{'mean rank':>14}{'fullest':>11}"
    for place in shown:
        one = growth[place]
        yield f"  {one.step:<26,}{one.rows:>14,}{_size(one.mean_bytes):>14}{_size(one.most_bytes):>11}"
    yield "  fullest rank: " + ", ".join(f"{name} {_size(held)}" for name, held in result.parts_of_bytes.items())
    for number, table in enumerate(result.shape.tables):
        rows = result.rows[number]
        note = f"; an upper bound: {table.upper_bound}" if table.upper_bound else ""
        yield (
            f"  table {table.name!r}: {rows.sum():,} rows, fullest rank {rows.max():,}, most/mean "
            f"{rows.max() / max(rows.mean(), 1e-9):.3f}; row = {table.row_text()}{note}"
        )


def _ms(seconds: float) -> str:
    return f"{seconds * KILO:,.2f} ms"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / MEGA:,.1f} MB" if num_bytes >= MEGA / 10 else f"{num_bytes / KILO:,.1f} kB"


def to_json(result: Simulation) -> dict[str, Any]:
    """Return what is not a flat number: growth per step and rows of each table at each rank's extremes."""
    return {
        "growth": [[one.step, one.rows, one.mean_bytes, one.most_bytes] for one in result.growth],
        "tables": {
            table.name: {"rows": int(rows.sum()), "rows_most": int(rows.max()), "rows_least": int(rows.min())}
            for table, rows in zip(result.shape.tables, result.rows, strict=True)
        },
    }
