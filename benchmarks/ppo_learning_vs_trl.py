"""What PPO learns here and in trl 1.12.0 from the same SFT policy and reward model, after the same number of episodes.

    python benchmarks/ppo_learning_vs_trl.py                                       the quickstart, three seeds
    python benchmarks/ppo_learning_vs_trl.py --quick                               one seed
    python benchmarks/ppo_learning_vs_trl.py --checkpoint FOLDER --stories FILE    happier stories (real_checkpoint.py)

Each seed trains SFT and reward model once. From there our PPO stage runs with both value functions, and trl's trainer
with ours' settings: policy LoRA from zero on the base with the SFT adapter merged into it, the reward model merged and
normalised, its value model a full copy of that reward model. The base is not quantised, since merging would be lossy.
What trl does not have: gradient clipping.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from measure import ROOT, arguments, install_trl, print_table, run, write

sys.path.insert(0, str(ROOT))

LAST = 10  # updates that the training figures are averaged over
ANSWERS = 8  # of a policy to each held-out prompt
VALUE_RATE = 0.1
"""trl's value model is trained at this share of the policy's learning rate: all of its weights move, not an adapter."""


def on_heldout(shared: Any, policy: str, reference: str, recipe: Any, text_format: Any) -> dict[str, float]:
    """Return the gold score of what a policy answers to held-out prompts, its deviation and the KL to the reference."""
    import accelerate

    from rlhf_kit import check
    from rlhf_kit.evaluation import Examination, heldout_prompts
    from rlhf_kit.pieces import Pieces

    settings = recipe.stages["ppo"]
    prompts, ids = heldout_prompts(recipe, check.plan(recipe).examples, text_format, recipe.evaluation.count)
    pieces = Pieces("evaluation", recipe.evaluation.batch_size, "prompts", accelerate.Accelerator(cpu=True))
    examined = partial(
        Examination,
        shared=shared,
        text_format=text_format,
        prompts=prompts,
        prompt_ids=ids,
        limit=settings.max_new_tokens,
        temperature=settings.temperature,
        reference=reference,
        reward=None,
        gold=recipe.evaluation.gold,
        pieces=pieces,
    )
    found = [examined(seed=recipe.seed + draw).answers(policy).figures() for draw in range(ANSWERS)]
    return {name: fmean(figures[name] for figures in found) for name in ("gold", "gold_std", "kl")}


def trl_worker(run_dir: Path) -> None:
    """Train with trl what `run_dir`'s ppo stage trains; print the figures as JSON."""
    import torch
    from accelerate import Accelerator
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from torch import nn
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from rlhf_kit import artifacts, check, models
    from rlhf_kit.collate import load_text_format, tokenise_prompts
    from rlhf_kit.examples.loading import prompts_of
    from rlhf_kit.maths.schedules import learning_rate_factor
    from rlhf_kit.recipe_reading import written_recipe

    recipe = written_recipe(run_dir / artifacts.RECIPE)
    ppo = recipe.stages["ppo"]
    examples = prompts_of(check.plan(recipe).examples[ppo.prompts])
    text_format = load_text_format(recipe.base)
    tokenizer = text_format.tokenizer
    tokenizer.padding_side = "left"
    assert text_format.pad_id != text_format.end_id
    tokenizer.pad_token_id, tokenizer.eos_token_id = text_format.pad_id, text_format.end_id

    def merged(stage: str, shell: Any) -> Any:
        return PeftModel.from_pretrained(shell, str(run_dir / stage / "adapter")).merge_and_unload()

    def base() -> Any:
        return models.load_base(recipe.base, text_format, Accelerator(cpu=True, mixed_precision="no"))

    policy = merged("sft", base())
    policy.generation_config.pad_token_id = text_format.pad_id
    reward = merged("reward", models.classifier(base()))
    unit = artifacts.read_manifest(run_dir / "reward")["score_normalisation"]
    score = nn.Linear(reward.score.in_features, 1)
    with torch.no_grad():
        score.weight.copy_(reward.score.weight / unit["std"])
        score.bias.fill_(-unit["mean"] / unit["std"])
    reward.score = score
    value = copy.deepcopy(reward)
    value.requires_grad_(True)
    reward.requires_grad_(False)

    tokenised = tokenise_prompts(examples.train, text_format, None, "error")
    seen: list[dict[str, float]] = []

    class Report(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):  # type: ignore[no-untyped-def]
            seen.append(dict(logs))
            print(
                f"trl step {len(seen)} score {logs['objective/scores']:.3f} kl {logs['objective/kl']:.2f}", flush=True
            )

    config = PPOConfig(
        output_dir=str(run_dir / "trl"),
        per_device_train_batch_size=ppo.batch_size,
        gradient_accumulation_steps=1,
        num_mini_batches=ppo.minibatches,
        num_ppo_epochs=ppo.epochs,
        total_episodes=ppo.updates * ppo.batch_size,
        response_length=ppo.max_new_tokens,
        local_rollout_forward_batch_size=ppo.batch_size,
        stop_token="eos",
        temperature=ppo.temperature,
        missing_eos_penalty=ppo.missing_eos_penalty,
        kl_coef=ppo.kl_coef,
        cliprange=ppo.clip,
        cliprange_value=ppo.value_clip,
        vf_coef=ppo.value_coef,
        gamma=ppo.gamma,
        lam=ppo.lam,
        gradient_checkpointing=False,
        num_sample_generations=0,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=recipe.seed,
    )
    torch.manual_seed(recipe.seed)
    from peft import get_peft_model

    shape = recipe.adapter
    policy = get_peft_model(
        policy,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=shape.r,
            lora_alpha=shape.alpha,
            lora_dropout=0.0,
            target_modules=shape.target_modules,
        ),
    )
    own = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": own, "lr": ppo.learning_rate},
            {"params": list(value.parameters()), "lr": VALUE_RATE * ppo.learning_rate},
        ],
        weight_decay=ppo.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda update: learning_rate_factor(ppo.schedule, update, ppo.updates, ppo.warmup_updates)
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": tokenised.rows}),
        eval_dataset=Dataset.from_dict({"input_ids": tokenised.rows[: ppo.batch_size]}),
        optimizers=(optimizer, schedule),
        callbacks=[Report()],
    )
    trainer.train()

    policy.save_pretrained(str(run_dir / "trl"))
    shared = models.SharedBase(merged("sft", base()), recipe.base)
    shared.add("ppo", run_dir / "trl")
    last = seen[-LAST:]
    figures = {
        **on_heldout(shared, "ppo", models.BASE, recipe, text_format),
        "train score": fmean(step["objective/scores"] for step in last),
        "train kl": fmean(step["objective/kl"] for step in last),
    }
    print("figures " + json.dumps(figures), flush=True)


