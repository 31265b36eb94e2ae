"""A run that is pushed: what is sent, what stops it, and that others can load it; over HTTP, with the real client."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from safetensors.torch import load as load_safetensors

from tests.end_to_end import chain
from tests.hub import TOKEN, Fault, Hub

REPO = "me/tuned"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a finished run in `run`, whose base is me/base on the Hub."""
    folder = tmp_path_factory.mktemp("publish")
    recipe = chain.write_chain(folder, base={"hub_id": "me/base"})
    chain.run_chain(recipe, folder / "run")
    return folder


@pytest.fixture
def hub(workplace):
    with Hub() as server:
        server.add("me/base", {path.name: path.read_bytes() for path in (workplace / "model").iterdir()})
        yield server


def push(hub, folder, *arguments, run="run", code=0, token=TOKEN, **environment):
    result = subprocess.run(
        [*chain.command(), "push", str(folder / run), "--repo", REPO, *arguments],
        capture_output=True,
        text=True,
        cwd=chain.ROOT,
        env={**chain.environment(), **hub.environment(folder / "home", token), **environment},
        timeout=300,
    )
    assert result.returncode == code, result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    return result


def hub_recipe(name):
    """A written recipe of another name."""
    recipe = {"name": name, "base": {"model": "me/base"}, "stages": {"sft": {"kind": "sft", "data": "d.md"}}}
    return yaml.safe_dump(recipe).encode()


def test_a_pushed_run_is_loaded_by_others(hub, workplace, tmp_path):
    """peft alone, in a process with an empty cache, gives bit-equal logits; card and recipe say what was done."""
    result = push(hub, workplace)
    assert f"{hub.url}/{REPO} at commit" in result.stdout
    assert hub.repositories[REPO].private
    files = hub.files(REPO)
    for name in ("adapter_model.safetensors", "sft/adapter/adapter_model.safetensors", "ppo/value/head.safetensors",
                 "reward/adapter/adapter_config.json", "ppo/manifest.json", "tokenizer.json", "data_cards/pairs.md",
                 "recipe.resolved.yaml", "summary.json", "report.html", "README.md"):  # fmt: skip
        assert name in files, name
    assert not [name for name in files if re.search(r"jsonl|optimizer|training_args|checkpoint|\.env", name)]
    front = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert front["base_model"] == "me/base" and front["base_model_relation"] == "adapter"
    assert front["library_name"] == "peft" and front["license"] == "cc0-1.0"
    assert "licence" not in result.stderr.replace("licence of me/base", ""), "every data card says its own"
    table = files["README.md"].decode().partition("| held-out prompts |")[2].splitlines()[1:5]
    assert [row[:2] for row in table] == ["|-", "| ", "| ", "| "], "a table has no empty lines"
    adapter = json.loads(files["adapter_config.json"])  # what vLLM's loader of LoRA files asks of one
    assert {"r", "lora_alpha", "target_modules"} <= adapter.keys() and adapter["bias"] == "none"
    assert not adapter["modules_to_save"] and not adapter["use_dora"]
    names = load_safetensors(files["adapter_model.safetensors"])
    assert names and all(
        re.fullmatch(r"base_model\.model\.model\.layers\..*\.lora_[AB]\.weight", name) for name in names
    )
    measured = {one["name"]: one["value"] for one in front["model-index"][0]["results"][0]["metrics"]}
    summary = json.loads(files["summary.json"])
    assert measured["score"] == pytest.approx(summary["systems"]["ppo"]["score"], abs=1e-3)
    assert yaml.safe_load(files["recipe.resolved.yaml"])["base"]["model"] == "me/base"
    code = (
        "import sys, torch\n"
        "from peft import AutoPeftModelForCausalLM, PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"ours = AutoPeftModelForCausalLM.from_pretrained('{REPO}').eval()\n"
        f"ids = AutoTokenizer.from_pretrained('{REPO}')('Where is my hat?', return_tensors='pt')['input_ids']\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "local = PeftModel.from_pretrained(base, sys.argv[2]).eval()\n"
        "assert torch.equal(ours(ids).logits, local(ids).logits)\n"
    )
    words = [sys.executable, "-c", code, str(workplace / "model"), str(workplace / "run" / "ppo" / "adapter")]
    environment = {**os.environ, **hub.environment(tmp_path / "empty", TOKEN)}
    loaded = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert loaded.returncode == 0, loaded.stderr[-3000:]


