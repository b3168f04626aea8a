"""Where the parts of a row lie, and that growth moves none of them."""

from itertools import pairwise

import pytest
import torch

from recis_kernels.dispatch import Impl
from recis_kernels.row_blocks import RowBlocks, RowLayout, layout_of_key

LAYOUTS = [
    RowLayout(1),
    RowLayout(64, torch.float32, (("h", 1),)),
    RowLayout(5, torch.bfloat16, (("m", 3), ("v", 2)), clock=True),
    RowLayout(16, torch.bfloat16, (("m", 16), ("v", 16))),
]


def numbered(blocks: RowBlocks, rows: torch.Tensor, start: int) -> dict[str, torch.Tensor]:
    """Return a field set of the right shapes whose values all differ, exact in bfloat16 up to 256."""
    shapes = {name: values.shape for name, values in blocks.read(rows).items()}
    fields = {}
    for name, (_, _, dtype) in blocks.layout.fields().items():
        count = shapes[name].numel()
        fields[name] = (torch.arange(count) % 200 + start).view(shapes[name]).to(dtype)
    return fields


def assert_fields_equal(got, want):
    assert set(got) == set(want)
    for name, values in want.items():
        assert got[name].dtype == values.dtype
        assert got[name].equal(values), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layout_is_aligned_and_has_no_overlap(layout):
    taken = []
    for offset, width, dtype in layout.fields().values():
        taken.append((offset, offset + max(width, 1) * dtype.itemsize))
        assert offset % dtype.itemsize == 0
    assert all(stop <= start for (_, stop), (start, _) in pairwise(taken))
    assert taken[-1][1] <= layout.row_bytes < taken[-1][1] + 32
    assert layout.row_bytes % 32 == 0
    assert layout.id_offset % 8 == 0


def test_offsets_by_hand():
    layout = RowLayout(64, torch.float32, (("m", 64), ("h", 1)), clock=True)
    assert layout.state_offset("m") == 256
    assert layout.state_offset("h") == 512
    assert (layout.id_offset, layout.last_seen_offset, layout.count_offset, layout.clock_offset) == (520, 528, 532, 536)
    assert layout.row_bytes == 544
    assert RowLayout(64).row_bytes == 288
    assert RowLayout(3, torch.bfloat16, (("h", 1),)).state_offset("h") == 8  # 6 bytes of weights, padded to 4
    assert RowLayout(2).clock_offset == -1


