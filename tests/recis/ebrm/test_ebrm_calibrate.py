"""The calibrator: against known coefficients, at the edges, and the fit of cuts."""

import numpy as np
import pytest

from recis.ebrm import Calibrator
from recis.ebrm.calibrate import VerdictThresholds, fit_calibrator, fit_threshold, logit_of
from recis.errors import ConfigError


def test_logits_of_log_r():
    r = np.array([1e-20, 0.1, 0.5, 0.9, 1 - 1e-9])
    assert logit_of(np.log(r))[:4] == pytest.approx(np.log(r / (1 - r))[:4], rel=1e-9)
    assert logit_of(np.array([-1e-9]))[0] == pytest.approx(np.log(1e9), rel=1e-9)
    assert logit_of(np.array([0.0]))[0] == pytest.approx(69.0776, abs=1e-3)


def test_known_coefficients_are_found():
    generator = np.random.default_rng(0)
    x = generator.normal(0, 3, 40_000)
    labels = generator.random(40_000) < 1 / (1 + np.exp(-(0.5 * x + 1.0)))
    calibrator = fit_calibrator(-np.logaddexp(0, -x), labels)
    assert (calibrator.a, calibrator.b) == (pytest.approx(0.5, abs=0.03), pytest.approx(1.0, abs=0.05))
    # at the optimum the mean of p is the share of positives, and p is not correlated with the error
    p = calibrator.probability(-np.logaddexp(0, -x))
    assert p.mean() == pytest.approx(labels.mean(), abs=1e-4)
    assert abs(((p - labels) * x).mean()) < 1e-3
    weights = np.where(labels, 3.0, 1.0)
    tripled = fit_calibrator(
        np.repeat(-np.logaddexp(0, -x), np.where(labels, 3, 1)), np.repeat(labels, np.where(labels, 3, 1))
    )
    weighted = fit_calibrator(-np.logaddexp(0, -x), labels, weights)
    assert (weighted.a, weighted.b) == (pytest.approx(tripled.a, abs=1e-5), pytest.approx(tripled.b, abs=1e-5))


def test_separable_and_extreme_scores_stay_finite():
    calibrator = fit_calibrator(np.array([0.0, -1e-20, -50.0, -69.0]), np.array([1, 1, 0, 0]))
    p = calibrator.probability(np.array([0.0, -69.0]))
    assert np.isfinite([calibrator.a, calibrator.b]).all()
    assert p[0] > 0.99
    assert p[1] < 0.01


def test_what_cannot_be_fitted():
    log_r = np.log([0.9, 0.8, 0.2, 0.1])
    for labels, message in (
        ([1, 1, 1, 1], "needs relevant and irrelevant pairs; got 4 of 4"),
        ([0, 0, 1, 1], "worse than chance"),
        ([0, 1], r"must be \[N\]"),
        ([0, 1, np.nan, 1], "must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_calibrator(log_r, np.array(labels))
    for a, b in ((0.0, 0.0), (-1.0, 0.0), (1.0, np.nan), (np.inf, 0.0)):
        with pytest.raises(ConfigError, match="a must be above 0"):
            Calibrator(a=a, b=b)


def test_cuts():
    assert fit_threshold(np.array([0.9, 0.2, 0.6, 0.4]), np.array([1, 0, 1, 0])) == pytest.approx(0.5)
    assert fit_threshold(np.array([0.3, 0.3, 0.3]), np.array([1, 0, 1])) in (0.15, 0.65)
    with pytest.raises(ValueError, match="met and unmet"):
        fit_threshold(np.array([0.3]), np.array([1]))
    with pytest.raises(ConfigError, match="near at most match"):
        VerdictThresholds(near=0.9, match=0.5)
