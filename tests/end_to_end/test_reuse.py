"""What others made, as a start or a reward, and a published run made again: over HTTP, with the real Hub client."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from transformers import AutoModelForCausalLM

from rlhf_kit.finished import FinishedRun
from rlhf_kit.publish import contents
from tests import tiny
from tests.end_to_end import chain
from tests.hub import TOKEN, Hub
from tests.others import add_value_head, make_adapter

TEMPLATE = "{% for turn in messages %}[{{ turn.role }}] {{ turn.content }} {% endfor %}"
"""The recipe's own."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a run that is published as me/tuned on me/base, and an adapter made with PEFT alone."""
    folder = tmp_path_factory.mktemp("reuse")
    (folder / "turns.jinja").write_text(TEMPLATE)
    tiny.write_card(folder, "read", "text", [{"text": text} for text in tiny.QUESTIONS])
    base = {"hub_id": "me/base", "chat_template": "turns.jinja"}
    recipe = chain.write_chain(folder, name="tuned", base=base, publish={"repo": "me/tuned"})
    content = yaml.safe_load(recipe.read_text())
    content["stages"]["ppo"]["ptx"] = {"data": "read.md", "coef": 0.1}
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    make_adapter(folder / "theirs", folder / "model")
    with Hub() as hub:
        hub.add("me/base", {path.name: path.read_bytes() for path in (folder / "model").iterdir()})
        call(hub, folder, "run", str(recipe), "--out", str(folder / "run"), token=TOKEN)
        hub.repositories["me/tuned"].private = False
        yield folder, hub


def call(hub, folder: Path, *arguments: str, code: int = 0, token: str | None = None) -> Any:
    """Run the command line in a folder, on this Hub, with a cache of the folder's own."""
    result = subprocess.run(
        [*chain.command(), *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**chain.environment(), **hub.environment(folder / "home", token)},
        timeout=300,
    )
    assert result.returncode == code, result.stderr[-4000:]
    assert "Traceback" not in result.stderr
    return result


def change(recipe: Path, to: Path, **stages: dict[str, Any] | None) -> Path:
    """Write a recipe with other settings of its stages, and with further ones; None leaves a stage out."""
    content = yaml.safe_load(recipe.read_text())
    content.pop("publish", None)
    content["name"] = to.stem
    for name, settings in stages.items():
        if settings is None:
            del content["stages"][name]
        else:
            content["stages"].setdefault(name, {}).update(settings)
    to.write_text(yaml.safe_dump(content, sort_keys=False))
    return to


def manifest(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / stage / "manifest.json").read_text())


def logits(model: Path, adapter: Path) -> torch.Tensor:
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).eval()
    with torch.no_grad():
        return plain(input_ids=torch.arange(5, 25).unsqueeze(0)).logits


