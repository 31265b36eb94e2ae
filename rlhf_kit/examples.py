"""A data card's rows in their canonical form, split, counted and hashed.

Every row of the files is either kept or dropped for a reason that is counted. What is wrong with a file (cut off, not
JSON, without a column) is an error always; what is wrong with a row (nothing in a cell, equal answers) is an error with
file and line, or a counted drop where the card says `on_problem: drop`. Where several rows of a file make one of ours
(votes on a pair, completions of a prompt), the others are counted as merged.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf_kit.columns import ROLES as PROMPT_ROLES
from rlhf_kit.columns import (
    Expression,
    Missing,
    columns_of,
    is_there,
    optional_columns,
    optional_value,
    our_way,
    template_columns,
    value_of,
)
from rlhf_kit.data_cards import DataCard, HubSource, SpecialTokens, data_suffix, names_of, range_of
from rlhf_kit.data_files import file_rows, hub_rows, is_one_object, short
from rlhf_kit.errors import InputError, did_you_mean, printable

__all__ = [
    "Demonstration",
    "Examples",
    "Preference",
    "Prompt",
    "PromptRow",
    "Ranking",
    "Row",
    "Share",
    "Text",
    "load_examples",
    "mixed",
    "prompts_of",
]

Prompt = str | list[dict[str, str]]
"""Text, used as it is; or chat messages {"role", "content"} of system, user and assistant, the last not the
assistant's."""

SHOWN = 5
"""Broken rows that an error message shows."""

OVER_LINES = "a cell of a .tsv over several lines, as a quote at its beginning makes it"

_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_encode = json.JSONEncoder(ensure_ascii=False, sort_keys=True).encode


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


@dataclass(frozen=True)
class Examples:
    """What a card yields. No prompt is both in `train` and in `heldout`."""

    card: DataCard
    train: list[Any]
    """Rows, all of the class that belongs to the card's kind, in the order of the files."""
    heldout: list[Any]
    counts: dict[str, int]
    """"read", "kept", "dropped: <reason>" for each reason, "merged: <into what>"; and "repeated: <why>" for rows that
    are there more than once. Kept, less those repeated, and dropped and merged add up to what was read."""
    content_hash: str
    """SHA-256 over both lists, without `where`."""


