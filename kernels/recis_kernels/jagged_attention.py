"""Softmax attention over variable-length sequences, without padding.

    out[i, h] = sum over keys j of i's sequence of softmax_j(scale * q[i, h] . k[j, h] + bias) * v[j, h]

Sequence b holds the rows offsets[b]:offsets[b + 1]. Queries and keys may be jagged by offsets of their own (cross
attention); the last query of a sequence then stands at its last key. A query without a key to see gets zeros. The biases,
by position and by time, are those of attention_inputs.py.

Scores exist a tile at a time: memory is that of the rows, plus the log of each row's sum, from which the backward pass
makes the weights again. Work is about 2 (Dk + Dv) flops per pair and head forward, 2.5 times that backward, over the pairs
that exist; the bytes are those of the rows once per tile of queries. Sums are in fp32 (fp64 for fp64 rows, CPU only).
"""

import torch
from torch import Tensor

from recis_kernels import attention_cpu, attention_triton
from recis_kernels.attention_inputs import (
    AttentionInputs,
    TimeBias,
    check_contents_if_asked,
    check_offsets,
    check_position_table,
    check_rows,
    check_time,
    grads_like,
    reference_scores,
)
from recis_kernels.dispatch import Impl, choose


def jagged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    *,
    key_offsets: Tensor | None = None,
    causal: bool = False,
    position_bias: Tensor | None = None,
    time: TimeBias | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Return the attention of each query over its sequence, [Lq, H, Dv] in the dtype of query.

    Differentiable in query, key, value, position_bias and time.table; gradients do not depend on the order of threads.

    Args:
        query: [Lq, H, Dk] float32, bfloat16 or float64 (CPU only); D up to 256.
        key, value: [Lk, H, Dk] and [Lk, H, Dv].
        offsets: [B + 1] int64, rows of each sequence; of the queries alone where key_offsets is given.
        key_offsets: [B + 1] int64, rows of each sequence's keys; None takes offsets.
        causal: a query sees the keys up to its own position only.
        position_bias: [H, 2 M - 1]; entry M - 1 + (position of query - position of key), clipped to the table.
        time: a bias per bucket of the time between query and key.
        scale: of the products; None takes 1 / sqrt(Dk).

    Raises:
        ValueError: a shape, dtype or device does not fit; on the CPU or inside recis_kernels.checks() also where offsets
            do not ascend from 0 to the number of rows, or boundaries do not ascend.
    """
    key_offsets = offsets if key_offsets is None else key_offsets
    check_rows(query, key, value)
    check_offsets(offsets, "offsets", query)
    check_offsets(key_offsets, "key_offsets", query)
    if key_offsets.numel() != offsets.numel():
        raise ValueError(
            f"key_offsets must be [{offsets.numel()}] as offsets is, one sequence of keys per sequence of queries; "
            f"got [{key_offsets.numel()}]"
        )
    table = check_position_table(position_bias, query)
    times = check_time(time, query, key)
    factor = query.shape[2] ** -0.5 if scale is None else float(scale)
    if impl == "reference":
        inputs = _inputs(query, key, value, offsets, key_offsets, table, *times, causal, factor)
        check_contents_if_asked(inputs)
        return _reference(inputs)
    return _op(query, key, value, offsets, key_offsets, table, *times, causal, factor, impl)[0]


def _inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    position_table: Tensor | None,
    time_table: Tensor | None,
    boundaries: Tensor | None,
    query_times: Tensor | None,
    key_times: Tensor | None,
    causal: bool,
    scale: float,
) -> AttentionInputs:
    return AttentionInputs(
        query=query,
        key=key,
        value=value,
        query_offsets=query_offsets,
        key_offsets=key_offsets,
        position_table=position_table,
        time_table=time_table,
        boundaries=boundaries,
        query_times=query_times,
        key_times=key_times,
        num_targets=None,
        causal=causal,
        scale=scale,
        divisor=0,
    )


# ---- reference: float64, one sequence at a time, torch's own gradients


def _reference(inputs: AttentionInputs) -> Tensor:
    outs = [inputs.value[:0].double()]
    for scores, pairs, value in reference_scores(inputs):
        sees = pairs.any(1)[:, None]
        weights = torch.where(pairs | ~sees, scores, -torch.inf).softmax(2) * sees  # a row without a key would be NaN
        outs.append((weights @ value).transpose(0, 1))
    return torch.cat(outs).to(inputs.query.dtype)


# ---- CPU


def _cpu(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    return attention_cpu.forward(inputs, _weigh, -torch.inf)


def _cpu_grad(inputs: AttentionInputs, out: Tensor, log_sum: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    return attention_cpu.backward(inputs, _pull, -torch.inf, out, log_sum, grad)


def _weigh(scores: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    top = scores.amax(3, keepdim=True)
    top.masked_fill_(top == -torch.inf, 0)  # a row without a key: its weights become exp(-inf) = 0
    weights = scores.sub_(top).exp_()
    total = weights.sum(3, keepdim=True)
    log_sum = total.log().add_(top)
    return weights, total.masked_fill_(total == 0, 1), log_sum


def _pull(
    scores: Tensor, grad_weights: Tensor, log_sum: Tensor | None, weighted: Tensor | None, _: Tensor
) -> tuple[Tensor, Tensor]:
    assert log_sum is not None
    assert weighted is not None
    weights = scores.sub_(log_sum.masked_fill(log_sum == -torch.inf, 0)).exp_()
    return weights, grad_weights.sub_(weighted).mul_(weights)


# ---- Triton


def _triton(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    return attention_triton.forward(inputs, softmax=True)


def _triton_grad(inputs: AttentionInputs, out: Tensor, log_sum: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    return attention_triton.backward(inputs, True, out, log_sum, grad)


# ---- nodes of torch.compile and export


@torch.library.custom_op("recis::jagged_attention", mutates_args=())
def _op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    key_offsets: Tensor,
    position_bias: Tensor | None,
    time_table: Tensor | None,
    boundaries: Tensor | None,
    query_times: Tensor | None,
    key_times: Tensor | None,
    causal: bool,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Return (out, log of the sum of exp(scores) of each row [Lq, H])."""
    inputs = _inputs(
        *(query, key, value, offsets, key_offsets),
        *(position_bias, time_table, boundaries, query_times, key_times),
        *(causal, scale),
    )
    check_contents_if_asked(inputs)
    return choose(impl, query, triton=_triton, numba=_cpu)(inputs)  # type: ignore[arg-type]


