"""Kills, faults and bad input until the time is up, other ones with every seed; nothing may be lost.

make soak                                            an hour
python -m tests.faults.soak --minutes 5 --seed 2     shorter, and others
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.end_to_end import chain
from tests.faults import bad_inputs, campaigns
from tests.faults.harness import Server


def main() -> int:
    """Run the soak; return 0 if nothing was lost and no input broke anything, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=60, help="for kills and faults; bad input comes on top")
    parser.add_argument("--cases", type=int, default=2000, help="of bad input")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    killed = faults = losses = rounds = 0
    ends = time.monotonic() + 60 * options.minutes
    server = Server()
    while time.monotonic() < ends:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            quantization = ("none", "8bit")[rounds % 2]
            recipe = chain.write_chain(folder, base={"quantization": quantization}, adapter={"dropout": 0.1})
            for campaign in ("one process", "two processes", "disk full", "killed"):
                place = folder / campaign.replace(" ", "-")
                place.mkdir()
                try:
                    if "process" in campaign:
                        many, at_least = (1, 25) if campaign == "one process" else (2, 10)
                        seed = 1000 * options.seed + rounds
                        killed += campaigns.kills(server, recipe, place, seed=seed, at_least=at_least, processes=many)
                    else:
                        many = 1 + rounds // 2 % 2
                        faults += campaigns.faults(server, recipe, place, campaign, processes=many)[0]
                except AssertionError as loss:
                    losses += 1
                    print(f"round {rounds}, {campaign}, {quantization}: {loss}", file=sys.stderr)
                shutil.rmtree(place)
                print(f"{campaign}, {quantization}: kills {killed}, faults {faults}, losses {losses}", flush=True)
        rounds += 1
    server.close()
    counts, failures = bad_inputs.soak(options.cases, options.seed)
    for failure in failures[:10]:
        print(failure[:20_000], file=sys.stderr)
    print(
        f"kills {killed}, faults {faults}, losses {losses}; bad input: cases {counts.total() + len(failures)}, "
        f"refused {counts['refused']}, accepted {counts['accepted']}, failures {len(failures)}"
    )
    return 1 if losses or failures else 0


if __name__ == "__main__":
    sys.exit(main())
