"""What the recipes of reinforcement learning differ in: reward, advantages, which groups are dead, one prompt or two.

    Method(reward=outcome_reward(), signal=group_signal(signal_config(config.rl)))
    signal(graded, step_ids, progress) -> Signal(advantages [B] or [B, C], transfer [B] or None, numbers to log)

A trainer generates, grades and then asks its method; everything here is tensor work on one rank's rows, whose groups are
whole. Source: see the modules that hold the formulas: advantages, step_advantages, two_groups, rewards, replay.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from relevance.advantages import clamp, group_zscore, spread, spread_label_rationale, two_baselines
from relevance.config import RlConfig
from relevance.curriculum import STAGES, Stage, stage_at
from relevance.data import Pair
from relevance.labels import Parsed, Profile
from relevance.replay import ReplayConfig
from relevance.reward_calls import RewardFunction, call_reward
from relevance.rewards import RewardConfig, Rewards, is_correct, outcome, shaped, step_rewards
from relevance.sampling import MIXED, AccuracyRange, keep_difficulty, keep_two_groups
from relevance.step_advantages import StepAdvantageConfig, StepAdvantages, per_step, share_unanimous
from relevance.tally import Highest, Mean, Number, mean_of
from relevance.two_groups import Gate, TwoGroups, printed_gate, two_group_advantages
from relevance.verify import StepVerifier


@dataclass(frozen=True, slots=True, kw_only=True)
class Graded:
    """The rollouts of a generation batch of one rank: B rows, groups of G side by side."""

    pairs: tuple[Pair, ...]
    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    parsed: tuple[Parsed, ...]
    rewards: Rewards
    group_size: int
    is_guided: Tensor
    """[B] bool: sampled under a prompt with guidance."""

    def grouped(self, values: Tensor) -> Tensor:
        """Return [B] as [Q, G]."""
        return values.view(-1, self.group_size)

    def with_rows(self, rows: Sequence[int], other: "Graded") -> "Graded":
        """Return a copy in which `rows` are the rows of `other`, in order."""
        if len(rows) != len(other.pairs):
            raise ValueError(f"{len(other.pairs)} graded rows for {len(rows)} row numbers")

        def put(own: Sequence[Any], new: Sequence[Any]) -> tuple[Any, ...]:
            values = list(own)
            for row, value in zip(rows, new, strict=True):
                values[row] = value
            return tuple(values)

        place = torch.as_tensor(rows, dtype=torch.int64)
        mine, theirs = self.rewards, other.rewards
        rewards = Rewards(
            total=mine.total.index_copy(0, place, theirs.total),
            parts={name: part.index_copy(0, place, theirs.parts[name]) for name, part in mine.parts.items()},
            correct=mine.correct.index_copy(0, place, theirs.correct),
        )
        return Graded(
            pairs=put(self.pairs, other.pairs),
            texts=put(self.texts, other.texts),
            ids=put(self.ids, other.ids),
            parsed=put(self.parsed, other.parsed),
            rewards=rewards,
            group_size=self.group_size,
            is_guided=self.is_guided.index_copy(0, place, other.is_guided),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands."""

    step: int
    num_steps: int
    mean_over_ranks: Callable[[Tensor], Tensor] = field(default=lambda value: value)
    """0-d tensor -> its mean over all ranks, which ask together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """What a batch teaches."""

    advantages: Tensor
    """[B], or [B, C] with 0 on padding."""
    transfer: Tensor | None = None
    """[B], weights of the transfer term; 0 where a row takes no part. None: there is no such term."""
    numbers: Mapping[str, Number] = field(default_factory=dict)
    """For the log, of this rank."""

    def is_silent(self, group_size: int) -> Tensor:
        """Return [Q] bool: groups in which nothing pushes the policy anywhere."""
        moves = self.advantages.reshape(len(self.advantages), -1).ne(0).any(1)
        if self.transfer is not None:
            moves = moves | self.transfer.ne(0)
        return ~moves.view(-1, group_size).any(1)


Reward = Callable[[Sequence[Parsed], Sequence[Pair]], Rewards]
SignalFunction = Callable[[Graded, Tensor, Progress], Signal]
"""(graded rows, step ids [B, C], progress) -> signal."""
DeadGroups = Callable[[Graded], Tensor]
"""Graded rows -> [Q] bool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How a recipe turns graded rollouts into a loss."""

    reward: Reward
    signal: SignalFunction
    is_dead: DeadGroups | None = None
    """Groups that are sampled anew; None: those whose signal is all zero."""
    replay: ReplayConfig | None = None
    refill_rounds: int = 0
    """How often dead groups are replaced by fresh prompts; 0 keeps them in the batch, as TRL does."""
    has_two_prompts: bool = False
    """Half of each group reads the prompt with the chunk, and the loss has a transfer term."""
    lx_coef: float = 1.0
    """Weight of the transfer term."""


# ---- rewards


def outcome_reward(config: RewardConfig | None = None) -> Reward:
    """Return the reward of the right label."""
    return lambda parsed, pairs: outcome(parsed, pairs, config)


def shaped_reward(config: RewardConfig) -> Reward:
    """Return the shaped reward behind its gate."""
    return lambda parsed, pairs: shaped(parsed, pairs, config)


def own_reward(name: str, function: RewardFunction, *, timeout_s: float = 60.0) -> Reward:
    """Return a reward of the user's own; see `reward_calls.call_reward` for what it refuses."""

    def reward(parsed: Sequence[Parsed], pairs: Sequence[Pair]) -> Rewards:
        total = call_reward(name, function, parsed, pairs, timeout_s=timeout_s)
        return Rewards(total=total, parts={name: total}, correct=is_correct(parsed, pairs))

    return reward


