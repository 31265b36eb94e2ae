"""Rows of Hub datasets, through the real clients and HTTP: the revision that the card says, or none."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.dataset_hub import DatasetHub
from tests.end_to_end import chain

CONFIGS = (
    b"---\nconfigs:\n- {config_name: main, data_files: train.jsonl}\n- {config_name: other, data_files: o.jsonl}\n---\n"
)


def lines(*prompts):
    return "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts).encode()


@pytest.fixture(scope="module")
def hub():
    old = {"train.jsonl": lines(*(f"old {n}" for n in range(8)))}
    new = {"README.md": CONFIGS, "train.jsonl": lines(*(f"new {n}" for n in range(5))), "o.jsonl": lines("a", "b", "c")}
    with DatasetHub({"owner/name": {"v1": old, "v2": new, "main": new}}) as server:
        yield server


def check(hub, folder: Path, source: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "c.md").write_text(f"---\nrlhf_kit: {{kind: prompts, source: {source}}}\n---\n")
    result = subprocess.run(
        [*chain.command(), "data", "check", "c.md"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**chain.environment(), **hub.environment(folder / "home"), **environment},
        timeout=300,
    )
    assert result.returncode == code, result.stdout + result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    return result


def test_the_revision_that_the_card_says(hub, tmp_path):
    """Also without the Hub, from what is kept here; another one that is kept is not taken for it."""
    assert "8 read" in check(hub, tmp_path, "{hub: owner/name, revision: v1}").stdout
    assert "8 read" in check(hub, tmp_path, "{hub: owner/name, revision: v1}", HF_HUB_OFFLINE="1").stdout
    refused = check(hub, tmp_path, "{hub: owner/name, revision: v2}", code=2, HF_HUB_OFFLINE="1")
    assert "is another revision" in refused.stderr
    assert "5 read" in check(hub, tmp_path, "{hub: owner/name, revision: v2, config: main}").stdout


def test_configurations_streams_and_folders_of_the_same_name(hub, tmp_path):
    """A configuration by its name, rows as they come, and no folder here in the Hub's place."""
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "train.jsonl").write_bytes(lines("local"))
    assert "3 read" in check(hub, tmp_path, "{hub: owner/name, revision: v2, config: other}").stdout
    assert "8 read" in check(hub, tmp_path, "{hub: owner/name, revision: v1, streaming: true}").stdout


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{hub: owner/name, revision: v9}", "v9"),
        ("{hub: owner/none, revision: v1}", "owner/none"),
        ("{hub: owner/name, revision: v1, split: nosuch}", "nosuch"),
    ],
)
def test_what_is_not_there(hub, tmp_path, source, said):
    """One message."""
    assert said in check(hub, tmp_path, source, code=2).stderr.strip().splitlines()[-1]
