"""A row in our form, of whichever kind, and what it says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_kit.data_cards import SpecialTokens

__all__ = [
    "Demonstration",
    "Preference",
    "Prompt",
    "PromptRow",
    "Ranking",
    "Row",
    "Text",
    "encode",
    "probability_of",
    "refusal",
    "refused_rows",
    "texts_of",
]

Prompt = str | list[dict[str, str]]
"""Text, used as it is; or chat messages {"role", "content"} of system, user and assistant, the last not the
assistant's."""


@dataclass(frozen=True)
class Demonstration:
    prompt: Prompt
    completion: str
    where: str
    """File and line, "data/mine.jsonl:31"."""
    special_tokens: SpecialTokens = "escape"
    """The card's, of every row."""


@dataclass(frozen=True)
class Preference:
    prompt: Prompt
    chosen: str
    rejected: str
    where: str
    margin: float | None = None
    annotator: str | None = None
    probability: float | None = None
    """That `chosen` is the better one, from several votes; None is 1, and 0.5 a tie."""
    special_tokens: SpecialTokens = "escape"
    slices: Mapping[str, str] | None = None
    """Values of the columns that the card names as slices; None where it names none."""


@dataclass(frozen=True)
class Ranking:
    prompt: Prompt
    completions: list[str]
    """2 to 9 of them, no two the same."""
    ranks: list[float]
    """1 is best; equal numbers tie."""
    where: str
    ratings: list[float] | None = None
    """As given, higher is better, where the card maps ratings; the ranks follow from them."""
    annotator: str | None = None
    margin_per_point: float = 0.0
    """Margin of a pair per point by which its ratings differ, as the card says."""
    special_tokens: SpecialTokens = "escape"
    slices: Mapping[str, str] | None = None
    """As a preference's."""


@dataclass(frozen=True)
class PromptRow:
    prompt: Prompt
    where: str
    special_tokens: SpecialTokens = "escape"


@dataclass(frozen=True)
class Text:
    text: str
    where: str
    special_tokens: SpecialTokens = "escape"


Row = Demonstration | Preference | Ranking | PromptRow | Text

encode = json.JSONEncoder(ensure_ascii=False, sort_keys=True).encode
"""The text that equal values have in common, by which they are told apart and hashed."""


def probability_of(row: Preference) -> float:
    """Return the probability that `chosen` is the better one."""
    return 1.0 if row.probability is None else row.probability


def texts_of(row: Any, *, prompt_only: bool = False) -> list[str]:
    """Return the texts of a row; of a chat prompt, the contents of its messages."""
    if isinstance(row, Text):
        return [row.text]
    texts = [row.prompt] if isinstance(row.prompt, str) else [message["content"] for message in row.prompt]
    if not prompt_only:
        texts += [getattr(row, name) for name in ("completion", "chosen", "rejected") if hasattr(row, name)]
        texts += getattr(row, "completions", [])
    return texts


def refused_rows(rows: Iterable[Row], spells: Callable[[str], bool]) -> list[str]:
    """Return where the rows stand whose card refuses special tokens, and whose texts spell one."""
    return [row.where for row in rows if row.special_tokens == "refuse" and any(map(spells, texts_of(row)))]


def refusal(refused: Sequence[str], rows: int) -> str:
    """Return what is said of rows that spell special tokens, where their card refuses that."""
    shown = "; ".join(refused[:5]) + (" …" if len(refused) > 5 else "")
    return (
        f"{len(refused)} of {rows} rows spell special tokens of the model: {shown}. Mend them, or write in their card "
        "special_tokens: escape to keep that as text, or allow to make it special tokens."
    )
