"""A training step of tables as a run does it: collection, backward, clipping, SparseOptimizer, end of the step.

Kernels alone are the other jobs; here is all that recis does around them. The check compares some small steps with the
same steps on the CPU, and on a GPU then makes steps in which a host sync is an error.
"""

from typing import Any

import torch
from torch import Tensor

from recis.bench.inputs import even_offsets
from recis.bench.op_cases import Point, Work, inputs_of
from recis.embedding import EmbeddingBagCollection, TableConfig, TableSet
from recis.jagged import KeyedJaggedTensor
from recis.optim import RowWiseAdagrad, SparseOptimizer, clip_grad_norm
from recis_kernels.dispatch import Impl
from recis_kernels.philox import hash64

CHECKED_BAGS, CHECKED_STEPS = 64, 3


class TableStep:
    """Tables and what a step needs of them.

    Args:
        device: where the rows lie.
        more: fields of the TableConfig beside name, features and width.
    """

    def __init__(self, point: Point, device: torch.device, **more: Any) -> None:
        dtype = "bfloat16" if point.dtype == torch.bfloat16 else "float32"
        config = TableConfig(
            name="t",
            features=("f",),
            embedding_dim=point.dim,
            dtype=dtype,
            optimizer=RowWiseAdagrad(lr=0.01),
            **more,
        )
        self.tables = TableSet([config], seed=0, device=device)
        self.pooled = EmbeddingBagCollection(self.tables)
        self.sparse = SparseOptimizer([self.pooled])
        self.step = 0

    def run(self, batch: KeyedJaggedTensor, upstream: Tensor) -> Tensor:
        """Make one step; returns the pooled bags."""
        self.step += 1
        out = self.pooled(batch)["f"]
        out.backward(upstream)
        clip_grad_norm([], [self.pooled], 1e9)
        self.sparse.step()
        self.pooled.end_step(self.step)
        return out


def table_step(point: Point, device: torch.device, impl: Impl = "auto", **more: Any) -> Work:
    """Steps on hashed ids; the warm-up gives them their rows. `impl` is what the device says: tables choose.

    Args:
        more: as in TableStep.
    """
    del impl
    offsets = even_offsets(point.num_bags, point.bag_length, device)
    batches = [KeyedJaggedTensor(("f",), hash64(ids), offsets=offsets) for ids in inputs_of(point, device)]
    upstream = torch.full((point.num_bags, point.dim), 1e-3, device=device)
    timed = TableStep(point, device, **more)
    timed.tables["t"].reserve(point.num_rows)

    def run(n: int) -> object:
        return timed.run(batches[n % len(batches)], upstream)

    def check() -> None:
        _check_against_cpu(point, device, batches[0], **more)
        for n in range(point.num_inputs):
            run(n)
        if device.type == "cuda":
            _check_syncs(run, point.num_inputs)

    num_ids = point.num_bags * point.bag_length
    return Work(
        case=f"tables, whole step with clipping, row-wise Adagrad, {point.words}",
        run=run,
        check=check,
        num_inputs=point.num_inputs,
        bytes_moved=None,
        items=num_ids,
    )


def _check_against_cpu(point: Point, device: torch.device, batch: KeyedJaggedTensor, **more: Any) -> None:
    """Make steps of a part of the batch on both devices; rows, ids and counters must agree."""
    num_bags = min(CHECKED_BAGS, point.num_bags)
    ids = batch.values[: num_bags * point.bag_length]
    found = []
    for where in (torch.device("cpu"), device):
        small = TableStep(point, where, **more)
        offsets, upstream = even_offsets(num_bags, point.bag_length, where), torch.ones(num_bags, point.dim)
        for step in range(CHECKED_STEPS):
            moved = KeyedJaggedTensor(("f",), (ids + step % 2).to(where), offsets=offsets)
            small.run(moved, upstream.to(where))
        table = small.tables["t"]
        rows = {name: values.cpu() for name, values in table.export().items()}
        found.append((rows, table.counters().to_dict() | {"capacity": 0}))
    (want, counts), (got, other_counts) = found
    assert counts == other_counts, f"counters differ: {counts} and {other_counts}"
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def _check_syncs(run: Any, num_steps: int) -> None:
    """Make steps in which a host sync is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for n in range(num_steps):
            run(n)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        raise AssertionError(f"a step of a table waits for the device: {error}") from error
    finally:
        torch.cuda.set_sync_debug_mode("default")
