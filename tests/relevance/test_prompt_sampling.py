"""Selection of prompts: pass@k, difficulty, balance, diversity, curriculum, pool, preference pairs."""

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from graded_pairs import COMPACT, answer, make_pair, read
from hypothesis import given, settings
from hypothesis import strategies as st

from recis.errors import ConfigError, DataError
from relevance.advantages import is_flat
from relevance.curriculum import (
    STAGES,
    PoolConfig,
    keep_diverse,
    label_entropy_bits,
    pool_summary,
    stage_at,
    stage_positions,
    uncertainty_pool,
)
from relevance.data import Chunk
from relevance.files import Preference, Sample
from relevance.preferences import PreferenceConfig, check_completion, check_preference, make_preferences
from relevance.sampling import (
    DYKNOW_RANGE,
    AccuracyRange,
    balance_labels,
    coefficient_of_variation,
    keep_difficulty,
    keep_two_groups,
    label_histogram,
    level_round_robin,
    pass_at_k,
)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.data())
def test_pass_at_k_counts_draws(num_samples, data):
    k = data.draw(st.integers(1, num_samples))
    for right in range(num_samples + 1):
        draws = list(itertools.combinations(range(num_samples), k))
        want = sum(min(draw) < right for draw in draws) / len(draws)
        assert float(pass_at_k(torch.tensor(right), num_samples, k)) == pytest.approx(want)


def test_pass_at_k_refuses():
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.4; got 5"):
        pass_at_k(torch.tensor([1]), 4, 5)
    with pytest.raises(ValueError, match=r"num_correct must lie in 0\.\.4"):
        pass_at_k(torch.tensor([5]), 4, 1)


def groups_of(group_size):
    return torch.arange(group_size + 1)[:, None] > torch.arange(group_size)


def kept_counts(group_size, **options):
    return keep_difficulty(groups_of(group_size), **options).nonzero().flatten().tolist()


def test_difficulty_ranges():
    """Invariant 5."""
    assert kept_counts(16, accuracy=DYKNOW_RANGE) == list(range(1, 15))
    roll = AccuracyRange(low=0.1, high=0.95)
    assert kept_counts(8, accuracy=roll) == list(range(1, 8))
    assert kept_counts(16, accuracy=roll) == list(range(2, 16))
    assert kept_counts(8) == list(range(1, 8))
    assert kept_counts(8, gamma=4) == [1, 2, 3]
    assert kept_counts(1) == []
    assert kept_counts(10, accuracy=AccuracyRange(low=0.1, high=0.9, closed=True)) == list(range(1, 10))
    assert kept_counts(10, accuracy=AccuracyRange(low=0.1, high=0.9)) == list(range(2, 9))
    wrongs: list[dict[str, Any]] = [{"low": 0.5, "high": 0.2}, {"low": -0.1}, {"high": 1.1}]
    for wrong in wrongs:
        with pytest.raises(ConfigError, match="an accuracy range needs"):
            AccuracyRange(**wrong)


@pytest.mark.parametrize(("p", "wanted"), [(0.8, (0.411, 0.168, 0.028)), (0.95, (0.815, 0.663, 0.440))])
def test_share_of_dead_groups(p, wanted):
    """Invariant 6: p^G + (1-p)^G, counted over every outcome of G rollouts by the rule that the trainer uses."""
    for group_size, want in zip((4, 8, 16), wanted, strict=True):
        dead = ~keep_difficulty(groups_of(group_size))
        chance = sum(
            math.comb(group_size, c) * p**c * (1 - p) ** (group_size - c) for c in dead.nonzero().flatten().tolist()
        )
        assert chance == pytest.approx(want, abs=5e-4)
        assert torch.equal(dead, is_flat(groups_of(group_size).double()))


def test_two_groups_are_kept_by_their_union():
    none, every = torch.zeros(1, 4), torch.ones(1, 4)
    assert keep_two_groups(none, every).tolist() == [True]
    assert keep_two_groups(none, none).tolist() == [False]
    assert keep_two_groups(every, every).tolist() == [False]


def labelled(counts):
    labels = [label for label, count in counts.items() for _ in range(count)]
    order = np.random.Generator(np.random.Philox(3)).permutation(len(labels))
    return [make_pair(labels[n], id=f"p{n}", query_id=f"q{rank // 8}") for rank, n in enumerate(order)]


