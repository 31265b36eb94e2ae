"""Supervised finetuning through trl's `SFTTrainer`; the loss is the mean over a batch's completion tokens, in nats.

Rows reach the trainer as tokens with labels (collate.py), so trl prepares, packs and cuts nothing. Order of rows,
optimizer and checkpoints are ours (training.py), and so is the folder that the stage leaves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from rlhf_kit import distributed
from rlhf_kit.collate import IGNORED, right_pad, tokenise_demonstrations
from rlhf_kit.generation import derived_seed
from rlhf_kit.metrics import MetricLog, progress, say
from rlhf_kit.models import add_adapter, context_length, load_base, save_adapter
from rlhf_kit.pieces import Pieces
from rlhf_kit.recipe import SFTStage
from rlhf_kit.stages import Job, Outcome
from rlhf_kit.token_cache import tokenised
from rlhf_kit.training import Training, Watched, batches_of_like_length, evaluating, without_dropout

HELDOUT = 1024
"""Held-out rows at most, taken at random, that the loss is measured on."""


def run(job: Job) -> Outcome:
    """Tune an adapter on demonstrations or texts; `adapter/` is the result."""
    settings, base = job.settings, job.recipe.base
    assert isinstance(settings, SFTStage)
    examples = job.examples[settings.data]
    limit = settings.max_length or context_length(base)
    rows = tokenised(tokenise_demonstrations, examples.train, job.text_format, limit, settings.truncate)
    say(f"{job.name}: {rows}")
    heldout = None
    if examples.heldout:
        heldout = tokenised(tokenise_demonstrations, examples.heldout, job.text_format, limit, settings.truncate)

    causal = load_base(base, job.text_format, job.accelerator)
    without_dropout(causal)
    model = add_adapter(
        causal,
        job.recipe.adapter,
        "CAUSAL_LM",
        init=job.adapter(settings.init) if settings.init else None,
        seed=derived_seed(job.recipe.seed, job.name, "adapter"),
        base=base,
    )
    log = MetricLog(job.folder / "metrics.jsonl", enabled=job.accelerator.is_main_process, accelerator=job.accelerator)
    training = Training(
        model,
        rows.rows,
        settings,
        name=job.name,
        seed=job.recipe.seed,
        folder=job.folder,
        accelerator=job.accelerator,
        stop=lambda: job.stop.requested,
        log=log,
        pieces=Pieces(f"stages.{job.name}.microbatch", settings.microbatch, "rows", job.accelerator),
    )
    trainer = Trainer(
        model=model,
        args=training.arguments(SFTConfig, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}),
        data_collator=lambda rows: {"rows": rows},
        train_dataset=training.dataset(),
        processing_class=job.text_format.tokenizer,
    )
    trainer.pad_id = job.text_format.pad_id
    training.attach(trainer)

    def loss_on_heldout() -> float:
        assert heldout is not None
        generator = torch.Generator().manual_seed(derived_seed(job.recipe.seed, job.name, "heldout"))
        picked = torch.randperm(len(heldout.rows), generator=generator)[:HELDOUT].tolist()
        return heldout_loss(job, model, [heldout.rows[row] for row in picked], training.pieces)

    if heldout and not training.first:
        training.carried["sft/heldout_loss_before"] = loss_on_heldout()
        log.log(0, {"sft/heldout_loss": training.carried["sft/heldout_loss_before"]})
    training.run()
    metrics = dict(training.carried)
    if heldout:
        with job.stop.nothing_to_lose(job.accelerator):
            metrics["sft/heldout_loss"] = loss_on_heldout()
        log.log(training.steps, {"sft/heldout_loss": metrics["sft/heldout_loss"]})
    if job.accelerator.is_main_process:
        save_adapter(model, job.folder / "adapter", base)
    return Outcome(
        metrics=metrics,
        data={
            "train": {
                "card": examples.card.name,
                "rows": len(rows.rows),
                "content_hash": examples.content_hash,
                "read": examples.counts,
                "tokenised": rows.counts,
            },
            "heldout": {"rows": len(heldout.rows), "tokenised": heldout.counts} if heldout else {"rows": 0},
        },
        extra={"steps": training.steps, "tokens": training.tokens(lambda row: len(row["input_ids"]))},
    )


class Trainer(Watched, SFTTrainer):
    """trl's, with its way to log-probabilities that never holds all logits [B, T, V]."""

    pad_id: int

    def tokens(self, rows: Sequence[Mapping[str, Any]]) -> int:
        return sum(label != IGNORED for row in rows for label in row["labels"][1:])

    def microbatches(self, rows: Sequence[Mapping[str, Any]], size: int) -> Iterator[dict[str, Tensor]]:
        for index in batches_of_like_length([len(row["input_ids"]) for row in rows], size):
            yield padded([rows[row] for row in index], self.pad_id, self.model.device)

    def part(self, microbatch: dict[str, Tensor], tokens: Tensor) -> Tensor:
        return -self.model(**microbatch, fused_lm_head=True).log_probs.sum() / tokens  # 0 where there is no label


def padded(rows: Sequence[Mapping[str, Any]], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """Return a batch of rows as the model takes it: ids, mask and labels, each [B, T], right-padded."""
    ids, mask = right_pad([row["input_ids"] for row in rows], pad_id)
    labels, _ = right_pad([row["labels"] for row in rows], IGNORED)
    return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device), "labels": labels.to(device)}


def heldout_loss(job: Job, model: PeftModel, rows: Sequence[Mapping[str, Any]], pieces: Pieces) -> float:
    """Return the mean loss over all completion tokens of the rows, in nats, each row read once by some process."""
    accelerator = job.accelerator
    mine = [rows[row] for row in distributed.share(len(rows), accelerator)]

    def sums(size: int) -> Tensor:
        found = torch.zeros(2, dtype=torch.float64)
        batches = batches_of_like_length([len(row["input_ids"]) for row in mine], size)
        for index in progress(batches, desc=f"{job.name}: held-out loss"):
            batch = padded([mine[row] for row in index], job.text_format.pad_id, model.device)
            output = model(**batch, fused_lm_head=True)
            found -= torch.tensor([output.log_probs.double().sum().item(), -output.label_mask.sum().item()])
        return found

    with evaluating(model):
        loss, tokens = distributed.total(pieces.whole(sums).to(accelerator.device), accelerator).tolist()
    return loss / tokens
