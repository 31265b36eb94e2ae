"""DPO, KTO, RLOO, GRPO and rejection sampling beside PPO, from one SFT policy, through the command line."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

import rlhf_kit
from rlhf_kit.artifacts import read_manifest
from rlhf_kit.models import read_adapter
from tests.end_to_end import chain

TRAINING = {"batch_size": 8, "microbatch": 4, "learning_rate": 0.005, "max_steps": 3}
BESIDE = ("dpo", "kto", "rloo", "grpo", "best")
PAGE = (chain.ROOT / "docs" / "reference" / "metrics.md").read_text()


def write_recipe(folder, drop=(), **settings):
    """Write the chain with the other stages behind its PPO, without those in `drop`; return the recipe's path."""
    path = chain.write_chain(folder, **settings)
    recipe = yaml.safe_load(path.read_text())
    stages: dict[str, Any] = recipe["stages"]
    stages["ppo"] |= {"updates": 1}
    asked = {key: stages["ppo"][key] for key in ("policy", "reward", "prompts", "max_new_tokens", "microbatch")}
    online = {**asked, "kl_coef": 0.05, "updates": 2, "batch_size": 8, "learning_rate": 0.003}
    stages["dpo"] = {"kind": "dpo", "policy": "sft", "data": stages["reward"]["data"], "kl_coef": 0.1, **TRAINING}
    stages["kto"] = {**stages["dpo"], "kind": "kto"}
    stages["rloo"] = {"kind": "rloo", **online}
    stages["grpo"] = {"kind": "grpo", **online, "minibatches": 2}
    stages["best"] = {"kind": "rejection_sampling", **asked, "completions_per_prompt": 4, **TRAINING}
    for name in drop:
        del stages[name]
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run of everything in `run`, on 8-bit weights, and what the command printed."""
    folder = tmp_path_factory.mktemp("baselines")
    printed = chain.run_chain(write_recipe(folder, base={"quantization": "8bit"}), folder / "run")
    return folder, printed


def test_every_policy_is_compared_with_the_one_it_started_from(finished):
    """summary.json, the closing table and the report have a row for each, and its win rate over sft."""
    folder, printed = finished
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert list(summary["systems"]) == ["base", "sft", "ppo", *BESIDE]
    assert list(summary["win_rate"]) == [f"{name}/sft" for name in ("ppo", *BESIDE)]
    assert all(figures.keys() == {"score", "kl", "length"} for figures in summary["systems"].values())
    assert summary["systems"]["sft"]["kl"] == pytest.approx(0, abs=1e-4)
    assert list(summary["examples"][0]) == ["prompt", "sft", "ppo", *BESIDE]
    assert list(summary["cost"]) == ["sft", "reward", "ppo", *BESIDE]
    report = (folder / "run" / "report.html").read_text()
    for name in BESIDE:
        assert f"\n{name} wins over sft" in printed.stdout and f"{name} over sft" in report
        assert summary["cost"][name]["tokens"] > 0


def test_stages_leave_what_the_contract_says(finished):
    """Manifest with inputs, settings, data and metrics; adapter; metrics that the reference explains; samples."""
    folder, _ = finished
    for name in BESIDE:
        stage = folder / "run" / name
        manifest = read_manifest(stage)
        assert manifest is not None
        assert set(manifest["inputs"]) == ({"sft"} if name in ("dpo", "kto") else {"sft", "reward"})
        assert manifest["settings"]["policy"] == "sft" and manifest["metrics"] and manifest["data"]
        assert (stage / "samples.jsonl").is_file() == (name not in ("dpo", "kto"))
        assert not (stage / "checkpoints").exists()
        lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
        logged = set().union(*lines) - {"step"}
        assert sorted(metric for metric in logged if f"`{metric}`" not in PAGE) == []
        files = {file["path"] if isinstance(file, dict) else file for file in manifest["files"]}
        assert any("adapter_model.safetensors" in file for file in files)


def test_a_second_run_does_nothing_and_only_runs_one(finished):
    """Finished stages are skipped; with --only one of them runs again after a change, the others do not."""
    folder, _ = finished
    recipe, out = folder / "chain.yaml", folder / "run"
    again = chain.run_chain(recipe, out)
    assert again.stderr.count("finished already") == 8
    before = read_manifest(out / "dpo")
    only = chain.run("run", str(recipe), "--out", str(out), "--only", "dpo", "--set", "stages.dpo.kl_coef=0.2")
    assert only.returncode == 0, only.stderr[-3000:]
    assert "dpo: runs again" in only.stderr and "rloo: " not in only.stderr.replace("no summary", "")
    after = read_manifest(out / "dpo")
    assert before is not None and after is not None and before["settings_hash"] != after["settings_hash"]


def test_each_is_a_policy_to_use(finished, tmp_path):
    """`sample` and `merge` take the stages, and `rlhf_kit.load` gives their models."""
    folder, _ = finished
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("May I see the cup?\n")
    for name in ("dpo", "best"):
        out = tmp_path / f"{name}.jsonl"
        result = chain.run("sample", str(folder / "run"), "--stage", name, "--prompts", str(prompts), "--out", str(out))
        assert result.returncode == 0, result.stderr[-3000:]
        assert {"prompt", "completion", "score"} <= json.loads(out.read_text()).keys()
    merged = chain.run("merge", str(folder / "run"), "--stage", "rloo", "--out", str(tmp_path / "merged"))
    assert merged.returncode == 0, merged.stderr[-3000:]
    model, _ = rlhf_kit.load(folder / "run", "grpo")
    assert model.active_adapter == "default"


def test_dpo_needs_no_reward_model(tmp_path):
    """Without a reward and a gold scorer the table has KL and length, and nobody is said to win."""
    recipe = write_recipe(tmp_path, drop=("ppo", "kto", "rloo", "grpo", "best", "reward"))
    printed = chain.run_chain(recipe, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {name: set(figures) for name, figures in summary["systems"].items()} == {
        name: {"kl", "length"} for name in ("base", "sft", "dpo")
    }
    assert summary["win_rate"] == {} and "KL (nats)" in printed.stdout and "score" not in printed.stdout


def test_two_processes_do_the_work_of_one(tmp_path):
    """Each but PPO takes the same steps in two processes as in one, up to the order of sums."""
    recipe = write_recipe(tmp_path, drop=("ppo",))
    few = [f"stages.{name}.microbatch=2" for name in ("sft", "reward", *BESIDE)]
    chain.run_chain(recipe, tmp_path / "one", *few)
    chain.run_chain(recipe, tmp_path / "two", *few, processes=2)
    for name in BESIDE:
        one, two = (read_adapter(tmp_path / out / name / "adapter") for out in ("one", "two"))
        start = read_adapter(tmp_path / "one" / "sft" / "adapter")
        moved = max(float((one[key] - start[key]).abs().max()) for key in one)
        apart = max(float((one[key] - two[key]).abs().max()) for key in one)
        assert apart < 0.1 * moved, name


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.dpo.kl_coef=0", "stages.dpo.kl_coef: must be more than 0"),
        ("stages.dpo.beta=0.1", "stages.dpo.beta: unknown key; here it is kl_coef"),
        ("stages.dpo.policy=reward", "stages.dpo.policy: must name a stage of kind sft, ppo"),
        ("stages.dpo.data=asked.md", "stages.dpo.data: needs a card of preferences or rankings"),
        ("stages.rloo.completions_per_prompt=1", "stages.rloo.completions_per_prompt: must be"),
        ("stages.rloo.completions_per_prompt=3", "batch_size 8 is not a multiple of completions_per_prompt 3"),
        (
            "stages.grpo.num_generations=4",
            "stages.grpo.num_generations: unknown key; here it is completions_per_prompt",
        ),
        ("stages.best.reward=dpo", "stages.best.reward: must name a stage of kind reward; dpo is of kind dpo"),
        ("stages.best.max_length=10", "stages.best.max_length: unknown key"),
    ],
)
def test_wrong_settings_are_one_message(tmp_path, override, said):
    """Where, what, what was seen and what would work, and exit code 2."""
    result = chain.run("check", str(write_recipe(tmp_path)), "--set", override)
    assert result.returncode == 2 and said in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
