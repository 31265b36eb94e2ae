"""A reward model from comparisons: pairs, or rankings of up to nine completions; a standard `SEQ_CLS` adapter.

A prompt's completions are each encoded once, and all pairs of them are learnt from these scores (maths/preference.py).
The score is read at the last real token, found from the mask (models.classifier). A step is a set of prompts. How a
process divides its share of them into microbatches, and these into forward passes of completions of like length, is
decided by tokens (collate.py) and changes nothing but the order of sums, for a causal model does not see the padding
behind a completion. trl's `RewardTrainer` knows pairs alone and batches of a fixed number of them; what is left of a
trainer here is transformers' own.

Trained in train mode, scored in eval mode only: with 8-bit weights the two compute different numbers, and PPO scores in
eval mode.

An ensemble is the same training several times, each member an adapter and a head of its own on the same base:
`adapter/` is member 0, `members/1/adapter/` the next. Preferences fix neither zero nor unit of a score, so each
member's score is normalised before one is made of all.

At its end the stage reads the adapters back from their folders, which must score as those it trained, and measures what
others rely on: mean and standard deviation of the scores of demonstrations,
which become 0 and 1 in PPO (InstructGPT's zero point); a health report (health.py); and a probe, the scores of a few
sequences for every later user to compare with.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainingArguments

from rlhf_kit import artifacts, distributed, health, token_cache
from rlhf_kit.batches import Comparisons
from rlhf_kit.collate import (
    Tokenised,
    compare,
    compared,
    forward_passes,
    left_pad,
    right_pad,
    tokenise_comparisons,
    tokenise_demonstrations,
    tokens_of_group,
    within_budget,
)
from rlhf_kit.errors import InputError
from rlhf_kit.examples.rows import Demonstration, Preference, Ranking
from rlhf_kit.generation import derived_seed, generate, uniforms
from rlhf_kit.maths import preference
from rlhf_kit.maths.ensembles import ensemble_score, ensemble_std
from rlhf_kit.maths.logprobs import OutputHead, token_logprobs
from rlhf_kit.metrics import MetricLog, progress, say
from rlhf_kit.models import (
    BASE,
    SharedBase,
    add_adapter,
    classifier,
    context_length,
    load_base,
    open_adapter,
    output_head,
    probe_logits,
    save_adapter,
    scores_and_states,
    sequence_scores,
)
from rlhf_kit.pieces import Pieces
from rlhf_kit.recipe import RewardStage, SFTStage
from rlhf_kit.rollout import logits_held, microbatches
from rlhf_kit.stages import Job, Outcome, data_read
from rlhf_kit.training import Training, Watched, evaluating, optimizer_steps, without_dropout

ROUNDING = 1e-5
"""How far scores near 1 of one text may be apart, as other rows of a batch may make them, and be the same score."""
NORMALISED_ON = 512
"""Demonstrations at most whose scores set the zero and the unit: standard error of the zero below 5 % of the unit."""
PROBE = 8
SAMPLED, SAMPLED_TOKENS = 64, 256
"""Held-out prompts at most whose answers are sampled and spoilt for the health report, and tokens of a sample."""


def run(job: Job) -> Outcome:
    """Tune an adapter and a score head on comparisons; `adapter/` is the result, and `members/` of an ensemble."""
    settings = job.settings
    assert isinstance(settings, RewardStage)
    examples = job.examples[settings.data]
    limit = settings.max_length or context_length(job.recipe.base)
    how = (job.text_format, limit, settings.truncate)
    groups = token_cache.tokenised(tokenise_comparisons, examples.train, *how, settings.ties)
    say(f"{job.name}: {groups}")
    heldout = None
    if examples.heldout:
        heldout = token_cache.tokenised(tokenise_comparisons, examples.heldout, *how)
    reference = reference_rows(job, limit)
    least = max(map(tokens_of_group, groups.rows))
    budget = token_budget(job.name, settings, least)
    pieces = Pieces(f"stages.{job.name}.microbatch", budget, "tokens", job.accelerator, least=least)
    probe = [ids for group in (heldout or groups).rows[:PROBE] for ids in group["completions"]][:PROBE]

    trained = []
    for member in range(settings.ensemble):
        trained.append(train_member(job, member, groups.rows, pieces, probe))
        gc.collect()  # a trainer refers to itself; two bases need not fit into memory
    with job.stop.nothing_to_lose(job.accelerator):  # what is measured here is measured again
        return measured(job, groups, heldout, reference, trained, probe, pieces)


def measured(
    job: Job,
    groups: Tokenised,
    heldout: Tokenised | None,
    reference: Mapping[str, Any],
    trained: Sequence[tuple[list[float], int]],
    probe: Sequence[Sequence[int]],
    pieces: Pieces,
) -> Outcome:
    """Return what others rely on, of the members as read back; `trained` is what `train_member` returned of each."""
    settings = job.settings
    assert isinstance(settings, RewardStage)
    examples = job.examples[settings.data]
    samples = policy_samples(job, heldout.rows) if heldout else []
    gc.collect()  # their base
    ensemble = Ensemble(job, pieces)
    ensemble.check(probe, [scores for scores, _ in trained])

    steps = optimizer_steps(len(groups.rows), settings)
    metrics: dict[str, float] = {}
    extra: dict[str, Any] = {"steps": steps, "tokens": sum(tokens for _, tokens in trained)}
    demonstrations = ensemble.normalise_on(reference)
    extra["score_normalisation"] = ensemble.unit
    if heldout:
        rows = [examples.heldout[row] for row in heldout.kept]
        extra["health"] = health_report(job, ensemble, heldout.rows, rows, demonstrations, samples)
        metrics["reward/heldout_accuracy"] = extra["health"]["accuracy"]
        metrics["reward/calibration_error"] = extra["health"]["calibration"]["error"]
    if settings.ensemble > 1:
        extra["ensemble"] = ensemble.description()
        metrics["reward/ensemble_std"] = float(ensemble.last_std.mean())
    extra["probe"] = [{"ids": ids, "score": ensemble.score_alone(ids)} for ids in probe]
    if metrics:
        metric_log(job, job.folder).log(steps, metrics)
    return Outcome(
        metrics=metrics,
        data=data_read(examples, groups, heldout),
        extra=extra,
    )


def metric_log(job: Job, folder: Path) -> MetricLog:
    """Return the log in a folder; trackers follow the stage's own, which is the first member's."""
    accelerator = job.accelerator if folder == job.folder else None
    return MetricLog(folder / "metrics.jsonl", enabled=job.accelerator.is_main_process, accelerator=accelerator)


def member_folder(job: Job, member: int) -> Path:
    """Return where a member's `adapter/` and `metrics.jsonl` go."""
    return job.folder / "members" / str(member) if member else job.folder


