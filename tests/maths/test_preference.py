"""Losses of a reward model."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kit.maths.preference import (
    bradley_terry_loss,
    centering_penalty,
    kto_loss,
    language_modelling_loss,
    pair_weights,
    smoothed,
    soft_bradley_terry_loss,
)
from tests.maths import oracle

scores = st.floats(-5, 5, width=32)
shares = st.floats(0, 1)


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


# ---------------------------------------------------------------- labels that are not certain


def test_soft_labels_by_hand():
    """At a difference of log 3: three in four right costs 3/4 log(4/3) + 1/4 log 4; certain costs log(4/3)."""
    chosen, rejected = torch.tensor([math.log(3), math.log(3)]), torch.zeros(2)
    found = soft_bradley_terry_loss(chosen, rejected, torch.tensor([0.75, 1.0]), torch.zeros(2))
    expected = [0.75 * math.log(4 / 3) + 0.25 * math.log(4), math.log(4 / 3)]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_certain_labels_are_not_changed():
    """With probability 1 and margin 0 the loss is that of Bradley and Terry to the last bit."""
    chosen, rejected = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    found = soft_bradley_terry_loss(chosen, rejected, torch.ones(100), torch.zeros(100))
    assert torch.equal(found, bradley_terry_loss(chosen, rejected))


@given(scores, scores, shares, st.floats(0, 3))
def test_soft_labels_have_no_side(one, other, share, margin):
    """Calling the other one chosen, with the other probability, is the same statement and costs the same."""
    a, b, p, m = (torch.tensor(x, dtype=torch.float64) for x in (one, other, share, margin))
    there, back = soft_bradley_terry_loss(a, b, p, m), soft_bradley_terry_loss(b, a, 1 - p, m)
    torch.testing.assert_close(there, back, rtol=1e-9, atol=1e-12)


@given(st.floats(0.05, 0.95))
def test_soft_labels_are_learnt_as_what_they_are(share):
    """Without a margin the cheapest difference is the log of the odds: the gradient vanishes there, for a tie at 0."""
    difference = torch.tensor(math.log(share / (1 - share)), dtype=torch.float64, requires_grad=True)
    zero = torch.zeros((), dtype=torch.float64)
    soft_bradley_terry_loss(difference, zero, torch.tensor(share, dtype=torch.float64), zero).backward()
    assert float(difference.grad) == pytest.approx(0, abs=1e-9)


def test_smoothing_by_hand():
    """One label in ten turned round: certain is .9, impossible .1, a tie a tie, .8 is .8 x .9 + .2 x .1 = .74."""
    found = smoothed(torch.tensor([1.0, 0.0, 0.5, 0.8]), 0.1)
    assert found.tolist() == pytest.approx([0.9, 0.1, 0.5, 0.74])
    assert torch.equal(smoothed(torch.tensor([1.0, 0.3]), 0.0), torch.tensor([1.0, 0.3]))


# ---------------------------------------------------------------- rankings


def test_pair_weights_by_hand():
    """Three pairs of the first prompt count a third each, the one pair of the second counts whole."""
    assert pair_weights(torch.tensor([0, 0, 1, 0])).tolist() == pytest.approx([1 / 3, 1 / 3, 1, 1 / 3])


def test_a_ranking_of_three_by_hand():
    """Scores 2, 1, 0 in the right order: (2 log(1 + e^-1) + log(1 + e^-2)) / 3, equation 1 of InstructGPT."""
    r = torch.tensor([2.0, 1.0, 0.0])
    losses = bradley_terry_loss(r[[0, 0, 1]], r[[1, 2, 2]])
    found = (pair_weights(torch.zeros(3, dtype=torch.long)) * losses).sum()
    assert float(found) == pytest.approx((2 * math.log1p(math.exp(-1)) + math.log1p(math.exp(-2))) / 3)


# ---------------------------------------------------------------- the auxiliary objective


def test_language_modelling_by_hand():
    """Tokens of probability 1/2 and 1/8 cost (log 2 + log 8) / 2 each; in two parts of the step the same together."""
    logprobs = torch.tensor([0.5, 0.125]).log()
    assert float(language_modelling_loss(logprobs, 2)) == pytest.approx(2 * math.log(2))
    parts = [language_modelling_loss(part, torch.tensor(2)) for part in logprobs.split(1)]
    assert float(sum(parts)) == pytest.approx(2 * math.log(2))


def test_kto_by_hand():
    """At the KL both kinds cost 1/2; log 3 / beta above it a desirable one costs 1/4 and an undesirable one 3/4."""
    log_ratio = torch.tensor([2.0, 2.0, 2.0 + math.log(3) / 0.5, 2.0 + math.log(3) / 0.5])
    desirable = torch.tensor([True, False, True, False])
    losses = kto_loss(log_ratio, desirable, torch.tensor(2.0), 0.5)
    torch.testing.assert_close(losses, torch.tensor([0.5, 0.5, 0.25, 0.75]))
