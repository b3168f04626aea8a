"""Eviction by time, capacity, norm and score (A32, B12, B13), and its queues against a full look at every step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recis.embedding import (
    ByScore,
    HashTable,
    LfuCapacity,
    LruCapacity,
    MinNorm,
    RowMeta,
    TableConfig,
    TableSet,
    TtlSeconds,
    TtlSteps,
)
from recis.embedding.eviction import lowest


def one_table(*policies, clock=None, on_evict=None, **changes) -> HashTable:
    config = TableConfig(**{"name": "item", "features": ("f",), "embedding_dim": 2, "eviction": policies, **changes})
    return TableSet([config], seed=7, clock=clock, on_evict=on_evict)["item"]


def see(table, step, *ids):
    table.lookup(torch.tensor(ids, dtype=torch.int64), train=True, step=step)
    table.end_step(step)


def test_time_to_live_by_hand():  # B12
    table = one_table(TtlSteps(4))
    seen = {1: [10], 2: [20, 30], 3: [10], 6: [30]}
    removed = {}
    for step in range(1, 12):
        before = set(table.ids().tolist())
        if step == 5:
            table.lookup(torch.tensor([20]), train=False, step=5)
        see(table, step, *seen.get(step, []))
        for row_id in before - set(table.ids().tolist()):
            removed[row_id] = step
    assert removed == {10: 7, 20: 6, 30: 10}


META = {5: (10, 1), -3: (10, 4), 7: (8, 9), 2: (12, 1), 9: (8, 2)}


@pytest.mark.parametrize(
    ("policy", "out"),
    [
        (LruCapacity(4), {7}),
        (LruCapacity(2), {7, 9, -3}),
        (LfuCapacity(4), {5}),
        (LfuCapacity(3), {5, 2}),
        (LruCapacity(5), set()),
    ],
    ids=repr,
)
@pytest.mark.parametrize("order", [1, -1])
def test_capacity_by_hand(policy, out, order):  # B13, any row order
    table = one_table(policy)
    ids = list(META)[::order]
    table.import_rows(
        {
            "ids": torch.tensor(ids),
            "weight": torch.zeros(5, 2),
            "last_seen": torch.tensor([META[i][0] for i in ids], dtype=torch.int32),
            "count": torch.tensor([META[i][1] for i in ids], dtype=torch.int32),
        }
    )
    table.end_step(20)
    assert set(table.ids().tolist()) == set(META) - out
    assert table.counters().evicted == len(out)


def test_older_than_is_strict():  # A32
    table = one_table()
    see(table, 5, 1)
    assert table.evict_older_than(5).numel() == 0
    assert table.evict_older_than(6).tolist() == [1]


def test_seconds_follow_one_reading_per_step():
    now = [1_700_000_000]
    evicted = []
    table = one_table(
        TtlSeconds(10), clock=lambda: now[0], on_evict=lambda name, ids: evicted.append((name, ids.tolist()))
    )
    see(table, 1, 1, 2)
    now[0] += 6
    see(table, 2, 2)
    now[0] += 3
    see(table, 3, 3)
    assert evicted == []
    now[0] += 1
    see(table, 4)
    assert evicted == [("item", [1])]
    now[0] -= 5  # a clock that runs back does not bring time back
    see(table, 5)
    assert table.export()["last_seen_s"].tolist() == [1_700_000_006, 1_700_000_009]
    assert [step for step, _ in table.store.clock.log] == [1, 2, 3, 4, 5]


def test_a_replay_of_the_clock_log_evicts_alike():
    now = iter([100, 107, 108, 140, 141])
    steps = {1: [1, 2], 2: [2], 3: [3], 4: [3], 5: []}
    first = one_table(TtlSeconds(30), clock=lambda: next(now))
    for step, ids in steps.items():
        see(first, step, *ids)
    log = dict(first.store.clock.log)
    step = 0
    again = one_table(TtlSeconds(30), clock=lambda: log[step])
    for step, ids in steps.items():
        see(again, step, *ids)
    assert again.ids().tolist() == first.ids().tolist() == [3]


def test_clock_readings_past_2038_survive():
    table = one_table(TtlSeconds(10), clock=lambda: 3_000_000_000)
    see(table, 1, 1)
    assert table.export()["last_seen_s"].tolist() == [3_000_000_000]
    see(table, 2)
    assert table.size == 1


def test_small_norms_go_every_so_many_steps():
    table = one_table(MinNorm(1.0, every_steps=3))
    table.insert(torch.tensor([1, 2, 3]), torch.tensor([[0.6, 0.8], [0.6, 0.79], [3.0, 0.0]]))
    for step in (1, 2):
        table.end_step(step)
        assert table.size == 3
    table.end_step(3)
    assert table.ids().tolist() == [1, 3]  # the norm of row 1 is 1, not below


def norm_then_count(meta: RowMeta) -> torch.Tensor:
    assert meta.ids.tolist() == sorted(meta.ids.tolist())
    return meta.norm * 1000 + meta.count


def test_own_score():
    table = one_table(ByScore(norm_then_count, rows=2))
    table.insert(torch.tensor([3, 1, 2]), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.0]]))
    see(table, 1, 3, 3, 1)
    assert table.ids().tolist() == [1, 3]
    see(table, 2, 1, 3, 4)
    assert table.ids().tolist() == [1, 3]  # 4 came with a norm near 0.01
    bad = one_table(ByScore(lambda meta: meta.norm[:1], rows=1))
    bad.lookup(torch.tensor([1, 2]), train=True, step=1)
    with pytest.raises(ValueError, match=r"'item': the score of ByScore must be \[2\]"):
        bad.end_step(1)


def test_policies_work_together():
    table = one_table(LruCapacity(3), TtlSteps(5))
    see(table, 1, 1, 2, 3)
    see(table, 2, 4)
    assert table.ids().tolist() == [2, 3, 4]
    see(table, 6)
    assert table.ids().tolist() == [4]


def test_eviction_is_reported_per_table():
    seen = []
    configs = [
        TableConfig(name="a", features=("a",), eviction=(TtlSteps(1),)),
        TableConfig(name="b", features=("b",), eviction=(TtlSteps(2),)),
        TableConfig(name="c", features=("c",)),
    ]
    tables = TableSet(configs, seed=1, on_evict=lambda name, ids: seen.append((name, ids.tolist())))
    for table in tables:
        table.lookup(torch.tensor([3, -1]), train=True, step=1)
    tables.end_step(1)
    tables.end_step(2)
    tables.end_step(3)
    assert seen == [("a", [-1, 3]), ("b", [-1, 3])]
    assert [table.size for table in tables] == [0, 0, 2]
    assert tables["b"].counters().evicted == 2


def test_ending_a_step_table_by_table_is_the_same():
    def build():
        return TableSet(
            [TableConfig(name=n, features=(n,), eviction=(TtlSteps(2), LruCapacity(3))) for n in ("a", "b")], seed=1
        )

    together, apart = build(), build()
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 12):
        ids = torch.randint(0, 9, (2, 4), generator=generator)
        for tables in (together, apart):
            for table, batch in zip(tables, ids, strict=True):
                table.lookup(batch, train=True, step=step)
        together.end_step(step)
        for table in apart:
            table.end_step(step)
        for name in ("a", "b"):
            assert together[name].ids().tolist() == apart[name].ids().tolist()
            assert together[name].counters() == apart[name].counters()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["ttl", "lru", "lfu"]),
    st.integers(1, 9),
    st.lists(st.lists(st.integers(0, 14), max_size=5), min_size=1, max_size=40),
)
def test_queues_find_what_a_full_look_finds(kind, limit, stream):
    policy = {"ttl": TtlSteps, "lru": LruCapacity, "lfu": LfuCapacity}[kind](limit)
    table = one_table(policy)
    rows: dict[int, list[int]] = {}  # id -> [last_seen, count]
    for step, ids in enumerate(stream, start=1):
        for row_id in ids:
            row = rows.setdefault(row_id, [step, 0])
            row[:] = [step, row[1] + 1]
        if kind == "ttl":
            rows = {row_id: row for row_id, row in rows.items() if step - row[0] < limit}
        else:
            order = sorted(rows, key=lambda i: (rows[i][0 if kind == "lru" else 1], rows[i][0], i))
            for row_id in order[: max(0, len(rows) - limit)]:
                del rows[row_id]
        see(table, step, *ids)
        assert table.ids().tolist() == sorted(rows)
        out = table.export()
        assert out["last_seen"].tolist() == [rows[i][0] for i in sorted(rows)]
        assert out["count"].tolist() == [rows[i][1] for i in sorted(rows)]


ROWS = st.tuples(st.integers(-2, 2), st.integers(0, 2), st.integers(-9, 9))


@given(st.lists(ROWS, unique_by=lambda row: row[2]), st.integers(0, 9))
def test_lowest_sorts_by_score_then_age_then_id(rows, num_rows):
    scores, last_seen, ids = torch.tensor(rows, dtype=torch.int64).view(-1, 3).unbind(1)
    picked = lowest(scores, last_seen, ids, num_rows)
    assert sorted(rows[i] for i in picked.tolist()) == sorted(rows)[:num_rows]


def test_rows_without_a_usable_score_go_first():
    scores = torch.tensor([1.0, float("nan"), -5.0, float("inf")])
    picked = lowest(scores, torch.zeros(4), torch.arange(4), 2)
    assert sorted(picked.tolist()) == [1, 2]
