"""Token rewards, advantages and returns."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kit.maths.advantages import gae, group_normalised, leave_one_out
from rlhf_kit.maths.kl import kl_k1
from rlhf_kit.maths.rewards import token_rewards
from tests.maths import oracle
from tests.maths.helpers import completions, mask_of, padded, unpadded

unit = st.floats(0, 1)


def test_token_rewards_by_hand():
    """KL of .1 and .3 nats at coefficient 2 costs .2 and .6; the score 5 lands on the last real token, padding is 0."""
    kl = torch.tensor([[0.1, 0.3, 9.0], [0.5, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    rewards = token_rewards(torch.tensor([5.0, -1.0]), kl, mask, 2.0)
    torch.testing.assert_close(rewards, torch.tensor([[-0.2, 4.4, 0.0], [-2.0, 0.0, 0.0]]))


@given(completions(2), st.floats(-3, 3, width=32), unit)
def test_token_rewards_agree_with_the_paper(rows, score, coef):
    """Token by token, for completions of several lengths in one batch."""
    policy, reference = ([row[i] for row in rows] for i in (0, 1))
    mask = mask_of(policy)
    kl = kl_k1(padded(policy), padded(reference, fill=-7.0))
    rewards = token_rewards(torch.full((len(rows),), score), kl, mask, coef)
    for found, (p, q) in zip(unpadded(rewards, mask), rows, strict=True):
        assert found == pytest.approx(oracle.completion_rewards(score, p, q, coef), abs=1e-9)
    assert (rewards[~mask] == 0).all()


def test_a_completion_without_a_token_has_no_place_for_its_score():
    """An empty row raises; the score would land on padding."""
    with pytest.raises(ValueError, match="empty"):
        token_rewards(torch.ones(1), torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.bool), 0.1)


def test_gae_by_hand():
    """Two tokens, gamma 1, lambda 1/2: the advantages come out by pencil.

    rewards 0, 1 and values .25, .5: delta_1 = 1 - .5 = .5 (nothing after the end), delta_0 = 0 + .5 - .25 = .25,
    A_1 = .5, A_0 = .25 + .5 * .5 = .5; returns A + V = .75, 1.
    """
    rewards, values = torch.tensor([[0.0, 1.0, 7.0]]), torch.tensor([[0.25, 0.5, 7.0]])
    advantages, returns = gae(rewards, values, torch.tensor([[True, True, False]]), 1.0, 0.5)
    assert advantages.tolist() == [[0.5, 0.5, 0.0]]
    assert returns.tolist() == [[0.75, 1.0, 0.0]]


@given(completions(2), unit, unit, st.integers(0, 3))
def test_gae_agrees_with_the_double_sum(rows, gamma, lam, extra):
    """For any batch, discount, lambda and padding, whatever the padding holds."""
    rewards, values = ([row[i] for row in rows] for i in (0, 1))
    mask = mask_of(rewards, extra)
    found = gae(padded(rewards, extra), padded(values, extra, fill=float("nan")), mask, gamma, lam)
    expected = [oracle.completion_advantages(r, v, gamma, lam) for r, v in rows]
    for part in (0, 1):
        for row, row_expected in zip(unpadded(found[part], mask), expected, strict=True):
            assert row == pytest.approx(row_expected[part], abs=1e-9)
        assert (found[part][~mask] == 0).all()


@given(completions(2), unit)
def test_lambda_0_is_the_td_error(rows, gamma):
    """r_t + gamma V_{t+1} - V_t, with V = 0 after the last token."""
    rewards, values = ([row[i] for row in rows] for i in (0, 1))
    advantages, _ = gae(padded(rewards), padded(values), mask_of(rewards), gamma, 0.0)
    for found, r, v in zip(unpadded(advantages, mask_of(rewards)), rewards, values, strict=True):
        after = [*v[1:], 0.0]
        assert found == pytest.approx([r[t] + gamma * after[t] - v[t] for t in range(len(r))], abs=1e-9)


@given(completions(2), unit)
def test_lambda_1_returns_are_the_discounted_rewards_to_go(rows, gamma):
    """With lambda 1 the values drop out of the returns."""
    rewards, values = ([row[i] for row in rows] for i in (0, 1))
    _, returns = gae(padded(rewards), padded(values), mask_of(rewards), gamma, 1.0)
    for found, r in zip(unpadded(returns, mask_of(rewards)), rewards, strict=True):
        to_go = [sum(gamma ** (k - t) * r[k] for k in range(t, len(r))) for t in range(len(r))]
        assert found == pytest.approx(to_go, abs=1e-9)


@given(completions(2), unit, unit)
def test_extra_padding_changes_nothing(rows, gamma, lam):
    """Three more columns of rubbish leave every real token exactly as it was."""
    rewards, values = ([row[i] for row in rows] for i in (0, 1))
    tight = gae(padded(rewards), padded(values), mask_of(rewards), gamma, lam)
    wide = gae(padded(rewards, 3), padded(values, 3), mask_of(rewards, 3), gamma, lam)
    for a, b in zip(tight, wide, strict=True):
        assert torch.equal(a, b[:, : a.shape[1]])
        assert (b[:, a.shape[1] :] == 0).all()


def test_gae_refuses_left_padding():
    """A mask with its padding on the left would be read as a completion cut in two."""
    with pytest.raises(ValueError, match="right-padded"):
        gae(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[False, True]]), 1.0, 1.0)


def test_leave_one_out_by_hand():
    """Of 1, 2 and 6 the others' means are 4, 3.5 and 1.5; completions that all earn the same teach nothing."""
    found = leave_one_out(torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]]))
    torch.testing.assert_close(found, torch.tensor([[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]))


def test_group_normalised_by_hand():
    """0, 2 and 4 have mean 2 and, divided by two, variance 4; equal scores give 0."""
    found = group_normalised(torch.tensor([[0.0, 2.0, 4.0], [3.0, 3.0, 3.0]]))
    expected = 2 / (2 + 1e-4)
    torch.testing.assert_close(found, torch.tensor([[-expected, 0.0, expected], [0.0, 0.0, 0.0]]))
