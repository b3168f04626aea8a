"""Speed of reducing duplicate gradients and updating the touched rows.

    make bench, or: pytest benchmarks/test_kernel_sparse_update.py --benchmark-json=out.json
    pytest benchmarks/test_kernel_sparse_update.py -k small      a minute, to see that it runs

The job of FBGEMM's backward: from row numbers [L] and the gradient of the pooled bags to updated rows. Ours does unique_ids,
lists, sums and the update; FBGEMM's runs its backward again on a kept graph; torch's makes a sparse gradient and coalesces
it. The second group updates distinct rows with given sums. On a GPU ours and torch's run there. The whole steps, forward
included, are in test_embedding_step.py.
"""

from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.test_embedding_step import DIM, FBGEMM, LR, NUM_BAGS, OFFSETS, batches, in_turn, upstream
from recis.bench.harness import at_threads, compare
from recis_kernels.row_blocks import RowBlocks, RowLayout
from recis_kernels.row_rules import ADAM, ADAMW, FTRL, ROW_WISE_ADAGRAD, SGD, UpdateRule, reference_update
from recis_kernels.sparse_update import PendingLookup, RowGrad, fused_update_flags, update_rows
from recis_kernels.unique_ids import unique_ids

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS = "triton" if DEVICE == "cuda" else "numba"
SIZES = {"small": 5_000, "full": 2_000_000}
EPS = 1e-8
# rule: scalars, states as (name, whole vector?), bytes of a row read and written per weight, and beside them
RULES: dict[str, tuple[UpdateRule, list[float], tuple[tuple[str, bool], ...], int, int]] = {
    "sgd": (SGD, [LR, 0.0], (), 12, 0),
    "row_wise_adagrad": (ROW_WISE_ADAGRAD, [LR, 0.0, EPS], (("h", False),), 12, 8),
    "adam": (ADAM, [LR, 0.9, 0.999, EPS, 0.0, 5.0], (("m", True), ("v", True)), 28, 0),
    "adamw": (ADAMW, [LR, 0.9, 0.999, EPS, 0.01, 5.0], (("m", True), ("v", True)), 28, 0),
    "ftrl": (FTRL, [LR, 1.0, 0.0, 0.0], (("n", True), ("z", True)), 28, 0),
}
TARGETS = {"row_wise_adagrad": 20e6, "adam": 9e6}  # distinct rows of D = 64 per second on two CPU cores


def filled(num_rows: int, dim: int, dtype: torch.dtype, states: tuple[tuple[str, bool], ...]) -> RowBlocks:
    layout = RowLayout(dim, dtype, tuple((name, dim if is_vector else 1) for name, is_vector in states))
    blocks = RowBlocks(layout, device=DEVICE)
    blocks.grow(num_rows)
    weight = torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(1)) * 0.01
    blocks.write(torch.arange(num_rows, device=DEVICE), {"weight": weight.to(dtype)})
    return blocks


class Backward:
    """Row-wise Adagrad from row numbers and the gradient of the bags: ours."""

    def __init__(self, num_rows: int) -> None:
        self.blocks = filled(num_rows, DIM, torch.float32, (("h", False),))
        self.scalars = torch.tensor([[LR, 0.0, EPS]], dtype=torch.float64)
        self.offsets, self.grad = OFFSETS.to(DEVICE), upstream().to(DEVICE)

    def run(self, ids: Tensor, *, deterministic: bool = True) -> None:
        unique = unique_ids(ids)
        view = RowGrad(unique.inverse, self.offsets, NUM_BAGS, grad=self.grad)
        lookup = PendingLookup(unique.ids, unique.segments, unique.counts, [view])
        fused_update_flags(self.blocks, [lookup], ROW_WISE_ADAGRAD, self.scalars, step=1, deterministic=deterministic)

    def weights(self) -> Tensor:
        rows = torch.arange(len(self.blocks.blocks) << self.blocks.shift, device=DEVICE)
        return self.blocks.read(rows, ("weight",))["weight"]


class FbgemmBackward:
    """FBGEMM's backward with its fused update, on CPU; the graph of each batch is kept from one forward."""

    def __init__(self, num_rows: int, inputs: list[Tensor]) -> None:
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
            eps=EPS,
        )
        weight = torch.randn(num_rows, DIM, generator=torch.Generator().manual_seed(1)) * 0.01
        self.module.split_embedding_weights()[0].copy_(weight)
        self.outs = [self.module(batch, OFFSETS) for batch in inputs]

    def run(self, out: Tensor) -> None:
        out.backward(upstream(), retain_graph=True)

    def weights(self) -> Tensor:
        return self.module.split_embedding_weights()[0]


