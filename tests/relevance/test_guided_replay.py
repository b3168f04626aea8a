"""Guided replay: trigger, rows, levels, annealing, rewriting of padded batches, and which tokens get a gradient."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recis.errors import ConfigError
from relevance.advantages import group_zscore
from relevance.replay import (
    ReplayConfig,
    behaviour_logps,
    is_guided,
    needs_next_level,
    overwrite_rows,
    plan,
    tau_at,
)

CONFIG = ReplayConfig(max_guided_groups=1.0)


def test_plan_by_hand():
    rewards = torch.tensor([[0.2, 0.0, 0.0, 0.4], [1.0, 1.0, 0.0, 0.0], [0.0, float("nan"), 1.0, 0.0]])
    found = plan(rewards, rewards == 1, tau=0.25, config=CONFIG)
    assert found.groups.tolist() == [0, 2]  # the least accurate first
    assert found.rollouts.tolist() == [[1, 2], [1, 0]]  # lowest reward first, NaN lowest, ties by index
    assert found.rows.tolist() == [1, 2, 9, 8]
    assert is_guided(found, 3).nonzero().tolist() == [[0, 1], [0, 2], [2, 0], [2, 1]]
    assert plan(rewards, rewards == 1, tau=0.0, config=CONFIG).groups.tolist() == [0]
    assert plan(rewards, rewards == 1, tau=-1.0, config=CONFIG).rows.tolist() == []
    one = ReplayConfig(num_replayed=1, max_guided_groups=0.4)
    assert plan(rewards, rewards == 1, tau=1.0, config=one).rows.tolist() == [1]
    assert (
        plan(rewards[:, :1], rewards[:, :1] == 1, tau=1.0, config=CONFIG).rows.tolist() == []
    )  # a group of one: M = 0
    with pytest.raises(ValueError, match=r"need rewards and correct \[Q, G\]"):
        plan(rewards, rewards[:2] == 1, tau=0.0, config=CONFIG)
    with pytest.raises(ValueError, match="num_replayed 5 exceeds the group size 4"):
        plan(rewards, rewards == 1, tau=0.0, config=ReplayConfig(num_replayed=5))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.integers(1, 8), st.floats(-0.5, 1), st.floats(0, 1), st.integers(0, 99))
def test_plan_keeps_its_limits(num_groups, group_size, tau, share, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 3, (num_groups, group_size), generator=generator) / 2
    correct = rewards == 1
    found = plan(rewards, correct, tau=tau, config=ReplayConfig(max_guided_groups=share))
    accuracy = correct.double().mean(1)
    assert len(found.groups) <= share * num_groups
    assert bool((accuracy[found.groups] <= tau + 1e-9).all())
    assert len(set(found.rows.tolist())) == len(found.rows) == len(found.groups) * (group_size // 2)
    for group, rollouts in zip(found.groups.tolist(), found.rollouts.tolist(), strict=True):
        left = [reward for place, reward in enumerate(rewards[group].tolist()) if place not in rollouts]
        assert max(rewards[group, rollouts].tolist(), default=0) <= min(left, default=1)


def test_tau_falls_at_the_end():
    assert [tau_at(step, 100, ReplayConfig()) for step in (0, 70, 85, 100, 120)] == pytest.approx(
        [0.125, 0.125, 0.0625, 0, 0]
    )
    assert tau_at(100, 100, ReplayConfig(tau=-1.0)) == -1
    assert tau_at(100, 100, ReplayConfig(anneal_share=0.0)) == 0.125


def test_next_level():
    assert needs_next_level(torch.tensor([[False, False], [False, True]])).tolist() == [True, False]
    wrongs: list[dict[str, Any]] = [
        {"max_levels": 4},
        {"start_level": 3},
        {"num_replayed": 0},
        {"max_guided_groups": 1.5},
    ]
    for wrong in wrongs:
        with pytest.raises(ConfigError):
            ReplayConfig(**wrong)


def test_rows_are_overwritten_with_padding():
    old = torch.tensor([[1, 2], [3, 4], [5, 6]])
    got = overwrite_rows(old, torch.tensor([[7, 8, 9]]), torch.tensor([1]), pad=0)
    assert got.tolist() == [[1, 2, 0], [7, 8, 9], [5, 6, 0]]
    assert overwrite_rows(old, torch.tensor([[7]]), torch.tensor([2]), pad=0).tolist() == [[1, 2], [3, 4], [7, 0]]
    left = overwrite_rows(old, torch.tensor([[7, 8, 9]]), torch.tensor([0]), pad=0, on_left=True)
    assert left.tolist() == [[7, 8, 9], [0, 3, 4], [0, 5, 6]]
    assert old.tolist() == [[1, 2], [3, 4], [5, 6]]
    nothing = overwrite_rows(old, torch.zeros(0, 5, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), pad=0)
    assert nothing[:, :2].tolist() == old.tolist()
    with pytest.raises(ValueError, match=r"which must lie in 0\.\.2"):
        overwrite_rows(old, old[:1], torch.tensor([3]), pad=0)


def clipped_loss(logps, behaviour, advantage, mask):
    ratio = (logps - behaviour).exp()
    term = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return -(term * mask).sum() / mask.sum()


def test_no_gradient_reaches_guidance_tokens():
    """Invariant 22: a toy policy with one row of logits per token; the first two tokens are guidance, masked."""
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([1, 2, 3, 4, 5])
    logps = logits.log_softmax(1).gather(1, tokens[:, None])[:, 0]
    mask = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    clipped_loss(logps, logps.detach(), 1.0, mask).backward()
    assert logits.grad is not None
    largest = logits.grad.abs().amax(1)
    assert largest[:2].tolist() == [0.0, 0.0]
    assert bool((largest[2:] > 0).all())


def test_the_hint_reaches_the_loss_through_stored_log_probs_only():
    """Invariant 22: plain rows have ratio 1; a guided row is compared with what sampled it, whatever the hint says now."""
    plain = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    stored = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)  # under the guided prompt, when it was sampled
    behaviour = behaviour_logps(plain, stored, torch.tensor([1]))
    assert not behaviour.requires_grad
    ratio = (plain - behaviour).exp()
    assert ratio[[0, 2]].tolist() == [[1.0] * 4] * 2
    torch.testing.assert_close(ratio[1], (plain[1] - stored[0]).exp())
    clipped_loss(plain, behaviour, 1.0, torch.ones(3, 4)).backward()
    assert stored.grad is None
    narrow = behaviour_logps(plain, stored[:, :2], torch.tensor([1]))
    assert narrow[1, 2:].tolist() == [0.0, 0.0]


def test_replay_revives_a_dead_group():
    """What replay is for: 8 wrong answers teach nothing, 6 wrong and 2 guided right ones do."""
    rewards = torch.zeros(1, 8)
    found = plan(rewards, rewards == 1, tau=0.125, config=ReplayConfig(num_replayed=2, max_guided_groups=1.0))
    rewards.view(-1)[found.rows] = 1.0
    assert bool((group_zscore(rewards) > 0).sum() == 2)
