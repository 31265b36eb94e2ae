"""Data cards from other tools' descriptions of datasets: LLaMA-Factory's dataset_info.json.

What it cannot say (licence, who judged, a revision of the Hub's) is left for a person to fill in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf_kit.errors import InputError, did_you_mean
from rlhf_kit.examples.messages import ROLES
from rlhf_kit.marked_yaml import write_yaml

__all__ = ["import_cards"]

UNREAD = ("images", "videos", "audios", "tools")
ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
"""The columns of an entry in alpaca format that names none."""
MESSAGES = {"sharegpt": "conversations", "openai": "messages"}
"""The column of an entry in these formats that names none."""
TAGS = {"role_tag": ("from", "role"), "content_tag": ("value", "content")}
"""How messages may be written, as `examples` reads them."""
ROLE_TAGS = {"system_tag": "system", "user_tag": "user", "assistant_tag": "assistant"}
TOOL_TAGS = ("function_tag", "observation_tag")
"""Of messages to and from tools, which `examples` does not read."""


def import_cards(path: Path, names: Iterable[str], out: Path) -> tuple[list[Path], list[str]]:
    """Write a data card for each dataset that a dataset_info.json describes, or for those named.

    Returns the cards, and what is left out: datasets that cannot be imported, if none was named, and rows.

    Raises:
        InputError: it is no such file, has no such dataset, or one that was named, or each of them, has what we do not
            read; nothing is written then.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON: {error}") from None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise InputError(f"{path}: is not a dataset_info.json, which names datasets: {{name: {{file_name: ...}}}}")
    named = list(names)
    wanted = named or list(entries)
    unknown = [f"--name {name}: {path} has no such dataset{did_you_mean(name, entries)}" for name in wanted
               if name not in entries]  # fmt: skip
    if unknown:
        raise InputError(unknown)
    cards, problems, left_out = {}, [], []
    for name in wanted:
        if not re.fullmatch(r"[\w][\w.-]*", name):
            problems.append(f"{path}: {name!r} cannot be a card's name; use letters, digits, . _ and -")
            continue
        card = out / f"{name}.md"
        try:
            text = _card(name, entries[name], path)
        except InputError as error:
            problems += [f"{path}: {name}: {problem}" for problem in error.problems]
            continue
        if card.exists():
            problems.append(f"{card}: is there already; remove it, or write elsewhere with --out")
            continue
        cards[card] = text
        if tools := [tag for tag in TOOL_TAGS if (entries[name].get("tags") or {}).get(tag)]:
            left_out.append(
                f"{path}: {name}: rows with messages of {' or '.join(tools)}, for the use of tools is not read; they "
                f"are errors, or left out and counted with on_problem: drop in {card}"
            )
    if problems and (named or not cards):
        raise InputError(problems)
    out.mkdir(parents=True, exist_ok=True)
    for card, text in cards.items():
        card.write_text(text, encoding="utf-8")
    return list(cards), problems + left_out


def _card(name: str, entry: Mapping[str, Any], path: Path) -> str:
    kinds = {"columns": dict, "tags": dict, "num_samples": int}
    wrong = [name for name, kind in kinds.items() if not isinstance(entry.get(name, kind()), kind | None)]
    if wrong:
        what = {dict: "a mapping", int: "a whole number"}
        raise InputError([f"{name} must be {what[kinds[name]]}; seen {entry[name]!r}" for name in wrong])
    style = entry.get("formatting", "alpaca")
    if style not in ("alpaca", *MESSAGES):
        raise InputError(f"formatting is {style!r}; known: alpaca, {', '.join(MESSAGES)}")
    columns = entry.get("columns") or ({"messages": MESSAGES[style]} if style in MESSAGES else ALPACA)
    problems = [f"has {column}, which are not read" for column in UNREAD if columns.get(column)]
    tags = entry.get("tags") or {}
    for tag, known in TAGS.items():
        written = tags.get(tag, known[0])
        if written not in known:
            problems.append(f"writes {tag} as {written!r}; known: {', '.join(known)}")
    if problems:
        raise InputError(problems)
    block = {**_kind_and_columns(entry, columns, style), "source": _source(entry, path)}
    names = {role: tags[tag] for tag, role in ROLE_TAGS.items() if tags.get(tag)}
    if roles := {role: name for role, name in names.items() if ROLES.get(str(name).lower()) != role}:
        block["roles"] = roles
    filters: dict[str, Any] = {}
    if columns.get("kto_tag"):
        filters["where"] = {columns["kto_tag"]: True}
    if entry.get("num_samples"):
        filters["max_rows"] = int(entry["num_samples"])
    if filters:
        block["filters"] = filters
    front = {"pretty_name": name, "license": "unknown", "language": ["unknown"], "rlhf_kit": block}
    return (
        f"---\n{write_yaml(front)}---\n# {name}\n\n"
        f"Imported from `{path.name}`. Say here where the rows come from, what a preference means, who gave it, and "
        "what is wrong with them; fill in licence and language above.\n"
    )


def _kind_and_columns(entry: Mapping[str, Any], columns: Mapping[str, str], style: str) -> dict[str, Any]:
    """Return the kind and the columns of a card's block."""
    prompt: Any
    if style in MESSAGES:
        talk = columns.get("messages", MESSAGES[style])
        system = {"system": f"{columns['system']}?"} if columns.get("system") else {}
        prompt = {**system, "history": talk}
        if not entry.get("ranking"):
            begin = {"prompt": {**system, "history": f"{talk}[:-1]"}} if system else {}
            return {"kind": "demonstrations", "columns": {**begin, "completion": f"{talk}[-1:]" if system else talk}}
    else:
        asked = [columns[column] for column in ("prompt", "query") if columns.get(column)]
        if not asked:
            raise InputError(f"an entry in alpaca format needs columns.prompt; seen {dict(columns)}")
        if not entry.get("ranking") and not columns.get("response"):
            return {"kind": "text", "columns": {"text": asked[0]}}
        user = asked[0] if len(asked) == 1 else f"{{{asked[0]}}}\n{{{asked[1]}?}}"
        before = {key: f"{columns[key]}?" for key in ("system", "history") if columns.get(key)}
        prompt = {**before, "user": user}
        if not entry.get("ranking"):
            return {"kind": "demonstrations", "columns": {"prompt": prompt, "completion": columns["response"]}}
    pair = {key: columns.get(key, key) for key in ("chosen", "rejected")}
    if "chosen" not in columns and entry.get("columns") and columns.get("response"):  # the better one stands first
        pair = {"chosen": f"{columns['response']}[0]", "rejected": f"{columns['response']}[1]"}
    return {"kind": "preferences", "columns": {"prompt": prompt, **pair}}


def _source(entry: Mapping[str, Any], path: Path) -> Any:
    if entry.get("file_name"):
        file = path.parent / str(entry["file_name"])
        if file.is_dir():
            return [str(inside.absolute()) for inside in sorted(file.iterdir()) if inside.is_file()]
        return str(file.absolute())
    if entry.get("hf_hub_url"):
        source = {"hub": entry["hf_hub_url"], "revision": "main"}
        if entry.get("subset"):
            source["config"] = entry["subset"]
        if entry.get("split"):
            source["split"] = entry["split"]
        if entry.get("folder"):
            source["data_dir"] = entry["folder"]
        return source
    raise InputError("names neither file_name nor hf_hub_url; scripts and other hubs are not read")
