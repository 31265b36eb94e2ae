"""A data card: how to read a dataset, and what a person should know about it, in one Markdown file.

The file is a Hugging Face dataset card whose front matter also holds a block `rlhf_kit:`. `load_card` reads that block
and finds the files; the rows themselves are read in `examples`. Nothing here imports torch or datasets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from glob import glob
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from pydantic_core import PydanticCustomError, PydanticKnownError

from rlhf_kit.columns import Expression, fault, optional_columns, path_of, template_columns
from rlhf_kit.errors import InputError, did_you_mean
from rlhf_kit.marked_yaml import KeyPath, MarkedYaml, Problem, read_yaml
from rlhf_kit.recipe import STAGE_KINDS
from rlhf_kit.settings import (
    HUB_ID,
    Count,
    Positive,
    Settings,
    Text,
    TextOrTexts,
    climbs,
    explain,
    find_path,
    matching,
    near,
    not_found,
    read_text,
    written_wrongly,
)

__all__ = ["DataCard", "Filters", "HubSource", "Preferred", "load_card"]

Kind = Literal["demonstrations", "preferences", "rankings", "prompts", "text"]
SpecialTokens = Literal["escape", "refuse", "allow"]
"""What becomes of text in the data that spells a special token, such as "</s>": it stays text, it is an error, or it
becomes that token."""


@dataclass(frozen=True)
class Shape:
    """Our names for the columns of rows of one kind."""

    needed: tuple[str, ...]
    may: tuple[str, ...] = ()
    """What else there may be."""
    judged: tuple[str, ...] = ()
    """At least one of these says which completion is the better one."""


SHAPES: Mapping[str, tuple[Shape, ...]] = {
    "demonstrations": (Shape(("prompt", "completion")),),
    "preferences": (
        Shape(("prompt", "chosen", "rejected"), ("margin", "annotator", "ratings", "probability")),
        Shape(("prompt", "first", "second"), ("margin", "annotator"), ("preferred", "ratings", "probability")),
    ),
    "rankings": (
        Shape(("prompt", "completions"), ("annotator", "names"), ("ranks", "ratings", "comparisons", "ranked")),
        Shape(("prompt", "completion"), ("annotator", "group"), ("rank", "rating")),
    ),
    "prompts": (Shape(("prompt",)),),
    "text": (Shape(("text",)),),
}
"""A card has the first shape of its kind unless it maps a name that only another has."""
HH_SHAPES: Mapping[str, tuple[Shape, ...]] = {
    **{kind: (Shape(("transcript",)),) for kind in ("demonstrations", "prompts")},
    "preferences": tuple(Shape(one.needed[1:], ("prompt", *one.may), one.judged) for one in SHAPES["preferences"]),
    "rankings": SHAPES["rankings"][:1],
}
"""Of format hh, where one column holds prompt and completion, or the prompt is a transcript of its own."""
PREFIX_SHAPES = {"preferences": tuple(Shape(one.needed[1:], one.may, one.judged) for one in SHAPES["preferences"])}
"""Of format common_prefix, where prompts stand in the answers only."""
THREAD_SHAPES = {
    "rankings": tuple(Shape(("id", "parent", "role", "text", last), ("annotator",)) for last in ("rank", "rating"))
}
"""Of format threads, where a row is one message and names the one that it answers."""
BY_DEFAULT = {"transcript": "chosen"}
"""Our names that are called otherwise in the data unless mapped."""
UNASKED = ("margin", "annotator", "ranks", "ratings")
"""Names that are taken without being mapped where a column is called so."""
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".feather")
"""Endings of files that are read; those of text also with .gz or .zst behind."""
PACKED = (".gz", ".zst")
BINARY = (".parquet", ".arrow", ".feather")


@dataclass(frozen=True)
class HubSource:
    """A split of a dataset on the Hub, at a revision."""

    repo: str
    revision: str
    config: str | None
    split: str
    data_dir: str | None
    data_files: str | tuple[str, ...] | None
    streaming: bool = False
    """Read rows as they come and keep no copy of the dataset."""

    def __str__(self) -> str:
        inside = "".join(f"/{part}" for part in (self.config, self.data_dir) if part)
        return f"{self.repo}{inside}@{self.revision}[{self.split}]"


def _values(written: Any) -> Any:
    values = written if isinstance(written, list) else [written]
    if not values or not all(isinstance(value, str | int | float | bool | None) for value in values) or written is None:
        raise PydanticCustomError("unexpected", "{expected}", {"expected": "a value or a list of values"})
    if any(ends and ends[0] > ends[1] for ends in map(range_of, values)):
        raise PydanticCustomError("unexpected", "{expected}", {"expected": 'ranges from low to high, such as "1..3"'})
    return values


def range_of(written: Any) -> tuple[float, float] | None:
    """Return the ends of a range written "0.5..3", or None for another value."""
    ends = _RANGE.fullmatch(written) if isinstance(written, str) else None
    return (float(ends[1]), float(ends[2])) if ends else None


_NUMBER = r"(-?(?:\d+(?:\.\d*)?|\.\d+))"
_RANGE = re.compile(rf"{_NUMBER}\.\.{_NUMBER}")


def _column(written: Any) -> Any:
    if isinstance(written, list | dict):
        parts = _texts_of(written) if isinstance(written, dict) else written
        if written and (all(isinstance(part, str) and part for part in parts) or _are_numbers(written)):
            return written
        expected = "columns, written as text" + " (a template in quotes)" * isinstance(written, dict)
        raise PydanticCustomError("unexpected", "{expected}", {"expected": expected})
    if isinstance(written, str) and written:
        return written
    raise (
        PydanticKnownError("string_too_short", {"min_length": 1})
        if written == ""
        else PydanticKnownError("string_type")
    )


def _are_numbers(written: Any) -> bool:
    """Return whether a column is a list of numbers, which are the same in each row."""
    numbers = written if isinstance(written, list) else []
    return numbers != [] and all(isinstance(part, int | float) and not isinstance(part, bool) for part in numbers)


def _texts_of(messages: dict[str, Any]) -> list[Any]:
    """Return what messages are made of, texts of the card's own as such."""
    return [part["text"] if isinstance(part, dict) and "text" in part else part for part in messages.values()]


