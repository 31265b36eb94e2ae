"""A run that is killed, stopped or refused by the disk goes on, and ends byte for byte as one that never was."""

from __future__ import annotations

import errno
import random
import re
import signal
from pathlib import Path

import pytest

from rlhf_kit import artifacts
from tests.end_to_end import chain
from tests.faults.harness import Ended, Server, left

SEED = 20261125
KILLS = {1: 24, 2: 8}
"""Of how many runs, by number of processes."""
CHECKPOINTS = tuple(f"stages.{stage}.checkpoint_every.updates=1" for stage in ("sft", "reward", "ppo"))
SHORT = (*CHECKPOINTS, "stages.sft.max_steps=3", "stages.reward.max_steps=3", "stages.ppo.updates=2")


@pytest.fixture(scope="module")
def server():
    """The server process of this module."""
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The tiny chain."""
    return chain.write_chain(tmp_path_factory.mktemp("recipe"), adapter={"dropout": 0.1})


@pytest.fixture(scope="module")
def undisturbed(server, recipe, tmp_path_factory):
    """For a number of processes, a run that nothing happened to: how it ended, its folder, and what it left."""
    found = {}

    def get(processes: int):
        if processes not in found:
            out = tmp_path_factory.mktemp(f"undisturbed{processes}") / "run"
            ended = server.run(recipe, out, *CHECKPOINTS, processes=processes)
            assert ended.codes == [0] * processes, ended.log[-3000:]
            found[processes] = (ended, out, left(out))
        return found[processes]

    return get


def went_well(ended: Ended) -> bool:
    """Whether a run ended as it may under kills, with nothing to read for a user but messages."""
    return all(code in (0, 75, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, 1) for code in ended.codes)


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_any_moment(server, recipe, undisturbed, tmp_path, processes):
    """Killed again and again, by signals at random moments and in the middle of random writes, nothing is lost."""
    whole, folder, expected = undisturbed(processes)
    draw = random.Random(SEED + processes)
    kills, runs = 0, 0
    while kills < KILLS[processes]:
        out = tmp_path / str(runs)
        runs += 1
        place = f"{folder}/", f"{out}/"
        left_over = [operation.replace(*place) for operation in whole.operations]
        for _ in range(5):
            number = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            if draw.random() < 0.5:
                how = {"at": draw.choice(left_over), "at_signal": number}
            else:
                share = len(left_over) / len(whole.operations)
                how = {"signal": number, "signal_after_s": draw.uniform(0.3, share * whole.seconds)}
            ended = server.run(recipe, out, *CHECKPOINTS, processes=processes, only_one=draw.random() < 0.5, **how)
            assert went_well(ended), (how, ended)
            assert processes == 2 or "Traceback" not in ended.log, (how, ended.log[-3000:])
            if ended.code == 0:
                break
            kills += 1
            done = {name for name in ("sft", "reward", "ppo") if (out / name / artifacts.MANIFEST).is_file()}
            left_over = [o for o in left_over if not any(f"/{name}/" in o for name in done)]
        ended = server.run(recipe, out, *CHECKPOINTS, processes=processes)
        assert ended.codes == [0] * processes, ended.log[-3000:]
        assert left(out) == expected
    print(f"{processes} processes: {kills} kills in {runs} runs, nothing lost")


def sites(operations: list[str], out: Path) -> list[str]:
    """Return the first of each kind of operation: numbers in names make no other kind."""
    kinds: dict[str, str] = {}
    for operation in operations:
        kinds.setdefault(re.sub(r"\d+", "#", operation.replace(str(out), "")), operation)
    return list(kinds.values())


@pytest.mark.parametrize("fault", ["disk full", "killed"])
def test_every_write_and_rename(server, recipe, tmp_path, fault):
    """Each kind of write, rename, fsync and mkdir of a run fails in turn, or kills it; run again, the run goes on.

    The faults come one after the other in the same run directory, in the order in which a run gets to them.
    """
    whole, out = tmp_path / "whole", tmp_path / "disturbed"
    ended = server.run(recipe, whole, *SHORT)
    assert ended.code == 0, ended.log[-3000:]
    faults = sites(ended.operations, whole)
    assert len(faults) > 60 and any("rename" in site for site in faults)
    how = {"error": errno.ENOSPC} if fault == "disk full" else {"at_signal": signal.SIGKILL}
    met = 0
    for site in faults:
        ended = server.run(recipe, out, *SHORT, at=site.replace(str(whole), str(out)), **how)
        if ended.code == 0:
            continue  # what a run that goes on has no need to do again
        met += 1
        assert ended.code in ((1, 2) if fault == "disk full" else (-signal.SIGKILL,)), (site, ended.log[-3000:])
        assert "Traceback" not in ended.log, (site, ended.log[-3000:])
        if fault == "disk full":
            assert "No space left on device" in ended.log.splitlines()[-1], (site, ended.log[-3000:])
    assert met > 0.8 * len(faults), f"{met} of {len(faults)}"
    assert server.run(recipe, out, *SHORT).code == 0
    assert left(out) == left(whole)
    print(f"{fault}: {met} of {len(faults)} kinds of operation, nothing lost")
