"""The chain through `accelerate launch`, with one process and with two."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from rlhf_kit.models import read_adapter
from tests.end_to_end import chain

STAGES = ("sft", "reward", "ppo")


def adapter(out, stage):
    """Return an adapter's weights; of ppo, those of the value function too."""
    folders = ("adapter", "value") if stage == "ppo" else ("adapter",)
    return {f"{folder}/{name}": w for folder in folders for name, w in read_adapter(out / stage / folder).items()}


def distance(one, other):
    """Return the largest difference of two adapters' weights."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def metrics(out, stage):
    return [json.loads(line) for line in (out / stage / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("quantization", ["none", "8bit"])
def test_two_processes_do_the_work_of_one(tmp_path, quantization):
    """Two processes take the same steps on the same global batches as one, up to the order of float summation.

    The tolerance is measured: one process that sums each batch in the pieces of half the size does the same arithmetic
    in another order too, so two processes may be as far from one as a small multiple of that.
    """
    recipe = chain.write_chain(tmp_path, base={"quantization": quantization})
    pieces = [f"stages.{stage}.microbatch=2" for stage in STAGES]
    chain.run_chain(recipe, tmp_path / "one", processes=1)
    chain.run_chain(recipe, tmp_path / "halves", *pieces)
    result = chain.run_chain(recipe, tmp_path / "two", *pieces, processes=2)
    assert "2 processes" in result.stderr

    one, halves, two = (tmp_path / name for name in ("one", "halves", "two"))
    for stage in STAGES:
        lines = [metrics(out, stage) for out in (one, two)]
        assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]], stage
        reference = adapter(one, stage)
        order_alone = distance(reference, adapter(halves, stage))
        size = max(float(tensor.abs().max()) for tensor in reference.values())
        assert distance(reference, adapter(two, stage)) <= 10 * order_alone + 1e-6 * size, stage
    # Before anything is learned both sample the same completions. Later ones may part where a probability is rounded
    # to the other side of a random number, with 8-bit activations sooner.
    first, second = metrics(one, "ppo")[0], metrics(two, "ppo")[0]
    assert first["rollout/length"] == second["rollout/length"]


def test_a_launch_that_starts_fewer_processes_than_asked_for_is_refused(tmp_path):
    """`accelerate launch --cpu --num_processes 2` starts one process; the run says so and how to get two."""
    recipe = chain.write_chain(tmp_path)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    result = subprocess.run(
        [*command, "-m", "rlhf_kit", "run", str(recipe), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=chain.ROOT,
        env={**os.environ, "PYTHONPATH": str(chain.ROOT)},
        timeout=120,
    )
    assert "cpu_two_processes.yaml" in result.stderr
    assert not (tmp_path / "out").exists()
