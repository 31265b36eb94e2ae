"""A data card: how to read a dataset, and what a person should know about it, in one Markdown file.

The file is a Hugging Face dataset card whose front matter also holds a block `rlhf_kit:`. `load_card` reads that block
and finds the files; the rows themselves are read in `examples`. Nothing here imports torch or datasets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from rlhf_kit.errors import InputError, did_you_mean
from rlhf_kit.marked_yaml import KeyPath, MarkedYaml, Problem, read_yaml
from rlhf_kit.settings import (
    HUB_ID,
    Count,
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

__all__ = ["DataCard", "Filters", "HubSource", "load_card"]

Kind = Literal["demonstrations", "preferences", "prompts", "text"]
SpecialTokens = Literal["escape", "refuse", "allow"]
"""What becomes of text in the data that spells a special token, such as "</s>": it stays text, it is an error, or it
becomes that token."""
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "demonstrations": ("prompt", "completion"),
    "preferences": ("prompt", "chosen", "rejected", "margin", "annotator"),
    "prompts": ("prompt",),
    "text": ("text",),
}
"""Our names for the columns of each kind; margin and annotator may be missing."""
HH_COLUMNS: Mapping[str, Mapping[str, str]] = {
    "demonstrations": {"transcript": "chosen"},
    "preferences": {"chosen": "chosen", "rejected": "rejected"},
    "prompts": {"transcript": "chosen"},
}
"""Of format hh, where one column holds prompt and completion: our names, and what they are called unless mapped."""
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Endings of files that are read; all but .parquet also with .gz behind."""


@dataclass(frozen=True)
class HubSource:
    """A split of a dataset on the Hub, at a revision."""

    repo: str
    revision: str
    config: str | None
    split: str
    data_dir: str | None
    data_files: str | tuple[str, ...] | None

    def __str__(self) -> str:
        inside = "".join(f"/{part}" for part in (self.config, self.data_dir) if part)
        return f"{self.repo}{inside}@{self.revision}[{self.split}]"


class Filters(Settings):
    """Which rows are taken, before any rule is applied to them."""

    max_rows: Count | None = None
    """The first so many rows that pass `where`; nothing is read after them."""
    where: dict[str, str | int | float | bool | list[str | int | float | bool] | None] = Field(default={})
    """The dataset's column: the value, or list of values, that it must have."""


@dataclass(frozen=True)
class DataCard:
    """What a card says. `path` and `sources` open from the working directory."""

    path: Path
    name: str
    kind: Kind
    sources: tuple[Path, ...] | HubSource
    format: Literal["hh"] | None
    columns: Mapping[str, str]
    """Every one of our names of this kind -> the dataset's column, or a template such as "{instruction}\\n{input}"."""
    mapped: frozenset[str]
    """Those of our names that the card maps itself."""
    heldout: float | tuple[Path, ...] | HubSource
    """Share of prompts, chosen by their hash; or where the held-out rows are."""
    filters: Filters
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
    revision: Text
    config: Text | None = None
    split: Text = "train"
    data_dir: Annotated[Text | None, InDataset] = None
    data_files: Annotated[TextOrTexts | None, InDataset] = None


class _Block(Settings):
    kind: Kind
    source: Any
    format: Literal["hh"] | None = None
    columns: dict[str, Text] = Field(default={})
    heldout: Any = 0.1
    filters: Filters = Filters()
    on_problem: Literal["error", "drop"] = "error"
    special_tokens: SpecialTokens = "escape"


NEEDED: Mapping[tuple[str, ...], str] = {
    ("kind",): "demonstrations, preferences, prompts or text",
    ("source",): f"a file ({', '.join(SUFFIXES)}), a list of files, or {{hub: owner/name, revision: ...}}",
    ("source", "hub"): "a Hub dataset, written owner/name",
    ("source", "revision"): "the commit or tag to read, so that the data cannot change under the recipe",
}


def load_card(path: str | Path, data_root: str | Path | None = None) -> DataCard:
    """Return the card in the file `path`; its relative sources are looked for in `data_root`, beside it, and here.

    Raises:
        InputError: everything that is wrong with the card, together, with lines.
    """
    path = Path(path)
    front, text = _front_matter(path)
    metadata = front.value
    if not isinstance(metadata, dict) or not isinstance(metadata.get("rlhf_kit"), dict):
        raise InputError(_no_block(front))
    raw = dict(metadata["rlhf_kit"])
    for name in ("filters", "columns"):
        if name in raw and raw[name] is None:  # its every key commented out
            raw[name] = {}
    metadata["rlhf_kit"] = raw
    places = [path.parent, Path()] if data_root is None else [Path(data_root), path.parent, Path()]
    problems: list[Problem] = list(_problems(_Block, raw, ("rlhf_kit",), front))
    sources = None  # a missing source is among the problems by now
    if "source" in raw:
        sources = _sources(raw["source"], ("rlhf_kit", "source"), places, front, problems)
    heldout = _heldout(raw.get("heldout", 0.1), sources, places, front, problems)
    problems += _column_problems(raw, front)
    if problems:
        raise InputError(front.messages(problems))
    block = _Block.model_validate(raw)
    assert sources is not None and heldout is not None
    names = HH_COLUMNS[block.kind] if block.format == "hh" else {name: name for name in COLUMNS[block.kind]}
    return DataCard(
        path=path,
        name=path.stem,
        kind=block.kind,
        sources=sources,
        format=block.format,
        columns={**names, **block.columns},
        mapped=frozenset(block.columns),
        heldout=heldout,
        filters=block.filters,
        on_problem=block.on_problem,
        special_tokens=block.special_tokens,
        metadata={key: value for key, value in metadata.items() if key != "rlhf_kit"},
        text=text,
    )


