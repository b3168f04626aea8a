"""Cutting rows and copying what stays: conformance rows, both sides, many columns; picks in cut rows."""

import pytest
import torch

from recis_kernels.dispatch import Impl
from recis_kernels.jagged import lengths_to_offsets
from recis_kernels.ragged_truncate import ragged_take, ragged_truncate, take_runs

IMPLS = ["torch", "reference"]
CUT_IMPLS: list[Impl] = ["numba", "torch", "reference"]
VALUES, OFFSETS = torch.arange(1, 11), torch.tensor([0, 4, 7, 10])


def _kept(cut, values=VALUES) -> list[int]:
    return take_runs(values, cut.starts, cut.lengths, int(cut.lengths.sum())).tolist()


@pytest.mark.parametrize("impl", CUT_IMPLS)
def test_conformance_rows(impl):  # A15, A16
    left = ragged_truncate(OFFSETS, (0, 3), [2], ["left"], impl=impl)
    right = ragged_truncate(OFFSETS, (0, 3), [2], ["right"], impl=impl)
    assert _kept(left) == [3, 4, 6, 7, 9, 10]
    assert _kept(right) == [1, 2, 5, 6, 8, 9]
    for cut in (left, right):
        assert lengths_to_offsets(cut.lengths).tolist() == [0, 2, 4, 6]
    three = ragged_truncate(OFFSETS, (0, 3), [3], ["left"], impl=impl)
    assert (three.dropped.tolist(), three.missing.tolist()) == ([1, 0, 0], [0, 0, 0])
    four = ragged_truncate(OFFSETS, (0, 3), [4], ["right"], impl=impl)
    assert (four.dropped.tolist(), four.missing.tolist()) == ([0, 0, 0], [0, 1, 1])
    assert _kept(four) == VALUES.tolist()


def test_columns_have_their_own_rule():
    offsets = torch.tensor([0, 4, 7, 10], dtype=torch.int32)
    want = ragged_truncate(offsets, (0, 1, 1, 3), [0, 5, 2], ["left", "left", "right"], impl="reference")
    for impl in CUT_IMPLS:
        got = ragged_truncate(offsets, (0, 1, 1, 3), [0, 5, 2], ["left", "left", "right"], impl=impl)
        for name in ("starts", "lengths", "dropped", "missing"):
            assert getattr(got, name).tolist() == getattr(want, name).tolist()
        assert _kept(got) == [5, 6, 8, 9]


@pytest.mark.parametrize("impl", ["numba", "torch"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("dim", [None, 3])
def test_runs_match_reference(impl, dtype, dim):
    torch.manual_seed(4)
    lengths = torch.randint(0, 12, (9000,))
    offsets = lengths_to_offsets(lengths)
    shape = (int(offsets[-1]),) if dim is None else (int(offsets[-1]), dim)
    values = torch.randint(0, 200, shape).to(dtype)
    cut = ragged_truncate(offsets, (0, 9000), [4], ["left"])
    total = int(cut.lengths.sum())
    got = take_runs(values, cut.starts, cut.lengths, total, impl=impl)
    assert torch.equal(got, take_runs(values, cut.starts, cut.lengths, total, impl="reference"))


def test_nothing_cut_copies_nothing_and_nothing_kept_is_empty():
    whole = ragged_truncate(OFFSETS, (0, 3), [9], ["left"])
    assert take_runs(VALUES, whole.starts, whole.lengths, 10) is VALUES
    none = ragged_truncate(OFFSETS, (0, 3), [0], ["left"])
    assert _kept(none) == []
    empty = ragged_truncate(torch.tensor([0]), (0, 0), [2], ["right"])
    assert empty.lengths.tolist() == []


@pytest.mark.parametrize("impl", IMPLS)
def test_take_maps_picks_back(impl):
    cut = ragged_truncate(OFFSETS, (0, 3), [2], ["left"])
    picks, bags = torch.tensor([1, 0, 0, 2, 1, -1]), torch.tensor([0, 2, 4, 6])
    taken, offsets = ragged_take(OFFSETS, cut.dropped, picks, bags, impl=impl)
    assert taken.tolist() == [3, 2, 5, 9]
    assert VALUES[taken].tolist() == [4, 3, 6, 10]
    assert offsets.tolist() == [0, 2, 3, 4]


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="keep must be at least 0"):
        ragged_truncate(OFFSETS, (0, 3), [-1], ["left"])
    with pytest.raises(ValueError, match='"left" or "right"'):
        ragged_truncate(OFFSETS, (0, 3), [1], ["middle"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="from 0 to 3"):
        ragged_truncate(OFFSETS, (0, 2), [1], ["left"])
    with pytest.raises(ValueError, match="3 rows need dropped"):
        ragged_take(OFFSETS, torch.tensor([0]), torch.tensor([0]), torch.tensor([0, 1]))
