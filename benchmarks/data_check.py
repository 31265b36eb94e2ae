"""`data check` of a million short pairs beside `datasets.load_dataset("json")` reading the same file: time and memory.

    python benchmarks/data_check.py [--quick] [--json FILE]

Both run in processes of their own, in turns, with fresh caches; imports are not timed. Memory is the process's peak,
also with a tenth of the rows. Rows are written by this script from a seed: a prompt of 8 words, two answers of 10.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import ROOT, arguments, conditions

OURS = """
import resource, sys, time
import numpy, pyarrow.json, pyarrow.compute
from rlhf_kit.audit import audit
from rlhf_kit.data_cards import load_card
wall, cpu = time.monotonic(), time.process_time()
found = audit(load_card(sys.argv[1]))
wall, cpu = time.monotonic() - wall, time.process_time() - cpu
print(wall, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, found.rows["kept"])
"""
THEIRS = """
import resource, sys, tempfile, time
import datasets
datasets.disable_progress_bars()
with tempfile.TemporaryDirectory() as cache:
    wall, cpu = time.monotonic(), time.process_time()
    found = datasets.load_dataset("json", data_files=sys.argv[2], split="train", cache_dir=cache)
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    print(wall, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, len(found))
"""


def write_rows(path: Path, rows: int) -> None:
    """Write pairs as JSON lines."""
    draw = random.Random(5)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(5000)]

    def text(length: int) -> str:
        return " ".join(draw.choices(words, k=length))

    with path.open("w") as file:
        for _ in range(rows):
            file.write(json.dumps({"prompt": f"{text(8)}?", "chosen": text(10), "rejected": text(10)}) + "\n")


def measured(code: str, card: Path, data: Path) -> dict[str, float]:
    """Return seconds, CPU seconds and peak bytes of a process that runs `code`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(card), str(data)]
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    wall, cpu, peak, rows = result.stdout.split()
    return {"seconds": float(wall), "cpu_seconds": float(cpu), "peak_bytes": int(peak), "rows": int(rows)}


def main() -> None:
    options = arguments(__doc__.splitlines()[0]).parse_args()
    sizes, turns = ((10_000, 100_000), 2) if options.quick else ((100_000, 1_000_000), 4)
    figures: dict[str, Any] = {**conditions(), "sizes": {}}
    print(f"{'rows':>10}  {'':14} {'s':>7} {'CPU s':>7} {'peak MB':>8}")
    for rows in sizes:
        with tempfile.TemporaryDirectory() as folder:
            data, card = Path(folder) / "rows.jsonl", Path(folder) / "card.md"
            write_rows(data, rows)
            card.write_text("---\nrlhf_kit: {kind: preferences, source: rows.jsonl}\n---\n")
            runs: dict[str, list[dict[str, float]]] = {"load_dataset": [], "data check": []}
            for _ in range(turns):
                runs["load_dataset"].append(measured(THEIRS, card, data))
                runs["data check"].append(measured(OURS, card, data))
        assert all(run["rows"] == rows for side in runs.values() for run in side)
        for name, side in runs.items():
            middle = {key: statistics.median(run[key] for run in side) for key in side[0]}
            print(
                f"{rows:10,}  {name:14} {middle['seconds']:7.2f} {middle['cpu_seconds']:7.2f} "
                f"{middle['peak_bytes'] / 1e6:8.0f}"
            )
        pairs = list(zip(runs["data check"], runs["load_dataset"], strict=True))
        ratios = {key: statistics.median(a[key] / b[key] for a, b in pairs) for key in ("seconds", "cpu_seconds")}
        print(f"{'':10}  data check takes {ratios['seconds']:.2f} times as long, {ratios['cpu_seconds']:.2f} x the CPU")
        figures["sizes"][str(rows)] = {"runs": runs, "ratios": ratios}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
