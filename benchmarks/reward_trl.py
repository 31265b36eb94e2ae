"""A reward training here and in trl 1.16's `RewardTrainer`, side by side; for reward_kwise.py and reward_pairs.py.

Both sides get the same base, adapter, head, data, epochs, optimizer steps and schedule, and run as processes of their
own, one after the other: A B A B. trl gets each ranking as its pairs. Its model is the very one that is trained here,
because transformers' own classifier over a checkpoint with tied embeddings may start with random ones. A step's time is
the time between the ends of two steps, seen from outside.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from measure import ROOT
from ppo_vs_trl import Seen, environment, watch

RANK = 16


@dataclass(frozen=True)
class Result:
    """One training."""

    epoch_seconds: float
    """From the steps after the first, for as many as an epoch has."""
    epoch_cpu_seconds: float
    """The same in CPU time, which other work on the machine hardly changes."""
    accuracy: float
    peak: int
    """Bytes."""


def prepare(
    folder: Path,
    base: str,
    kind: str,
    train: Sequence[Mapping[str, Any]],
    heldout: Sequence[Mapping[str, Any]],
    **more: Any,
) -> None:
    """Write data, card and recipe of one reward stage into `folder`; `more` are its settings."""
    for name, rows in (("train", train), ("heldout", heldout)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    block = f"rlhf_kit:\n  kind: {kind}\n  source: train.jsonl\n  heldout: heldout.jsonl\n"
    (folder / "card.md").write_text(f"---\n{block}---\nMade by a benchmark.\n")
    recipe = {
        "name": "reward",
        "base": {"model": base, "dtype": "float32"},
        "adapter": {"r": RANK, "alpha": RANK},
        "stages": {"reward": {"kind": "reward", "data": "card.md", **more}},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


def ours(folder: Path, seed: int) -> Result:
    """Train here."""
    command = [
        sys.executable,
        "-m",
        "rlhf_kit",
        "run",
        "recipe.yaml",
        "--out",
        "run",
        "--fresh",
        "--set",
        f"seed={seed}",
    ]
    seen = watch(command, folder, environment())
    manifest = json.loads((folder / "run" / "reward" / "manifest.json").read_text())
    return _result(seen, manifest["steps"], manifest["health"]["accuracy"], manifest["settings"]["epochs"])


def theirs(folder: Path, seed: int, microbatch: int) -> Result:
    """Train with trl, `microbatch` pairs a forward pass."""
    command = [sys.executable, __file__, str(folder), str(seed), str(microbatch)]
    seen = watch(command, folder, environment())
    figures = json.loads(seen.lines[-1])
    return _result(seen, figures["steps"], figures["accuracy"], figures["epochs"])


def _result(seen: Seen, steps: int, accuracy: float, epochs: float) -> Result:
    # the closing figures are logged as one more line of the last step
    seconds, cpu = ((ends[steps - 1] - ends[0]) / (steps - 1) * steps / epochs for ends in (seen.ends, seen.cpu))
    return Result(seconds, cpu, accuracy, seen.peak)


def worker(folder: Path, seed: int, microbatch: int) -> None:
    """Train with trl what `folder`'s recipe trains; print the figures as JSON."""
    import math

    import torch
    from accelerate import Accelerator
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import RewardConfig, RewardTrainer

    from rlhf_kit import check, health, models
    from rlhf_kit.collate import load_text_format, right_pad, tokenise_comparisons
    from rlhf_kit.recipe_reading import load_recipe
    from rlhf_kit.training import optimizer_steps

    recipe = load_recipe("recipe.yaml")
    settings = recipe.stages["reward"]
    examples = check.plan(recipe).examples[settings.data]
    text_format = load_text_format(recipe.base)
    groups, heldout = (
        tokenise_comparisons(rows, text_format, None, "error").rows for rows in (examples.train, examples.heldout)
    )
    pairs = [
        {"chosen_ids": group["completions"][chosen], "rejected_ids": group["completions"][rejected]}
        for group in groups
        for chosen, rejected in zip(group["chosen"], group["rejected"], strict=True)
    ]
    causal = models.load_base(recipe.base, text_format, Accelerator(cpu=True, mixed_precision="no"))
    model = models.add_adapter(
        models.classifier(causal), recipe.adapter, "SEQ_CLS", init=None, seed=seed, base=recipe.base
    )
    steps = optimizer_steps(len(groups), settings)
    batch = settings.batch_size * len(pairs) // len(groups)  # pairs of a step: those of as many prompts

    class Report(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):  # type: ignore[no-untyped-def]
            if "loss" in logs:
                print(f"trl step {state.global_step} loss {logs['loss']}", flush=True)

    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            output_dir="trl",
            per_device_train_batch_size=microbatch,
            gradient_accumulation_steps=batch // microbatch,
            max_steps=steps,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.schedule,
            warmup_steps=math.ceil(settings.warmup_fraction * steps),
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=text_format.tokenizer,
        callbacks=[Report()],
    )
    trainer.train()
    model.eval()
    scores = []
    with torch.no_grad():
        for group in heldout:
            ids, mask = right_pad(group["completions"], text_format.pad_id)
            scores.append(models.sequence_scores(model, ids, mask.long()))
    found = health.accuracy(health.pairs_of(heldout), torch.cat(scores).numpy())
    print(json.dumps({"steps": steps, "epochs": settings.epochs, "accuracy": found["accuracy"]}))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    worker(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
