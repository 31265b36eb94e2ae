"""The chain through `accelerate launch`, with one process and with two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from rlhf_kit.models import read_adapter
from tests import tiny
from tests.end_to_end import chain
from tests.faults.harness import left

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


def test_two_processes_learn_the_same_from_rankings(tmp_path):
    """Rankings of unlike lengths, a language modelling loss and two members: shares that differ in tokens and in the
    number of microbatches change nothing but the order of summation, and each completion is scored by one process.
    """
    model = tiny.make_checkpoint(tmp_path / "model")
    rows = [{**row, "completions": [text + " So." * (n % 5) for text in row["completions"]]}
            for n, row in enumerate(tiny.rankings())]  # fmt: skip
    card = tiny.write_card(tmp_path, "ranked", "rankings", rows, heldout=0.2)
    training = {"batch_size": 8, "learning_rate": 0.005, "max_steps": 3, "lm_coef": 0.2, "ensemble": 2}
    stages = {"reward": {"kind": "reward", "data": str(card), **training}}
    recipe = tiny.write_recipe(tmp_path / "ranked.yaml", model, stages)
    chain.run_chain(recipe, tmp_path / "one")
    pieces = "stages.reward.microbatch_tokens=300"
    chain.run_chain(recipe, tmp_path / "pieces", pieces)
    chain.run_chain(recipe, tmp_path / "two", pieces, processes=2)
    one, divided, two = (tmp_path / name / "reward" for name in ("one", "pieces", "two"))
    for member in (".", "members/1"):
        reference = adapter(one, member)
        order_alone = distance(reference, adapter(divided, member))
        size = max(float(tensor.abs().max()) for tensor in reference.values())
        assert distance(reference, adapter(two, member)) <= 10 * order_alone + 1e-6 * size
    first, second = (json.loads((out / "manifest.json").read_text()) for out in (one, two))
    assert first["steps"] == second["steps"] and first["cost"]["tokens"] == second["cost"]["tokens"]
    assert first["health"]["pairs"] == second["health"]["pairs"]
    for line, other in zip(metrics(one.parent, "reward"), metrics(two.parent, "reward"), strict=True):
        assert line.keys() == other.keys()
        for name in line.keys() & {"reward/loss", "reward/lm_loss", "reward/ensemble_std"}:
            assert other[name] == pytest.approx(line[name], rel=1e-3)


def test_a_launch_that_is_stopped_goes_on(tmp_path):
    """SIGTERM to `accelerate launch` with two processes saves a checkpoint and says how to go on; launched again, the
    run ends bit for bit as two processes that nobody stopped.
    """
    recipe, longer = chain.write_chain(tmp_path), "stages.ppo.updates=25"
    log, out = tmp_path / "log", tmp_path / "out"
    process = chain.start(log, "run", str(recipe), "--out", str(out), "--set", longer, processes=2)
    chain.wait_for(log, "ppo step 1 ", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(90) != 0
    assert f"accelerate launch [as before] -m rlhf_kit run {recipe} --set {longer} --out {out}" in log.read_text()
    assert not (out / "ppo" / "manifest.json").exists()
    result = chain.run_chain(recipe, out, longer, processes=2)
    assert "ppo: was interrupted; going on from its checkpoint" in result.stderr
    chain.run_chain(recipe, tmp_path / "undisturbed", longer, processes=2)
    assert left(out) == left(tmp_path / "undisturbed")


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
