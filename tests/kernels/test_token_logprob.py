"""Log-probabilities of tokens without their logits: against the float64 reference, forward and gradients; by hand."""

import math
from typing import Any

import pytest
import torch

from recis_kernels import checks, logit_blocks
from recis_kernels.token_logprob import TokenStats, token_logprob, token_stats

IMPLS = ["torch", "triton"]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # bf16 rounds gradients, and d_weight once more per block


def _inputs(num_tokens: int, vocab: int, width: int, dtype: torch.dtype = torch.float32):
    hidden, weight = torch.randn(num_tokens, width).to(dtype), torch.randn(vocab, width).to(dtype)
    return hidden, weight, torch.randn(vocab).to(dtype), torch.randint(0, vocab, (num_tokens,))


def _values_and_grads(inputs, **options) -> tuple[TokenStats, list[torch.Tensor]]:
    """Return the statistics and the gradients of a random mix of logprob and logsumexp."""
    hidden, weight, bias, targets = inputs
    leaves = [leaf.detach().requires_grad_() for leaf in (hidden, weight, bias)]
    stats = token_stats(leaves[0], leaves[1], targets, bias=leaves[2], with_entropy=True, **options)
    torch.manual_seed(3)
    mix = torch.randn(2, hidden.shape[0])
    (stats.logprob * mix[0] + stats.logsumexp * mix[1]).sum().backward()
    return stats, [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 4 tokens and slices of 8 words, so that small inputs cross their borders."""
    monkeypatch.setattr(logit_blocks, "CPU_TOKENS", 4)
    monkeypatch.setattr(logit_blocks, "VOCAB_SLICE", 8)
    monkeypatch.setattr(logit_blocks, "MIN_TOKENS", 1)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"softcap": 2.5, "temperature": 1.5}], ids=str)
@pytest.mark.parametrize("sizes", [(0, 5, 3), (1, 1, 1), (9, 65, 7), (3, 4200, 3)], ids=str)
def test_matches_reference(impl, dtype, options, sizes):
    num_tokens, vocab, width = sizes
    inputs = _inputs(num_tokens, vocab, width, dtype)
    inputs[3][1:2] = -100
    stats, grads = _values_and_grads(inputs, impl=impl, **options)
    want_stats, want_grads = _values_and_grads(inputs, impl="reference", **options)
    assert len(grads) == 3
    for got, want in zip(stats, want_stats, strict=True):
        assert got is not None
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)  # sums are in fp32 for bf16 too
    for got, want in zip(grads, want_grads, strict=True):
        assert got.dtype == dtype
        scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_by_hand(impl):
    """Logits log 1, log 2, log 5 for hidden 1; at temperature 1/2 twice that: p = 1/30, 4/30, 25/30."""
    hidden = torch.tensor([[1.0], [1.0], [0.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [2.0], [5.0]]).log()
    targets = torch.tensor([2, 0, 1])
    stats = token_stats(hidden, weight, targets, with_entropy=True, impl=impl)
    torch.testing.assert_close(stats.logprob, torch.tensor([5 / 8, 1 / 8, 1 / 3]).log())
    torch.testing.assert_close(stats.logsumexp, torch.tensor([8.0, 8.0, 3.0]).log())
    entropy = math.log(8) - (2 * math.log(2) + 5 * math.log(5)) / 8
    torch.testing.assert_close(stats.entropy, torch.tensor([entropy, entropy, math.log(3)]))
    sharp = token_logprob(hidden, weight, targets, temperature=0.5, impl=impl)
    torch.testing.assert_close(sharp, torch.tensor([25 / 30, 1 / 30, 1 / 3]).log())
    sharp[1].backward()
    # d logprob / d hidden = (w[0] - sum p w) / temperature
    slope = -2 * (4 * math.log(2) + 25 * math.log(5)) / 30
    torch.testing.assert_close(hidden.grad, torch.tensor([[0.0], [slope], [0.0]]))


@pytest.mark.parametrize("impl", IMPLS)
def test_extreme_entropy(impl):
    """One certain word has entropy 0; a masked word (bias -inf) adds none; equal words have log V."""
    hidden, weight = torch.tensor([[1.0], [0.0]]), torch.zeros(5000, 1)
    weight[4321] = 200.0
    bias = torch.zeros(5000)
    bias[:4200] = -torch.inf
    stats = token_stats(hidden, weight, torch.tensor([4321, 4999]), bias=bias, with_entropy=True, impl=impl)
    torch.testing.assert_close(stats.entropy, torch.tensor([0.0, math.log(800)]))
    torch.testing.assert_close(stats.logprob, torch.tensor([0.0, -math.log(800)]))


@pytest.mark.parametrize("impl", IMPLS)
def test_entropy_of_logits_that_grow_from_tile_to_tile(impl):
    """9,000 words of log-odds 0, 1 and 2 by thirds: every tile of the vocabulary raises the maximum."""
    weight = torch.arange(3.0).repeat_interleave(3000)[:, None]
    stats = token_stats(torch.ones(1, 1), weight, torch.tensor([0]), with_entropy=True, impl=impl)
    total = 3000 * (1 + math.e + math.e**2)
    entropy = math.log(total) - 3000 * (math.e + 2 * math.e**2) / total
    torch.testing.assert_close(stats.entropy, torch.tensor([entropy]))


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_ignored_and_invalid_targets(impl):
    hidden, weight, bias, targets = _inputs(6, 9, 3)
    targets[[0, 3]] = 7
    targets[[2, 5]] = torch.tensor([-100, 9])
    stats = token_stats(hidden, weight, targets, bias=bias, ignore_index=7, with_entropy=True, impl=impl)
    assert stats.logprob.isnan().tolist() == [False, False, True, False, False, True]
    assert stats.entropy is not None
    for value in (stats.logprob, stats.logsumexp, stats.entropy):
        assert (value == 0).tolist() == [True, False, False, True, False, False]
    with checks(), pytest.raises(ValueError, match=r"targets\[2\] is -100; a target must be in \[0, 9\)"):
        token_logprob(hidden, weight, targets, bias=bias, ignore_index=7, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_all_ignored(impl):
    hidden, weight, bias, _ = _inputs(4, 9, 3)
    stats, grads = _values_and_grads((hidden, weight, bias, torch.full((4,), -100)), impl=impl)
    assert all((value == 0).all() for value in (*stats, *grads) if value is not None)


@pytest.mark.parametrize("impl", IMPLS)
def test_non_contiguous_inputs(impl):
    inputs = _inputs(9, 31, 5)
    strided = [torch.stack((one, one), 1)[:, 1] for one in inputs]
    assert not any(tensor.is_contiguous() for tensor in strided)
    torch.testing.assert_close(_values_and_grads(strided, impl=impl), _values_and_grads(inputs, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_where_it_is_wanted(impl):
    """A frozen unembedding gets none; the entropy carries none."""
    hidden, weight, _, targets = _inputs(5, 11, 3)
    hidden.requires_grad_()
    stats = token_stats(hidden, weight, targets, with_entropy=True, impl=impl)
    assert stats.entropy is not None
    assert not stats.entropy.requires_grad
    stats.logprob.sum().backward()
    want = torch.autograd.grad(token_logprob(hidden, weight, targets, impl="reference").sum(), hidden)[0]
    torch.testing.assert_close(hidden.grad, want, rtol=1e-5, atol=1e-5)
    assert weight.grad is None


def test_wrong_inputs_are_refused():
    hidden, weight, bias, targets = _inputs(5, 7, 3)
    with pytest.raises(ValueError, match="cast one"):
        token_logprob(hidden, weight.bfloat16(), targets)
    with pytest.raises(ValueError, match=r"targets must be \[T\] = \[5\] int64"):
        token_logprob(hidden, weight, targets[:, None], bias=bias)
    with pytest.raises(ValueError, match="temperature must be above 0; got -1"):
        token_logprob(hidden, weight, targets, temperature=-1)


def test_op_is_a_node_of_torch_compile():
    hidden, weight, bias, targets = _inputs(5, 11, 3)
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]
    args = (*leaves, targets, -100, 0.7, 3.0, True, True, "torch")
    torch.library.opcheck(torch.ops.recis.token_stats.default, args)
    with torch.no_grad():
        upstream, lse = torch.rand(3, 5), token_stats(hidden, weight, targets).logsumexp
    grads = (hidden.detach(), weight.detach(), None, targets, -100, 0.7, None, upstream, lse)
    torch.library.opcheck(torch.ops.recis.token_stats_grad.default, (*grads, [True, True, False], True, "torch"))

    def run(hidden, weight, bias):
        return token_logprob(hidden, weight, targets, bias=bias, temperature=0.7).square().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want = [run(*leaves), *torch.autograd.grad(run(*leaves), leaves)]
    got = [compiled(*leaves), *torch.autograd.grad(compiled(*leaves), leaves)]
    torch.testing.assert_close(got, want)


def launches() -> None:
    """Call every Triton kernel in each of its forms (see compile_kernels.py)."""
    for vocab in (300, 5000):
        for dtype in TOLERANCE:
            hidden, weight, bias, targets = _inputs(2, vocab, 4, dtype)
            hidden.requires_grad_()
            variants: list[dict[str, Any]] = [{}, {"bias": bias}, {"softcap": 3.0}, {"bias": bias, "softcap": 3.0}]
            for options in variants:
                token_stats(
                    hidden, weight, targets, with_entropy=True, impl="triton", **options
                ).logprob.sum().backward()
