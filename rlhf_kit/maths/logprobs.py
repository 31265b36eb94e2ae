"""Log-probabilities of tokens: plain, in chunks that bound memory, and while sampling. Always float32, in nats."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]  # hidden states [n, H] -> logits [n, V]


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """`logits / temperature` in float32, same shape.

    Raises: ValueError unless the temperature is above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    logits = logits.float()
    return logits if temperature == 1 else logits / temperature


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each of `ids` [..] under softmax(logits [.., V] / temperature), float32 [..]."""
    logits = tempered(logits, temperature)
    chosen = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(dim=-1)


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(logits [.., V] / temperature), in nats, float32 [..]. A logit of -inf counts as 0."""
    log_p = tempered(logits, temperature).log_softmax(dim=-1)
    return torch.special.entr(log_p.exp()).sum(dim=-1)


def chunked_token_logprobs(hidden: Tensor, head: Head, ids: Tensor, temperature: float, chunk: int) -> Tensor:
    """Log-probability of each of `ids` [N] under softmax(head(hidden [N, H]) / temperature), float32 [N].

    Equal to `token_logprobs(head(hidden), ids, temperature)`, but logits exist for `chunk` tokens at a time only: in
    the forward pass, where they are dropped, and in the backward pass, which computes them anew. Gradients reach
    `hidden` and whatever of the head is trainable.
    """

    def logprobs(h: Tensor, i: Tensor) -> Tensor:
        return token_logprobs(head(h), i, temperature)

    chunks = zip(hidden.split(chunk), ids.split(chunk), strict=True)
    return torch.cat([_recomputed(logprobs, h, i) for h, i in chunks])


def chunked_token_logprobs_and_entropy(
    hidden: Tensor, head: Head, ids: Tensor, temperature: float, chunk: int
) -> tuple[Tensor, Tensor]:
    """What `chunked_token_logprobs` gives, and the entropy at the same positions (nats): two float32 [N]."""

    def logprobs_and_entropy(h: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(h)
        return token_logprobs(logits, i, temperature), token_entropy(logits, temperature)

    chunks = zip(hidden.split(chunk), ids.split(chunk), strict=True)
    logprobs, entropy = zip(*(_recomputed(logprobs_and_entropy, h, i) for h, i in chunks), strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


def _recomputed(function, *inputs: Tensor):
    """`function(*inputs)`; if gradients are on, its intermediate values are not kept but computed again for them."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False)


def sample_inverse_cdf(logits: Tensor, uniform: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """One token a row, drawn from softmax(logits [B, V] / temperature), and its log-probability: ids [B], float32 [B].

    `uniform` [B] holds the random numbers in [0, 1): the same number draws the same token whatever else is in the
    batch. The token is the first whose cumulative probability exceeds `uniform`; where rounding leaves none (`uniform`
    within float32 of 1), the last possible one. A token of probability 0 (a logit of -inf, say) is never drawn.
    A row with NaN logits gives a NaN log-probability.
    """
    logits = tempered(logits, temperature)
    probabilities = logits.softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    target = uniform.to(cumulative.dtype).unsqueeze(-1) * cumulative[:, -1:]  # the sum is 1 up to rounding
    # Asking for a positive probability too: a parallel scan may rise by a rounding error on a token of probability 0.
    possible = probabilities > 0
    passed = (cumulative > target) & possible
    first_passed = passed.byte().argmax(dim=-1)
    last_possible = possible.shape[-1] - 1 - possible.flip(-1).byte().argmax(dim=-1)
    ids = torch.where(passed.any(dim=-1), first_passed, last_possible)
    return ids, token_logprobs(logits, ids)
