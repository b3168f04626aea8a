"""Speed of reductions per bag beside FBGEMM's CPU ops and torch.segment_reduce: sum, mean, max, softmax, with gradients.

    make bench, or: pytest benchmarks/test_kernel_segment.py --benchmark-json=out.json

FBGEMM sums single columns only (segment_sum_csr) and pads inside its softmax; where it has no op it is not listed.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch

from recis.bench.harness import at_threads, compare
from recis_kernels.jagged import lengths_to_offsets
from recis_kernels.segment import segment_max, segment_mean, segment_softmax, segment_sum

try:
    import fbgemm_gpu  # noqa: F401  (its import registers the ops)

    FBGEMM: Any = torch.ops.fbgemm
except ImportError:
    FBGEMM = None

MISSING = () if FBGEMM else ("fbgemm_gpu",)
SHORT_JOB_BYTES = 1 << 22  # what takes microseconds is called often in a row
CASES = [(128, 20, 1), (128, 20, 64), (8192, 20, 1), (8192, 20, 64), (1024, 100, 128)]
REDUCTIONS = {"sum": segment_sum, "mean": segment_mean, "max": segment_max}
sizes = pytest.mark.parametrize(("bags", "mean_length", "dim"), CASES)


def bags_of(bags: int, mean_length: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return values [L, D], offsets [B + 1], and the longest bag."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 2 * mean_length + 1, (bags,), generator=generator)
    offsets = lengths_to_offsets(lengths)
    return torch.randn(int(offsets[-1]), dim, generator=generator), offsets, int(lengths.max())


def run(benchmark, case: str, impls: Mapping[str, Callable[[], object]], bytes_moved: int) -> None:
    """Time them beside ours at one thread; none of the peers may be faster."""
    targets = dict.fromkeys((name for name in impls if name != "numba"), 1.0)
    impls = {**impls, "numba, 1 thread": at_threads(1, impls["numba"])}
    compare(
        benchmark,
        case=case,
        ours="numba",
        impls=impls,
        bytes_moved=bytes_moved,
        missing=MISSING,
        targets=targets,
        calls=50 if bytes_moved < SHORT_JOB_BYTES else 1,
    )


@sizes
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduction(benchmark, name, bags, mean_length, dim):
    values, offsets, _ = bags_of(bags, mean_length, dim)
    impls: dict[str, Callable[[], torch.Tensor]] = {
        "numba": partial(REDUCTIONS[name], values, offsets),
        "torch.segment_reduce": partial(torch.segment_reduce, values, name, offsets=offsets),
    }
    if FBGEMM and name == "sum" and dim == 1:
        column = values[:, 0].contiguous()
        impls["fbgemm"] = lambda: FBGEMM.segment_sum_csr(1, offsets, column)[:, None]
    want = REDUCTIONS[name](values, offsets, impl="reference")
    for run_one in impls.values():
        torch.testing.assert_close(run_one(), want, rtol=1e-4, atol=1e-4)
    run(benchmark, f"segment_{name} {bags}x{mean_length} D{dim}", impls, 4 * (values.numel() + bags * dim))


@sizes
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "with_gradient"])
def test_softmax(benchmark, gradient, bags, mean_length, dim):
    values, offsets, longest = bags_of(bags, mean_length, dim)
    forwards: dict[str, Callable[[], torch.Tensor]] = {"numba": partial(segment_softmax, values, offsets)}
    if FBGEMM:
        forwards["fbgemm"] = lambda: FBGEMM.jagged_softmax(values, offsets, longest)[0]
    for forward in forwards.values():
        want = segment_softmax(values, offsets, impl="reference")
        torch.testing.assert_close(forward(), want, rtol=1e-4, atol=1e-5)
    if not gradient:
        run(benchmark, f"segment_softmax {bags}x{mean_length} D{dim}", dict(forwards), 8 * values.numel())
        return
    values.requires_grad_()
    upstream = torch.randn(values.shape)

    def step(forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        return torch.autograd.grad(forward(), values, upstream)[0]

    impls: dict[str, Callable[[], object]] = {name: partial(step, forward) for name, forward in forwards.items()}
    case = f"segment_softmax and gradient {bags}x{mean_length} D{dim}"
    run(benchmark, case, impls, 20 * values.numel())
