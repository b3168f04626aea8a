"""Speed of jagged ops beside FBGEMM's CPU ops: offsets, padding and its inverse, reordering of bags, with gradients.

    make bench, or: pytest benchmarks/test_kernel_jagged.py --benchmark-json=out.json

FBGEMM works on the same tensors in the same process; its own threads are OpenMP's. The target is not to be slower.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from recis.bench.harness import at_threads, compare
from recis_kernels.jagged import jagged_to_padded, lengths_to_offsets, merge_offsets, padded_to_jagged
from recis_kernels.jagged_runs import concat_bags, permute_bags, split_bags

try:
    import fbgemm_gpu  # noqa: F401  (its import registers the ops)

    FBGEMM: Any = torch.ops.fbgemm
except ImportError:
    FBGEMM = None

MISSING = () if FBGEMM else ("fbgemm_gpu",)
SHORT_JOB_BYTES = 1 << 22  # what takes microseconds is called often in a row
CASES = [(128, 20, 1), (128, 20, 64), (8192, 20, 1), (8192, 20, 64), (1024, 100, 128)]
sizes = pytest.mark.parametrize(("bags", "mean_length", "dim"), CASES)


def bags_of(bags: int, mean_length: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return values [L, D], lengths [B] from 0 to twice the mean, and offsets."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 2 * mean_length + 1, (bags,), generator=generator)
    offsets = lengths_to_offsets(lengths)
    return torch.randn(int(offsets[-1]), dim, generator=generator), lengths, offsets


def run(benchmark, case: str, ours: Callable[[], object], peer: Callable[[], object] | None, bytes_moved: int) -> None:
    """Time ours at all threads and at one, beside FBGEMM's op where there is one to compare with."""
    impls = {"numba": ours, "numba, 1 thread": at_threads(1, ours)}
    if peer is not None:
        impls |= {"fbgemm": peer, "fbgemm, 1 thread": at_threads(1, peer)}
    targets = {} if peer is None else {"fbgemm": 1.0, "fbgemm, 1 thread": 1.0}
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
def test_lengths_to_offsets(benchmark, bags, mean_length, dim):
    _, lengths, offsets = bags_of(bags, mean_length, dim)
    peer = partial(FBGEMM.asynchronous_complete_cumsum, lengths) if FBGEMM else None
    assert peer is None or torch.equal(peer(), offsets)
    run(benchmark, f"lengths_to_offsets {bags}", partial(lengths_to_offsets, lengths), peer, 16 * bags)


@sizes
def test_to_padded(benchmark, bags, mean_length, dim):
    values, lengths, offsets = bags_of(bags, mean_length, dim)
    longest = int(lengths.max())
    ours = partial(jagged_to_padded, values, offsets, longest)
    peer = partial(FBGEMM.jagged_to_padded_dense, values, [offsets], [longest], 0.0) if FBGEMM else None
    assert torch.equal(ours(), jagged_to_padded(values, offsets, longest, impl="reference"))
    assert peer is None or torch.equal(peer(), ours())
    moved = 4 * (values.numel() + bags * longest * dim)
    run(benchmark, f"jagged_to_padded {bags}x{mean_length} D{dim}", ours, peer, moved)


@sizes
def test_to_jagged(benchmark, bags, mean_length, dim):
    values, lengths, offsets = bags_of(bags, mean_length, dim)
    padded = jagged_to_padded(values, offsets, int(lengths.max()))
    ours = partial(padded_to_jagged, padded, offsets, values.shape[0])
    peer = (lambda: FBGEMM.dense_to_jagged(padded, [offsets], values.shape[0])[0]) if FBGEMM else None
    assert torch.equal(ours(), values)
    assert peer is None or torch.equal(peer(), values)
    run(benchmark, f"padded_to_jagged {bags}x{mean_length} D{dim}", ours, peer, 8 * values.numel())


@sizes
def test_to_padded_and_back_through_autograd(benchmark, bags, mean_length, dim):
    values, lengths, offsets = bags_of(bags, mean_length, dim)
    longest = int(lengths.max())
    values.requires_grad_()
    upstream = torch.randn(bags, longest, dim)

    def step(forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        return torch.autograd.grad(forward(), values, upstream)[0]

    ours = partial(step, lambda: jagged_to_padded(values, offsets, longest))
    peer = partial(step, lambda: FBGEMM.jagged_to_padded_dense(values, [offsets], [longest], 0.0)) if FBGEMM else None
    assert peer is None or torch.equal(peer(), ours())
    moved = 8 * (values.numel() + bags * longest * dim)
    run(benchmark, f"jagged_to_padded and gradient {bags}x{mean_length} D{dim}", ours, peer, moved)


@sizes
def test_permute_bags(benchmark, bags, mean_length, dim):
    values, lengths, offsets = bags_of(bags, mean_length, dim)
    order = torch.randperm(bags, generator=torch.Generator().manual_seed(1))
    if dim == 1:
        values = values[:, 0].contiguous()
    ours, peer = partial(permute_bags, values, offsets, order), None
    if FBGEMM:
        short = order.int()
        peer = {
            True: lambda: FBGEMM.permute_1D_sparse_data(short, lengths, values, None, None)[1],
            False: lambda: FBGEMM.jagged_index_select(values, lengths, order)[0],
        }[dim == 1]
        assert torch.equal(peer(), ours()[0])
    run(benchmark, f"permute_bags {bags}x{mean_length} D{dim}", ours, peer, 8 * values.numel())


@sizes
def test_concat_and_split_bags(benchmark, bags, mean_length, dim):
    """FBGEMM has no CPU op for these."""
    values, _, offsets = bags_of(bags, mean_length, dim)

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        joined, _ = concat_bags(values, offsets, values, offsets)
        return split_bags(joined, offsets, offsets, values.shape[0])

    assert all(torch.equal(part, values) for part in ours())
    run(benchmark, f"concat_bags, split_bags {bags}x{mean_length} D{dim}", ours, None, 32 * values.numel())


@sizes
def test_merge_offsets(benchmark, bags, mean_length, dim):
    _, lengths, offsets = bags_of(bags, mean_length, dim)
    parts, joined = [offsets] * 20, torch.cat([lengths] * 20)
    peer = (lambda: FBGEMM.asynchronous_complete_cumsum(torch.cat([lengths] * 20))) if FBGEMM else None
    assert torch.equal(merge_offsets(parts), lengths_to_offsets(joined))
    run(benchmark, f"merge_offsets 20 x {bags}", partial(merge_offsets, parts), peer, 320 * bags)
