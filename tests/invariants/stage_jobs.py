"""Jobs of the SFT and reward stages on the tiny model, for the tests of this folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from rlhf_kit.collate import load_text_format
from rlhf_kit.data_cards import load_card
from rlhf_kit.examples.loading import load_examples
from rlhf_kit.recipe import Recipe
from rlhf_kit.recipe_reading import load_recipe
from rlhf_kit.stages import Job, StopRequest
from tests import tiny

TRAINING = {"batch_size": 8, "microbatch": 4, "learning_rate": 0.005, "epochs": 2}


def make_recipe(
    folder: Path,
    *,
    base: dict[str, Any] | None = None,
    adapter: dict[str, Any] | None = None,
    text: bool = False,
    ranked: bool = False,
    reward: dict[str, Any] | None = None,
    **training: Any,
) -> Recipe:
    """Write a checkpoint, cards and a recipe of an SFT and a reward stage; return the recipe.

    text: SFT on a card of plain texts. ranked: the reward stage on rankings. reward: further settings of the reward
    stage. training: of both stages.
    """
    if not (folder / "model").exists():
        tiny.make_checkpoint(folder / "model")
    rows = tiny.demonstrations()
    if text:
        texts = [{"text": row["prompt"] + row["completion"]} for row in rows]
        card = tiny.write_card(folder, "shown", "text", texts, heldout=0.25)
    else:
        card = tiny.write_card(folder, "shown", "demonstrations", rows, heldout=0.25)
    if ranked:
        pairs = tiny.write_card(folder, "pairs", "rankings", tiny.rankings(), heldout=0.25)
    else:
        pairs = tiny.write_card(folder, "pairs", "preferences", tiny.preferences(), heldout=0.25)
    stages = {
        "sft": {"kind": "sft", "data": str(card), **TRAINING, **training},
        "reward": {"kind": "reward", "init": "sft", "data": str(pairs), **TRAINING, **training, **(reward or {})},
    }
    path = tiny.write_recipe(folder / "recipe.yaml", folder / "model", stages, base=base or {}, adapter=adapter or {})
    return load_recipe(path)


def make_job(recipe: Recipe, name: str, run: Path, stop: Any = None) -> Job:
    """Return a stage's job with its data read, under the run directory `run`."""
    (run / name).mkdir(parents=True, exist_ok=True)
    cards = {stage.data for stage in recipe.stages.values()}
    return Job(
        recipe=recipe,
        name=name,
        settings=recipe.stages[name],
        folder=run / name,
        inputs={},
        examples={card: load_examples(load_card(card)) for card in cards},
        text_format=load_text_format(recipe.base),
        accelerator=Accelerator(cpu=True),
        stop=stop or StopRequest(),
    )


@dataclass
class StopAfter:
    """A request to stop that comes while step `step` is at work."""

    step: int
    asked: int = 0

    @property
    def requested(self) -> bool:
        self.asked += 1  # a training looks once a step
        return self.asked >= self.step


def adapter_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what a clock or the machine's memory says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in lines]
