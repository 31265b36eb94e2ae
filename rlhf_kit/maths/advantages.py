"""How much better than expected each token was."""

import torch
from torch import Tensor

from rlhf_kit.maths.masking import require_right_padded


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both [B, C] and zero on padding, by generalised advantage estimation.

        delta_t = r_t + gamma * V_{t+1} - V_t        A_t = delta_t + gamma * lam * A_{t+1}        return_t = A_t + V_t

    `values[:, t]` is V_t, the value of the state before completion token t (the paper's V(s_t)), and `rewards[:, t]`
    what token t earned. A completion ends with its last real token T: V_{T+1} = A_{T+1} = 0, whether it ended by
    itself or was cut. What `rewards` and `values` hold on padding does not matter.

    Raises: ValueError for a mask [B, C] that is not right-padded.
    Source: Schulman et al. 2016, "High-Dimensional Continuous Control Using GAE", equations 11, 12 and 16.
    """
    require_right_padded(mask)
    rewards = torch.where(mask, rewards, torch.zeros_like(rewards))
    values = torch.where(mask, values, torch.zeros_like(values))

    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage  # stays 0 on padding, where everything is
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def leave_one_out(earned: Tensor) -> Tensor:
    """What each of the K completions of G prompts earned, less the mean of the K - 1 others of its prompt; [G, K].

        A_i = R_i - sum_{j != i} R_j / (K - 1)

    Each row adds up to 0.

    Source: Ahmadian et al. 2024, "Back to Basics", section 3.3, the RLOO estimator; Kool et al. 2019.
    """
    count = earned.shape[1]
    return earned - (earned.sum(1, keepdim=True) - earned) / (count - 1)


def group_normalised(scores: Tensor) -> Tensor:
    """What each of the K completions of G prompts scored, in standard deviations from its prompt's mean; [G, K].

        A_i = (r_i - mean(r)) / (std(r) + 1e-4)

    The variance is divided by K - 1. Where all scores are the same the advantages are 0.

    Source: Shao et al. 2024, "DeepSeekMath", section 4.1.2; the 1e-4 as in trl.
    """
    return (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-4)
