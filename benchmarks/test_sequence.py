"""Sequence models: attention without padding at the lengths that histories have, all items in one loss, long sequences.

    pytest benchmarks/test_sequence.py --benchmark-json=out.json

Lengths follow a power law on 1 to 2,048 with mean 64: most histories are short, a few fill the limit. The peer pads to the
longest and calls torch's scaled_dot_product_attention, padding and unpadding included, as its caller pays them. Memory is the
rise of the process's resident memory during a step (forward and gradients), inputs not counted. In the loss over all items
the plain peer holds [N, items] logits and their gradient.
"""

import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recis.bench.harness import alternate, compare, keep
from recis.bench.peak_memory import peak_bytes
from recis.models.hstu import Hstu
from recis.models.sasrec import SasRec
from recis_kernels.jagged import lengths_to_offsets
from recis_kernels.jagged_attention import jagged_attention
from recis_kernels.linear_cross_entropy import linear_cross_entropy

MIB = 2**20
MEAN, LONGEST = 64, 2048
NUM_SEQUENCES, NUM_HEADS, HEAD_DIM = 64, 2, 32
LOSS_LIMIT = 2 * 2**30
LOSS_ROUNDS = 2  # seconds each


def power_law_lengths(num: int, mean: float = MEAN, longest: int = LONGEST, seed: int = 0) -> torch.Tensor:
    """Return lengths [num] with P(l) ~ l ** -a on 1 .. longest, a such that the mean is as asked; one is the longest."""
    values = np.arange(1, longest + 1, dtype=np.float64)
    low, high, weights = 0.5, 3.0, values
    for _ in range(60):
        exponent = (low + high) / 2
        weights = values**-exponent
        low, high = (exponent, high) if weights @ values / weights.sum() > mean else (low, exponent)
    rng = np.random.default_rng(seed)
    # stratified, so that the sample has the law's mean and not luck's
    u = (np.arange(num) + rng.random(num)) / num
    lengths = np.searchsorted(np.cumsum(weights) / weights.sum(), u) + 1
    lengths[-1] = longest
    return torch.from_numpy(rng.permutation(lengths))


def test_attention_at_power_law_lengths(benchmark):
    lengths = power_law_lengths(NUM_SEQUENCES)
    offsets = lengths_to_offsets(lengths)
    num_rows = int(offsets[-1])
    torch.manual_seed(0)
    rows = [torch.randn(num_rows, NUM_HEADS, HEAD_DIM) for _ in range(3)]
    upstream = torch.randn(num_rows, NUM_HEADS, HEAD_DIM)
    inside = torch.arange(LONGEST) < lengths[:, None]

    def padded(*parts):
        wide = [
            part.new_zeros(*inside.shape, NUM_HEADS, HEAD_DIM).index_put(inside.nonzero(as_tuple=True), part)
            for part in parts
        ]
        query, key, value = (part.transpose(1, 2) for part in wide)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)[inside]

    def step(op):
        asked = [part.detach().requires_grad_() for part in rows]
        out = op(*asked)
        return [out.detach(), *torch.autograd.grad(out, asked, upstream)]

    runs = {
        "jagged": lambda: step(lambda *parts: jagged_attention(parts[0], parts[1], parts[2], offsets, causal=True)),
        "padded SDPA": lambda: step(padded),
    }
    for got, want in zip(runs["jagged"](), runs["padded SDPA"](), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    memory = {name: peak_bytes(run) for name, run in runs.items()}
    assert memory["padded SDPA"] >= 3 * memory["jagged"], memory
    compare(
        benchmark,
        case=f"{NUM_SEQUENCES} sequences, mean {num_rows / NUM_SEQUENCES:.0f}, longest {LONGEST}, H={NUM_HEADS} "
        f"D={HEAD_DIM}, causal, with gradients",
        ours="jagged",
        impls=runs,
        rounds=7,
        targets={"padded SDPA": 2.0},
        extra={"peak_mib": {name: round(value / MIB, 1) for name, value in memory.items()}},
    )


def test_loss_over_100_000_items(benchmark):
    num_items, num_positions, width = 100_000, 4096, 64
    torch.manual_seed(0)
    hidden, table = torch.randn(num_positions, width), torch.randn(num_items, width) * 0.05
    wanted = torch.randint(0, num_items, (num_positions,))

    def step(loss_of):
        asked = [hidden.detach().requires_grad_(), table.detach().requires_grad_()]
        loss = loss_of(*asked)
        return [loss.detach(), *torch.autograd.grad(loss, asked)]

    runs = {
        "linear_cross_entropy": lambda: step(lambda h, w: linear_cross_entropy(h, w, wanted)),
        "plain": lambda: step(lambda h, w: F.cross_entropy(h @ w.T, wanted)),
    }
    memory = {name: peak_bytes(run) for name, run in runs.items()}
    assert memory["linear_cross_entropy"] <= LOSS_LIMIT, memory
    for got, want in zip(runs["linear_cross_entropy"](), runs["plain"](), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    times = alternate(runs, LOSS_ROUNDS, "cpu")
    benchmark.pedantic(runs["linear_cross_entropy"], rounds=1, iterations=1)
    keep(
        benchmark,
        case=f"{num_positions} positions, {num_items} items, H={width}, with gradients",
        ours="linear_cross_entropy",
        seconds=times,
        items=num_positions,
        extra={"rounds": LOSS_ROUNDS, "peak_mib": {name: round(value / MIB, 1) for name, value in memory.items()}},
    )


@pytest.mark.parametrize("length", [1024, 2048, 4096, 8192])
@pytest.mark.parametrize("kind", ["sasrec", "hstu"])
def test_long_sequences(benchmark, kind, length):
    """One layer over one sequence and 64 short ones: memory grows with the rows, not with the longest's square."""
    width, short = 64, 64
    lengths = torch.tensor([length, *[16] * short])
    offsets = lengths_to_offsets(lengths)
    num_rows = int(offsets[-1])
    torch.manual_seed(0)
    rows, upstream = torch.randn(num_rows, width), torch.randn(num_rows, width)
    if kind == "sasrec":
        encoder = SasRec(num_layers=1, num_heads=2, num_positions=8192, dropout=0.0).build(width)
        given = (offsets,)
    else:
        encoder = Hstu(num_layers=1, num_heads=2, head_width=32, divisor=64, dropout=0.0).build(width)
        given = (offsets, torch.arange(num_rows) * 60)

    def step():
        asked = rows.detach().requires_grad_()
        encoder.zero_grad()
        encoder(asked, *given).backward(upstream)
        return asked.grad

    step()
    memory = peak_bytes(step)
    assert memory < num_rows * width * 4 * 60 + 64 * MIB, memory  # 60 arrays of [rows, width]; [T, T] would be 256 MiB
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begun)
    benchmark.pedantic(step, rounds=1, iterations=1)
    keep(
        benchmark,
        case=f"{kind}, 1 layer, width {width}, one of {length} and {short} of 16, with gradients",
        ours=kind,
        seconds={kind: seconds},
        items=num_rows,
        extra={"peak_mib": round(memory / MIB, 1), "rows": num_rows},
    )
