"""The order of samples as pure functions, against loops that deal one row at a time."""

from itertools import cycle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recis.errors import ConfigError
from recis.io.lanes import check_split, deal_units, micro_batches_of_step, permutation, rows_given


def deal_one_by_one(lane_rows: list[int], total: int) -> list[int]:
    given_rows = [0] * len(lane_rows)
    for lane in cycle(range(len(lane_rows))):
        if sum(given_rows) == total:
            return given_rows
        if given_rows[lane] < lane_rows[lane]:
            given_rows[lane] += 1
    raise AssertionError


def test_units_are_dealt_round_robin():
    assert deal_units(6, 4, seed=0, epoch=0, shuffle=False) == [[0, 4], [1, 5], [2], [3]]
    assert deal_units(2, 4, seed=0, epoch=0, shuffle=False) == [[0], [1], [], []]


def test_shuffled_units_are_a_permutation_that_changes_with_seed_and_epoch():
    orders = [
        deal_units(40, 1, seed=seed, epoch=epoch, shuffle=True)[0] for seed, epoch in ((1, 0), (1, 1), (2, 0), (1, 0))
    ]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert orders[0] == orders[3]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_permutation_is_the_same_on_every_machine():
    # words of Philox4x64-10 with this key and counter, sorted: fixed, because positions in checkpoints rely on it
    assert permutation(6, seed=1, epoch=0, stream=0).tolist() == [3, 5, 2, 0, 1, 4]
    assert permutation(5, seed=2**64 - 1, epoch=3, stream=7, block=2).tolist() == [4, 3, 2, 1, 0]
    assert permutation(0, seed=0, epoch=0, stream=0).tolist() == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.data())
def test_rows_given_is_dealing_one_row_at_a_time(lane_rows, data):
    total = data.draw(st.integers(0, sum(lane_rows)))
    assert rows_given(np.array(lane_rows), total).tolist() == deal_one_by_one(lane_rows, total)


def test_rows_given_by_hand():
    assert rows_given(np.array([3, 0, 1, 5]), 7).tolist() == [3, 0, 1, 3]
    with pytest.raises(ValueError, match=r"total must be in \[0, 9\]; got 10"):
        rows_given(np.array([3, 0, 1, 5]), 10)


def test_equal_shares_where_ranks_divide_lanes_and_batch():
    lane_rows = np.full(8, 1000)
    before = rows_given(lane_rows, 0)
    for step in range(1, 30):
        after = rows_given(lane_rows, 20 * step)  # 8 lanes do not divide 20, 4 ranks do
        shares = [int((after - before)[rank::4].sum()) for rank in range(4)]
        assert shares == [5] * 4
        before = after


def test_micro_batches_grow_in_number_not_in_size():
    counts = np.array([4, 0, 0, 0])  # one lane is left: its rank has the whole step of 4
    assert micro_batches_of_step(counts, world_size=4, micro_batches=1, micro_batch_size=1) == 4
    assert micro_batches_of_step(np.array([1, 1, 1, 1]), world_size=4, micro_batches=1, micro_batch_size=1) == 1
    assert micro_batches_of_step(np.array([1, 0, 0, 0]), world_size=1, micro_batches=3, micro_batch_size=2) == 3


def test_split_is_checked():
    assert check_split(batch_size=12, num_lanes=4, rank=1, world_size=2, micro_batches=3) == 2
    with pytest.raises(ConfigError, match=r"batch_size=10 must be a multiple .* 4 x 1; use batch_size=8"):
        check_split(batch_size=10, num_lanes=4, rank=0, world_size=4, micro_batches=1)
    with pytest.raises(ConfigError, match="4 ranks need at least as many lanes; num_lanes=2"):
        check_split(batch_size=8, num_lanes=2, rank=0, world_size=4, micro_batches=1)
    with pytest.raises(ConfigError, match="rank=2, world_size=2"):
        check_split(batch_size=8, num_lanes=2, rank=2, world_size=2, micro_batches=1)
