"""Log-probability of the target token at each position, from hidden states: never [T, V] in memory.

    x[t, v] = cap(hidden[t] . weight[v] + bias[v]) / temperature          cap(z) = z, or softcap * tanh(z / softcap)
    logsumexp[t] = log sum_v exp x[t, v]
    logprob[t] = x[t, targets[t]] - logsumexp[t]
    entropy[t] = - sum_v p[t, v] log p[t, v],   p = exp(x - logsumexp)        no gradient

What trainers with a policy gradient need of policy, reference and behaviour alike. Sums are in fp32 also for bf16 input.
Forward costs one matrix product of T * V * H, backward three (the logits are made again, whatever the upstream is).
Memory is one block of logits, see logit_blocks.py. On the CPU tokens with ignore_index cost nothing; on a GPU they cost
their products, because counting them would need a host sync: select the positions first where they are few.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from recis_kernels.dispatch import Impl
from recis_kernels.logit_blocks import (
    Gradients,
    check_inputs,
    gradients_in_blocks,
    labels_of,
    stats_in_blocks,
)
from recis_kernels.logit_rows import IGNORED, INVALID, Head


class TokenStats(NamedTuple):
    """logprob and logsumexp [T] float32, with gradients; entropy [T] float32 or None, without."""

    logprob: Tensor
    logsumexp: Tensor
    entropy: Tensor | None


def token_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    impl: Impl = "auto",
) -> Tensor:
    """Return log p(targets[t] | hidden[t]), natural log, float32 [T]; 0 where the target is ignore_index.

    Differentiable in hidden, weight and bias, for any upstream gradient. A target outside [0, V) that is not
    ignore_index gets NaN, and NaN gradients; nothing is read for it.

    Args:
        hidden: [T, H] float32 or bfloat16.
        weight: [V, H], the unembedding, dtype of hidden.
        targets: [T] int64.
        bias: [V], dtype of hidden.
        temperature: logits are divided by it.
        softcap: logits z become softcap * tanh(z / softcap) before that.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; temperature or softcap is not above 0; inside `checks()`, a
            target outside [0, V) (one host sync).
    """
    options = {"bias": bias, "temperature": temperature, "softcap": softcap, "ignore_index": ignore_index, "impl": impl}
    return token_stats(hidden, weight, targets, **options).logprob


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    with_entropy: bool = False,
    impl: Impl = "auto",
) -> TokenStats:
    """Return log-probability and log-sum-exp of each token, and the entropy if asked; as token_logprob otherwise."""
    check_inputs(hidden, weight, targets, bias, temperature, softcap)
    if impl == "reference":
        logprob, lse, _, entropy = reference_stats(hidden, weight, bias, targets, ignore_index, temperature, softcap)
        return TokenStats(logprob.float(), lse.float(), entropy.detach().float() if with_entropy else None)
    logprob, lse, _, entropy = stats_op(
        hidden, weight, bias, targets, ignore_index, temperature, softcap, False, with_entropy, impl
    )
    return TokenStats(logprob, lse, entropy.detach() if with_entropy else None)


# ---- reference: float64, all logits at once, torch's own gradients


def reference_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logprob, lse, mean_logprob and entropy, float64 [T] each; mean_logprob is the mean of log p over V."""
    logits = hidden.double() @ weight.double().t()
    if bias is not None:
        logits = logits + bias.double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    lse = logits.logsumexp(1)
    logprobs = logits - lse[:, None]
    labels = labels_of(targets, weight.shape[0], ignore_index)
    picked = logprobs.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    picked = picked * torch.where(labels == INVALID, torch.nan, 1.0)
    entropy = torch.special.entr(logprobs.exp()).sum(1)
    ignored = labels == IGNORED
    stats = (torch.where(ignored, 0.0, one) for one in (picked, lse, logprobs.mean(1), entropy))
    return tuple(stats)  # type: ignore[return-value]


# ---- torch and Triton: nodes of torch.compile and export


@torch.library.custom_op("recis::token_stats", mutates_args=())
def stats_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    with_mean: bool,
    with_entropy: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logprob, lse, mean_logprob and entropy, fp32 [T] each; zeros for what is not asked."""
    head = Head(weight, bias, temperature, softcap)
    labels = labels_of(targets, weight.shape[0], ignore_index)
    stats = stats_in_blocks(hidden, labels, head, with_mean=with_mean, with_entropy=with_entropy, impl=impl)
    logprob, lse, mean, entropy = (row.clone() for row in stats)
    return logprob, lse, mean, entropy


@torch.library.custom_op("recis::token_stats_grad", mutates_args=())
def stats_grad_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    upstream: Tensor,
    lse: Tensor | None,
    wants: Sequence[bool],
    with_mean: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias from upstream [3, T] of logprob, lse and mean_logprob."""
    head = Head(weight, bias, temperature, softcap)
    labels = labels_of(targets, weight.shape[0], ignore_index)
    return gradients_in_blocks(hidden, labels, head, upstream, wants=wants, with_mean=with_mean, impl=impl, lse=lse)


@stats_op.register_fake
def _(hidden, weight, bias, targets, ignore_index, temperature, softcap, with_mean, with_entropy, impl):
    logprob, lse, mean, entropy = (hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(4))
    return logprob, lse, mean, entropy


@stats_grad_op.register_fake
def _(hidden, weight, bias, targets, ignore_index, temperature, softcap, upstream, lse, wants, with_mean, impl):
    return fake_gradients(hidden, weight, wants)


def fake_gradients(hidden: Tensor, weight: Tensor, wants: Sequence[bool]) -> Gradients:
    """Return empty gradients of the right shapes: what the ops with gradients tell torch.compile."""
    return Gradients(
        hidden.new_empty(hidden.shape if wants[0] else 0),
        weight.new_empty(weight.shape if wants[1] else 0),
        weight.new_empty(weight.shape[0] if wants[2] else 0),
    )


def _setup(ctx, inputs, output) -> None:
    hidden, weight, bias, targets, *numbers, with_mean, _, impl = inputs
    ctx.save_for_backward(hidden, weight, bias, targets, output[1])
    ctx.numbers, ctx.with_mean, ctx.impl = numbers, with_mean, impl


def _backward(ctx, of_logprob, of_lse, of_mean, of_entropy):
    hidden, weight, bias, targets, lse = ctx.saved_tensors
    wants = list(ctx.needs_input_grad[:3])
    upstream = torch.stack((of_logprob, of_lse, of_mean))
    grads = stats_grad_op(hidden, weight, bias, targets, *ctx.numbers, upstream, lse, wants, ctx.with_mean, ctx.impl)
    given = (grad if wanted else None for grad, wanted in zip(grads, wants, strict=True))
    return *given, *[None] * 7


stats_op.register_autograd(_backward, setup_context=_setup)