def _scale(written: Any) -> Any:
    ends = written if isinstance(written, list) else []
    if len(ends) == 2 and all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends):
        return written
    raise PydanticCustomError("unexpected", "{expected}", {"expected": "the lowest and the highest rating: [1, 7]"})


def _names(written: Any) -> Any:
    names = written if isinstance(written, list) else [written]
    if names and all(isinstance(name, str | int) and not isinstance(name, bool) and name != "" for name in names):
        return [str(name).lower() for name in names]
    raise PydanticCustomError("unexpected", "{expected}", {"expected": "a name in the data or a list of names"})


Scale = Annotated[list[float], BeforeValidator(_scale)]
Values = Annotated[list[Any], BeforeValidator(_values)]
Names = Annotated[list[str], BeforeValidator(_names)]
_Column = Annotated[Any, BeforeValidator(_column)]


class Filters(Settings):
    """Which rows are taken, before any rule is applied to them."""

    max_rows: Count | None = None
    """The first so many rows that pass `where`; nothing is read after them."""
    where: dict[str, str | int | float | bool | list[str | int | float | bool] | None] = Field(default={})
    """The dataset's column: the value, or list of values, that it must have; "3..5" is a range with both ends."""


class Preferred(Settings):
    """What the values of a column that names the better completion mean; "0.5..3" is a range with both ends."""

    first: Values
    """Values that mean that the first completion is the better one."""
    second: Values
    """Values that mean that the second one is."""
    tie: Values = Field(default=[])
    """Values that mean that neither is."""
    drop: Values = Field(default=[])
    """Values whose rows are left out, and counted."""


class Roles(Settings):
    """Whose words a message holds, by the names that the data has for them, in upper case or lower; beside those that
    are known."""

    system: Names = Field(default=[])
    """Names of whoever sets the scene."""
    user: Names = Field(default=[])
    """Names of whoever asks."""
    assistant: Names = Field(default=[])
    """Names of whoever answers, as the model is to."""


@dataclass(frozen=True)
class DataCard:
    """What a card says. `path` and `sources` open from the working directory."""

    path: Path
    name: str
    kind: Kind
    sources: tuple[Path, ...] | HubSource
    rows: str | None
    """In .json files that are one object, the way to the list of rows."""
    format: Literal["hh", "common_prefix", "threads"] | None
    quoting: Literal["none"] | None
    """Of .csv and .tsv files: none where quotes are text."""
    columns: Mapping[str, Expression]
    """Our names of this kind and shape -> where the value stands in a row, in the words of `columns`."""
    mapped: frozenset[str]
    """Those of our names that the card maps itself."""
    templates: Mapping[str, str]
    """Prompts over several columns, by name, of which each row draws one."""
    optional: tuple[str, ...]
    """What of both a row may lack, with question marks."""
    roles: Mapping[str, str]
    """The data's names, in lower case, of those who speak in messages -> ours; beside the ones that are known."""
    preferred: Preferred | None
    votes: Literal["majority", "probability"] | None
    scale: tuple[float, float] | None
    """The lowest and the highest rating there is."""
    margin_per_point: float | None
    max_completions: int | None
    """Of a prompt whose completions have a row each, so many are taken."""
    heldout: float | tuple[Path, ...] | HubSource
    """Share of prompts, chosen by their hash; or where the held-out rows are."""
    shared_prompts: Literal["error", "drop"]
    filters: Filters
    slices: tuple[str, ...]
    """Columns by whose values a reward model's accuracy is told apart."""
    on_problem: Literal["error", "drop"]
    special_tokens: SpecialTokens
    metadata: Mapping[str, Any]
    """The rest of the front matter: licence, language, ..."""
    text: str
    """The prose below the front matter."""


