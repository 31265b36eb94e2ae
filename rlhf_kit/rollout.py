"""Generate and score: prompts -> `Rollout`.

The same functions score completions before and during learning, so that the first ratio is 1: both run in eval mode,
at the sampling temperature, and read log-probabilities only at completion positions, a chunk of the vocabulary's
logits at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from rlhf_kit.batches import Completions, PromptBatch, Rollout
from rlhf_kit.collate import TextFormat, forward_passes, left_pad
from rlhf_kit.examples.rows import Prompt
from rlhf_kit.generation import generate, joined
from rlhf_kit.maths.logprobs import token_logprobs
from rlhf_kit.models import SharedBase
from rlhf_kit.pieces import Pieces
from rlhf_kit.scorers import Written
from rlhf_kit.unpadded import in_common, room_of

T = TypeVar("T")

LOGITS = {"cpu": 3 * 2**19}
"""How many float32 logits are held at a time: 6 MiB, which caches hold, on a CPU, and `MOST_LOGITS` elsewhere."""
MOST_LOGITS = 2**25

ValueFunction = Callable[[Rollout, Tensor], Tensor]
"""(rollout, the policy's completion states [B, C, H]) -> values [B, C], 0 on padding."""


class PolicyPass(NamedTuple):
    """What a pass of the policy makes of some completions."""

    states: Tensor
    """[M, C, H], as `completion_states`."""
    logprobs: Tensor
    """[M, C], as `completion_logprobs`."""


def microbatches(rows: Sequence[T], size: int) -> Iterator[list[T]]:
    """Yield `rows` in pieces of at most `size`."""
    for start in range(0, len(rows), size):
        yield list(rows[start : start + size])


def in_pieces(
    ids: Tensor, mask: Tensor, rows: Sequence[int], size: int, *, prompts: Sequence[Hashable], unpadded: bool
) -> list[list[int]]:
    """Return `rows` of `ids` [B, T] in pieces of like length, each with the room of `size` rows of full length.

    unpadded: passes are over real tokens alone, and over those that begin several rows once; then rows of one prompt
    stay together. prompts: of the B rows.
    """
    budget = size * mask.shape[1]
    if unpadded:
        return _of_real_tokens(ids, mask, rows, budget, prompts)
    pieces = forward_passes(mask[list(rows)].sum(1).tolist(), budget)
    return [[rows[number] for number in piece] for piece in pieces]


def _of_real_tokens(
    ids: Tensor, mask: Tensor, rows: Sequence[int], budget: int, prompts: Sequence[Hashable]
) -> list[list[int]]:
    """Return the rows prompt by prompt, the one with the longest row first, in pieces that are full but the first.

    A piece has the room of `budget` tokens, and its results, which are laid out in rows, at most twice as many places.
    """
    lengths = mask.sum(1).tolist()
    longest: dict[Hashable, int] = {}
    for row in rows:
        longest[prompts[row]] = max(lengths[row], longest.get(prompts[row], 0))
    place = {prompt: number for number, prompt in enumerate(sorted(longest, key=longest.__getitem__))}
    order = sorted(rows, key=lambda row: (place[prompts[row]], lengths[row]))
    pieces: list[list[int]] = []
    tokens = shared = columns = 0  # of the last piece
    for row, common in zip(order, in_common(ids[order], mask[order]), strict=True):
        tokens, shared, columns = tokens + lengths[row], shared + common, max(columns, lengths[row])
        if not pieces or room_of(tokens, shared) > budget or columns * (len(pieces[-1]) + 1) > 2 * budget:
            pieces.append([])
            tokens, shared, columns = lengths[row], 0, lengths[row]
        pieces[-1].append(row)
    return [piece[::-1] for piece in pieces[::-1]]


def of_rollout(shared: SharedBase, rollout: Rollout, rows: Sequence[int], size: int) -> list[list[int]]:
    """Return `rows` of a rollout in pieces. Padded ones all have the length of the longest prompt."""
    asked = rollout.prompt_mask if shared.unpadded else torch.ones_like(rollout.prompt_mask)
    mask = torch.cat([asked, rollout.completion_mask], dim=1)
    prompts = [*map(tuple, rollout.prompt_ids.tolist())]
    return in_pieces(rollout.ids, mask, rows, size, prompts=prompts, unpadded=shared.unpadded)


def of_written(written: Written, size: int, *, unpadded: bool) -> list[list[int]]:
    """Return the rows of completions in pieces, as `in_pieces`."""
    prompts = [*map(repr, written.prompts)]
    rows = range(len(prompts))
    return in_pieces(written.ids, written.mask, rows, size, prompts=prompts, unpadded=unpadded)


def scores_of(scorer: Callable[[Written], Tensor], written: Written, microbatch: int, *, unpadded: bool) -> Tensor:
    """Return the raw scores [B] of completions, at most `microbatch` of full length in a pass.

    unpadded: its passes are over real tokens alone.
    """
    scores = torch.zeros(len(written.texts), device=written.mask.device)
    for rows in of_written(written, microbatch, unpadded=unpadded):
        scores[rows] = scorer(written.rows(rows))
    return scores


def logits_held(device: torch.device) -> int:
    """Return how many logits are held at a time."""
    return LOGITS.get(device.type, MOST_LOGITS)


def completion_states(shared: SharedBase, role: str, rollout: Rollout) -> Tensor:
    """Return the hidden states [B, C, H] from which a role predicts each completion token."""
    prompt_length = rollout.prompt_ids.shape[1]
    return shared.hidden(role, rollout.ids, rollout.mask)[:, prompt_length - 1 : -1]


def completion_logprobs(shared: SharedBase, states: Tensor, rollout: Rollout, temperature: float) -> Tensor:
    """Return the log-probabilities [B, C], float32 nats, of a rollout's tokens given their states [B, C, H].

    Logits are made for real tokens only, and never more than `logits_held` at once, with or without gradients.
    """
    mask = rollout.completion_mask
    entries = logits_held(mask.device)
    logprobs = token_logprobs(states[mask], shared.output_head, rollout.completion_ids[mask], temperature, entries)
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, logprobs)


