"""Held-out prompts that the policy answers while it is trained, so that a run shows where it goes before it is there.

Each look is at the same prompts with the same random numbers, whatever the update: what differs between two looks is
the policy. The scores are those that it is trained on; gold scores, where there is a gold scorer, are by something that
it is not trained on, which is what its score is worth believing against.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf_kit import distributed
from rlhf_kit.collate import TextFormat
from rlhf_kit.errors import Diverged, InputError
from rlhf_kit.examples.rows import Prompt
from rlhf_kit.generation import seed_generators, uniforms
from rlhf_kit.guard import Guard, Look
from rlhf_kit.maths import diversity, kl
from rlhf_kit.metrics import say
from rlhf_kit.models import SharedBase
from rlhf_kit.pieces import Pieces
from rlhf_kit.recipe import Guard as GuardSettings
from rlhf_kit.rollout import sampled, scored_by_models, scores_of
from rlhf_kit.scorers import Scorer, Written, unpadded
from rlhf_kit.values import no_values


class Watch:
    """The held-out prompts, what judges the answers, the looks so far, and the best policy among them."""

    def __init__(
        self,
        shared: SharedBase,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[Sequence[int]],
        *,
        name: str,
        seed: tuple[object, ...],
        every: int,
        new_tokens: int,
        temperature: float,
        text_format: TextFormat,
        scorer: Scorer,
        unit: tuple[float, float],
        gold: Scorer | None,
        gold_unit: tuple[float, float],
        guard: GuardSettings | None,
        microbatch: Pieces,
        accelerator: Accelerator,
    ) -> None:
        """name: the stage's. unit, gold_unit: mean and standard deviation that raw scores are normalised by.

        microbatch: how many completions are read at a time.
        """
        self.shared, self.prompts, self.prompt_ids = shared, prompts, prompt_ids
        self.name, self.seed, self.every, self.temperature = name, seed, every, temperature
        self.format, self.accelerator, self.microbatch = text_format, accelerator, microbatch
        self.scorer, self.unit, self.gold, self.gold_unit = scorer, unit, gold, gold_unit
        self.rows = distributed.share(len(prompts), accelerator)
        self.at_once = Pieces(f"stages.{name}.watch.count", len(self.rows), "completions at a time", accelerator)
        self.uniform = uniforms(self.rows, len(prompts), new_tokens, *seed, "watch")
        self.guard = Guard(guard) if guard is not None else None
        self.history: list[dict[str, float]] = []
        """The figures of every look."""
        self.best: dict[str, Tensor] = {}
        """The trainable parameters where the guard would go back to: of the policy, and of its value function."""

    # ------------------------------------------------------------ looking

    def is_due(self, done: int, last: int) -> bool:
        """Return whether to look after `done` updates of `last`."""
        return done % self.every == 0 or done == last

    @torch.no_grad()
    def look(self, policy: str, reference: str, done: int) -> dict[str, float]:
        """Return the metrics of the policy after `done` updates, and let the guard judge it.

        Raises:
            Diverged: a score or a log-probability is not finite.
            InputError: a gold score is not finite.
        """
        seed_generators(*self.seed, "watch", done, self.accelerator.process_index)  # for scorers that draw numbers
        rows = distributed.gather_rows(self._answers(policy, reference), self.accelerator)
        self._require_finite(rows, done)
        column = {name: [row[name] for row in rows] for name in rows[0]}
        look = Look(done, column["score"], column["kl"], column["length"], column.get("gold"))
        self.history.append(look.figures())
        tokens = [ids[:-1] if ended else ids for ids, ended in zip(column["ids"], column["ended"], strict=True)]
        return {
            "heldout/score": fmean(look.score),
            **({} if look.gold is None else {"heldout/gold": fmean(look.gold)}),
            "heldout/kl": fmean(look.kl),
            "heldout/length": fmean(look.length),
            "heldout/ended_fraction": fmean(column["ended"]),
            "heldout/repetition": fmean(map(diversity.repetition, tokens)),
            "heldout/distinct_1": diversity.distinct(tokens, 1),
            "heldout/distinct_2": diversity.distinct(tokens, 2),
            "heldout/reference_perplexity": math.exp(-math.fsum(column["reference"]) / math.fsum(look.length)),
            **self._judged(look),
        }

    def _answers(self, policy: str, reference: str) -> list[dict[str, Any]]:
        """Return what the policy wrote for this process's prompts, and its figures, a row each."""
        rollout, written = sampled(
            self.shared,
            policy,
            [self.prompts[row] for row in self.rows],
            [self.prompt_ids[row] for row in self.rows],
            self.uniform,
            self.format,
            self.temperature,
            self.at_once,
        )
        logprobs, _ = self.microbatch.whole(
            lambda size: scored_by_models(
                self.shared,
                rollout,
                policy=policy,
                reference=reference,
                value=no_values,
                temperature=self.temperature,
                microbatch=size,
            )
        )
        judges = {"score": (self.scorer, self.unit)} | ({"gold": (self.gold, self.gold_unit)} if self.gold else {})
        columns: dict[str, list[Any]] = {
            name: self._scores(scorer, unit, written) for name, (scorer, unit) in judges.items()
        }
        columns["kl"] = kl.kl_k1(logprobs["policy_logprobs"], logprobs["reference_logprobs"]).double().sum(1).tolist()
        columns["reference"] = logprobs["reference_logprobs"].double().sum(1).tolist()
        columns["length"] = rollout.completion_mask.sum(1).double().tolist()
        columns["ended"] = rollout.ended.tolist()
        pairs = zip(rollout.completion_ids, rollout.completion_mask, strict=True)
        columns["ids"] = [ids[mask].tolist() for ids, mask in pairs]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _scores(self, scorer: Scorer, unit: tuple[float, float], written: Written) -> list[float]:
        mean, std = unit
        scores = self.microbatch.whole(lambda size: scores_of(scorer, written, size, unpadded=unpadded(scorer)))
        return ((scores.double() - mean) / std).tolist()

    def _require_finite(self, rows: Sequence[Mapping[str, Any]], done: int) -> None:
        for row in rows:
            if not all(map(math.isfinite, (row["score"], row["kl"], row["reference"]))):
                raise Diverged(f"{self.name}: a held-out score or KL after update {done} is NaN or infinite.")
            if not math.isfinite(row.get("gold", 0.0)):
                raise InputError(
                    f"stages.{self.name}.watch.gold: a held-out completion after update {done} has a score that is NaN "
                    "or infinite; mend the scorer."
                )

    # ------------------------------------------------------------ the guard

    def _judged(self, look: Look) -> dict[str, float]:
        """Let the guard, if any, judge a look; keep the policy if it is the best so far, and say so if it acts."""
        guard = self.guard
        if guard is None:
            return {}
        before = guard.acted
        figures = guard.judge(look)
        if guard.is_best(look) and guard.settings.action == "rollback":
            parameters = self.shared.trainable()
            self.best = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        if guard.acted is not None and before is None:
            then = {
                "warn": "the run goes on (guard.action: warn)",
                "stop": "the stage ends with the policy of this update",
                "rollback": f"the stage ends with the policy of update {guard.best['update']:.0f}, the best watched",
            }
            say(f"{self.name}: guard: update {look.update}: {guard.acted['why']}; {then[guard.settings.action]}")
        return figures

    @property
    def over(self) -> bool:
        """Whether the guard ends the stage."""
        return self.guard is not None and self.guard.over

    def outcome(self) -> dict[str, Any]:
        """Return for the manifest which update's policy is kept and why, and the figures of every look."""
        acted = self.guard.acted if self.guard else None
        rolls_back = self.over and self.guard is not None and self.guard.settings.action == "rollback"
        kept = self.guard.best["update"] if rolls_back and self.guard else self.history[-1]["update"]
        if acted is None:
            why = "the last: the guard did not act" if self.guard else "the last: there is no guard"
        elif rolls_back:
            by = "gold" if "gold" in self.history[0] else "score"
            why = f"the best watched by {by}, within KL budget and length; {acted['why']}"
        elif self.over:
            why = f"where the guard stopped: {acted['why']}"
        else:
            why = f"the last: the guard only warned: {acted['why']}"
        return {"kept_update": kept, "why": why, "acted": acted, "looks": self.history}

    def put_back_best(self) -> None:
        """Make policy and value function those of the best look, if the guard ended the stage and is to roll back."""
        if self.over and self.guard is not None and self.guard.settings.action == "rollback":
            with torch.no_grad():
                for name, parameter in self.shared.trainable().items():
                    parameter.copy_(self.best[name])

    # ------------------------------------------------------------ checkpoints

    def state(self) -> dict[str, Any]:
        """Return what `load` needs, for JSON; `tensors` has the rest."""
        return {"history": self.history, "guard": self.guard and self.guard.state(), "at_once": self.at_once.size}

    def tensors(self) -> dict[str, Tensor]:
        """Return the parameters of the best look, as "best/<name>"."""
        return {f"best/{name}": tensor for name, tensor in self.best.items()}

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint's state and tensors."""
        self.history = list(state["history"])
        self.at_once.size = min(self.at_once.size, state["at_once"])
        if self.guard is not None:
            self.guard.load(state["guard"])
        best = {name.removeprefix("best/"): tensor for name, tensor in tensors.items() if name.startswith("best/")}
        self.best = {name: tensor.to(self.shared.device) for name, tensor in best.items()}
