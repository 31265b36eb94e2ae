"""Run the command line as a user would and read what it left: wall time, peak memory, summary.json."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the same figures to this file")
    parser.add_argument("--quick", action="store_true", help="a run of a few minutes: fewer seeds")
    return parser


def rlhf_kit(*words: str, log: Path | None = None) -> None:
    """Run a command of rlhf_kit in a process of its own.

    Raises:
        subprocess.CalledProcessError: it failed; its output is at the end of `log`, or was shown.
    """
    command = [sys.executable, "-m", "rlhf_kit", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if log is None:
        subprocess.run(command, check=True, cwd=ROOT, env=environment)
    else:
        with log.open("a") as file:
            subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)


def run_stage(out: Path, stage: str, *settings: str) -> dict[str, Any]:
    """Run one stage of the quickstart into `out` unless it is finished; return its manifest."""
    chosen = [word for setting in settings for word in ("--set", setting)]
    log = out.with_name(f"{out.name}.log")
    rlhf_kit("run", "recipes/quickstart.yaml", "--out", str(out), "--only", stage, *chosen, log=log)
    return json.loads((out / stage / "manifest.json").read_text())


def run(recipe: Path, out: Path, settings: Sequence[str] = (), *, log: Path | None = None) -> dict[str, Any]:
    """Run a recipe in a process of its own; return its summary with "wall_s" and "peak_bytes" of the process.

    Raises:
        subprocess.CalledProcessError: it failed; its output is at the end of `log`, or was shown.
    """
    started = time.monotonic()
    rlhf_kit("run", str(recipe), "--out", str(out), *(word for one in settings for word in ("--set", one)), log=log)
    summary = json.loads((out / "summary.json").read_text())
    # The largest child so far, which is this one unless an earlier one was larger: an upper bound.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {**summary, "wall_s": time.monotonic() - started, "peak_bytes": peak}


def install_trl(folder: Path, version: str = "1.12.0") -> Path:
    """Put a trl of its own into `folder`, to come first in the PYTHONPATH of a process; return the folder.

    1.12.0 is the last release with a PPO trainer.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*command, f"trl=={version}"], check=True, stderr=subprocess.DEVNULL)
    return folder


def conditions() -> dict[str, Any]:
    """Return what the figures were measured on."""
    import torch

    return {
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows of the same keys as aligned columns."""
    shown = [[f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    header = list(rows[0])
    widths = [max(len(line[column]) for line in [header, *shown]) for column in range(len(header))]
    for line in [header, *shown]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def write(path: Path | None, figures: dict[str, Any]) -> None:
    """Write the figures as JSON, if a file was asked for."""
    if path is not None:
        path.write_text(json.dumps({"conditions": conditions(), **figures}, indent=2) + "\n")
