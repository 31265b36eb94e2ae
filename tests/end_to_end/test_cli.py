"""The command line as a user meets it: what it prints where, with which exit code, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import rlhf_kit
from rlhf_kit import artifacts
from rlhf_kit.errors import InputError
from rlhf_kit.models import read_adapter
from tests.end_to_end import chain

HEAVY = ("torch", "transformers", "datasets", "accelerate", "peft", "trl", "pandas")


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a fresh interpreter."""
    environment = {**os.environ, "PYTHONPATH": str(chain.ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)


class TestHelp:
    @pytest.mark.parametrize("verb", [(), ("run",), ("check",), ("report",)])
    def test_every_verb_explains_itself(self, verb):
        """--help prints to stdout and ends well."""
        result = chain.run(*verb, "--help")
        assert result.returncode == 0 and "Usage: rlhf-kit" in result.stdout and result.stderr == ""

    @pytest.mark.parametrize("arguments", [("run",), ("run", "x.yaml", "--tempo"), ("train", "x.yaml")])
    def test_wrong_arguments_end_with_2(self, arguments):
        """A missing or unknown argument or verb is wrong input, without a traceback."""
        result = chain.run(*arguments)
        assert result.returncode == 2 and result.stdout == ""
        assert "Traceback" not in result.stderr

    @pytest.mark.parametrize(
        "arguments", [["--help"], ["run", "--help"], ["check", str(chain.ROOT / "recipes" / "quickstart.yaml")]]
    )
    def test_what_must_be_quick_imports_nothing_heavy(self, arguments):
        """--help and check answer at once because torch and its like stay out."""
        result = python(
            "import sys\nfrom rlhf_kit.__main__ import main\n"
            f"sys.argv = ['rlhf-kit', *{arguments!r}]\n"
            "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
            f"found = [name for name in {HEAVY!r} if name in sys.modules]\nassert not found, found\n"
        )
        assert result.returncode == 0, result.stderr


class TestWrongInput:
    def test_all_problems_come_in_one_message(self, tmp_path):
        """Exit code 2, every problem with its place on stderr, no traceback, nothing on stdout, nothing written."""
        recipe = chain.write_chain(tmp_path / "in")
        out = tmp_path / "out"
        settings = ["--set", "stages.ppo.kl_coeff=0.1", "--set", "seed=no"]
        for verb, more in (("run", ["--out", str(out)]), ("check", [])):
            result = chain.run(verb, str(recipe), *settings, *more)
            assert result.returncode == 2 and result.stdout == "", verb
            assert "did you mean kl_coef" in result.stderr and "seed" in result.stderr, verb
            assert "Traceback" not in result.stderr, verb
        assert not out.exists()

    def test_a_report_of_no_run(self, tmp_path):
        """A folder that is no run directory is named."""
        result = chain.run("report", str(tmp_path))
        assert result.returncode == 2 and str(tmp_path) in result.stderr and "Traceback" not in result.stderr

    def test_a_bug_ends_with_1_and_its_traceback(self):
        """What is not the user's fault is not dressed up as if it were."""
        result = python(
            "import sys, rlhf_kit.check\nfrom rlhf_kit.__main__ import main\n"
            "rlhf_kit.check.check_recipe = lambda recipe: 1 / 0\n"
            f"sys.argv = ['rlhf-kit', 'check', {str(chain.ROOT / 'recipes' / 'quickstart.yaml')!r}]\nmain()\n"
        )
        assert result.returncode == 1 and "ZeroDivisionError" in result.stderr and "Traceback" in result.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A recipe that has been run, its run directory, and the finished process."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = chain.write_chain(folder, base={"quantization": "8bit"})
    return recipe, folder / "out", chain.run_chain(recipe, folder / "out")


class TestRun:
    def test_it_ends_with_a_table_on_stdout(self, finished):
        """Results go to stdout: accuracy, every system, the win rate, where things lie. Progress goes to stderr."""
        _, out, result = finished
        for expected in (
            "held-out accuracy",
            "base",
            "sft",
            "ppo",
            "KL (nats)",
            "95 % interval",
            str(out / "report.html"),
        ):
            assert expected in result.stdout.replace("\n", ""), expected
        assert "step" not in result.stdout
        assert re.search(r"^rlhf_kit \S+: 1 process on \S+, torch", result.stderr.splitlines()[0])
        assert "ppo step 3" in result.stderr
        assert "\r" not in result.stderr and "Warning" not in result.stderr

    def test_it_leaves_the_files_of_the_contract(self, finished):
        """Each stage has a standard adapter, metrics, samples where it samples, and a manifest that holds."""
        _, out, _ = finished
        assert {path.name for path in out.iterdir()} >= {
            *("recipe.resolved.yaml", "environment.json", "summary.json", "report.html", "sft", "reward", "ppo")
        }
        for stage in ("sft", "reward", "ppo"):
            manifest = artifacts.read_manifest(out / stage)
            assert manifest is not None and artifacts.changed_files(out / stage, manifest) == []
            assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "metrics.jsonl"} <= set(
                manifest["files"]
            )
            steps = [json.loads(line)["step"] for line in (out / stage / "metrics.jsonl").read_text().splitlines()]
            assert steps == sorted(set(steps))
            assert not (out / stage / "checkpoints").exists()
        assert (out / "ppo" / "samples.jsonl").is_file()
        summary = json.loads((out / "summary.json").read_text())
        assert {"reward", "systems", "win_rate", "cost"} <= set(summary)
        assert set(summary["systems"]) == {"base", "sft", "ppo"} and set(summary["win_rate"]) == {"ppo/sft"}
        assert set(summary["cost"]) == {"sft", "reward", "ppo"}

    def test_a_second_run_does_nothing(self, finished):
        """It says that nothing has changed and shows the same table."""
        recipe, out, first = finished
        result = chain.run_chain(recipe, out)
        assert result.stderr.count("finished already, nothing has changed; skipped") == 3
        assert result.stdout == first.stdout

    def test_the_report_is_written_again_on_request(self, finished):
        """`report` prints where the page is."""
        _, out, _ = finished
        result = chain.run("report", str(out))
        assert result.returncode == 0 and result.stdout.strip() == str(out / "report.html")


