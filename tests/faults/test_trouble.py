"""What is not a kill: no memory, a folder that is gone, linked or held, damaged files, numbers that are not finite."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
from pathlib import Path

import pytest

from rlhf_kit import artifacts
from rlhf_kit.models import read_adapter
from tests.end_to_end import chain
from tests.faults.campaigns import CHECKPOINTS, STAGES
from tests.faults.harness import left

SHORT = (*CHECKPOINTS, "stages.sft.max_steps=4", "stages.reward.max_steps=3", "stages.ppo.updates=3")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The tiny chain."""
    return chain.write_chain(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def whole(server, recipe, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    ended = server.run(recipe, out, *SHORT)
    assert ended.code == 0, ended.log[-3000:]
    return out


def metrics(out: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (out / stage / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def stopped(server, recipe, whole, tmp_path):
    """A run directory whose ppo stage was killed when its second checkpoint was whole."""
    out = tmp_path / "run"
    at = f"fsync {out}/ppo/metrics.jsonl"  # the first of them: the first checkpoint is about to be written
    ended = server.run(recipe, out, *SHORT, at=at, at_signal=signal.SIGTERM)
    assert ended.code == 75, ended.log[-3000:]
    ended = server.run(recipe, out, *SHORT, at=f"rename {out}/ppo/checkpoints/step-000003", at_signal=signal.SIGKILL)
    assert ended.code == -signal.SIGKILL
    assert {path.name for path in (out / "ppo" / "checkpoints").glob("step-*")} == {"step-000001", "step-000002"}
    return out


@pytest.mark.parametrize("damage", ["cut short", "one bit", "state", "missing"])
def test_a_damaged_checkpoint_is_passed_over(server, recipe, whole, stopped, damage):
    """The log names it, the one before is used, and the run ends as if nothing had happened."""
    newest = stopped / "ppo" / "checkpoints" / "step-000002"
    tensors, state = newest / "tensors.safetensors", newest / "state.json"
    if damage == "cut short":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif damage == "one bit":
        content = bytearray(tensors.read_bytes())
        content[-50] ^= 1
        tensors.write_bytes(content)
    elif damage == "state":
        state.write_text(state.read_text().replace('"tokens": ', '"tokens": 1'))
    else:
        tensors.unlink()
    ended = server.run(recipe, stopped, *SHORT)
    assert ended.code == 0, ended.log[-3000:]
    assert f"{newest}: this checkpoint is damaged; trying the one before it" in ended.log
    assert "going on after update 1" in ended.log
    assert left(stopped) == left(whole)


def test_changed_files_of_a_finished_stage_are_listed(server, recipe, stopped):
    """A manifest whose files are not as they were is refused with the list; exit code 2."""
    adapter = stopped / "sft" / "adapter"
    with (adapter / "adapter_model.safetensors").open("ab") as file:
        file.write(b"x")
    (adapter / "adapter_config.json").unlink()
    ended = server.run(recipe, stopped, *SHORT)
    assert ended.code == 2 and "Traceback" not in ended.log
    last = ended.log.splitlines()[-1]
    assert "adapter/adapter_config.json: missing" in last and "adapter/adapter_model.safetensors: " in last


def test_other_threads_are_told(server, recipe, stopped):
    """A run that goes on with other threads says that it is no longer bit for bit; the manifest keeps it."""
    ended = server.run(recipe, stopped, *SHORT, before="import torch; torch.set_num_threads(2)")
    assert ended.code == 0, ended.log[-3000:]
    assert "ppo: goes on elsewhere than it began (threads: 1 -> 2)" in ended.log
    manifest = json.loads((stopped / "ppo" / "manifest.json").read_text())
    assert [environment["threads"] for environment in manifest["environments"]] == [1, 2]


def test_another_number_of_processes_goes_on_within_rounding(server, recipe, whole, stopped):
    """What one process began two end, with the same steps up to the order of sums, and they say so."""
    ended = server.run(recipe, stopped, *SHORT, processes=2)
    assert ended.codes == [0, 0], ended.log[-3000:]
    assert "processes: 1 -> 2" in ended.log
    for folder in ("adapter", "value"):
        one, two = (read_adapter(out / "ppo" / folder) for out in (whole, stopped))
        assert one.keys() == two.keys()
        apart = max(float((one[name] - two[name]).abs().max()) for name in one)
        assert apart < 1e-4  # weights are up to 0.2
    assert len(metrics(stopped, "ppo")) == len(metrics(whole, "ppo"))


SMALLER = """
import torch
from rlhf_kit import rollout, supervised
from rlhf_kit.stages import ppo, reward

def refuse(rows):
    if rows > 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

sft_part, reward_part = supervised.Trainer.part, reward.Trainer.part
learn, generate, sampled = ppo.PPO._learn_from, rollout.generate, ppo.sampled

def part(self, microbatch, tokens):
    if len(microbatch["input_ids"]) > 1:
        sft_part(self, microbatch, tokens).backward()  # gradients are there when memory runs out
    refuse(len(microbatch["input_ids"]))
    return sft_part(self, microbatch, tokens)

def comparisons(self, microbatch, tokens):
    refuse(int(microbatch.prompt.max()) + 1)
    return reward_part(self, microbatch, tokens)

def learn_from(self, sampled, *rest):
    found = learn(self, sampled, *rest)
    full = max(map(len, self.prompt_ids)) + self.settings.max_new_tokens
    refuse(self.shared.room(sampled.ids, sampled.mask) / full)  # short rows may be two where one full one has room
    return found

def generated(shared, role, prompts, *rest, **more):
    refuse(len(prompts.prompt_ids) - 3)
    return generate(shared, role, prompts, *rest, **more)

def sampled_in_ppo(*rest):  # and not in the evaluation
    rollout.generate = generated
    try:
        return sampled(*rest)
    finally:
        rollout.generate = generate

supervised.Trainer.part, reward.Trainer.part = part, comparisons
ppo.PPO._learn_from, ppo.sampled = learn_from, sampled_in_ppo
"""


def test_without_memory_the_pieces_halve(server, recipe, whole, tmp_path):
    """Out of memory in any stage halves the pieces until they fit; the steps are the same up to rounding."""
    out = tmp_path / "run"
    ended = server.run(recipe, out, *SHORT, before=SMALLER)
    assert ended.code == 0, ended.log[-3000:]
    halved = ("of 2 rows", "of 1 rows", "of 1 completions", "of 4 completions generated at a time")
    for what in (f"from here on pieces {pieces}" for pieces in halved):
        assert what in ended.log, what
    for stage in STAGES:
        assert [line["step"] for line in metrics(out, stage)] == [line["step"] for line in metrics(whole, stage)]
        one, two = (read_adapter(folder / stage / "adapter") for folder in (whole, out))
        assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-3, stage  # of up to 0.2


def test_halved_pieces_go_on_halved(server, recipe, tmp_path):
    """A checkpoint takes the smaller size along: resumed with memory again, the run ends as if there were none."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    ended = server.run(recipe, whole, *SHORT, before=SMALLER)
    assert ended.code == 0, ended.log[-3000:]
    at = f"rename {out}/ppo/checkpoints/step-000003"
    ended = server.run(recipe, out, *SHORT, before=SMALLER, at=at, at_signal=signal.SIGKILL)
    assert ended.code == -signal.SIGKILL
    ended = server.run(recipe, out, *SHORT)
    assert ended.code == 0 and "going on after update 2" in ended.log, ended.log[-3000:]
    assert left(out) == left(whole)


def test_pieces_of_one_that_do_not_fit_end_the_run_with_advice(server, recipe, tmp_path):
    """Where nothing is left to halve, the message says what needs less memory; exit code 1, no traceback."""
    ended = server.run(recipe, tmp_path / "run", *SHORT, before=SMALLER.replace("rows > 1", "rows > 0"))
    assert ended.code == 1 and "Traceback" not in ended.log
    assert ended.log.splitlines()[-1].startswith("stages.sft.microbatch: memory ran out with pieces of 1 rows")
    assert "base.quantization" in ended.log.splitlines()[-1]


def test_numbers_that_are_not_finite_are_skipped_if_asked_for(server, recipe, tmp_path):
    """on_nonfinite: skip leaves the step out, counts it and goes on; stop, the default, ends the run."""
    before = """
from dataclasses import replace
from rlhf_kit import supervised
from rlhf_kit.stages import ppo
part, scored = supervised.Trainer.part, ppo.PPO._scored

def broken(self, microbatch, tokens):
    loss = part(self, microbatch, tokens)
    return loss * float("nan") if self.training.first + self.state.global_step == 1 else loss

def scores(self, rollout, written):
    found = scored(self, rollout, written)
    self.calls = getattr(self, "calls", 0) + 1
    return replace(found, scores=found.scores * float("inf")) if self.calls == 2 else found

supervised.Trainer.part, ppo.PPO._scored = broken, scores
"""
    out = tmp_path / "run"
    ended = server.run(recipe, out, *SHORT, before=before)
    assert ended.code == 1 and "Traceback" not in ended.log
    assert "sft: the loss of step 2 is nan with finite trainable parameters" in ended.log.splitlines()[-1]
    skip = [f"stages.{stage}.on_nonfinite=skip" for stage in STAGES]
    ended = server.run(recipe, out, *SHORT, *skip, before=before)
    assert ended.code == 0, ended.log[-3000:]
    assert [line.get("sft/skipped_steps") for line in metrics(out, "sft")[1:]] == [None, 1, 1, 1]
    assert metrics(out, "sft")[2]["sft/loss"] is None
    assert metrics(out, "ppo")[1] == {"step": 2, "ppo/skipped_steps": 1}
    assert [line["ppo/skipped_steps"] for line in metrics(out, "ppo")[1:]] == [1, 1]


def test_a_skip_is_remembered(server, recipe, tmp_path):
    """What was skipped before a stop counts after it, in SFT and in PPO; a scoring function may give NaN in between."""
    (tmp_path / "moody.py").write_text(
        "calls = 0\n\ndef score(prompts, completions):\n    global calls\n    calls += 1\n"
        "    return [float('nan') if calls == 2 else len(text) for text in completions]\n"
    )
    settings = ("stages.ppo.reward=moody:score", "stages.ppo.normalize_score=false", "stages.ppo.microbatch=8")
    settings += (*SHORT, "stages.ppo.on_nonfinite=skip")
    out, before = tmp_path / "run", f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    at = f"rename {out}/ppo/checkpoints/step-000002"
    ended = server.run(recipe, out, *settings, before=before, at=at, at_signal=signal.SIGKILL)
    assert "is skipped, 1 so far" in ended.log, ended.log[-3000:]
    assert server.run(recipe, out, *settings, before=before + "; import moody; moody.calls = 3").code == 0
    assert [line["ppo/skipped_steps"] for line in metrics(out, "ppo")] == [1, 1, 1]


def test_checkpoints_by_time_are_kept_if_asked_for(server, recipe, tmp_path):
    """With `minutes` alone a checkpoint comes whenever so much time has passed; keep_checkpoints keeps all of them."""
    out = tmp_path / "run"
    settings = (*SHORT, *(f"stages.{stage}.keep_checkpoints=true" for stage in STAGES))
    settings += tuple(f"stages.{stage}.checkpoint_every={{updates: null, minutes: 1e-9}}" for stage in STAGES)
    ended = server.run(recipe, out, *settings)
    assert ended.code == 0, ended.log[-3000:]
    kept = {stage: sorted(path.name for path in (out / stage / "checkpoints").iterdir()) for stage in STAGES}
    assert kept == {
        "sft": [f"step-00000{step}" for step in (1, 2, 3, 4)],
        "reward": [f"step-00000{step}" for step in (1, 2, 3)],
        "ppo": [f"step-00000{step}" for step in (1, 2, 3)],
    }


def test_a_changed_setting_keeps_what_was_done(server, recipe, stopped):
    """Half of a stage is set aside, not deleted, when a setting that it depends on changes; on_nonfinite is none."""
    ended = server.run(
        recipe, stopped, *SHORT, "stages.ppo.on_nonfinite=skip", at=f"mkdir {stopped}/ppo/adapter", error=errno.ENOSPC
    )
    assert "going on after update 2" in ended.log
    ended = server.run(
        recipe, stopped, *SHORT, "stages.ppo.kl_coef=0.1", at=f"mkdir {stopped}/ppo/checkpoints", error=errno.ENOSPC
    )
    assert "what it had done is kept in ppo.previous" in ended.log
    assert (stopped / "ppo.previous" / "checkpoints" / "step-000003").is_dir()


def test_a_run_directory_that_is_taken(server, recipe, tmp_path):
    """Another run's lock names its process and host; exit code 2. A lock that a killed run left holds nobody."""
    out = tmp_path / "run"
    with artifacts.locked(out):
        ended = server.run(recipe, out, *SHORT)
    assert ended.code == 2
    assert f"another run is at work here (process {os.getpid()} on {socket.gethostname()})" in ended.log
    (out / artifacts.LOCK).write_text("process 1 on elsewhere\n")
    ended = server.run(recipe, out, *SHORT, at=f"mkdir {out}/sft", at_signal=signal.SIGKILL)
    assert "the run before this one ended without a word (process 1 on elsewhere)" in ended.log


def test_a_run_directory_that_cannot_be_written(server, recipe, tmp_path):
    """A folder that takes no files is wrong input, told before anything is trained."""
    out = tmp_path / "run"
    ended = server.run(recipe, out, at=f"mkdir {out}", error=errno.EROFS)
    assert ended.code == 2 and "Traceback" not in ended.log
    assert ended.log.splitlines()[-1].startswith(f"{out}: cannot be written (Read-only file system)")


def test_a_run_directory_that_vanishes(server, recipe, tmp_path):
    """The run ends with exit code 1 and says that its folder is gone."""
    out = tmp_path / "run"
    before = f"""
import shutil
from rlhf_kit.stages import sft
run = sft.run

def gone(job):
    shutil.rmtree({str(out)!r})
    return run(job)

sft.run = gone
"""
    ended = server.run(recipe, out, *SHORT, before=before)
    assert ended.code == 1 and "Traceback" not in ended.log
    assert "the folder is gone" in ended.log.splitlines()[-1]


@pytest.mark.parametrize("place", ["sft", "ppo/metrics.jsonl", "recipe.resolved.yaml"])
def test_links_in_a_run_directory_are_not_followed(server, recipe, stopped, tmp_path, place):
    """What lies behind a symbolic link in a run directory is not written to; exit code 2 names the link."""
    elsewhere = tmp_path / "elsewhere"
    (stopped / place).rename(elsewhere)
    (stopped / place).symlink_to(elsewhere)
    before = sorted((path, path.stat().st_mtime_ns) for path in [elsewhere, *elsewhere.rglob("*")])
    ended = server.run(recipe, stopped, *SHORT)
    assert ended.code == 2 and f"{stopped / place}: is a symbolic link" in ended.log.splitlines()[-1]
    assert sorted((path, path.stat().st_mtime_ns) for path in [elsewhere, *elsewhere.rglob("*")]) == before


def test_a_second_interrupt_leaves_at_once(server, recipe, tmp_path):
    """The first Ctrl-C waits for a safe place; a second one does not."""
    out = tmp_path / "run"
    before = """
import os, signal
from rlhf_kit import supervised
part = supervised.Trainer.part

def interrupted(self, *rest):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    return part(self, *rest)

supervised.Trainer.part = interrupted
"""
    ended = server.run(recipe, out, *SHORT, before=before)
    assert ended.code not in (0, 75) and "Traceback" not in ended.log
    assert "sft step 1" not in ended.log
    assert server.run(recipe, out, *SHORT).code == 0


def test_a_users_generators_go_on_too(server, recipe, tmp_path):
    """A scoring function that draws from Python's and NumPy's generators draws the same after a resume."""
    (tmp_path / "noisy.py").write_text(
        "import random, numpy\n\ndef score(prompts, completions):\n"
        "    return [len(text) + random.random() + numpy.random.rand() for text in completions]\n"
    )
    settings = (*SHORT, "stages.ppo.reward=noisy:score")
    before = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    for out in (tmp_path / "whole", tmp_path / "run"):
        if out.name == "run":
            at = f"rename {out}/ppo/checkpoints/step-000002"
            ended = server.run(recipe, out, *settings, at=at, at_signal=signal.SIGKILL, before=before)
            assert ended.code == -signal.SIGKILL
        ended = server.run(recipe, out, *settings, before=before)
        assert ended.code == 0, ended.log[-3000:]
    assert left(tmp_path / "run") == left(tmp_path / "whole")
