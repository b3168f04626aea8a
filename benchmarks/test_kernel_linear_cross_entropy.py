"""Speed and peak memory of the cross-entropy over a vocabulary, forward and backward.

    make bench, or: pytest benchmarks/test_kernel_linear_cross_entropy.py --benchmark-json=out.json

Peers: F.cross_entropy(F.linear(...)), and torch's own chunked F.linear_cross_entropy where this torch has it (from 2.13),
with its default chunks in the small case and with chunks of our size in the others. Peak memory is measured in a process
of its own per implementation: growth of the resident set on the CPU, the allocator's peak on a GPU; inputs not counted.
"""

import gc
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from recis.bench.harness import compare
from recis_kernels.linear_cross_entropy import linear_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS = "triton" if DEVICE == "cuda" else "torch"
PLAIN = "F.cross_entropy(F.linear)"
CASES = {  # tokens, words, width, dtype
    "cpu": [(1024, 32768, 512, torch.float32), (2048, 32768, 256, torch.float32), (1024, 32768, 128, torch.bfloat16)],
    "cuda": [
        (4096, 32768, 4096, torch.bfloat16),
        (32768, 32768, 4096, torch.bfloat16),
        (4096, 128256, 4096, torch.bfloat16),
        (16384, 128256, 4096, torch.bfloat16),
    ],
}[DEVICE]
SMALL = (256, 32768, 256, torch.float32)
ROUNDS = 9 if DEVICE == "cpu" else 30  # a call takes seconds on a CPU
NONE_AT_MOST = 1.4  # one product more than mean and sum
HIDDEN_SCALE = 0.05


def make_inputs(num_tokens: int, vocab: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    hidden = torch.randn(num_tokens, width, device=DEVICE).to(dtype).requires_grad_()
    weight = (HIDDEN_SCALE * torch.randn(vocab, width, device=DEVICE)).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (num_tokens,), device=DEVICE)


def _plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets, reduction=reduction)


def _native(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, reduction: str, chunk: int | None
) -> torch.Tensor:
    nn: Any = torch.nn
    options = {} if chunk is None else {"batch_chunk_size": chunk, "chunking_method": None}
    chosen = nn.LinearCrossEntropyOptions(**options)
    return F.linear_cross_entropy(hidden, weight, targets, reduction=reduction, options=chosen)  # type: ignore[attr-defined]


def losses(*, with_default_chunks: bool) -> tuple[dict[str, Callable[..., torch.Tensor]], list[str]]:
    """Return the implementations by name, and the names of what is not installed."""
    found: dict[str, Any] = {OURS: linear_cross_entropy, PLAIN: _plain}
    if not hasattr(F, "linear_cross_entropy"):
        return found, ["F.linear_cross_entropy (torch 2.13)"]
    found["F.linear_cross_entropy, chunks as ours"] = partial(_native, chunk=512 if DEVICE == "cpu" else 1024)
    if with_default_chunks:
        found["F.linear_cross_entropy, its chunks"] = partial(_native, chunk=None)
    return found, []


def step(loss: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], reduction: str) -> list[torch.Tensor]:
    """Return the loss and the gradients of hidden and weight."""
    out = loss(*inputs, reduction=reduction)
    upstream = torch.linspace(0.5, 1.5, out.numel(), device=out.device, dtype=out.dtype).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad(out, inputs[:2], upstream)]


def peak_bytes(name: str, case: tuple[int, int, int, torch.dtype], reduction: str) -> int:
    """Return by how much one forward and backward raised the memory of a fresh process above its inputs."""
    words = [name, json.dumps(case[:3]), str(case[3]).removeprefix("torch."), reduction]
    command = [sys.executable, __file__, *words]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def _resident_peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM: peak memory needs Linux")


def main(name: str, sizes: str, dtype: str, reduction: str) -> None:
    """Print the bytes of one step of implementation `name`."""
    num_tokens, vocab, width = json.loads(sizes)
    loss = losses(with_default_chunks=True)[0][name]
    warm = make_inputs(8, 16, 4, getattr(torch, dtype))
    step(loss, warm, reduction)
    inputs = make_inputs(num_tokens, vocab, width, getattr(torch, dtype))
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(loss, inputs, reduction)
        print(torch.cuda.max_memory_allocated() - before)
        return
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to what is resident now
    before = _resident_peak()
    step(loss, inputs, reduction)
    print(_resident_peak() - before)


def measure(benchmark: Any, case: tuple[int, int, int, torch.dtype], reduction: str, *, small: bool) -> None:
    """Check that all agree, then time them and store their peak memory."""
    torch.manual_seed(0)
    inputs = make_inputs(*case)
    impls, missing = losses(with_default_chunks=small)
    wide = tuple(leaf.detach().float().requires_grad_() for leaf in inputs[:2])
    want = step(_plain, (*wide, inputs[2]), reduction)
    tolerance = 1e-3 if case[3] == torch.float32 else 2e-2
    for loss in impls.values():
        for got, right in zip(step(loss, inputs, reduction), want, strict=True):
            scale = right.abs().max().item()
            torch.testing.assert_close(got.float() / scale, right / scale, rtol=tolerance, atol=tolerance)
    del want, wide
    peaks = {name: peak_bytes(name, case, reduction) for name in impls}
    num_tokens, vocab, width, dtype = case
    compare(
        benchmark,
        case=f"{reduction}, T={num_tokens} V={vocab} H={width} {str(dtype).removeprefix('torch.')}",
        ours=OURS,
        impls={name: partial(step, loss, inputs, reduction) for name, loss in impls.items()},
        items=num_tokens,
        missing=missing,
        targets={PLAIN: 1 / NONE_AT_MOST if reduction == "none" else 1.0},
        rounds=ROUNDS,
        device=DEVICE,
        extra={
            "peak_mib": {name: round(peak / 2**20, 1) for name, peak in peaks.items()},
            "peak_of_plain": {name: round(peak / peaks[PLAIN], 3) for name, peak in peaks.items()},
            "peak_target": 0.5,
        },
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_linear_cross_entropy(benchmark, case, reduction):
    measure(benchmark, case, reduction, small=False)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy_small(benchmark, reduction):
    measure(benchmark, SMALL, reduction, small=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
