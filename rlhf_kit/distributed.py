"""The few collective operations that the stages use, over accelerate; each is the identity in a single process.

Work is divided by global row numbers: a batch of N rows is the same batch on any number of processes, and every
process takes a contiguous share of it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn


def join() -> Accelerator:
    """Return the accelerator of this process, which computes in the precision of the weights.

    Attention is kept off cuDNN's kernels, which torch prefers on H100 and later: under a mask their gradients can be
    NaN at some lengths of rows (https://github.com/pytorch/pytorch/issues/196678).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Told to stay on the CPU where there is nothing else: it would not join several processes otherwise.
    return Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision="no")


def share(total: int, accelerator: Accelerator) -> range:
    """Return the rows of a global batch of `total` that belong to this process."""
    rank, world = accelerator.process_index, accelerator.num_processes
    return range(total * rank // world, total * (rank + 1) // world)


def total(values: Tensor, accelerator: Accelerator) -> Tensor:
    """Return the element-wise sum of `values` over all processes."""
    return accelerator.reduce(values, reduction="sum")


def maximum(value: float, accelerator: Accelerator) -> float:
    """Return the largest `value` of all processes."""
    return float(accelerator.gather(torch.tensor([value], dtype=torch.float64, device=accelerator.device)).max())


def gather_rows(rows: list, accelerator: Accelerator) -> list:
    """Return the rows of all processes, in the order of `share`."""
    return gather_object(rows) if accelerator.num_processes > 1 else rows


def agree(flag: bool, accelerator: Accelerator) -> bool:
    """Return whether any process raised its flag; every process gets the same answer."""
    return maximum(float(flag), accelerator) > 0


def add_up_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Replace every gradient by its sum over all processes, in one operation.

    Losses are divided by the token count of the whole minibatch, so the sum is the gradient of the whole minibatch.
    A process whose share of the minibatch was empty contributes zeros.
    """
    if accelerator.num_processes == 1:
        return
    parameters = list(parameters)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    pieces = total(flat, accelerator).split([p.numel() for p in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.grad = piece.view_as(parameter)
