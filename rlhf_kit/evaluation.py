"""Is the tuned policy better? Base, SFT and PPO on the same held-out prompts, as the figures of `summary.json`.

Every system answers every prompt once, with the same random numbers. Scores come from the reward that PPO was trained
on; where the recipe names a gold scorer, which training never saw, it decides who wins.
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

from rlhf_kit.collate import TextFormat, compared, left_pad, tokenise_prompts
from rlhf_kit.errors import InputError
from rlhf_kit.examples import Examples, Preference, Prompt, Ranking, prompts_of
from rlhf_kit.foreign import Foreign
from rlhf_kit.generation import generate, uniforms
from rlhf_kit.maths import kl, statistics
from rlhf_kit.metrics import progress, say
from rlhf_kit.models import BASE, SharedBase, context_length, load_base
from rlhf_kit.pieces import Pieces
from rlhf_kit.recipe import Cards, PPOStage, Recipe, RewardStage, SFTStage
from rlhf_kit.rollout import completion_logprobs, completion_states, unscored
from rlhf_kit.scorers import Scorer, Written, add_reward_role, call_function, load_function, scorer_of

SHOWN_PROMPTS = 3


@dataclass(frozen=True)
class System:
    """What one system wrote for the held-out prompts, one entry a prompt."""

    texts: list[str]
    scores: list[float]
    gold: list[float] | None
    kl: list[float]
    """Nats per completion, to the reference policy of the last PPO stage, on the system's own samples."""
    lengths: list[int]
    """Tokens, end token included."""

    @property
    def verdict(self) -> list[float]:
        """What decides who wins: the gold scores where there are any."""
        return self.scores if self.gold is None else self.gold

    def figures(self) -> dict[str, float]:
        """Return the means that `summary.json` holds."""
        gold = {} if self.gold is None else {"gold": fmean(self.gold), "gold_std": pstdev(self.gold)}
        return {"score": fmean(self.scores), **gold, "kl": fmean(self.kl), "length": fmean(self.lengths)}


def summarise(
    recipe: Recipe,
    folder: Path,
    manifests: Mapping[str, Mapping[str, Any]],
    examples: Mapping[Cards, Examples],
    artefacts: Mapping[str, Foreign],
    text_format: TextFormat,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Return `summary.json` of a run whose stages are finished.

    folder: the run directory; manifests: by stage; examples and artefacts, which no stage made: as the recipe names
    them.
    A recipe without a PPO stage has no systems to compare.
    """
    summary: dict[str, Any] = {
        "reward": _reward_figures(recipe, manifests, examples),
        "systems": {},
        "win_rate": {},
        "examples": [],
        "cost": {name: manifest["cost"] for name, manifest in manifests.items()},
    }
    ppo_stages = [name for name, stage in recipe.stages.items() if isinstance(stage, PPOStage)]
    if not ppo_stages:
        return summary
    prompts, systems = _answers(recipe, folder, manifests, examples, artefacts, text_format, accelerator, ppo_stages)
    summary["systems"] = {name: system.figures() for name, system in systems.items()}
    for name in ppo_stages:
        before = recipe.start_of(name)
        summary["win_rate"][f"{name}/{before}"] = _win_rate(systems[name], systems[before])
    last = ppo_stages[-1]
    first = recipe.start_of(last)
    summary["examples"] = [
        {"prompt": prompt, first: systems[first].texts[row], last: systems[last].texts[row]}
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
    figures: dict[str, Any] = dict(manifests[name]["heldout"])
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


def _win_rate(after: System, before: System) -> dict[str, Any]:
    plain = statistics.win_rate(after.verdict, before.verdict)
    matched = statistics.length_matched_win_rate(after.verdict, after.lengths, before.verdict, before.lengths)
    return {"rate": plain.rate, "ci": list(plain.ci), "length_matched": matched.rate}


def _answers(
    recipe: Recipe,
    folder: Path,
    manifests: Mapping[str, Mapping[str, Any]],
    examples: Mapping[Cards, Examples],
    artefacts: Mapping[str, Foreign],
    text_format: TextFormat,
    accelerator: Accelerator,
    ppo_stages: Sequence[str],
) -> tuple[list[Prompt], dict[str, System]]:
    """Return the held-out prompts and what base, policies that others made, SFT stages and PPO stages answer, on one
    shared base.
    """
    settings, last = recipe.evaluation, recipe.stages[ppo_stages[-1]]
    assert isinstance(last, PPOStage)
    limit = settings.max_new_tokens or last.max_new_tokens
    rows = prompts_of(examples[settings.prompts or last.prompts]).heldout
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    context = context_length(recipe.base)
    room = None if context is None else context - limit
    tokenised = tokenise_prompts([rows[index] for index in order[: settings.count]], text_format, room, last.truncate)
    prompts = [rows[order[index]].prompt for index in tokenised.kept]
    if len(prompts) < settings.count:
        say(f"evaluation: {len(prompts)} held-out prompts, fewer than evaluation.count: {settings.count}")

    shared = SharedBase(load_base(recipe.base, text_format, accelerator), recipe.base)
    names = [name for name, stage in recipe.stages.items() if isinstance(stage, SFTStage | PPOStage)]
    for name in names:
        shared.add(name, folder / name / "adapter")
    for name, written in recipe.starts().items():
        shared.add(name, artefacts[written].folder)
    names = [*recipe.starts(), *names]
    mean, std = (manifests[ppo_stages[-1]]["score_normalisation"][key] for key in ("mean", "std"))
    scorer: Scorer
    if last.reward in recipe.stages:
        scorer = add_reward_role(shared, "reward model", folder / last.reward / "adapter")
    else:
        scorer = scorer_of(shared, "reward model", last.reward, artefacts)
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
                temperature=last.temperature,
            )
            rollout = unscored(packed, completions)
            written = text_format.completion_texts(ids, completions.completion_ids, completions.completion_mask)
            raw = scorer(Written([prompts[row] for row in batch], written, rollout.ids, rollout.mask))
            if not bool(raw.isfinite().all()):
                raise InputError(f"{last.reward}: a held-out completion of {role} has a score that is NaN or infinite.")
            logprobs = [
                completion_logprobs(shared, completion_states(shared, who, rollout), rollout, last.temperature)
                for who in (role, recipe.start_of(ppo_stages[-1]))
            ]
            texts += written
            scores += ((raw - mean) / std).tolist()
            divergence += kl.kl_k1(*logprobs).sum(1).tolist()
            lengths += completions.completion_mask.sum(1).tolist()
        judged = call_function(gold[1], gold[0], prompts, texts) if gold else None
        return System(texts, scores, judged, divergence, lengths)

    with torch.no_grad():
        return prompts, {role: pieces.whole(partial(answers, role)) for role in (BASE, *names)}