# ---------------------------------------------------------------- training


def train_member(
    job: Job, member: int, groups: Sequence[Mapping[str, Any]], pieces: Pieces, probe: Sequence[Sequence[int]]
) -> tuple[list[float], int]:
    """Train one member and write its adapter; return its raw scores of the probe, and the tokens that it saw.

    A member that is trained already is there in its last checkpoint.
    """
    settings, accelerator = job.settings, job.accelerator
    assert isinstance(settings, RewardStage)
    name = f"{job.name} member {member}" if member else job.name
    folder = member_folder(job, member)
    model, head = new_reward_model(job, name)
    training = Training(
        model,
        groups,
        settings,
        name=name,
        seed=job.recipe.seed,
        # all of a stage's checkpoints lie in one folder, which is not part of its result
        folder=job.folder / artifacts.CHECKPOINTS / folder.relative_to(job.folder) if member else job.folder,
        accelerator=accelerator,
        stop=lambda: job.stop.requested,
        log=metric_log(job, folder),
        pieces=pieces,
    )
    trainer = Trainer(
        model=model,
        args=training.arguments(TrainingArguments),
        data_collator=lambda rows: {"rows": rows},
        train_dataset=training.dataset(),
    )
    trainer.settings, trainer.head, trainer.pad_id = settings, head, job.text_format.pad_id
    training.attach(trainer, trainer.figures)
    training.run()
    scores = [score_alone(model, ids) for ids in probe]
    if accelerator.is_main_process:
        save_adapter(model, folder / "adapter", job.recipe.base)
    accelerator.wait_for_everyone()
    return scores, training.tokens(tokens_of_group)


