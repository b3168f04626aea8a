"""Loss of an unembedding without its logits: against the float64 reference, forward and gradients; memory; by hand."""

import math
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recis_kernels import checks, logit_blocks, token_logprob
from recis_kernels import linear_cross_entropy as module
from recis_kernels.linear_cross_entropy import linear_cross_entropy
from recis_kernels.logit_blocks import tokens_per_block

IMPLS = ["torch", "triton"]
REDUCTIONS = ["mean", "sum", "none"]
# the fp32 sums run over H, V and T; bf16 rounds gradients, and d_weight once more per block
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def _inputs(num_tokens: int, vocab: int, width: int, dtype: torch.dtype = torch.float32):
    hidden = torch.randn(num_tokens, width).to(dtype)
    weight = torch.randn(vocab, width).to(dtype)
    bias = torch.randn(vocab).to(dtype)
    return hidden, weight, bias, torch.randint(0, vocab, (num_tokens,))


def _value_and_grads(inputs, **options) -> list[torch.Tensor]:
    hidden, weight, bias, targets = inputs
    leaves = [leaf.detach().requires_grad_() for leaf in (hidden, weight, bias) if leaf is not None]
    token_weights = options.pop("token_weights", None)
    if token_weights is not None:
        token_weights = token_weights.clone().requires_grad_()
        leaves.append(token_weights)
    given_bias = None if bias is None else leaves[2]
    loss = linear_cross_entropy(leaves[0], leaves[1], targets, bias=given_bias, token_weights=token_weights, **options)
    torch.manual_seed(3)
    loss.backward(torch.randn(loss.shape))
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def _assert_like_reference(inputs, impl: str, **options) -> None:
    got = _value_and_grads(inputs, impl=impl, **options)
    want = _value_and_grads(inputs, impl="reference", **options)
    assert got[0].dtype == torch.float32
    tolerance = TOLERANCE[inputs[0].dtype]
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        scale = max(1.0, theirs.abs().max().item()) if theirs.numel() and theirs.isfinite().all() else 1.0
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 4 tokens and slices of 8 words, so that small inputs cross their borders."""
    monkeypatch.setattr(logit_blocks, "CPU_TOKENS", 4)
    monkeypatch.setattr(logit_blocks, "VOCAB_SLICE", 8)
    monkeypatch.setattr(logit_blocks, "MIN_TOKENS", 1)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 7, 3), (5, 2, 1), (9, 65, 7), (13, 33, 64)], ids=str)
def test_matches_reference(impl, reduction, dtype, sizes):
    num_tokens, vocab, width = sizes
    _assert_like_reference(_inputs(num_tokens, vocab, width, dtype), impl, reduction=reduction)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1},
        {"label_smoothing": 1.0},
        {"temperature": 0.7},
        {"softcap": 2.0},
        {"softcap": 3.0, "temperature": 1.7, "label_smoothing": 0.2},
        {"token_weights": torch.tensor([0.5, 2.0, 0.0, 1.0, -1.0, 3.0, 1.0])},
        {"token_weights": torch.arange(7.0), "label_smoothing": 0.3},
    ],
    ids=str,
)
def test_options_match_reference(impl, reduction, options):
    hidden, weight, bias, targets = _inputs(7, 19, 5)
    targets[[1, 4]] = -100
    _assert_like_reference((hidden, weight, bias, targets), impl, reduction=reduction, **options)
    _assert_like_reference((hidden, weight, None, targets), impl, reduction=reduction, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_many_tiles(impl, dtype):
    """A vocabulary of several tiles and slices whose last one is part full."""
    _assert_like_reference(_inputs(3, 8193 + 17, 3, dtype), impl, label_smoothing=0.1)
    _assert_like_reference(_inputs(3, 8193 + 17, 3, dtype), impl, reduction="none")


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_plain_torch(impl, reduction):
    hidden, weight, bias, targets = _inputs(11, 23, 6)
    targets[3] = 9
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]

    def run(loss) -> list[torch.Tensor]:
        torch.manual_seed(5)
        return [loss.detach(), *torch.autograd.grad(loss, leaves, torch.randn(loss.shape))]

    options = {"reduction": reduction, "ignore_index": 9, "label_smoothing": 0.1}
    want = run(F.cross_entropy(F.linear(hidden, weight, bias), targets, **options))
    got = run(linear_cross_entropy(hidden, weight, targets, bias=bias, impl=impl, **options))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_by_hand(impl):
    """Logits log 1, log 2, log 5, so p = 1/8, 1/4, 5/8; targets 2 and 0; the second token weighs 3."""
    hidden, targets = torch.tensor([[1.0], [1.0]], requires_grad=True), torch.tensor([2, 0])
    weight = torch.tensor([[1.0], [2.0], [5.0]]).log().requires_grad_()
    run = partial(linear_cross_entropy, hidden, weight, targets, token_weights=torch.tensor([1.0, 3.0]), impl=impl)
    first, second = math.log(8 / 5), 3 * math.log(8)
    torch.testing.assert_close(run(reduction="none"), torch.tensor([first, second]))
    torch.testing.assert_close(run(reduction="sum"), torch.tensor(first + second))
    loss = run()
    torch.testing.assert_close(loss, torch.tensor((first + second) / 4))
    loss.backward()
    # d x = weight / 4 * (p - 1 at the target): (1, 2, -3) / 32 and 3 (-7, 2, 5) / 32, hidden is 1
    torch.testing.assert_close(weight.grad, torch.tensor([[-20.0], [8.0], [12.0]]) / 32)
    slopes = [(2 * math.log(2) - 3 * math.log(5)) / 32, 3 * (2 * math.log(2) + 5 * math.log(5)) / 32]
    torch.testing.assert_close(hidden.grad, torch.tensor(slopes)[:, None])
    # smoothing 0.3: 0.7 of the target and 0.1 of each word; -mean log p = (log 8 + log 4 + log 1.6) / 3
    even = (math.log(8) + math.log(4) + math.log(1.6)) / 3
    want = torch.tensor([0.7 * first + 0.3 * even, 0.7 * second + 0.9 * even])
    torch.testing.assert_close(run(reduction="none", label_smoothing=0.3), want)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("num_tokens", [0, 5])
def test_nothing_counted(impl, reduction, num_tokens):
    """No token, or all ignored: gradients are zeros; the mean of nothing is NaN, as torch's."""
    hidden, weight, bias, _ = _inputs(num_tokens, 9, 4)
    targets = torch.full((num_tokens,), -100)
    loss, *grads = _value_and_grads((hidden, weight, bias, targets), impl=impl, reduction=reduction)
    if reduction == "mean":
        assert loss.isnan()
    else:
        assert loss.shape == ((num_tokens,) if reduction == "none" else ())
        assert (loss == 0).all()
    for grad, leaf in zip(grads, (hidden, weight, bias), strict=True):
        assert grad.shape == leaf.shape
        assert (grad == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_non_contiguous_inputs(impl, reduction):
    hidden, weight, bias, targets = _inputs(9, 31, 5)
    strided = (
        hidden.t().contiguous().t(),
        torch.stack((weight, weight), 1)[:, 0],
        torch.stack((bias, bias), 1)[:, 1],
        torch.stack((targets, targets), 1)[:, 0],
    )
    assert not any(tensor.is_contiguous() for tensor in strided)
    got = _value_and_grads(strided, impl=impl, reduction=reduction, label_smoothing=0.1)
    want = _value_and_grads((hidden, weight, bias, targets), impl=impl, reduction=reduction, label_smoothing=0.1)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", IMPLS)
def test_only_wanted_gradients(impl):
    hidden, weight, bias, targets = _inputs(5, 11, 3)
    want = _value_and_grads((hidden, weight, bias, targets), impl=impl)
    for number, leaf in enumerate((hidden, weight, bias)):
        leaf.requires_grad_()
        linear_cross_entropy(hidden, weight, targets, bias=bias, impl=impl).backward()
        leaf.requires_grad_(False)
        assert leaf.grad is not None
        assert (leaf.grad / want[number + 1]).std() < 1e-4  # equal up to the upstream factor
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, bias=bias, impl=impl), want[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice(impl, reduction):
    """The gradients made in forward are given away once; a second backward makes them again."""
    hidden, weight, _, targets = _inputs(6, 13, 4)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction, label_smoothing=0.1, impl=impl)
    upstream = torch.rand(loss.shape)
    first = [grad.clone() for grad in torch.autograd.grad(loss, leaves, upstream, retain_graph=True)]
    second = torch.autograd.grad(loss, leaves, 2 * upstream, retain_graph=True)
    third = torch.autograd.grad(loss, leaves, upstream)
    torch.testing.assert_close([2 * grad for grad in first], list(second))
    torch.testing.assert_close(first, list(third))


