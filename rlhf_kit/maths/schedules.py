"""How a learning rate goes over the steps of a training."""

import math


def learning_rate_factor(schedule: str, step: int, steps: int, warmup: int) -> float:
    """Factor in (0, 1] of the peak rate in `step` (from 0) of `steps`: linear warm-up, then the schedule towards 0.

    schedule: "constant", "linear" or "cosine". No step has a rate of 0: the first of `warmup` steps has 1 / warmup, and
    a schedule would reach 0 one step after the last.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]