class _Broken(Exception):
    """A row breaks a rule."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason, self.detail = reason, detail or reason


def load_examples(card: DataCard) -> Examples:
    """Return the card's rows.

    Raises:
        InputError: a file cannot be read to its end, a column is not there, no row is left; and rows that break a rule,
            unless the card drops them.
    """
    book = Book()
    train = list(canonical_rows(card, card.sources, book))
    heldout: list[Row] = []
    if not isinstance(card.heldout, float):
        heldout = list(canonical_rows(card, card.heldout, book))
    if book.broken and card.on_problem == "error":
        raise InputError(book.problems(card))
    others = book.others()
    if isinstance(card.heldout, float):
        train, heldout = _split(train, card.heldout)
    else:
        reserved = {_key(row): row.where for row in heldout}
        shared = [row for row in train if _key(row) in reserved]
        if shared and card.shared_prompts == "error":
            raise InputError(_shared(card, shared, reserved))
        if shared:
            others["dropped: prompt is also held out"] = len(shared)
            train = [row for row in train if _key(row) not in reserved]
    if not train:
        what = f"no row is left to train on: of {book.read:,} read {_reasons(others)}{book.wanted(card)}"
        raise InputError(f"{card.path}: {what}")
    return _examples(card, train, heldout, {"read": book.read, **others})


def _shared(card: DataCard, shared: Sequence[Row], reserved: Mapping[str, str]) -> list[str]:
    shown = [f"{row.where}: the prompt is also held out, in {reserved[_key(row)]}" for row in shared[:SHOWN]]
    return [
        *shown,
        f"{card.path}: {len(shared):,} rows to train on have prompts that are also held out; take them out of one, or "
        "write shared_prompts: drop to leave them out of training, counted",
    ]


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


def prompts_of(examples: Examples) -> Examples:
    """Return the prompts alone, each once, as rows of class `PromptRow`; what was left out is counted.

    Raises:
        InputError: rows of kind text have no prompts.
    """
    if examples.card.kind == "text":
        raise InputError(f"{examples.card.path}: rows of kind text have no prompts; use a card of another kind")
    seen: set[str] = set()
    rows: tuple[list[Row], list[Row]] = ([], [])
    for prompts, side in zip(rows, (examples.train, examples.heldout), strict=True):
        for row in side:
            if _key(row) not in seen:
                seen.add(_key(row))
                prompts.append(PromptRow(row.prompt, row.where, row.special_tokens))
    repeated = len(examples.train) + len(examples.heldout) - len(seen)
    dropped = {name: number for name, number in examples.counts.items() if name != "kept"}
    if repeated:
        dropped["dropped: repeated prompt"] = repeated
    return _examples(examples.card, *rows, dropped)


@dataclass(frozen=True)
class Share:
    """How much of one card goes into a mixture."""

    examples: Examples
    weight: float
    cap: int | None


def mixed(shares: Sequence[Share]) -> Examples:
    """Return the rows of several cards as those of one: capped, repeated by weight, one card after the other.

    All held-out rows are held out, once, and no prompt of theirs is trained on. Which rows are taken is decided by
    their content: a row that is added changes nothing for the others, but where there is a cap.
    """
    heldout = [row for share in shares for row in share.examples.heldout]
    reserved = {_key(row) for row in heldout}
    train: list[Row] = []
    counts: Counter[str] = Counter()
    for share in shares:
        found, name = share.examples, share.examples.card.name
        counts.update({what: number for what, number in found.counts.items() if what != "kept"})
        rows = [row for row in found.train if _key(row) not in reserved]
        counts["dropped: prompt is also held out"] += len(found.train) - len(rows)
        if share.cap is not None and len(rows) > share.cap:
            counts[f"dropped: over the cap of {name}"] += len(rows) - share.cap
            taken = {id(row) for row in sorted(rows, key=lambda row: _drawn_number(row, "cap"))[: share.cap]}
            rows = [row for row in rows if id(row) in taken]
        times = [int(share.weight) + (_drawn_number(row, "weight") < share.weight % 1) for row in rows]
        counts[f"repeated: weight {share.weight:g} of {name}"] += sum(max(number - 1, 0) for number in times)
        counts[f"dropped: weight {share.weight:g} of {name}"] += times.count(0)
        train += [row for row, number in zip(rows, times, strict=True) for _ in range(number)]
    cards = [share.examples.card for share in shares]
    card = replace(cards[0], name=" + ".join(card.name for card in cards))
    return _examples(card, train, heldout, {what: n for what, n in counts.items() if n or what == "read"})


def _drawn_number(row: Row, purpose: str) -> float:
    """Return a number from 0 to 1 that a row has by its content, another one for each purpose."""
    return _unit_hash(purpose + _content(row))


def _unit_hash(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _examples(card: DataCard, train: list[Row], heldout: list[Row], counts: Mapping[str, int]) -> Examples:
    counts = {"read": counts["read"], "kept": len(train) + len(heldout), **counts}
    digest = hashlib.sha256()
    for side in (train, heldout):
        for row in side:
            digest.update(_content(row).encode() + b"\n")
        digest.update(b"\n")
    return Examples(card, train, heldout, dict(counts), digest.hexdigest())


def _content(row: Row) -> str:
    """Return what a row says, wherever it stood, to be hashed."""
    content = {**vars(row), "where": ""}
    if row.special_tokens == "escape":  # as if there were no choice
        del content["special_tokens"]
    content.pop("slices", None)  # they say how results are told apart, and change none
    return _encode(content)


def _reasons(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} × {name.removeprefix('dropped: ')}" for name, number in dropped.items()) or "none"


def _key(row: Row) -> str:
    """Return the text that decides on which side of the split a row is."""
    return row.text if isinstance(row, Text) else _encode(row.prompt)


def _split(rows: list[Row], share: float) -> tuple[list[Row], list[Row]]:
    """Return training and held-out rows; a prompt whose hash lies below `share` of all hashes is held out.

    The same prompt is on the same side in every card with the same share. Of a few prompts, all of which fall on one
    side, the one with the smallest hash is held out, the one with the greatest is not.
    """
    hashes = {key: _unit_hash(key) for key in map(_key, rows)}
    if share == 0 or len(hashes) < 2:
        return rows, []
    least, greatest = min(hashes.values()), max(hashes.values())
    limit = math.nextafter(least, 1) if least >= share else min(share, greatest)
    return [row for row in rows if hashes[_key(row)] >= limit], [row for row in rows if hashes[_key(row)] < limit]


# ---------------------------------------------------------------- rows, from theirs to ours


@dataclass
class Book:
    """What became of the rows that were read."""

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """By reason."""
    merged: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    """"file:line: what is wrong" of the first rows that break a rule; all of them are in `dropped`."""
    shown: dict[str, list[str]] = field(default_factory=dict)
    """The same by reason, also where no rule is broken."""
    breaking: Counter[str] = field(default_factory=Counter)
    """Those of `dropped` that break a rule."""
    noted: Counter[str] = field(default_factory=Counter)
    """What was read otherwise than it was said, in rows that are kept."""
    unwanted: dict[str, list[str]] = field(default_factory=dict)
    """By column, the first values that filters.where leaves out."""
    sides: Counter[str] = field(default_factory=Counter)
    """Votes for the "first" and the "second" completion shown, and "tie", where the data says which stood first."""

    over_lines: int = 0
    """Rows that were read with a cell of a .tsv over several lines, which may be rows that a quote swallowed."""

    @property
    def kept_so_far(self) -> int:
        """How many rows of the files have not been dropped."""
        return self.read - self.dropped.total()

    def drop(self, reason: str, message: str, rows: int = 1) -> None:
        """Count rows that break a rule, and keep the first messages."""
        if rows:
            self.dropped[reason] += rows
        self.breaking[reason] += max(rows, 1)
        if len(self.broken) < SHOWN:
            self.broken.append(printable(message))
        self._show(reason, message)

    def drop_times(self, reason: str, rows: int) -> None:
        """Count rows that are left out and break no rule."""
        if rows:
            self.dropped[reason] += rows

    def leave_out(self, reason: str, where: str) -> None:
        """Count a row that the card leaves out."""
        self.dropped[reason] += 1
        self._show(reason, where)

    def note_over_lines(self, where: str) -> None:
        """Count a row one of whose cells goes over several lines."""
        self.over_lines += 1
        self._show(OVER_LINES, where)

    def see(self, column: str, value: Any) -> None:
        """Keep a value that filters.where leaves out, to be shown where no row is left."""
        seen = self.unwanted.setdefault(column, [])
        if len(seen) < SHOWN and (shown := short(value)) not in seen:
            seen.append(shown)

    def wanted(self, card: DataCard) -> str:
        """Return the end of a message where no row is left: what the filters wanted, and some of what they saw."""
        return "".join(
            f"; filters.where.{name} wants {short(card.filters.where[name])}, seen {', '.join(values)}"
            for name, values in self.unwanted.items()
        )

    def _show(self, reason: str, message: str) -> None:
        if len(shown := self.shown.setdefault(reason, [])) < SHOWN:
            shown.append(printable(message))

    def others(self) -> dict[str, int]:
        """Return the counts of what was not kept as it was read."""
        dropped = {f"dropped: {reason}": number for reason, number in self.dropped.items()}
        others = {"merged": self.merged, "noted": self.noted}
        return dropped | {
            f"{how}: {what}": number for how, counts in others.items() for what, number in counts.items() if number
        }

    def problems(self, card: DataCard) -> list[str]:
        """Return what to say of the rows that break a rule."""
        return [
            *self.broken,
            f"{card.path}: {_reasons(self.breaking)} in {self.read:,} rows; mend them, or write on_problem: drop "
            "to leave them out, counted",
        ]


def canonical_rows(card: DataCard, source: Sequence[Path] | HubSource, book: Book) -> Iterator[Row]:
    """Yield the rows that keep the rules, as they come or put together; every row of the files goes into the book.

    Raises:
        InputError: a file cannot be read to its end, or a column is not there.
    """
    read = read_rows(card, source, book)
    rows: Iterator[Row]
    if card.format == "threads":
        rows = _threads((row for row in read if isinstance(row, _Turn)), card, book)
    elif card.kind == "rankings" and "completion" in card.columns:
        rows = _put_together((row for row in read if isinstance(row, _Answer)), card, book)
    elif card.votes is not None:
        rows = _counted_votes((row for row in read if isinstance(row, Preference)), card.votes, book)
    else:
        rows = (row for row in read if not isinstance(row, _Answer | _Turn))
    if card.special_tokens == "escape":  # as rows are made
        return rows
    return (replace(row, special_tokens=card.special_tokens) for row in rows)


def read_rows(card: DataCard, source: Sequence[Path] | HubSource, book: Book) -> Iterator[Row | _Answer | _Turn]:
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
            unmet = next((name for name, wanted in card.filters.where.items() if not _meets(name, wanted, cells)), None)
            if unmet is not None:
                book.leave_out(f"filters.where.{unmet}", where)
                book.see(unmet, _found(unmet, cells))
                continue
            yield from taken_rows(card, cells, where, book)
            taken += 1
            if taken == card.filters.max_rows:
                return
        if is_first:
            raise InputError(f"{part}: is empty, there is no row in it")


def taken_rows(card: DataCard, cells: Mapping[str, Any], where: str, book: Book) -> list[Row | _Answer | _Turn]:
    """Return what one row of a file says; nothing, and a reason in the book, if it breaks a rule."""
    try:
        read = _Cells(card, cells, where)
        rows = _rows(read)
        if card.slices:
            found = read.slices()
            rows = [replace(row, slices=found) for row in rows if isinstance(row, Preference | Ranking | _Answer)]
    except (_Broken, Missing) as problem:
        book.drop(problem.reason, f"{where}: {problem.detail}")
    except _LeftOut as left_out:
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


class _LeftOut(Exception):
    """The card leaves the row out by a value of its own."""


def _meets(name: str, wanted: Any, cells: Mapping[str, Any]) -> bool:
    found = _found(name, cells)
    return _is(found, wanted) or _is_within(found, _listed(wanted))


def _found(name: str, cells: Mapping[str, Any]) -> Any:
    try:
        return value_of(name, cells)
    except Missing:
        return None


def _is(cell: Any, wanted: Any) -> bool:
    """Return whether a cell has the value wanted, or one of them; a text is also what it spells, true is not 1."""
    return any(_equal(cell, value) for value in _listed(wanted))


def _listed(values: Any) -> list[Any]:
    return values if isinstance(values, list) else [values]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, str) != isinstance(other, str):
        one, other = _spelt(one), _spelt(other)
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _spelt(value: Any) -> Any:
    """Return the number, truth or nothing that a text spells, as cells of .csv files do; "TRUE", "1.0", ""."""
    if not isinstance(value, str):
        return value
    word = value.strip().lower()
    if word in _WORDS:
        return _WORDS[word]
    for number in (int, float):
        try:
            return number(word)
        except ValueError:
            continue
    return value


_WORDS = {"true": True, "false": False, "": None, "null": None, "none": None}


def check_columns(card: DataCard, where: str, cells: Mapping[str, Any]) -> None:
    """Raise InputError if the first row of a file lacks a column; only dialogues can do without a prompt."""
    problems, unmapped = [], []
    for name in card.columns:
        missing = [path for path in columns_of(_way(card, name, cells)) if not is_there(path, cells)]
        if not missing or (name in MAY_BE_MISSING and name not in card.mapped):
            continue
        if name == "prompt" and name not in card.mapped and _is_dialogue(cells, card):
            continue
        if other := _other_shape(card, where, cells):
            raise InputError(printable(f"{where}: there is no column {missing[0]}{other}"))
        if name in card.mapped:
            problems.append(f"{where}: there is no {_no_column(card, name, missing[0], cells)}")
        else:
            unmapped.append(name)
    if len(unmapped) == 1:
        problems.append(f"{where}: there is no {_no_column(card, unmapped[0], unmapped[0], cells)}")
    elif unmapped:
        problems.append(f"{where}: there are no {_no_columns(card, unmapped, cells)}")
    judged = [name for name in ("ranks", "ratings", "comparisons", "ranked") if name in card.columns]
    if card.kind == "rankings" and judged and not any(_has(card, name, cells) for name in judged):
        problems.append(
            f"{where}: there is no column ranks or ratings; map one in {card.path}: columns: {{ranks: <their name>}} "
            f"(columns: {', '.join(map(str, cells))})"
        )
    if not card.mapped & set(judged) and _has(card, "ranks", cells) and _has(card, "ratings", cells):
        problems.append(f"{where}: there are columns ranks and ratings; map the one that counts in {card.path}")
    for name, template in card.templates.items():
        missing = [path for path in columns_of(template) if not is_there(path, cells)]
        if missing:
            near = did_you_mean(missing[0], cells).replace("; known", "; columns")
            problems.append(f"{where}: there is no column {missing[0]}, which template {name} takes{near}")
    for name in card.filters.where:
        if not is_there(name, cells):
            near = did_you_mean(name, cells).replace("; known", "; columns")
            problems.append(f"{where}: there is no column {name}, which filters.where of {card.path} names{near}")
    for name in card.slices:
        if not is_there(name, cells):
            near = did_you_mean(name, cells).replace("; known", "; columns")
            problems.append(f"{where}: there is no column {name}, which slices of {card.path} names{near}")
    if problems:
        raise InputError([printable(problem) for problem in problems])


MAY_BE_MISSING = ("margin", "annotator", "ranks", "ratings")
"""Of our names those that need not be there, where the card does not map them."""


def _other_shape(card: DataCard, where: str, cells: Mapping[str, Any]) -> str | None:
    """Return the end of the one message about columns that are missing because the file is of another shape."""
    only = str(next(iter(cells), ""))
    if len(cells) == 1 and (mark := next((mark for mark in ";|\t" if mark in only), None)):
        return f", but one called {only!r}: save the file with commas instead of {mark!r}, or as .tsv"
    if str(cells.get("chosen", "")).lstrip().startswith("Human:"):
        return f" (columns: {', '.join(map(str, cells))}); these are transcripts, write format: hh in {card.path}"
    lists = [
        name
        for name, value in cells.items()
        if isinstance(value, list) and value and all(isinstance(row, dict) and "role" not in row for row in value)
    ]
    if len(lists) == 1 and card.rows is None and is_one_object(Path(where.rpartition(":")[0])):
        return f": the rows are a list inside the key {lists[0]}; write rows: {lists[0]} in {card.path}"
    return None


def _no_columns(card: DataCard, names: Sequence[str], cells: Mapping[str, Any]) -> str:
    """Return what is said of several columns that are not there and not mapped, and how to map them."""
    theirs = {name: close[0] for name in names if (close := difflib.get_close_matches(name.lower(), list(cells), n=1))}
    plain = re.compile(r"[A-Za-z][\w.-]*( [\w.-]+)*")  # else YAML needs quotes
    written = {name: way if plain.fullmatch(way) else json.dumps(way) for name, way in theirs.items()}
    ways = ", ".join(f"{name}: {written.get(name, '<their name>')}" for name in names)
    return (
        f"columns {', '.join(names)}; columns: {', '.join(sorted(map(str, cells)))}; map them in {card.path}: "
        f"columns: {{{ways}}}"
    )


def _no_column(card: DataCard, name: str, missing: str, cells: Mapping[str, Any]) -> str:
    what = f"column {missing}, which the card takes for {name}" if name in card.mapped else f"column {name}"
    theirs = card.columns[name]
    if isinstance(theirs, dict) and theirs.get("system") == missing and " " in missing:
        return f"column {missing!r}; where that is the text itself, write system: {{text: {missing}}}"
    if (ours := our_way(missing)) != missing:
        return f"column {missing}, which the card takes for {name}; the way into a column is written {ours}"
    near = did_you_mean(missing, cells)
    seen = "" if near.startswith("; known") else f" (columns: {', '.join(map(str, cells))})"
    mend = "" if name in card.mapped else f"; map it in {card.path}: columns: {{{name}: <their name>}}"
    if name == "prompt" and name not in card.mapped and card.kind == "preferences":
        mend += "; where the answers repeat the prompt, write format: common_prefix"
    return f"{what}{near.replace('; known', '; columns')}{seen}{mend}"


def _way(card: DataCard, name: str, cells: Mapping[str, Any]) -> Expression:
    """Return where a row has what we call `name`; of rows of messages alone, prompt and completion are in these."""
    of_messages = {"demonstrations": "completion", "prompts": "prompt"}.get(card.kind)
    if name == of_messages and name not in card.mapped and name not in cells and "messages" in cells:
        return "messages"
    return card.columns[name]


def _has(card: DataCard, name: str, cells: Mapping[str, Any]) -> bool:
    theirs = _way(card, name, cells) if name in card.columns else None
    if theirs is None or (isinstance(theirs, str) and theirs in cells):  # nearly always it is this simple
        return theirs is not None
    return all(is_there(path, cells) for path in columns_of(theirs))


def _is_dialogue(cells: Mapping[str, Any], card: DataCard) -> bool:
    answers = ("chosen", "rejected", "first", "second", "completion", "completions")
    for name in answers:
        if name in card.columns:
            try:
                value = value_of(_way(card, name, cells), cells)
            except Missing:
                continue
            value = value[0] if name == "completions" and isinstance(value, list) and value else value
            if isinstance(_talk(value), list):
                return True
    return False


def _rows(read: _Cells) -> list[Row | _Answer | _Turn]:
    """Return what a row says, several rows where there are several votes on a pair; or raise _Broken."""
    card, where = read.card, read.where
    if card.kind == "text":
        return [Text(read.text("text"), where)]
    if card.kind == "prompts":
        prompt = _hh_turns(read.text("transcript"))[0] if card.format else read.prompt()
        return [PromptRow(_kept(prompt), where)]
    if card.kind == "demonstrations":
        prompt, (completion,) = _hh(read, ["transcript"]) if card.format else read.prompt_and_answers(["completion"])
        return [Demonstration(_kept(prompt), completion, where)]
    if card.kind == "preferences":
        return list(_preferences(read))
    if card.format == "threads":
        return [_turn(read)]
    if "completion" in card.columns:
        prompt, (completion,) = read.prompt_and_answers(["completion"])
        name = "rating" if "rating" in card.columns else "rank"
        number = read.number(name, read.cell(name))
        return [_Answer(_kept(prompt), completion, number, where, read.annotator(), read.group())]
    return [_ranking(read)]


# ---------------------------------------------------------------- pairs and the votes on them


def _preferences(read: _Cells) -> Iterator[Preference]:
    card = read.card
    pair = ["chosen", "rejected"] if "chosen" in card.columns else ["first", "second"]
    how = {"hh": _hh, "common_prefix": _common_prefix}.get(str(card.format), _Cells.prompt_and_answers)
    prompt, (first, second) = how(read, pair)
    if first.strip() == second.strip():
        raise _Broken(f"{pair[0]} equal to {pair[1]}", f'{pair[0]} is equal to {pair[1]}: "{short(first)}"')
    prompt = _kept(prompt)
    ratings = read.numbers("ratings", 2) if "ratings" in card.columns else None
    margin = read.margin()
    if ratings is not None and card.margin_per_point is not None:
        margin = card.margin_per_point * abs(ratings[0] - ratings[1])
    for probability, annotator in _judgements(read, pair, ratings):
        if pair[0] == "first":
            read.votes.append(probability)
        sides = (first, second) if probability >= 0.5 else (second, first)
        share = max(probability, 1 - probability)
        yield Preference(prompt, *sides, read.where, margin, annotator, None if share == 1 else share)


def _judgements(read: _Cells, pair: Sequence[str], ratings: list[float] | None) -> Iterator[tuple[float, str | None]]:
    """Yield, for each vote on the pair, the probability that the first one is better and who says so."""
    card = read.card
    if "preferred" in card.columns:
        votes = read.cell("preferred", gaps=True)
        if not isinstance(votes, list):
            yield _agreed(read, votes, read.vote(votes), ratings), read.annotator()
            return
        if not votes:
            raise _Broken("no vote", f"{read.called('preferred')} is an empty list")
        if len(votes) > 1 and card.votes is None:
            raise _Broken(
                "several votes on a pair",
                f"{read.called('preferred')} holds {len(votes)} votes; write votes: majority or votes: probability",
            )
        who = read.cell("annotator") if read.has("annotator") else None
        named = who if isinstance(who, list) and len(who) == len(votes) else [who] * len(votes)
        for vote, name in zip(votes, named, strict=True):
            try:
                share = read.vote(vote)
            except _LeftOut:
                read.votes_left_out += 1
                continue
            share = share if len(votes) > 1 else _agreed(read, vote, share, ratings)
            yield share, None if name in (None, "") or isinstance(name, list) else str(name)
        if read.votes_left_out == len(votes):
            raise _LeftOut("no vote that counts")
        return
    if "probability" in card.columns:
        probability = read.number("probability", read.cell("probability"))
        if not 0 <= probability <= 1:
            raise _Broken("no probability", f"{read.called('probability')} lies between 0 and 1; seen {probability:g}")
    elif ratings is not None and pair[0] == "first":
        probability = 0.5 if ratings[0] == ratings[1] else float(ratings[0] > ratings[1])
    else:
        probability = 1.0
        if ratings is not None and ratings[0] == ratings[1]:
            probability = 0.5
        if ratings is not None and ratings[0] < ratings[1]:
            raise _Broken("chosen is rated lower", f"chosen is rated {ratings[0]:g} and rejected {ratings[1]:g}")
    yield probability, read.annotator()


def _agreed(read: _Cells, vote: Any, share: float, ratings: list[float] | None) -> float:
    """Return the share of a row's one vote, which may part equal ratings, but not contradict different ones."""
    rated = 0.0 if ratings is None else ratings[0] - ratings[1]
    if ratings is not None and rated and (share - 0.5) * rated <= 0:
        raise _Broken(
            "preferred and ratings disagree",
            f"{read.called('preferred')} is {short(vote)}, and first is rated {ratings[0]:g}, second {ratings[1]:g}; "
            "where the two need not agree, map only one of them",
        )
    return share


