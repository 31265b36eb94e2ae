"""The tensors that travel through PPO, reward training and DPO, in named frozen dataclasses, and the legend of their
shapes.

B  completions of this process's rollout        P  prompt length in tokens, left-padded
M  completions of a microbatch                  C  completion length in tokens, right-padded
V  vocabulary size                              T  P + C
N  completions of some compared prompts         Q  pairs of them
H  size of a hidden state

Masks are true for real tokens and come from known lengths, never from comparing with a pad id.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptBatch:
    """Tokenised prompts."""

    prompt_ids: Tensor
    """[B, P] int64, left-padded."""
    prompt_mask: Tensor
    """[B, P] bool."""

    def rows(self, index: list[int]) -> PromptBatch:
        """Return some of the rows, padded as they are."""
        return PromptBatch(self.prompt_ids[index], self.prompt_mask[index])


@dataclass(frozen=True)
class Completions:
    """What a policy wrote after the prompts."""

    completion_ids: Tensor
    """[B, C] int64, right-padded; a completion that ended includes its end token."""
    completion_mask: Tensor
    """[B, C] bool, true through the end token."""
    ended: Tensor
    """[B] bool, true where the completion ended by itself within its limit."""
    logprobs: Tensor
    """[B, C] nats, of each token under the distribution that it was drawn from; 0 on padding."""


@dataclass(frozen=True)
class Rollout:
    """Completions with everything that is fixed while the policy learns from them."""

    prompt_ids: Tensor
    """[B, P] int64, left-padded."""
    prompt_mask: Tensor
    """[B, P] bool."""
    completion_ids: Tensor
    """[B, C] int64, right-padded."""
    completion_mask: Tensor
    """[B, C] bool."""
    ended: Tensor
    """[B] bool."""
    policy_logprobs: Tensor
    """[B, C] nats, of each completion token under the policy that sampled it; 0 on padding."""
    reference_logprobs: Tensor
    """[B, C] nats, the same under the reference policy; 0 on padding."""
    values: Tensor
    """[B, C]; `values[:, t]` is the value of the state before completion token t; 0 on padding."""
    reward_states: Tensor
    """[B, C, H], what the reward model's trunk made of the state before each completion token; [B, C, 0] where no value
    function reads it."""
    scores: Tensor
    """[B], the reward model's numbers, normalised where the recipe asks for it, before any penalty."""

    @property
    def ids(self) -> Tensor:
        """Prompt and completion, [B, T]."""
        return torch.cat([self.prompt_ids, self.completion_ids], dim=1)

    @property
    def mask(self) -> Tensor:
        """[B, T] bool."""
        return torch.cat([self.prompt_mask, self.completion_mask], dim=1)

    def rows(self, index: Tensor) -> Rollout:
        """Return the rows of `index` [M], without columns that are padding in all of them."""
        picked = Rollout(**{field.name: getattr(self, field.name)[index] for field in fields(self)})
        first = int(picked.prompt_mask.sum(1).max())
        last = int(picked.completion_mask.sum(1).max())
        left = {name: getattr(picked, name)[:, picked.prompt_ids.shape[1] - first :] for name in _PROMPT_FIELDS}
        right = {name: getattr(picked, name)[:, :last] for name in _COMPLETION_FIELDS}
        return Rollout(**left, **right, ended=picked.ended, scores=picked.scores)


_PROMPT_FIELDS = ("prompt_ids", "prompt_mask")
_COMPLETION_FIELDS = (
    "completion_ids",
    "completion_mask",
    "policy_logprobs",
    "reference_logprobs",
    "values",
    "reward_states",
)


@dataclass(frozen=True)
class Targets:
    """What the policy and the value function learn towards."""

    advantages: Tensor
    """[B, C], 0 on padding."""
    returns: Tensor
    """[B, C], 0 on padding."""


@dataclass(frozen=True)
class Comparisons:
    """The completions of some prompts, each once, and the pairs of them that a reward model learns from."""

    ids: tuple[Tensor, ...]
    """Forward passes [n, T] int64 of completions of like length behind their prompts, right-padded; the n's add up to
    N."""
    mask: tuple[Tensor, ...]
    """[n, T] bool of each pass."""
    learnt: tuple[Tensor, ...]
    """[n, T] bool of each pass, true on the completion tokens whose log-probabilities are learnt: of each prompt's best
    completion, for a language modelling loss, or of all."""
    chosen: Tensor
    """[Q], which of the N, in the order of the passes, is the better one of a pair."""
    rejected: Tensor
    """[Q]"""
    probability: Tensor
    """[Q] float32, that it is; 0.5 is a tie."""
    margin: Tensor
    """[Q] float32, by how much the scores are to differ."""
    prompt: Tensor
    """[Q], numbers from 0: whose pair it is."""

    def to(self, device: torch.device) -> Comparisons:
        """Return the same on a device."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            moved[field.name] = (
                tuple(piece.to(device) for piece in value) if isinstance(value, tuple) else value.to(device)
            )
        return Comparisons(**moved)
