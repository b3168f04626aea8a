"""Gather and pooled gather against float64 sums over exported rows; gradients of factors likewise."""

import pytest
import torch

from recis_kernels import checks
from recis_kernels.embedding_bag import embedding_bag, factor_grads, row_gather, tile_positions
from recis_kernels.row_blocks import RowBlocks, RowLayout

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-5}  # a bf16 row is widened exactly, sums are fp32


def filled_blocks(num_rows, dim, dtype=torch.float32):
    """Return blocks of 8 rows each with normal weights, NaN state and the weights [num_rows, dim]."""
    blocks = RowBlocks(RowLayout(dim, dtype, (("h", 1),)), shift=3)
    blocks.grow(num_rows)
    weight = torch.randn(num_rows, dim).to(dtype)
    nan = torch.full((num_rows, 1), float("nan"))
    blocks.write(torch.arange(num_rows), {"weight": weight, "state.h": nan})
    return blocks, weight


def offsets_of(lengths):
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int64).cumsum(0)])


def random_lookup(lengths, num_rows):
    """Return (rows [U] with an absent one, inverse [L] with padding, offsets)."""
    rows = torch.randperm(num_rows)[:11]
    rows[3] = -1
    offsets = offsets_of(lengths)
    return rows, torch.randint(-1, rows.numel(), (int(offsets[-1]),)), offsets


@pytest.mark.parametrize("wide", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [1, 15, 16, 17, 64, 1024], ids="D{}".format)
@pytest.mark.parametrize("lengths", [[4], [0, 3, 0], [1, 100, 7]], ids=str)
def test_bags_match_the_reference(lengths, dim, dtype, wide):
    blocks, _ = filled_blocks(37, dim, dtype)
    rows, inverse, offsets = random_lookup(lengths, 37)
    factors = torch.rand(inverse.numel())
    for given in (None, factors):
        want = embedding_bag(blocks, rows, inverse, offsets, given, impl="reference")
        got = embedding_bag(blocks, rows, inverse.to(wide), offsets, given, impl="numba")
        torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def bits(values):
    return values.view(torch.int32)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [1, 3, 16, 63, 64, 1023], ids="D{}".format)
def test_triton_gives_the_bits_of_numba(dim, dtype):
    """Bags around the four positions in flight, an empty one, more bags than a tile has, factors, three kinds of inverse."""
    blocks, _ = filled_blocks(37, dim, dtype)
    rows, inverse, offsets = random_lookup([0, 1, 3, 4, 5, 0, 2, 9, 1, 17], 37)
    cases = [
        (inverse.int(), offsets, None),
        (inverse, offsets, torch.randn(inverse.numel())),
        (None, torch.tensor([2, 3, 3, 9]), torch.rand(11)),
    ]
    for given, bags, factors in cases:
        want = embedding_bag(blocks, rows, given, bags, factors, impl="numba")
        assert bits(embedding_bag(blocks, rows, given, bags, factors, impl="triton")).equal(bits(want))
    grad = torch.randn(offsets.numel() - 1, dim)
    want = factor_grads(blocks, rows, inverse, offsets, grad, impl="numba")
    assert bits(factor_grads(blocks, rows, inverse, offsets, grad, impl="triton")).equal(bits(want))


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_one_huge_bag_of_one_row(impl):
    blocks, weight = filled_blocks(4, 5)
    out = embedding_bag(
        blocks, torch.tensor([2]), torch.zeros(300, dtype=torch.int32), torch.tensor([0, 300]), impl=impl
    )
    fold = torch.zeros(5)
    for _ in range(300):
        fold = fold + weight[2]
    assert torch.equal(out[0], fold)


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_signs_of_zero_are_those_of_the_fold(impl):
    """A bag of -0.0 alone stays -0.0; with an absent row (+0.0) it is +0.0; an empty bag is +0.0."""
    blocks, _ = filled_blocks(1, 2)
    blocks.write(torch.tensor([0]), {"weight": torch.full((1, 2), -0.0)})
    inverse, offsets = torch.tensor([0, 0, 0, -1, 0]), torch.tensor([0, 2, 4, 5, 5])
    out = embedding_bag(blocks, torch.tensor([0]), inverse, offsets, impl=impl)
    assert out.signbit()[:, 0].tolist() == [True, False, True, False]