def _counted_votes(rows: Iterable[Preference], votes: str, book: Book) -> Iterator[Preference]:
    """Yield one row for all votes on a pair of completions, where the first of them stood.

    A vote counts by its probability, a tie a half for either side. No annotator is named where there were several.
    """
    pairs: dict[str, list[Preference]] = {}
    before = book.kept_so_far
    for row in rows:
        pairs.setdefault(_encode([row.prompt, *sorted((row.chosen, row.rejected))]), []).append(row)
    book.merged["votes on one pair"] += book.kept_so_far - before - len(pairs)
    for cast in pairs.values():
        first = cast[0]
        share = sum(
            probability_of(row) if row.chosen == first.chosen else 1 - probability_of(row) for row in cast
        ) / len(cast)
        if votes == "majority":
            share = 0.5 if share == 0.5 else float(share > 0.5)
        chosen, rejected = (first.chosen, first.rejected) if share >= 0.5 else (first.rejected, first.chosen)
        share = max(share, 1 - share)
        annotators = {row.annotator for row in cast}
        yield replace(
            first,
            chosen=chosen,
            rejected=rejected,
            annotator=annotators.pop() if len(annotators) == 1 else None,
            probability=None if share == 1 else share,
        )


def probability_of(row: Preference) -> float:
    """Return the probability that `chosen` is the better one."""
    return 1.0 if row.probability is None else row.probability


