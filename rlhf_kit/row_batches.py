"""A card's rows, many at a time and column by column, as an audit looks at them.

Plain cards over JSON lines, whose columns are texts, are read in blocks of columns; all others row by row, several
times slower.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_kit import sketches
from rlhf_kit.columns import path_of, template_columns
from rlhf_kit.data_cards import DataCard, HubSource, data_suffix
from rlhf_kit.data_files import Block, file_rows, json_blocks, json_row
from rlhf_kit.errors import InputError
from rlhf_kit.examples.book import Book
from rlhf_kit.examples.messages import SPELLS_MESSAGES
from rlhf_kit.examples.missing_columns import check_columns
from rlhf_kit.examples.reading import canonical_rows, read_rows, taken_rows
from rlhf_kit.examples.rows import Demonstration, Preference, Prompt, Ranking, Row, Text

__all__ = ["Batch", "batches"]

BATCH = 2048
"""Rows that are looked at together where they come one by one."""


@dataclass
class Batch:
    """Rows, column by column."""

    files: list[str]
    file: np.ndarray
    """Of each row its place in `files`."""
    line: np.ndarray
    element: np.ndarray
    """Which element of that line it is, where several rows stand on one; else 0."""
    keys: list[str]
    """The prompts, such that different ones differ."""
    prompts: list[str]
    """Their texts."""
    answers: list[list[str]]
    """The texts beside the prompt: completions; chosen and rejected; of a ranking all in one."""
    hashes: list[np.ndarray]
    """Of the answers without the white space around them."""
    who: Sequence[str | None] | None = None
    """The annotators, where there are any."""
    rows: Sequence[Row] | None = None
    """The rows themselves, where they came one by one."""


def batches(card: DataCard, source: Sequence[Path] | HubSource, book: Book) -> Iterator[Batch]:
    """Yield the rows of a card in batches: of plain files from their columns, which is faster, else row by row."""
    files = [] if isinstance(source, HubSource) else list(source)
    if not files or not all(_is_plain(card, path) for path in files):
        yield from _by_rows(card, source, book)
        return
    for path in files:
        yield from _by_blocks(card, path, book)


def _by_rows(card: DataCard, source: Sequence[Path] | HubSource, book: Book) -> Iterator[Batch]:
    rows = canonical_rows(card, source, book) if card.kind == "rankings" else read_rows(card, source, book)
    while chunk := [row for row in islice(rows, BATCH) if isinstance(row, Row)]:
        yield _batch(chunk)


def _batch(rows: Sequence[Row]) -> Batch:
    keys, prompts = [], []
    answers: list[list[str]] = []
    for row in rows:
        prompt: Prompt = "" if isinstance(row, Text) else row.prompt
        keys.append(prompt if isinstance(prompt, str) else json.dumps(prompt))
        prompts.append(_text(prompt))
        answers.append(_answers(row))
    places = [row.where.rpartition(":") for row in rows]
    files = list(dict.fromkeys(file for file, _, _ in places))
    file = np.array([files.index(name) for name, _, _ in places])
    numbers = [number.partition("#") for _, _, number in places]
    line = np.array([int(number) for number, _, _ in numbers])
    element = np.array([int(number or 0) for _, _, number in numbers])
    columns = [list(column) for column in zip(*answers, strict=True)]
    who = [getattr(row, "annotator", None) for row in rows]
    return Batch(
        files, file, line, element, keys, prompts, columns, list(map(sketches.stripped_hashes, columns)), who, rows
    )


def _text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def _answers(row: Row) -> list[str]:
    match row:
        case Text(text=text):
            return [text]
        case Demonstration(completion=completion):
            return [completion]
        case Preference(chosen=chosen, rejected=rejected):
            return [chosen, rejected]
        case Ranking(completions=completions):
            return ["\n\n".join(completions)]
    return []


def _is_plain(card: DataCard, path: Path) -> bool:
    """Return whether the rows are lines of JSON with texts in columns, and the card takes them as they are."""
    suffix = (data_suffix(path) or "").removesuffix(".gz").removesuffix(".zst")
    ways = [way for name, way in card.columns.items() if name in card.mapped or name not in ("margin", "annotator")]
    return (
        suffix in (".jsonl", ".ndjson")
        and card.kind in ("demonstrations", "preferences", "prompts", "text")
        and not (card.format or card.templates or card.preferred or card.filters.where or card.filters.max_rows)
        and not card.mapped & {"margin", "ratings", "probability", "first", "second"}
        and all(isinstance(way, str) and len(path_of(way)) == 1 and not template_columns(way) for way in ways)
    )


def _by_blocks(card: DataCard, path: Path, book: Book) -> Iterator[Batch]:
    """Yield the rows of a file of JSON lines with plain columns."""
    names = [name for name in ("prompt", "completion", "chosen", "rejected", "text") if name in card.columns]
    theirs = {name: str(card.columns[name]) for name in names}
    where, cells = next(file_rows(path), ("", None))
    if cells is None:
        raise InputError(f"{path}: is empty, there is no row in it")
    check_columns(card, where, cells)
    who, by_line = str(card.columns.get("annotator")), "margin" in card.columns and "margin" in cells
    if who in cells:
        theirs["annotator"] = who
        by_line |= not isinstance(cells[who], str)
    for block in json_blocks(path, sorted(set(theirs.values()))):
        if by_line or block.columns is None or _may_spell_messages(block.columns, theirs):
            yield from _by_lines(card, block, book)
            continue
        columns = {name: block.columns[way].to_pylist() for name, way in theirs.items()}
        yield from _by_columns(card, block, columns, book)


def _may_spell_messages(columns: Mapping[str, Any], theirs: Mapping[str, str]) -> bool:
    """Return whether a prompt or an answer may be a JSON list of messages, written as text."""
    from pyarrow import compute

    looked_at = [columns[way] for name, way in theirs.items() if name not in ("text", "annotator")]
    return any(compute.any(compute.match_substring_regex(column, SPELLS_MESSAGES)).as_py() for column in looked_at)


def _by_lines(card: DataCard, block: Block, book: Book) -> Iterator[Batch]:
    rows: list[Row] = []
    for where, line in block.lines():
        book.read += 1
        rows += [row for row in taken_rows(card, json_row(line, where), where, book) if isinstance(row, Row)]
    if rows:
        yield _batch(rows)


def _by_columns(card: DataCard, block: Block, columns: dict[str, list[str]], book: Book) -> Iterator[Batch]:
    count = len(next(iter(columns.values())))
    book.read += count
    lines = np.arange(block.first_line, block.first_line + count)
    prompts: list[str] | None = columns.pop("prompt", None)
    who: Any = columns.pop("annotator", None)
    hashes = [sketches.stripped_hashes(column) for column in columns.values()]
    broken = np.zeros(count, bool)
    for column in hashes:
        broken |= column == sketches.EMPTY
    if prompts is not None and "" in (stripped := list(map(str.strip, prompts))):
        broken |= np.array([not text for text in stripped])
    if card.kind == "preferences":
        broken |= hashes[-2] == hashes[-1]
    if broken.any():
        for row, (where, line) in enumerate(block.lines()):
            if broken[row]:
                taken_rows(card, json_row(line, where), where, book)
        keep = np.flatnonzero(~broken)
        columns = {name: [column[row] for row in keep] for name, column in columns.items()}
        prompts = prompts and [prompts[row] for row in keep]
        who = who and [who[row] for row in keep]
        lines, hashes = lines[keep], [column[keep] for column in hashes]
    if len(lines):
        keys = [""] * len(lines) if prompts is None else prompts
        file = np.zeros(len(lines), int)
        named: list[str | None] | None = who and [name or None for name in who]
        yield Batch([str(block.path)], file, lines, file, keys, keys, list(columns.values()), hashes, named)
