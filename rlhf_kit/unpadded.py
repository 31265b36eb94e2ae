"""Passes of a trunk over the real tokens of a batch alone, and over what begins several rows once.

Norms, projections and feed-forward blocks compute each token by itself, so they get all tokens of a batch in one row
[1, N] and no padding. Only in attention do tokens look at each other; there they are rows again, of like length. And
they look at those before them alone, so where rows begin alike, as completions of one prompt do, they are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


LEAST_SHARED = 0.1
"""What share of a batch's tokens must be there already, in another row, for a pass to compute such tokens once. Putting
them into their rows, in each layer, takes about a twentieth of computing them."""

SHARED = 0.5
"""What such a token takes of the memory of one that is computed: attention keeps it in each row. Counted as a quarter,
passes of a Llama took an eighth more memory than without."""


class Once(NamedTuple):
    """Tokens of which those that begin several rows alike are there once."""

    first: Tensor
    """[N] which of the n tokens of all rows, one row after the other, are computed."""
    which: Tensor
    """[n] which of those N each token is."""

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor) -> Once:
        """Return how the tokens of `ids` [B, T] are shared; mask: [B, T] of the real ones."""
        rows, real = left_aligned(ids, mask)
        order = sorted(range(len(rows)), key=rows.tolist().__getitem__)  # so those that begin alike are neighbours
        rows, there = rows[order], real[order]
        places = torch.arange(rows.numel()).view(rows.shape)
        kinds = places.masked_fill(_as_before(rows, there), 0).cummax(0).values  # [B, L], alike where tokens are
        kind = torch.empty_like(kinds).index_copy(0, torch.tensor(order), kinds)[real]
        token = torch.arange(len(kind))
        first = torch.full((rows.numel(),), len(kind)).scatter_reduce(0, kind, token, "amin")[kind]
        is_first = first == token
        return cls(token[is_first], (is_first.cumsum(0) - 1)[first])

    @property
    def counts(self) -> tuple[int, int]:
        """How many tokens there are, and how many of them are there already, in another row."""
        return len(self.which), len(self.which) - len(self.first)


def is_enough(tokens: int, shared: int) -> bool:
    """Return whether a pass over rows of so many tokens, so many of them there already, computes those once."""
    return shared >= LEAST_SHARED * tokens > 0


def room_of(tokens: int, shared: int) -> float:
    """Return the memory that such a pass takes, in tokens that are computed."""
    return tokens - (1 - SHARED) * shared if is_enough(tokens, shared) else tokens


def left_aligned(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the real tokens of `ids` [B, T] from the first column on, and where such are; on the CPU."""
    ids, mask = ids.cpu(), mask.cpu()
    lengths = mask.sum(1)
    real = torch.arange(max(lengths.tolist(), default=0)) < lengths.unsqueeze(1)
    return torch.full(real.shape, -1).masked_scatter(real, ids[mask]), real


def in_common(ids: Tensor, mask: Tensor) -> list[int]:
    """Return with how many tokens each of the rows `ids` [B, T] begins as the row before it does."""
    lengths: list[int] = _as_before(*left_aligned(ids, mask)).sum(1).tolist()
    return lengths


def _as_before(rows: Tensor, real: Tensor) -> Tensor:
    """Return which tokens of rows [B, L] are, with all before them, those of the row before."""
    same = torch.zeros_like(real)
    same[1:] = (rows[1:] == rows[:-1]) & real[1:]
    return same.long().cumprod(1).bool()


class Group(NamedTuple):
    """Rows that attention computes together."""

    lengths: Sequence[int]
    """Tokens of each row."""
    places: Tensor | None
    """[n] where their tokens stand in rows [B, L], counted through; None where there is no padding."""

    def rows(self, tokens: Tensor) -> Tensor:
        """Return the rows [B, heads, L, size] of their tokens [n, heads, size]."""
        shape = len(self.lengths), max(self.lengths)
        if self.places is not None:
            tokens = tokens.new_zeros(shape[0] * shape[1], *tokens.shape[1:]).index_copy(0, self.places, tokens)
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
    return [Group(group, _places(group, device) if min(group) < max(group) else None) for group in groups]


def _places(lengths: Sequence[int], device: torch.device) -> Tensor:
    real = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return real.flatten().nonzero().squeeze(1).to(device)