# ---------------------------------------------------------------- rankings

COMPLETIONS = (2, 9)
"""Of one ranking, at least and at most."""


@dataclass(frozen=True)
class _Answer:
    """A row that holds one completion of a ranking."""

    prompt: Prompt
    completion: str
    number: float
    """Its rank or its rating."""
    where: str
    annotator: str | None
    group: str | None
    """What rows of one ranking have in common, if it is not the prompt."""
    slices: Mapping[str, str] | None = None


def _ranking(read: _Cells) -> Ranking:
    card = read.card
    cell = read.cell("completions")
    if not isinstance(cell, list):
        raise _Broken("completions are no list", f"{read.called('completions')} must be a list; seen {short(cell)}")
    if not COMPLETIONS[0] <= len(cell) <= COMPLETIONS[1]:
        way = "; [:9] behind a list, of completions and what ranks them, takes the first nine"
        way *= len(cell) > COMPLETIONS[1]
        raise _Broken("not 2 to 9 completions", f"{len(cell)} completions; a ranking has 2 to 9{way}")
    if card.format == "hh":
        prompt: Prompt = _hh_prompt(read.text("prompt"))
        completions = [_text(one, "completion", read.called("completions")) for one in cell]
    else:
        prompt, completions = read.answered([("completion", read.called("completions"), one) for one in cell])
    ratings = None
    if read.has("ratings"):
        ratings = read.numbers("ratings", len(completions))
        ranks = _ranks(ratings, best_is_high=True)
    elif "comparisons" in card.columns:
        shares = _shares(read, len(completions))
        ranks = _ranks(_wins(shares, len(completions)), best_is_high=True)
        read.ordered_draws = sum(share == 0.5 and ranks[one] != ranks[two] for (one, two), share in shares.items())
    elif "ranked" in card.columns:
        ranks = _ranks(_by_name(read, len(completions)), best_is_high=False)
    else:
        ranks = _ranks(read.numbers("ranks", len(completions)), best_is_high=False)
        _check_order(read)
    return _ranked(prompt, completions, ranks, ratings, read.where, read.annotator(), card.margin_per_point)