def test_second_derivatives_are_refused():
    hidden, weight, _, targets = _inputs(6, 13, 4)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    loss = linear_cross_entropy(hidden, weight, targets, reduction="sum")
    (grad,) = torch.autograd.grad(loss, hidden)
    assert not grad.requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits_and_masked_words(impl):
    """Logits of 100, whose exp no fp32 holds, are safe; words with bias -inf get probability 0, also a whole tile of them."""
    hidden, weight, bias, targets = _inputs(3, 9000, 2)
    targets %= 100
    bias[200:] = -torch.inf
    bias[:100] += 100
    _assert_like_reference((hidden, weight, bias, targets), impl, reduction="none")
    bias.fill_(-torch.inf)[8500:] = 0.0
    _assert_like_reference((hidden, weight, bias, targets + 8500), impl, reduction="mean")


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("bad", [-1, 7, -(2**62), 2**62])
def test_target_outside_the_vocabulary(impl, bad):
    hidden, weight, bias, targets = _inputs(5, 7, 3)
    targets[2] = bad
    losses = linear_cross_entropy(hidden, weight, targets, bias=bias, reduction="none", impl=impl)
    assert losses.isnan().tolist() == [False, False, True, False, False]
    loss, d_hidden, *_ = _value_and_grads((hidden, weight, bias, targets), impl=impl, reduction="sum")
    assert loss.isnan()
    assert d_hidden.isnan().any(1).tolist() == [False, False, True, False, False]
    with checks(), pytest.raises(ValueError, match=rf"targets\[2\] is {bad}; a target must be in \[0, 7\)"):
        linear_cross_entropy(hidden, weight, targets, bias=bias, impl=impl)


