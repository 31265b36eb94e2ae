"""A run that is killed, stopped or refused by the disk goes on, and ends byte for byte as one that never was."""

from __future__ import annotations

import pytest
import yaml

from tests.end_to_end import chain
from tests.end_to_end.test_baselines import write_recipe
from tests.faults import campaigns


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The tiny chain, with dropout, which draws random numbers."""
    return chain.write_chain(tmp_path_factory.mktemp("recipe"), adapter={"dropout": 0.1})


@pytest.mark.parametrize(("processes", "at_least"), [(1, 24), (2, 8)])
def test_killed_at_any_moment(server, recipe, tmp_path, processes, at_least):
    """Killed again and again, by signals at random moments and in the middle of random writes, nothing is lost."""
    assert campaigns.kills(server, recipe, tmp_path, seed=processes, at_least=at_least, processes=processes) >= at_least


def test_other_kinds_killed_at_any_moment(server, tmp_path):
    """So do a PPO stage that is watched, guarded and reads texts beside, DPO, RLOO and rejection sampling."""
    recipe = write_recipe(tmp_path, drop=("kto", "grpo"))
    asked = tmp_path / "asked.md"
    asked.write_text(asked.read_text().replace("heldout: 0.2", "heldout: 0.4"))
    content = yaml.safe_load(recipe.read_text())
    shown = content["stages"]["sft"]["data"]
    content["stages"]["ppo"] |= {
        "updates": 3,
        "watch": {"every": 1, "count": 8},
        "guard": {"action": "rollback", "kl_budget": 5},
        "ptx": {"data": shown, "coef": 0.1},
    }
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    stages = tuple(content["stages"])
    assert campaigns.kills(server, recipe, tmp_path, seed=3, at_least=12, stages=stages) >= 12


@pytest.mark.parametrize("fault", ["disk full", "killed"])
@pytest.mark.parametrize(("processes", "every"), [(1, 1), (2, 6)])
def test_every_write_and_rename(server, recipe, tmp_path, fault, processes, every):
    """Each kind of write, rename, fsync and mkdir fails in turn, or kills the run; run again, the run goes on.

    With two processes every sixth; a soak takes them all.
    """
    met, kinds = campaigns.faults(server, recipe, tmp_path, fault, processes=processes, every=every)
    assert kinds * every > 100 and met > 0.8 * kinds
