"""Which rows a step reads, and what stops a training."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from rlhf_kit.errors import Diverged, InputError
from rlhf_kit.recipe import RewardStage, SFTStage
from rlhf_kit.training import (
    Training,
    batches_of_like_length,
    optimizer_steps,
    row_order,
    share_of_batch,
    without_dropout,
)


def settings(**changes) -> SFTStage:
    return SFTStage(kind="sft", data="card.md", **changes)


def test_steps_see_every_row():
    """As many steps as see each row `epochs` times, the last filled up from the next pass; `max_steps` overrides."""
    assert optimizer_steps(100, settings(batch_size=16, microbatch=8)) == 7
    assert optimizer_steps(96, settings(batch_size=16, microbatch=8, epochs=2.0)) == 12
    assert optimizer_steps(96, settings(batch_size=16, microbatch=8, epochs=0.5)) == 3
    assert optimizer_steps(3, settings(batch_size=16, microbatch=8, epochs=0.01)) == 1
    assert optimizer_steps(96, settings(batch_size=16, microbatch=8, max_steps=5)) == 5


def test_passes_are_whole_and_differ():
    """Every pass has each row once, in an order of its own."""
    order = row_order(10, 0, 30, "seed")
    assert [sorted(order[start : start + 10]) for start in (0, 10, 20)] == [list(range(10))] * 3
    assert order[:10] != order[10:20] != list(range(10))
    assert order != row_order(10, 0, 30, "other seed")


def test_order_does_not_depend_on_where_one_starts():
    """Going on from the middle reads the rows that an uninterrupted run reads."""
    whole = row_order(7, 0, 40, 1)
    assert all(row_order(7, first, 40, 1) == whole[first:] for first in range(40))


def test_processes_divide_the_batch():
    """Each process takes the same number of rows; what does not divide is the user's error, with what would work."""
    assert share_of_batch(settings(batch_size=16), "sft", 1) == 16
    assert share_of_batch(settings(batch_size=16, microbatch=3), "sft", 4) == 4
    for batch, processes in ((16, 3), (4, 8)):
        with pytest.raises(InputError, match=rf"stages\.sft\.batch_size: {batch} rows do not divide"):
            share_of_batch(settings(batch_size=batch), "sft", processes)


def test_a_reward_stage_divides_its_share_itself():
    """It is handed its process's whole share of a step; shares must be equal."""
    stage = RewardStage(kind="reward", data="card.md", batch_size=12, microbatch=5)
    assert [share_of_batch(stage, "reward", processes) for processes in (1, 2, 4)] == [12, 6, 3]
    with pytest.raises(InputError, match=r"stages\.reward\.batch_size: 12 rows do not divide among 5 processes"):
        share_of_batch(stage, "reward", 5)


def test_held_out_rows_are_each_read_once():
    """Batches hold every row once, rows of like length together."""
    batches = batches_of_like_length([3, 9, 1, 9, 5], 2)
    assert batches == [[1, 3], [4, 0], [2]]
    assert Counter(row for batch in batches for row in batch) == Counter(range(5))


def with_gradients(**changes) -> Training:
    """A training at its tenth step, with finite gradients of two parameters and none of a third."""
    training = Training.__new__(Training)
    training.name, training.first, training.skipped = "sft", 10, 0
    training.settings, training.accelerator = settings(**changes), Accelerator(cpu=True)
    training.model = nn.ParameterDict({name: nn.Parameter(torch.ones(2, 2)) for name in ("good", "bad", "idle")})
    training.parameters = dict(training.model.items())
    for name in ("good", "bad"):
        training.parameters[name].grad = torch.ones(2, 2)
    return training


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_broken_gradient_is_named(value):
    """A gradient that is not finite stops the training before the optimizer sees it, naming step and tensor."""
    training = with_gradients()
    assert training.check(3, torch.tensor(1.0))
    training.parameters["bad"].grad[1, 0] = value
    with pytest.raises(Diverged, match="sft: step 13: the gradient of bad is not finite"):
        training.check(3, torch.tensor(1.0))


def test_broken_steps_are_skipped_if_asked_for_and_counted():
    """With on_nonfinite: skip such a step has no gradients left for the optimizer, up to max_skipped times."""
    training = with_gradients(on_nonfinite="skip", max_skipped=2)
    for skipped in (1, 2):
        training.parameters["bad"].grad = torch.full((2, 2), float("nan"))
        assert not training.check(skipped, torch.tensor(1.0))
        assert training.skipped == skipped and all(p.grad is None for p in training.parameters.values())
    training.parameters["good"].grad = torch.ones(2, 2)
    with pytest.raises(Diverged, match=r"the loss of step 13 is nan .*; 2 steps were skipped before it"):
        training.check(3, torch.tensor(float("nan")))


def test_base_dropout_is_off():
    """A base's own dropout does nothing any more, in train mode too."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.9))).train()
    without_dropout(model)
    assert torch.equal(model(torch.ones(100)), torch.ones(100))
