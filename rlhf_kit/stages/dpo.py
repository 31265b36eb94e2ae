"""Direct preference optimization: a policy that learns from preferences as if it were their reward model; and KTO.

The score of a completion is kl_coef times the policy's log-ratio to the reference, and pairs of scores are learnt from
as a reward stage does, rankings, ties and margins included (maths/preference.py). The reference is the policy that the
stage starts from.

Of trl's `DPOTrainer` three things are used: the frozen copy "ref" of the adapter on the same base, the way to
log-probabilities that never holds all logits, and what it is itself built on. Its loss takes pairs alone and gathers
its metrics from all processes within a microbatch, where a process whose memory ran out would leave the others waiting;
tests/invariants/test_dpo.py holds ours to be the same. Neither base nor adapter has dropout, as in trl.

KTO does the same with completions one by one: those that won more pairs than they lost are desirable, those that lost
more undesirable. The KL that they are compared with is measured at every step, on each prompt with the best completion
of the prompt behind it in the data; trl pairs them within a microbatch, whose size would change the step then.

Sources: Rafailov et al. 2023 (arXiv 2305.18290), equation 7; the margin as in Amini et al. 2024 (arXiv 2402.10571),
equation 3; Ethayarajh et al. 2024 (arXiv 2402.01306), equation 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer

from rlhf_kit import distributed, token_cache
from rlhf_kit.batches import Comparisons
from rlhf_kit.collate import IGNORED, compare, right_pad, tokenise_comparisons, tokens_of_group, within_budget
from rlhf_kit.generation import derived_seed
from rlhf_kit.maths import preference
from rlhf_kit.metrics import MetricLog, progress, say
from rlhf_kit.models import add_adapter, context_length, load_base, save_adapter
from rlhf_kit.pieces import Pieces
from rlhf_kit.recipe import DPOStage, KTOStage
from rlhf_kit.stages import Job, Outcome, data_read
from rlhf_kit.training import Training, Watched, evaluating, without_dropout

POLICY, REFERENCE = "default", "ref"  # adapters, as trl names them


def run(job: Job) -> Outcome:
    """Tune an adapter on preferences; `adapter/` is the result."""
    settings, base = job.settings, job.recipe.base
    assert isinstance(settings, DPOStage | KTOStage)
    examples = job.examples[settings.data]
    limit = settings.max_length or context_length(base)
    how = (job.text_format, limit, settings.truncate)
    ties = settings.ties if isinstance(settings, DPOStage) else "drop"
    groups = token_cache.tokenised(tokenise_comparisons, examples.train, *how, ties)
    say(f"{job.name}: {groups}")
    heldout = None
    if examples.heldout:
        heldout = token_cache.tokenised(tokenise_comparisons, examples.heldout, *how, ties)
    most = max(map(tokens_of_group, groups.rows))

    causal = load_base(base, job.text_format, job.accelerator)
    without_dropout(causal)
    model = add_adapter(
        causal,
        job.recipe.adapter.model_copy(update={"dropout": 0.0}),
        "CAUSAL_LM",
        init=job.adapter(settings.policy),
        seed=derived_seed(job.recipe.seed, job.name, "adapter"),
        base=base,
    )
    log = MetricLog(job.folder / "metrics.jsonl", enabled=job.accelerator.is_main_process, accelerator=job.accelerator)
    training = Training(
        model,
        groups.rows if isinstance(settings, DPOStage) else with_mismatched(groups.rows, limit),
        settings,
        name=job.name,
        seed=job.recipe.seed,
        folder=job.folder,
        accelerator=job.accelerator,
        stop=lambda: job.stop.requested,
        log=log,
        pieces=Pieces(
            f"stages.{job.name}.microbatch", settings.microbatch * most, "tokens", job.accelerator, least=most
        ),
    )
    start = {name: p.detach().clone() for name, p in training.parameters.items()}
    kind: Callable[..., Trainer] = Trainer if isinstance(settings, DPOStage) else KTO
    trainer = kind(
        model=model,
        args=training.arguments(DPOConfig, max_length=None),
        data_collator=lambda rows: {"rows": rows},
        train_dataset=training.dataset(),
        processing_class=job.text_format.tokenizer,
    )
    trainer.settings, trainer.pad_id = settings, job.text_format.pad_id
    freeze_reference(model, start)
    training.attach(trainer, trainer.figures)
    training.run()
    metrics: dict[str, float] = {}
    if heldout:
        with job.stop.nothing_to_lose(job.accelerator):
            metrics = trainer.heldout_figures(heldout.rows, f"{job.name}: held-out preferences")
        log.log(training.steps, metrics)
    if job.accelerator.is_main_process:
        save_adapter(model, job.folder / "adapter", base)
    return Outcome(
        metrics=metrics,
        data=data_read(examples, groups, heldout),
        extra={"steps": training.steps, "tokens": training.tokens(tokens_of_group)},
    )


def freeze_reference(model: PeftModel, start: Mapping[str, Tensor]) -> None:
    """Give the reference the weights that the policy starts from; trl has rounded them where the base is quantised."""
    policy, reference = f".{POLICY}.", f".{REFERENCE}."
    for name, parameter in model.named_parameters():
        if reference in name:
            parameter.data = start[name.replace(reference, policy)].clone()
            parameter.requires_grad_(False)


class Trainer(Watched, DPOTrainer):
    """trl's, with its reference and its way to log-probabilities, and our loss; no prompt's completions are divided."""

    settings: DPOStage | KTOStage
    pad_id: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[Tensor] = []
        """[right, score difference, untied pairs] summed over each microbatch of the step."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        """Nothing is to be prepared: rows come as tokens."""
        return dataset

    def tokens(self, rows: Sequence[Mapping[str, Any]]) -> int:
        return sum(len(ids) - row["prompt_tokens"] for row in rows for ids in row["completions"])

    def microbatches(self, rows: Sequence[Mapping[str, Any]], size: int) -> Iterator[Comparisons]:
        for index in within_budget([tokens_of_group(row) for row in rows], size):
            yield compare([rows[row] for row in index], self.pad_id, learn_all=True).to(self.model.device)

    def part(self, microbatch: Comparisons, tokens: Tensor) -> Tensor:
        losses, figures = self.pairs(microbatch)
        self.seen.append(figures)
        return (preference.pair_weights(microbatch.prompt) * losses).sum() / self.settings.batch_size

    def pairs(self, microbatch: Comparisons) -> tuple[Tensor, Tensor]:
        """Return the loss of each pair, and right, score difference and number summed over the untied ones."""
        scores = self.scores(microbatch)
        chosen, rejected = scores[microbatch.chosen], scores[microbatch.rejected]
        smoothing = self.settings.label_smoothing if isinstance(self.settings, DPOStage) else 0.0
        probability = preference.smoothed(microbatch.probability, smoothing)
        losses = preference.soft_bradley_terry_loss(chosen, rejected, probability, microbatch.margin)
        return losses, self.compared(scores.detach(), microbatch)

    def compared(self, scores: Tensor, microbatch: Comparisons) -> Tensor:
        """Return right, score difference and number summed over the untied pairs, given the scores [N]."""
        untied = microbatch.probability != 0.5
        difference = (scores[microbatch.chosen] - scores[microbatch.rejected])[untied].double()
        right = (difference > 0).double() + (difference == 0).double() / 2
        return torch.stack([right.sum(), difference.sum(), untied.sum().double()])

    def scores(self, microbatch: Comparisons) -> Tensor:
        """Return the score [N] of each completion: kl_coef times the policy's log-ratio to the reference."""
        passes = zip(microbatch.ids, microbatch.mask, microbatch.learnt, strict=True)
        return self.settings.kl_coef * torch.cat([self.log_ratios(*one) for one in passes])

    def log_ratios(self, ids: Tensor, mask: Tensor, learnt: Tensor) -> Tensor:
        """Return the log-ratio [n] of policy to reference of completions, the tokens marked by `learnt`, in nats."""
        with torch.no_grad(), self.reference():
            before = self.logprobs(ids, mask, learnt)
        return self.logprobs(ids, mask, learnt) - before

    def logprobs(self, ids: Tensor, mask: Tensor, learnt: Tensor) -> Tensor:
        """Return the log-probability [n] of completions, in nats."""
        labels = ids.masked_fill(~learnt, IGNORED)
        output = self.model(input_ids=ids, attention_mask=mask.long(), labels=labels, fused_lm_head=True)
        return output.log_probs.sum(1)  # 0 where there is no label

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Run the block with the reference in the policy's place."""
        self.model.set_adapter(REFERENCE, inference_mode=True)
        try:
            yield
        finally:
            self.model.set_adapter(POLICY)

    def _gradients(self, rows: Sequence[Mapping[str, Any]], size: int, tokens: Tensor) -> Tensor:
        self.seen.clear()  # of pieces that ran out of memory
        return super()._gradients(rows, size, tokens)

    def figures(self) -> dict[str, float]:
        """Return accuracy and mean score difference over the untied pairs of the step, in all processes."""
        right, margin, pairs = distributed.total(torch.stack(self.seen).sum(0), self.accelerator).tolist()
        self.seen.clear()
        kind = self.settings.kind
        return {f"{kind}/accuracy": right / pairs, f"{kind}/margin": margin / pairs} if pairs else {}

    def heldout_figures(self, rows: Sequence[Mapping[str, Any]], desc: str) -> dict[str, float]:
        """Return loss and accuracy over the pairs of all prompts, each read by some process."""
        mine = [rows[row] for row in distributed.share(len(rows), self.accelerator)]

        def sums(size: int) -> Tensor:
            found = torch.zeros(4, dtype=torch.float64, device=self.accelerator.device)
            for microbatch in progress(list(self.microbatches(mine, size)), desc=desc):
                losses, figures = self.pairs(microbatch)
                loss = (preference.pair_weights(microbatch.prompt) * losses).sum().double()
                found += torch.cat([loss.unsqueeze(0), figures])
            return found

        with evaluating(self.model):
            found = distributed.total(self.training.pieces.whole(sums), self.accelerator)
        loss, right, _, pairs = found.tolist()
        kind = self.settings.kind
        return {
            **({"dpo/heldout_loss": loss / len(rows)} if kind == "dpo" else {}),
            **({f"{kind}/heldout_accuracy": right / pairs} if pairs else {}),
        }


