"""The learning rate over the steps of a training."""

import pytest

from rlhf_kit.maths.schedules import learning_rate_factor


def factors(schedule: str, steps: int, warmup: int) -> list[float]:
    return [learning_rate_factor(schedule, step, steps, warmup) for step in range(steps)]


def test_linear_by_hand():
    """Two steps up in halves, then four steps down in quarters of the way to 0."""
    assert factors("linear", 6, 2) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_cosine_by_hand():
    """Half a cosine: 1, cos 60 degrees taken from [-1, 1] to [0, 1], and so on."""
    assert factors("cosine", 3, 0) == pytest.approx([1.0, 0.75, 0.25])


def test_constant_by_hand():
    """Warm-up, then 1."""
    assert factors("constant", 4, 3) == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_every_step_learns(schedule, warmup):
    """No step's rate is 0 or above the peak, even if all steps are warm-up."""
    assert all(0 < factor <= 1 for factor in factors(schedule, 7, warmup))
