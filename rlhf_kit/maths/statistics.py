"""Intervals and win rates for what is measured on held-out prompts. Plain numbers and NumPy; no tensors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class Rate:
    """A rate in [0, 1] with its 95 % interval, over `count` prompts."""

    rate: float
    ci: tuple[float, float]
    count: int


def wilson_interval(successes: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Low and high end of the interval of a rate of `successes` in `n` trials; half successes (ties) are fine.

    Raises: ValueError when `n` is 0 or `successes` is outside 0..n.
    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials")
    rate = successes / n
    centre = rate + z * z / (2 * n)
    half_width = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # exact at the ends, where rounding would leave -1e-17 or 1 + 1e-16
    low = 0.0 if successes == 0 else (centre - half_width) / scale
    high = 1.0 if successes == n else (centre + half_width) / scale
    return low, high


def clustered_wilson_interval(successes: Sequence[float], trials: Sequence[int]) -> tuple[float, float]:
    """The Wilson interval of a rate over trials that come in clusters, such as the pairs of one prompt: of each cluster
    its successes (ties counted half) and its trials.

    Trials of a cluster are not independent, so they count as fewer: n / deff, where deff is the variance of the rate
    over clusters against that of independent trials. At a rate of 0 or 1 nothing tells them apart, and each cluster
    counts as one. Clusters of one trial each give `wilson_interval`.

    Raises: ValueError when there is no trial.
    Sources: Kish 1965, "Survey Sampling", section 8.2 (deff); Korn and Graubard 1998, "Confidence intervals for
    proportions with small expected number of positive counts estimated from survey data" (the count n / deff).
    """
    right, count = np.asarray(successes, dtype=np.float64), np.asarray(trials, dtype=np.float64)
    n = float(count.sum())
    if n <= 0:
        raise ValueError("interval of no trials")
    rate = float(right.sum()) / n
    variance = float(np.square(right - rate * count).sum()) / n**2  # of a ratio of two sums, linearised
    effective = rate * (1 - rate) / variance if variance > 0 else float(np.count_nonzero(count))
    effective = min(effective, n)
    return wilson_interval(rate * effective, effective)


def bootstrap_interval(values: Sequence[float], seed: int, resamples: int = 2000) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values`, from `resamples` draws with replacement.

    Raises: ValueError when there are no values.
    Source: Efron 1979, "Bootstrap Methods: Another Look at the Jackknife".
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise ValueError("interval of no values")
    draws = np.random.default_rng(seed).integers(data.size, size=(resamples, data.size))
    low, high = np.quantile(data[draws].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def win_rate(a: Sequence[float], b: Sequence[float]) -> Rate:
    """How often system a scores above system b, one completion of each a prompt, ties counted half; Wilson interval.

    With ties the interval is on the wide side. Raises: ValueError for no prompts or unequal lengths.
    """
    wins = _wins(a, b)
    return Rate(float(wins.mean()), wilson_interval(float(wins.sum()), wins.size), wins.size)


def length_matched_win_rate(
    scores_a: Sequence[float], lengths_a: Sequence[float], scores_b: Sequence[float], lengths_b: Sequence[float]
) -> Rate:
    """The rate at which a would win over b on a prompt if both completions were equally long.

    A logistic regression of win (1), tie (0.5), loss (0) on x = tanh(d / std(d)), d the difference of lengths a - b,
    read at d = 0: sigmoid(intercept), with its 95 % profile-likelihood interval. This is the length-controlled win rate
    of AlpacaEval without its per-instruction term. It was taken rather than keeping only pairs of about equal length
    because it uses every prompt: where PPO moved the length, few such pairs are left. Where none are near d = 0 it
    extrapolates, and the interval says so by its width.

    Normal priors, 2.5 wide on the slope and 10 on the intercept, in logits, keep it finite when one side always wins
    (Gelman et al. 2008 use Cauchy ones of these widths).

    Raises: ValueError for no prompts or unequal lengths.
    Source: Dubois et al. 2024, "Length-Controlled AlpacaEval: A Simple Way to Debias Automatic Evaluators", section 3.
    """
    wins = _wins(scores_a, scores_b)
    difference = np.asarray(lengths_a, dtype=np.float64) - np.asarray(lengths_b, dtype=np.float64)
    if difference.shape != wins.shape:
        raise ValueError(f"{wins.size} scores, {difference.size} lengths")
    spread = difference.std()
    x = np.tanh(difference / spread) if spread > 0 else np.sign(difference)  # its limit

    fit = _LengthRegression(wins, x)
    intercept, cost = fit.best()
    limit = cost + Z95**2 / 2
    low = _bisect(lambda a: fit.cost_at(a) - limit, intercept, intercept - 40)
    high = _bisect(lambda a: fit.cost_at(a) - limit, intercept, intercept + 40)
    rate, low, high = (1 / (1 + math.exp(-a)) for a in (intercept, low, high))
    return Rate(rate, (low, high), wins.size)


def correlation(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float | None:
    """Pearson's correlation of two columns; None where one of them does not vary."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return float(np.corrcoef(x, y)[0, 1]) if x.size and x.std() > 0 and y.std() > 0 else None


