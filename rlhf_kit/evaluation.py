"""Is the tuned policy better? Base, SFT and every policy tuned from it on the same held-out prompts, as the figures of
`summary.json`.

Every system answers every prompt once, with the same random numbers, and is compared with the policy it started from.
Scores come from the reward that the last stage with one learned from, else from the last reward stage; where the recipe
names a gold scorer, which training never saw, it decides who wins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from accelerate import Accelerator

from rlhf_kit.check import evaluation_card, evaluation_lengths
from rlhf_kit.collate import TextFormat, compared, left_pad, tokenise_prompts
from rlhf_kit.errors import InputError
from rlhf_kit.examples import Examples, Preference, Prompt, Ranking, prompts_of
from rlhf_kit.generation import generate, uniforms
from rlhf_kit.maths import kl, statistics
from rlhf_kit.metrics import progress, say
from rlhf_kit.models import BASE, SharedBase, context_length, load_base
from rlhf_kit.pieces import Pieces
from rlhf_kit.recipe import Cards, PolicyStage, Recipe, RewardStage
from rlhf_kit.rollout import completion_logprobs, completion_states, unscored
from rlhf_kit.scorers import Scorer, Written, add_reward_role, call_function, external_scorer, load_function

SHOWN_PROMPTS = 3


@dataclass(frozen=True)
class System:
    """What one system wrote for the held-out prompts, one entry a prompt."""

    texts: list[str]
    scores: list[float] | None
    """None where the recipe has nothing that scores."""
    gold: list[float] | None
    kl: list[float]
    """Nats per completion, to the policy that the last stage started from, on the system's own samples."""
    lengths: list[int]
    """Tokens, end token included."""

    @property
    def verdict(self) -> list[float] | None:
        """What decides who wins: the gold scores where there are any."""
        return self.scores if self.gold is None else self.gold

    def figures(self) -> dict[str, float]:
        """Return the means that `summary.json` holds."""
        gold = {} if self.gold is None else {"gold": fmean(self.gold), "gold_std": pstdev(self.gold)}
        score = {} if self.scores is None else {"score": fmean(self.scores)}
        return {**score, **gold, "kl": fmean(self.kl), "length": fmean(self.lengths)}


