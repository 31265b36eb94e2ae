"""YAML as plain data that remembers on which line each value stood, so that every message can say where.

Recipes and data cards are read with it. The dialect is YAML 1.2's core schema and a little less: `no` and `on` are
text, `1e-5` is a number, and what surprises people is refused: duplicate keys, anchors and aliases, tags.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml

from rlhf_kit.errors import InputError, printable

KeyPath = tuple[str | int, ...]
"""The way to a value: ("stages", "ppo", "kl_coef")."""

Problem = tuple[KeyPath, str]

MAX_DEPTH = 16
MAX_VALUES = 20_000
"""Keys and values of a document. PyYAML takes about a second for so many; the longest cards have a few thousand."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict] = {}  # type: ignore[misc]  # its own, not YAML 1.1's


class _Dumper(yaml.SafeDumper):  # quotes what either dialect would not read as text
    def represent_str(self, data: str) -> yaml.ScalarNode:
        odd = any(letter in "\x85\u2028\u2029\ufeff" for letter in data)  # written plainly they read back as breaks
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if odd else None)

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(str, _Dumper.represent_str)

for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]{0,30}", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
     list("-+.0123456789")),
):  # fmt: skip
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), _first)


@dataclass
class MarkedYaml:
    """Plain dicts, lists and scalars, and where each of them was written."""

    name: str
    """The file, as the user named it."""
    value: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    texts: dict[KeyPath, str] = field(default_factory=dict)
    """Scalars as they were written: the number 1e-5 is the text "1e-5"."""
    overrides: dict[KeyPath, str] = field(default_factory=dict)
    """Values that came from elsewhere than the file, and where from."""

    def place(self, path: KeyPath) -> str:
        """Return "file:line" of the value at `path`, or of the nearest value around it that was written."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.overrides:
                return self.overrides[path[:end]]
            if path[:end] in self.lines:
                return f"{self.name}:{self.lines[path[:end]]}"
        return self.name

    def seen(self, path: KeyPath) -> str:
        """Return the value at `path` as it was written, shortened, for a message."""
        value = self.value
        for step in path:
            value = value[step]
        if isinstance(value, dict):
            return "a mapping"
        if isinstance(value, list):
            return "a list"
        if value is None:
            return "nothing"
        text = self.texts.get(path, str(value))
        text = text if len(text) <= 60 else text[:57] + "..."
        return f'"{text}"' if isinstance(value, str) else text

    def put(self, path: Sequence[str], value: MarkedYaml, place: str) -> None:
        """Replace the value at `path`, making the mappings on the way to it.

        Raises:
            InputError: something on the way is there and is not a mapping.
        """
        whole = tuple(path)
        if not isinstance(self.value, dict):
            self.value = {}
        target = self.value
        for end, step in enumerate(path[:-1], start=1):
            if target.get(step) is None:
                target[step] = {}
                self.overrides[whole[:end]] = place
            target = target[step]
            if not isinstance(target, dict):
                raise InputError(
                    f"{place}: {_dotted(whole[:end])} is {self.seen(whole[:end])}, not a mapping; set it as a whole: "
                    f"--set '{_dotted(whole[:end])}=...'"
                )
        target[path[-1]] = value.value
        for notes in (self.lines, self.texts, self.overrides):
            for old in [old for old in notes if old[: len(whole)] == whole]:
                del notes[old]
        self.overrides[whole] = place
        self.texts |= {whole + inner: text for inner, text in value.texts.items()}

    def messages(self, problems: Iterable[Problem]) -> list[str]:
        """Return one message for each problem, "file:line: a.b: what", without repetitions, in the file's order."""
        unique = list(dict.fromkeys(problems))
        unique.sort(key=lambda problem: self._order(problem[0]))
        return [printable(f"{self.place(path)}: {_dotted(path)}{': ' if path else ''}{what}") for path, what in unique]

    def _order(self, path: KeyPath) -> tuple[bool, int]:
        place = self.place(path)
        line = place.rpartition(":")[2]
        in_file = place.startswith(f"{self.name}:")
        return (not in_file and place != self.name, int(line) if in_file else 0)