@pytest.mark.parametrize("impl", ["numba", "triton"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [1, 17, 64, 700], ids="D{}".format)
def test_gather_is_exact(dim, dtype, impl):
    blocks, weight = filled_blocks(37, dim, dtype)
    rows, inverse, _ = random_lookup([50], 37)
    got = row_gather(blocks, rows, inverse, impl=impl)
    present = (inverse >= 0) & (rows[inverse.clamp(min=0)] >= 0)
    assert torch.equal(got[present], weight[rows[inverse[present]]].float())
    assert not got[~present].any()
    assert torch.equal(got, row_gather(blocks, rows, inverse, impl="reference"))
    by_rows = row_gather(blocks, rows, impl=impl)
    assert torch.equal(by_rows, row_gather(blocks, rows, torch.arange(rows.numel()), impl=impl))


@pytest.mark.parametrize("impl", ["numba", "triton", "reference"])
def test_by_hand(impl):
    """A20: vectors (1,1), (2,2), (3,3); indices 2,0,1,0 in bags 0,1,1,2 of four; weights 2, 3, .5, 1."""
    blocks, _ = filled_blocks(3, 2)
    blocks.write(torch.arange(3), {"weight": torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])})
    inverse, offsets = torch.tensor([2, 0, 1, 0]), torch.tensor([0, 1, 3, 4, 4])
    out = embedding_bag(blocks, torch.arange(3), inverse, offsets, torch.tensor([2.0, 3.0, 0.5, 1.0]), impl=impl)
    assert out.tolist() == [[6.0, 6.0], [4.0, 4.0], [1.0, 1.0], [0.0, 0.0]]
    grads = factor_grads(blocks, torch.arange(3), inverse, offsets, torch.tensor([[1.0, 2.0]] * 4), impl=impl)
    assert grads.tolist() == [9.0, 3.0, 6.0, 3.0]


def test_the_sum_is_a_left_fold_whatever_the_threads():
    blocks, weight = filled_blocks(64, 5)
    lengths = torch.randint(0, 40, (900,)).tolist()
    offsets = offsets_of(lengths)
    inverse = torch.randint(0, 64, (int(offsets[-1]),))
    results = []
    before = torch.get_num_threads()
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append(embedding_bag(blocks, torch.arange(64), inverse, offsets))
    torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
    bag = 7
    fold = torch.zeros(5)
    for p in range(int(offsets[bag]), int(offsets[bag + 1])):
        fold = fold + weight[inverse[p]]
    assert torch.equal(results[0][bag], fold)


