"""A recipe's file, read whole before anything else is looked at, with the overrides put into it.

Everything that is wrong with it is reported together, each with file, line and what would work. Nothing here imports
torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_kit.errors import InputError, printable
from rlhf_kit.marked_yaml import MarkedYaml, read_yaml
from rlhf_kit.recipe import Origin, Recipe
from rlhf_kit.recipe_problems import chain_problems, field_problems, path_problems
from rlhf_kit.settings import read_text

__all__ = ["load_recipe", "written_recipe"]

MAY_BE_EMPTY = ("base", "adapter", "evaluation")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in the file `path`, after the overrides, each "stages.ppo.kl_coef=0.1".

    Raises:
        InputError: everything that is wrong with it, together.
    """
    return _load(Path(path), overrides, look=True)


def written_recipe(path: str | Path) -> Recipe:
    """Return the recipe that a run wrote down, without looking whether the files it names are still there.

    Raises:
        InputError: it is not there, or has been changed to something that is no recipe.
    """
    return _load(Path(path), (), look=False)


def _load(path: Path, overrides: Sequence[str], look: bool) -> Recipe:
    marked = read_yaml(read_text(path, "recipe", (".yaml", ".yml")), str(path))
    if marked.value is None and not overrides:
        raise InputError(f"{path}: is empty; a recipe has name, base and stages")
    if marked.value is not None and not (isinstance(marked.value, dict) and marked.value.keys() & Recipe.model_fields):
        raise InputError(f"{path}:1: is not a recipe, which is a mapping with name, base and stages; wrong file?")
    wrong = [message for override in overrides for message in _override(marked, override)]
    if wrong:
        raise InputError(wrong)
    data = _open_sections(marked.value or {})
    marked.value = data
    problems = list(field_problems(data, marked))
    problems += chain_problems(data.get("stages"), path.parent)
    problems += path_problems(data, path.parent, look)  # turns the paths in `data` into ones that open
    if problems:
        raise InputError(marked.messages(problems))
    recipe = Recipe.model_validate(data)
    recipe._origin = Origin(path, marked)
    return recipe


def _override(marked: MarkedYaml, override: str) -> Iterator[str]:
    place = printable(f"--set {override if len(override) <= 80 else override[:77] + '...'}")
    key, equals, value = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        yield f"{place}: write a key path, =, and a value, such as --set stages.ppo.kl_coef=0.1"
        return
    try:
        marked.put(path, read_yaml(value, place), place)
    except InputError as error:
        yield from error.problems


def _open_sections(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a copy in which a section whose every key is commented out is empty and not null."""
    data = dict(raw)
    for section in MAY_BE_EMPTY:
        if section in data and data[section] is None:
            data[section] = {}
        elif isinstance(data.get(section), dict):
            data[section] = dict(data[section])
    if isinstance(data.get("stages"), dict):
        data["stages"] = {
            name: {} if stage is None else dict(stage) if isinstance(stage, dict) else stage
            for name, stage in data["stages"].items()
        }
        for stage in data["stages"].values():
            for key in ("data", "prompts") if isinstance(stage, dict) else ():
                if isinstance(stage.get(key), list):  # a card's name alone is a portion without weight and cap
                    stage[key] = [{"card": card} if isinstance(card, str) else card for card in stage[key]]
            for key in ("checkpoint_every", "require") if isinstance(stage, dict) else ():
                if key in stage and stage[key] is None:
                    stage[key] = {}
            for key in ("watch", "ptx") if isinstance(stage, dict) else ():  # in which paths are put that open
                if isinstance(stage.get(key), dict):
                    stage[key] = dict(stage[key])
    return data
