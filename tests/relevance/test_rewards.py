"""Rewards: the spec's numbers, bounds and order, missing gold, faults, step rewards, functions that fail."""

import threading
import time
from typing import Any

import pytest
import torch
from graded_pairs import COMPACT, answer, make_pair, read
from hypothesis import given, settings
from hypothesis import strategies as st

from recis.errors import ConfigError
from relevance.advantages import group_zscore
from relevance.grammar import parse
from relevance.labels import PROFILES, AttributeVerdict
from relevance.reward_calls import RewardError, call_reward
from relevance.rewards import RewardConfig, attribute_f1, combine, outcome, shaped, step_rewards
from relevance.verify import (
    Hybrid,
    balanced_accuracy,
    binary_verdicts,
    gold_verdicts,
    noisy_oracle,
    override,
    thresholded,
    weak_steps,
)

NAN = float("nan")
PAIR = make_pair(4, attributes={"colour": "ok"})


def close(got, want, tolerance=5e-4):
    torch.testing.assert_close(got, torch.tensor(want, dtype=got.dtype), atol=tolerance, rtol=0, equal_nan=True)


def rewards_of(texts, pair=PAIR, config=None, function=shaped):
    return function([read(text) for text in texts], [pair] * len(texts), config)


def test_outcome_by_hand():
    texts = [answer(4, attributes={"colour": "ok"}), answer(3, "near"), "4", "", "nonsense", answer(4, verdict=3)]
    found = rewards_of(texts, function=outcome)
    assert found.total.tolist() == [1, 0, 0, 0, 0, 1]  # verdict and label may differ: only the gate minds
    assert found.correct.tolist() == [True, False, False, False, False, True]
    assert found.num_unscorable == 0
    assert rewards_of(texts, make_pair(None), function=outcome).num_unscorable == 6
    loose = RewardConfig(require_ok=False)
    assert rewards_of(texts, config=loose, function=outcome).total.tolist() == [1, 0, 1, 0, 0, 1]
    near = RewardConfig(ordinal_coef=0.5)
    close(rewards_of(texts[:2], config=near, function=outcome).total, [1.0, 1 / 3])


def test_four_wrong_rollouts_are_told_apart_by_their_steps():
    """Invariant 19."""
    gold = make_pair(3, category="near", attributes={"colour": "miss"})
    texts = [
        answer(2, "near", {"colour": "miss"}),
        answer(2, "near", {"colour": "ok"}),
        answer(2, "match", {"colour": "unknown"}),
        answer(2, "near", {"size": "ok"}),
    ]
    found = rewards_of(texts, gold)
    close(found.total, [0.4, 0.2, 0.0, 0.2])
    close(group_zscore(found.total[None])[0], [1.414, 0.0, -1.414, 0.0])
    plain = rewards_of(texts, gold, function=outcome).total
    assert group_zscore(plain[None]).tolist() == [[0.0] * 4]
    hidden = make_pair(3, has_steps=False)
    right = answer(3, "near", {"colour": "miss"})
    assert rewards_of([*texts, right], hidden).total.tolist() == [0, 0, 0, 0, 1]  # the outcome reward, not 0


def test_gate():
    """Invariant 20."""
    texts = [
        answer(4, "match", {"colour": "ok"}),
        answer(4, "match", {"colour": "ok"}, verdict=3),  # right label, breaks H1
        answer(4, "match", {"colour": "miss"}),
        answer(2, "match", {"colour": "ok", "size": "miss"}, verdict=2),
    ]
    found = rewards_of(texts)
    assert found.parts["gate"].tolist() == [1, 0, 1, 1]
    close(group_zscore(torch.tensor([[1.0, 0.0, 0.8, 0.4]]))[0], [1.172, -1.432, 0.651, -0.391])
    close(found.total[:3], [1.0, 0.0, 0.8])
    assert found.total[1] < found.total[found.total > 0].min()
    open_gate = rewards_of(texts, config=RewardConfig(kind="shaped", gated=False))
    close(open_gate.total[1:2], [1.0])
    close(rewards_of(texts, config=RewardConfig(kind="shaped", hard_rules=("H2",))).total[1:2], [1.0])
    assert rewards_of(["", "4", "junk"]).total.tolist() == [0, 0, 0]


