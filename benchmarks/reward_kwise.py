"""Rankings of nine: all pairs from one pass over the completions, or trl's `RewardTrainer` on the 36 pairs of each.

    python benchmarks/reward_kwise.py --checkpoint FOLDER --stories FILE    3 seeds, then the 15 M shape's speed alone
    python benchmarks/reward_kwise.py --checkpoint FOLDER --stories FILE --quick    1 seed

FOLDER is the checkpoint raincandy-u/TinyStories-656K, FILE a JSONL of TinyStories texts. For each prompt the checkpoint
writes nine continuations; they are ranked by how happy they are, with noise (Plackett and Luce: Gumbel noise on the
scores), and held-out prompts without it. Both sides take the same optimizer steps, each on the same number of prompts.
Epoch times are medians over the seeds, the ratio that of each seed's two neighbouring runs.
"""

from __future__ import annotations

import json
import math
import random
import sys
import tempfile
from pathlib import Path
from statistics import fmean, median
from typing import Any

from measure import ROOT, arguments, print_table, write
from ppo_vs_trl import SHAPES, write_base
from reward_trl import ours, prepare, theirs

K = 9
TRAIN, BATCH, EPOCHS = 48, 2, 4  # prompts, prompts a step
SETTINGS = {"batch_size": BATCH, "learning_rate": 5e-3}
MICROBATCHES = {"656k": 72, "15m": 36}
"""Pairs of a forward pass of trl's: the fastest of those tried."""

sys.path.insert(0, str(ROOT))


def rankings(checkpoint: Path, stories: Path, prompts: int) -> list[dict[str, Any]]:
    """Return that many prompts with nine different sampled continuations each, and how happy these are."""
    from transformers import AutoTokenizer

    from tests.real_input.happy_stories import sample_stories, score, split_story

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    texts = [json.loads(line)["text"] for line in stories.read_text(encoding="utf-8").splitlines()]
    asked = list(dict.fromkeys(split[0] for text in texts if (split := split_story(text, tokenizer)) is not None))
    asked = asked[: prompts + prompts // 10]  # some lose a completion to a repetition
    written = [sample_stories(checkpoint, tokenizer, asked, seed=seed) for seed in range(K)]
    rows = []
    for prompt, completions in zip(asked, zip(*written, strict=True), strict=True):
        if len(set(completions)) == K and all(completions):
            rows.append({"prompt": prompt, "completions": list(completions), "gold": score([prompt] * K, completions)})
    return rows[:prompts]


def ranked(row: dict[str, Any], noise: random.Random | None) -> dict[str, Any]:
    """Return a prompt's completions with ranks by gold; equally happy ones tie unless there is noise."""
    from tests.real_input.happy_stories import LABEL_TEMPERATURE

    def heard(gold: float) -> float:
        return gold / LABEL_TEMPERATURE - math.log(-math.log(noise.random())) if noise else gold

    scores = [heard(gold) for gold in row["gold"]]
    ranks = [1 + sum(other > score for other in scores) for score in scores]
    return {"prompt": row["prompt"], "completions": row["completions"], "ranks": ranks}


def main() -> None:
    """Run the pairs and print a row for each, then their means."""
    options = arguments(__doc__ or "")
    options.add_argument("--checkpoint", type=Path, required=True)
    options.add_argument("--stories", type=Path, required=True)
    options.add_argument("--heldout", type=int, default=120, help="prompts")
    chosen = options.parse_args()
    seeds = (1,) if chosen.quick else (1, 2, 3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "656k"
        folder.mkdir()
        data = rankings(chosen.checkpoint, chosen.stories, TRAIN + chosen.heldout)
        rows = []
        for seed in seeds:
            noise = random.Random(seed)
            train = [ranked(row, noise) for row in data[:TRAIN]]
            heldout = [ranked(row, None) for row in data[TRAIN:]]
            prepare(folder, str(chosen.checkpoint.resolve()), "rankings", train, heldout, epochs=EPOCHS, **SETTINGS)
            rows.append(compared("656k", folder, seed))
            print_table(rows)
        folder = Path(name) / "15m"
        folder.mkdir()
        shape = SHAPES["15m"]
        write_base(folder / "model", shape, "llama", 0.0)
        draw = random.Random(0)

        def text(tokens: int) -> str:
            return " ".join(f"t{draw.randrange(3, 1000)}" for _ in range(tokens))

        made = [
            {"prompt": text(shape.prompt), "completions": [" " + text(shape.completion - 2) for _ in range(K)]}
            for _ in range(3 * BATCH + 1)
        ]
        made = [{**row, "ranks": list(range(1, K + 1))} for row in made]
        prepare(folder, "model", "rankings", made[:-1], made[-1:], epochs=1, **SETTINGS)
        speeds = [compared("15m", folder, seed) for seed in seeds]
        print_table(speeds)
    print(
        f"\n656k: {median(row['faster'] for row in rows):.2f} times as fast per epoch; held-out accuracy "
        f"{fmean(row['ours accuracy'] for row in rows):.4f}, trl {fmean(row['trl accuracy'] for row in rows):.4f}; "
        f"15m: {median(row['faster'] for row in speeds):.2f} times as fast"
    )
    write(chosen.json, {"prompts": TRAIN, "epochs": EPOCHS, "rows": [*rows, *speeds]})


def compared(size: str, folder: Path, seed: int) -> dict[str, Any]:
    """Return the figures of our training and trl's, one after the other."""
    our = ours(folder, seed)
    their = theirs(folder, seed, MICROBATCHES[size])
    return {
        "size": size,
        "seed": seed,
        "faster": their.epoch_seconds / our.epoch_seconds,
        "faster in CPU time": their.epoch_cpu_seconds / our.epoch_cpu_seconds,
        "ours CPU s/epoch": our.epoch_cpu_seconds,
        "trl CPU s/epoch": their.epoch_cpu_seconds,
        "ours accuracy": our.accuracy,
        "trl accuracy": their.accuracy,
        "ours peak GB": our.peak / 1e9,
        "trl peak GB": their.peak / 1e9,
    }


if __name__ == "__main__":
    main()
