"""PPO-ptx in the quickstart's world: what does it keep of what the policy could before, and what does it cost?

    python benchmarks/ptx.py                       three seeds, coef 0 (plain PPO) and the default
    python benchmarks/ptx.py --coefs 0 0.5 1       others
    python benchmarks/ptx.py --quick               one seed, 12 updates

The texts are of the kind that the base was pretrained on, and no stage has seen them: notices and conversations of the
shop, good and bad. `perplexity` is of held-out ones, over that of the SFT policy; `kept` is the gain of gold over SFT
as a share of plain PPO's.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from guard import examples_of
from measure import arguments, print_table, run_stage, write

from rlhf_kit.recipe import PTX

DEFAULT: float = PTX.model_fields["coef"].default
LIMITS = {"perplexity": 1.02, "kept": 0.85}
TEXTS = 2400
PROMPTS = 256
CARD = """---
license: apache-2.0
rlhf_kit: {kind: text, source: texts.jsonl, heldout: 0.2}
---
Texts of the quickstart's shop, as its base was pretrained on.
"""


def write_card(folder: Path) -> Path:
    """Write the texts and their card into a folder; return the card."""
    from rlhf_kit.quickstart import make

    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random("texts for ptx")
    lines = [json.dumps({"text": make.document(rng)}) for _ in range(TEXTS)]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "texts.md").write_text(CARD)
    return folder / "texts.md"


def measured(out: Path, card: Path, seed: int) -> dict[str, tuple[float, list[float]]]:
    """Return of the SFT and the PPO policy the perplexity on held-out texts, and gold on held-out prompts."""
    import torch

    from rlhf_kit import finished, generation
    from rlhf_kit.collate import tokenise_demonstrations
    from rlhf_kit.examples.loading import prompts_of
    from rlhf_kit.pieces import Pieces
    from rlhf_kit.ptx import mean_loss
    from rlhf_kit.quickstart import world
    from rlhf_kit.rollout import sampled

    run = finished.FinishedRun(out)
    stage: Any = run.recipe.stages["ppo"]
    prompts = [row.prompt for row in prompts_of(examples_of(stage.prompts)).heldout[:PROMPTS]]
    ids = [run.text_format.prompt_ids(prompt) for prompt in prompts]
    uniform = generation.uniforms(range(len(ids)), len(ids), stage.max_new_tokens, seed, "ptx benchmark")
    texts = tokenise_demonstrations(examples_of(card).heldout, run.text_format, None, "error").rows
    found = {}
    for name in ("sft", "ppo"):
        role = run.policy(name)
        with torch.no_grad():
            at_once = Pieces("PROMPTS", len(ids), "completions", run.accelerator)
            _, written = sampled(run.shared, role, prompts, ids, uniform, run.text_format, 1.0, at_once)
            loss = mean_loss(run.shared, role, texts, run.text_format.pad_id, 32)
        found[name] = math.exp(loss), world.gold(written.prompts, written.texts)
    return found


def main() -> int:
    """Run, print the table and whether the limits held; return 1 if they did not."""
    options = arguments(__doc__ or "")
    options.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9])
    options.add_argument("--coefs", type=float, nargs="+", default=[0.0, DEFAULT], help="0 comes first: plain PPO")
    options.add_argument("--updates", type=int, help="of PPO; default: the quickstart's")
    options.add_argument("--keep", type=Path, help="the folder of the runs; default: a temporary one")
    chosen = options.parse_args()
    updates = chosen.updates or (12 if chosen.quick else None)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (chosen.keep or Path(temporary)).absolute()
        card = write_card(folder)
        for seed in chosen.seeds[:1] if chosen.quick else chosen.seeds:
            of_seed = folder / f"seed-{seed}"
            of_seed.mkdir(parents=True, exist_ok=True)
            same = [f"seed={seed}", *([f"stages.ppo.updates={updates}"] if updates else [])]
            for stage in ("sft", "reward"):
                run_stage(of_seed / "healthy", stage, same[0])
            for coef in chosen.coefs:
                out = of_seed / f"ptx-{coef:g}"
                if not out.exists():
                    shutil.copytree(of_seed / "healthy", out, ignore=shutil.ignore_patterns("ppo*"))
                ptx = [f"stages.ppo.ptx={{data: '{card}', coef: {coef}}}"] if coef else []
                run_stage(out, "ppo", *same, *ptx)
                found = measured(out, card, seed)
                (before, gold_before), (after, gold_after) = found["sft"], found["ppo"]
                gain = (fmean(gold_after) - fmean(gold_before)) / pstdev(gold_before)
                plain = next((row["gold gain"] for row in rows if row["seed"] == seed and row["coef"] == 0), gain)
                rows.append({"seed": seed, "coef": coef, "perplexity of SFT": before, "perplexity": after / before,
                             "gold gain": gain, "kept": gain / plain})  # fmt: skip
                print_table(rows)
                write(chosen.json, {"rows": rows, "updates": updates})
    default = [row for row in rows if row["coef"] == DEFAULT]
    reached = {
        "perplexity": all(row["perplexity"] <= LIMITS["perplexity"] for row in default),
        "kept": all(row["kept"] >= LIMITS["kept"] for row in default),
    }
    for name, limit in LIMITS.items():
        print(f"{name}: limit {limit}: {'reached' if reached[name] else 'NOT reached'} by every seed at coef {DEFAULT}")
    return 0 if all(reached.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
