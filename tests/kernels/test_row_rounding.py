"""Stochastic rounding to bfloat16 (B18): the stated bits, the mean, and values that have no neighbours."""

import pytest
import torch

from recis_kernels.philox import table_key
from recis_kernels.row_rounding import add_noise, round_stochastic

KEY = torch.tensor([table_key(7, "item")])


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_by_hand(impl):
    """Seed 7, table "item", id 42, step 1, columns 0..3 of 1 + 2**-9: only the first rounds up."""
    got = round_stochastic(torch.full((1, 4), 1 + 2.0**-9), torch.tensor([42]), KEY, 1, impl=impl)
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


@pytest.mark.parametrize("num_keys", [1, 9])
@pytest.mark.parametrize("dim", [1, 2, 3, 7, 64, 65, 513], ids="D{}".format)
def test_triton_gives_the_bits_of_torch(dim, num_keys):
    """All ids and exponents, Inf and every kind of NaN, several tiles of rows and columns, strided values."""
    values = torch.randint(-(2**31), 2**31, (9, 2 * dim), dtype=torch.int64).to(torch.int32).view(torch.float32)[:, ::2]
    values[0, 0], values[1, 0], values[2, 0] = torch.inf, -torch.inf, torch.nan
    values.view(torch.int32)[3, 0] = 0x7F800001
    ids = torch.tensor([5, -1, 0, 2**62, -(2**63), 2**63 - 1, 2**32, 7, 8])
    keys = torch.tensor([table_key(seed, "item") for seed in range(num_keys)])
    want = round_stochastic(values, ids, keys, 2**31 + 5, impl="torch")
    got = round_stochastic(values, ids, keys, 2**31 + 5, impl="triton")
    assert got.view(torch.int16).equal(want.view(torch.int16))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_nothing_to_round(impl):
    none = torch.empty(0, dtype=torch.int64)
    assert round_stochastic(torch.empty(0, 3), none, KEY, 1, impl=impl).shape == (0, 3)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_op_is_known_to_torch(impl):
    values, ids = torch.rand(3, 5), torch.arange(3)
    torch.library.opcheck(torch.ops.recis.round_stochastic.default, (values, ids, KEY, 4, impl))

    def run(given):
        return round_stochastic(given * 2, ids, KEY, 4, impl=impl)

    assert torch.compile(run, fullgraph=True, backend="aot_eager")(values).equal(run(values))


def test_wrong_values_are_named():
    with pytest.raises(ValueError, match="values must be"):
        round_stochastic(torch.zeros(2, 2, dtype=torch.float64), torch.arange(2), KEY, 1)
    with pytest.raises(ValueError, match=r"ids must be \[2\]"):
        round_stochastic(torch.zeros(2, 2), torch.arange(3), KEY, 1)
    with pytest.raises(ValueError, match=r"keys must be \[2\] or"):
        round_stochastic(torch.zeros(2, 2), torch.arange(2), KEY.expand(3), 1)


def launches() -> None:
    for dim in (64, 5, 1):
        for keys in (KEY, KEY.expand(3)):
            round_stochastic(torch.rand(3, dim), torch.arange(3), keys, 1, impl="triton")