def new_reward_model(job: Job, name: str) -> tuple[PeftModel, OutputHead | None]:
    """Return the recipe's base as a classifier with a new adapter and head, or a copy of the `init` stage's adapter.

    The second is the base's output head, where a language modelling loss needs it. name: what seeds the new weights.
    """
    settings, base = job.settings, job.recipe.base
    assert isinstance(settings, RewardStage)
    causal = load_base(base, job.text_format, job.accelerator)
    without_dropout(causal)
    head = output_head(causal, probe_logits(causal)) if settings.lm_coef else None
    model = add_adapter(
        classifier(causal),
        job.recipe.adapter,
        "SEQ_CLS",
        init=job.adapter(settings.init) if settings.init else None,
        seed=derived_seed(job.recipe.seed, name, "adapter"),
        base=base,
    )
    return model, head


def token_budget(name: str, settings: RewardStage, most: int) -> int:
    """Return the tokens of a microbatch: as the recipe says, else `microbatch` times those of the longest prompt.

    most: those of the longest prompt, all its completions together.

    Raises: InputError when a prompt's completions do not fit, for they are learnt from together.
    """
    if settings.microbatch_tokens is not None and settings.microbatch_tokens < most:
        raise InputError(
            f"stages.{name}.microbatch_tokens: {settings.microbatch_tokens} tokens, but one prompt's completions have "
            f"{most} together and are learnt from in one piece; use at least {most}, or a smaller max_length with "
            "truncate: left_prompt or drop."
        )
    return settings.microbatch_tokens or settings.microbatch * most


class Trainer(Watched):
    """transformers' trainer, with our loss; no prompt's completions are divided."""

    settings: RewardStage
    pad_id: int
    head: OutputHead | None
    """The base's output head, if a language modelling loss is asked for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[Tensor] = []
        """[right, score difference, untied pairs, language modelling loss] summed over each microbatch of the step."""

    def tokens(self, rows: Sequence[Mapping[str, Any]]) -> int:
        return sum(len(row["completions"][row["best"]]) - row["prompt_tokens"] for row in rows)

    def microbatches(self, rows: Sequence[Mapping[str, Any]], size: int) -> Iterator[Comparisons]:
        for index in within_budget([tokens_of_group(row) for row in rows], size):
            yield compare([rows[row] for row in index], self.pad_id).to(self.model.device)

    def part(self, microbatch: Comparisons, tokens: Tensor) -> Tensor:
        """Return a microbatch's part of a step's loss; `tokens` is how many the step's language modelling loss has."""
        settings = self.settings
        scored, logprobs = [], []
        for ids, mask, learnt in zip(microbatch.ids, microbatch.mask, microbatch.learnt, strict=True):
            scores, states = scores_and_states(self.model, ids, mask.long())
            scored.append(scores)
            if self.head is not None and learnt.any():
                following = learnt[:, 1:]
                hidden, next_ids, held = states[:, :-1][following], ids[:, 1:][following], logits_held(ids.device)
                logprobs.append(token_logprobs(hidden, self.head, next_ids, 1.0, held))
        scores = torch.cat(scored)
        chosen, rejected = scores[microbatch.chosen], scores[microbatch.rejected]
        probability = preference.smoothed(microbatch.probability, settings.label_smoothing)
        losses = preference.soft_bradley_terry_loss(chosen, rejected, probability, microbatch.margin)
        losses = losses + settings.center_coef * preference.centering_penalty(chosen, rejected)
        loss = (preference.pair_weights(microbatch.prompt) * losses).sum() / settings.batch_size
        modelling = torch.zeros_like(loss)
        if logprobs:
            modelling = preference.language_modelling_loss(torch.cat(logprobs), tokens)
            loss = loss + settings.lm_coef * modelling

        untied = microbatch.probability != 0.5
        difference = (chosen - rejected).detach()[untied].double()
        right = (difference > 0).double() + (difference == 0).double() / 2
        figures = (right.sum(), difference.sum(), untied.sum().double(), modelling.detach().double())
        self.seen.append(torch.stack(figures))
        return loss

    def _gradients(self, rows: Sequence[Mapping[str, Any]], size: int, tokens: Tensor) -> Tensor:
        self.seen.clear()  # of pieces that ran out of memory
        return super()._gradients(rows, size, tokens)

    def figures(self) -> dict[str, float]:
        """Return accuracy and mean score difference over the untied pairs of the step, in all processes; and the
        language modelling loss, if any.
        """
        right, margin, pairs, modelling = distributed.total(torch.stack(self.seen).sum(0), self.accelerator).tolist()
        self.seen.clear()
        figures = {"reward/accuracy": right / pairs, "reward/margin": margin / pairs} if pairs else {}
        return figures | ({} if self.head is None else {"reward/lm_loss": modelling})


