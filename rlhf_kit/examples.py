"""A data card's rows in their canonical form, split, counted and hashed.

Every row of the files is either kept or dropped for a reason that is counted. What is wrong with a file (cut off, not
JSON, without a column) is an error always; what is wrong with a row (nothing in a cell, equal answers) is an error with
file and line, or a counted drop where the card says `on_problem: drop`. Local files are read here, without `datasets`,
so that `check` is quick and every row has a line number; Hub datasets go through `datasets`, imported late.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf_kit.data_cards import DataCard, HubSource, SpecialTokens, data_suffix, template_columns
from rlhf_kit.errors import InputError, did_you_mean, printable

__all__ = [
    "Demonstration",
    "Examples",
    "Preference",
    "Prompt",
    "PromptRow",
    "Row",
    "Text",
    "load_examples",
    "prompts_of",
]

Prompt = str | list[dict[str, str]]
"""Text, used as it is; or chat messages {"role", "content"} of system, user and assistant, the last not the
assistant's."""

MAX_LINE = 2**26
"""Bytes of a line. A small .gz can unpack to a line that fills the memory."""
SHOWN = 5
"""Broken rows that an error message shows."""

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
    special_tokens: SpecialTokens = "escape"


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


Row = Demonstration | Preference | PromptRow | Text


@dataclass(frozen=True)
class Examples:
    """What a card yields. No prompt is both in `train` and in `heldout`."""

    card: DataCard
    train: list[Any]
    """Rows, all of the class that belongs to the card's kind, in the order of the files."""
    heldout: list[Any]
    counts: dict[str, int]
    """"read", "kept", and "dropped: <reason>" for each reason; what was kept and dropped adds up to what was read."""
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
    counts: Counter[str] = Counter()
    broken: list[str] = []
    train = list(_canonical(card, card.sources, counts, broken))
    heldout: list[Row] = []
    if not isinstance(card.heldout, float):
        heldout = list(_canonical(card, card.heldout, counts, broken))
    dropped = {f"dropped: {reason}": number for reason, number in counts.items() if reason != "read"}
    if broken and card.on_problem == "error":
        rules = {name: number for name, number in dropped.items() if not name.startswith("dropped: filters")}
        raise InputError(
            [
                *broken[:SHOWN],
                f"{card.path}: {_reasons(rules)} in {counts['read']:,} rows; mend them, or write on_problem: drop "
                "to leave them out, counted",
            ]
        )
    if isinstance(card.heldout, float):
        train, heldout = _split(train, card.heldout)
    else:
        reserved = {_key(row) for row in heldout}
        kept = [row for row in train if _key(row) not in reserved]
        if len(kept) < len(train):
            dropped["dropped: prompt is also held out"] = len(train) - len(kept)
        train = kept
    if not train:
        raise InputError(f"{card.path}: no row is left to train on: of {counts['read']:,} read {_reasons(dropped)}")
    return _examples(card, train, heldout, {"read": counts["read"], **dropped})


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


def _examples(card: DataCard, train: list[Row], heldout: list[Row], counts: Mapping[str, int]) -> Examples:
    counts = {"read": counts["read"], "kept": len(train) + len(heldout), **counts}
    digest = hashlib.sha256()
    for side in (train, heldout):
        for row in side:
            content = {**vars(row), "where": ""}
            if row.special_tokens == "escape":  # the hash that such rows had before there was a choice
                del content["special_tokens"]
            digest.update(_encode(content).encode() + b"\n")
        digest.update(b"\n")
    return Examples(card, train, heldout, dict(counts), digest.hexdigest())


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
    hashes = {key: int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64 for key in map(_key, rows)}
    if share == 0 or len(hashes) < 2:
        return rows, []
    least, greatest = min(hashes.values()), max(hashes.values())
    limit = math.nextafter(least, 1) if least >= share else min(share, greatest)
    return [row for row in rows if hashes[_key(row)] >= limit], [row for row in rows if hashes[_key(row)] < limit]


# ---------------------------------------------------------------- rows, from theirs to ours


