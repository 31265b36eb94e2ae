"""A reward stage on pairs and rankings together."""

from __future__ import annotations

import json

import rlhf_kit
from tests import tiny


def test_pairs_and_rankings_teach_one_reward_model(tmp_path):
    """It learns the order that both agree on, counts both cards' rows, and a run that goes on skips it."""
    model = tiny.make_checkpoint(tmp_path / "model")
    pairs = tiny.write_card(tmp_path, "pairs", "preferences", tiny.preferences(), heldout=0.2)
    ranked = tiny.write_card(tmp_path, "ranked", "rankings", tiny.rankings(), heldout=0.2)
    stage = {"kind": "reward", "data": [str(pairs), {"card": str(ranked), "weight": 2, "cap": 10}], "epochs": 3}
    stage |= {"batch_size": 8, "microbatch": 4, "learning_rate": 0.01}
    recipe = tiny.write_recipe(tmp_path / "mixed.yaml", model, {"reward": stage})
    run = rlhf_kit.run(recipe, out=tmp_path / "run")
    manifest = run.manifests["reward"]
    counts = manifest["data"]["train"]["read"]
    assert counts["read"] == 64
    assert counts["repeated: weight 2 of ranked"] == 10
    assert run.summary["reward"]["accuracy"] > 0.8
    before = json.dumps(manifest, sort_keys=True)
    assert json.dumps(rlhf_kit.run(recipe, out=tmp_path / "run").manifests["reward"], sort_keys=True) == before