def read_yaml(text: str, name: str, first_line: int = 1) -> MarkedYaml:
    """Return the data of a YAML document that begins on line `first_line` of the file `name`.

    Raises:
        InputError: not YAML, or one of the things refused here; all that is found, with lines.
    """
    try:
        problems = list(_refused(text))
        if problems:
            raise InputError([printable(f"{name}:{line + first_line}: {what}") for line, what in problems])
        root = yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, int(error.position)) + first_line
        raise InputError(f"{name}:{line}: the character {chr(error.character)!r} cannot stand in YAML") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise InputError(
            f"{name}{f':{mark.line + first_line}' if mark else ''}: not YAML: {error.problem or error.context}"
            f"{_syntax_hint(error)}"
        ) from None
    marked = MarkedYaml(name)
    if root is not None:
        twice: list[str] = []
        marked.lines[()] = first_line
        marked.value = _plain(root, (), marked, first_line, twice)
        if twice:
            raise InputError([printable(message) for message in twice])
    return marked


def write_yaml(data: Any) -> str:
    """Return `data` as YAML that `read_yaml` reads back equal, keys in their given order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _refused(text: str) -> Iterator[tuple[int, str]]:
    depth = values = 0
    for event in yaml.parse(text, Loader=_Loader):
        line = event.start_mark.line if event.start_mark else 0
        tag = getattr(event, "tag", None)
        if isinstance(event, yaml.AliasEvent):
            yield line, f"*{event.anchor} is an alias, which is not used here; write the value out, or quote it"
        elif isinstance(event, yaml.NodeEvent) and event.anchor:
            yield line, f"&{event.anchor} is an anchor, which is not used here; remove it, or quote the value"
        elif tag not in (None, "!"):
            short = tag.replace("tag:yaml.org,2002:", "!!")
            yield line, f"{short} is a tag, which is not used here; remove it, or quote the value"
        values += isinstance(event, yaml.NodeEvent)
        if values > MAX_VALUES:
            yield line, f"more than {MAX_VALUES:,} keys and values; is this the right file?"
            return
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                yield line, f"nested more than {MAX_DEPTH} deep"
                return
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _plain(node: yaml.Node, path: KeyPath, marked: MarkedYaml, first_line: int, twice: list[str]) -> Any:
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + first_line
            if not isinstance(key_node, yaml.ScalarNode):
                twice.append(f"{marked.name}:{line}: a key must be a word, not a list or mapping")
                continue
            inner = (*path, key_node.value)
            if key_node.value in mapping:
                twice.append(
                    f"{marked.name}:{line}: {_dotted(inner)}: written twice, first on line {marked.lines[inner]}; "
                    "keep one"
                )
                continue
            marked.lines[inner] = line
            mapping[key_node.value] = _plain(value_node, inner, marked, first_line, twice)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            inner = (*path, index)
            marked.lines[inner] = item.start_mark.line + first_line
            items.append(_plain(item, inner, marked, first_line, twice))
        return items
    marked.texts[path] = node.value
    match node.tag.rpartition(":")[2]:
        case "null":
            return None
        case "bool":
            return node.value.lower() == "true"
        case "int":
            return int(node.value.replace("_", ""))
        case "float":
            return float(node.value.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
    return node.value


def _syntax_hint(error: yaml.MarkedYAMLError) -> str:
    said = f"{error.context} {error.problem}"
    if "\\t" in said:
        return "; indent with spaces, not tabs"
    if "cannot start any token" in said or "alias" in said or "anchor" in said or "tag" in said:
        return "; put values that begin with * & ! % @ or ` in quotes"
    if "mapping values are not allowed" in said:
        return "; a value with a colon in it needs quotes, and keys of one mapping the same indentation"
    if "expected a single document" in said:
        return "; keep one document in a file"
    if "expected ',' or '}'" in said or "expected ',' or ']'" in said:
        return '; put text with [ ] { } or ? in quotes: "x.y[0]", "{question}"'
    if "could not find expected ':'" in said or "expected <block end>" in said:
        return "; look at the indentation here and in the line above"
    return ""


def _dotted(path: KeyPath) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")
