"""The chain with a reward stage of two members."""

from __future__ import annotations

import json

import pytest

import rlhf_kit
from tests.end_to_end import chain


@pytest.mark.parametrize("how", ["mean", "lower"])
def test_ppo_is_scored_by_an_ensemble(tmp_path, how):
    """The members score together in PPO and in the closing table what the reward stage stored, and PPO logs how far
    they disagree; reading the files back with other units would be noticed.
    """
    recipe = chain.write_chain(tmp_path)
    settings = {
        "stages.reward.ensemble": 2,
        "stages.reward.ensemble_score": how,
        "stages.sft.max_steps": 2,
        "stages.reward.max_steps": 4,
        "stages.ppo.updates": 1,
    }
    run = rlhf_kit.run(recipe, settings, out=tmp_path / "run")
    ppo, reward = run.manifests["ppo"], run.manifests["reward"]
    assert ppo["invariants"]["probe_score_error"] < 1e-4
    assert ppo["metrics"]["reward/ensemble_std"] > 0
    assert ppo["score_normalisation"]["std"] == reward["score_normalisation"]["std"]
    assert "members/1/adapter/adapter_model.safetensors" in reward["files"]
    assert not [name for name in reward["files"] if "checkpoint" in name]
    for member in reward["ensemble"]["members"]:
        member["mean"] += 1.0  # as a manifest would have it that does not belong to the files
    (tmp_path / "run" / "reward" / "manifest.json").write_text(json.dumps(reward))
    with pytest.raises(RuntimeError, match="probe_score_error"):
        rlhf_kit.run(recipe, {**settings, "stages.ppo.kl_coef": 0.06}, out=tmp_path / "run", only="ppo")