def explained_variance(residual_variance: float, return_variance: float) -> float:
    """1 - Var(return - value) / Var(return): 1 for perfect values, 0 for a constant, below 0 for worse than one.

    Both variances come from `masking.moments`, added over processes. NaN where the returns do not vary.
    """
    return 1 - residual_variance / return_variance if return_variance > 0 else math.nan


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error: the standard deviation (n - 1) over the root of n.

    Of differences on the same prompts, the error of a paired comparison. Raises: ValueError for fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"standard error of {len(values)} values")
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def _wins(a: Sequence[float], b: Sequence[float]) -> np.ndarray:
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.size == 0 or first.shape != second.shape:
        raise ValueError(f"{first.size} scores against {second.size}; as many of each, at least one")
    return np.where(first == second, 0.5, (first > second).astype(np.float64))


@dataclass(frozen=True)
class _LengthRegression:
    """Negative log posterior of P(win) = sigmoid(intercept + slope * x), minimised over one or both weights."""

    wins: np.ndarray
    x: np.ndarray

    def best(self) -> tuple[float, float]:
        """The intercept at the minimum, and the minimum."""
        weights = self._minimise(np.zeros(2), free=[0, 1])
        return float(weights[0]), self._cost(weights)

    def cost_at(self, intercept: float) -> float:
        """The minimum over the slope with the intercept held."""
        return self._cost(self._minimise(np.array([intercept, 0.0]), free=[1]))

    def _cost(self, weights: np.ndarray) -> float:
        logit = weights[0] + weights[1] * self.x
        prior = 0.5 * float(np.sum(_PRIOR_PRECISION * weights**2))
        return float(np.sum(np.logaddexp(0, logit) - self.wins * logit)) + prior

    def _minimise(self, weights: np.ndarray, free: list[int]) -> np.ndarray:
        design = np.stack([np.ones_like(self.x), self.x], axis=1)
        while True:  # Newton's method on a strictly convex function, the step halved until it improves
            p = 1 / (1 + np.exp(-design @ weights))
            gradient = design.T @ (p - self.wins) + _PRIOR_PRECISION * weights
            hessian = (design * (p * (1 - p))[:, None]).T @ design + np.diag(_PRIOR_PRECISION)
            step = np.zeros(2)
            step[free] = np.linalg.solve(hessian[np.ix_(free, free)], gradient[free])
            while self._cost(weights - step) > self._cost(weights) and np.abs(step).max() > 1e-9:
                step = step / 2
            weights = weights - step
            if np.abs(step).max() <= 1e-9:
                return weights


_PRIOR_PRECISION = np.array([10.0**-2, 2.5**-2])  # of intercept and slope


def _bisect(function: Callable[[float], float], inside: float, outside: float) -> float:
    """Where `function` crosses from negative at `inside` to positive at `outside`."""
    for _ in range(50):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if function(middle) < 0 else (inside, middle)
    return inside


def krippendorff_alpha(votes: np.ndarray) -> float | None:
    """Krippendorff's alpha for nominal labels: 1 is full agreement, 0 what chance gives, below it disagreement.

    votes: [items, labels], how many annotators gave an item a label. Items with one vote say nothing about agreement.
    None where no item has two votes, or every vote is the same, for then chance would agree as well.

    Source: Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", sections C and D: alpha = 1 - D_o / D_e
    over the matrix of coincidences. The library that computes it is under the GPL.
    """
    counts = np.asarray(votes, dtype=np.float64)
    counts = counts[counts.sum(axis=1) >= 2]
    per_item, per_label = counts.sum(axis=1), counts.sum(axis=0)
    total = per_label.sum()
    observed = float(((per_item**2 - (counts**2).sum(axis=1)) / (per_item - 1)).sum())
    expected = float((total**2 - (per_label**2).sum()) / (total - 1)) if total else 0.0
    return None if expected == 0 else 1 - observed / expected
