"""The small language in which a data card says where a value stands in a row.

    question                       a column
    info.post                      a field inside of it
    summaries[0].text              an element of a list; [-1] is the last one
    completions[].overall_score    of every element, as a list; [:9] of the first nine
    "{instruction}\\n{input?}"      a template over several of them; one with ? may be missing or null
    [answer_1, answer_2]           a list of them
    [1, 2, 2]                      numbers, the same in each row, for ranks and names
    {system: "s?", user: question} chat messages, for prompts; {system: {text: Be brief.}} for one text in all rows

Where a path goes into a text, the text is read as JSON, which is how .csv files hold lists. A column whose own name is
written like a path (`preference.responses`, `Better?`) is taken before the way into another. Braces of a template's own
are written twice: {{ and }}.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from rlhf_kit.errors import did_you_mean

__all__ = [
    "ROLES",
    "Expression",
    "Missing",
    "columns_of",
    "fault",
    "is_there",
    "optional_columns",
    "optional_value",
    "our_way",
    "value_of",
]

Constant = dict[str, str]
"""{"text": ...}: what every row has, and no column."""
Expression = str | list[str] | list[int | float] | dict[str, str | Constant]
Step = str | int | slice

ROLES = ("system", "history", "user")
"""Keys of a prompt's chat messages: history is a list of messages, or of pairs of question and answer."""

_STEP = re.compile(r"\.([^.\[\]{}]+)|\[(-?\d{1,9})\]|\[(?:(-?\d{1,9})?:(-?\d{1,9})?)?\]")
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")


class Missing(LookupError):
    """There is nothing where the expression points; `reason` is without the row's own words."""

    def __init__(self, reason: str, detail: str):
        self.reason, self.detail = reason, detail


@lru_cache(maxsize=1024)
def path_of(text: str) -> tuple[Step, ...]:
    """Return the steps of `info.posts[0]`: ("info", "posts", 0); the text itself as one step if it is no path."""
    first = re.match(r"[^.\[\]{}]+", text)
    steps: list[Step] = [first[0]] if first else []
    end = first.end() if first else 0
    while first and end < len(text):
        step = _STEP.match(text, end)
        if step is None:
            return (text,)
        name, index, start, stop = step.groups()
        if name is not None:
            steps.append(name)
        elif index is not None:
            steps.append(int(index))
        else:
            steps.append(slice(int(start) if start else None, int(stop) if stop else None))
        end = step.end()
    return tuple(steps) or (text,)


@lru_cache(maxsize=1024)
def template_columns(template: str) -> tuple[str, ...]:
    """Return what a template such as "{instruction}\\n{input?}" names in braces, as it is written there; nothing if it
    is not a template."""
    rest = _BRACES.sub("", template)
    return () if "{" in rest or "}" in rest else tuple(path for path in _BRACES.findall(template) if path)


def columns_of(expression: Expression) -> list[str]:
    """Return the paths that an expression is made of, templates taken apart, less those that a row may lack."""
    return [path for path, optional in _paths(expression) if not optional]


def optional_columns(expression: Expression) -> list[str]:
    """Return the paths that a row may lack, with their question marks."""
    return [path for path, optional in _paths(expression) if optional]


def _paths(expression: Expression, role: str = "user") -> list[tuple[str, bool]]:
    """Return paths and whether a row may lack them: a question mark means that in templates, and before what the user
    says; else it belongs to the column's name."""
    match expression:
        case str():
            if names := template_columns(expression):
                return [(path, path.endswith("?")) for path in names]
            return [(expression, _may_lack(role, expression))]
        case list():
            return [path for part in _parts(expression) for path in _paths(part)]
    return [path for role, part in expression.items() if isinstance(part, str) for path in _paths(part, role)]


def _may_lack(role: str, part: str) -> bool:
    return role != "user" and part.endswith("?") and not template_columns(part)


def fault(expression: Expression) -> str | None:
    """Return what is wrong with the way an expression is written, or None."""
    if isinstance(expression, dict):
        unknown = [role for role in expression if role not in ROLES]
        if unknown:
            return f"a prompt of messages has {', '.join(ROLES)}, not {unknown[0]}"
        if "user" not in expression and "history" not in expression:
            return "a prompt of messages needs user: what is asked"
        own = {role: text for role, text in expression.items() if isinstance(text, dict)}
        if any(role != "system" or text.keys() != {"text"} for role, text in own.items()):
            return "a text of the card's own is system: {text: Be brief.}"
    for part in [expression] if isinstance(expression, str) else _parts(expression):
        if re.fullmatch(r"\{\{\s*[^{}]+?\s*\}\}", part):
            return f"a template has single braces: {{{part.strip('{} ')}}}"
        if ("{" in part or "}" in part) and not template_columns(part):
            return 'a template names columns in braces, such as "{instruction} {input}", its own braces being {{ and }}'
    return None


