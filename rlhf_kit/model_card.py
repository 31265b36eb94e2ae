"""The model card of a published run: what it is, what it was made from, and how good it was measured to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from rlhf_kit import story
from rlhf_kit.recipe import Recipe, SamplingStage
from rlhf_kit.settings import HUB


def model_card(
    recipe: Recipe,
    stage: str,
    manifests: Mapping[str, Mapping[str, Any]],
    summary: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    repo: str,
    data: Sequence[Mapping[str, Any]],
    starts: Mapping[str, str],
    base_licence: str | None,
) -> tuple[str, list[str]]:
    """Return the card of a run whose policy `stage` lies at the root of `repo`, and what to warn of.

    evaluation: `eval.json`, if there is one. data: name, license and Hub repository of each data card. starts:
    "stage.field" and what it names that no stage made. base_licence: None where it is not known.
    """
    base = recipe.base
    hub_base = base.hub_id or (None if recipe.is_local_base else base.model)
    licences = {str(one["license"]) for one in data if one["license"]} | ({base_licence} if base_licence else set())
    warnings = []
    unknown = [str(one["name"]) for one in data if one["license"] in (None, "unknown")]
    if unknown:
        warnings.append(f"the licence of {', '.join(unknown)} is not known; say it in the data card")
    if hub_base is not None and base_licence is None:
        warnings.append(f"the licence of {hub_base} is not known; look at it")
    if len(licences) > 1:
        warnings.append(
            f"base and data have different licences ({', '.join(sorted(licences))}); which one holds is yours to say"
        )
    if hub_base is None:
        warnings.append("the base is a local folder, so nobody else can load the adapter; name it with base.hub_id")
    settings = recipe.stages[stage]
    if isinstance(settings, SamplingStage) and recipe.reward_source(stage) == "server":
        made_by = manifests[stage]["made_from"][f"stages.{stage}.reward"][:12]
        warnings.append(f"the reward model of {stage} is not here: {settings.reward} served it (manifest {made_by})")
    here = [f"{what} ({where})" for what, where in starts.items() if not where.startswith(HUB)]
    if here:
        warnings.append(f"nobody else has the folder of {', '.join(here)}; push it, and name it {HUB}OWNER/NAME")
    if len(here) < len(starts):
        warnings.append("the licences of what was taken from the Hub beside base and data are not in this one")
    metadata = ModelCardData(
        base_model=hub_base,
        library_name="peft",
        pipeline_tag="text-generation",
        license=licences.pop() if len(licences) == 1 else "other",
        datasets=sorted({str(one["hub"]) for one in data if one["hub"]}) or None,
        tags=["rlhf", "lora", "rlhf_kit", *sorted({manifest["kind"] for manifest in manifests.values()})],
        model_name=recipe.name,
        eval_results=list(_results(stage, summary)) or None,
    )
    if hub_base is not None:
        metadata["base_model_relation"] = "adapter"
    systems = summary.get("systems", {})
    template = Path(__file__).with_name("model_card.md.jinja").read_text(encoding="utf-8")
    strict = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    text = strict.from_string(template).render(
        name=recipe.name,
        base=hub_base or manifests[stage]["base"]["name"],
        revision=None if base.revision == "main" or not hub_base else base.revision,
        hub_base=hub_base,
        base_hash=(manifests[stage]["base"]["sha256"] or "")[:12],
        version=manifests[stage]["rlhf_kit"],
        chain=", then ".join(STEPS[recipe.stages[name].kind] for name in manifests),
        stages=[_row(name, manifest) for name, manifest in manifests.items()],
        starts=starts,
        reward=summary.get("reward") or {},
        systems=systems,
        gold=any("gold" in figures for figures in systems.values()),
        wins=summary.get("win_rate", {}),
        weaknesses=list(_weaknesses(recipe, stage, manifests, summary, evaluation, warnings)),
        repo=repo,
        others=[f"{name}/adapter" for name in manifests if name != stage],
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n{text}", warnings


STEPS: Mapping[str, str] = {
    "sft": "supervised finetuning",
    "reward": "a reward model from preferences",
    "ppo": "PPO with a KL penalty",
    "rloo": "RLOO with a KL penalty",
    "grpo": "GRPO",
    "dpo": "DPO",
    "kto": "KTO",
    "rejection_sampling": "supervised finetuning on the best of several completions",
}
"""What each kind of stage does, in words."""


def _row(name: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    data = [part for part in manifest["data"].values() if "card" in part]
    return {
        "name": name,
        "kind": manifest["kind"],
        "cards": ", ".join(part["card"] for part in data),
        "rows": f"{sum(part['rows'] for part in data):,}",
        "content": ", ".join(part["content_hash"][:12] for part in data),
        "settings": manifest["settings_hash"][:12],
        "seconds": f"{manifest['cost']['seconds']:,.0f}",
    }


def _results(stage: str, summary: Mapping[str, Any]) -> list[EvalResult]:
    """Return the measured results for the card's model-index."""
    found = []
    if "accuracy" in summary.get("reward", {}):
        found.append(("reward model, held-out accuracy", "accuracy", summary["reward"]["accuracy"]))
    for pair, figures in summary.get("win_rate", {}).items():
        if pair.startswith(f"{stage}/"):
            found.append((f"win rate over {pair.partition('/')[2]}", "win_rate", figures["rate"]))
    figures = summary.get("systems", {}).get(stage, {})
    found += [(name, name, figures[name]) for name in ("score", "gold", "kl", "length") if name in figures]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name="held-out rows of the data cards",
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for name, kind, value in found
    ]


def _weaknesses(
    recipe: Recipe,
    stage: str,
    manifests: Mapping[str, Mapping[str, Any]],
    summary: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    warnings: Sequence[str],
) -> list[str]:
    """Return what the figures give reason to worry about."""
    lines = []
    reward, systems = summary.get("reward", {}), summary.get("systems", {})
    if reward:
        wrong = 100 * (1 - reward["accuracy"])
        lines.append(f"The reward model judges {wrong:.0f} % of the held-out pairs otherwise than people did.")
    before = recipe.start_of(stage) if stage in recipe.tuned() else None
    if before in systems and stage in systems and systems[before]["length"]:
        ratio = systems[stage]["length"] / systems[before]["length"]
        if not 0.8 < ratio < 1.25:
            lines.append(f"Its answers are {ratio:.2f} times as long as those of {before}.")
    if systems and not any("gold" in figures for figures in systems.values()):
        lines.append("No judge but the reward model it was trained on has looked at it.")
    stages = [{"name": name, "manifest": manifest} for name, manifest in manifests.items()]
    worries = story.worries(recipe.model_dump(), stages, summary or None, evaluation)
    return [*lines, *(f"{worry[0].upper()}{worry[1:]}." for worry in [*worries, *warnings])]
