"""Pointwise attention of HSTU over variable-length sequences, without padding.

    out[i, h] = sum over keys j that i sees of silu(scale * q[i, h] . k[j, h] + bias) / N * v[j, h]

The weights are not normalised over the keys, so that how many actions a user has made stays visible; N is max_length, or
the length of the sequence. Sequence b holds the rows offsets[b]:offsets[b + 1]. The last num_targets[b] items may be
candidates to rank: they see the history and themselves, not each other. The biases are those of attention_inputs.py.

Scores exist a tile at a time and are made again in the backward pass: memory is that of the rows. Work is about
2 (Dk + Dv) flops per pair and head forward, 2.5 times that backward. Sums are in fp32 (fp64 for fp64 rows, CPU only).
Source: Zhai et al. 2024, arXiv:2402.17152, equation 2 (spatial aggregation); the clipped position table is ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from recis_kernels import attention_cpu, attention_triton
from recis_kernels.attention_inputs import (
    AttentionInputs,
    TimeBias,
    check_contents_if_asked,
    check_offsets,
    check_position_table,
    check_rows,
    check_targets,
    check_time,
    grads_like,
    reference_scores,
)
from recis_kernels.dispatch import Impl, choose


def hstu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    *,
    max_length: int = 0,
    causal: bool = True,
    num_targets: Tensor | None = None,
    position_bias: Tensor | None = None,
    time: TimeBias | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Return the attention of each item over its sequence, [L, H, Dv] in the dtype of query.

    Differentiable in query, key, value, position_bias and time.table; gradients do not depend on the order of threads.

    Args:
        query, key: [L, H, Dk] float32, bfloat16 or float64 (CPU only); D up to 256.
        value: [L, H, Dv].
        offsets: [B + 1] int64, rows of each sequence.
        max_length: N, what the weights are divided by; 0 takes the length of each sequence.
        causal: an item sees itself and those before it only.
        num_targets: [B] int64, from 0 to the length: the last items of each sequence, which do not see each other.
        position_bias: [H, 2 M - 1]; entry M - 1 + (position of query - position of key), clipped to the table.
        time: a bias per bucket of the time between query and key.
        scale: of the products; None takes 1 / sqrt(Dk).

    Raises:
        ValueError: a shape, dtype or device does not fit, or max_length is negative; on the CPU or inside
            recis_kernels.checks() also where offsets do not ascend from 0 to L, boundaries do not ascend, or a sequence
            has more targets than items.
    """
    check_rows(query, key, value)
    if query.shape[0] != key.shape[0]:
        raise ValueError(f"key must have {query.shape[0]} rows as query has; got {key.shape[0]}")
    check_offsets(offsets, "offsets", query)
    if max_length < 0:
        raise ValueError(f"max_length must be at least 0, 0 for each sequence's own length; got {max_length}")
    check_targets(num_targets, offsets)
    table = check_position_table(position_bias, query)
    times = check_time(time, query, key)
    factor = query.shape[2] ** -0.5 if scale is None else float(scale)
    if impl == "reference":
        inputs = _inputs(query, key, value, offsets, table, *times, num_targets, causal, factor, max_length)
        check_contents_if_asked(inputs)
        return _reference(inputs)
    return _op(query, key, value, offsets, table, *times, num_targets, causal, factor, max_length, impl)


def _inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    position_table: Tensor | None,
    time_table: Tensor | None,
    boundaries: Tensor | None,
    query_times: Tensor | None,
    key_times: Tensor | None,
    num_targets: Tensor | None,
    causal: bool,
    scale: float,
    max_length: int,
) -> AttentionInputs:
    return AttentionInputs(
        query=query,
        key=key,
        value=value,
        query_offsets=offsets,
        key_offsets=offsets,
        position_table=position_table,
        time_table=time_table,
        boundaries=boundaries,
        query_times=query_times,
        key_times=key_times,
        num_targets=num_targets,
        causal=causal,
        scale=scale,
        divisor=max_length,
    )


# ---- reference: float64, one sequence at a time, torch's own gradients


