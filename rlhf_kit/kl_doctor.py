"""Why is the KL negative? What a policy's samples say about the distribution that they were drawn from.

KL(policy || reference) is never negative. Its estimate k1 is, by chance, near 0; beyond chance it says that the
completions are not samples of the distribution whose log-probabilities were taken, or that policy and reference did not
read the same tokens. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass

CHANCE = 4.0
"""Standard errors below 0 that chance explains; there are hundreds of updates, and k1 has long tails."""
ROUNDING = 0.01
"""Nats per completion below 0 that rounding explains, where policy and reference are nearly the same."""
AGREES = {"float32": 1e-3, "float16": 0.01, "bfloat16": 0.05}
"""Nats per token that the sampler's log-probabilities may be off by rounding alone: cached and whole passes add up in
another order."""


@dataclass(frozen=True)
class Symptoms:
    """What an update showed."""

    kl: float
    """Nats per completion, k1."""
    error: float
    """Its standard error."""
    gap: float
    """Nats per token, mean distance of the sampler's log-probabilities from the trainer's."""
    lean: float
    """Nats per token, sampler's less trainer's, mean: above 0, the sampler was surer of what it drew."""
    train_mode: bool
    """Whether some module of the model is in train mode."""
    ended: float
    """Share of the completions that ended by themselves."""


def diagnose(seen: Symptoms, dtype: str) -> str | None:
    """Return which cause of a negative KL is likely and what to change, or None where chance explains it."""
    if not seen.kl < -(CHANCE * seen.error + ROUNDING):
        return None
    begin = f"objective/kl is {seen.kl:.3g} nats per completion, {-seen.kl:.3g} below 0 at a standard error of "
    begin += f"{seen.error:.2g}: more than chance. "
    if seen.train_mode:
        return begin + (
            "Likely the mode: the model is in train mode, where dropout (and int8's other arithmetic) changes every "
            "probability. Call eval() before sampling and scoring, and keep dropout out of the policy."
        )
    if seen.gap > AGREES[dtype]:
        surer = "surer of its tokens than" if seen.lean > 0 else "less sure of its tokens than"
        return begin + (
            f"Likely the sampling settings: the sampler was {surer} the policy (rollout/logprob_gap {seen.gap:.3g} "
            "nats), so tokens came from another distribution than the one that is scored. Sample at "
            "the temperature of the log-probabilities, without top-k, top-p, min-p or a repetition penalty."
        )
    return begin + (
        f"Likely the template: sampler and trainer agree (rollout/logprob_gap {seen.gap:.2g} nats), so policy and "
        f"reference read different tokens: another chat template, prompt or padding. {seen.ended:.0%} of the "
        "completions ended; look at the prompts with `rlhf-kit data preview`, and set base.chat_template to the one "
        "that the policy's sft stage was trained with."
    )
