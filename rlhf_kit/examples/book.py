"""What becomes of the rows that are read: which were dropped or merged, why, and the first of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_kit.data_cards import DataCard
from rlhf_kit.data_files import short
from rlhf_kit.errors import printable

__all__ = ["OVER_LINES", "SHOWN", "Book", "Broken", "LeftOut", "reasons"]

SHOWN = 5
"""Broken rows that an error message shows."""
OVER_LINES = "a cell of a .tsv over several lines, as a quote at its beginning makes it"


class Broken(Exception):
    """A row breaks a rule."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason, self.detail = reason, detail or reason


class LeftOut(Exception):
    """The card leaves the row out by a value of its own."""


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
            f"{card.path}: {reasons(self.breaking)} in {self.read:,} rows; mend them, or write on_problem: drop "
            "to leave them out, counted",
        ]


def reasons(dropped: Mapping[str, int]) -> str:
    """Return the counts in words, "3 × empty chosen, 1 × no vote"; "none" of none."""
    return ", ".join(f"{number:,} × {name.removeprefix('dropped: ')}" for name, number in dropped.items()) or "none"
