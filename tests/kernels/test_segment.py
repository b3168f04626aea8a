"""Reductions per bag: against the float64 reference, forward and gradient; and once by hand."""

from functools import partial

import pytest
import torch

from recis_kernels.jagged import lengths_to_offsets
from recis_kernels.segment import segment_max, segment_mean, segment_softmax, segment_sum

OPS = [segment_sum, segment_mean, segment_max, segment_softmax]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}  # bf16 rounds the result once, at 2**-8


def _value_and_grad(op, values: torch.Tensor, upstream_seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = values.clone().requires_grad_()
    out = op(leaf)
    torch.manual_seed(upstream_seed)
    out.backward(torch.randn(out.shape).to(out.dtype))
    assert leaf.grad is not None
    return out.detach(), leaf.grad


@pytest.mark.parametrize("impl", ["torch", "numba"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [1, 63, 256], ids="D{}".format)
@pytest.mark.parametrize("lengths", [[], [4], [0, 3, 0], [1, 100, 7]], ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_matches_reference(op, impl, dtype, dim, lengths):
    offsets = lengths_to_offsets(torch.tensor(lengths, dtype=torch.int64))
    # distinct values: which of two equal bf16 maxima takes the gradient is tested by itself
    values = (torch.randperm(sum(lengths) * dim).view(-1, dim) / 100 - 1).to(torch.float32)
    values = torch.randn(values.shape).to(dtype) if op is not segment_max else values.to(dtype)
    if op is segment_max and dtype == torch.bfloat16:
        values = torch.randperm(sum(lengths)).to(dtype)[:, None].expand(-1, dim).contiguous()
    got = _value_and_grad(partial(op, offsets=offsets, impl=impl), values)
    want = _value_and_grad(partial(op, offsets=offsets, impl="reference"), values)
    tolerance = TOLERANCE[dtype]
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_by_hand():
    values, offsets = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([0, 2, 2, 3])
    assert segment_sum(values, offsets).tolist() == [[3.0], [0.0], [4.0]]
    assert segment_mean(values, offsets).tolist() == [[1.5], [0.0], [4.0]]
    assert segment_max(values, offsets).tolist() == [[2.0], [0.0], [4.0]]
    powers = torch.tensor([1.0, 3.0, 5.0]).log()[:, None]
    torch.testing.assert_close(segment_softmax(powers, offsets), torch.tensor([[0.25], [0.75], [1.0]]))


@pytest.mark.parametrize("impl", ["torch", "numba"])
def test_max_edges(impl):
    offsets = torch.tensor([0, 3, 3, 5])
    values = torch.tensor([[2.0], [5.0], [5.0], [-1.0], [torch.nan]])
    out, grad = _value_and_grad(lambda v: segment_max(v, offsets, impl=impl).sum()[None], values)
    assert out.isnan().all()
    assert (grad != 0).flatten().tolist() == [False, True, False, False, True]  # first of equals; NaN wins
    assert segment_max(torch.tensor([[-torch.inf]]), torch.tensor([0, 1]), impl=impl).tolist() == [[-torch.inf]]


@pytest.mark.parametrize("impl", ["torch", "numba"])
def test_softmax_is_safe_for_large_scores(impl):
    out = segment_softmax(torch.tensor([[1e4], [1e4], [-1e4]]), torch.tensor([0, 3]), impl=impl)
    torch.testing.assert_close(out, torch.tensor([[0.5], [0.5], [0.0]]))


def test_threads_do_not_change_a_bit():
    offsets = lengths_to_offsets(torch.randint(0, 9, (5000,)))
    values = torch.randn(int(offsets[-1]), 8)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([op(values, offsets, impl="numba") for op in OPS])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_wrong_shapes_are_refused(op):
    with pytest.raises(ValueError, match=r"floating point \[L, D\]"):
        op(torch.zeros(3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"floating point \[L, D\]"):
        op(torch.zeros(3, 1, dtype=torch.int64), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"offsets must be \[B \+ 1\] int64"):
        op(torch.zeros(3, 1), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("name", ["segment_sum", "segment_softmax"])
def test_ops_are_nodes_of_torch_compile(name):
    values, offsets = torch.randn(5, 2, requires_grad=True), torch.tensor([0, 2, 2, 5])
    torch.library.opcheck(getattr(torch.ops.recis, name).default, (values, offsets))