def _in_the_dataset(value: Any) -> Any:
    """Refuse what `datasets` would look for elsewhere than in the dataset: on this machine, or at another address."""
    for path in value if isinstance(value, list) else [value]:
        if isinstance(path, str) and (path.startswith(("/", "~")) or climbs(path) or ":" in path or "\\" in path):
            raise PydanticCustomError("unexpected", "{expected}", {"expected": "a path inside the dataset"})
    return value


InDataset = BeforeValidator(_in_the_dataset)


class _HubSettings(Settings):
    hub: Annotated[str, matching(HUB_ID, "a Hub dataset, written owner/name")]
    """The dataset, owner/name."""
    revision: Text
    """The commit or tag to read."""
    config: Text | None = None
    """One of its configurations."""
    split: Text = "train"
    """The split to train on."""
    data_dir: Annotated[Text | None, InDataset] = None
    """A folder inside the dataset."""
    data_files: Annotated[TextOrTexts | None, InDataset] = None
    """Files inside the dataset."""
    streaming: bool = False
    """Read rows as they come and keep no copy of the dataset."""


class _Block(Settings):
    kind: Kind
    """What a row is."""
    source: Any
    """A file, a pattern of names, a list of files, or a dataset on the Hub {hub, revision, ...}. Files are looked for
    in the recipe's data_root, beside the card, then in the working directory."""
    rows: Text | None = None
    """In .json files that are one object, the key (or way: a.b) behind which the list of rows stands."""
    format: Literal["hh", "common_prefix", "threads"] | None = None
    """hh: transcripts "Human: ... Assistant: ..." of which the last answer is the completion; common_prefix: chosen and
    rejected begin with the prompt; threads: a row is a message that names the one it answers."""
    quoting: Literal["none"] | None = None
    """none: quotes in .csv and .tsv files are text; null: a cell that begins with a quote goes on to the next one."""
    columns: dict[str, _Column] = Field(default={})
    """Our name: where the value stands in a row. Names that agree need not be listed."""
    templates: dict[str, Text] = Field(default={})
    """Name: a prompt over several columns; each row draws one, by its content."""
    roles: Roles = Roles()
    """Ours: what the data calls those who speak in messages, where it is not a name that is known."""
    preferred: Preferred | None = None
    """What the values of the column `preferred`, or of `comparisons`, mean."""
    votes: Literal["majority", "probability"] | None = None
    """What becomes of several votes on one pair; null keeps each as a row."""
    scale: Scale | None = None
    """The lowest and the highest rating there is, [1, 7]; others are errors."""
    margin_per_point: Positive | None = None
    """Margin of a pair for each point between the two ratings."""
    max_completions: Annotated[int, Field(ge=2, le=9)] | None = None
    """Where completions have a row each: the first so many of a prompt are taken, others are left out and counted."""
    heldout: Any = 0.1
    """What is kept for evaluation: a share of the prompts, chosen by hash, or a file, or the name of a split."""
    shared_prompts: Literal["error", "drop"] = "error"
    """What becomes of held-out rows whose prompt is trained on, where heldout is a file or split."""
    filters: Filters = Filters()
    """Which rows are taken."""
    slices: list[Text] = Field(default=[])
    """Columns of comparisons, such as subset, for each of whose values a reward model's accuracy is told."""
    on_problem: Literal["error", "drop"] = "error"
    """What becomes of rows that break a rule: the run stops and shows them, or they are left out and counted."""
    special_tokens: SpecialTokens = "escape"
    """What becomes of text that spells a special token: it stays text, it is an error, or it becomes that token."""


NEEDED: Mapping[tuple[str, ...], str] = {
    ("kind",): "demonstrations, preferences, rankings, prompts or text",
    ("source",): f"a file ({', '.join(SUFFIXES)}), a list of files, or {{hub: owner/name, revision: ...}}",
    ("source", "hub"): "a Hub dataset, written owner/name",
    ("source", "revision"): "the commit or tag to read, so that the data cannot change under the recipe",
    ("preferred", "first"): "the values that mean that the first completion is the better one",
    ("preferred", "second"): "the values that mean that the second completion is the better one",
}


