"""Prompts to completions, by sampling from the whole distribution of a role at the recipe's temperature.

Nothing is truncated (no top-k, no top-p): PPO's ratios and KL speak of the distribution that was sampled from.
Each completion consumes its own uniform numbers, drawn from the seed and its global row, so the same recipe samples
the same completions in any number of processes and after any restart (up to the order of float summation).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from rlhf_kit.batches import Completions, PromptBatch
from rlhf_kit.maths.logprobs import inverse_cdf, tempered
from rlhf_kit.metrics import progress
from rlhf_kit.models import SharedBase


def derived_seed(*parts: object) -> int:
    """Return a 63-bit seed that depends on all the parts, for example (seed, stage, "rollout", update)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_generators(*parts: object) -> None:
    """Seed Python's, NumPy's and torch's generators, of every device, from the parts.

    Nothing of ours draws from them but dropout; a user's scoring function may. Done at the start of every step, it
    makes a run that goes on from a checkpoint draw what it would have drawn.
    """
    set_seed(derived_seed(*parts) % 2**32)


def uniforms(rows: Sequence[int], total: int, length: int, *seed_parts: object) -> Tensor:
    """Return [len(rows), length] uniform numbers in [0, 1): the given rows of the global [total, length] draw."""
    generator = torch.Generator().manual_seed(derived_seed(*seed_parts))
    return torch.rand(total, length, generator=generator)[list(rows)]


class _Room(DynamicLayer):
    """A layer's keys and values in room for all that are to come: a token's are written behind the others, where
    transformers copies them all for each.
    """

    def __init__(self, filled: DynamicLayer, tokens: int) -> None:
        super().__init__()
        self.lazy_initialization(filled.keys, filled.values)
        self.rooms = [
            states.new_empty(*states.shape[:2], tokens, states.shape[3]) for states in (filled.keys, filled.values)
        ]
        """Of keys and of values, [B, heads, tokens, size]."""
        self.update(filled.keys, filled.values)

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write the next keys and values [B, heads, n, size]; return all so far."""
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room[:, :, start:end] = states
        return self._show(end)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows of these indices alone."""
        self.rooms = [room[beam_idx] for room in self.rooms]
        self._show(self.get_seq_length())

    def _show(self, end: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (room[:, :, :end] for room in self.rooms)
        return self.keys, self.values


def _with_room(cache: Cache, tokens: int) -> Cache:
    """Give those layers of a cache that keep every token room for so many."""
    cache.layers = [
        _Room(layer, tokens) if type(layer) is DynamicLayer and layer.is_initialized else layer
        for layer in cache.layers
    ]
    return cache


def _distinct(prompts: PromptBatch) -> tuple[PromptBatch, Tensor]:
    """Return prompts, each once, and which of them each row [B] has."""
    first: dict[tuple[int, ...], int] = {}
    rows = [*map(tuple, torch.where(prompts.prompt_mask, prompts.prompt_ids, -1).tolist())]
    for number, row in enumerate(rows):
        first.setdefault(row, number)
    place = {row: number for number, row in enumerate(first)}
    return prompts.rows([*first.values()]), torch.tensor([place[row] for row in rows])


@torch.no_grad()
def generate(
    shared: SharedBase,
    role: str,
    prompts: PromptBatch,
    uniform: Tensor,
    *,
    end_id: int,
    pad_id: int,
    temperature: float = 1.0,
    tell: Callable[[Tensor], None] | None = None,
) -> Completions:
    """Return one completion for each prompt, of at most C tokens, its end token included.

    uniform: [B, C] numbers in [0, 1), one for every token that may be sampled; they set C.
    tell: called with the tokens of each step, of the rows that have not ended before.
    A row that has ended leaves the batch, so the steps get cheaper as rows end. A prompt of several rows is read once.
    """
    device = shared.device
    count, limit = uniform.shape
    uniform = uniform.to(device)
    ids = torch.full((count, limit), pad_id, device=device)
    logprobs = torch.zeros(count, limit, device=device)
    lengths = torch.zeros(count, dtype=torch.long, device=device)
    ended = torch.zeros(count, dtype=torch.bool, device=device)

    running = torch.arange(count, device=device)
    asked, prompt_of = _distinct(prompts)
    prompt_of = prompt_of.to(device)
    mask, step_ids, cache = asked.prompt_mask.to(device), asked.prompt_ids.to(device), None
    with shared.decoding(role):
        for step in progress(range(limit), desc="  generating, tokens"):
            positions = {name: tensor[:, -step_ids.shape[1] :] for name, tensor in shared.positions(mask).items()}
            output = shared.trunk(
                input_ids=step_ids, attention_mask=mask.long(), past_key_values=cache, use_cache=True, **positions
            )
            states = output.last_hidden_state[:, -1]
            if cache is None:
                cache, states, mask = output.past_key_values, states[prompt_of], mask[prompt_of]
                if len(asked.prompt_ids) < count:
                    cache.reorder_cache(prompt_of)
                cache = _with_room(cache, mask.shape[1] + limit)
            logits = shared.output_head(states)
            probabilities = tempered(logits, temperature).softmax(dim=-1)
            tokens = inverse_cdf(probabilities, uniform[running, step])
            ids[running, step] = tokens
            logprobs[running, step] = probabilities.gather(1, tokens.unsqueeze(1)).squeeze(1).log()
            if tell is not None:
                tell(tokens)
            lengths[running] = step + 1
            at_end = tokens == end_id
            ended[running[at_end]] = True
            if bool(at_end.any()):
                going_on = (~at_end).nonzero().squeeze(1)
                if len(going_on) == 0:
                    break
                running, tokens, mask = running[going_on], tokens[going_on], mask[going_on]
                cache.reorder_cache(going_on)
            step_ids = tokens.unsqueeze(1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)

    longest = int(lengths.max())
    completion_mask = torch.arange(longest, device=device) < lengths.unsqueeze(1)
    return Completions(ids[:, :longest], completion_mask, ended, logprobs[:, :longest])


def joined(pieces: Sequence[Completions], pad_id: int) -> Completions:
    """Return the completions of several calls of `generate` as one, padded to the longest."""
    if len(pieces) == 1:
        return pieces[0]
    longest = max(piece.completion_ids.shape[1] for piece in pieces)

    def widened(name: str, filling: int) -> Tensor:
        tensors = [getattr(piece, name) for piece in pieces]
        return torch.cat([nn.functional.pad(t, (0, longest - t.shape[1]), value=filling) for t in tensors])

    ended = torch.cat([piece.ended for piece in pieces])
    return Completions(
        widened("completion_ids", pad_id), widened("completion_mask", False), ended, widened("logprobs", 0)
    )
