"""What a stage gets and gives back. Each stage is a module with one function, `run(job) -> Outcome`.

A stage looks into `job.folder / "checkpoints"` and goes on from there. Only the main process writes. When
`job.stop.requested` is set in any process, the stage saves a checkpoint and raises `Interrupted`. It does not
write `manifest.json`: the pipeline does, last, from the Outcome.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from accelerate import Accelerator

from rlhf_kit import distributed
from rlhf_kit.collate import TextFormat, Tokenised
from rlhf_kit.errors import InputError, Interrupted
from rlhf_kit.examples.loading import Examples
from rlhf_kit.foreign import Foreign, folder_of
from rlhf_kit.models import SharedBase
from rlhf_kit.recipe import Cards, Recipe, Stage
from rlhf_kit.scorers import Scorer, ServerScorer, probe_error, probe_limit, scorer_of

__all__ = ["Job", "Outcome", "StopRequest", "data_read"]


class StopRequest:
    """While it is entered, SIGTERM and SIGINT ask the run to stop at the next safe place instead of ending it.

    A second SIGINT ends it at once. Outside the main thread signals cannot be caught, and none is.
    """

    def __init__(self) -> None:
        self.requested = False
        self._at_once = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    @contextmanager
    def nothing_to_lose(self, accelerator: Accelerator) -> Iterator[None]:
        """While it lasts, a signal raises `Interrupted` where it comes: there is no checkpoint to wait for.

        Several processes go on to the end of the block, where they agree: one alone would leave the others waiting.
        """
        self._at_once = accelerator.num_processes == 1
        try:
            if self._at_once and self.requested:
                raise Interrupted("stopped before measuring")
            yield
        finally:
            self._at_once = False
        if distributed.agree(self.requested, accelerator):
            raise Interrupted("stopped while measuring")

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        if self._at_once:
            raise Interrupted(f"stopped by {signal.Signals(number).name}")


@dataclass(frozen=True)
class Job:
    """One stage to run."""

    recipe: Recipe
    name: str
    settings: Stage
    folder: Path
    """Where adapter/, metrics.jsonl, samples.jsonl and checkpoints/ go."""
    inputs: Mapping[str, dict[str, Any]]
    """The manifests of the stages this one builds on, by stage name, and of what others made with us, by what the
    recipe names; their files have been verified."""
    examples: Mapping[Cards, Examples]
    """By what the recipe names: a card's path, or a mixture of cards."""
    text_format: TextFormat
    accelerator: Accelerator
    stop: StopRequest
    foreign: Mapping[str, Foreign] = field(default_factory=dict)
    """What it starts from or scores with that no stage has made, by what the recipe names."""

    def adapter(self, name: str) -> Path:
        """Return the adapter folder of an earlier stage, or the folder of what others made."""
        return folder_of(name, self.folder.parent, self.foreign)

    def scorer(
        self, name: str, shared: SharedBase, role: str, setting: str
    ) -> tuple[Scorer, tuple[float, float] | None]:
        """Return what a setting of the stage names to give scores, and the mean and standard deviation that come with
        it, if any do.

        role: of the shared base, for an adapter. setting: such as reward, for messages.

        Raises:
            InputError: it cannot be had, or is what others made and scores its own probe otherwise than it did.
        """
        at = f"stages.{self.name}.{setting}"
        scorer = scorer_of(name, self.adapter(name), shared, self.text_format, role=role, setting=at)
        if isinstance(scorer, ServerScorer):
            return scorer, scorer.unit
        manifest = self.inputs.get(name, {})
        found = manifest.get("score_normalisation")
        unit = None if found is None else (found["mean"], found["std"])
        error = probe_error(scorer, shared, manifest) if name in self.foreign else 0.0
        if not error <= probe_limit(shared, unit):
            raise InputError(
                f"{at}: {name} scores its own probe otherwise than its manifest says, by up to {error:.3g}: its base "
                f"was another one than {self.recipe.base.model}; name that one as base.model, or another scorer"
            )
        return scorer, unit


def data_read(examples: Examples, train: Tokenised, heldout: Tokenised | None) -> dict[str, Any]:
    """Return what an outcome tells of a card, or a mixture, that a stage learned from."""
    return {
        "train": {
            "card": examples.card.name,
            "rows": len(train.rows),
            "content_hash": examples.content_hash,
            "read": examples.counts,
            "tokenised": train.counts,
        },
        "heldout": {"rows": len(heldout.rows), "tokenised": heldout.counts} if heldout else {"rows": 0},
    }


@dataclass(frozen=True)
class Outcome:
    """What a stage tells its manifest."""

    metrics: dict[str, float]
    """The final figures, by metric name."""
    data: dict[str, Any]
    """What was read: cards, rows, counts."""
    extra: dict[str, Any] = field(default_factory=dict)
    """More top-level fields of the manifest, e.g. `score_normalisation`, `probe`, `tokens`."""