def card_metadata(path: Path) -> dict[str, Any]:
    """Return the front matter of a card as it is written, without looking for the files that it names.

    Raises:
        InputError: there is none, or it has no block rlhf_kit.
    """
    front, _ = _front_matter(path)
    metadata: dict[str, Any] = front.value
    return metadata


def load_card(path: str | Path, data_root: str | Path | None = None) -> DataCard:
    """Return the card in the file `path`; its relative sources are looked for in `data_root`, beside it, and here.

    Raises:
        InputError: everything that is wrong with the card, together, with lines.
    """
    path = Path(path)
    if data_root is not None and not Path(data_root).is_dir():
        raise InputError(f"{data_root}: is no folder, so there are no data in it; mend --data-root (or data_root)")
    front, text = _front_matter(path)
    metadata = front.value
    raw = dict(metadata["rlhf_kit"])
    for name in ("filters", "columns", "templates", "roles"):
        if name in raw and raw[name] is None:  # its every key commented out
            raw[name] = {}
    metadata["rlhf_kit"] = raw
    places = [path.parent, Path()] if data_root is None else [Path(data_root), path.parent, Path()]
    problems: list[Problem] = list(_problems(_Block, raw, ("rlhf_kit",), front))
    sources = None  # a missing source is among the problems by now
    if "source" in raw:
        sources = _sources(raw["source"], ("rlhf_kit", "source"), places, front, problems)
    heldout = _heldout(raw.get("heldout", 0.1), sources, places, front, problems)
    named = sources if isinstance(sources, tuple) else ()
    if isinstance(raw.get("rows"), str):
        files = [*named, *(heldout if isinstance(heldout, tuple) else ())]
        others = [str(file) for file in files if data_suffix(file) not in (".json", ".json.gz", ".json.zst")]
        if others or isinstance(sources, HubSource):
            problems.append((("rlhf_kit", "rows"), f"is for .json files; seen {others[0] if others else sources}"))
    problems += _column_problems(raw, front)
    tables = [file for file in named if (data_suffix(file) or "")[:4] in (".csv", ".tsv")]
    if raw.get("quoting") and sources and not tables:
        problems.append((("rlhf_kit", "quoting"), "is for .csv and .tsv files, of which the source names none"))
    problems += _role_problems(raw.get("roles"))
    if problems:
        raise InputError(front.messages(problems))
    block = _Block.model_validate(raw)
    columns = _columns(raw)
    ways = [*columns.values(), *block.templates.values()]
    assert sources is not None and heldout is not None
    return DataCard(
        path=path,
        name=path.stem,
        kind=block.kind,
        sources=sources,
        rows=block.rows,
        format=block.format,
        quoting=block.quoting,
        columns=columns,
        mapped=frozenset(block.columns),
        templates=block.templates,
        optional=tuple(dict.fromkeys(path for way in ways for path in optional_columns(way))),
        roles={name: role for role, names in block.roles for name in names},
        preferred=block.preferred,
        votes=block.votes,
        scale=None if block.scale is None else (block.scale[0], block.scale[1]),
        margin_per_point=block.margin_per_point,
        max_completions=block.max_completions,
        heldout=heldout,
        shared_prompts=block.shared_prompts,
        filters=block.filters,
        slices=tuple(block.slices),
        on_problem=block.on_problem,
        special_tokens=block.special_tokens,
        metadata={key: value for key, value in metadata.items() if key != "rlhf_kit"},
        text=text,
    )


def _front_matter(path: Path) -> tuple[MarkedYaml, str]:
    """Return the YAML between the two lines "---", which has a block rlhf_kit, and the text below."""
    lines = read_text(path, "data card", (".md",)).splitlines(keepends=True)
    fences = [number for number, line in enumerate(lines) if line.rstrip() == "---"]
    if not fences or "".join(lines[: fences[0]]).strip():
        raise InputError(f"{path}:1: {_FORM}" if lines else f"{path}: is empty; {_FORM}")
    if len(fences) == 1:
        raise InputError(f"{path}:{fences[0] + 1}: the front matter has no end; close it with a line ---")
    first, last = fences[:2]
    front = read_yaml("".join(lines[first + 1 : last]), str(path), first + 2)
    if not isinstance(front.value, dict) or not isinstance(front.value.get("rlhf_kit"), dict):
        raise InputError(_no_block(front))
    return front, "".join(lines[last + 1 :]).strip()


