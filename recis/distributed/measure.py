"""Measure what `recis.distributed.costs` keeps: the parts of a shared table's step here, and a link of two processes.

    ops     the engine's own code on a table of 200,000 rows with one rank, part by part: 4,096 and 65,536 positions of width
            16, 65,536 of width 128; three times give fixed, per item and per byte
    link    two processes, gloo over the loop-back: messages of 8 bytes behind some computing, as in a step, then of 4 MiB;
            the same computing by one of them alone, and by both at once

Popular ids are drawn as 1 / rank. Medians of rounds; the whole takes about ten seconds, most of it filling tables.
"""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from statistics import median

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from recis.distributed.costs import Costs, LinkCost, OpCost
from recis.distributed.ranks import Ranks
from recis.distributed.tables import share_tables
from recis.embedding import EmbeddingBagCollection, TableConfig, TableSet
from recis.embedding.rows import RowStore
from recis.errors import RecisError
from recis.jagged import KeyedJaggedTensor
from recis.optim import SparseOptimizer
from recis_kernels import calibration
from recis_kernels.philox import hash64
from recis_kernels.threads import num_threads
from recis_kernels.unique_ids import unique_ids

NUM_ROWS = 200_000
CASES = ((4096, 16), (65_536, 16), (65_536, 128))  # positions, row width
ROUNDS = 9
MESSAGE_BYTES = 4 << 20
ROUNDS_ALONE, ROUNDS_BOTH = 50, 200  # of messages; one process computes between the first, both between the others
_PIECES = 10
_BAG = 16
_LINK_WAIT_S = 60.0

Point = tuple[float, float, float]  # items, bytes, seconds


def measure(*, copy_gb_per_s: float, roofline_at: str, scale: float = 1.0) -> Costs:
    """Return the costs of this machine; scale shrinks tables, batches and messages, for tests."""
    load_before = os.getloadavg()[0]
    ops = measure_ops(copy_gb_per_s, scale=scale)
    link = measure_link(scale=scale)
    return Costs(
        machine=calibration.machine_name(),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        threads=num_threads(),
        load_average=(round(load_before, 2), round(os.getloadavg()[0], 2)),
        copy_gb_per_s=copy_gb_per_s,
        roofline_at=roofline_at,
        ops=ops,
        link=link,
    )