def theirs(run_dir: Path, trl: Path) -> dict[str, float]:
    """Return what trl's trainer reaches."""
    environment = {**os.environ, "PYTHONPATH": f"{trl}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, __file__, "--trl-worker", str(run_dir)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    (run_dir / "trl.log").write_text(result.stdout)
    if result.returncode:
        raise SystemExit(result.stdout[-4000:])
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("figures ")]
    return json.loads(line.removeprefix("figures "))


def ours(recipe: Path, out: Path, settings: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Return what our PPO stage reaches, and the SFT policy's figures."""
    from rlhf_kit.finished import FinishedRun

    shutil.rmtree(out / "ppo", ignore_errors=True)
    run(recipe, out, settings, log=out.with_suffix(".log"))
    metrics = [json.loads(line) for line in (out / "ppo" / "metrics.jsonl").read_text().splitlines()][-LAST:]
    finished = FinishedRun(out)
    for stage in ("sft", "ppo"):
        finished.shared.add(stage, out / stage / "adapter")
    ppo, sft = (
        on_heldout(finished.shared, stage, "sft", finished.recipe, finished.text_format) for stage in ("ppo", "sft")
    )
    figures = {
        **ppo,
        "train score": fmean(step["objective/score"] for step in metrics),
        "train kl": fmean(step["objective/kl"] for step in metrics),
    }
    return figures, sft


def main() -> None:
    """Train, and print a row for each seed and trainer."""
    options = arguments(__doc__ or "")
    options.add_argument("--trl-worker", type=Path, help="for this script itself")
    options.add_argument("--checkpoint", type=Path)
    options.add_argument("--stories", type=Path)
    options.add_argument("--values", nargs="+", choices=("adapter", "trunk"), default=["adapter", "trunk"])
    options.add_argument("--seeds", nargs="+", type=int)
    chosen = options.parse_args()
    if chosen.trl_worker:
        trl_worker(chosen.trl_worker)
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trl = install_trl(folder / "trl")
        settings = ["base.quantization=none", "base.dtype=float32"]
        if chosen.checkpoint:
            from tests.real_input.happy_stories import write_data

            write_data(folder / "data", chosen.checkpoint, chosen.stories)
            recipe, seeds = ROOT / "tests" / "real_input" / "happy_stories.yaml", [1, 2, 3]
            settings += [f"base.model={chosen.checkpoint.resolve()}", f"data_root={folder / 'data'}"]
        else:
            recipe, seeds = ROOT / "recipes" / "quickstart.yaml", [7, 8, 9]
        kl_coef = yaml.safe_load(recipe.read_text())["stages"]["ppo"]["kl_coef"]
        for seed in chosen.seeds or (seeds[:1] if chosen.quick else seeds):
            out = folder / f"run{seed}"
            for value in (*chosen.values, "trl"):
                if value == "trl":
                    figures = theirs(out, trl)
                else:
                    mine = [*settings, f"seed={seed}", f"stages.ppo.value={value}"]
                    figures, sft = ours(recipe, out, mine)
                objective = figures["train score"] - kl_coef * figures["train kl"]
                gain = (figures["gold"] - sft["gold"]) / sft["gold_std"]
                trainer = "trl 1.12.0" if value == "trl" else f"ours, {value}"
                found = {"gold gain (SFT std)": gain, **figures, "score - coef x kl": objective}
                del found["gold_std"]
                rows.append({"seed": seed, "trainer": trainer, **found})
                print_table(rows)
                print(flush=True)
    assert all(math.isfinite(row["gold"]) for row in rows)
    write(chosen.json, {"rows": rows})


if __name__ == "__main__":
    main()
