"""What mkdocs does beyond rendering the pages of this folder; it calls the `on_...` functions by their names.

Pages of the reference are made from the typed recipe, the data card and the command line, so they cannot be out of
date. Files that stand elsewhere in the project (SECURITY.md, measured results) become pages as they are. Equations
become MathML, which browsers draw without a script.
"""

from __future__ import annotations

import html
import inspect
import json
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel

PROJECT = Path(__file__).resolve().parents[1]
PAGES_OF_FILES = {
    "SECURITY.md": "security.md",
    "benchmarks/RESULTS.md": "results.md",
    "CHANGELOG.md": "changes.md",
    "data_cards/TEMPLATE.md": "reference/data-card-template.md",
}
"""Files of the project outside this folder -> the page that each is."""
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")
FENCED = re.compile(r"^(`{3,}).*?^\1`*$", re.MULTILINE | re.DOTALL)


# ---------------------------------------------------------------- what mkdocs calls


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Return the files of this folder and the pages that are made."""
    made = {page: text_of(source) for source, page in PAGES_OF_FILES.items()}
    made["reference/recipe.md"] = recipe_reference()
    made["reference/data-card.md"] = card_reference()
    made["reference/commands.md"] = command_reference()
    for page, content in made.items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a page whose links lead to pages, wherever in the project they pointed."""
    here = {page: source for source, page in PAGES_OF_FILES.items()}.get(page.file.src_uri)
    source = here or f"docs/{page.file.src_uri}"
    return outside_code(markdown, lambda text: LINK.sub(lambda link: rewritten(link, source, page.file.src_uri), text))


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a page with its equations drawn."""
    return re.sub(
        r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>',
        lambda found: mathml(html.unescape(found[2]), block=found[1] == "div"),
        content,
        flags=re.DOTALL,
    )


# ---------------------------------------------------------------- text


def text_of(source: str) -> str:
    """Return a file of the project as a page; a data card, which is YAML more than text, as a listing."""
    text = (PROJECT / source).read_text(encoding="utf-8")
    if source.startswith("data_cards/"):
        return f"# A data card to copy\n\n`{source}`, every key explained.\n\n````yaml\n{text}````\n"
    return text


def outside_code(markdown: str, change: Any) -> str:
    """Return the text with everything changed that is not in a fenced block."""
    parts, end = [], 0
    for fence in FENCED.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])


def rewritten(link: re.Match[str], source: str, page: str) -> str:
    """Return a link of `source` as it stands on `page`: to the page that its file is, or as plain text if it is none.

    Raises: PluginError where no such file is there.
    """
    words, target = link[1], link[2]
    path, hash_, anchor = target.partition("#")
    if re.match(r"[a-z]+:", target) or not path:
        return link[0]
    file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if file in PAGES_OF_FILES:
        to = PAGES_OF_FILES[file]
    elif file.startswith("docs/"):
        to = file.removeprefix("docs/")
    elif (PROJECT / file).exists():
        return words
    else:
        raise PluginError(f"{source}: links to {target}, which is not there")
    return f"[{words}]({posixpath.relpath(to, posixpath.dirname(page) or '.')}{hash_}{anchor})"


def mathml(latex: str, block: bool) -> str:
    """Return an equation as MathML.

    Raises: PluginError where a command of it is not known, for it would be shown as it is written.
    """
    drawn = convert(latex, display="block" if block else "inline")
    unknown = re.search(r"&#x0005C;\w*|\\\w+", drawn)
    if unknown:
        raise PluginError(f"{latex}: {html.unescape(unknown[0])} is not known to latex2mathml")
    return drawn


# ---------------------------------------------------------------- the reference


def recipe_reference() -> str:
    """Return the page of every recipe key, from the typed recipe."""
    from rlhf_kit import recipe, recipe_problems

    first = {"Top level": recipe.Recipe, **{place: recipe.HOMES[place] for place in ("base", "adapter")}}
    stages = {place: settings for place, settings in recipe.HOMES.items() if place.startswith("stages.")}
    mixed = {"Several cards in `data` or `prompts`": recipe.Portion}
    places = first | stages | mixed | recipe.HOMES
    names = {settings.__name__: heading(place) for place, settings in places.items()}
    lines = [
        "# Recipe",
        "Every key of a recipe. A key without a default must be written. An unknown key, or a value of another kind, "
        "is an error with its line. Paths are looked for beside the recipe, then in the working directory.",
    ]
    for place, settings in places.items():
        lines += [f"## {heading(place)}", plain(inspect.getdoc(settings) or ""), table(settings, names)]
    theirs = [(f"`{name}`", ours) for name, ours in recipe_problems.FROM_ELSEWHERE.items()]
    lines += [
        "## Names of other toolkits",
        "Written in a recipe, they are errors that tell what the setting is called here. "
        "[Coming from another toolkit](../coming-from.md) says what else is different.",
        rows(("there", "here"), theirs),
    ]
    return "\n\n".join(lines) + "\n"


def card_reference() -> str:
    """Return the page of every key of a data card's `rlhf_kit:` block."""
    from rlhf_kit import data_cards as cards

    places = {
        "`rlhf_kit`": cards._Block,
        "`rlhf_kit.source`, a dataset on the Hub": cards._HubSettings,
        "`rlhf_kit.filters`": cards.Filters,
        "`rlhf_kit.preferred`": cards.Preferred,
        "`rlhf_kit.roles`": cards.Roles,
    }
    names = {settings.__name__: heading(place) for place, settings in places.items()}
    lines = [
        "# Data card",
        "A card is a Hugging Face dataset card (Markdown with YAML front matter) whose front matter also has a block "
        "`rlhf_kit:` with these keys. [A template](data-card-template.md) explains them at more length; "
        "[Your own data](../data.md) has the block for public datasets.",
    ]
    for place, settings in places.items():
        lines += [f"## {heading(place)}", table(settings, names)]
    lines += [
        "## Columns of each kind",
        "Our names, which `columns` maps onto where the values stand. A card has the first line of its kind unless it "
        "maps a name that only another has.",
        rows(("kind", "format", "needed", "one of these at least", "may be there"), list(shapes(cards))),
    ]
    return "\n\n".join(lines) + "\n"


