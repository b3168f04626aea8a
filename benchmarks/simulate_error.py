"""How far `recis simulate` is from real runs: the same ids replayed, and trained on by 2 and by 4 processes.

    python benchmarks/simulate_error.py --out benchmarks/results/DATE-cpu-simulate_error.json    about 5 minutes, idle machine
    python benchmarks/simulate_error.py --worlds 2 --rounds 2 --out /tmp/look.json               a quick look

Two cases, one thread per process: "tables" looks up, pools, sends back and updates one shared table (bags of 20 ids, D = 64,
Zipf 1.2 over 200,000 rows); "dlrm" trains a DLRM on batches made beforehand, with and without overlap. Costs are measured
first (or --costs FILE). Bytes and rows must agree exactly, or the run fails; of the times the file keeps estimate, real
median and error. Four processes on fewer cores share them, which the estimate is told (--cores).
"""

import argparse
import json
import multiprocessing
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from recis.bench.harness import device_name
from recis.bench.inputs import draw_rows
from recis.distributed import Parallel
from recis.distributed import costs as costs_file
from recis.distributed.costs import Costs
from recis.distributed.ranks import Ranks
from recis.distributed.replay import Replay
from recis.distributed.shape import ModelShape, table_shape
from recis.distributed.simulate import Simulation, simulate
from recis.distributed.tables import share_tables
from recis.distributed.trace import Trace, TraceWriter
from recis.embedding import EmbeddingBagCollection, TableConfig, TableSet
from recis.io import Batch
from recis.jagged import KeyedJaggedTensor
from recis.models.dlrm import DlrmConfig
from recis.models.synthetic import SyntheticClicks, synthetic_dense, synthetic_tables
from recis.optim import SparseOptimizer
from recis.scale.costs_file import measured
from recis.scale.recipe import record
from recis.trainer import TrainConfig, Trainer
from recis_kernels.philox import hash64

NUM_STEPS = 6  # distinct ones; a first pass makes the rows, later passes are timed
BAGS, BAG_SIZE, DIM, NUM_ROWS = 2048, 20, 64, 200_000
SAMPLES = 2048  # of the DLRM, per rank and step
LINK_KINDS = ("ids", "rows", "gradients")


@dataclass(frozen=True, slots=True)
class Real:
    """What one rank did: seconds of its timed steps, bytes it sent in a pass over all steps by kind, rows of each table."""

    seconds: list[float]
    sent: dict[str, int]
    rows: list[int]