@pytest.mark.parametrize("impl", ["numba", "triton"])
@pytest.mark.parametrize("num_bags", [0, 3])
def test_nothing_to_read(num_bags, impl):
    blocks, _ = filled_blocks(4, 3)
    none = torch.empty(0, dtype=torch.int64)
    offsets = torch.zeros(num_bags + 1, dtype=torch.int64)
    assert torch.equal(embedding_bag(blocks, none, none, offsets, impl=impl), torch.zeros(num_bags, 3))
    assert factor_grads(blocks, none, none, offsets, torch.ones(num_bags, 3), impl=impl).shape == (0,)
    assert row_gather(blocks, none, none, impl=impl).shape == (0, 3)
    assert torch.equal(row_gather(blocks, none, torch.tensor([-1, -1]), impl=impl), torch.zeros(2, 3))
    empty = RowBlocks(RowLayout(3))
    assert torch.equal(row_gather(empty, torch.tensor([-1]), impl=impl), torch.zeros(1, 3))


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_offsets_need_not_cover_all_positions(impl):
    blocks, weight = filled_blocks(10, 4)
    offsets, inverse = torch.tensor([2, 3, 5]), torch.arange(8)
    out = embedding_bag(blocks, torch.arange(10), inverse, offsets, impl=impl)
    torch.testing.assert_close(out, torch.stack([weight[2], weight[3] + weight[4]]))
    grads = factor_grads(blocks, torch.arange(10), inverse, offsets, torch.ones(2, 4), impl=impl)
    torch.testing.assert_close(grads, torch.tensor([0, 0, 1, 1, 1, 0, 0, 0]) * weight[:8].sum(1))


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_non_contiguous_inputs(impl):
    blocks, _ = filled_blocks(20, 6)
    rows, inverse = torch.arange(40)[::2], torch.arange(0, 24)[::2] % 20
    rows = rows.clone() % 20
    spread = torch.stack([rows, rows]).t().contiguous().t()[0]  # stride 2
    offsets, factors = torch.tensor([0, 9, 5, 9, 12])[::2], torch.rand(12, 2)[:, 0]
    want = embedding_bag(blocks, rows, inverse.clone(), offsets, factors, impl="reference")
    torch.testing.assert_close(embedding_bag(blocks, spread, inverse, offsets, factors, impl=impl), want)
    grad = torch.randn(6, 2).t()
    want = factor_grads(blocks, rows, inverse.clone(), offsets, grad, impl="reference")
    torch.testing.assert_close(factor_grads(blocks, spread, inverse, offsets, grad, impl=impl), want)


