"""Pairs whose lengths are spread over 10 to 100 % of the longest: pairs per second here and in trl's `RewardTrainer`.

    python benchmarks/reward_pairs.py            both sizes, 3 pairs of runs each
    python benchmarks/reward_pairs.py --quick    the smaller size

Random models and tokens; chosen and rejected each have a length of their own, uniform from 10 to 100 %. trl runs with
each of `MICROBATCHES` and is compared at the fastest; it cannot group pairs by length (transformers' sampler for that
looks for `input_ids`). Ratios are of neighbouring runs, and their medians are shown last.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from measure import arguments, print_table, write
from ppo_vs_trl import SHAPES, Shape, write_base
from reward_trl import ours, prepare, theirs

BATCH, STEPS, PROMPT = 32, 8, 8
MICROBATCHES = (2, 4, 8, 16)
"""Pairs of a forward pass of trl's."""
SMALL = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 8}
SIZES: dict[str, tuple[Shape, int]] = {
    "656k": (replace(SHAPES["15m"], config={**SMALL, "num_key_value_heads": 4, "vocab_size": 2048}), 256),
    "15m": (SHAPES["15m"], 192),
}
"""Shape and longest row in tokens; the small one is TinyStories-656K's."""


def write_pairs(folder: Path, shape: Shape, longest: int, steps: int) -> None:
    """Write a base, and pairs for that many steps."""
    write_base(folder / "model", replace(shape, prompt=PROMPT, completion=longest), "llama", 0.0)
    draw = random.Random(0)

    def text(tokens: int) -> str:
        return " ".join(f"t{draw.randrange(3, 1000)}" for _ in range(tokens))

    def completion() -> str:
        return " " + text(draw.randint(longest // 10, longest) - PROMPT - 1)

    rows = [
        {"prompt": text(PROMPT), "chosen": completion(), "rejected": completion()} for _ in range(BATCH * steps + 1)
    ]
    prepare(folder, "model", "preferences", rows[:-1], rows[-1:], batch_size=BATCH, microbatch=8)


def compared(folder: Path, size: str, microbatches: tuple[int, ...]) -> dict[str, Any]:
    """Return the figures of our run and trl's, one after the other."""
    our = ours(folder, 0)
    their = {microbatch: theirs(folder, 0, microbatch) for microbatch in microbatches}
    fastest = min(their, key=lambda microbatch: their[microbatch].epoch_cpu_seconds)
    return {
        "size": size,
        "faster": their[fastest].epoch_seconds / our.epoch_seconds,
        "faster in CPU time": their[fastest].epoch_cpu_seconds / our.epoch_cpu_seconds,
        "ours CPU s/epoch": our.epoch_cpu_seconds,
        "trl CPU s/epoch": their[fastest].epoch_cpu_seconds,
        "trl pairs a pass": fastest,
    }


def main() -> None:
    """Run and print a row for each pair of runs, then the medians."""
    options = arguments(__doc__ or "")
    options.add_argument("--sizes", nargs="+", choices=SIZES)
    chosen = options.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for size in chosen.sizes or (["656k"] if chosen.quick else list(SIZES)):
            folder = Path(name) / size
            folder.mkdir()
            shape, longest = SIZES[size]
            write_pairs(folder, shape, longest, STEPS if size == "656k" else STEPS // 2)
            tried: tuple[int, ...] = MICROBATCHES
            for _ in range(2 if chosen.quick else 3):
                rows.append(compared(folder, size, tried))
                tried = (rows[-1]["trl pairs a pass"],)
                print_table(rows)
    print()
    for size in dict.fromkeys(row["size"] for row in rows):
        of_size = [row for row in rows if row["size"] == size]
        wall, cpu = (median(row[key] for row in of_size) for key in ("faster", "faster in CPU time"))
        print(f"{size}: {wall:.2f} times as fast as trl, {cpu:.2f} times in CPU time")
    write(chosen.json, {"pairs a step": BATCH, "rows": rows})


if __name__ == "__main__":
    main()
