"""Folds of rows and sums in sixteen lanes: the stated order bit for bit; the finite check."""

import numpy as np
import pytest
import torch

from recis_kernels.dispatch import njit
from recis_kernels.lanes import (
    NUM_LANES,
    fold_rows,
    fold_words,
    lane_scratch,
    lane_sum,
    scale_is_finite,
    square_root,
    square_sum,
    square_sum_reference,
)


@njit
def _square_sum(address, size):
    return square_sum(address, size)


@njit
def _lane_sum(address, size):
    return lane_sum(address, size)


@njit
def _scale_is_finite(address, size, scale):
    return scale_is_finite(address, size, scale)


@njit
def _square_root(value):
    return square_root(value)


@njit
def _fold_rows(sources, factors, count, total, dim, started):
    fold_rows(sources, factors, count, total, dim, started, 0)


@njit
def _fold_words(sources, factors, count, total, dim):
    fold_words(sources, factors, count, total, dim, 0)


@pytest.mark.parametrize("num_rows", [1, 2, 33])
@pytest.mark.parametrize("dim", [1, 15, 16, 17, 64, 80, 97, 1024])
@pytest.mark.parametrize("weighted", [False, True])
def test_fold_is_one_addition_after_the_other(dim, num_rows, weighted):
    rows, order = torch.randn(40, dim), torch.randint(0, 40, (num_rows,))
    factors = torch.rand(num_rows)
    sources = rows.data_ptr() + 4 * dim * order
    earlier = torch.randn(dim)
    for started in (False, True):
        total = torch.cat([earlier, torch.full((3,), 7.0)])
        factors_at = factors.data_ptr() if weighted else 0
        _fold_rows(sources.data_ptr(), factors_at, num_rows, total.data_ptr(), dim, started)
        terms = [(factors[c] if weighted else 1.0) * rows[order[c]] for c in range(num_rows)]
        want = earlier + terms[0] if started else terms[0]
        for term in terms[1:]:
            want = want + term
        assert torch.equal(total[:dim], want)
        assert total[dim:].tolist() == [7.0] * 3  # nothing is written past the row


@pytest.mark.parametrize("num_rows", [1, 2, 33])
@pytest.mark.parametrize("dim", [1, 15, 16, 17, 64, 80, 97, 1024])
@pytest.mark.parametrize("weighted", [False, True])
def test_fold_of_words_is_the_fold_of_their_floats(dim, num_rows, weighted):
    rows, order, factors = torch.randn(40, dim).bfloat16(), torch.randint(0, 40, (num_rows,)), torch.rand(num_rows)
    words, wide = rows.data_ptr() + 2 * dim * order, rows.float()
    floats = wide.data_ptr() + 4 * dim * order
    got, want = torch.full((dim + 3,), 7.0), torch.full((dim + 3,), 7.0)
    factors_at = factors.data_ptr() if weighted else 0
    _fold_words(words.data_ptr(), factors_at, num_rows, got.data_ptr(), dim)
    _fold_rows(floats.data_ptr(), factors_at, num_rows, want.data_ptr(), dim, False)
    assert torch.equal(got, want)
    assert got[dim:].tolist() == [7.0] * 3


def test_scratch_is_padded_zeros():
    assert lane_scratch(17, 2).shape == (2, 32)
    assert not lane_scratch(17, 2).any()


def padded(row):
    return torch.nn.functional.pad(row, (0, -row.numel() % NUM_LANES))


@pytest.mark.parametrize("dim", [1, 15, 16, 17, 64, 333, 1024])
def test_square_sum_has_the_stated_order(dim):
    rows = torch.randn(5, dim)
    want = square_sum_reference(rows)
    torch.testing.assert_close(want.double(), rows.double().square().sum(1), rtol=1e-6, atol=0)
    for row, sum_of_row in zip(rows, want, strict=True):
        copy = padded(row)
        assert np.float32(_square_sum(copy.data_ptr(), copy.numel())) == sum_of_row.numpy()


def test_square_sum_by_hand_at_two_lanes():
    row = padded(torch.tensor([3.0] + [0.0] * 15 + [4.0]))
    assert _square_sum(row.data_ptr(), row.numel()) == 25.0


def test_a_loop_starts_each_sum_from_zero():
    rows = torch.ones(3, NUM_LANES)

    @njit
    def all_sums(address, out):
        for u in range(out.size):
            out[u] = lane_sum(address + 64 * u, 16)

    out = np.full(3, np.nan, np.float32)
    all_sums(rows.data_ptr(), out)
    assert out.tolist() == [16.0, 16.0, 16.0]


@pytest.mark.parametrize("dim", [1, 16, 40])
def test_lane_sum(dim):
    row = padded(torch.randn(dim))
    assert _lane_sum(row.data_ptr(), row.numel()) == pytest.approx(float(row.double().sum()), abs=1e-5)


@pytest.mark.parametrize("position", [0, 15, 16, 31])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 3e38])
def test_a_product_that_is_not_finite_is_found_anywhere(position, value):
    row = torch.ones(32)
    assert _scale_is_finite(row.data_ptr(), 32, np.float32(2.0))
    assert row.tolist() == [2.0] * 32
    row[position] = value
    assert not _scale_is_finite(row.data_ptr(), 32, np.float32(2.0))


def test_the_largest_floats_are_finite():
    row = torch.full((16,), 3.4028234e38)
    assert _scale_is_finite(row.data_ptr(), 16, np.float32(1.0))


def test_square_root_is_rounded_correctly():
    values = torch.rand(100) * 1e6
    want = values.double().sqrt().float()
    assert [np.float32(_square_root(np.float32(v))) for v in values.numpy()] == want.tolist()