def _parts(expression: list[str] | list[int | float] | dict[str, str | Constant]) -> list[str]:
    parts = expression if isinstance(expression, list) else expression.values()
    return [part for part in parts if isinstance(part, str)]


def is_there(path: str, cells: Mapping[str, Any]) -> bool:
    """Return whether the row has the column that a path begins with."""
    return path in cells or path_of(path)[0] in cells


def our_way(path: str) -> str:
    """Return a path that is written as in JSONPath or Python, `$.x['y'][*]`, in our words: `x.y[]`."""
    ours = re.sub(r"^\$(?=[.\[])\.?", "", path).replace("[*]", "[]")
    return re.sub(r"""\[(["'])([^"'\[\].]+)\1\]""", r".\2", ours).lstrip(".") or path


def value_of(expression: Expression, cells: Mapping[str, Any], *, gaps: bool = False) -> Any:
    """Return the value in a row; a template's is text without white space at its ends.

    gaps: what an element of a list does not have is None.

    Raises:
        Missing: the row does not have it.
    """
    if isinstance(expression, str):
        if expression in cells:
            return cells[expression]
        names = template_columns(expression)
        if not names:
            return _walk(cells, path_of(expression), expression, gaps)
        filled = {name: _filled(name, cells) for name in names}
        return _BRACES.sub(lambda match: filled[match[1]] if match[1] else match[0][0], expression).strip()
    if isinstance(expression, list):
        return [value_of(part, cells) if isinstance(part, str) else part for part in expression]
    return {role: _of_messages(role, part, cells) for role, part in expression.items()}


def optional_value(path: str, cells: Mapping[str, Any]) -> Any:
    """Return the value where a path with a question mark leads, None if the row does not have it."""
    try:
        return value_of(path if path in cells else path.removesuffix("?"), cells)
    except Missing:
        return None


def _of_messages(role: str, part: str | Constant, cells: Mapping[str, Any]) -> Any:
    if isinstance(part, dict):
        return part["text"]
    return optional_value(part, cells) if _may_lack(role, part) else value_of(part, cells)


def _filled(name: str, cells: Mapping[str, Any]) -> str:
    """Return the text that a part of a template becomes; numbers, true and false are written as in JSON."""
    optional = name.endswith("?")
    mend = f"; write {{{name}?}} where rows may lack it"
    try:
        value = optional_value(name, cells) if optional else value_of(name, cells)
    except Missing as missing:
        raise Missing(missing.reason, missing.detail + mend) from None
    if value is None and optional:
        return ""
    if isinstance(value, int | float) and math.isfinite(value):
        return json.dumps(value)
    if not isinstance(value, str):
        seen = "nothing (null)" if value is None else json.dumps(value, ensure_ascii=False, default=str)[:80]
        raise Missing("non-text cell", f"column {name} must be text; seen {seen}{mend if value is None else ''}")
    return value


def _walk(value: Any, steps: tuple[Step, ...], path: str, gaps: bool = False) -> Any:
    for number, step in enumerate(steps):
        if isinstance(value, str) and number:
            value = _structured(value, path)
        if isinstance(step, str):
            if not isinstance(value, Mapping):
                raise Missing("missing column", f"{path}: there is no {step}, for it is inside no mapping")
            if step not in value:
                raise Missing("missing column", f"{path}: there is no {step} in this row{did_you_mean(step, value)}")
            value = value[step]
        elif not isinstance(value, list):
            raise Missing("missing column", f"{path}: there is no list to take {_shown(step)} of")
        elif isinstance(step, slice):
            walk = _walk_or_none if gaps else _walk
            return [walk(item, steps[number + 1 :], path) for item in value[step]]
        elif not -len(value) <= step < len(value):
            raise Missing("missing column", f"{path}: the list has {len(value)} elements, there is no [{step}]")
        else:
            value = value[step]
    return value


def _walk_or_none(value: Any, steps: tuple[Step, ...], path: str) -> Any:
    try:
        return _walk(value, steps, path)
    except Missing:
        return None


def _structured(text: str, path: str) -> Any:
    """Return the list or object that a text spells, as cells of .csv files do."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Missing("missing column", f"{path}: goes into a text, which is not JSON: {text[:40]!r}") from None


def _shown(step: int | slice) -> str:
    return f"[{step}]" if isinstance(step, int) else "the elements"
