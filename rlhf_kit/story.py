"""What a run's figures say, in sentences: what should worry a reader, and where a policy stands beside best-of-n.

Everything comes from the files of the run directory. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_kit import health


def worries(
    recipe: Mapping[str, Any],
    stages: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any] | None,
    evaluation: Mapping[str, Any] | None,
) -> list[str]:
    """Return what a reader should doubt or look at, the worst first.

    recipe: as `recipe.resolved.yaml` has it; stages: {"name", "manifest"} of each.
    """
    found = [*_of_the_reward_models(stages), *_of_guards(stages)]
    if summary is not None:
        found += _of_the_policies(recipe, summary)
    if evaluation is not None:
        found += _of_the_evaluation(evaluation)
    return found


def _of_the_reward_models(stages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for stage in stages:
        if stage["manifest"] and stage["manifest"].get("health"):
            for concern in health.concerns(stage["manifest"]["health"]):
                yield f"{stage['name']}: {concern}"


def _of_guards(stages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for stage in stages:
        watched = (stage["manifest"] or {}).get("watch") or {}
        if watched.get("acted"):
            yield f"{stage['name']}: the guard acted: {watched['why']}"


def _of_the_policies(recipe: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[str]:
    for pair, win in summary["win_rate"].items():
        after, before = pair.split("/")
        new, old = summary["systems"][after], summary["systems"][before]
        if win["ci"][1] < 0.5:
            yield f"{after} loses to {before} on most prompts"
        elif win["ci"][0] <= 0.5:
            yield f"{after} may be no better than {before}: the interval of its win rate begins at {win['ci'][0]:.2f}"
        if "gold" in new and "score" in new and new["score"] > old["score"] and new["gold"] < old["gold"]:
            yield (
                f"{after} pleases the reward model ({old['score']:.2f} to {new['score']:.2f}) and not the gold scorer "
                f"({old['gold']:.2f} to {new['gold']:.2f}): reward hacking"
            )
        if win["length_matched"] is not None and win["rate"] - win["length_matched"] > 0.1:
            yield f"{after} wins by length: at equal length {win['length_matched']:.2f}, over all {win['rate']:.2f}"
        budget = recipe["stages"][after].get("kl_budget")
        if budget is not None and new["kl"] > budget:
            yield f"{after} is {new['kl']:.1f} nats from {before}, over its budget of {budget:g}"


def _of_the_evaluation(evaluation: Mapping[str, Any]) -> Iterator[str]:
    for name, place in evaluation["frontier"].items():
        if place["equal_kl"] is None or (place["kl_ratio"] or 0) > 2:
            yield f"{name}: {frontier_line(place, evaluation['best_of_n']['samples'])}"
    systems, before = evaluation["systems"], evaluation["reference"]
    reference, text = systems[before], evaluation["text"]
    for name, figures in systems.items():
        if figures["repetition"] > 2 * reference["repetition"] + 0.05:
            share, theirs = figures["repetition"], reference["repetition"]
            yield f"{name} repeats itself: {share:.0%} of its 4-grams stood there before, {theirs:.0%} of {before}'s"
        if figures["distinct_2"] < reference["distinct_2"] / 2:
            share, theirs = figures["distinct_2"], reference["distinct_2"]
            yield f"{name} says the same to everybody: distinct-2 is {share:.2f}, {before}'s {theirs:.2f}"
        if text is not None and text["change"][name] > 0.1 and name != "base":
            rise = text["change"][name]
            yield f"{name} models {text['card']} worse: its perplexity is {rise:.0%} above {before}'s"


def frontier_line(place: Mapping[str, Any], samples: int) -> str:
    """Return in words where a system stands to best-of-n on the same prompts."""
    head = f"{place['verdict']} {place['value']:.2f} at {place['kl']:.1f} nats"
    if place["equal_kl"] is None:
        return f"{head}; best of {samples} does not reach it"
    if place["kl_ratio"] is None:
        return f"{head}; a single sample reaches it"
    return f"{head}; best-of-n reaches it at {place['equal_kl']:.1f} nats: {place['kl_ratio']:.1f} times its KL"