def test_reversing_weights_are_refused():
    with pytest.raises(ConfigError, match="a wrong label with perfect steps would outrank a right label"):
        RewardConfig(w=(0.4, 0.3, 0.3))
    config = RewardConfig(w=(0.4, 0.3, 0.3), allow_reversal=True)
    texts = [answer(2, "match", {"colour": "ok", "size": "miss"}), answer(4, "near", {"size": "miss"})]
    gold = make_pair(4, attributes={"colour": "ok", "size": "miss"})
    close(rewards_of(texts, gold, config).total[:1], [0.6])
    close(combine(torch.tensor([[1.0, 0.0, 0.0]]), torch.ones(1), config.w), [0.4])
    wrongs: list[dict[str, Any]] = [
        {"w": (0.6, 0.2, 0.1)},
        {"hard_rules": ("H9",)},
        {"ordinal_coef": 2.0},
        {"w": (1.2, -0.1, -0.1)},
    ]
    for wrong in wrongs:
        with pytest.raises(ConfigError):
            RewardConfig(**wrong)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=1, max_size=5),
    st.sampled_from([(0.6, 0.2, 0.2), (0.8, 0.1, 0.1), (0.51, 0.49, 0.0)]),
    st.integers(0, 2),
)
def test_shaped_rewards_are_bounded_and_monotone(parts, w, part):
    """Invariant 18."""
    table = torch.tensor(parts, dtype=torch.float64)
    total = combine(table, torch.ones(len(parts), dtype=torch.float64), w)
    assert bool(((total >= 0) & (total <= 1 + 1e-12)).all())
    better = table.clone()
    better[:, part] = 1.0
    assert bool((combine(better, torch.ones_like(total), w) >= total - 1e-12).all())


def test_any_right_label_beats_any_wrong_one():
    """Invariant 18: .6 against .4."""
    worst_right = combine(torch.tensor([[1.0, 0.0, 0.0]]), torch.ones(1), (0.6, 0.2, 0.2))
    best_wrong = combine(torch.tensor([[0.0, 1.0, 1.0]]), torch.ones(1), (0.6, 0.2, 0.2))
    close(worst_right, [0.6])
    close(best_wrong, [0.4])
    close(combine(torch.tensor([[0.0, NAN, 1.0]]), torch.ones(1), (0.6, 0.2, 0.2)), [0.25])
    close(combine(torch.tensor([[NAN, 1.0, 1.0]]), torch.ones(1), (0.6, 0.2, 0.2)), [NAN])


def test_attribute_f1():
    def said(**verdicts):
        return [AttributeVerdict(name=name, value="x", verdict=verdict) for name, verdict in verdicts.items()]

    assert attribute_f1(said(colour="ok"), {"colour": "ok"}) == 1
    assert attribute_f1(said(colour="miss"), {"colour": "ok"}) == 0
    assert attribute_f1(said(colour="ok", size="ok"), {"colour": "ok"}) == pytest.approx(2 / 3)
    assert attribute_f1([], {}) == 1
    assert attribute_f1([], {"colour": "ok"}) == 0
    assert attribute_f1(None, {}) == 0


def test_step_rewards_by_hand():
    texts = [answer(4, attributes={"colour": "ok"}), answer(3, "near", {"colour": "ok"}, "E01", 4), "4<category>match"]
    found = step_rewards([read(text) for text in texts], [PAIR] * 3, COMPACT, gold_verdicts)
    close(found, [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, NAN, NAN, NAN, NAN]])
    hidden = step_rewards([read(texts[0])], [make_pair(4, has_steps=False)], COMPACT, gold_verdicts)
    close(hidden, [[1, NAN, NAN, NAN, 1]])
    nothing = step_rewards(
        [read(text) for text in texts[::2]], [make_pair(None, has_steps=False)] * 2, COMPACT, gold_verdicts
    )
    assert bool(nothing.isnan().all())
    post_cot = PROFILES["post_cot"]
    text = texts[0].replace("<category>", "<query>q</query><item>i</item><category>")
    close(step_rewards([parse(text, post_cot)], [PAIR], post_cot, gold_verdicts), [[1, NAN, NAN, 1, 1, 1, 1]])
    assert step_rewards([], [], COMPACT, gold_verdicts).shape == (0, 5)


def test_step_verdicts_must_be_verdicts():
    def scores(parsed, pairs, profile):
        return torch.full((len(pairs), profile.num_steps), 0.7, dtype=torch.float64)

    with pytest.raises(ValueError, match=r"a step verdict is 0, 1 or NaN; got 0.7"):
        step_rewards([read(answer(4))], [PAIR], COMPACT, scores)
    with pytest.raises(ValueError, match=r"must be \[1, 5\]; got \(0, 5\)"):
        step_rewards([read(answer(4))], [PAIR], COMPACT, lambda parsed, pairs, profile: torch.zeros(0, 5))
    found = step_rewards([read(answer(4))], [PAIR], COMPACT, thresholded(scores))
    assert found.tolist() == [[1.0] * 5]


