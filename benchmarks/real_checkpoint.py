"""PPO towards happier stories on TinyStories-656K: gold score and KL over kl_coef and seeds.

    python benchmarks/real_checkpoint.py --checkpoint FOLDER --stories FILE [--quick]

FOLDER is the checkpoint raincandy-u/TinyStories-656K, FILE a JSONL of TinyStories texts. SFT and the reward model are
trained once a seed; PPO runs once a seed and coefficient from the same run directory.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from measure import ROOT, arguments, print_table, run, write

sys.path.insert(0, str(ROOT))

from tests.real_input.happy_stories import write_data


def main() -> None:
    """Run, print a row for each seed and coefficient."""
    options = arguments(__doc__ or "")
    options.add_argument("--checkpoint", type=Path, required=True)
    options.add_argument("--stories", type=Path, required=True)
    options.add_argument("--set", action="append", default=[], help="override a recipe setting, as in `rlhf-kit run`")
    chosen = options.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "data", chosen.checkpoint, chosen.stories)
        for seed in (1,) if chosen.quick else (1, 2, 3):
            out = folder / f"seed{seed}"
            for kl_coef in (0.1,) if chosen.quick else (0.2, 0.1, 0.05, 0.01):
                shutil.rmtree(out / "ppo", ignore_errors=True)
                settings = [
                    f"base.model={chosen.checkpoint.resolve()}",
                    f"data_root={folder / 'data'}",
                    f"seed={seed}",
                    f"stages.ppo.kl_coef={kl_coef}",
                    *chosen.set,
                ]
                summary = run(ROOT / "tests" / "real_input" / "happy_stories.yaml", out, settings, log=folder / "log")
                sft, ppo = summary["systems"]["sft"], summary["systems"]["ppo"]
                gain = (ppo["gold"] - sft["gold"]) / sft["gold_std"]
                rows.append(
                    {
                        "seed": seed,
                        "kl_coef": kl_coef,
                        "accuracy": summary["reward"]["accuracy"],
                        "best": summary["reward"]["best_reachable"],
                        "gold gain (SFT std)": gain,
                        "kl": ppo["kl"],
                        "score": ppo["score"],
                        "score - coef x kl": ppo["score"] - kl_coef * ppo["kl"],
                        "length sft": sft["length"],
                        "length ppo": ppo["length"],
                        "ppo seconds": summary["cost"]["ppo"]["seconds"],
                    }
                )
                print_table(rows)
    write(chosen.json, {"rows": rows})


if __name__ == "__main__":
    main()