def _canonical(
    card: DataCard, source: Sequence[Path] | HubSource, counts: Counter[str], broken: list[str]
) -> Iterator[Row]:
    """Yield the rows that keep the rules; count every row, and for those that do not keep them why."""
    taken = 0
    for part in [source] if isinstance(source, HubSource) else source:
        is_first = True
        for where, cells in _hub_rows(part) if isinstance(part, HubSource) else _file_rows(part):
            if is_first:
                _check_columns(card, where, cells)
                is_first = False
            counts["read"] += 1
            unmet = [name for name, wanted in card.filters.where.items() if not _is(cells.get(name), wanted)]
            if unmet:
                counts[f"filters.where.{unmet[0]}"] += 1
                continue
            try:
                yield replace(_row(card, cells, where), special_tokens=card.special_tokens)
            except _Broken as problem:
                counts[problem.reason] += 1
                broken.append(printable(f"{where}: {problem.detail}"))
            taken += 1
            if taken == card.filters.max_rows:
                return
        if is_first:
            raise InputError(f"{part}: is empty, there is no row in it")


def _is(cell: Any, wanted: Any) -> bool:
    """Return whether a cell has the value wanted, or one of them; cells of .csv files are text."""
    values = wanted if isinstance(wanted, list) else [wanted]
    return any(
        (cell == value and isinstance(cell, bool) == isinstance(value, bool))
        or (isinstance(cell, str) and cell == str(value))
        for value in values
    )


def _check_columns(card: DataCard, where: str, cells: Mapping[str, Any]) -> None:
    """Raise InputError if the first row of a file lacks a column; only dialogues can do without a prompt."""
    problems = []
    for name, column in card.columns.items():
        missing = [part for part in template_columns(column) or (column,) if part not in cells]
        if not missing or (name in ("margin", "annotator") and name not in card.mapped):
            continue
        if name == "prompt" and name not in card.mapped and _is_dialogue(cells, card):
            continue
        what = f"column {missing[0]}, which the card takes for {name}" if name in card.mapped else f"column {name}"
        near = did_you_mean(missing[0], cells)
        seen = "" if near.startswith("; known") else f" (columns: {', '.join(map(str, cells))})"
        mend = "" if name in card.mapped else f"; map it in {card.path}: columns: {{{name}: <their name>}}"
        if str(cells.get("chosen", "")).lstrip().startswith("Human:"):
            mend = f"; these are transcripts, write format: hh in {card.path}"
        problems.append(f"{where}: there is no {what}{near.replace('; known', '; columns')}{seen}{mend}")
    for name in card.filters.where:
        if name not in cells:
            near = did_you_mean(name, cells).replace("; known", "; columns")
            problems.append(f"{where}: there is no column {name}, which filters.where of {card.path} names{near}")
    if problems:
        raise InputError([printable(problem) for problem in problems])


def _is_dialogue(cells: Mapping[str, Any], card: DataCard) -> bool:
    return any(isinstance(cells.get(column), list) for name, column in card.columns.items() if name != "prompt")


