"""The house: which module may import which, read from the source without importing it.

A new module is put on its floor in `FLOORS`; a module that no floor holds fails the first test.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "rlhf_kit"

FLOORS = (  # from the ground up; a module imports from its own floor or from below, and never in a circle
    {"errors", "memory", "sketches"},
    {"marked_yaml", "settings", "columns"},
    {"recipe", "recipe_problems", "recipe_reading", "maths", "artifacts", "rehearsal", "gradients"},
    {"data_cards", "model_folders"},
    {"data_files", "foreign"},
    {"examples", "batches", "row_batches", "chat_templates"},
    {"collate", "check", "audit", "audit_words", "guard", "health", "kl_doctor", "layers"},
    {"story", "drawings"},
    {"importing", "token_cache"},
    {"models", "generation", "scorers", "distributed", "checkpoints", "metrics", "pieces", "remote_reward", "unpadded"},
    {"rollout", "evaluation", "training", "preview", "finished", "repeat", "watch", "ptx", "values"},
    {"supervised", "passes"},
    {"sampling", "merge", "model_card", "judges", "benchmark_tasks"},
    {"comparison"},
    {"publish"},
    {"chat", "serving"},
    {"stages"},
    {"report", "closing", "quickstart"},
    {"forecast"},
    {"pipeline"},
    {"__main__", ""},  # "" is the package's own __init__
)
WITHOUT_TORCH = (
    "errors",
    "marked_yaml",
    "settings",
    "recipe",
    "recipe_problems",
    "recipe_reading",
    "columns",
    "data_cards",
    "data_files",
    "artifacts",
    "examples.loading",
    "check",
    "model_folders",
    "foreign",
    "chat_templates",
    "audit",
    "audit_words",
    "importing",
    "report",
    "guard",
    "kl_doctor",
)
HEAVY = {"torch", "transformers", "datasets", "accelerate", "peft", "trl", "bitsandbytes"}


@dataclass(frozen=True)
class Import:
    """One imported module: of the package ("rlhf_kit.maths.kl") or from outside ("torch")."""

    target: str
    line: int
    late: bool  # inside a function, or for type checkers only: not run when the module is imported


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name within it; a folder's __init__ by the folder's."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> list[Import]:
    """All imports of a file, wherever they stand."""
    return list(_imports(ast.parse(path.read_text(encoding="utf-8")), late=False))


def _imports(node: ast.AST, late: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, late) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: imports are absolute here"
            assert child.module is not None
            for alias in child.names:  # "from rlhf_kit.maths import kl" imports rlhf_kit.maths.kl
                name = f"{child.module}.{alias.name}"
                yield Import(name if _is_own(name) else child.module, child.lineno, late)
        else:
            for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, late or is_function or for_types)


def _is_own(name: str) -> bool:
    return name.startswith("rlhf_kit.") and name.removeprefix("rlhf_kit.") in MODULES


def own(target: str) -> str | None:
    """The module's name within the package, or None for one from outside."""
    return target.removeprefix("rlhf_kit").removeprefix(".") if target.partition(".")[0] == "rlhf_kit" else None


def floor(module: str) -> int:
    room = module.partition(".")[0]
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


MODULES = modules()
IMPORTS = {name: imports(path) for name, path in MODULES.items()}
ROOMS = {name.partition(".")[0] for name in MODULES}


def test_every_module_has_a_floor():
    """No module stands outside the house."""
    assert ROOMS - set().union(*FLOORS) == set()


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    """A module imports from its own floor or from below; late imports count too."""
    upwards = [
        f"{MODULES[module].name}:{i.line}: {i.target}"
        for i in IMPORTS[module]
        if (target := own(i.target)) and floor(target) > floor(module)  # "", the package's version, is free to all
    ]
    assert upwards == []


def test_no_import_goes_in_a_circle():
    """Not even within a floor; a folder's __init__ and its modules are apart."""
    state: dict[str, str] = {}

    def visit(module: str, trail: list[str]) -> None:
        assert state.get(module) != "open", " -> ".join([*trail, module])
        if module in state:
            return
        state[module] = "open"
        for i in IMPORTS[module]:
            target = own(i.target)
            if target and target in MODULES and target != module:
                visit(target, [*trail, module])
        state[module] = "done"

    for module in MODULES:
        visit(module, [])


def test_stages_do_not_import_each_other():
    """What two stages share lives below them."""
    stages = {name for name in MODULES if name.startswith("stages.")}
    across = {(stage, i.target) for stage in stages for i in IMPORTS[stage] if own(i.target) in stages - {stage}}
    assert across == set()


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("maths")])
def test_maths_imports_torch_and_its_siblings_only(module):
    """Nor a model, a config, a tokenizer or a process; `statistics` and `best_of_n` have NumPy in place of torch."""
    allowed = {"numpy"} if module in ("maths.statistics", "maths.best_of_n") else {"torch"}
    outside = {i.target for i in IMPORTS[module] if i.target.partition(".")[0] not in sys.stdlib_module_names}
    foreign = {t for t in outside if t.partition(".")[0] not in allowed and not t.startswith("rlhf_kit.maths")}
    assert foreign == set()


@pytest.mark.parametrize("module", [name for name in WITHOUT_TORCH if name in MODULES])
def test_what_checks_recipes_starts_without_torch(module):
    """Importing the module, and all that it imports, runs no import of torch or of what would pull it in."""
    seen, todo, heavy = set(), [(module, module)], []
    while todo:
        name, trail = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for i in IMPORTS[name]:
            if i.late:
                continue
            if i.target.partition(".")[0] in HEAVY:
                heavy.append(f"{trail} -> {i.target}")
            parents = [own(i.target)] if own(i.target) is not None else []
            if parents and "." in parents[0]:
                parents.append(parents[0].partition(".")[0])  # importing maths.kl runs maths/__init__
            todo += [(parent, f"{trail} -> {parent}") for parent in [*parents, ""] if parent in MODULES]
    assert heavy == []


def test_the_rules_see_what_they_forbid(tmp_path):
    """The reader finds plain, aliased, late and type-checking imports, and tells the late ones."""
    source = tmp_path / "example.py"
    source.write_text(
        "import torch.nn as nn\n"
        "from rlhf_kit.maths import kl\n"
        "from rlhf_kit.recipe import Recipe\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n"
        "    from accelerate import Accelerator\n"
        "class A:\n"
        "    def f(self):\n"
        "        import datasets\n"
    )
    assert imports(source) == [
        Import("torch.nn", 1, False),
        Import("rlhf_kit.maths.kl", 2, False),
        Import("rlhf_kit.recipe", 3, False),
        Import("typing", 4, False),
        Import("accelerate", 6, True),
        Import("datasets", 9, True),
    ]
