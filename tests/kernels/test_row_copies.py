"""Whole rows copied between stores, and rows read from either of two stores: against RowBlocks.read and write."""

import pytest
import torch

from recis_kernels.row_blocks import RowBlocks, RowLayout
from recis_kernels.row_copies import copy_rows, read_either

LAYOUTS = [
    RowLayout(5, state=(("m", 5), ("h", 1)), clock=True),
    RowLayout(64),
    RowLayout(7, torch.bfloat16, (("h", 1),)),
]


def _store(layout: RowLayout, num_rows: int, shift: int) -> RowBlocks:
    blocks = RowBlocks(layout, shift=shift)
    blocks.grow(num_rows)
    fields = {}
    for name, (_, width, dtype) in layout.fields().items():
        shape = (num_rows, width) if width else (num_rows,)
        fields[name] = torch.randint(-1000, 1000, shape).to(dtype)
    blocks.write(torch.arange(num_rows), fields)
    return blocks


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.dim}-{layout.dtype}")
@pytest.mark.parametrize("count", [0, 1, 37])
def test_copied_rows_equal_their_source_and_others_stay(layout, count):
    source, target = _store(layout, 40, 3), _store(layout, 50, 4)
    rows, places = torch.randint(0, 40, (count,)), torch.randperm(50)[:count]
    before, want = target.read(torch.arange(50)), source.read(rows)
    copy_rows(source, rows, target, places)
    got, others = target.read(places), torch.tensor([row for row in range(50) if row not in places.tolist()])
    after = target.read(others)
    for name in want:
        assert torch.equal(got[name], want[name])
        assert torch.equal(after[name], before[name][others])


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.dim}-{layout.dtype}")
def test_reads_the_copy_where_there_is_one(layout):
    blocks, copies = _store(layout, 40, 3), _store(layout, 10, 2)
    rows = torch.randint(0, 40, (33,))
    places = torch.where(torch.rand(33) < 0.4, torch.randint(0, 10, (33,)), -1)
    got, own, theirs = read_either(blocks, rows, copies, places), blocks.read(rows), copies.read(places.clamp(min=0))
    for name, values in got.items():
        for n in range(33):
            assert torch.equal(values[n], (theirs if places[n] >= 0 else own)[name][n])


def test_empty_read():
    blocks = _store(LAYOUTS[0], 4, 1)
    none = torch.empty(0, dtype=torch.int64)
    assert {name: tuple(values.shape) for name, values in read_either(blocks, none, blocks, none).items()} == {
        "weight": (0, 5), "state.m": (0, 5), "state.h": (0, 1), "id": (0,), "last_seen": (0,), "count": (0,),
        "last_seen_s": (0,),
    }  # fmt: skip


def test_wrong_input_is_named():
    blocks, other = _store(LAYOUTS[1], 4, 1), _store(LAYOUTS[0], 4, 1)
    row = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="within one layout"):
        copy_rows(blocks, row, other, row)
    with pytest.raises(ValueError, match=r"rows must lie in \[0, 4\); got 4..4"):
        copy_rows(blocks, row + 4, blocks, row)
    with pytest.raises(ValueError, match=r"places must lie in \[-1, 4\); got -2..-2"):
        read_either(blocks, row, blocks, row - 2)
    with pytest.raises(ValueError, match="one shape"):
        read_either(blocks, row, blocks, torch.zeros(2, dtype=torch.int64))
