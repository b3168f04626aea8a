"""Addresses beyond 2^31 elements: every op whose memory may be touched in parts, on memory that is mapped lazily.

Only the pages that a test writes or reads exist, so gibibytes of address space cost kilobytes. Ops over rows of tables
(row_blocks, embedding_bag, sparse_update) have such a test in their own files. Ops that visit each element of their input or
write each of their output (distinct ids, moduli, buckets, rounding, gradients of jagged copies) cannot be shown so: their
kernels are called here with memory of the test where they have a part that can.
"""

import mmap
from typing import Any

import pytest
import torch

from recis_kernels import hash_ops, jagged_runs, segment_loops, segment_triton
from recis_kernels import hash_probe as probe
from recis_kernels.hstu_attention import hstu_attention
from recis_kernels.id_hash import hash_strings
from recis_kernels.jagged import jagged_to_padded, lengths_to_offsets, padded_to_jagged
from recis_kernels.jagged_runs import gather_runs
from recis_kernels.philox import hash64, table_key
from recis_kernels.ragged_truncate import ragged_take, ragged_truncate, take_runs
from recis_kernels.row_blocks import RowBlocks, RowLayout
from recis_kernels.row_copies import copy_rows, read_either
from recis_kernels.row_grads import RowGrad, reduce_grads
from recis_kernels.row_init import InitKind, InitSpec, init_rows
from recis_kernels.segment import segment_max, segment_mean, segment_sum
from recis_kernels.vocab_lookup import lookup_strings, string_vocab

FAR = 2**31 + 40  # elements
EACH = pytest.mark.parametrize("impl", ["numba", "triton"])


