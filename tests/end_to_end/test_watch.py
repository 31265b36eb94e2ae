"""The chain with a gold reward stage that the policy is not trained on, a guard and PPO-ptx."""

from __future__ import annotations

import json

import pytest
import yaml

from tests import tiny
from tests.end_to_end import chain
from tests.end_to_end.test_processes import adapter, distance, metrics


@pytest.fixture
def recipe(tmp_path):
    """The tiny chain with all of it."""
    path = chain.write_chain(tmp_path)
    content = yaml.safe_load(path.read_text())
    stages = content["stages"]
    other = tiny.write_card(tmp_path, "others", "preferences", tiny.preferences(), heldout=0.5)
    texts = [{"text": f"{row['prompt']}{row['completion']}"} for row in tiny.demonstrations()]
    ptx = tiny.write_card(tmp_path, "texts", "text", texts)
    prompts = tiny.write_card(tmp_path, "asked", "prompts", [{"prompt": q} for q in tiny.QUESTIONS], heldout=0.4)
    ppo = stages.pop("ppo")
    stages["judge"] = {**stages["reward"], "data": str(other)}
    stages["ppo"] = {
        **ppo,
        "prompts": str(prompts),
        "updates": 2,
        "watch": {"every": 1, "count": 9, "gold": "judge"},
        "guard": {"action": "rollback", "kl_budget": 0.001, "sigmas": 0.1, "tolerance": 0, "patience": 1},
        "ptx": {"data": str(ptx), "batch_size": 3},
    }
    for name in ("sft", "reward", "judge"):
        stages[name]["max_steps"] = 4
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_a_gold_stage_a_guard_and_texts_in_one_process_and_two(recipe, tmp_path):
    """The judge's scores are in its own unit, the guard goes back to the policy that kept its tiny budget, and two
    processes see and do the same up to the order of summation."""
    one, two = tmp_path / "one", tmp_path / "two"
    chain.run_chain(recipe, one)
    chain.run_chain(recipe, two, processes=2)
    told, theirs = (json.loads((out / "ppo" / "manifest.json").read_text()) for out in (one, two))
    assert set(told["inputs"]) == {"sft", "reward", "judge"}
    assert told["data"]["ptx"]["card"] == "texts"
    assert told["watch"]["acted"]["alarm"] == "kl"
    assert told["watch"]["kept_update"] == 0 and "within KL budget" in told["watch"]["why"]
    assert (
        distance(adapter(one, "sft"), {k: v for k, v in adapter(one, "ppo").items() if k in adapter(one, "sft")}) == 0
    )
    first, second = metrics(one, "ppo"), metrics(two, "ppo")
    assert [line["step"] for line in first] == [line["step"] for line in second]
    assert first[0].keys() == second[0].keys()
    for name, value in first[0].items():
        if name.startswith("heldout/"):
            assert second[0][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    assert first[1]["ppo/ptx_loss"] == pytest.approx(second[1]["ppo/ptx_loss"], rel=1e-3)
    assert theirs["watch"]["kept_update"] == 0