def policy_pass(shared: SharedBase, role: str, rollout: Rollout, temperature: float) -> PolicyPass:
    """Return a role's states and log-probabilities of a rollout's completions."""
    states = completion_states(shared, role, rollout)
    return PolicyPass(states, completion_logprobs(shared, states, rollout, temperature))


def sampled(
    shared: SharedBase,
    role: str,
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[Sequence[int]],
    uniform: Tensor,
    text_format: TextFormat,
    temperature: float,
    at_once: Pieces | None = None,
) -> tuple[Rollout, Written]:
    """Return a role's completions of prompts, not yet scored, as tokens and as text.

    uniform: [B, C] numbers in [0, 1), as `generate` takes them. at_once: how many are generated at a time; None is
    all of them.
    """
    batch = left_pad(prompt_ids, text_format.pad_id)

    def completed(size: int) -> Completions:
        pieces = [
            generate(
                shared,
                role,
                batch.rows(piece),
                uniform[piece],
                end_id=text_format.end_id,
                pad_id=text_format.pad_id,
                temperature=temperature,
            )
            for piece in microbatches(range(len(prompts)), size)
        ]
        return joined(pieces, text_format.pad_id)

    completions = completed(len(prompts)) if at_once is None else at_once.whole(completed)
    rollout = unscored(batch, completions)
    texts = text_format.completion_texts(prompt_ids, rollout.completion_ids, rollout.completion_mask)
    return rollout, Written(list(prompts), texts, rollout.ids, rollout.mask)


def unscored(prompts: PromptBatch, completions: Completions) -> Rollout:
    """Return the tokens of a rollout with zeros where the numbers go, and as `policy_logprobs` those of the sampler."""
    zeros = torch.zeros(completions.completion_ids.shape, device=completions.completion_ids.device)
    return Rollout(
        prompt_ids=prompts.prompt_ids.to(zeros.device),
        prompt_mask=prompts.prompt_mask.to(zeros.device),
        completion_ids=completions.completion_ids,
        completion_mask=completions.completion_mask,
        ended=completions.ended,
        policy_logprobs=completions.logprobs,
        reference_logprobs=zeros,
        values=zeros,
        reward_states=zeros.unsqueeze(2)[..., :0],
        scores=zeros[:, 0],
    )


def fill(target: Tensor, rows: Sequence[int], values: Tensor) -> None:
    """Write `values` [M, c, ...] of some rows into the left part of `target` [B, C, ...]."""
    target[list(rows), : values.shape[1]] = values.to(target.dtype)


@torch.no_grad()
def scored_by_models(
    shared: SharedBase,
    rollout: Rollout,
    *,
    policy: str,
    reference: str,
    value: ValueFunction,
    temperature: float,
    microbatch: int,
    learnt_first: Sequence[int] = (),
    passes: Callable[[list[list[int]]], Iterable[list[int]]] = iter,
) -> tuple[dict[str, Tensor], dict[tuple[int, ...], PolicyPass]]:
    """Return `policy_logprobs`, `reference_logprobs` and `values`, each [B, C], computed a microbatch at a time, and
    passes of the policy that learning can begin with.

    The policy that takes the first step of learning is still the one that wrote. So its passes over the rows that this
    step learns from, `learnt_first`, in the pieces that learning has, are made with gradients and returned by their
    rows: from the last on, as many as together have the room of a microbatch. passes: wraps the loop over
    microbatches, for a progress bar.
    """
    result = {name: torch.zeros_like(rollout.values) for name in ("policy_logprobs", "reference_logprobs", "values")}
    later = sorted({*range(len(rollout.scores))}.difference(learnt_first))
    first, others = (of_rollout(shared, rollout, rows, microbatch) for rows in (learnt_first, later))
    room, begun = float(microbatch * rollout.ids.shape[1]), {}
    for rows in passes([*others, *reversed(first)]):
        piece = rollout.rows(torch.tensor(rows, device=shared.device))
        states = completion_states(shared, reference, piece)
        fill(result["reference_logprobs"], rows, completion_logprobs(shared, states, piece, temperature))
        needed = shared.room(piece.ids, piece.mask) if rows in first else math.inf
        fits = needed <= room
        with torch.set_grad_enabled(fits):
            made = policy_pass(shared, policy, piece, temperature)
        if fits:
            begun[tuple(rows)] = made
            room -= needed
        fill(result["policy_logprobs"], rows, made.logprobs.detach())
        fill(result["values"], rows, value(piece, made.states))
    return result, begun
