"""RLOO and GRPO on a tiny model: trl's losses, groups that stay together, exact resume, learning."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOTrainer, RLOOTrainer

from rlhf_kit.errors import Interrupted
from rlhf_kit.rollout import completion_logprobs, completion_states
from rlhf_kit.stages import ppo
from tests.invariants.policy_jobs import make_job
from tests.invariants.stage_jobs import StopAfter, adapter_weights, metrics

KINDS = ["rloo", "grpo"]
GIVEN = "tests.invariants.policy_jobs:count_of_a"


def without_clock(job):
    """The lines of metrics.jsonl without what a clock measured."""
    return [{k: v for k, v in line.items() if not k.startswith("throughput/")} for line in metrics(job.folder)]


def moved_trainer(job):
    """A run at work whose policy has moved after its rollout; the rollout and its targets."""
    trainer = ppo.PPO(job)
    rollout, _ = trainer.roll_out(0)
    targets = trainer.targets(rollout)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return trainer, rollout, targets


@pytest.mark.parametrize("kind", KINDS)
def test_passes_that_learning_begins_with_have_the_room_of_a_microbatch(tmp_path, kind):
    """However many completions share a prompt."""
    settings = {"batch_size": 32, "completions_per_prompt": 16, "minibatches": 1, "microbatch": 4}
    trainer = ppo.PPO(make_job(tmp_path, kind, **settings))
    rollout, _ = trainer.roll_out(0)
    taken = [trainer.shared.room(rollout.ids[[*rows]], rollout.mask[[*rows]]) for rows in trainer.begun]
    assert 0 < sum(taken) <= 4 * rollout.ids.shape[1]
    assert sum(map(len, trainer.begun)) > 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_trls(tmp_path, kind):
    """On a rollout that the policy has moved away from, the loss of one minibatch is that of trl's trainer."""
    trainer, rollout, targets = moved_trainer(make_job(tmp_path, kind, minibatches=1, clip=0.1))
    index = torch.arange(len(rollout.scores))
    tokens = int(rollout.completion_mask.sum())
    figures, _, ratio_error = trainer._learn_from(rollout, index, targets, tokens, False)
    assert ratio_error > 0.05

    states = completion_states(trainer.shared, ppo.POLICY, rollout)
    logprobs = completion_logprobs(trainer.shared, states, rollout, 1.0).detach()
    mask = rollout.completion_mask.long()
    shared = {
        "prompt_ids": rollout.prompt_ids,
        "prompt_mask": rollout.prompt_mask.long(),
        "completion_ids": rollout.completion_ids,
        "completion_mask": mask,
        "advantages": targets.advantages[:, 0],
    }
    theirs = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, torch.zeros_like(logprobs), None),
        model=SimpleNamespace(training=True),
        accelerator=trainer.accelerator,
        aux_loss_enabled=False,
        epsilon_low=0.1,
        epsilon_high=0.1,
        _metrics=defaultdict(lambda: defaultdict(list)),
        # of GRPO
        beta=0.05,
        loss_type="dapo",
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
    )
    if kind == "rloo":
        old = (rollout.policy_logprobs * mask).sum(1)
        loss = RLOOTrainer._compute_loss(theirs, None, {**shared, "old_logps": old})
    else:
        more = {
            "old_per_token_logps": rollout.policy_logprobs,
            "ref_per_token_logps": rollout.reference_logprobs,
            "num_items_in_batch": mask.sum(),
        }
        loss = GRPOTrainer._compute_loss(theirs, None, {**shared, **more})
    assert float(figures[0]) == pytest.approx(float(loss), rel=1e-5)
    assert float(figures[1]) > 0  # the clip is at work


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_compare_the_completions_of_one_prompt(tmp_path, kind):
    """Four rows in a row have the same prompt, their advantages add up to 0, and every token has its completion's."""
    trainer = ppo.PPO(make_job(tmp_path, kind))
    rollout, written = trainer.roll_out(0)
    assert written.prompts[0] == written.prompts[3] != written.prompts[4] == written.prompts[7]
    assert len({tuple(row.tolist()) for row in rollout.completion_ids[:4]}) > 1
    targets = trainer.targets(rollout)
    assert torch.equal(targets.advantages != 0, rollout.completion_mask)
    first = targets.advantages[:, 0]
    assert torch.equal(targets.advantages, first.unsqueeze(1) * rollout.completion_mask)
    torch.testing.assert_close(first.view(2, 4).sum(1), torch.zeros(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_microbatches_do_not_change_the_update(tmp_path, kind):
    """1x8 and 8x1 microbatches take the same optimizer steps up to the order of float summation."""
    results = []
    for microbatch in (8, 1):
        trainer = ppo.PPO(make_job(tmp_path, kind, microbatch=microbatch))
        rollout, _ = trainer.roll_out(0)
        trainer.learn(0, rollout, trainer.targets(rollout))
        results.append({name: parameter.detach().clone() for name, parameter in trainer.parameters.items()})
    start = ppo.PPO(make_job(tmp_path, kind)).parameters
    assert set(start) == {name for name in results[0] if name.startswith("policy/")}  # and no value function
    for name, reference in results[0].items():
        step = (reference - start[name]).abs().max()
        assert step > 0, name
        assert (results[1][name] - reference).abs().max() < 0.02 * step, name


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, kind):
    """Stopped after an update and run again, it ends with the same adapter, metrics and samples."""
    whole = make_job(tmp_path, kind, out="whole")
    ppo.run(whole)
    job = make_job(tmp_path, kind, out="parts", stop=StopAfter(3))
    with pytest.raises(Interrupted):
        ppo.run(job)
    job = make_job(tmp_path, kind, out="parts")
    outcome = ppo.run(job)
    ours, theirs = adapter_weights(job.folder), adapter_weights(whole.folder)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert without_clock(job) == without_clock(whole)
    assert (job.folder / "samples.jsonl").read_bytes() == (whole.folder / "samples.jsonl").read_bytes()
    assert outcome.extra["tokens"] > 0 and not (job.folder / "value").exists()


@pytest.mark.parametrize("quantization", ["none", "8bit"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_what_is_rewarded(tmp_path, kind, quantization):
    """In twenty updates the score of the policy's completions rises by more than a standard deviation."""
    settings = {"updates": 20, "batch_size": 32, "kl_coef": 0.001, "learning_rate": 0.01, "reward": GIVEN}
    job = make_job(tmp_path, kind, quantization=quantization, **settings)
    ppo.run(job)
    lines = metrics(job.folder)
    assert abs(lines[0]["objective/kl"]) < 1e-3
    assert lines[-1]["objective/score"] > lines[0]["objective/score"] + 1.0
    assert {f"{kind}/policy_loss", f"{kind}/clip_fraction", f"{kind}/first_ratio_error"} <= lines[0].keys()
    assert not any(name.startswith(("ppo/", "value/")) for name in lines[0])
