"""What `rlhf-kit plan` tells before a run, beside what the run then takes.

    python benchmarks/plan.py                     recipes/quickstart.yaml
    python benchmarks/plan.py --quick             its sft and reward stages
    python benchmarks/plan.py --recipe RECIPE --set stages.ppo.updates=10

Each stage runs in a process of its own, for on a CPU memory is the most that a process has held so far. Seconds are a
stage's own, as its manifest tells them, loading and writing included.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from measure import arguments, print_table, rlhf_kit, write


def main() -> None:
    """Plan, run, and print a row for each stage."""
    options = arguments(__doc__ or "")
    options.add_argument("--recipe", default="recipes/quickstart.yaml")
    options.add_argument("--set", dest="settings", action="append", default=[])
    chosen = options.parse_args()
    settings = [word for setting in chosen.settings for word in ("--set", setting)]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rlhf_kit("plan", chosen.recipe, *settings, "--json", str(folder / "plan.json"))
        plan = json.loads((folder / "plan.json").read_text())
        stages = [stage for stage in plan["needs"] if stage != "evaluation"]
        for stage in stages[:2] if chosen.quick else stages:
            rlhf_kit("run", chosen.recipe, *settings, "--out", str(folder / "run"), "--only", stage, log=folder / "log")
            cost = json.loads((folder / "run" / stage / "manifest.json").read_text())["cost"]
            need = plan["needs"][stage]
            rows.append(
                {
                    "stage": stage,
                    "seconds told": need["seconds"],
                    "taken": cost["seconds"],
                    "told / taken": need["seconds"] / cost["seconds"],
                    "GB told": need["peak"] / 1e9,
                    "taken GB": cost["peak_bytes"] / 1e9,
                    "told / taken GB": need["peak"] / cost["peak_bytes"],
                }
            )
    print_table(rows)
    write(chosen.json, {"recipe": chosen.recipe, "rows": rows})


if __name__ == "__main__":
    main()
