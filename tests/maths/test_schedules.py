"""Learning rates over the steps of a training."""

import pytest

from rlhf_kit.maths.schedules import learning_rate_factor


def factors(schedule: str, steps: int, warmup: int) -> list[float]:
    return [learning_rate_factor(schedule, step, steps, warmup) for step in range(steps)]


def test_warmup_by_hand():
    """Four warm-up steps go 1/4, 2/4, 3/4, 1; then the peak stays."""
    assert factors("constant", 6, 4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_by_hand():
    """After one step of warm-up, four steps go down from the peak by a quarter each, and none is at 0."""
    assert factors("linear", 5, 1) == [1.0, 1.0, 0.75, 0.5, 0.25]


def test_cosine_by_hand():
    """Half a cosine over four steps: (1 + cos(0, pi/4, pi/2, 3 pi/4)) / 2."""
    half_root = 2**-0.5
    assert factors("cosine", 4, 0) == pytest.approx([1.0, (1 + half_root) / 2, 0.5, (1 - half_root) / 2])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (3, 3), (3, 5), (10, 1)])
def test_every_step_learns(schedule, steps, warmup):
    """No step has a rate of 0 or above the peak, even where the warm-up takes all the steps or more."""
    assert all(0 < factor <= 1 for factor in factors(schedule, steps, warmup))
