"""What a run ends with: `summary.json` as tables a person reads on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from rlhf_kit import artifacts
from rlhf_kit.recipe import Recipe
from rlhf_kit.story import frontier_line

SHOWN_CHARACTERS = 600
"""Of a prompt or completion."""


def print_closing_table(recipe: Recipe, folder: Path, summary: Mapping[str, Any], console: Console) -> None:
    """Print the figures of a finished run, a few prompts with their completions, and where everything lies."""
    for part in _parts(recipe, folder, summary):
        # Only tables are fitted to the width: a path that is broken cannot be copied.
        console.print(part, soft_wrap=isinstance(part, Text), highlight=False)


def print_comparison(measured: Mapping[str, Any], folder: Path, console: Console) -> None:
    """Print what `eval` measured: systems, win rates, best-of-n and what was forgotten."""
    for part in _comparison(measured, folder):
        console.print(part, soft_wrap=isinstance(part, Text), highlight=False)


def _comparison(measured: Mapping[str, Any], folder: Path) -> Iterator[RenderableType]:
    columns = [
        ("gold", "gold", 2),
        ("score", "score", 2),
        ("kl", "KL", 1),
        ("length", "length", 1),
        ("repetition", "repeats", 2),
        ("distinct_2", "distinct-2", 2),
    ]
    shown = [column for column in columns if all(column[0] in figures for figures in measured["systems"].values())]
    table = plain_table([f"{measured['prompts']['count']} prompts", *(head for _, head, _ in shown)])
    text = measured["text"]
    if text is not None:
        table.add_column("perplexity", justify="right")
    for name, figures in measured["systems"].items():
        forgotten = [f"{text['perplexity'][name]:.2f} ({text['change'][name]:+.1%})"] if text else []
        table.add_row(name, *(f"{figures[key]:.{digits}f}" for key, _, digits in shown), *forgotten)
    yield table
    if text is not None:
        yield Text(f"perplexity of {text['rows']} texts of {text['card']}; KL in nats to {measured['reference']}\n")
    for source, rates in (("", measured["win_rate"]), ("judge: ", measured.get("judge") or {})):
        for pair, win in rates.items():
            if pair == "name" or win["rate"] is None:
                continue
            after, before = pair.split("/")
            low, high = (_percent(end) for end in win["ci"])
            controlled = f"; at equal length {_percent(win['length_controlled'])}" if "length_controlled" in win else ""
            yield Text(f"{source}{after} wins over {before}   {_percent(win['rate'])}, {low} to {high}{controlled}")
    best = measured["best_of_n"]
    if best is not None:
        yield Text()
        heads = [key for key in ("gold", "score", "length") if key in best["points"][0]]
        table = plain_table([f"best of n of {best['of']}", "KL at most", *heads])
        for point in best["points"]:
            table.add_row(str(point["n"]), f"{point['kl_bound']:.2f}", *(f"{point[key]:.2f}" for key in heads))
        yield table
        for name, place in measured["frontier"].items():
            yield Text(f"{name}: {frontier_line(place, best['samples'])}")
    if measured["tasks"]:
        yield Text()
        table = plain_table(["task", *measured["systems"]])
        for task, by_system in measured["tasks"].items():
            table.add_row(task, *(_accuracy(by_system.get(name, {})) for name in measured["systems"]))
        yield table
    for name, found in measured["reward_sets"].items():
        low, high = (_percent(end) for end in found["accuracy_ci"])
        yield Text(
            f"\nreward model on {name}   {_percent(found['accuracy'])} of {found['pairs']} pairs, {low} to {high}"
        )
        for column, parts in found["slices"].items():
            table = plain_table([column, "accuracy", "95 % interval", "pairs"])
            for part, rate in parts.items():
                low, high = (_percent(end) for end in rate["accuracy_ci"])
                table.add_row(part, _percent(rate["accuracy"]), f"{low} to {high}", str(rate["pairs"]))
            yield table
    yield Text()
    yield Text(f"figures   {folder / artifacts.EVAL}")
    yield Text(f"report    {folder / artifacts.REPORT}")


def _accuracy(metrics: Mapping[str, float]) -> str:
    """A task's first metric, with its standard error."""
    name = next(iter(metrics), None)
    if name is None:
        return "–"
    error = metrics.get(f"{name}_stderr")
    return f"{name} {metrics[name]:.3f}" + ("" if error is None else f" ± {error:.3f}")


def plain_table(heads: Sequence[str]) -> Table:
    """Return a table without lines whose columns are numbers but for the first."""
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column(heads[0])
    for head in heads[1:]:
        table.add_column(head, justify="right")
    return table


def _parts(recipe: Recipe, folder: Path, summary: Mapping[str, Any]) -> Iterator[RenderableType]:
    if summary["reward"]:
        yield Text(f"\nreward model   {_reward_line(summary['reward'])}")
    if summary["systems"]:
        yield Text()
        yield _systems(recipe, summary["systems"])
    for pair, win in summary["win_rate"].items():
        after, before = pair.split("/")
        low, high = (_percent(end) for end in win["ci"])
        yield Text(f"\n{after} wins over {before}   {_percent(win['rate'])}, 95 % interval {low} to {high}")
        yield Text(f"at equal length   {_percent(win['length_matched'])}")
    for example in summary["examples"]:
        yield Text()
        yield _example(example)
    yield Text()
    yield from (Text(f"adapter   {folder / name / 'adapter'}") for name in recipe.stages)
    yield Text(f"report    {folder / artifacts.REPORT}")


def _reward_line(figures: Mapping[str, Any]) -> str:
    low, high = figures["accuracy_ci"]
    line = f"held-out accuracy {figures['accuracy']:.3f}, 95 % interval {low:.3f} to {high:.3f}"
    best = figures.get("best_reachable")
    return line if best is None else f"{line}; the best reachable is {best:.3f}"


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.1f} %"


def _systems(recipe: Recipe, systems: Mapping[str, Mapping[str, float]]) -> Table:
    budgets = {name: stage.kl_budget for name, stage in recipe.tuned().items()}
    with_gold, with_score = (all(name in figures for figures in systems.values()) for name in ("gold", "score"))
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("held-out prompts")
    for head in ["gold"] * with_gold + ["score"] * with_score + ["KL (nats)", "length (tokens)"]:
        table.add_column(head, justify="right")
    for name, figures in systems.items():
        gold = [f"{figures['gold']:.2f} ± {figures['gold_std']:.2f}"] if with_gold else []
        score = [f"{figures['score']:.2f}"] if with_score else []
        divergence = f"{figures['kl']:.1f}{_compared(figures['kl'], budgets.get(name))}"
        table.add_row(name, *gold, *score, divergence, f"{figures['length']:.1f}")
    return table


def _compared(divergence: float, budget: float | None) -> str:
    if budget is None:
        return ""
    return f" (budget {budget:g})" if divergence <= budget else f" (over budget {budget:g})"


def _example(example: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in example.items():
        table.add_row(name, Text(_shown(text)))
    return table


def _shown(text: Any) -> str:
    """Return a completion, or a prompt in text or chat messages, cut to what is read at a glance.

    What a model writes may hold control characters, which a terminal would obey; they are shown as �.
    """
    if not isinstance(text, str):
        text = "\n".join(f"{message['role']}: {message['content']}" for message in text)
    text = "".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text)
    text = text.strip()
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …"
