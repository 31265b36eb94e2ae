"""Answers written with what was said before them: transcripts of Anthropic's HH, texts with a common prefix."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlhf_kit.examples.book import Broken
from rlhf_kit.examples.cells import Cells
from rlhf_kit.examples.messages import checked_text
from rlhf_kit.examples.rows import Prompt

__all__ = ["common_prefix", "hh", "hh_prompt", "hh_turns"]


def hh(read: Cells, names: Sequence[str]) -> tuple[Prompt, list[str]]:
    """Return what both transcripts say before the last answer, and the last answers.

    Where the card maps the prompt, that is a transcript and the answers are not.
    """
    if "prompt" in read.card.columns:
        return hh_prompt(read.text("prompt")), [read.text(name) for name in names]
    turns = [hh_turns(read.text(name)) for name in names]
    prompt = turns[0][0]
    if any(other != prompt for other, _ in turns):
        raise Broken(
            "transcripts differ before the last answer", f"{' and '.join(names)} differ before the last answer"
        )
    answers = [
        checked_text(answer, "completion" if name == "transcript" else name, f"the last answer of {read.called(name)}")
        for name, (_, answer) in zip(names, turns, strict=True)
    ]
    return prompt, answers


def hh_prompt(transcript: str) -> list[dict[str, str]]:
    """Return the turns of a transcript that ends where the answer begins."""
    messages, answer = hh_turns(transcript)
    if answer:
        raise Broken("transcript goes on after Assistant:", "the prompt must end with Assistant: and no answer")
    return messages


def hh_turns(transcript: str) -> tuple[list[dict[str, str]], str]:
    """Return the turns of "\\n\\nHuman: ...\\n\\nAssistant: ..." before the last answer as messages, and that answer.

    The last answer is what follows the last "\\n\\nAssistant:". Turns lose the white space around them; turns of one
    speaker in a row, before the last answer, are one message.
    """
    before, *parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + transcript.lstrip())
    speakers, said = parts[::2], [text.strip() for text in parts[1::2]]
    if before.strip() or not speakers or speakers[0] != "Human":
        raise Broken("transcript does not begin with Human:", "a transcript must begin with Human: and the first turn")
    if speakers[-1] != "Assistant":
        raise Broken("transcript does not end with Assistant:", "the last turn of a transcript must be the Assistant's")
    messages: list[dict[str, str]] = []
    for speaker, text in zip(speakers[:-1], said[:-1], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{text}".strip()
        else:
            messages.append({"role": role, "content": text})
    return messages, said[-1]


def common_prefix(read: Cells, names: Sequence[str]) -> tuple[Prompt, list[str]]:
    """Return the longest text that both begin with, cut back to before its last white space; and the rest of each.

    What both answers happen to begin with goes to the prompt as well.
    """
    first, second = [read.text(name) for name in names]
    length = next(
        (at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    prompt = re.sub(r"\s+\S*\Z", "", first[:length]) if re.search(r"\s", first[:length]) else ""
    if not prompt.strip():
        raise Broken("no common prefix", f"{' and '.join(names)} begin with no common words")
    texts = [
        checked_text(text[len(prompt) :], name, read.called(name))
        for name, text in zip(names, (first, second), strict=True)
    ]
    return prompt, texts
