"""What the README says is so. The launch commands are run in test_processes, `make quickstart` by the benchmark."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from rlhf_kit.__main__ import INPUT_IS_WRONG, STOPPED
from tests import tiny
from tests.end_to_end import chain

README = (chain.ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def lines_with(word: str) -> list[str]:
    """The command lines of the README's code blocks that begin with a word, without their comments."""
    lines = [line.partition("#")[0].strip() for _, block in BLOCKS for line in block.splitlines()]
    return [line for line in lines if line.startswith(f"{word} ")]


def test_links_lead_somewhere():
    """Every relative link names a file of the project."""
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 5
    assert [link for link in links if not (chain.ROOT / link).exists()] == []


@pytest.mark.parametrize("command", lines_with("make"))
def test_make_targets_are_there(command):
    """make knows what to do for each command, and the variables in it reach the install."""
    words = [word.replace("ADDRESS", "file:///wheels") for word in shlex.split(command)]
    result = subprocess.run([*words, "--dry-run", "--always-make"], capture_output=True, text=True, cwd=chain.ROOT)
    assert result.returncode == 0, result.stderr
    expected = {"quickstart": "run recipes/quickstart.yaml", "test": "pytest"}[words[1]]
    assert expected in result.stdout
    assert ("--index-url file:///wheels" in result.stdout) == ("ADDRESS" in command)


def test_your_own_data_in_five_lines(tmp_path):
    """The README's card, rows with its columns and a recipe that names it pass `check` as it is written there."""
    card = next(block for _, block in BLOCKS if "rlhf_kit:" in block)
    assert len(card.strip().splitlines()) <= 5
    rows = [{"question": f"{text} please?", "better": " Yes.", "worse": " No."} for text in tiny.QUESTIONS]
    for folder in ("data_cards", "recipes"):
        (tmp_path / folder).mkdir()
    (tmp_path / "data_cards" / "mine.md").write_text(card)
    (tmp_path / "data_cards" / "my_pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = yaml.safe_load((chain.ROOT / "recipes" / "quickstart.yaml").read_text())
    recipe["base"]["model"] = str(chain.ROOT / "rlhf_kit" / "quickstart" / "checkpoint")
    reward = {"kind": "reward", "data": "../data_cards/mine.md"}
    recipe |= {"stages": {"reward": reward}, "evaluation": {}}
    (tmp_path / "recipes" / "mine.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    check = next(line for line in lines_with("rlhf-kit") if "mine.yaml" in line and "check" in line)
    result = chain.run(*shlex.split(check)[1:], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "32 rows read" in result.stdout
    looks = [line for line in lines_with("rlhf-kit data") if "mine.md" in line]
    assert [line.split()[2] for line in looks] == ["check", "preview"]
    for line, seen in zip(looks, ("32 read, 32 kept", "judged     "), strict=True):
        words = line.replace("recipes/quickstart.yaml", str(chain.ROOT / "recipes" / "quickstart.yaml")).split()
        result = chain.run(*words[1:], cwd=tmp_path)
        assert result.returncode == 0 and seen in result.stdout, result.stderr


def test_the_data_verbs_are_there():
    """`data` has the verbs and options that the README names."""
    for line in (line for line in lines_with("rlhf-kit data") if "mine.md" not in line):
        for verb in line.split()[2].split("|"):
            text = chain.run("data", verb, "--help").stdout
            for option in re.findall(r"--\w+", line):
                assert option in text, option


@pytest.mark.parametrize("command", [line for line in lines_with("rlhf-kit") if "RECIPE" in line or "RUN_DIR" in line])
def test_verbs_and_options_are_there(command):
    """Every verb is one, and has the options that are written behind it."""
    verb, *rest = command.split()[1:]
    text = chain.run(verb, "--help").stdout
    for option in re.findall(r"--\w+", " ".join(rest)):
        assert option in text, option


@pytest.mark.parametrize("command", lines_with("accelerate"))
def test_launch_commands_name_a_configuration_that_is_there(command):
    """The launcher configuration exists and what it launches is this package."""
    words = command.split()
    assert (chain.ROOT / words[words.index("--config_file") + 1]).is_file()
    assert words[words.index("-m") :][:3] == ["-m", "rlhf_kit", "run"]


def test_exit_codes():
    """The table has the codes that the command line ends with."""
    assert re.findall(r"^\| (\d+) \|", README, re.MULTILINE) == ["0", str(INPUT_IS_WRONG), str(STOPPED), "1"]


def test_the_python_example_runs(tmp_path):
    """The example, with a small recipe in the quickstart's place, trains and generates."""
    code = next(block for language, block in BLOCKS if language == "python")
    recipe = chain.write_chain(tmp_path, name="example")
    assert '"recipes/quickstart.yaml"' in code
    code = code.replace("recipes/quickstart.yaml", str(recipe))
    code += "\nprint(model.generate(**tokenizer('Where?', return_tensors='pt'), max_new_tokens=3))\n"
    (tmp_path / "example.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(chain.ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "example.py"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "tensor" in result.stdout
    assert (tmp_path / "runs" / "example" / "summary.json").is_file()
