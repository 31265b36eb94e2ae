"""One score from several reward models."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kit.maths.ensembles import ensemble_score, ensemble_std

members = st.lists(st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=3), min_size=1, max_size=5)


def test_scores_by_hand():
    """Members 1, 2, 6: mean 3, least 1, deviation sqrt((4 + 1 + 9) / 3), and three less half of that."""
    scores = torch.tensor([[1.0], [2.0], [6.0]])
    assert ensemble_std(scores).item() == pytest.approx(math.sqrt(14 / 3))
    assert ensemble_score(scores, "mean", 0.5).item() == pytest.approx(3)
    assert ensemble_score(scores, "worst", 0.5).item() == 1
    assert ensemble_score(scores, "lower", 0.5).item() == pytest.approx(3 - math.sqrt(14 / 3) / 2)


@given(members, st.floats(0, 2))
def test_caution_only_lowers(rows, k):
    """The least and the lower score are never above the mean, and without k the lower score is the mean."""
    scores = torch.tensor(rows, dtype=torch.float64)
    mean = ensemble_score(scores, "mean", k)
    assert (ensemble_score(scores, "worst", k) <= mean + 1e-12).all()
    assert (ensemble_score(scores, "lower", k) <= mean).all()
    assert torch.equal(ensemble_score(scores, "lower", 0.0), mean)


def test_one_member_is_its_own_score():
    """An ensemble of one is certain."""
    scores = torch.tensor([[0.3, -7.0]])
    for kind in ("mean", "worst", "lower"):
        assert torch.equal(ensemble_score(scores, kind, 1.0), scores[0])
    assert torch.equal(ensemble_std(scores), torch.zeros(2))
