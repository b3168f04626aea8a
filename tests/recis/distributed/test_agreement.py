"""What owners decide together: the result must be that of one process, bit for bit, however the rows are dealt."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_ranks import on_ranks

from recis.distributed.agreement import lowest_of_all, sum_of_squares
from recis.distributed.ranks import Ranks
from recis.embedding.eviction import lowest

SQUARES = st.lists(st.floats(0, 1e30, allow_subnormal=False), max_size=40)


def dealt(values: torch.Tensor, world_size: int, seed: int) -> list[torch.Tensor]:
    """Return which of the values each rank has, at random."""
    owner = torch.randint(0, world_size, (values.shape[0],), generator=torch.Generator().manual_seed(seed))
    return [(owner == rank).nonzero().squeeze(1) for rank in range(world_size)]


@settings(max_examples=40, deadline=None)
@given(squares=SQUARES, world_size=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_norm_does_not_depend_on_the_deal(squares, world_size, seed):
    values = torch.tensor(squares, dtype=torch.float64)
    alone = sum_of_squares(Ranks(), values, "norm")
    places = dealt(values, world_size, seed)
    together = on_ranks(world_size, lambda ranks: float(sum_of_squares(ranks, values[places[ranks.rank]], "norm")))
    assert together == [float(alone)] * world_size
    exact = sum(map(Fraction, squares), Fraction(0))
    assert float(alone) == pytest.approx(float(exact), rel=1e-12)


def test_the_norm_by_hand():
    assert float(sum_of_squares(Ranks(), torch.tensor([9.0, 16.0], dtype=torch.float64), "norm")) == 25.0
    assert float(sum_of_squares(Ranks(), torch.zeros(0, dtype=torch.float64), "norm")) == 0.0
    tiny = torch.tensor(
        [1.0, 2.0**-60], dtype=torch.float64
    )  # what a float64 sum would lose is there, then rounded once
    assert float(sum_of_squares(Ranks(), tiny, "norm")) == 1.0
    many = torch.full((1 << 16,), 2.0**-60, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    assert float(sum_of_squares(Ranks(), torch.cat([one, many]), "norm")) == 1 + math.ldexp(1, -44)


@settings(max_examples=40, deadline=None)
@given(
    keys=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=30),
    num_rows=st.integers(0, 12),
    world_size=st.integers(1, 4),
    floats=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_lowest_are_those_of_one_process(keys, num_rows, world_size, floats, seed):
    """Ties by last_seen, then by id; each rank gives only its own lowest."""
    scores = torch.tensor([score for score, _ in keys], dtype=torch.float64 if floats else torch.int32)
    last_seen = torch.tensor([seen for _, seen in keys], dtype=torch.int32)
    ids = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed)) - 5
    want = set(ids[lowest(scores, last_seen, ids, num_rows)].tolist())
    places = dealt(ids, world_size, seed)

    def work(ranks):
        at = places[ranks.rank]
        at = at[lowest(scores[at], last_seen[at], ids[at], num_rows)]
        picked = lowest_of_all(ranks, scores[at], last_seen[at], ids[at], num_rows, "eviction")
        return ids[at][picked].tolist()

    got = [number for numbers in on_ranks(world_size, work) for number in numbers]
    assert len(got) == len(want)
    assert set(got) == want
