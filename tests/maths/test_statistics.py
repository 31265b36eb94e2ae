"""Intervals and win rates."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kit.maths.statistics import (
    Z95,
    bootstrap_interval,
    clustered_wilson_interval,
    explained_variance,
    length_matched_win_rate,
    wilson_interval,
    win_rate,
)
from tests.maths import oracle


def test_wilson_by_hand():
    """At z = 2, 5 of 10: centre (.5 + 4/20) / 1.4 = .5, half width 2 sqrt(.025 + .01) / 1.4 = .2673."""
    low, high = wilson_interval(5, 10, z=2)
    half = 2 * math.sqrt(0.025 + 0.01) / 1.4
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half))


@given(st.integers(1, 500), st.floats(0, 1))
def test_wilson_ends_are_z_standard_errors_away(n, share):
    """The ends solve (observed - p)^2 = z^2 p (1 - p) / n, which defines the interval; none, all and ties included."""
    successes = round(2 * n * share) / 2
    found = wilson_interval(successes, n)
    assert found == pytest.approx(oracle.wilson_ends(successes, n, Z95), abs=1e-7)
    assert 0 <= found[0] <= successes / n <= found[1] <= 1


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_impossible_counts(successes, n):
    """No trials, more successes than trials, fewer than none."""
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(successes, n)


def test_clusters_of_one_are_independent_trials():
    """One pair a prompt, no ties: the plain interval."""
    low, high = clustered_wilson_interval([1.0] * 7 + [0.0] * 3, [1] * 10)
    assert (low, high) == pytest.approx(wilson_interval(7, 10), abs=1e-12)


def test_pairs_that_say_the_same_count_once():
    """Ten prompts whose 36 pairs are all right or all wrong are ten trials and not 360."""
    found = clustered_wilson_interval([36.0] * 7 + [0.0] * 3, [36] * 10)
    assert found == pytest.approx(wilson_interval(7, 10), abs=1e-12)


def test_clusters_by_hand():
    """Right 2 of 3 and 1 of 3: p = 1/2, residuals +-1/2, variance (1/4 + 1/4) / 36 = 1/72, so 1/4 / (1/72) = 18 trials,
    but six are all there are.
    """
    assert clustered_wilson_interval([2.0, 1.0], [3, 3]) == pytest.approx(wilson_interval(3, 6))
    # right 3 of 3 and 0 of 3: residuals +-3/2, variance (9/4 + 9/4) / 36 = 1/8, so 1/4 / (1/8) = 2 trials
    assert clustered_wilson_interval([3.0, 0.0], [3, 3]) == pytest.approx(wilson_interval(1, 2))


def test_a_perfect_score_counts_prompts():
    """Where nothing tells pairs of a prompt apart, each prompt is one trial; a prompt without a pair is none."""
    assert clustered_wilson_interval([36.0] * 5 + [0.0], [36] * 5 + [0]) == wilson_interval(5, 5)
    with pytest.raises(ValueError, match="no trials"):
        clustered_wilson_interval([0.0], [0])


def test_the_clustered_interval_covers():
    """Of 1,000 data sets of 40 prompts with 6 pairs that agree more often than not, 95 % hold the true rate 0.7, to two
    in a hundred; the plain interval of the 240 pairs holds it clearly less often.
    """
    draw = np.random.default_rng(0)
    covered = plain = 0
    for _ in range(1000):
        easy = draw.beta(1.4, 0.6, size=40)  # mean 0.7, intraclass correlation 1/3
        right = draw.binomial(6, easy).astype(float)
        low, high = clustered_wilson_interval(right.tolist(), [6] * 40)
        covered += low <= 0.7 <= high
        low, high = wilson_interval(float(right.sum()), 240)
        plain += low <= 0.7 <= high
    assert covered / 1000 == pytest.approx(0.95, abs=0.02)
    assert plain < 850


def test_bootstrap_is_about_two_standard_errors():
    """Of 400 normal numbers the interval of the mean is mean -+ 1.96 s / sqrt(400), to a tenth; the seed decides it."""
    values = np.random.default_rng(0).normal(3, 2, 400)
    error = 1.96 * values.std() / 20
    low, high = bootstrap_interval(values, seed=1)
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.1 * error)
    assert bootstrap_interval(values, seed=1) == (low, high)
    assert bootstrap_interval(values, seed=2) != (low, high)


def test_bootstrap_of_a_constant_is_a_point():
    """Nothing varies, so nothing is uncertain; and no values have no interval."""
    assert bootstrap_interval([2.5] * 7, seed=0) == (2.5, 2.5)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_interval([], seed=0)


def test_win_rate_counts_ties_half():
    """Win, tie, loss, win: 2.5 of 4."""
    found = win_rate([1, 2, 3, 9], [0, 2, 5, 1])
    assert found.rate == 0.625
    assert found.ci == wilson_interval(2.5, 4)
    assert found.count == 4


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1))
def test_win_rates_of_both_sides_add_up_to_one(pairs):
    """a over b and b over a are complements, with or without ties, matched by length or not."""
    a, b = zip(*pairs, strict=True)
    assert win_rate(a, b).rate + win_rate(b, a).rate == pytest.approx(1)
    lengths = [abs(x - y) + i % 5 for i, (x, y) in enumerate(pairs)]
    there, back = length_matched_win_rate(a, lengths, b, b), length_matched_win_rate(b, b, a, lengths)
    assert there.rate + back.rate == pytest.approx(1, abs=1e-6)
    assert there.ci[0] + back.ci[1] == pytest.approx(1, abs=1e-6)


def test_equal_lengths_leave_the_win_rate():
    """Without a difference in length there is nothing to correct: 60 of 100 stay 60 % (the prior moves it by 1e-4)."""
    found = length_matched_win_rate([1] * 60 + [0] * 40, [7] * 100, [0] * 60 + [1] * 40, [7] * 100)
    assert found.rate == pytest.approx(0.6, abs=2e-4)
    assert found.ci == pytest.approx(wilson_interval(60, 100), abs=0.005)


def test_the_matched_rate_agrees_with_the_paper():
    """On eight prompts with wins, ties and losses at all sorts of lengths, it is what slow gradient descent finds."""
    wins, a, b = [1, 1, 0.5, 0, 1, 1, 0, 1], [40, 35, 20, 22, 50, 18, 9, 31], [20, 30, 25, 24, 20, 24, 30, 30]
    found = length_matched_win_rate(wins, a, [1 - win for win in wins], b)
    assert found.rate == pytest.approx(oracle.length_regression(wins, a, b), abs=1e-6)


def test_winning_by_length_alone_is_no_win():
    """a wins exactly where it is longer, which is mostly: 75 % raw, about half when matched."""
    rng = np.random.default_rng(0)
    longer = rng.normal(8, 12, 400)
    wins = (longer > 0).astype(float)
    assert win_rate(wins, 1 - wins).rate > 0.7
    found = length_matched_win_rate(wins, 40 + longer, 1 - wins, [40.0] * 400)
    assert found.ci[0] < 0.5 < found.ci[1]


def test_winning_whatever_the_length_is_a_win():
    """a is longer everywhere and wins 80 % however much: matched by length it still wins."""
    rng = np.random.default_rng(0)
    wins = (rng.random(600) < 0.8).astype(float)
    found = length_matched_win_rate(wins, 40 + rng.normal(5, 10, 600), 1 - wins, [40.0] * 600)
    assert found.rate == pytest.approx(0.8, abs=0.05)
    assert found.ci[0] > 0.65


def test_the_matched_interval_covers():
    """Drawn from its own model with a rate of .73 at equal length, the interval holds .73 in about 95 of 100 runs."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        difference = rng.normal(-8, 10, 150)
        x = np.tanh(difference / difference.std())
        wins = (rng.random(150) < 1 / (1 + np.exp(-(1.0 - 2.0 * x)))).astype(float)
        low, high = length_matched_win_rate(wins, 30 + difference, 1 - wins, [30.0] * 150).ci
        covered += low < 1 / (1 + math.exp(-1.0)) < high
    assert 88 <= covered <= 100


