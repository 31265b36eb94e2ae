"""Passes of a trunk over the real tokens of a batch alone.

Norms, projections and feed-forward blocks compute each token by itself, so they get all tokens of a batch in one row
[1, N] and no padding. Only in attention do tokens look at each other; there they are rows again, of like length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf_kit.pieces import ran_out_of_memory

ATTENTION = "sdpa_unpadded"
"""Name of our attention among those of transformers: its `sdpa`, which is told where rows begin and end."""

ONLY_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers in which attention alone looks at other tokens."""

SLACK = {"cpu": 0.0}
MOST_SLACK = 0.25
"""How much padding rows may have that attention computes together, as a share of their tokens. On a CPU it saves
nothing to compute them together; on accelerators, whose share is a guess, many small operations take longer."""


class Group(NamedTuple):
    """Rows that attention computes together."""

    start: int
    """Their first token among all of the batch's."""
    lengths: Sequence[int]
    """Tokens of each row."""
    places: Tensor | None
    """[n] where their tokens stand in rows [B, L], counted through; None where there is no padding."""

    def rows(self, x: Tensor) -> Tensor:
        """Return the rows [B, heads, L, size] of this group, of all tokens [1, heads, N, size]."""
        shape = len(self.lengths), max(self.lengths)
        tokens = x[0, :, self.start : self.start + sum(self.lengths)].transpose(0, 1)
        if self.places is not None:
            tokens = x.new_zeros(shape[0] * shape[1], *tokens.shape[1:]).index_copy(0, self.places, tokens)
        return tokens.unflatten(0, shape).transpose(1, 2)

    def tokens(self, rows: Tensor) -> Tensor:
        """Return the tokens [n, heads, size] of rows [B, L, heads, size]."""
        flat = rows.flatten(0, 1)
        return flat if self.places is None else flat.index_select(0, self.places)


def groups_of(lengths: Sequence[int], device: torch.device) -> list[Group]:
    """Return neighbouring rows of these lengths in groups with little padding."""
    places = 1 + SLACK.get(device.type, MOST_SLACK)  # of a token, at most
    groups: list[list[int]] = []
    longest = tokens = 0  # of the last group
    for length in filter(None, lengths):
        longest, tokens = max(longest, length), tokens + length
        if groups and longest * (len(groups[-1]) + 1) <= places * tokens:
            groups[-1].append(length)
        else:
            groups.append([length])
            longest = tokens = length
    starts = accumulate(map(sum, groups), initial=0)
    return [
        Group(start, group, _places(group, device) if min(group) < max(group) else None)
        for start, group in zip(starts, groups, strict=False)
    ]


def _places(lengths: Sequence[int], device: torch.device) -> Tensor:
    real = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return real.flatten().nonzero().squeeze(1).to(device)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    groups: Sequence[Group] | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Compute transformers' `sdpa` attention, of tokens [1, heads, N, size] in the rows of `groups`.

    attention_mask: with `groups` that of rows as long as the longest, [1, 1, L, L]; an empty one is none.

    Returns [1, N, heads, size].
    """
    if groups is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    tokens = []
    for group in groups:
        rows, longest = [group.rows(x) for x in (query, key, value)], max(group.lengths)
        mask = None if attention_mask is None else attention_mask[..., :longest, :longest]
        mask = mask if mask is not None and mask.numel() else None
        tokens.append(group.tokens(sdpa_attention_forward(module, *rows, mask, **settings)[0]))
    whole = tokens[0] if len(tokens) == 1 else torch.cat(tokens)  # which copies
    return whole.unsqueeze(0), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def states(causal: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the trunk's last hidden states [B, T, H] of `ids` [B, T], zeros at padding."""
    lengths = mask.sum(1).tolist()
    trunk = getattr(causal, causal.base_model_prefix)
    tokens = trunk(
        input_ids=ids[mask].unsqueeze(0),
        attention_mask=_masks(causal, max(lengths)),
        position_ids=(mask.cumsum(1) - 1)[mask].unsqueeze(0),
        use_cache=False,
        groups=groups_of(lengths, ids.device),
    ).last_hidden_state.squeeze(0)
    if len(tokens) == mask.numel():
        return tokens.unflatten(0, mask.shape)
    result = tokens.new_zeros(mask.numel(), tokens.shape[-1])
    return result.index_copy(0, mask.flatten().nonzero().squeeze(1), tokens).unflatten(0, mask.shape)


def _masks(causal: PreTrainedModel, length: int) -> Any:
    """Return what the model's layers may look at in a row of a length, as it would make it itself.

    Where that is all that came before it is an empty mask: to the model one that is ready.
    """
    make = getattr(causal, "create_masks_for_generate", masking_utils.create_masks_for_generate)
    some = next(causal.parameters())
    row = some.new_empty(1, length, 0)
    masks = make(config=causal.config, inputs_embeds=row, attention_mask=None, past_key_values=None)
    empty = some.new_empty(1, 1, 0, 0)
    if isinstance(masks, dict):
        return {kind: empty if mask is None else mask for kind, mask in masks.items()}
    return empty if masks is None else masks


@torch.no_grad()
def works(causal: PreTrainedModel, padded: Callable[[Tensor, Tensor], Tensor], tolerance: float) -> bool:
    """Let a model's attention be ours, if it then computes the states of rows without padding; return whether it does.

    padded: (ids [B, T], mask [B, T]) -> the trunk's states [B, T, H], padding computed.
    tolerance: how far states may be apart where only the order of summation differs, as a share of them.
    """
    config = causal.config.get_text_config()
    if (
        config._attn_implementation != "sdpa"
        or not causal._supports_attention_backend
        or not ONLY_ATTENTION.issuperset(getattr(config, "layer_types", None) or ())
    ):
        return False
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 0]], dtype=torch.bool, device=causal.device)
    ids = torch.arange(mask.numel(), device=causal.device).view(mask.shape) % config.vocab_size
    same = False
    with _short_windows(config):
        expected = padded(ids, mask)[mask].float()
        causal.set_attn_implementation(ATTENTION)
        try:
            apart = states(causal, ids, mask)[mask].float() - expected
            same = bool(apart.norm() <= tolerance * expected.norm())
        except Exception as error:  # layers that want their mask as they know it say so each in a way of their own
            if ran_out_of_memory(error):
                raise
        finally:
            if not same:
                causal.set_attn_implementation("sdpa")
    return same


@contextmanager
def _short_windows(config: PretrainedConfig) -> Iterator[None]:
    """Within the block, windows that layers look through, where a model has such, are shorter than rows of five."""
    there = {name: getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")}
    there = {name: length for name, length in there.items() if length is not None}
    for name in there:
        setattr(config, name, 3)
    try:
        yield
    finally:
        for name, length in there.items():
            setattr(config, name, length)
