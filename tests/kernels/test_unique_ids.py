"""Distinct pairs: equal to the reference in every array, whatever the threads; and the extremes of int64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recis_kernels import unique_ids as module
from recis_kernels import unique_ids_order as order_module
from recis_kernels.calibration import BUILT_IN, use
from recis_kernels.unique_ids import Unique, order_by_segment_and_id, unique_ids, unique_ids_padded

EXTREMES = [-(2**63), -(2**63) + 1, -2, -1, 0, 1, 2**62, 2**63 - 1]
FIELDS = ("ids", "segments", "inverse", "counts")


def assert_same(got: Unique, want: Unique):
    for field in FIELDS:
        assert getattr(got, field).dtype == getattr(want, field).dtype, field
        assert getattr(got, field).equal(getattr(want, field)), field


def assert_sound(got: Unique, ids: torch.Tensor, segments: torch.Tensor):
    """Check the four promises against the input alone."""
    inverse = got.inverse.long()
    assert got.ids[inverse].equal(ids)
    assert got.segments[inverse].equal(segments.to(torch.int32))
    assert torch.bincount(inverse, minlength=got.ids.numel()).equal(got.counts.long())
    pairs = set(zip(segments.tolist(), ids.tolist(), strict=True))
    assert len(pairs) == got.ids.numel()


@pytest.fixture(params=[1, 2, 3], ids="{}threads".format)
def threads(request, monkeypatch):
    """Run with that many threads, however small the batch."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(module, "_MIN_PER_THREAD", 1)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_segments", [1, 3])
@pytest.mark.parametrize("num_ids", [0, 1, 7, 2047, 4097, 9001])
def test_matches_reference(threads, num_ids, num_segments):
    ids = torch.randint(-40, max(1, num_ids), (num_ids,)) * 2654435761
    segments = torch.randint(0, num_segments, (num_ids,))
    got = unique_ids(ids, segments)
    assert_same(got, unique_ids(ids, segments, impl="reference"))
    assert_sound(got, ids, segments)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*EXTREMES, 7]), st.integers(0, 3)), max_size=60), st.integers(0, 5))
def test_any_ids(pairs, repeat):
    pairs = pairs * (1 + 20 * repeat)  # up to 6000: several partitions, long runs
    ids = torch.tensor([row_id for row_id, _ in pairs], dtype=torch.int64)
    segments = torch.tensor([segment for _, segment in pairs], dtype=torch.int32)
    got = unique_ids(ids, segments)
    assert_same(got, unique_ids(ids, segments, impl="reference"))
    assert_sound(got, ids, segments)


KERNEL_BATCHES = {
    "one": (torch.tensor([7]), torch.tensor([2])),
    "extremes": (torch.tensor(EXTREMES * 3), torch.arange(24) % 2),
    "one id": (torch.full((300,), -1), torch.zeros(1, dtype=torch.int32)),
    "distinct": (torch.arange(129) * 2654435761, torch.zeros(1, dtype=torch.int32)),
    "in partitions": (
        torch.randint(0, 900, (4500,), generator=torch.Generator().manual_seed(1)),
        torch.arange(4500) % 3,
    ),
}


@pytest.mark.parametrize("batch", KERNEL_BATCHES)
@pytest.mark.parametrize("way", ["ticket", "sort"])
def test_kernels_match_the_loops(way, batch):
    ids, segments = KERNEL_BATCHES[batch]
    with use(replace(BUILT_IN, reduce_duplicates_by=way)):
        check_kernels(ids, segments)


def check_kernels(ids: torch.Tensor, segments: torch.Tensor) -> None:
    assert_same(unique_ids(ids, segments, impl="triton"), unique_ids(ids, segments))
    wide, want = unique_ids_padded(ids, segments, impl="triton"), unique_ids_padded(ids, segments)
    for field in (*FIELDS, "num_unique"):
        assert getattr(wide, field).dtype == getattr(want, field).dtype, field
        assert getattr(wide, field).equal(getattr(want, field)), field


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*EXTREMES, 7]), st.integers(0, 3)), max_size=70))
def test_kernels_on_any_ids(pairs):
    ids = torch.tensor([row_id for row_id, _ in pairs], dtype=torch.int64)
    segments = torch.tensor([segment for _, segment in pairs], dtype=torch.int32)
    for impl in ("triton", "torch"):
        assert_same(unique_ids(ids, segments, impl=impl), unique_ids(ids, segments, impl="reference"))


@pytest.mark.parametrize("impl", ["numba", "torch", "triton", "reference"])
def test_padded_by_hand(impl):
    got = unique_ids_padded(torch.tensor([5, 9, 5, 5]), impl=impl)
    assert got.ids.tolist() == [5, 9, 0, 0]  # one partition, so by first position
    assert got.inverse.tolist() == [0, 1, 0, 0]
    assert got.counts.tolist() == [3, 1, 0, 0]
    assert got.segments.tolist() == [0, 0, 0, 0]
    assert got.num_unique.tolist() == [2]
    none = unique_ids_padded(torch.tensor([], dtype=torch.int64), impl=impl)
    assert none.ids.shape == none.inverse.shape == (0,)
    assert none.num_unique.tolist() == [0]


@pytest.mark.parametrize("impl", ["numba", "torch", "reference"])
def test_versions_of_the_order_agree(impl):
    ids = torch.tensor([3, -1, 3, 2**63 - 1, -(2**63)])
    segments = torch.tensor([1, 1, 0, 0, 1], dtype=torch.int32)
    assert order_by_segment_and_id(ids, segments, 2, impl=impl).tolist() == [2, 3, 4, 1, 0]
    assert order_by_segment_and_id(ids[1:3], segments[:2], 1, impl=impl).tolist() == [0, 1]


