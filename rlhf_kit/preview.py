"""Rows as a base will see them, token by token: `rlhf-kit data preview`, and the token counts of `data check`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from rich.text import Text as Line

from rlhf_kit.audit import Measured
from rlhf_kit.collate import TextFormat, load_text_format
from rlhf_kit.data_cards import DataCard
from rlhf_kit.errors import InputError, printable
from rlhf_kit.examples.book import Book
from rlhf_kit.examples.reading import canonical_rows
from rlhf_kit.examples.rows import Demonstration, Preference, Prompt, PromptRow, Ranking, Row, Text, texts_of
from rlhf_kit.models import context_length
from rlhf_kit.recipe import Base
from rlhf_kit.recipe_reading import load_recipe

__all__ = ["base_named", "measured", "preview"]

TEMPLATE_TOKENS = 64
"""More tokens than any chat template puts around a message."""


def base_named(name: str) -> Base:
    """Return the base that is a folder, a Hub id, or a recipe's.

    Raises:
        InputError: it is neither.
    """
    if name.endswith((".yaml", ".yml")):
        return load_recipe(name).base
    if name.startswith((".", "/", "~")) and not Path(name).exists():
        raise InputError(f"--base {name}: there is no such folder")
    if Path(name).is_file():
        raise InputError(f"--base {name}: is a file; name a checkpoint's folder, a Hub id or a recipe")
    return Base(model=name)


def measured(base: Base) -> Measured:
    """Return how tokens are counted for a base, with its chat template and end token."""
    text_format, context = load_text_format(base), context_length(base)

    def may_be_too_long(size: int, messages: int) -> bool:
        return context is not None and size + TEMPLATE_TOKENS * (messages + 1) > context  # no token is below a byte

    def count(prompt: Prompt, completions: Sequence[str]) -> tuple[int, list[int]]:
        if not completions:
            return len(text_format.prompt_ids(prompt)), []
        if prompt == "":
            return 0, [len(text_format.text_ids(text)) for text in completions]
        return len(text_format.prompt_ids(prompt)), [len(text_format.completion_ids(prompt, c)) for c in completions]

    return Measured(base.model, context, may_be_too_long, count, text_format.spells_special)


def preview(card: DataCard, rows: int, base: Base | None) -> Iterator[Line]:
    """Yield the first rows that a card yields, line by line: as tokens of a base, or as text without one.

    Lines are marked in words as well as by colour: what is learned from, and what is only read.
    """
    text_format = None if base is None else load_text_format(base)
    context = None if base is None else context_length(base)
    if text_format is not None:
        for note in text_format.notes:
            yield Line(note, style="dim")
    book = Book()
    for row in islice(canonical_rows(card, card.sources, book), rows):
        for title, prompt, completion in _sequences(row):
            parts = _pieces(text_format, prompt, completion, judged=isinstance(row, Preference | Ranking))
            total = sum(len(pieces) for _, pieces in parts)
            unit = "characters" if text_format is None else "tokens"
            size = total if text_format is not None else len(parts[0][1][0]) + sum(len(p[0]) for _, p in parts[1:])
            over = f", {size - context:,} over the context of {context:,}" if context and size > context else ""
            yield Line(f"\n{row.where}  {title}: {size:,} {unit}{over}", style="bold")
            for what, pieces in parts:
                yield _line(what, pieces)
        if text_format is not None and any(map(text_format.spells_special, texts_of(row))):
            ways = {"refuse": "refused, as its card says", "allow": "made special tokens", "escape": "kept as text"}
            yield Line(f"  it spells special tokens: {ways[row.special_tokens]}", style="yellow")
    for message in book.broken:
        yield Line(f"\nleft out: {message}", style="red")


def _sequences(row: Row) -> list[tuple[str, Prompt | None, str | None]]:
    """Return what each sequence of a row is, its prompt and its completion."""
    match row:
        case Text(text=text):
            return [("text", None, text)]
        case Demonstration(prompt=prompt, completion=completion):
            return [("demonstration", prompt, completion)]
        case Preference(prompt=prompt, chosen=chosen, rejected=rejected):
            more = [f"{name} {value:g}" for name, value in (("margin", row.margin), ("probability", row.probability))
                    if value is not None]  # fmt: skip
            more += [f"annotator {row.annotator}"] if row.annotator else []
            title = f"chosen{' (' * bool(more)}{', '.join(more)}{')' * bool(more)}"
            return [(title, prompt, chosen), ("rejected", prompt, rejected)]
        case Ranking(prompt=prompt, completions=completions, ranks=ranks):
            return [(f"rank {rank:g}", prompt, text) for rank, text in sorted(zip(ranks, completions, strict=True))]
        case PromptRow(prompt=prompt):
            return [("prompt", prompt, None)]
    raise TypeError(type(row))


def _pieces(
    text_format: TextFormat | None, prompt: Prompt | None, completion: str | None, judged: bool
) -> list[tuple[str, list[str]]]:
    """Return the parts of a sequence, each in pieces: its tokens, or the text as one."""
    if text_format is None:
        shown = prompt
        if isinstance(prompt, list):
            shown = "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
        parts = [("prompt", shown), ("completion", completion)]
        return [(what, [text]) for what, text in parts if isinstance(text, str)]
    if prompt is None:
        assert completion is not None  # a text
        return [("loss", _words(text_format, text_format.text_ids(completion)))]
    found = [("read" if judged else "no loss", _words(text_format, text_format.prompt_ids(prompt)))]
    if completion is not None:
        found.append(
            ("judged" if judged else "loss", _words(text_format, text_format.completion_ids(prompt, completion)))
        )
    return found


def _words(text_format: TextFormat, ids: Sequence[int]) -> list[str]:
    return [
        str(text_format.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for token in ids
    ]


def _line(what: str, pieces: Sequence[str]) -> Line:
    """Return tokens between bars, on alternating grounds where there are colours."""
    learned = what in ("loss", "judged", "completion")
    line = Line(f"  {what:10} ")
    for number, piece in enumerate(pieces):
        line.append("|" if number else "", style="dim")
        colour = ("black on green" if number % 2 else "black on bright_green") if learned else ""
        line.append(printable(piece), style=colour or ("dim" if number % 2 else ""))
    return line
