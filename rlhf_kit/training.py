"""What SFT and reward training share: stock trainers, with our own order of rows, optimizer, guard and checkpoints.

The rows of step k are the same in any number of processes and in any size of microbatch: row k * batch_size and those
after it in an endless sequence of shuffled passes over the data. No step has a smaller batch. Every random generator is
seeded anew at every step, so a checkpoint needs no generator state, and the stock trainer's own checkpoints, which a
crash can leave unusable, are not used at all. Trainable parameters are float32, whatever the base is in; the base's own
dropout is off, as it is in PPO.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from rlhf_kit import artifacts, checkpoints, distributed
from rlhf_kit.errors import Diverged, InputError, Interrupted
from rlhf_kit.generation import derived_seed, seed_generators
from rlhf_kit.gradients import Gradients
from rlhf_kit.maths.schedules import learning_rate_factor
from rlhf_kit.metrics import MetricLog, finite, peak_bytes, progress, say
from rlhf_kit.models import checkpointed
from rlhf_kit.pieces import Pieces
from rlhf_kit.recipe import TrainingStage


def without_dropout(base: nn.Module) -> None:
    """Turn a base model's own dropout off; an adapter added afterwards keeps the recipe's."""
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def optimizer_steps(rows: int, settings: TrainingStage) -> int:
    """Return the steps of a stage: as many as see every row `epochs` times, unless the recipe says `max_steps`."""
    return settings.max_steps or math.ceil(settings.epochs * rows / settings.batch_size)


def row_order(rows: int, first: int, last: int, *seed: object) -> list[int]:
    """Return rows `first` to `last` (exclusive) of an endless sequence of shuffled passes over `rows` rows."""
    order: list[int] = []
    for lap in range(first // rows, -(-last // rows)):
        generator = torch.Generator().manual_seed(derived_seed(*seed, "rows", lap))
        order += torch.randperm(rows, generator=generator).tolist()
    start = first // rows * rows
    return order[first - start : last - start]


def share_of_batch(settings: TrainingStage, name: str, processes: int) -> int:
    """Return the rows of a step that each process takes.

    Raises: InputError when they do not divide the batch.
    """
    share, left = divmod(settings.batch_size, processes)
    if left or not share:
        raise InputError(
            f"stages.{name}.batch_size: {settings.batch_size} rows do not divide among {processes} processes; use a "
            f"multiple of {processes}."
        )
    return share


class Training:
    """The state of one training: the parameters and their optimizer, and how far it is."""

    def __init__(
        self,
        model: PeftModel,
        rows: Sequence[Mapping[str, Any]],
        settings: TrainingStage,
        *,
        name: str,
        seed: int,
        folder: Path,
        accelerator: Accelerator,
        stop: Callable[[], bool],
        log: MetricLog,
        pieces: Pieces,
    ) -> None:
        """Find out where to start.

        name, folder: the stage's. stop: tells whether the run was asked to. pieces: how a step is divided.
        """
        self.model, self.rows, self.settings = model, rows, settings
        self.name, self.seed, self.folder = name, (seed, name), folder
        self.accelerator, self.stop, self.log, self.pieces = accelerator, stop, log, pieces
        self.share = share_of_batch(settings, name, accelerator.num_processes)
        self.steps = optimizer_steps(len(rows), settings)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.carried: dict[str, Any] = {}
        """Figures that a checkpoint takes along."""
        self.skipped = 0
        """Steps that were not taken because something in them was not finite."""
        self.taken = True
        """Whether the step at work is one that is."""
        self._values = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._found = checkpoints.latest(folder / artifacts.CHECKPOINTS, say)
        self.first = self._found.step if self._found else 0
        log.truncate_after(self.first if self._found else -1)

    def tokens(self, of_row: Callable[[Mapping[str, Any]], int]) -> int:
        """Return how many tokens the whole training sees, of rows that have so many each."""
        order = row_order(len(self.rows), 0, self.steps * self.settings.batch_size, *self.seed)
        lengths = [of_row(row) for row in self.rows]
        return sum(lengths[index] for index in order)

    def dataset(self) -> Dataset:
        """Return the rows that are still to be trained on, in their order; some in any case, for a trainer asks."""
        size, last = self.settings.batch_size, max(self.steps, self.first + 1)
        columns = {column: [row[column] for row in self.rows] for column in self.rows[0]}
        order = row_order(len(self.rows), self.first * size, last * size, *self.seed)
        return Dataset.from_dict(columns).select(order, keep_in_memory=True)

    def arguments(self, kind: type[TrainingArguments], **more: Any) -> TrainingArguments:
        """Return the trainer's configuration for this training; what it would decide for itself is decided here."""
        device = self.accelerator.device
        arguments = kind(
            output_dir=str(self.folder / artifacts.CHECKPOINTS),
            save_strategy="no",
            max_steps=self.steps - self.first,
            per_device_train_batch_size=self.share,
            gradient_accumulation_steps=1,  # `Watched` divides a step itself
            remove_unused_columns=False,
            train_sampling_strategy="sequential",
            max_grad_norm=self.settings.max_grad_norm,
            seed=derived_seed(*self.seed) % 2**32,
            data_seed=derived_seed(*self.seed) % 2**32,
            bf16=False,
            fp16=False,
            use_cpu=device.type == "cpu",
            gradient_checkpointing=checkpointed(self.settings.activation_checkpointing, self.model, device),
            average_tokens_across_devices=True,
            ddp_find_unused_parameters=False,
            dataloader_pin_memory=device.type == "cuda",
            accelerator_config={"use_configured_state": True},
            logging_steps=1,
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            report_to="none",
            **more,
        )
        arguments._n_gpu = min(1, arguments.n_gpu)  # else a lone process takes all GPUs it sees with nn.DataParallel
        return arguments

    def attach(self, trainer: Watched, figures: Callable[[], dict[str, float]] = dict) -> None:
        """Take over the trainer's parameters, optimizer, schedule and reports.

        figures: called once a step in every process; what it returns joins the step's metrics.
        """
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.data = self._values[name]  # trl's has cast those of quantised models to bfloat16
        self._values = {}
        self.gradients = Gradients(self.parameters)
        settings = self.settings
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        if self._found:
            self._load(self._found)
        warmup = math.ceil(settings.warmup_fraction * self.steps)
        trainer.optimizer = self.optimizer
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(settings.schedule, self.first + step, self.steps, warmup)
        )
        trainer.remove_callback(PrinterCallback)  # it prints to stdout
        trainer.add_callback(_Reporter(self, figures))
        trainer.training = self
        self.trainer = trainer

    def run(self) -> None:
        """Train to the end, and leave a checkpoint there: what is measured afterwards can be measured again.

        Raises:
            Interrupted: the run was asked to stop; a checkpoint is saved.
            Diverged: a loss or gradient is not finite, and the recipe says to stop then.
        """
        if self.first:
            say(f"{self.name}: going on after step {self.first} of {self.steps}")
        self.saved_at = self.step_began = time.monotonic()
        done = self.first
        if self.first < self.steps:
            self.model.train()
            with progress(total=self.steps, desc=self.name) as self.bar:
                self.bar.update(self.first)
                self.trainer.train()
            done += self.trainer.state.global_step
            self.save(done)
        self.model.eval()
        if done < self.steps or distributed.agree(self.stop(), self.accelerator):
            raise Interrupted(f"{self.name}: stopped after step {done} of {self.steps}")

    def save(self, done: int) -> None:
        """Write a checkpoint after `done` steps, from the main process; the others wait."""
        if self.accelerator.is_main_process:
            carried = {name: finite(value) for name, value in self.carried.items()}
            state = {"carried": carried, "skipped": self.skipped, "pieces": self.pieces.size}
            checkpoints.save(
                self.folder / artifacts.CHECKPOINTS,
                checkpoints.Checkpoint(done, checkpoints.tensors_of(self.parameters, self.optimizer), state),
                keep_all=self.settings.keep_checkpoints,
                logs=[self.log.path],
            )
        self.accelerator.wait_for_everyone()
        self.saved_at = time.monotonic()

    def _load(self, found: checkpoints.Checkpoint) -> None:
        checkpoints.put_back(found, self.parameters, self.optimizer)
        self.carried, self.skipped = found.state["carried"], found.state["skipped"]
        self.pieces.size = min(self.pieces.size, found.state["pieces"])

    def check(self, step: int, loss: Tensor) -> bool:
        """Return whether a step's loss, and its gradients, which are those of all processes, are finite.

        If they are not and the recipe says skip, the step is not taken, and counted.

        Raises: Diverged naming what is not finite.
        """
        # NaN and inf survive a sum; looking at each element of each gradient would cost more
        sums = torch.stack([p.grad.sum() for p in self.parameters.values() if p.grad is not None])
        sound = bool(torch.isfinite(sums).all()) and bool(torch.isfinite(loss))
        self.taken = not distributed.agree(not sound, self.accelerator)
        if self.taken:
            return True
        settings = self.settings
        if settings.on_nonfinite == "skip" and self.skipped < settings.max_skipped:
            self.skipped += 1
            self.model.zero_grad(set_to_none=True)  # the optimizer passes over parameters without a gradient
            say(f"{self.name}: step {self.first + step} is not finite and is skipped, {self.skipped} so far")
            return False
        advice = "try a smaller learning_rate, or dtype: float32 or bfloat16 in place of float16"
        if self.skipped:
            advice = f"{self.skipped} steps were skipped before it, as max_skipped allows; {advice}"
        if not torch.isfinite(loss):
            broken = [name for name, p in self.parameters.items() if not torch.isfinite(p).all()]
            cause = f"because of {_listed(broken)}" if broken else "with finite trainable parameters"
            raise Diverged(f"{self.name}: the loss of step {self.first + step} is {float(loss)} {cause}; {advice}")
        broken = [n for n, p in self.parameters.items() if p.grad is not None and not torch.isfinite(p.grad).all()]
        which = f"the gradient of {_listed(broken)}" if broken else "the loss or a gradient in another process"
        raise Diverged(f"{self.name}: step {self.first + step}: {which} is not finite; {advice}")


