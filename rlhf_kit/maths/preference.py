"""Losses of a reward model that learns from comparisons. Results are per pair; scores in, nats out.

A ranking of K completions is its K-choose-2 pairs, a pair is a ranking of two, and each completion has one score
however many pairs it is in. With weights w of `pair_weights` a prompt's loss is

    sum over its pairs of w * (soft_bradley_terry_loss + center_coef * centering_penalty),

to which `language_modelling_loss` may be added.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected - margin) per pair, in nats; scores and margins [Q].

    Source: Ouyang et al. 2022 (InstructGPT), equation 1; the margin from Touvron et al. 2023 (Llama 2), equation 2.
    """
    difference = chosen - rejected
    return -F.logsigmoid(difference if margin is None else difference - margin)


def soft_bradley_terry_loss(chosen: Tensor, rejected: Tensor, probability: Tensor, margin: Tensor) -> Tensor:
    """p L(chosen, rejected) + (1 - p) L(rejected, chosen) per pair [Q], L being `bradley_terry_loss` with the margin.

    What L is expected to be where `chosen` is the better one with probability p [Q]; p = 1 is L itself, p = 1/2 a tie,
    cheapest at equal scores. Whichever is better, it is to be so by the margin.

    Source: Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO", the loss of cDPO.
    """
    right = bradley_terry_loss(chosen, rejected, margin)
    wrong = bradley_terry_loss(rejected, chosen, margin)
    return probability * right + (1 - probability) * wrong


def smoothed(probability: Tensor, label_smoothing: float) -> Tensor:
    """p (1 - e) + (1 - p) e: the probability of a label p that is turned round with probability e; ties stay ties.

    Source: Mitchell 2023, as above; Szegedy et al. 2016, "Rethinking the Inception Architecture", section 7.
    """
    return probability * (1 - label_smoothing) + (1 - probability) * label_smoothing


def pair_weights(prompt: Tensor) -> Tensor:
    """1 / number of pairs of the same prompt, float32 [Q]; `prompt` [Q] holds numbers from 0 that say whose a pair is.

    So every prompt counts the same, and a completion is not learnt from K - 1 times as often as a pair's.

    Source: Ouyang et al. 2022, equation 1, the factor 1 / (K choose 2); here over the pairs that are learnt from, which
    are fewer where ties are left out.
    """
    return 1 / torch.bincount(prompt)[prompt].float()


def centering_penalty(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(r_chosen + r_rejected)^2 per pair [Q]: pulls a pair's scores to lie around 0, which preferences leave open.

    Source: Eisenstein et al. 2023, "Helping or Herding?", appendix A.
    """
    return (chosen + rejected).square()


def kto_loss(log_ratio: Tensor, desirable: Tensor, kl: Tensor, kl_coef: float) -> Tensor:
    """1 - sigmoid(kl_coef (log_ratio - kl)) per desirable completion, 1 - sigmoid(kl_coef (kl - log_ratio)) else; [N].

    log_ratio [N]: of policy to reference, in nats. desirable [N] bool. kl: a scalar, the KL to compare with, from
    completions of other prompts; it is 0 or more and has no gradient.

    Source: Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", equation 8, without the
    weights.
    """
    return 1 - torch.sigmoid(kl_coef * torch.where(desirable, log_ratio - kl, kl - log_ratio))


def language_modelling_loss(logprobs: Tensor, tokens: Tensor | float) -> Tensor:
    """-sum of `logprobs` [n] / `tokens`, a scalar in nats: L1 of L3 = L2 + lambda L1, as a mean over tokens.

    `tokens` counts all of a step, so that the parts of its microbatches and processes add up.

    Source: Radford et al. 2018 (GPT-1), equations 1 and 5; there sums over a data set, and to be maximised.
    """
    return -logprobs.sum() / tokens
