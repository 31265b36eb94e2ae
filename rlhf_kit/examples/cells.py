"""One row of a file by our names for its columns, and whether a cell has the value that a card wants."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_kit.columns import (
    Expression,
    Missing,
    columns_of,
    is_there,
    optional_columns,
    optional_value,
    template_columns,
    value_of,
)
from rlhf_kit.data_cards import DataCard, range_of
from rlhf_kit.data_files import short
from rlhf_kit.examples.book import Broken, LeftOut
from rlhf_kit.examples.messages import chat, checked_text, our_messages, talk
from rlhf_kit.examples.rows import Prompt, encode

__all__ = ["Cells", "cell_or_none", "has", "meets", "way_into"]

THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought")
"""What a message of a model that thinks aloud may have beside its content."""


class Cells:
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
        return has(self.card, name, self.cells)

    def called(self, name: str) -> str:
        theirs = way_into(self.card, name, self.cells) if name in self.card.columns else name
        return name if theirs == name else f"{name} ({'column ' * isinstance(theirs, str)}{_written(theirs)})"

    def cell(self, name: str, *, gaps: bool = False) -> Any:
        """Return what stands where the card says; with `gaps`, None for an element of a list that has it not."""
        theirs = way_into(self.card, name, self.cells)
        if theirs == name and name not in self.cells:
            raise Broken("missing column", f"{name} is missing in this row")
        return value_of(theirs, self.cells, gaps=gaps)

    def text(self, name: str) -> str:
        return checked_text(self.cell(name), name, self.called(name))

    def talk(self, cell: Any) -> Any:
        found = talk(cell)
        self.spelt_talk |= found is not cell
        messages = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
        self.thoughts |= any(message.get(name) for message in messages for name in THOUGHTS)
        return found

    def prompt(self) -> Prompt:
        if self.card.templates:
            return checked_text(_drawn(self.card.templates, self.cells), "prompt", "prompt")
        prompt = self.talk(self.cell("prompt"))
        if isinstance(prompt, list):
            messages = our_messages(prompt, self.called("prompt"), self.card.roles)
            is_answered = messages and messages[-1]["role"] == "assistant" and "prompt" not in self.cells
            return messages[:-1] if is_answered and "prompt" not in self.card.mapped else messages
        if isinstance(prompt, dict):
            return chat(prompt, self.called("prompt"), self.card.roles)
        return self.text("prompt")

    def prompt_and_answers(self, names: Sequence[str]) -> tuple[Prompt, list[str]]:
        """Return the prompt and the texts of the answers, which may be given as messages or as whole dialogues."""
        return self.answered([(name, self.called(name), self.cell(name)) for name in names])

    def answered(self, answers: Sequence[tuple[str, str, Any]]) -> tuple[Prompt, list[str]]:
        """Return the prompt and the texts of the answers: our name, what to call it, and what stands there."""
        answers = [(name, called, self.talk(cell)) for name, called, cell in answers]
        if not all(isinstance(cell, list | dict) for _, _, cell in answers):
            texts = [checked_text(cell, name, called) for name, called, cell in answers]  # raises if one is messages
            return self.prompt(), texts
        roles = self.card.roles
        dialogues = [
            our_messages([cell] if isinstance(cell, dict) else cell, called, roles) for _, called, cell in answers
        ]
        for (_, called, _), dialogue in zip(answers, dialogues, strict=True):
            if not dialogue or dialogue[-1]["role"] != "assistant":
                raise Broken("dialogue without a last answer", f"{called} must end with the assistant's message")
        before = dialogues[0][:-1]
        if any(dialogue[:-1] != before for dialogue in dialogues):
            raise Broken(
                "dialogues differ before the last answer",
                f"{' and '.join(dict.fromkeys(name for name, _, _ in answers))} differ before the last answer",
            )
        written = self.prompt() if self.card.templates or self.has("prompt") else before
        if isinstance(written, str):
            if before and written not in [message["content"] for message in before]:
                raise Broken("prompt differs from the dialogue", f"{self.called('prompt')} is not in the dialogue")
            written = before or [{"role": "user", "content": written}]
        elif before and written != before:
            raise Broken("prompt differs from the dialogue", f"{self.called('prompt')} is not how the dialogue begins")
        texts = [
            checked_text(dialogue[-1]["content"], name, called)
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
                        raise LeftOut(f"judged {short(value)}")
                    return meaning
        known = ", ".join(short(value) for _, values in meanings for value in values)
        raise Broken("unknown preference", f"the card gives no meaning to {short(value)}; known: {known}")

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
            raise Broken(f"{name} is no number", f"{self.called(name)} must be a number; seen {short(cell)}{way}")
        if self.card.scale is not None and name in ("rating", "ratings"):
            lowest, highest = self.card.scale
            if not lowest <= number <= highest:
                raise Broken(
                    "rating outside the scale",
                    f"{self.called(name)} is on a scale from {lowest:g} to {highest:g}; seen {number:g}",
                )
        return number

    def numbers(self, name: str, count: int) -> list[float]:
        """Return a list of as many numbers as there are completions."""
        cell = self.cell(name)
        if not isinstance(cell, list) or len(cell) != count:
            raise Broken(
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
            raise Broken("margin is no number", f"{self.called('margin')} must be a number; seen {short(cell)}")
        if margin is not None and self.card.columns["margin"] == self.card.columns.get("preferred"):
            return abs(margin)  # a strength, whose sign says which is better
        if margin is not None and margin < 0:
            raise Broken(
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
            raise Broken("no group", f"{self.called('group')} must be text or a number; seen {short(cell)}")
        return str(cell)

    def annotator(self) -> str | None:
        cell = self.cell("annotator") if self.has("annotator") else None
        if isinstance(cell, list | dict):
            raise Broken("several annotators", f"{self.called('annotator')} must name one; seen {short(cell)}")
        return None if cell in (None, "") else str(cell)


def way_into(card: DataCard, name: str, cells: Mapping[str, Any]) -> Expression:
    """Return where a row has what we call `name`; of rows of messages alone, prompt and completion are in these."""
    of_messages = {"demonstrations": "completion", "prompts": "prompt"}.get(card.kind)
    if name == of_messages and name not in card.mapped and name not in cells and "messages" in cells:
        return "messages"
    return card.columns[name]


def has(card: DataCard, name: str, cells: Mapping[str, Any]) -> bool:
    """Return whether the row has all that the card takes for what we call `name`."""
    theirs = way_into(card, name, cells) if name in card.columns else None
    if theirs is None or (isinstance(theirs, str) and theirs in cells):  # nearly always it is this simple
        return theirs is not None
    return all(is_there(path, cells) for path in columns_of(theirs))


def _written(expression: Any) -> str:
    if isinstance(expression, str):
        return expression
    return ", ".join([*columns_of(expression), *optional_columns(expression)] or map(str, expression))


def _drawn(templates: Mapping[str, str], cells: Mapping[str, Any]) -> str:
    """Return the prompt of the template that the row draws.

    Rows that agree in what the templates take draw the same one, wherever they stand; a new template takes rows from
    the others and moves none between them.
    """
    names = sorted({path for template in templates.values() for path in template_columns(template)})
    taken = encode([optional_value(path, cells) if path.endswith("?") else value_of(path, cells) for path in names])
    drawn = max(
        templates, key=lambda name: hashlib.sha256(f"{name}\0{taken}".encode("utf-8", "surrogatepass")).digest()
    )
    return str(value_of(templates[drawn], cells))


def meets(name: str, wanted: Any, cells: Mapping[str, Any]) -> bool:
    """Return whether the row has in that column the value wanted, or one of them, or a number in a range of them."""
    found = cell_or_none(name, cells)
    return _is(found, wanted) or _is_within(found, _listed(wanted))


def cell_or_none(name: str, cells: Mapping[str, Any]) -> Any:
    """Return what stands in the row where the path leads, None if nothing does."""
    try:
        return value_of(name, cells)
    except Missing:
        return None


def _is(cell: Any, wanted: Any) -> bool:
    """Return whether a cell has the value wanted, or one of them; a text is also what it spells, true is not 1."""
    return any(_equal(cell, value) for value in _listed(wanted))


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
