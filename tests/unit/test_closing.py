"""The closing table says what summary.json says."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from rlhf_kit.closing import print_closing_table
from rlhf_kit.recipe_reading import load_recipe
from tests import tiny

SUMMARY = {
    "reward": {"accuracy": 0.75, "accuracy_ci": [0.7, 0.8], "best_reachable": 0.78},
    "systems": {
        "base": {"score": -1.0, "gold": 0.25, "gold_std": 1.5, "kl": 8.0, "length": 40.0},
        "sft": {"score": 0.0, "gold": 1.0, "gold_std": 1.25, "kl": 0.0, "length": 30.0},
        "ppo": {"score": 1.5, "gold": 2.5, "gold_std": 0.5, "kl": 12.34, "length": 28.5},
    },
    "win_rate": {"ppo/sft": {"rate": 0.875, "ci": [0.8, 0.925], "length_matched": 0.86}},
    "examples": [{"prompt": "Where is my parcel?", "sft": "No idea.", "ppo": "It is on its way.\x1b[2J"}],
    "cost": {},
}


@pytest.fixture
def show(tmp_path):
    """A function that renders a summary for a recipe with the given KL budget."""

    def render(summary, kl_budget=None) -> str:
        model = tmp_path / "model"
        model.mkdir(exist_ok=True)
        card = tiny.write_card(tmp_path, "asked", "prompts", [{"prompt": "?"}])
        ppo = {"kind": "ppo", "policy": "sft", "reward": "a.b:c", "prompts": str(card), "kl_coef": 0.1}
        stages = {"sft": {"kind": "sft", "data": str(card)}, "ppo": {**ppo, "kl_budget": kl_budget}}
        recipe = load_recipe(tiny.write_recipe(tmp_path / "x.yaml", model, stages))
        file = io.StringIO()
        print_closing_table(recipe, Path("runs") / ("a-long-name" * 8), summary, Console(width=80, file=file))
        return file.getvalue()

    return render


def test_every_figure_is_there(show):
    """Accuracy with interval and ceiling, gold, score, KL and length of each system, the win rate, samples, paths."""
    text = show(SUMMARY)
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert rows["base"] == ["0.25", "±", "1.50", "-1.00", "8.0", "40.0"]
    assert rows["report"][0].endswith("/report.html") and len(rows["report"][0]) > 80
    assert "0.750, 95 % interval 0.700 to 0.800; the best reachable is 0.780" in " ".join(text.split())
    assert "ppo wins over sft   87.5 %, 95 % interval 80.0 % to 92.5 %" in text
    assert "at equal length   86.0 %" in text
    assert "Where is my parcel?" in text and "No idea." in text


@pytest.mark.parametrize(("budget", "said"), [(15, "12.3 (budget 15)"), (10, "12.3 (over budget 10)"), (None, "12.3 ")])
def test_the_kl_is_compared_with_the_budget(show, budget, said):
    """Within, over, or without a budget."""
    assert said in show(SUMMARY, budget)


def test_without_a_gold_scorer_there_is_no_gold_column(show):
    """Real data has no gold preference."""
    systems = {
        name: {key: value for key, value in figures.items() if not key.startswith("gold")}
        for name, figures in SUMMARY["systems"].items()
    }
    assert "gold" not in show({**SUMMARY, "systems": systems})


def test_a_completion_cannot_command_the_terminal(show):
    """An escape sequence that a model wrote is shown and not obeyed."""
    text = show(SUMMARY)
    assert "\x1b" not in text and "on its way.\N{REPLACEMENT CHARACTER}[2J" in text


def test_a_run_without_ppo_has_figures_too(show):
    """Only a reward model, or nothing to compare at all."""
    nothing = {"reward": {}, "systems": {}, "win_rate": {}, "examples": [], "cost": {}}
    assert "adapter" in show(nothing)
