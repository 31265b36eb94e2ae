"""The reward model's health report in a run, and the requirements that keep a chain from learning from a bad one."""

from __future__ import annotations

import json

import pytest

from rlhf_kit.health import SPOILT
from tests.end_to_end import chain


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run whose reward model misses what is asked of it, with its recipe."""
    folder = tmp_path_factory.mktemp("stopped")
    recipe = chain.write_chain(folder)
    ended = chain.run("run", str(recipe), "--out", str(folder / "run"), *asked("accuracy_over_rules=1"))
    return recipe, folder / "run", ended


def asked(*requirements: str) -> list[str]:
    return [word for one in requirements for word in ("--set", f"stages.reward.require.{one}")]


def test_a_chain_stops_before_ppo_and_says_why(stopped):
    """The reward stage is finished and kept; nothing of ppo is written; one message says which figure is missed."""
    _, out, ended = stopped
    assert ended.returncode == 1, ended.stderr
    told = ended.stderr.strip().splitlines()[-1]
    assert told.startswith("ppo: learns from reward, which misses what stages.reward.require asks for: ")
    assert "accuracy_over_rules: is " in told and "required at least 1" in told and "action: warn" in told
    assert "Traceback" not in ended.stderr
    assert (out / "reward" / "manifest.json").is_file() and not (out / "ppo").exists()


def test_the_report_holds_what_was_measured(stopped):
    """Samples of the SFT policy and demonstrations are scored, every probe is tried, and the files tell the same."""
    _, out, _ = stopped
    manifest = json.loads((out / "reward" / "manifest.json").read_text())
    health = manifest["health"]
    assert health["scores"]["of"].keys() == {"chosen", "rejected", "demonstrations", "policy samples"}
    shown = health["scores"]["of"]["demonstrations"]
    assert shown["mean"] == pytest.approx(0, abs=1e-9) and shown["std"] == pytest.approx(1)
    assert health["probes"].keys() <= SPOILT.keys() and "empty" in health["probes"]
    assert health["by"]["length"] and health["calibration"]["curve"]
    last = json.loads((out / "reward" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["reward/heldout_accuracy"] == health["accuracy"]
    assert last["reward/calibration_error"] == health["calibration"]["error"]


def test_a_changed_requirement_runs_nothing_again(stopped):
    """With action: warn the chain goes on from the reward model that is there, and says what it misses."""
    recipe, out, _ = stopped
    before = (out / "reward" / "manifest.json").read_bytes()
    ended = chain.run("run", str(recipe), "--out", str(out), *asked("accuracy_over_rules=1", "action=warn"))
    assert ended.returncode == 0, ended.stderr
    assert "reward: finished already, nothing has changed; skipped" in ended.stderr
    assert "which misses what stages.reward.require asks for: accuracy_over_rules" in ended.stderr
    assert (out / "reward" / "manifest.json").read_bytes() == before and (out / "summary.json").is_file()


def test_a_finished_stage_is_not_undone_by_a_requirement(stopped):
    """What has been learnt is there; only a stage that would run is kept from it."""
    recipe, out, _ = stopped
    ended = chain.run("run", str(recipe), "--out", str(out), *asked("accuracy_over_rules=1"))
    assert ended.returncode == 0, ended.stderr
    again = chain.run(
        "run", str(recipe), "--out", str(out), *asked("accuracy=1.0", "probes=0"), "--only", "ppo", "--fresh"
    )
    assert again.returncode == 1 and "probes: is " in again.stderr


def test_a_wrong_requirement_is_refused(stopped):
    recipe = stopped[0]
    ended = chain.run("check", str(recipe), *asked("accuracy_lower=0.6"))
    assert ended.returncode == 2 and "did you mean accuracy_lower_bound?" in ended.stderr
    ended = chain.run("check", str(recipe), *asked("accuracy=60"))
    assert ended.returncode == 2 and "must be" in ended.stderr
