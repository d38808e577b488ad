"""τ and its intervals."""

import math

import numpy as np
import pytest

from draft.evaluation.tau import acceptance_length, bootstrap_gain, bootstrap_ratio


def test_the_bonus_token_counts():
    assert acceptance_length(emitted=12, verifications=5) == 2.4
    assert math.isnan(acceptance_length(0, 0))


def test_a_ratio_is_of_sums_and_not_a_mean_of_ratios():
    interval = bootstrap_ratio([10, 1], [2, 1])
    assert interval.value == pytest.approx(11 / 3)
    assert interval.low <= interval.value <= interval.high


def test_the_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        verifications = rng.integers(20, 60, size=60)
        emitted = verifications * rng.normal(2.0, 0.3, size=60)
        interval = bootstrap_ratio(emitted, verifications, resamples=1000, seed=seed)
        covered += interval.low <= 2.0 <= interval.high
    assert 180 <= covered <= 199


def test_pairing_removes_what_both_have_in_common():
    rng = np.random.default_rng(1)
    difficulty = rng.normal(2.0, 0.6, size=50)
    baseline = [(100 * d, 100.0) for d in difficulty]
    candidate = [(103 * d, 100.0) for d in difficulty]
    gain = bootstrap_gain(baseline, candidate)
    assert gain.value == pytest.approx(0.03) and gain.low == pytest.approx(0.03) and gain.high == pytest.approx(0.03)
    assert bootstrap_gain(baseline, baseline).high == 0
    shuffled = bootstrap_gain(baseline, candidate[::-1])
    assert shuffled.high - shuffled.low > 0.1


def test_nothing_measured_is_not_a_number():
    assert math.isnan(bootstrap_ratio([], []).value)
