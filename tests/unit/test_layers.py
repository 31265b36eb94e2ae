"""Layers of a frozen base compute what they did, from fewer copies and with less kept for the way back."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_kit.layers import keep_less, multiply_packed
from rlhf_kit.maths.products import packs


@pytest.fixture
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=50, max_length=16
    )
    return LlamaForCausalLM(config).requires_grad_(False).eval()


def through(block, x):
    """What a block makes of x, the gradient for x, and how many numbers were kept for it."""
    kept, x = {}, x.clone().requires_grad_()

    def count(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        out = block(x)
    out.square().sum().backward()
    weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    return out.detach(), x.grad, sum(count for place, count in kept.items() if place not in weights)


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_a_gated_block_is_the_same_and_keeps_less(llama, act):
    """Nothing is kept but the two halves, not the way to their product."""
    block = llama.model.layers[0].mlp
    block.act_fn = {"silu": nn.SiLU(), "gelu_pytorch_tanh": nn.GELU("tanh")}[act]
    plain, x = copy.deepcopy(block), torch.randn(2, 5, 32)
    keep_less(llama.model, torch.float32)
    (out, slope, kept), (expected, expected_slope, kept_before) = through(block, x), through(plain, x)
    assert torch.equal(out, expected)
    torch.testing.assert_close(slope, expected_slope)
    assert kept == 2 * 2 * 5 * 96
    assert kept_before > kept


def test_the_product_is_made_again_for_weights_that_learn(llama):
    """The input of the last layer is what its weight's gradient is made of."""
    block = llama.model.layers[0].mlp.requires_grad_(True)
    plain, x = copy.deepcopy(block), torch.randn(2, 5, 32)
    keep_less(llama.model, torch.float32)
    for one in (block, plain):
        one(x).square().sum().backward()
    for (name, ours), theirs in zip(block.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


class Scaled(nn.Module):
    """The parts of a gated block, and another formula."""

    def __init__(self, block):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = block.gate_proj, block.up_proj, block.down_proj
        self.act_fn = block.act_fn

    def forward(self, x):
        """With a factor that no part shows."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 0.5)


class Told(Scaled):
    """The same formula, but it is told more than its input."""

    def forward(self, x, layer):
        """The layer has no say."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("kind", [Scaled, Told])
def test_blocks_that_compute_something_else_are_left_alone(llama, kind):
    """Falcon's scale their halves, and some are told of more than their input."""
    layer = llama.model.layers[0]
    layer.mlp = kind(layer.mlp)
    more, x = {"layer": 0} if kind is Told else {}, torch.randn(3, 32)
    expected = layer.mlp(x, **more)
    keep_less(llama.model, torch.float32)
    assert "forward" not in vars(layer.mlp)
    assert "forward" in vars(llama.model.layers[1].mlp)
    assert torch.equal(layer.mlp(x, **more), expected)


@pytest.mark.skipif(not packs(torch.device("cpu"), torch.float32), reason="nothing is packed on this machine")
def test_packed_layers_hold_their_weights_once(llama):
    """The model computes what it did, also backwards; what a layer shows has its shape and no numbers to use."""
    plain, ids = copy.deepcopy(llama), torch.randint(50, (2, 7))
    multiply_packed(llama, llama.model)
    shapes = [parameter.shape for parameter in plain.parameters()]
    assert [parameter.shape for parameter in llama.parameters()] == shapes
    layer = llama.model.layers[0].mlp.up_proj
    assert layer.weight.untyped_storage().nbytes() == 4
    assert math.isnan(layer.weight[0, 0])
    assert torch.equal(layer.forward.weight, plain.model.layers[0].mlp.up_proj.weight)

    slopes = []
    for model in (llama, plain):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embedded).logits
        logits.square().sum().backward()
        slopes.append((logits.detach(), embedded.grad))
    torch.testing.assert_close(*slopes)