def test_ppo_starts_from_others_adapter_and_a_published_reward_model(workplace, tmp_path):
    """Of another rank and other layers; the reward keeps its unit; what was used is in the manifest; a changed one
    makes the stage run again; what is done with the run afterwards finds it."""
    folder, hub = workplace
    theirs = shutil.copytree(folder / "theirs", tmp_path / "theirs")
    ppo = {"policy": str(theirs), "reward": "hub://me/tuned/reward@main", "updates": 2, "learning_rate": 1e-9}
    recipe = change(folder / "chain.yaml", folder / "onwards.yaml", sft=None, reward=None, ppo=ppo)
    out = tmp_path / "run"
    result = call(hub, folder, "run", str(recipe), "--out", str(out))
    made = manifest(out, "ppo")
    commit = hub.repositories["me/tuned"].branches["main"]
    assert made["inputs"]["hub://me/tuned/reward@main"]["commit"] == commit
    assert made["inputs"]["…/theirs"]["sha256"] == made["made_from"]["stages.ppo.policy"]
    assert str(tmp_path) not in json.dumps(made)
    of_reward = manifest(folder / "run", "reward")["score_normalisation"]
    assert made["score_normalisation"] == {key: of_reward[key] for key in ("mean", "std")}
    assert made["invariants"]["probe_score_error"] < 1e-3
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["systems"]) == ["base", "start of ppo", "ppo"]
    assert summary["systems"]["start of ppo"]["kl"] == 0
    assert "ppo wins over start of ppo" in result.stdout
    config = json.loads((out / "ppo" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (6, 9, ["q_proj", "v_proj"])
    difference = logits(folder / "model", out / "ppo" / "adapter") - logits(folder / "model", theirs)
    assert 0 <= difference.abs().max() < 1e-3

    assert "finished already" in call(hub, folder, "run", str(recipe), "--out", str(out)).stderr
    (tmp_path / "asked.txt").write_text("Why?\n")
    words = ("--prompts", str(tmp_path / "asked.txt"), "--max-new-tokens", "3", "--out")
    call(hub, folder, "sample", str(out), "--stage", "start of ppo", *words, str(tmp_path / "sampled.jsonl"))
    assert "score" in json.loads((tmp_path / "sampled.jsonl").read_text())

    call(hub, folder, "push", str(out), "--repo", "me/onwards", "--public", token=TOKEN)
    files = hub.files("me/onwards")
    card, written = files["README.md"].decode(), yaml.safe_load(files["recipe.resolved.yaml"])
    assert f"`ppo.reward` is `hub://me/tuned/reward@{commit}`" in card and "(theirs)" in card
    assert written["stages"]["ppo"]["reward"] == f"hub://me/tuned/reward@{commit}"

    make_adapter(theirs, folder / "model", seed=9)
    refused = call(
        hub, folder, "sample", str(out), *words, str(tmp_path / "more.jsonl"), "--stage", "start of ppo", code=2
    )
    assert "is not what" in refused.stderr
    again = call(hub, folder, "run", str(recipe), "--out", str(out))
    assert "runs again, because of stages.ppo.policy" in again.stderr


def test_every_stage_starts_from_an_adapter_and_trls_value_head_scores(workplace, tmp_path):
    """sft and reward keep its shape; a reward of trl's files has its unit measured on the reference."""
    folder, hub = workplace
    judge = make_adapter(tmp_path / "judge", folder / "model", seed=4, r=3, target_modules=["o_proj"])
    add_value_head(judge)
    hub.add("me/sft", {f"sub/{path.name}": path.read_bytes() for path in (folder / "theirs").iterdir()})
    short = {"init": "hub://me/sft/sub", "max_steps": 1}
    ppo = {"reward": str(judge), "updates": 1}
    recipe = change(folder / "chain.yaml", folder / "started.yaml", sft=short, reward=short, ppo=ppo)
    out = tmp_path / "run"
    call(hub, folder, "run", str(recipe), "--out", str(out))
    for stage in ("sft", "reward"):
        config = json.loads((out / stage / "adapter" / "adapter_config.json").read_text())
        assert (config["r"], config["target_modules"]) == (6, ["q_proj", "v_proj"])
        assert manifest(out, stage)["inputs"]["hub://me/sft/sub"]["subfolder"] == "sub"
    assert manifest(out, "ppo")["score_normalisation"]["std"] != 1
    first = json.loads((out / "ppo" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["objective/score"]) < 1.5  # in standard deviations of the reference


def test_whatever_tunes_a_policy_starts_from_others_and_is_compared_with_it(workplace, tmp_path, monkeypatch):
    """dpo, rejection_sampling and rloo, scored by a published reward model and watched by trl's, each in its own unit;
    the closing table and eval call the start alike, and a push names all of it."""
    folder, hub = workplace
    judge = make_adapter(tmp_path / "judge", folder / "model", seed=4, r=3, target_modules=["o_proj"])
    add_value_head(judge)
    stages = yaml.safe_load((folder / "chain.yaml").read_text())["stages"]
    theirs = shutil.copytree(folder / "theirs", tmp_path / "theirs")
    start, scored = {"policy": str(theirs)}, {"reward": "hub://me/tuned/reward"}
    short = {"max_steps": 1, "batch_size": 8, "microbatch": 4}
    prompts = tiny.write_card(tmp_path, "more", "prompts", [{"prompt": q} for q in tiny.QUESTIONS], heldout=0.5)
    asked = {"prompts": str(prompts), "max_new_tokens": 8}
    dpo = {"kind": "dpo", **start, "data": stages["reward"]["data"], "kl_coef": 0.1, **short}
    best = {"kind": "rejection_sampling", **start, **scored, **asked, "completions_per_prompt": 2, **short}
    rloo = {"kind": "rloo", **start, **scored, **asked, "kl_coef": 0.05, "updates": 1, "batch_size": 8}
    rloo["watch"] = {"every": 1, "count": 8, "gold": str(judge)}
    gone: dict[str, None] = {"sft": None, "reward": None, "ppo": None}
    recipe = change(folder / "chain.yaml", folder / "others.yaml", **gone, dpo=dpo, best=best, rloo=rloo)
    out = tmp_path / "run"
    call(hub, folder, "run", str(recipe), "--out", str(out))
    unit = manifest(folder / "run", "reward")["score_normalisation"]
    for name in ("dpo", "best", "rloo"):
        made = manifest(out, name)
        assert made["inputs"].keys() >= {"…/theirs"} and "stages.sft" not in json.dumps(made["made_from"])
        config = json.loads((out / name / "adapter" / "adapter_config.json").read_text())
        assert (config["r"], config["target_modules"]) == (6, ["q_proj", "v_proj"])
        if name != "dpo":
            assert made["score_normalisation"] == {key: unit[key] for key in ("mean", "std")}
    assert (
        manifest(out, "rloo")["made_from"]["stages.rloo.watch.gold"]
        == manifest(out, "rloo")["inputs"]["…/judge"]["sha256"]
    )
    assert "heldout/gold" in json.loads((out / "rloo" / "metrics.jsonl").read_text().splitlines()[0])
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["systems"]) == ["base", "start of dpo", "dpo", "best", "rloo"]
    assert list(summary["win_rate"]) == [f"{name}/start of dpo" for name in ("dpo", "best", "rloo")]

    printed = call(hub, folder, "eval", str(out), "--best-of", "2", "--best-of-prompts", "2").stdout
    measured = json.loads((out / "eval.json").read_text())
    assert measured["reference"] == "start of dpo" and list(measured["systems"]) == list(summary["systems"])
    for name, figures in summary["systems"].items():
        assert measured["systems"][name]["score"] == pytest.approx(figures["score"], abs=1e-5)
        assert measured["systems"][name]["kl"] == pytest.approx(figures["kl"], abs=1e-5)
    assert measured["win_rate"].keys() == {"start of dpo/base", *summary["win_rate"]}
    assert "rloo wins over start of dpo" in printed
    monkeypatch.chdir(folder)  # where the run was started
    files, _ = contents(FinishedRun(out), "rloo", "me/others", None)
    published = yaml.safe_load(files["recipe.resolved.yaml"])["stages"]["rloo"]
    commit = hub.repositories["me/tuned"].branches["main"]
    assert published["reward"] == f"hub://me/tuned/reward@{commit}" and published["watch"]["gold"] == "judge"
    assert "`rloo.watch.gold` is `judge`" in files["README.md"].decode()


def test_a_published_run_is_run_again(workplace, tmp_path):
    """With the data given, to the same bytes, from the Hub's base; without them, one message says what to give."""
    folder, hub = workplace
    missing = call(hub, tmp_path, "run", "hub://me/tuned", code=2)
    assert "shown.jsonl" in missing.stderr and "--set data_root=DIR" in missing.stderr
    assert not (tmp_path / "runs").exists()
    root = ("--set", f"data_root={folder}")
    result = call(hub, tmp_path, "run", "hub://me/tuned/recipe.resolved.yaml@main", *root, "--only", "sft")
    assert "data, base and versions are as they were" in result.stderr
    weights = Path("sft") / "adapter" / "adapter_model.safetensors"
    assert (tmp_path / "runs" / "me--tuned" / weights).read_bytes() == (folder / "run" / weights).read_bytes()
    assert "publish:" not in result.stderr
    (copy,) = (tmp_path / "published").iterdir()
    assert (copy / "chat_template.jinja").read_text() == TEMPLATE
    assert {path.stem for path in (copy / "data_cards").iterdir()} == {"shown", "pairs", "asked", "read"}

    old = json.loads(hub.files("me/tuned")["environment.json"])
    old["packages"]["peft"] = "0.1.0"
    hub.repositories["me/tuned"].commit({"environment.json": json.dumps(old).encode()})
    other = tmp_path / "other"
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns("run", "home"))
    rows = (other / "shown.jsonl").read_text().splitlines(keepends=True)
    (other / "shown.jsonl").write_text("".join(rows[:-1]))
    words = ("--set", f"data_root={other}", "--only", "sft", "--out", str(tmp_path / "second"))
    told = call(hub, tmp_path, "run", "hub://me/tuned", *words).stderr
    assert 'hub://me/tuned: peft: "0.1.0" -> ' in told and "hub://me/tuned: sft: data: " in told


def test_a_base_is_known_by_its_content(workplace, tmp_path):
    """From the Hub it is the base of a local folder with the same files; a branch that moved is another one."""
    folder, hub = workplace
    moving = hub.add("me/moving", hub.files("me/base"))
    shutil.copytree(folder / "run", tmp_path / "run")
    from_hub = ("--set", "base.model=me/moving", "--set", "publish=null")
    again = call(hub, folder, "run", str(folder / "chain.yaml"), "--out", str(tmp_path / "run"), *from_hub)
    assert again.stderr.count("finished already, nothing has changed; skipped") == 3

    weights = load_file(folder / "model" / "model.safetensors")
    first = next(iter(weights))
    weights[first] = weights[first] + 1
    moving.commit({"model.safetensors": to_bytes(weights, metadata={"format": "pt"})})
    (tmp_path / "texts.jsonl").write_text('{"prompt": "Why?", "completion": "So."}\n')
    scored = ("score", str(tmp_path / "run"), str(tmp_path / "texts.jsonl"), "--base")
    call(hub, folder, *scored, "me/base")
    assert "me/moving: is not the base that" in call(hub, folder, *scored, "me/moving", code=2).stderr
    recipe = change(folder / "chain.yaml", folder / "moved.yaml", reward=None, ppo=None, sft={"init": "hub://me/tuned"})
    refused = call(hub, folder, "run", str(recipe), "--out", str(tmp_path / "new"), *from_hub, code=2).stderr
    assert "stages.sft.init: hub://me/tuned: this adapter was made for another base (model, content " in refused
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("hub://me/nothing", "hub://me/nothing: cannot be had from the Hub"),
        ("hub://me/base", "has no recipe.resolved.yaml, so it is no run"),
        ("hub://me", "a published run is written hub://OWNER/NAME[@REVISION]"),
    ],
)
def test_no_published_run(workplace, tmp_path, reference, said):
    """One message, exit code 2, nothing written."""
    _, hub = workplace
    assert said in call(hub, tmp_path, "run", reference, code=2).stderr
    assert not (tmp_path / "runs").exists() and not (tmp_path / "published").exists()


