"""A card's examples: its rows split, counted and hashed; their prompts alone; several cards mixed."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf_kit.data_cards import DataCard
from rlhf_kit.errors import InputError
from rlhf_kit.examples.book import SHOWN, Book, reasons
from rlhf_kit.examples.reading import canonical_rows
from rlhf_kit.examples.rows import PromptRow, Row, Text, encode

__all__ = ["Examples", "Share", "load_examples", "mixed", "prompts_of"]


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
        what = f"no row is left to train on: of {book.read:,} read {reasons(others)}{book.wanted(card)}"
        raise InputError(f"{card.path}: {what}")
    return _examples(card, train, heldout, {"read": book.read, **others})


def _shared(card: DataCard, shared: Sequence[Row], reserved: Mapping[str, str]) -> list[str]:
    shown = [f"{row.where}: the prompt is also held out, in {reserved[_key(row)]}" for row in shared[:SHOWN]]
    return [
        *shown,
        f"{card.path}: {len(shared):,} rows to train on have prompts that are also held out; take them out of one, or "
        "write shared_prompts: drop to leave them out of training, counted",
    ]


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
    return encode(content)


def _key(row: Row) -> str:
    """Return the text that decides on which side of the split a row is."""
    return row.text if isinstance(row, Text) else encode(row.prompt)


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
