"""A plain checkpoint of a finished stage, its adapter folded into the base's full-precision weights.

transformers loads it alone, and what converts or serves plain checkpoints takes it. Training on 8-bit weights makes an
adapter for those; how far the merged model is from the one that was trained is measured on the run's own prompts.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from rlhf_kit import models
from rlhf_kit.errors import InputError
from rlhf_kit.finished import FinishedRun
from rlhf_kit.metrics import read_metrics
from rlhf_kit.recipe import RewardStage

TRIED = 8
"""Rows that the two models are compared on."""


@dataclass(frozen=True)
class Difference:
    """How far the merged model's outputs are from those of base and adapter: logits, or scores of a reward stage."""

    what: str
    largest: float
    mean: float
    spread: float
    """Standard deviation of the outputs themselves."""


def merge(run: FinishedRun, stage: str, out: Path) -> Difference:
    """Write the plain checkpoint of a stage to `out`, whole or not at all, and return how it differs.

    Raises: InputError when `out` has something in it, or the stage is not finished.
    """
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise InputError(f"--out {out}: is there already; name a new folder.")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}.")
    manifest = run.manifest(stage)
    if "ensemble" in manifest:
        raise InputError(f"{stage}: is an ensemble of reward models, which no plain checkpoint can hold.")
    folder = run.folder / stage / "adapter"
    reward = isinstance(run.recipe.stages[stage], RewardStage)
    rows = [probe["ids"] for probe in manifest["probe"]][:TRIED] if reward else _rows(run, stage)
    with torch.no_grad():
        trained = _outputs(_with_adapter(run, folder, quantised=True, reward=reward), rows, reward)
        gc.collect()  # two bases need not fit into memory
        model = _with_adapter(run, folder, quantised=False, reward=reward).merge_and_unload()
        merged = _outputs(model, rows, reward)
    _write(run, model, out)
    distance = (merged - trained).abs()
    what = "scores" if reward else "logits"
    return Difference(what, float(distance.max()), float(distance.mean()), float(trained.std(correction=0)))


def _with_adapter(run: FinishedRun, folder: Path, *, quantised: bool, reward: bool) -> PeftModel:
    """Return base and adapter, the base as the run had it or in its full precision."""
    base = run.recipe.base
    if not quantised:
        base = base.model_copy(update={"quantization": "none"})
    model = models.load_base(base, run.text_format, run.accelerator)
    return models.open_adapter(models.classifier(model) if reward else model, folder)


def _rows(run: FinishedRun, stage: str) -> list[list[int]]:
    """Return tokens to compare the models on: what a stage, or else another one of the run, kept of its samples."""
    for name in [stage, *run.recipe.stages]:
        samples = run.folder / name / "samples.jsonl"
        if samples.is_file():
            kept = [(sample["prompt"], sample["completion"]) for sample in read_metrics(samples)[:TRIED]]
            return [[*run.text_format.prompt_ids(p), *run.text_format.completion_ids(p, c)] for p, c in kept]
    return [run.text_format.text_ids("Hello, how are you?")]


def _outputs(model: Any, rows: list[list[int]], reward: bool) -> Tensor:
    """Return the logits of every token of every row, or every row's score, in one line."""
    outputs = []
    for row in rows:
        ids = torch.tensor([row], device=model.device)
        if reward:
            outputs.append(models.sequence_scores(model, ids, torch.ones_like(ids)))
        else:
            outputs.append(model(input_ids=ids, use_cache=False).logits.float().flatten())
    return torch.cat(outputs).cpu()


def _write(run: FinishedRun, model: Any, out: Path) -> None:
    """Write model and tokenizer beside `out`, then put them there at once."""
    text_format = run.text_format
    model.config.use_cache = True
    model.config.pad_token_id = text_format.pad_id
    if getattr(model, "generation_config", None) is not None:  # a classifier has none
        model.generation_config.pad_token_id = text_format.pad_id
        model.generation_config.eos_token_id = text_format.end_id
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        model.save_pretrained(beside)
        text_format.tokenizer.save_pretrained(beside)
        beside.chmod(0o755)
        if out.is_dir():
            out.rmdir()
        os.replace(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