def measure_ops(copy_gb_per_s: float, *, scale: float = 1.0) -> dict[str, OpCost]:
    """Return the cost of each op."""
    points: dict[str, list[Point]] = {}
    for positions, dim in CASES:
        part = _Parts(max(_BAG, int(NUM_ROWS * scale)), dim, max(_BAG, int(positions * scale) // _BAG * _BAG))
        for name, point in part.measured().items():
            points.setdefault(name, []).append(point)
    return {name: fitted(found, copy_gb_per_s) for name, found in points.items()}


def fitted(points: Sequence[Point], copy_gb_per_s: float) -> OpCost:
    """Return the cost that goes through three points (few, many, many and wide); nothing below 0."""
    (few_items, few_bytes, few_s), (items, num_bytes, seconds), (_, wide_bytes, wide_s) = points
    byte_s = max(0.0, (wide_s - seconds) / (wide_bytes - num_bytes)) if wide_bytes > num_bytes else 0.0
    byte_s = min(byte_s, seconds / num_bytes) if num_bytes else byte_s
    rest, few_rest = seconds - num_bytes * byte_s, few_s - few_bytes * byte_s
    item_s = max(0.0, (rest - few_rest) / (items - few_items)) if items > few_items else 0.0
    item_s = min(item_s, rest / items)
    return OpCost(fixed_s=max(0.0, rest - items * item_s), item_s=item_s, passes=byte_s * copy_gb_per_s * 1e9)


class _Parts:
    """The parts of a step on one table of one rank."""

    def __init__(self, num_rows: int, dim: int, positions: int) -> None:
        self._dim, self._positions, self._num_rows = dim, positions, num_rows
        self._set = TableSet([TableConfig(name="item", features=("item",), embedding_dim=dim)], seed=0)
        share_tables(self._set, Ranks())
        self._collection = EmbeddingBagCollection(self._set)
        self._optimizer = SparseOptimizer([self._collection])
        self._steps = 0
        for first in range(0, num_rows, 50_000):
            rows = torch.arange(first, min(num_rows, first + 50_000))
            self._set["item"].import_rows({"ids": hash64(rows), "weight": torch.full((rows.numel(), dim), 0.01)})
        draw = np.random.default_rng(0)
        popular = [num_rows ** draw.random(positions) for _ in range(ROUNDS)]
        self._batches = [hash64(torch.from_numpy(rows.astype(np.int64))) for rows in popular]
        self._gradient = torch.full((positions // _BAG, dim), 1e-3)
        self._lengths = torch.full((positions // _BAG,), _BAG)

    @property
    def _store(self) -> RowStore:
        return self._set.stores[0]

    def measured(self) -> dict[str, Point]:
        """Return (items, bytes, seconds) of each op."""
        unique = [unique_ids(ids) for ids in self._batches]
        dedup_s = _median(lambda k: unique_ids(self._batches[k]))
        lookup_s = median(self._lookup(k) for k in range(ROUNDS))
        forward_s, backward_s, sums_s, update_s = (
            median(times) for times in zip(*(self._step(k) for k in range(ROUNDS)), strict=True)
        )
        new_ids = max(_BAG, self._positions // 4)
        insert_s = median(self._inserted(k, new_ids) for k in range(ROUNDS))
        pairs = median(one.ids.numel() for one in unique)
        row, stored = 4 * self._dim, self._store.layout.row_bytes
        at_positions = float(self._positions * row)
        return {
            "dedup": (self._positions, 0.0, dedup_s),
            "lookup": (pairs, pairs * row, max(0.0, lookup_s - dedup_s)),
            "insert": (new_ids, new_ids * stored, insert_s),
            "pool": (self._positions, at_positions, max(0.0, forward_s - lookup_s) + backward_s),
            "sums": (self._positions, at_positions, sums_s),
            "update": (pairs, pairs * (row + stored), update_s),
        }

    def _end(self) -> None:
        self._steps += 1
        self._optimizer.step()
        self._set.end_step(self._steps)

    def _lookup(self, number: int, ids: Tensor | None = None) -> float:
        ranges = self._store.one_range(self._batches[number] if ids is None else ids, 0)
        seconds = _timed(lambda: self._store.lookup(ranges, train=True, source=self))
        self._end()
        return seconds

    def _inserted(self, number: int, count: int) -> float:
        """Return what new ids take longer than the same ids when they have rows."""
        first = self._num_rows + number * count
        ids = hash64(torch.arange(first, first + count))
        return max(0.0, self._lookup(number, ids) - self._lookup(number, ids))

    def _step(self, number: int) -> tuple[float, float, float, float]:
        exchange = self._store.exchange
        assert exchange is not None
        ids, lengths = self._batches[number], self._lengths
        batch = KeyedJaggedTensor(keys=("item",), values=ids, lengths=lengths, stride=lengths.numel())
        begun = time.perf_counter()
        pooled = self._collection(batch)["item"]
        looked_up = time.perf_counter()
        pooled.backward(self._gradient)
        done = time.perf_counter()
        sums_s = _timed(exchange.bring_gradients)
        return looked_up - begun, done - looked_up, sums_s, _timed(self._end)


def _timed(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def _median(run: Callable[[int], object]) -> float:
    """Return the median of one call per batch, after one that warms up."""
    run(0)
    return median(_timed(lambda k=k: run(k)) for k in range(ROUNDS))


# ---- link


def measure_link(*, scale: float = 1.0) -> LinkCost:
    """Return the cost of messages between two processes of this machine.

    Raises:
        RecisError: the processes did not answer.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    children = [
        context.Process(target=_serve, args=(rank, port, scale, theirs if rank == 0 else None), daemon=True)
        for rank in range(2)
    ]
    for child in children:
        child.start()
    try:
        if not ours.poll(_LINK_WAIT_S):
            raise RecisError(f"the two processes that measure the link gave no answer within {_LINK_WAIT_S:.0f} s")
        times, large_s, num_bytes = ours.recv()
        for child in children:
            child.join(_LINK_WAIT_S)
    except EOFError as error:
        raise RecisError("a process that measures the link has ended early; its error stands above") from error
    finally:
        for child in children:
            if child.is_alive():
                child.terminate()
    alone, both = times[:, :ROUNDS_ALONE, 0], times[:, ROUNDS_ALONE:]
    later = np.median(both.min(0), 0)  # who comes later waits for nobody
    latency_s, gather_s = float(later[1]), float(later[2])
    moving_s = max(large_s - latency_s, 1e-9)
    return LinkCost(
        latency_s=latency_s,
        gather_latency_s=gather_s,
        gb_per_s=num_bytes / moving_s / 1e9,
        between="two processes of one machine",
        crowding=crowding(alone[0], both[:, :, 0]),
    )


def crowding(alone: np.ndarray, both: np.ndarray) -> float:
    """Return how many times as long work takes side by side until the slower is done: seconds alone [A], of both [2, B].

    A step is some ten such pieces, so that a hiccup in one of them makes the step a tenth longer: means over ten, and of
    these the median.
    """
    tens = both.shape[1] // _PIECES * _PIECES
    slower = both.max(0)[:tens].reshape(-1, _PIECES).mean(1)
    return max(1.0, float(np.median(slower) / np.median(alone)))


def _computing() -> Callable[[], object]:
    """Return a millisecond or two of a small dense part, as ranks do it between messages."""
    model = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
    values = torch.full((512, 128), 0.5)

    def once() -> None:
        model.zero_grad()
        model(values).square().mean().backward()

    return once


def _serve(rank: int, port: int, scale: float, pipe: Connection | None) -> None:
    """Be one of the two."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, timedelta(seconds=_LINK_WAIT_S))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    ranks = Ranks(rank, 2, store=store, group=dist.group.WORLD, timeout_s=_LINK_WAIT_S)
    words = max(8, int(MESSAGE_BYTES * scale) // 8)
    small, large, one = torch.zeros(2), torch.zeros(2 * words, dtype=torch.int64), torch.zeros(1)
    compute = _computing()
    compute()
    rounds = []
    for number in range(ROUNDS_ALONE + max(_PIECES, int(ROUNDS_BOTH * scale))):
        alone = number < ROUNDS_ALONE
        computed = _timed(compute) if rank == 0 or not alone else 0.0
        sent = _timed(lambda: ranks.all_to_all(small, [1, 1], [1, 1], "a small message"))
        if not alone:
            compute()
        gathered = _timed(lambda: ranks.all_gather(one, "a number"))
        rounds.append([computed, sent, gathered])
    times = ranks.all_gather(torch.tensor(rounds, dtype=torch.float64), "the times").numpy()
    large_s = median(
        _timed(lambda: ranks.all_to_all(large, [words, words], [words, words], "a large message")) for _ in range(15)
    )
    if pipe is not None:
        pipe.send((times, large_s, 8 * words))
    dist.barrier()
    dist.destroy_process_group()
