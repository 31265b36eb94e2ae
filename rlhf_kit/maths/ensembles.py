"""One score from those of several reward models, and how far these disagree. The members come first: [n, ...].

Members' scores must share a zero and a unit: preferences fix neither, so raw scores of two members cannot be compared.
"""

from typing import Literal

from torch import Tensor


def ensemble_score(scores: Tensor, kind: Literal["mean", "worst", "lower"], k: float) -> Tensor:
    """The members' mean, their least, or mean - k standard deviations; `k` matters to the last alone.

    Sources: Coste et al. 2024, "Reward Model Ensembles Help Mitigate Overoptimization", section 3 (mean, worst case;
    their third subtracts a variance); Eisenstein et al. 2023, "Helping or Herding?", section 5 (a standard deviation).
    """
    if kind == "worst":
        return scores.amin(0)
    mean = scores.mean(0)
    return mean - k * ensemble_std(scores) if kind == "lower" else mean


def ensemble_std(scores: Tensor) -> Tensor:
    """Standard deviation over the members (divided by n): 0 of one member, or where all agree."""
    return scores.std(0, correction=0)