# ---- which groups are dead


def outside(accuracy: AccuracyRange = MIXED, *, gamma: int | None = None) -> DeadGroups:
    """Return the rule: the group's share of right answers is out of range; never looks at a reward."""
    return lambda graded: ~keep_difficulty(graded.grouped(graded.rewards.correct), gamma=gamma, accuracy=accuracy)


def two_groups_outside(accuracy: AccuracyRange) -> DeadGroups:
    """Return the rule of two groups: their accuracy together is out of range."""

    def is_dead(graded: Graded) -> Tensor:
        without, with_chunk = _halves(graded, graded.rewards.correct)
        return ~keep_two_groups(without, with_chunk, accuracy=accuracy)

    return is_dead


# ---- signals


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSignalConfig:
    """How a group's rewards become advantages."""

    ddof: int = 0
    eps: float = 1e-6
    limit: float | None = 2.0
    """Clamp of the advantages; None leaves them. Source: DyKnow-RAG."""
    label_weight: float = 1.0
    rationale_weight: float = 1.0
    shared_baseline: bool = True
    """One baseline for plain and guided rows."""


def signal_config(rl: RlConfig, *, shared_baseline: bool = True) -> GroupSignalConfig:
    """Return what the settings of a recipe say of a group's advantages."""
    return GroupSignalConfig(
        ddof=rl.std_ddof,
        eps=rl.std_eps,
        limit=rl.advantage_clamp,
        label_weight=rl.label_weight,
        rationale_weight=rl.rationale_weight,
        shared_baseline=shared_baseline,
    )


def group_signal(config: GroupSignalConfig | None = None) -> SignalFunction:
    """Return z-scores per group, clamped; with weights other than 1 spread over label and rationale tokens."""
    own = config or GroupSignalConfig()

    def signal(graded: Graded, step_ids: Tensor, progress: Progress) -> Signal:
        rewards = graded.grouped(graded.rewards.total)
        if own.shared_baseline:
            scores = group_zscore(rewards, ddof=own.ddof, eps=own.eps)
        else:
            scores = two_baselines(rewards, graded.grouped(graded.is_guided), ddof=own.ddof, eps=own.eps)
        advantages = clamp(scores, own.limit).flatten()
        numbers = {"advantage/share_clamped": mean_of(scores.abs() > (own.limit or torch.inf))}
        if own.label_weight == own.rationale_weight == 1.0:
            return Signal(advantages=advantages.float(), numbers=numbers)
        spread_out = spread_label_rationale(
            advantages, step_ids, label_weight=own.label_weight, rationale_weight=own.rationale_weight
        )
        return Signal(advantages=spread_out.float(), numbers=numbers)

    return signal


