"""The pages of docs/ say what is so: their commands and Python are run, their recipes are read, on one tiny chain.

`recipes/quickstart.yaml` of the pages is the tiny chain here, with the same names of stages. A block that cannot be run
here begins with `# Not run by the tests: <why>`, and its commands are parsed. The cards of docs/data.md are read in
tests/unit/test_docs_data.py, the site and the names that pages use in tests/unit/test_docs_site.py.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
import yaml
from accelerate import Accelerator
from torch import nn

from rlhf_kit.__main__ import app
from rlhf_kit.check import check_recipe
from rlhf_kit.collate import load_text_format
from rlhf_kit.models import add_adapter, load_base
from rlhf_kit.recipe import Adapter, Base
from rlhf_kit.recipe_reading import load_recipe
from tests import tiny
from tests.end_to_end import chain

DOCS = chain.ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = "# Not run by the tests: "


def blocks(language: str) -> list[tuple[str, str]]:
    """Every block of a language, each with its page."""
    return [(page, body) for page, text in PAGES.items() for kind, body in BLOCK.findall(text) if kind == language]


def commands(body: str) -> list[str]:
    """The commands of a block, a line each, without comments."""
    lines = (line.partition("#")[0].strip() for line in body.splitlines())
    return [line for line in lines if line]


RUN = [(page, command) for page, body in blocks("sh") if not body.startswith(NOT_RUN) for command in commands(body)]
PARSED = [(page, body) for page, body in blocks("sh") if body.startswith(NOT_RUN)]
SYNOPSES = [(page, line) for page, body in blocks("") for line in commands(body) if line.startswith("rlhf-kit ")]
SYNOPSES += [(page, command) for page, text in PAGES.items() for command in re.findall(r"`(rlhf-kit \w[^`]*)`", text)]
WHOLE = ("base", "stages", "name")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder like a checkout, in which the pages' names are there and small."""
    folder = tmp_path_factory.mktemp("docs")
    recipe = chain.write_chain(folder, name="quickstart")
    (folder / "recipes").mkdir()
    (folder / "recipes" / "accelerate").symlink_to(chain.ROOT / "recipes" / "accelerate")
    (folder / "rlhf_kit").symlink_to(chain.ROOT / "rlhf_kit")
    tiny.write_card(folder / "data_cards", "mine", "preferences", tiny.preferences(), heldout=0.2)
    mine = yaml.safe_load(recipe.read_text())
    mine["stages"]["reward"]["data"] = "../data_cards/mine.md"
    (folder / "recipes" / "mine.yaml").write_text(yaml.safe_dump({**mine, "name": "mine"}, sort_keys=False))
    recipe.rename(folder / "recipes" / "quickstart.yaml")
    return folder


@pytest.fixture(scope="module")
def run_once(workplace) -> Any:
    """What runs a command in the workplace; one that several pages have is run once."""
    done: dict[str, subprocess.CompletedProcess[str]] = {}

    def run(command: str) -> subprocess.CompletedProcess[str]:
        if command not in done:
            words = shlex.split(command)
            assert words[0] == "rlhf-kit", f"nothing runs {command!r}; say why with {NOT_RUN!r}"
            done[command] = chain.run(*words[1:], cwd=workplace, timeout=600)
        return done[command]

    return run


def test_there_is_something_to_run():
    """The pages have blocks of each kind, so that no test below passes for want of any."""
    assert len(RUN) >= 8 and len(PARSED) >= 4 and len(SYNOPSES) >= 5
    assert blocks("python") and blocks("yaml")
    assert {kind for text in PAGES.values() for kind, _ in BLOCK.findall(text)} <= {"", "sh", "python", "yaml", "text"}
    assert sum(text.count("\n```") for text in PAGES.values()) == 2 * sum(len(BLOCK.findall(t)) for t in PAGES.values())


@pytest.mark.parametrize(("page", "command"), RUN)
def test_commands_run(page, command, run_once):
    """Every command ends with 0, run in the order of the pages."""
    run_once("rlhf-kit run recipes/quickstart.yaml")  # what most of them look at
    result = run_once(command)
    assert result.returncode == 0, f"docs/{page}: {command}\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
    assert result.stdout.strip(), f"docs/{page}: {command}: says nothing"