class TorchBackward:
    """torch: a sparse gradient with one row per position, coalesced, and row-wise Adagrad by indexing."""

    def __init__(self, num_rows: int) -> None:
        weight = torch.randn(num_rows, DIM, generator=torch.Generator().manual_seed(1)) * 0.01
        self.weight, self.sums = weight.to(DEVICE), torch.zeros(num_rows, device=DEVICE)
        self.bag = torch.arange(NUM_BAGS).repeat_interleave(OFFSETS.diff()).to(DEVICE)
        self.grad = upstream().to(DEVICE)

    def run(self, ids: Tensor) -> None:
        by_position = torch.sparse_coo_tensor(
            ids[None], self.grad[self.bag], self.weight.shape, check_invariants=False
        ).coalesce()
        rows, grads = by_position.indices()[0], by_position.values()
        self.sums[rows] += grads.square().mean(1)
        self.weight[rows] -= LR * grads / (self.sums[rows].sqrt() + EPS)[:, None]

    def weights(self) -> Tensor:
        return self.weight


def run_kept(table: FbgemmBackward) -> Callable[[], object]:
    turn = cycle(table.outs)
    return lambda: table.run(next(turn))


@pytest.mark.parametrize("distribution", ["uniform", "zipf"])
@pytest.mark.parametrize("size", SIZES)
def test_reduce_and_update(benchmark, size, distribution):
    num_rows = SIZES[size]
    ids = [batch.to(DEVICE) for batch in batches(distribution, num_rows)]
    has_fbgemm = FBGEMM and DEVICE == "cpu"
    ours, torchs = Backward(num_rows), TorchBackward(num_rows)
    ours.run(ids[0])
    torchs.run(ids[0])
    changed = ids[0].unique()
    torch.testing.assert_close(ours.weights()[changed], torchs.weights()[changed], rtol=1e-4, atol=1e-6)
    impls: dict[str, Callable[[], object]] = {OURS: in_turn(ids, ours.run)}
    if DEVICE == "cuda":
        impls["triton, any order"] = in_turn(ids, lambda batch: ours.run(batch, deterministic=False))
    if has_fbgemm:
        fbgemm = FbgemmBackward(num_rows, [batch.cpu() for batch in ids])
        fbgemm.run(fbgemm.outs[0])
        torch.testing.assert_close(fbgemm.weights()[changed], torchs.weights()[changed], rtol=1e-4, atol=1e-6)
        impls |= {"fbgemm TBE": run_kept(fbgemm), "fbgemm TBE, 1 thread": at_threads(1, run_kept(fbgemm))}
    impls["torch coalesce"] = in_turn(ids, torchs.run)
    distinct = changed.numel()
    compare(
        benchmark,
        case=f"reduce and update {distribution}, row-wise Adagrad, {ids[0].numel()} ids, {num_rows} rows, D={DIM}",
        ours=OURS,
        impls=impls,
        bytes_moved=ids[0].numel() * 8 + NUM_BAGS * 4 * DIM + distinct * (8 * DIM + 8),
        items=ids[0].numel(),
        missing=() if has_fbgemm else ("fbgemm TBE",),
        targets={"fbgemm TBE": 1.0} if has_fbgemm else None,
        device=DEVICE,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("size", SIZES)
def test_update_of_distinct_rows(benchmark, size, name, dim, dtype):
    rule, line, states, bytes_per_weight, bytes_beside = RULES[name]
    num_rows = SIZES[size]
    num_updated = min(163_840, num_rows // 2)
    blocks, keys = filled(num_rows, dim, dtype, states), torch.tensor([1])
    scalars = torch.tensor([line], dtype=torch.float64)
    picks = [torch.randperm(num_rows)[:num_updated].to(DEVICE) for _ in range(8)]
    grads = torch.randn(num_updated, dim).to(DEVICE) * 0.01
    numbers: dict[str, Any] = {"step": 1, "keys": keys}
    old = blocks.read(picks[0])
    update_rows(blocks, picks[0], grads, rule, scalars, **numbers)
    state = {name: old[f"state.{name}"] for name, _ in states}
    want, _ = reference_update(rule, old["weight"], state, grads, scalars.to(DEVICE).expand(num_updated, -1))
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    got = blocks.read(picks[0], ("weight",))["weight"]
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=1e-6)
    width = bytes_per_weight - (4 if dtype == torch.bfloat16 else 0)  # a bf16 weight is 2 bytes in and 2 out
    compare(
        benchmark,
        case=f"update of {num_updated} distinct rows of {num_rows}, {name}, D={dim} {dtype}",
        ours=OURS,
        impls={OURS: in_turn(picks, lambda rows: update_rows(blocks, rows, grads, rule, scalars, **numbers))},
        bytes_moved=num_updated * (width * dim + bytes_beside),
        items=num_updated,
        targets={"items_per_s": TARGETS[name]} if name in TARGETS and dim == 64 and DEVICE == "cpu" else None,
        device=DEVICE,
    )
