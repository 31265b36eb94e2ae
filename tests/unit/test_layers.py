"""Layers of a frozen base compute what they did, from fewer copies and with less kept for the way back."""

import copy
import math
import platform
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_kit.layers import adapt_in_few_passes, keep_less, multiply_packed
from rlhf_kit.maths.products import FrozenMatrix
from rlhf_kit.rehearsal import Machine, rehearsing

ON_X86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only x86 CPUs have a packed layout")


@pytest.fixture
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=50, max_length=16
    )
    return LlamaForCausalLM(config).requires_grad_(False).eval()


@pytest.fixture
def adapted(llama):
    config = LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(llama, config)
    adapt_in_few_passes(llama.modules(), "default")
    return llama


def through(block, x):
    """What a block makes of x, the bytes that are there for the way back, and the gradients."""
    x = x.clone().requires_grad_()
    with rehearsing(Machine(1.0, 1.0, 1.0)) as seen:
        out = block(x)
        kept = seen.alive
        out.square().sum().backward()
    learning = [parameter.grad for parameter in block.parameters() if parameter.requires_grad]
    return out.detach(), kept, [x.grad, *learning]


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_a_gated_block_is_the_same_and_keeps_less(adapted, act):
    """Kept are the two halves, what the adapters made of x and the result; not the way to the product, nor itself."""
    block = adapted.model.layers[0].mlp
    block.act_fn = {"silu": nn.SiLU(), "gelu_pytorch_tanh": nn.GELU("tanh")}[act]
    plain, x = copy.deepcopy(block), torch.randn(2, 5, 32)
    keep_less(adapted.model, torch.float32)
    (out, kept, slopes), (expected, kept_before, expected_slopes) = through(block, x), through(plain, x)
    assert torch.equal(out, expected)
    torch.testing.assert_close(slopes, expected_slopes)
    tokens = 2 * 5
    assert kept == 4 * tokens * (96 + 96 + 3 * 4 + 32)
    assert kept_before == kept + 4 * tokens * (96 + 96)


def test_an_adapter_keeps_its_input_in_the_precision_of_the_base(llama):
    """And what it made of it in its own: beside these there is the result alone."""
    up = llama.bfloat16().model.layers[0].mlp.up_proj
    get_peft_model(llama, LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights=False))
    adapt_in_few_passes(llama.modules(), "default")
    layer, tokens = llama.model.layers[0].mlp.up_proj, 10
    assert layer.base_layer is up
    _, kept, _ = through(layer, torch.randn(tokens, 32, dtype=torch.bfloat16))
    assert kept == tokens * (4 * 4 + 2 * 96)


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


class Clamped(Scaled):
    """The same formula for all but large numbers."""

    def forward(self, x):
        """With both halves cut off."""
        gate, up = self.gate_proj(x).clamp(max=16), self.up_proj(x).clamp(-16, 16)
        return self.down_proj(self.act_fn(gate) * up)


@pytest.mark.parametrize("kind", [Scaled, Told, Clamped])
def test_blocks_that_compute_something_else_are_left_alone(llama, kind):
    """Some scale their halves, some cut them off, and some are told of more than their input."""
    layer = llama.model.layers[0]
    layer.mlp = kind(layer.mlp)
    more, x = {"layer": 0} if kind is Told else {}, torch.randn(3, 32)
    expected = layer.mlp(x, **more)
    keep_less(llama.model, torch.float32)
    assert "forward" not in vars(layer.mlp)
    assert "forward" in vars(llama.model.layers[1].mlp)
    assert torch.equal(layer.mlp(x, **more), expected)


@ON_X86
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

    multiply_packed(llama, llama.model)
    assert torch.equal(layer.forward.weight, plain.model.layers[0].mlp.up_proj.weight), "packed a second time"

    slopes = []
    for model in (llama, plain):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embedded).logits
        logits.square().sum().backward()
        slopes.append((logits.detach(), embedded.grad))
    torch.testing.assert_close(*slopes)


@ON_X86
def test_kinds_of_linear_layers_that_do_more_are_not_packed(llama):
    """They multiply with something else, or return more, and their weight stays what it is."""

    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    mlp, x = llama.model.layers[0].mlp, torch.randn(3, 32)
    mlp.up_proj = Doubling(32, 96, bias=False).requires_grad_(False)
    expected = mlp.up_proj(x)
    multiply_packed(llama, llama.model)
    assert isinstance(mlp.gate_proj.forward, FrozenMatrix)
    assert torch.equal(mlp.up_proj(x), expected)


@ON_X86
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells in a file what is mapped")
def test_a_packed_model_lets_go_of_its_file(llama, tmp_path):
    """Its weights would be in memory twice, whoever holds a piece of the file."""
    llama.save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    file = str(tmp_path / "model.safetensors")
    assert file in Path("/proc/self/maps").read_text()
    multiply_packed(model, model.model)
    assert file not in Path("/proc/self/maps").read_text()
    assert torch.equal(model.get_input_embeddings().weight, llama.get_input_embeddings().weight)