_FORM = (
    "a data card begins with front matter: a line ---, YAML with a block "
    "rlhf_kit: {kind: demonstrations, source: my.jsonl}, a line ---"
)


def _no_block(front: MarkedYaml) -> str:
    keys = front.value if isinstance(front.value, dict) else {}
    if "rlhf_kit" in keys:
        return f"{front.place(('rlhf_kit',))}: rlhf_kit: must be a mapping; seen {front.seen(('rlhf_kit',))}"
    stray = [key for key in ("kind", "source") if key in keys]
    hint = f"indent {' and '.join(stray)} below rlhf_kit:" if stray else _FORM
    misspelt = [key for key in keys if near(key, ["rlhf_kit"])]
    if misspelt:
        return f"{front.place((misspelt[0],))}: {misspelt[0]}: unknown key; did you mean rlhf_kit?"
    return f"{front.place(())}: the front matter has no block rlhf_kit; {hint}"


def _problems(settings: type[BaseModel], raw: Mapping[str, Any], at: KeyPath, marked: MarkedYaml) -> Iterator[Problem]:
    try:
        settings.model_validate(raw)
    except ValidationError as invalid:
        for error in invalid.errors(include_url=False):
            loc = (*at, *error["loc"])
            if loc[:3] == ("rlhf_kit", "filters", "where") and len(loc) > 3:
                yield loc[:4], f"must be a value or a list of values; seen {marked.seen(loc[:4])}"
                continue
            inner: Mapping[str, type[Settings]] = {"filters": Filters, "preferred": Preferred, "roles": Roles}
            key, inside = str(loc[-1]), inner.get(str(loc[-2]), settings)
            match error["type"]:
                case "extra_forbidden":
                    elsewhere = len(loc) == 2 and any(key in stage.model_fields for stage in STAGE_KINDS.values())
                    hint = "; it is a setting of a recipe's stage" if elsewhere else ""
                    yield loc, f"unknown key{hint or did_you_mean(key, inside.model_fields)}"
                case "missing":
                    if not written_wrongly(key, raw, settings.model_fields):
                        yield loc, f"missing, and has no default: {NEEDED[tuple(str(step) for step in loc[1:])]}"
                case _:
                    yield loc, explain(error, loc, marked)


def _shapes(raw: Mapping[str, Any]) -> tuple[Shape, ...]:
    """Return the shapes that rows of the card's kind and format may have; none if they do not go together."""
    return _shapes_of(str(raw.get("format"))).get(str(raw.get("kind")), ())


def _shapes_of(style: str) -> Mapping[str, tuple[Shape, ...]]:
    return {"hh": HH_SHAPES, "common_prefix": PREFIX_SHAPES, "threads": THREAD_SHAPES}.get(style, SHAPES)


def _shape(raw: Mapping[str, Any]) -> Shape:
    """Return the shape that the mapped names belong to."""
    shapes = _shapes(raw)
    mapped = {*raw.get("columns", {}), *(["preferred"] if raw.get("preferred") is not None else [])}
    first = shapes[0]
    shared = {*first.needed, *first.may, *first.judged}
    for shape in shapes[1:]:
        if mapped & ({*shape.needed, *shape.judged} - shared):
            return shape
    return first


def _columns(raw: Mapping[str, Any]) -> dict[str, Expression]:
    """Return our names -> theirs, with those that need not be mapped."""
    shape, mapped = _shape(raw), raw.get("columns", {})
    names = [name for name in shape.needed if name != "prompt" or not raw.get("templates")]
    optional = shape.may if mapped.keys() & set(shape.judged) else (*shape.may, *shape.judged)
    names += [name for name in optional if name in UNASKED and (name != "ratings" or name in shape.judged)]
    return {**{name: BY_DEFAULT.get(name, name) for name in names}, **mapped}


