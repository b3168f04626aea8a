"""Distinct ids per row: first or last occurrence, short and long rows, many columns."""

import pytest
import torch

from recis_kernels.jagged import lengths_to_offsets
from recis_kernels.ragged_distinct import Keep, ragged_distinct


@pytest.mark.parametrize("impl", ["numba", "reference"])
def test_by_hand(impl):
    ids, offsets = torch.tensor([5, 3, 5, 8, 3, 5, 3]), torch.tensor([0, 5, 5, 7])
    first, ends = ragged_distinct(ids, offsets, (0, 3), ["first"], impl=impl)
    assert (first.tolist(), ends.tolist()) == ([0, 1, 3, 5, 6], [0, 3, 3, 5])
    last, ends = ragged_distinct(ids, offsets, (0, 1, 3), ["last", "first"], impl=impl)
    assert (last.tolist(), ends.tolist()) == ([2, 3, 4, 5, 6], [0, 3, 3, 5])


def test_matches_reference_in_short_and_long_rows():
    torch.manual_seed(7)
    lengths = torch.tensor([0, 1, 31, 32, 33, 64, 500, 2] * 300)
    offsets = lengths_to_offsets(lengths)
    ids = torch.randint(-40, 40, (int(offsets[-1]),)) * 2**40
    choices: list[list[Keep]] = [["first", "last"], ["last", "last"]]
    for keeps in choices:
        got = ragged_distinct(ids, offsets, (0, 999, 2400), keeps, impl="numba")
        want = ragged_distinct(ids, offsets, (0, 999, 2400), keeps, impl="reference")
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_wrong_arguments_are_refused():
    ids, offsets = torch.tensor([1]), torch.tensor([0, 1])
    with pytest.raises(ValueError, match='"first" or "last"'):
        ragged_distinct(ids, offsets, (0, 1), ["any"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="int64"):
        ragged_distinct(ids.float(), offsets, (0, 1), ["first"])
