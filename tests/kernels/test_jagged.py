"""Lengths, offsets, bag numbers, permutations and padding: against the reference, and once by hand."""

import pytest
import torch

from recis_kernels.jagged import (
    bag_of_value,
    jagged_to_padded,
    lengths_to_offsets,
    merge_offsets,
    offsets_to_lengths,
    padded_to_jagged,
    permute_bags,
    trimmed_lengths,
)

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
    assert bag_of_value(offsets, sum(lengths)).tolist() == [b for b, size in enumerate(lengths) for _ in range(size)]


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


def test_permute_bags_by_hand_and_gradient():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    turned, offsets = permute_bags(values, torch.tensor([0, 2, 2, 4]), torch.tensor([2, 0, 1]))
    assert turned.tolist() == [3, 4, 1, 2]
    assert offsets.tolist() == [0, 2, 4, 4]
    (turned * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [100, 1000, 1, 10]


@pytest.mark.parametrize("impl", ["torch", "numba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("dim", [None, 1, 7], ids="D{}".format)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_padding_matches_reference(impl, dtype, dim, lengths):
    offsets = _offsets(lengths)
    shape = (sum(lengths),) if dim is None else (sum(lengths), dim)
    values = torch.randint(1, 100, shape).to(dtype)
    for max_length in (0, 1, 5, 101):
        padded = jagged_to_padded(values, offsets, max_length, fill=9, impl=impl)
        want = jagged_to_padded(values, offsets, max_length, fill=9, impl="reference")
        assert padded.dtype == dtype
        assert torch.equal(padded, want)
        back = padded_to_jagged(padded, offsets, sum(lengths), impl=impl)
        assert torch.equal(back, padded_to_jagged(padded, offsets, sum(lengths), impl="reference"))
        if max_length >= max(lengths, default=0):
            assert torch.equal(back, values)


@pytest.mark.parametrize("impl", ["torch", "numba"])
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


def test_padding_is_one_node_for_torch_compile():
    offsets = _offsets([2, 1])
    values = torch.randn(3, 2, requires_grad=True)
    torch.library.opcheck(torch.ops.recis.jagged_to_padded.default, (values, offsets, 3, 0.0))
    padded = torch.randn(2, 3, 2, requires_grad=True)
    torch.library.opcheck(torch.ops.recis.padded_to_jagged.default, (padded, offsets, 3))


def test_trimmed_lengths_by_hand():
    assert trimmed_lengths(torch.tensor([[1, 0, 3, 0, 0], [0, 0, 0, 0, 0], [6, 7, 8, 0, 9]]), 0).tolist() == [3, 0, 5]
    vectors = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 2.0], [0.0, 0.0]]])
    assert trimmed_lengths(vectors, 0).tolist() == [3]
    assert trimmed_lengths(torch.zeros(2, 0), 0).tolist() == [0, 0]