def test_lengths_that_all_moved_alike_leave_a_wide_interval():
    """Always 10 tokens shorter and always better: whether by length nobody can tell, and the interval says so."""
    wins = [1.0] * 35 + [0.0] * 15
    moved = length_matched_win_rate(wins, [10] * 50, [0.5] * 50, [20] * 50).ci
    equal = length_matched_win_rate(wins, [20] * 50, [0.5] * 50, [20] * 50).ci
    assert moved[1] - moved[0] > 2 * (equal[1] - equal[0])


def test_winning_every_time_stays_finite():
    """Complete separation has no maximum likelihood; the priors keep rate and interval inside (0, 1)."""
    found = length_matched_win_rate([1] * 50, list(range(50)), [0] * 50, [20] * 50)
    assert 0.9 < found.ci[0] < found.rate < found.ci[1] < 1


def test_unequal_numbers_are_refused():
    """As many scores of each system as lengths, and at least one."""
    with pytest.raises(ValueError, match="0 scores against 0"):
        win_rate([], [])
    with pytest.raises(ValueError, match="2 scores against 1"):
        win_rate([1, 2], [1])
    with pytest.raises(ValueError, match="2 scores, 1 lengths"):
        length_matched_win_rate([1, 2], [1], [1, 2], [1])


def test_explained_variance_by_hand():
    """A residual variance of 1 of 4 leaves 3/4 explained; returns that do not vary have none to explain."""
    assert explained_variance(1.0, 4.0) == 0.75
    assert explained_variance(8.0, 4.0) == -1.0
    assert math.isnan(explained_variance(0.0, 0.0))
