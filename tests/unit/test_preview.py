"""data preview: every token of a row once, with what is learned from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_kit.data_cards import load_card
from rlhf_kit.errors import InputError
from rlhf_kit.marked_yaml import write_yaml
from rlhf_kit.preview import base_named, measured, preview
from rlhf_kit.recipe import Base
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    tokenizer = tiny.make_tokenizer(extra=("<|im_start|>", "<|im_end|>"), chat_template=tiny.CHATML)
    return tiny.make_checkpoint(tmp_path_factory.mktemp("base") / "model", tokenizer, context=40)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def lines(rows: list[dict], kind: str, base: Base | None, count: int = 9) -> list[str]:
    Path("d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    block = {"kind": kind, "source": "d.jsonl", "heldout": 0, "on_problem": "drop"}
    Path("c.md").write_text(f"---\n{write_yaml({'rlhf_kit': block})}---\n")
    return [line.plain for line in preview(load_card("c.md"), count, base)]


def test_demonstrations(model):
    """The prompt has no loss, the completion and the end token have; one token a byte here."""
    found = lines([{"prompt": "Hi", "completion": " yo"}], "demonstrations", Base(model=str(model)))
    assert found[-3:] == [
        "\nd.jsonl:1  demonstration: 7 tokens",
        "  no loss    <s>|H|i",
        "  loss        |y|o|<|im_end|>",
    ]


def test_chat_and_a_row_too_long(model):
    """The chat template's own tokens show; a row over the context says by how much."""
    prompt = [{"role": "user", "content": "Hi"}]
    found = lines([{"prompt": prompt, "completion": "yo"}], "demonstrations", Base(model=str(model)))
    # <|im_start|> u s e r \n H i <|im_end|> \n <|im_start|> a s s i s t a n t \n: 21, and y o <|im_end|>
    assert found[-3] == "\nd.jsonl:1  demonstration: 24 tokens"
    assert found[-2].startswith("  no loss    <|im_start|>|u|s|e|r|\\n|H|i|<|im_end|>|\\n|<|im_start|>|a|s")
    found = lines([{"prompt": "x" * 50, "completion": "y"}], "demonstrations", Base(model=str(model)))
    assert found[-3].endswith("53 tokens, 13 over the context of 40")


def test_pairs_rankings_and_what_is_left_out(model):
    """Each sequence by itself, with margin and annotator; broken rows are told."""
    pair = {"prompt": "Q", "chosen": "a", "rejected": "b", "margin": 2, "annotator": "me"}
    found = lines([{**pair, "chosen": ""}, pair], "preferences", Base(model=str(model)))
    assert "\nd.jsonl:2  chosen (margin 2, annotator me): 4 tokens" in found
    assert "  judged     b|<|im_end|>" in found
    assert found[-1] == "\nleft out: d.jsonl:1: chosen is empty"
    ranking = {"prompt": "Q", "completions": ["a", "b"], "ranks": [2, 1]}
    assert [line.split(":")[1] for line in lines([ranking], "rankings", None) if "rank" in line] == [
        "1  rank 1", "1  rank 2",
    ]  # fmt: skip


def test_without_a_base():
    """Texts as they are, line breaks as escapes."""
    found = lines(
        [{"prompt": "Q\n", "completion": " A"}, {"prompt": "R", "completion": "A"}], "demonstrations", None, 1
    )
    assert found == ["\nd.jsonl:1  demonstration: 4 characters", "  prompt     Q\\n", "  completion  A"]


def test_counts_are_those_of_training(model):
    """What check counts are the lengths of the rows that the trainer sees."""
    from rlhf_kit.collate import load_text_format, tokenise_demonstrations
    from rlhf_kit.examples.rows import Demonstration, Text

    base = Base(model=str(model))
    rows = [Demonstration("Hi", " yo", "x:1"), Demonstration([{"role": "user", "content": "Hé"}], "yo", "x:2")]
    tokenised = tokenise_demonstrations([*rows, Text("plain", "x:3")], load_text_format(base), None, "error").rows
    count = measured(base).count
    lengths = [sum((before, *behind)) for before, behind in (
        *(count(row.prompt, [row.completion]) for row in rows), count("", ["plain"]))]  # fmt: skip
    assert lengths == [len(row["input_ids"]) for row in tokenised]


def test_the_base_of_a_recipe(model):
    """A recipe stands for its base; another file is wrong input."""
    Path("shown.jsonl").write_text('{"prompt": "Q", "completion": "A"}\n')
    Path("shown.md").write_text("---\nrlhf_kit: {kind: demonstrations, source: shown.jsonl}\n---\n")
    Path("r.yaml").write_text(f"name: r\nbase: {{model: {model}}}\nstages: {{sft: {{kind: sft, data: shown.md}}}}\n")
    assert base_named("r.yaml").model == str(model)
    assert base_named("owner/name").model == "owner/name"
    Path("x.txt").write_text("")
    with pytest.raises(InputError, match="is a file; name a checkpoint's folder"):
        base_named("x.txt")
