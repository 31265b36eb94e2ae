"""Activation checkpointing: layers are computed again on the way back, and nothing that is learnt changes."""

from __future__ import annotations

import pytest
import torch
from transformers import GPTNeoXJapaneseConfig, GPTNeoXJapaneseForCausalLM, JetMoeConfig, JetMoeForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from rlhf_kit import layers, models
from rlhf_kit.errors import InputError
from rlhf_kit.stages import dpo, ppo, rejection_sampling, reward, sft
from tests.invariants import policy_jobs, stage_jobs, test_ppo
from tests.invariants.stage_jobs import adapter_weights, metrics

RUN = {
    "sft": sft.run,
    "reward": reward.run,
    "dpo": dpo.run,
    "kto": dpo.run,
    "ppo": ppo.run,
    "grpo": ppo.run,
    "rejection_sampling": rejection_sampling.run,
}


def job_of(folder, kind, again, quantization, settings):
    """A stage of a kind with or without checkpointing; SFT and reward model with dropout."""
    settings, out = {**settings, "activation_checkpointing": again}, f"run-{again}"
    if kind in ("sft", "reward"):
        how = {
            "base": {"quantization": quantization},
            "adapter": {"dropout": 0.1},
            "reward": {"init": None, "lm_coef": 0.1},
        }
        return stage_jobs.make_job(stage_jobs.make_recipe(folder, epochs=1, **how, **settings), kind, folder / out)
    if kind == "ppo":
        return test_ppo.make_job(folder, out=out, quantization=quantization, **settings)
    return policy_jobs.make_job(folder, kind, out=out, quantization=quantization, **settings)


@pytest.mark.parametrize(
    ("kind", "quantization", "settings"),
    [
        ("sft", "none", {}),
        ("sft", "8bit", {}),
        ("reward", "none", {}),
        ("reward", "8bit", {}),
        ("dpo", "none", {}),
        ("kto", "8bit", {}),
        ("ppo", "none", {"value": "adapter", "ptx": {"coef": 0.1}}),
        ("ppo", "none", {"value": "trunk"}),
        ("ppo", "8bit", {"value": "trunk"}),
        ("ppo", "4bit", {"value": "adapter"}),
        ("grpo", "none", {}),
        ("rejection_sampling", "none", {}),
    ],
)
def test_every_stage_learns_the_same(tmp_path, monkeypatch, kind, quantization, settings):
    """Adapter and metrics are the same to the bit, though blocks with a gradient are computed more than once."""
    computed = {False: 0, True: 0}

    def counted(forward):
        def forward_counted(self, x):
            computed[again] += torch.is_grad_enabled()
            return forward(self, x)

        return forward_counted

    for again in computed:
        job = job_of(tmp_path, kind, again, quantization, settings)
        with monkeypatch.context() as patch:
            patch.setattr(layers, "_gated", counted(layers._gated))
            patch.setattr(LlamaMLP, "forward", counted(LlamaMLP.forward))
            RUN[kind](job)
    folders = [tmp_path / f"run-{again}" / kind for again in computed]
    (plain, ours), (lines, same) = map(adapter_weights, folders), map(metrics, folders)
    assert all(torch.equal(plain[name], ours[name]) for name in plain) and plain.keys() == ours.keys()
    assert [without_clock(line) for line in lines] == [without_clock(line) for line in same]
    assert computed[True] >= 1.8 * computed[False] > 0  # a pass that is only looked at has no way back


def without_clock(line):
    return {name: value for name, value in line.items() if not name.startswith("throughput/")}


SHAPE = {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
WITHOUT = {
    "no such layers": lambda: GPTNeoXJapaneseForCausalLM(GPTNeoXJapaneseConfig(num_attention_heads=2, **SHAPE)),
    "says that it cannot": lambda: JetMoeForCausalLM(
        JetMoeConfig(intermediate_size=8, num_key_value_heads=1, kv_channels=4, num_local_experts=2, **SHAPE)
    ),
}


@pytest.mark.parametrize("why", WITHOUT)
def test_layers_that_cannot_be_computed_again(tmp_path, why):
    """They stay as they are where nobody asked for it; who asks is told where, and what to do instead."""

    def of_sft_alone(recipe):  # of the one kind there is no reward model
        return recipe.model_copy(update={"stages": {"sft": recipe.stages["sft"]}})

    recipe = of_sft_alone(stage_jobs.make_recipe(tmp_path))
    model = WITHOUT[why]()
    assert not models.checkpointed(None, model, torch.device("cuda"))
    models.check_stages(recipe, model)
    asked = of_sft_alone(stage_jobs.make_recipe(tmp_path, activation_checkpointing=True))
    with pytest.raises(
        InputError, match=r"recipe\.yaml:\d+: stages\.sft\.activation_checkpointing: true, but .*ForCausalLM again"
    ):
        models.check_stages(asked, model)
    models.check_stages(asked, models.without_weights(asked.base))


@pytest.mark.parametrize(
    ("wanted", "on_cpu", "on_gpu"), [(None, False, True), (True, True, True), (False, False, False)]
)
def test_by_itself_on_a_gpu_alone(tmp_path, wanted, on_cpu, on_gpu):
    """Arithmetic is what a CPU is short of, and memory what a GPU is."""
    model = models.without_weights(stage_jobs.make_recipe(tmp_path).base)
    assert models.checkpointed(wanted, model, torch.device("cpu")) == on_cpu
    assert models.checkpointed(wanted, model, torch.device("cuda")) == on_gpu
