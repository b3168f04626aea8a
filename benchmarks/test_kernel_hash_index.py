"""Speed of the hash index: find, insert, find_or_insert, and the de-duplication before them.

    make bench, or: pytest benchmarks/test_kernel_hash_index.py --benchmark-json=out.json

Peers hold the same map as sorted keys: torch.searchsorted and numpy's. A sorted array cannot take single new ids, so the
peers of the inserting ops sort or de-duplicate the whole batch, which is the least they would have to do.
RecIS's CPU core is not installable; its recorded 7.2 M new ids/s (D=16, 2 threads, another machine) is quoted in `extra`.
"""

from collections.abc import Callable
from functools import cache, partial
from itertools import cycle

import numpy as np
import pytest
import torch

from recis.bench.harness import at_threads, compare
from recis_kernels.hash_index import HashIndex, find_or_insert
from recis_kernels.philox import table_key
from recis_kernels.row_allocator import RowAllocator, find_or_insert_rows
from recis_kernels.row_blocks import RowBlocks, RowLayout
from recis_kernels.row_init import InitKind, InitSpec, init_rows
from recis_kernels.unique_ids import order_by_segment_and_id, unique_ids

NUM_SLOTS = 1 << 24  # 256 MiB
NUM_KEYS = 1 << 18  # per call; the sorted peers take a second for a million
NUM_BATCHES = 16  # in turn, so that no call finds the slots of the one before in cache
BYTES_PER_FIND = 32  # one sector per key: performance.md, section 1
STEP_IDS, STEP_ROWS = 163_840, 2_000_000
RECIS_INSERT_PER_S = 7.2e6