def _front_matter(path: Path) -> tuple[MarkedYaml, str]:
    """Return the YAML between the two lines "---", and the text below."""
    lines = read_text(path, "data card", (".md",)).splitlines(keepends=True)
    fences = [number for number, line in enumerate(lines) if line.rstrip() == "---"]
    if not fences or "".join(lines[: fences[0]]).strip():
        raise InputError(f"{path}:1: {_FORM}" if lines else f"{path}: is empty; {_FORM}")
    if len(fences) == 1:
        raise InputError(f"{path}:{fences[0] + 1}: the front matter has no end; close it with a line ---")
    first, last = fences[:2]
    return read_yaml("".join(lines[first + 1 : last]), str(path), first + 2), "".join(lines[last + 1 :]).strip()


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
            key, inside = str(loc[-1]), Filters if loc[1:-1] == ("filters",) else settings
            match error["type"]:
                case "extra_forbidden":
                    yield loc, f"unknown key{did_you_mean(key, inside.model_fields)}"
                case "missing":
                    if not written_wrongly(key, raw, settings.model_fields):
                        yield loc, f"missing, and has no default: {NEEDED[tuple(str(step) for step in loc[1:])]}"
                case "literal_error" if key == "kind" and error["input"] == "rankings":
                    yield loc, "rankings are not read yet; write them out as pairs, of kind preferences"
                case _:
                    yield loc, explain(error, loc, marked)


def _column_problems(raw: Mapping[str, Any], marked: MarkedYaml) -> Iterator[Problem]:
    kind, columns = raw.get("kind"), raw.get("columns", {})
    if not isinstance(kind, str) or kind not in COLUMNS or not isinstance(columns, dict):
        return
    if raw.get("format") == "hh" and kind not in HH_COLUMNS:
        yield ("rlhf_kit", "format"), f"hh transcripts have no kind {kind}; use {', '.join(HH_COLUMNS)}"
        return
    ours = HH_COLUMNS[kind] if raw.get("format") == "hh" else COLUMNS[kind]
    for name, theirs in columns.items():
        at = ("rlhf_kit", "columns", name)
        if name not in ours:
            swapped = (
                f"; the order is ours: theirs, so {theirs}: {name}" if theirs in ours else did_you_mean(name, ours)
            )
            yield at, f"{kind} have no column {name}{swapped}"
        elif isinstance(theirs, str) and ("{" in theirs or "}" in theirs) and not template_columns(theirs):
            yield at, f'a template names columns in braces, such as "{{instruction}} {{input}}"; seen {marked.seen(at)}'


@lru_cache(maxsize=256)
def template_columns(template: str) -> tuple[str, ...]:
    """Return the columns that a template such as "{instruction}\\n{input}" names; none if it is not a template."""
    parts = re.split(r"\{([^{}]+)\}", template)
    return () if any("{" in text or "}" in text for text in parts[::2]) else tuple(parts[1::2])


# ---------------------------------------------------------------- where the rows are


def _sources(
    written: Any, at: KeyPath, places: Sequence[Path], marked: MarkedYaml, problems: list[Problem]
) -> tuple[Path, ...] | HubSource | None:
    if isinstance(written, dict):
        found = list(_problems(_HubSettings, written, at, marked))
        problems += found
        return None if found else _hub(_HubSettings.model_validate(written))
    names = [written] if isinstance(written, str) else written
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        problems.append((at, f"must be {NEEDED[('source',)]}; seen {marked.seen(at)}"))
        return None
    files = []
    for index, name in enumerate(names):
        here = (*at, index) if isinstance(written, list) else at
        path = find_path(name, places[:-2] if climbs(name) else places)  # places[:-2] is the recipe's data_root, if any
        if path is None and climbs(name):
            problems.append(
                (here, f"{name} leads out of the card's folder; use the recipe's data_root, or an absolute path")
            )
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
            problems.append((here, f"{path}: files end in {', '.join(SUFFIXES)}, or these and .gz"))
        else:
            files.append(path)
    if len(set(files)) < len(files):
        problems.append((at, "names a file twice"))
    return tuple(files) if len(files) == len(names) else None


def data_suffix(path: Path) -> str | None:
    """Return the ending that says how a file is read, such as ".jsonl" or ".csv.gz"; None if it is not read."""
    name = path.name.lower()
    for suffix in SUFFIXES:
        if name.endswith(suffix) or (name.endswith(f"{suffix}.gz") and suffix != ".parquet"):
            return suffix + ".gz" * name.endswith(".gz")
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
    elif isinstance(sources, HubSource):
        if isinstance(written, str) and written and written != sources.split:
            return HubSource(
                sources.repo, sources.revision, sources.config, written, sources.data_dir, sources.data_files
            )
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
