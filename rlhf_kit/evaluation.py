"""Is the tuned policy better? Base, SFT and every policy tuned from it on the same held-out prompts, as the figures of
`summary.json`.

Every system answers every prompt once, with the same random numbers, and is compared with the policy it started from.
Scores come from the reward that the last stage with one learned from, else from the last reward stage; where the recipe
names a gold scorer, which training never saw, it decides who wins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf_kit.batches import Rollout
from rlhf_kit.check import evaluation_card, evaluation_lengths
from rlhf_kit.collate import TextFormat, compared, tokenise_prompts
from rlhf_kit.errors import InputError
from rlhf_kit.examples.loading import Examples, prompts_of
from rlhf_kit.examples.rows import Preference, Prompt, Ranking
from rlhf_kit.finished import RewardModel
from rlhf_kit.foreign import Foreign, folder_of
from rlhf_kit.generation import uniforms
from rlhf_kit.maths import kl, statistics
from rlhf_kit.metrics import progress, say
from rlhf_kit.models import BASE, SharedBase, context_length, load_base
from rlhf_kit.pieces import Pieces
from rlhf_kit.recipe import Cards, PolicyStage, Recipe, RewardStage
from rlhf_kit.rollout import sampled, scored_by_models, scores_of
from rlhf_kit.scorers import Written, call_function, load_function, scorer_of, unpadded
from rlhf_kit.values import no_values

SHOWN_PROMPTS = 3


@dataclass(frozen=True)
class System:
    """What one system wrote for the held-out prompts, one entry a prompt."""

    texts: list[str]
    tokens: list[list[int]]
    """Of the completions, without their end token."""
    ended: list[bool]
    scores: list[float] | None
    """None where the recipe has nothing that scores."""
    gold: list[float] | None
    kl: list[float]
    """Nats per completion, to the policy that the last stage started from, on the system's own samples (k1)."""
    token_kl: list[list[float]]
    """The same of every token, end token included."""
    kl_k3: list[float]
    """KL by another estimator, which is never negative."""
    reference: list[float]
    """Log-probability of the completion, end token included, under that policy, in nats."""
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


@dataclass(frozen=True)
class Examination:
    """Held-out prompts, and what answers to them are measured with."""

    shared: SharedBase
    text_format: TextFormat
    prompts: Sequence[Prompt]
    prompt_ids: Sequence[Sequence[int]]
    limit: int
    """Tokens of an answer."""
    temperature: float
    reference: str
    """The role that KL is measured to."""
    reward: RewardModel | None
    gold: str | None
    """A function package.module:function."""
    seed: int
    pieces: Pieces
    """How many prompts are answered at a time."""

    def rows(self, index: Sequence[int]) -> Examination:
        """Return the same of some of the prompts."""
        prompts = [self.prompts[row] for row in index]
        return replace(self, prompts=prompts, prompt_ids=[self.prompt_ids[row] for row in index])

    @torch.no_grad()
    def answers(self, role: str) -> System:
        """Return what a role answers.

        Raises: InputError when a score is not finite.
        """
        rollout, written = self.sampled(role, self.uniforms())
        logprobs, _ = self.pieces.whole(
            lambda size: scored_by_models(
                self.shared,
                rollout,
                policy=role,
                reference=self.reference,
                value=no_values,
                temperature=self.temperature,
                microbatch=size,
            )
        )
        policy, reference = logprobs["policy_logprobs"], logprobs["reference_logprobs"]
        mask = rollout.completion_mask
        rows = [ids[real].tolist() for ids, real in zip(rollout.completion_ids, mask, strict=True)]
        ended = rollout.ended.tolist()
        return System(
            texts=list(written.texts),
            tokens=[ids[:-1] if done else ids for ids, done in zip(rows, ended, strict=True)],
            ended=ended,
            scores=self.scores(written, role),
            gold=self.judged(written.texts),
            kl=kl.kl_k1(policy, reference).double().sum(1).tolist(),
            token_kl=[row[real].tolist() for row, real in zip(kl.kl_k1(policy, reference), mask, strict=True)],
            kl_k3=(kl.kl_k3(policy, reference) * mask).double().sum(1).tolist(),
            reference=reference.double().sum(1).tolist(),
            lengths=mask.sum(1).tolist(),
        )

    def uniforms(self, *draw: object) -> Tensor:
        """Return the numbers that completions of the prompts are made from, as `generate` takes them."""
        return uniforms(range(len(self.prompts)), len(self.prompts), self.limit, self.seed, "evaluation", *draw)

    def sampled(self, role: str, uniform: Tensor) -> tuple[Rollout, Written]:
        """Return a role's completions, one for each prompt."""
        return sampled(
            self.shared,
            role,
            self.prompts,
            self.prompt_ids,
            uniform,
            self.text_format,
            self.temperature,
            self.pieces,
        )

    def scores(self, written: Written, role: str) -> list[float] | None:
        """Return the normalised scores of a role's completions; None where nothing scores.

        Raises: InputError when one is not finite.
        """
        reward = self.reward
        if reward is None:
            return None

        scorer = reward.scorer
        raw = self.pieces.whole(lambda size: scores_of(scorer, written, size, unpadded=unpadded(scorer)))
        scores = reward.normalised(raw)
        if not all(map(math.isfinite, scores)):
            raise InputError(f"{reward.name}: a held-out completion of {role} has a score that is NaN or infinite.")
        return scores

    def judged(self, texts: Sequence[str]) -> list[float] | None:
        """Return the gold scores of answers to the prompts, in order; None where there is no gold scorer."""
        return self.gold and call_function(load_function(self.gold), self.gold, self.prompts, texts)  # type: ignore[return-value]


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
    prompts, systems = _answers(recipe, folder, manifests, examples, artefacts, text_format, accelerator)
    summary["systems"] = {name: system.figures() for name, system in systems.items()}
    starts = {name: recipe.start_of(name) for name in tuned}
    for name, before in starts.items():
        if (rates := win_rates(systems[name], systems[before])) is not None:
            plain, matched = rates
            found = {"rate": plain.rate, "ci": list(plain.ci), "length_matched": matched.rate}
            summary["win_rate"][f"{name}/{before}"] = found
    first = starts[list(tuned)[-1]]
    shown = [first, *(name for name, before in starts.items() if before == first)]
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


