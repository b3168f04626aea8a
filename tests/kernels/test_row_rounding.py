"""Stochastic rounding to bfloat16 (B18): the stated bits, the mean, and values that have no neighbours."""

import pytest
import torch

from recis_kernels.philox import table_key
from recis_kernels.row_rounding import add_noise, round_stochastic

KEY = torch.tensor([table_key(7, "item")])


def test_by_hand():
    """Seed 7, table "item", id 42, step 1, columns 0..3 of 1 + 2**-9: only the first rounds up."""
    got = round_stochastic(torch.full((1, 4), 1 + 2.0**-9), torch.tensor([42]), KEY, 1)
    assert got.dtype == torch.bfloat16
    assert got.tolist() == [[1.0078125, 1.0, 1.0, 1.0]]


def test_the_mean_over_all_noise_is_the_value():
    noise = torch.arange(65536)
    rounded = add_noise(torch.full((65536,), 1 + 2.0**-9), noise).float()
    assert int((rounded > 1).sum()) == 16384
    assert rounded.double().mean() == 1 + 2.0**-9
    negative = add_noise(torch.full((65536,), -1 - 2.0**-9), noise).float()
    assert negative.double().mean() == -1 - 2.0**-9


def test_exact_values_inf_and_nan_stay():
    values = torch.tensor([[1.5, -2.0, 0.0, float("inf"), -float("inf"), float("nan")]])
    for step in range(5):
        got = round_stochastic(values, torch.tensor([3]), KEY, step)
        torch.testing.assert_close(got.float(), values, rtol=0, atol=0, equal_nan=True)
    low_nan = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)
    assert add_noise(low_nan, torch.tensor([0])).isnan().all()  # cutting the low bits alone would give infinity


def test_noise_depends_on_id_step_and_table_only():
    values, ids = torch.rand(6, 9), torch.tensor([5, -1, 5, 2**62, 0, -(2**63)])
    values[2] = values[0]
    base = round_stochastic(values, ids, KEY, 3)
    assert torch.equal(base[0], base[2])
    order = torch.tensor([4, 2, 0, 1, 5, 3])
    assert torch.equal(round_stochastic(values[order], ids[order], KEY.expand(6), 3), base[order])
    assert not torch.equal(round_stochastic(values, ids, KEY, 4), base)
    assert not torch.equal(round_stochastic(values, ids, torch.tensor([table_key(7, "user")]), 3), base)


def test_wrong_values_are_named():
    with pytest.raises(ValueError, match="values must be"):
        round_stochastic(torch.zeros(2, 2, dtype=torch.float64), torch.arange(2), KEY, 1)
