"""Whole rows copied between stores, and rows read from either of two stores: against copies of one row after another."""

import pytest
import torch

from recis_kernels import row_copies
from recis_kernels.dispatch import Impl
from recis_kernels.row_blocks import RowBlocks, RowLayout
from recis_kernels.row_copies import copy_rows, read_either

LAYOUTS = [
    RowLayout(5, state=(("m", 5), ("h", 1)), clock=True),
    RowLayout(64),
    RowLayout(7, torch.bfloat16, (("h", 1),)),
    RowLayout(301, torch.bfloat16, (("m", 301),)),  # more words than a tile has
]
IMPLS: list[Impl] = ["numba", "triton", "reference"]
EACH_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.dim}-{layout.dtype}")
EACH_IMPL = pytest.mark.parametrize("impl", IMPLS)


def _store(layout: RowLayout, num_rows: int, shift: int) -> RowBlocks:
    """Return a store whose bytes all differ from place to place, padding and NaNs of any kind included."""
    blocks = RowBlocks(layout, shift=shift)
    blocks.grow(num_rows)
    for block in blocks.blocks:
        block.copy_(torch.randint(0, 256, block.shape))
    return blocks


def _bytes(blocks: RowBlocks) -> torch.Tensor:
    return torch.cat(blocks.blocks)


