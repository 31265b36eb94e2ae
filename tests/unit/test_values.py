"""The head of a value function without an adapter of its own."""

import torch

from rlhf_kit.values import HIDDEN, TrunkHead

CPU = torch.device("cpu")


def test_the_head_is_a_linear_one_and_a_network_beside_it():
    """w s + b + u gelu(D s + c), with gelu(x) = x Phi(x), for any weights."""
    head, states = TrunkHead(6, CPU, seed=0), torch.randn(2, 5, 6)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    inner = states @ head.inner.weight.T + head.inner.bias
    bent = inner * torch.distributions.Normal(0.0, 1.0).cdf(inner)
    expected = states @ head.linear.weight.T + head.linear.bias + bent @ head.outer.weight.T
    torch.testing.assert_close(head(states), expected)


def test_the_head_starts_at_zero_with_a_network_drawn_from_its_seed():
    """Whatever else was drawn before; its elements have variance 1 / (3 W)."""
    one, again, other = (TrunkHead(300, CPU, seed=seed) for seed in (1, 1, 2))
    assert not one(torch.randn(4, 300)).any()
    assert torch.equal(one.inner.weight, again.inner.weight)
    assert not torch.equal(one.inner.weight, other.inner.weight)
    assert one.inner.weight.shape == (HIDDEN, 300)
    torch.testing.assert_close(float(one.inner.weight.detach().var()), 1 / 900, rtol=0.05, atol=0)
