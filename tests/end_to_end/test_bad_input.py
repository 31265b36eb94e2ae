"""Bad input gets one clear message, exit code 2, no traceback, and leaves nothing behind: through the command line.

Each fault is put alone into a set of files that is otherwise without one, and both `check` and `run` must tell it:
where, what, what was seen, what would work. The verbs run in this process, so that torch is imported once; the last
tests start processes of their own.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlhf_kit import __main__ as command_line
from tests.plain import QUESTIONS, make_workplace, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, and what the message about it must hold."""

    name: str
    make: Callable[[Path], None]
    said: tuple[str, ...]
    settings: tuple[str, ...] = ()
    messages: int = 1


def recipe(old: str, new: str) -> Callable[[Path], None]:
    """Replace a piece of the recipe."""

    def make(folder: Path) -> None:
        text = (folder / "recipe.yaml").read_text()
        assert text.count(old) == 1, old
        (folder / "recipe.yaml").write_text(text.replace(old, new))

    return make


def card(name: str, more: str = "", **replaced: str) -> Callable[[Path], None]:
    """Replace "key: value" lines of a card's block, or add to it."""

    def make(folder: Path) -> None:
        lines = (folder / f"{name}.md").read_text().splitlines()
        for number, line in enumerate(lines):
            key = line.strip().partition(":")[0]
            if line.startswith("  ") and key in replaced:
                lines[number] = f"  {key}: {replaced[key]}"
        lines.insert(lines.index("---", 1), more) if more else None
        (folder / f"{name}.md").write_text("\n".join(lines))

    return make


def rows(name: str, number: int, **cells: object) -> Callable[[Path], None]:
    """Change cells of one row (from 1) of a data file; a cell of ... is removed."""

    def make(folder: Path) -> None:
        path = folder / f"{name}.jsonl"
        content = [json.loads(line) for line in path.read_text().splitlines()]
        for key, value in cells.items():
            content[number - 1][key] = value
        content[number - 1] = {key: value for key, value in content[number - 1].items() if value is not ...}
        write_jsonl(path, content)

    return make


def file(name: str, change: Callable[[Path], object]) -> Callable[[Path], None]:
    """Do something to one file."""
    return lambda folder: change(folder / name) and None


