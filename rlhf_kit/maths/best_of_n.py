"""Best-of-n: the completion of n samples that scores highest. What it reaches, and how far it is from the sampler."""

import math
from collections.abc import Sequence

import numpy as np


def expected_best(scores: Sequence[float] | np.ndarray, values: Sequence[float] | np.ndarray, n: int) -> float:
    """Mean value of the highest-scoring of `n` of N samples, over all ways to draw the n from the N.

    scores, values: [N] of the samples of one prompt; the value may be the score itself, a gold score or a length. It is
    unbiased for every n <= N, and uses all samples for each n: of samples ordered by score, the i-th (from 0) is the
    best of a draw in C(i, n - 1) of C(N, n) draws. Of equal scores each is as likely to be taken.

    Raises: ValueError when n is not in 1..N or the lengths differ.
    Source: Nakano et al. 2021, "WebGPT" (arXiv 2112.09332), appendix I.
    """
    ranked, worth = np.asarray(scores, dtype=np.float64), np.asarray(values, dtype=np.float64)
    count = ranked.size
    if worth.shape != ranked.shape or not 1 <= n <= count:
        raise ValueError(f"best of {n} of {count} samples with {worth.size} values")
    order = np.argsort(ranked, kind="stable")
    ranked, worth = ranked[order], worth[order]
    total = math.comb(count, n)
    weights = np.asarray([math.comb(place, n - 1) / total for place in range(count)])
    _, group = np.unique(ranked, return_inverse=True)
    of_group = np.bincount(group, worth) / np.bincount(group)
    return float((weights * of_group[group]).sum())


def kl_bound(n: float) -> float:
    """KL of best-of-n to the sampler, in nats: log n - (n - 1) / n; an upper end, reached where no two samples tie.

    Sources: Stiennon et al. 2020 (arXiv 2009.01325), appendix G.3; Beirami et al. 2024 (arXiv 2401.01879), theorem 1.
    """
    return math.log(n) - (n - 1) / n
