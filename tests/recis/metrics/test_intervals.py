"""Bootstrap intervals cover as often as they say; IPS and SNIPS by hand and in the mean."""

import math

import numpy as np
import pytest
import torch

from recis.errors import DataError
from recis.metrics import bootstrap, ips, snips


def test_bootstrap_is_seeded_and_holds_the_value():
    values = np.random.default_rng(0).normal(3.0, 1.0, 200)
    first = bootstrap(lambda rows: float(values[rows].mean()), 200, num_resamples=200, seed=5)
    again = bootstrap(lambda rows: float(values[rows].mean()), 200, num_resamples=200, seed=5)
    other = bootstrap(lambda rows: float(values[rows].mean()), 200, num_resamples=200, seed=6)
    assert first == again != other
    assert first.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / math.sqrt(200)
    assert first.low == pytest.approx(values.mean() - half, abs=0.25 * half)
    assert first.high == pytest.approx(values.mean() + half, abs=0.25 * half)
    assert str(first) == f"{first.value:.4f} [{first.low:.4f}, {first.high:.4f}]"


def test_bootstrap_covers():
    """Of 200 90 % intervals for a mean about 180 hold the truth (binomial: 168 to 191 at four sigma, less a little bias)."""
    rng = np.random.default_rng(1)
    held = 0
    for trial in range(200):
        values = rng.exponential(1.0, 80)
        interval = bootstrap(lambda rows, v=values: float(v[rows].mean()), 80, num_resamples=150, level=0.9, seed=trial)
        held += interval.low <= 1.0 <= interval.high
    assert 160 <= held <= 192


def test_bootstrap_by_group_draws_whole_groups_and_is_wider():
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(40), 25)
    values = rng.normal(0.0, 1.0, 40)[groups] + rng.normal(0.0, 0.1, 1000)
    order = rng.permutation(1000)
    groups, values = groups[order], values[order]
    seen = []

    def mean(rows: np.ndarray) -> float:
        seen.append(rows)
        return float(values[rows].mean())

    by_group = bootstrap(mean, 1000, groups=torch.from_numpy(groups), num_resamples=200)
    for rows in seen[:-1]:
        drawn, counts = np.unique(groups[rows], return_counts=True)
        assert (counts % 25 == 0).all()
        assert len(rows) == 1000
        for group in drawn[:3]:
            assert set(np.flatnonzero(groups == group)) == set(rows[groups[rows] == group])
    by_row = bootstrap(lambda rows: float(values[rows].mean()), 1000, num_resamples=200)
    assert by_group.high - by_group.low > 3 * (by_row.high - by_row.low)


def test_bootstrap_leaves_out_undefined_draws():
    sometimes = bootstrap(lambda rows: math.nan if rows[0] == 0 else float(rows.mean()), 5, num_resamples=100)
    assert sometimes.low < sometimes.high
    never = bootstrap(lambda rows: math.nan, 5, num_resamples=10)
    assert math.isnan(never.low)
    assert math.isnan(never.value)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_rows": 0}, "at least one row"),
        ({"num_rows": 3, "num_resamples": 1}, "num_resamples"),
        ({"num_rows": 3, "level": 1.0}, "level"),
        ({"num_rows": 3, "groups": np.zeros(2, int)}, r"groups must be \[3\]"),
    ],
)
def test_bootstrap_refuses(arguments, match):
    with pytest.raises(ValueError, match=match):
        bootstrap(lambda rows: 0.0, **arguments)


def test_ips_and_snips_by_hand():
    rewards, logged, target = [1.0, 0, 1, 0], [0.5, 0.5, 0.25, 0.25], [0.25, 0.5, 0.5, 0.25]
    # ratios .5 1 2 1, terms .5 0 2 0
    plain = ips(torch.tensor(rewards), torch.tensor(logged), torch.tensor(target))
    assert plain.interval.value == pytest.approx(2.5 / 4)
    assert plain.num_effective == pytest.approx(4.5**2 / 6.25)
    error = np.std([0.5, 0, 2, 0], ddof=1) / 2
    assert plain.interval.high - plain.interval.value == pytest.approx(1.959964 * error, rel=1e-6)
    normalised = snips(np.array(rewards), np.array(logged), np.array(target))
    assert normalised.interval.value == pytest.approx(2.5 / 4.5)
    residuals = np.array([0.5, 1, 2, 1]) * (np.array(rewards) - 2.5 / 4.5) / (4.5 / 4)
    error = math.sqrt((residuals**2).sum() / 3 / 4)
    assert normalised.interval.value - normalised.interval.low == pytest.approx(1.959964 * error, rel=1e-6)
    clipped = ips(np.array(rewards), np.array(logged), np.array(target), max_ratio=1.0)
    assert clipped.interval.value == pytest.approx(1.5 / 4)
    assert clipped.num_clipped == 1


def test_estimates_are_right_on_average_and_cover():
    """A log of two actions under (.8, .2), rewards .1 and .6; the target (.3, .7) earns .45."""
    rng = np.random.default_rng(3)
    values = {"ips": [], "snips": []}
    held = {"ips": 0, "snips": 0}
    for _ in range(200):
        action = (rng.random(800) < 0.2).astype(int)
        reward = (rng.random(800) < np.array([0.1, 0.6])[action]).astype(float)
        logged, target = np.array([0.8, 0.2])[action], np.array([0.3, 0.7])[action]
        for name, estimate in (("ips", ips), ("snips", snips)):
            interval = estimate(reward, logged, target).interval
            values[name].append(interval.value)
            held[name] += interval.low <= 0.45 <= interval.high
    for name, found in values.items():
        assert np.mean(found) == pytest.approx(0.45, abs=float(4 * np.std(found) / math.sqrt(200))), name
        assert 178 <= held[name] <= 200, name
    assert np.std(values["snips"]) < np.std(values["ips"])


def test_off_policy_edges():
    nothing = snips(np.ones(3), np.ones(3), np.zeros(3))
    assert math.isnan(nothing.interval.value)
    assert nothing.num_effective == 0
    assert ips(np.ones(3), np.ones(3), np.zeros(3)).interval.value == 0
    assert math.isnan(ips(np.ones(1), np.ones(1), np.ones(1)).interval.low)
    for name, columns in (
        ("reward", ([math.inf, 0], [0.5, 0.5], [0.5, 0.5])),
        ("logged", ([0.0, 0], [0.5, 0.0], [0.5, 0.5])),
        ("target", ([0.0, 0], [0.5, 0.5], [1.5, 0.5])),
    ):
        with pytest.raises(DataError, match=rf"column '{name}'"):
            ips(*map(np.array, columns))
    with pytest.raises(ValueError, match="N > 0"):
        ips(np.ones(0), np.ones(0), np.ones(0))
    with pytest.raises(ValueError, match="max_ratio"):
        ips(np.ones(1), np.ones(1), np.ones(1), max_ratio=0.0)
    with pytest.raises(ValueError, match="level"):
        snips(np.ones(1), np.ones(1), np.ones(1), level=0.0)
