"""PPO beside best-of-n in the quickstart's world: the gold score of best-of-16 and of best-of-64, at how many nats?

    python benchmarks/frontier.py                 three seeds
    python benchmarks/frontier.py --quick         one seed
    python benchmarks/frontier.py --keep FOLDER   finished stages in FOLDER are used again

Each seed trains SFT and reward model of the quickstart and a PPO that is held closer and has more updates, and
`rlhf-kit eval` samples 64 completions of SFT for each of the same held-out prompts. `bound` is the KL of best-of-n at
most, log n - (n - 1) / n nats; gold has a standard error of `error` on those prompts.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import arguments, print_table, rlhf_kit, run_stage, write

SETTINGS = ("stages.ppo.kl_coef=0.12", "stages.ppo.updates=60", "stages.ppo.learning_rate=1.0e-3")
"""The best that was found; see docs/experiments.md."""
MOST = {16: 2.0, 64: 1.5}
"""How many times best-of-n's bound PPO's KL may be."""
PROMPTS = 256


def rows_of(told: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Return PPO beside each best-of-n that it is held against, from an eval.json."""
    ppo = told["systems"]["ppo"]
    points = {point["n"]: point for point in told["best_of_n"]["points"]}
    return [
        {
            "seed": seed,
            "n": n,
            "its gold": points[n]["gold"],
            "bound": points[n]["kl_bound"],
            "PPO's gold": ppo["gold"],
            "error": ppo["gold_error"],
            "PPO's KL": ppo["kl"],
            "times": ppo["kl"] / points[n]["kl_bound"],
            "limit": most,
            "reached": ppo["gold"] >= points[n]["gold"] and ppo["kl"] <= most * points[n]["kl_bound"],
        }
        for n, most in MOST.items()
    ]


def main() -> int:
    """Run, print the table and whether the limits held; return 1 if they did not."""
    options = arguments(__doc__ or "")
    options.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9])
    options.add_argument("--set", action="append", default=[], help="override a recipe setting, as in `rlhf-kit run`")
    options.add_argument("--keep", type=Path, help="the folder of the runs; default: a temporary one")
    chosen = options.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (chosen.keep or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        for seed in chosen.seeds[:1] if chosen.quick else chosen.seeds:
            out = folder / f"seed-{seed}"
            for stage in ("sft", "reward", "ppo"):
                run_stage(out, stage, f"seed={seed}", *SETTINGS, *chosen.set)
            sampled = ("--best-of", "64", "--best-of-prompts", str(PROMPTS))
            rlhf_kit("eval", str(out), "--stages", "sft,ppo", *sampled, log=out.with_name(f"{out.name}.log"))
            rows += rows_of(json.loads((out / "eval.json").read_text()), seed)
            print_table(rows)
            write(chosen.json, {"rows": rows})
    reached = sum(row["reached"] for row in rows)
    print(f"gold of best-of-n within its KL: {reached} of {len(rows)}")
    return 0 if reached == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
