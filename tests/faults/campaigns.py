"""Runs that are killed or refused by the disk again and again, each of which must end as if nothing had happened.

The tests of this folder run a short campaign of each sort; a soak runs them until its time is up:

    python -m tests.faults.soak --minutes 60 --seed 1
"""

from __future__ import annotations

import errno
import random
import re
import signal
from pathlib import Path

from rlhf_kit import artifacts
from tests.faults.harness import Ended, Server, left


def checkpoints(stages: tuple[str, ...]) -> tuple[str, ...]:
    """Return the settings by which stages keep a checkpoint of every step."""
    return tuple(f"stages.{stage}.checkpoint_every.updates=1" for stage in stages)


STAGES = ("sft", "reward", "ppo")
CHECKPOINTS = checkpoints(STAGES)
SHORT = (*CHECKPOINTS, "stages.sft.max_steps=3", "stages.reward.max_steps=3", "stages.ppo.updates=2")
KILLS_A_RUN = 5
ENDS = (0, 75, 1, 130, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)
"""Exit codes of runs that are killed: done, stopped, left alone by a partner, interrupted while it printed what it had
finished (130), or ended before it looked for signals."""


def undisturbed(server: Server, recipe: Path, out: Path, settings: tuple[str, ...], processes: int = 1) -> Ended:
    """Return how a run ended that nothing happened to."""
    ended = server.run(recipe, out, *settings, processes=processes)
    assert ended.codes == [0] * processes, ended.log[-3000:]
    return ended


def kills(
    server: Server,
    recipe: Path,
    folder: Path,
    *,
    seed: int,
    at_least: int,
    processes: int = 1,
    stages: tuple[str, ...] = STAGES,
) -> int:
    """Kill runs at random moments and in the middle of random writes; return how many kills nothing was lost by.

    Every run is killed up to KILLS_A_RUN times, then left alone, and compared with one that never was.

    Raises:
        AssertionError: something was lost, or a user would have read a stack trace.
    """
    settings = checkpoints(stages)
    whole = undisturbed(server, recipe, folder / "whole", settings, processes)
    expected = left(folder / "whole", stages)
    draw, killed, runs = random.Random(seed), 0, 0
    while killed < at_least:
        out = folder / f"run{runs}"
        runs += 1
        operations = [operation.replace(f"{folder}/whole", str(out)) for operation in whole.operations]
        for _ in range(KILLS_A_RUN):
            done = {name for name in stages if (out / name / artifacts.MANIFEST).is_file()}
            ahead = [operation for operation in operations if not any(f"/{name}/" in operation for name in done)]
            number = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            if draw.random() < 0.5:
                number_of_it = draw.randrange(len(ahead))
                operation = ahead[number_of_it]
                time = ahead[: number_of_it + 1].count(operation)
                how = {"at": operation, "at_time": time, "at_signal": number}
            else:
                most = whole.seconds * len(ahead) / len(operations)
                how = {"signal": number, "signal_after_s": draw.uniform(0.3, most)}
            only = draw.choice([None, 0, processes - 1])
            ended = server.run(recipe, out, *settings, processes=processes, only=only, **how)
            assert all(code in ENDS for code in ended.codes), (how, ended.log[-3000:])
            # a process whose partner dies is told by the library that talked to it, with a stack trace
            assert processes > 1 or "Traceback" not in ended.log, (how, ended.log[-3000:])
            if ended.code == 0:
                break
            killed += 1
        undisturbed(server, recipe, out, settings, processes)
        assert left(out, stages) == expected, f"{out}: not what an undisturbed run leaves"
    return killed


def faults(
    server: Server, recipe: Path, folder: Path, fault: str, *, processes: int = 1, every: int = 1
) -> tuple[int, int]:
    """Let each kind of write, rename, fsync and mkdir of a run fail in turn ("disk full"), or kill it ("killed").

    The faults come one after the other in the same run directory, in the order in which a run gets to them; then it is
    left alone, and compared. Returns how many faults there were, and of how many kinds of operation.

    every: 2 takes every second kind, and so on.

    Raises:
        AssertionError: something was lost, or a user would have read a stack trace.
    """
    whole, out = folder / "whole", folder / "disturbed"
    kinds = sites(undisturbed(server, recipe, whole, SHORT, processes).operations, whole)[::every]
    how = {"error": errno.ENOSPC} if fault == "disk full" else {"at_signal": signal.SIGKILL}
    met = 0
    for site in kinds:
        ended = server.run(recipe, out, *SHORT, processes=processes, at=site.replace(str(whole), str(out)), **how)
        if ended.code == 0:
            continue  # what a run that goes on has no need to do again
        met += 1
        assert ended.code in ((1, 2) if fault == "disk full" else (-signal.SIGKILL,)), (site, ended.log[-3000:])
        assert processes > 1 or "Traceback" not in ended.log, (site, ended.log[-3000:])
        if fault == "disk full":
            told = [line for line in ended.log.splitlines() if "No space left on device" in line]
            assert len(told) == 1 and (processes > 1 or told == ended.log.splitlines()[-1:]), (site, ended.log[-3000:])
    undisturbed(server, recipe, out, SHORT, processes)
    assert left(out) == left(whole), f"{out}: not what an undisturbed run leaves"
    return met, len(kinds)


def sites(operations: list[str], out: Path) -> list[str]:
    """Return the first of each kind of operation: numbers in names make no other kind."""
    kinds: dict[str, str] = {}
    for operation in operations:
        kinds.setdefault(re.sub(r"\d+", "#", operation.replace(str(out), "")), operation)
    return list(kinds.values())
