"""Sums, means and moments over real tokens."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kit.maths.masking import last_index, masked_mean, masked_sum, mean_and_variance, moments, whiten
from tests.maths import oracle
from tests.maths.helpers import completions, mask_of, padded, unpadded

X = torch.tensor([[1.0, 2.0, math.nan], [4.0, math.inf, math.nan]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_sum_and_mean_count_real_tokens_only():
    """Of 1, 2 | pad and 4 | pad the sum is 7 and the mean 7/3, whatever the padding holds."""
    assert masked_sum(X, MASK).item() == 7
    assert masked_mean(X, MASK).item() == pytest.approx(7 / 3)


def test_mean_takes_the_count_it_is_given():
    """With a count of 14 tokens (those of a whole minibatch) the part 7 contributes 1/2."""
    assert masked_mean(X, MASK, count=14).item() == 0.5


def test_padding_gets_no_gradient_even_where_it_is_nan():
    """The gradient of the mean of three tokens is 1/3 on each and 0 on padding."""
    x = X.clone().requires_grad_()
    masked_mean(x, MASK).backward()
    third = 1 / 3
    torch.testing.assert_close(x.grad, torch.tensor([[third, third, 0], [third, 0, 0]]))


def test_last_index_is_the_last_real_token():
    """Rows with 2, 1 and 3 real tokens end in columns 1, 0 and 2."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    assert last_index(mask).tolist() == [1, 0, 2]


@pytest.mark.parametrize("row", [[0, 0, 0], [1, 0, 1], [0, 1, 1]], ids=["empty", "hole", "left-padded"])
def test_last_index_refuses_what_is_not_right_padded(row):
    """An empty row, a hole and padding on the left are named by their row."""
    mask = torch.tensor([[1, 1, 0], row], dtype=torch.bool)
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        last_index(mask)


@given(completions(1))
def test_moments_give_mean_and_variance(rows):
    """Mean and population variance agree with their definitions over the real tokens."""
    values = [row[0] for row in rows]
    mean, variance = mean_and_variance(*moments(padded(values), mask_of(values)))
    expected_mean, expected_variance = oracle.mean_and_variance([v for row in values for v in row])
    assert mean.item() == pytest.approx(expected_mean, abs=1e-12)
    assert variance.item() == pytest.approx(expected_variance, abs=1e-12)


def test_moments_are_summed_in_float64():
    """4095.5 and 4096.5 in turn have variance 1/4; their squares do not fit float32, which would give 0 or worse."""
    x = torch.tensor([[4095.5, 4096.5] * 500])
    mean, variance = mean_and_variance(*moments(x, torch.ones_like(x, dtype=torch.bool)))
    assert (mean.item(), variance.item()) == (4096, 0.25)


def test_the_variance_of_a_constant_is_not_negative():
    """Rounding makes mean of squares - square of mean negative for some of these constants."""
    for constant in torch.arange(1, 100, dtype=torch.float64) / 10:
        x = constant.expand(1, 3)
        _, variance = mean_and_variance(*moments(x, torch.ones_like(x, dtype=torch.bool)))
        assert 0 <= variance.item() < 1e-12


def test_no_values_have_no_mean():
    """Moments of nothing raise rather than give NaN."""
    with pytest.raises(ValueError, match="no values"):
        mean_and_variance(*moments(X, torch.zeros_like(MASK)))


def test_whitening_by_hand():
    """1, 3 | pad and 5 | pad have mean 3 and variance 8/3: whitened -2, 0, 2 over sqrt(8/3); uncentred, 3 more."""
    x = torch.tensor([[1.0, 3.0, 50.0], [5.0, 50.0, 50.0]])
    unit = 2 / math.sqrt(8 / 3)
    torch.testing.assert_close(whiten(x, MASK, 3.0, 8 / 3), torch.tensor([[-unit, 0, 0], [unit, 0, 0]]))
    uncentred = whiten(x, MASK, 3.0, 8 / 3, center=False)
    torch.testing.assert_close(uncentred, torch.tensor([[3 - unit, 3, 0], [3 + unit, 0, 0]]))
    assert uncentred.dtype == torch.float32


@given(completions(1), st.integers(1, 3))
def test_whitening_over_two_shards_equals_the_whole(rows, cut):
    """Moments of two shards, added, whiten each shard as the whole is whitened."""
    values = [row[0] for row in rows] + [[0.5, -0.25], [1.0]]  # never constant
    x, mask = padded(values), mask_of(values)
    shards = (slice(None, cut), slice(cut, None))
    added = [sum(parts) for parts in zip(*(moments(x[s], mask[s]) for s in shards), strict=True)]
    mean, variance = mean_and_variance(*added)
    by_shard = torch.cat([whiten(x[s], mask[s], mean, variance) for s in shards])
    whole = whiten(x, mask, *mean_and_variance(*moments(x, mask)))
    torch.testing.assert_close(by_shard, whole, rtol=0, atol=1e-9)


@given(completions(1))
def test_whitened_numbers_have_mean_0_and_variance_1(rows):
    """Whatever came in, mean 0 and variance 1 come out, and zeros on padding."""
    values = [row[0] for row in rows] + [[0.5, -2.25]]
    x, mask = padded(values), mask_of(values)
    out = whiten(x, mask, *mean_and_variance(*moments(x, mask)))
    mean, variance = oracle.mean_and_variance([v for row in unpadded(out, mask) for v in row])
    assert mean == pytest.approx(0, abs=1e-9)
    assert variance == pytest.approx(1, abs=1e-6)
    assert (out[~mask] == 0).all()


def test_whitening_a_constant_stays_finite():
    """A batch in which all advantages are equal becomes zeros, not NaN."""
    x = torch.full((2, 3), 0.1)
    out = whiten(x, MASK, *mean_and_variance(*moments(x, MASK)))
    assert out.abs().max() < 1e-6