def test_python_runs(workplace, run_once):
    """The Python of each page runs from top to bottom, beside a finished run."""
    run_once("rlhf-kit run recipes/quickstart.yaml")
    pages: dict[str, str] = {}
    for page, body in blocks("python"):
        pages[page] = pages.get(page, "") + body
    driver = f"for page, code in {pages!r}.items():\n    exec(compile(code, page, 'exec'), {{'__name__': page}})\n"
    (workplace / "driver.py").write_text(driver)
    environment = {**os.environ, "PYTHONPATH": str(chain.ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "driver.py"]
    result = subprocess.run(words, capture_output=True, text=True, cwd=workplace, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "did you mean kl_coef?" in result.stdout


def joined(recipe: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with the keys of a part put into it."""
    both = {key: joined(recipe[key], value) for key, value in part.items() if isinstance(recipe.get(key), dict)}
    return {**recipe, **part, **both}


@pytest.mark.parametrize(("page", "body"), [(page, body) for page, body in blocks("yaml") if page != "data.md"])
def test_recipes_are_recipes(page, body, workplace):
    """A whole recipe passes `check`; a part of one has known keys and values when put into one."""
    written = yaml.safe_load(body)
    whole = all(key in written for key in WHOLE)
    recipe = (
        written if whole else joined(yaml.safe_load((workplace / "recipes" / "quickstart.yaml").read_text()), written)
    )
    path = workplace / "recipes" / "of_a_page.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    loaded = load_recipe(path)
    if whole:
        assert check_recipe(loaded)


def verb(words: list[str]) -> tuple[Any, list[str]]:
    """The verb that words behind `rlhf-kit` call, and what is left for it."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        assert words and words[0] in command.commands, f"no verb {' '.join(words)}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


@pytest.mark.parametrize(("page", "body"), PARSED)
def test_what_is_not_run_says_why_and_is_understood(page, body):
    """A block that is not run gives a reason; its verbs, options, files and make targets are there."""
    assert len(body.splitlines()[0]) > len(NOT_RUN) + 10
    assert commands(body)
    for command in commands(body):
        words = shlex.split(command.replace("ADDRESS", "file:///wheels"))
        match words:
            case ["accelerate", "launch", "--config_file", config, "-m", "rlhf_kit", *rest]:
                assert (chain.ROOT / config).is_file(), config
                words = ["rlhf-kit", *rest]
            case ["make", *_]:
                done = subprocess.run([*words, "--dry-run", "--always-make"], capture_output=True, cwd=chain.ROOT)
                assert done.returncode == 0, done.stderr
                continue
            case ["pip", "install", "-c", constraints, "-e", "."]:
                assert (chain.ROOT / constraints).is_file()
                continue
        assert words[0] == "rlhf-kit", f"docs/{page}: {command}"
        command, rest = verb(words[1:])
        command.make_context(words[0], rest)  # raises where an option is unknown or an argument missing


@pytest.mark.parametrize(("page", "line"), SYNOPSES)
def test_synopses_name_what_is_there(page, line):
    """Verbs in prose and in synopses exist, with the options written behind them."""
    words = re.sub(r"[\[\]]|\.\.\.", " ", line).split()
    command, rest = verb(words[1:])
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known, f"docs/{page}: {line}"


def test_metrics_of_a_run_are_explained(workplace, run_once):
    """Every name that the chain logged stands in docs/reference/metrics.md."""
    run_once("rlhf-kit run recipes/quickstart.yaml")
    logged = {
        name
        for path in (workplace / "runs" / "quickstart").glob("*/metrics.jsonl")
        for line in path.read_text().splitlines()
        for name in json.loads(line)
    }
    assert len(logged) > 30
    assert sorted(name for name in logged - {"step"} if f"`{name}`" not in PAGES["reference/metrics.md"]) == []


def test_figures_of_a_summary_are_explained(workplace, run_once):
    """Every key of summary.json stands in docs/report.md."""
    run_once("rlhf-kit run recipes/quickstart.yaml")
    summary = json.loads((workplace / "runs" / "quickstart" / "summary.json").read_text())
    keys = {*summary["reward"], *summary["systems"]["ppo"], *summary["win_rate"]["ppo/sft"]} - {"pairs", "prompts"}
    assert sorted(key for key in keys if not re.search(rf"[`.]{key}`", PAGES["report.md"])) == []


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_a_base_takes_what_the_page_says(quantization):
    """The quickstart's base, loaded, has the bytes that docs/hardware.md computes, and its adapters have w weights."""
    settings = Base(model=str(chain.ROOT / "rlhf_kit" / "quickstart" / "checkpoint"), quantization=quantization)
    model = load_base(settings, load_text_format(settings), Accelerator(cpu=True))
    kept = {parameter.data_ptr(): parameter for parameter in model.parameters()}.values()  # tied ones once
    taken = sum(parameter.nbytes for parameter in kept)
    for parameter in kept:
        taken += getattr(parameter, "SCB", torch.empty(0)).nbytes  # of 8 bit, a scale an output
        state = getattr(parameter, "quant_state", None)
        taken += state.absmax.nbytes if state is not None else 0  # of 4 bit, a scale a block
    head = model.get_output_embeddings()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not head]
    n = sum(layer.in_features * layer.out_features for layer in layers)
    outputs = sum(layer.out_features for layer in layers)
    width, vocabulary = model.config.hidden_size, model.config.vocab_size
    norms = width * (2 * model.config.num_hidden_layers + 1)
    o = width * vocabulary + norms  # its head is tied
    assert taken == {"none": 4 * (n + o), "8bit": n + 4 * o + 4 * outputs, "4bit": 0.5625 * n + 4 * o}[quantization]
    w = sum(16 * (layer.in_features + layer.out_features) for layer in layers)
    adapted = add_adapter(model, Adapter(r=16), "CAUSAL_LM", init=None, seed=0, base=settings)
    assert sum(parameter.numel() for name, parameter in adapted.named_parameters() if "lora_" in name) == w