class TestLoad:
    def test_a_policy_generates_as_it_does_without_rlhf_kit(self, finished):
        """`load` gives a frozen model ready to generate; transformers and peft alone open the adapter to the same."""
        recipe, out, _ = finished
        model, tokenizer = rlhf_kit.load(out, "ppo")
        assert not any(parameter.requires_grad for parameter in model.parameters())
        prompts = tokenizer(["May I see a map?", "Is this it?"], return_tensors="pt", padding=True)
        settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}

        base = AutoModelForCausalLM.from_pretrained(
            recipe.parent / "model", quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float32
        )
        plain = PeftModel.from_pretrained(base, str(out / "ppo" / "adapter"))
        ids = model.generate(**prompts, **settings)
        assert torch.equal(ids, plain.generate(**prompts, **settings, pad_token_id=tokenizer.pad_token_id))
        with plain.disable_adapter():
            assert not torch.equal(model(**prompts).logits, plain(**prompts).logits)

    def test_a_reward_model_scores(self, finished):
        """The reward stage's model gives the stored probe the scores of its manifest."""
        _, out, _ = finished
        model, _ = rlhf_kit.load(out, "reward")
        for probe in json.loads((out / "reward" / "manifest.json").read_text())["probe"]:
            ids = torch.tensor([probe["ids"]])
            score = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item()
            assert score == pytest.approx(probe["score"], abs=1e-3)

    def test_what_is_not_there_is_named(self, finished, tmp_path):
        """An unknown stage gets a suggestion; a folder that is no run is named."""
        _, out, _ = finished
        with pytest.raises(InputError, match="has no stage pppo; did you mean ppo"):
            rlhf_kit.load(out, "pppo")
        with pytest.raises(InputError, match=r"recipe\.resolved\.yaml"):
            rlhf_kit.load(tmp_path, "ppo")


def test_numbers_that_blow_up(tmp_path):
    """A gradient that is not finite ends the run with a message and no stack trace, and the stage is not finished."""
    recipe, out = chain.write_chain(tmp_path), tmp_path / "out"
    result = chain.run("run", str(recipe), "--out", str(out), "--set", "adapter.alpha=1e30")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("ppo: update 1: the gradient of ")
    assert not (out / "ppo" / "manifest.json").exists()


def test_a_scorer_is_tried_before_anything_is_trained(tmp_path):
    """A function that does not give a number for each completion is told before the run directory is made."""
    recipe = chain.write_chain(tmp_path)
    (tmp_path / "mine.py").write_text("def score(prompts, completions):\n    return [1.0]\n")
    result = chain.run("run", str(recipe), "--set", "stages.ppo.reward=mine:score", cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1] == "mine:score: returned 1 numbers for 2 completions."
    assert "Traceback" not in result.stderr and not (tmp_path / "runs").exists()


def test_modules_that_cannot_be_adapted(tmp_path):
    """One message that names those which can, before anything is written."""
    recipe = chain.write_chain(tmp_path, adapter={"target_modules": ["qproj"]})
    result = chain.run("run", str(recipe), "--out", str(tmp_path / "run"))
    assert result.returncode == 2
    (message,) = [line for line in result.stderr.splitlines() if "adapter.target_modules: " in line]
    assert "chain.yaml:" in message and "name some of down_proj, gate_proj," in message
    assert "Traceback" not in result.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("stage", "longer"), [("sft", "stages.sft.max_steps=200"), ("ppo", "stages.ppo.updates=25")])
def test_stopped_and_run_again(tmp_path, stage, longer):
    """SIGTERM ends with 75 and the command to go on; that command goes on and ends where an undisturbed run ends.

    The stage is long enough not to end before the signal comes.
    """
    recipe = chain.write_chain(tmp_path)
    log = tmp_path / "log"
    process = chain.start(log, "run", str(recipe), "--out", str(tmp_path / "out"), "--fresh", "--set", longer)
    chain.wait_for(log, f"{stage} step 1", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75, log.read_text()[-2000:]
    again = f"rlhf-kit run {recipe} --set {longer} --out {tmp_path / 'out'}"
    assert log.read_text().splitlines()[-1].strip() == again
    assert "Traceback" not in log.read_text()
    assert not (tmp_path / "out" / stage / "manifest.json").exists()

    result = chain.run_chain(recipe, tmp_path / "out", longer)
    assert f"{stage}: was interrupted; going on from its checkpoint" in result.stderr
    chain.run_chain(recipe, tmp_path / "undisturbed", longer)
    for name in ("sft", "reward", "ppo"):
        resumed, undisturbed = (read_adapter(tmp_path / out / name / "adapter") for out in ("out", "undisturbed"))
        assert resumed.keys() == undisturbed.keys()
        assert all(torch.equal(resumed[key], undisturbed[key]) for key in resumed), name
