"""What `rlhf-kit eval` and `report` cost: are answers sampled as fast as in training, and how long does the page take?

    python benchmarks/evaluation.py                a run of recipes/compare.yaml
    python benchmarks/evaluation.py --quick        one of recipes/quickstart.yaml
    python benchmarks/evaluation.py --run FOLDER   a finished run

In one process and in turn, the last policy writes a batch of PPO's and eval's 256 answers, at the recipe's batch sizes;
then the two commands, in processes of their own.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from measure import ROOT, arguments, print_table, rlhf_kit, write

TURNS = 5
PROMPTS = 256
LIMITS = {"eval / training, tokens a second": 1.0, "report, seconds": 10.0}


def tokens_a_second(folder: Path) -> tuple[float, float]:
    """Return the median rates of sampling of training, and of eval."""
    from rlhf_kit import check, evaluation, finished, generation, rollout
    from rlhf_kit.pieces import Pieces

    run = finished.FinishedRun(folder)
    last = run.recipe.last_sampling()
    assert last is not None
    name, stage = last
    role = run.policy(name)
    examples = check.plan(run.recipe).examples
    prompts, ids = evaluation.heldout_prompts(run.recipe, examples, run.text_format, PROMPTS)
    found: list[list[float]] = []
    for turn in range(TURNS):
        of_turn = []
        for count, at_once in ((stage.batch_size, stage.batch_size), (len(ids), run.recipe.evaluation.batch_size)):
            uniform = generation.uniforms(range(count), count, stage.max_new_tokens, turn, "evaluation benchmark")
            pieces = Pieces("prompts", at_once, "prompts", run.accelerator)
            started = time.monotonic()
            written, _ = rollout.sampled(
                run.shared, role, prompts[:count], ids[:count], uniform, run.text_format, 1.0, pieces
            )
            of_turn.append(int(written.completion_mask.sum()) / (time.monotonic() - started))
        found.append(of_turn)
    training, evaluating = (median(rates) for rates in zip(*found, strict=True))
    return training, evaluating


def seconds(*words: str) -> float:
    """Return how long a command takes."""
    started = time.monotonic()
    rlhf_kit(*words)
    return time.monotonic() - started


def main() -> int:
    """Run, print the figures and whether the limits held; return 1 if they did not."""
    options = arguments(__doc__ or "")
    options.add_argument("--run", type=Path, help="a finished run; default: one is made")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.run.absolute() if chosen.run else Path(temporary) / "run"
        if not chosen.run:
            recipe = ROOT / "recipes" / ("quickstart.yaml" if chosen.quick else "compare.yaml")
            rlhf_kit("run", str(recipe), "--out", str(folder))
        training, evaluating = tokens_a_second(folder)
        row: dict[str, Any] = {
            "training, tokens a second": training,
            "eval / training, tokens a second": evaluating / training,
            "eval, seconds": seconds("eval", str(folder), "--best-of", "1", "--count", str(PROMPTS)),
            "report, seconds": seconds("report", str(folder)),
        }
    print_table([row])
    write(chosen.json, row)
    rate, page = LIMITS
    reached = row[rate] >= 0.95 * LIMITS[rate] and row[page] <= LIMITS[page]
    print(f"{rate}: about {LIMITS[rate]}; {page}: at most {LIMITS[page]}: {'reached' if reached else 'NOT reached'}")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