def summarise(
    recipe: Recipe,
    folder: Path,
    manifests: Mapping[str, Mapping[str, Any]],
    examples: Mapping[Cards, Examples],
    text_format: TextFormat,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Return `summary.json` of a run whose stages are finished.

    folder: the run directory; manifests: by stage; examples: by data card, as the recipe names it.
    A recipe without a stage that tunes a policy further has no systems to compare.
    """
    summary: dict[str, Any] = {
        "reward": _reward_figures(recipe, manifests, examples),
        "systems": {},
        "win_rate": {},
        "examples": [],
        "cost": {name: manifest["cost"] for name, manifest in manifests.items()},
    }
    tuned = recipe.tuned()
    if not tuned:
        return summary
    prompts, systems = _answers(recipe, folder, manifests, examples, text_format, accelerator)
    summary["systems"] = {name: system.figures() for name, system in systems.items()}
    for name, stage in tuned.items():
        win_rate = _win_rate(systems[name], systems[stage.policy])
        if win_rate is not None:
            summary["win_rate"][f"{name}/{stage.policy}"] = win_rate
    last = list(tuned.values())[-1]
    shown = [last.policy, *(name for name, stage in tuned.items() if stage.policy == last.policy)]
    summary["examples"] = [
        {"prompt": prompt, **{name: systems[name].texts[row] for name in shown}}
        for row, prompt in enumerate(prompts[:SHOWN_PROMPTS])
    ]
    return summary


def _reward_figures(
    recipe: Recipe, manifests: Mapping[str, Mapping[str, Any]], examples: Mapping[Cards, Examples]
) -> dict[str, Any]:
    """Return the last reward stage's held-out accuracy, and what the gold scorer reaches on the same pairs."""
    stages = [(name, stage) for name, stage in recipe.stages.items() if isinstance(stage, RewardStage)]
    if not stages:
        return {}
    name, stage = stages[-1]
    health = manifests[name].get("health")
    if health is None:
        return {}  # nothing was held out
    figures: dict[str, Any] = {key: health[key] for key in ("accuracy", "accuracy_ci", "pairs", "prompts")}
    if recipe.evaluation.gold is not None:
        figures["best_reachable"] = gold_accuracy(recipe.evaluation.gold, examples[stage.data].heldout)
    return figures


def gold_accuracy(gold: str, rows: Sequence[Preference | Ranking]) -> float:
    """Return how often the gold scorer prefers the better answer of an untied pair, ties of its own counted half.

    Labels drawn from the gold preference with noise let no reward model do better than this, in expectation.
    """
    found = [compared(row) for row in rows]
    prompts = [row.prompt for row, one in zip(rows, found, strict=True) for _ in one.completions]
    scores = iter(
        call_function(load_function(gold), gold, prompts, [text for one in found for text in one.completions])
    )
    scored = [[next(scores) for _ in one.completions] for one in found]
    pairs = [
        (of_row[pair.chosen], of_row[pair.rejected])
        for one, of_row in zip(found, scored, strict=True)
        for pair in one.pairs
        if pair.probability != 0.5
    ]
    return statistics.win_rate(*zip(*pairs, strict=True)).rate


def _win_rate(after: System, before: System) -> dict[str, Any] | None:
    if after.verdict is None or before.verdict is None:
        return None
    plain = statistics.win_rate(after.verdict, before.verdict)
    matched = statistics.length_matched_win_rate(after.verdict, after.lengths, before.verdict, before.lengths)
    return {"rate": plain.rate, "ci": list(plain.ci), "length_matched": matched.rate}


def _answers(
    recipe: Recipe,
    folder: Path,
    manifests: Mapping[str, Mapping[str, Any]],
    examples: Mapping[Cards, Examples],
    text_format: TextFormat,
    accelerator: Accelerator,
) -> tuple[list[Prompt], dict[str, System]]:
    """Return the held-out prompts and what the base and every policy answer, on one shared base."""
    settings, reference = recipe.evaluation, list(recipe.tuned().values())[-1].policy
    sampling, card = recipe.last_sampling(), evaluation_card(recipe)
    truncate, limit = evaluation_lengths(recipe)
    temperature = sampling[1].temperature if sampling else 1.0
    assert card is not None
    rows = prompts_of(examples[card]).heldout
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    context = context_length(recipe.base)
    room = None if context is None else context - limit
    tokenised = tokenise_prompts([rows[index] for index in order[: settings.count]], text_format, room, truncate)
    prompts = [rows[order[index]].prompt for index in tokenised.kept]
    if len(prompts) < settings.count:
        say(f"evaluation: {len(prompts)} held-out prompts, fewer than evaluation.count: {settings.count}")

    shared = SharedBase(load_base(recipe.base, text_format, accelerator), recipe.base)
    names = [name for name, stage in recipe.stages.items() if isinstance(stage, PolicyStage)]
    for name in names:
        shared.add(name, folder / name / "adapter")
    rewards = [name for name, stage in recipe.stages.items() if isinstance(stage, RewardStage)]
    reward = sampling[1].reward if sampling else rewards[-1] if rewards else None
    scorer: Scorer | None = None
    mean, std = 0.0, 1.0
    if reward is not None:
        unit = manifests[sampling[0] if sampling else reward]["score_normalisation"]
        mean, std = unit["mean"], unit["std"]
        if reward in recipe.stages:
            scorer = add_reward_role(shared, "reward model", folder / reward / "adapter")
        else:
            scorer = external_scorer(reward, shared.device)
    gold = settings.gold and (settings.gold, load_function(settings.gold))

    pieces = Pieces("evaluation.batch_size", settings.batch_size, "prompts", accelerator)

    def answers(role: str, size: int) -> System:
        texts: list[str] = []
        scores: list[float] = []
        divergence: list[float] = []
        lengths: list[int] = []
        starts = range(0, len(prompts), size)
        for start in progress(starts, desc=f"evaluating {role}"):
            batch = range(start, min(start + size, len(prompts)))
            ids = [tokenised.rows[row] for row in batch]
            packed = left_pad(ids, text_format.pad_id)
            uniform = uniforms(batch, len(prompts), limit, recipe.seed, "evaluation")
            completions = generate(
                shared,
                role,
                packed,
                uniform,
                end_id=text_format.end_id,
                pad_id=text_format.pad_id,
                temperature=temperature,
            )
            rollout = unscored(packed, completions)
            written = text_format.completion_texts(ids, completions.completion_ids, completions.completion_mask)
            if scorer is not None:
                raw = scorer(Written([prompts[row] for row in batch], written, rollout.ids, rollout.mask))
                if not bool(raw.isfinite().all()):
                    raise InputError(f"{reward}: a held-out completion of {role} has a score that is NaN or infinite.")
                scores += ((raw - mean) / std).tolist()
            logprobs = [
                completion_logprobs(shared, completion_states(shared, who, rollout), rollout, temperature)
                for who in (role, reference)
            ]
            texts += written
            divergence += kl.kl_k1(*logprobs).sum(1).tolist()
            lengths += completions.completion_mask.sum(1).tolist()
        judged = call_function(gold[1], gold[0], prompts, texts) if gold else None
        return System(texts, scores if scorer else None, judged, divergence, lengths)

    with torch.no_grad():
        return prompts, {role: pieces.whole(partial(answers, role)) for role in (BASE, *names)}