def mapped(num_elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Return zeros whose pages exist once they are touched."""
    pages = mmap.mmap(-1, num_elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype)


@EACH
def test_segment(impl):
    values, offsets = mapped(FAR + 100, torch.float32).view(-1, 2), torch.tensor([0, 3, 3, 7])
    near, first = torch.randn(7, 2), FAR // 2
    values[first : first + 7] = near
    for op in (segment_sum, segment_mean, segment_max):
        assert torch.equal(op(values, offsets + first, impl=impl), op(near, offsets, impl=impl))
    rows = torch.ops.recis.segment_max(values, offsets + first, impl)[1]
    want = torch.ops.recis.segment_max(near, offsets, impl)[1]
    assert torch.equal(rows[[0, 2]], want[[0, 2]] + first)


@EACH
def test_segment_softmax(impl):
    """Its output has a row per value, so the kernels get mapped memory for it."""
    offsets, first, near = torch.tensor([0, 3, 3, 7]), FAR // 2, torch.randn(7, 2)
    values, shares, grads = (mapped(FAR + 100, torch.float32).view(-1, 2) for _ in range(3))
    values[first : first + 7] = near
    if impl == "numba":
        arrays = [tensor.numpy() for tensor in (values, offsets + first, shares, grads)]
        segment_loops.softmax_loop(*arrays[:3], 0, 3)
        segment_loops.softmax_grad_loop(arrays[2], arrays[0], arrays[1], arrays[3], 0, 3)
    else:
        grid, options = segment_triton._shape(3, 2)
        options |= {"WIDE": segment_triton.tl.float32}
        kernels: Any = segment_triton
        kernels.launch(kernels._segment_softmax_kernel, grid, values, offsets + first, shares, 3, 2, **options)
        given = shares, values, offsets + first, grads, 3, 2
        kernels.launch(kernels._segment_softmax_grad_kernel, grid, *given, **options)
    want = torch.ops.recis.segment_softmax(near, offsets, impl)
    assert torch.equal(shares[first : first + 7], want)
    want = torch.ops.recis.segment_softmax_grad(want, near, offsets, impl)
    assert torch.equal(grads[first : first + 7], want)


@pytest.mark.parametrize("impl", ["numba", "triton", "torch"])
def test_jagged_to_padded(impl):
    """The second bag has more than 2^31 values, of which the head is kept; the third starts after it."""
    values = mapped(FAR + 8, torch.uint8)
    values[:6] = torch.arange(1, 7).byte()
    values[FAR : FAR + 2] = torch.tensor([8, 9]).byte()
    padded = jagged_to_padded(values, torch.tensor([0, 2, FAR, FAR + 2]), 3, fill=7, impl=impl)
    assert padded.tolist() == [[1, 2, 7], [3, 4, 5], [8, 9, 7]]


@pytest.mark.parametrize("impl", ["numba", "triton", "torch"])
def test_padded_to_jagged(impl):
    padded = mapped(3 << 30, torch.uint8).view(3, 1 << 30)
    for bag in range(3):
        padded[bag, :3] = torch.arange(3).byte() + 10 * (bag + 1)
    assert padded_to_jagged(padded, torch.tensor([0, 2, 4, 7]), 7, impl=impl).tolist() == [10, 11, 20, 21, 30, 31, 32]


@EACH
def test_runs(impl):
    values, starts, offsets = mapped(FAR + 8, torch.uint8), torch.tensor([FAR, 1]), torch.tensor([0, 3, 5])
    taken = torch.tensor([1, 2, 3, 4, 5]).byte()
    jagged_runs._copy(taken, values, starts, offsets, impl, to_packed=False)  # scatter_runs, without its new zeros
    assert values[FAR - 1 : FAR + 4].tolist() == [0, 1, 2, 3, 0]
    assert values[:4].tolist() == [0, 4, 5, 0]
    assert torch.equal(gather_runs(values, starts, offsets, 5, impl=impl), taken)
    assert take_runs(values, starts.flip(0), torch.tensor([2, 3]), 5, impl=impl).tolist() == [4, 5, 1, 2, 3]


@pytest.mark.parametrize("impl", ["numba", "torch", "triton"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_truncate(impl, side):
    offsets = torch.tensor([0, 3, FAR, FAR + 1, 2**40])
    got = ragged_truncate(offsets, (0, 4), [2], [side], impl=impl)
    assert got.lengths.tolist() == [2, 2, 1, 2]
    assert got.dropped.tolist() == [1, FAR - 5, 0, 2**40 - FAR - 3]
    want = [1, FAR - 2, FAR, 2**40 - 2] if side == "left" else [0, 3, FAR, FAR + 1]
    assert got.starts.tolist() == want
    if impl != "numba":
        taken, _ = ragged_take(offsets, got.dropped, torch.zeros(4).long(), torch.arange(5), impl=impl)
        assert taken.tolist() == [1, FAR - 2, FAR, 2**40 - 2]


@EACH
def test_strings(impl):
    text = b"abchelloa much longer string than any block of the hashes has, and then some"
    data, ends = mapped(FAR + 200, torch.uint8), torch.tensor([0, 3, 8, len(text)])
    near = torch.tensor(list(text), dtype=torch.uint8)
    data[FAR : FAR + len(text)] = near
    for kind in ("farm", "murmur"):
        got = hash_strings(data, ends + FAR, (0, 3), [kind], [None], impl=impl)
        assert torch.equal(got, hash_strings(near, ends, (0, 3), [kind], [None], impl="reference"))
    vocab = string_vocab(torch.tensor(list(b"helloabc"), dtype=torch.uint8), torch.tensor([0, 5, 8]))
    assert lookup_strings(data, ends + FAR, (0, 3), [vocab], impl=impl).tolist() == [1, 0, -1]


def far_store() -> RowBlocks:
    """Return a block of more than 2**31 floats."""
    blocks = RowBlocks(RowLayout(1024), shift=20 + 1)
    blocks.grow(1 << 21)
    assert blocks.blocks[0].numel() // 4 > FAR
    return blocks


@EACH
def test_row_init(impl):
    blocks, keys = far_store(), torch.tensor([table_key(1, "t")])
    rows, ids = torch.tensor([(1 << 21) - 1, -1, 0]), torch.tensor([-5, 6, 2**62])
    init_rows(blocks, rows, ids, keys, InitSpec(InitKind.UNIFORM, -1.0, 1.0), step=3, impl=impl)
    near = RowBlocks(RowLayout(1024), shift=1)
    near.grow(2)
    init_rows(near, torch.tensor([0, 1]), ids[[0, 2]], keys, InitSpec(InitKind.UNIFORM, -1.0, 1.0), step=3)
    got = blocks.read(rows[[0, 2]])
    for name, values in near.read(torch.tensor([0, 1])).items():
        assert torch.equal(got[name], values), name
    assert not blocks.blocks[0][-2].any()


@EACH
def test_row_copies(impl):
    blocks, copies = far_store(), far_store()
    rows, places = torch.tensor([(1 << 21) - 1, 3]), torch.tensor([0, (1 << 21) - 2])
    weight = torch.randn(2, 1024)
    blocks.write(rows, {"weight": weight})
    copy_rows(blocks, rows, copies, places, impl=impl)
    assert torch.equal(copies.read(places)["weight"], weight)
    assert not copies.blocks[0][-1].any()
    there = torch.tensor([-1, (1 << 21) - 2])
    assert torch.equal(read_either(blocks, rows, copies, there, impl=impl)["weight"], weight)


@EACH
def test_row_gradients_far_apart(impl):
    grads = mapped(3 * (FAR // 2), torch.float32).as_strided((3, 8), (FAR // 2, 1))
    near = torch.randn(3, 8)
    grads.copy_(near)
    views = [RowGrad(torch.tensor([1, 0, 1]), torch.arange(4), 3, grad=grad) for grad in (grads, near)]
    far, want = (reduce_grads([view], 2, 8, impl=impl) for view in views)
    assert torch.equal(far, want)


@EACH
def test_hash_slots(impl):
    """2^28 slots of two int64: byte distances up to 2^32. Only the groups where the ids start are made empty."""
    slots, shift = mapped(1 << 29, torch.int64).view(-1, 2), 64 - 28
    ids = torch.arange(1, 40)
    homes = hash64(ids) >> shift & (1 << 28) - 1
    assert int(homes.max()) * 16 > 2**31
    for group in (homes // probe.GROUP_SLOTS).tolist():
        slots[group * probe.GROUP_SLOTS : (group + 1) * probe.GROUP_SLOTS] = torch.tensor([probe.EMPTY, -1])
    table = torch.zeros(1, probe.COLUMNS, dtype=torch.int64)
    table[0, probe.ADDRESS], table[0, probe.SHIFT] = slots.data_ptr(), shift
    table[0, probe.SLOTS], table[0, probe.SIDE] = 1 << 28, -1
    place = table, [slots], ids, torch.zeros(1, dtype=torch.int32)
    assert hash_ops.find(*place, impl=impl).tolist() == [-1] * 39
    hash_ops.insert(*place, rows=ids * 2**33, impl=impl)
    assert torch.equal(hash_ops.find(*place, impl=impl), ids * 2**33)
    assert torch.equal(slots[homes, 0], ids)
    assert int(table[0, probe.LIVE]) == 39
    assert torch.equal(hash_ops.erase(*place, impl=impl), ids * 2**33)
    assert hash_ops.find(*place, impl=impl).tolist() == [-1] * 39


@EACH
def test_hstu_attention(impl):
    stride, num_rows = 1 << 26, 34
    assert stride * (num_rows - 1) > 2**31
    packed = mapped(stride * num_rows, torch.bfloat16).as_strided((num_rows, 3, 1, 4), (stride, 4, 4, 1))
    packed.copy_(torch.randn(packed.shape))
    offsets = lengths_to_offsets(torch.tensor([13, 0, 21]))
    found = []
    for rows in (packed, packed.contiguous()):
        query, key, value = (part.detach().requires_grad_() for part in rows.unbind(1))
        out = hstu_attention(query, key, value, offsets, impl=impl)
        found.append((out, *torch.autograd.grad(out.square().sum(), (query, key, value))))
    for far, near in zip(*found, strict=True):
        torch.testing.assert_close(far, near, rtol=0, atol=0)
