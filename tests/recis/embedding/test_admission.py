"""Admission by count, sketch and probability, worked by hand (B8-B11, B14), and its saved state."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recis.embedding import (
    AfterSightings,
    CountMin,
    EmbeddingBagCollection,
    Exact,
    HashTable,
    LfuCapacity,
    TableConfig,
    TableSet,
    TtlSeconds,
    TtlSteps,
    WithProbability,
)
from recis.embedding.sightings import SketchSightings
from recis.jagged import KeyedJaggedTensor
from recis.optim import Adam

# positions of each id in steps 1, 2, 3, 4
STREAM = {9: (2, 0, 1, 1), 8: (1, 1, 1, 0), 7: (5, 1, 0, 0), 6: (3, 0, 0, 0)}


def one_table(**changes) -> HashTable:
    config = TableConfig(**{"name": "item", "features": ("f",), "embedding_dim": 4, **changes})
    return TableSet([config], seed=7)["item"]


def positions(step):
    return [row_id for row_id, counts in STREAM.items() for _ in range(counts[step - 1])]


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("flip", [False, True])
def test_after_sightings_by_hand(cut, flip):  # B8, B9: the same in 1, 2 or 3 micro-batches and in any order
    table = one_table(admission=AfterSightings(3))
    first_row, deltas, before = {}, [], table.counters()
    for step in range(1, 5):
        ids = positions(step)[::-1] if flip else positions(step)
        for part in range(cut):
            batch = torch.tensor(ids[part::cut], dtype=torch.int64)
            rows, numbers = table.lookup(batch, train=True, step=step)
            assert bool((rows[numbers < 0] == 0).all())
        table.end_step(step)
        for row_id in table.ids().tolist():
            first_row.setdefault(row_id, step)
        now = table.counters()
        deltas.append(now - before)
        before = now
    assert first_row == {9: 3, 8: 3, 7: 2}
    assert [d.rejected for d in deltas] == [4, 1, 0, 0]
    assert [d.inserted for d in deltas] == [0, 1, 2, 0]
    assert [d.found for d in deltas] == [0, 0, 0, 1]
    assert table.admission_state()["sightings.ids"].tolist() == [6]
    assert table.admission_state()["sightings.counts"].tolist() == [3]


def test_two_features_and_two_collections_are_one_batch():  # sightings are positions of the whole step
    tables = TableSet([TableConfig(name="item", features=("a", "b"), admission=AfterSightings(3))], seed=7)
    towers = [EmbeddingBagCollection(tables, features=[name]) for name in ("a", "b")]
    batch = KeyedJaggedTensor.from_lists({"a": [[1, 1], [2]], "b": [[1], [3]]})
    for tower in towers:
        tower(batch)
    for tower in towers:
        tower.end_step(1)
    state = tables["item"].admission_state()
    assert dict(zip(state["sightings.ids"].tolist(), state["sightings.counts"].tolist(), strict=True)) == {
        1: 3,
        2: 1,
        3: 1,
    }
    assert tables["item"].counters().rejected == 3
    assert tables.step == 1


def test_rejected_ids_get_no_gradient():
    table = one_table(admission=AfterSightings(2))
    table.lookup(torch.tensor([1]), train=True, step=1)
    table.end_step(1)
    rows, numbers = table.lookup(torch.tensor([1, 2, 2]), train=True, step=2)
    rows.sum().backward()
    (lookup,) = table.store.pending()
    assert sorted(lookup.rows.tolist()) == sorted([int(numbers[0]), -1])
    table.store.drop_gradients()
    table.end_step(2)


def test_admitted_then_evicted_then_seen_twice_again():  # B14
    table = one_table(admission=AfterSightings(2), eviction=(TtlSteps(2),), optimizer=Adam(lr=0.1))
    has_row, first = {}, None
    for step in range(1, 7):
        if step in (1, 2, 5, 6):
            table.lookup(torch.tensor([4]), train=True, step=step)
            if table.size:
                out = table.export()
                first = out["weight"] if first is None else first
                assert torch.equal(out["weight"], first)
                assert bool((out["state.m"] == 0).all())
                table.insert(torch.tensor([4]), torch.ones(1, 4), {"m": torch.ones(1, 4)})
        has_row[step] = table.size == 1
        table.end_step(step)
    assert has_row == {1: False, 2: True, 3: True, 4: True, 5: False, 6: True}
    assert table.counters().evicted == 1


def test_probability_by_hand():  # B11
    table = one_table(admission=WithProbability(0.5))
    _, numbers = table.lookup(torch.tensor([42, 43, 44, 45, -1]), train=True, step=1)
    assert (numbers >= 0).tolist() == [True, False, True, False, True]
    table.end_step(1)
    _, numbers = table.lookup(torch.tensor([43, 45, 42]), train=True, step=2)
    assert (numbers >= 0).tolist() == [True, False, True]
    assert one_table(admission=WithProbability(0.0)).lookup(torch.arange(9), train=True, step=1)[1].max() == -1
    assert one_table(admission=WithProbability(1.0)).lookup(torch.arange(9), train=True, step=1)[1].min() == 0


def test_sketch_size_and_bounds():  # B10
    assert (CountMin(1e-4, 1e-2).width, CountMin(1e-4, 1e-2).depth) == (27183, 5)
    sketch = SketchSightings([None, CountMin(eps=0.02, delta=0.05)])  # small, so that cells collide
    generator = torch.Generator().manual_seed(0)
    truth = torch.zeros(3000, dtype=torch.int64)
    tables = torch.ones(3000, dtype=torch.int32)
    for _ in range(4):
        counts = torch.randint(0, 4, (3000,), generator=generator)
        sketch.add(torch.arange(3000) - 1500, tables, counts)
        truth += counts
    estimate = sketch.counts(torch.arange(3000) - 1500, tables)
    assert bool((estimate >= truth).all())
    assert int(sketch.totals[1]) == int(truth.sum())
    too_high = (estimate > truth + 0.02 * truth.sum()).float().mean()
    assert too_high <= 0.05


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(-3, 12), max_size=8), min_size=1, max_size=6), st.integers(2, 4))
def test_sketch_admits_no_later_than_exact(stream, needed):  # B10
    sketch_config = AfterSightings(needed, CountMin(eps=0.3, delta=0.3))
    exact, sketch = one_table(admission=AfterSightings(needed)), one_table(admission=sketch_config)
    for step, ids in enumerate(stream, start=1):
        for table in (exact, sketch):
            table.lookup(torch.tensor(ids, dtype=torch.int64), train=True, step=step)
            table.end_step(step)
        assert set(exact.ids().tolist()) <= set(sketch.ids().tolist())


def test_idle_sightings_are_forgotten_by_the_time_to_live():
    table = one_table(admission=AfterSightings(3), eviction=(TtlSteps(2),))
    for step, ids in enumerate([[1, 2], [2], [], []], start=1):
        table.lookup(torch.tensor(ids, dtype=torch.int64), train=True, step=step)
        table.end_step(step)
        kept = table.admission_state().get("sightings.ids", torch.empty(0)).tolist()
        assert kept == {1: [1, 2], 2: [1, 2], 3: [2], 4: []}[step]


def test_idle_sightings_are_forgotten_by_seconds():
    now = [100]
    config = TableConfig(name="item", features=("f",), admission=AfterSightings(3), eviction=(TtlSeconds(60),))
    table = TableSet([config], seed=7, clock=lambda: now[0])["item"]
    for step, (seconds, ids) in enumerate([(100, [1]), (150, [2]), (160, []), (209, []), (210, [])], start=1):
        now[0] = seconds
        table.lookup(torch.tensor(ids, dtype=torch.int64), train=True, step=step)
        table.end_step(step)
        kept = table.admission_state().get("sightings.ids", torch.empty(0)).tolist()
        assert kept == {1: [1], 2: [1, 2], 3: [2], 4: [2], 5: []}[step]


def test_exact_counter_keeps_the_newest_ids_under_its_limit():
    table = one_table(admission=AfterSightings(9, Exact(max_ids=3)))
    table.lookup(torch.tensor([5, 6, 7]), train=True, step=1)
    table.end_step(1)
    table.lookup(torch.tensor([6, 1]), train=True, step=2)
    table.end_step(2)
    assert table.admission_state()["sightings.ids"].tolist() == [
        1,
        6,
        7,
    ]  # of 5 and 7, equally old, the smaller id went


def test_counters_of_several_tables_do_not_mix():
    rules = {
        "x": AfterSightings(2),
        "y": AfterSightings(3, CountMin()),
        "z": AfterSightings(1),
        "w": WithProbability(1.0),
    }
    tables = TableSet([TableConfig(name=k, features=(k,), admission=rule) for k, rule in rules.items()], seed=7)
    assert len(tables.stores) == 1
    collection = EmbeddingBagCollection(tables)
    sizes = []
    for step in range(1, 5):
        collection(KeyedJaggedTensor.from_lists({name: [[1]] for name in rules}))
        collection.end_step(step)
        sizes.append([table.size for table in tables])
    assert sizes == [[0, 0, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize("counter", [Exact(), CountMin(eps=0.1, delta=0.1)], ids=lambda c: type(c).__name__)
def test_saved_sightings_continue_and_merge(counter):
    def fed(*steps):
        table = one_table(admission=AfterSightings(5, counter))
        for step, ids in enumerate(steps, start=1):
            table.lookup(torch.tensor(ids), train=True, step=step)
            table.end_step(step)
        return table

    whole = fed([1, 1, 2], [2, 3])
    other = one_table(admission=AfterSightings(5, counter))
    other.load_admission_state(whole.admission_state())
    control = whole.store.admission
    ids = torch.arange(6)
    assert torch.equal(other.store.admission.sightings(ids, 0), control.sightings(ids, 0))
    merged = fed([1, 1, 2])
    merged.load_admission_state(fed([2, 3]).admission_state(), merge=True)
    assert torch.equal(merged.store.admission.sightings(ids, 0), control.sightings(ids, 0))
    merged.load_admission_state({})
    assert bool((merged.store.admission.sightings(ids, 0) == 0).all())


def test_saved_sightings_of_another_kind_are_refused():
    exact, sketch = one_table(admission=AfterSightings(2)), one_table(admission=AfterSightings(2, CountMin(0.1, 0.1)))
    exact.lookup(torch.tensor([1]), train=True, step=1)
    exact.end_step(1)
    with pytest.raises(ValueError, match=r"'item'.*holds 'sightings.ids'.*keeps 'sketch'"):
        sketch.load_admission_state(exact.admission_state())
    with pytest.raises(ValueError, match="use the eps and delta it was made with"):
        sketch.load_admission_state(one_table(admission=AfterSightings(2, CountMin(0.5, 0.1))).admission_state())


def test_forgetting_works_beside_other_policies():
    """An admitted id gives up its count; once evicted it starts from 0, whatever evicted it."""
    table = one_table(admission=AfterSightings(2), eviction=(LfuCapacity(1),))
    for step in (1, 2):
        table.lookup(torch.tensor([1, 2, 2]), train=True, step=step)
        table.end_step(step)
    assert table.ids().tolist() == [2]
    _, numbers = table.lookup(torch.tensor([1]), train=True, step=3)
    assert numbers.tolist() == [-1]
