"""Speed of HSTU's pointwise attention over variable-length sequences, forward and with its gradients.

    make bench, or: pytest benchmarks/test_kernel_hstu_attention.py --benchmark-json=out.json

Lengths are skewed as user histories are: most are short, some fill max_length. The peer is the formula in torch on
sequences padded to the longest, as in the paper's public code for devices without its kernels; padding and unpadding are
part of its time, as its caller would pay them.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recis.bench.harness import at_threads, compare
from recis_kernels.attention_inputs import TimeBias
from recis_kernels.hstu_attention import hstu_attention
from recis_kernels.jagged import lengths_to_offsets

CASES = {"small": (8, 8, 40, 1, 8), "step": (128, 40, 512, 4, 64), "long": (16, 300, 2048, 2, 64)}
MAX_DISTANCE, NUM_BUCKETS = 128, 32


def skewed_lengths(num_sequences: int, mean_length: int, max_length: int, seed: int = 0) -> torch.Tensor:
    """Return lengths: geometric, and one sequence in 32 of the greatest length."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(1 / mean_length, num_sequences), max_length)
    lengths[:: max(1, min(32, num_sequences - 1))] = max_length
    return torch.from_numpy(lengths)


class Data:
    """Rows of one batch, and the same padded."""

    def __init__(self, case: str) -> None:
        num_sequences, mean_length, self.max_length, self.num_heads, dim = CASES[case]
        torch.manual_seed(0)
        self.lengths = skewed_lengths(num_sequences, mean_length, self.max_length)
        self.offsets = lengths_to_offsets(self.lengths)
        num_rows = int(self.offsets[-1])
        self.rows = [torch.randn(num_rows, self.num_heads, dim) for _ in range(3)]
        self.upstream = torch.randn(num_rows, self.num_heads, dim)
        self.position = torch.randn(self.num_heads, 2 * MAX_DISTANCE - 1)
        self.time = TimeBias(
            table=torch.randn(self.num_heads, NUM_BUCKETS),
            boundaries=1 << torch.arange(NUM_BUCKETS - 1),
            query_times=torch.randint(0, 1 << 24, (num_rows,)).sort().values,
        )
        step = torch.arange(self.max_length)
        self.inside = step < self.lengths[:, None]
        self.distance = (step[:, None] - step).clamp(1 - MAX_DISTANCE, MAX_DISTANCE - 1) + MAX_DISTANCE - 1
        self.num_pairs = int((self.lengths * (self.lengths + 1) // 2).sum())
        self.name = (
            f"{num_sequences} sequences, mean {num_rows / num_sequences:.0f}, longest {self.max_length}, "
            f"H={self.num_heads} D={dim}, causal"
        )

    def pad(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows [L, ...] as [B, T, ...]."""
        padded = rows.new_zeros(*self.inside.shape, *rows.shape[1:])
        return padded.index_put(self.inside.nonzero(as_tuple=True), rows)

    def dense_bias(self, position: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Return the biases as [B, H, T, T]."""
        times = self.pad(self.time.query_times)
        buckets = torch.bucketize(times[:, :, None] - times[:, None], self.time.boundaries, right=True)
        return position[:, self.distance] + table[:, buckets].transpose(0, 1)


def step_of(
    op: Callable[..., torch.Tensor], leaves: list[torch.Tensor], upstream: torch.Tensor | None
) -> Callable[[], list[torch.Tensor]]:
    """Return a function that runs op, with its gradients where there is an upstream."""

    def run() -> list[torch.Tensor]:
        if upstream is None:
            with torch.no_grad():
                return [op(*leaves)]
        asked = [leaf.detach().requires_grad_() for leaf in leaves]
        out = op(*asked)
        return [out.detach(), *torch.autograd.grad(out, asked, upstream)]

    return run


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("grads", [False, True], ids=["forward", "with_grads"])
@pytest.mark.parametrize("case", CASES)
def test_hstu_attention(benchmark, case, grads, biased):
    if case == "long" and biased:
        pytest.skip("the padded peer would need several tensors of 16 * 2 * 2048 * 2048 floats: 0.5 GiB each")
    data = Data(case)

    def ours(query, key, value, position=None, table=None):
        time = None if table is None else replace(data.time, table=table)
        options = {"max_length": data.max_length, "position_bias": position, "time": time}
        return hstu_attention(query, key, value, data.offsets, **options)

    def padded(query, key, value, position=None, table=None):
        queries, keys, values = (data.pad(part).transpose(1, 2) for part in (query, key, value))
        scores = queries @ keys.mT * query.shape[2] ** -0.5
        if position is not None and table is not None:
            scores = scores + data.dense_bias(position, table)
        out = (F.silu(scores) / data.max_length).tril() @ values  # padding stands behind: no item sees it
        return out.transpose(1, 2)[data.inside]

    leaves = [*data.rows, data.position, data.time.table] if biased else data.rows
    upstream = data.upstream if grads else None
    runs = {"cpu": step_of(ours, leaves, upstream), "padded torch": step_of(padded, leaves, upstream)}
    for got, want in zip(runs["cpu"](), runs["padded torch"](), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * max(1.0, float(want.abs().max())))
    compare(
        benchmark,
        case=f"{data.name}{', position and time bias' if biased else ''}, {'with gradients' if grads else 'forward'}",
        ours="cpu",
        impls={**runs, "cpu, 1 thread": at_threads(1, runs["cpu"])},
        items=data.num_pairs * data.num_heads,
    )
