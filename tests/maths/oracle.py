"""The formulas again, slowly: plain loops over single numbers, written from the papers and not from `rlhf_kit.maths`.

One function takes one completion (a list of its real tokens, no padding) or one number. Nothing is shared with the
code under test but the papers: log-softmax is taken from its definition in exact-enough float64, GAE as the explicit
double sum of Schulman et al. 2016, equation 16, and not as the backward recursion.
"""

import math
from collections.abc import Sequence


def log_softmax(logits: Sequence[float], temperature: float) -> list[float]:
    highest = max(logits)
    shifted = [(logit - highest) / temperature for logit in logits]
    log_normaliser = math.log(math.fsum(math.exp(x) for x in shifted))
    return [x - log_normaliser for x in shifted]


def exact_kl(p: Sequence[float], q: Sequence[float]) -> float:
    """Sum over the vocabulary of p log(p / q)."""
    return math.fsum(pi * math.log(pi / qi) for pi, qi in zip(p, q, strict=True) if pi > 0)


def completion_rewards(score: float, policy: Sequence[float], reference: Sequence[float], coef: float) -> list[float]:
    """Ziegler et al. 2019, equation 2, split over the tokens: log-probabilities of one completion under both."""
    rewards = []
    for t, (p, q) in enumerate(zip(policy, reference, strict=True)):
        reward = -coef * (p - q)
        if t == len(policy) - 1:
            reward = reward + score
        rewards.append(reward)
    return rewards


def completion_advantages(
    rewards: Sequence[float], values: Sequence[float], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """A_t = sum_l (gamma lam)^l delta_{t+l}, the state after the last token being terminal (value 0)."""
    length = len(rewards)
    deltas = []
    for t in range(length):
        value_after = values[t + 1] if t + 1 < length else 0.0
        deltas.append(rewards[t] + gamma * value_after - values[t])
    advantages = []
    for t in range(length):
        advantages.append(math.fsum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length)))
    returns = [a + v for a, v in zip(advantages, values, strict=True)]
    return advantages, returns


def clipped_objective(ratio: float, advantage: float, clip: float) -> float:
    """Schulman et al. 2017, equation 7, to be maximised."""
    bounded = min(max(ratio, 1 - clip), 1 + clip)
    return min(ratio * advantage, bounded * advantage)


def clipped_value_error(value: float, old: float, target: float, clip: float) -> float:
    bounded = min(max(value, old - clip), old + clip)
    return max((value - target) ** 2, (bounded - target) ** 2) / 2


def bradley_terry(chosen: float, rejected: float, margin: float) -> float:
    """-log of the probability that chosen is preferred, exp(c) / (exp(c) + exp(r)), the margin handed to rejected."""
    return -math.log(math.exp(chosen) / (math.exp(chosen) + math.exp(rejected + margin)))


def mean_and_variance(values: Sequence[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    return mean, math.fsum((v - mean) ** 2 for v in values) / len(values)


def wilson_ends(successes: float, n: float, z: float) -> tuple[float, float]:
    """The two rates p at which |successes / n - p| is exactly z standard errors sqrt(p (1 - p) / n), by bisection."""
    observed = successes / n

    def outside(p: float) -> bool:
        return (observed - p) ** 2 > z * z * p * (1 - p) / n

    def crossing(inside: float, limit: float) -> float:
        for _ in range(200):
            middle = (inside + limit) / 2
            inside, limit = (inside, middle) if outside(middle) else (middle, limit)
        return inside

    return crossing(observed, 0.0), crossing(observed, 1.0)


def length_regression(wins: Sequence[float], lengths_a: Sequence[float], lengths_b: Sequence[float]) -> float:
    """Dubois et al. 2024: sigmoid(intercept) of the logistic regression on tanh(d / std(d)), by small gradient steps.

    With normal priors of width 10 on the intercept and 2.5 on the slope.
    """
    d = [a - b for a, b in zip(lengths_a, lengths_b, strict=True)]
    _, variance = mean_and_variance(d)
    x = [math.tanh(di / math.sqrt(variance)) for di in d]
    intercept = slope = 0.0
    for _ in range(20_000):
        misses = [1 / (1 + math.exp(-intercept - slope * xi)) - win for xi, win in zip(x, wins, strict=True)]
        down_intercept = sum(misses) + intercept / 10**2
        down_slope = sum(m * xi for m, xi in zip(misses, x, strict=True)) + slope / 2.5**2
        intercept, slope = intercept - down_intercept / len(x), slope - down_slope / len(x)
    return 1 / (1 + math.exp(-intercept))
