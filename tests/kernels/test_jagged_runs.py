"""Runs, permutations, concatenation and cutting of bags: against the reference with gradients, and once by hand."""

import pytest
import torch

from recis_kernels.dispatch import Impl
from recis_kernels.jagged import lengths_to_offsets
from recis_kernels.jagged_runs import concat_bags, gather_runs, permute_bags, scatter_runs, split_bags

IMPLS: list[Impl] = ["numba", "triton"]
LENGTHS = [[], [0], [4], [0, 3, 0], [1, 100, 7, 0, 0, 2]]
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8]


def _offsets(lengths: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return lengths_to_offsets(torch.tensor(lengths, dtype=dtype))


def _numbers(num_rows: int, dim: int | None, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(1, 100, (num_rows,) if dim is None else (num_rows, dim)).to(dtype)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_by_hand(impl):
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    turned, offsets = permute_bags(values, torch.tensor([0, 2, 2, 4]), torch.tensor([2, 0, 1]), impl=impl)
    assert turned.tolist() == [3, 4, 1, 2]
    assert offsets.tolist() == [0, 2, 4, 4]
    (turned * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [100, 1000, 1, 10]
    ends, more_ends = torch.tensor([0, 2, 2]), torch.tensor([0, 1, 3])
    joined, offsets = concat_bags(torch.tensor([1, 2]), ends, torch.tensor([7, 8, 9]), more_ends, impl=impl)
    assert joined.tolist() == [1, 2, 7, 8, 9]
    assert offsets.tolist() == [0, 3, 5]
    first, second = split_bags(torch.tensor([5, 6, 7, 8, 9]), more_ends, ends, 3, impl=impl)
    assert (first.tolist(), second.tolist()) == ([5, 8, 9], [6, 7])
    taken = gather_runs(torch.arange(10), torch.tensor([7, 0]), torch.tensor([0, 2, 5]), 5, impl=impl)
    assert taken.tolist() == [7, 8, 0, 1, 2]
    spread = scatter_runs(taken + 1, torch.tensor([4, 1]), torch.tensor([0, 2, 5]), 7, impl=impl)
    assert spread.tolist() == [0, 1, 2, 3, 8, 9, 0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [None, 1, 7, 130], ids="D{}".format)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_matches_reference(impl, dtype, dim, lengths):
    torch.manual_seed(8)
    offsets, num_rows = _offsets(lengths), sum(lengths)
    other = _offsets([(5 * size + 1) % 4 for size in lengths], torch.int32)
    values, more = _numbers(num_rows, dim, dtype), _numbers(int(other[-1]), dim, dtype)
    order = torch.randperm(len(lengths))

    def run(version):
        turned, turned_offsets = permute_bags(values, offsets, order, impl=version)
        joined, joined_offsets = concat_bags(values, offsets, more, other, impl=version)
        parts = split_bags(joined, offsets, other, num_rows, impl=version)
        apart = scatter_runs(
            values, offsets[:-1] + torch.arange(len(lengths)) * 2, offsets, num_rows + 20, impl=version
        )
        return turned, turned_offsets, joined, joined_offsets, *parts, apart

    got, want = run(impl), run("reference")
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(got[4], values)
    assert torch.equal(got[5], more)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", [[2, 0, 5], [0, 0]], ids=str)
def test_gradients_match_reference(impl, lengths):
    offsets, num_rows = _offsets(lengths), sum(lengths)
    other = _offsets([1] * len(lengths))

    def grads(version):
        torch.manual_seed(1)
        first = torch.randn(num_rows, 3, requires_grad=True)
        second = torch.randn(len(lengths), 3, requires_grad=True)
        joined, _ = concat_bags(first, offsets, second, other, impl=version)
        turned, turned_offsets = permute_bags(first, offsets, torch.arange(len(lengths)).flip(0), impl=version)
        spread = scatter_runs(turned, turned_offsets[:-1] + 3, turned_offsets, num_rows + 4, impl=version)
        parts = split_bags(joined * joined, other, offsets, len(lengths), impl=version)
        for out in (joined, turned, spread, *parts):
            (out * torch.randn(out.shape)).sum().backward(retain_graph=True)
        return first.grad, second.grad

    for got, want in zip(grads(impl), grads("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_huge_bag_and_values_apart(impl):
    values = torch.randn(6002, 4)[:, ::2]
    starts, ends = torch.tensor([6001, 0, 9]), torch.tensor([0, 1, 1, 5991])
    got = gather_runs(values, starts, ends, 5991, impl=impl)
    assert torch.equal(got, torch.cat([values[6001:], values[9:5999]]))
    apart = torch.stack((starts, starts), 1)[:, 0], torch.stack((ends, ends), 1)[:, 1]
    assert torch.equal(gather_runs(values, *apart, 5991, impl=impl), got)


def launches() -> None:
    for dtype in (torch.uint8, torch.int16, torch.float32, torch.int64):
        for dim in (1, 64):
            values, offsets = torch.zeros(5, dim).to(dtype), torch.tensor([0, 2, 5])
            gather_runs(values, offsets[:-1], offsets, 5, impl="triton")
            scatter_runs(values, offsets[:-1].clone(), offsets.int(), 6, impl="triton")


@pytest.mark.parametrize("impl", IMPLS)
def test_nodes_of_torch_compile(impl):
    offsets, other = torch.tensor([0, 2, 2, 5]), torch.tensor([0, 1, 2, 3])
    values, more = torch.randn(5, 2, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    order = torch.tensor([2, 0, 1])
    nodes = torch.ops.recis
    torch.library.opcheck(nodes.gather_runs.default, (values, offsets[:-1], offsets, 5, impl))
    torch.library.opcheck(nodes.scatter_runs.default, (values, offsets[:-1], offsets, 6, impl))
    torch.library.opcheck(nodes.concat_bags.default, (values, offsets, more, other, impl))
    torch.library.opcheck(nodes.split_bags.default, (values, offsets, other[:1].expand(4).contiguous(), 5, impl))

    def run(values, more):
        turned, ends = permute_bags(values, offsets, order, impl=impl)
        joined, _ = concat_bags(turned * 2, ends, more, other, impl=impl)
        return split_bags(joined, ends, other, 5, impl=impl)[0] * 3

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(values, more), run(values, more))
    got = torch.autograd.grad(compiled(values, more).sum(), (values, more))
    assert torch.equal(got[0], torch.full((5, 2), 6.0))
    assert torch.equal(got[1], torch.zeros(3, 2))


def test_wrong_arguments_are_refused():
    values, offsets = torch.zeros(2), torch.tensor([0, 2])
    with pytest.raises(ValueError, match=r"starts must be int64 \[1\]"):
        gather_runs(values, torch.tensor([0, 1]), offsets, 2)
    with pytest.raises(ValueError, match=r"order must be int64 \[1\]"):
        permute_bags(values, offsets, torch.tensor([0, 0]))
    for order in ([0, 2], [-1, 0], [1, 1]):
        with pytest.raises(ValueError, match="each of 0 to 1 once"):
            permute_bags(values, torch.tensor([0, 0, 2]), torch.tensor(order))
    with pytest.raises(ValueError, match="the same bags"):
        concat_bags(values, offsets, values, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="one shape and dtype"):
        concat_bags(values, offsets, values.double(), offsets)
    with pytest.raises(ValueError, match=r"num_first must be in \[0, 2\]"):
        split_bags(values, offsets, offsets, 3)
