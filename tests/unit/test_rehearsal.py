"""What a rehearsal on the meta device counts: arithmetic, memory, time."""

import pytest
import torch
from torch import nn

from rlhf_kit.rehearsal import Machine, NotRehearsed, rehearsing

MACHINE = Machine(flops_per_second=1e9, bytes_per_second=1e8, seconds_per_operation=1e-3)


def empty(*shape, grad=False):
    return torch.empty(*shape, device="meta", requires_grad=grad)


def test_a_product_takes_its_arithmetic():
    """2 m k n operations; its time is that of the arithmetic where moving the operands takes less."""
    with rehearsing(MACHINE) as seen:
        empty(1000, 2000) @ empty(2000, 3000)
    assert seen.flops == 2 * 1000 * 2000 * 3000
    moved = 4 * (1000 * 2000 + 2000 * 3000 + 1000 * 3000)
    made = 4 * (1000 * 2000 + 2000 * 3000)  # by `empty`, which writes them
    assert moved / 1e8 < seen.flops / 1e9
    assert seen.seconds == pytest.approx(3e-3 + made / 1e8 + seen.flops / 1e9)


def test_a_sum_takes_the_moving_of_its_operands():
    """Elementwise work has no arithmetic to speak of."""
    one, other = empty(1000), empty(1000)
    with rehearsing(MACHINE) as seen:
        one + other
    assert (seen.flops, seen.seconds) == (0, pytest.approx(1e-3 + 3 * 4000 / 1e8))


def test_views_cost_nothing():
    """Neither time nor memory."""
    array = empty(10, 20)
    with rehearsing(MACHINE) as seen:
        array.t()[3:].unsqueeze(0).reshape(-1, 10).detach()
    assert (seen.seconds, seen.alive, seen.peak) == (0.0, 0, 0)


def test_what_is_written_in_place_is_not_new_memory():
    """It takes the time of moving it all the same."""
    array = empty(1000)
    with rehearsing(MACHINE) as seen:
        array.mul_(2)
    assert (seen.alive, seen.peak) == (0, 0)
    assert seen.seconds == pytest.approx(1e-3 + 2 * 4000 / 1e8)


def test_memory_is_what_is_alive():
    """A tensor counts from when it is made until the last of its views has gone."""
    with rehearsing(MACHINE) as seen:
        first = empty(1000)
        view = first[10:]
        del first
        assert seen.alive == 4000
        second = empty(500)
        assert (seen.alive, seen.peak) == (6000, 6000)
        del view
        assert seen.alive == 2000
        third = empty(500)
        assert (seen.alive, seen.peak) == (4000, 6000)
    assert second.shape == third.shape


def test_the_way_back_counts_and_keeps_what_it_needs():
    """A chain of frozen layers with a SiLU each keeps the inputs of the SiLUs alone."""
    layers = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(64, 64, bias=False), nn.SiLU())))
    layers.to("meta").requires_grad_(False)
    rows = empty(100, 64, grad=True)
    with rehearsing(MACHINE) as seen:
        result = layers(rows)
        forward = seen.flops
        assert forward == 4 * 2 * 100 * 64 * 64
        assert seen.alive == 5 * 4 * 100 * 64  # four inputs of SiLUs, and the result
        result.sum().backward()
    assert seen.flops == 2 * forward


def test_attention_keeps_no_weights():
    """As kernels do: memory grows with the length, not with its square; grouped heads share keys."""

    def peak(length):
        query = empty(2, 8, length, 16, grad=True)
        key, value = empty(2, 4, length, 16), empty(2, 4, length, 16)
        with rehearsing(MACHINE) as seen:
            nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True).sum().backward()
        assert seen.flops == 2 * 8 * length * length * 16 * 2 * (2 + 5)  # two products there, five back
        return seen.peak

    assert peak(2048) <= 2.1 * peak(1024)


def test_what_asks_for_numbers_is_not_rehearsed():
    """There are none; and what goes wrong for another reason stays what it is."""
    with pytest.raises(NotRehearsed, match=r"item\(\)"), rehearsing(MACHINE):
        empty(1).item()
    with pytest.raises(ValueError, match="mine"), rehearsing(MACHINE):
        raise ValueError("mine")


def test_a_machine_is_measured():
    """With a layer that is there; the figures are those of some computer."""
    layer = nn.Linear(128, 256, bias=False).requires_grad_(False)
    found = Machine.measured(layer, 128, 256, torch.device("cpu"), torch.float32)
    assert 1e8 < found.flops_per_second < 1e16
    assert 1e8 < found.bytes_per_second < 1e14
    assert 1e-8 < found.seconds_per_operation < 1e-2