def test_class_balance():
    """Invariant 15."""
    counts = {4: 12930, 3: 1514, 2: 5891, 1: 1281}
    pairs = labelled(counts)
    kept = balance_labels(pairs, seed=5)
    assert label_histogram([pairs[n].label for n in kept]) == dict.fromkeys((1, 2, 3, 4), 1281)
    assert len(kept) == 5124
    assert coefficient_of_variation([1281] * 4) == 0
    assert kept == balance_labels(pairs, seed=5) == sorted(kept)
    assert kept != balance_labels(pairs, seed=6)
    assert coefficient_of_variation([50, 5, 36, 9]) == pytest.approx(0.749, abs=5e-4)
    assert balance_labels([], seed=0) == []
    assert balance_labels([make_pair(None)], seed=0) == []
    with pytest.raises(ValueError, match="takes the pairs of one split"):
        balance_labels([make_pair(4), make_pair(4, id="p2", split="dev")], seed=0)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=30), st.integers(0, 30), st.integers(0, 5))
def test_round_robin_levels(keys, num_kept, seed):
    taken = level_round_robin(keys, [0.0] * len(keys), num_kept, seed=seed)
    assert len(taken) == len(set(taken)) == min(num_kept, len(keys))
    assert taken == level_round_robin(keys, [0.0] * len(keys), num_kept, seed=seed)
    counts, total = Counter(keys[n] for n in taken), Counter(keys)
    for first, second in itertools.permutations(total, 2):
        # nobody is ahead by more than one unless the other has run out
        assert counts[first] <= counts[second] + 1 or counts[second] == total[second]


def test_round_robin_takes_the_highest_priority_first():
    assert level_round_robin(["a", "a", "b"], [1.0, 2.0, 0.0], 2, seed=0) == [1, 2]


def test_diversity():
    labels = torch.tensor([[4] * 8, [4] * 7 + [3], [4] * 4 + [3] * 4, [4] * 7 + [0]])
    torch.testing.assert_close(
        label_entropy_bits(labels), torch.tensor([0.0, 0.5436, 1.0, 0.5436], dtype=torch.float64), atol=5e-5, rtol=0
    )
    assert keep_diverse(labels).tolist() == [False, True, True, True]
    steps = torch.zeros(4, 8, 3)
    assert keep_diverse(labels, steps).tolist() == [False, True, True, True]
    steps[0, 3, 1] = float("nan")
    assert keep_diverse(labels, steps)[0]
    assert not keep_diverse(labels, torch.full((4, 8, 3), float("nan")))[0]


def test_stages():
    assert [stage_at(step, 100) for step in (0, 29, 30, 69, 70, 99, 200)] == [0, 0, 1, 1, 2, 2, 2]
    pairs = [make_pair(4, family=family) for family in ("plain", "negation", "negation", "plain")]
    accuracies = [0.9, 0.5, 0.05, float("nan")]
    assert [stage_positions(pairs, accuracies, stage) for stage in STAGES] == [[0, 1], [0, 1], [1, 2]]
    with pytest.raises(ConfigError, match="shares of the stages must sum to 1"):
        stage_at(0, 10, STAGES[:1])


def test_uncertainty_pool():
    families = ["negation"] * 4 + ["question"] * 2 + ["plain"]
    pairs = [make_pair(4, id=f"p{n}", family=family) for n, family in enumerate(families)]
    sure = [0.9, 0.6, 0.5, 0.95, 0.65, 0.99, 0.3]
    probs = torch.tensor([[1 - p, 0.0, 0.0, p] if p >= 0.5 else [0.3, 0.2, 0.2, p] for p in sure])
    # uncertain ones first, least sure first, by turns of the families; "plain" never
    assert uncertainty_pool(pairs, probs) == [2, 4, 1, 0, 5, 3]
    assert uncertainty_pool(pairs, probs, config=PoolConfig(size=3)) == [2, 4, 1]
    disagreement = torch.tensor([0.0, 0.9, 0.1, 0.5, 0.0, 0.0, 0.0])
    assert uncertainty_pool(pairs, probs, disagreement=disagreement) == [1, 4, 2, 3, 5, 0]
    assert pool_summary(pairs, [0, 4])["family"] == {"negation": 1, "question": 1}
    chunks = [Chunk(id="c", text="t", decision=decision) for decision in ("adopt", "adopt", "ignore")]
    noted = [make_pair(4, id=str(n), family="negation", chunk=chunk) for n, chunk in enumerate(chunks)]
    assert uncertainty_pool(noted, probs[[1, 2, 1]], config=PoolConfig(size=2)) == [1, 2]
    with pytest.raises(ValueError, match=r"probs must be \[7, 4\]"):
        uncertainty_pool(pairs, probs[:3])
    with pytest.raises(ConfigError, match="families out of plain"):
        PoolConfig(families=("riddle",))


