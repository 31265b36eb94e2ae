"""A tiny shared base with all four roles on it, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator

from rlhf_kit import models, recipe
from rlhf_kit.collate import TextFormat, left_pad, load_text_format
from rlhf_kit.generation import generate, uniforms
from rlhf_kit.rollout import unscored
from rlhf_kit.scorers import add_reward_role
from rlhf_kit.values import value_head
from tests import tiny

ADAPTER = recipe.Adapter(r=4, alpha=8.0)
PROMPTS = ["Where?", "May I see the red cup?", "A map", "Who has my hat today?"]


def base_settings(folder: Path, quantization: str, dtype: str = "float32") -> recipe.Base:
    return recipe.Base(model=str(folder), quantization=quantization, dtype=dtype)


def disturb(model: torch.nn.Module, seed: int) -> None:
    """Give the zero half of every LoRA adapter some weight, so that the adapter changes what the model says."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def write_adapters(folder: Path, base: recipe.Base, text_format: TextFormat) -> None:
    """Write `folder`/sft (a causal adapter) and `folder`/reward (a sequence classifier's, with its head)."""
    accelerator = Accelerator(cpu=True)
    for name, task, seed in (("sft", "CAUSAL_LM", 1), ("reward", "SEQ_CLS", 2)):
        model = models.load_base(base, text_format, accelerator)
        if task == "SEQ_CLS":
            model = models.classifier(model)
        peft_model = models.add_adapter(model, ADAPTER, task, init=None, seed=seed, base=base)
        disturb(peft_model, seed)
        models.save_adapter(peft_model, folder / name, base)


def shared_base(folder: Path, quantization: str = "none", **how: bool) -> tuple[models.SharedBase, TextFormat]:
    """Return a tiny base with the roles policy, reference, reward and value, and its text format."""
    if not (folder / "model").exists():
        tiny.make_checkpoint(folder / "model")
    base = base_settings(folder / "model", quantization)
    text_format = load_text_format(base)
    write_adapters(folder, base, text_format)
    shared = models.SharedBase(models.load_base(base, text_format, Accelerator(cpu=True)), base, **how)
    shared.add("reference", folder / "sft")
    shared.add("policy", folder / "sft", trainable=True)
    add_reward_role(shared, "reward", folder / "reward")
    shared.add("value", folder / "reward", trainable=True)
    shared.set_head("value", value_head(shared, "adapter", "reward", 0.5, 2.0, 0), trainable=True)
    return shared, text_format


def sampled(shared: models.SharedBase, text_format: TextFormat, *, length: int = 12, role: str = "policy"):
    """Return a rollout of PROMPTS without its numbers."""
    prompts = left_pad([text_format.prompt_ids(prompt) for prompt in PROMPTS], text_format.pad_id)
    uniform = uniforms(range(len(PROMPTS)), len(PROMPTS), length, 0, "test")
    return unscored(
        prompts, generate(shared, role, prompts, uniform, end_id=text_format.end_id, pad_id=text_format.pad_id)
    )