def _column_problems(raw: Mapping[str, Any], marked: MarkedYaml) -> Iterator[Problem]:
    kind, columns, templates = raw.get("kind"), raw.get("columns", {}), raw.get("templates", {})
    if not isinstance(kind, str) or kind not in SHAPES or not isinstance(columns, dict):
        return
    if not _shapes(raw):
        yield ("rlhf_kit", "format"), _no_such_format(str(raw["format"]), kind)
        return
    shape = _shape(raw)
    ours = [*shape.needed, *shape.may, *shape.judged]
    for name, theirs in columns.items():
        at = ("rlhf_kit", "columns", name)
        if name not in ours:
            known = [*ours, *(other for one in _shapes(raw) for other in (*one.needed, *one.may, *one.judged))]
            with_others = f", in a card with {', '.join(shape.needed)}" if name in known else ""
            swapped = isinstance(theirs, str) and theirs in ours
            hint = f"; the order is ours: theirs, so {theirs}: {name}" if swapped else did_you_mean(name, ours)
            yield at, f"{kind} have no column {name}{with_others}{hint}"
        elif isinstance(theirs, list) and name not in ("completions", "ranks", "ratings", "comparisons", "names"):
            yield at, "must be one column, or a template; seen a list"
        elif _are_numbers(theirs) and name not in ("ranks", "names"):
            yield at, "must be columns, written as text; numbers, the same in each row, are for ranks and names"
        elif isinstance(theirs, dict) and name != "prompt":
            yield at, "must be one column, or a template; seen a mapping"
        elif _is_written(theirs) and (wrong := fault(theirs)):
            yield at, f"{wrong}; seen {marked.seen(at)}"
    judged = [name for name in columns if name in shape.judged and (name != "ratings" or kind == "rankings")]
    if len(judged) > 1 and set(judged) != {"ranked", "ranks"}:
        yield ("rlhf_kit", "columns", judged[1]), f"says again which is better, as {judged[0]} does; map one of them"
    if "first" in shape.needed and not columns.keys() & set(shape.judged) and raw.get("preferred") is None:
        yield ("rlhf_kit", "columns"), f"map one of {', '.join(shape.judged)}, which says which completion is better"
    if "ranked" in columns and "names" not in columns and "completions" in shape.needed:
        called = names_of(columns.get("completions"))
        if called is None or len(set(called)) < len(called):
            yield (
                ("rlhf_kit", "columns", "ranked"),
                "names completions, and nothing says what these are called; map names: their names in the order of "
                'completions, such as "items[].id", or [0, 1, 2] where they are numbered',
            )
    if "names" in columns and "ranked" not in columns and "completions" in shape.needed:
        yield ("rlhf_kit", "columns", "names"), "are what ranked has in order, which is not mapped"
    if raw.get("max_completions") is not None and (kind != "rankings" or "completions" in shape.needed):
        at_list = "; of a list, completions[:9] takes the first nine" if kind == "rankings" else ""
        yield ("rlhf_kit", "max_completions"), f"is for rankings whose completions have a row each{at_list}"
    if raw.get("slices") and (kind not in ("preferences", "rankings") or raw.get("format") == "threads"):
        yield ("rlhf_kit", "slices"), "is for preferences and rankings, whose rows are comparisons"
    if isinstance(templates, dict) and templates:
        yield from _template_problems(templates, columns, shape, kind, marked)
    yield from _judgement_problems(raw, columns, shape)


def names_of(completions: Any) -> list[str] | None:
    """Return what completions are called that are listed by their columns, each as its path ends; None for others."""
    ends = [path_of(part)[-1] for part in completions if isinstance(part, str)] if isinstance(completions, list) else []
    return [str(end) for end in ends] if ends and all(isinstance(end, str) for end in ends) else None


def _role_problems(roles: Any) -> Iterator[Problem]:
    """Yield names that are given to two roles; what else may be wrong with them is told already."""
    said: dict[str, str] = {}
    for role, names in roles.items() if isinstance(roles, dict) else ():
        for name in names if isinstance(names, list) else [names]:
            before = said.setdefault(str(name).lower(), role)
            if before != role:
                yield ("rlhf_kit", "roles", role), f"gives {name} to {role}, and {before} has it; keep one"


def _is_written(theirs: Any) -> bool:
    """Return whether a column is text or made of texts; what else it may be is told already."""
    parts = _texts_of(theirs) if isinstance(theirs, dict) else theirs if isinstance(theirs, list) else [theirs]
    return all(isinstance(part, str) for part in parts)


def _no_such_format(written: str, kind: str) -> str:
    if written == "hh":
        return f"hh transcripts have no kind {kind}; use {', '.join(HH_SHAPES)}"
    return f"{written} is for {', '.join(_shapes_of(written))} and not for {kind}"


def _template_problems(
    templates: dict[str, Any], columns: dict[str, Any], shape: Shape, kind: str, marked: MarkedYaml
) -> Iterator[Problem]:
    at = ("rlhf_kit", "templates")
    if "prompt" not in shape.needed:
        yield at, f"{kind} of this format have no prompt to write a template for"
    if "prompt" in columns:
        yield ("rlhf_kit", "columns", "prompt"), "is mapped, and templates say it too; keep one"
    for name, template in templates.items():
        if isinstance(template, str) and not template_columns(template):
            yield (*at, name), f'names no columns in braces, such as "{{question}}"; seen {marked.seen((*at, name))}'


