"""What is said of a file that lacks a column which its card takes, and how to map it."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_kit.columns import Missing, columns_of, is_there, our_way, value_of
from rlhf_kit.data_cards import DataCard
from rlhf_kit.data_files import is_one_object
from rlhf_kit.errors import InputError, did_you_mean, printable
from rlhf_kit.examples.cells import has, way_into
from rlhf_kit.examples.messages import talk

__all__ = ["check_columns"]

MAY_BE_MISSING = ("margin", "annotator", "ranks", "ratings")
"""Of our names those that need not be there, where the card does not map them."""


def check_columns(card: DataCard, where: str, cells: Mapping[str, Any]) -> None:
    """Raise InputError if the first row of a file lacks a column; only dialogues can do without a prompt."""
    problems, unmapped = [], []
    for name in card.columns:
        missing = [path for path in columns_of(way_into(card, name, cells)) if not is_there(path, cells)]
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
    if card.kind == "rankings" and judged and not any(has(card, name, cells) for name in judged):
        problems.append(
            f"{where}: there is no column ranks or ratings; map one in {card.path}: columns: {{ranks: <their name>}} "
            f"(columns: {', '.join(map(str, cells))})"
        )
    if not card.mapped & set(judged) and has(card, "ranks", cells) and has(card, "ratings", cells):
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


def _is_dialogue(cells: Mapping[str, Any], card: DataCard) -> bool:
    answers = ("chosen", "rejected", "first", "second", "completion", "completions")
    for name in answers:
        if name in card.columns:
            try:
                value = value_of(way_into(card, name, cells), cells)
            except Missing:
                continue
            value = value[0] if name == "completions" and isinstance(value, list) and value else value
            if isinstance(talk(value), list):
                return True
    return False
