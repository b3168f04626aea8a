"""How long a step of W ranks takes, from its volumes and measured costs: phase by phase, the slowest rank of each.

    features
    distinct ids, numbers of ids, ids, lookup at owners, rows, pooling   of each lookup
    trainer, weights and losses, dense part, dense gradients
    sums of gradients, gradients, update at owners                       of each lookup
    copies of hot ids: their sums travel to the owners, their new rows to every rank

An exchange waits for all, so phases are added and ranks are not. With overlap, the ids of the next step travel while the
dense part computes: what of that is no longer than the dense part counts nothing, and all other phases follow one another.
Where there are several ranks, all computing takes `crowding` times as long: cores share a memory, and all wait for the slowest.
Each rank has a core of its own unless `cores` says that all of them share so many.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from recis.distributed.costs import Costs
from recis.distributed.replay import WORD_BYTES, Volumes
from recis.distributed.shape import ModelShape

_COUNT_BYTES = 8  # of a number of pairs in the exchange of numbers
FLOAT_BYTES = 4
_SIGHTINGS_BYTES = 4


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase: its name, the seconds of each rank [W], the bytes each sends [W] and receives [W] in it."""

    name: str
    seconds: np.ndarray
    sent: np.ndarray
    received: np.ndarray

    def wall_s(self, cores: int | None) -> float:
        """Return the seconds until the slowest rank is done; with fewer cores than ranks, until all work is."""
        slowest = float(self.seconds.max())
        return slowest if cores is None else max(slowest, float(self.seconds.sum()) / cores)


def phases_of_step(
    shape: ModelShape,
    volumes: Sequence[Volumes],
    costs: Costs,
    *,
    batch: float,
    hot_per_table: np.ndarray | None = None,
) -> list[Phase]:
    """Return the phases of a step in order.

    Args:
        shape: of the model.
        volumes: of each lookup.
        costs: of the machine and its link.
        batch: samples per rank.
        hot_per_table: int64 [T], copies that every rank keeps; None = none.
    """
    ranks = volumes[0].positions.size
    found: list[Phase] = []
    if any(shape.features_s):
        found.append(_still("features", np.full(ranks, _of_batch(shape.features_s, batch)), costs))
    for number, one in enumerate(volumes):
        found += _lookup(shape, number, one, costs, ranks)
    found += _dense(shape, costs, ranks, batch)
    for number, one in enumerate(volumes):
        found += _gradients(shape, number, one, costs, ranks)
    if hot_per_table is not None and hot_per_table.any():
        found.append(_hot(shape, hot_per_table, costs, ranks))
    return found


HIDDEN = ("numbers of ids", "ids")
_BEHIND = "dense part"


def hidden_s(shape: ModelShape, wall_s: Mapping[str, float]) -> float:
    """Return the seconds of a step's phases that pass while the dense part computes; wall_s: of each phase."""
    if not shape.overlap:
        return 0.0
    return min(sum(wall_s.get(name, 0.0) for name in HIDDEN), wall_s.get(_BEHIND, 0.0))


def _still(name: str, seconds: np.ndarray, costs: Costs) -> Phase:
    none = np.zeros(seconds.size, np.int64)
    return Phase(name, seconds * (costs.link.crowding if seconds.size > 1 else 1.0), none, none)


def _of_batch(seconds: tuple[float, float], batch: float) -> float:
    fixed, per_sample = seconds
    return fixed + per_sample * batch


def _exchange(name: str, sent: np.ndarray, received: np.ndarray, costs: Costs) -> Phase:
    return Phase(name, costs.all_to_all(np.maximum(sent, received), sent.size), sent, received)


def _gather(name: str, num_bytes: int, costs: Costs, ranks: int) -> Phase:
    moved = np.full(ranks, num_bytes * (ranks - 1), np.int64)
    return Phase(name, np.full(ranks, costs.all_gather(num_bytes, ranks)), moved, moved)


