"""Distinct ids per row: first or last occurrence, short and long rows, many columns."""

import pytest
import torch

from recis_kernels.jagged import lengths_to_offsets
from recis_kernels.ragged_distinct import Keep, ragged_distinct


@pytest.mark.parametrize("impl", ["numba", "triton", "reference"])
def test_by_hand(impl):
    ids, offsets = torch.tensor([5, 3, 5, 8, 3, 5, 3]), torch.tensor([0, 5, 5, 7])
    first, ends = ragged_distinct(ids, offsets, (0, 3), ["first"], impl=impl)
    assert (first.tolist(), ends.tolist()) == ([0, 1, 3, 5, 6], [0, 3, 3, 5])
    last, ends = ragged_distinct(ids, offsets, (0, 1, 3), ["last", "first"], impl=impl)
    assert (last.tolist(), ends.tolist()) == ([2, 3, 4, 5, 6], [0, 3, 3, 5])


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_matches_reference_in_short_and_long_rows(impl):
    torch.manual_seed(7)
    repeats = 300 if impl == "numba" else 3  # the interpreter runs one program after another
    lengths = torch.tensor([0, 1, 31, 32, 33, 64, 500, 2] * repeats)
    offsets = lengths_to_offsets(lengths)
    border, num_rows = 999 * repeats // 300, 8 * repeats
    ids = torch.randint(-40, 40, (int(offsets[-1]),)) * 2**40
    choices: list[list[Keep]] = [["first", "last"], ["last", "last"]]
    for keeps in choices:
        got = ragged_distinct(ids, offsets, (0, border, num_rows), keeps, impl=impl)
        want = ragged_distinct(ids, offsets, (0, border, num_rows), keeps, impl="reference")
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("impl", ["numba", "triton"])
@pytest.mark.parametrize("keep", ["first", "last"])
def test_duplicates_only_huge_rows_and_no_ids(impl, keep):
    ids = torch.full((700, 2), -(2**63))[:, 1]
    offsets = torch.tensor([0, 0, 699, 700], dtype=torch.int32)
    kept, ends = ragged_distinct(ids, offsets, (0, 3), [keep], impl=impl)
    assert kept.tolist() == [0 if keep == "first" else 698, 699]
    assert ends.tolist() == [0, 0, 1, 2]
    kept, _ = ragged_distinct(torch.arange(700) * 1024, offsets, (0, 3), [keep], impl=impl)
    assert torch.equal(kept, torch.arange(700))
    kept, ends = ragged_distinct(ids[:0], offsets * 0, (0, 3), [keep], impl=impl)
    assert (kept.tolist(), ends.tolist()) == ([], [0] * 4)
    kept, ends = ragged_distinct(ids[:0], offsets[:1], (0,), [], impl=impl)
    assert (kept.tolist(), ends.tolist()) == ([], [0])


def launches() -> None:
    for dtype in (torch.int64, torch.int32):
        offsets = torch.tensor([0, 2, 5], dtype=dtype)
        ragged_distinct(torch.arange(5), offsets, (0, 1, 2), ["first", "last"], impl="triton")


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_node_of_torch_compile(impl):
    ids, offsets = torch.tensor([5, 3, 5, 8, 3, 5, 3]), torch.tensor([0, 5, 5, 7])
    torch.library.opcheck(torch.ops.recis.ragged_distinct.default, (ids, offsets, [0, 1, 3], [1, 0], impl))
    compiled = torch.compile(
        lambda ids: ragged_distinct(ids, offsets, (0, 3), ["first"], impl=impl), fullgraph=True, backend="aot_eager"
    )
    kept, ends = compiled(ids)
    assert (kept.tolist(), ends.tolist()) == ([0, 1, 3, 5, 6], [0, 3, 3, 5])


def test_wrong_arguments_are_refused():
    ids, offsets = torch.tensor([1]), torch.tensor([0, 1])
    with pytest.raises(ValueError, match='"first" or "last"'):
        ragged_distinct(ids, offsets, (0, 1), ["any"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="int64"):
        ragged_distinct(ids.float(), offsets, (0, 1), ["first"])
