"""DPO and KTO on a tiny model: trl's loss, a reference that is where the policy starts, exact resume."""

from __future__ import annotations

import math

import pytest
import torch
from trl import DPOTrainer, KTOTrainer

from rlhf_kit.collate import right_pad
from rlhf_kit.errors import Diverged, Interrupted
from rlhf_kit.models import read_adapter
from rlhf_kit.stages import dpo
from rlhf_kit.training import Training
from tests.invariants.policy_jobs import make_job
from tests.invariants.stage_jobs import StopAfter, adapter_weights, metrics


def trainer_at_the_start(job, monkeypatch):
    """The stage's trainer as it is when training begins."""
    found = {}

    def look(training):
        found["trainer"] = training.trainer
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(Training, "run", look)
        with pytest.raises(Interrupted):
            dpo.run(job)
    trainer = found["trainer"]
    trainer.training.model.train()
    return trainer


def moved(trainer, seed=3):
    """Give the policy other weights than the reference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.training.parameters.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_it_learns_from_even_odds_on(tmp_path, quantization):
    """At the first step policy and reference are the same, so the loss is ln 2; then held-out pairs are told apart."""
    job = make_job(tmp_path, "dpo", quantization=quantization)
    outcome = dpo.run(job)
    lines = metrics(job.folder)
    assert lines[0]["dpo/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[0]["dpo/accuracy"] == 0.5 and lines[0]["dpo/margin"] == 0.0
    assert outcome.metrics["dpo/heldout_accuracy"] == 1.0
    assert outcome.metrics["dpo/heldout_loss"] < 0.5
    assert outcome.extra["tokens"] > 0 and outcome.data["train"]["card"] == "pairs"


def test_the_loss_is_trls(tmp_path, monkeypatch):
    """On a batch of pairs loss and gradients are those of trl's own DPO loss."""
    job = make_job(tmp_path, "dpo", batch_size=6, microbatch=6)
    trainer = trainer_at_the_start(job, monkeypatch)
    moved(trainer)
    rows = trainer.training.rows[:6]
    parameters = list(trainer.training.parameters.values())
    (microbatch,) = trainer.microbatches(rows, 10_000)
    ours = trainer.part(microbatch, torch.tensor(1))
    gradients = torch.autograd.grad(ours, parameters)

    pairs = [[row["completions"][row[side][0]] for row in rows] for side in ("chosen", "rejected")]
    ids, mask = right_pad([*pairs[0], *pairs[1]], trainer.pad_id)
    asked = torch.tensor([row["prompt_tokens"] for row in rows] * 2).unsqueeze(1)
    behind = mask & (torch.arange(ids.shape[1]) >= asked)
    batch = {"input_ids": ids, "attention_mask": mask.long(), "completion_mask": behind.long()}
    trainer.beta = trainer.settings.kl_coef
    theirs = DPOTrainer._compute_loss(trainer, trainer.model, batch, False)
    their_gradients = torch.autograd.grad(theirs, parameters)
    ours, theirs = ours.detach(), theirs.detach()
    assert float(ours) != pytest.approx(math.log(2), abs=1e-3)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    for gradient, other in zip(gradients, their_gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("quantization", ["none", "8bit"])
def test_the_reference_is_the_sft_adapter_and_stays(tmp_path, monkeypatch, quantization):
    """The reference has the float32 weights of the stage that the policy comes from, and nothing trains it."""
    job = make_job(tmp_path, "dpo", quantization=quantization)
    trainer = trainer_at_the_start(job, monkeypatch)
    stored = read_adapter(job.adapter("sft"))
    reference = {name.replace(".ref", ""): p for name, p in trainer.model.named_parameters() if ".ref." in name}
    assert {name: p.dtype for name, p in reference.items()} == dict.fromkeys(stored, torch.float32)
    assert all(torch.equal(reference[name], stored[name]) for name in stored)
    with trainer.reference():
        assert not any(p.requires_grad for p in trainer.model.parameters())
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained == set(trainer.training.parameters) and not any(".ref." in name for name in trained)


def test_rankings_and_ties_are_learnt_from(tmp_path):
    """A ranking is its pairs, ties at even odds if asked for; microbatches change nothing but the order of sums."""
    weights = []
    for microbatch in (8, 1):
        out = f"run{microbatch}"
        job = make_job(
            tmp_path, "dpo", out=out, data=str(tmp_path / "ranked.md"), ties="soft", microbatch=microbatch, epochs=1
        )
        outcome = dpo.run(job)
        assert outcome.metrics["dpo/heldout_accuracy"] > 0.7
        weights.append(adapter_weights(job.folder))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path, kind):
    """Stopped after two steps and run again, the stage ends with the same adapter and the same metrics."""
    whole = make_job(tmp_path, kind, out="whole")
    dpo.run(whole)
    job = make_job(tmp_path, kind, out="parts", stop=StopAfter(2))
    with pytest.raises(Interrupted):
        dpo.run(job)
    job = make_job(tmp_path, kind, out="parts")
    dpo.run(job)
    ours, theirs = adapter_weights(job.folder), adapter_weights(whole.folder)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert metrics(job.folder) == metrics(whole.folder)


