"""Log-probabilities of tokens, in chunks that bound memory, and sampling. Always float32, in nats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Head = Callable[[Tensor], Tensor]  # hidden states [n, H] -> logits [n, V]
SPAN = 256
"""Vocabulary entries that sampling adds up before it looks at them one by one; near the root of usual vocabularies."""


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """`logits / temperature` in float32, same shape.

    Raises: ValueError unless the temperature is above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    logits = logits.float()
    return logits if temperature == 1 else logits / temperature


def token_logprobs(hidden: Tensor, head: Head, ids: Tensor, temperature: float, chunk: int) -> Tensor:
    """Log-probability of each of `ids` [N] under softmax(head(hidden [N, H]) / temperature), float32 [N].

    Logits exist for `chunk` tokens at a time only. Gradients reach `hidden` and stop at the head, which is frozen: a
    row's logits depend on its own hidden state alone, so its gradient, as small as the hidden state, is made with the
    logits that the forward pass has anyway, and the backward pass only scales it.
    """
    return _TokenLogprobs.apply(hidden, head, ids, temperature, chunk)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, ids: Tensor, temperature: float, chunk: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        chunks = zip(hidden.split(chunk), ids.split(chunk), strict=True)
        logprobs, slopes = zip(*(_logprobs_and_slopes(h, head, i, temperature, wanted) for h, i in chunks), strict=True)
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (upstream[0].unsqueeze(-1) * slopes).to(slopes.dtype), None, None, None, None


def _logprobs_and_slopes(
    hidden: Tensor, head: Head, ids: Tensor, temperature: float, wanted: bool
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [n] and their gradients by the hidden states: [n, H], or nothing if not wanted."""
    with torch.set_grad_enabled(wanted):
        states = hidden.detach().requires_grad_(wanted)
        logits = head(states)
    token = ids.unsqueeze(-1)
    log_p = tempered(logits.detach(), temperature).log_softmax(-1)
    logprobs = log_p.gather(-1, token).squeeze(-1)
    if not wanted:
        return logprobs, hidden[:0]
    # d log p(token) / d logits = (1 at the token - p) / temperature
    slope = log_p.exp_().neg_().scatter_add_(-1, token, torch.ones_like(token, dtype=log_p.dtype))
    if temperature != 1:
        slope /= temperature
    return logprobs, torch.autograd.grad(logits, states, slope.to(logits.dtype))[0]


def sample_inverse_cdf(logits: Tensor, uniform: Tensor, temperature: float = 1.0) -> Tensor:
    """One token a row [B], drawn from softmax(logits [B, V] / temperature).

    `uniform` [B] holds the random numbers in [0, 1): the same number draws the same token whatever else is in the
    batch. The token is the first whose cumulative probability exceeds `uniform`; where rounding leaves none (`uniform`
    within float32 of 1), the last possible one. A token of probability 0 (a logit of -inf, say) is never drawn.
    """
    probabilities = tempered(logits, temperature).softmax(dim=-1)
    spans = nn.functional.pad(probabilities, (0, -probabilities.shape[-1] % SPAN)).unflatten(-1, (-1, SPAN))
    mass = spans.sum(-1)
    total = mass.sum(-1, keepdim=True)  # 1 up to rounding
    span, target = _first_beyond(mass, uniform.to(mass.dtype).unsqueeze(-1) * total)
    inside = spans.gather(1, span.unsqueeze(-1).expand(-1, -1, SPAN)).squeeze(1)
    token, _ = _first_beyond(inside, target)
    return (span * SPAN + token).squeeze(-1)


def _first_beyond(mass: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulative sum of `mass` [B, n] first exceeds `target` [B, 1], and by how much the entries before fall
    short of it, both [B, 1]; the last entry above 0 where it never does. Entries of 0 are never chosen.
    """
    cumulative = mass.cumsum(-1)
    # Asking for positive mass too: a parallel scan may rise by a rounding error on an entry of 0.
    possible = mass > 0
    passed = (cumulative > target) & possible
    last_possible = possible.shape[-1] - 1 - possible.flip(-1).byte().argmax(-1, keepdim=True)
    first = torch.where(passed.any(-1, keepdim=True), passed.byte().argmax(-1, keepdim=True), last_possible)
    return first, target - (cumulative - mass).gather(-1, first)