def _reference(inputs: AttentionInputs) -> Tensor:
    outs = [inputs.value[:0].double()]
    for scores, pairs, value in reference_scores(inputs):
        divisor = inputs.divisor if inputs.divisor > 0 else max(1, value.shape[1])
        weights = torch.where(pairs, F.silu(scores), 0.0) / divisor
        outs.append((weights @ value).transpose(0, 1))
    return torch.cat(outs).to(inputs.query.dtype)


# ---- CPU


def _cpu(inputs: AttentionInputs) -> Tensor:
    return attention_cpu.forward(inputs, _weigh, attention_cpu.MASKED)[0]


def _cpu_grad(inputs: AttentionInputs, grad: Tensor) -> tuple[Tensor, ...]:
    return attention_cpu.backward(inputs, _pull, attention_cpu.MASKED, None, None, grad)


def _weigh(scores: Tensor, divisor: Tensor) -> tuple[Tensor, Tensor, None]:
    return F.silu(scores, inplace=True), divisor, None


def _pull(
    scores: Tensor, grad_weights: Tensor, _log_sum: Tensor | None, _weighted: Tensor | None, divisor: Tensor
) -> tuple[Tensor, Tensor]:
    """silu'(s) = gate + silu(s) * (1 - gate), gate = sigmoid(s)."""
    gate = scores.sigmoid()
    weights = scores.mul_(gate)
    slopes = (gate + weights).addcmul_(weights, gate, value=-1).mul_(grad_weights)
    return weights.div_(divisor), slopes.div_(divisor)


# ---- Triton


def _triton(inputs: AttentionInputs) -> Tensor:
    return attention_triton.forward(inputs, softmax=False)[0]


def _triton_grad(inputs: AttentionInputs, grad: Tensor) -> tuple[Tensor, ...]:
    nothing = grad.new_empty(0, dtype=torch.float32)
    return attention_triton.backward(inputs, False, grad, nothing, grad)


# ---- nodes of torch.compile and export


@torch.library.custom_op("recis::hstu_attention", mutates_args=())
def _op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    position_bias: Tensor | None,
    time_table: Tensor | None,
    boundaries: Tensor | None,
    query_times: Tensor | None,
    key_times: Tensor | None,
    num_targets: Tensor | None,
    causal: bool,
    scale: float,
    max_length: int,
    impl: str,
) -> Tensor:
    inputs = _inputs(
        *(query, key, value, offsets),
        *(position_bias, time_table, boundaries, query_times, key_times),
        *(num_targets, causal, scale, max_length),
    )
    check_contents_if_asked(inputs)
    return choose(impl, query, triton=_triton, numba=_cpu)(inputs)  # type: ignore[arg-type]


@torch.library.custom_op("recis::hstu_attention_grad", mutates_args=())
def _grad_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    position_bias: Tensor | None,
    time_table: Tensor | None,
    boundaries: Tensor | None,
    query_times: Tensor | None,
    key_times: Tensor | None,
    num_targets: Tensor | None,
    causal: bool,
    scale: float,
    max_length: int,
    impl: str,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value, position_bias and time_table; empty where there is no table."""
    inputs = _inputs(
        *(query, key, value, offsets),
        *(position_bias, time_table, boundaries, query_times, key_times),
        *(num_targets, causal, scale, max_length),
    )
    return choose(impl, query, triton=_triton_grad, numba=_cpu_grad)(inputs, grad)  # type: ignore[arg-type]


@_op.register_fake
def _(query, key, value, *rest):
    return query.new_empty(query.shape[0], query.shape[1], value.shape[2])


@_grad_op.register_fake
def _(query, key, value, offsets, position_bias, time_table, *rest):
    return grads_like(query, key, value, position_bias, time_table)


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.causal, ctx.scale, ctx.max_length, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    tensors = ctx.saved_tensors
    *rows, position_grad, time_grad = _grad_op(*tensors, ctx.causal, ctx.scale, ctx.max_length, ctx.impl, grad)
    position_grad = None if tensors[4] is None else position_grad
    time_grad = None if tensors[5] is None else time_grad
    return *rows, None, position_grad, time_grad, *[None] * 8


_op.register_autograd(_backward, setup_context=_setup)