class Kept:
    """Batches made beforehand, delivered `passes` times."""

    def __init__(self, batches: Sequence[Batch], passes: int) -> None:
        self.batches, self.passes, self._next = batches, passes, 0

    def __iter__(self) -> Iterator[Batch]:
        while self._next < len(self.batches) * self.passes:
            self._next += 1
            yield self.batches[(self._next - 1) % len(self.batches)]

    def state_dict(self) -> dict[str, Any]:
        return {"next": self._next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._next = state["next"]


class Times:
    """A hook that notes when each step ended, and what had been sent by the end of the first two passes."""

    def __init__(self, sent: dict[str, int]) -> None:
        self.ends: list[float] = []
        self.after: list[dict[str, int]] = []
        self._sent = sent

    def on_step_end(self, state: Any) -> None:
        self.ends.append(time.perf_counter())
        self.after.append(dict(self._sent))


def count_sent(ranks: Ranks) -> dict[str, int]:
    """Let a rank count what its all-to-alls send to others, by the first words of their names; returns the counts."""
    sent: dict[str, int] = dict.fromkeys(LINK_KINDS, 0)
    plain = ranks.start_all_to_all

    def counting(given: Tensor, send: Sequence[int], receive: Sequence[int], what: str, **more: Any) -> Any:
        kind = next((kind for kind in LINK_KINDS if what.startswith((f"{kind} of table", f"{kind} for table"))), None)
        if kind is not None:
            others = sum(send) - send[ranks.rank]
            sent[kind] += others * given.element_size() * int(np.prod(given.shape[1:]))
        return plain(given, send, receive, what, **more)

    ranks.start_all_to_all = counting  # type: ignore[method-assign]
    return sent


# ---- case: tables alone


def table_config() -> TableConfig:
    """Return the table of the case without a model."""
    return TableConfig(name="item", features=("item",), embedding_dim=DIM)


def table_ids(step: int, world_size: int) -> Tensor:
    """Return the ids of all ranks in a step, rank after rank."""
    rows = draw_rows("zipf", NUM_ROWS, BAGS * BAG_SIZE * world_size, step, torch.device("cpu"))
    return hash64(rows)


def run_tables(ranks: Ranks, rounds: int) -> Real:
    """Train the table alone: a pass that makes the rows, then `rounds` passes."""
    sent = count_sent(ranks)
    table_set = TableSet([table_config()], seed=0)
    share_tables(table_set, ranks)
    collection = EmbeddingBagCollection(table_set)
    optimizer = SparseOptimizer([collection])
    each = BAGS * BAG_SIZE
    own = [table_ids(step, ranks.world_size)[ranks.rank * each : (ranks.rank + 1) * each] for step in range(NUM_STEPS)]
    lengths, gradient = torch.full((BAGS,), BAG_SIZE), torch.full((BAGS, DIM), 1e-3)
    seconds: list[float] = []
    of_pass: list[dict[str, int]] = []
    for number in range((1 + rounds) * NUM_STEPS):
        begun = time.perf_counter()
        batch = KeyedJaggedTensor(keys=("item",), values=own[number % NUM_STEPS], lengths=lengths, stride=BAGS)
        collection(batch)["item"].backward(gradient)
        optimizer.step()
        table_set.end_step(number + 1)
        if number >= NUM_STEPS:
            seconds.append(time.perf_counter() - begun)
        if (number + 1) % NUM_STEPS == 0:
            of_pass.append(dict(sent))
    return Real(seconds, {kind: of_pass[1][kind] - of_pass[0][kind] for kind in sent}, [table_set["item"].size])


def trace_tables(path: Path, world_size: int) -> None:
    """Write two passes over the ids of all ranks."""
    shape = ModelShape(
        tables=(table_shape(table_config()),), features={"item": 0}, lookups=(("item",),), batch_size=BAGS
    )
    offsets = torch.arange(BAGS * world_size + 1) * BAG_SIZE
    with TraceWriter(path, shape) as writer:
        for number in range(2 * NUM_STEPS):
            writer.write({"item": table_ids(number % NUM_STEPS, world_size)}, {"item": offsets})


# ---- case: a DLRM


def dlrm(world_size: int, passes: int, *, overlap: bool, hooks: tuple[Any, ...] = ()) -> TrainConfig:
    """Return the run of a DLRM on batches made beforehand."""
    clicks = SyntheticClicks(
        num_samples=NUM_STEPS * SAMPLES * world_size, batch_size=SAMPLES * world_size, num_users=4000, num_items=1000
    )
    model = DlrmConfig(
        tables=synthetic_tables(32), dense=synthetic_dense(), bottom_hidden=(64, 32), top_hidden=(128, 64)
    )
    return TrainConfig(
        name="dlrm",
        model=model,
        train_data=Kept(list(clicks), passes),
        tasks=("click",),
        hooks=hooks,
        parallel=Parallel(overlap=overlap),
        log_every_steps=1 << 20,
        max_steps=passes * NUM_STEPS,
    )


def run_dlrm(ranks: Ranks, rounds: int, *, overlap: bool) -> Real:
    """Train the DLRM: a pass that makes the rows, then `rounds` passes."""
    times = Times(count_sent(ranks))
    config = dlrm(ranks.world_size, 1 + rounds, overlap=overlap, hooks=(times,))
    trainer = Trainer(config, None, quiet=True, ranks=ranks)
    trainer.train()
    rows = [table.size for table in trainer.tables.values()]
    trainer.close()
    # with overlap the ids of the next step are sent before a step ends: a whole pass is one pass later the same
    first, second = times.after[NUM_STEPS - 1], times.after[2 * NUM_STEPS - 1]
    return Real(
        np.diff(times.ends)[NUM_STEPS - 1 :].tolist(), {kind: second[kind] - first[kind] for kind in first}, rows
    )


def trace_dlrm(path: Path, world_size: int, *, overlap: bool) -> None:
    """Record two passes of the DLRM's ids, and time its dense part."""
    config = dlrm(world_size, 2, overlap=overlap)
    record(config, path, max_samples=1 << 62)


CASES: dict[str, tuple[Callable[[Ranks, int], Real], Callable[[Path, int], None], int]] = {
    "tables": (run_tables, trace_tables, BAGS),
    "dlrm": (
        lambda ranks, rounds: run_dlrm(ranks, rounds, overlap=False),
        lambda path, world: trace_dlrm(path, world, overlap=False),
        SAMPLES,
    ),
    "dlrm+overlap": (
        lambda ranks, rounds: run_dlrm(ranks, rounds, overlap=True),
        lambda path, world: trace_dlrm(path, world, overlap=True),
        SAMPLES,
    ),
}


# ---- processes


def serve(case: str, rank: int, world_size: int, port: int, rounds: int, pipe: Connection) -> None:
    """Be one rank."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, world_size, rank == 0, timedelta(seconds=120))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    ranks = Ranks(rank, world_size, store=store, group=dist.group.WORLD)
    result = CASES[case][0](ranks, rounds)
    pipe.send(result)
    dist.barrier()
    dist.destroy_process_group()


def run_real(case: str, world_size: int, rounds: int) -> list[Real]:
    """Return what the ranks of a case did."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pipes, children = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe()
        child = context.Process(target=serve, args=(case, rank, world_size, port, rounds, theirs), daemon=True)
        child.start()
        theirs.close()
        pipes.append(ours)
        children.append(child)
    results = [pipe.recv() for pipe in pipes]
    for child in children:
        child.join(60)
    return results


def estimated(
    case: str, world_size: int, costs: Costs, cores: int | None
) -> tuple[Simulation, Replay, dict[str, list[int]]]:
    """Return the simulation of a case, and the bytes that each rank sends in the second pass."""
    _, trace_of, batch = CASES[case]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.parquet"
        trace_of(path, world_size)
        trace = Trace(path)
        result = simulate(trace, world_size=world_size, batch=batch, costs=costs, cores=cores, skip_steps=NUM_STEPS)
        replay = Replay(trace.shape, world_size)
        sent = {kind: np.zeros(world_size, np.int64) for kind in LINK_KINDS}
        for number, ids in enumerate(trace.steps(batch * world_size)):
            volumes = replay.step(ids).plain
            for lookup, one in enumerate(volumes if number >= NUM_STEPS else ()):
                row = 4 * trace.shape.dim_of(lookup)
                sent["ids"] += 8 * one.words_out
                sent["rows"] += row * (one.received - one.own)
                sent["gradients"] += row * (one.asked - one.own)
    return result, replay, {kind: count.tolist() for kind, count in sent.items()}


def compared(case: str, world_size: int, costs: Costs, rounds: int) -> dict[str, Any]:
    """Run a case for real and simulated; bytes and rows must agree.

    Raises:
        SystemExit: they do not.
    """
    cores = len(os.sched_getaffinity(0))
    result, replay, sent = estimated(case, world_size, costs, cores if cores < world_size else None)
    real = run_real(case, world_size, rounds)
    found = {kind: [one.sent[kind] for one in real] for kind in LINK_KINDS}
    rows = [list(each) for each in zip(*(one.rows for one in real), strict=True)]
    if found != sent or sorted(rows) != sorted(replay.rows.tolist()):
        raise SystemExit(
            f"{case}, {world_size} ranks: sent {found}, simulated {sent}; rows {rows}, {replay.rows.tolist()}"
        )
    steps = np.median([one.seconds for one in real], axis=0)
    low, real_s, high = np.percentile(steps, [20, 50, 80])
    estimate_s = result.plain.step_s
    assert estimate_s is not None
    return {
        "case": case,
        "ranks": world_size,
        "cores": cores,
        "real_ms": [round(float(value) * 1e3, 3) for value in (low, real_s, high)],
        "estimate_ms": round(estimate_s * 1e3, 3),
        "error": round(estimate_s / float(real_s) - 1, 4),
        "phases_ms": {name: round(seconds * 1e3, 4) for name, (seconds, _, _) in result.plain.phases.items()},
        "hidden_ms": round(result.plain.hidden_s * 1e3, 4),
        "sent_bytes_per_step": {kind: round(float(np.mean(each)) / NUM_STEPS) for kind, each in found.items()},
        "rows_per_rank": [sum(each) for each in zip(*rows, strict=True)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--worlds", default="2,4", help="numbers of processes (default: 2,4)")
    parser.add_argument("--cases", default=",".join(CASES), metavar="A,B", help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument("--rounds", type=int, default=10, help=f"timed passes over {NUM_STEPS} steps (default: 10)")
    parser.add_argument("--costs", type=Path, metavar="FILE", help="costs file; default: measured now")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2: with overlap the last pass sends no ids ahead")
    torch.set_num_threads(1)
    costs = costs_file.load(args.costs) if args.costs else measured(None, print)
    print(costs.describe())
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    kept = {
        "command": "python benchmarks/simulate_error.py",
        "commit": commit,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name("cpu"),
        "load_average_before": round(os.getloadavg()[0], 2),
        "costs": costs.to_json(),
        "results": [],
    }
    for case in args.cases.split(","):
        for world_size in map(int, args.worlds.split(",")):
            one = compared(case, world_size, costs, args.rounds)
            kept["results"].append(one)
            print(
                f"{one['case']:<16}{world_size} ranks on {one['cores']} cores: real {one['real_ms'][1]:,.2f} ms "
                f"({one['real_ms'][0]:,.2f} to {one['real_ms'][2]:,.2f}), estimate {one['estimate_ms']:,.2f} ms, "
                f"error {one['error']:+.1%}; bytes and rows agree",
                flush=True,
            )
            args.out.write_text(json.dumps(kept, indent=1) + "\n")
    kept["load_average_after"] = round(os.getloadavg()[0], 2)
    args.out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
