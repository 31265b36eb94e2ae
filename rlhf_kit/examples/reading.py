"""The rows of a card's files in our form, one by one or put together; each that is read goes into the book."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_kit.columns import Missing, optional_value
from rlhf_kit.data_cards import DataCard, HubSource, data_suffix
from rlhf_kit.data_files import file_rows, hub_rows
from rlhf_kit.errors import InputError
from rlhf_kit.examples.book import Book, Broken, LeftOut
from rlhf_kit.examples.cells import Cells, cell_or_none, meets
from rlhf_kit.examples.messages import kept
from rlhf_kit.examples.missing_columns import check_columns
from rlhf_kit.examples.pairs import counted_votes, preferences_of
from rlhf_kit.examples.rankings import Answer, Turn, put_together, ranking_of, threads, turn_of
from rlhf_kit.examples.rows import Demonstration, Preference, PromptRow, Ranking, Row, Text
from rlhf_kit.examples.transcripts import hh, hh_turns

__all__ = ["canonical_rows", "read_rows", "taken_rows"]


def canonical_rows(card: DataCard, source: Sequence[Path] | HubSource, book: Book) -> Iterator[Row]:
    """Yield the rows that keep the rules, as they come or put together; every row of the files goes into the book.

    Raises:
        InputError: a file cannot be read to its end, or a column is not there.
    """
    read = read_rows(card, source, book)
    rows: Iterator[Row]
    if card.format == "threads":
        rows = threads((row for row in read if isinstance(row, Turn)), card, book)
    elif card.kind == "rankings" and "completion" in card.columns:
        rows = put_together((row for row in read if isinstance(row, Answer)), card, book)
    elif card.votes is not None:
        rows = counted_votes((row for row in read if isinstance(row, Preference)), card.votes, book)
    else:
        rows = (row for row in read if not isinstance(row, Answer | Turn))
    if card.special_tokens == "escape":  # as rows are made
        return rows
    return (replace(row, special_tokens=card.special_tokens) for row in rows)


def read_rows(card: DataCard, source: Sequence[Path] | HubSource, book: Book) -> Iterator[Row | Answer | Turn]:
    """Yield what each row of the files says, before votes on one pair or completions of one prompt are put together."""
    taken = 0
    for part in [source] if isinstance(source, HubSource) else source:
        is_first = True
        is_tsv = isinstance(part, Path) and (data_suffix(part) or "").startswith(".tsv")
        quoted = card.quoting != "none"
        read = hub_rows(part) if isinstance(part, HubSource) else file_rows(part, card.rows, quoted=quoted)
        for where, cells in read:
            if is_first:
                check_columns(card, where, cells)
                is_first = False
            book.read += 1
            if is_tsv and any("\n" in cell for cell in cells.values()):
                book.note_over_lines(where)
            unmet = next((name for name, wanted in card.filters.where.items() if not meets(name, wanted, cells)), None)
            if unmet is not None:
                book.leave_out(f"filters.where.{unmet}", where)
                book.see(unmet, cell_or_none(unmet, cells))
                continue
            yield from taken_rows(card, cells, where, book)
            taken += 1
            if taken == card.filters.max_rows:
                return
        if is_first:
            raise InputError(f"{part}: is empty, there is no row in it")


def taken_rows(card: DataCard, cells: Mapping[str, Any], where: str, book: Book) -> list[Row | Answer | Turn]:
    """Return what one row of a file says; nothing, and a reason in the book, if it breaks a rule."""
    try:
        read = Cells(card, cells, where)
        rows = _rows(read)
        if card.slices:
            found = read.slices()
            rows = [replace(row, slices=found) for row in rows if isinstance(row, Preference | Ranking | Answer)]
    except (Broken, Missing) as problem:
        book.drop(problem.reason, f"{where}: {problem.detail}")
    except LeftOut as left_out:
        book.leave_out(str(left_out), where)
    else:
        book.noted["votes left out, others on the pair counted"] += read.votes_left_out
        book.noted["judgements of equal, ordered by the others"] += read.ordered_draws
        book.noted["text that is a JSON list of messages, read as these"] += read.spelt_talk
        book.noted["message with thoughts beside its content, which are left out"] += read.thoughts
        gaps = (path for path in card.optional if optional_value(path, cells) is None)
        book.noted.update(f"{path} is missing or null, read as no text" for path in gaps)
        book.sides.update("tie" if vote == 0.5 else "first" if vote > 0.5 else "second" for vote in read.votes)
        return rows
    return []


def _rows(read: Cells) -> list[Row | Answer | Turn]:
    """Return what a row says, several rows where there are several votes on a pair; or raise Broken."""
    card, where = read.card, read.where
    if card.kind == "text":
        return [Text(read.text("text"), where)]
    if card.kind == "prompts":
        prompt = hh_turns(read.text("transcript"))[0] if card.format else read.prompt()
        return [PromptRow(kept(prompt), where)]
    if card.kind == "demonstrations":
        prompt, (completion,) = hh(read, ["transcript"]) if card.format else read.prompt_and_answers(["completion"])
        return [Demonstration(kept(prompt), completion, where)]
    if card.kind == "preferences":
        return list(preferences_of(read))
    if card.format == "threads":
        return [turn_of(read)]
    if "completion" in card.columns:
        prompt, (completion,) = read.prompt_and_answers(["completion"])
        name = "rating" if "rating" in card.columns else "rank"
        number = read.number(name, read.cell(name))
        return [Answer(kept(prompt), completion, number, where, read.annotator(), read.group())]
    return [ranking_of(read)]
