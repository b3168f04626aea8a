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


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [1, 17, 64], ids="D{}".format)
def test_gather_is_exact(dim, dtype):
    blocks, weight = filled_blocks(37, dim, dtype)
    rows, inverse, _ = random_lookup([50], 37)
    got = row_gather(blocks, rows, inverse)
    present = (inverse >= 0) & (rows[inverse.clamp(min=0)] >= 0)
    assert torch.equal(got[present], weight[rows[inverse[present]]].float())
    assert not got[~present].any()
    assert torch.equal(got, row_gather(blocks, rows, inverse, impl="reference"))
    assert torch.equal(row_gather(blocks, rows), row_gather(blocks, rows, torch.arange(rows.numel())))


def test_by_hand():
    """A20: vectors (1,1), (2,2), (3,3); indices 2,0,1,0 in bags 0,1,1,2 of four; weights 2, 3, .5, 1."""
    blocks, _ = filled_blocks(3, 2)
    blocks.write(torch.arange(3), {"weight": torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])})
    inverse, offsets = torch.tensor([2, 0, 1, 0]), torch.tensor([0, 1, 3, 4, 4])
    out = embedding_bag(blocks, torch.arange(3), inverse, offsets, torch.tensor([2.0, 3.0, 0.5, 1.0]))
    assert out.tolist() == [[6.0, 6.0], [4.0, 4.0], [1.0, 1.0], [0.0, 0.0]]


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


@pytest.mark.parametrize("num_bags", [0, 3])
def test_nothing_to_read(num_bags):
    blocks, _ = filled_blocks(4, 3)
    none = torch.empty(0, dtype=torch.int64)
    offsets = torch.zeros(num_bags + 1, dtype=torch.int64)
    assert torch.equal(embedding_bag(blocks, none, none, offsets), torch.zeros(num_bags, 3))
    assert row_gather(blocks, none, none).shape == (0, 3)
    assert torch.equal(row_gather(blocks, none, torch.tensor([-1, -1])), torch.zeros(2, 3))
    empty = RowBlocks(RowLayout(3))
    assert torch.equal(row_gather(empty, torch.tensor([-1])), torch.zeros(1, 3))


def test_offsets_need_not_cover_all_positions():
    blocks, weight = filled_blocks(10, 4)
    offsets, inverse = torch.tensor([2, 3, 5]), torch.arange(8)
    out = embedding_bag(blocks, torch.arange(10), inverse, offsets)
    torch.testing.assert_close(out, torch.stack([weight[2], weight[3] + weight[4]]))
    grads = factor_grads(blocks, torch.arange(10), inverse, offsets, torch.ones(2, 4))
    torch.testing.assert_close(grads, torch.tensor([0, 0, 1, 1, 1, 0, 0, 0]) * weight[:8].sum(1))


def test_non_contiguous_inputs():
    blocks, _ = filled_blocks(20, 6)
    rows, inverse = torch.arange(40)[::2], torch.arange(0, 24)[::2] % 20
    rows = rows.clone() % 20
    spread = torch.stack([rows, rows]).t().contiguous().t()[0]  # stride 2
    offsets = torch.tensor([0, 5, 12])
    want = embedding_bag(blocks, rows, inverse.clone(), offsets, impl="reference")
    torch.testing.assert_close(embedding_bag(blocks, spread, inverse, offsets), want)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [1, 15, 64, 100], ids="D{}".format)
def test_factor_gradients_match_the_reference(dim, dtype):
    blocks, _ = filled_blocks(37, dim, dtype)
    rows, inverse, offsets = random_lookup([1, 0, 30, 6], 37)
    grad = torch.randn(4, dim)
    want = factor_grads(blocks, rows, inverse, offsets, grad, impl="reference")
    got = factor_grads(blocks, rows, inverse, offsets, grad.t().contiguous().t())
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