@pytest.mark.parametrize("impl", ["numba", "triton"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_beyond_two_to_the_31_elements(dtype, impl):
    """One block of more than 2**31 weights, mapped lazily; only rows near its end and at its start are touched."""
    blocks = RowBlocks(RowLayout(1024, dtype), shift=21)
    blocks.grow(1 << 21)
    assert blocks.blocks[0].numel() // dtype.itemsize > 2**31
    rows = torch.tensor([0, (1 << 21) - 1, (1 << 31) // blocks.layout.row_bytes + 1, (1 << 21) - 3])
    weight = torch.randn(4, 1024).to(dtype)
    blocks.write(rows, {"weight": weight})
    inverse, offsets = torch.tensor([1, 2, 3, 0, 1]), torch.tensor([0, 2, 5])
    assert torch.equal(row_gather(blocks, rows, inverse, impl=impl), weight[inverse].float())
    wide = weight.float()
    want = torch.stack([wide[1] + wide[2], (wide[3] + wide[0]) + wide[1]])
    assert torch.equal(embedding_bag(blocks, rows, inverse, offsets, impl=impl), want)
    grads = factor_grads(blocks, rows, inverse, offsets, torch.ones(2, 1024), impl=impl)
    torch.testing.assert_close(grads, wide[inverse].sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", ["numba", "triton", "reference"])
def test_pooling_is_differentiable_in_factors(impl):
    blocks, _ = filled_blocks(9, 5)
    rows, inverse, offsets = torch.arange(9), torch.randint(0, 9, (7,)), torch.tensor([0, 3, 7])
    factors, upstream = torch.rand(7, requires_grad=True), torch.randn(2, 5)
    embedding_bag(blocks, rows, inverse, offsets, factors, impl=impl).backward(upstream)
    want = factor_grads(blocks, rows, inverse, offsets, upstream, impl=impl)
    assert factors.grad is not None
    assert torch.equal(factors.grad, want)


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_ops_are_known_to_torch(impl):
    blocks, _ = filled_blocks(20, 6)
    store = (blocks.blocks, blocks.layout_key, blocks.shift)
    rows, inverse, offsets = torch.arange(9), torch.randint(-1, 9, (7,)), torch.tensor([0, 3, 7])
    factors = torch.rand(7, requires_grad=True)
    ops = torch.ops.recis
    torch.library.opcheck(ops.row_gather.default, (*store, rows, inverse, impl))
    torch.library.opcheck(ops.embedding_bag.default, (*store, rows, inverse, offsets, factors, impl))
    torch.library.opcheck(ops.factor_grads.default, (*store, rows, None, offsets, torch.randn(2, 6), impl))


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_compiled_functions_give_equal_results(impl):
    blocks, _ = filled_blocks(20, 6)
    rows, inverse, offsets = torch.arange(9), torch.randint(-1, 9, (7,)), torch.tensor([0, 3, 7])

    def run(factors):
        pooled = embedding_bag(blocks, rows, inverse, offsets, factors * 2, impl=impl)
        return pooled.sum(0) + row_gather(blocks, rows, impl=impl).sum(0)

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        factors = torch.linspace(0, 1, 7, requires_grad=True)
        out = function(factors)
        out.sum().backward()
        assert factors.grad is not None
        results.append((out.detach(), factors.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


class Pooled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, _ = filled_blocks(20, 6)

    def forward(self, rows, inverse, offsets):
        return embedding_bag(self.blocks, rows, inverse, offsets)


def test_an_exported_module_holds_the_op():
    module, args = Pooled(), (torch.arange(9), torch.randint(-1, 9, (7,)), torch.tensor([0, 3, 7]))
    program = torch.export.export(module, args)
    assert "recis.embedding_bag.default" in [str(node.target) for node in program.graph.nodes]
    assert torch.equal(program.module()(*args), module(*args))


@pytest.mark.parametrize("impl", ["numba", "triton"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [1, 15, 64, 100], ids="D{}".format)
def test_factor_gradients_match_the_reference(dim, dtype, impl):
    blocks, _ = filled_blocks(37, dim, dtype)
    rows, inverse, offsets = random_lookup([1, 0, 30, 6], 37)
    grad = torch.randn(4, dim)
    want = factor_grads(blocks, rows, inverse, offsets, grad, impl="reference")
    got = factor_grads(blocks, rows, inverse, offsets, grad.t().contiguous().t(), impl=impl)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_tile_positions():
    """A22: bags of 1, 2 and 4 vectors, n = 3."""
    positions = tile_positions(torch.tensor([0, 1, 3, 7]), 3)
    assert positions.tolist() == [0, -1, -1, 1, 2, -1, 3, 4, 5]
    assert tile_positions(torch.tensor([5, 6]), 2).tolist() == [5, -1]
    assert tile_positions(torch.tensor([0]), 2).tolist() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(3, dtype=torch.int32)}, "rows must be"),
        ({"inverse": torch.zeros(3)}, "inverse must be"),
        ({"offsets": torch.zeros(0, dtype=torch.int64)}, "offsets must be"),
        ({"factors": torch.zeros(3, dtype=torch.float64)}, "factors must be"),
    ],
    ids=["rows", "inverse", "offsets", "factors"],
)
def test_wrong_arguments_are_named(change, message):
    blocks, _ = filled_blocks(4, 3)
    good = {"rows": torch.arange(3), "inverse": torch.arange(3), "offsets": torch.tensor([0, 3]), "factors": None}
    with pytest.raises(ValueError, match=message):
        embedding_bag(blocks, **(good | change))


def test_wrong_gradients_are_named():
    blocks, _ = filled_blocks(4, 3)
    with pytest.raises(ValueError, match="grad must be"):
        factor_grads(blocks, torch.arange(3), torch.arange(3), torch.tensor([0, 3]), torch.zeros(2, 3))


def test_content_is_checked_on_request():
    blocks, _ = filled_blocks(4, 3)  # capacity 8
    with checks():
        row_gather(blocks, torch.tensor([7, -1]), torch.tensor([0, -1, 1]))
        with pytest.raises(ValueError, match=r"rows must lie in -1\.\.7; got 8\.\.8"):
            row_gather(blocks, torch.tensor([8]))
        with pytest.raises(ValueError, match=r"inverse must lie in -1\.\.1; got 0\.\.2"):
            row_gather(blocks, torch.tensor([1, 2]), torch.tensor([0, 2]))


def launches() -> None:
    rows, offsets = torch.arange(6), torch.tensor([0, 2, 6])
    forms = ((64, torch.float32), (128, torch.bfloat16), (3, torch.float32), (1024, torch.float32), (1, torch.bfloat16))
    for dim, dtype in forms:
        blocks = RowBlocks(RowLayout(dim, dtype), shift=3)
        blocks.grow(8)
        for inverse in (None, rows, rows.int()):
            row_gather(blocks, rows, inverse, impl="triton")
            for factors in (None, torch.ones(6)):
                embedding_bag(blocks, rows, inverse, offsets, factors, impl="triton")
            factor_grads(blocks, rows, inverse, offsets, torch.ones(2, dim), impl="triton")
    blocks = RowBlocks(RowLayout(1), shift=0)  # every number 1, which Triton makes a constant
    blocks.grow(1)
    embedding_bag(blocks, rows[:1] * 0, None, offsets[:2], impl="triton")
    row_gather(blocks, rows[:1] * 0, impl="triton")
    factor_grads(blocks, rows[:1] * 0, None, offsets[:2], torch.ones(1, 1), impl="triton")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [1, 3, 16, 33, 64], ids="D{}".format)
@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_rows_of_a_tensor_are_read_where_they_lie(impl, dim, dtype):
    """Row behind row without metadata, the last one at the very end of the memory: the bits of the same rows in blocks."""
    blocks, weight = filled_blocks(37, dim, dtype)
    bare = RowBlocks.of_tensor(weight)
    assert bare.capacity == 37
    assert bare.blocks[0].data_ptr() == weight.data_ptr()
    rows, inverse, offsets = random_lookup([0, 3, 9, 17], 37)
    rows[0] = 36
    for factors in (None, torch.rand(inverse.numel())):
        want = embedding_bag(blocks, rows, inverse, offsets, factors, impl="numba")
        assert bits(embedding_bag(bare, rows, inverse, offsets, factors, impl=impl)).equal(bits(want))
    assert row_gather(bare, rows, inverse, impl=impl).equal(row_gather(blocks, rows, inverse, impl="numba"))
    weight[36] = 2.0  # no copy was made
    assert row_gather(bare, torch.tensor([36]), impl=impl).eq(2.0).all()


def test_rows_of_a_tensor_refuse_what_they_cannot_hold():
    with pytest.raises(ValueError, match=r"contiguous; got \(4, 3\)"):
        RowBlocks.of_tensor(torch.zeros(3, 4).t())
    with pytest.raises(ValueError, match=r"float32 or torch\.bfloat16"):
        RowBlocks.of_tensor(torch.zeros(3, 4, dtype=torch.float64))
    bare = RowBlocks.of_tensor(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="rows of a tensor do not grow; it has 3, got 4"):
        bare.grow(4)
    with pytest.raises(ValueError, match="rows have no field 'id'"):
        bare.read(torch.tensor([0]), ("id",))
    with pytest.raises(ValueError, match="a bare row has weights alone"):
        RowLayout(4, state=(("m", 4),), bare=True)


@pytest.mark.parametrize("impl", ["numba", "triton", "reference"])
def test_a_gather_writes_where_it_is_told(impl):
    blocks, _ = filled_blocks(9, 5)
    rows, inverse = torch.tensor([4, -1, 8]), torch.tensor([2, 1, -1, 0], dtype=torch.int32)
    memory = torch.full((6, 5), float("nan"))
    out = row_gather(blocks, rows, inverse, out=memory[1:5], impl=impl)
    assert out.data_ptr() == memory[1:].data_ptr()
    assert memory[1:5].equal(row_gather(blocks, rows, inverse))
    assert memory[[0, 5]].isnan().all()
    with pytest.raises(ValueError, match=r"out must be \(4, 5\) float32"):
        row_gather(blocks, rows, inverse, out=memory)