def win_rates(after: System, before: System) -> tuple[statistics.Rate, statistics.Rate] | None:
    """Return how often one system beats another on the same prompts, and at equal length; None where nothing scores."""
    if after.verdict is None or before.verdict is None:
        return None
    matched = statistics.length_matched_win_rate(after.verdict, after.lengths, before.verdict, before.lengths)
    return statistics.win_rate(after.verdict, before.verdict), matched


def heldout_prompts(
    recipe: Recipe, examples: Mapping[Cards, Examples], text_format: TextFormat, count: int
) -> tuple[list[Prompt], list[list[int]]]:
    """Return `count` of the held-out prompts that a recipe is measured on, at most, and their tokens."""
    card = evaluation_card(recipe)
    assert card is not None
    truncate, limit = evaluation_lengths(recipe)
    rows = prompts_of(examples[card]).heldout
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    context = context_length(recipe.base)
    room = None if context is None else context - limit
    tokenised = tokenise_prompts([rows[index] for index in order[:count]], text_format, room, truncate)
    prompts = [rows[order[index]].prompt for index in tokenised.kept]
    if len(prompts) < count:
        say(f"evaluation: {len(prompts)} held-out prompts, fewer than evaluation.count: {count}")
    return prompts, tokenised.rows


def _answers(
    recipe: Recipe,
    folder: Path,
    manifests: Mapping[str, Mapping[str, Any]],
    examples: Mapping[Cards, Examples],
    artefacts: Mapping[str, Foreign],
    text_format: TextFormat,
    accelerator: Accelerator,
) -> tuple[list[Prompt], dict[str, System]]:
    """Return the held-out prompts and what the base, policies that others made and every stage's policy answer, on one
    shared base.
    """
    settings, sampling = recipe.evaluation, recipe.last_sampling()
    prompts, prompt_ids = heldout_prompts(recipe, examples, text_format, settings.count)
    shared = SharedBase(load_base(recipe.base, text_format, accelerator), recipe.base)
    policies = [name for name, stage in recipe.stages.items() if isinstance(stage, PolicyStage)]
    places = recipe.starts() | {name: name for name in policies}
    for name, written in places.items():
        shared.add(name, folder_of(written, folder, artefacts))
    rewards = [name for name, stage in recipe.stages.items() if isinstance(stage, RewardStage)]
    reward = sampling[1].reward if sampling else rewards[-1] if rewards else None
    scored: RewardModel | None = None
    if reward is not None:
        unit = manifests[sampling[0] if sampling else reward]["score_normalisation"]
        place = folder_of(reward, folder, artefacts)
        scorer = scorer_of(reward, place, shared, text_format, role="reward model")
        scored = RewardModel(reward, scorer, unit["mean"], unit["std"])
    examination = Examination(
        shared=shared,
        text_format=text_format,
        prompts=prompts,
        prompt_ids=prompt_ids,
        limit=evaluation_lengths(recipe)[1],
        temperature=sampling[1].temperature if sampling else 1.0,
        reference=recipe.start_of(list(recipe.tuned())[-1]),
        reward=scored,
        gold=settings.gold,
        seed=recipe.seed,
        pieces=Pieces("evaluation.batch_size", settings.batch_size, "prompts", accelerator),
    )
    return prompts, {role: examination.answers(role) for role in progress([BASE, *places], desc="evaluating, systems")}
