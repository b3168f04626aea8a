"""Speed of one training step of an embedding table: look up, pool, backward, update; and of its parts.

    make bench, or: pytest benchmarks/test_embedding_step.py --benchmark-json=out.json

The reference step is 8192 bags of 20 ids, D = 64 fp32, a table of 2 M rows, pooled sum. "static" means that row numbers
are given; "dynamic" starts from arbitrary 64-bit ids: de-duplication, index lookup and the step's bookkeeping are included.
FBGEMM's CPU table (no index, rows given) runs at our thread count and with one thread, whichever suits it. RecIS's CPU core
is not installable; its recorded figures for gathers and AdamW (1 M ids, 2 threads, another machine) are quoted in `extra`.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recis.bench.harness import at_threads, compare
from recis.embedding import EmbeddingBagCollection, TableConfig
from recis.jagged import KeyedJaggedTensor
from recis.optim import Adagrad, AdamW, AdamWTF, RowOptimizer, RowWiseAdagrad, SparseOptimizer
from recis_kernels.embedding_bag import embedding_bag
from recis_kernels.row_blocks import RowBlocks, RowLayout
from recis_kernels.row_rules import ADAM, ROW_WISE_ADAGRAD, reference_update
from recis_kernels.sparse_update import PendingLookup, RowGrad, fused_update, update_rows
from recis_kernels.unique_ids import unique_ids

NUM_BAGS, BAG_SIZE, DIM, NUM_ROWS = 8192, 20, 64, 2_000_000
NUM_IDS = NUM_BAGS * BAG_SIZE
SLOW_ROUNDS = 12  # against torch's sparse optimizers, which take up to a second a step
NUM_BATCHES = 8  # in turn, so that no step finds the rows of the one before in cache
LR, ADAGRAD_EPS, ADAM_EPS = 0.01, 1e-8, 1e-8
DISTRIBUTIONS = ("uniform", "zipf")
RECIS_ROWS_PER_S = {"gradient unique + AdamW, D=64": 4.4e6, "lookup, all hits, D=64": 12e6}
OFFSETS = torch.arange(0, NUM_IDS + 1, BAG_SIZE)

FBGEMM = find_spec("fbgemm_gpu") is not None
MISSING = () if FBGEMM else ("fbgemm TBE",)
FBGEMM_NAMES = ("fbgemm TBE", "fbgemm TBE, 1 thread") if FBGEMM else ()


@cache
def batches(distribution: str, num_rows: int = NUM_ROWS) -> list[Tensor]:
    """Return row numbers [NUM_IDS] per batch: uniform, or Zipf 1.2 with the popular rows scattered."""
    rng = np.random.default_rng(0)
    if distribution == "uniform":
        return [torch.from_numpy(rng.integers(0, num_rows, NUM_IDS)) for _ in range(NUM_BATCHES)]
    places = rng.permutation(num_rows)
    total = np.cumsum(np.arange(1, num_rows + 1, dtype=np.float64) ** -1.2)
    draws = [np.searchsorted(total, rng.random(NUM_IDS) * total[-1]) for _ in range(NUM_BATCHES)]
    return [torch.from_numpy(places[draw]) for draw in draws]


@cache
def first_weights(num_rows: int) -> Tensor:
    """Return the weights that every implementation starts from, [num_rows, DIM]."""
    return torch.randn(num_rows, DIM, generator=torch.Generator().manual_seed(1)) * 0.01


@cache
def upstream() -> Tensor:
    """Return the gradient of the pooled bags, [NUM_BAGS, DIM]."""
    return torch.randn(NUM_BAGS, DIM, generator=torch.Generator().manual_seed(2)) * 0.01


class Static:
    """Our kernels on given row numbers: what a table without an index does, with row-wise Adagrad."""

    def __init__(self, num_rows: int) -> None:
        self.scalars = torch.tensor([[LR, 0.0, ADAGRAD_EPS]], dtype=torch.float64)
        self.blocks = filled_blocks(num_rows, (("h", 1),))

    def step(self, row_numbers: Tensor) -> Tensor:
        unique = unique_ids(row_numbers)
        out = embedding_bag(self.blocks, unique.ids, unique.inverse, OFFSETS)
        view = RowGrad(unique.inverse, OFFSETS, NUM_BAGS, grad=upstream())
        lookup = PendingLookup(unique.ids, unique.segments, unique.counts, [view])
        fused_update(self.blocks, [lookup], ROW_WISE_ADAGRAD, self.scalars, step=1)
        return out

    def weights(self, row_numbers: Tensor) -> Tensor:
        return self.blocks.read(row_numbers, ("weight",))["weight"]


class Dynamic:
    """A collection over arbitrary ids, its optimizer and the end of the step: what a model's training runs."""

    def __init__(self, num_rows: int, optimizer: RowOptimizer) -> None:
        config = TableConfig(name="item", features=("f",), embedding_dim=DIM, optimizer=optimizer)
        self.collection = EmbeddingBagCollection([config], seed=0)
        self.optimizer = SparseOptimizer(self.collection)
        self.ids = torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=torch.Generator().manual_seed(3))
        self.table = self.collection.table_set["item"]
        self.table.reserve(num_rows)
        self.table.insert(self.ids, first_weights(num_rows))
        self.num_steps = 0

    def step(self, row_numbers: Tensor) -> Tensor:
        return self.step_of_ids(self.ids[row_numbers])

    def step_of_ids(self, ids: Tensor) -> Tensor:
        out = self.collection(KeyedJaggedTensor(("f",), ids, offsets=OFFSETS, stride=NUM_BAGS))["f"]
        out.backward(upstream())
        self.optimizer.step()
        self.num_steps += 1
        self.collection.end_step(self.num_steps)
        return out.detach()

    def weights(self, row_numbers: Tensor) -> Tensor:
        rows = self.table.find(self.ids[row_numbers])
        return self.table.store.blocks.read(rows, ("weight",))["weight"]


