"""PPO with a KL penalty to the SFT policy, all roles on one base; and RLOO and GRPO, which do without a value function.

One update: sample completions from the policy; score them with the reward model; charge every token for its KL to the
reference policy; estimate advantages; take a few epochs of clipped policy and value steps; adapt the KL coefficient.
RLOO and GRPO sample several completions of a prompt and judge each by the others: all that differs is the advantage
(`targets`) and the loss (`_policy_losses`).

trl's trainers of these two are not used, though tests/invariants/test_groups.py holds the losses to be theirs. They
draw completions from the one generator of a process for a whole padded batch, so who wrote what depends on the batch
and on the number of processes; they run in train mode, where 8-bit weights compute other logits than in eval mode; and
they gather figures from all processes within a loss, where one whose memory ran out would leave the others waiting.

Sources: Ziegler et al. 2019 (arXiv 1909.08593) for the reward and the adaptive coefficient, Schulman et al. 2017
(arXiv 1707.06347) for the losses, Ouyang et al. 2022 (arXiv 2203.02155) for the normalised score, Ahmadian et al. 2024
(arXiv 2402.14740) for RLOO, Shao et al. 2024 (arXiv 2402.03300) for GRPO.

Everything random (prompt order, sampled tokens, minibatches) is derived from the seed, the update and the global row,
so a run is the same in one process or several and needs no generator state to go on from a checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_kit import artifacts, checkpoints, distributed, kl_doctor, token_cache
from rlhf_kit.batches import Rollout, Targets
from rlhf_kit.collate import tokenise_demonstrations, tokenise_prompts
from rlhf_kit.errors import Diverged, InputError, Interrupted, NotScored
from rlhf_kit.examples.loading import prompts_of
from rlhf_kit.generation import derived_seed, seed_generators, uniforms
from rlhf_kit.gradients import Gradients
from rlhf_kit.maths import advantages, kl, masking, ppo, rewards, statistics
from rlhf_kit.maths.schedules import learning_rate_factor
from rlhf_kit.metrics import MetricLog, finite, peak_bytes, progress, say, track_samples
from rlhf_kit.models import SUMMATION_TOLERANCE, SharedBase, checkpointed, context_length, load_base
from rlhf_kit.pieces import Pieces
from rlhf_kit.ptx import PTX
from rlhf_kit.recipe import GRPOStage, OnlineStage, PPOStage, RLOOStage
from rlhf_kit.rollout import (
    PolicyPass,
    ValueFunction,
    fill,
    microbatches,
    of_rollout,
    of_written,
    policy_pass,
    sampled,
    scored_by_models,
)
from rlhf_kit.scorers import AdapterScorer, Written, probe_error, probe_limit, score_unit, unpadded
from rlhf_kit.stages import Job, Outcome
from rlhf_kit.values import no_values, value_function, value_head
from rlhf_kit.watch import Watch

POLICY, REFERENCE, REWARD, VALUE, GOLD = "policy", "reference", "reward", "value", "gold"
PROBE_PROMPTS = 4
RATIO_TOLERANCE = {**SUMMATION_TOLERANCE, "bfloat16": 0.3}  # a logit above 16 has steps of an eighth there
UNIT_COMPLETIONS = 256  # at least, to measure the zero and the unit of a score that brings none
HEAD_RATE = 4  # times the policy's learning rate, of a value head without an adapter
SAMPLES = 8  # completions kept for a reader whenever samples are due


def run(job: Job) -> Outcome:
    """Tune the policy; `adapter/` is the policy, and of PPO `value/` the value function's adapter and head."""
    trainer = PPO(job)
    invariants = trainer.check_invariants()
    first = trainer.resume()
    log = trainer.log
    log.truncate_after(first)
    if first == 0 and (seen := trainer.look(0)):
        log.log(0, seen)
    for update in progress(range(first, trainer.settings.updates), desc=job.name):
        if trainer.over:
            break  # the guard has seen enough
        seed_generators(*trainer.seed, update, job.accelerator.process_index)
        try:
            rollout, written = trainer.roll_out(update)
        except NotScored:
            trainer.checkpoint(update)  # nothing is learnt yet
            raise
        except Diverged as error:
            skipped = trainer.skip(error)
            trainer.metrics |= skipped
            log.log(update + 1, skipped)
            trainer.checkpoint_if_due(update + 1)
            continue
        trainer.stop_if_asked(update)  # nothing is learnt yet: only the rollout is made again
        targets = trainer.targets(rollout)
        learned = trainer.learn(update, rollout, targets)
        trainer.metrics = trainer.summarise(rollout, targets, learned)
        trainer.kl_control.update(trainer.metrics["objective/kl"], trainer.settings.batch_size)
        trainer.metrics |= trainer.look(update + 1)
        log.log(update + 1, trainer.metrics)
        trainer.keep_samples(update, rollout, written)
        del rollout, targets  # the next is not made beside it
        trainer.checkpoint_if_due(update + 1)
    trainer.save()
    return Outcome(
        metrics=trainer.metrics,
        data=trainer.data,
        extra={
            "invariants": invariants,
            "score_normalisation": {"mean": trainer.mean, "std": trainer.std},
            "tokens": trainer.tokens,
            **({} if trainer.watch is None else {"watch": trainer.watch.outcome()}),
        },
    )