def _ranked(
    prompt: Prompt,
    completions: list[str],
    ranks: list[float],
    ratings: list[float] | None,
    where: str,
    annotator: str | None,
    margin_per_point: float | None = None,
) -> Ranking:
    if len({completion.strip() for completion in completions}) < len(completions):
        twice = Counter(completion.strip() for completion in completions).most_common(1)[0][0]
        raise _Broken("equal completions", f'a completion stands twice in the ranking: "{short(twice)}"')
    return Ranking(_kept(prompt), completions, ranks, where, ratings, annotator, margin_per_point or 0.0)


def _ranks(numbers: Sequence[float], best_is_high: bool) -> list[float]:
    """Return 1 for the best and for each other one 1 more than there are better ones; equal numbers tie."""
    sign = 1 if best_is_high else -1
    return [1.0 + sum(sign * other > sign * number for other in numbers) for number in numbers]


def _by_name(read: _Cells, count: int) -> list[float]:
    """Return the rank of each completion, by its name in a list: that has ranks beside it, or is best first.

    One name that is no list is the best one's; the others tie behind it.
    """
    names, cell = _names(read, count), read.cell("ranked")
    ranked = [_name(read, name, names) for name in (cell if isinstance(cell, list) else [cell])]
    with_ranks = "ranks" in read.card.columns
    if not isinstance(cell, list) and not with_ranks:
        return [float(name not in ranked) for name in names]
    for name in names:
        if (times := ranked.count(name)) != 1:
            raise _Broken(
                "not every completion ranked once",
                f"{read.called('ranked')} must have each of {', '.join(map(short, names))} once; seen {short(name)} "
                f"{times} times",
            )
    ranks = read.numbers("ranks", count) if with_ranks else list(map(float, range(count)))
    return [ranks[ranked.index(name)] for name in names]


def _check_order(read: _Cells) -> None:
    """Raise _Broken if the ranks stand beside the names of the completions, whose order is not theirs."""
    path, names = read.card.columns["ranks"], names_of(read.card.columns["completions"])
    if names is None or not isinstance(path, str) or "[]." not in path:
        return
    entries = path.rpartition(".")[0]
    items = value_of(entries, read.cells)
    for key in items[0] if all(isinstance(item, Mapping) for item in items) else ():
        if sorted(str(item.get(key)) for item in items) == sorted(names):
            raise _Broken(
                "ranks beside names",
                f"{read.called('ranks')} stands beside {key}, which names the completions; map ranked: {entries}.{key}",
            )


def _names(read: _Cells, count: int) -> list[str]:
    """Return what the completions are called, no two the same."""
    cell: Any = read.cell("names") if "names" in read.card.columns else names_of(read.card.columns["completions"])
    are_names = isinstance(cell, list) and all(isinstance(name, str | int | float) for name in cell)
    if not are_names or len(cell) != count:
        raise _Broken(
            "not one of names for each completion",
            f"{read.called('names')} must be a list of {count} names; seen {short(cell)}",
        )
    names = list(map(str, cell))
    if len(set(names)) < count:
        raise _Broken("equal names", f"{read.called('names')} must be different ones; seen {short(cell)}")
    return names


def _name(read: _Cells, cell: Any, names: Sequence[str]) -> str:
    if not isinstance(cell, str | int | float) or str(cell) not in names:
        raise _Broken(
            "ranked by an unknown name",
            f"{read.called('ranked')} has {short(cell)}, as no completion is called; known: "
            + ", ".join(map(short, names)),
        )
    return str(cell)


def _shares(read: _Cells, count: int) -> dict[tuple[int, int], float]:
    """Return the first one's share, of each pair's judgement, from those of all pairs 1-2, 1-3, ..., 2-3, ..."""
    votes = read.cell("comparisons")
    pairs = [(first, second) for first in range(count) for second in range(first + 1, count)]
    if not isinstance(votes, list) or len(votes) != len(pairs):
        raise _Broken(
            "not one comparison for each pair",
            f"{read.called('comparisons')} must be {len(pairs)} judgements, 1-2, 1-3, ..., of {count} completions",
        )
    return {pair: read.vote(vote) for pair, vote in zip(pairs, votes, strict=True)}


def _wins(shares: Mapping[tuple[int, int], float], count: int) -> list[float]:
    """Return how often each completion wins; ties are half. Judgements that go in a circle make completions tie."""
    wins = [0.0] * count
    for (first, second), share in shares.items():
        wins[first] += share
        wins[second] += 1 - share
    return wins