def _row(card: DataCard, cells: Mapping[str, Any], where: str) -> Row:
    """Return the canonical row, or raise _Broken."""
    read = _Cells(card, cells)
    if card.kind == "text":
        return Text(read.text("text"), where)
    if card.kind == "prompts":
        prompt = _hh_turns(read.text("transcript"))[0] if card.format else read.prompt()
        return PromptRow(_kept(prompt), where)
    if card.kind == "demonstrations":
        prompt, (completion,) = _hh(read, ["transcript"]) if card.format else read.prompt_and_answers(["completion"])
        return Demonstration(_kept(prompt), completion, where)
    pair = ["chosen", "rejected"]
    prompt, (chosen, rejected) = _hh(read, pair) if card.format else read.prompt_and_answers(pair)
    if chosen.strip() == rejected.strip():
        raise _Broken("chosen equal to rejected", f'chosen is equal to rejected: "{_short(chosen)}"')
    return Preference(_kept(prompt), chosen, rejected, where, read.margin(), read.annotator())


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

    def __init__(self, card: DataCard, cells: Mapping[str, Any]):
        self.card, self.cells = card, cells

    def has(self, name: str) -> bool:
        return self.card.columns.get(name) in self.cells or bool(template_columns(self.card.columns.get(name, "")))

    def called(self, name: str) -> str:
        theirs = self.card.columns[name]
        return name if theirs == name else f"{name} (column {theirs})"

    def cell(self, name: str) -> Any:
        """Return a cell, or the template over several, without white space at its ends."""
        theirs = self.card.columns[name]
        parts = template_columns(theirs)
        for part in parts or (theirs,):
            if part not in self.cells:
                raise _Broken("missing column", f"{self.called(name)} is missing in this row")
            if parts and not isinstance(self.cells[part], str):
                raise _Broken("non-text cell", f"column {part} must be text; seen {_short(self.cells[part])}")
        if not parts:
            return self.cells[theirs]
        return re.sub(r"\{([^{}]+)\}", lambda match: self.cells[match[1]], theirs).strip()

    def text(self, name: str) -> str:
        return _text(self.cell(name), name, self.called(name))

    def prompt(self) -> Prompt:
        prompt = self.cell("prompt")
        return _messages(prompt, self.called("prompt")) if isinstance(prompt, list) else self.text("prompt")

    def prompt_and_answers(self, names: Sequence[str]) -> tuple[Prompt, list[str]]:
        """Return the prompt and the texts of the answers, which may be given as messages or as whole dialogues."""
        cells = [self.cell(name) for name in names]
        if not all(isinstance(cell, list) for cell in cells):
            answers = [self.text(name) for name in names]  # raises if one is a list of messages
            return self.prompt(), answers
        dialogues = [_messages(cell, self.called(name)) for name, cell in zip(names, cells, strict=True)]
        for name, dialogue in zip(names, dialogues, strict=True):
            if not dialogue or dialogue[-1]["role"] != "assistant":
                raise _Broken(
                    "dialogue without a last answer", f"{self.called(name)} must end with the assistant's message"
                )
        before = dialogues[0][:-1]
        if any(dialogue[:-1] != before for dialogue in dialogues):
            raise _Broken(
                "dialogues differ before the last answer", f"{' and '.join(names)} differ before the last answer"
            )
        written = self.prompt() if self.has("prompt") else before
        if isinstance(written, str):
            if before and written not in [message["content"] for message in before]:
                raise _Broken("prompt differs from the dialogue", f"{self.called('prompt')} is not in the dialogue")
            written = before or [{"role": "user", "content": written}]
        elif before and written != before:
            raise _Broken("prompt differs from the dialogue", f"{self.called('prompt')} is not how the dialogue begins")
        answers = [
            _text(dialogue[-1]["content"], name, self.called(name))
            for name, dialogue in zip(names, dialogues, strict=True)
        ]
        return written, answers

    def margin(self) -> float | None:
        if not self.has("margin"):
            return None
        cell = self.cell("margin")
        try:
            if cell in (None, "") or isinstance(cell, bool):
                margin = None if cell in (None, "") else float("nan")
            else:
                margin = float(cell)
        except (TypeError, ValueError):
            margin = float("nan")
        if margin is not None and not abs(margin) < float("inf"):
            raise _Broken("margin is no number", f"{self.called('margin')} must be a number; seen {_short(cell)}")
        return margin

    def annotator(self) -> str | None:
        cell = self.cell("annotator") if self.has("annotator") else None
        return None if cell in (None, "") else str(cell)


def _text(cell: Any, name: str, called: str) -> str:
    if not isinstance(cell, str):
        raise _Broken("non-text cell", f"{called} must be text; seen {_short(cell)}")
    if not cell.strip():
        raise _Broken(f"empty {name}", f"{called} is empty")
    if re.search("[\ud800-\udfff]", cell):
        raise _Broken("text that is not Unicode", f"{called} has half of a surrogate pair, which is not Unicode text")
    return cell


ROLES: Mapping[Any, str] = {
    "system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant",
}  # fmt: skip
"""Roles as they are written, {"role", "content"} or {"from", "value"}, and ours."""


def _messages(cell: list[Any], called: str) -> list[dict[str, str]]:
    messages = []
    for message in cell:
        if not isinstance(message, dict):
            raise _Broken("not a list of messages", f"{called} must be text or messages; seen {_short(cell)}")
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise _Broken(
                "unknown role",
                f"{called}: the role of a message must be system, user or assistant; seen {_short(role)}",
            )
        if not isinstance(content, str) or re.search("[\ud800-\udfff]", content):
            raise _Broken("non-text cell", f"{called}: the content of a message must be text; seen {_short(content)}")
        messages.append({"role": ROLES[role], "content": content})
    return messages


