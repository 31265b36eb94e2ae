"""The chain on real checkpoints and real human data, with nothing but recipe and card files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end import chain
from tests.real_input.happy_stories import write_data

HERE = Path(__file__).parent
ASSETS = chain.ROOT.parent / "shared" / "assets"
CHECKPOINT = ASSETS / "checkpoints" / "TinyStories-656K"
pytestmark = pytest.mark.skipif(not CHECKPOINT.is_dir(), reason=f"real checkpoints and data are not at {ASSETS}")


def manifest(out: Path, stage: str) -> dict:
    return json.loads((out / stage / "manifest.json").read_text())


def test_human_dialogues_go_through_with_every_row_explained(tmp_path):
    """2,312 real multi-turn pairs: each row is used, or counted with its reason; prompts that are cut are counted."""
    out = tmp_path / "run"
    chain.run_chain(HERE / "hh.yaml", out, f"base.model={CHECKPOINT}")
    for stage, sides in (("sft", ("train", "heldout")), ("reward", ("train", "heldout"))):
        data = manifest(out, stage)["data"]
        read = data["train"]["read"]
        assert read["read"] == 2312
        assert read["kept"] + sum(count for name, count in read.items() if name.startswith("dropped")) == 2312
        counts = [data[side]["tokenised"] for side in sides]
        assert sum(count["rows"] for count in counts) == read["kept"]
        for count in counts:
            dropped = sum(number for name, number in count.items() if name.startswith("dropped"))
            assert count["kept"] + dropped == count["rows"]
            assert count["prompt cut"] > 0
    prompts = manifest(out, "ppo")["data"]["prompts"]["counts"]
    assert prompts["read"] == 2312
    assert prompts["rows"] == manifest(out, "ppo")["data"]["prompts"]["rows"] > 2000
    summary = json.loads((out / "summary.json").read_text())
    assert summary["systems"].keys() == {"base", "sft", "ppo"}


def test_stories_get_happier(tmp_path):
    """In 30 updates PPO raises the outside score, which it never sees, by more than one SFT standard deviation."""
    write_data(tmp_path / "data", CHECKPOINT, ASSETS / "data" / "tinystories-sample" / "train_sample.jsonl", pairs=1500)
    out = tmp_path / "run"
    chain.run_chain(
        HERE / "happy_stories.yaml",
        out,
        f"base.model={CHECKPOINT}",
        f"data_root={tmp_path / 'data'}",
        "stages.ppo.updates=30",
    )
    systems = json.loads((out / "summary.json").read_text())["systems"]
    gain = (systems["ppo"]["gold"] - systems["sft"]["gold"]) / systems["sft"]["gold_std"]
    assert gain > 1.0, systems
    assert systems["ppo"]["kl"] > 0
