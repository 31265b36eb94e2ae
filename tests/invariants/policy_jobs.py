"""Jobs of the stages that tune a policy without PPO, on the tiny model, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from rlhf_kit import models
from rlhf_kit.collate import load_text_format
from rlhf_kit.data_cards import load_card
from rlhf_kit.examples.loading import load_examples
from rlhf_kit.recipe_reading import load_recipe
from rlhf_kit.stages import Job, StopRequest
from tests import tiny
from tests.invariants import roles


def count_of_a(prompts, completions):
    """Score completions by how often they have the letter a: something a tiny policy can learn in a few steps."""
    return [completion.lower().count("a") for completion in completions]


def not_a_number(prompts, completions):
    """Give every third completion no score."""
    return [float("nan") if number % 3 == 0 else 1.0 * number for number in range(len(completions))]


SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"kl_coef": 0.1, "batch_size": 8, "microbatch": 4, "learning_rate": 0.005, "epochs": 2},
    "kto": {"kl_coef": 0.1, "batch_size": 8, "microbatch": 4, "learning_rate": 0.005, "epochs": 2},
    "rejection_sampling": {
        "completions_per_prompt": 4,
        "sampled_at_once": 16,
        "max_new_tokens": 10,
        "batch_size": 8,
        "microbatch": 4,
        "learning_rate": 0.005,
        "missing_eos_penalty": 1.0,
    },
    "rloo": {
        "kl_coef": 0.05,
        "updates": 3,
        "batch_size": 8,
        "microbatch": 4,
        "max_new_tokens": 10,
        "learning_rate": 0.005,
        "missing_eos_penalty": 1.0,
    },
    "grpo": {
        "kl_coef": 0.05,
        "updates": 3,
        "batch_size": 8,
        "epochs": 2,
        "minibatches": 2,
        "microbatch": 4,
        "max_new_tokens": 10,
        "learning_rate": 0.005,
    },
}


def make_job(
    folder: Path, kind: str, *, out: str = "run", quantization: str = "none", stop: Any = None, **settings: Any
) -> Job:
    """Return a job of a stage named as its kind, the SFT and reward stages before it finished."""
    model = folder / "model"
    if not model.exists():
        tiny.make_checkpoint(model)
    prompts = tiny.write_card(folder, "asked", "prompts", [{"prompt": q} for q in tiny.QUESTIONS], heldout=0.1)
    pairs = tiny.write_card(folder, "pairs", "preferences", tiny.preferences(), heldout=0.2)
    ranked = tiny.write_card(folder, "ranked", "rankings", tiny.rankings(), heldout=0.2)
    shown = tiny.write_card(folder, "shown", "demonstrations", tiny.demonstrations(), heldout=0.1)
    reads = {"data": str(pairs)} if kind in ("dpo", "kto") else {"prompts": str(prompts), "reward": "reward"}
    stages = {
        "sft": {"kind": "sft", "data": str(shown)},
        "reward": {"kind": "reward", "init": "sft", "data": str(pairs)},
        kind: {"kind": kind, "policy": "sft", **reads, **SETTINGS[kind], **settings},
    }
    recipe = load_recipe(tiny.write_recipe(folder / "tiny.yaml", model, stages, base={"quantization": quantization}))
    text_format = load_text_format(recipe.base)
    run = folder / out
    if not run.exists():
        roles.write_adapters(folder / "made", recipe.base, text_format)
        for stage in ("sft", "reward"):
            (run / stage).mkdir(parents=True)
            (folder / "made" / stage).rename(run / stage / "adapter")
    (run / kind).mkdir(exist_ok=True)
    accelerator = Accelerator(cpu=True)
    reward_model = models.classifier(models.load_base(recipe.base, text_format, accelerator))
    reward_model = models.open_adapter(reward_model, run / "reward" / "adapter")
    ids = text_format.prompt_ids(tiny.QUESTIONS[0])
    with torch.no_grad():
        score = float(models.sequence_scores(reward_model, torch.tensor([ids]), torch.ones(1, len(ids))))
    unit = {"score_normalisation": {"mean": 0.1, "std": 0.5}, "probe": [{"ids": ids, "score": score}]}
    return Job(
        recipe=recipe,
        name=kind,
        settings=recipe.stages[kind],
        folder=run / kind,
        inputs={"sft": {}, **({"reward": unit} if "reward" in recipe.depends_on(kind) else {})},
        examples={str(card): load_examples(load_card(card)) for card in (prompts, pairs, ranked)},
        text_format=text_format,
        accelerator=accelerator,
        stop=stop or StopRequest(),
    )