def _short(value: Any) -> str:
    """Return a value for a message, so that two different ones look different and a long one stays short."""
    if value is None:
        return "nothing (null)"
    text = printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= 80 else text[:77] + "..."


# ---------------------------------------------------------------- transcripts of Anthropic's HH


def _hh(read: _Cells, names: Sequence[str]) -> tuple[Prompt, list[str]]:
    """Return what both transcripts say before the last answer, and the last answers."""
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


# ---------------------------------------------------------------- files


def _file_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield "file:line" and the cells of each row of a file.

    Raises:
        InputError: it is cut off or not what its ending says; with the line.
    """
    suffix = data_suffix(path)
    assert suffix is not None  # load_card has seen to it
    match suffix.removesuffix(".gz"):
        case ".jsonl" | ".ndjson":
            return _jsonl_rows(path)
        case ".json":
            return _json_rows(path)
        case ".csv":
            return _csv_rows(path, ",")
        case ".tsv":
            return _csv_rows(path, "\t")
    return _parquet_rows(path)


def _lines(path: Path) -> Iterator[str]:
    number = 0
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
                if len(line) > MAX_LINE:
                    raise InputError(f"{path}:{number}: the line is longer than {MAX_LINE:,} bytes")
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{number}: byte {error.start + 1} of the line is not UTF-8 text") from None
    except EOFError:
        raise InputError(f"{path}:{number + 1}: the compressed file is cut off here; get it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}:{number + 1}: not a sound gzip file: {error}; get it again") from None
    except OSError as error:
        raise InputError(f"{path}:{number + 1}: cannot be read: {error.strerror or error}") from None


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == 1 and line.strip() == "[":
                raise InputError(f"{path}:1: is a JSON list and not JSON lines; let its name end in .json") from None
            cut = "" if line.endswith("\n") else "; is the file cut off here?"
            raise InputError(f"{path}:{number}: not a line of JSON: {_json_error(error)}{cut}") from None
        yield (where := f"{path}:{number}"), _object(row, where)


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a JSON list; or of a file with one object after another, as some .json files are."""
    text = "".join(_lines(path))
    space, decoder = re.compile(r"[\s,]*"), json.JSONDecoder()
    start = len(text) - len(text.lstrip())
    is_list = text[start : start + 1] == "["
    position = space.match(text, start + is_list).end()  # type: ignore[union-attr]
    line, counted = 1, 0
    while position < len(text) and not (is_list and text[position] == "]"):
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise InputError(f"{path}:{at}: not JSON: {_json_error(error)}") from None
        yield (where := f"{path}:{line}"), _object(row, where)
        position = space.match(text, position).end()  # type: ignore[union-attr]
    if is_list and (position >= len(text) or text[position + 1 :].strip()):
        line = text.count("\n", 0, position) + 1
        raise InputError(f"{path}:{line}: the list has no end; is the file cut off here?" if position >= len(text)
                         else f"{path}:{line}: there is more behind the end of the list")  # fmt: skip


def _json_error(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f'{where}: a row is an object such as {{"prompt": "..."}}; seen {_short(row)}')
    return row


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(MAX_LINE)
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = cells
                twice = [name for name, number in Counter(header).items() if number > 1]
                if twice:
                    raise InputError(printable(f"{where}: the header names column {twice[0]} twice"))
            elif len(cells) != len(header):
                raise InputError(
                    f"{where}: {len(cells)} cells under a header of {len(header)}; quote cells with {delimiter!r}"
                )
            else:
                yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}:{line}: not CSV: {error}; is a quote not closed, or the file cut off?") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for number, row in enumerate(batch.to_pylist(), start=number + 1):  # noqa: B020
                    yield f"{path}:{number}", row
    except (pyarrow.ArrowException, OSError) as error:
        said = str(error).splitlines()[0]
        raise InputError(f"{path}:{number + 1}: not a sound Parquet file: {said}; get it again") from None


def _hub_rows(source: HubSource) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        data = datasets.load_dataset(
            source.repo,
            source.config,
            data_dir=source.data_dir,
            data_files=list(source.data_files) if isinstance(source.data_files, tuple) else source.data_files,
            split=source.split,
            revision=source.revision,
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{source}: cannot be had from the Hub: {str(error).splitlines()[0]}") from error
    for number, row in enumerate(data, start=1):
        yield f"{source}:{number}", row