def test_pushing_again_makes_no_second_commit(hub, workplace):
    """The same run makes the same files."""
    push(hub, workplace)
    commits = len(hub.repositories[REPO].commits)
    assert "has it already" in push(hub, workplace).stdout
    assert len(hub.repositories[REPO].commits) == commits


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST .*/commit/", after=True),  # the commit was made, its answer was lost
        Fault("PUT /objects/", times=99),
        Fault("POST .*/preupload/", status=500, times=99),
        Fault("POST .*/commit/", status=503, times=99),
    ],
    ids=["answer lost", "uploads reset", "500", "503"],
)
def test_an_interrupted_push_is_completed(hub, workplace, fault):
    """One message with the next step; the same command, run again, leaves one commit of ours."""
    hub.faults.append(fault)
    result = push(hub, workplace, code=1)
    assert "run the same command again" in result.stderr
    hub.faults.clear()
    push(hub, workplace)
    assert len(hub.repositories[REPO].commits) == 2  # the empty repository, and ours
    assert "adapter_model.safetensors" in hub.files(REPO)


def test_a_slow_hub_is_waited_for(hub, workplace):
    """Answers that take seconds, of several kinds of request, are no failure."""
    hub.faults += [Fault(pattern, wait_s=3) for pattern in ("POST .*/preupload/", "PUT /objects/", "POST .*/commit/")]
    assert "at commit" in push(hub, workplace).stdout
    assert not any(fault.times for fault in hub.faults)
    assert len(hub.repositories[REPO].commits) == 2


@pytest.mark.parametrize(
    ("status", "headers", "code", "said"),
    [
        (401, {}, 2, "log"),
        (403, {}, 2, "may not write there"),
        (404, {"X-Error-Code": "RepoNotFound"}, 2, "mend --repo"),
        (409, {}, 1, "changed by somebody else"),
        (412, {}, 1, "nothing of theirs was overwritten"),
        (429, {"Retry-After": "7"}, 1, "in 7 seconds"),
    ],
)
def test_what_the_hub_refuses_is_one_message(hub, workplace, status, headers, code, said):
    """With the next step."""
    hub.faults.append(Fault("POST .*/commit/", status=status, headers=headers, times=9))
    result = push(hub, workplace, code=code)
    assert said in result.stderr and REPO in result.stderr
    assert len(hub.repositories[REPO].commits) == 1


def test_a_commit_of_others_in_between_is_not_overwritten(hub, workplace):
    """The parent is checked; what the other one wrote stays."""

    def meddle(request):
        if "/commit/" in request:
            hub.repositories[REPO].commit({"theirs.txt": b"x"})
            hub.before = lambda _: None

    push(hub, workplace, "--stage", "sft")
    hub.before = meddle
    assert "somebody else" in push(hub, workplace, code=1).stderr
    assert "ppo/value/head.safetensors" in hub.files(REPO) and "theirs.txt" in hub.files(REPO)
    push(hub, workplace)
    assert {"theirs.txt", "sft/adapter/adapter_config.json"} <= set(hub.files(REPO))


SCORED = """
import json, sys, torch
from huggingface_hub import hf_hub_download
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

repo = sys.argv[1]
manifest = json.load(open(hf_hub_download(repo, "reward/manifest.json")))
base = AutoModelForSequenceClassification.from_pretrained("me/base", num_labels=1)
model = PeftModel.from_pretrained(base, repo, subfolder="reward/adapter").eval()
with torch.no_grad():
    found = [float(model(input_ids=torch.tensor([row["ids"]])).logits) for row in manifest["probe"]]
print(json.dumps([found, [row["score"] for row in manifest["probe"]]]))
"""