@cache
def full_index() -> tuple[HashIndex, torch.Tensor, torch.Tensor]:
    """Return an index of 16 M slots at load 0.5, its ids in ascending order and their rows."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-(2**63), 2**63 - 1, (NUM_SLOTS // 2,), generator=generator).unique()
    rows = torch.randperm(ids.numel(), generator=generator)
    index = HashIndex()
    segment = index.add_segment()
    index.reserve(segment, ids.numel())
    index.insert(ids, segment, rows)
    return index, ids, rows


def picks(distribution: str, num_ids: int, count: int, seed: int) -> torch.Tensor:
    """Return `count` positions in [0, num_ids), uniform or Zipf 1.2 with the popular ones scattered."""
    rng = np.random.default_rng(seed)
    if distribution == "uniform":
        return torch.from_numpy(rng.integers(0, num_ids, count))
    return torch.from_numpy(rng.zipf(1.2, count) % num_ids * 2_654_435_761 % num_ids)


def in_turn(batches: list[torch.Tensor], run: Callable[[torch.Tensor], object]) -> Callable[[], object]:
    """Return a function that runs the next batch at each call."""
    turn = cycle(batches)
    return lambda: run(next(turn))


@pytest.mark.parametrize("distribution", ["uniform", "zipf"])
def test_find(benchmark, distribution):
    index, ids, rows = full_index()
    batches = [ids[picks(distribution, ids.numel(), NUM_KEYS, seed)] for seed in range(NUM_BATCHES)]
    sorted_ids, sorted_rows = ids.numpy(), rows.numpy()

    def numpy_find(batch: torch.Tensor) -> np.ndarray:
        return sorted_rows[np.searchsorted(sorted_ids, batch.numpy())]

    def torch_find(batch: torch.Tensor) -> torch.Tensor:
        return rows[torch.searchsorted(ids, batch)]

    for batch in batches[:2]:
        assert index.find(batch).equal(torch_find(batch))
        assert np.array_equal(index.find(batch).numpy(), numpy_find(batch))
    compare(
        benchmark,
        case=f"find {distribution}, {NUM_SLOTS >> 20} M slots, load 0.5, {NUM_KEYS >> 10} k hits",
        ours="numba",
        impls={
            "numba": in_turn(batches, index.find),
            "numba, 1 thread": at_threads(1, in_turn(batches, index.find)),
            "torch.searchsorted": in_turn(batches, torch_find),
            "numpy.searchsorted": in_turn(batches, numpy_find),
        },
        bytes_moved=NUM_KEYS * BYTES_PER_FIND,
        items=NUM_KEYS,
        targets={"items_per_s": 50e6},
    )


def fresh_index() -> HashIndex:
    index = HashIndex()
    index.add_segment()
    return index


@pytest.mark.parametrize("room", ["reserved", "growing"])
def test_insert(benchmark, room):
    ids = torch.randint(-(2**63), 2**63 - 1, (1 << 20,)).unique()
    ids = ids[torch.randperm(ids.numel())]
    rows = torch.arange(ids.numel())

    def ours() -> HashIndex:
        index = fresh_index()
        if room == "reserved":
            index.reserve(0, ids.numel())
            index.insert(ids, 0, rows)
        else:
            for part, part_rows in zip(ids.split(1 << 17), rows.split(1 << 17), strict=True):
                index.insert(part, 0, part_rows)
        return index

    assert ours().find(ids).equal(rows)
    compare(
        benchmark,
        case=f"insert {ids.numel()} new ids, {room}",
        ours="numba",
        impls={
            "numba": ours,
            "numba, 1 thread": at_threads(1, ours),
            "torch.sort": partial(torch.sort, ids),
            "numpy.argsort": partial(np.argsort, ids.numpy()),
        },
        items=ids.numel(),
    )


def test_insert_with_rows(benchmark):
    """All of a lookup of new ids: de-duplicate, find, order, number, insert, write first values (D=16, row-wise state)."""
    ids = torch.randint(-(2**63), 2**63 - 1, (1_000_000,))
    keys, spec = torch.tensor([table_key(7, "item")]), InitSpec(InitKind.UNIFORM, -0.01, 0.01)
    layout = RowLayout(16, state=(("h", 1),))

    def ours() -> tuple[HashIndex, RowBlocks]:
        index, blocks = fresh_index(), RowBlocks(layout)
        unique = unique_ids(ids)
        absent = (index.find(unique.ids, unique.segments) < 0).nonzero().squeeze(1)
        order = absent[order_by_segment_and_id(unique.ids[absent], unique.segments[absent], 1)]
        new_ids, rows = unique.ids.index_select(0, order), torch.arange(order.numel())
        index.insert(new_ids, 0, rows)
        blocks.grow(rows.numel())
        init_rows(blocks, rows, new_ids, keys, spec)
        return index, blocks

    index, blocks = ours()
    distinct = ids.unique()
    assert index.find(distinct).equal(torch.arange(distinct.numel()))
    assert blocks.read(torch.arange(distinct.numel()), ("id",))["id"].equal(distinct)
    compare(
        benchmark,
        case="1 M new ids to rows, D=16",
        ours="numba",
        impls={"numba": ours, "numba, 1 thread": at_threads(1, ours), "torch.unique": lambda: torch.unique(ids)},
        items=ids.numel(),
        targets={"items_per_s": 1.5 * RECIS_INSERT_PER_S},
        extra={"recorded_elsewhere": {"RecIS 1.0 CPU core, lookup of new ids, items_per_s": RECIS_INSERT_PER_S}},
    )


@pytest.mark.parametrize("known", [0.0, 0.5, 1.0], ids="{}known".format)
@pytest.mark.parametrize("distribution", ["uniform", "zipf"])
def test_find_or_insert(benchmark, distribution, known):
    """One step's ids, some share of them already in the index; peer: de-duplicate alone."""
    vocabulary = torch.randint(-(2**63), 2**63 - 1, (STEP_ROWS,)).unique()
    ids = vocabulary[picks(distribution, vocabulary.numel(), STEP_IDS, seed=1)]
    old = ids.unique()[: int(known * ids.unique().numel())]
    index = fresh_index()
    index.reserve(0, STEP_ROWS)
    index.insert(old, 0, torch.arange(old.numel()))
    added: list[torch.Tensor] = []

    def allocate(new_ids: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        added.append(new_ids)
        return torch.arange(old.numel(), old.numel() + new_ids.numel())

    def ours() -> torch.Tensor:
        rows = find_or_insert(index, ids, 0, allocate)
        while added:  # so that the next call meets the same index; erasing costs a fifth of the time
            index.erase(added.pop(), 0)
        return rows

    want = torch.unique(ids, return_inverse=True)[1]
    assert ours().equal(want)  # old ids are the smallest, so rows ascend with ids
    assert ours().equal(want)
    compare(
        benchmark,
        case=f"find_or_insert {STEP_IDS} {distribution} ids, {known:.0%} known",
        ours="numba",
        impls={
            "numba": ours,
            "numba, 1 thread": at_threads(1, ours),
            "torch.unique": lambda: torch.unique(ids, return_inverse=True),
            "numpy.unique": lambda: np.unique(ids.numpy(), return_inverse=True),
        },
        items=STEP_IDS,
    )


@pytest.mark.parametrize("distribution", ["uniform", "zipf"])
def test_find_or_insert_rows(benchmark, distribution):
    """One step's distinct ids, half of them known, with rows numbered by an allocator; peer: de-duplicate alone."""
    ids = unique_ids(picks(distribution, STEP_ROWS, STEP_IDS, seed=3) * 7919).ids
    index, allocator = fresh_index(), RowAllocator(STEP_ROWS)
    index.reserve(0, STEP_ROWS)
    find_or_insert_rows(index, ids[::2], 0, allocator)

    def ours() -> torch.Tensor:
        rows, is_new = find_or_insert_rows(index, ids, 0, allocator)
        allocator.release(index.erase(ids[is_new]))  # so that the next call meets the same index
        return rows

    assert ours()[::2].equal(index.find(ids[::2]))
    assert ours().unique().numel() == ids.numel()
    compare(
        benchmark,
        case=f"find_or_insert_rows {ids.numel()} distinct {distribution} ids, half known",
        ours="numba",
        impls={
            "numba": ours,
            "numba, 1 thread": at_threads(1, ours),
            "torch.unique": lambda: torch.unique(ids, return_inverse=True),
        },
        items=ids.numel(),
    )


@pytest.mark.parametrize("distribution", ["uniform", "zipf"])
def test_unique_ids(benchmark, distribution):
    ids = picks(distribution, STEP_ROWS, STEP_IDS, seed=2) * 7919
    got, (want, inverse, counts) = unique_ids(ids), torch.unique(ids, return_inverse=True, return_counts=True)
    order = got.ids.argsort()
    assert got.ids[order].equal(want)
    assert got.counts[order].equal(counts.int())
    assert order[inverse].equal(got.inverse.long())
    compare(
        benchmark,
        case=f"unique_ids {STEP_IDS} {distribution}",
        ours="numba",
        impls={
            "numba": lambda: unique_ids(ids),
            "numba, 1 thread": at_threads(1, lambda: unique_ids(ids)),
            "torch.unique": lambda: torch.unique(ids, return_inverse=True, return_counts=True),
            "numpy.unique": lambda: np.unique(ids.numpy(), return_inverse=True, return_counts=True),
        },
        items=STEP_IDS,
    )
