"""A reward model from pairwise preferences, through trl's `RewardTrainer`, as a standard `SEQ_CLS` adapter.

The score is read at the last real token, found from the mask (models.classifier), and the loss is Bradley and Terry's
(maths/preference.py). Trained in train mode, scored in eval mode only: with 8-bit weights the two compute different
numbers, and PPO scores in eval mode.

At its end the stage measures what others rely on: held-out accuracy; mean and standard deviation of the scores of
demonstrations, which become 0 and 1 in PPO (InstructGPT's zero point); and a probe, the scores of a few sequences for
every later user of the adapter to compare with. The adapter is read back from its folder and must score the probe the
same.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from trl import RewardConfig, RewardTrainer

from rlhf_kit import distributed
from rlhf_kit.collate import right_pad, tokenise_demonstrations, tokenise_pairs
from rlhf_kit.errors import InputError
from rlhf_kit.examples import Demonstration, Preference
from rlhf_kit.generation import derived_seed
from rlhf_kit.maths.preference import bradley_terry_loss, centering_penalty
from rlhf_kit.maths.statistics import wilson_interval
from rlhf_kit.metrics import MetricLog, progress, say
from rlhf_kit.models import (
    add_adapter,
    classifier,
    context_length,
    load_base,
    open_adapter,
    save_adapter,
    sequence_scores,
)
from rlhf_kit.recipe import RewardStage, SFTStage
from rlhf_kit.stages import Job, Outcome
from rlhf_kit.training import Training, Watched, batches_of_like_length, evaluating, without_dropout

NORMALISED_ON = 512
"""Demonstrations at most whose scores set the zero and the unit: standard error of the zero below 5 % of the unit."""
PROBE = 8


def run(job: Job) -> Outcome:
    """Tune an adapter and a score head on pairs; `adapter/` is the result."""
    settings, base, text_format = job.settings, job.recipe.base, job.text_format
    assert isinstance(settings, RewardStage)
    examples = job.examples[settings.data]
    limit = settings.max_length or context_length(base)
    pairs = tokenise_pairs(examples.train, text_format, limit, settings.truncate)
    say(f"{job.name}: {pairs}")
    heldout = tokenise_pairs(examples.heldout, text_format, limit, settings.truncate) if examples.heldout else None
    reference = reference_rows(job, limit)

    model = new_reward_model(job)
    log = MetricLog(job.folder / "metrics.jsonl", enabled=job.accelerator.is_main_process, accelerator=job.accelerator)
    training = Training(
        model,
        pairs.rows,
        settings,
        name=job.name,
        seed=job.recipe.seed,
        folder=job.folder,
        accelerator=job.accelerator,
        stop=lambda: job.stop.requested,
        log=log,
    )
    dataset = training.dataset()
    trainer = Trainer(
        model=model,
        args=training.arguments(RewardConfig, max_length=None, disable_dropout=False),
        data_collator=collator(text_format.pad_id),
        train_dataset=dataset,
        processing_class=text_format.tokenizer,
    )
    left = len(cast(Dataset, trainer.train_dataset))
    if left != len(dataset):
        raise RuntimeError(f"{job.name}: trl dropped {len(dataset) - left} pairs")
    trainer.centre = settings.center_coef
    training.attach(trainer, trainer.figures)
    training.run()

    metrics: dict[str, float] = {}
    extra: dict[str, Any] = {}
    if heldout:
        extra["heldout"] = heldout_accuracy(job, model, heldout.rows)
        metrics["reward/heldout_accuracy"] = extra["heldout"]["accuracy"]
        log.log(training.steps, metrics)
    extra["score_normalisation"] = score_unit(job, model, reference)
    sequences = (heldout or pairs).rows[: PROBE // 2]
    probe = [ids for pair in sequences for ids in (pair["chosen_ids"], pair["rejected_ids"])]
    extra["probe"] = [{"ids": ids, "score": score_alone(model, ids)} for ids in probe]
    if job.accelerator.is_main_process:
        save_adapter(model, job.folder / "adapter", base)
    job.accelerator.wait_for_everyone()
    del model, trainer, training.model, training.trainer
    gc.collect()  # a trainer refers to itself; two bases need not fit into memory
    check_saved(job, extra["probe"])
    return Outcome(
        metrics=metrics,
        data={
            "train": {
                "card": examples.card.name,
                "rows": len(pairs.rows),
                "content_hash": examples.content_hash,
                "read": examples.counts,
                "tokenised": pairs.counts,
            },
            "heldout": {"rows": len(heldout.rows), "tokenised": heldout.counts} if heldout else {"rows": 0},
        },
        extra={"steps": training.steps, "tokens": training.tokens("chosen_ids", "rejected_ids"), **extra},
    )


def new_reward_model(job: Job) -> PeftModel:
    """Return the recipe's base as a classifier with a new adapter and head, or a copy of the `init` stage's adapter."""
    settings, base = job.settings, job.recipe.base
    assert isinstance(settings, RewardStage)
    causal = load_base(base, job.text_format, job.accelerator)
    without_dropout(causal)
    return add_adapter(
        classifier(causal),
        job.recipe.adapter,
        "SEQ_CLS",
        init=job.input_folder(settings.init) / "adapter" if settings.init else None,
        seed=derived_seed(job.recipe.seed, job.name, "adapter"),
        base=base,
    )


class Trainer(Watched, RewardTrainer):
    """trl's, watched, with our loss: trl's pools by comparing with a pad id unless the model knows better."""

    centre = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[Tensor] = []
        """[right, margin, pairs] summed over each microbatch of the step."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the mean loss of a microbatch of pairs; the chosen half comes first."""
        scores = sequence_scores(model, inputs["input_ids"], inputs["attention_mask"])
        chosen, rejected = scores.chunk(2)
        margin = (chosen - rejected).detach().double()
        right = (margin > 0).double() + (margin == 0).double() / 2
        self.seen.append(torch.stack([right.sum(), margin.sum(), torch.tensor(float(len(margin))).to(margin)]))
        loss = bradley_terry_loss(chosen, rejected, inputs.get("margin"))
        return (loss + self.centre * centering_penalty(chosen, rejected)).mean()

    def figures(self) -> dict[str, float]:
        """Return accuracy and mean score difference over the pairs of the step, in all processes."""
        right, margin, pairs = distributed.total(torch.stack(self.seen).sum(0), self.accelerator).tolist()
        self.seen.clear()
        return {"reward/accuracy": right / pairs, "reward/margin": margin / pairs}


