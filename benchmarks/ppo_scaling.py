"""How PPO's memory and time grow: with the batch, the tokens, the updates; beside SFT's memory; on a quantised base;
what activation checkpointing gives and takes; and RLOO's with the completions of a prompt.

    python benchmarks/ppo_scaling.py
    python benchmarks/ppo_scaling.py --only batch checkpointing
    python benchmarks/ppo_scaling.py --quick    fewer updates

The 15 M shape of ppo_vs_trl.py (checkpointing, groups: its 135 M shape), fixed lengths, 8 rows a microbatch. Memory is
the process's peak less what importing takes; time is that of a step, the first left out.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from measure import arguments, print_table, write
from ppo_vs_trl import SHAPES, Shape, environment, imports_only, prepare, watch

MICROBATCH = 8
BATCHES = (8, 16, 32, 64, 128)
COMPLETIONS = (12, 24, 48, 96)
GROUPS = (2, 4, 8)
SHAPE = replace(SHAPES["15m"], batch=max(BATCHES))
Table = list[dict[str, Any]]


def ppo(folder: Path, base: int, quantization: str = "none", **settings: object) -> tuple[float, float, Table]:
    """Run the PPO stage, after what it builds on if there is none; return net peak in GB, seconds, the metrics."""
    command = [sys.executable, "-m", "rlhf_kit", "run", "recipe.yaml", "--out", f"run-{quantization}"]
    command += ["--set", f"base.quantization={quantization}"]
    for stage in ("sft", "reward"):  # in processes of their own, for a process's peak is that of all it has done
        watch([*command, "--only", stage], folder, environment())
    for name, value in {"microbatch": MICROBATCH, **settings}.items():
        command += ["--set", f"stages.ppo.{name}={json.dumps(value)}"]
    seen = watch([*command, "--only", "ppo", "--fresh"], folder, environment())
    lines = (folder / f"run-{quantization}" / "ppo" / "metrics.jsonl").read_text().splitlines()
    return (seen.peak - base) / 1e9, seen.step_seconds, [json.loads(line) for line in lines]


def sft_peak(folder: Path, shape: Shape, **settings: object) -> float:
    """Return the net peak in GB of an SFT stage on rows as long as a shape's, its end token included."""
    words = " ".join(f"t{n}" for n in range(3, 2 + shape.prompt + shape.completion))
    half = len(words) // 2 + words[len(words) // 2 :].index(" ")
    rows = [{"prompt": words[:half], "completion": words[half:]}] * 64
    (folder / "long.jsonl").write_text("".join(json.dumps({**row, "id": n}) + "\n" for n, row in enumerate(rows)))
    card = "---\nrlhf_kit: {kind: demonstrations, source: long.jsonl, heldout: 0}\n---\n"
    (folder / "long.md").write_text(card)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    stage = {"kind": "sft", "data": "long.md", "max_steps": 4, "batch_size": 32, "microbatch": MICROBATCH, **settings}
    recipe |= {"stages": {"sft": stage}, "evaluation": {}}
    (folder / "sft.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    command = [sys.executable, "-m", "rlhf_kit", "run", "sft.yaml", "--out", "sft_run", "--fresh"]
    base = imports_only("import rlhf_kit.pipeline, rlhf_kit.stages.sft")
    return (watch(command, folder, environment()).peak - base) / 1e9


def by_batch(folder: Path, base: int) -> Table:
    """Each batch, in memory and time."""
    table = []
    for batch in BATCHES:
        peak, seconds, _ = ppo(folder, base, batch_size=batch)
        table.append(
            {"batch": batch, "peak GB": peak, "seconds a step": seconds, "ms a completion": 1000 * seconds / batch}
        )
    return table


def by_tokens(folder: Path, base: int) -> Table:
    """Completions of each length, 32 of them."""
    table = []
    for tokens in COMPLETIONS:
        place = folder / str(tokens)
        place.mkdir()
        prepare(place, replace(SHAPE, completion=tokens), "llama", "fixed")
        peak, seconds, _ = ppo(place, base, batch_size=32)
        total = 32 * (SHAPE.prompt + tokens)
        table.append(
            {"tokens": total, "peak GB": peak, "seconds a step": seconds, "ms a token": 1000 * seconds / total}
        )
    return table


def by_updates(folder: Path, base: int, updates: int = 200) -> Table:
    """The peak of one process up to an update, with imports, and by how much it has grown since the fifth."""
    _, _, metrics = ppo(folder, base, batch_size=8, updates=updates)
    peaks = [line["memory/peak_bytes"] / 1e9 for line in metrics]
    ends = (5, updates // 4, updates // 2, updates)
    return [{"update": end, "peak GB": peaks[end - 1], "of the fifth": peaks[end - 1] / peaks[4]} for end in ends]


def beside_sft(folder: Path, base: int) -> Table:
    """PPO's memory over SFT's, on the same base, rows as long and as many a microbatch."""
    peak, _, _ = ppo(folder, base, batch_size=32)
    sft = sft_peak(folder, SHAPE)
    return [{"ppo GB": peak, "sft GB": sft, "ppo / sft": peak / sft}]


def by_precision(folder: Path, base: int) -> Table:
    """A base that is quantised."""
    table = []
    for quantization in ("none", "8bit", "4bit"):
        peak, _, metrics = ppo(folder, base, quantization, batch_size=32)
        table.append({"base": quantization, "peak GB": peak, **split(metrics)})
    return table


def by_checkpointing(folder: Path, base: int) -> Table:
    """Layers that keep what they computed, and layers that are computed again; PPO, and SFT's memory."""
    place, shape, table = folder / "135m", SHAPES["135m"], []
    place.mkdir()
    prepare(place, shape, "llama", "fixed")
    for again in (False, True):
        peak, seconds, metrics = ppo(place, base, updates=4, activation_checkpointing=again)
        sft = sft_peak(place, shape, activation_checkpointing=again)
        figures = {"peak GB": peak, "seconds a step": seconds, **split(metrics)}
        table.append({"checkpointing": again, **figures, "sft GB": sft, "ppo / sft": peak / sft})
    return table


def by_group(folder: Path, base: int) -> Table:
    """RLOO, 8 completions of fewer and fewer long prompts, each of which is computed once in a pass."""
    place, table = folder / "rloo", []
    place.mkdir()
    prepare(place, replace(SHAPES["135m"], prompt=192, completion=32), "llama", "fixed")
    recipe = yaml.safe_load((place / "recipe.yaml").read_text())
    recipe["stages"]["ppo"]["kind"] = "rloo"
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    for completions in GROUPS:
        peak, seconds, metrics = ppo(place, base, updates=3, completions_per_prompt=completions)
        figures = {"peak GB": peak, "seconds a step": seconds, **split(metrics)}
        table.append({"completions a prompt": completions, **figures})
    return table


def split(metrics: Table) -> dict[str, float]:
    """Return where the time of a step goes, the first left out."""
    return {
        "generate s": fmean(line["time/rollout_s"] - line["time/scoring_s"] for line in metrics[1:]),
        "score s": fmean(line["time/scoring_s"] for line in metrics[1:]),
        "learn s": fmean(line["time/update_s"] for line in metrics[1:]),
    }


QUESTIONS: dict[str, Callable[[Path, int], Table]] = {
    "batch": by_batch,
    "tokens": by_tokens,
    "updates": by_updates,
    "sft": beside_sft,
    "quantization": by_precision,
    "checkpointing": by_checkpointing,
    "groups": by_group,
}


def main() -> None:
    """Measure, and print a table for each question."""
    options = arguments(__doc__ or "")
    options.add_argument("--only", nargs="+", choices=QUESTIONS, default=list(QUESTIONS), help="these questions alone")
    chosen = options.parse_args()
    if chosen.quick:
        QUESTIONS["updates"] = partial(by_updates, updates=20)
    found: dict[str, Table] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, SHAPE, "llama", "fixed")
        base = imports_only("import rlhf_kit.pipeline, rlhf_kit.stages.ppo")
        for question in chosen.only:
            found[question] = QUESTIONS[question](folder, base)
            print_table(found[question])
            print(flush=True)
    write(chosen.json, found)


if __name__ == "__main__":
    main()
