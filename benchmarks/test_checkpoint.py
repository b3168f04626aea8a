"""Speed of checkpoints: save and load of 400 MB, and what an asynchronous save of 400 MB and of 1 GB costs the steps beside it.

    make bench, or: pytest benchmarks/test_checkpoint.py --benchmark-json=out.json

Ours gathers rows out of row blocks in the order of their ids, hashes every file (SHA-256) and writes a manifest; loading
verifies every hash and builds the index. The peers write and read tensors that lie ready in memory, without hashes and
without an index: they show what the disk side of the job costs. Page cache; fsync is timed apart, in `extra`.
"""

import os
import shutil
import time
from functools import partial
from itertools import cycle
from statistics import median

import pytest
import safetensors.torch
import torch
from torch import Tensor

from recis.bench.harness import compare
from recis.checkpoint import Boundary, Saver, Target, load, save
from recis.embedding import EmbeddingBagCollection, TableConfig, TableSet
from recis.jagged import KeyedJaggedTensor
from recis.optim import SparseOptimizer

NUM_ROWS, DIM = 1_450_000, 64  # 276 bytes a row in a file: 400 MB
ROUNDS = 30
STEP_BAGS, STEP_BAG_SIZE = 8192, 20
GIGABYTE_ROWS = 3_630_000
MAX_STALL = 0.05  # of the duration of a save
STEPS = 40  # in one timed run of the stall test: longer than the save that runs beside them


def ids_of(num_rows: int) -> Tensor:
    """Return distinct ids in no order."""
    return torch.randperm(4 * num_rows, generator=torch.Generator().manual_seed(0))[:num_rows]


def table_of(ids: Tensor) -> TableSet:
    """Return one table with row-wise Adagrad and rows for the ids."""
    made = TableSet([TableConfig(name="item", features=("item",), embedding_dim=DIM)], seed=0)
    made["item"].reserve(ids.numel())
    for part in ids.split(100_000):
        made["item"].import_rows({"ids": part, "weight": torch.rand(part.numel(), DIM)})
    return made


@pytest.fixture(scope="module")
def tables() -> TableSet:
    return table_of(ids_of(NUM_ROWS))


@pytest.fixture(scope="module")
def exported(tables) -> dict[str, Tensor]:
    return tables["item"].export()


