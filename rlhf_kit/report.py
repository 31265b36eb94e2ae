"""One self-contained page about a run: figures, samples, curves, settings and hashes.

Everything comes from the files of the run directory; what is not there yet is left out. The page needs no network and
runs no script, and nothing that a model or a data set wrote is read as markup.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from rlhf_kit import artifacts, drawings, story
from rlhf_kit.errors import InputError
from rlhf_kit.marked_yaml import read_yaml, write_yaml
from rlhf_kit.metrics import HEADLINE, duration, read_metrics
from rlhf_kit.settings import read_text, without_local_paths

TEMPLATE = Path(__file__).with_name("report.html.jinja")
TEXT = 4_000  # characters of a prompt or a completion


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory, from whatever is there, and return its path.

    Raises: InputError where there is no run.
    """
    if not (run_dir / artifacts.RECIPE).is_file():
        raise InputError(f"{run_dir}: no {artifacts.RECIPE} in it, so it is not a run directory")
    path = run_dir / artifacts.RECIPE
    recipe = without_local_paths(read_yaml(read_text(path, "recipe", (".yaml",)), str(path)).value)
    stages = [_stage(run_dir / name, name, settings) for name, settings in recipe["stages"].items()]
    summary, evaluation = (_json_or_none(run_dir / name) for name in (artifacts.SUMMARY, artifacts.EVAL))
    page = _environment().from_string(TEMPLATE.read_text(encoding="utf-8"))
    html = page.render(
        name=recipe["name"],
        recipe=recipe,
        recipe_text=write_yaml(recipe),
        summary=summary,
        evaluation=evaluation,
        outdated_evaluation=evaluation is not None and _outdated(evaluation, stages),
        frontier=_frontier(evaluation),
        worries=story.worries(recipe, stages, summary, evaluation),
        cost=_costs(stages, evaluation),
        outdated=summary is not None and _outdated(summary, stages),
        headlines=_headlines(recipe, summary) if summary else [],
        stages=stages,
        samples=[] if summary and summary.get("examples") else _last_samples(run_dir, stages),
        environment=_json_or_none(run_dir / artifacts.ENVIRONMENT),
        chart_size=(drawings.WIDTH, drawings.HEIGHT),
        plot_size=drawings.PLOT,
    )
    path = run_dir / artifacts.REPORT
    artifacts.write_atomically(path, html)
    return path


def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        figure=figure,
        fixed=_fixed,
        duration=duration,
        shortened=_shortened,
        spoken=_spoken,
        plain=_plain,
        percent=_percent,
        strength=_strength,
        frontier_line=story.frontier_line,
    )
    return environment


# ---------------------------------------------------------------- what is there


