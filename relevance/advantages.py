"""Advantages of rollouts within their group: how much better a completion is than the others of its prompt.

    A = (r - mean) / (std + eps)        over the G rollouts of a prompt

A group without spread gets exactly 0. NaN rewards are left out of mean and std and get 0. All functions keep the dtype of
their input (fp32 or fp64) and none looks at a group in Python. Source: GRPO, arXiv:2402.03300; population std and the clamp
at 2, DyKnow-RAG arXiv:2510.11122; ddof 1 and eps 1e-4 are what TRL does; eps 1e-6 and the exact 0 are ours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

MIN_SPREAD = 1e-8
"""Largest max - min of a group that counts as no spread."""


def group_zscore(rewards: Tensor, *, ddof: int = 0, eps: float = 1e-6) -> Tensor:
    """Return the advantages [Q, G] of rewards [Q, G].

    Args:
        rewards: NaN = unscorable.
        ddof: 0 divides the squared deviations by the number of scored rollouts, 1 by one less.
        eps: added to the std.

    Raises:
        ValueError: not [Q, G] floats, an infinite reward, or ddof other than 0 and 1.
    """
    _check(rewards, ddof)
    return _zscore(rewards, rewards, ddof=ddof, eps=eps)


def _zscore(rewards: Tensor, baseline: Tensor, *, ddof: int, eps: float) -> Tensor:
    """Standardise rewards [Q, G] by mean and std of baseline [Q, N]."""
    mean, std = moments(baseline, ddof=ddof)
    advantages = (rewards - mean[:, None]) / (std[:, None] + eps)
    return advantages.masked_fill(rewards.isnan() | is_flat(baseline)[:, None], 0.0)


def moments(rewards: Tensor, *, ddof: int = 0) -> tuple[Tensor, Tensor]:
    """Return mean and std [Q] of the scored rewards of each group; 0 where too few are scored."""
    is_scored = ~rewards.isnan()
    count = is_scored.sum(1)
    known = rewards.nan_to_num(0.0)
    mean = known.sum(1) / count.clamp(min=1)
    deviation = (known - mean[:, None]).masked_fill(~is_scored, 0.0)
    return mean, (deviation.square().sum(1) / (count - ddof).clamp(min=1)).sqrt()


def is_flat(rewards: Tensor) -> Tensor:
    """Return [Q] bool: the scored rewards of the group are equal, or fewer than two are scored.

    A group of one has nothing to be compared with: it is flat.
    """
    high = rewards.nan_to_num(-torch.inf).amax(1)
    low = rewards.nan_to_num(torch.inf).amin(1)
    return ~(high - low > MIN_SPREAD)


def clamp(advantages: Tensor, limit: float | None) -> Tensor:
    """Return the advantages within [-limit, limit]; None leaves them.

    The sum over a group is then no longer 0 when a share below .2 or above .8 of it is right: a bias the papers accept.
    """
    if limit is None:
        return advantages
    if not limit > 0:
        raise ValueError(f"the clamp of advantages must be positive; got {limit}")
    return advantages.clamp(-limit, limit)


def spread(advantages: Tensor, step_ids: Tensor) -> Tensor:
    """Give each token [B, C] the advantage of its step, from advantages [B, K]; 0 on padding (-1).

    Raises:
        ValueError: batch sizes differ, or a step id reaches K.
    """
    if advantages.ndim != 2 or step_ids.ndim != 2 or len(advantages) != len(step_ids):
        raise ValueError(
            f"need advantages [B, K] and step_ids [B, C]; got {tuple(advantages.shape)} and {tuple(step_ids.shape)}"
        )
    num_steps = advantages.shape[1]
    if step_ids.numel() and not -1 <= int(step_ids.amin()) <= int(step_ids.amax()) < num_steps:
        raise ValueError(
            f"step ids must lie in -1..{num_steps - 1}; got {int(step_ids.amin())}..{int(step_ids.amax())}"
        )
    return advantages.gather(1, step_ids.clamp(min=0)).masked_fill(step_ids < 0, 0.0)


def spread_label_rationale(
    advantages: Tensor, step_ids: Tensor, *, label_weight: float = 1.0, rationale_weight: float = 1.0
) -> Tensor:
    """Give each token [B, C] its rollout's advantage [B] times the weight of label or rationale; 0 on padding.

    An outcome reward tells the rationale of an answer-first completion nothing, so its weight can be lowered (ours). The
    weights stand in the advantage, not in a mask: under per-sequence averages a mask changes the denominator too.
    """
    weights = advantages.new_tensor([label_weight, rationale_weight])
    weight = torch.where(step_ids == 0, weights[0], weights[1])
    return (advantages[:, None] * weight).masked_fill(step_ids < 0, 0.0)


def sum_then_normalize(rewards: Tensor, weights: Sequence[float], *, ddof: int = 0, eps: float = 1e-6) -> Tensor:
    """Return the advantages [Q, G] of the weighted sum of several rewards [Q, G, F].

    A NaN of one reward leaves out that reward for the rollout; a rollout without any reward is unscorable. Rewards that sum
    alike are not told apart: w = (.5, .25, .25) maps (1, 0, 0) and (0, 1, 1) both to .5.
    """
    weighted = rewards * _weights(rewards, weights)
    total = weighted.nan_to_num(0.0).sum(2).masked_fill(rewards.isnan().all(2), torch.nan)
    return group_zscore(total, ddof=ddof, eps=eps)


def normalize_then_sum(rewards: Tensor, weights: Sequence[float], *, ddof: int = 0, eps: float = 1e-6) -> Tensor:
    """Return the weighted sum [Q, G] of the advantages of several rewards [Q, G, F], standardised one by one."""
    num_groups, group_size, num_rewards = rewards.shape
    apart = rewards.permute(0, 2, 1).reshape(num_groups * num_rewards, group_size)
    advantages = group_zscore(apart, ddof=ddof, eps=eps).view(num_groups, num_rewards, group_size).permute(0, 2, 1)
    return (advantages * _weights(rewards, weights)).sum(2)


def two_baselines(rewards: Tensor, is_guided: Tensor, *, ddof: int = 0, eps: float = 1e-6) -> Tensor:
    """Return advantages [Q, G] in which guided and plain rollouts are each compared with their own kind only.

    For comparison: where guided rollouts are all right and plain ones all wrong both kinds are flat, and replay teaches
    nothing. The recipe shares one baseline, which is plain `group_zscore`.

    Args:
        rewards: [Q, G]; NaN = unscorable.
        is_guided: [Q, G] bool.
    """
    _check(rewards, ddof)
    total = torch.zeros_like(rewards)
    for kind in (is_guided, ~is_guided):
        total = total + group_zscore(rewards.masked_fill(~kind, torch.nan), ddof=ddof, eps=eps)
    return total


def _weights(rewards: Tensor, weights: Sequence[float]) -> Tensor:
    if rewards.ndim != 3 or rewards.shape[2] != len(weights):
        raise ValueError(f"need rewards [Q, G, {len(weights)}], one per weight; got {tuple(rewards.shape)}")
    return torch.as_tensor(weights, dtype=rewards.dtype, device=rewards.device)


def _check(rewards: Tensor, ddof: int) -> None:
    if rewards.ndim != 2 or not rewards.is_floating_point() or rewards.shape[1] < 1:
        raise ValueError(f"rewards must be [Q, G] floats, G >= 1; got {tuple(rewards.shape)} {rewards.dtype}")
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1; got {ddof}")
    if bool(rewards.isinf().any()):
        raise ValueError("rewards must be finite, or NaN for what cannot be scored; one is infinite")
