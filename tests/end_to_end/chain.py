"""The whole chain on the tiny model, through the command line, for the tests of this folder."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
TWO_PROCESSES = ROOT / "recipes" / "accelerate" / "cpu_two_processes.yaml"


def write_chain(folder: Path, **settings: Any) -> Path:
    """Write a checkpoint, three data cards and a recipe of three short stages into `folder`; return the recipe.

    settings: further top-level keys, such as base={"quantization": "8bit"}.
    """
    model = tiny.make_checkpoint(folder / "model")
    demonstrations = tiny.write_card(folder, "shown", "demonstrations", tiny.demonstrations(), heldout=0.2)
    preferences = tiny.write_card(folder, "pairs", "preferences", tiny.preferences(), heldout=0.2)
    prompts = tiny.write_card(folder, "asked", "prompts", [{"prompt": q} for q in tiny.QUESTIONS], heldout=0.2)
    training = {"batch_size": 8, "microbatch": 4, "learning_rate": 0.005}
    stages = {
        "sft": {"kind": "sft", "data": str(demonstrations), "epochs": 3, **training},
        "reward": {"kind": "reward", "init": "sft", "data": str(preferences), "epochs": 2, **training},
        "ppo": {
            "kind": "ppo",
            "policy": "sft",
            "reward": "reward",
            "prompts": str(prompts),
            "kl_coef": 0.05,
            "updates": 3,
            "batch_size": 8,
            "epochs": 2,
            "minibatches": 2,
            "microbatch": 4,
            "max_new_tokens": 16,
            "learning_rate": 0.003,
            "samples_every": 1,
        },
    }
    return tiny.write_recipe(folder / "chain.yaml", model, stages, **settings)


def vowels(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """A gold score that nobody trains on."""
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def run(*arguments: str, processes: int | None = None, cwd: Path = ROOT, timeout: float = 300) -> Any:
    """Run `python -m rlhf_kit` with arguments, under `accelerate launch` if a number of processes is given.

    Returns the finished process with its text output; fails if it takes longer than `timeout` seconds.
    """
    return subprocess.run(
        [*command(processes), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(),
        timeout=timeout,
    )


def command(processes: int | None = None) -> list[str]:
    """Return how `rlhf_kit` is started, under `accelerate launch` if a number of processes is given."""
    words = [sys.executable, "-m"]
    if processes == 2:
        words += ["accelerate.commands.launch", "--config_file", str(TWO_PROCESSES), "-m"]
    elif processes == 1:
        words += ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m"]
    return [*words, "rlhf_kit"]


def environment() -> dict[str, str]:
    """Return the environment of a run: this checkout, one thread a process."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start(log: Path, *arguments: str, processes: int | None = None) -> subprocess.Popen[str]:
    """Start `python -m rlhf_kit` with arguments; what it prints to stderr goes to `log`."""
    return subprocess.Popen(
        [*command(processes), *arguments],
        stdout=subprocess.PIPE,
        stderr=log.open("w"),
        text=True,
        cwd=ROOT,
        env=environment(),
    )


def wait_for(log: Path, text: str, process: subprocess.Popen[str]) -> None:
    """Wait until `text` is in the log of a process that is still running."""
    for _ in range(1200):
        if text in log.read_text():
            return
        assert process.poll() is None, log.read_text()[-2000:]
        time.sleep(0.1)
    raise AssertionError(f"{text!r} did not come within two minutes")


def run_chain(recipe: Path, out: Path, *settings: str, processes: int | None = None) -> Any:
    """Run the recipe into `out`; fail with its output unless it ends with exit code 0."""
    result = run("run", str(recipe), "--out", str(out), *_sets(settings), processes=processes)
    assert result.returncode == 0, result.stderr[-4000:]
    return result


def _sets(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]