def _lookup(shape: ModelShape, number: int, one: Volumes, costs: Costs, ranks: int) -> Iterator[Phase]:
    row = FLOAT_BYTES * shape.dim_of(number)
    travelling = shape.row_item(number) * shape.dim_of(number)
    row_bytes = shape.table_of(shape.lookups[number][0]).row_bytes
    yield _still("distinct ids", costs.seconds("dedup", one.positions), costs)
    moved = np.full(ranks, _COUNT_BYTES * (ranks - 1) * len(shape.tables_of(number)), np.int64)
    yield _exchange("numbers of ids", moved, moved, costs)
    yield _exchange("ids", WORD_BYTES * one.words_out, WORD_BYTES * one.words_in, costs)
    served = one.received + one.local
    yield _still(
        "lookup at owners",
        costs.seconds("lookup", served, served * row) + costs.seconds("insert", one.inserted, one.inserted * row_bytes),
        costs,
    )
    yield _exchange("rows", (one.received - one.own) * travelling, (one.asked - one.own) * travelling, costs)
    yield _still("pooling", costs.seconds("pool", one.positions, one.positions * row), costs)


def _gradients(shape: ModelShape, number: int, one: Volumes, costs: Costs, ranks: int) -> Iterator[Phase]:
    row = FLOAT_BYTES * shape.dim_of(number)
    travelling = shape.rows_item * shape.dim_of(number)
    row_bytes = shape.table_of(shape.lookups[number][0]).row_bytes
    yield _still("sums of gradients", costs.seconds("sums", one.positions, one.positions * row), costs)
    yield _exchange("gradients", (one.asked - one.own) * travelling, (one.received - one.own) * travelling, costs)
    moved = one.received * row + one.distinct * row_bytes
    yield _still("update at owners", costs.seconds("update", one.received, moved), costs)


def _dense(shape: ModelShape, costs: Costs, ranks: int, batch: float) -> Iterator[Phase]:
    if any(shape.trainer_s):
        yield _still("trainer", np.full(ranks, _of_batch(shape.trainer_s, batch)), costs)
    if shape.dense_parameters or any(shape.dense_s):
        each = costs.all_gather(2 * FLOAT_BYTES, ranks)
        moved = np.full(ranks, 2 * FLOAT_BYTES * (ranks - 1) * shape.small_gathers, np.int64)
        yield Phase("weights and losses", np.full(ranks, shape.small_gathers * each), moved, moved)
    yield _still("dense part", np.full(ranks, _of_batch(shape.dense_s, batch)), costs)
    if shape.dense_parameters:
        chunk = FLOAT_BYTES * -(-shape.dense_parameters // ranks)
        moved = np.full(ranks, chunk * (ranks - 1), np.int64)
        yield _exchange("dense gradients", moved, moved, costs)
        if shape.dense_at_once is not None:  # weights: before forward and again before backward
            yield Phase("dense weights", np.full(ranks, 2 * costs.all_gather(chunk, ranks)), 2 * moved, 2 * moved)
            return
        yield _gather("sums of dense gradients", chunk, costs, ranks)


def _hot(shape: ModelShape, hot_per_table: np.ndarray, costs: Costs, ranks: int) -> Phase:
    """Sums and sightings of all copies to their owners, the update there, the new rows to all; see `copies`.

    Each table's copies count as those of one lookup per step.
    """
    item = FLOAT_BYTES * np.array([table.dim for table in shape.tables])
    state = np.array([table.row_bytes for table in shape.tables])
    owned = -(-hot_per_table // ranks)
    sums, rows = int((owned * (item + _SIGHTINGS_BYTES)).sum()), int((owned * item).sum())
    sent = (ranks - 1) * sums
    moved = np.full(ranks, sent + (ranks - 1) * rows, np.int64)
    update = costs.seconds("update", float(ranks * owned.sum()), float((owned * (ranks * item + state)).sum()))
    return Phase(
        "copies of hot ids",
        costs.all_to_all(np.full(ranks, sent), ranks) + costs.all_gather(rows, ranks) + update,
        moved,
        moved,
    )