def with_mismatched(groups: Sequence[Mapping[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    """Return the prompts with what KTO measures its KL on: "mismatched", the tokens of the prompt and of the best
    completion of the prompt behind it, cut to the limit.
    """
    found = []
    for number, group in enumerate(groups):
        other = groups[(number + 1) % len(groups)]
        asked = group["completions"][0][: group["prompt_tokens"]]
        answer = other["completions"][other["best"]][other["prompt_tokens"] :]
        found.append({**group, "mismatched": (asked + answer)[:limit]})
    return found


class KTO(Trainer):
    """The same with another loss, on completions one by one."""

    settings: KTOStage
    kl: Tensor
    """Of the step at work, over all processes, in nats."""

    def tokens(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Return how many completions of these rows count, by which the step's loss is divided."""
        return sum(len([won for won in balance(row) if won]) for row in rows)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        self.model.train()
        total = self.training.pieces.whole(lambda size: self._mismatched_log_ratios(inputs["rows"], size))
        mean = distributed.total(total, self.accelerator) / self.settings.batch_size
        self.kl = mean.clamp(min=0).float()
        return super().training_step(model, inputs, num_items_in_batch)

    @torch.no_grad()
    def _mismatched_log_ratios(self, rows: Sequence[Mapping[str, Any]], size: int) -> Tensor:
        found = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for index in within_budget([len(row["mismatched"]) for row in rows], size):
            ids, mask = right_pad([rows[row]["mismatched"] for row in index], self.pad_id)
            first = torch.tensor([rows[row]["prompt_tokens"] for row in index]).unsqueeze(1)
            learnt = mask & (torch.arange(ids.shape[1]) >= first)
            found += self.log_ratios(*(tensor.to(self.model.device) for tensor in (ids, mask, learnt))).double().sum()
        return found

    def part(self, microbatch: Comparisons, tokens: Tensor) -> Tensor:
        settings, scores = self.settings, self.scores(microbatch)
        count = len(scores)
        won = torch.bincount(microbatch.chosen, minlength=count) - torch.bincount(microbatch.rejected, minlength=count)
        desirable = won > 0
        losses = preference.kto_loss(scores / settings.kl_coef, desirable, self.kl, settings.kl_coef)
        weights = torch.where(desirable, settings.desirable_weight, settings.undesirable_weight) * (won != 0)
        self.seen.append(self.compared(scores.detach(), microbatch))
        return (weights * losses).sum() / tokens

    def figures(self) -> dict[str, float]:
        """Return accuracy and mean score difference over the pairs of the step, in all processes, and its KL."""
        return {**super().figures(), "kto/kl": float(self.kl)}


def balance(group: Mapping[str, Any]) -> list[int]:
    """Return how many more of its prompt's pairs each completion won than lost."""
    won = [0] * len(group["completions"])
    for chosen, rejected in zip(group["chosen"], group["rejected"], strict=True):
        won[chosen] += 1
        won[rejected] -= 1
    return won