def test_human_overrides_the_reward_model():
    """Invariant 29."""
    human = torch.tensor([[NAN, 1.0, NAN, 0.0]])
    model = binary_verdicts(torch.tensor([[0.9, 0.2, 0.7, 0.4]]))
    merged, source = override([human, model])
    assert merged.tolist() == [[1, 1, 1, 0]]
    assert source.tolist() == [[1, 0, 1, 0]]
    assert override([torch.full((1, 2), NAN)])[1].tolist() == [[-1, -1]]
    with pytest.raises(ValueError, match="must have one shape"):
        override([human, model[:, :2]])


def test_hybrid_on_fully_annotated_data_does_not_need_its_reward_model():
    """Invariant 29."""
    texts = [answer(4, attributes={"colour": "ok"}), answer(2, "near", {"colour": "miss"}), ""]
    parsed, pairs = [read(text) for text in texts], [PAIR] * 3
    assert PAIR.steps is not None
    truth = {PAIR.id: PAIR.steps}
    noisy = Hybrid(verifiers={"gold": gold_verdicts, "rm": noisy_oracle(truth, accuracy=0.5, seed=3)})
    gold = Hybrid(verifiers={"gold": gold_verdicts, "rm": gold_verdicts})
    close(step_rewards(parsed, pairs, COMPACT, noisy), step_rewards(parsed, pairs, COMPACT, gold).tolist())


def test_noisy_oracle_is_right_as_often_as_it_says():
    pairs = [make_pair(4, id=f"p{number}", has_steps=False) for number in range(2000)]
    steps = make_pair(4).steps
    assert steps is not None
    truth = {pair.id: steps for pair in pairs}
    parsed = [read(answer(4))] * len(pairs)
    verify = noisy_oracle(truth, accuracy=0.9, seed=1)
    verdicts = verify(parsed, pairs, COMPACT)
    assert bool(verdicts[:, [0, 4]].isnan().all())
    share = float(verdicts[:, 1:4].mean())
    assert abs(share - 0.9) < 4 * (0.9 * 0.1 / 6000) ** 0.5
    close(verify(parsed[:5], pairs[:5], COMPACT), verdicts[:5].tolist())  # the same answer, the same verdict
    assert bool(noisy_oracle({}, accuracy=0.9)(parsed, pairs, COMPACT).isnan().all())
    with pytest.raises(ConfigError, match="accuracy must lie in"):
        noisy_oracle({}, accuracy=2)


def test_weak_verifiers_are_switched_off():
    truth = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0, 1.0]] * 10)
    verdicts = truth.clone()
    verdicts[:10, 1] = 1 - verdicts[:10, 1]
    verdicts[:, 4] = NAN
    with pytest.warns(UserWarning, match=r"'rm' is switched off for step 'category': balanced accuracy 0.500"):
        weak = weak_steps("rm", verdicts, truth, COMPACT)
    assert weak == {"category": 0.5}
    pairs, parsed = [make_pair(4, has_steps=False)], [read(answer(4))]
    hybrid = Hybrid(
        verifiers={"rm": lambda *_: torch.ones(1, 5, dtype=torch.float64)}, switched_off=frozenset({("rm", "category")})
    )
    close(hybrid(parsed, pairs, COMPACT), [[1, NAN, 1, 1, 1]])
    assert hybrid.with_sources(parsed, pairs, COMPACT)[1].tolist() == [[0, -1, 0, 0, 0]]
    assert balanced_accuracy(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])) == 0.75
    assert balanced_accuracy(torch.tensor([NAN]), torch.tensor([1.0])) != balanced_accuracy(
        torch.ones(1), torch.ones(1)
    )
    with pytest.raises(ConfigError, match="did you mean 'gold'"):
        Hybrid(verifiers={"gold": gold_verdicts}, switched_off=frozenset({("gol", "rule")}))


def test_own_reward_functions_fail_by_name():
    parsed, pairs = [read(answer(4))] * 2, [PAIR] * 2
    assert call_reward("half", lambda *_: torch.tensor([0.5, NAN]), parsed, pairs)[0] == 0.5

    def raises(parsed, pairs):
        raise KeyError("clicks")

    with pytest.raises(RewardError, match="reward 'clicks' raised KeyError: 'clicks'; on pairs p1, p1") as caught:
        call_reward("clicks", raises, parsed, pairs)
    assert isinstance(caught.value.__cause__, KeyError)
    release = threading.Event()
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"reward 'slow' gave no answer within 0\.05 s"):
        call_reward("slow", lambda *_: torch.tensor(float(release.wait(30))), parsed, pairs, timeout_s=0.05)
    assert time.monotonic() - began < 20  # it came back long before the function does
    release.set()
    with pytest.raises(RewardError, match=r"must return \[2\], one number per completion; got \(3,\)"):
        call_reward("three", lambda *_: torch.ones(3), parsed, pairs)
    with pytest.raises(RewardError, match="is infinite for pair p1"):
        call_reward("inf", lambda *_: torch.tensor([1.0, torch.inf]), parsed, pairs)
