"""What a finished run is good for: samples, scores, a dialogue, a plain checkpoint."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import rlhf_kit
from rlhf_kit.artifacts import read_manifest
from rlhf_kit.collate import load_text_format
from rlhf_kit.recipe_reading import written_recipe
from tests import tiny
from tests.end_to_end.chain import ROOT, command, environment, run, run_chain, write_chain


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a finished run in `run`, on 8-bit weights."""
    folder = tmp_path_factory.mktemp("use")
    run_chain(write_chain(folder, base={"quantization": "8bit"}), folder / "run")
    return folder


def done(*arguments, code=0, **options):
    result = run(*map(str, arguments), **options)
    assert result.returncode == code, result.stderr[-3000:]
    return result


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_samples_are_scored_and_the_same_whatever_the_batch(workplace, tmp_path):
    """Two completions of each prompt, in its order; the seed decides, not the batch."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is red?\n\nWho are you?\nWhy?\n")
    arguments = ("sample", workplace / "run", "--prompts", prompts, "--n", "2", "--max-new-tokens", "8")
    done(*arguments, "--out", tmp_path / "a.jsonl", "--batch-size", "4")
    done(*arguments, "--out", tmp_path / "b.jsonl", "--batch-size", "1")
    done(*arguments, "--out", tmp_path / "c.jsonl", "--seed", "1")
    first, again, other = (rows(tmp_path / f"{name}.jsonl") for name in "abc")
    assert [row["prompt"] for row in first] == [p for p in ("What is red?", "Who are you?", "Why?") for _ in range(2)]
    assert [row["completion"] for row in first] == [row["completion"] for row in again]
    assert [row["completion"] for row in first] != [row["completion"] for row in other]
    assert [row["score"] for row in first] == pytest.approx([row["score"] for row in again], abs=1e-4)
    assert all(1 <= row["length"] <= 8 for row in first)


def test_scores_are_those_of_the_reward_model_alone(workplace, tmp_path):
    """Prompt, completion and end token through plain PEFT, in the unit that the manifest gives; two shapes of rows."""
    answers = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in tiny.preferences()[:5]]
    dialogue = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    (tmp_path / "answers.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*answers, {"messages": dialogue}])
    )
    scored = done("score", workplace / "run", tmp_path / "answers.jsonl", "--batch-size", "4").stdout.splitlines()
    unit = read_manifest(workplace / "run" / "reward")["score_normalisation"]
    model, _ = rlhf_kit.load(workplace / "run", "reward")
    text_format = load_text_format(written_recipe(workplace / "run" / "recipe.resolved.yaml").base)
    expected = []
    for row in [*answers, {"prompt": dialogue[:1], "completion": "Because."}]:
        ids = text_format.prompt_ids(row["prompt"]) + text_format.completion_ids(row["prompt"], row["completion"])
        with torch.no_grad():
            raw = float(model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits)
        expected.append((raw - unit["mean"]) / unit["std"])
    assert [json.loads(line)["score"] for line in scored] == pytest.approx(expected, abs=1e-3)


def test_a_merged_policy_is_a_plain_checkpoint(workplace, tmp_path):
    """transformers alone loads it and gives the logits of base and adapter in full precision; the rest is measured."""
    result = done("merge", workplace / "run", "--stage", "ppo", "--out", tmp_path / "merged")
    assert "8bit quantisation" in result.stdout
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(workplace / "model", dtype="auto")
    plain = PeftModel.from_pretrained(base, workplace / "run" / "ppo" / "adapter")
    ids = tokenizer("What is red?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(merged(ids).logits, plain.base_model.model(ids).logits * 0, atol=1e-3)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    again = done("merge", workplace / "run", "--stage", "ppo", "--out", tmp_path / "merged", code=2)
    assert "is there already" in again.stderr and "Traceback" not in again.stderr


def test_a_merged_reward_model_is_a_plain_classifier(workplace, tmp_path):
    """Its scores are those of the manifest's probe, up to the 8-bit weights that training had."""
    done("merge", workplace / "run", "--stage", "reward", "--out", tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype="auto")
    assert model.config.num_labels == 1
    probe = read_manifest(workplace / "run" / "reward")["probe"]
    with torch.no_grad():
        scores = [float(model(torch.tensor([one["ids"]])).logits) for one in probe]
    spread = max(one["score"] for one in probe) - min(one["score"] for one in probe)
    assert scores == pytest.approx([one["score"] for one in probe], abs=0.2 * spread)