# ---------------------------------------------------------------- what others rely on


def score_alone(model: nn.Module, ids: Sequence[int]) -> float:
    """Return the raw score of one sequence without any padding."""
    row = torch.tensor([ids], device=next(model.parameters()).device)
    with evaluating(model):
        return float(sequence_scores(model, row, torch.ones_like(row)))


class Ensemble:
    """The members as read back from their folders, and one score from all of them; of one member its raw score."""

    def __init__(self, job: Job, pieces: Pieces) -> None:
        settings = job.settings
        assert isinstance(settings, RewardStage)
        self.job, self.settings, self.pieces = job, settings, pieces
        self.folders = [member_folder(job, member) / "adapter" for member in range(settings.ensemble)]
        fresh = classifier(load_base(job.recipe.base, job.text_format, job.accelerator))
        self.model = open_adapter(fresh, self.folders[0])
        for number, folder in enumerate(self.folders[1:], start=1):
            self.model.load_adapter(str(folder), str(number), torch_device=str(self.model.device))
        self.units: list[tuple[float, float]] = []
        """Mean and standard deviation of each member's raw scores of the demonstrations."""
        self.unit: dict[str, Any] = {}
        """Mean and standard deviation of the one score of the demonstrations, and what these were."""
        self.last_std = torch.zeros(0)
        """Of the rows scored last, the standard deviation over the members."""

    def check(self, probe: Sequence[Sequence[int]], trained: Sequence[Sequence[float]]) -> None:
        """Compare the members with what was trained.

        Raises: RuntimeError when one scores the probe differently.
        """
        for member, (folder, expected) in enumerate(zip(self.folders, trained, strict=True)):
            self._activate(member)
            for ids, score in zip(probe, expected, strict=True):
                again = score_alone(self.model, ids)
                if again != score:
                    raise RuntimeError(
                        f"{folder}: read back, the reward model scores {again} where it scored {score}; the files do "
                        "not hold what was trained"
                    )
        say(f"{self.job.name}: read back, the adapter gives the same {len(probe)} probe scores")

    def normalise_on(self, reference: Mapping[str, Any]) -> Tensor:
        """Take mean and standard deviation of the scores of the reference rows as zero and unit; return these scores.

        Raises: InputError when they all have the same score.
        """
        raw = self.raw(reference["rows"], "demonstrations")
        self.units = [self._unit(scores, reference["card"]) for scores in raw]
        scores = self._combined(raw)
        mean, std = self._unit(scores, reference["card"])
        say(
            f"{self.job.name}: {len(scores)} demonstrations of {reference['card']} score {mean:.4g} ± {std:.4g}; "
            "0 ± 1 in PPO"
        )
        kept = {"card": reference["card"], "heldout_rows": reference["heldout"], "tokenised": reference["counts"]}
        self.unit = {"mean": mean, "std": std, "rows": len(scores), **kept}
        return self.normalised(raw)

    def _unit(self, scores: Tensor, card: str) -> tuple[float, float]:
        """Return mean and standard deviation of the scores [N] of a card's rows."""
        mean, std = float(scores.mean()), float(scores.std(correction=0))
        if not std > ROUNDING * max(1.0, float(scores.abs().max())):
            raise InputError(
                f"stages.{self.job.name}.normalize_on: all {len(scores)} rows of {card} have the same score "
                f"({mean:.4g}), so there is no unit; name a card with several different demonstrations."
            )
        return mean, std

    def normalised(self, raw: Tensor) -> Tensor:
        """Return one score [N] of the members' raw ones [n, N], in the unit of `normalise_on`."""
        return (self._combined(raw) - self.unit["mean"]) / self.unit["std"]

    def score_alone(self, ids: Sequence[int]) -> float:
        """Return the score of one sequence without any padding."""
        raw = []
        for member in range(len(self.folders)):
            self._activate(member)
            raw.append([score_alone(self.model, ids)])
        return float(self._combined(torch.tensor(raw, dtype=torch.float64)))

    def description(self) -> dict[str, Any]:
        """Return what a user of the folders needs to make the same score of them."""
        members = [
            {"folder": folder.relative_to(self.job.folder).as_posix(), "mean": mean, "std": std}
            for folder, (mean, std) in zip(self.folders, self.units, strict=True)
        ]
        return {"score": self.settings.ensemble_score, "k": self.settings.ensemble_k, "members": members}

    def _activate(self, member: int) -> None:
        if len(self.folders) > 1:
            self.model.set_adapter(str(member) if member else "default", inference_mode=True)

    def raw(self, rows: Sequence[Sequence[int]], what: str) -> Tensor:
        """Return the members' raw scores [n, N], float64 on the CPU; each row is read by some process."""
        job, accelerator = self.job, self.job.accelerator
        mine = distributed.share(len(rows), accelerator)

        def scored(budget: int) -> Tensor:
            scores = torch.zeros(len(self.folders), len(rows), dtype=torch.float64)
            passes = forward_passes([len(rows[row]) for row in mine], budget)
            for member in range(len(self.folders)):
                self._activate(member)
                for index in progress(passes, desc=f"{job.name}: scoring {what}"):
                    picked = [mine[number] for number in index]
                    ids, mask = right_pad([rows[row] for row in picked], job.text_format.pad_id)
                    found = sequence_scores(self.model, ids.to(self.model.device), mask.long().to(self.model.device))
                    scores[member, picked] = found.double().cpu()
            return scores

        with evaluating(self.model):
            scores = self.pieces.whole(scored)
        return distributed.total(scores.to(accelerator.device), accelerator).cpu()

    def _combined(self, raw: Tensor) -> Tensor:
        if len(raw) == 1:
            return raw[0]
        mean, std = (torch.tensor(column, dtype=raw.dtype).unsqueeze(1) for column in zip(*self.units, strict=True))
        normalised = (raw - mean) / std
        self.last_std = ensemble_std(normalised)
        return ensemble_score(normalised, self.settings.ensemble_score, self.settings.ensemble_k)


