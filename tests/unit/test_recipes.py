"""Every recipe that ships loads, passes check, and says in its header what a user needs to know."""

from pathlib import Path

import pytest
import yaml

from rlhf_kit.check import check_recipe
from rlhf_kit.recipe import resolved_yaml
from rlhf_kit.recipe_reading import load_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate")
LAUNCHERS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT / "recipes")) for path in paths]


def test_they_are_found():
    """The quickstart and a recipe each for a small, a 1 B and a 7 to 8 B model are there."""
    assert len(RECIPES) >= 4 and ROOT / "recipes" / "quickstart.yaml" in RECIPES and len(LAUNCHERS) == 3


@pytest.mark.parametrize("path", RECIPES, ids=names(RECIPES))
class TestRecipe:
    def test_it_passes_check(self, path, monkeypatch):
        """`check` has nothing to say against it, without a network."""
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.chdir(ROOT)
        lines = check_recipe(load_recipe(path))
        assert lines

    def test_resolved_it_is_the_same_recipe(self, path, tmp_path, monkeypatch):
        """With every default written out it loads to the same settings."""
        monkeypatch.chdir(ROOT)
        recipe = load_recipe(path)
        (tmp_path / "resolved.yaml").write_text(resolved_yaml(recipe))
        assert load_recipe(tmp_path / "resolved.yaml").model_dump() == recipe.model_dump()

    def test_its_header_says_what_it_is(self, path):
        """What it trains, whether and on what it was run, and how to launch it stand at the top."""
        header = path.read_text().split("\nname:")[0]
        for word in ("Trains", "Run on", "Launch", str(path.relative_to(ROOT))):
            assert word in header, word

    def test_the_readme_lists_it(self, path):
        """A recipe that nobody can find is of no use."""
        assert f"(recipes/{path.relative_to(ROOT / 'recipes')})" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", LAUNCHERS, ids=names(LAUNCHERS))
def test_launchers_leave_the_precision_to_the_recipe(path):
    """Each is a launcher configuration without mixed precision, with its command in the header."""
    settings = yaml.safe_load(path.read_text())
    assert settings["mixed_precision"] == "no" and settings["compute_environment"] == "LOCAL_MACHINE"
    assert f"--config_file recipes/accelerate/{path.name} -m rlhf_kit run" in path.read_text()
