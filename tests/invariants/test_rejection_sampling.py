"""Rejection sampling on a tiny model: the best of each prompt wins and is learnt, whatever the pieces and the stops."""

from __future__ import annotations

import json
import math

import pytest
import torch

from rlhf_kit import artifacts, checkpoints
from rlhf_kit.errors import Diverged, InputError, Interrupted
from rlhf_kit.stages import rejection_sampling
from rlhf_kit.stages.rejection_sampling import Sampling, Winners
from tests.invariants.policy_jobs import count_of_a, make_job
from tests.invariants.stage_jobs import StopAfter, adapter_weights, metrics

GIVEN = "tests.invariants.policy_jobs:count_of_a"
BROKEN = "tests.invariants.policy_jobs:not_a_number"


def test_the_best_of_each_prompt_wins():
    """Of each prompt the completion of the highest score is kept, the first among equals; the rest is counted."""
    winners = Winners()
    end = 9
    winners.add([([[1], [2, end], [3]], [0.0, 2.0, 2.0]), ([[4], [5]], [math.nan, math.nan])], end)
    winners.add([([[6, 7, end], [8]], [math.nan, -1.0])], end)
    assert (winners.prompts, winners.rows, winners.completions) == (3, [0, 2], [[2, end], [8]])
    assert (winners.scores, winners.all_scores, winners.scored) == ([2.0, -1.0], 3.0, 4)
    assert (winners.tokens, winners.ended, winners.skipped) == (4 + 2 + 4, 1, 2)


def test_winners_survive_a_checkpoint(tmp_path):
    """What a checkpoint gives back is what was saved."""
    winners = Winners()
    winners.add([([[1], [2, 9]], [0.5, 0.25])] * 3, 9)
    checkpoints.save(tmp_path, winners.checkpoint((0.1, 2.0)), keep_all=False)
    found = checkpoints.latest(tmp_path, print)
    assert found is not None and Winners.of(found) == winners and found.state["unit"] == [0.1, 2.0]


@pytest.mark.parametrize("quantization", ["none", "8bit"])
def test_it_learns_what_scores_best(tmp_path, quantization):
    """Winners score higher than all completions do, and the policy moves towards them."""
    job = make_job(tmp_path, "rejection_sampling", quantization=quantization, reward=GIVEN, epochs=4)
    outcome = rejection_sampling.run(job)
    found = outcome.metrics
    assert found["objective/score"] > found["rejection_sampling/score_of_all"] + 0.5
    assert found["rejection_sampling/kl_bound"] == pytest.approx(math.log(4) - 0.75)
    lines = metrics(job.folder)
    assert lines[0]["step"] == 0 and lines[0]["objective/score"] == found["objective/score"]
    assert lines[-1]["rejection_sampling/loss"] < lines[1]["rejection_sampling/loss"] - 0.2
    assert outcome.extra["tokens"] > 0 and outcome.extra["score_normalisation"]["std"] > 0
    samples = [json.loads(line) for line in (job.folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 8
    unit, ended = outcome.extra["score_normalisation"], [sample["ended"] for sample in samples]
    counts = count_of_a([], [sample["completion"] for sample in samples])
    expected = [(count - unit["mean"]) / unit["std"] - (not end) for count, end in zip(counts, ended, strict=True)]
    assert [sample["score"] for sample in samples] == pytest.approx(expected)


def test_pieces_do_not_change_the_winners(tmp_path):
    """Whether 4 or 32 completions are written at a time, the same ones win."""
    found = [
        Sampling(make_job(tmp_path, "rejection_sampling", out=f"run{size}", sampled_at_once=size)).run()[0]
        for size in (4, 32)
    ]
    assert found[0].completions == found[1].completions
    assert found[0].scores == pytest.approx(found[1].scores, abs=1e-5)


@pytest.mark.parametrize("looks", [3, 9])
def test_an_interrupted_stage_goes_on_bit_for_bit(tmp_path, looks):
    """Stopped while it samples (7 batches) or while it trains, and run again, it ends with the same files."""
    whole = make_job(tmp_path, "rejection_sampling", out="whole")
    rejection_sampling.run(whole)
    job = make_job(tmp_path, "rejection_sampling", out="parts", stop=StopAfter(looks))
    with pytest.raises(Interrupted, match="sampling for" if looks == 3 else "after step"):
        rejection_sampling.run(job)
    assert any((job.folder / artifacts.CHECKPOINTS).glob("step-*"))  # what the pipeline looks for
    job = make_job(tmp_path, "rejection_sampling", out="parts")
    rejection_sampling.run(job)
    ours, theirs = adapter_weights(job.folder), adapter_weights(whole.folder)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert metrics(job.folder) == metrics(whole.folder)
    assert (job.folder / "samples.jsonl").read_bytes() == (whole.folder / "samples.jsonl").read_bytes()


def test_a_score_that_is_not_a_number(tmp_path):
    """It ends the stage, or, if the recipe says skip, cannot win and is counted."""
    settings = {"reward": BROKEN, "normalize_score": False}
    with pytest.raises(Diverged, match="NaN or infinite"):
        rejection_sampling.run(make_job(tmp_path, "rejection_sampling", **settings))
    job = make_job(tmp_path, "rejection_sampling", out="skips", on_nonfinite="skip", max_skipped=100, **settings)
    outcome = rejection_sampling.run(job)
    assert outcome.metrics["rejection_sampling/skipped_prompts"] == outcome.data["prompts"]["rows"]
    assert math.isfinite(outcome.metrics["objective/score"])


def test_a_reward_without_a_unit_is_refused(tmp_path, monkeypatch):
    """All scores the same: there is nothing to choose by, and the message says what would work."""
    monkeypatch.setattr(
        "tests.invariants.policy_jobs.count_of_a", lambda prompts, completions: [1.0] * len(completions)
    )
    job = make_job(tmp_path, "rejection_sampling", reward=GIVEN)
    with pytest.raises(InputError, match=r"stages\.rejection_sampling\.reward.*the same score.*normalize_score: false"):
        rejection_sampling.run(job)