def num_bytes(fields: dict[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in fields.values())


def same_rows(have: TableSet, want: dict[str, Tensor]) -> None:
    got = have["item"].export()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_save(benchmark, tables, exported, tmp_path, monkeypatch):
    fresh = TableSet([table.config for table in tables], seed=0)
    load(save(tmp_path / "check", Boundary(step=1, table_sets=[tables])), into=Target(tables=fresh.tables))
    same_rows(fresh, exported)
    del fresh

    started = time.perf_counter()
    save(tmp_path / "synced", Boundary(step=1, table_sets=[tables]))
    with_fsync = time.perf_counter() - started
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    started = time.perf_counter()
    save(tmp_path / "unsynced", Boundary(step=1, table_sets=[tables]))
    without = time.perf_counter() - started

    def ours() -> None:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        save(tmp_path / "run", Boundary(step=1, table_sets=[tables]))

    impls = {
        "recis": ours,
        "torch.save of ready tensors": partial(torch.save, exported, tmp_path / "torch.pt"),
        "safetensors of ready tensors": partial(safetensors.torch.save_file, exported, tmp_path / "file.safetensors"),
    }
    compare(
        benchmark,
        case=f"save {num_bytes(exported) / 1e6:.0f} MB with SHA-256",
        ours="recis",
        impls=impls,
        bytes_moved=num_bytes(exported),
        rounds=ROUNDS,
        extra={"fsync_ms": round(1e3 * (with_fsync - without), 1), "target_ms": 800},
    )


def test_load(benchmark, tables, exported, tmp_path):
    path = save(tmp_path, Boundary(step=1, table_sets=[tables]))
    safetensors.torch.save_file(exported, tmp_path / "file.safetensors")
    torch.save(exported, tmp_path / "torch.pt")
    into = TableSet([table.config for table in tables], seed=0)
    load(path, into=Target(tables=into.tables))
    same_rows(into, exported)
    impls = {
        "recis": partial(load, path, into=Target(tables=into.tables)),
        "torch.load into tensors": partial(torch.load, tmp_path / "torch.pt"),
        "safetensors into tensors": partial(safetensors.torch.load_file, tmp_path / "file.safetensors"),
    }
    compare(
        benchmark,
        case=f"load {num_bytes(exported) / 1e6:.0f} MB, every hash verified",
        ours="recis",
        impls=impls,
        bytes_moved=num_bytes(exported),
        rounds=ROUNDS,
        extra={"target_ms": 500},
    )


class Steps:
    """Training steps of the reference size on the table: look up, pool, backward, update, end of step."""

    def __init__(self, tables: TableSet, ids: Tensor) -> None:
        self.tables = tables
        self.collection = EmbeddingBagCollection(tables)
        self.optimizer = SparseOptimizer(self.collection)
        generator = torch.Generator().manual_seed(1)
        picks = [torch.randint(0, ids.numel(), (STEP_BAGS * STEP_BAG_SIZE,), generator=generator) for _ in range(8)]
        lengths = torch.full((STEP_BAGS,), STEP_BAG_SIZE)
        self.batches = cycle(
            [KeyedJaggedTensor(("item",), ids[pick], lengths=lengths, stride=STEP_BAGS) for pick in picks]
        )
        self.upstream = torch.randn(STEP_BAGS, DIM, generator=generator)
        self.step = tables.step

    def run(self, num_steps: int) -> list[float]:
        """Take steps and return the seconds of each."""
        seconds = []
        for _ in range(num_steps):
            started = time.perf_counter()
            self.collection(next(self.batches))["item"].backward(self.upstream)
            self.optimizer.step()
            self.step += 1
            self.collection.end_step(self.step)
            seconds.append(time.perf_counter() - started)
        return seconds


def test_stall_of_training(benchmark, exported, tmp_path):
    tables = TableSet([TableConfig(name="item", features=("item",), embedding_dim=DIM)], seed=0)
    tables["item"].import_rows(exported)
    steps = Steps(tables, exported["ids"])
    steps.run(4)
    saver = Saver(tmp_path / "run", keep=1)
    captures: list[float] = []

    def beside_a_save() -> None:
        started = time.perf_counter()
        saver.save(Boundary(step=steps.step, table_sets=[tables]))
        captures.append(time.perf_counter() - started)
        steps.run(STEPS)
        saver.wait()

    def synchronous() -> None:
        save(tmp_path / "sync", Boundary(step=steps.step, table_sets=[tables]))
        steps.run(STEPS)
        shutil.rmtree(tmp_path / "sync")

    impls = {
        "recis, saving beside": beside_a_save,
        "no save": partial(steps.run, STEPS),
        "saving in between": synchronous,
    }
    info = compare(
        benchmark,
        case=f"{STEPS} steps of {STEP_BAGS * STEP_BAG_SIZE} ids and one save of {num_bytes(exported) / 1e6:.0f} MB",
        ours="recis, saving beside",
        impls=impls,
        rounds=10,
        targets={"no save": 1 / 1.05},
    )
    saver.close()
    captures.sort()
    benchmark.extra_info["snapshot_ms"] = round(1e3 * captures[len(captures) // 2], 2)
    benchmark.extra_info["stall_share"] = round(1 / info["ratio_to"]["no save"] - 1, 3)


def test_stall_of_a_gigabyte(benchmark, tmp_path):
    """How long training stands still for a save (snapshot, waits for room); apart, how much slower steps are meanwhile."""
    ids = ids_of(GIGABYTE_ROWS)
    tables = table_of(ids)
    steps = Steps(tables, ids)
    steps.run(4)
    saver = Saver(tmp_path / "run", keep=1)
    stalls, saves, during, alone = [], [], [], []
    size = 0

    def one_save() -> None:
        nonlocal size
        started = time.perf_counter()
        saver.save(Boundary(step=steps.step, table_sets=[tables]))
        stalled = time.perf_counter() - started
        protection = tables.stores[0].snapshot
        assert protection is not None
        while (whole := saver.poll()) is None:
            during.extend(steps.run(1))
        saves.append(time.perf_counter() - started)
        stalls.append(stalled + protection.waited_s)
        size = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())

    for _ in range(4):
        one_save()
        alone.extend(steps.run(20))
    benchmark.pedantic(one_save, rounds=1)
    saver.close()
    shares = [stall / took for stall, took in zip(stalls, saves, strict=True)]
    benchmark.extra_info.update(
        case=f"steps of {STEP_BAGS * STEP_BAG_SIZE} ids beside saves of {size / 1e9:.2f} GB",
        threads=torch.get_num_threads(),
        load_average=os.getloadavg()[0],
        saves=len(saves),
        save_s=median(saves),
        stall_ms=1e3 * median(stalls),
        stall_share=median(shares),
        stall_share_max=max(shares),
        target_stall_share=MAX_STALL,
        step_alone_ms=1e3 * median(alone),
        step_during_ms=1e3 * median(during),
        slow_down=median(during) / median(alone),
    )
    assert size > 0.99e9
