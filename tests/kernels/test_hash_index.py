"""The hash index against a Python dict over random operations, adversarial ids, growth, and the layout's reference."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from recis_kernels import hash_ops as module
from recis_kernels import hash_probe as probe
from recis_kernels.dispatch import Impl
from recis_kernels.hash_index import HashIndex, erase, find, find_or_insert, insert
from recis_kernels.hash_segments import SegmentTable
from recis_kernels.philox import hash64
from recis_kernels.row_blocks import RowBlocks, RowLayout

EXTREMES = [-(2**63), -(2**63) + 1, -2, -1, 0, 1, 2**63 - 2, 2**63 - 1]
M = 1 << 64


def id_with_hash(bits: int) -> int:
    """Return the int64 whose hash64 has these bits: the finaliser run backwards."""
    for factor in (0xC4CEB9FE1A85EC53, 0xFF51AFD7ED558CCD):
        bits ^= bits >> 33
        bits = bits * pow(factor, -1, M) % M
    bits ^= bits >> 33
    return bits - M if bits >> 63 else bits


COLLIDING = [id_with_hash(number) for number in range(1, 61)]  # all of home slot 0, whatever the size
LAST_GROUP = [id_with_hash(M - 1 - number) for number in range(60)]  # the last home slot: probing wraps round
SAME_LOW_BITS = [id_with_hash(number << 40) for number in range(1, 61)]


def new_index(num_segments: int = 1) -> HashIndex:
    index = HashIndex()
    for segment in range(num_segments):
        assert index.add_segment() == segment
    return index


def mirrored_index(num_segments: int = 1) -> HashIndex:
    """Return an index whose host and kernels keep separate tables, as on a GPU."""
    index = HashIndex()
    index._segments = SegmentTable(index.device, mirrored=True)
    for _ in range(num_segments):
        index.add_segment()
    return index


def tensor(values) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int64)


def test_the_test_can_make_hashes():
    assert hash64(tensor(COLLIDING)).tolist() == list(range(1, 61))
    assert [bits % M for bits in hash64(tensor(LAST_GROUP)).tolist()] == [M - 1 - number for number in range(60)]


class IndexAgainstDict(RuleBasedStateMachine):
    """Random inserts, finds, erases, growth, rebuilds and clears on three segments, each step checked."""

    ids = st.lists(
        st.one_of(
            st.sampled_from(EXTREMES + COLLIDING + LAST_GROUP + SAME_LOW_BITS),
            st.integers(-(2**63), 2**63 - 1),
            st.integers(-200, 200),
        ),
        max_size=70,
    )
    segment = st.integers(0, 2)
    impl = st.sampled_from(["numba"] * 6 + ["reference"])

    @initialize()
    def start(self):
        self.index = new_index(3)
        self.want: list[dict[int, int]] = [{}, {}, {}]
        self.next_row = 0

    def _rows(self, count: int) -> torch.Tensor:
        self.next_row += count
        return torch.arange(self.next_row - count, self.next_row)

    @rule(ids=ids, segment=segment, impl=impl)
    def insert_into_one(self, ids, segment, impl):
        rows = self._rows(len(ids))
        insert(self.index, tensor(ids), segment, rows, impl=impl)
        self.want[segment].update(zip(ids, rows.tolist(), strict=True))

    @rule(ids=ids, data=st.data(), impl=impl)
    def insert_into_many(self, ids, data, impl):
        segments = data.draw(st.lists(self.segment, min_size=len(ids), max_size=len(ids)))
        rows = self._rows(len(ids))
        insert(self.index, tensor(ids), tensor(segments), rows, impl=impl)
        for row_id, segment, row in zip(ids, segments, rows.tolist(), strict=True):
            self.want[segment][row_id] = row

    @rule(ids=ids, segment=segment, impl=impl)
    def find_or_insert_into_one(self, ids, segment, impl):
        def allocate(new_ids, new_segments):
            assert new_ids.tolist() == sorted(set(ids) - set(self.want[segment]))
            assert set(new_segments.tolist()) <= {segment}
            rows = self._rows(new_ids.numel())
            self.want[segment].update(zip(new_ids.tolist(), rows.tolist(), strict=True))
            return rows

        got = find_or_insert(self.index, tensor(ids), segment, allocate, impl=impl)
        assert got.tolist() == [self.want[segment][row_id] for row_id in ids]

    @rule(ids=ids, segment=segment, impl=impl)
    def erase_from_one(self, ids, segment, impl):
        got = erase(self.index, tensor(ids), segment, impl=impl)
        assert got.tolist() == [self.want[segment].pop(row_id, -1) for row_id in ids]

    @rule(share=st.integers(1, 3), segment=segment)
    def erase_many_that_are_there(self, share, segment):
        ids = sorted(self.want[segment])[::share]
        assert self.index.erase(tensor(ids), segment).tolist() == [self.want[segment].pop(row_id) for row_id in ids]

    @rule(ids=ids, segment=segment, impl=impl)
    def find_in_one(self, ids, segment, impl):
        assert find(self.index, tensor(ids), segment, impl=impl).tolist() == [
            self.want[segment].get(i, -1) for i in ids
        ]

    @rule(segment=segment)
    def clear(self, segment):
        self.index.clear(segment)
        self.want[segment].clear()

    @rule(segment=segment, num_ids=st.integers(0, 500))
    def reserve(self, segment, num_ids):
        self.index.reserve(segment, num_ids)

    @rule()
    def maintain(self):
        self.index.maintain()
        table = self.index.table
        used, slots = table[:, probe.LIVE] + table[:, probe.DEAD], table[:, probe.SLOTS]
        assert bool((used <= 0.75 * slots).all())
        assert bool((table[:, probe.DEAD] * 8 <= slots).all())

    @invariant()
    def holds_what_the_dict_holds(self):
        if not hasattr(self, "index"):
            return
        for segment, want in enumerate(self.want):
            ids, rows = self.index.export(segment)
            assert ids.tolist() == sorted(want)
            assert rows.tolist() == [want[row_id] for row_id in ids.tolist()]
            assert self.index.size(segment) == len(want)
            used = int(self.index.table[segment, [probe.LIVE, probe.DEAD]].sum())
            assert used <= 0.9 * int(self.index.table[segment, probe.SLOTS])
        assert self.index.sizes().tolist() == [len(want) for want in self.want]


IndexAgainstDict.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestIndexAgainstDict = IndexAgainstDict.TestCase

POOL = EXTREMES + COLLIDING + LAST_GROUP[:30] + SAME_LOW_BITS[:20] + list(range(-20, 20))
KINDS = ["insert", "insert", "find_or_insert", "erase", "find", "maintain"]


def run_against_dict(index: HashIndex, steps: list[tuple[str, Impl, int, int]], max_ids: int) -> None:
    """Run (kind, impl, segment or 3 = a segment per id, seed) steps on the index and a dict and compare every answer."""
    want: dict[tuple[int, int], int] = {}
    next_row = 0
    for kind, impl, segment, seed in steps:
        rng = np.random.default_rng(seed)
        ids = rng.choice(POOL, rng.integers(0, max_ids + 1)).tolist()
        segments = rng.integers(0, 3, len(ids)) if segment == 3 else np.full(len(ids), segment)
        pairs = list(zip(segments.tolist(), ids, strict=True))
        where = torch.from_numpy(segments) if segment == 3 else segment
        rows = torch.arange(next_row, next_row + len(ids))
        next_row += len(ids)
        if kind == "insert":
            insert(index, tensor(ids), where, rows, impl=impl)
            want.update(zip(pairs, rows.tolist(), strict=True))
        elif kind == "find_or_insert":

            def allocate(new_ids, new_segments, rows=rows):
                new = list(zip(new_segments.tolist(), new_ids.tolist(), strict=True))
                assert new == sorted(set(new) - want.keys())
                want.update(zip(new, rows.tolist(), strict=False))
                return rows[: len(new)]

            got = find_or_insert(index, tensor(ids), where, allocate, impl=impl)
            assert got.tolist() == [want[pair] for pair in pairs]
        elif kind == "erase":
            assert erase(index, tensor(ids), where, impl=impl).tolist() == [want.pop(pair, -1) for pair in pairs]
        elif kind == "find":
            assert find(index, tensor(ids), where, impl=impl).tolist() == [want.get(pair, -1) for pair in pairs]
        else:
            index.maintain(impl=impl)
    for segment in range(3):
        ids, rows = index.export(segment)
        assert dict(zip(ids.tolist(), rows.tolist(), strict=True)) == {
            i: r for (s, i), r in want.items() if s == segment
        }
        assert find(index, ids, segment).equal(rows)
        assert index.size(segment) == len(ids)
        slots = index._slots[segment]
        is_used, has_row = slots[:, 0] != probe.EMPTY, slots[:, 1] >= 0
        live, dead = index.table[segment, [probe.LIVE, probe.DEAD]].tolist()
        assert (live, dead) == (int((is_used & has_row).sum()), int((is_used & ~has_row).sum()))
    index.check()


def steps_of(impls: list[str], most: int = 8) -> st.SearchStrategy:
    step = st.tuples(st.sampled_from(KINDS), st.sampled_from(impls), st.integers(0, 3), st.integers(0, 2**20))
    return st.lists(step, min_size=1, max_size=most)


@settings(max_examples=2000, deadline=None)
@given(st.integers(0, 2**40), st.integers(1, 6))
def test_thousands_of_sequences_against_a_dict(seed, num_steps):
    """Sequences drawn from a seed: hypothesis would spend longer on drawing single steps than the index on taking them."""
    rng = np.random.default_rng(seed)
    versions: tuple[Impl, ...] = (*["numba"] * 12, "reference")  # pyright: ignore[reportAssignmentType]
    steps: list[tuple[str, Impl, int, int]] = [
        (
            KINDS[rng.integers(len(KINDS))],
            versions[rng.integers(len(versions))],
            int(rng.integers(4)),
            int(rng.integers(2**20)),
        )
        for _ in range(num_steps)
    ]
    run_against_dict(new_index(3), steps, max_ids=25)


@settings(max_examples=20, deadline=None)
@given(steps_of(["triton", "triton", "numba", "reference"]))
def test_versions_take_turns_on_one_index(steps):
    run_against_dict(new_index(3), steps, max_ids=90)


@settings(max_examples=12, deadline=None)
@given(steps_of(["triton", "numba"]))
def test_a_table_mirrored_as_on_a_gpu(steps):
    run_against_dict(mirrored_index(3), steps, max_ids=60)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("ids", [COLLIDING, LAST_GROUP, SAME_LOW_BITS], ids=["home0", "last", "low"])
def test_threads_meet_in_full_groups(ids, num_threads, monkeypatch):
    monkeypatch.setattr(module, "_MIN_PER_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    index = new_index(2)
    everything = tensor(ids + EXTREMES + list(range(500, 900)))
    segments = torch.arange(everything.numel()) % 2
    index.insert(everything, segments, torch.arange(everything.numel()))
    assert index.find(everything, segments).equal(torch.arange(everything.numel()))
    assert index.find(everything, 1 - segments).eq(-1).all()
    torch.set_num_threads(before)


@pytest.mark.parametrize("ids", [COLLIDING, LAST_GROUP, SAME_LOW_BITS], ids=["home0", "last", "low"])
def test_kernels_fill_full_groups_as_the_loops_do(ids):
    """Each version finds what the other inserted, and repeated ids in one call share a slot."""
    everything = tensor(ids + EXTREMES + ids[:5] + EXTREMES)
    rows = torch.arange(everything.numel())
    turns: list[tuple[Impl, Impl]] = [("triton", "numba"), ("numba", "triton"), ("triton", "reference")]
    for writer, reader in turns:
        index, want = new_index(2), dict(zip(everything.tolist(), rows.tolist(), strict=True))
        insert(index, everything, 1, rows, impl=writer)
        assert find(index, everything, 1, impl=reader).tolist() == [want[row_id] for row_id in everything.tolist()]
        assert find(index, everything, 0, impl=reader).eq(-1).all()
        assert index.size(1) == len(want)
        assert int(index.table[1, probe.DEAD]) == 0
        gone = everything[::2]
        freed = erase(index, gone, 1, impl=writer).tolist()
        assert freed == [want.pop(row_id, -1) for row_id in gone.tolist()]
        insert(index, gone[:3], 1, tensor([7, 8, 9]), impl=writer)
        want.update(zip(gone[:3].tolist(), (7, 8, 9), strict=True))
        assert find(index, everything, 1, impl=reader).tolist() == [
            want.get(row_id, -1) for row_id in everything.tolist()
        ]


@pytest.mark.parametrize("impl", ["numba", "triton"])
@pytest.mark.parametrize("ids", [COLLIDING, LAST_GROUP], ids=["home0", "last"])
def test_a_search_passes_every_group(ids, impl):
    """28 ids of one home slot in 32 slots: one group is full, the other has the rest."""
    index = new_index()
    for part in (slice(0, 24), slice(24, 28)):
        insert(index, tensor(ids[part]), 0, torch.arange(28)[part], impl=impl)
    assert int(index.table[0, probe.SLOTS]) == 2 * probe.GROUP_SLOTS
    assert find(index, tensor(ids[:30]), 0, impl=impl).tolist() == [*range(28), -1, -1]


def test_kernels_through_growth_and_rebuilds():
    index = new_index(2)
    ids = torch.randint(-(2**63), 2**63 - 1, (400,)).unique()
    segments, rows = torch.arange(ids.numel()) % 2, torch.arange(ids.numel())
    for part in (slice(0, 7), slice(7, 150), slice(150, None)):
        insert(index, ids[part], segments[part], rows[part], impl="triton")
    assert index.find(ids, segments).equal(rows)
    erase(index, ids[:250], segments[:250], impl="triton")
    index.maintain(impl="triton")
    assert int(index.table[:, probe.DEAD].sum()) == 0
    assert find(index, ids, segments, impl="triton").equal(torch.where(rows < 250, -1, rows))
    assert index.export(1, impl="triton")[0].equal(index.export(1)[0])
    index.reserve(0, 600, impl="triton")
    assert index.find(ids, segments).equal(torch.where(rows < 250, -1, rows))


def test_the_usual_step_of_a_mirrored_table_reads_no_counts(monkeypatch):
    index, pulls = mirrored_index(3), []
    pull = SegmentTable.pull
    monkeypatch.setattr(SegmentTable, "pull", lambda table: (pulls.append(1), pull(table))[1])
    for step in range(12):
        ids = torch.arange(100) + 100 * (step // 4)  # three steps of four bring nothing new
        insert(index, ids, torch.arange(100) % 3, ids, impl="triton" if step % 4 == 0 else "numba")
        index.maintain()
    assert len(pulls) <= 2  # the first insert, and perhaps one growth
    assert index.sizes().tolist() == [102, 99, 99]
    assert int(index._segments.bounds().sum()) == 300


def test_a_bound_that_grows_without_readings_ends_in_an_exact_one(monkeypatch):
    index = mirrored_index()
    monkeypatch.setattr(SegmentTable, "start_reading", lambda table: None)  # as if none ever arrived
    for _ in range(30):  # the same ids again and again: no more slots may be needed
        index.insert(torch.arange(50), 0, torch.arange(50))
    assert index.num_bytes() <= 16 * 1024
    assert index.find(torch.arange(51)).tolist() == [*range(50), -1]


def test_a_lost_id_is_reported():
    """No insert may pass load 0.9; where one does, the kernel stops after every group and the caller can see it."""
    index = new_index()
    index.reserve(0, 10)
    places = module.hash_index_triton.publish(index.kernel_table, tensor(range(17)), torch.zeros(1, dtype=torch.int32))
    assert int((places == 0).sum()) == 1
    with pytest.raises(RuntimeError, match=r"had no slot for 1 ids of segments \[0\]"):
        index.check()


def test_ops_are_nodes_of_torch_compile():
    index = new_index(2)
    ids, segments, rows = torch.arange(8), torch.arange(8).to(torch.int32) % 2, torch.arange(8) + 5
    with pytest.raises(RuntimeError, match=r"segments \[0, 1\] have no room"):
        module.insert_op(index.kernel_table, index._slots, ids, segments, rows, "numba")
    index.make_room(segments, 8)
    check = torch.library.opcheck
    check(module.insert_op, (index.kernel_table, index._slots, ids, segments, rows, "numba"))
    index.insert(ids, segments, rows)
    check(module.find_op, (index.kernel_table, index._slots, ids, segments, "numba"))
    check(module.erase_op, (index.kernel_table, index._slots, ids, segments, "numba"))


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_compiled_steps_change_the_index_itself(impl):
    compiled_index, plain_index = new_index(2), new_index(2)

    def step(index, ids, segments, rows):
        before = find(index, ids, segments, impl=impl)
        insert(index, ids, segments, rows, impl=impl)
        freed = erase(index, ids[:3], segments[:3], impl=impl)
        return before, freed, find(index, ids, segments, impl=impl)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ids, segments = tensor([3, -1, probe.EMPTY, 2**63 - 1, 9]), torch.tensor([0, 1, 1, 0, 1], dtype=torch.int32)
    for index in (compiled_index, plain_index):
        index.make_room(segments, 5)
    got = compiled(compiled_index, ids, segments, torch.arange(5))
    want = step(plain_index, ids, segments, torch.arange(5))
    for ours, theirs in zip(got, want, strict=True):
        assert ours.equal(theirs)
    assert compiled_index.table[:, probe.LIVE :].equal(plain_index.table[:, probe.LIVE :])
    for segment in range(2):
        assert compiled_index.export(segment)[0].equal(plain_index.export(segment)[0])


def launches() -> None:
    """Launch every kernel once or more, for compile_kernels.py."""
    index = new_index(2)
    ids, segments = tensor(range(40)), torch.arange(40, dtype=torch.int32) % 2
    insert(index, ids, segments, ids, impl="triton")
    insert(index, ids, 0, ids, impl="triton")
    find(index, ids, 0, impl="triton")
    find(index, ids, segments, impl="triton")
    erase(index, ids, segments, impl="triton")
    index.reserve(0, 1000, impl="triton")


@pytest.mark.parametrize("num_threads", [1, 2])
def test_many_ids_through_every_growth(num_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    index = new_index()
    ids = torch.randint(-(2**63), 2**63 - 1, (100_000,)).unique()
    rows = torch.arange(ids.numel())
    for part, part_rows in zip(ids.split(30_001), rows.split(30_001), strict=True):
        index.insert(part, 0, part_rows)
    assert index.find(ids).equal(rows)
    assert index.find(ids ^ 1)[~torch.isin(ids ^ 1, ids)].eq(-1).all()
    got_ids, got_rows = index.export(0)
    assert got_ids.equal(ids)
    assert got_rows.equal(rows)
    assert index.num_bytes() == 16 * 131_072  # load 0.76 is legal until the step's end
    index.maintain()
    assert index.num_bytes() == 16 * 262_144
    assert index.find(ids).equal(rows)
    torch.set_num_threads(before)


def slots_of(index: HashIndex) -> list[list[list[int]]]:
    return [slots.tolist() for slots in index._slots]


def test_reference_writes_the_same_slots():
    ids = tensor(COLLIDING[:40] + LAST_GROUP[:40] + EXTREMES + list(range(2, 100)))
    segments = torch.arange(ids.numel()) % 3
    rows = torch.arange(ids.numel())
    indexes = {}
    for impl in ("numba", "reference"):
        index = indexes[impl] = new_index(3)
        insert(index, ids, segments, rows, impl=impl)
        freed = erase(index, ids[::3], segments[::3], impl=impl)
        assert freed.equal(rows[::3])
        insert(index, ids[::6], segments[::6], rows[::6] + 1000, impl=impl)
        assert erase(index, tensor([7777, ids[1]]), 0, impl=impl).tolist() == [-1, -1]
    assert slots_of(indexes["numba"]) == slots_of(indexes["reference"])
    for impl, index in indexes.items():
        assert index.table[:, 3:6].equal(indexes["numba"].table[:, 3:6])
        for other in indexes.values():
            assert find(other, ids, segments, impl=impl).equal(find(index, ids, segments))
        assert find(index, ids[:6], 2, impl=impl).tolist() == [-1, -1, 2, -1, -1, 5]


def test_empty_mark_is_an_id_like_any_other():
    mark = tensor([probe.EMPTY])
    index = new_index(2)
    assert index.find(mark).tolist() == [-1]
    index.insert(mark, 1, tensor([5]))
    assert index.find(mark, 0).tolist() == [-1]
    assert index.find(mark, 1).tolist() == [5]
    assert index.export(1)[0].tolist() == [probe.EMPTY]
    assert index.size(1) == 1
    index.insert(tensor(range(1000)), 1, torch.arange(1000) + 10)  # rebuilds keep the side cell
    assert index.find(mark, 1).tolist() == [5]
    assert index.erase(mark, 1).tolist() == [5]
    assert index.find(mark, 1).tolist() == [-1]


def test_rows_beyond_32_bits_and_growth_of_one_segment_only():
    index = new_index(2)
    index.insert(tensor([1, 2]), 0, tensor([2**40, 2**62]))
    other = index.table[0].clone()
    index.insert(torch.arange(10_000), 1, torch.arange(10_000))
    assert index.table[0].equal(other)
    assert index.find(tensor([1, 2])).tolist() == [2**40, 2**62]


def test_reserve_makes_inserts_move_nothing():
    index = new_index()
    index.reserve(0, 5000)
    address = int(index.table[0, probe.ADDRESS])
    index.insert(torch.arange(5000), 0, torch.arange(5000))
    index.maintain()
    assert int(index.table[0, probe.ADDRESS]) == address


def test_dead_slots_are_purged_and_sizes_shrink_by_clear_alone():
    index = new_index()
    for start in range(0, 40_000, 1000):  # a rolling window of 1000 live ids
        index.insert(torch.arange(start, start + 1000), 0, torch.arange(1000))
        index.erase(torch.arange(start, start + 1000), 0)
        index.maintain()
    assert index.size(0) == 0
    assert int(index.table[0, probe.SLOTS]) <= 4096
    index.insert(torch.arange(100), 0, torch.arange(100))
    index.clear(0)
    assert index.num_bytes() == 0
    assert index.find(torch.arange(100)).eq(-1).all()


def test_thousands_of_segments_start_without_memory():
    index = new_index(5000)
    assert index.num_bytes() == 0
    segments = torch.arange(5000)
    ids = torch.full((5000,), 3)
    assert index.find(ids, segments).eq(-1).all()
    index.insert(ids, segments, torch.arange(5000))
    assert index.find(ids, segments).equal(torch.arange(5000))
    assert index.num_bytes() == 5000 * 16 * 16
    index.maintain()
    assert index.sizes().eq(1).all()


def test_find_or_insert_orders_new_ids_by_segment_then_id():
    index = new_index(3)
    index.insert(tensor([4]), 2, tensor([70]))
    calls = []

    def allocate(ids, segments):
        calls.append(list(zip(segments.tolist(), ids.tolist(), strict=True)))
        return torch.arange(ids.numel()) + 10

    ids, segments = tensor([5, 4, -7, 5, 5, 4]), tensor([2, 2, 2, 0, 2, 1])
    got = find_or_insert(index, ids, segments, allocate)
    assert calls == [[(0, 5), (1, 4), (2, -7), (2, 5)]]
    assert got.tolist() == [13, 70, 12, 10, 13, 11]
    assert find_or_insert(index, ids, segments, allocate).equal(got)
    assert len(calls) == 1
    assert find_or_insert(index, ids[:0], segments[:0], allocate).tolist() == []


def test_row_numbers_ignore_threads_and_order():
    ids = torch.randint(-(2**40), 2**40, (50_000,))
    results = []
    for num_threads, order in ((1, torch.arange(50_000)), (2, torch.randperm(50_000))):
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        index = new_index()
        rows = torch.empty_like(ids)
        rows[order] = find_or_insert(index, ids[order], 0, lambda new, _: torch.arange(new.numel()))
        results.append(rows)
        torch.set_num_threads(before)
    assert results[0].equal(results[1])
    assert results[0].equal(torch.unique(ids, return_inverse=True)[1])


def test_equal_ids_in_one_insert_take_the_last_row():
    index = new_index()
    index.insert(tensor([7, 7, 8, probe.EMPTY, probe.EMPTY]), 0, tensor([1, 2, 3, 4, 5]))
    assert index.find(tensor([7, 8, probe.EMPTY])).tolist() == [2, 3, 5]
    assert index.size(0) == 3


def test_strided_input_and_empty_calls():
    index = new_index()
    both = torch.stack((torch.arange(50), torch.arange(50) + 100), dim=1)
    index.insert(both[:, 0], 0, both[:, 1])
    assert index.find(both[:, 0].flip(0)).equal(both[:, 1].flip(0))
    none = tensor([])
    assert index.find(none).shape == (0,)
    assert index.erase(none, 0).shape == (0,)
    index.insert(none, 0, none)
    assert index.size(0) == 50


@pytest.mark.parametrize("clone", [copy.deepcopy, pickle.dumps])
def test_copies_that_would_share_addresses_are_refused(clone):
    with pytest.raises(TypeError, match="holds addresses"):
        clone(new_index())
    with pytest.raises(TypeError, match="hold addresses"):
        clone(RowBlocks(RowLayout(2)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i: i.find(torch.tensor([1.0])), "ids must be int64"),
        (lambda i: i.find(torch.tensor([[1]])), "ids must be int64 \\[U\\]"),
        (lambda i: i.find(tensor([1]), 2), r"segment must lie in \[0, 2\); got 2"),
        (lambda i: i.find(tensor([1, 2]), tensor([0, 0, 0])), "segments must be a number or"),
        (lambda i: i.insert(tensor([1, 2]), 0, tensor([1])), "rows must be int64 \\(2,\\)"),
        (lambda i: find(i, tensor([1]), impl="torch"), "impl='torch' is not available"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(new_index(2))