class Rows(NamedTuple):
    """The rows that a pass's tokens are in."""

    groups: Sequence[Group]
    """Of all rows, one after the other."""
    once: Once | None
    """How rows share tokens; None where each has its own."""

    def apart(self, tokens: Tensor) -> Sequence[Tensor]:
        """Return the tokens [n, ...] of each group, of those that are computed [N, ...]."""
        if self.once is not None:
            tokens = _taken(tokens, self.once.which)
        return tokens.split([sum(group.lengths) for group in self.groups])

    def together(self, tokens: Sequence[Tensor]) -> Tensor:
        """Return those that are computed [N, ...] of the tokens [n, ...] of each group."""
        whole = tokens[0] if len(tokens) == 1 else torch.cat([*tokens])
        return whole if self.once is None else _taken(whole, self.once.first)


def _taken(tokens: Tensor, which: Tensor) -> Tensor:
    """Return some of the tokens [N, ...], by an operator whose way back is the fastest that torch has for it.

    It sums gradients in float32; on a CPU torch would in the tokens' own precision.
    """
    flat = tokens.flatten(1)
    wide = flat.float() if flat.device.type == "cpu" else flat
    return nn.functional.embedding(which, wide).to(tokens.dtype).unflatten(1, tokens.shape[1:])


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    rows: Rows | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Compute transformers' `sdpa` attention, of tokens [1, heads, N, size] in `rows`.

    attention_mask: with `rows` that of rows as long as the longest, [1, 1, L, L]; an empty one is none.

    Returns [1, N, heads, size].
    """
    if rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    tokens = []
    apart = (rows.apart(x.squeeze(0).transpose(0, 1)) for x in (query, key, value))
    for group, *parts in zip(rows.groups, *apart, strict=True):
        longest = max(group.lengths)
        mask = None if attention_mask is None else attention_mask[..., :longest, :longest]
        mask = mask if mask is not None and mask.numel() else None
        seen, _ = sdpa_attention_forward(module, *map(group.rows, parts), mask, **settings)
        tokens.append(group.tokens(seen))
    return rows.together(tokens).unsqueeze(0), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def states(causal: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the trunk's last hidden states [B, T, H] of `ids` [B, T], zeros at padding."""
    lengths = mask.sum(1).tolist()
    positions, once = (mask.cumsum(1) - 1)[mask], _once(ids, mask)
    tokens = ids[mask]
    if once is not None:
        tokens, positions = tokens[once.first], positions[once.first]
    trunk = getattr(causal, causal.base_model_prefix)
    made = trunk(
        input_ids=tokens.unsqueeze(0),
        attention_mask=_masks(causal, max(lengths)),
        position_ids=positions.unsqueeze(0),
        use_cache=False,
        rows=Rows(groups_of(lengths, ids.device), once),
    ).last_hidden_state.squeeze(0)
    if once is not None:
        made = _taken(made, once.which)
    if len(made) == mask.numel():
        return made.unflatten(0, mask.shape)
    result = made.new_zeros(mask.numel(), made.shape[-1])
    return result.index_copy(0, mask.flatten().nonzero().squeeze(1), made).unflatten(0, mask.shape)


def room(ids: Tensor, mask: Tensor) -> float:
    """Return the memory that `states` takes, in tokens that are computed."""
    return room_of(*Once.of(ids, mask).counts)


def _once(ids: Tensor, mask: Tensor) -> Once | None:
    """Return how the tokens of a batch are shared, if enough are."""
    once = Once.of(ids, mask)
    return Once(*(places.to(ids.device) for places in once)) if is_enough(*once.counts) else None


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


def possible(causal: PreTrainedModel) -> bool:
    """Return whether a model's attention may be another, and is all of it that looks at other tokens."""
    config = causal.config.get_text_config()
    return (
        config._attn_implementation == "sdpa"
        and causal._supports_attention_backend
        and ONLY_ATTENTION.issuperset(getattr(config, "layer_types", None) or ())
    )


@torch.no_grad()
def works(causal: PreTrainedModel, padded: Callable[[Tensor, Tensor], Tensor], tolerance: float) -> bool:
    """Let a model's attention be ours, if it then computes the states of rows without padding; return whether it does.

    padded: (ids [B, T], mask [B, T]) -> the trunk's states [B, T, H], padding computed.
    tolerance: how far states may be apart where only the order of summation differs, as a share of them.
    """
    if not possible(causal):
        return False
    config = causal.config.get_text_config()
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 0]], dtype=torch.bool, device=causal.device)
    ids = torch.arange(mask.numel(), device=causal.device).view(mask.shape) % config.vocab_size
    ids[2, 2:4] = ids[1, :2]  # the last row begins as the one before
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
