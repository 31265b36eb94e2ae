"""Work in pieces whose size halves when memory runs out.

A step is a sum over its rows, divided by what the whole step has, so the size of the pieces changes the order of sums
and nothing else. The smaller size stays for the rest of the run, and checkpoints take it along.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size

from rlhf_kit import distributed
from rlhf_kit.errors import OutOfRoom
from rlhf_kit.metrics import say

T = TypeVar("T")

SIGNS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""What errors without a class of their own say when memory runs out, and accelerate does not know."""


def ran_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that a device, or the machine, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or should_reduce_batch_size(error):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


class Pieces:
    """How large the pieces of some work are at most, in `unit`."""

    def __init__(self, where: str, size: int, unit: str, accelerator: Accelerator, *, least: int = 1) -> None:
        """where: the setting that the size comes from, for messages. least: what a piece cannot be smaller than."""
        self.where, self.size, self.unit, self.accelerator, self.least = where, size, unit, accelerator, least

    def whole(self, work: Callable[[int], T]) -> T:
        """Return work(size); if memory runs out in any process, all do all of it again with half the size, and so on.

        Raises:
            OutOfRoom: memory runs out with the smallest pieces.
        """
        while True:
            seen = ""
            try:
                result = work(self.size)
            except Exception as error:
                if not ran_out_of_memory(error):
                    raise
                seen = str(error).strip().splitlines()[0]
            if not distributed.agree(bool(seen), self.accelerator):
                return result
            seen = seen or "in another process"
            gc.collect()  # behind the except block, which held on to the tensors of the frames that failed
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if self.size <= self.least:
                raise OutOfRoom(
                    f"{self.where}: memory ran out with pieces of {self.size} {self.unit}, which cannot be less "
                    f"({seen}). The stage's activation_checkpointing: true needs less. So do shorter rows (max_length, "
                    "max_new_tokens), base.quantization: 8bit or 4bit, a smaller adapter.r or a smaller base, which "
                    "start the stage anew."
                )
            self.size = max(self.least, self.size // 2)
            say(
                f"{self.where}: memory ran out ({seen}); from here on pieces of {self.size} {self.unit}, with the "
                "same result up to rounding"
            )
