"""Best-of-n by all draws there are, and its KL by the definition."""

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kit.maths.best_of_n import expected_best, kl_bound

numbers = st.lists(st.floats(-5, 5), min_size=1, max_size=7)


@given(numbers, st.data())
def test_it_is_the_mean_over_all_draws(scores, data):
    """Of every choice of n of the N samples, the value of the one that scores highest; equal ones share."""
    values = data.draw(st.lists(st.floats(-5, 5), min_size=len(scores), max_size=len(scores)))
    n = data.draw(st.integers(1, len(scores)))
    found = []
    for draw in combinations(range(len(scores)), n):
        best = max(scores[row] for row in draw)
        ties = [row for row in range(len(scores)) if scores[row] == best]
        found.append(sum(values[row] for row in ties) / len(ties))
    assert expected_best(scores, values, n) == pytest.approx(sum(found) / len(found), abs=1e-9)


@given(numbers)
def test_its_ends(scores):
    """One sample is the mean, all samples the best, and more are never worse by the score itself."""
    assert expected_best(scores, scores, 1) == pytest.approx(np.mean(scores))
    assert expected_best(scores, scores, len(scores)) == pytest.approx(max(scores))
    reached = [expected_best(scores, scores, n) for n in range(1, len(scores) + 1)]
    assert all(later >= earlier - 1e-9 for earlier, later in pairwise(reached))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_bound_is_the_kl_of_best_of_n(n):
    """Of many equally likely samples without ties, the k-th best is drawn with probability (k^n - (k-1)^n) / N^n."""
    count = 20_000
    rank = np.arange(1, count + 1, dtype=np.float64) / count
    drawn = rank**n - (rank - 1 / count) ** n
    kl = float((drawn * np.log(drawn * count)).sum())
    assert kl == pytest.approx(kl_bound(n), abs=1e-3)


def test_wrong_calls():
    for n, values in ((0, [1.0]), (2, [1.0]), (1, [1.0, 2.0])):
        with pytest.raises(ValueError, match="best of"):
            expected_best([1.0], values, n)
    assert kl_bound(1) == 0 and kl_bound(16) == math.log(16) - 15 / 16