def shapes(cards: Any) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table of columns."""
    formats = {
        "": cards.SHAPES,
        "hh": cards.HH_SHAPES,
        "common_prefix": cards.PREFIX_SHAPES,
        "threads": cards.THREAD_SHAPES,
    }
    for name, kinds in formats.items():
        for kind, found in kinds.items():
            for shape in found:
                yield kind, name, *map(listed, (shape.needed, shape.judged, shape.may))


def command_reference() -> str:
    """Return the page of every verb and its options, from the command line itself."""
    import typer.main

    from rlhf_kit.__main__ import app

    lines = [
        "# Command line",
        "`rlhf-kit` is `python -m rlhf_kit`. Results go to stdout, progress to stderr; the exit codes stand in "
        "[Stops and going on](../stops.md#exit-codes).",
    ]
    for words, command in verbs("rlhf-kit", typer.main.get_command(app)):
        given = [(p.metavar or p.name, p) for p in command.params if p.param_type_name == "argument"]
        given += [(f"{', '.join(p.opts)} {p.metavar or ''}".strip(), p) for p in command.params if p.opts[0][0] == "-"]
        lines += [f"## {words}", plain(command.help or "")]
        lines.append(rows(("", "meaning"), [(f"`{name}`", plain(p.help or "")) for name, p in given]))
    return "\n\n".join(lines) + "\n"


def verbs(words: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Yield every verb below a command with the words that call it."""
    for name, one in getattr(command, "commands", {}).items():
        if hasattr(one, "commands"):
            yield from verbs(f"{words} {name}", one)
        else:
            yield f"{words} {name}", one


def heading(place: str) -> str:
    """Return a place in a recipe as a heading."""
    return f"`{place}`" if re.fullmatch(r"[a-z_.]+|stages\..*", place) else place


def anchor(title: str) -> str:
    """Return the anchor that the heading gets."""
    from markdown.extensions.toc import slugify

    return slugify(title.replace("`", ""), "-")


def table(settings: type[BaseModel], names: Mapping[str, str]) -> str:
    """Return a class of settings as a table, a key a row, those of its own before those that it shares."""
    schema = settings.model_json_schema()
    own = [key for key in settings.__annotations__ if key in schema["properties"]]
    keys = [*own, *(key for key in schema["properties"] if key not in own)]
    body = []
    for key in keys:
        field = schema["properties"][key]
        nested = field.get("$ref", "").rpartition("/")[2]
        if key in schema.get("required", ()):
            default = "**required**"
        elif nested:
            default = "those below"
        else:
            default = f"`{json.dumps(field.get('default'), ensure_ascii=False)}`"
        body.append((f"`{key}`", kind(field, schema, names), default, plain(field.get("description", ""))))
    return rows(("key", "value", "default", "meaning"), body)


def kind(field: Mapping[str, Any], schema: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Return what a value may be, in words, from its JSON schema."""
    if "$ref" in field or "discriminator" in field:
        if "discriminator" in field:
            return " or ".join(kind(one, schema, names) for one in field["oneOf"])
        name = field["$ref"].rpartition("/")[2]
        if name not in names:
            raise PluginError(f"docs/hooks.py: no section of the reference has the keys of {name}")
        return f"[{names[name]}](#{anchor(names[name])})"
    for several in ("anyOf", "oneOf"):
        if several in field:
            return " or ".join(dict.fromkeys(kind(one, schema, names) for one in field[several]))
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    of = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
    match field.get("type"):
        case "array":
            return f"list of {kind(field['items'], schema, names) if field.get('items') else 'values'}"
        case "object":
            inside = field.get("additionalProperties")
            return f"mapping to {kind(inside, schema, names)}" if isinstance(inside, dict) else "mapping"
        case None:
            return "one of several forms"
        case simple:
            limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
            return ", ".join([of[simple], *(f"{sign} {field[name]}" for name, sign in limits.items() if name in field)])


def plain(text: str) -> str:
    """Return a docstring as one line in which nothing is read as markup but `code`."""
    parts = " ".join(text.split()).split("`")
    return "`".join(part if place % 2 else html.escape(part, quote=False) for place, part in enumerate(parts))


def listed(names: tuple[str, ...]) -> str:
    """Return names for a cell."""
    return ", ".join(f"`{name}`" for name in names)


def rows(head: tuple[str, ...], body: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [head, ("---",) * len(head), *([cell.replace("|", "\\|") for cell in row] for row in body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
