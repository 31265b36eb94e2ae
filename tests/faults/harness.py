"""Run recipes that are killed, refused by the disk or out of memory, and compare what they leave.

A server process (server.py) has imported everything and forks for each run, so that a run of the tiny chain takes a
second or two. A C shim, built here and preloaded into it, disturbs a write, rename, fsync or mkdir.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.end_to_end import chain

HERE = Path(__file__).parent
NOT_THE_SAME = ("time/", "memory/", "throughput/")
"""Groups of metrics that a clock or the machine gives."""


def build_shim(folder: Path) -> Path:
    """Compile the shim into a folder; return the library."""
    library = folder / "shim.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "shim.c"), "-ldl"]
    subprocess.run(command, check=True)
    return library


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    codes: list[int]
    """Of each process; minus the number of the signal that ended it."""
    operations: list[str]
    """Writes, renames, fsyncs and mkdirs of the main process below the run directory: "rename /path", in order."""
    seconds: float
    log: str
    """What it printed, stdout and stderr together."""

    @property
    def code(self) -> int:
        return self.codes[0]


class Server:
    """The server process; runs one recipe at a time."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        library = build_shim(Path(self.folder.name))
        environment = {
            **os.environ,
            "LD_PRELOAD": str(library),
            "PYTHONPATH": str(chain.ROOT),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=chain.ROOT,
            env=environment,
        )
        assert self._answer() == {"ready": True}

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the server process has ended"
        return json.loads(line)

    def run(
        self,
        recipe: Path,
        out: Path,
        *settings: str,
        processes: int = 1,
        at: str = "",
        at_time: int = 1,
        error: int = 0,
        at_signal: int = 0,
        signal: int = 0,
        signal_after_s: float | None = None,
        only: int | None = None,
        before: str = "",
    ) -> Ended:
        """Run a recipe into `out`.

        at: the operation of the main process, as `Ended.operations` has it, that fails with `error`, as all later ones
        do, or in the middle of which it gets `at_signal`; of several alike the `at_time`-th.
        signal, signal_after_s: what all processes (or the one of rank `only`) get after so many seconds.
        before: Python that each process executes first.
        """
        log = Path(self.folder.name) / "log"
        log.write_text("")
        arguments = ["run", str(recipe), "--out", str(out)]
        for setting in settings:
            arguments += ["--set", setting]
        request = {
            "arguments": arguments,
            "below": f"{out}",
            "processes": processes,
            "at": at,
            "at_time": at_time,
            "error": error,
            "at_signal": at_signal,
            "signal": signal,
            "signal_after_s": signal_after_s,
            "only": only,
            "before": before,
            "log": str(log),
        }
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        return Ended(**answer, log=log.read_text(errors="replace"))

    def close(self) -> None:
        """End the server process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.folder.cleanup()


def left(out: Path, stages: tuple[str, ...] = ("sft", "reward", "ppo")) -> dict[str, Any]:
    """Return what must be the same in a run that was stopped and one that was not.

    The hash of every adapter, head and sample file; every metric but those of a clock and of memory; what the manifests
    say, but what it cost and the hashes of files with such metrics in them; the summary likewise.
    """
    found: dict[str, Any] = {}
    for stage in stages:
        manifest = json.loads((out / stage / "manifest.json").read_text())
        for name in manifest["files"]:
            path = out / stage / name
            if path.name == "metrics.jsonl":
                lines = [json.loads(line) for line in path.read_text().splitlines()]
                found[f"{stage}/{name}"] = [_without_clock(line) for line in lines]
            else:
                found[f"{stage}/{name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
        told = {key: value for key, value in manifest.items() if key not in ("files", "cost", "inputs", "made_from")}
        found[f"{stage}/manifest"] = {**told, "metrics": _without_clock(told["metrics"])}
    summary = json.loads((out / "summary.json").read_text())
    found["summary"] = {key: value for key, value in summary.items() if key not in ("cost", "made_from")}
    return found


def _without_clock(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if not name.startswith(NOT_THE_SAME)}