@torch.library.custom_op("recis::jagged_attention_grad", mutates_args=())
def _grad_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    key_offsets: Tensor,
    position_bias: Tensor | None,
    time_table: Tensor | None,
    boundaries: Tensor | None,
    query_times: Tensor | None,
    key_times: Tensor | None,
    causal: bool,
    scale: float,
    impl: str,
    out: Tensor,
    log_sum: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value, position_bias and time_table; empty where there is no table."""
    inputs = _inputs(
        *(query, key, value, offsets, key_offsets),
        *(position_bias, time_table, boundaries, query_times, key_times),
        *(causal, scale),
    )
    return choose(impl, query, triton=_triton_grad, numba=_cpu_grad)(inputs, out, log_sum, grad)  # type: ignore[arg-type]


@_op.register_fake
def _(query, key, value, *rest):
    num_queries, num_heads, _ = query.shape
    out = query.new_empty(num_queries, num_heads, value.shape[2])
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return out, query.new_empty(num_queries, num_heads, dtype=wide)


@_grad_op.register_fake
def _(query, key, value, offsets, key_offsets, position_bias, time_table, *rest):
    return grads_like(query, key, value, position_bias, time_table)


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.causal, ctx.scale, ctx.impl = inputs
    out, log_sum = output
    ctx.mark_non_differentiable(log_sum)
    ctx.save_for_backward(*tensors, out, log_sum)


def _backward(ctx, grad, _):
    tensors = ctx.saved_tensors
    *rows, position_grad, time_grad = _grad_op(*tensors[:-2], ctx.causal, ctx.scale, ctx.impl, *tensors[-2:], grad)
    position_grad = None if tensors[5] is None else position_grad
    time_grad = None if tensors[6] is None else time_grad
    return *rows, None, None, position_grad, time_grad, *[None] * 6


_op.register_autograd(_backward, setup_context=_setup)