def _judgement_problems(raw: Mapping[str, Any], columns: dict[str, Any], shape: Shape) -> Iterator[Problem]:
    """Yield what does not go together among the settings about which completion is the better one."""
    kind, named = raw.get("kind"), columns.keys() & {"preferred", "comparisons"}
    if named and raw.get("preferred") is None:
        yield (
            ("rlhf_kit", "columns", min(named)),
            "say what its values mean: preferred: {first: 0, second: 1, tie: tie}",
        )
    elif raw.get("preferred") is not None and not named:
        yield ("rlhf_kit", "preferred"), "there is no column for it; map columns: {preferred: <their name>}"
    yield from _meaning_problems(raw.get("preferred"), columns)
    if raw.get("votes") is not None and "preferred" not in columns:
        yield ("rlhf_kit", "votes"), "votes are counted in a column preferred, which is not mapped"
    if raw.get("votes") is not None and "margin" in columns:
        yield ("rlhf_kit", "votes"), "several votes on a pair have no one margin; leave out votes or columns.margin"
    scale = raw.get("scale")
    ends = scale if isinstance(scale, list) and all(isinstance(end, int | float) for end in scale) else []
    if len(ends) == 2 and ends[0] >= ends[1]:
        yield ("rlhf_kit", "scale"), f"goes from the lowest rating to the highest; seen {ends[0]:g}, {ends[1]:g}"
    rated = columns.keys() & {"ratings", "rating"} or (kind == "rankings" and not columns.keys() & set(shape.judged))
    if scale is not None and not rated:
        yield ("rlhf_kit", "scale"), "is of ratings, and no column is mapped to ratings"
    if raw.get("margin_per_point") is not None:
        if not rated:
            yield ("rlhf_kit", "margin_per_point"), "is of ratings, and no column is mapped to ratings"
        elif "margin" in columns:
            yield ("rlhf_kit", "columns", "margin"), "is mapped, and margin_per_point says it too; keep one"


