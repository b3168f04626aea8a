"""ExactSum is the correctly rounded sum, whatever the order and the split."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recis.metrics.exact_sum import NUM_LIMBS, ExactSum

FINITE = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300)


def exact_sum(numbers) -> ExactSum:
    total = ExactSum()
    total.add(np.array(numbers, dtype=np.float64))
    return total


@settings(deadline=None)
@given(st.lists(FINITE, max_size=30), st.randoms(use_true_random=False))
def test_equals_rounded_rational_sum_in_any_order_and_split(numbers, random):
    want = float(sum(map(Fraction, numbers), Fraction(0)))
    straight = exact_sum(numbers)
    shuffled = list(numbers)
    random.shuffle(shuffled)
    cut = random.randint(0, len(numbers))
    parts = [exact_sum(shuffled[:cut]), exact_sum(shuffled[cut:])]
    parts[1].merge(parts[0])
    assert straight.value() == parts[1].value() == want
    assert torch.equal(straight.state(), parts[1].state())


@pytest.mark.parametrize(
    "numbers",
    [[], [0.0], [-0.0], [5e-324], [-5e-324, 5e-324], [1e308, 1.0, -1e308], [2.0**-1022, -(2.0**-1074)], [1.0] * 1000],
    ids=str,
)
def test_edges(numbers):
    assert exact_sum(numbers).value() == math.fsum(numbers)


def test_cancellation_that_floats_lose():
    assert exact_sum([1e16, 1.0, -1e16]).value() == 1.0


def test_state_round_trip_and_wrong_state():
    total = exact_sum([0.1, -7.25, 1e-200])
    loaded = ExactSum()
    loaded.load(total.state())
    assert loaded.value() == total.value()
    assert torch.equal(loaded.state(), total.state())
    with pytest.raises(ValueError, match=rf"int64 \[{NUM_LIMBS}\]"):
        loaded.load(torch.zeros(3, dtype=torch.int64))
