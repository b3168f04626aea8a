"""Two groups of rollouts of one query, without (0) and with (1) its chunk, and what one teaches the other.

    A_g,i = (R_g,i - mu_g) / s_g           within group g
    At_i  = (R_0,i - mu*) / s*             no-chunk rollouts against all 2n
    gap   = acc_1 - acc_0                  of the query, or of the batch
    beta  = 4 sigmoid(4 gap),  alpha = 0.1 / beta
    T_i   = alpha At_i if At_i > 0 else beta At_i
    lx    = mean_i mean_t pi(o0_i,t | p', o0_i,<t) T_i       the probability itself: no ratio, no clip, no log

T weighs the no-chunk rollouts under the prompt with the chunk: a large alpha teaches to ignore the chunk, a large beta not to
answer from memory when the chunk is there. The printed gate is not neutral: at gap 0 beta is 40 alpha. Source: DyKnow-RAG
arXiv:2510.11122, as printed; population std, eps outside the root and `centered_gate` are ours.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from relevance.advantages import clamp, group_zscore, is_flat, moments

Gate = Callable[[Tensor], tuple[Tensor, Tensor]]
"""gap [Q] -> (alpha [Q], beta [Q])."""
NEUTRAL = 0.1**0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoGroups:
    """Advantages of Q queries with n rollouts in each group."""

    without: Tensor
    """A_0 [Q, n], clamped."""
    with_chunk: Tensor
    """A_1 [Q, n], clamped."""
    transfer: Tensor
    """T [Q, n] of the no-chunk rollouts, clamped only where asked."""
    gap: Tensor
    """[Q], accuracy with the chunk less accuracy without; the batch's mean where so asked."""
    alpha: Tensor
    beta: Tensor
    is_dead: Tensor
    """[Q] bool: all 2n returns are equal, so nothing is learned. Groups that differ only from each other are alive."""


def printed_gate(gap: Tensor, *, gain: float = 4.0, product: float = 0.1) -> tuple[Tensor, Tensor]:
    """Return alpha and beta of the paper: beta = 4 sigmoid(gain * gap), alpha = product / beta."""
    beta = 4.0 * torch.sigmoid(gain * gap)
    return product / beta, beta


def centered_gate(gap: Tensor) -> tuple[Tensor, Tensor]:
    """Return a gate that is neutral at gap 0 (ours): alpha = sqrt(.1) exp(-2 gap), beta = sqrt(.1) exp(2 gap)."""
    return NEUTRAL * torch.exp(-2.0 * gap), NEUTRAL * torch.exp(2.0 * gap)


def fixed_gate(gap: Tensor, *, alpha: float = 2.0, beta: float = 0.05) -> tuple[Tensor, Tensor]:
    """Return constant alpha and beta: the paper's ablation."""
    return torch.full_like(gap, alpha), torch.full_like(gap, beta)


def two_group_advantages(
    without: Tensor,
    with_chunk: Tensor,
    *,
    correct_without: Tensor | None = None,
    correct_with: Tensor | None = None,
    gate: Gate = printed_gate,
    is_gap_of_batch: bool = False,
    mean_over_ranks: Callable[[Tensor], Tensor] | None = None,
    limit: float | None = 2.0,
    transfer_limit: float | None = None,
    ddof: int = 0,
    eps: float = 1e-6,
) -> TwoGroups:
    """Return the advantages of both groups and the weights of the transfer term.

    Args:
        without: [Q, n] returns of the rollouts under the prompt without the chunk; NaN = unscorable.
        with_chunk: [Q, n] returns under the prompt with it.
        correct_without, correct_with: [Q, n] 0 or 1 that the accuracies count; None takes the returns themselves.
        gate: alpha and beta of the gap.
        is_gap_of_batch: one gap for all queries, the mean of theirs: the text has both.
        mean_over_ranks: of the batch's gap, where the batch lies on several ranks with Q queries each.
        limit: clamp of A_0 and A_1.
        transfer_limit: clamp of T; the paper has none.
        ddof, eps: as in `group_zscore`.

    Raises:
        ValueError: shapes differ (both groups have n rollouts), or what `group_zscore` refuses.
    """
    if without.shape != with_chunk.shape:
        raise ValueError(
            f"both groups must have n rollouts, [Q, n]; got {tuple(without.shape)} and {tuple(with_chunk.shape)}"
        )
    union = torch.cat([without, with_chunk], dim=1)
    joint = group_zscore(union, ddof=ddof, eps=eps)[:, : without.shape[1]]
    accuracy_without = moments(without if correct_without is None else correct_without.to(without.dtype))[0]
    accuracy_with = moments(with_chunk if correct_with is None else correct_with.to(without.dtype))[0]
    gap = accuracy_with - accuracy_without
    if is_gap_of_batch:
        mean = gap.mean()
        gap = (mean if mean_over_ranks is None else mean_over_ranks(mean)).expand_as(gap)
    alpha, beta = gate(gap)
    transfer = torch.where(joint > 0, alpha[:, None] * joint, beta[:, None] * joint)
    return TwoGroups(
        without=clamp(group_zscore(without, ddof=ddof, eps=eps), limit),
        with_chunk=clamp(group_zscore(with_chunk, ddof=ddof, eps=eps), limit),
        transfer=clamp(transfer, transfer_limit),
        gap=gap,
        alpha=alpha,
        beta=beta,
        is_dead=is_flat(union),
    )


def transfer_term(logps: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """Return the sum over rows of T_i times the mean probability of the row's tokens, a scalar to be maximised.

    lx is this sum divided by the number of no-chunk rows; the caller knows that number over all micro-batches.

    Args:
        logps: [B, C] log-probs of the no-chunk completions under the prompt with the chunk, aligned by completion offset.
        mask: [B, C], 1 for tokens of the completion.
        weights: [B] T_i; a row with weight 0 takes no part.

    The gradient goes into logps: d/d logp = T pi / length. A row without tokens adds 0.
    """
    kept = mask.to(logps.dtype)
    probability = torch.exp(logps.masked_fill(kept == 0, 0.0)) * kept
    return (weights * (probability.sum(1) / kept.sum(1).clamp(min=1))).sum()
