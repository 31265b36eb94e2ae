"""Best of n: sample several completions of each prompt, keep the one that scores best, and learn it by heart.

First the policy that the stage starts from writes, and the reward model scores, all on one shared base; then supervised
finetuning (supervised.py) goes on from that policy's adapter with the winners as demonstrations. Nothing is sampled
twice, so the policy comes at most as far as best-of-n itself: log n - (n - 1) / n nats a completion.

A checkpoint of the first part is the winners so far, one of the second the training's own, in a folder below. Every
prompt has random numbers of its own, so neither a stop, nor the number of processes, nor how many completions are
written at a time decides who wins (up to the order of float summation).

Sources: Ouyang et al. 2022 (arXiv 2203.02155), whose text-davinci-002 was made with it; Touvron et al. 2023 (arXiv
2307.09288), section 3.2.3, rejection sampling finetuning; Beirami et al. 2024 (arXiv 2401.01879) for the bound.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf_kit import artifacts, checkpoints, distributed, token_cache
from rlhf_kit.collate import IGNORED, tokenise_prompts
from rlhf_kit.errors import Diverged, Interrupted
from rlhf_kit.examples.loading import prompts_of
from rlhf_kit.examples.rows import Prompt
from rlhf_kit.generation import derived_seed, seed_generators, uniforms
from rlhf_kit.maths.best_of_n import kl_bound
from rlhf_kit.metrics import MetricLog, progress, say
from rlhf_kit.models import SharedBase, add_adapter, context_length, load_base, save_adapter
from rlhf_kit.pieces import Pieces
from rlhf_kit.recipe import RejectionSamplingStage
from rlhf_kit.rollout import microbatches, sampled
from rlhf_kit.scorers import score_unit
from rlhf_kit.stages import Job, Outcome
from rlhf_kit.supervised import attach_trainer
from rlhf_kit.training import Training, without_dropout

POLICY, REWARD = "policy", "reward"
UNIT_COMPLETIONS = 256  # at least, to measure the zero and the unit of a score that brings none
SAMPLES = 8  # winners kept for a reader


@dataclass
class Winners:
    """The best completion of each prompt so far, and what all completions were like."""

    prompts: int = 0
    """How many have been answered."""
    rows: list[int] = field(default_factory=list)
    """Which of them have a winner; those without a finite score have none."""
    completions: list[list[int]] = field(default_factory=list)
    """Tokens, the end token included where the completion ended."""
    scores: list[float] = field(default_factory=list)
    """Normalised, less the penalty of a completion that did not end."""
    all_scores: float = 0.0
    """Sum over every completion with a finite score."""
    scored: int = 0
    """How many these are."""
    tokens: int = 0
    """Of every completion."""
    ended: int = 0
    """Winners with an end token."""
    skipped: int = 0
    """Prompts some of whose completions have a score that is not finite."""

    def add(self, answers: Sequence[tuple[list[list[int]], list[float]]], end_id: int) -> None:
        """Take the completions and scores of the next prompts."""
        for completions, scores in answers:
            finite = [number for number, score in enumerate(scores) if math.isfinite(score)]
            self.skipped += len(finite) < len(scores)
            self.tokens += sum(map(len, completions))
            self.all_scores += math.fsum(scores[number] for number in finite)
            self.scored += len(finite)
            if finite:
                best = max(finite, key=scores.__getitem__)  # the first among equals
                self.rows.append(self.prompts)
                self.completions.append(completions[best])
                self.scores.append(scores[best])
                self.ended += completions[best][-1] == end_id
            self.prompts += 1

    def checkpoint(self, unit: tuple[float, float]) -> checkpoints.Checkpoint:
        """Return all of it as tensors and numbers."""
        flat = [token for completion in self.completions for token in completion]
        tensors = {
            "rows": torch.tensor(self.rows, dtype=torch.long),
            "tokens": torch.tensor(flat, dtype=torch.long),
            "lengths": torch.tensor([len(completion) for completion in self.completions], dtype=torch.long),
            "scores": torch.tensor(self.scores, dtype=torch.float64),
        }
        numbers = {name: getattr(self, name) for name in ("all_scores", "scored", "tokens", "ended", "skipped")}
        return checkpoints.Checkpoint(self.prompts, tensors, {**numbers, "unit": list(unit)})

    @classmethod
    def of(cls, found: checkpoints.Checkpoint) -> Winners:
        """Return what a checkpoint holds."""
        tensors, numbers = found.tensors, {name: value for name, value in found.state.items() if name != "unit"}
        pieces = tensors["tokens"].split(tensors["lengths"].tolist())
        completions = [piece.tolist() for piece in pieces]
        return cls(found.step, tensors["rows"].tolist(), completions, tensors["scores"].tolist(), **numbers)


def run(job: Job) -> Outcome:
    """Tune an adapter on the best of several completions; `adapter/` is the result."""
    settings, base = job.settings, job.recipe.base
    assert isinstance(settings, RejectionSamplingStage)
    sampling = Sampling(job)
    winners, unit = sampling.run()
    samples = sampling.samples(winners)
    rows = [sampling.row(row, won) for row, won in zip(winners.rows, winners.completions, strict=True)]
    data = sampling.data
    del sampling
    gc.collect()  # two bases need not fit into memory

    causal = load_base(base, job.text_format, job.accelerator)
    without_dropout(causal)
    model = add_adapter(
        causal,
        job.recipe.adapter,
        "CAUSAL_LM",
        init=job.adapter(settings.policy),
        seed=derived_seed(job.recipe.seed, job.name, "adapter"),
        base=base,
    )
    log = MetricLog(job.folder / "metrics.jsonl", enabled=job.accelerator.is_main_process, accelerator=job.accelerator)
    training = Training(
        model,
        rows,
        settings,
        name=job.name,
        seed=job.recipe.seed,
        # below the winners', which the pipeline looks for, and like them no part of the result
        folder=job.folder / artifacts.CHECKPOINTS / "training",
        accelerator=job.accelerator,
        stop=lambda: job.stop.requested,
        log=log,
        pieces=Pieces(f"stages.{job.name}.microbatch", settings.microbatch, "rows", job.accelerator),
    )
    attach_trainer(training, job.text_format)
    metrics = {
        "objective/score": math.fsum(winners.scores) / len(winners.scores),
        "rejection_sampling/score_of_all": winners.all_scores / winners.scored,
        "rejection_sampling/kl_bound": kl_bound(settings.completions_per_prompt),
        "rollout/ended_fraction": winners.ended / len(rows),
        "rollout/length": sum(map(len, winners.completions)) / len(rows),
        **({"rejection_sampling/skipped_prompts": float(winners.skipped)} if winners.skipped else {}),
    }
    if not training.first:
        log.log(0, metrics)
        if job.accelerator.is_main_process:
            lines = b"".join(map(artifacts.json_line, samples))
            artifacts.write_atomically(job.folder / "samples.jsonl", lines)
    training.run()
    if job.accelerator.is_main_process:
        save_adapter(model, job.folder / "adapter", base)
    return Outcome(
        metrics=metrics,
        data=data,
        extra={
            "steps": training.steps,
            "tokens": winners.tokens + training.tokens(lambda row: len(row["input_ids"])),
            "score_normalisation": {"mean": unit[0], "std": unit[1]},
        },
    )


class Sampling:
    """The first part: the policy and the reward model on one base, and the prompts."""

    def __init__(self, job: Job) -> None:
        settings = job.settings
        assert isinstance(settings, RejectionSamplingStage)
        self.job, self.settings, self.accelerator, self.format = job, settings, job.accelerator, job.text_format
        examples = prompts_of(job.examples[settings.prompts])
        context = context_length(job.recipe.base)
        room = None if context is None else context - settings.max_new_tokens
        tokenised = token_cache.tokenised(tokenise_prompts, examples.train, self.format, room, settings.truncate)
        self.prompt_ids: list[list[int]] = tokenised.rows
        self.prompts: list[Prompt] = [examples.train[index].prompt for index in tokenised.kept]
        self.data = {
            "prompts": {
                "card": examples.card.name,
                "rows": len(self.prompts),
                "content_hash": examples.content_hash,
                "counts": {**examples.counts, **tokenised.counts},
            }
        }
        self.folder = job.folder / artifacts.CHECKPOINTS
        self.at_once = Pieces(
            f"stages.{job.name}.sampled_at_once",
            settings.sampled_at_once,
            "completions generated at a time",
            self.accelerator,
        )
        self.unit = (0.0, 1.0)

    def run(self) -> tuple[Winners, tuple[float, float]]:
        """Return the winners of all prompts, and the mean and standard deviation that scores are normalised by.

        Raises:
            Interrupted: the run was asked to stop; a checkpoint is saved.
            Diverged: a score is not finite, and the recipe says to stop then; or no prompt has a winner.
        """
        found = checkpoints.latest(self.folder, say)
        winners = Winners() if found is None else Winners.of(found)
        total = len(self.prompts)
        if found is not None:
            self.unit = found.state["unit"][0], found.state["unit"][1]
            say(f"{self.job.name}: going on after {winners.prompts:,} of {total:,} prompts sampled for")
        if winners.prompts < total:
            self._load_roles()
            if found is None:
                self._measure_unit()
            self._sample_the_rest(winners)
        if not winners.rows:
            raise Diverged(f"{self.job.name}: no completion of any prompt has a finite score, so there is no winner")
        return winners, self.unit

    def row(self, prompt: int, completion: list[int]) -> dict[str, list[int]]:
        """Return a winner as a row to learn from."""
        asked = self.prompt_ids[prompt]
        return {"input_ids": asked + completion, "labels": [IGNORED] * len(asked) + completion}

    def samples(self, winners: Winners) -> list[dict[str, Any]]:
        """Return a few winners for `samples.jsonl`."""
        return [
            {
                "step": 0,
                "prompt": self.prompts[row],
                "completion": self.format.completion_text(self.prompt_ids[row], won),
                "score": score,
                "length": len(won),
                "ended": won[-1] == self.format.end_id,
            }
            for row, won, score in zip(
                winners.rows[:SAMPLES], winners.completions[:SAMPLES], winners.scores[:SAMPLES], strict=True
            )
        ]

    # ------------------------------------------------------------ sampling

    def _load_roles(self) -> None:
        job, settings = self.job, self.settings
        self.shared = SharedBase(load_base(job.recipe.base, self.format, self.accelerator), job.recipe.base)
        self.shared.add(POLICY, job.adapter(settings.policy))
        self.scorer, self.own_unit = job.scorer(settings.reward, self.shared, REWARD, "reward")

    def _measure_unit(self) -> None:
        """Find mean and standard deviation of the score: those that come with the reward, else of the first prompts'
        completions, which are sampled once more later.
        """
        if not self.settings.normalize_score:
            return
        if self.own_unit is not None:
            self.unit = self.own_unit
            return
        prompts = range(min(len(self.prompts), math.ceil(UNIT_COMPLETIONS / self.settings.completions_per_prompt)))
        raw = [score for _, scores in self._answered(prompts, penalised=False) for score in scores]
        self.unit = score_unit(raw, f"stages.{self.job.name}.reward", self.settings.reward)

    def _sample_the_rest(self, winners: Winners) -> None:
        settings, total = self.settings, len(self.prompts)
        batch = max(1, settings.sampled_at_once // settings.completions_per_prompt) * self.accelerator.num_processes
        saved_at, saved = time.monotonic(), winners.prompts
        starts = range(winners.prompts, total, batch)
        for number, start in enumerate(progress(starts, desc=f"{self.job.name}: sampling"), start=1):
            winners.add(self._answered(range(start, min(start + batch, total))), self.format.end_id)
            if winners.skipped > (0 if settings.on_nonfinite == "stop" else settings.max_skipped):
                raise Diverged(
                    f"{self.job.name}: {winners.skipped} of {winners.prompts:,} prompts have completions with a score "
                    "that is NaN or infinite; mend the reward, or let so many be left out with on_nonfinite: skip and "
                    "max_skipped"
                )
            stopped = distributed.agree(self.job.stop.requested, self.accelerator)
            due = checkpoints.due(settings.checkpoint_every, number, saved_at, self.accelerator)
            if (stopped or due or winners.prompts == total) and winners.prompts > saved:
                if self.accelerator.is_main_process:
                    checkpoints.save(self.folder, winners.checkpoint(self.unit), keep_all=settings.keep_checkpoints)
                self.accelerator.wait_for_everyone()
                saved_at, saved = time.monotonic(), winners.prompts
            if stopped:
                raise Interrupted(
                    f"{self.job.name}: stopped after sampling for {winners.prompts:,} of {total:,} prompts"
                )

    def _answered(self, prompts: range, *, penalised: bool = True) -> list[tuple[list[list[int]], list[float]]]:
        """Return the completions and scores of each of the prompts, in every process; each is sampled by one."""
        n = self.settings.completions_per_prompt
        share = distributed.share(len(prompts), self.accelerator)
        mine = [prompts[number] for number in share]
        seed_generators(self.job.recipe.seed, self.job.name, prompts.start, self.accelerator.process_index)
        flat = self.at_once.whole(lambda size: self._sampled([row for row in mine for _ in range(n)], mine, size))
        if penalised:
            mean, std = self.unit
            penalty = self.settings.missing_eos_penalty or 0.0
            flat = [(ids, (score - mean) / std - penalty * (ids[-1] != self.format.end_id)) for ids, score in flat]
        found = [
            ([ids for ids, _ in flat[start : start + n]], [score for _, score in flat[start : start + n]])
            for start in range(0, len(flat), n)
        ]
        return distributed.gather_rows(found, self.accelerator)

    @torch.no_grad()
    def _sampled(self, rows: list[int], prompts: list[int], size: int) -> list[tuple[list[int], float]]:
        """Return tokens and raw score of one completion for each of the rows, which are prompts, each n times."""
        settings, n = self.settings, self.settings.completions_per_prompt
        if not rows:
            return []
        seed = (self.job.recipe.seed, self.job.name, "completions")
        uniform = torch.cat([uniforms(range(n), n, settings.max_new_tokens, *seed, prompt) for prompt in prompts])
        found: list[tuple[list[int], float]] = []
        for piece in microbatches(range(len(rows)), size):
            asked = [self.prompt_ids[rows[number]] for number in piece]
            texts = [self.prompts[rows[number]] for number in piece]
            how = (uniform[piece], self.format, settings.temperature)
            rollout, written = sampled(self.shared, POLICY, texts, asked, *how)
            scores: Tensor = self.scorer(written)
            ids = zip(rollout.completion_ids, rollout.completion_mask, strict=True)
            found += [(row[mask].tolist(), float(score)) for (row, mask), score in zip(ids, scores, strict=True)]
        return found
