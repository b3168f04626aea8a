"""Cross-entropy of a linear layer over a vocabulary, from hidden states: never [T, V] in memory.

    x[t, v] = cap(hidden[t] . weight[v] + bias[v]) / temperature          cap(z) = z, or softcap * tanh(z / softcap)
    log p[t, v] = x[t, v] - log sum_u exp x[t, u]
    loss[t] = -token_weights[t] * ((1 - label_smoothing) log p[t, targets[t]] + label_smoothing * mean_v log p[t, v])
    sum:  sum_t loss[t]          mean:  sum_t loss[t] / sum of token_weights[t] over tokens that are not ignored

Equal to F.cross_entropy(F.linear(...)) with sums in fp32 also for bf16 input. For sum and mean the gradients are made
while the logits are at hand and only scaled in backward: three matrix products of T * V * H in all, as the plain version.
For none the upstream gradient of each token is not known before backward, which makes the logits again: four products.
Memory: one block of logits (see logit_blocks.py) and the gradients; the plain version holds three times [T, V].
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from recis_kernels.dispatch import Impl
from recis_kernels.logit_blocks import check_inputs, gradients_in_blocks, labels_of
from recis_kernels.logit_rows import Head
from recis_kernels.token_logprob import fake_gradients, reference_stats, stats_grad_op, stats_op

Reduction = Literal["mean", "sum", "none"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    token_weights: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Return the loss, float32: a scalar, or [T] for reduction="none", 0 where the target is ignore_index.

    Differentiable in hidden, weight, bias and token_weights, once: second derivatives raise. The mean over no counted
    token is NaN with zero gradients, as torch's. A target outside [0, V) that is not ignore_index makes its loss and the
    gradients NaN; nothing is read for it. On the CPU ignored tokens cost nothing; on a GPU they cost their products.

    Args:
        hidden: [T, H] float32 or bfloat16.
        weight: [V, H], the unembedding, dtype of hidden.
        targets: [T] int64.
        bias: [V], dtype of hidden.
        reduction: "mean" divides by the sum of the weights of counted tokens (their number without token_weights).
        label_smoothing: in [0, 1]; share of the target's probability that is spread evenly over V.
        token_weights: [T] float32.
        temperature: logits are divided by it.
        softcap: logits z become softcap * tanh(z / softcap) before that.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; reduction is unknown; label_smoothing is outside [0, 1];
            temperature or softcap is not above 0; inside `checks()`, a target outside [0, V) (one host sync).
        RuntimeError: backward with create_graph=True through mean or sum.
    """
    check_inputs(hidden, weight, targets, bias, temperature, softcap)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none'; got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1]; got {label_smoothing}")
    if token_weights is not None and (token_weights.shape != targets.shape or token_weights.dtype != torch.float32):
        raise ValueError(
            f"token_weights must be [T] = [{targets.shape[0]}] float32; "
            f"got {tuple(token_weights.shape)} {token_weights.dtype}"
        )
    counted = targets != ignore_index
    weights = torch.where(counted, 1.0 if token_weights is None else token_weights, 0.0)
    inputs = (hidden, weight, bias, targets, ignore_index, temperature, softcap)
    if reduction == "none":
        return (weights * _losses(inputs, label_smoothing, impl)).float()
    if reduction == "mean":
        weights = weights / torch.where(counted.any(), weights.sum(), 1.0)
    wants = [torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in (hidden, weight, bias)]
    if impl == "reference" or not any(wants):
        total = (weights * _losses(inputs, label_smoothing, impl)).sum()
    else:
        total = _sum_op(*inputs, weights, label_smoothing, wants, impl)[0]
    if reduction == "mean":
        total = total + torch.where(counted.any(), 0.0, torch.nan)
    return total.float()


def _losses(inputs: tuple, label_smoothing: float, impl: Impl) -> Tensor:
    """Return each token's loss without its weight, [T]."""
    if impl == "reference":  # float64, all logits at once
        logprob, _, mean_logprob, _ = reference_stats(*inputs)
    else:
        logprob, _, mean_logprob, _ = stats_op(*inputs, label_smoothing > 0, False, impl)
    return _mix(logprob, mean_logprob, label_smoothing)


def _mix(logprob: Tensor, mean_logprob: Tensor, label_smoothing: float) -> Tensor:
    if label_smoothing == 0:  # 0 times the mean would be NaN where a word has probability 0
        return -logprob
    return (label_smoothing - 1) * logprob - label_smoothing * mean_logprob


# ---- torch and Triton, mean and sum: the loss and its gradients from the same logits; a node of torch.compile and export


@torch.library.custom_op("recis::linear_cross_entropy", mutates_args=())
def _sum_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    token_weights: Tensor,
    label_smoothing: float,
    wants: Sequence[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the weighted sum of the losses, the losses [T] without weights, and the sum's gradients."""
    head = Head(weight, bias, temperature, softcap)
    labels = labels_of(targets, weight.shape[0], ignore_index)
    stats = torch.zeros(4, hidden.shape[0], dtype=torch.float32, device=hidden.device)
    upstream = _upstream(token_weights, label_smoothing)
    grads = gradients_in_blocks(
        hidden, labels, head, upstream, wants=wants, with_mean=label_smoothing > 0, impl=impl, stats=stats
    )
    losses = _mix(stats[0], stats[2], label_smoothing)
    return (token_weights * losses).sum(), losses, grads.hidden, grads.weight, grads.bias


def _upstream(token_weights: Tensor, label_smoothing: float) -> Tensor:
    """Return the gradient of the sum for logprob, lse and mean_logprob, [3, T]."""
    return torch.stack(
        ((label_smoothing - 1) * token_weights, torch.zeros_like(token_weights), -label_smoothing * token_weights)
    )


@_sum_op.register_fake
def _(hidden, weight, bias, targets, ignore_index, temperature, softcap, token_weights, label_smoothing, wants, impl):
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    return losses.new_empty(()), losses, *fake_gradients(hidden, weight, wants)


def _setup(ctx, inputs, output) -> None:
    hidden, weight, bias, targets, ignore_index, temperature, softcap, token_weights, smoothing, wants, impl = inputs
    ctx.save_for_backward(hidden, weight, bias, targets, token_weights, output[1])
    ctx.numbers = (ignore_index, temperature, softcap)
    ctx.smoothing, ctx.wants, ctx.impl = smoothing, wants, impl
    ctx.grads = [grad.detach() for grad in output[2:]]
    ctx.set_materialize_grads(False)  # nobody takes gradients of gradients: no zeros of their size


def _backward(ctx, of_total, *_):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_cross_entropy has no second derivatives: leave create_graph off, or use impl='reference'"
        )
    hidden, weight, bias, targets, token_weights, losses = ctx.saved_tensors
    grads, ctx.grads = ctx.grads, None
    if grads is None:  # a second backward through the same graph: the first one gave the gradients away
        upstream = _upstream(token_weights, ctx.smoothing)
        grads = stats_grad_op(
            hidden, weight, bias, targets, *ctx.numbers, upstream, None, ctx.wants, ctx.smoothing > 0, ctx.impl
        )
    # in place: a second weight gradient would be the largest tensor here; graphs that are being traced take a product
    scaled = (grad.mul_(of_total) if type(grad) is Tensor else grad * of_total for grad in grads)
    given = (grad if wanted else None for grad, wanted in zip(scaled, ctx.wants, strict=True))
    return *given, None, None, None, None, of_total * losses, None, None, None


_sum_op.register_autograd(_backward, setup_context=_setup)
