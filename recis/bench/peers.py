"""Other libraries doing the jobs of `op_cases`, where they are installed: FBGEMM's tables and jagged ops, torchrec.

torch's own ops stand with the jobs; these need imports that fail on many machines, so they are tried once and otherwise
named. A peer gets the same inputs, drawn from the same seeds.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from recis.bench.inputs import weights
from recis.bench.op_cases import EPS, LR, Point, inputs_of, offsets_of

Run = Callable[[int], object]
NAMES = ("fbgemm_gpu", "torchrec")


@cache
def _installed(name: str) -> str | None:
    """Import a peer and return None, or why it cannot be imported; a library built for another torch fails in many ways."""
    try:
        __import__(name)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return None


def missing() -> list[str]:
    """Return the names of the peers that cannot be imported here."""
    return [name for name in NAMES if _installed(name) is not None]


def of_op(op: str, point: Point, device: torch.device) -> Mapping[str, Run]:
    """Return the installed peers of an op ("pooled", "step", "padded", ...) at a point of its grid."""
    builders = {
        "pooled": _table_forward,
        "step": _table_step,
        "padded": _jagged_to_dense,
    }
    return builders[op](point, device) if op in builders and _installed("fbgemm_gpu") is None else {}


def _table(point: Point, device: torch.device) -> Any:
    """Return FBGEMM's table-batched embedding with row-wise Adagrad, rows given, on CPU or GPU."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    build: Any = SplitTableBatchedEmbeddingBagsCodegen
    on_gpu = device.type == "cuda"
    where = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA) if on_gpu else (EmbeddingLocation.HOST, ComputeDevice.CPU)
    table = build(
        [(point.num_rows, point.dim, *where)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=LR,
        eps=EPS,
        **({"device": torch.cuda.current_device()} if on_gpu else {}),
    )
    table.split_embedding_weights()[0].copy_(weights(point.num_rows, point.dim, device))
    return table


def _table_forward(point: Point, device: torch.device) -> Mapping[str, Run]:
    if point.dtype != torch.float32 or point.dim % 4:  # its rows are padded to four floats
        return {}
    table, batches, (offsets, _) = _table(point, device), inputs_of(point, device), offsets_of(point, device)

    def forward(n: int) -> object:
        with torch.no_grad():
            return table(batches[n % len(batches)], offsets)

    return {"fbgemm TBE forward": forward}


def _table_step(point: Point, device: torch.device) -> Mapping[str, Run]:
    """Forward, backward and update in one: FBGEMM has no way to run the update alone."""
    if point.dtype != torch.float32 or point.dim % 4:
        return {}
    table, batches, (offsets, _) = _table(point, device), inputs_of(point, device), offsets_of(point, device)
    upstream = weights(point.num_bags, point.dim, device)

    def step(n: int) -> object:
        return table(batches[n % len(batches)], offsets).backward(upstream)

    return {"fbgemm TBE": step}


def _jagged_to_dense(point: Point, device: torch.device) -> Mapping[str, Run]:
    offsets, num_values = offsets_of(point, device)
    longest = int(offsets.diff().max())
    values = weights(num_values, point.dim, device).to(point.dtype)
    found: dict[str, Run] = {
        "fbgemm jagged_2d_to_dense": lambda n: torch.ops.fbgemm.jagged_2d_to_dense(values, offsets, longest)
    }
    if _installed("torchrec") is None:
        from torchrec import JaggedTensor

        jagged = JaggedTensor(values=values, offsets=offsets)
        found["torchrec JaggedTensor.to_padded_dense"] = lambda n: jagged.to_padded_dense(longest)
    return found
