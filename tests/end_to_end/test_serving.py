"""A run's reward model served by one process, and learnt from by others: real processes on loopback."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx2
import pytest

from rlhf_kit.artifacts import manifest_hash, read_manifest
from rlhf_kit.finished import FinishedRun
from rlhf_kit.publish import contents
from tests import tiny
from tests.end_to_end import chain
from tests.hub import Loopback

KIND = "grpo"  # PPO's value function would start as the reward adapter, which is not here
MEASURED = ("time/", "throughput/", "memory/")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with a run in `local` whose policy learnt from its own reward stage."""
    folder = tmp_path_factory.mktemp("serving")
    chain.run_chain(chain.write_chain(folder), folder / "local", f"stages.ppo.kind={KIND}")
    return folder


@pytest.fixture(scope="module")
def address(workplace):
    """Where the run's reward model is served, by a process of its own, which ends with 0 when it is told to."""
    process = subprocess.Popen(
        [*chain.command(), "serve-reward", str(workplace / "local"), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=chain.ROOT,
        env=chain.environment(),
    )
    assert process.stdout is not None
    said = process.stdout.readline()
    assert " serves reward of " in said
    yield said.split()[0]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0


class Relay(Loopback):
    """Passes requests on to a reward server, as long as it is alive; it may tell of another reward model."""

    def __init__(self, to: str) -> None:
        super().__init__(_Relayed)
        self.to = to
        self.alive_for: int | None = None
        """Requests for scores; None for ever."""
        self.instead = (b"", b"")
        """What it says, and what in place of it."""


class _Relayed(BaseHTTPRequestHandler):
    hub: Relay

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        relay, body = self.hub, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command == "POST" and relay.alive_for is not None:
            if relay.alive_for == 0:
                self.connection.close()
                return
            relay.alive_for -= 1
        with httpx2.Client(trust_env=False, timeout=60) as client:
            headers = {"content-type": "application/json"}
            answer = client.request(self.command, relay.to + self.path, content=body, headers=headers)
        content = answer.content.replace(*relay.instead) if relay.instead[0] else answer.content
        self.send_response(answer.status_code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET


def started_like(workplace: Path, folder: Path) -> Path:
    """Return a run directory with the finished stages before PPO."""
    folder.mkdir()
    for name in ("sft", "reward"):
        shutil.copytree(workplace / "local" / name, folder / name)
    shutil.copy(workplace / "local" / "recipe.resolved.yaml", folder)
    return folder


def learn(workplace: Path, out: Path, reward: str, *, kind: str = KIND, processes: int | None = None) -> Any:
    """Run the recipe with another reward; return the finished process."""
    settings = (f"stages.ppo.kind={kind}", f"stages.ppo.reward={reward}")
    words = [word for setting in settings for word in ("--set", setting)]
    return chain.run("run", str(workplace / "chain.yaml"), "--out", str(out), *words, processes=processes)


def metrics(run: Path) -> list[dict[str, float]]:
    """Return the metrics of a PPO stage without what depends on the machine."""
    lines = [json.loads(line) for line in (run / "ppo" / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(MEASURED)} for line in lines]


def post(address: str, path: str, content: Any) -> httpx2.Response:
    return httpx2.post(address + path, json=content, trust_env=False, timeout=60)


@pytest.fixture(scope="module")
def remote(workplace, address) -> Path:
    """A run whose policy learnt from the server."""
    out = started_like(workplace, workplace / "remote")
    result = learn(workplace, out, address)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "asked with tokens" in result.stderr
    return out


def test_a_policy_learns_from_a_server_as_from_a_stage(workplace, address, remote):
    """Every metric, and every figure of the closing table, bit for bit; the manifest says which reward model it was."""
    assert metrics(remote) == metrics(workplace / "local")
    summaries = [json.loads((run / "summary.json").read_text()) for run in (remote, workplace / "local")]
    assert summaries[0]["systems"] == summaries[1]["systems"] and summaries[0]["win_rate"] == summaries[1]["win_rate"]
    here, there = (read_manifest(run / "ppo") for run in (remote, workplace / "local"))
    assert here and there and here["score_normalisation"] == there["score_normalisation"]
    assert here["made_from"]["stages.ppo.reward"] == manifest_hash(workplace / "local" / "reward")


def test_such_a_run_is_published_with_the_address(remote, address):
    """The files of a push are made without the server's help, and tell where the scores came from."""
    files, _ = contents(FinishedRun(remote), "ppo", "me/chain", None)
    assert address in files["recipe.resolved.yaml"].decode()
    assert address in files["README.md"].decode()


def test_another_reward_model_at_the_same_address_is_learnt_from_anew(workplace, address, remote, tmp_path):
    """A finished stage knows its reward model, wherever that is served, and gets no scores from another one."""
    hash_there = manifest_hash(workplace / "local" / "reward").encode()
    out, prompts = tmp_path / "run", tmp_path / "prompts.txt"
    prompts.write_text("What is red?\n")
    shutil.copytree(remote, out)

    def sampled(name: str) -> tuple[str, dict[str, Any]]:
        written = tmp_path / name
        result = chain.run(
            "sample", str(out), "--prompts", str(prompts), "--max-new-tokens", "4", "--out", str(written)
        )
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stderr, json.loads(written.read_text())

    with Relay(address) as relay:
        resolved = out / "recipe.resolved.yaml"
        resolved.write_text(resolved.read_text().replace(address, relay.url))
        moved = learn(workplace, out, relay.url)
        assert moved.returncode == 0 and "ppo: finished already" in moved.stderr
        assert "score" in sampled("same.jsonl")[1]
        relay.instead = (hash_there, b"0" * 64)
        told, row = sampled("other.jsonl")
        assert "has another reward model" in told and "score" not in row
        anew = learn(workplace, out, relay.url)
        assert anew.returncode == 0 and "ppo: runs again, because of stages.ppo.reward: " in anew.stderr
    told, row = sampled("gone.jsonl")
    assert "no reward server answers" in told and "score" not in row
    refused = chain.run("score", str(out), str(tmp_path / "gone.jsonl"))
    assert refused.returncode == 2 and "no reward server answers" in refused.stderr


def test_a_server_that_dies_stops_the_run_and_the_same_command_goes_on(workplace, address, tmp_path):
    """Exit code 1, one message, a checkpoint of every update that was done; then as if nothing had been."""
    out = started_like(workplace, tmp_path / "run")
    with Relay(address) as relay:
        relay.alive_for = 3  # of two requests an update
        stopped = learn(workplace, out, relay.url)
        assert stopped.returncode == 1, stopped.stderr[-2000:]
        assert "Traceback" not in stopped.stderr and "asking again in 4 s" in stopped.stderr
        assert f"reward: {relay.url}: gives no scores, asked 4 times" in stopped.stderr.splitlines()[-1]
        relay.alive_for = None
        going_on = learn(workplace, out, relay.url)
    assert going_on.returncode == 0, going_on.stderr[-2000:]
    assert "going on after update 1" in going_on.stderr
    assert metrics(out) == metrics(workplace / "local")


def test_a_value_function_starts_without_the_reward_adapter(workplace, address, tmp_path):
    """PPO learns from a server too; its own value function is then an adapter that starts as the policy."""
    out = started_like(workplace, tmp_path / "run")
    result = learn(workplace, out, address, kind="ppo")
    assert result.returncode == 0, result.stderr[-3000:]
    assert all(math.isfinite(line["ppo/value_loss"]) for line in metrics(out))


def test_every_process_asks_for_its_own(workplace, address, tmp_path):
    """Two processes together get the scores that one gets; requests that meet are rounded together."""
    out = started_like(workplace, tmp_path / "run")
    result = learn(workplace, out, address, processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    first, alone = metrics(out)[0], metrics(workplace / "local")[0]
    assert first["objective/score"] == pytest.approx(alone["objective/score"], rel=1e-4)


def test_without_a_server_nothing_begins(workplace, tmp_path):
    """Exit code 2 and one message, with the line of the recipe; `check` asks nobody."""
    out = tmp_path / "run"
    result = learn(workplace, out, "http://127.0.0.1:1")
    assert result.returncode == 2 and not out.exists()
    (message,) = [line for line in result.stderr.splitlines() if "stages.ppo.reward" in line]
    assert "no reward server answers" in message and "rlhf-kit serve-reward" in message
    checked = chain.run("check", str(workplace / "chain.yaml"), "--set", "stages.ppo.reward=http://127.0.0.1:1")
    assert checked.returncode == 0 and "scored by http://127.0.0.1:1, which check does not ask" in checked.stdout


def test_texts_are_scored_as_by_the_verb(workplace, address, tmp_path):
    """The same numbers as `rlhf-kit score`, once they are in the unit that the server tells."""
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in tiny.preferences()[:5]]
    rows.append({"prompt": [{"role": "user", "content": "Why?"}], "completion": "Because."})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = chain.run("score", str(workplace / "local"), str(tmp_path / "rows.jsonl")).stdout.splitlines()
    unit = httpx2.get(f"{address}/identity", trust_env=False).json()["score_normalisation"]
    raw = post(address, "/score/texts", {"rows": rows}).json()["scores"]
    normalised = [(score - unit["mean"]) / unit["std"] for score in raw]
    assert [json.loads(line)["score"] for line in scored] == pytest.approx(normalised, rel=1e-5)


def test_the_interface_is_described(address):
    """OpenAPI with every path and refusal; no page that would fetch scripts from elsewhere."""
    described = httpx2.get(f"{address}/openapi.json", trust_env=False).json()
    assert described["paths"].keys() == {"/health", "/identity", "/score/tokens", "/score/texts"}
    assert "422" in described["paths"]["/score/tokens"]["post"]["responses"]
    assert "left_padding" in described["components"]["schemas"]["TokenRow"]["properties"]
    assert httpx2.get(f"{address}/health", trust_env=False).json() == {"status": "ready"}
    assert httpx2.get(f"{address}/docs", trust_env=False).status_code == 404


@pytest.mark.parametrize(
    ("path", "content", "told"),
    [
        ("/score/tokens", {"rows": []}, "rows: List should have at least 1 item"),
        ("/score/tokens", {"rows": [{"ids": []}]}, "rows.0.ids: List should have at least 1 item"),
        ("/score/tokens", {"rows": [{"ids": [1]}, {"ids": [3, 999999]}]}, "rows.1: has token 999999"),
        ("/score/tokens", {"rows": [{"ids": [1] * 129}]}, "rows.0: has 129 tokens, and the reward model reads 128"),
        ("/score/tokens", {"rows": [{"ids": [1], "left_padding": 10**9}]}, "rows.0: left_padding 1000000000 is more"),
        ("/score/tokens", {"rows": [{"ids": ["a"]}]}, "rows.0.ids.0: Input should be a valid integer"),
        ("/score/tokens", {"rows": [{"text": "a"}]}, "rows.0.text: Extra inputs are not permitted"),
        ("/score/texts", {"rows": [{"prompt": "a"}]}, "rows.0.completion: Field required"),
        ("/score/texts", {"rows": [{"prompt": "a" * 200, "completion": "b"}]}, "the reward model reads 128 at most"),
        ("/score/texts", [], "body: Input should be"),
    ],
)
def test_what_cannot_be_scored_is_refused(address, path, content, told):
    """422 and one message; the server goes on."""
    answer = post(address, path, content)
    assert answer.status_code == 422 and told in answer.json()["detail"]
    assert post(address, "/score/tokens", {"rows": [{"ids": [1]}]}).status_code == 200


def test_wrong_arguments_are_one_message(workplace, address, tmp_path):
    """Exit code 2: a port that is taken, a host that is nobody's, a stage that scores nothing, no run, no extra."""
    port = address.rpartition(":")[2]
    for arguments, told in (
        ((workplace / "local", "--port", port), f"--host 127.0.0.1 --port {port}: cannot be served on"),
        ((workplace / "local", "--host", "no.such.host.invalid"), "cannot be served on"),
        ((workplace / "local", "--stage", "ppo", "--port", "0"), "a stage of kind reward gives scores"),
        ((tmp_path / "nosuch", "--port", "0"), "nosuch"),
    ):
        result = chain.run("serve-reward", *map(str, arguments))
        assert result.returncode == 2 and told in result.stderr and "Traceback" not in result.stderr
    code = "import sys; sys.modules['fastapi'] = None; from rlhf_kit.__main__ import main; main()"
    words = [sys.executable, "-c", code, "serve-reward", str(workplace / "local")]
    without = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **chain.environment()})
    assert without.returncode == 2 and "not installed: fastapi; `pip install 'rlhf-kit[serve]'`" in without.stderr