def _stage(folder: Path, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the page says of one stage; `state` in words."""
    manifest = artifacts.read_manifest(folder)
    metrics = folder / "metrics.jsonl"
    lines = read_metrics(metrics) if metrics.is_file() else []
    health = manifest.get("health") if manifest is not None else None
    if manifest is not None:
        state = "finished"
    elif lines:
        state = f"not finished; at step {lines[-1]['step']}"
    else:
        state = "not run yet"
    drawn = drawings.charts(lines, HEADLINE)
    return {
        "name": name,
        "kind": settings["kind"],
        "state": state,
        "manifest": manifest,
        "health": health,
        "pictures": _pictures(health) if health else [],
        "manifest_hash": artifacts.manifest_hash(folder) if manifest is not None else None,
        "headline": [chart for chart in drawn if chart.name in HEADLINE],
        "more": [chart for chart in drawn if chart.name not in HEADLINE],
    }


def _pictures(health: Mapping[str, Any]) -> list[drawings.Plot]:
    return [drawings.reliability(health["calibration"]), drawings.histograms(health["scores"])]


def _frontier(evaluation: Mapping[str, Any] | None) -> drawings.Plot | None:
    """The picture of score and KL, where best-of-n was measured."""
    if evaluation is None or evaluation["best_of_n"] is None:
        return None
    return drawings.frontier(evaluation["best_of_n"], evaluation["frontier"])


def _costs(stages: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    """What every finished stage has cost, with the arithmetic where it was estimated."""
    costs = {stage["name"]: stage["manifest"].get("cost") for stage in stages if stage["manifest"]}
    estimated = evaluation["cost"] if evaluation is not None else {}
    unknown = {"flops": None, "6PD": None}
    return {name: {**unknown, **cost, **estimated.get(name, {})} for name, cost in costs.items() if cost}


def _json_or_none(path: Path) -> Any:
    return artifacts.read_json(path) if path.is_file() else None


def _outdated(summary: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a stage was run again after the summary was measured."""
    measured = summary.get("made_from", {}).get("stages")
    there = {stage["name"]: stage["manifest_hash"] for stage in stages if stage["manifest_hash"] is not None}
    return measured is not None and measured != there


def _last_samples(run_dir: Path, stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Three samples of the last step of the last stage that has any: what there is to see before the evaluation."""
    for stage in reversed(stages):
        path = run_dir / stage["name"] / "samples.jsonl"
        if path.is_file() and (lines := read_metrics(path)):
            return [line for line in lines if line["step"] == lines[-1]["step"]][:3]
    return []


def _headlines(recipe: Mapping[str, Any], summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The few figures that decide whether to believe the run: (what, figure, note)."""
    found = []
    reward = summary.get("reward") or {}
    if "accuracy" in reward:
        note = f"95 % interval {_interval(reward['accuracy_ci'])}" if "accuracy_ci" in reward else ""
        if reward.get("best_reachable") is not None:
            note += f"; best reachable {figure(reward['best_reachable'])}"
        found.append(("reward model, held-out accuracy", figure(reward["accuracy"]), note))
    for pair, rate in summary["win_rate"].items():
        after, before = pair.split("/")
        note = f"95 % interval {_interval(rate['ci'])}; at equal length {figure(rate['length_matched'])}"
        found.append((f"win rate of {after} over {before}", figure(rate["rate"]), note))
        new, old = summary["systems"][after], summary["systems"][before]
        name = "gold" if "gold" in new and "gold" in old else "score"
        rise = new[name] - old[name]
        if name == "gold" and old.get("gold_std"):
            found.append(
                (
                    f"gold score, {after} − {before}",
                    f"{rise / old['gold_std']:+.2f}",
                    f"standard deviations of {before}",
                )
            )
        else:
            found.append(
                (f"{name}, {after} − {before}", f"{rise:+.2f}", "by the reward model that was trained against")
            )
        budget = recipe["stages"][after].get("kl_budget")
        note = "nats per completion" + (f"; budget {figure(budget)}" if budget is not None else "")
        found.append((f"KL of {after}", figure(new["kl"]), note))
    return found


# ---------------------------------------------------------------- words and numbers


def figure(value: Any) -> str:
    """A number as a reader wants it: three significant digits, thousands set apart, a dash for none."""
    if value is None:
        return "–"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}".replace("-", "−")
    return f"{value:.3g}".replace("-", "−")


def _fixed(value: float | None, decimals: int = 2) -> str:
    """A number for a column in which the decimal points stand below each other."""
    return "–" if value is None else f"{value:.{decimals}f}".replace("-", "−")


def _interval(ends: Sequence[float]) -> str:
    return f"{figure(ends[0])} to {figure(ends[1])}"


def _shortened(text: str) -> str:
    return text if len(text) <= TEXT else f"{text[:TEXT]} … ({len(text) - TEXT:,} more characters)"


def _spoken(prompt: str | Sequence[Mapping[str, str]]) -> str:
    """A prompt as text: as it is, or one chat message a paragraph."""
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def _plain(value: Any) -> str:
    """A setting as YAML has it."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _strength(divergence: float) -> str:
    """How strongly a token is marked by its KL, as a CSS percentage; 2 nats are the strongest."""
    return f"{min(1.0, abs(divergence) / 2) * 60:.0f}%"