def test_a_piped_chat_answers_each_line(workplace, tmp_path):
    """Two prompts, two answers with scores; /save writes the dialogue, /reset forgets it, the end of input ends it."""
    saved = tmp_path / "said.json"
    lines = f"What is red?\n/save {saved}\n/reset\nWho are you?\n/nonsense\n"
    result = subprocess.run(
        [*command(), "chat", str(workplace / "run"), "--dialogue", "--max-new-tokens", "6"],
        input=lines,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("(score ") == 2
    assert "/save FILE" in result.stdout, "an unknown command shows the help"
    said = json.loads(saved.read_text())["ppo"]
    assert [message["role"] for message in said["messages"]] == ["user", "assistant"]
    assert said["messages"][1]["content"].strip() in result.stdout
    assert len(said["scores"]) == 1


def test_comparing_shows_both_policies(workplace):
    """The SFT policy's answer beside the tuned one's."""
    result = subprocess.run(
        [*command(), "chat", str(workplace / "run"), "--compare", "--max-new-tokens", "4"],
        input="What is red?\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**environment(), "COLUMNS": "100"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    top = next(line for line in result.stdout.splitlines() if "sft" in line)
    assert "ppo" in top


def test_a_chat_on_a_terminal_survives_ctrl_c(workplace):
    """Ctrl-C stops an answer or does nothing; /quit ends."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [*command(), "chat", str(workplace / "run"), "--max-new-tokens", "100"],
        stdin=child,
        stdout=child,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env={**environment(), "TERM": "dumb"},
        start_new_session=True,
        # what runs in the background of a script inherits an ignored SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(child)
    seen = ""

    def wait_for(text, interrupting=False):
        nonlocal seen
        end = time.monotonic() + 120
        while text not in seen:
            assert time.monotonic() < end, seen
            if interrupting:  # one that comes before the line editor listens is lost
                process.send_signal(signal.SIGINT)
            if select.select([parent], [], [], 1)[0]:
                seen += os.read(parent, 4096).decode(errors="replace")

    wait_for("> ")
    wait_for("/quit or Ctrl-D", interrupting=True)
    os.write(parent, b"What is red?\n")
    wait_for("score")
    os.write(parent, b"/quit\n")
    assert process.wait(timeout=60) == 0
    os.close(parent)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chat", "RUN", "--stage", "pp"), "did you mean ppo"),
        (("chat", "RUN", "--stage", "reward"), "writes nothing"),
        (("score", "RUN", "nosuch.jsonl"), "no such file"),
        (("score", "RUN", "BAD"), "completion"),
        (("sample", "RUN", "--prompts", "EMPTY", "--out", "x.jsonl"), "holds no prompt"),
        (("sample", "RUN", "--prompts", "none.txt", "--out", "x.jsonl"), "none.txt: there is no such file"),
        (("sample", "RUN", "--prompts", "EMPTY", "--out", "EMPTY"), "is there already"),
        (("merge", "RUN", "--stage", "ppo", "--out", "no/such/folder"), "no folder"),
        (("merge", "nosuch", "--stage", "ppo", "--out", "x"), "nosuch"),
    ],
)
def test_wrong_input_is_one_message(workplace, tmp_path, arguments, message):
    """Exit code 2, no traceback."""
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    (tmp_path / "empty.txt").write_text("\n")
    places = {"RUN": workplace / "run", "BAD": tmp_path / "bad.jsonl", "EMPTY": tmp_path / "empty.txt"}
    result = done(*(places.get(word, word) for word in arguments), code=2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_base_that_moved_is_named_and_one_that_changed_is_refused(workplace, tmp_path):
    """--base takes a copy of the base elsewhere; another model is not taken for it."""
    shutil.copytree(workplace / "model", tmp_path / "moved")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Why?\n")
    arguments = ("sample", workplace / "run", "--prompts", prompts, "--max-new-tokens", "2")
    done(*arguments, "--base", tmp_path / "moved", "--out", tmp_path / "a.jsonl")
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    (tmp_path / "moved" / "config.json").write_text(json.dumps({**config, "rope_theta": 77.0}))
    refused = done(*arguments, "--base", tmp_path / "moved", "--out", tmp_path / "b.jsonl", code=2)
    assert "is not the base" in refused.stderr
    assert not (tmp_path / "b.jsonl").exists()


def test_load_gives_what_the_stages_made(workplace):
    """`rlhf_kit.load` of every stage: policies generate, the reward model scores."""
    model, tokenizer = rlhf_kit.load(workplace / "run", "ppo")
    ids = tokenizer("What is red?", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3).shape[1] <= ids["input_ids"].shape[1] + 3
