"""What sharing a table costs: a step of two processes with exchange against two processes that share nothing.

    make bench, or: pytest benchmarks/test_exchange.py --benchmark-json=out.json

Both do the same work at once, one thread each: 4096 bags of 20 ids per process, D = 64, row-wise Adagrad, a table of 1 M
rows; look up, pool, backward, update, end of step. "shared" spreads one table over the two (half of the ids of a process are
the other's) and exchanges over gloo's sockets; "alone" gives each a table of its own. Target: shared at most 1.25 times alone.
"10,000 hot ids" are copied to both (parallel.places.hot_ids): Zipf ids have such, uniform ones do not.
"""

import multiprocessing
import socket
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import cycle
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist

from recis.bench.harness import compare
from recis.bench.inputs import draw_rows
from recis.distributed.config import Places
from recis.distributed.copies import COUNTED_STEPS
from recis.distributed.ranks import Ranks
from recis.distributed.tables import share_tables
from recis.embedding import EmbeddingBagCollection, TableConfig, TableSet
from recis.jagged import KeyedJaggedTensor
from recis.optim import SparseOptimizer
from recis_kernels.philox import hash64

NUM_BAGS, BAG_SIZE, DIM, NUM_ROWS = 4096, 20, 64, 1_000_000
NUM_BATCHES = 8
WORLD_SIZE = 2
HOT_IDS = 10_000
IMPLS = ("shared", "two processes alone", "shared, bfloat16 rows", f"shared, {HOT_IDS:,} hot ids")


def steps(
    ranks: Ranks | None, batches: list[torch.Tensor], *, rows_dtype: torch.dtype = torch.float32, hot_ids: int = 0
) -> Callable[[], int]:
    """Return a function that makes one training step of a table filled with all ids that will come."""
    table_set = TableSet([TableConfig(name="item", features=("item",), embedding_dim=DIM)], seed=0)
    if ranks is not None:
        share_tables(table_set, ranks, rows_dtype=rows_dtype, places=Places(hot_ids=hot_ids))
    collection = EmbeddingBagCollection(table_set)
    optimizer = SparseOptimizer([collection])
    lengths = torch.full((NUM_BAGS,), BAG_SIZE)
    turns = cycle(batches)
    done = 0

    def step() -> int:
        nonlocal done
        done += 1
        ids = KeyedJaggedTensor(keys=("item",), values=next(turns), lengths=lengths, stride=NUM_BAGS)
        collection(ids)["item"].backward(torch.full((NUM_BAGS, DIM), 1e-3))
        optimizer.step()
        table_set.end_step(done)
        return table_set["item"].size

    for _ in range(
        max(len(batches), COUNTED_STEPS)
    ):  # every id gets its row, hot ones are chosen, before what is measured
        step()
    return step


def serve(rank: int, port: int, distribution: Any, pipe: Connection) -> None:
    """Be one of the processes: make a step of the implementation that the parent names, again and again."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, WORLD_SIZE, rank == 0, timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE)
    ranks = Ranks(rank, WORLD_SIZE, store=store, group=dist.group.WORLD)
    seeds = [100 * rank + number for number in range(NUM_BATCHES)]
    rows = [draw_rows(distribution, NUM_ROWS, NUM_BAGS * BAG_SIZE, seed, torch.device("cpu")) for seed in seeds]
    batches = [hash64(row) for row in rows]  # ids over the whole range
    runs = {
        IMPLS[0]: steps(ranks, batches),
        IMPLS[1]: steps(None, batches),
        IMPLS[2]: steps(ranks, batches, rows_dtype=torch.bfloat16),
        IMPLS[3]: steps(ranks, batches, hot_ids=HOT_IDS),
    }
    pipe.send("ready")
    while (name := pipe.recv()) is not None:
        pipe.send(runs[name]())
    dist.destroy_process_group()


@pytest.mark.parametrize("distribution", ["zipf", "uniform"])
def test_exchange(benchmark, distribution):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pipes, children = [], []
    for rank in range(WORLD_SIZE):
        ours, theirs = context.Pipe()
        child = context.Process(target=serve, args=(rank, port, distribution, theirs), daemon=True)
        child.start()
        pipes.append(ours)
        children.append(child)
    for pipe in pipes:
        assert pipe.recv() == "ready"

    def step(name: str) -> list[int]:
        for pipe in pipes:
            pipe.send(name)
        return [pipe.recv() for pipe in pipes]

    shared, alone, *others = (step(name) for name in IMPLS)
    assert others == [shared, shared]
    assert max(shared) < min(alone)  # an owner has half of the ids of both, which have many in common
    compare(
        benchmark,
        case=f"{WORLD_SIZE} processes of {NUM_BAGS}x{BAG_SIZE} ids D{DIM} {distribution}",
        ours=IMPLS[0],
        impls={name: partial(step, name) for name in IMPLS},
        items=WORLD_SIZE * NUM_BAGS * BAG_SIZE,
        targets={IMPLS[1]: 1 / 1.25},
        rounds=30,
        extra={"rows": shared, "rows_alone": alone},
    )
    for pipe in pipes:
        pipe.send(None)
    for child in children:
        child.join(20)
        assert child.exitcode == 0
