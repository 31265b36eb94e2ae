"""What a computation takes in time and memory, found by rehearsing it without numbers.

On torch's meta device a tensor has a shape and no content, so a model of any size goes through its passes at once and
takes no memory. `rehearsing` looks at every operation on the way. Time is that of the roofline: an operation takes what
its arithmetic or what moving its operands takes, whichever is longer, and what starting it costs. Memory is what of the
tensors made is alive at a time.

Source: Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model".
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from rlhf_kit.errors import first_line

ROWS, MANY_ROWS = {"cpu": 512}, 4096
"""Of the matrix product that a device's rate is measured by; on others than CPUs it takes many to keep them busy."""
MOVED, MANY_MOVED = {"cpu": 2**24}, 2**27
"""Numbers of the array that its bandwidth is measured by; no cache holds them."""
aten = torch.ops.aten


@dataclass(frozen=True)
class Machine:
    """What a device does, as measured on it."""

    flops_per_second: float
    bytes_per_second: float
    seconds_per_operation: float
    """What starting one costs, the mean of the way there and the way back."""

    @classmethod
    def measured(cls, layer: nn.Module, inputs: int, outputs: int, device: torch.device, dtype: torch.dtype) -> Machine:
        """Measure a device: its rate by a linear layer [inputs -> outputs] that is there, forwards and backwards."""
        count = ROWS.get(device.type, MANY_ROWS)
        rows = torch.randn(count, inputs, device=device, dtype=dtype, requires_grad=True)
        array = torch.zeros(MOVED.get(device.type, MANY_MOVED), device=device)
        small, chain = (
            torch.zeros(8, device=device, requires_grad=True),
            nn.Sequential(*(nn.SiLU() for _ in range(100))),
        )

        def both_ways() -> None:
            torch.autograd.grad(layer(rows).sum(), rows)

        def many() -> None:
            torch.autograd.grad(chain(small).sum(), small)

        product = _seconds(both_ways, device)
        return cls(
            flops_per_second=4 * count * inputs * outputs / product,
            bytes_per_second=2 * array.nbytes / _seconds(lambda: array.add_(1), device),
            seconds_per_operation=_seconds(many, device) / (2 * len(chain)),
        )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the least time of several goes, the first left out."""
    taken = []
    for _ in range(6):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return min(taken[1:])


class NotRehearsed(Exception):
    """The computation depends on more than shapes."""


@contextmanager
def rehearsing(machine: Machine) -> Iterator[Rehearsal]:
    """Rehearse what the block computes with tensors on the meta device.

    Raises:
        NotRehearsed: the block asks for numbers, or has an operation that knows no shapes.
    """
    rehearsal = Rehearsal(machine)
    try:
        with _AttentionInOnePiece(), rehearsal:
            yield rehearsal
    except RuntimeError as error:  # what torch raises for both; there is no class of their own
        raise NotRehearsed(first_line(error)) from error


class Rehearsal(TorchDispatchMode):
    """What the operations so far would have taken."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine
        self.seconds = 0.0
        self.flops = 0
        self.alive = 0
        """Bytes of the tensors made that are still there."""
        self.peak = 0
        """The most that there were."""
        self._storages: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given, made = _tensors((args, kwargs)), _tensors(result)
        places = {tensor.untyped_storage()._cdata for tensor in given}
        if not func._schema.is_mutable and all(tensor.untyped_storage()._cdata in places for tensor in made):
            return result  # another view of what is there
        for tensor in made:
            if tensor.untyped_storage()._cdata not in places:
                self._hold(tensor.untyped_storage())
        count = FLOPS.get(func.overloadpacket)
        flops = 0 if count is None else count(*args, **kwargs, out_val=result)
        moved = sum(tensor.numel() * tensor.element_size() for tensor in (*given, *made))
        machine = self.machine
        self.flops += flops
        self.seconds += machine.seconds_per_operation
        self.seconds += max(flops / machine.flops_per_second, moved / machine.bytes_per_second)
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        place = storage._cdata
        if place in self._storages:
            return
        self._storages[place] = storage.nbytes()
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._let_go, place)

    def _let_go(self, place: int) -> None:
        self.alive -= self._storages.pop(place)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class _AttentionInOnePiece(TorchFunctionMode):
    """Attention by a kernel that keeps no weights [B, heads, T, T], as devices have it and the meta device has not."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        shared_by = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(shared_by, 1) if shared_by > 1 else tensor for tensor in (key, value))
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(upstream.shape, query.shape, key.shape, value.shape))


FLOPS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    aten.addmm_: flop_registry[aten.addmm],
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""The arithmetic of the operations that have any to speak of; torch's own table lacks a few."""