def test_ops_are_nodes_of_torch_compile():
    ids, segments = torch.tensor([5, 9, 5, -1]), torch.tensor([0, 1, 0, 0], dtype=torch.int32)
    for op in (module._unique_op, module._padded_op):
        torch.library.opcheck(op, (ids, segments, "numba"))
    torch.library.opcheck(order_module._order_op, (ids, segments, 2, "numba"))

    def run(ids, segments):
        unique, padded = unique_ids(ids, segments), unique_ids_padded(ids, segments)
        order = order_by_segment_and_id(padded.ids, padded.segments, 2)
        return unique.ids, unique.segments, unique.inverse, unique.counts, padded.ids[order], padded.num_unique

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(ids, segments), run(ids, segments), strict=True):
        assert got.equal(want)


def launches() -> None:
    """Launch every kernel once or more, for compile_kernels.py."""
    for segments in (torch.zeros(1, dtype=torch.int32), torch.arange(40, dtype=torch.int32)):
        unique_ids_padded(torch.arange(40), segments, impl="triton")


def test_many_distinct_ids_on_two_threads():
    ids = torch.cat((torch.randint(-(2**63), 2**63 - 1, (60_000,)), torch.tensor(EXTREMES * 3)))
    zipf = (torch.rand(60_000) ** -1.5).long()  # a few ids hold most positions, so partitions differ widely
    for batch in (ids, zipf, torch.full((50_000,), -1)):
        got = unique_ids(batch)
        assert_sound(got, batch, torch.zeros_like(batch))
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        alone = unique_ids(batch)
        torch.set_num_threads(before)
        assert_same(got, alone)


def test_ranges_are_per_id_segments_written_short():
    ids = torch.tensor([5, 5, 6, 5, 5, 9])
    offsets = torch.tensor([0, 2, 2, 3, 6])
    got = unique_ids(ids, torch.tensor([1, 0, 0, 1]), offsets)  # features 0 and 3 share table 1
    assert_same(got, unique_ids(ids, torch.tensor([1, 1, 0, 1, 1, 1])))
    pairs = dict(zip(zip(got.segments.tolist(), got.ids.tolist(), strict=True), got.counts.tolist(), strict=True))
    assert pairs == {(1, 5): 4, (0, 6): 1, (1, 9): 1}
    one = unique_ids(ids, torch.tensor([4]), torch.tensor([0, 6]))
    assert one.segments.tolist() == [4, 4, 4]


def test_ids_common_to_thousands_of_segments():
    segments = torch.arange(5000).repeat_interleave(4)
    ids = torch.tensor([0, 1, 1, -1]).repeat(5000)
    got = unique_ids(ids, segments)
    assert got.ids.numel() == 15_000
    assert_sound(got, ids, segments)


def test_input_is_kept_and_may_be_strided():
    both = torch.tensor([[3, 1], [3, 2], [4, 3]])
    got = unique_ids(both[:, 0], both[:, 1])
    assert_sound(got, both[:, 0], both[:, 1])
    assert both.tolist() == [[3, 1], [3, 2], [4, 3]]


def test_order_by_segment_and_signed_id():
    ids = torch.tensor([3, -1, 3, 2**63 - 1, -(2**63)])
    segments = torch.tensor([1, 1, 0, 0, 1], dtype=torch.int32)
    order = order_by_segment_and_id(ids, segments, 2)
    assert list(zip(segments[order].tolist(), ids[order].tolist(), strict=True)) == [
        (0, 3),
        (0, 2**63 - 1),
        (1, -(2**63)),
        (1, -1),
        (1, 3),
    ]
    assert order_by_segment_and_id(ids[:0], segments[:0], 2).tolist() == []
    assert ids[order_by_segment_and_id(ids[[0, 1, 4]], segments[:3], 1)].numel() == 3


@pytest.mark.parametrize(("low", "high"), [(-(2**63), 2**63 - 1), (0, 10**6), (-50, 50), (5, 6)])
def test_argsort_of_a_long_list(low, high):
    ids = np.random.default_rng(0).integers(low, high, 70_000)
    order = order_module.argsort_ids(ids)
    assert np.array_equal(np.sort(order), np.arange(70_000))
    assert np.array_equal(ids[order], np.sort(ids))
    ids[:2] = -(2**63), 2**63 - 1  # all others crowd in one range
    assert np.array_equal(ids[order_module.argsort_ids(ids)], np.sort(ids))
    with use(replace(BUILT_IN, bucketed_sort_from_ids=0)):
        for short in (ids[:1], ids[:3], ids[2:900]):
            assert np.array_equal(short[order_module.argsort_ids(short)], np.sort(short))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(2, dtype=torch.int32),), "ids must be int64"),
        ((torch.zeros(2, 2, dtype=torch.int64),), "ids must be int64 \\[L\\]"),
        ((torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int32)), "segments must be \\[2\\] or \\[1\\]"),
        ((torch.zeros(2, dtype=torch.int64), torch.zeros(2)), "segments must be int32 or int64"),
        (
            (torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int32), torch.zeros(3)),
            "offsets must be int64",
        ),
        ((torch.zeros(2, dtype=torch.int64), None, torch.tensor([0, 2])), "offsets need segments"),
    ],
)
def test_wrong_input_is_named(args, message):
    with pytest.raises(ValueError, match=message):
        unique_ids(*args)
