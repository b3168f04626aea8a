"""Speed of distinct ids: de-duplication by tickets and by sorting, the padded form, the order of pairs, owners of ids.

    make bench, or: pytest benchmarks/test_kernel_unique_ids.py --benchmark-json=out.json

Peers: torch.unique, numpy.unique, and fbgemm's jagged_unique_indices where it has a kernel for the device; none of them
keeps equal ids of different tables apart, so with 26 tables they get (table << 48) + id, made before the clock starts.
A position reads its id (8 B) and writes its inverse (4 B); a pair is written once (16 B): the least that must move.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from recis.bench.harness import at_threads, compare
from recis_kernels.ids_partition import ids_partition
from recis_kernels.unique_ids import Unique, order_by_segment_and_id, unique_ids, unique_ids_padded

NUM_IDS, VOCABULARY, NUM_RANKS = 163_840, 2_000_000, 8
DISTRIBUTIONS = pytest.mark.parametrize("distribution", ["uniform", "zipf"])


def draw(distribution: str, seed: int = 0) -> torch.Tensor:
    """Return the ids of a step, uniform or Zipf 1.2, spread over all of int64."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, VOCABULARY, NUM_IDS) if distribution == "uniform" else rng.zipf(1.2, NUM_IDS) % VOCABULARY
    return torch.from_numpy(picks) * 7919


def same_pairs(got: Unique, ids: torch.Tensor) -> None:
    """Check distinct ids, counts and inverse against torch.unique."""
    want, inverse, counts = torch.unique(ids, return_inverse=True, return_counts=True)
    order = got.ids.argsort()
    assert got.ids[order].equal(want)
    assert got.counts[order].equal(counts.int())
    assert got.ids[got.inverse.long()].equal(ids)
    assert want[inverse].equal(ids)


@pytest.mark.parametrize("num_tables", [1, 26])
@DISTRIBUTIONS
def test_unique_ids(benchmark, distribution, num_tables):
    ids = draw(distribution)
    tables = torch.arange(NUM_IDS, dtype=torch.int32) * num_tables // NUM_IDS
    segments = None if num_tables == 1 else tables
    keys = ids if num_tables == 1 else ids + (tables.long() << 48)
    got = unique_ids(ids, segments)
    if num_tables == 1:
        same_pairs(got, ids)
    assert got.ids.numel() == keys.unique().numel()
    for other in (unique_ids(ids, segments, impl="torch"), unique_ids_padded(ids, segments)):
        assert other.inverse.equal(got.inverse)
    impls: dict[str, Callable[[], object]] = {
        "numba": lambda: unique_ids(ids, segments),
        "numba, 1 thread": at_threads(1, lambda: unique_ids(ids, segments)),
        "numba, padded": lambda: unique_ids_padded(ids, segments),
        "torch (sorts)": lambda: unique_ids(ids, segments, impl="torch"),
        "torch.unique": lambda: torch.unique(keys, return_inverse=True, return_counts=True),
        "numpy.unique": lambda: np.unique(keys.numpy(), return_inverse=True, return_counts=True),
    }
    compare(
        benchmark,
        case=f"unique_ids {NUM_IDS} {distribution}, {num_tables} tables",
        ours="numba",
        impls=impls,
        bytes_moved=NUM_IDS * 12 + got.ids.numel() * 16,
        items=NUM_IDS,
        missing=["fbgemm jagged_unique_indices (CUDA only)"],
    )


def test_order_by_segment_and_id(benchmark):
    unique = unique_ids(draw("uniform"), torch.arange(NUM_IDS) % 26)
    order = order_by_segment_and_id(unique.ids, unique.segments, 26)
    arrays = unique.ids.numpy(), unique.segments.numpy()
    assert np.array_equal(order.numpy(), np.lexsort(arrays))
    assert order.equal(order_by_segment_and_id(unique.ids, unique.segments, 26, impl="torch"))
    compare(
        benchmark,
        case=f"order of {unique.ids.numel()} pairs of 26 tables",
        ours="numba",
        impls={
            "numba": lambda: order_by_segment_and_id(unique.ids, unique.segments, 26),
            "torch (two sorts)": lambda: order_by_segment_and_id(unique.ids, unique.segments, 26, impl="torch"),
            "numpy.lexsort": partial(np.lexsort, arrays),
        },
        items=unique.ids.numel(),
    )


@DISTRIBUTIONS
def test_ids_partition(benchmark, distribution):
    ids = draw(distribution)
    part = ids_partition(ids, NUM_RANKS)
    assert part.ids[part.inverse.long()].equal(ids)
    assert int(part.counts.sum()) == ids.unique().numel()

    def torch_partition() -> tuple[torch.Tensor, ...]:
        distinct, inverse = torch.unique(ids, return_inverse=True)
        order = (distinct % NUM_RANKS).argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.numel())
        return distinct[order], torch.bincount(distinct % NUM_RANKS), place[inverse]

    assert torch_partition()[0].numel() == part.ids.numel()
    compare(
        benchmark,
        case=f"ids_partition {NUM_IDS} {distribution}, {NUM_RANKS} ranks",
        ours="numba",
        impls={
            "numba": lambda: ids_partition(ids, NUM_RANKS),
            "numba, 1 thread": at_threads(1, lambda: ids_partition(ids, NUM_RANKS)),
            "torch.unique and argsort": torch_partition,
        },
        items=NUM_IDS,
        extra={"recorded_elsewhere": {"RecIS 1.0 CPU core, ids_partition, 1 rank, items_per_s": 25e6}},
    )