@pytest.mark.parametrize("impl", ["triton", "numba", "torch", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_write_then_read_touches_nothing_else(layout, impl):
    blocks = RowBlocks(layout, shift=2)
    blocks.grow(23)
    assert blocks.capacity == 24
    rows = torch.tensor([17, 0, 23, 5])
    fields = numbered(blocks, rows, 1)
    blocks.write(rows, fields, impl=impl)
    assert_fields_equal(blocks.read(rows, impl=impl), fields)
    others = torch.tensor([row for row in range(24) if row not in rows.tolist()])
    assert all(not values.any() for values in blocks.read(others, impl=impl).values())
    blocks.write(rows[:1], {"count": torch.tensor([99], dtype=torch.int32)}, impl=impl)
    fields["count"][0] = 99
    readers: list[Impl] = ["triton", "numba", "torch", "reference"]
    for reader in readers:
        assert_fields_equal(blocks.read(rows, impl=reader), fields)
    assert blocks.read(rows, ("id",), impl=impl)["id"].equal(fields["id"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [1, 3, 257, 1023], ids="D{}".format)
def test_versions_copy_every_bit(dim, dtype):
    """Rows and words beyond one tile, odd widths, and NaNs with marks of their own."""
    blocks = RowBlocks(RowLayout(dim, dtype), shift=4)
    blocks.grow(70)
    word = torch.int32 if dtype == torch.float32 else torch.int16
    values = torch.randint(-(2**15), 2**15, (67, dim)).to(word).mul(65537 if dtype == torch.float32 else 1).view(dtype)
    rows = torch.randperm(70)[:67]
    pairs: list[tuple[Impl, Impl]] = [("triton", "numba"), ("numba", "reference"), ("reference", "triton")]
    for writer, reader in pairs:
        blocks.write(rows, {"weight": torch.zeros_like(values)})
        blocks.write(rows, {"weight": values}, impl=writer)
        assert blocks.read(rows, ("weight",), impl=reader)["weight"].view(word).equal(values.view(word))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_survives_its_key(layout):
    assert layout_of_key(layout.key) == layout


def test_blocks_over_given_tensors_share_memory():
    blocks = RowBlocks(RowLayout(3), shift=1)
    blocks.grow(4)
    copies = [block.clone() for block in blocks.blocks]
    other = RowBlocks.over(blocks.layout, 1, copies, torch.device("cpu"))
    other.write(torch.tensor([3]), {"weight": torch.ones(1, 3)})
    assert blocks.read(torch.tensor([3]), ("weight",))["weight"].sum() == 0
    assert copies[1][1, :12].view(torch.float32).tolist() == [1.0, 1.0, 1.0]


def test_rows_past_a_block_keep_address_and_content():
    blocks = RowBlocks(RowLayout(4), shift=10)
    blocks.grow(2048)
    rows = torch.arange(2048)
    values = torch.randn(2048, 4)
    blocks.write(rows, {"weight": values})
    before = blocks.pointers.clone()
    blocks.grow(2049)
    assert blocks.capacity == 3072
    assert blocks.pointers[:2].equal(before)
    assert blocks.pointers.tolist() == [block.data_ptr() for block in blocks.blocks]
    assert blocks.device_pointers.equal(blocks.pointers)
    assert all(pointer % 64 == 0 for pointer in blocks.pointers.tolist())
    assert blocks.read(rows)["weight"].equal(values)
    blocks.grow(1)
    assert blocks.capacity == 3072


@pytest.mark.parametrize("impl", ["triton", "numba", "torch", "reference"])
def test_values_and_rows_of_other_strides_are_taken(impl):
    blocks = RowBlocks(RowLayout(3), shift=3)
    blocks.grow(8)
    values, rows = torch.randn(3, 16, requires_grad=True).t()[::2], torch.arange(16).flip(0)[::2].clone() // 2
    apart = torch.stack((rows, rows * 0), dim=1)[:, 0]
    assert not values.is_contiguous()
    blocks.write(apart, {"weight": values}, impl=impl)
    assert blocks.read(torch.arange(8))["weight"].equal(values.detach().flip(0))
    assert blocks.read(apart, impl=impl)["weight"].equal(values.detach())


@pytest.mark.parametrize("impl", ["triton", "numba"])
def test_rows_beyond_two_to_the_31_elements(impl):
    blocks = RowBlocks(RowLayout(1024), shift=21)  # one block of 2.2e9 floats: 8.7 GB of address space
    blocks.grow(1 << 21)  # mapped lazily: only the pages that are written exist
    assert blocks.blocks[0].numel() // 4 > 2**31
    rows = torch.tensor([0, (1 << 21) - 1, (1 << 31) // blocks.layout.row_bytes + 1])
    values = torch.randn(3, 1024)
    blocks.write(rows, {"weight": values}, impl=impl)
    assert blocks.read(rows, ("weight",), impl=impl)["weight"].equal(values)
    last = blocks.blocks[0][-1][:4096].view(torch.float32)
    assert last.equal(values[1])


@pytest.mark.parametrize("impl", ["triton", "numba", "torch", "reference"])
def test_ops_are_known_to_torch(impl):
    layout = RowLayout(5, torch.bfloat16, (("m", 3),), clock=True)
    blocks, rows = RowBlocks(layout, shift=2), torch.tensor([6, 0, 3])
    blocks.grow(8)
    weight, ids = torch.randn(3, 5).bfloat16(), torch.tensor([9, -1, 2**62])
    store = blocks.blocks, blocks.layout_key, blocks.shift, rows
    torch.library.opcheck(torch.ops.recis.write_rows.default, (*store, "weight|id", [weight, ids], impl))
    torch.library.opcheck(torch.ops.recis.read_rows.default, (*store, "id|weight|state.m", impl))

    def run(blocks, rows, weight):
        blocks.write(rows, {"weight": weight * 2, "id": ids}, impl=impl)
        whole = blocks.read(rows, impl=impl)
        return whole["weight"] + blocks.read(rows, ("weight",), impl=impl)["weight"], whole["id"], whole["last_seen_s"]

    other = RowBlocks(layout, shift=2)
    other.grow(8)
    other.write(rows, blocks.read(rows))
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(blocks, rows, weight)
    assert all(torch.equal(one, two) for one, two in zip(got, run(other, rows, weight), strict=True))
    assert_fields_equal(blocks.read(torch.arange(8)), other.read(torch.arange(8)))


def test_empty_and_errors():
    blocks = RowBlocks(RowLayout(2, state=(("h", 1),)), shift=0)
    none = torch.tensor([], dtype=torch.int64)
    assert blocks.read(none)["weight"].shape == (0, 2)
    blocks.write(none, {"weight": torch.empty(0, 2)})
    blocks.grow(3)
    impls: list[Impl] = ["triton", "numba", "torch", "reference"]
    for impl in impls:
        blocks.write(none, {"weight": torch.empty(0, 2)}, impl=impl)
        assert blocks.read(none, impl=impl)["state.h"].shape == (0, 1)
    with pytest.raises(ValueError, match=r"rows must lie in \[0, 3\); got 1..3"):
        blocks.read(torch.tensor([1, 3]))
    with pytest.raises(ValueError, match=r"got -1..0"):
        blocks.write(torch.tensor([0, -1]), {})
    with pytest.raises(ValueError, match="rows must be \\[N\\] int64"):
        blocks.read(torch.tensor([1], dtype=torch.int32))
    with pytest.raises(ValueError, match="no field 'bias'"):
        blocks.read(torch.tensor([1]), ("bias",))
    with pytest.raises(ValueError, match=r"weight must be \(1, 2\) torch.float32; got \(2,\)"):
        blocks.write(torch.tensor([1]), {"weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"shift must be 0\.\.31"):
        RowBlocks(RowLayout(2), shift=32)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RowLayout(0), "dim must be at least 1; got 0"),
        (lambda: RowLayout(2, torch.float64), "torch.float32 or torch.bfloat16; got torch.float64"),
        (lambda: RowLayout(2, state=(("m", 2), ("m", 2))), "state names must differ"),
        (lambda: RowLayout(2, state=(("m", 0),)), "state 'm' must be at least 1 wide"),
        (lambda: RowLayout(2, state=(("m", 2),)).state_offset("v"), "no state 'v'"),
    ],
)
def test_impossible_layouts(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def launches() -> None:
    for dim, dtype in ((64, torch.float32), (5, torch.bfloat16), (1, torch.float32)):
        blocks = RowBlocks(RowLayout(dim, dtype), shift=3)
        blocks.grow(20)
        rows = torch.arange(20)
        fields = blocks.read(rows, impl="triton")
        blocks.write(rows, fields, impl="triton")
