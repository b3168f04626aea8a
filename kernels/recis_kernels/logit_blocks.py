"""Walk the logits of an unembedding in blocks of tokens: log-probabilities of targets, and gradients, never [T, V].

    x[t, v] = cap(hidden[t] . weight[v] + bias[v]) / temperature          cap(z) = z, or softcap * tanh(z / softcap)
    lse[t] = log sum_v exp x[t, v];   p[t, v] = exp(x[t, v] - lse[t])
    logprob[t] = x[t, y_t] - lse[t];  mean_logprob[t] = mean_v x[t, v] - lse[t];  entropy[t] = -sum_v p log p
    dx[t, v] = g_logprob[t] (1[v = y_t] - p) + g_mean[t] (1 / V - p) + g_lse[t] p

The machinery of linear_cross_entropy and token_logprob. A block of tokens has its logits in one fp32 buffer: a matrix
product fills it (torch's, so cuBLAS on a GPU), a row version turns it into statistics and then, in place, into dx, and
two products carry dx to hidden and weight. Cost: one product of T * V * H forward, three with gradients (the logits are
made again when the gradient is asked for later). Traffic per logit on a GPU: 8 bytes forward, 14 to 18 with gradients.
Memory: one block of n tokens, 4 n V bytes (bf16 on a GPU 6 n V), n as `tokens_per_block` says.

d_weight is summed over blocks in its own dtype. In bf16 every block rounds the sum once, so bf16 takes blocks of at
least T / 8 tokens: at most 8 roundings of 2**-9. The reductions have a fixed order: results do not differ from run to run.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recis_kernels.contents import is_asked
from recis_kernels.dispatch import choose
from recis_kernels.logit_rows import IGNORED, INVALID, Head, TorchRows
from recis_kernels.logit_rows_triton import TritonRows

CPU_TOKENS, CUDA_TOKENS = 512, 1024  # a product of fewer rows runs below the machine's speed
CPU_LOGITS, CUDA_LOGITS = 1 << 25, 1 << 28  # most logits of a block, unless its tokens are an eighth of all
MIN_TOKENS = 64
MOST_ROUNDINGS = 8
VOCAB_SLICE = 4096  # rows of a bf16 weight that the CPU widens at a time; its own bf16 product is four times slower


class Gradients(NamedTuple):
    """Gradients of hidden [T, H], weight [V, H] and bias [V]; an empty tensor where none was wanted."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