@dataclass(frozen=True)
class Learned:
    """Means over the tokens of one update's learning phase."""

    policy_loss: float
    value_loss: float
    clip_fraction: float
    value_clip_fraction: float
    approx_kl: float
    gradient_norm: float
    first_ratio_error: float
    learning_rate: float
    ptx_loss: float | None
    seconds: float


class PPO:
    """The state of a run of PPO, RLOO or GRPO: the roles on their base, the optimizer, the KL coefficient, the score's
    zero and unit.
    """

    def __init__(self, job: Job) -> None:
        assert isinstance(job.settings, OnlineStage)
        self.job, self.settings, self.accelerator = job, job.settings, job.accelerator
        self.with_value = job.settings if isinstance(job.settings, PPOStage) else None
        """The settings, where there is a value function."""
        self.group = job.settings.group
        """Completions of the same prompt, one after the other in a batch."""
        self.format = job.text_format
        self.seed = (job.recipe.seed, job.name)
        self.rows = distributed.share(self.settings.batch_size, self.accelerator)  # of each global batch
        if self.settings.batch_size < self.accelerator.num_processes:
            raise InputError(
                f"stages.{job.name}.batch_size: {self.settings.batch_size} completions for "
                f"{self.accelerator.num_processes} processes; each needs one at least."
            )
        self.log = MetricLog(
            job.folder / "metrics.jsonl", enabled=self.accelerator.is_main_process, accelerator=self.accelerator
        )
        self.pieces = Pieces(f"stages.{job.name}.microbatch", self.settings.microbatch, "completions", self.accelerator)
        self.at_once = Pieces(
            f"stages.{job.name}.batch_size", len(self.rows), "completions generated at a time", self.accelerator
        )
        self.skipped = 0
        self.metrics: dict[str, float] = {}
        self.ensemble_std: list[Tensor] = []  # sums over the completions of each microbatch
        self.tokens = 0
        self.kl_was_explained = False
        self.rollout_seconds = self.scoring_seconds = 0.0
        self.begun: dict[tuple[int, ...], PolicyPass] = {}
        """Passes of the policy, by their rows, that scoring made and learning begins with."""
        self.saved_at, self.saved_step = time.monotonic(), 0
        self.watch: Watch | None = None
        self._load_prompts()
        self._load_roles()
        self.ptx = self._load_ptx()
        self._make_optimizer()
        self.kl_control: kl.FixedKL | kl.AdaptiveKL = kl.FixedKL(self.settings.kl_coef)
        if self.with_value is not None and self.with_value.kl_target is not None:
            self.kl_control = kl.AdaptiveKL(
                self.settings.kl_coef, self.with_value.kl_target, self.with_value.kl_horizon
            )

    # ------------------------------------------------------------ setting up

    def _load_prompts(self) -> None:
        examples = prompts_of(self.job.examples[self.settings.prompts])
        context = context_length(self.job.recipe.base)
        room = None if context is None else context - self.settings.max_new_tokens
        tokenised = token_cache.tokenised(tokenise_prompts, examples.train, self.format, room, self.settings.truncate)
        self.prompt_ids: list[list[int]] = tokenised.rows
        self.prompts = [examples.train[index].prompt for index in tokenised.kept]
        self.data = {
            "prompts": {
                "card": examples.card.name,
                "rows": len(self.prompts),
                "content_hash": examples.content_hash,
                "counts": {**examples.counts, **tokenised.counts},
            }
        }

    def _load_roles(self) -> None:
        job, settings = self.job, self.settings
        base = load_base(job.recipe.base, self.format, self.accelerator)
        again = checkpointed(settings.activation_checkpointing, base, base.device)
        self.shared = shared = SharedBase(base, job.recipe.base, checkpointed=again)
        start = job.adapter(settings.policy)
        shared.add(REFERENCE, start)
        shared.add(POLICY, start, trainable=True)

        self.scorer, unit = job.scorer(settings.reward, shared, REWARD, "reward")
        self.has_unit = unit is not None or not settings.normalize_score
        self.mean, self.std = unit if unit is not None and settings.normalize_score else (0.0, 1.0)

        self.value: ValueFunction = no_values
        self.read: AdapterScorer | None = None
        """The reward model, if the value function reads its states."""
        if self.with_value is None:
            return
        if self.with_value.value == "adapter":
            place = job.adapter(settings.reward) if isinstance(self.scorer, AdapterScorer) else start
            shared.add(VALUE, place, trainable=True)
        elif isinstance(self.scorer, AdapterScorer):
            self.read = self.scorer
        shared.set_head(VALUE, self._value_head(self.with_value), trainable=True)
        self.value = value_function(shared, VALUE, self.with_value.value)

    def _value_head(self, settings: PPOStage) -> nn.Module:
        reward = REWARD if isinstance(self.scorer, AdapterScorer) else None
        seed = derived_seed(*self.seed, "value head")
        return value_head(self.shared, settings.value, reward, self.mean, self.std, seed)

    def _load_ptx(self) -> PTX | None:
        settings = self.settings.ptx
        if settings is None:
            return None
        examples, context = self.job.examples[settings.data], context_length(self.job.recipe.base)
        truncate = self.settings.truncate
        texts = token_cache.tokenised(tokenise_demonstrations, examples.train, self.format, context, truncate)
        self.data["ptx"] = {
            "card": examples.card.name,
            "rows": len(texts.rows),
            "content_hash": examples.content_hash,
            "counts": {**examples.counts, **texts.counts},
        }
        return PTX(
            self.shared,
            texts.rows,
            coef=settings.coef,
            batch_size=settings.batch_size,
            pad_id=self.format.pad_id,
            seed=self.seed,
            accelerator=self.accelerator,
        )

    def _make_watch(self) -> Watch | None:
        """Return the watch over the held-out prompts, which needs the score's unit; None if there is none."""
        job, settings = self.job, self.settings
        if settings.watch is None:
            return None
        rows = prompts_of(job.examples[settings.prompts]).heldout
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(job.recipe.seed)).tolist()
        context = context_length(job.recipe.base)
        room = None if context is None else context - settings.max_new_tokens
        picked = [rows[row] for row in order[-settings.watch.count :]]  # the closing table takes the first
        tokenised = token_cache.tokenised(tokenise_prompts, picked, self.format, room, settings.truncate)
        if len(tokenised.rows) < max(2, self.accelerator.num_processes):
            raise InputError(
                f"stages.{job.name}.watch: {len(tokenised.rows)} held-out prompts fit, for "
                f"{self.accelerator.num_processes} processes; hold more out in the card."
            )
        gold, gold_unit = None, None
        if settings.watch.gold is not None:
            gold, gold_unit = job.scorer(settings.watch.gold, self.shared, GOLD, "watch.gold")
        return Watch(
            self.shared,
            [picked[row].prompt for row in tokenised.kept],
            tokenised.rows,
            name=job.name,
            seed=self.seed,
            every=settings.watch.every,
            new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            text_format=self.format,
            scorer=self.scorer,
            unit=(self.mean, self.std),
            gold=gold,
            gold_unit=gold_unit or (0.0, 1.0),
            guard=settings.guard,
            microbatch=self.pieces,
            accelerator=self.accelerator,
        )

    def _unit_of_reference(self) -> tuple[float, float]:
        """Return mean and standard deviation of the scores of some completions of the reference policy."""
        scores: list[float] = []
        for batch in progress(
            range(math.ceil(UNIT_COMPLETIONS / self.settings.batch_size)), desc="score unit, batches"
        ):
            rollout, written = self._sample(REFERENCE, self._prompt_rows(batch), "score unit", batch)
            scores += distributed.gather_rows(self._scored(rollout, written).scores.tolist(), self.accelerator)
        return score_unit(scores, f"stages.{self.job.name}.reward", self.settings.reward)

    def _make_optimizer(self) -> None:
        settings, with_value = self.settings, self.with_value
        self.value_epochs, value_rate = 0, settings.learning_rate
        if with_value is not None:
            self.value_epochs = with_value.own_value_epochs or with_value.value_epochs or settings.epochs
            value_rate = with_value.value_learning_rate or settings.learning_rate * (
                settings.epochs / self.value_epochs if with_value.value == "adapter" else HEAD_RATE
            )
        self.parameters = self.shared.trainable()
        self.gradients = Gradients(self.parameters)
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            rate = value_rate if name.startswith(f"{VALUE}/") else settings.learning_rate
            groups.setdefault(rate, []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters, "lr": rate, "initial_lr": rate} for rate, parameters in groups.items()],
            weight_decay=settings.weight_decay,
        )

    # ------------------------------------------------------------ invariants and checkpoints

    def check_invariants(self) -> dict[str, float]:
        """Return, and log, how exactly the start is a start: KL 0, first ratio 1, and the stored scores.

        Raises:
            RuntimeError: policy and reference differ, the first ratio is not 1, or the reward model no longer scores
                its stored probe as it did when it was saved.
        """
        rollout, _ = self._sample(POLICY, list(range(min(PROBE_PROMPTS, len(self.prompts)))), "probe", world=False)
        scored, _ = self._scored_by_models(rollout)
        kl_error = float((scored["policy_logprobs"] - scored["reference_logprobs"]).abs().max())
        with torch.enable_grad():
            again = self.pieces.whole(lambda size: self._logprobs_with_gradients(rollout, size))
        ratio_error = float((torch.exp(again - scored["policy_logprobs"]) - 1).abs().max())
        reward = self.job.inputs.get(self.settings.reward, {})
        found = {
            "kl": kl_error,
            "first_ratio_error": ratio_error,
            "probe_score_error": probe_error(self.scorer, self.shared, reward),
        }
        limits = {
            "kl": 0.0,
            "first_ratio_error": RATIO_TOLERANCE[self.job.recipe.base.dtype],
            "probe_score_error": probe_limit(self.shared, (self.mean, self.std)),
        }
        for name, error in found.items():
            if not error <= limits[name]:
                raise RuntimeError(f"{self.job.name}: step-0 invariant {name} is {error:.3g}, not 0 as it must be")
        say(f"{self.job.name}: invariants hold: " + ", ".join(f"{name} {error:.1e}" for name, error in found.items()))
        return found

    def _logprobs_with_gradients(self, rollout: Rollout, size: int) -> Tensor:
        logprobs = torch.zeros_like(rollout.policy_logprobs)
        for rows in microbatches(range(len(logprobs)), size):
            piece = rollout.rows(torch.tensor(rows, device=self.shared.device))
            made = policy_pass(self.shared, POLICY, piece, self.settings.temperature)
            fill(logprobs, rows, made.logprobs.detach())
        return logprobs

    def resume(self) -> int:
        """Return the update to go on with: 0, or where the newest whole checkpoint left off."""
        found = checkpoints.latest(self.job.folder / artifacts.CHECKPOINTS, say)
        if self.accelerator.is_main_process:
            artifacts.truncate_jsonl(self.samples, found.step if found else 0)
        if found is None:
            if not self.has_unit:
                self.mean, self.std = self._unit_of_reference()
                if self.with_value is not None:
                    self.shared.heads[VALUE].load_state_dict(self._value_head(self.with_value).state_dict())
            self.watch = self._make_watch()
            return 0
        checkpoints.put_back(found, self.parameters, self.optimizer)
        self.kl_control.load(found.state["kl_control"])
        self.mean, self.std = found.state["score_unit"]
        self.metrics, self.tokens, self.skipped = (found.state[name] for name in ("metrics", "tokens", "skipped"))
        self.pieces.size = min(self.pieces.size, found.state["pieces"])
        self.at_once.size = min(self.at_once.size, found.state["at_once"])
        self.watch = self._make_watch()
        if self.watch is not None:
            self.watch.load(found.state["watch"], found.tensors)
        say(f"{self.job.name}: going on after update {found.step}")
        self.saved_step = found.step
        return found.step

    def stop_if_asked(self, done: int) -> None:
        """If the run was asked to stop, save a checkpoint after `done` updates.

        Raises:
            Interrupted: it was.
        """
        if distributed.agree(self.job.stop.requested, self.accelerator):
            self.checkpoint(done)
            raise Interrupted(f"{self.job.name}: stopped after update {done} of {self.settings.updates}")

    def checkpoint_if_due(self, done: int) -> None:
        """Save a checkpoint after `done` updates if one is due.

        Raises:
            Interrupted: the run was asked to stop; the checkpoint is saved.
        """
        self.stop_if_asked(done)
        if checkpoints.due(self.settings.checkpoint_every, done, self.saved_at, self.accelerator):
            self.checkpoint(done)

    def checkpoint(self, done: int) -> None:
        """Save a checkpoint after `done` updates, unless there is one; from the main process, and the others wait."""
        if done == self.saved_step:
            return
        if self.accelerator.is_main_process:
            state = {
                "kl_control": self.kl_control.state(),
                "score_unit": [self.mean, self.std],
                "metrics": {name: finite(value) for name, value in self.metrics.items()},
                "tokens": self.tokens,
                "skipped": self.skipped,
                "pieces": self.pieces.size,
                "at_once": self.at_once.size,
            }
            tensors = checkpoints.tensors_of(self.parameters, self.optimizer)
            if self.watch is not None:
                state["watch"] = self.watch.state()
                tensors |= self.watch.tensors()
            checkpoints.save(
                self.job.folder / artifacts.CHECKPOINTS,
                checkpoints.Checkpoint(done, tensors, state),
                keep_all=self.settings.keep_checkpoints,
                logs=[self.log.path, self.samples],
            )
        self.saved_at, self.saved_step = time.monotonic(), done
        self.accelerator.wait_for_everyone()

    @property
    def samples(self) -> Path:
        """Where completions are kept for a reader."""
        return self.job.folder / "samples.jsonl"

    def save(self) -> None:
        """Write the tuned policy and its value function, or those that the guard goes back to."""
        if self.watch is not None:
            self.watch.put_back_best()
        if self.accelerator.is_main_process:
            self.shared.save(POLICY, self.job.folder / "adapter")
            if self.with_value is not None and self.with_value.value == "adapter":
                self.shared.save(VALUE, self.job.folder / "value")

    # ------------------------------------------------------------ watching

    def look(self, done: int) -> dict[str, float]:
        """Return what the watch sees after `done` updates, if it is to look then."""
        if self.watch is None or not self.watch.is_due(done, self.settings.updates):
            return {}
        started = time.monotonic()
        seen = self.watch.look(POLICY, REFERENCE, done)
        return {**seen, "time/watch_s": time.monotonic() - started}

    @property
    def over(self) -> bool:
        """Whether the guard ends the stage before its last update."""
        return self.watch is not None and self.watch.over

    # ------------------------------------------------------------ one update

    def _prompt_rows(self, update: int) -> list[int]:
        """Return this process's prompts of an update: the prompts in an endless sequence of shuffled passes."""
        count, size = len(self.prompts), self.settings.batch_size // self.group
        rows = []
        for position in (update * size + row // self.group for row in self.rows):
            generator = torch.Generator().manual_seed(derived_seed(*self.seed, "prompts", position // count))
            rows.append(int(torch.randperm(count, generator=generator)[position % count]))
        return rows

    def _sample(self, role: str, prompts: list[int], *purpose: object, world: bool = True) -> tuple[Rollout, Written]:
        """Return completions of prompts by a role, not yet scored.

        world: the prompts are this process's share of a global batch, so they take its share of the random numbers.
        """
        rows, total = (self.rows, self.settings.batch_size) if world else (range(len(prompts)), len(prompts))
        uniform = uniforms(rows, total, self.settings.max_new_tokens, *self.seed, *purpose)
        texts, ids = [self.prompts[prompt] for prompt in prompts], [self.prompt_ids[prompt] for prompt in prompts]
        return sampled(self.shared, role, texts, ids, uniform, self.format, self.settings.temperature, self.at_once)

    def _scored(self, rollout: Rollout, written: Written) -> Rollout:
        """Return a rollout with the raw scores of this process's completions and, where the value function reads them,
        the states from which the reward model made them.

        Raises: NotScored, in every process, where the reward server of one gives none.
        """
        lost: list[NotScored] = []

        def scored(size: int) -> Rollout:
            try:
                return self._scored_in_pieces(rollout, written, size)
            except NotScored as error:
                lost.append(error)
                return rollout

        result = self.pieces.whole(scored)
        if distributed.agree(bool(lost), self.accelerator):
            raise lost[0] if lost else NotScored(f"reward: {self.settings.reward}: gave another process no scores.")
        return result

    def _scored_in_pieces(self, rollout: Rollout, written: Written, size: int) -> Rollout:
        mask, scores, states = rollout.completion_mask, torch.zeros_like(rollout.scores), rollout.reward_states
        if self.read is not None:
            dtype = getattr(torch, self.job.recipe.base.dtype)
            states = torch.zeros(*mask.shape, self.shared.width, dtype=dtype, device=mask.device)
        self.ensemble_std = []
        for rows in of_written(written, size, unpadded=unpadded(self.scorer)):
            piece = written.rows(rows)
            if self.read is None:
                scores[rows] = self.scorer(piece)
            else:
                scores[rows], made = self.read.scores_and_states(piece)
                fill(states, rows, made[:, -1 - int(mask[rows].sum(1).max()) : -1])
            if isinstance(self.scorer, AdapterScorer) and len(self.scorer.roles) > 1:
                self.ensemble_std.append(self.scorer.last_std.sum())
        return replace(rollout, scores=scores, reward_states=states)

    def _scored_by_models(
        self, rollout: Rollout, value: ValueFunction = no_values, learnt_first: Sequence[int] = ()
    ) -> tuple[dict[str, Tensor], dict[tuple[int, ...], PolicyPass]]:
        return self.pieces.whole(
            lambda size: scored_by_models(
                self.shared,
                rollout,
                policy=POLICY,
                reference=REFERENCE,
                value=value,
                temperature=self.settings.temperature,
                microbatch=size,
                learnt_first=learnt_first,
                passes=lambda pieces: progress(pieces, desc="  scoring, microbatches"),
            )
        )

    @torch.no_grad()
    def roll_out(self, update: int) -> tuple[Rollout, Written]:
        """Return the update's completions with their log-probabilities, values and normalised scores."""
        started = time.monotonic()
        self.begun = {}  # of an update that was skipped
        rollout, written = self._sample(POLICY, self._prompt_rows(update), "rollout", update)
        sampled = time.monotonic()
        rollout = self._scored(rollout, written)
        scores = (rollout.scores - self.mean) / self.std
        if self.settings.score_clip is not None:
            scores = scores.clamp(-self.settings.score_clip, self.settings.score_clip)
        self.sampler_logprobs = rollout.policy_logprobs
        first = self._mine(self._minibatches(update, 0)[0])
        scored, self.begun = self._scored_by_models(rollout, self.value, first)
        rollout = replace(rollout, scores=scores, **scored)
        for name in ("policy_logprobs", "reference_logprobs", "values", "scores"):
            self._require_finite(name, getattr(rollout, name), update)
        self.rollout_seconds, self.scoring_seconds = time.monotonic() - started, time.monotonic() - sampled
        return rollout, written

    @torch.no_grad()
    def targets(self, rollout: Rollout) -> Targets:
        """Return advantages and returns: of PPO the score, less penalties and the KL of every token, through GAE; of
        RLOO and GRPO what a completion earns compared with the others of its prompt, on each of its tokens.
        """
        settings, mask = self.with_value, rollout.completion_mask
        scores = rollout.scores
        if self.settings.missing_eos_penalty is not None:
            scores = scores - self.settings.missing_eos_penalty * (~rollout.ended)
        if settings is None:
            compared = self._compared_in_groups(scores, rollout)
            return Targets(compared.unsqueeze(1) * mask, torch.zeros_like(rollout.values))
        if settings.whiten_scores:
            column = scores.unsqueeze(1)
            scores = self._whitened(column, torch.ones_like(column, dtype=torch.bool), center=False).squeeze(1)
        token_kl = kl.kl_k1(rollout.policy_logprobs, rollout.reference_logprobs)
        token_rewards = rewards.token_rewards(scores, token_kl, mask, self.kl_control.coef)
        advantage, returns = advantages.gae(token_rewards, rollout.values, mask, settings.gamma, settings.lam)
        if settings.whiten_advantages:
            advantage = self._whitened(advantage, mask, center=True)
        return Targets(advantage, returns)

    def _compared_in_groups(self, scores: Tensor, rollout: Rollout) -> Tensor:
        """Return the advantages [B] of this process's completions, whose groups may reach into other processes."""
        earned = scores
        if isinstance(self.settings, RLOOStage):
            token_kl = kl.kl_k1(rollout.policy_logprobs, rollout.reference_logprobs)
            earned = scores - self.kl_control.coef * (token_kl * rollout.completion_mask).sum(1)
        everyone = torch.tensor(distributed.gather_rows(earned.tolist(), self.accelerator), device=earned.device)
        groups = everyone.view(-1, self.group)
        if isinstance(self.settings, RLOOStage):
            compared = advantages.leave_one_out(groups)
        else:
            compared = advantages.group_normalised(groups)
        return compared.flatten()[self.rows.start : self.rows.stop]

    def _whitened(self, x: Tensor, mask: Tensor, *, center: bool) -> Tensor:
        """Return x whitened by the mean and variance over all processes."""
        return masking.whiten(x, mask, *self._moments(x, mask), center=center)

    def _moments(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the real tokens of all processes."""
        return masking.mean_and_variance(*distributed.total(torch.stack(masking.moments(x, mask)), self.accelerator))

    def _minibatches(self, update: int, epoch: int) -> list[list[int]]:
        """Return the global rows of each minibatch of an epoch."""
        size = self.settings.batch_size
        generator = torch.Generator().manual_seed(derived_seed(*self.seed, "minibatches", update, epoch))
        order = torch.randperm(size, generator=generator).tolist()
        return list(microbatches(order, size // self.settings.minibatches))

    def _mine(self, rows: list[int]) -> list[int]:
        """Return those global rows that are this process's, counted from its first."""
        return [row - self.rows.start for row in rows if row in self.rows]

    def learn(self, update: int, rollout: Rollout, targets: Targets) -> Learned:
        """Take epochs x minibatches optimizer steps on a rollout.

        A minibatch is a set of global rows; its losses are sums over its tokens divided by its token count over all
        processes, so neither the microbatch nor the number of processes changes the step.
        """
        started = time.monotonic()
        settings = self.settings
        factor = learning_rate_factor(settings.schedule, update, settings.updates, settings.warmup_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        lengths = distributed.gather_rows(rollout.completion_mask.sum(1).tolist(), self.accelerator)
        policy_sums = torch.zeros(3, dtype=torch.float64, device=self.shared.device)
        value_sums = torch.zeros(2, dtype=torch.float64, device=self.shared.device)
        ptx_sum = torch.zeros((), dtype=torch.float64, device=self.shared.device)
        gradient_norms, first_ratio_error = [], 0.0
        bar = progress(total=settings.epochs * len(self.rows), desc="  learning, completions")
        for epoch in range(settings.epochs):
            with_value = epoch < self.value_epochs
            for number, minibatch in enumerate(self._minibatches(update, epoch)):
                tokens = sum(lengths[row] for row in minibatch)
                mine = self._mine(minibatch)
                step = (update * settings.epochs + epoch) * settings.minibatches + number
                policy_figures, value_figures, ratio_error, ptx_loss = self._gradients(
                    rollout, mine, targets, tokens, with_value, step
                )
                policy_sums += policy_figures
                value_sums += value_figures
                ptx_sum += ptx_loss
                bar.update(len(mine))
                if epoch == number == 0:
                    first_ratio_error = ratio_error
                gradient_norms.append(self._step(update, with_value))
        bar.close()
        policy_means = distributed.total(policy_sums, self.accelerator) / (settings.epochs * settings.minibatches)
        value_means = distributed.total(value_sums, self.accelerator) / max(1, self.value_epochs * settings.minibatches)
        policy_loss, clip_fraction, approx_kl = policy_means.tolist()
        value_loss, value_clip_fraction = value_means.tolist()
        ptx_mean = distributed.total(ptx_sum, self.accelerator) / (settings.epochs * settings.minibatches)
        return Learned(
            policy_loss,
            value_loss,
            clip_fraction,
            value_clip_fraction,
            approx_kl,
            gradient_norm=math.fsum(gradient_norms) / len(gradient_norms),
            first_ratio_error=distributed.maximum(first_ratio_error, self.accelerator),
            learning_rate=self.optimizer.param_groups[0]["lr"],
            ptx_loss=None if self.ptx is None else float(ptx_mean),
            seconds=time.monotonic() - started,
        )

    def _gradients(
        self, rollout: Rollout, rows: list[int], targets: Targets, tokens: int, with_value: bool, step: int
    ) -> tuple[Tensor, Tensor, float, Tensor]:
        """Make the gradients of this process's rows of a minibatch, and of its share of the texts of optimizer step
        `step`; return what `_learn_from` does, of all of them, and the loss on the texts.
        """

        def in_pieces(size: int) -> tuple[Tensor, Tensor, float, Tensor]:
            begun, self.begun = self.begun, {}  # good for the policy that wrote, and once
            self.gradients.start(self._learning(with_value))
            policy_sums, value_sums = (torch.zeros(n, dtype=torch.float64, device=self.shared.device) for n in (3, 2))
            largest = 0.0
            pieces = of_rollout(self.shared, rollout, rows, size)
            for piece in sorted(pieces, key=lambda piece: tuple(piece) not in begun):  # what is held makes room first
                index = torch.tensor(piece, device=self.shared.device)
                policy_figures, value_figures, ratio_error = self._learn_from(
                    rollout.rows(index), index, targets, tokens, with_value, begun.pop(tuple(piece), None)
                )
                policy_sums += policy_figures
                value_sums += value_figures
                largest = max(largest, ratio_error)
            ptx_loss = torch.zeros((), dtype=torch.float64, device=self.shared.device)
            if self.ptx is not None:
                ptx_loss = self.ptx.add_gradients(POLICY, step, size)
            return policy_sums, value_sums, largest, ptx_loss

        return self.pieces.whole(in_pieces)

    def _learn_from(
        self,
        rollout: Rollout,
        index: Tensor,
        targets: Targets,
        tokens: int,
        with_value: bool,
        begun: PolicyPass | None = None,
    ) -> tuple[Tensor, Tensor, float]:
        """Add a microbatch's part of the minibatch's gradients. begun: the policy's pass, if there has been one.

        Returns its part of the policy's figures [3] and of the value function's [2], and its largest |ratio - 1|.
        """
        settings, mask = self.with_value, rollout.completion_mask
        columns = mask.shape[1]
        advantage, returns = targets.advantages[index, :columns], targets.returns[index, :columns]
        states, logprobs = begun or policy_pass(self.shared, POLICY, rollout, self.settings.temperature)
        losses, clipped = self._policy_losses(logprobs, rollout, advantage)
        per_completion = losses.dim() == 1
        counted, count = mask, float(tokens)
        if per_completion:
            counted = torch.ones_like(losses, dtype=torch.bool)
            count = self.settings.batch_size / self.settings.minibatches
        loss = masking.masked_mean(losses, counted, count)
        with torch.no_grad():
            moved = ppo.approx_kl(logprobs, rollout.policy_logprobs)
            ratio_error = float((torch.exp(logprobs - rollout.policy_logprobs) - 1).abs().max())
            policy_figures = torch.cat(
                [masked_means(counted, count, losses, clipped), masked_means(mask, tokens, moved)]
            )
        if not with_value or settings is None:
            self.shared.backward(POLICY, loss)
            return policy_figures, policy_figures.new_zeros(2), ratio_error
        if settings.value == "adapter":  # it has a graph of its own, for which all of the policy's makes room
            self.shared.backward(POLICY, loss)
            loss, states = torch.zeros_like(loss), torch.empty(0)
            del logprobs, losses, clipped, begun
        values = self.value(rollout, states)
        losses, clipped = ppo.value_loss(values, rollout.values, returns, settings.value_clip)
        loss = loss + settings.value_coef * masking.masked_mean(losses, mask, tokens)
        self.shared.backward(VALUE if settings.value == "adapter" else POLICY, loss)
        return policy_figures, masked_means(mask, tokens, losses, clipped), ratio_error

    def _policy_losses(self, logprobs: Tensor, rollout: Rollout, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses and where the clip made them larger: of each token [M, C], or of each completion [M].

        advantage: [M, C].
        """
        old, mask, clip = rollout.policy_logprobs, rollout.completion_mask, self.settings.clip
        if isinstance(self.settings, RLOOStage):
            return ppo.policy_loss((logprobs * mask).sum(1), (old * mask).sum(1), advantage[:, 0], clip)
        losses, clipped = ppo.policy_loss(logprobs, old, advantage, clip)
        if isinstance(self.settings, GRPOStage):
            losses = losses + self.kl_control.coef * kl.kl_k3(logprobs, rollout.reference_logprobs)
        return losses, clipped

    def _learning(self, with_value: bool) -> dict[str, nn.Parameter]:
        """Return the parameters that learn, by name, with the value function's or without."""
        return {name: p for name, p in self.parameters.items() if with_value or not name.startswith(f"{VALUE}/")}

    def _step(self, update: int, with_value: bool) -> float:
        """Take one optimizer step with the gradients of all processes; return their norm before clipping.

        A step with a gradient that is not finite is not taken if the recipe says so; its norm counts as 0.
        """
        parameters = list(self._learning(with_value).values())
        distributed.add_up_gradients(parameters, self.accelerator)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not norm.isfinite():
            broken = [name for name, p in self.parameters.items() if p.grad is not None and not p.grad.isfinite().all()]
            what = f"the gradient of {', '.join(broken[:3]) or 'all parameters together'}"
            self.skip(self._diverged(what, update))
            self.optimizer.zero_grad(set_to_none=True)
            return 0.0
        torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.max_grad_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    # ------------------------------------------------------------ reporting

    def _require_finite(self, name: str, tensor: Tensor, update: int) -> None:
        """Stop before the update does harm; the last checkpoint stays as it is."""
        if distributed.agree(not bool(tensor.isfinite().all()), self.accelerator):
            raise self._diverged(name, update)

    def _diverged(self, name: str, update: int) -> Diverged:
        folder = self.job.folder / artifacts.CHECKPOINTS
        kept = f" The last good state is kept in {folder}." if folder.is_dir() else ""
        return Diverged(
            f"{self.job.name}: update {update + 1}: {name} is NaN or infinite.{kept} on_nonfinite: skip goes on from "
            "there and leaves such steps out; a lower learning_rate, a higher kl_coef or base.dtype: float32 usually "
            "helps, and starts the stage anew."
        )

    def skip(self, error: Diverged) -> dict[str, float]:
        """Count a step that is not taken because of `error`, and return that as metrics; or raise it.

        Raises: `error`, if the recipe says stop or so many steps have been skipped as it allows.
        """
        if self.settings.on_nonfinite == "stop" or self.skipped == self.settings.max_skipped:
            raise error
        self.skipped += 1
        say(f"{error} It is skipped, {self.skipped} so far.")
        return {f"{self.settings.kind}/skipped_steps": self.skipped}

    def summarise(self, rollout: Rollout, targets: Targets, learned: Learned) -> dict[str, float]:
        """Return the update's metrics, each a mean over the completions or tokens of all processes."""
        mask, size = rollout.completion_mask, self.settings.batch_size
        token_kl = kl.kl_k1(rollout.policy_logprobs, rollout.reference_logprobs)
        lean = self.sampler_logprobs - rollout.policy_logprobs
        per_batch = torch.stack(
            [
                rollout.scores.sum(),
                masking.masked_sum(token_kl, mask),
                masking.masked_sum(kl.kl_k2(rollout.policy_logprobs, rollout.reference_logprobs), mask),
                masking.masked_sum(kl.kl_k3(rollout.policy_logprobs, rollout.reference_logprobs), mask),
                token_kl.double().sum(1).square().sum(),
                masking.masked_sum(lean.abs(), mask),
                masking.masked_sum(lean, mask),
                rollout.ended.sum(),
                mask.sum(),
            ]
        ).double()
        means = (distributed.total(per_batch, self.accelerator) / size).tolist()
        score, kl_k1, kl_k2, kl_k3, squared_kl, gap, lean_sum, ended, length = means
        self._explain_kl(kl_k1, squared_kl, gap / length, lean_sum / length, ended)
        residual, returned = (
            float(self._moments(x, mask)[1]) for x in (targets.returns - rollout.values, targets.returns)
        )
        self.tokens += round(length * size)
        seconds, kind = self.rollout_seconds + learned.seconds, self.settings.kind
        value_figures = {
            "value/explained_variance": statistics.explained_variance(residual, returned),
            "value/clip_fraction": learned.value_clip_fraction,
        }
        doubt = torch.stack(self.ensemble_std).sum() if self.ensemble_std else None
        return {
            "objective/score": score,
            **(
                {}
                if doubt is None
                else {"reward/ensemble_std": float(distributed.total(doubt, self.accelerator)) / size}
            ),
            "objective/kl": kl_k1,
            "objective/kl_k2": kl_k2,
            "objective/kl_k3": kl_k3,
            "objective/kl_coef": self.kl_control.coef,
            f"{kind}/policy_loss": learned.policy_loss,
            **({} if self.with_value is None else {"ppo/value_loss": learned.value_loss}),
            **({} if learned.ptx_loss is None else {f"{kind}/ptx_loss": learned.ptx_loss}),
            f"{kind}/clip_fraction": learned.clip_fraction,
            f"{kind}/approx_kl": learned.approx_kl,
            f"{kind}/first_ratio_error": learned.first_ratio_error,
            f"{kind}/gradient_norm": learned.gradient_norm,
            f"{kind}/learning_rate": learned.learning_rate,
            **({} if self.with_value is None else value_figures),
            "rollout/ended_fraction": ended,
            "rollout/length": length,
            "rollout/logprob_gap": gap / length,
            **({f"{kind}/skipped_steps": self.skipped} if self.skipped else {}),
            "time/rollout_s": self.rollout_seconds,
            "time/scoring_s": self.scoring_seconds,
            "time/update_s": learned.seconds,
            "throughput/completions_per_s": size / seconds,
            "memory/peak_bytes": distributed.maximum(peak_bytes(), self.accelerator),
        }

    def _explain_kl(self, mean: float, mean_square: float, gap: float, lean: float, ended: float) -> None:
        """Say once, if the KL is negative beyond chance, what is likely the cause."""
        error = math.sqrt(max(0.0, mean_square - mean * mean) / self.settings.batch_size)
        train_mode = any(module.training for module in self.shared.causal.modules())
        seen = kl_doctor.Symptoms(mean, error, gap, lean, train_mode, ended)
        cause = kl_doctor.diagnose(seen, self.job.recipe.base.dtype)
        if cause is not None and not self.kl_was_explained:
            self.kl_was_explained = True
            say(f"{self.job.name}: {cause}")

    def keep_samples(self, update: int, rollout: Rollout, written: Written) -> None:
        """Append some of the update's completions to `samples.jsonl` when samples are due."""
        last = update + 1 == self.settings.updates or self.over
        if not self.accelerator.is_main_process or (update % self.settings.samples_every and not last):
            return
        token_kl = kl.kl_k1(rollout.policy_logprobs, rollout.reference_logprobs).sum(1)
        samples: list[dict[str, Any]] = [
            {
                "step": update + 1,
                "prompt": written.prompts[row],
                "completion": written.texts[row],
                "score": float(rollout.scores[row]),
                "kl": float(token_kl[row]),
                "length": int(rollout.completion_mask[row].sum()),
                "ended": bool(rollout.ended[row]),
            }
            for row in range(min(SAMPLES, len(written.texts)))
        ]
        artifacts.append_lines(self.samples, samples)
        track_samples(self.accelerator, samples, update + 1)


def masked_means(mask: Tensor, count: float, *figures: Tensor) -> Tensor:
    """Return the means over `count` real tokens (or completions) of each of the figures, without gradients, float64."""
    return torch.stack([masking.masked_mean(figure.detach().float(), mask, count) for figure in figures]).double()