def test_what_is_not_finite_ends_the_stage(tmp_path, monkeypatch):
    """A loss that is NaN is refused with what to try, and no step is taken with it."""
    job = make_job(tmp_path, "dpo")
    logprobs = dpo.Trainer.logprobs
    monkeypatch.setattr(dpo.Trainer, "logprobs", lambda self, *pass_: logprobs(self, *pass_) * torch.nan)
    with pytest.raises(Diverged, match="dpo: the loss of step 1 is nan"):
        dpo.run(job)
    assert not (job.folder / "adapter").exists()


@pytest.mark.parametrize("quantization", ["none", "8bit"])
def test_kto_learns_from_a_loss_of_a_half_on(tmp_path, quantization):
    """At the first step nothing has moved and the loss is 1/2; then held-out pairs are told apart."""
    job = make_job(tmp_path, "kto", quantization=quantization)
    outcome = dpo.run(job)
    lines = metrics(job.folder)
    assert lines[0]["kto/loss"] == pytest.approx(0.5, abs=1e-6)
    assert lines[0]["kto/kl"] == 0.0 and lines[0]["kto/accuracy"] == 0.5
    assert all(line["kto/kl"] >= 0 for line in lines[:-1] if "kto/kl" in line)
    assert outcome.metrics == {"kto/heldout_accuracy": 1.0}


def test_the_loss_of_kto_is_trls(tmp_path, monkeypatch):
    """On the completions of a batch and the mismatched ones, loss and gradients are those of trl's own KTO loss."""
    job = make_job(tmp_path, "kto", batch_size=6, microbatch=6, desirable_weight=1.5)
    trainer = trainer_at_the_start(job, monkeypatch)
    moved(trainer)
    rows = trainer.training.rows[:6]
    parameters = list(trainer.training.parameters.values())
    trainer.kl = (trainer._mismatched_log_ratios(rows, 10_000) / 6).float()
    assert trainer.kl > 1  # so that it counts
    (microbatch,) = trainer.microbatches(rows, 10_000)
    ours = trainer.part(microbatch, torch.tensor(trainer.tokens(rows)))
    gradients = torch.autograd.grad(ours, parameters)

    def batch_of(completions):
        ids, mask = right_pad(completions, trainer.pad_id)
        asked = torch.tensor([row["prompt_tokens"] for row in rows] * (len(completions) // len(rows))).unsqueeze(1)
        return ids, mask.long(), (mask & (torch.arange(ids.shape[1]) >= asked)).long()

    both = [row["completions"][row[side][0]] for side in ("chosen", "rejected") for row in rows]
    keys = ("input_ids", "attention_mask", "completion_mask")
    batch = dict(zip(keys, batch_of(both), strict=True))
    batch |= {
        f"KL_{key}": tensor for key, tensor in zip(keys, batch_of([row["mismatched"] for row in rows]), strict=True)
    }
    batch["label"] = torch.tensor([True] * 6 + [False] * 6)
    trainer.beta, trainer.loss_type, trainer.calculate_KL = trainer.settings.kl_coef, "kto", True
    trainer.desirable_weight, trainer.undesirable_weight = 1.5, 1.0
    trainer._compute_kl_logps = lambda model, given: KTOTrainer._compute_kl_logps(trainer, model, given)
    theirs = KTOTrainer._compute_loss(trainer, trainer.model, batch, False)
    their_gradients = torch.autograd.grad(theirs, parameters)
    assert float(ours.detach()) != pytest.approx(0.625, abs=1e-3)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    for gradient, other in zip(gradients, their_gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-6)


def test_completions_of_a_ranking_are_desirable_or_not():
    """Best of four, two tied and left out of each other's pairs: the first wins three pairs, the last loses three."""
    group = {"completions": [[1], [2], [3], [4]], "chosen": [0, 0, 0, 1, 2], "rejected": [1, 2, 3, 3, 3]}
    assert dpo.balance(group) == [3, 0, 0, -3]


def test_mismatched_completions_belong_to_the_prompt_behind():
    """Each prompt gets the best completion of the next, the last that of the first; no more than the limit."""
    groups = [
        {"completions": [[1, 11], [1, 12, 13]], "prompt_tokens": 1, "best": 1},
        {"completions": [[2, 2, 21], [2, 2, 22]], "prompt_tokens": 2, "best": 0},
    ]
    assert [group["mismatched"] for group in dpo.with_mismatched(groups, 3)] == [[1, 21], [2, 2, 12]]
