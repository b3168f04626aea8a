"""Advantages per reasoning step: rewards [Q, G, K] of Q groups of G rollouts with K steps.

    per_step     A_step[i, k] = (r[i, k] - mean_k) / (std_k + eps)              among the rollouts, step by step
                 A_out on the label and verdict steps, lam * crit[i, k] * A_step[i, k] on the others
    suffix_sum   all step rewards of a group standardised together; a step gets the sum of its own and all later ones
    masked       A_out, kept only on steps whose reward agrees with its sign

crit = after_error behind the first wrong step of a rollout whose label is wrong, else 1. Each variant is one function with
the same arguments, so that a recipe passes one in. Source: per_step and crit are ours, after TaoSR-SHE arXiv:2510.07972 (which
states stepwise rewards and priority for critical steps); suffix_sum is the process supervision of DeepSeekMath
arXiv:2402.03300; masked is ours.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from relevance.advantages import clamp, group_zscore, moments

StepAdvantages = Callable[..., Tensor]
"""(rewards [Q, G, K], outcome [Q, G], config) -> advantages [Q, G, K]; `per_step`, `suffix_sum` or `masked`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAdvantageConfig:
    """Knobs of the step advantages; the numbers are ours."""

    lam: float = 0.5
    """Weight of the steps other than label and verdict."""
    after_error: float = 0.5
    """Weight of steps behind the first wrong one of a rollout with a wrong label."""
    outcome_steps: tuple[int, ...] = (0, -1)
    """Steps that get the outcome's advantage: the label, and the verdict at the end."""
    ddof: int = 0
    eps: float = 1e-6
    limit: float | None = 2.0
    """Clamp of the outcome and step z-scores; None leaves them."""


def per_step(rewards: Tensor, outcome: Tensor, config: StepAdvantageConfig) -> Tensor:
    """Return the advantages [Q, G, K]; with K = 1 they are the outcome's, bit for bit.

    Args:
        rewards: [Q, G, K] in {0, 1, NaN}; column 0 is the label's.
        outcome: [Q, G] reward of the whole completion.
        config: see its fields.
    """
    num_groups, group_size, num_steps = _check(rewards, outcome)
    whole = clamp(group_zscore(outcome, ddof=config.ddof, eps=config.eps), config.limit)
    steps = clamp(step_zscore(rewards, ddof=config.ddof, eps=config.eps), config.limit)
    advantages = config.lam * critical(rewards, after_error=config.after_error) * steps
    is_outcome = torch.zeros(num_steps, dtype=torch.bool, device=rewards.device)
    is_outcome[[step for step in config.outcome_steps if -num_steps <= step < num_steps]] = True
    return torch.where(is_outcome, whole[:, :, None].expand(num_groups, group_size, num_steps), advantages)


def step_zscore(rewards: Tensor, *, ddof: int = 0, eps: float = 1e-6) -> Tensor:
    """Return the z-scores [Q, G, K] of each step among the rollouts of its group; 0 for NaN and for unanimous steps."""
    num_groups, group_size, num_steps = rewards.shape
    apart = rewards.permute(0, 2, 1).reshape(num_groups * num_steps, group_size)
    return group_zscore(apart, ddof=ddof, eps=eps).view(num_groups, num_steps, group_size).permute(0, 2, 1)


def critical(rewards: Tensor, *, after_error: float) -> Tensor:
    """Return the weights [Q, G, K]: after_error behind the first wrong step of a rollout whose label is wrong, else 1.

    The label (step 0) is no reasoning step: an error is looked for from step 1 on.
    """
    is_error = rewards == 0
    is_error = torch.cat([torch.zeros_like(is_error[..., :1]), is_error[..., 1:]], dim=-1)
    errors = is_error.cumsum(-1)
    is_behind = errors - is_error.to(errors.dtype) > 0
    is_wrong = (rewards[..., :1] == 0).expand_as(is_behind)
    return torch.where(is_wrong & is_behind, rewards.new_tensor(after_error), rewards.new_tensor(1.0))


def suffix_sum(rewards: Tensor, outcome: Tensor, config: StepAdvantageConfig) -> Tensor:
    """Return the advantages [Q, G, K]: sums of a rollout's own and later standardised step rewards.

    They grow with the number of steps that remain, and a right step before a wrong one is punished with it.
    """
    num_groups, group_size, num_steps = _check(rewards, outcome)
    flat = rewards.reshape(num_groups, group_size * num_steps)
    together = group_zscore(flat, ddof=config.ddof, eps=config.eps).view_as(rewards)
    return together.flip(-1).cumsum(-1).flip(-1)


def masked(rewards: Tensor, outcome: Tensor, config: StepAdvantageConfig) -> Tensor:
    """Return the advantages [Q, G, K]: the outcome's on right steps where it is positive, on wrong ones where negative.

    A step without a verdict gets 0.
    """
    _check(rewards, outcome)
    whole = clamp(group_zscore(outcome, ddof=config.ddof, eps=config.eps), config.limit)[:, :, None]
    agrees = ((rewards == 1) & (whole > 0)) | ((rewards == 0) & (whole < 0))
    return torch.where(agrees, whole, torch.zeros_like(rewards))


def share_unanimous(rewards: Tensor) -> Tensor:
    """Return, per step [K], the share of groups in which all verdicts of the step are equal: such steps teach nothing.

    Groups with fewer than two verdicts count as unanimous.
    """
    num_groups, group_size, num_steps = rewards.shape
    apart = rewards.permute(0, 2, 1).reshape(num_groups * num_steps, group_size)
    return (moments(apart)[1] == 0).view(num_groups, num_steps).to(rewards.dtype).mean(0)


def _check(rewards: Tensor, outcome: Tensor) -> tuple[int, int, int]:
    if rewards.ndim != 3 or outcome.shape != rewards.shape[:2] or rewards.shape[2] < 1:
        raise ValueError(
            f"need rewards [Q, G, K] and outcome [Q, G]; got {tuple(rewards.shape)} and {tuple(outcome.shape)}"
        )
    num_groups, group_size, num_steps = rewards.shape
    return num_groups, group_size, num_steps
