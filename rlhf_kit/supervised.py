"""trl's `SFTTrainer` at work for us; the loss is the mean over a step's completion tokens, in nats.

Rows reach the trainer as tokens with labels (collate.py), so trl prepares, packs and cuts nothing. Order of rows,
optimizer and checkpoints are ours (training.py), and so is the folder that a stage leaves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from rlhf_kit.collate import IGNORED, TextFormat, right_pad
from rlhf_kit.training import Training, Watched, batches_of_like_length


def attach_trainer(training: Training, text_format: TextFormat) -> None:
    """Give a training trl's trainer, whose rows are {"input_ids", "labels"}."""
    trainer = Trainer(
        model=training.model,
        args=training.arguments(SFTConfig, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}),
        data_collator=lambda rows: {"rows": rows},
        train_dataset=training.dataset(),
        processing_class=text_format.tokenizer,
    )
    trainer.pad_id = text_format.pad_id
    training.attach(trainer)


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
