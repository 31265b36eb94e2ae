"""Losses of a reward model."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kit.maths.preference import bradley_terry_loss, centering_penalty
from tests.maths import oracle

scores = st.floats(-5, 5, width=32)


def test_bradley_terry_by_hand():
    """Equal scores cost log 2; three to one odds (a difference of log 3) cost log(4/3), and log 2 with that margin."""
    chosen, rejected = torch.tensor([1.0, math.log(3)]), torch.tensor([1.0, 0.0])
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected), torch.tensor([math.log(2), math.log(4 / 3)]))
    with_margin = bradley_terry_loss(chosen, rejected, torch.tensor([0.0, math.log(3)]))
    torch.testing.assert_close(with_margin, torch.tensor([math.log(2), math.log(2)]))


@given(st.lists(st.tuples(scores, scores, scores), min_size=1, max_size=5))
def test_bradley_terry_agrees_with_its_definition(pairs):
    """Pair by pair, with any margin."""
    chosen, rejected, margin = torch.tensor(pairs, dtype=torch.float64).T
    expected = [oracle.bradley_terry(*pair) for pair in pairs]
    assert bradley_terry_loss(chosen, rejected, margin).tolist() == pytest.approx(expected, abs=1e-9)


@given(scores, scores, scores)
def test_bradley_terry_sees_differences_only(chosen, rejected, shift):
    """Both scores moved alike, the loss stays: hence the centering penalty."""
    c, r, s = (torch.tensor(x, dtype=torch.float64) for x in (chosen, rejected, shift))
    torch.testing.assert_close(bradley_terry_loss(c + s, r + s), bradley_terry_loss(c, r))


def test_bradley_terry_stays_finite():
    """A difference of -1000 costs 1000 nats, where log(sigmoid(-1000)) is -inf."""
    assert bradley_terry_loss(torch.tensor(-500.0), torch.tensor(500.0)).item() == 1000


def test_centering_by_hand():
    """(1 + 2)^2 = 9; a pair around zero costs nothing."""
    found = centering_penalty(torch.tensor([1.0, 1.5]), torch.tensor([2.0, -1.5]))
    assert found.tolist() == [9.0, 0.0]