def test_wrong_inputs_are_refused():
    hidden, weight, bias, targets = _inputs(5, 7, 3)
    bad = [
        ((hidden[None], weight, targets), {}, "flatten batch"),
        ((hidden, weight[:, :2], targets), {}, r"hidden must be \[T, H\]"),
        ((hidden, weight[:0], targets), {}, "V > 0"),
        ((hidden.bfloat16(), weight, targets), {}, "cast one"),
        ((hidden.double(), weight.double(), targets), {}, "both be float32"),
        ((hidden, weight, targets[:4]), {}, r"targets must be \[T\]"),
        ((hidden, weight, targets.int()), {}, "int64"),
        ((hidden, weight, targets), {"bias": torch.zeros(6)}, r"bias must be \[V\]"),
        ((hidden, weight, targets.to("meta")), {}, "one device"),
        ((hidden, weight, targets), {"temperature": 0.0}, "temperature must be above 0"),
        ((hidden, weight, targets), {"softcap": math.nan}, "softcap must be above 0"),
        ((hidden, weight, targets), {"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\]"),
        ((hidden, weight, targets), {"reduction": "batchmean"}, "reduction must be"),
        ((hidden, weight, targets), {"token_weights": torch.ones(4)}, r"token_weights must be \[T\]"),
    ]
    for args, options, message in bad:
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*args, **{"bias": bias} | options)


class _LargestAllocation(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation returns, inside our ops too."""

    inside: ClassVar = {
        torch.ops.recis.linear_cross_entropy.default: module._sum_op._init_fn,
        torch.ops.recis.token_stats.default: token_logprob.stats_op._init_fn,
        torch.ops.recis.token_stats_grad.default: token_logprob.stats_grad_op._init_fn,
    }
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.inside:
            with self:
                return self.inside[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.nbytes)
        return out


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_logits_of_all_tokens_never_exist(impl, reduction, dtype, monkeypatch):
    monkeypatch.setattr(logit_blocks, "CPU_TOKENS", 16)
    monkeypatch.setattr(logit_blocks, "MIN_TOKENS", 1)
    num_tokens, vocab, width = 160, 40, 3
    hidden, weight, bias, targets = _inputs(num_tokens, vocab, width, dtype)
    targets[5] = -100
    for leaf in (hidden, weight, bias):
        leaf.requires_grad_()
    mode = _LargestAllocation()
    with mode:
        loss = linear_cross_entropy(
            hidden, weight, targets, bias=bias, softcap=5.0, label_smoothing=0.1, reduction=reduction, impl=impl
        )
        loss.sum().backward()
    most_tokens = 20 if dtype == torch.bfloat16 else 16  # an eighth of the tokens in bf16
    assert mode.largest == 4 * most_tokens * vocab
    plain = _LargestAllocation()
    with plain:
        F.cross_entropy(F.linear(hidden, weight), targets).backward()
    assert plain.largest == num_tokens * vocab * hidden.element_size()  # the mode sees what it should


def test_blocks_are_bounded():
    for on_cuda, most in ((False, 512), (True, 1024)):
        assert tokens_per_block(4096, 32768, on_cuda=on_cuda, rounded=False) == most
        assert tokens_per_block(4096, 32768, on_cuda=on_cuda, rounded=True) == most
        assert tokens_per_block(1 << 14, 32768, on_cuda=on_cuda, rounded=True) == 2048
        assert tokens_per_block(4096, 1 << 40, on_cuda=on_cuda, rounded=False) == 1
    assert tokens_per_block(4096, 150_000, on_cuda=False, rounded=False) == 223
    assert tokens_per_block(200, 32768, on_cuda=False, rounded=False) == 100
    assert tokens_per_block(20, 32768, on_cuda=False, rounded=False) == 64


def test_op_is_a_node_of_torch_compile():
    hidden, weight, bias, targets = _inputs(5, 11, 3)
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]
    token_weights = torch.rand(5, requires_grad=True)
    args = (*leaves, targets, -100, 1.0, None, token_weights, 0.1, [True, True, True], "torch")
    torch.library.opcheck(torch.ops.recis.linear_cross_entropy.default, args)
    for reduction in REDUCTIONS:

        def loss(hidden, weight, bias, reduction: Any = reduction):
            out = linear_cross_entropy(hidden, weight, targets, bias=bias, reduction=reduction, label_smoothing=0.1)
            return (out * torch.arange(1.0, 1.0 + out.numel())).sum()

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        want = [loss(*leaves), *torch.autograd.grad(loss(*leaves), leaves)]
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
                for smoothing in (0.0, 0.1):
                    linear_cross_entropy(
                        hidden, weight, targets, label_smoothing=smoothing, impl="triton", **options
                    ).backward()
