"""Group, step and two-group advantages: the spec's numbers, an obvious Python reference, odd groups."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relevance.advantages import (
    clamp,
    group_zscore,
    is_flat,
    moments,
    normalize_then_sum,
    spread,
    spread_label_rationale,
    sum_then_normalize,
    two_baselines,
)
from relevance.config import RlConfig
from relevance.methods import GroupSignalConfig, signal_config
from relevance.step_advantages import (
    StepAdvantageConfig,
    critical,
    masked,
    per_step,
    share_unanimous,
    step_zscore,
    suffix_sum,
)
from relevance.two_groups import (
    centered_gate,
    fixed_gate,
    printed_gate,
    transfer_term,
    two_group_advantages,
)

NAN = float("nan")
FREE = StepAdvantageConfig(lam=1.0, after_error=1.0, limit=None, outcome_steps=(-1,))
STEPS = torch.tensor([[[1, 1, 1, 1], [1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]], dtype=torch.float64)
FINAL = STEPS[..., -1]


def close(got, want, tolerance=5e-4):
    torch.testing.assert_close(got, torch.tensor(want, dtype=got.dtype), atol=tolerance, rtol=0)


def right_of(count, group_size=16):
    return torch.tensor([[1.0] * count + [0.0] * (group_size - count)], dtype=torch.float64)


def reference(rewards, ddof, eps):
    known = [value for value in rewards if not math.isnan(value)]
    if len(known) < 2 or max(known) - min(known) <= 1e-8:
        return [0.0] * len(rewards)
    mean = statistics.fmean(known)
    std = math.sqrt(sum((value - mean) ** 2 for value in known) / (len(known) - ddof))
    return [0.0 if math.isnan(value) else (value - mean) / (std + eps) for value in rewards]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1.0, 0.25, NAN]) | st.floats(-5, 5), min_size=1, max_size=9),
    st.sampled_from([(0, 1e-6), (1, 1e-4)]),
)
def test_matches_reference(rewards, options):
    ddof, eps = options
    got = group_zscore(torch.tensor([rewards], dtype=torch.float64), ddof=ddof, eps=eps)[0]
    torch.testing.assert_close(
        got, torch.tensor(reference(rewards, ddof, eps), dtype=torch.float64), atol=1e-6, rtol=1e-6
    )


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-5, 5), min_size=2, max_size=8),
    st.floats(0.1, 10),
    st.floats(-5, 5),
    st.integers(0, 1),
    st.randoms(),
)
def test_affine_invariance_permutation_and_moments(rewards, scale, shift, ddof, random):
    """Invariant 2."""
    group = torch.tensor([rewards], dtype=torch.float64)
    if float(group.max() - group.min()) < 1e-2:
        return
    advantages = group_zscore(group, ddof=ddof, eps=0.0)
    torch.testing.assert_close(
        group_zscore(scale * group + shift, ddof=ddof, eps=0.0), advantages, atol=1e-6, rtol=1e-6
    )
    order = list(range(len(rewards)))
    random.shuffle(order)
    torch.testing.assert_close(group_zscore(group[:, order], ddof=ddof, eps=0.0), advantages[:, order])
    assert abs(float(advantages.sum())) < 1e-6
    assert abs(float(advantages.var(correction=ddof)) - 1) < 1e-6


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, NAN])
@pytest.mark.parametrize("group_size", [1, 2, 7])
def test_equal_rewards_give_exact_zero_and_no_gradient(value, group_size):
    """Invariant 1; a group of one and a group without any reward are flat too."""
    rewards = torch.full((3, group_size), value, requires_grad=True)
    for ddof in (0, 1):
        advantages = group_zscore(rewards, ddof=ddof)
        assert advantages.tolist() == [[0.0] * group_size] * 3
    logps = torch.randn(3, group_size, requires_grad=True)
    (advantages.detach() * logps).sum().backward()
    assert logps.grad is not None
    assert not bool(logps.grad.any())
    assert is_flat(rewards).tolist() == [True] * 3


@pytest.mark.parametrize(
    ("count", "right", "wrong"),
    [(1, 3.8730, -0.2582), (4, 1.7321, -0.5774), (8, 1.0, -1.0), (15, 0.2582, -3.8730)],
)
def test_binary_rewards(count, right, wrong):
    """Invariant 3."""
    advantages = group_zscore(right_of(count))[0]
    close(advantages[[0, -1]], [right, wrong])
    sample = group_zscore(right_of(count), ddof=1)[0]
    close(sample[[0, -1]], [right * 0.96825, wrong * 0.96825])
    if count == 1:
        close(sample[[0, -1]], [3.75, -0.25])


@pytest.mark.parametrize(("count", "total"), [(1, -1.873), (2, -1.292), (8, 0.0), (15, 1.873)])
def test_clamp_biases_rare_groups(count, total):
    """Invariant 4."""
    advantages = group_zscore(right_of(count), eps=0.0)
    close(clamp(advantages, 2.0).sum(), total)
    close(clamp(advantages, None).sum(), 0.0)


def test_trl_convention():
    rewards = torch.tensor([[1.0, 0.0, 0.5, 0.25]])
    want = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(group_zscore(rewards, ddof=1, eps=1e-4), want, atol=1e-6, rtol=0)
    assert group_zscore(rewards).dtype == torch.float32


def test_nan_rewards_are_left_out():
    close(group_zscore(torch.tensor([[1.0, NAN, 0.0, NAN]]))[0], [1.0, 0.0, -1.0, 0.0])
    assert moments(torch.tensor([[NAN, NAN]]))[0].tolist() == [0.0]


@pytest.mark.parametrize(
    "wrong", [torch.ones(3), torch.ones(2, 2, dtype=torch.int64), torch.tensor([[1.0, torch.inf]]), torch.ones(2, 0)]
)
def test_bad_rewards_are_named(wrong):
    with pytest.raises(ValueError, match="rewards must be"):
        group_zscore(wrong)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="ddof must be 0 or 1"):
        group_zscore(torch.ones(1, 2), ddof=2)
    with pytest.raises(ValueError, match="must be positive; got 0"):
        clamp(torch.ones(1), 0)
    with pytest.raises(ValueError, match=r"\[Q, G, 2\], one per weight"):
        sum_then_normalize(torch.ones(1, 2, 3), (0.5, 0.5))


def test_two_ways_to_mix_rewards():
    """(1, 0, 0) and (0, 1, 1) both sum to .5: only normalising first keeps them apart."""
    rewards = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]]], dtype=torch.float64)
    weights = (0.5, 0.25, 0.25)
    summed = sum_then_normalize(rewards, weights)[0]
    assert summed[0] == summed[1]
    apart = normalize_then_sum(rewards, weights)[0]
    assert abs(float(apart[0] - apart[1])) > 0.01
    columns = [group_zscore(rewards[..., number]) * weight for number, weight in enumerate(weights)]
    torch.testing.assert_close(apart, torch.stack(columns).sum(0)[0])
    missing = torch.tensor([[[1.0, NAN], [0.0, 1.0], [NAN, NAN]]])
    close(sum_then_normalize(missing, (0.5, 0.5))[0], [0.0, 0.0, 0.0])


def test_spread_over_tokens():
    ids = torch.tensor([[0, 0, 1, 2, -1], [0, 1, 1, -1, -1]])
    got = spread(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), ids)
    assert got.tolist() == [[1, 1, 2, 3, 0], [4, 5, 5, 0, 0]]
    with pytest.raises(ValueError, match=r"must lie in -1..1; got -1..2"):
        spread(torch.ones(2, 2), ids)
    with pytest.raises(ValueError, match=r"advantages \[B, K\]"):
        spread(torch.ones(3, 3), ids)
    weighted = spread_label_rationale(torch.tensor([2.0, -1.0]), ids, rationale_weight=0.5)
    assert weighted.tolist() == [[2, 2, 1, 1, 0], [-1, -0.5, -0.5, 0, 0]]
    # weights of 1: the same number on each token, as the [B] path has it
    assert spread_label_rationale(torch.tensor([2.0, 3.0]), ids).tolist() == [[2, 2, 2, 2, 0], [3, 3, 3, 0, 0]]


def test_replay_needs_a_shared_baseline():
    """Invariant 23."""
    rewards = torch.tensor([[0.0] * 6 + [1.0] * 2], dtype=torch.float64)
    is_guided = rewards == 1
    close(group_zscore(rewards)[0], [-0.577] * 6 + [1.732] * 2)
    assert two_baselines(rewards, is_guided).tolist() == [[0.0] * 8]
    close(
        two_baselines(torch.tensor([[0.0, 1.0, 0.0, 0.5]]), torch.tensor([[False, False, True, True]]))[0],
        [-1, 1, -1, 1],
    )


def test_step_zscores():
    """Invariant 27."""
    got = step_zscore(STEPS)[0]
    close(got[0], [0, 1, 1, 1.732])
    close(got[1], [0, -1, 1, -0.577])
    assert got[:, 0].tolist() == [0.0] * 4
    assert share_unanimous(STEPS).tolist() == [1, 0, 0, 0]
    close(per_step(STEPS, FINAL, FREE)[0, 1], [0, -1, 1, -0.577])


def test_suffix_sum_and_masked():
    """Invariant 27."""
    got = suffix_sum(STEPS, FINAL, FREE)[0]
    close(got[0], [3.528, 2.646, 1.764, 0.882])
    close(got[1], [-0.504, -1.386, -0.252, -1.134])
    got = masked(STEPS, FINAL, FREE)[0]
    close(got[0], [1.732] * 4)
    close(got[1], [0, -0.577, 0, -0.577])
    assert masked(STEPS * NAN, FINAL, FREE).tolist() == torch.zeros_like(STEPS).tolist()


def test_per_step_weights_by_hand():
    # label, category, attribute, verdict; rollout 0 right, rollout 1 wrong with its first error at the category
    rewards = torch.tensor([[[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]])
    config = StepAdvantageConfig()
    close(critical(rewards, after_error=0.5)[0], [[1, 1, 1, 1], [1, 1, 0.5, 0.5]])
    close(per_step(rewards, rewards[..., 0], config)[0], [[1, 0.5, 0.5, 1], [-1, -0.5, -0.25, -1]])
    # an error in a rollout with the right label weighs nothing down
    close(critical(torch.tensor([[[1.0, 0.0, 1.0]]]), after_error=0.5)[0], [[1, 1, 1]])
    close(critical(torch.tensor([[[0.0, NAN, 1.0]]]), after_error=0.5)[0], [[1, 1, 1]])


def test_one_step_is_plain_grpo_bit_for_bit():
    """Invariant 26."""
    outcome = torch.randint(0, 2, (50, 8)).float()
    got = per_step(outcome[..., None], outcome, StepAdvantageConfig())
    assert torch.equal(got[..., 0], clamp(group_zscore(outcome), 2.0))


def test_step_advantages_name_wrong_shapes():
    for variant in (per_step, suffix_sum, masked):
        with pytest.raises(ValueError, match=r"need rewards \[Q, G, K\]"):
            variant(STEPS, FINAL[:, :2], FREE)


@pytest.mark.parametrize(
    ("gap", "alpha", "beta"),
    [(-1, 1.390, 0.0719), (-0.5, 0.2097, 0.4768), (0, 0.05, 2), (0.5, 0.0284, 3.523), (1, 0.0255, 3.928)],
)
def test_printed_gate(gap, alpha, beta):
    """Invariant 31."""
    got = printed_gate(torch.tensor([float(gap)], dtype=torch.float64))
    close(torch.cat(got), [alpha, beta])
    close(got[0] * got[1], [0.1], 1e-12)


def test_where_gates_are_neutral():
    """Invariant 31: the printed one at gap -.6138, the centered one at 0."""
    close(torch.cat(printed_gate(torch.tensor([-0.6138], dtype=torch.float64))), [0.3162, 0.3162])
    close(torch.cat(centered_gate(torch.tensor([0.0]))), [0.3162, 0.3162])
    close(torch.cat(centered_gate(torch.tensor([0.5], dtype=torch.float64))), [0.3162 / math.e, 0.3162 * math.e])
    assert torch.cat(fixed_gate(torch.tensor([0.3]))).tolist() == pytest.approx([2.0, 0.05])


def test_equal_groups():
    """Invariant 32."""
    half = torch.tensor([[1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    got = two_group_advantages(half, half)
    close(got.transfer[0], [0.05, 0.05, -2, -2])
    close(got.transfer.sum(), -3.9)
    assert not bool(got.is_dead)
    for value in (0.0, 1.0):
        same = torch.full((1, 4), value)
        got = two_group_advantages(same, same)
        assert bool(got.is_dead)
        assert not bool(torch.cat([got.without, got.with_chunk, got.transfer]).any())


def test_signal_only_between_groups():
    """Invariant 34."""
    none, every = torch.zeros(1, 4, dtype=torch.float64), torch.ones(1, 4, dtype=torch.float64)
    got = two_group_advantages(none, every)
    assert not bool(torch.cat([got.without, got.with_chunk]).any())
    close(got.transfer[0], [-3.928] * 4)
    assert not bool(got.is_dead)
    close(two_group_advantages(every, none).transfer[0], [1.390] * 4)


def test_two_group_options():
    without, with_chunk = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    got = two_group_advantages(without, with_chunk, is_gap_of_batch=True)
    assert got.gap.tolist() == [0.5, 0.5]
    close(two_group_advantages(without, with_chunk, transfer_limit=1.0).transfer[0], [-1.0, -1.0])
    raw = two_group_advantages(without * 0.3, with_chunk * 0.3, correct_without=without, correct_with=with_chunk)
    assert raw.gap.tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="both groups must have n rollouts"):
        two_group_advantages(without, with_chunk[:, :1])


def test_transfer_term_is_the_probability():
    """Invariant 36."""
    logits = torch.tensor([[2.0, 0.5, -1.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([-1.7], dtype=torch.float64)

    def value(of):
        return transfer_term(of.log_softmax(1)[:, :1], torch.ones(1, 1), weight)

    (gradient,) = torch.autograd.grad(value(logits), logits)
    taken = float(logits.detach().softmax(1)[0, 0])
    assert float(gradient[0, 0]) == pytest.approx(-1.7 * taken * (1 - taken), abs=1e-12)
    for column in range(3):
        step = torch.zeros_like(logits)
        step[0, column] = 1e-5
        numeric = (value(logits + step) - value(logits - step)) / 2e-5
        assert float(gradient[0, column]) == pytest.approx(float(numeric.detach()), abs=1e-6)
    logps = torch.tensor([[math.log(0.05), math.log(0.9)]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(transfer_term(logps, torch.ones(1, 2), torch.ones(1)), logps)
    assert float(gradient[0, 1] / gradient[0, 0]) == pytest.approx(18.0)


def test_transfer_term_by_hand():
    """Invariant 37: only the tokens of the completion count, whatever the padding holds; row means, then the weights."""
    logps = torch.tensor([[math.log(0.5), math.log(0.25), -NAN], [0.0, NAN, NAN], [0.0, 0.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]])
    got = transfer_term(logps.requires_grad_(), mask, torch.tensor([2.0, 5.0, 0.0], dtype=torch.float64))
    assert float(got.detach()) == pytest.approx(0.75)
    (gradient,) = torch.autograd.grad(got, logps)
    close(gradient, [[0.5, 0.25, 0.0], [0.0] * 3, [0.0] * 3])


def test_settings_of_a_run_reach_its_advantages():
    rl = RlConfig(std_ddof=1, std_eps=0.1, advantage_clamp=None, label_weight=0.5, rationale_weight=0.25)
    assert signal_config(rl, shared_baseline=False) == GroupSignalConfig(
        ddof=1, eps=0.1, limit=None, label_weight=0.5, rationale_weight=0.25, shared_baseline=False
    )
    assert signal_config(RlConfig()) == GroupSignalConfig()
