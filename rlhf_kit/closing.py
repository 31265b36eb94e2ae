"""What a run ends with: `summary.json` as tables a person reads on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rlhf_kit import artifacts
from rlhf_kit.recipe import PPOStage, Recipe

SHOWN_CHARACTERS = 600
"""Of a prompt or completion."""


def closing_table(recipe: Recipe, folder: Path, summary: Mapping[str, Any]) -> RenderableType:
    """Return the figures of a finished run, a few prompts with their completions, and where everything lies."""
    return Group(*_parts(recipe, folder, summary))


def _parts(recipe: Recipe, folder: Path, summary: Mapping[str, Any]) -> Iterator[RenderableType]:
    if summary["reward"]:
        yield Text(f"\nreward model   {_reward_line(summary['reward'])}")
    if summary["systems"]:
        yield Text()
        yield _systems(recipe, summary["systems"])
    for pair, win in summary["win_rate"].items():
        after, before = pair.split("/")
        low, high = win["ci"]
        line = f"{after} wins over {before} {win['rate']:.1%} of the time, 95 % interval {low:.1%} to {high:.1%}"
        yield Text(f"\n{line}; among answers of like length {_percent(win['length_matched'])}")
    for example in summary["examples"]:
        yield Text()
        yield _example(example)
    adapters = ", ".join(str(folder / name / "adapter") for name in recipe.stages)
    yield Text(f"\nadapters   {adapters}\nreport     {folder / artifacts.REPORT}")


def _reward_line(figures: Mapping[str, Any]) -> str:
    low, high = figures["accuracy_ci"]
    line = f"held-out accuracy {figures['accuracy']:.3f}, 95 % interval {low:.3f} to {high:.3f}"
    best = figures.get("best_reachable")
    return line if best is None else f"{line}; the best reachable is {best:.3f}"


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.1%}"


def _systems(recipe: Recipe, systems: Mapping[str, Mapping[str, float]]) -> Table:
    budgets = {name: stage.kl_budget for name, stage in recipe.stages.items() if isinstance(stage, PPOStage)}
    with_gold = all("gold" in figures for figures in systems.values())
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("held-out prompts")
    heads = ["score", "KL (nats)", "length (tokens)"]
    for head in ["gold", *heads] if with_gold else heads:
        table.add_column(head, justify="right")
    for name, figures in systems.items():
        budget = budgets.get(name)
        within = "" if budget is None else f" of {budget:g}" if figures["kl"] <= budget else f" over {budget:g}!"
        gold = [f"{figures['gold']:.2f} ± {figures['gold_std']:.2f}"] if with_gold else []
        table.add_row(
            name, *gold, f"{figures['score']:.2f}", f"{figures['kl']:.1f}{within}", f"{figures['length']:.1f}"
        )
    return table


def _example(example: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in example.items():
        table.add_row(name, Text(_shown(text)))
    return table


def _shown(text: Any) -> str:
    """Return a completion, or a prompt in text or chat messages, cut to what is read at a glance."""
    if not isinstance(text, str):
        text = "\n".join(f"{message['role']}: {message['content']}" for message in text)
    text = text.strip()
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …"