def health_report(
    job: Job,
    ensemble: Ensemble,
    groups: Sequence[Mapping[str, Any]],
    rows: Sequence[Preference | Ranking],
    demonstrations: Tensor,
    samples: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """Return the health report on the held-out comparisons: `groups` are the tokens of `rows`.

    demonstrations: the normalised scores of the rows that set zero and unit. samples: token rows of `policy_samples`.
    """
    ids = [ids for group in groups for ids in group["completions"]]
    raw = ensemble.raw(ids, "held-out completions")
    prompts = [group["prompt_tokens"] for group in groups for _ in group["completions"]]
    answers = health.Answers(
        score=ensemble.normalised(raw).numpy(),
        logit=raw.mean(0).numpy(),
        tokens=np.asarray([len(row) - prompt for row, prompt in zip(ids, prompts, strict=True)]),
        overlap=np.asarray([health.overlap(row.prompt, text) for row in rows for text in compared(row).completions]),
    )
    scored = {"demonstrations": demonstrations.numpy()}
    if samples:
        scored["policy samples"] = ensemble.normalised(ensemble.raw(samples, "policy samples")).numpy()
    found = health.report(health.pairs_of(groups), answers, rows, scored, probed(job, ensemble, groups, rows, answers))
    low, high = found["accuracy_ci"]
    say(f"{job.name}: held-out accuracy {found['accuracy']:.3f}, 95 % interval {low:.3f} to {high:.3f}")
    for concern in health.concerns(found):
        say(f"{job.name}: {concern}")
    return found


def probed(
    job: Job,
    ensemble: Ensemble,
    groups: Sequence[Mapping[str, Any]],
    rows: Sequence[Preference | Ranking],
    answers: health.Answers,
) -> dict[str, np.ndarray]:
    """Return, by probe, what it changes in the scores of the best answers to `SAMPLED` prompts at most."""
    context = context_length(job.recipe.base)
    first, changed, before = 0, defaultdict(list), defaultdict(list)
    for group, row in list(zip(groups, rows, strict=True))[:SAMPLED]:
        found = compared(row)
        prompt = group["completions"][0][: group["prompt_tokens"]]
        allow = row.special_tokens == "allow"
        spoilt = health.spoilt(row.prompt, found.completions[found.best], derived_seed(job.recipe.seed, row.where))
        for probe, text in spoilt.items():
            ids = prompt + job.text_format.completion_ids(row.prompt, text, allow_special=allow)
            if context is None or len(ids) <= context:
                changed[probe].append(ids)
                before[probe].append(answers.score[first + found.best])
        first += len(found.completions)
    every = [ids for probe in changed.values() for ids in probe]
    if not every:
        return {}
    scores = ensemble.normalised(ensemble.raw(every, "probes")).split([len(ids) for ids in changed.values()])
    return {probe: part.numpy() - np.asarray(before[probe]) for probe, part in zip(changed, scores, strict=True)}


def policy_samples(job: Job, groups: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Return what the `init` stage's policy, or the base, writes to held-out prompts: token rows, prompt and answer.

    An answer may have as many tokens as the longest held-out one, `SAMPLED_TOKENS` at most.
    """
    settings, recipe = job.settings, job.recipe
    assert isinstance(settings, RewardStage)
    prompts = list({tuple(group["completions"][0][: group["prompt_tokens"]]): None for group in groups})
    longest = max(len(ids) - group["prompt_tokens"] for group in groups for ids in group["completions"])
    limit, context = min(longest, SAMPLED_TOKENS), context_length(recipe.base)
    prompts = [ids for ids in prompts if ids and (context is None or len(ids) + limit <= context)][:SAMPLED]
    shared = SharedBase(load_base(recipe.base, job.text_format, job.accelerator), recipe.base)
    role = BASE
    if settings.init is not None:
        shared.add(role := "init", job.adapter(settings.init))
    pieces = Pieces(f"stages.{job.name}.microbatch", SAMPLED, "prompts", job.accelerator)

    def sampled(size: int) -> list[list[int]]:
        rows = []
        for batch in microbatches(range(len(prompts)), size):
            completions = generate(
                shared,
                role,
                left_pad([prompts[row] for row in batch], job.text_format.pad_id),
                uniforms(batch, len(prompts), limit, recipe.seed, job.name, "health"),
                end_id=job.text_format.end_id,
                pad_id=job.text_format.pad_id,
            )
            for row, ids, mask in zip(batch, completions.completion_ids, completions.completion_mask, strict=True):
                rows.append([*prompts[row], *ids[mask].tolist()])
        return rows

    return pieces.whole(sampled)


def reference_rows(job: Job, limit: int | None) -> dict[str, Any]:
    """Return the demonstrations that set the zero and the unit of the score: a card's name, their token rows, counts.

    They are those of `normalize_on`, else those the `init` stage learned from, else the best completions; at most
    `NORMALISED_ON` of them at random, held-out ones first. Those that do not fit are left out and counted.
    """
    settings, recipe = job.settings, job.recipe
    assert isinstance(settings, RewardStage)
    start = recipe.stages.get(settings.init or "")
    card = settings.normalize_on or (start.data if isinstance(start, SFTStage) else settings.data)
    examples = job.examples[card]
    rows = []
    for part in (examples.heldout, examples.train):
        generator = torch.Generator().manual_seed(derived_seed(recipe.seed, job.name, "normalisation"))
        rows += [part[index] for index in torch.randperm(len(part), generator=generator).tolist()]
    rows = [best_side(row) if isinstance(row, Preference | Ranking) else row for row in rows[:NORMALISED_ON]]
    truncate = "drop" if settings.truncate == "error" else settings.truncate
    tokenised = tokenise_demonstrations(rows, job.text_format, limit, truncate)
    heldout = sum(index < len(examples.heldout) for index in tokenised.kept)
    return {
        "card": examples.card.name,
        "rows": [row["input_ids"] for row in tokenised.rows],
        "heldout": heldout,
        "counts": tokenised.counts,
    }


def best_side(row: Preference | Ranking) -> Demonstration:
    """Return the best completion of a prompt as a demonstration."""
    found = compared(row)
    return Demonstration(row.prompt, found.completions[found.best], row.where, row.special_tokens)
