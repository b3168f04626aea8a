"""Factors of weighted sums and means (A21), with their gradients against autograd in float64."""

import pytest
import torch

from recis_kernels.bag_factors import bag_factors
from recis_kernels.dispatch import Impl


def offsets_of(lengths):
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int64).cumsum(0)])


def factors_of(offsets, weights, mean, *, impl: Impl = "auto"):
    """Return bag_factors that must not be None."""
    factors = bag_factors(offsets, weights, mean, impl=impl)
    assert factors is not None
    return factors


def test_mean_factors_by_hand():
    """A21: values 10, 20 with weights 1, 3 average to 17.5; unit weights to 15; an empty bag and a zero sum give 0."""
    offsets = torch.tensor([0, 2, 2, 4])
    weights = torch.tensor([1.0, 3.0, 2.0, -2.0])
    assert factors_of(offsets, weights, True, impl="triton").tolist() == [0.25, 0.75, 0.0, 0.0]
    assert factors_of(offsets, weights, True).tolist() == [0.25, 0.75, 0.0, 0.0]
    assert factors_of(offsets, None, True).tolist() == [0.5, 0.5, 0.5, 0.5]
    assert bag_factors(offsets, None, False) is None
    assert torch.equal(factors_of(offsets, weights, False), weights)


def test_features_choose_their_pooling():
    offsets = torch.tensor([0, 2, 3, 5, 5])  # two features of two samples
    factors = factors_of(offsets, torch.tensor([1.0, 3.0, 5.0, 2.0, 2.0]), torch.tensor([False, True]))
    assert factors.tolist() == [1.0, 3.0, 5.0, 0.5, 0.5]
    assert factors_of(offsets, None, torch.tensor([False, True])).tolist() == [1.0, 1.0, 1.0, 0.5, 0.5]


@pytest.mark.parametrize("mean", [False, True, torch.tensor([True, False])], ids=str)
@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("impl", ["triton", "numba", "torch"])
def test_gradients_match_autograd(impl, mean, extra):
    offsets = offsets_of([3, 0, 1, 5])
    weights = (torch.rand(9 + extra) + 0.1).double().requires_grad_()
    bag = torch.arange(4).repeat_interleave(offsets.diff())
    sums = torch.zeros(4, dtype=torch.float64).index_add(0, bag, weights[:9])
    flags = torch.as_tensor(mean).reshape(-1).repeat_interleave(4 // torch.as_tensor(mean).numel())
    scale = torch.where(flags[bag], 1 / sums[bag], 1.0)
    pull = torch.randn(9 + extra, dtype=torch.float64)
    want = torch.autograd.grad((weights[:9] * scale * pull[:9]).sum() + (weights[9:] * pull[9:]).sum(), weights)[0]
    mine = weights.detach().float().requires_grad_()
    got = factors_of(offsets, mine, mean, impl=impl)
    torch.testing.assert_close(got[:9].double(), (weights[:9] * scale).detach(), rtol=1e-6, atol=0)
    (got * pull.float()).sum().backward()
    assert mine.grad is not None
    torch.testing.assert_close(mine.grad.double(), want, rtol=1e-5, atol=1e-6)


def test_zero_sum_has_zero_gradient():
    weights = torch.tensor([1.0, -1.0], requires_grad=True)
    for impl in ("triton", "numba", "torch"):
        weights.grad = None
        factors_of(torch.tensor([0, 2]), weights, True, impl=impl).sum().backward()
        assert weights.grad is not None
        assert weights.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("impl", ["triton", "numba", "torch"])
@pytest.mark.parametrize("first", [0, 2])
def test_versions_match_the_reference(impl, first):
    offsets = offsets_of([3, 0, 40, 1, 2, 5]) + first
    weights = torch.randn(int(offsets[-1]) + 4)
    for mean in (True, torch.tensor([True, False]), torch.tensor([False, True, False])):
        want = factors_of(offsets, weights, mean, impl="reference")
        got = factors_of(offsets, weights, mean, impl=impl)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        if impl == "triton":
            assert torch.equal(got, factors_of(offsets, weights, mean, impl="numba"))


def test_threads_change_nothing():
    offsets = offsets_of(torch.randint(0, 5, (20_000,)).tolist())
    weights = torch.rand(int(offsets[-1]))
    before = torch.get_num_threads()
    results = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        results.append(factors_of(offsets, weights, True))
    torch.set_num_threads(before)
    assert torch.equal(*results)


def test_gradients_of_the_loops_are_equal_bit_for_bit():
    """Strided weights and gradients, one long bag, means of two of three features."""
    offsets, mean = offsets_of([3, 0, 70, 1, 2, 5]), torch.tensor([True, False, True])
    grads = []
    for impl in ("numba", "triton"):
        weights = torch.linspace(-1, 2, 162).view(81, 2)[:, 0].detach().requires_grad_()
        factors_of(offsets, weights, mean, impl=impl).backward(torch.linspace(3, -1, 162)[::2])
        grads.append(weights.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("impl", ["triton", "numba"])
def test_op_is_known_to_torch(impl):
    weights, offsets, mean = torch.rand(6, requires_grad=True), torch.tensor([0, 2, 6]), torch.tensor([True])
    torch.library.opcheck(torch.ops.recis.bag_factors.default, (weights, offsets, mean, impl))

    def run(values):
        return factors_of(offsets, values * 2, True, impl=impl)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weights), run(weights))


@pytest.mark.parametrize("impl", ["triton", "numba", "torch"])
def test_no_bags_in_any_version(impl):
    assert factors_of(torch.tensor([0]), torch.ones(2), True, impl=impl).tolist() == [1.0, 1.0]
    assert factors_of(torch.tensor([0]), torch.ones(0), torch.zeros(0, dtype=torch.bool), impl=impl).shape == (0,)
    given = bag_factors(torch.tensor([0, 2]), None, True, num_positions=3, impl=impl)
    assert given is not None
    assert given.tolist() == [0.5, 0.5, 1.0]


def test_no_bags():
    assert factors_of(torch.tensor([0]), torch.ones(2), True).tolist() == [1.0, 1.0]
    assert factors_of(torch.tensor([0, 0]), None, True).shape == (0,)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="offsets must be"):
        bag_factors(torch.zeros(0, dtype=torch.int64), None, True)
    with pytest.raises(ValueError, match="mean must be"):
        bag_factors(torch.tensor([0, 3]), None, torch.tensor([True, False]))
    with pytest.raises(ValueError, match="mean must be"):
        bag_factors(torch.tensor([0, 3]), None, torch.zeros(0, dtype=torch.bool))
    with pytest.raises(ValueError, match="weights must be"):
        bag_factors(torch.tensor([0, 3]), torch.zeros(3, dtype=torch.int64), True)


def launches() -> None:
    weights = torch.ones(6, requires_grad=True)
    factors_of(torch.tensor([0, 2, 6]), weights, True, impl="triton").sum().backward()
