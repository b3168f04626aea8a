"""Reductions per bag: against the float64 reference, forward and gradient; and once by hand."""

from functools import partial
from itertools import product

import pytest
import torch

from recis_kernels.dispatch import Impl
from recis_kernels.jagged import lengths_to_offsets
from recis_kernels.segment import segment_max, segment_mean, segment_softmax, segment_sum

OPS = [segment_sum, segment_mean, segment_max, segment_softmax]
IMPLS: list[Impl] = ["torch", "numba", "triton"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}  # bf16 rounds the result once, at 2**-8


def _value_and_grad(op, values: torch.Tensor, upstream_seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = values.clone().requires_grad_()
    out = op(leaf)
    torch.manual_seed(upstream_seed)
    out.backward(torch.randn(out.shape).to(out.dtype))
    assert leaf.grad is not None
    return out.detach(), leaf.grad


CASES = [
    *product(["torch", "numba"], [[], [4], [0, 3, 0], [1, 100, 7]], [1, 63, 256]),
    *product(["triton"], [[], [4], [0, 3, 0], [1, 17, 7]], [1, 63, 130]),  # the interpreter takes its time
    ("triton", [1, 100, 7], 3),
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("impl", "lengths", "dim"), CASES, ids=str)
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


@pytest.mark.parametrize("impl", IMPLS)
def test_max_edges(impl):
    offsets = torch.tensor([0, 3, 3, 5])
    values = torch.tensor([[2.0], [5.0], [5.0], [-1.0], [torch.nan]])
    out, grad = _value_and_grad(lambda v: segment_max(v, offsets, impl=impl).sum()[None], values)
    assert out.isnan().all()
    assert (grad != 0).flatten().tolist() == [False, True, False, False, True]  # first of equals; NaN wins
    assert segment_max(torch.tensor([[-torch.inf]]), torch.tensor([0, 1]), impl=impl).tolist() == [[-torch.inf]]


@pytest.mark.parametrize("impl", IMPLS)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [1, 65])
def test_sums_are_left_folds_with_the_same_bits(dim, dtype):
    torch.manual_seed(9)
    lengths = torch.tensor([0, 1, 2, 3, 4, 5, 9, 10, 0, 90, 6, 6, 6])
    offsets = lengths_to_offsets(lengths)
    values = (torch.randn(int(offsets[-1]), dim) * 1e3).to(dtype)
    shares, upstream = segment_softmax(values, offsets), torch.randn(values.shape).to(dtype)
    calls = [
        lambda impl: segment_sum(values, offsets, impl=impl),
        lambda impl: segment_mean(values, offsets, impl=impl),
        lambda impl: torch.ops.recis.segment_softmax_grad(shares, upstream, offsets, impl),
    ]
    for call in calls:
        assert torch.equal(call("numba"), call("triton"))
    wide = values.double() if dtype == torch.float64 else values.float()
    total = wide.new_zeros(dim)
    for row in wide[offsets[9] : offsets[10]]:
        total = total + row
    assert torch.equal(calls[0]("triton")[9], total.to(dtype))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("impl", IMPLS)
def test_values_and_offsets_apart(op, impl):
    offsets = torch.stack([torch.tensor([0, 2, 2, 7, 20])] * 2, 1)[:, 1]
    values = torch.randn(40, 14)[::2, 1::2]
    got = _value_and_grad(partial(op, offsets=offsets, impl=impl), values)
    want = _value_and_grad(partial(op, offsets=offsets, impl="reference"), values)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_sum_has_a_second_gradient(impl):
    offsets = torch.tensor([0, 2, 2, 3])
    values = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda v: segment_sum(v, offsets, impl=impl) ** 2, values)


def launches() -> None:
    offsets = torch.tensor([0, 2, 2, 5])
    for dtype in TOLERANCE:
        for dim in (1, 64):
            values = torch.zeros(5, dim, dtype=dtype)
            for op in OPS:
                op(values, offsets, impl="triton")
            torch.ops.recis.segment_softmax_grad(values, values, offsets, "triton")
            torch.ops.recis.segment_spread(values[:3], offsets, 5, "triton")
            torch.ops.recis.segment_place(values[:3], torch.zeros(3, dim, dtype=torch.int64), 5, "triton")


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_nodes_of_torch_compile(impl):
    values, offsets = torch.randn(5, 2, requires_grad=True), torch.tensor([0, 2, 2, 5])
    nodes = torch.ops.recis
    for node in (nodes.segment_sum, nodes.segment_max, nodes.segment_softmax):
        torch.library.opcheck(node.default, (values, offsets, impl))
    shares = values.detach()
    torch.library.opcheck(nodes.segment_softmax_grad.default, (shares, shares + 1, offsets, impl))
    torch.library.opcheck(nodes.segment_spread.default, (values[:3], offsets, 5, impl))
    rows = torch.tensor([[0, 1], [5, 5], [4, 2]])
    torch.library.opcheck(nodes.segment_place.default, (shares[:3], rows, 5, impl))

    def run(values):
        shares = segment_softmax(values, offsets, impl=impl)
        bags = segment_max(values, offsets, impl=impl) + segment_mean(values, offsets, impl=impl)
        return bags + segment_sum(shares * values, offsets, impl=impl)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(values), run(values))
    (got,), (want,) = (torch.autograd.grad(f(values).square().sum(), values) for f in (compiled, run))
    assert torch.equal(got, want)
