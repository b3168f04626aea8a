"""Lengths, offsets, bag numbers, permutations and padding: against the reference, and once by hand."""

import pytest
import torch

from recis_kernels.dispatch import Impl
from recis_kernels.jagged import (
    bag_of_value,
    jagged_to_padded,
    lengths_to_offsets,
    merge_offsets,
    offsets_to_lengths,
    padded_to_jagged,
    trimmed_lengths,
)

IMPLS: list[Impl] = ["torch", "numba", "triton"]
ALL_IMPLS: list[Impl] = [*IMPLS, "reference"]
LENGTHS = [[], [0], [4], [0, 3, 0], [1, 100, 7, 0, 0, 2]]


def _offsets(lengths: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return lengths_to_offsets(torch.tensor(lengths, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths_and_offsets_invert_each_other(lengths, dtype):
    offsets = _offsets(lengths, dtype)
    assert offsets.dtype == dtype
    assert offsets.tolist() == [sum(lengths[:bag]) for bag in range(len(lengths) + 1)]
    assert offsets_to_lengths(offsets).tolist() == lengths
    for impl in ALL_IMPLS:
        bags = bag_of_value(offsets, sum(lengths), impl=impl)
        assert bags.dtype == torch.int64
        assert bags.tolist() == [b for b, size in enumerate(lengths) for _ in range(size)]


def test_merge_and_bag_numbers_by_hand():  # A19
    merged = merge_offsets([torch.tensor([0, 2, 5]), torch.tensor([0, 3, 6])])
    assert merged.tolist() == [0, 2, 5, 8, 11]
    assert bag_of_value(torch.tensor([0, 2, 5]), 5).tolist() == [0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="at least one"):
        merge_offsets([])


@pytest.mark.parametrize(
    "wrong", [torch.zeros(0, dtype=torch.int64), torch.zeros(2), torch.zeros(1, 1).long()], ids=str
)
def test_malformed_offsets_are_refused(wrong):
    with pytest.raises(ValueError, match="offsets must be"):
        offsets_to_lengths(wrong)
    with pytest.raises(ValueError, match="offsets must be"):
        jagged_to_padded(torch.zeros(0), wrong, 1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("dim", [None, 1, 7], ids="D{}".format)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_padding_matches_reference(impl, dtype, dim, lengths):
    offsets = _offsets(lengths)
    shape = (sum(lengths),) if dim is None else (sum(lengths), dim)
    values = torch.randint(1, 100, shape).to(dtype)
    for max_length in (0, 1, 5, 101) if impl != "triton" else (0, 1, 101):
        padded = jagged_to_padded(values, offsets, max_length, fill=9, impl=impl)
        want = jagged_to_padded(values, offsets, max_length, fill=9, impl="reference")
        assert padded.dtype == dtype
        assert torch.equal(padded, want)
        back = padded_to_jagged(padded, offsets, sum(lengths), impl=impl)
        assert torch.equal(back, padded_to_jagged(padded, offsets, sum(lengths), impl="reference"))
        if max_length >= max(lengths, default=0):
            assert torch.equal(back, values)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", [[2, 0, 5], [0, 0]], ids=str)
def test_padding_gradients_match_reference(impl, lengths):
    offsets = _offsets(lengths)

    def grads(version):
        torch.manual_seed(1)
        values = torch.randn(sum(lengths), 3, requires_grad=True)
        rows = torch.randn(len(lengths), 4, 3, requires_grad=True)
        padded = jagged_to_padded(values, offsets, 4, impl=version)
        flat = padded_to_jagged(rows, offsets, sum(lengths), impl=version)
        (padded * torch.randn(padded.shape)).sum().backward()
        (flat * torch.randn(flat.shape)).sum().backward()
        return values.grad, rows.grad

    for got, want in zip(grads(impl), grads("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_huge_bag_and_values_apart(impl):
    offsets = torch.tensor([0, 0, 5000, 5001], dtype=torch.int32)
    values = torch.randn(5001, 6)[:, ::2]
    padded = jagged_to_padded(values, offsets, 4999, fill=-1.5, impl=impl)
    assert torch.equal(padded, jagged_to_padded(values, offsets, 4999, fill=-1.5, impl="reference"))
    turned = padded.transpose(1, 2).contiguous().transpose(1, 2)
    back = padded_to_jagged(turned, offsets, 5001, impl=impl)
    assert torch.equal(back, padded_to_jagged(padded, offsets, 5001, impl="reference"))
    assert bag_of_value(offsets, 5001, impl=impl).bincount(minlength=3).tolist() == [0, 5000, 1]


@pytest.mark.parametrize("impl", ["numba", "torch", "triton"])
def test_values_past_the_last_bag_are_in_no_row_and_get_no_gradient(impl):
    values = torch.randn(5, 3, requires_grad=True)
    padded = jagged_to_padded(values, torch.tensor([0, 2, 3]), 4, impl=impl)
    want = jagged_to_padded(values, torch.tensor([0, 2, 3]), 4, impl="reference")
    upstream = torch.randn_like(padded)
    assert torch.equal(padded, want)
    assert torch.equal(*(torch.autograd.grad(one, values, upstream)[0] for one in (padded, want)))


def launches() -> None:
    for dtype in (torch.uint8, torch.int16, torch.float32, torch.int64):
        for index in (torch.int64, torch.int32):
            offsets = torch.tensor([0, 2, 5], dtype=index)
            for shape in ((5,), (5, 64)):
                padded = jagged_to_padded(torch.zeros(shape).to(dtype), offsets, 3, fill=7, impl="triton")
                padded_to_jagged(padded, offsets, 5, impl="triton")
            bag_of_value(offsets, 5, impl="triton")


@pytest.mark.parametrize("impl", IMPLS)
def test_nodes_of_torch_compile(impl):
    offsets = _offsets([2, 1])
    values = torch.randn(3, 2, requires_grad=True)
    torch.library.opcheck(torch.ops.recis.jagged_to_padded.default, (values, offsets, 3, 0.0, impl))
    padded = torch.randn(2, 3, 2, requires_grad=True)
    torch.library.opcheck(torch.ops.recis.padded_to_jagged.default, (padded, offsets, 3, impl))
    torch.library.opcheck(torch.ops.recis.bag_of_value.default, (offsets, 3, impl))

    def there_and_back(values, offsets):
        rows = jagged_to_padded(values, offsets, 2, fill=1.0, impl=impl)
        bags = bag_of_value(merge_offsets([offsets, offsets]), 6, impl=impl)
        return padded_to_jagged(rows * rows, offsets, 3, impl=impl) + bags[:3, None]

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(values, offsets), there_and_back(values, offsets))
    (got,) = torch.autograd.grad(compiled(values, offsets).sum(), values)
    assert torch.equal(got, 2 * values)


def test_trimmed_lengths_by_hand():
    assert trimmed_lengths(torch.tensor([[1, 0, 3, 0, 0], [0, 0, 0, 0, 0], [6, 7, 8, 0, 9]]), 0).tolist() == [3, 0, 5]
    vectors = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 2.0], [0.0, 0.0]]])
    assert trimmed_lengths(vectors, 0).tolist() == [3]
    assert trimmed_lengths(torch.zeros(2, 0), 0).tolist() == [0, 0]