def _assert_equal_bits(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert list(got) == list(want)
    for name, values in want.items():
        assert got[name].shape == values.shape
        assert got[name].dtype == values.dtype
        assert torch.equal(got[name].view(torch.uint8), values.view(torch.uint8)), name


@EACH_LAYOUT
@EACH_IMPL
@pytest.mark.parametrize("count", [0, 1, 37])
def test_copied_rows_equal_their_source_and_others_stay(layout, impl, count):
    source, target = _store(layout, 40, 3), _store(layout, 50, 4)
    rows, places = torch.randint(0, 40, (count,)), torch.randperm(50)[:count]
    want, kept = _bytes(target).clone(), _bytes(source).clone()
    want[places] = kept[rows]
    copy_rows(source, rows, target, places, impl=impl)
    assert torch.equal(_bytes(target), want)
    assert torch.equal(_bytes(source), kept)


@EACH_LAYOUT
@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_reads_the_copy_where_there_is_one(layout, impl):
    blocks, copies = _store(layout, 40, 3), _store(layout, 10, 2)
    rows = torch.randint(0, 40, (33,))
    places = torch.where(torch.rand(33) < 0.4, torch.randint(0, 10, (33,)), -1)
    for there in (places, torch.full_like(places, -1), places.clamp(min=0)):
        got = read_either(blocks, rows, copies, there, impl=impl)
        _assert_equal_bits(got, read_either(blocks, rows, copies, there, impl="reference"))


@EACH_IMPL
def test_by_hand(impl):
    blocks, copies = RowBlocks(RowLayout(2), shift=1), RowBlocks(RowLayout(2), shift=0)
    blocks.grow(3)
    copies.grow(2)
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    blocks.write(torch.arange(3), {"weight": weight, "count": torch.tensor([7, 8, 9], dtype=torch.int32)})
    copy_rows(blocks, torch.tensor([2, 0]), copies, torch.tensor([0, 1]), impl=impl)
    blocks.write(torch.arange(3), {"weight": -weight})  # training goes on; the copies keep what was
    got = read_either(blocks, torch.tensor([0, 1, 2]), copies, torch.tensor([1, -1, 0]), impl=impl)
    assert got["weight"].tolist() == [[1.0, 2.0], [-3.0, -4.0], [5.0, 6.0]]
    assert got["count"].tolist() == [7, 8, 9]


@EACH_IMPL
def test_one_row_again_and_again(impl):
    blocks, copies = _store(LAYOUTS[0], 4, 1), _store(LAYOUTS[0], 600, 3)
    row = torch.full((600,), 3)
    copy_rows(blocks, row, copies, torch.arange(600), impl=impl)
    assert torch.equal(_bytes(copies), _bytes(blocks)[3].expand(600, -1))
    got = read_either(blocks, row, copies, torch.where(torch.arange(600) % 2 == 0, 599, -1), impl=impl)
    one = blocks.read(row[:1])
    _assert_equal_bits(got, {name: values.expand(600, *values.shape[1:]).contiguous() for name, values in one.items()})


@EACH_IMPL
def test_strided_rows_and_places(impl):
    source, target = _store(LAYOUTS[0], 40, 3), _store(LAYOUTS[0], 40, 2)
    both = torch.stack((torch.randperm(40)[:12], torch.randperm(40)[:12]), dim=1)
    rows, places = both[:, 0], both[:, 1]
    want = _bytes(target).clone()
    want[places] = _bytes(source)[rows]
    copy_rows(source, rows, target, places, impl=impl)
    assert torch.equal(_bytes(target), want)
    got = read_either(source, rows, target, places, impl=impl)
    _assert_equal_bits(got, target.read(places.contiguous()))


@EACH_IMPL
def test_empty_read(impl):
    blocks = _store(LAYOUTS[0], 4, 1)
    none = torch.empty(0, dtype=torch.int64)
    read = read_either(blocks, none, blocks, none, impl=impl)
    assert {name: tuple(values.shape) for name, values in read.items()} == {
        "weight": (0, 5), "state.m": (0, 5), "state.h": (0, 1), "id": (0,), "last_seen": (0,), "count": (0,),
        "last_seen_s": (0,),
    }  # fmt: skip


def test_threads_change_nothing(monkeypatch):
    monkeypatch.setattr(row_copies, "_MIN_PER_THREAD", 1)
    source, before, results = _store(LAYOUTS[0], 300, 3), torch.get_num_threads(), []
    rows, places = torch.randint(0, 300, (200,)), torch.randperm(200)
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        target = RowBlocks(LAYOUTS[0], shift=5)
        target.grow(200)
        copy_rows(source, rows, target, places)
        results.append((_bytes(target), read_either(source, rows, target, places - 100 * (places > 100))["weight"]))
    torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@EACH_IMPL
def test_ops_are_known_to_torch(impl):
    blocks, copies = _store(LAYOUTS[2], 20, 3), _store(LAYOUTS[2], 10, 2)
    rows, places = torch.tensor([3, 19, 0]), torch.tensor([9, 0, 4])
    store, there = (blocks.blocks, blocks.layout_key, blocks.shift, rows), (copies.blocks, copies.shift)
    torch.library.opcheck(torch.ops.recis.copy_rows.default, (*store, *there, places, impl))
    torch.library.opcheck(torch.ops.recis.read_either.default, (*store, *there, places, impl))

    def run(blocks, copies, rows, places):
        copy_rows(blocks, rows, copies, places, impl=impl)
        return read_either(blocks, rows, copies, places - 1, impl=impl)["id"] ^ 1

    mine, other = _store(LAYOUTS[2], 10, 2), RowBlocks(LAYOUTS[2], shift=2)
    other.grow(10)
    copy_rows(mine, torch.arange(12), other, torch.arange(12))
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(blocks, mine, rows, places)
    assert torch.equal(got, run(blocks, other, rows, places))
    assert torch.equal(_bytes(mine), _bytes(other))


def test_wrong_input_is_named():
    blocks, other = _store(LAYOUTS[1], 4, 1), _store(LAYOUTS[0], 4, 1)
    row = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="within one layout"):
        copy_rows(blocks, row, other, row)
    with pytest.raises(ValueError, match="must have the rows' layout"):
        read_either(blocks, row, other, row)
    with pytest.raises(ValueError, match=r"rows must lie in \[0, 4\); got 4..4"):
        copy_rows(blocks, row + 4, blocks, row)
    with pytest.raises(ValueError, match=r"places must lie in \[0, 4\); got -1..-1"):
        copy_rows(blocks, row, blocks, row - 1)
    with pytest.raises(ValueError, match=r"places must lie in \[-1, 4\); got -2..-2"):
        read_either(blocks, row, blocks, row - 2)
    with pytest.raises(ValueError, match="one shape"):
        read_either(blocks, row, blocks, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"places must be \[N\] int64; got \(1,\) torch.int32"):
        copy_rows(blocks, row, blocks, row.int())


def launches() -> None:
    for layout in (*LAYOUTS, RowLayout(1)):
        blocks, copies, rows = _store(layout, 20, 3), _store(layout, 10, 2), torch.arange(10)
        copy_rows(blocks, rows, copies, rows.flip(0), impl="triton")
        read_either(blocks, rows, copies, (rows - 4).clamp(min=-1), impl="triton")
