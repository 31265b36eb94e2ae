"""Supervised finetuning through trl's `SFTTrainer` (supervised.py), and the loss on held-out rows before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from rlhf_kit import distributed
from rlhf_kit.collate import tokenise_demonstrations
from rlhf_kit.generation import derived_seed
from rlhf_kit.metrics import MetricLog, progress, say
from rlhf_kit.models import add_adapter, context_length, load_base, save_adapter
from rlhf_kit.pieces import Pieces
from rlhf_kit.recipe import SFTStage
from rlhf_kit.stages import Job, Outcome, data_read
from rlhf_kit.supervised import attach_trainer, padded
from rlhf_kit.token_cache import tokenised
from rlhf_kit.training import Training, batches_of_like_length, evaluating, without_dropout

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
    attach_trainer(training, job.text_format)

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
        data=data_read(examples, rows, heldout),
        extra={"steps": training.steps, "tokens": training.tokens(lambda row: len(row["input_ids"]))},
    )


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
