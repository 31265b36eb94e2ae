"""Losses of a reward model on pairs of completions. Results are per pair."""

import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected - margin) per pair, in nats; scores and margins [B].

    Source: Ouyang et al. 2022 (InstructGPT), equation 1; the margin from Touvron et al. 2023 (Llama 2), equation 2.
    """
    difference = chosen - rejected
    return -F.logsigmoid(difference if margin is None else difference - margin)


def centering_penalty(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(r_chosen + r_rejected)^2 per pair [B]: pulls a pair's scores to lie around 0, which preferences leave open.

    Source: Eisenstein et al. 2023, "Helping or Herding?", appendix A.
    """
    return (chosen + rejected).square()
