"""Cutting rows and copying what stays: conformance rows, both sides, many columns; picks in cut rows."""

import pytest
import torch

from recis_kernels.dispatch import Impl
from recis_kernels.jagged import lengths_to_offsets
from recis_kernels.ragged_truncate import ragged_take, ragged_truncate, take_runs

IMPLS: list[Impl] = ["torch", "triton", "reference"]
CUT_IMPLS: list[Impl] = ["numba", "torch", "triton", "reference"]
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


@pytest.mark.parametrize("impl", ["numba", "triton"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("dim", [None, 3])
def test_runs_match_reference(impl, dtype, dim):
    torch.manual_seed(4)
    num_rows = 9000 if impl == "numba" else 1100
    lengths = torch.randint(0, 12, (num_rows,))
    offsets = lengths_to_offsets(lengths)
    shape = (int(offsets[-1]),) if dim is None else (int(offsets[-1]), dim)
    values = torch.randint(0, 200, shape).to(dtype)
    cut = ragged_truncate(offsets, (0, num_rows), [4], ["left"])
    total = int(cut.lengths.sum())
    got = take_runs(values, cut.starts, cut.lengths, total, impl=impl)
    assert torch.equal(got, take_runs(values, cut.starts, cut.lengths, total, impl="reference"))


@pytest.mark.parametrize("impl", ["numba", "torch", "triton"])
def test_many_rows_and_offsets_apart(impl):
    lengths = torch.randint(0, 30, (3000,))
    lengths[7] = 10**6
    offsets = torch.stack([lengths_to_offsets(lengths)] * 2, 1)[:, 0]
    columns, keeps, drops = (0, 8, 8, 2050, 3000), [5, 1, 20, 0], ["left", "right", "right", "left"]
    got = ragged_truncate(offsets, columns, keeps, drops, impl=impl)  # type: ignore[arg-type]
    want = ragged_truncate(offsets, columns, keeps, drops, impl="reference")  # type: ignore[arg-type]
    for name in ("starts", "lengths", "dropped", "missing"):
        assert torch.equal(getattr(got, name), getattr(want, name))


@pytest.mark.parametrize("impl", IMPLS)
def test_many_picks(impl):
    lengths = torch.randint(0, 9, (700,))
    offsets, cut = lengths_to_offsets(lengths), torch.randint(0, 3, (700,))
    bags = lengths_to_offsets(torch.randint(0, 5, (700,)))
    picks = torch.randint(-2, 9, (int(bags[-1]), 2))[:, 0]
    got = ragged_take(offsets, cut, picks, bags, impl=impl)
    want = ragged_take(offsets, cut, picks, bags, impl="reference")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    none = ragged_take(offsets, cut, picks[:0], bags * 0, impl=impl)
    assert none[0].tolist() == []
    assert none[1].tolist() == [0] * 701


def launches() -> None:
    for dtype in (torch.int64, torch.int32):
        offsets = OFFSETS.to(dtype)
        ragged_truncate(offsets, (0, 1, 3), [2, 3], ["left", "right"], impl="triton")
        ragged_take(
            offsets, torch.zeros(3, dtype=torch.int64), torch.tensor([1, 0]), offsets.clamp(max=2), impl="triton"
        )


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_nodes_of_torch_compile(impl):
    bags, picks = torch.tensor([0, 2, 4, 6]), torch.tensor([1, 0, 0, 2, 1, -1])
    torch.library.opcheck(torch.ops.recis.ragged_truncate.default, (OFFSETS, [0, 1, 3], [2, 3], [1, 0], impl))
    torch.library.opcheck(torch.ops.recis.ragged_take.default, (OFFSETS, torch.tensor([2, 1, 1]), picks, bags, impl))

    def run(offsets, picks):
        cut = ragged_truncate(offsets, (0, 3), [2], ["left"], impl=impl)
        taken, new_offsets = ragged_take(offsets, cut.dropped, picks, bags, impl=impl)
        return taken + 1, new_offsets, cut.starts

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(OFFSETS, picks), run(OFFSETS, picks), strict=True))


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