def _meaning_problems(preferred: Any, columns: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield the values of a column that have two meanings; and a strength as margin that has none by its sign."""
    written = preferred if isinstance(preferred, dict) else {}
    lists = {name: value if isinstance(value, list) else [value] for name, value in written.items()}
    meanings = {name: lists[name] for name in Preferred.model_fields if name in lists}
    for (one, values), (other, others) in combinations(meanings.items(), 2):
        twice = [(value, again) for value in values for again in others if _overlap(value, again)]
        if twice:
            value, again = (str(match) for match in twice[0])
            both = value if value == again else f"{value} and {again} have values in common, which"
            at = ("rlhf_kit", "preferred", other)
            yield at, f"{both} cannot mean {one} and {other}; write each value, and each range, so that it means one"
    first, second = (list(map(_span, meanings.get(name, []))) for name in ("first", "second"))
    signed = any(_beyond_zero(first, side) and _beyond_zero(second, -side) for side in (1, -1))
    if "margin" in columns and columns["margin"] == columns.get("preferred") and not signed:
        yield (
            ("rlhf_kit", "columns", "margin"),
            "is the column of preferred too, so its sign must say which one is better: of preferred.first and "
            "preferred.second, one has the numbers above 0, the other those below",
        )


def _overlap(one: Any, other: Any) -> bool:
    """Return whether there is a cell that two values of `preferred` both match."""
    spans = _span(one), _span(other)
    if spans[0] and spans[1] and spans[0][0] <= spans[1][1] and spans[1][0] <= spans[0][1]:
        return True
    return str(one) == str(other)  # as cells of .csv files are matched


def _span(value: Any) -> tuple[float, float] | None:
    """Return the ends of a range, or of a number, which may be written as text."""
    try:
        return range_of(value) or (None if isinstance(value, bool) else (float(value), float(value)))
    except (TypeError, ValueError, OverflowError):
        return None


def _beyond_zero(spans: Sequence[tuple[float, float] | None], side: int) -> bool:
    """Return whether all numbers lie above 0 (side 1) or below it (side -1), or on it."""
    return all(min(side * span[0], side * span[1]) >= 0 for span in spans if span)


# ---------------------------------------------------------------- where the rows are


def _sources(
    written: Any, at: KeyPath, places: Sequence[Path], marked: MarkedYaml, problems: list[Problem]
) -> tuple[Path, ...] | HubSource | None:
    if isinstance(written, dict):
        if of_hub := _HUB_ADDRESS.match(str(written.get("hub"))):
            problems.append(((*at, "hub"), f"is an address; write hub: {of_hub[1]}"))
            return None
        found = list(_problems(_HubSettings, written, at, marked))
        problems += found
        return None if found else _hub(_HubSettings.model_validate(written))
    names = [written] if isinstance(written, str) else written
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        problems.append((at, f"must be {NEEDED[('source',)]}; seen {marked.seen(at)}"))
        return None
    files: list[Path] = []
    before = len(problems)
    for index, name in enumerate(names):
        here = (*at, index) if isinstance(written, list) else at
        path = find_path(name, places[:-2] if climbs(name) else places)  # places[:-2] is the recipe's data_root, if any
        if path is None and climbs(name):
            problems.append(
                (here, f"{name} leads out of the card's folder; use the recipe's data_root, or an absolute path")
            )
        elif path is None and (matching_files := _glob(name, places)):
            files += matching_files
        elif path is None and (of_hub := _HUB_ADDRESS.match(name)):
            problems.append(
                (here, f"is an address; for the Hub dataset write {{hub: {of_hub[1]}, revision: <commit>}}")
            )
        elif path is None and "://" in name:
            problems.append((here, f"{name} is an address; get the file and name it as it is called here"))
        elif path is None and HUB_ID.fullmatch(name) and not Path(name).suffix:
            problems.append(
                (here, f"there is no file {name}; for the Hub dataset write {{hub: {name}, revision: <commit>}}")
            )
        elif path is None:
            problems.append((here, f"there is no file {name}{not_found(name, places)}"))
        elif path.is_dir():
            inside = sorted(entry.name for entry in path.iterdir() if data_suffix(entry) is not None)
            problems.append((here, f"{path} is a folder; name the files in it{': ' * bool(inside)}{', '.join(inside)}"))
        elif not path.is_file():
            problems.append((here, f"{path} is a device or a pipe; name a file"))
        elif data_suffix(path) is None:
            problems.append((here, f"{path}: files end in {', '.join(SUFFIXES)}, those of text also with .gz or .zst"))
        else:
            files.append(path)
    if len(set(files)) < len(files):
        problems.append((at, "names a file twice"))
    return tuple(files) if len(problems) == before else None


_HUB_ADDRESS = re.compile(rf"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/datasets/({HUB_ID.pattern})")


def _glob(pattern: str, places: Sequence[Path]) -> list[Path]:
    """Return the data files that a pattern such as "parts/*.jsonl" stands for in the first place that has any."""
    if not re.search(r"[*?\[]", pattern) or ".." in Path(pattern).parts:  # what lies elsewhere is named, not searched
        return []
    for place in places:
        names = sorted(glob(pattern, root_dir=place or None, recursive=True))
        found = [path for name in names if (path := find_path(name, [place])) and path.is_file() and data_suffix(path)]
        if found:
            return found
    return []


def data_suffix(path: Path) -> str | None:
    """Return the ending that says how a file is read, such as ".jsonl" or ".csv.gz"; None if it is not read."""
    name = path.name.lower()
    packed = next((end for end in PACKED if name.endswith(end)), "")
    for suffix in SUFFIXES:
        if name.removesuffix(packed).endswith(suffix) and not (packed and suffix in BINARY):
            return suffix + packed
    return None


def _hub(settings: _HubSettings) -> HubSource:
    files = settings.data_files
    return HubSource(
        settings.hub,
        settings.revision,
        settings.config,
        settings.split,
        settings.data_dir,
        tuple(files) if isinstance(files, list) else files,
        settings.streaming,
    )


def _heldout(
    written: Any,
    sources: tuple[Path, ...] | HubSource | None,
    places: Sequence[Path],
    marked: MarkedYaml,
    problems: list[Problem],
) -> float | tuple[Path, ...] | HubSource | None:
    at = ("rlhf_kit", "heldout")
    if isinstance(written, bool) or not isinstance(written, int | float | str | list):
        problems.append(
            (at, f"must be a share such as 0.1, or a file, list of files or a Hub split; seen {marked.seen(at)}")
        )
    elif isinstance(written, int | float):
        if 0 <= written < 1:
            return float(written)
        problems.append((at, f"must be a share, at least 0 and less than 1; seen {marked.seen(at)}"))
    elif isinstance(written, str) and (share := re.fullmatch(r"(\d{1,2}(?:\.\d+)?) ?%", written)):
        problems.append((at, f"must be a share, not {written}; write {float(share[1]) / 100:g}"))
    elif isinstance(sources, HubSource):
        if isinstance(written, str) and written and written != sources.split:
            return replace(sources, split=written)
        problems.append(
            (at, f"must be a share such as 0.1, or another split than {sources.split}; seen {marked.seen(at)}")
        )
    else:
        files = _sources(written, at, places, marked, problems)
        assert not isinstance(files, HubSource)  # written is text or a list
        if files is not None and sources is not None and set(files) & set(sources):
            problems.append((at, "names a file that is also the source"))
        return files
    return None
