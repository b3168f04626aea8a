"""Guided replay: where a prompt's rollouts nearly all fail, sample some again under a prompt that tells part of the truth.

    fire      group accuracy <= tau                     training only, the worst groups first, a capped share of the batch
    replace   the M rollouts with the lowest rewards    ties: the lowest index
    level     1, and one more if all M fail             at most max_levels per group
    loss      policy under the plain prompt; ratio = pi(o | x) / pi_old(o | x, hint), usual clip, all completion tokens

Everything here is tensor work on the rewards of the batch and on padded completions; generating is the trainer's. Source: that
low-accuracy rollouts are found during training and get ground-truth guidance on demand, TaoSR-AGRL arXiv:2510.08048; trigger,
rows, levels, annealing and the loss are ours (public relatives: arXiv:2506.13923, arXiv:2508.13023).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from recis.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayConfig:
    """When and how much is replayed; all numbers are ours."""

    tau: float = 0.125
    """Groups with at most this accuracy fire; negative = never."""
    num_replayed: int | None = None
    """M, rollouts replaced per group; None = half the group."""
    max_guided_groups: float = 0.25
    """Largest share of the batch's groups that fire."""
    max_levels: int = 2
    """Guidance levels that a group may see in one step."""
    start_level: int = 1
    anneal_share: float = 0.3
    """Last share of the steps over which tau falls to 0."""
    shared_baseline: bool = True
    """One baseline for plain and guided rollouts; False compares each kind with itself (`two_baselines`)."""

    def __post_init__(self) -> None:
        if self.num_replayed is not None and self.num_replayed < 1:
            raise ConfigError(f"num_replayed must be at least 1, or None; got {self.num_replayed}")
        if not 0 <= self.max_guided_groups <= 1 or not 0 <= self.anneal_share <= 1:
            raise ConfigError(
                f"max_guided_groups and anneal_share lie in [0, 1]; got {self.max_guided_groups}, {self.anneal_share}"
            )
        if self.max_levels < 1 or not 1 <= self.start_level <= 3 or self.start_level + self.max_levels > 4:
            raise ConfigError(
                f"levels run from start_level to at most 3; got start_level {self.start_level}, max_levels {self.max_levels}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which rollouts are replaced."""

    groups: Tensor
    """[N] int64: the groups that fire, the least accurate first, ties by index."""
    rollouts: Tensor
    """[N, M] int64: positions within the group, the lowest reward first."""
    group_size: int

    @property
    def rows(self) -> Tensor:
        """[N * M] int64: rows of the batch [Q * G]."""
        return (self.groups[:, None] * self.group_size + self.rollouts).flatten()


def tau_at(step: int, num_steps: int, config: ReplayConfig) -> float:
    """Return tau at a step: constant, then linear to 0 over the last `anneal_share` of the steps; negative stays as it is."""
    if config.tau < 0 or config.anneal_share == 0:
        return config.tau
    left = (num_steps - step) / (config.anneal_share * num_steps) if num_steps else 0.0
    return config.tau * min(max(left, 0.0), 1.0)


def plan(
    rewards: Tensor,
    correct: Tensor,
    *,
    tau: float,
    config: ReplayConfig,
    accuracies: Tensor | None = None,
    first: int = 0,
) -> Plan:
    """Return which rollouts are sampled again.

    Args:
        rewards: [Q, G]; NaN counts as lowest.
        correct: [Q, G] bool, raw correctness; the trigger never looks at the reward.
        tau: of this step, see `tau_at`.
        config: M, and the share of groups that may fire.
        accuracies: [N * Q] of the groups of all N ranks, which share the batch and its cap; None is one rank.
        first: place of this rank's first group among them.

    Raises:
        ValueError: shapes differ, or M exceeds G.
    """
    if rewards.ndim != 2 or rewards.shape != correct.shape:
        raise ValueError(f"need rewards and correct [Q, G]; got {tuple(rewards.shape)} and {tuple(correct.shape)}")
    num_groups, group_size = rewards.shape
    num_replayed = group_size // 2 if config.num_replayed is None else config.num_replayed
    if num_replayed > group_size:
        raise ValueError(f"num_replayed {num_replayed} exceeds the group size {group_size}")
    accuracy = correct.to(torch.float64).mean(1) if accuracies is None else accuracies
    order = accuracy.argsort(stable=True)
    allowed = math.floor(config.max_guided_groups * len(accuracy)) if num_replayed else 0
    # the tolerance keeps 1 of 8 right at tau .125 whatever the rounding of an annealed tau
    groups = order[accuracy[order] <= tau + 1e-9][:allowed] if tau >= 0 else order[:0]
    groups = groups[(groups >= first) & (groups < first + num_groups)] - first
    lowest = rewards.nan_to_num(-torch.inf).argsort(dim=1, stable=True)
    return Plan(groups=groups, rollouts=lowest[groups, :num_replayed], group_size=group_size)


def needs_next_level(correct: Tensor) -> Tensor:
    """Return [N] bool: all M guided rollouts [N, M] failed, so the group may see the next level."""
    return ~correct.bool().any(1)


def is_guided(plan: Plan, num_groups: int) -> Tensor:
    """Return [Q, G] bool: which rollouts are guided ones."""
    flags = torch.zeros(num_groups * plan.group_size, dtype=torch.bool, device=plan.groups.device)
    flags[plan.rows] = True
    return flags.view(num_groups, plan.group_size)


def overwrite_rows(old: Tensor, new: Tensor, rows: Tensor, *, pad: float, on_left: bool = False) -> Tensor:
    """Return `old` [B, C] with `new` [N, C'] in its `rows` [N], both padded to the larger width.

    Args:
        pad: what fills the added columns (pad id, 0 of a mask, 0 of log-probs).
        on_left: pad on the left, as prompts are; completions are padded on the right.

    Raises:
        ValueError: row numbers and new rows differ in number, or a row number is out of range.
    """
    if len(rows) != len(new) or (len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(old)):
        raise ValueError(f"{len(new)} new rows for {len(rows)} row numbers, which must lie in 0..{len(old) - 1}")
    width = max(old.shape[1], new.shape[1])
    out = _padded(old, width, pad, on_left).clone()
    out[rows] = _padded(new, width, pad, on_left).to(out.dtype)
    return out


def _padded(table: Tensor, width: int, pad: float, on_left: bool) -> Tensor:
    missing = width - table.shape[1]
    return torch.nn.functional.pad(table, (missing, 0) if on_left else (0, missing), value=pad)


def behaviour_logps(plain: Tensor, guided: Tensor, rows: Tensor) -> Tensor:
    """Return the behaviour log-probs [B, C] of a batch with guided rows, without gradient.

    Plain rows: the policy's own under the plain prompt, so their ratio is 1. Guided rows: those under the guided prompt that
    sampled them; the policy is then compared with what really sampled.

    Args:
        plain: [B, C] under the plain prompt.
        guided: [N, C'] of the guided rows, C' <= C, 0 beyond their tokens.
        rows: [N] int64.
    """
    return overwrite_rows(plain.detach(), guided.detach(), rows, pad=0.0)
