"""The base of a recipe without weights, and what passes through it take on a device.

Everything here happens on the meta device (rehearsal.py): the same trunk, adapters, log-probabilities and sampling as
in a run, and not one weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_kit import models, unpadded
from rlhf_kit.layers import adapt_in_few_passes, gains_packed, keep_less
from rlhf_kit.maths.logprobs import inverse_cdf, tempered, token_logprobs
from rlhf_kit.maths.products import packs
from rlhf_kit.recipe import Recipe
from rlhf_kit.rehearsal import Machine, rehearsing
from rlhf_kit.rollout import logits_held

FLOAT = 4
"""Bytes of a number of an adapter, whatever the base is in."""


class Pass(NamedTuple):
    """What one pass through the base takes."""

    seconds: float
    bytes: float
    """The most that is alive at a time, besides weights."""


class Passes:
    """The base without weights, one adapter on it, and what passes through them take on a device."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.base, self.device = recipe.base, device
        causal = models.without_weights(recipe.base)
        self.config = causal.config.get_text_config()
        models.check_stages(recipe, causal)
        self.trunk: nn.Module = getattr(causal, causal.base_model_prefix)
        self.takes_positions = models.takes_positions(self.trunk)
        self.unpadded = self.takes_positions and unpadded.possible(causal)
        """Whether a shared base's passes may be over real tokens alone, and over those that begin several rows once."""
        self.head = models.plain_head(causal, causal.get_output_embeddings())
        layers = [layer for layer in self.trunk.modules() if isinstance(layer, nn.Linear | Conv1D)]
        self.bytes = self._bytes_of_base(causal, layers)
        keep_less(self.trunk, getattr(torch, recipe.base.dtype))
        self.adapted = _with_adapter(causal, recipe)
        adapt_in_few_passes(causal.modules(), "default")
        stock = models.without_weights(recipe.base)
        self.stock_trunk: nn.Module = getattr(stock, stock.base_model_prefix)
        """As the stock trainers have it."""
        _with_adapter(stock, recipe)
        lora = (parameter.numel() for name, parameter in self.adapted.named_parameters() if ".lora_" in name)
        self.adapter_bytes = FLOAT * sum(lora)
        self.copied_bytes = self.folded_bytes = 0
        if packs(device, getattr(torch, recipe.base.dtype)):
            own = [layer.base_layer for layer in self.trunk.modules() if isinstance(layer, LoraLayer)]
            plain = recipe.base.quantization == "none" and all(map(gains_packed, own))
            self.copied_bytes = self.head.weight.nbytes  # a shared base has it packed too
            self.folded_bytes = sum(layer.weight.nbytes for layer in own if plain)  # and these while it samples
        inputs, outputs = max(map(_ends, layers), key=math.prod)
        layer = models.one_layer(recipe.base, inputs, outputs, device)
        self.machine = Machine.measured(layer, inputs, outputs, device, getattr(torch, recipe.base.dtype))
        self.read, self.learn, self.sample = cache(self._read), cache(self._learn), cache(self._sample)

    def _bytes_of_base(self, causal: nn.Module, layers: Sequence[nn.Linear | Conv1D]) -> int:
        """Return the bytes of the base's weights, of which the trunk's linear layers are quantised."""
        total = sum(parameter.nbytes for parameter in causal.parameters())  # tied ones once
        if self.base.quantization == "none":
            return total
        others = total - sum(layer.weight.nbytes for layer in layers)
        weights, outputs = sum(layer.weight.numel() for layer in layers), sum(_ends(layer)[1] for layer in layers)
        if self.base.quantization == "8bit":
            return others + weights + FLOAT * outputs  # a scale for each output
        return others + weights * 9 // 16  # half a byte, and a float32 for 64 weights

    def _states(
        self, rows: int, tokens: int, past: Any = None, before: int = 0, *, keep: bool = False, stock: bool = False
    ) -> Any:
        """What the trunk makes of [rows, tokens]. past: keys and values of the `before` tokens that came before.
        keep: it is to return such. stock: it is that of the stock trainers.
        """
        ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
        mask = torch.ones(rows, 1, tokens, before + tokens, dtype=torch.bool, device="meta")
        positions = {"position_ids": ids} if self.takes_positions else {}
        use_cache = keep or past is not None
        trunk = self.stock_trunk if stock else self.trunk
        return trunk(input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=use_cache, **positions)

    def _logprobs(self, states: Tensor, predicted: int) -> Tensor:
        """Log-probabilities of the last `predicted` tokens of each row."""
        hidden = states[:, -predicted:].flatten(0, 1)
        ids = torch.zeros(len(hidden), dtype=torch.long, device="meta")
        return token_logprobs(hidden, self.head, ids, 1.0, logits_held(self.device))

    @torch.no_grad()
    def _read(self, rows: int, tokens: int, predicted: int = 0) -> Pass:
        """A forward pass of [rows, tokens], and the log-probabilities of the last `predicted` tokens of each row."""
        with rehearsing(self.machine) as seen:
            states = self._states(rows, tokens).last_hidden_state
            if predicted:
                self._logprobs(states, predicted)
        return Pass(seen.seconds, seen.peak)

    def _learn(
        self, rows: int, tokens: int, predicted: int = 0, *, stock: bool = False, checkpointed: bool = False
    ) -> Pass:
        """The same and the way back. stock: in a stock trainer. checkpointed: layers keep their inputs alone and are
        computed again on the way back.
        """
        with rehearsing(self.machine) as seen:
            states = self._states(rows, tokens, stock=stock).last_hidden_state
            (self._logprobs(states, predicted) if predicted else states).sum().backward()
        if not checkpointed:
            return Pass(seen.seconds, seen.peak)
        with rehearsing(self.machine) as layers:
            self._states(rows, tokens, stock=True).last_hidden_state.sum().backward()
        with rehearsing(self.machine) as head:
            given = torch.zeros_like(states, requires_grad=True)
            if predicted:
                self._logprobs(given, predicted).sum().backward()
        count = self.config.num_hidden_layers
        most = (count + 1) * states.nbytes + max(layers.peak / count, head.peak)
        return Pass(seen.seconds + self.read(rows, tokens).seconds, most)

    def _decoding(self) -> AbstractContextManager[Any]:
        """The block samples as a shared base does: folded adapters take no operations of their own."""
        return self.adapted.disable_adapter() if self.folded_bytes else nullcontext()

    @torch.no_grad()
    def _sample(self, rows: int, prompt: int, new: int, group: int = 1) -> Pass:
        """`new` tokens for each of `rows`, none of which ends before; each prompt is that of `group` rows."""
        with self._decoding(), rehearsing(self.machine) as reading:
            self._states(math.ceil(rows / group), prompt, keep=True)
        with self._decoding(), rehearsing(self.machine) as seen:
            middle = prompt + new // 2
            past = self._states(rows, middle, keep=True).past_key_values
            kept, before = seen.alive, seen.seconds
            states = self._states(rows, 1, past, middle).last_hidden_state
            probabilities = tempered(self.head(states[:, -1]), 1.0).softmax(-1)
            inverse_cdf(probabilities, torch.zeros(rows, device="meta"))
        at_the_end = kept * (prompt + new) / middle + 2 * probabilities.nbytes  # and the logits beside them
        folding = 4 * self.folded_bytes / self.machine.bytes_per_second  # weights read, added to, written and packed
        seconds = folding + reading.seconds + new * (seen.seconds - before)
        return Pass(seconds, self.folded_bytes + max(reading.peak, at_the_end))


def _with_adapter(causal: PreTrainedModel, recipe: Recipe) -> PeftModel:
    return models.tried(causal, recipe.adapter, recipe.where(models.TARGETS)).eval()


def _ends(layer: nn.Module) -> tuple[int, int]:
    """Return a linear layer's inputs and outputs."""
    outputs, inputs = layer.get_parameter("weight").shape
    return (outputs, inputs) if isinstance(layer, Conv1D) else (inputs, outputs)