def test_what_the_hub_has_and_no_stage_can_use(workplace, tmp_path):
    """All told together: a model, nothing at all, a reward model as a policy, pickles."""
    folder, hub = workplace
    config = (folder / "theirs" / "adapter_config.json").read_bytes()
    hub.add("me/old", {"adapter_config.json": config, "adapter_model.bin": b"x"})
    sft, reward = {"init": "hub://me/base"}, {"init": "hub://me/nothing"}
    ppo = {"policy": "hub://me/tuned/reward", "reward": "hub://me/old"}
    recipe = change(folder / "chain.yaml", folder / "wrong.yaml", sft=sft, reward=reward, ppo=ppo)
    told = call(hub, folder, "run", str(recipe), "--out", str(tmp_path / "out"), code=2).stderr
    for said in (
        "stages.sft.init: hub://me/base is a whole model and no adapter; what works here: ",
        "stages.reward.init: cannot get hub://me/nothing from the Hub: ",
        "stages.ppo.policy: hub://me/tuned/reward is an adapter of a sequence classifier, which gives scores; what",
        "stages.ppo.reward: hub://me/old has pickled weights only (adapter_model.bin)",
    ):
        assert said in told, told
    assert not (tmp_path / "out").exists()
    assert "resolve" not in "".join(request for request in hub.requests if ".bin" in request)