def samples_of(*texts):
    return [Sample(id="p1", k=number, completion=text) for number, text in enumerate(texts)]


def preferences_of(texts, *, pairs=None, config=None, oracles=None):
    pairs = pairs or [make_pair(4)]
    return make_preferences(
        pairs,
        {pair.id: samples_of(*texts) for pair in pairs},
        {pair.id: "prompt\n" for pair in pairs},
        {pair.id: answer(pair.label or 0) for pair in pairs} if oracles is None else oracles,
        read,
        config=config or PreferenceConfig(max_oracle_share=1.0),
    )


def test_preferences_by_hand():
    right, wrong, other = answer(4), answer(3, "near"), answer(2, "near")
    found = preferences_of([right, wrong, right + " ", wrong])
    assert [(row.chosen, row.rejected, row.source) for row in found.rows] == [(right, wrong, "own")]
    assert found.counts["duplicates"] == 2
    # blanks behind the text are a fault: the clean twin is kept, whichever comes first
    assert preferences_of([right + " ", right, wrong]).rows == found.rows
    found = preferences_of([wrong, other, answer(1, "mismatch")])
    assert [row.source for row in found.rows] == ["oracle", "oracle"]
    assert found.counts["over_prompt_limit"] == 1
    assert preferences_of([right, right]).counts["all_right"] == 1
    assert preferences_of([wrong], oracles={}).counts["no_oracle"] == 1
    assert preferences_of([]).rows == ()
    # a completion without any label can be rejected
    assert preferences_of([right, ""]).rows[0].rejected == ""


def test_preferences_are_levelled():
    right = {label: answer(label, "near") for label in (2, 3)}
    pairs = [make_pair(2, id=f"a{n}") for n in range(10)] + [make_pair(3, id=f"b{n}") for n in range(2)]
    found = preferences_of([right[2], right[3]], pairs=pairs, config=PreferenceConfig())
    assert Counter(read(row.chosen).label for row in found.rows) == {2: 4, 3: 2}
    assert found.counts["dropped_label"] == 6
    # one pair of a label would take all others away but two: it sets no limit below a tenth of an even share
    pairs = [make_pair(2, id=f"a{n}") for n in range(40)] + [make_pair(3, id="b")]
    found = preferences_of([right[2], right[3]], pairs=pairs, config=PreferenceConfig())
    assert Counter(read(row.chosen).label for row in found.rows) == {2: 40, 3: 1}
    assert (found.counts["dropped_label"], found.counts["scarce_labels"]) == (0, 1)
    # 8 own pairs and 10 of the oracle: 2 of 10 is a share of .2
    own, none = [make_pair(2, id=f"a{n}") for n in range(8)], [make_pair(2, id=f"b{n}") for n in range(10)]
    samples = {pair.id: samples_of(right[2], right[3]) for pair in own} | {
        pair.id: samples_of(right[3]) for pair in none
    }
    texts = dict.fromkeys(samples, "prompt\n")
    found = make_preferences([*own, *none], samples, texts, dict.fromkeys(samples, right[2]), read)
    assert found.counts["dropped_oracle"] == 8
    assert found.counts["oracle"] == 2


def test_bad_preferences_are_refused():
    def check(chosen, rejected):
        return check_preference(Preference(id="p1", prompt="", chosen=chosen, rejected=rejected), read)

    with pytest.raises(DataError, match="are the same text"):
        check(answer(4), answer(4) + "\n")
    with pytest.raises(DataError, match="have the same label 4"):
        check(answer(4), answer(4, rule="A01"))
    with pytest.raises(DataError, match="the chosen side has a fault: missing_tag"):
        check("4", answer(3))
    with pytest.raises(DataError, match="needs the gold label"):
        make_preferences([make_pair(None)], {}, {"p1": ""}, {}, read)
    with pytest.raises(DataError, match="no compact rationale: missing_tag at character 1"):
        check_completion("4", COMPACT, read)
