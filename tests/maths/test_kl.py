"""KL estimates and the coefficients that weigh them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kit.maths.kl import AdaptiveKL, FixedKL, kl_k1, kl_k2, kl_k3
from tests.maths import oracle


def test_estimates_by_hand():
    """A token with p = 1/2, q = 1/4 has k1 = log 2, k3 = 1/2 - 1 + log 2; the other way round -log 2 and 1 - log 2.
    k2 is (log 2)^2 / 2 both ways.
    """
    p, q = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.5]).log()
    torch.testing.assert_close(kl_k1(p, q), torch.tensor([math.log(2), -math.log(2)]))
    torch.testing.assert_close(kl_k3(p, q), torch.tensor([math.log(2) - 0.5, 1 - math.log(2)]))
    torch.testing.assert_close(kl_k2(p, q), torch.tensor([math.log(2) ** 2 / 2] * 2))


@given(st.lists(st.tuples(st.floats(-4, 4), st.floats(-4, 4)), min_size=2, max_size=6))
def test_both_estimates_are_unbiased(logits):
    """Averaged over the vocabulary with the policy's own probabilities, k1 and k3 are the exact KL."""
    log_p, log_q = (oracle.log_softmax(row, 1.0) for row in zip(*logits, strict=True))
    p, q = ([math.exp(x) for x in row] for row in (log_p, log_q))
    weights, lp, lq = (torch.tensor(row, dtype=torch.float64) for row in (p, log_p, log_q))
    exact = oracle.exact_kl(p, q)
    assert (weights * kl_k1(lp, lq)).sum().item() == pytest.approx(exact, abs=1e-9)
    assert (weights * kl_k3(lp, lq)).sum().item() == pytest.approx(exact, abs=1e-9)


@given(st.lists(st.floats(-20, 0, width=32), min_size=1, max_size=6), st.lists(st.floats(-20, 0, width=32), min_size=6))
def test_k3_is_never_negative(policy, reference):
    """Not on a single token, however near or far the two are."""
    p, q = torch.tensor(policy), torch.tensor(reference[: len(policy)])
    assert (kl_k3(p, q) >= 0).all()


def test_policy_equal_to_reference_has_no_kl():
    """Exactly 0 by every estimate, not nearly."""
    logprobs = torch.randn(100)
    assert (kl_k2(logprobs, logprobs) == 0).all()
    assert (kl_k1(logprobs, logprobs) == 0).all()
    assert (kl_k3(logprobs, logprobs) == 0).all()


def test_k3_keeps_tiny_differences():
    """A difference d near 1e-3 has k3 = d^2 / 2 within d / 3 of it; exp(d) - 1 for expm1 would be off by a tenth."""
    d = torch.arange(8, 16) / 2**13
    torch.testing.assert_close(kl_k3(torch.zeros(8), d), d.square() / 2, rtol=1e-3, atol=0)


def test_fixed_coefficient_stays():
    """Whatever the KL."""
    control = FixedKL(0.05)
    control.update(1e9, 64)
    assert control.coef == 0.05


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),  # on target
        (6.6, 1 + 0.1 * 64 / 10_000),  # 10 % above
        (5.4, 1 - 0.1 * 64 / 10_000),
        (60.0, 1 + 0.2 * 64 / 10_000),  # clipped at 20 %
        (0.0, 1 - 0.2 * 64 / 10_000),
        (-3.0, 1 - 0.2 * 64 / 10_000),  # k1 can be negative
    ],
)
def test_adaptive_coefficient_by_hand(kl, factor):
    """It moves by its relative error, at most 20 %, times the completions' share of the horizon."""
    control = AdaptiveKL(0.1, target=6.0, horizon=10_000)
    control.update(kl, completions=64)
    assert control.coef == pytest.approx(0.1 * factor, rel=1e-12)


def test_adaptive_coefficient_counts_completions():
    """Twice the completions move it twice as far, whatever the number of updates."""
    control = AdaptiveKL(1.0, target=1.0, horizon=100)
    control.update(2.0, completions=10)
    assert control.coef == pytest.approx(1.02, rel=1e-12)
    control.update(2.0, completions=20)
    assert control.coef == pytest.approx(1.02 * 1.04, rel=1e-12)


def test_adaptive_coefficient_finds_its_target():
    """Where KL falls as the coefficient rises (KL = 1 / coef), it settles at the target."""
    control = AdaptiveKL(0.05, target=5.0, horizon=1000)
    for _ in range(500):
        control.update(1 / control.coef, completions=64)
    assert 1 / control.coef == pytest.approx(5.0, rel=1e-3)


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_adaptive_coefficient_refuses_what_is_not_finite(kl):
    """A NaN would pass through min and max as the number 0.2."""
    control = AdaptiveKL(0.1, target=6.0, horizon=10_000)
    with pytest.raises(ValueError, match="KL of"):
        control.update(kl, 64)
    assert control.coef == 0.1


@pytest.mark.parametrize("make", [lambda coef: FixedKL(coef), lambda coef: AdaptiveKL(coef, 6.0, 10_000)])
def test_a_coefficient_goes_on_from_its_state(make):
    """A new one given the old one's state moves on as the old one does."""
    old = make(0.1)
    old.update(9.0, 64)
    new = make(0.7)
    new.load(old.state())
    for control in (old, new):
        control.update(1.0, 64)
    assert new.coef == old.coef
