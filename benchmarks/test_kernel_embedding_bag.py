"""Speed of gathering and pooling rows out of row blocks, and of the gradient of the factors.

    make bench, or: pytest benchmarks/test_kernel_embedding_bag.py --benchmark-json=out.json
    pytest benchmarks/test_kernel_embedding_bag.py -k small      a minute, to see that it runs

Bags hold 1 to 50 ids, uniform or Zipf 1.2 over two million rows. Peers read one dense table: torch's embedding_bag and
index_select, and FBGEMM's table-batched embedding on CPU. On a GPU ours and torch's run there.
"""

from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.test_embedding_step import FBGEMM, batches, in_turn
from recis.bench.harness import at_threads, compare
from recis_kernels.embedding_bag import embedding_bag, factor_grads, row_gather
from recis_kernels.row_blocks import RowBlocks, RowLayout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS = "triton" if DEVICE == "cuda" else "numba"
SIZES = {"small": 5_000, "full": 2_000_000}
LONGEST_BAG = 50
FORMS = [(64, torch.float32), (128, torch.float32), (64, torch.bfloat16), (128, torch.bfloat16)]


@cache
def offsets_for(num_ids: int) -> Tensor:
    """Return offsets of bags of 1 .. LONGEST_BAG ids that hold num_ids in all."""
    lengths = np.random.default_rng(1).integers(1, LONGEST_BAG + 1, num_ids)
    ends = np.cumsum(lengths)
    ends = ends[: int(np.searchsorted(ends, num_ids)) + 1]
    ends[-1] = num_ids
    return torch.from_numpy(np.concatenate(([0], ends))).to(DEVICE)


class Data:
    """The same weights in row blocks and in one tensor, and batches of row numbers."""

    def __init__(self, size: str, distribution: str, dim: int, dtype: torch.dtype) -> None:
        num_rows = SIZES[size]
        self.weight = (
            (torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(1)) * 0.01).to(dtype).to(DEVICE)
        )
        self.blocks = RowBlocks(RowLayout(dim, dtype, (("h", 1),)), device=DEVICE)
        self.blocks.grow(num_rows)
        self.blocks.write(torch.arange(num_rows, device=DEVICE), {"weight": self.weight})
        self.ids = [batch.to(DEVICE) for batch in batches(distribution, num_rows)]
        self.offsets = offsets_for(self.ids[0].numel())
        self.num_bags = self.offsets.numel() - 1
        self.row_bytes = dim * dtype.itemsize
        self.name = f"{distribution}, {self.num_bags} bags of 1-{LONGEST_BAG}, {num_rows} rows, D={dim} {dtype}"

    def time(
        self, benchmark, op: str, impls: Mapping[str, Callable[[Tensor], object]], bytes_moved: int, **more
    ) -> None:
        """Time impls, each over the batches in turn; torch's once more with one thread."""
        runs = {name: in_turn(self.ids, run) for name, run in impls.items()}
        if DEVICE == "cpu":
            runs |= {
                f"{name}, 1 thread": at_threads(1, in_turn(self.ids, impls[name])) for name in impls if name != OURS
            }
        compare(
            benchmark,
            case=f"{op} {self.name}",
            ours=OURS,
            impls=runs,
            bytes_moved=bytes_moved,
            items=self.ids[0].numel(),
            device=DEVICE,
            **more,
        )


def fbgemm_forward(weight: Tensor, offsets: Tensor) -> Callable[[Tensor], Tensor]:
    """Return FBGEMM's pooled forward over the weights, on CPU."""
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    table = (weight.shape[0], weight.shape[1], EmbeddingLocation.HOST, ComputeDevice.CPU)
    module = SplitTableBatchedEmbeddingBagsCodegen([table])
    module.split_embedding_weights()[0].copy_(weight)

    def run(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return module(ids, offsets)

    return run


@pytest.mark.parametrize(("dim", "dtype"), FORMS, ids=str)
@pytest.mark.parametrize("distribution", ["uniform", "zipf"])
@pytest.mark.parametrize("size", SIZES)
def test_pooled_forward(benchmark, size, distribution, dim, dtype):
    data = Data(size, distribution, dim, dtype)
    impls: dict[str, Callable[[Tensor], Tensor]] = {
        OURS: lambda ids: embedding_bag(data.blocks, ids, None, data.offsets),
        "torch embedding_bag": lambda ids: torch.nn.functional.embedding_bag(
            ids, data.weight, data.offsets, mode="sum", include_last_offset=True
        ),
    }
    if FBGEMM and DEVICE == "cpu" and dtype == torch.float32:
        impls["fbgemm TBE"] = fbgemm_forward(data.weight, data.offsets)
    want = embedding_bag(data.blocks, data.ids[0], None, data.offsets, impl="reference" if size == "small" else "auto")
    for run in impls.values():
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # torch pools bf16 in bf16
        torch.testing.assert_close(run(data.ids[0]).float(), want, rtol=tolerance, atol=tolerance / 10)
    bytes_moved = data.ids[0].numel() * (8 + data.row_bytes) + data.num_bags * 4 * dim
    missing = () if FBGEMM and DEVICE == "cpu" else ("fbgemm TBE",)
    data.time(benchmark, "pooled forward", impls, bytes_moved, missing=missing)


@pytest.mark.parametrize("dim", [16, 64])
@pytest.mark.parametrize("size", SIZES)
def test_gather(benchmark, size, dim):
    data = Data(size, "uniform", dim, torch.float32)
    impls: dict[str, Callable[[Tensor], Tensor]] = {
        OURS: lambda ids: row_gather(data.blocks, ids),
        "torch index_select": lambda ids: data.weight.index_select(0, ids),
    }
    for run in impls.values():
        assert torch.equal(run(data.ids[0]), data.weight[data.ids[0]])
    data.time(benchmark, "gather", impls, data.ids[0].numel() * (8 + 2 * data.row_bytes))


@pytest.mark.parametrize("size", SIZES)
def test_factor_gradients(benchmark, size):
    data = Data(size, "uniform", 64, torch.float32)
    grad = torch.randn(data.num_bags, 64, device=DEVICE)
    bag = torch.arange(data.num_bags, device=DEVICE).repeat_interleave(data.offsets.diff())
    impls: dict[str, Callable[[Tensor], Tensor]] = {
        OURS: lambda ids: factor_grads(data.blocks, ids, None, data.offsets, grad),
        "torch rows times gradients": lambda ids: (data.weight[ids] * grad[bag]).sum(1),
    }
    for run in impls.values():
        want = (data.weight[data.ids[0]].double() * grad[bag].double()).sum(1)
        torch.testing.assert_close(run(data.ids[0]).double(), want, rtol=1e-4, atol=1e-6)
    data.time(benchmark, "gradient of factors", impls, data.ids[0].numel() * (12 + data.row_bytes))