def collator(pad_id: int) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]:
    """Return what makes a batch of pairs: `input_ids` and `attention_mask` [2B, T], chosen first, and margins [B]."""

    def collate(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids, mask = right_pad([pair[side] for side in ("chosen_ids", "rejected_ids") for pair in pairs], pad_id)
        batch = {"input_ids": ids, "attention_mask": mask.long()}
        if "margin" in pairs[0]:
            batch["margin"] = torch.tensor([pair["margin"] for pair in pairs])
        return batch

    return collate


# ---------------------------------------------------------------- what others rely on


def score_rows(job: Job, model: PeftModel, rows: Sequence[Sequence[int]], what: str) -> Tensor:
    """Return the raw scores [N], float64 on the CPU, of token rows, in their order and in every process."""
    accelerator = job.accelerator
    batches = batches_of_like_length([len(row) for row in rows], 2 * job.settings.microbatch)
    mine = range(accelerator.process_index, len(batches), accelerator.num_processes)
    scores = torch.zeros(len(rows), dtype=torch.float64)
    with evaluating(model):
        for index in progress(mine, desc=f"{job.name}: scoring {what}"):
            ids, mask = right_pad([rows[row] for row in batches[index]], job.text_format.pad_id)
            scored = sequence_scores(model, ids.to(model.device), mask.long().to(model.device))
            scores[batches[index]] = scored.double().cpu()
    return distributed.total(scores.to(accelerator.device), accelerator).cpu()


def score_alone(model: PeftModel, ids: Sequence[int]) -> float:
    """Return the raw score of one sequence without any padding."""
    row = torch.tensor([ids], device=model.device)
    with evaluating(model):
        return float(sequence_scores(model, row, torch.ones_like(row)))


def heldout_accuracy(job: Job, model: PeftModel, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how often the chosen completion scores higher, ties counted half, with its 95 % Wilson interval."""
    rows = [pair[side] for side in ("chosen_ids", "rejected_ids") for pair in pairs]
    chosen, rejected = score_rows(job, model, rows, "held-out pairs").chunk(2)
    right = float((chosen > rejected).sum()) + float((chosen == rejected).sum()) / 2
    low, high = wilson_interval(right, len(pairs))
    say(f"{job.name}: held-out accuracy {right / len(pairs):.3f}, 95 % interval {low:.3f} to {high:.3f}")
    return {"accuracy": right / len(pairs), "accuracy_ci": [low, high], "pairs": len(pairs)}


def reference_rows(job: Job, limit: int | None) -> dict[str, Any]:
    """Return the demonstrations that set the zero and the unit of the score: a card's name, their token rows, counts.

    They are those of `normalize_on`, else those the `init` stage learned from, else the chosen completions; at most
    `NORMALISED_ON` of them at random, held-out ones first. Those that do not fit are left out and counted.
    """
    settings, recipe = job.settings, job.recipe
    assert isinstance(settings, RewardStage)
    start = recipe.stages[settings.init] if settings.init else None
    card = settings.normalize_on or (start.data if isinstance(start, SFTStage) else settings.data)
    examples = job.examples[card]
    rows = []
    for part in (examples.heldout, examples.train):
        generator = torch.Generator().manual_seed(derived_seed(recipe.seed, job.name, "normalisation"))
        rows += [part[index] for index in torch.randperm(len(part), generator=generator).tolist()]
    rows = [_chosen_side(row) if isinstance(row, Preference) else row for row in rows[:NORMALISED_ON]]
    truncate = "drop" if settings.truncate == "error" else settings.truncate
    tokenised = tokenise_demonstrations(rows, job.text_format, limit, truncate)
    heldout = sum(index < len(examples.heldout) for index in tokenised.kept)
    return {
        "card": examples.card.name,
        "rows": [row["input_ids"] for row in tokenised.rows],
        "heldout": heldout,
        "counts": tokenised.counts,
    }


def _chosen_side(pair: Preference) -> Demonstration:
    return Demonstration(prompt=pair.prompt, completion=pair.chosen, where=pair.where)


def score_unit(job: Job, model: PeftModel, reference: Mapping[str, Any]) -> dict[str, Any]:
    """Return mean and standard deviation of the raw scores of the reference rows.

    Raises: InputError when they all have the same score.
    """
    scores = score_rows(job, model, reference["rows"], "demonstrations")
    mean, std = float(scores.mean()), float(scores.std(correction=0))
    if not std > 0:
        raise InputError(
            f"stages.{job.name}.normalize_on: all {len(scores)} rows of {reference['card']} have the same score "
            f"({mean:.4g}), so there is no unit; name a card with several different demonstrations."
        )
    say(f"{job.name}: {len(scores)} demonstrations of {reference['card']} score {mean:.4g} ± {std:.4g}; 0 ± 1 in PPO")
    kept = {"card": reference["card"], "heldout_rows": reference["heldout"], "tokenised": reference["counts"]}
    return {"mean": mean, "std": std, "rows": len(scores), **kept}


def check_saved(job: Job, probe: Sequence[Mapping[str, Any]]) -> None:
    """Read the adapter back onto a fresh base and compare.

    Raises: RuntimeError when it scores the probe differently.
    """
    fresh = classifier(load_base(job.recipe.base, job.text_format, job.accelerator))
    model = open_adapter(fresh, job.folder / "adapter")
    for row in probe:
        again = score_alone(model, row["ids"])
        if again != row["score"]:
            raise RuntimeError(
                f"{job.folder / 'adapter'}: read back, the reward model scores {again} where it scored {row['score']}; "
                "the files do not hold what was trained"
            )
    say(f"{job.name}: read back, the adapter gives the same {len(probe)} probe scores")