def _put_together(rows: Iterable[_Answer], card: DataCard, book: Book) -> Iterator[Ranking]:
    """Yield one ranking for all completions of a prompt or group (and annotator), where the first of them stood."""
    groups: dict[tuple[str, str | None], list[_Answer]] = {}
    for row in rows:
        groups.setdefault((row.group or _encode(row.prompt), row.annotator), []).append(row)
    for whole in groups.values():
        group = whole[: card.max_completions]
        for row in whole[len(group) :]:
            book.leave_out("over max_completions", row.where)
        first, count = group[0], len(group)
        try:
            other = next((row for row in whole if row.prompt != first.prompt), None)
            if other is not None:
                raise _Broken(
                    "prompts of a group differ", f"the group {short(first.group)} has another prompt in {other.where}"
                )
            _check_count(count, "completions of this prompt")
            ranking = _ranked_by_rows(first.prompt, [row.completion for row in group], group, card)
            yield replace(ranking, slices=first.slices)
            book.merged["completions of one prompt"] += count - 1
        except _Broken as problem:
            book.drop(problem.reason, f"{first.where}: {problem.detail}", count)


def _ranked_by_rows(prompt: Prompt, completions: list[str], rows: Sequence[_Answer | _Turn], card: DataCard) -> Ranking:
    """Return the ranking of completions by the ranks, or the ratings, of the rows that hold them."""
    first, rated = rows[0], "rating" in card.columns
    numbers = [row.number for row in rows if row.number is not None]
    ranks, ratings = _ranks(numbers, best_is_high=rated), numbers if rated else None
    return _ranked(prompt, completions, ranks, ratings, first.where, first.annotator, card.margin_per_point)


def _check_count(count: int, what: str) -> None:
    """Raise _Broken if so many rows make no ranking."""
    if not COMPLETIONS[0] <= count <= COMPLETIONS[1]:
        way = "; max_completions: 9 takes the first nine" * (count > COMPLETIONS[1])
        raise _Broken("not 2 to 9 completions", f"{count} {what}; a ranking has 2 to 9{way}")


@dataclass(frozen=True)
class _Turn:
    """A row that holds one message of a tree of dialogues."""

    id: str
    parent: str | None
    role: str
    text: str
    number: float | None
    """An answer's rank or rating."""
    where: str
    annotator: str | None


def _turn(read: _Cells) -> _Turn:
    name = "rating" if "rating" in read.card.columns else "rank"
    role = _role(read.cell("role"), read.called("role"), read.card.roles)
    number, parent = read.cell(name), read.cell("parent")
    return _Turn(
        id=str(read.cell("id")),
        parent=None if parent in (None, "") else str(parent),
        role=role,
        text=read.text("text"),
        number=None if number in (None, "") or role != "assistant" else read.number(name, number),
        where=read.where,
        annotator=read.annotator(),
    )


def _threads(rows: Iterable[_Turn], card: DataCard, book: Book) -> Iterator[Ranking]:
    """Yield, for each message with several ranked or rated answers of the assistant, these as a ranking.

    The prompt is the way from the root of the tree to that message. Messages that serve in none are dropped, counted.
    """
    before_these = book.kept_so_far
    turns = {turn.id: turn for turn in rows}
    book.drop_times("repeated message", book.kept_so_far - before_these - len(turns))
    answers: dict[str | None, list[_Turn]] = {}
    for turn in turns.values():
        if turn.number is not None:
            answers.setdefault(turn.parent, []).append(turn)
    used: set[str] = set()
    left_out: list[_Turn] = []
    count, rated = 0, "rating" in card.columns
    for whole in answers.values():
        group = whole[: card.max_completions]
        left_out += whole[len(group) :]
        first = group[0]
        try:
            _check_count(len(group), f"{'rated' if rated else 'ranked'} answers")
            before = _way_to(first.parent, turns)
            prompt = [{"role": turn.role, "content": turn.text} for turn in before]
            ranking = _ranked_by_rows(prompt, [turn.text for turn in group], group, card)
        except _Broken as problem:
            book.drop(problem.reason, f"{first.where}: {problem.detail}", rows=0)
            continue
        used |= {turn.id for turn in (*before, *group)}
        count += 1
        yield ranking
    book.merged["messages of dialogues"] += len(used) - count
    left_out = [turn for turn in left_out if turn.id not in used]  # it may be on the way to another prompt
    for turn in left_out:
        book.leave_out("over max_completions", turn.where)
    book.drop_times("message of no ranking", len(turns) - len(used) - len(left_out))


def _way_to(message: str | None, turns: Mapping[str, _Turn]) -> list[_Turn]:
    """Return the messages from the root to one, that one included."""
    way: list[_Turn] = []
    while message is not None:
        if message not in turns or len(way) > len(turns):
            raise _Broken("message without its thread", f"the message {short(message)} before it is not in the data")
        way.append(turns[message])
        message = turns[message].parent
    return way[::-1]


