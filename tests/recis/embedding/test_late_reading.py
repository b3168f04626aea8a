"""Counts and faults that arrive late, and rows that are dealt by counters the host does not know."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recis.embedding import late_reading
from recis.embedding.late_reading import LateFaults, LateReading
from recis.embedding.row_owners import DeviceRowOwners, RowOwners
from recis_kernels.hash_index import HashIndex
from recis_kernels.row_allocator import find_or_insert_rows

CPU = torch.device("cpu")


@pytest.fixture
def arriving(monkeypatch):
    """A list whose one entry says whether copies have arrived."""
    state = [False]
    monkeypatch.setattr(late_reading._Copy, "has_arrived", property(lambda copy: state[0]))
    return state


def test_a_reading_keeps_the_value_and_the_note_of_its_start(arriving):
    reading, values = LateReading(), torch.tensor([1, 2])
    reading.start(values, "first")
    values += 10
    reading.start(values, "second")  # one is under way: nothing happens
    assert reading.take() is None
    arriving[0] = True
    taken = reading.take()
    assert taken is not None
    assert (taken[0].tolist(), taken[1]) == ([1, 2], "first")
    assert reading.take() is None
    reading.start(values)
    reading.drop()
    assert reading.take() is None


def test_faults_are_raised_once_each_in_order_when_they_arrive(arriving):
    faults = LateFaults()
    for name, count in (("none", 0), ("two", 2), ("three", 3)):
        faults.ask(torch.tensor(count), lambda found, name=name: RuntimeError(f"{name}: {found}"))
    faults.raise_found()
    arriving[0] = True
    with pytest.raises(RuntimeError, match="two: 2"):
        faults.raise_found()
    with pytest.raises(RuntimeError, match="three: 3"):
        faults.raise_found()
    faults.raise_found()
    arriving[0] = False
    faults.ask(torch.tensor([4]), lambda found: RuntimeError(f"four: {found}"))
    with pytest.raises(RuntimeError, match="four: 4"):
        faults.raise_found(wait=True)


def test_the_bound_holds_until_the_count_arrives(arriving):
    """Six lookups of which half the ids are new: the bound is never below the truth, and exact once all has arrived."""
    owners, index = DeviceRowOwners(CPU), HashIndex()
    index.add_segment()
    truth = 0
    for step in range(6):
        arriving[0] = step % 3 == 2
        ids = torch.arange(5 * step, 5 * step + 10)
        owners.grow(owners.most_fresh + ids.numel())
        rows, is_new = find_or_insert_rows(index, ids, 0, owners.allocator)
        owners.note(ids.numel())
        owners.own(torch.where(is_new, rows, -1), torch.zeros(10, dtype=torch.int32))
        truth += int(is_new.sum())
        arriving[0] = False
        assert owners.most_fresh >= truth
        assert bool((rows >= 0).all())
    assert owners.most_fresh > truth
    assert owners.num_fresh == owners.num_used == owners.most_fresh == truth == 35
    assert owners.rows_of(torch.tensor([True])).tolist() == list(range(35))


def test_a_row_that_was_not_there_is_no_secret():
    owners, index = DeviceRowOwners(CPU), HashIndex()
    index.add_segment()
    owners.grow(2)
    find_or_insert_rows(index, torch.arange(3), 0, owners.allocator)
    owners.note(3)
    with pytest.raises(RuntimeError, match="1 new ids got no row"):
        _ = owners.most_fresh


CALLS = st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=12)


@settings(max_examples=40, deadline=None)
@given(CALLS)
def test_both_deal_the_same_rows(calls):
    dealers: list[Any] = [RowOwners(), DeviceRowOwners(CPU)]
    used: list[int] = []
    for takes, number in calls:
        if takes:
            tables = torch.arange(number, dtype=torch.int32) % 3
            rows, other = (dealer.take(tables) for dealer in dealers)
            assert rows.tolist() == other.tolist()
            used += rows.tolist()
        else:
            freed, used = used[:number], used[number:]
            for dealer in dealers:
                dealer.release(torch.tensor(freed, dtype=torch.int64))
        for dealer in dealers:
            assert dealer.num_used == len(used)
        wanted = torch.tensor([True, False, True])
        rows, other = (dealer.rows_of(wanted).tolist() for dealer in dealers)
        assert rows == other
        assert dealers[0].num_fresh == dealers[1].num_fresh
