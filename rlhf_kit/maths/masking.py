"""Sums, means, moments and whitening over the real tokens of right-padded tensors."""

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of `x` where `mask` is true, as a scalar. Padding may hold anything, NaN included."""
    return torch.where(mask, x, torch.zeros_like(x)).sum()


def masked_mean(x: Tensor, mask: Tensor, count: Tensor | float | None = None) -> Tensor:
    """Sum of `x` where `mask` is true, divided by `count`, as a scalar.

    `count` is the number of real tokens of everything the result is to be a mean of (default: of `mask`). Given the
    count of a whole minibatch over all processes, the results of its microbatches add up to the minibatch's mean.
    """
    return masked_sum(x, mask) / (mask.sum() if count is None else count)


def require_right_padded(mask: Tensor) -> None:
    """Nothing, if every row of `mask` [B, C] is one run of real tokens, from the first column on, then padding.

    Raises: ValueError naming the first rows that are empty or have a hole.
    """
    broken = ~mask[:, 0] | (mask[:, 1:] & ~mask[:, :-1]).any(dim=1)
    if broken.any():
        rows = broken.nonzero().flatten().tolist()
        raise ValueError(f"mask rows {rows[:5]} of {len(mask)} are empty or not right-padded")


def last_index(mask: Tensor) -> Tensor:
    """Column [B] of the last real token of each row of the right-padded `mask` [B, C].

    Raises: ValueError for a row without a real token or with a hole.
    """
    require_right_padded(mask)
    return mask.sum(dim=1) - 1


def moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, sum and sum of squares of `x` where `mask` is true: three float64 scalars.

    They add up: sum each over microbatches or processes, then call `mean_and_variance`.
    """
    real = torch.where(mask, x, torch.zeros_like(x)).double()
    return mask.sum().double(), real.sum(), real.square().sum()


def mean_and_variance(count: Tensor, total: Tensor, total_of_squares: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance (divided by n, not n - 1) from the moments, float64 scalars.

    Raises: ValueError when `count` is 0.
    """
    if count <= 0:
        raise ValueError("mean of no values: the mask is false everywhere")
    mean = total / count
    variance = total_of_squares / count - mean.square()
    return mean, variance.clamp(min=0.0)  # a constant's variance can come out as -1e-17


def whiten(x: Tensor, mask: Tensor, mean: Tensor | float, variance: Tensor | float, center: bool = True) -> Tensor:
    """`x` scaled to unit variance, and to zero mean if `center`; the same shape and dtype, zero on padding.

    The moments are given, so that they can be those of all processes. A constant stays finite: 1e-8 is added to the
    variance. With `center=False` the mean is kept: (x - mean) / std + mean.

    Source: openai/lm-human-preferences, `utils/core.py`, `whiten`.
    """
    scaled = (x - mean) * torch.rsqrt(torch.as_tensor(variance, dtype=torch.float64, device=x.device) + 1e-8)
    whitened = scaled if center else scaled + mean
    return torch.where(mask, whitened, torch.zeros_like(whitened))
