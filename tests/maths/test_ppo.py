"""The clipped losses of PPO."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kit.maths.masking import masked_mean
from rlhf_kit.maths.ppo import approx_kl, policy_loss, value_loss
from tests.maths import oracle
from tests.maths.helpers import completions, mask_of, padded

token = st.tuples(*[st.floats(-3, 3, width=32)] * 3)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.5, 2.0, -2.4, True),  # no more than 1.2 is paid for
        (1.5, -2.0, 3.0, False),  # a worse token made likelier is charged in full
        (0.5, 2.0, -1.0, False),
        (0.5, -2.0, 1.6, True),  # nor below .8
        (1.1, 2.0, -2.2, False),
        (1.0, 0.0, 0.0, False),
    ],
)
def test_policy_loss_by_hand(ratio, advantage, loss, clipped):
    """All corners of the clip at .2; where it acts there is no gradient, elsewhere it is -A * ratio."""
    logprob = torch.tensor(math.log(ratio) - 1.0, dtype=torch.float64, requires_grad=True)
    old = torch.tensor(-1.0, dtype=torch.float64)
    found, was_clipped = policy_loss(logprob, old, torch.tensor(advantage), 0.2)
    found.backward()
    assert found.item() == pytest.approx(loss)
    assert was_clipped.item() is clipped
    assert logprob.grad.item() == pytest.approx(0 if clipped else -advantage * ratio)


@given(st.lists(token, min_size=1, max_size=9), st.floats(0.05, 0.5))
def test_policy_loss_agrees_with_the_paper(tokens, clip):
    """The negated objective, token by token."""
    logprobs, old, advantages = torch.tensor(tokens, dtype=torch.float64).T
    found, _ = policy_loss(logprobs, old, advantages, clip)
    expected = [-oracle.clipped_objective(math.exp(lp - o), a, clip) for lp, o, a in tokens]
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_first_step_is_the_policy_gradient():
    """With old = new nothing is clipped and the gradient is -A."""
    logprobs = torch.randn(50, requires_grad=True)
    advantages = torch.randn(50)
    loss, clipped = policy_loss(logprobs, logprobs.detach(), advantages, 0.2)
    loss.sum().backward()
    assert not clipped.any()
    torch.testing.assert_close(logprobs.grad, -advantages)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "clipped"),
    [
        (1.0, 0.0, 2.0, 0.5 * 1.8**2, True),  # moved past old + .2 towards the target: charged as if still at .2
        (3.0, 0.0, 2.0, 0.5 * 1.8**2, True),
        (-1.0, 0.0, 2.0, 0.5 * 3.0**2, False),  # moved away: charged in full
        (0.1, 0.0, 2.0, 0.5 * 1.9**2, False),
        (0.1, 0.0, 0.1, 0.0, False),
    ],
)
def test_value_loss_by_hand(value, old, target, loss, clipped):
    """Half the larger of the two squares; where the clipped one is larger there is no gradient."""
    v = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    found, was_clipped = value_loss(v, torch.tensor(old), torch.tensor(target, dtype=torch.float64), 0.2)
    found.backward()
    assert found.item() == pytest.approx(loss)
    assert was_clipped.item() is clipped
    assert v.grad.item() == pytest.approx(0 if clipped else value - target)


@given(st.lists(token, min_size=1, max_size=9), st.floats(0.05, 0.5))
def test_value_loss_agrees_with_the_oracle(tokens, clip):
    """Token by token."""
    values, old, returns = torch.tensor(tokens, dtype=torch.float64).T
    found, _ = value_loss(values, old, returns, clip)
    assert found.tolist() == pytest.approx([oracle.clipped_value_error(*t, clip) for t in tokens], rel=1e-9, abs=1e-9)


def test_approx_kl_is_that_of_old_to_new():
    """A token that had 1/2 and now has 1/4 counts 1/4 / 1/2 - 1 - log(1/2) = log 2 - 1/2; unmoved, exactly 0."""
    old, new = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.5]).log()
    torch.testing.assert_close(approx_kl(new, old), torch.tensor([math.log(2) - 0.5, 0.0]))


@given(completions(3), st.integers(1, 4))
def test_microbatches_add_up_to_the_minibatch(rows, size):
    """Cut into microbatches of any size, reduced with the whole count, loss and gradient are those of the whole."""
    logprobs, old, advantages = (padded([row[i] for row in rows], fill=0.5) for i in range(3))
    mask = mask_of([row[0] for row in rows])

    def reduced(piece: slice):
        x = logprobs.clone().requires_grad_()
        per_token, _ = policy_loss(x[piece], old[piece], advantages[piece], 0.2)
        loss = masked_mean(per_token, mask[piece], mask.sum())
        loss.backward()
        return loss.detach(), x.grad

    whole, whole_gradient = reduced(slice(None))
    parts = [reduced(slice(start, start + size)) for start in range(0, len(rows), size)]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    torch.testing.assert_close(sum(gradient for _, gradient in parts), whole_gradient)
    assert (whole_gradient[~mask] == 0).all()
