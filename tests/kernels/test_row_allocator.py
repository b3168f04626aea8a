"""Rows for new ids: every version against one another and by hand, past the capacity, with padding and freed rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recis_kernels import row_allocator as module
from recis_kernels.dispatch import Impl, checks
from recis_kernels.hash_index import HashIndex, erase, find
from recis_kernels.hash_segments import SegmentTable
from recis_kernels.row_allocator import RowAllocator, find_or_insert_rows
from recis_kernels.unique_ids import unique_ids_padded

EXTREMES = [-(2**63), -(2**63) + 1, -2, -1, 0, 1, 2**63 - 1]
VERSIONS: list[Impl] = ["numba", "triton", "reference"]
IMPLS = pytest.mark.parametrize("impl", VERSIONS)


def new_index(num_segments: int, *, mirrored: bool = False) -> HashIndex:
    index = HashIndex()
    index._segments = SegmentTable(index.device, mirrored=mirrored)
    for _ in range(num_segments):
        index.add_segment()
    return index


@IMPLS
def test_by_hand(impl):
    index, allocator = new_index(2), RowAllocator(6)
    ids, segments = torch.tensor([9, -4, 9, -(2**63), 9]), torch.tensor([1, 1, 0, 1, 1])
    rows, is_new = find_or_insert_rows(index, ids, segments, allocator, impl=impl)
    assert rows.tolist() == [3, 2, 0, 1, 3]  # by (segment, signed id)
    assert is_new.tolist() == [True, True, True, True, False]
    allocator.release(erase(index, torch.tensor([9, -4, 77]), 1, impl=impl))  # rows 3, 2, -1
    assert allocator.num_used() == 2
    rows, is_new = find_or_insert_rows(index, torch.tensor([8, 5, 9, 6, 7]), 0, allocator, impl=impl)
    assert rows.tolist() == [5, 2, 0, 3, 4]  # the row freed last comes first, then fresh ones
    assert is_new.tolist() == [True, True, False, True, True]
    assert allocator.overflow() == 0
    allocator.check()
    rows, is_new = find_or_insert_rows(index, torch.tensor([1, 8, 2]), 0, allocator, impl=impl)
    assert rows.tolist() == [-1, 5, -1]
    assert is_new.tolist() == [False, False, False]
    assert allocator.overflow() == 2
    with pytest.raises(RuntimeError, match="2 new ids got no row: all 6 rows are in use"):
        allocator.check()
    assert find(index, torch.tensor([1, 2]), 0, impl=impl).tolist() == [-1, -1]
    assert index.size(0) == 5
    allocator.grow(7)
    rows, is_new = find_or_insert_rows(index, torch.tensor([2, 1]), 0, allocator, impl=impl)
    assert rows.tolist() == [-1, 6]
    assert is_new.tolist() == [False, True]


ID = st.one_of(st.sampled_from(EXTREMES), st.integers(-15, 15))
STEP = st.tuples(
    st.sampled_from(["look up", "look up", "erase"]), st.lists(st.tuples(st.integers(0, 2), ID), max_size=40)
)


def run_steps(steps, versions: list[Impl], *, mirrored: bool = False) -> None:
    """Run the same calls on an index and an allocator of each version; every answer and every counter must agree."""
    made: list[tuple[Impl, HashIndex, RowAllocator]] = [
        (impl, new_index(3, mirrored=mirrored), RowAllocator(30)) for impl in versions
    ]
    for kind, pairs in steps:
        ids = torch.tensor([row_id for _, row_id in pairs], dtype=torch.int64)
        segments = torch.tensor([segment for segment, _ in pairs], dtype=torch.int32)
        answers = []
        for impl, index, allocator in made:
            if kind == "erase":
                freed = erase(index, ids, segments, impl=impl)
                allocator.release(freed)
                answers.append([freed.tolist(), allocator.state.tolist()])
            else:
                rows, is_new = find_or_insert_rows(index, ids, segments, allocator, impl=impl)
                answers.append([rows.tolist(), is_new.tolist(), allocator.state.tolist()])
                assert find(index, ids, segments, impl=impl).equal(rows)
        assert all(answer == answers[0] for answer in answers[1:])
    for segment in range(3):
        exports = [index.export(segment) for _, index, _ in made]
        assert all(ids.equal(exports[0][0]) and rows.equal(exports[0][1]) for ids, rows in exports[1:])


@settings(max_examples=150, deadline=None)
@given(st.lists(STEP, max_size=6))
def test_loops_match_the_reference(steps):
    run_steps(steps, ["numba", "reference"])


@settings(max_examples=12, deadline=None)
@given(st.lists(STEP, max_size=5), st.booleans())
def test_kernels_match_the_loops(steps, mirrored):
    run_steps(steps, ["numba", "triton"], mirrored=mirrored)


@IMPLS
def test_duplicates_only(impl):
    index, allocator = new_index(2), RowAllocator(10)
    for segment, row in ((1, 0), (0, 1)):
        ids = torch.full((300,), -(2**63))
        rows, is_new = find_or_insert_rows(index, ids, segment, allocator, impl=impl)
        assert rows.tolist() == [row] * 300
        assert is_new.tolist() == [True] + [False] * 299
    assert allocator.num_used() == 2


def test_without_determinism_rows_follow_positions():
    index, allocator = new_index(1), RowAllocator(10)
    ids = torch.tensor([5, 3, 5, 4])
    rows, is_new = find_or_insert_rows(index, ids, 0, allocator, deterministic=False, impl="triton")
    assert rows.tolist() == [0, 1, 0, 2]
    assert is_new.tolist() == [True, True, False, True]
    assert index.find(ids).equal(rows)


@IMPLS
def test_padding_is_left_alone(impl):
    index, allocator = new_index(1), RowAllocator(10)
    padded = unique_ids_padded(torch.tensor([5, 3, 5, 5]), impl="numba")
    rows, is_new = find_or_insert_rows(index, padded.ids, 0, allocator, num_ids=padded.num_unique, impl=impl)
    assert rows[:2].sort().values.tolist() == [0, 1]
    assert rows[2:].tolist() == [-1, -1]
    assert is_new.tolist() == [True, True, False, False]
    assert index.find(torch.tensor([0])).tolist() == [-1]  # the padding is no id
    assert allocator.num_used() == 2
    none, no_mask = find_or_insert_rows(index, torch.tensor([], dtype=torch.int64), 0, allocator, impl=impl)
    assert none.shape == no_mask.shape == (0,)


def test_a_step_on_a_mirrored_table_reads_no_counts(monkeypatch):
    index, allocator, pulls = new_index(2, mirrored=True), RowAllocator(1000), []
    pull = SegmentTable.pull
    monkeypatch.setattr(SegmentTable, "pull", lambda table: (pulls.append(1), pull(table))[1])
    for step in range(8):
        ids = torch.arange(60) + 5 * step
        rows, _ = find_or_insert_rows(index, ids, torch.arange(60) % 2, allocator, impl="triton")
        assert bool((rows >= 0).all())
    assert len(pulls) == 1  # the first one makes room


def test_checks_find_a_row_released_twice():
    index, allocator = new_index(1), RowAllocator(4)
    find_or_insert_rows(index, torch.arange(3), 0, allocator)
    allocator.release(torch.tensor([1, -1]))
    with checks(), pytest.raises(ValueError, match="released twice or never given"):
        allocator.release(torch.tensor([1]))
    with checks(), pytest.raises(ValueError, match="in use and distinct, below 3; got \\[3\\]"):
        allocator.release(torch.tensor([3]))
    with checks():
        allocator.release(torch.tensor([0, 2]))
    assert allocator.num_used() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i, a: find_or_insert_rows(i, torch.tensor([1.0]), 0, a), "ids must be int64"),
        (lambda i, a: find_or_insert_rows(i, torch.tensor([1]), 3, a), r"segment must lie in \[0, 1\)"),
        (
            lambda i, a: find_or_insert_rows(i, torch.tensor([1]), 0, a, num_ids=torch.tensor(1)),
            "num_ids must be int64",
        ),
        (lambda i, a: a.release(torch.tensor([1.0])), "rows must be int64"),
        (lambda i, a: a.grow(3), "does not shrink: capacity is 4, asked for 3"),
        (lambda i, a: RowAllocator(-1), "capacity must be at least 0; got -1"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(new_index(1), RowAllocator(4))


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_op_is_a_node_of_torch_compile(impl):
    made = [(new_index(2), RowAllocator(4)) for _ in range(3)]
    ids, segments = torch.tensor([7, -1, 7, 3, 2]), torch.tensor([0, 1, 0, 0, 1], dtype=torch.int32)
    for index, _ in made:
        index.make_room(segments, 5)
    index, allocator = made[0]
    args = (index.kernel_table, index._slots, allocator.state, allocator.free, ids, segments, None, True, impl)
    torch.library.opcheck(module._op, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"))

    def run(index, allocator, ids, segments):
        rows, is_new = find_or_insert_rows(index, ids, segments, allocator, impl=impl)
        return rows * 2, is_new

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, want = compiled(*made[1], ids, segments), run(*made[2], ids, segments)
    assert got[0].equal(want[0])
    assert got[1].equal(want[1])
    assert made[1][1].state.equal(made[2][1].state)
    for segment in range(2):
        assert made[1][0].export(segment)[1].equal(made[2][0].export(segment)[1])


def launches() -> None:
    """Launch every kernel once or more, for compile_kernels.py."""
    ids, segments = torch.arange(40), torch.arange(40, dtype=torch.int32) % 2
    for where in (0, segments):
        for deterministic in (True, False):
            find_or_insert_rows(
                new_index(2), ids, where, RowAllocator(10), num_ids=torch.tensor([39]), deterministic=deterministic,
                impl="triton",
            )  # fmt: skip
