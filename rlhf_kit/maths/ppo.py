"""The two clipped losses of PPO and the KL between its steps. Every result is per token; reduce with `masked_mean`."""

import torch
from torch import Tensor

from rlhf_kit.maths.kl import kl_k3


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Negated clipped objective per token, and where the clip made it larger (bool); the inputs' shape.

        ratio = p / p_old        loss = max(-A * ratio, -A * clip(ratio, 1 - clip, 1 + clip))

    Where the second is true the gradient is zero. Padding must be finite.

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", equation 7.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(unclipped, clipped), clipped > unclipped


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, value_clip: float) -> tuple[Tensor, Tensor]:
    """Half the squared error per token, clipped, and where the clip made it larger (bool); the inputs' shape.

        loss = max((V - R)^2, (clip(V, V_old - value_clip, V_old + value_clip) - R)^2) / 2

    Where the second is true the gradient is zero.

    Source: openai/baselines `ppo2/model.py`; not in the PPO paper.
    """
    near_old = old_values + (values - old_values).clamp(-value_clip, value_clip)
    unclipped = (values - returns).square()
    clipped = (near_old - returns).square()
    return 0.5 * torch.maximum(unclipped, clipped), clipped > unclipped


def approx_kl(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """KL(old policy || policy) per token by the k3 estimator, in nats: how far the update has moved; never negative."""
    return kl_k3(old_logprobs, logprobs)
