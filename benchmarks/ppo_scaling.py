"""How PPO's memory and time grow: with the batch, the tokens, the updates; beside SFT's memory; on a quantised base.

    python benchmarks/ppo_scaling.py
    python benchmarks/ppo_scaling.py --quick    fewer updates

The 15 M shape of ppo_vs_trl.py, fixed lengths, 8 rows a microbatch. Memory is the process's peak less what importing
takes; time is that of a step, the first left out.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import yaml
from measure import arguments, print_table, write
from ppo_vs_trl import SHAPES, environment, imports_only, prepare, watch

MICROBATCH = 8
BATCHES = (8, 16, 32, 64, 128)
COMPLETIONS = (12, 24, 48, 96)
SHAPE = replace(SHAPES["15m"], batch=max(BATCHES))


def ppo(
    folder: Path, base: int, quantization: str = "none", **settings: object
) -> tuple[float, float, list[dict[str, float]]]:
    """Run the PPO stage, after what it builds on if there is none; return net peak in GB, seconds, the metrics."""
    command = [sys.executable, "-m", "rlhf_kit", "run", "recipe.yaml", "--out", f"run-{quantization}"]
    command += ["--set", f"base.quantization={quantization}"]
    for stage in ("sft", "reward"):  # in processes of their own, for a process's peak is that of all it has done
        watch([*command, "--only", stage], folder, environment())
    for name, value in {"microbatch": MICROBATCH, **settings}.items():
        command += ["--set", f"stages.ppo.{name}={value}"]
    seen = watch([*command, "--only", "ppo"], folder, environment())
    lines = (folder / f"run-{quantization}" / "ppo" / "metrics.jsonl").read_text().splitlines()
    return (seen.peak - base) / 1e9, seen.step_seconds, [json.loads(line) for line in lines]


def sft_peak(folder: Path, base: int, tokens: int) -> float:
    """Return the net peak in GB of an SFT stage on rows of `tokens` tokens."""
    words = " ".join(f"t{n}" for n in range(3, 3 + tokens))
    half = len(words) // 2 + words[len(words) // 2 :].index(" ")
    rows = [{"prompt": words[:half], "completion": words[half:]}] * 64
    (folder / "long.jsonl").write_text("".join(json.dumps({**row, "id": n}) + "\n" for n, row in enumerate(rows)))
    card = "---\nrlhf_kit: {kind: demonstrations, source: long.jsonl, heldout: 0}\n---\n"
    (folder / "long.md").write_text(card)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    stage = {"kind": "sft", "data": "long.md", "max_steps": 8, "batch_size": 32, "microbatch": MICROBATCH}
    recipe |= {"stages": {"sft": stage}, "evaluation": {}}
    (folder / "sft.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    command = [sys.executable, "-m", "rlhf_kit", "run", "sft.yaml", "--out", "sft_run", "--fresh"]
    return (watch(command, folder, environment()).peak - base) / 1e9


def main() -> None:
    """Measure, and print a table for each question."""
    options = arguments(__doc__ or "")
    chosen = options.parse_args()
    updates = 20 if chosen.quick else 200
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, SHAPE, "llama", "fixed")
        base = imports_only("import rlhf_kit.pipeline, rlhf_kit.stages.ppo")
        found["batch"] = []
        for batch in BATCHES:
            peak, seconds, _ = ppo(folder, base, batch_size=batch)
            found["batch"].append(
                {"batch": batch, "peak GB": peak, "seconds a step": seconds, "ms a completion": 1000 * seconds / batch}
            )
        print_table(found["batch"])
        found["tokens"] = []
        for tokens in COMPLETIONS:
            longer = replace(SHAPE, completion=tokens)
            place = folder / str(tokens)
            place.mkdir()
            prepare(place, longer, "llama", "fixed")
            peak, seconds, _ = ppo(place, base, batch_size=32)
            total = 32 * (SHAPE.prompt + tokens)
            found["tokens"].append(
                {"tokens": total, "peak GB": peak, "seconds a step": seconds, "ms a token": 1000 * seconds / total}
            )
        print()
        print_table(found["tokens"])
        _, _, metrics = ppo(folder, base, batch_size=8, updates=updates)
        peaks = [line["memory/peak_bytes"] / 1e9 for line in metrics]
        ends = [5, updates // 4, updates // 2, updates]
        found["updates"] = [{"update": end, "peak GB, imports included": peaks[end - 1]} for end in ends]
        print()
        print_table(found["updates"])
        sft_base = imports_only("import rlhf_kit.pipeline, rlhf_kit.stages.sft")
        sft = sft_peak(folder, sft_base, SHAPE.prompt + SHAPE.completion - 1)  # and the end token
        peak = next(row["peak GB"] for row in found["batch"] if row["batch"] == 32)
        found["sft"] = [{"ppo GB": peak, "sft GB": sft, "ppo / sft": peak / sft}]
        print()
        print_table(found["sft"])
        print(f"growth from update 5 to {updates}: {peaks[-1] / peaks[4]:.3f}; mean {fmean(peaks):.3f} GB")
        found["quantization"] = []
        for quantization in ("none", "8bit", "4bit"):
            peak, _, metrics = ppo(folder, base, quantization, batch_size=32)
            split = {
                "generate s": fmean(line["time/rollout_s"] - line["time/scoring_s"] for line in metrics[1:]),
                "score s": fmean(line["time/scoring_s"] for line in metrics[1:]),
                "learn s": fmean(line["time/update_s"] for line in metrics[1:]),
            }
            found["quantization"].append({"base": quantization, "peak GB": peak, **split})
        print()
        print_table(found["quantization"])
    write(chosen.json, found)


if __name__ == "__main__":
    main()
