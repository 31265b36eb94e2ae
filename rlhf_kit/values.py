"""PPO's value function: what a policy may still earn, from each token on.

Either its own adapter and head, which start as the reward model; or a head alone (`TrunkHead`), whose states cost no
pass: those of the policy, and where an adapter on the same base scores, those from which it scored.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from rlhf_kit.batches import Rollout
from rlhf_kit.models import SharedBase, new_head
from rlhf_kit.rollout import ValueFunction, completion_states

HIDDEN = 128
"""Units of the network in a `TrunkHead`: its size grows with the states' width, and not with its square."""


class TrunkHead(nn.Module):
    """w s + b + u gelu(D s + c) of states s [..., W]; w, u and b start at zero."""

    def __init__(self, width: int, device: torch.device, seed: int) -> None:
        """seed: of D, whose elements have variance 1 / (3 W)."""
        super().__init__()
        self.linear = nn.Linear(width, 1, device=device, dtype=torch.float32)
        self.inner = nn.Linear(width, HIDDEN, device=device, dtype=torch.float32)
        self.outer = nn.Linear(HIDDEN, 1, bias=False, device=device, dtype=torch.float32)
        drawn = torch.randn(HIDDEN, width, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            self.inner.weight.copy_(drawn / (3 * width) ** 0.5)
            for zero in (self.inner.bias, self.outer.weight, self.linear.weight, self.linear.bias):
                zero.zero_()

    def forward(self, states: Tensor) -> Tensor:
        """Return [..., 1] of states [..., W]."""
        return self.linear(states) + self.outer(nn.functional.gelu(self.inner(states)))


def value_head(
    shared: SharedBase,
    kind: Literal["adapter", "trunk"],
    reward_role: str | None,
    mean: float,
    std: float,
    seed: int,
) -> nn.Module:
    """Return a trainable value head that starts as the normalised reward head, or at zero where there is none.

    The normalised score is (w·h + b - mean) / std, so the head starts at weights w / std and bias (b - mean) / std; of
    an ensemble the role is one member. On the trunk h are the reward model's states, behind the policy's.
    seed: of what is drawn of it.
    """
    width, device = shared.width, shared.device
    head: nn.Module
    if kind == "adapter":
        head = linear = new_head(width, device, bias=True)
    else:
        read = width if reward_role is None else 2 * width
        head = TrunkHead(read, device, seed)
        linear = head.linear
    with torch.no_grad():
        linear.weight.zero_()
        if reward_role is not None:
            reward = shared.heads[reward_role]
            assert isinstance(reward, nn.Linear)
            linear.weight[:, -width:] = reward.weight / std
            linear.bias.copy_((reward.bias - mean) / std)
    return head


def value_function(shared: SharedBase, role: str, kind: Literal["adapter", "trunk"]) -> ValueFunction:
    """Return the value function: the role's head on its adapter's states, or on the policy's and the reward model's."""

    def values(rollout: Rollout, policy_states: Tensor) -> Tensor:
        mask = rollout.completion_mask
        if kind == "adapter":
            states = completion_states(shared, role, rollout)[mask]
        else:
            states = torch.cat([policy_states[mask], rollout.reward_states[mask]], dim=-1)
        found = shared.heads[role](states.float()).squeeze(-1)
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, found)

    return values


def no_values(rollout: Rollout, policy_states: Tensor) -> Tensor:
    """Return the values of a run without a value function: zeros."""
    return torch.zeros_like(rollout.values)
