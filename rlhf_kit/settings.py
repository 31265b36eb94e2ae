"""Typed settings from YAML files: the kinds of field, the files themselves, and what to say when something is wrong.

Recipes and data cards are read with it. What pydantic finds becomes "must be ...; seen ...", with what would work.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import ErrorDetails, PydanticCustomError

from rlhf_kit.errors import InputError, did_you_mean
from rlhf_kit.marked_yaml import KeyPath, MarkedYaml

MAX_BYTES = 1_000_000
"""Recipes and cards are a page or a few long; something larger is another file."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
HUB = "hub://"
_HUB_REFERENCE = re.compile(rf"{HUB}({HUB_ID.pattern})((?:/[A-Za-z0-9_][\w.-]*)*)(?:@(\w[\w./-]*))?")


class Settings(BaseModel):
    """Frozen; unknown keys are errors; numbers are numbers and not text that looks like one."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


# ---------------------------------------------------------------- fields


def matching(pattern: re.Pattern[str], expected: str) -> AfterValidator:
    """Return the check that a text matches `pattern` as a whole; `expected` says in words what that is."""

    def check(text: str) -> str:
        if pattern.fullmatch(text):
            return text
        raise PydanticCustomError("unexpected", "{expected}", {"expected": expected})

    return AfterValidator(check)


def _text_or_texts(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list) and texts and all(isinstance(text, str) and text for text in texts):
        return value
    raise PydanticCustomError("unexpected", "{expected}", {"expected": "text or a list of texts, none empty"})


Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
TextOrTexts = Annotated[str | list[str], BeforeValidator(_text_or_texts)]


# ---------------------------------------------------------------- what is wrong with them

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "too_short": "given: at least one",
}
_LIMITS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def explain(error: ErrorDetails, path: KeyPath, marked: MarkedYaml) -> str:
    """Return what one of pydantic's errors means to the person who wrote the value: expected, seen, what would work."""
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    seen = marked.seen(path)
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        one_of = f"{', '.join(choices[:-1])} or {choices[-1]}" if len(choices) > 1 else choices[0]
        return f"must be {one_of}; seen {seen}{near(str(value), choices)}"
    if kind in _LIMITS:
        name, words = _LIMITS[kind]
        expected = f"{words} {context[name]:g}"
    elif kind == "unexpected":
        expected = context["expected"]
    elif kind in _EXPECTED:
        expected = _EXPECTED[kind]
    else:
        return f"{error['msg']}; seen {seen}"
    return f"must be {expected}; seen {seen}{_mend(kind, value, marked.texts.get(path, ''))}"


def _mend(kind: str, value: Any, written: str) -> str:
    """Return what to write instead, where that can be told."""
    word = str(value).lower()
    if kind == "string_type" and isinstance(value, int | float):
        return f'; in quotes it is text: "{written or value}"'
    if kind == "bool_type" and word in ("yes", "on", "1"):
        return "; write true"
    if kind == "bool_type" and word in ("no", "off", "0"):
        return "; write false"
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if kind in ("int_type", "float_type") and value is not None and word in ("none", "nil", "no", "off", "n/a"):
        return "; for none at all write null"
    if kind in ("int_type", "float_type") and isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", word):
        return "; write it without quotes"
    return ""


def near(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean x?", or nothing if no known word is near."""
    hint = did_you_mean(word, known)
    return hint if hint.startswith("; did") else ""


def written_wrongly(key: str, written: Mapping[str, Any], fields: Iterable[str]) -> bool:
    """Return whether one of the unknown keys written is probably meant to be `key`."""
    known = list(fields)
    return any(near(other, known) == f"; did you mean {key}?" for other in written if other not in known)


# ---------------------------------------------------------------- the Hub


@dataclass(frozen=True)
class HubReference:
    """A repository of the Hub, or a folder in one, at a revision: hub://OWNER/NAME[/SUBFOLDER][@REVISION]."""

    repo: str
    subfolder: str = ""
    revision: str | None = None

    FORM = "hub://OWNER/NAME[/SUBFOLDER][@REVISION]"

    def __str__(self) -> str:
        inside = f"/{self.subfolder}" if self.subfolder else ""
        return f"{HUB}{self.repo}{inside}{f'@{self.revision}' if self.revision else ''}"


def hub_reference(written: str) -> HubReference | None:
    """Return what a text that begins with hub:// names, or None where it is not written as such a reference."""
    found = _HUB_REFERENCE.fullmatch(written)
    return HubReference(found[1], found[2].strip("/"), found[3]) if found else None


# ---------------------------------------------------------------- files


def read_text(path: Path, what: str, suffixes: Sequence[str]) -> str:
    """Return the text of a small file that the user named; `what` it should be goes into messages.

    Raises:
        InputError: there is none, it is a folder, too large, or not UTF-8.
    """
    try:
        if path.is_dir():
            names = sorted(entry.name for entry in path.iterdir() if entry.suffix in suffixes)
            raise InputError(
                f"{path}: is a folder; name the {what} file in it{': ' if names else ''}{', '.join(names)}"
            )
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise InputError(f"{path}: is a device or a pipe; name a {what} file")
        size = about.st_size
        if size > MAX_BYTES:
            raise InputError(f"{path}: {size:,} bytes is more than the {MAX_BYTES:,} a {what} may have; wrong file?")
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such {what}{not_found(str(path), [Path()])}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8 text; is this a {what}?") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read the {what}: {error.strerror}") from None


def find_path(written: str, places: Sequence[Path]) -> Path | None:
    """Return the path meant by `written`, looked for in each of the folders, or None if nothing is there.

    It is relative to the working directory when inside it, else absolute.
    """
    for place in places:
        candidate = place / os.path.expanduser(written)  # pathlib raises where a user is unknown
        try:
            exists = candidate.exists()
        except (OSError, ValueError):  # a name too long, a NUL character
            exists = False
        if exists:
            absolute, here = Path(os.path.abspath(candidate)), Path.cwd()
            return absolute.relative_to(here) if absolute.is_relative_to(here) and absolute != here else absolute
    return None


def climbs(written: str) -> bool:
    """Return whether a relative path leads out of the folder that it is looked for in."""
    return os.path.normpath(written).split(os.sep)[0] == ".." and not os.path.isabs(written)


def not_found(written: str, places: Sequence[Path]) -> str:
    """Return the end of a message about a path that `find_path` did not find: the nearest name, or where it looked."""
    if "$" in written:
        return "; environment variables are not filled in"
    path = Path(os.path.expanduser(written))
    folders = [Path()] if path.is_absolute() else list(dict.fromkeys(places))
    for place in folders:
        folder = (place / path).parent
        if path.name and folder.is_dir():
            hint = near(path.name, [entry.name for entry in folder.iterdir()])
            if hint:
                return hint if folder == Path() else f"{hint.removesuffix('?')} in {folder}?"
    if folders == [Path()]:
        return ""
    return f" (looked in {', '.join('the working directory' if p == Path() else str(p) for p in folders)})"


def without_local_paths(value: Any) -> Any:
    """Return a JSON value in which a text that is an absolute path is its last part: "/home/me/m" becomes "m".

    For what leaves the machine with an adapter. Paths below the working directory are relative already (`find_path`).
    """
    if isinstance(value, Mapping):
        return {key: without_local_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_local_paths(item) for item in value]
    return os.path.basename(value.rstrip("/")) if isinstance(value, str) and os.path.isabs(value) else value
