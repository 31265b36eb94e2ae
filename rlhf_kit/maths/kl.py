"""KL divergence from policy to reference, estimated on the policy's samples, and the coefficient it is weighed with.

Source of the estimators: Schulman 2020, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html
"""

import math

import torch
from torch import Tensor


def kl_k1(policy_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """log p - log q per token, in nats, the inputs' shape; p the policy that drew the tokens, q the reference.

    Unbiased for KL(p || q); single tokens may be negative. This is what the reward is charged.
    """
    return policy_logprobs - reference_logprobs


def kl_k2(policy_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """(log q/p)^2 / 2 per token, in nats, the inputs' shape; p the policy that drew the tokens, q the reference.

    Never negative, and of small variance near p = q, where its bias is small; far from it too large. Its gradient on
    the policy's samples is that of KL(p || q).
    """
    return 0.5 * (reference_logprobs - policy_logprobs).square()


def kl_k3(policy_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """q/p - 1 - log(q/p) per token, in nats, the inputs' shape; p the policy that drew the tokens, q the reference.

    Unbiased for KL(p || q) as k1 is, of smaller variance near p = q, and never negative.
    """
    log_ratio = reference_logprobs - policy_logprobs
    return torch.expm1(log_ratio) - log_ratio


class FixedKL:
    """A KL coefficient that stays as it is."""

    def __init__(self, coef: float):
        self.coef = coef

    def update(self, kl: float, completions: int) -> None:
        """Nothing changes; here so that both kinds are used alike."""

    def state(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]


class AdaptiveKL:
    """A KL coefficient steered towards a KL of `target` nats per completion.

    With e = clip(KL / target - 1, -0.2, 0.2), each update multiplies it by 1 + e * completions / horizon. The paper
    writes K = 0.1 for 1 / horizon in updates; openai/lm-human-preferences counts the horizon in completions (10,000),
    and so do we.

    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.2.
    """

    def __init__(self, coef: float, target: float, horizon: float):
        self.coef = coef
        self.target = target  # nats per completion
        self.horizon = horizon  # completions

    def update(self, kl: float, completions: int) -> None:
        """Move `coef` after a rollout of `completions` whose mean KL was `kl` nats per completion.

        Raises: ValueError when `kl` is not finite.
        """
        if not math.isfinite(kl):
            raise ValueError(f"the KL coefficient cannot follow a KL of {kl}")
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * completions / self.horizon

    def state(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]
