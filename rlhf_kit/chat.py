"""Talk to the policies of a finished run, in a terminal or through a pipe.

Each line is a turn of a dialogue in the run's chat template; of a run whose prompts are plain texts, a whole prompt, in
which \\n stands for a line break. Ctrl-C stops an answer, Ctrl-D (or /quit) ends.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from torch import Tensor

from rlhf_kit import artifacts
from rlhf_kit.collate import left_pad
from rlhf_kit.errors import InputError, NotScored
from rlhf_kit.examples.rows import Prompt
from rlhf_kit.finished import FinishedRun, RewardModel
from rlhf_kit.generation import generate, uniforms
from rlhf_kit.rollout import unscored
from rlhf_kit.sampling import fitting_ids
from rlhf_kit.scorers import Written

HELP = """\
/reset        forget the dialogue
/save FILE    write it as JSON
/help         this
/quit         or Ctrl-D: end; Ctrl-C stops an answer"""


@dataclass
class Speaker:
    """A policy and the dialogue it has had."""

    role: str
    messages: list[dict[str, str]] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)
    """Of its answers; None without a reward model."""


@dataclass(frozen=True)
class Chat:
    """A dialogue with one or two policies."""

    run: FinishedRun
    reward: RewardModel | None
    speakers: list[Speaker]
    limit: int
    temperature: float
    seed: int
    plain: bool
    """Each line is a whole prompt."""
    console: Console

    def talk(self, lines: Iterator[str]) -> None:
        """Answer line after line until they end."""
        for line in lines:
            if not line.strip():
                continue
            command, _, argument = line.strip().partition(" ")
            if command == "/quit":
                return
            if command.startswith("/"):
                self._obey(command, argument.strip())
                continue
            try:
                self._answer(line)
            except (InputError, NotScored) as error:
                self.console.print(f"{error} /reset starts anew.", markup=False)

    def _obey(self, command: str, argument: str) -> None:
        if command == "/reset":
            for speaker in self.speakers:
                speaker.messages.clear()
                speaker.scores.clear()
            self.console.print("The dialogue is forgotten.")
        elif command == "/save" and argument:
            self._save(Path(argument))
        else:
            self.console.print(HELP, markup=False)

    def _save(self, path: Path) -> None:
        if path.exists():
            self.console.print(f"{path}: is there already; name another file.", markup=False)
            return
        said = {speaker.role: {"messages": speaker.messages, "scores": speaker.scores} for speaker in self.speakers}
        try:
            artifacts.write_json(path, said)
        except OSError as error:
            self.console.print(f"{path}: {error.strerror}", markup=False)
        else:
            self.console.print(f"written to {path}", markup=False)

    def _answer(self, line: str) -> None:
        if len(self.speakers) == 1:
            (speaker,) = self.speakers
            self._said(speaker, line, lambda text: self.console.print(text, end="", markup=False))
            self.console.print()
            if (score := _score(speaker)) is not None:
                self.console.print(f"({score})", style="dim")
            return
        width = max(20, (self.console.width - 2) // len(self.speakers))
        panels = []
        for speaker in self.speakers:
            text = self._said(speaker, line, lambda _: None)
            panels.append(Panel(Text(text), title=speaker.role, subtitle=_score(speaker), width=width))
        self.console.print(Columns(panels, padding=(0, 1)))

    def _said(self, speaker: Speaker, line: str, show: Callable[[str], Any]) -> str:
        """Return a speaker's answer, which joins its dialogue; `show` gets it as it is written."""
        text = line.replace("\\n", "\n")
        prompt: Prompt = text if self.plain else [*speaker.messages, {"role": "user", "content": text}]
        text_format, turn = self.run.text_format, len(speaker.scores)
        ids = fitting_ids(self.run, prompt, self.limit, "this dialogue")
        packed = left_pad([ids], text_format.pad_id)
        stream = _Stream(lambda tokens: text_format.completion_text(ids, tokens), show)
        stopped = False
        try:
            with torch.no_grad():
                completions = generate(
                    self.run.shared,
                    speaker.role,
                    packed,
                    uniforms([0], 1, self.limit, self.seed, "chat", turn),
                    end_id=text_format.end_id,
                    pad_id=text_format.pad_id,
                    temperature=self.temperature,
                    tell=stream,
                )
        except KeyboardInterrupt:
            stopped = True
        answer = stream.finish()
        score = None
        if self.reward is not None and not stopped:
            rollout = unscored(packed, completions)
            (score,) = self.reward(Written([prompt], [answer], rollout.ids, rollout.mask))
        speaker.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        speaker.scores.append(score)
        return answer


class _Stream:
    """Shows text as its tokens come; a character that is not whole yet waits."""

    def __init__(self, decode: Callable[[list[int]], str], show: Callable[[str], Any]) -> None:
        self.decode, self.show = decode, show
        self.tokens: list[int] = []
        self.shown = ""

    def __call__(self, tokens: Tensor) -> None:
        self.tokens += tokens.tolist()
        text = self.decode(self.tokens)
        if text.startswith(self.shown) and not text.endswith("\ufffd"):
            self.show(text[len(self.shown) :])
            self.shown = text

    def finish(self) -> str:
        """Show what has not been shown; return it all."""
        text = self.decode(self.tokens) if self.tokens else ""
        self.show(text.removeprefix(self.shown))
        return text


def _score(speaker: Speaker) -> str | None:
    score = speaker.scores[-1] if speaker.scores else None
    return None if score is None else f"score {score:.2f}"


def trained_on_texts(run: FinishedRun) -> bool:
    """Return whether the prompts that the last stage of the run sampled for were plain texts, not chat messages."""
    sampling = run.recipe.last_sampling()
    samples = run.folder / sampling[0] / "samples.jsonl" if sampling else None
    if samples is None or not samples.is_file():
        return False
    with samples.open(encoding="utf-8") as file:
        first = file.readline()
    return bool(first) and isinstance(json.loads(first)["prompt"], str)


def typed_lines(console: Console) -> Iterator[str]:
    """Yield what is typed, or piped in, until it ends."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    import readline  # noqa: F401  (line editing and history)

    while True:
        try:
            yield input("> ")
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print("\n/quit or Ctrl-D ends.")
