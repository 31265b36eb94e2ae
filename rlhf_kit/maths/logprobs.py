"""Log-probabilities of tokens, in blocks that bound memory, and sampling. Always float32, in nats."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_kit.maths.products import FrozenMatrix

BLOCK = {"cpu": 4096}
"""Vocabulary entries whose logits are made together: on a CPU so many, elsewhere all of them."""
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


@dataclass(frozen=True)
class OutputHead:
    """What makes logits of hidden states h: `scale (W h + b)`, bent to `cap tanh(logit / cap)` where there is a cap."""

    weight: Tensor
    """W [V, H], floating point, frozen."""
    bias: Tensor | None = None
    """b [V]."""
    scale: float = 1.0
    cap: float | None = None

    @cached_property
    def blocks(self) -> list[FrozenMatrix]:
        """W and b in blocks of some entries of the vocabulary each, in order."""
        size = BLOCK.get(self.weight.device.type, len(self.weight))
        weights = self.weight.split(size)
        biases = [None] * len(weights) if self.bias is None else self.bias.split(size)
        return [FrozenMatrix(weight, bias) for weight, bias in zip(weights, biases, strict=True)]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [B, V] of a few hidden states [B, H]."""
        return torch.cat([self.logits(hidden, block) for block in self.blocks], dim=-1)

    def logits(self, hidden: Tensor, block: FrozenMatrix) -> Tensor:
        """Logits [n, v] of one of the blocks, of hidden states [n, H]."""
        logits = block.times(hidden)
        logits = logits if self.scale == 1 else logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def slopes(self, logits: Tensor) -> Tensor | float:
        """d logit / d (W h + b) at each of `logits`."""
        return self.scale if self.cap is None else self.scale * (1 - (logits / self.cap).square())


def token_logprobs(hidden: Tensor, head: OutputHead, ids: Tensor, temperature: float, entries: int) -> Tensor:
    """Log-probability of each of `ids` [N] under softmax(head(hidden [N, H]) / temperature), float32 [N].

    Logits exist for `entries` pairs of a token and a vocabulary entry at a time only, or for one token and one of the
    head's blocks: few enough to stay in a CPU's cache. Gradients reach `hidden` and stop at the head, which is frozen;
    they are made along the way, as small as the hidden states, and the backward pass only scales them.

    Source: Milakov and Gimelshein 2018 (arXiv 1805.02867), algorithm 3, for the sum that is rescaled as its largest
    term becomes known; what is summed here are also the gradients.
    """
    return _TokenLogprobs.apply(hidden, head, ids, temperature, entries)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: OutputHead, ids: Tensor, temperature: float, entries: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        tokens = max(1, entries // len(head.blocks[0].weight))
        chunks = zip(hidden.split(tokens), ids.split(tokens), strict=True)
        logprobs, slopes = zip(*(_online(h, head, i, temperature, wanted) for h, i in chunks), strict=True)
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (upstream[0].unsqueeze(-1) * slopes).to(slopes.dtype), None, None, None, None


def _online(hidden: Tensor, head: OutputHead, ids: Tensor, temperature: float, wanted: bool) -> tuple[Tensor, Tensor]:
    """Log-probabilities [n] and their gradients by the hidden states: [n, H], or nothing if not wanted.

    d log p(token) / d h = (slope(token) W[token] - sum over v of p(v) slope(v) W[v]) / temperature
    """
    hidden, token = hidden.detach(), ids.unsqueeze(-1)
    largest = torch.full((len(ids), 1), torch.finfo(torch.float32).min, device=ids.device)
    total, own = torch.zeros_like(largest), torch.zeros_like(largest)
    mean = torch.zeros_like(hidden, dtype=torch.float32)  # of slope W under softmax, times `total`
    for block in head.blocks:
        logits = head.logits(hidden, block)
        slopes = head.slopes(logits) if wanted else 1.0
        logits = tempered(logits, temperature)
        inside = (token >= 0) & (token < logits.shape[-1])
        own = torch.where(inside, logits.gather(-1, token.clamp(0, logits.shape[-1] - 1)), own)
        token = token - logits.shape[-1]  # counted from the next block
        before, largest = largest, largest.maximum(logits.amax(-1, keepdim=True))
        shrink = (before - largest).exp_()
        weights = logits.sub_(largest).exp_()
        total = total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
        if wanted:
            weights = weights if isinstance(slopes, float) and slopes == 1 else weights * slopes
            mean = _plus_product(mean.mul_(shrink), weights, block.weight)
    logprobs = (own - largest - total.log()).squeeze(-1)
    if not wanted:
        return logprobs, hidden[:0]
    ours = head.weight[ids] * head.slopes(own * temperature)
    return logprobs, ((ours - mean / total) / temperature).to(hidden.dtype)


def _plus_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`total + left @ right`, in place; `total` is float32, the product is made in the precision of `right`."""
    if right.dtype == total.dtype:
        return total.addmm_(left, right)
    return total.add_(left.to(right.dtype) @ right)


def sample_inverse_cdf(logits: Tensor, uniform: Tensor, temperature: float = 1.0) -> Tensor:
    """One token a row [B], drawn from softmax(logits [B, V] / temperature).

    `uniform` [B] holds the random numbers in [0, 1): the same number draws the same token whatever else is in the
    batch. The token is the first whose cumulative probability exceeds `uniform`; where rounding leaves none (`uniform`
    within float32 of 1), the last possible one. A token of probability 0 (a logit of -inf, say) is never drawn.
    """
    return inverse_cdf(tempered(logits, temperature).softmax(dim=-1), uniform)


def inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """One token a row [B] of `probabilities` [B, V], float32, as `sample_inverse_cdf` draws it."""
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