class Watched(Trainer, ABC):
    """What both trainers do on top of the stock ones: they are handed this process's share of a whole step and divide
    it themselves, in smaller pieces when memory runs out; they show each step to a guard, and report to nobody.
    """

    training: Training

    @abstractmethod
    def tokens(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Return how many tokens of these rows have a loss."""

    @abstractmethod
    def microbatches(self, rows: Sequence[Mapping[str, Any]], size: int) -> Iterable[Any]:
        """Yield what `part` takes: the rows in pieces of at most `size`, on this process's device."""

    @abstractmethod
    def part(self, microbatch: Any, tokens: Tensor) -> Tensor:
        """Return a microbatch's part of a step's loss; `tokens` is how many tokens of the whole step have a loss."""

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Make the gradients of a step, of all processes; return this one's part of the loss, times their number.

        Losses are divided by the rows and tokens of the whole step, so that parts add up however it is divided.
        """
        self.model.train()  # and not `model`, which may be wrapped to average gradients over processes
        rows = inputs["rows"]
        count = torch.tensor(self.tokens(rows), device=self.accelerator.device)
        tokens = distributed.total(count, self.accelerator)
        loss = self.training.pieces.whole(lambda size: self._gradients(rows, size, tokens))
        distributed.add_up_gradients(self.training.parameters.values(), self.accelerator)
        taken = self.training.check(self.state.global_step + 1, loss)
        return loss * self.accelerator.num_processes if taken else torch.zeros_like(loss)  # NaN stays in a running sum

    def _gradients(self, rows: Sequence[Mapping[str, Any]], size: int, tokens: Tensor) -> Tensor:
        self.training.gradients.start()
        loss = torch.zeros((), device=self.accelerator.device)
        for microbatch in self.microbatches(rows, size):
            part = self.part(microbatch, tokens)
            part.backward()
            loss += part.detach()
        return loss

    def _send_telemetry(self) -> None:
        """Nothing; trl tells the Hub of every start of a trainer."""


class _Reporter(TrainerCallback):
    """Seeds and logs each step, saves now and then, and stops when asked."""

    def __init__(self, training: Training, figures: Callable[[], dict[str, float]]) -> None:
        self.training = training
        self.figures = figures

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        training = self.training
        training.step_began = time.monotonic()
        seed_generators(*training.seed, training.first + state.global_step, training.accelerator.process_index)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return  # the summary at the end of training
        training, settings = self.training, self.training.settings
        done = training.first + state.global_step
        training.log.log(
            done,
            {
                f"{settings.kind}/loss": logs["loss"] if training.taken else math.nan,
                **self.figures(),
                f"{settings.kind}/gradient_norm": float(logs["grad_norm"]),
                f"{settings.kind}/learning_rate": logs["learning_rate"],
                f"{settings.kind}/epoch": done * settings.batch_size / len(training.rows),
                **({f"{settings.kind}/skipped_steps": training.skipped} if training.skipped else {}),
                "time/step_s": time.monotonic() - training.step_began,
                "memory/peak_bytes": peak_bytes(),
            },
        )
        training.bar.update(1)
        if done == training.steps:
            return
        if distributed.agree(training.stop(), training.accelerator):
            control.should_training_stop = True
            return
        if checkpoints.due(settings.checkpoint_every, done, training.saved_at, training.accelerator):
            training.save(done)


def _listed(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


# ---------------------------------------------------------------- measuring on held-out rows


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode and without gradients."""
    before = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(before)


def batches_of_like_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return the rows in batches of at most `size`, longest first, so that little of a batch is padding."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    return [order[start : start + size] for start in range(0, len(order), size)]