class FbgemmTable:
    """FBGEMM's table-batched embedding on CPU with exact row-wise Adagrad; rows are given, there is no index."""

    def __init__(self, num_rows: int) -> None:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        self.module = SplitTableBatchedEmbeddingBagsCodegen(
            [(num_rows, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU)],
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=LR,
            eps=ADAGRAD_EPS,
        )
        self.module.split_embedding_weights()[0].copy_(first_weights(num_rows))

    def step(self, row_numbers: Tensor) -> Tensor:
        out = self.module(row_numbers, OFFSETS)
        out.backward(upstream())
        return out.detach()

    def weights(self, row_numbers: Tensor) -> Tensor:
        return self.module.split_embedding_weights()[0][row_numbers]


class TorchTable:
    """torch.nn.EmbeddingBag with sparse gradients and torch's sparse Adam or Adagrad."""

    def __init__(self, num_rows: int, build: Callable[[list[Tensor]], torch.optim.Optimizer]) -> None:
        self.module = torch.nn.EmbeddingBag(num_rows, DIM, mode="sum", sparse=True, include_last_offset=True)
        self.module.weight.data.copy_(first_weights(num_rows))
        self.optimizer = build([self.module.weight])

    def step(self, row_numbers: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        out = self.module(row_numbers, OFFSETS)
        out.backward(upstream())
        self.optimizer.step()
        return out.detach()

    def weights(self, row_numbers: Tensor) -> Tensor:
        return self.module.weight.data[row_numbers]


def filled_blocks(num_rows: int, states: tuple[tuple[str, int], ...]) -> RowBlocks:
    blocks = RowBlocks(RowLayout(DIM, state=states))
    blocks.grow(num_rows)
    zeros = {f"state.{name}": torch.zeros(num_rows, width) for name, width in states}
    blocks.write(torch.arange(num_rows), {"weight": first_weights(num_rows), **zeros})
    return blocks


def row_wise_adagrad(num_rows: int) -> dict[str, Any]:
    """Return our tables and their peers with row-wise Adagrad, by name."""
    tables: dict[str, Any] = {
        "ours static": Static(num_rows),
        "ours dynamic": Dynamic(num_rows, RowWiseAdagrad(lr=LR, eps=ADAGRAD_EPS)),
    }
    if FBGEMM:
        tables["fbgemm TBE"] = FbgemmTable(num_rows)
    return tables


def adam(num_rows: int) -> dict[str, Any]:
    """Return our table and torch's with Adam, in SparseAdam's form: eps beside the uncorrected root."""
    return {
        "ours dynamic": Dynamic(num_rows, AdamWTF(lr=LR, eps=ADAM_EPS, weight_decay=0.0)),
        "torch EmbeddingBag + SparseAdam": TorchTable(
            num_rows, lambda parameters: torch.optim.SparseAdam(parameters, lr=LR, eps=ADAM_EPS)
        ),
    }


def adagrad(num_rows: int) -> dict[str, Any]:
    """Return our table and torch's with Adagrad, one accumulator per weight."""
    return {
        "ours dynamic": Dynamic(num_rows, Adagrad(lr=LR)),
        "torch EmbeddingBag + sparse Adagrad": TorchTable(
            num_rows, lambda parameters: torch.optim.Adagrad(parameters, lr=LR)
        ),
    }


full_size = cache(lambda build: build(NUM_ROWS))  # tables of 0.5 to 1.6 GB, made once for both distributions


def check_equal(build: Callable[[int], dict[str, Any]], distribution: str) -> None:
    """Assert that outputs and rows of fresh small tables agree over two steps from equal rows."""
    num_rows = 20_000
    tables = list(build(num_rows).values())
    rows = torch.arange(num_rows)
    for batch in batches(distribution, num_rows)[:2]:
        want, *others = [table.step(batch) for table in tables]
        for out in others:
            torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    want, *others = [table.weights(rows) for table in tables]
    assert not torch.equal(want, first_weights(num_rows))
    for weights in others:
        torch.testing.assert_close(weights, want, rtol=1e-4, atol=1e-5)


def in_turn(inputs: list[Tensor], run: Callable[[Tensor], object]) -> Callable[[], object]:
    """Return a function that runs the next batch at each call."""
    turn = cycle(inputs)
    return lambda: run(next(turn))


def impls_of(tables: dict[str, Any], distribution: str) -> dict[str, Callable[[], object]]:
    """Return what compare times: ours from ids or rows at our thread count, peers at ours and at one thread."""
    rows = batches(distribution)
    impls: dict[str, Callable[[], object]] = {}
    for name, table in tables.items():
        if isinstance(table, Dynamic):
            impls[name] = in_turn([table.ids[batch] for batch in rows], table.step_of_ids)
        else:
            impls[name] = in_turn(rows, table.step)
            if not isinstance(table, Static):
                impls[f"{name}, 1 thread"] = at_threads(1, in_turn(rows, table.step))
    return impls


def least_bytes(distribution: str, bytes_per_row: int) -> int:
    """Return what a step must move: rows and ids read once per position, each distinct row's update."""
    distinct = int(np.mean([batch.unique().numel() for batch in batches(distribution)[:2]]))
    return NUM_IDS * (8 + 4 * DIM) + NUM_BAGS * 4 * DIM + distinct * bytes_per_row


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_static_step(benchmark, distribution):
    check_equal(row_wise_adagrad, distribution)
    compare(
        benchmark,
        case=f"static step {distribution}, row-wise Adagrad, {NUM_BAGS}x{BAG_SIZE} ids, D={DIM}, {NUM_ROWS} rows",
        ours="ours static",
        impls=impls_of(full_size(row_wise_adagrad), distribution),
        bytes_moved=least_bytes(distribution, 12 * DIM + 8),
        items=NUM_IDS,
        missing=MISSING,
        targets=dict.fromkeys(FBGEMM_NAMES, 1.3 if distribution == "uniform" else 1.2),
    )


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_dynamic_step(benchmark, distribution):
    check_equal(row_wise_adagrad, distribution)
    compare(
        benchmark,
        case=f"dynamic step {distribution}, row-wise Adagrad, {NUM_BAGS}x{BAG_SIZE} ids, D={DIM}, {NUM_ROWS} rows",
        ours="ours dynamic",
        impls=impls_of(full_size(row_wise_adagrad), distribution),
        bytes_moved=least_bytes(distribution, 12 * DIM + 8),
        items=NUM_IDS,
        missing=MISSING,
        targets=dict.fromkeys(FBGEMM_NAMES, 1.0) | {"ours static": 1 / 1.5},
    )


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("build", [adam, adagrad], ids=["adam", "adagrad"])
def test_dynamic_step_against_torch(benchmark, build, distribution):
    check_equal(build, distribution)
    peer = next(name for name in full_size(build) if name != "ours dynamic")
    compare(
        benchmark,
        case=f"dynamic step {distribution}, {peer.rsplit(' ', 1)[1]}, {NUM_BAGS}x{BAG_SIZE} ids, D={DIM}",
        ours="ours dynamic",
        impls=impls_of(full_size(build), distribution),
        bytes_moved=least_bytes(distribution, (28 if build is adam else 20) * DIM),
        items=NUM_IDS,
        rounds=SLOW_ROUNDS,
        targets={peer: 15.0, f"{peer}, 1 thread": 15.0} if build is adam else None,
    )


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_adamw_step(benchmark, distribution):
    """De-duplication, sums and AdamW, the job of RecIS's recorded `gradient unique + AdamW`."""
    table = full_size(adamw)
    compare(
        benchmark,
        case=f"dynamic step {distribution}, AdamW, {NUM_BAGS}x{BAG_SIZE} ids, D={DIM}, {NUM_ROWS} rows",
        ours="ours dynamic",
        impls=impls_of({"ours dynamic": table}, distribution),
        bytes_moved=least_bytes(distribution, 28 * DIM),
        items=NUM_IDS,
        targets={"items_per_s": 2.5 * RECIS_ROWS_PER_S["gradient unique + AdamW, D=64"]},
        extra={"recorded_recis_rows_per_s": RECIS_ROWS_PER_S},
    )


def adamw(num_rows: int) -> Dynamic:
    return Dynamic(num_rows, AdamW(lr=LR))


@pytest.mark.parametrize(
    ("rule", "scalars", "states", "bytes_per_row", "rows_per_s"),
    [
        (ROW_WISE_ADAGRAD, [LR, 0.0, ADAGRAD_EPS], (("h", 1),), 12 * DIM + 8, 20e6),
        (ADAM, [LR, 0.9, 0.999, ADAM_EPS, 0.0, 5.0], (("m", DIM), ("v", DIM)), 28 * DIM, 9e6),
    ],
    ids=["row_wise_adagrad", "adam"],
)
def test_update_of_distinct_rows(benchmark, rule, scalars, states, bytes_per_row, rows_per_s):
    blocks, numbers = filled_blocks(NUM_ROWS, states), torch.tensor([scalars], dtype=torch.float64)
    picks = [torch.randperm(NUM_ROWS)[:NUM_IDS] for _ in range(NUM_BATCHES)]
    grads = torch.randn(NUM_IDS, DIM) * 0.01
    old = blocks.read(picks[0])
    update_rows(blocks, picks[0], grads, rule, numbers, step=1)
    state = {name: old[f"state.{name}"] for name, _ in states}
    want, _ = reference_update(rule, old["weight"], state, grads, numbers.expand(NUM_IDS, -1))
    torch.testing.assert_close(blocks.read(picks[0])["weight"].double(), want, rtol=1e-5, atol=1e-6)
    compare(
        benchmark,
        case=f"update of {NUM_IDS} distinct rows of {NUM_ROWS}, {rule.name}, D={DIM}",
        ours="numba",
        impls={"numba": in_turn(picks, lambda rows: update_rows(blocks, rows, grads, rule, numbers, step=1))},
        bytes_moved=NUM_IDS * bytes_per_row,
        items=NUM_IDS,
        targets={"items_per_s": rows_per_s},
    )


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_pooled_gather(benchmark, distribution):
    blocks, weight = filled_blocks(NUM_ROWS, (("h", 1),)), first_weights(NUM_ROWS)
    rows = batches(distribution)

    def torch_bag(batch: Tensor) -> Tensor:
        return torch.nn.functional.embedding_bag(batch, weight, OFFSETS, mode="sum", include_last_offset=True)

    def our_bag(batch: Tensor) -> Tensor:
        return embedding_bag(blocks, batch, None, OFFSETS)

    torch.testing.assert_close(our_bag(rows[0]), torch_bag(rows[0]), rtol=1e-5, atol=1e-6)
    compare(
        benchmark,
        case=f"pooled gather {distribution}, {NUM_BAGS}x{BAG_SIZE} rows of {NUM_ROWS}, D={DIM}",
        ours="numba",
        impls={"numba": in_turn(rows, our_bag), "torch embedding_bag": in_turn(rows, torch_bag)},
        bytes_moved=NUM_IDS * (8 + 4 * DIM) + NUM_BAGS * 4 * DIM,
        items=NUM_IDS,
        targets={"items_per_s": 60e6},
    )
