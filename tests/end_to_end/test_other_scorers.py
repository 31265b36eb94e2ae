"""PPO through the command line with a reward that is no stage of the recipe."""

from __future__ import annotations

import json

import pytest

from tests.end_to_end import chain
from tests.unit.test_scorers import make_classifier


@pytest.mark.parametrize("kind", ["classifier", "function"])
def test_ppo_is_scored_by_a_classifier_or_a_function(tmp_path, kind):
    """A folder with a classifier of another vocabulary, or a Python function, takes the reward stage's place.

    Its scores are brought to mean 0 and standard deviation 1 on the reference policy's completions.
    """
    recipe = chain.write_chain(tmp_path)
    reward = "tests.unit.test_scorers:lengths"
    if kind == "classifier":
        make_classifier(tmp_path / "classifier", chat_template=None)
        reward = str(tmp_path / "classifier")
    out = tmp_path / "run"
    chain.run_chain(recipe, out, f"stages.ppo.reward={reward}")
    manifest = json.loads((out / "ppo" / "manifest.json").read_text())
    assert manifest["inputs"].keys() - {"…/classifier"} == {"sft"}
    assert ("…/classifier" in manifest["inputs"]) == (kind == "classifier")
    assert manifest["score_normalisation"]["std"] > 0
    first = json.loads((out / "ppo" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["objective/score"]) < 1.5  # in standard deviations, before anything is learned
    summary = json.loads((out / "summary.json").read_text())
    assert summary["systems"].keys() == {"base", "sft", "ppo"}