def _kept(prompt: Prompt) -> Prompt:
    """Return the prompt if there is something to answer in it, or raise _Broken."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise _Broken("empty prompt")
    elif not prompt or not prompt[-1]["content"].strip():
        raise _Broken("empty prompt")
    elif prompt[-1]["role"] == "assistant":
        raise _Broken(
            "prompt ends with an answer", "the prompt ends with a message of the assistant, with nothing to answer"
        )
    return prompt


class _Cells:
    """One row of a dataset, by our names for its columns."""

    def __init__(self, card: DataCard, cells: Mapping[str, Any], where: str):
        self.card, self.cells, self.where = card, cells, where
        self.votes: list[float] = []
        """How probable each judgement makes it that the completion shown first is better."""
        self.votes_left_out = 0
        """Of a list of votes, those whose values the card drops."""
        self.ordered_draws = 0
        """Pairs that were judged equal, and have an order by what was said of the others."""
        self.spelt_talk = False
        """Whether a text was read as the messages that it spells."""
        self.thoughts = False
        """Whether a message has thoughts beside its content, which are left out."""

    def has(self, name: str) -> bool:
        return _has(self.card, name, self.cells)

    def called(self, name: str) -> str:
        theirs = _way(self.card, name, self.cells) if name in self.card.columns else name
        return name if theirs == name else f"{name} ({'column ' * isinstance(theirs, str)}{_written(theirs)})"

    def cell(self, name: str, *, gaps: bool = False) -> Any:
        """Return what stands where the card says; with `gaps`, None for an element of a list that has it not."""
        theirs = _way(self.card, name, self.cells)
        if theirs == name and name not in self.cells:
            raise _Broken("missing column", f"{name} is missing in this row")
        return value_of(theirs, self.cells, gaps=gaps)

    def text(self, name: str) -> str:
        return _text(self.cell(name), name, self.called(name))

    def talk(self, cell: Any) -> Any:
        found = _talk(cell)
        self.spelt_talk |= found is not cell
        messages = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
        self.thoughts |= any(message.get(name) for message in messages for name in THOUGHTS)
        return found

    def prompt(self) -> Prompt:
        if self.card.templates:
            return _text(_drawn(self.card.templates, self.cells), "prompt", "prompt")
        prompt = self.talk(self.cell("prompt"))
        if isinstance(prompt, list):
            messages = _messages(prompt, self.called("prompt"), self.card.roles)
            is_answered = messages and messages[-1]["role"] == "assistant" and "prompt" not in self.cells
            return messages[:-1] if is_answered and "prompt" not in self.card.mapped else messages
        if isinstance(prompt, dict):
            return _chat(prompt, self.called("prompt"), self.card.roles)
        return self.text("prompt")

    def prompt_and_answers(self, names: Sequence[str]) -> tuple[Prompt, list[str]]:
        """Return the prompt and the texts of the answers, which may be given as messages or as whole dialogues."""
        return self.answered([(name, self.called(name), self.cell(name)) for name in names])

    def answered(self, answers: Sequence[tuple[str, str, Any]]) -> tuple[Prompt, list[str]]:
        """Return the prompt and the texts of the answers: our name, what to call it, and what stands there."""
        answers = [(name, called, self.talk(cell)) for name, called, cell in answers]
        if not all(isinstance(cell, list | dict) for _, _, cell in answers):
            texts = [_text(cell, name, called) for name, called, cell in answers]  # raises if one is messages
            return self.prompt(), texts
        roles = self.card.roles
        dialogues = [
            _messages([cell] if isinstance(cell, dict) else cell, called, roles) for _, called, cell in answers
        ]
        for (_, called, _), dialogue in zip(answers, dialogues, strict=True):
            if not dialogue or dialogue[-1]["role"] != "assistant":
                raise _Broken("dialogue without a last answer", f"{called} must end with the assistant's message")
        before = dialogues[0][:-1]
        if any(dialogue[:-1] != before for dialogue in dialogues):
            raise _Broken(
                "dialogues differ before the last answer",
                f"{' and '.join(dict.fromkeys(name for name, _, _ in answers))} differ before the last answer",
            )
        written = self.prompt() if self.card.templates or self.has("prompt") else before
        if isinstance(written, str):
            if before and written not in [message["content"] for message in before]:
                raise _Broken("prompt differs from the dialogue", f"{self.called('prompt')} is not in the dialogue")
            written = before or [{"role": "user", "content": written}]
        elif before and written != before:
            raise _Broken("prompt differs from the dialogue", f"{self.called('prompt')} is not how the dialogue begins")
        texts = [
            _text(dialogue[-1]["content"], name, called)
            for (name, called, _), dialogue in zip(answers, dialogues, strict=True)
        ]
        return written, texts

    def vote(self, value: Any) -> float:
        """Return 1 for a vote for the first completion, 0 for the second, 0.5 for a tie."""
        preferred = self.card.preferred
        assert preferred is not None  # load_card has seen to it
        meanings: list[tuple[float | None, list[Any]]] = [
            (None, preferred.drop), (1.0, preferred.first), (0.0, preferred.second), (0.5, preferred.tie),
        ]  # fmt: skip
        for matches in (_is, _is_within):
            for meaning, values in meanings:
                if matches(value, values):
                    if meaning is None:
                        raise _LeftOut(f"judged {short(value)}")
                    return meaning
        known = ", ".join(short(value) for _, values in meanings for value in values)
        raise _Broken("unknown preference", f"the card gives no meaning to {short(value)}; known: {known}")

    def number(self, name: str, cell: Any) -> float:
        """Return a number, which may be written as text; of ratings one on the card's scale, true being 1."""
        if name in ("rating", "ratings") and isinstance(_spelt(cell), bool):
            cell = _spelt(cell)
        try:
            number = float(cell) if isinstance(cell, str | int | float) else math.nan
        except (ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number) or (isinstance(cell, bool) and name not in ("rating", "ratings")):
            way = "; the names of what is ranked are mapped to ranked" * (name == "ranks" and isinstance(cell, str))
            raise _Broken(f"{name} is no number", f"{self.called(name)} must be a number; seen {short(cell)}{way}")
        if self.card.scale is not None and name in ("rating", "ratings"):
            lowest, highest = self.card.scale
            if not lowest <= number <= highest:
                raise _Broken(
                    "rating outside the scale",
                    f"{self.called(name)} is on a scale from {lowest:g} to {highest:g}; seen {number:g}",
                )
        return number

    def numbers(self, name: str, count: int) -> list[float]:
        """Return a list of as many numbers as there are completions."""
        cell = self.cell(name)
        if not isinstance(cell, list) or len(cell) != count:
            raise _Broken(
                f"not one of {name} for each completion",
                f"{self.called(name)} must be a list of {count} numbers; seen {short(cell)}",
            )
        return [self.number(name, number) for number in cell]

    def margin(self) -> float | None:
        if not self.has("margin"):
            return None
        cell = self.cell("margin")
        try:
            if cell in (None, "") or isinstance(cell, bool):
                margin = None if cell in (None, "") else float("nan")
            else:
                margin = float(cell)
        except (TypeError, ValueError, OverflowError):
            margin = float("nan")
        if margin is not None and not abs(margin) < float("inf"):
            raise _Broken("margin is no number", f"{self.called('margin')} must be a number; seen {short(cell)}")
        if margin is not None and self.card.columns["margin"] == self.card.columns.get("preferred"):
            return abs(margin)  # a strength, whose sign says which is better
        if margin is not None and margin < 0:
            raise _Broken(
                "negative margin",
                f"{self.called('margin')} says by how much the better one is better, 0 or more; seen {margin:g}. Of a "
                "strength whose sign says which is better, map both margin and preferred to it",
            )
        return margin

    def slices(self) -> dict[str, str]:
        """Return the values of the columns that the card names as slices, None and "" being none."""
        found = {name: value_of(name, self.cells) for name in self.card.slices if is_there(name, self.cells)}
        return {name: str(value) for name, value in found.items() if value not in (None, "")}

    def group(self) -> str | None:
        """Return the name of the group that the row belongs to, where the card maps one."""
        if "group" not in self.card.columns:
            return None
        cell = self.cell("group")
        if not isinstance(cell, str | int | float) or cell == "":
            raise _Broken("no group", f"{self.called('group')} must be text or a number; seen {short(cell)}")
        return str(cell)

    def annotator(self) -> str | None:
        cell = self.cell("annotator") if self.has("annotator") else None
        if isinstance(cell, list | dict):
            raise _Broken("several annotators", f"{self.called('annotator')} must name one; seen {short(cell)}")
        return None if cell in (None, "") else str(cell)


def _written(expression: Any) -> str:
    if isinstance(expression, str):
        return expression
    return ", ".join([*columns_of(expression), *optional_columns(expression)] or map(str, expression))


