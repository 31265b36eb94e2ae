"""What each token of a completion earns."""

import torch
from torch import Tensor

from rlhf_kit.maths.masking import last_index


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Token rewards [B, C]: -kl_coef * kl on every real token, plus the score on the last one; zero on padding.

    `scores` [B] belong to whole completions, `kl` [B, C] is in nats per token. Summed over a completion this is
    R(x, y) = r(x, y) - kl_coef * log(p(y|x) / q(y|x)).

    Raises: ValueError for a completion without a token, or a mask that is not right-padded.
    Source: Ziegler et al. 2019, equation 2.
    """
    rewards = torch.where(mask, -kl_coef * kl, torch.zeros_like(kl))
    return rewards.scatter_add(1, last_index(mask).unsqueeze(1), scores.to(rewards.dtype).unsqueeze(1))