def test_a_pushed_reward_model_scores_as_it_was_trained(hub, workplace, tmp_path):
    """With peft alone, in a process with an empty cache: the scores of the manifest's probe, up to a last bit or two.

    transformers applies the head to all tokens and we to the last one, which some processors sum in another order.
    """
    push(hub, workplace)
    ended = subprocess.run(
        [sys.executable, "-c", SCORED, REPO],
        capture_output=True,
        text=True,
        env={**chain.environment(), **hub.environment(tmp_path, TOKEN)},
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    found, probe = json.loads(ended.stdout)
    assert found == pytest.approx(probe, rel=1e-6) and len(set(found)) > 1


def test_others_repositories_are_left_alone(hub, workplace):
    """Other content is not mixed with ours, unless it is proposed; nor is a run put before everybody unasked."""
    assert "must be owner/name" in push(hub, workplace, "--repo", "nonsense", code=2).stderr
    hub.add(REPO, {".gitattributes": b""})
    assert "say --public" in push(hub, workplace, code=2).stderr
    hub.add(REPO, {"recipe.resolved.yaml": hub_recipe("another")}, private=True)
    assert "has other content (a run of another)" in push(hub, workplace, code=2).stderr
    hub.repositories[REPO].private = True
    hub.add(REPO, {"README.md": b"theirs"}, private=True)
    assert "has other content (README.md)" in push(hub, workplace, code=2).stderr
    hub.add(REPO, {"pytorch_model.bin": b"x"}, private=True)
    assert "has other content (pytorch_model.bin)" in push(hub, workplace, code=2).stderr
    result = push(hub, workplace, "--create-pr")
    assert "/discussions/" in result.stdout
    assert set(hub.files(REPO)) == {"pytorch_model.bin"}


def test_a_second_proposal_goes_on_with_the_first(hub, workplace):
    """The same run makes no second pull request and no second commit; one that was written on makes a commit there."""
    hub.add(REPO, {"pytorch_model.bin": b"x"}, private=True)
    first = push(hub, workplace, "--create-pr").stdout
    again = push(hub, workplace, "--create-pr").stdout
    assert again.split()[0] == first.split()[0] and "has it already" in again
    assert len(hub.repositories[REPO].proposals) == 1
    (number,) = hub.repositories[REPO].proposals
    hub.repositories[REPO].commit({"README.md": b"edited there"}, f"refs/pr/{number}")
    assert " at commit " in push(hub, workplace, "--create-pr").stdout
    assert hub.files(REPO, f"refs/pr/{number}")["README.md"] != b"edited there"
    assert len(hub.repositories[REPO].proposals) == 1 and set(hub.files(REPO)) == {"pytorch_model.bin"}


def test_a_hub_that_never_answers_is_not_waited_for(hub, workplace):
    """After a while, which is short here, that is said like any other trouble of the network."""
    hub.faults.append(Fault("POST /api/repos/create", wait_s=20, times=9))
    code = "from rlhf_kit import publish; publish.ANSWER_S = 1.0; from rlhf_kit.__main__ import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", code, "push", str(workplace / "run"), "--repo", REPO],
        capture_output=True,
        text=True,
        cwd=chain.ROOT,
        env={**chain.environment(), **hub.environment(workplace / "cache", TOKEN)},
        timeout=300,
    )
    assert ended.returncode == 1 and "cannot be reached" in ended.stderr and "Traceback" not in ended.stderr


def test_nobody_logged_in_no_network_and_offline(hub, workplace):
    """Each in its own words."""
    assert "log" in push(hub, workplace, code=2, token=None).stderr
    assert "HF_HUB_OFFLINE is set" in push(hub, workplace, code=2, HF_HUB_OFFLINE="1").stderr
    assert "cannot be reached" in push(hub, workplace, code=1, HF_ENDPOINT="http://127.0.0.1:9").stderr
    assert REPO not in hub.repositories


@pytest.mark.parametrize(
    ("written", "environment", "said"),
    [
        ("hf_" + "a" * 34, {}, "a Hugging Face token"),
        ("see /home/somebody/data", {}, "a home folder"),
        ("s3cr3t-value", {"MY_API_KEY": "s3cr3t-value"}, "the value of MY_API_KEY"),
    ],
)
def test_secrets_are_not_sent(hub, workplace, tmp_path, written, environment, said):
    """File and line are named, and nothing is pushed."""
    shutil.copytree(workplace / "run", tmp_path / "run")
    report = tmp_path / "run" / "report.html"
    report.write_text(report.read_text() + f"\n<p>{written}</p>\n")
    result = push(hub, tmp_path, code=2, **environment)
    assert re.search(rf"report\.html:\d+: holds what looks like {said}", result.stderr)
    assert written not in result.stderr
    assert REPO not in hub.repositories


def test_links_are_not_sent(hub, workplace, tmp_path):
    """A link may lead anywhere."""
    shutil.copytree(workplace / "run", tmp_path / "run")
    (tmp_path / "run" / "eval.json").symlink_to("/etc/hostname")
    assert "eval.json: is a link" in push(hub, tmp_path, code=2).stderr


def test_a_recipe_publishes_and_a_failed_push_fails_no_run(hub, workplace, tmp_path):
    """The run is done either way; where the push failed, the command that does it is told."""
    shutil.copytree(workplace / "run", tmp_path / "run")
    words = [*chain.command(), "run", str(workplace / "chain.yaml"), "--out", str(tmp_path / "run")]
    words += ["--set", "publish.repo=me/tuned"]

    def run():
        environment = {**chain.environment(), **hub.environment(tmp_path / "home", TOKEN)}
        return subprocess.run(
            words, capture_output=True, text=True, cwd=chain.ROOT, env=environment, timeout=300, check=True
        )

    hub.faults.append(Fault("POST .*/commit/", status=503, times=99))
    failed = run()
    assert f"rlhf-kit push {tmp_path / 'run'} --repo me/tuned --private" in failed.stderr
    hub.faults.clear()
    assert f"publish: {hub.url}/me/tuned at commit" in run().stderr