def cut_gz(folder: Path) -> None:
    """A compressed file of which the end is missing."""
    lines = [json.dumps({"prompt": q, "completion": os.urandom(500).hex()}) for q in QUESTIONS * 20]
    whole = gzip.compress("\n".join(lines).encode(), compresslevel=1)
    (folder / "shown.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    card("shown", source="shown.jsonl.gz")(folder)


def cut_parquet(folder: Path) -> None:
    """A Parquet file of which the end is missing."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"prompt": "a", "completion": "b"}] * 9), folder / "s.parquet"
    )
    whole = (folder / "s.parquet").read_bytes()
    (folder / "s.parquet").write_bytes(whole[:-20])
    card("shown", source="s.parquet")(folder)


def pickled(folder: Path) -> None:
    """A checkpoint in the old format."""
    (folder / "model" / "model.safetensors").rename(folder / "model" / "pytorch_model.bin")


def long_prompt(folder: Path) -> None:
    """One prompt that is longer than the context less the answer."""
    rows("asked", 3, prompt="Why" + "y" * 100 + "?")(folder)


TWO_SFT = "  sft2:\n    kind: sft\n    init: sft\n    data: shown.md\n"
FAULTS = [
    # the recipe
    Fault(
        "unknown key", recipe("kl_coef:", "kl_coeff:"), ("recipe.yaml:17: stages.ppo.kl_coeff", "did you mean kl_coef?")
    ),
    Fault(
        "a key of another toolkit",
        recipe("data: shown.md", "data: shown.md\n    lr: 1e-3"),
        ("yaml:8", "learning_rate"),
    ),
    Fault(
        "wrong type",
        recipe("kl_coef: 0.05", "kl_coef: low"),
        ("yaml:17: stages.ppo.kl_coef: must be a number", '"low"'),
    ),
    Fault("out of range", recipe("kl_coef: 0.05", "kl_coef: -1"), ("yaml:17", "must be at least 0; seen -1")),
    Fault("missing choice", recipe("    kl_coef: 0.05\n", ""), ("yaml:12: stages.ppo.kl_coef: missing", "no default")),
    Fault("missing stage", recipe("policy: sft", "policy: stf"), ("yaml:14", "no stage stf", "did you mean sft?")),
    Fault("later stage", recipe("init: sft", "init: ppo"), ("yaml:10: stages.reward.init", "comes later")),
    Fault("itself", recipe("init: sft", "init: reward"), ("yaml:10", "cannot build on itself")),
    Fault(
        "cycle",
        recipe("    data: shown.md\n", "    data: shown.md\n    init: sft2\n" + TWO_SFT),
        ("yaml:8: stages.sft.init: stage sft2 comes later",),
    ),
    Fault("stage of the wrong kind", recipe("policy: sft", "policy: reward"), ("yaml:14", "of kind sft, ppo, rloo")),
    Fault(
        "duplicate stage",
        recipe("  reward:\n", "  sft:\n    kind: sft\n    data: shown.md\n  reward:\n"),
        ("yaml:8: stages.sft: written twice, first on line 5",),
    ),
    Fault("duplicate key", recipe("name: plain", "name: plain\nname: other"), ("yaml:2: name: written twice",)),
    Fault("unknown kind", recipe("kind: ppo", "kind: dpoo"), ("yaml:13: stages.ppo.kind: must be sft, reward, ppo, ",)),
    Fault("no YAML", recipe("base:\n", "base:\n\t"), ("yaml:3: not YAML", "spaces, not tabs")),
    Fault("alias", recipe("data: pairs.md", "data: *cards"), ("yaml:11", "alias")),
    Fault("empty recipe", file("recipe.yaml", lambda path: path.write_text("")), ("recipe.yaml: is empty",)),
    Fault("no recipe", file("recipe.yaml", lambda path: path.unlink()), ("recipe.yaml: there is no such recipe",)),
    Fault("no text", file("recipe.yaml", lambda path: path.write_bytes(b"\xff\xfe\x00")), ("byte 0 is not UTF-8",)),
    Fault("not a recipe", file("recipe.yaml", lambda path: path.write_text("a: 1")), ("yaml:1: is not a recipe",)),
    Fault("bad override", lambda _: None, ("--set seed", "=", "such as"), ("seed",)),
    Fault(
        "override of an unknown key",
        lambda _: None,
        ("--set stages.ppo.updatse=3: stages.ppo.updatse", "did you mean updates?"),
        ("stages.ppo.updatse=3",),
    ),
    Fault("override of the wrong type", lambda _: None, ("--set seed=no", "a whole number", '"no"'), ("seed=no",)),
    # the card
    Fault(
        "no card",
        file("asked.md", lambda path: path.rename(path.with_name("aske.md"))),
        ("yaml:16", "did you mean aske.md"),
    ),
    Fault(
        "card without block",
        file("asked.md", lambda path: path.write_text("---\nlicense: mit\n---\n")),
        ("asked.md:2", "rlhf_kit"),
    ),
    Fault(
        "card without front matter",
        file("asked.md", lambda path: path.write_text("# hi\n")),
        ("asked.md:1", "front matter"),
    ),
    Fault(
        "unknown key in a card",
        card("asked", "  colums: {prompt: q}"),
        ("asked.md:6: rlhf_kit.colums", "did you mean columns?"),
    ),
    Fault(
        "card of the wrong kind",
        card("asked", kind="text", source="shown.jsonl\n  columns: {text: prompt}"),
        ("yaml:16", "text"),
    ),
    Fault(
        "rankings",
        card("asked", kind="rankings"),
        ("asked.jsonl:1: there is no column completions", "asked.jsonl:1: there is no column ranks or ratings"),
        messages=2,
    ),
    Fault(
        "hub without revision", card("asked", source="{hub: a/b}"), ("asked.md:5: rlhf_kit.source.revision: missing",)
    ),
    Fault(
        "card without file",
        file("asked.jsonl", Path.unlink),
        ("asked.md:5: rlhf_kit.source: there is no file asked.jsonl",),
    ),
    # the data
    Fault("empty file", file("asked.jsonl", lambda path: path.write_text("")), ("asked.jsonl: is empty",)),
    Fault(
        "missing column",
        card("asked", "  columns: {prompt: question}"),
        ("asked.jsonl:1", "question", "columns: prompt"),
    ),
    Fault(
        "unmapped column",
        file("asked.jsonl", lambda path: path.write_text('{"ask": "a"}\n')),
        ("asked.jsonl:1: there is no column prompt", "ask", "columns: {prompt:"),
    ),
    Fault("truncated gz", cut_gz, ("shown.jsonl.gz:", "cut off")),
    Fault(
        "truncated JSONL",
        file("asked.jsonl", lambda path: path.write_text(path.read_text()[:-9])),
        ("asked.jsonl:8: not a line of JSON", "cut off"),
    ),
    Fault("truncated Parquet", cut_parquet, ("s.parquet:1: not a sound Parquet file",)),
    Fault(
        "a line that is no object",
        file("asked.jsonl", lambda path: path.write_text('"a"\n')),
        ("asked.jsonl:1: a row is an object",),
    ),
    Fault(
        "no UTF-8",
        file("asked.jsonl", lambda path: path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xe9"}\n')),
        ("asked.jsonl:2: byte 13",),
    ),
    Fault(
        "empty prompt",
        rows("asked", 3, prompt=" "),
        ("asked.jsonl:3: prompt is empty", "1 × empty prompt in 8 rows", "on_problem: drop"),
        messages=2,
    ),
    Fault(
        "empty completion",
        rows("shown", 2, completion=""),
        ("shown.jsonl:2: completion is empty", "on_problem: drop"),
        messages=2,
    ),
    Fault(
        "equal answers",
        rows("pairs", 5, rejected=" Here."),
        ('pairs.jsonl:5: chosen is equal to rejected: " Here."',),
        messages=2,
    ),
    Fault("non-string cell", rows("asked", 4, prompt=3), ("asked.jsonl:4: prompt must be text; seen 3",), messages=2),
    Fault(
        "null cell",
        rows("asked", 4, prompt=None),
        ("asked.jsonl:4: prompt must be text; seen nothing (null)",),
        messages=2,
    ),
    Fault(
        "row without the column",
        rows("asked", 4, prompt=..., other=1),
        ("asked.jsonl:4: prompt is missing in this row",),
        messages=2,
    ),
    Fault(
        "filtered away",
        card("asked", "  filters: {where: {prompt: [x, y]}}"),
        ("asked.md: no row is left", "8 × filters.where.prompt"),
    ),
    Fault(
        "no pairs held out",
        card("pairs", "  heldout: 0"),
        ("yaml:11: stages.reward.data", "holds no pairs out", "heldout: 0.1"),
    ),
    # the base
    Fault(
        "unknown base",
        recipe("model: model", "model: ./modle"),
        ("yaml:3: base.model: there is no model folder ./modle", "did you mean model"),
    ),
    Fault(
        "pickles only",
        pickled,
        ("yaml:3: base.model: model has pickled weights only (pytorch_model.bin)", "model.safetensors"),
    ),
    Fault(
        "cut weights",
        file("model/model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1])),
        ("yaml:3", "it is cut off"),
    ),
    Fault("no weights", file("model/model.safetensors", Path.unlink), ("yaml:3", "has no model.safetensors")),
    Fault("no checkpoint", file("model/config.json", Path.unlink), ("yaml:3", "has no config.json")),
    Fault("no tokenizer", file("model/tokenizer.json", Path.unlink), ("yaml:3", "has no tokenizer")),
    Fault(
        "an adapter",
        file("model/config.json", lambda path: path.rename(path.with_name("adapter_config.json"))),
        ("yaml:3", "is an adapter and not a model"),
    ),
    # how they fit together
    Fault(
        "prompts too long",
        long_prompt,
        (
            "yaml:12: stages.ppo: at least 1 of 8 rows",
            "96 tokens that max_new_tokens 32 leaves",
            "104 (",
            "asked.jsonl:3",
            "left_prompt",
        ),
    ),
    Fault(
        "no room for prompts",
        recipe("max_new_tokens: 32", "max_new_tokens: 128"),
        ("yaml:12: stages.ppo: max_new_tokens 128 leaves no room",),
    ),
    Fault(
        "rows too long",
        rows("shown", 1, completion="x" * 200),
        ("yaml:5: stages.sft: at least 1 of 8 rows", "context of 128 tokens"),
    ),
    Fault(
        "no module",
        recipe("reward: reward", "reward: nowhere_at_all:score"),
        ("yaml:15: stages.ppo.reward: there is no module nowhere_at_all",),
    ),
]


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    """Run the command line here; return its exit code, stdout and stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rlhf-kit", *arguments])
        with pytest.raises(SystemExit) as end:
            command_line.main()
    output = capsys.readouterr()
    return int(end.value.code or 0), output.out, output.err


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """The folder of a recipe without a fault, as the working directory."""
    make_workplace(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def test_without_a_fault_check_finds_none(workplace, capsys):
    """The files that the faults are put into are in order: each fault below is alone."""
    code, out, err = call(capsys, "check", "recipe.yaml")
    assert (code, err) == (0, "")
    assert "8 rows read" in out and "stage    ppo: ppo after sft and reward" in out


@pytest.mark.parametrize("verb", ["check", "run"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_one_clear_message(workplace, capsys, fault, verb):
    """The fault is told in one message on stderr with exit code 2; nothing is on stdout and nothing new on the disk."""
    fault.make(workplace)
    before = everything_in(workplace)
    settings = [word for setting in fault.settings for word in ("--set", setting)]
    code, out, err = call(capsys, verb, "recipe.yaml", *settings)
    assert code == 2, err
    assert out == ""
    for piece in fault.said:
        assert piece in err
    assert len(err.strip().splitlines()) == fault.messages, err
    assert "Traceback" not in err and "pydantic" not in err
    assert everything_in(workplace) == before


def test_all_problems_are_told_together(workplace, capsys):
    """Faults of recipe keys, of stages that are named and of files come in one go, in the order of the file."""
    recipe("kl_coef: 0.05", "kl_coeff: 0.05\n    clip: wide")(workplace)
    recipe("init: sft", "init: stf")(workplace)
    recipe("data: shown.md", "data: shwn.md")(workplace)
    recipe("model: model", "model: ./none")(workplace)
    code, _, err = call(capsys, "check", "recipe.yaml")
    places = [line.split(": ")[0] for line in err.strip().splitlines()]
    assert code == 2
    assert places == [f"recipe.yaml:{number}" for number in (3, 7, 10, 17, 18)]


def test_faults_of_cards_data_and_base_are_told_together(workplace, capsys):
    """A pickled checkpoint, an empty prompt and a missing column come in one go."""
    pickled(workplace)
    rows("asked", 3, prompt="")(workplace)
    card("shown", "  columns: {completion: answer}")(workplace)
    code, _, err = call(capsys, "check", "recipe.yaml")
    assert code == 2
    assert "pickled weights" in err and "asked.jsonl:3: prompt is empty" in err and "answer" in err


def test_broken_rows_can_be_dropped_and_are_counted(workplace, capsys):
    """With on_problem: drop the same rows are left out, and check says how many and why."""
    rows("asked", 3, prompt="")(workplace)
    rows("asked", 4, prompt=7)(workplace)
    card("asked", "  on_problem: drop")(workplace)
    code, out, err = call(capsys, "check", "recipe.yaml")
    assert (code, err) == (0, "")
    assert "left out: 1 × empty prompt" in out and "left out: 1 × non-text cell" in out


def in_a_process(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "rlhf_kit", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("verb", ["check", "run"])
def test_in_a_process_of_its_own(workplace, verb):
    """As a user starts it: exit code 2, the message on stderr alone, no run directory."""
    recipe("kl_coef:", "kl_coeff:")(workplace)
    result = in_a_process(workplace, verb, "recipe.yaml")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "recipe.yaml:17: stages.ppo.kl_coeff: unknown key; did you mean kl_coef?\n"
    assert not (workplace / "runs").exists()