def check_inputs(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, softcap: float | None
) -> None:
    """Raise ValueError unless shapes, dtypes and devices fit together and the numbers are above 0."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"hidden must be [T, H] and weight [V, H] with V > 0; got {tuple(hidden.shape)} and {tuple(weight.shape)}: "
            "flatten batch and positions into T"
        )
    if hidden.dtype not in (torch.float32, torch.bfloat16) or weight.dtype != hidden.dtype:
        raise ValueError(
            f"hidden and weight must both be float32 or both bfloat16; got {hidden.dtype} and {weight.dtype}: "
            "cast one with .to(); gradients pass through the cast"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != hidden.dtype):
        raise ValueError(f"bias must be [V] = [{weight.shape[0]}] {hidden.dtype}; got {tuple(bias.shape)} {bias.dtype}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets must be [T] = [{hidden.shape[0]}] int64; got {tuple(targets.shape)} {targets.dtype}")
    if len({tensor.device for tensor in (hidden, weight, targets, bias) if tensor is not None}) > 1:
        raise ValueError(
            f"hidden, weight, targets and bias must lie on one device; got {hidden.device}, {weight.device}, "
            f"{targets.device} and {None if bias is None else bias.device}: move them together"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0; got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, or None for no cap; got {softcap}")


def tokens_per_block(num_tokens: int, vocab: int, *, on_cuda: bool, rounded: bool) -> int:
    """Return how many tokens have their logits in memory at once.

    512 on the CPU and 1,024 on a GPU, fewer when that passes the limit of logits; never more than half of all tokens
    once these are above 128.

    Args:
        rounded: each block rounds a sum, so a block has at least an eighth of the tokens.
    """
    most, logits = (CUDA_TOKENS, CUDA_LOGITS) if on_cuda else (CPU_TOKENS, CPU_LOGITS)
    tokens = max(1, min(most, logits // vocab))
    if rounded:
        tokens = max(tokens, -(-num_tokens // MOST_ROUNDINGS))
    return min(tokens, max(MIN_TOKENS, -(-num_tokens // 2)))


# ---- what the ops do


def labels_of(targets: Tensor, vocab: int, ignore_index: int) -> Tensor:
    """Return targets with ignore_index as IGNORED and others outside [0, vocab) as INVALID.

    Raises:
        ValueError: inside `checks()`: a target is INVALID.
    """
    invalid = (targets < 0) | (targets >= vocab)
    labels = torch.where(targets == ignore_index, IGNORED, torch.where(invalid, INVALID, targets))
    if is_asked() and bool((labels == INVALID).any()):
        first = int((labels == INVALID).nonzero()[0])
        raise ValueError(
            f"targets[{first}] is {int(targets[first])}; a target must be in [0, {vocab}) or be ignore_index = {ignore_index}"
        )
    return labels


def stats_in_blocks(
    hidden: Tensor, labels: Tensor, head: Head, *, with_mean: bool, with_entropy: bool, impl: str
) -> Tensor:
    """Return logprob, lse, mean_logprob and entropy, fp32 [4, T]; zeros where ignored and for what is not asked."""
    rows_of, kept = _version(hidden, labels, impl)
    if kept is not None:
        some = hidden.index_select(0, kept), labels.index_select(0, kept)
        part = stats_in_blocks(*some, head, with_mean=with_mean, with_entropy=with_entropy, impl=impl)
        return part.new_zeros(4, hidden.shape[0]).index_copy_(1, kept, part)
    stats = torch.zeros(4, hidden.shape[0], dtype=torch.float32, device=hidden.device)
    for block, logits in _blocks(hidden, head.weight, rounded=False):
        rows_of(logits, labels[block], head).stats(stats[:, block], with_mean=with_mean, with_entropy=with_entropy)
    return stats


def gradients_in_blocks(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    upstream: Tensor,
    *,
    wants: Sequence[bool],
    with_mean: bool,
    impl: str,
    lse: Tensor | None = None,
    stats: Tensor | None = None,
) -> Gradients:
    """Return the gradients of sum_t (upstream[0] logprob + upstream[1] lse + upstream[2] mean_logprob).

    Args:
        upstream: fp32 [3, T].
        wants: whether hidden, weight and bias want a gradient.
        with_mean: whether mean_logprob counts; without, upstream[2] must be zeros.
        lse: [T]; spares the row version a pass when the caller has it.
        stats: [4, T]; if given, logprob, lse and, with_mean, mean_logprob are written there from the same logits.
    """
    rows_of, kept = _version(hidden, labels, impl)
    if kept is not None:
        some = hidden.index_select(0, kept), labels.index_select(0, kept), head, upstream.index_select(1, kept)
        some_lse = None if lse is None else lse.index_select(0, kept)
        some_stats = None if stats is None else stats.index_select(1, kept)
        part = gradients_in_blocks(*some, wants=wants, with_mean=with_mean, impl=impl, lse=some_lse, stats=some_stats)
        if stats is not None and some_stats is not None:
            stats.index_copy_(1, kept, some_stats)
        if not wants[0]:
            return part
        return part._replace(hidden=part.hidden.new_zeros(hidden.shape).index_copy_(0, kept, part.hidden))
    upstream = torch.where(labels == INVALID, torch.nan, upstream)
    (num_tokens, width), vocab = hidden.shape, head.weight.shape[0]
    d_hidden = hidden.new_empty((num_tokens, width) if wants[0] else 0)
    d_weight = hidden.new_empty((vocab, width) if wants[1] else 0)
    if num_tokens == 0:
        d_weight.zero_()
    d_bias = hidden.new_zeros(vocab if wants[2] else 0, dtype=torch.float32)
    for block, logits in _blocks(hidden, head.weight, rounded=wants[1] and hidden.dtype != torch.float32):
        rows = rows_of(logits, labels[block], head, None if lse is None else lse[block])
        if stats is not None:
            rows.stats(stats[:, block], with_mean=with_mean, with_entropy=False)
        grad = rows.grad(upstream[:, block], hidden.dtype if hidden.is_cuda else torch.float32, with_mean=with_mean)
        if wants[2]:
            d_bias += grad.sum(0, dtype=torch.float32)
        if wants[0]:
            _grad_hidden_into(d_hidden[block], grad, head.weight)
        if wants[1]:
            _grad_weight_into(d_weight, grad, hidden[block], adds=block.start > 0)
        del rows, grad  # or the next block's would be made beside them
    return Gradients(d_hidden, d_weight, d_bias.to(hidden.dtype))


def _version(hidden: Tensor, labels: Tensor, impl: Any) -> tuple[Any, Tensor | None]:
    """Return the row version, and the positions of the tokens that count where finding them needs no sync: on the CPU."""
    rows_of = choose(impl, hidden, triton=TritonRows, torch=TorchRows)
    if rows_of is not TorchRows:
        return rows_of, None  # the kernels skip ignored tokens; their products are made all the same
    counted = labels != IGNORED
    return rows_of, None if bool(counted.all()) else counted.nonzero().squeeze(1)


def _blocks(hidden: Tensor, weight: Tensor, *, rounded: bool) -> Iterator[tuple[slice, Tensor]]:
    """Yield each block's slice of tokens and its products hidden . weight, fp32 [n, V], in one buffer used again."""
    num_tokens, vocab = hidden.shape[0], weight.shape[0]
    step = tokens_per_block(num_tokens, vocab, on_cuda=hidden.is_cuda, rounded=rounded)
    buffer = torch.empty(min(step, num_tokens), vocab, dtype=torch.float32, device=hidden.device)
    for start in range(0, num_tokens, step):
        block = slice(start, min(start + step, num_tokens))
        logits = buffer[: block.stop - start]
        _logits_into(logits, hidden[block], weight)
        yield block, logits


