"""Room for gradients is taken once, and says which parameters an optimizer passes over."""

import torch
from torch import nn

from rlhf_kit.gradients import Gradients


def parameters():
    return {name: nn.Parameter(torch.ones(3)) for name in ("policy/a", "policy/b", "value/c")}


def test_gradients_lie_where_they_lay():
    """A backward pass adds to the room there is, and a new step begins at 0."""
    mine = parameters()
    gradients = Gradients(mine)
    places = set()
    for _ in range(3):
        gradients.start()
        sum(parameter.square().sum() for parameter in mine.values()).backward()
        places.add(tuple(parameter.grad.data_ptr() for parameter in mine.values()))
        assert all(parameter.grad.tolist() == [2.0, 2.0, 2.0] for parameter in mine.values())
    assert len(places) == 1


def test_what_does_not_learn_has_none():
    """So its moments and its weights stay as they are, whatever the optimizer would do with a gradient of 0."""
    mine = parameters()
    gradients = Gradients(mine)
    optimizer = torch.optim.AdamW(mine.values(), lr=0.1, weight_decay=0.5)
    gradients.start()
    sum(parameter.sum() for parameter in mine.values()).backward()
    optimizer.step()
    before = mine["value/c"].detach().clone()
    gradients.start(["policy/a", "policy/b"])
    assert mine["value/c"].grad is None
    (mine["policy/a"] * mine["policy/b"]).sum().backward()
    optimizer.step()
    assert torch.equal(mine["value/c"], before)
    assert not torch.equal(mine["policy/a"], before)