def _is_within(value: Any, ranges: Sequence[Any]) -> bool:
    """Return whether a number lies in one of the ranges written "0.5..3"."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return False
    for written in ranges:
        ends = range_of(written)
        if ends and ends[0] <= number <= ends[1]:
            return True
    return False


def _drawn(templates: Mapping[str, str], cells: Mapping[str, Any]) -> str:
    """Return the prompt of the template that the row draws.

    Rows that agree in what the templates take draw the same one, wherever they stand; a new template takes rows from
    the others and moves none between them.
    """
    names = sorted({path for template in templates.values() for path in template_columns(template)})
    taken = _encode([optional_value(path, cells) if path.endswith("?") else value_of(path, cells) for path in names])
    drawn = max(
        templates, key=lambda name: hashlib.sha256(f"{name}\0{taken}".encode("utf-8", "surrogatepass")).digest()
    )
    return str(value_of(templates[drawn], cells))


def _text(cell: Any, name: str, called: str) -> str:
    if not isinstance(cell, str):
        raise _Broken("non-text cell", f"{called} must be text; seen {short(cell)}")
    if not cell.strip():
        raise _Broken(f"empty {name}", f"{called} is empty")
    if _HALF_CHARACTER.search(cell):
        raise _Broken("text that is not Unicode", f"{called} has half of a surrogate pair, which is not Unicode text")
    return cell


ROLES: Mapping[str, str] = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatbot": "assistant",
}  # fmt: skip
"""Roles as they are written in lower case, {"role", "content"} or {"from", "value"}, and ours."""
TOOLS = ("tool", "function", "function_call", "tool_call", "tool_response", "observation", "ipython")
"""Roles of messages to and from tools, which are not read."""


def _role(written: Any, called: str, roles: Mapping[str, str]) -> str:
    """Return our name of a role, of those that are known and the card's own."""
    name = str(written).lower() if isinstance(written, str | int) else ""
    role = roles.get(name) or ROLES.get(name)
    if role is None and name in TOOLS:
        raise _Broken("use of a tool", f"{called} is {written}; messages of tools are not read")
    if role is None:
        raise _Broken(
            "unknown role",
            f"{called} must be system, user or assistant; seen {short(written)}"
            + f"; if it is one of them, write in the card roles: {{assistant: {short(written)}}}" * bool(name),
        )
    return role


def _messages(cell: list[Any], called: str, roles: Mapping[str, str]) -> list[dict[str, str]]:
    """Return messages with our names; of what a message has beside role and content, use of tools is an error."""
    messages = []
    for message in cell:
        if not isinstance(message, dict):
            raise _Broken("not a list of messages", f"{called} must be text or messages; seen {short(cell)}")
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if role is None:
            seen = short(", ".join(map(str, message)))
            raise _Broken("unknown role", f"{called}: a message has role and content, or from and value; seen {seen}")
        role = _role(role, f"{called}: the role of a message", roles)
        if calls := message.get("tool_calls") or message.get("function_call"):
            raise _Broken("use of a tool", f"{called}: a message calls a tool, which is not read: {short(calls)}")
        if isinstance(content, list) and content and all(_is_text_part(part) for part in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str) or _HALF_CHARACTER.search(content):
            raise _Broken("non-text cell", f"{called}: the content of a message must be text; seen {short(content)}")
        messages.append({"role": role, "content": content})
    return messages


THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought")
"""What a message of a model that thinks aloud may have beside its content."""
SPELLS_MESSAGES = r"^\s*\[\s*\{\s*\""
"""How a text begins that is a JSON list of objects."""


def _talk(cell: Any) -> Any:
    """Return the messages that a text spells as a JSON list, as cells of .csv files do; any other cell as it is."""
    if not isinstance(cell, str) or not re.match(SPELLS_MESSAGES, cell):
        return cell
    try:
        found = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    are_messages = all(
        isinstance(one, dict) and ({"role", "content"} <= one.keys() or {"from", "value"} <= one.keys())
        for one in found
    )
    return found if are_messages else cell


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _chat(parts: Mapping[str, Any], called: str, roles: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the messages of {system, history, user}; an empty system message or history is none."""
    messages: list[dict[str, str]] = []
    for role in PROMPT_ROLES:
        part = _talk(parts.get(role)) if role == "history" else parts.get(role)
        if part in (None, "", []) and role != "user":
            continue
        if role != "history":
            messages += [{"role": role, "content": _text(part, "prompt", f"{called}, {role}")}] if role in parts else []
        elif isinstance(part, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in part):
            for asked, answered in part:
                messages += [{"role": "user", "content": _text(asked, "prompt", f"{called}, history")}]
                messages += [{"role": "assistant", "content": _text(answered, "prompt", f"{called}, history")}]
        elif isinstance(part, list):
            messages += _messages(part, f"{called}, history", roles)
        else:
            raise _Broken("not a list of messages", f"{called}: history is a list of turns; seen {short(part)}")
    return messages


# ---------------------------------------------------------------- transcripts of Anthropic's HH


def _hh(read: _Cells, names: Sequence[str]) -> tuple[Prompt, list[str]]:
    """Return what both transcripts say before the last answer, and the last answers.

    Where the card maps the prompt, that is a transcript and the answers are not.
    """
    if "prompt" in read.card.columns:
        return _hh_prompt(read.text("prompt")), [read.text(name) for name in names]
    turns = [_hh_turns(read.text(name)) for name in names]
    prompt = turns[0][0]
    if any(other != prompt for other, _ in turns):
        raise _Broken(
            "transcripts differ before the last answer", f"{' and '.join(names)} differ before the last answer"
        )
    answers = [
        _text(answer, "completion" if name == "transcript" else name, f"the last answer of {read.called(name)}")
        for name, (_, answer) in zip(names, turns, strict=True)
    ]
    return prompt, answers


def _hh_prompt(transcript: str) -> list[dict[str, str]]:
    """Return the turns of a transcript that ends where the answer begins."""
    messages, answer = _hh_turns(transcript)
    if answer:
        raise _Broken("transcript goes on after Assistant:", "the prompt must end with Assistant: and no answer")
    return messages


def _common_prefix(read: _Cells, names: Sequence[str]) -> tuple[Prompt, list[str]]:
    """Return the longest text that both begin with, cut back to before its last white space; and the rest of each.

    What both answers happen to begin with goes to the prompt as well.
    """
    first, second = [read.text(name) for name in names]
    length = next(
        (at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    prompt = re.sub(r"\s+\S*\Z", "", first[:length]) if re.search(r"\s", first[:length]) else ""
    if not prompt.strip():
        raise _Broken("no common prefix", f"{' and '.join(names)} begin with no common words")
    texts = [
        _text(text[len(prompt) :], name, read.called(name)) for name, text in zip(names, (first, second), strict=True)
    ]
    return prompt, texts


def _hh_turns(transcript: str) -> tuple[list[dict[str, str]], str]:
    """Return the turns of "\\n\\nHuman: ...\\n\\nAssistant: ..." before the last answer as messages, and that answer.

    The last answer is what follows the last "\\n\\nAssistant:". Turns lose the white space around them; turns of one
    speaker in a row, before the last answer, are one message.
    """
    before, *parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + transcript.lstrip())
    speakers, said = parts[::2], [text.strip() for text in parts[1::2]]
    if before.strip() or not speakers or speakers[0] != "Human":
        raise _Broken("transcript does not begin with Human:", "a transcript must begin with Human: and the first turn")
    if speakers[-1] != "Assistant":
        raise _Broken(
            "transcript does not end with Assistant:", "the last turn of a transcript must be the Assistant's"
        )
    messages: list[dict[str, str]] = []
    for speaker, text in zip(speakers[:-1], said[:-1], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{text}".strip()
        else:
            messages.append({"role": role, "content": text})
    return messages, said[-1]