# ---- the three products; bf16 on the CPU is widened slice by slice, on a GPU the tensor cores add in fp32


def _is_wide(weight: Tensor) -> bool:
    return weight.is_cuda or weight.dtype == torch.float32


def _slices(vocab: int) -> Iterator[slice]:
    return (slice(start, min(start + VOCAB_SLICE, vocab)) for start in range(0, vocab, VOCAB_SLICE))


def _logits_into(out: Tensor, hidden: Tensor, weight: Tensor) -> None:
    if hidden.dtype == torch.float32:
        torch.mm(hidden, weight.t(), out=out)
    elif hidden.is_cuda:
        torch.ops.aten.mm.dtype_out(hidden, weight.t(), torch.float32, out=out)
    else:
        wide = hidden.float()
        for rows in _slices(weight.shape[0]):
            torch.mm(wide, weight[rows].float().t(), out=out[:, rows])


def _grad_hidden_into(out: Tensor, grad: Tensor, weight: Tensor) -> None:
    if _is_wide(weight):
        torch.mm(grad, weight, out=out)
        return
    total = grad.new_zeros(out.shape)
    for rows in _slices(weight.shape[0]):
        total.addmm_(grad[:, rows], weight[rows].float())
    out.copy_(total)


def _grad_weight_into(out: Tensor, grad: Tensor, hidden: Tensor, *, adds: bool) -> None:
    if _is_wide(out):
        if adds:
            out.addmm_(grad.t(), hidden)
        else:
            torch.mm(grad.t(), hidden, out=out)
        return
    wide = hidden.float()
    for rows in _slices(out.shape[0]):
        part = torch.mm(grad[:, rows].t(), wide)
        out[rows] = part.add_(out[rows]) if adds else part