def step_signal(
    profile: Profile,
    verifier: StepVerifier,
    config: StepAdvantageConfig | None = None,
    *,
    variant: StepAdvantages = per_step,
    stages: Sequence[Stage] = STAGES,
) -> SignalFunction:
    """Return advantages per reasoning step; stages whose reward is "outcome" use the outcome alone.

    Args:
        profile: names the K steps.
        verifier: verdicts of steps.
        config: see its fields.
        variant: `per_step`, `suffix_sum` or `masked`.
        stages: of the curriculum, by share of the run.
    """
    own = config or StepAdvantageConfig()
    whole = group_signal(GroupSignalConfig(ddof=own.ddof, eps=own.eps, limit=own.limit))

    def signal(graded: Graded, step_ids: Tensor, progress: Progress) -> Signal:
        stage = stage_at(progress.step, progress.num_steps, stages)
        verdicts = step_rewards(graded.parsed, graded.pairs, profile, verifier)
        steps = verdicts.view(-1, graded.group_size, profile.num_steps)
        numbers: dict[str, Number] = {"stage": Highest(float(stage))}
        unanimous = share_unanimous(steps) * len(steps)
        for number, name in enumerate(profile.steps):
            numbers[f"step/{name}/mean"] = mean_of(verdicts[:, number])
            numbers[f"step/{name}/unanimous"] = Mean(float(unanimous[number]), float(len(steps)))
        if stages[stage].reward == "outcome":
            return replace(whole(graded, step_ids, progress), numbers=numbers)
        advantages = variant(steps, graded.grouped(graded.rewards.total), own).flatten(0, 1)
        return Signal(advantages=spread(advantages, step_ids).float(), numbers=numbers)

    return signal


def two_group_signal(
    *,
    gate: Gate = printed_gate,
    is_gap_of_batch: bool = False,
    ddof: int = 0,
    eps: float = 1e-6,
    limit: float | None = 2.0,
    transfer_limit: float | None = None,
) -> SignalFunction:
    """Return the advantages of both halves of each group and the transfer weights of the first; see `two_groups`."""

    def signal(graded: Graded, step_ids: Tensor, progress: Progress) -> Signal:
        without, with_chunk = _halves(graded, graded.rewards.total)
        correct_without, correct_with = _halves(graded, graded.rewards.correct.double())
        found = two_group_advantages(
            without,
            with_chunk,
            correct_without=correct_without,
            correct_with=correct_with,
            gate=gate,
            is_gap_of_batch=is_gap_of_batch,
            mean_over_ranks=progress.mean_over_ranks,
            ddof=ddof,
            eps=eps,
            limit=limit,
            transfer_limit=transfer_limit,
        )
        advantages = torch.cat([found.without, found.with_chunk], dim=1).flatten()
        transfer = torch.cat([found.transfer, torch.zeros_like(found.transfer)], dim=1).flatten()
        return Signal(
            advantages=advantages.float(),
            transfer=transfer.float(),
            numbers=_two_group_numbers(found, correct_without, correct_with, graded),
        )

    return signal


def _halves(graded: Graded, values: Tensor) -> tuple[Tensor, Tensor]:
    table = graded.grouped(values)
    return table[:, : graded.group_size // 2], table[:, graded.group_size // 2 :]


def _two_group_numbers(found: TwoGroups, without: Tensor, with_chunk: Tensor, graded: Graded) -> dict[str, Number]:
    numbers: dict[str, Number] = {
        "accuracy/without": mean_of(without),
        "accuracy/with": mean_of(with_chunk),
        "gap/mean": mean_of(found.gap),
        "gate/alpha": mean_of(found.alpha),
        "gate/beta": mean_of(found.beta),
        "transfer/max": Highest(float(found.transfer.abs().max())),
    }
    decisions = [parse.fields.context[0] if parse.fields.context else None for parse in graded.parsed]
    half = graded.group_size // 2
    with_rows = [row for row in range(len(decisions)) if row % graded.group_size >= half]
    for decision in ("adopt", "partial", "ignore"):
        told = sum(decisions[row] == decision for row in with_rows)
        numbers[f"context/{decision}"] = Mean(float(told), float(len(with_rows)))
    return numbers
