"""What must hold for PPO as a whole, on a tiny model: the same update however it is divided, exact resume, guards."""

from __future__ import annotations

import json
import math
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from rlhf_kit import checkpoints, models
from rlhf_kit.collate import load_text_format
from rlhf_kit.data_cards import load_card
from rlhf_kit.errors import Diverged, InputError, Interrupted
from rlhf_kit.examples.loading import load_examples
from rlhf_kit.recipe_reading import load_recipe
from rlhf_kit.rollout import completion_states, policy_pass
from rlhf_kit.stages import Job, StopRequest, ppo
from tests import tiny
from tests.invariants import roles
from tests.invariants.stage_jobs import StopAfter


def count_of_a(prompts, completions):
    """Score completions by the share of the letter a: something a tiny policy can learn in a few updates."""
    return [completion.lower().count("a") for completion in completions]


def make_job(folder: Path, *, out: str = "run", quantization: str = "none", heldout: float = 0.1, **settings) -> Job:
    """Return a PPO job of 8 completions an update on the tiny model, its SFT and reward stages finished.

    heldout: share of the prompts. A `ptx` without data learns the demonstrations.
    """
    model = folder / "model"
    if not model.exists():
        tiny.make_checkpoint(model)
    card = tiny.write_card(folder, "prompts", "prompts", [{"prompt": q} for q in tiny.QUESTIONS], heldout=heldout)
    pairs = tiny.write_card(folder, "pairs", "preferences", tiny.preferences(), heldout=0.1)
    shown = tiny.write_card(folder, "demonstrations", "demonstrations", tiny.demonstrations(), heldout=0.1)
    if "ptx" in settings:
        settings["ptx"] = {"data": str(shown), **settings["ptx"]}
    stages = {
        "sft": {"kind": "sft", "data": str(shown)},
        "reward": {"kind": "reward", "init": "sft", "data": str(pairs)},
        "ppo": {
            "kind": "ppo",
            "policy": "sft",
            "reward": "reward",
            "prompts": str(card),
            "kl_coef": 0.05,
            "updates": 3,
            "batch_size": 8,
            "epochs": 2,
            "minibatches": 2,
            "microbatch": 4,
            "max_new_tokens": 10,
            "learning_rate": 0.003,
            "missing_eos_penalty": 1.0,
            **settings,
        },
    }
    recipe = load_recipe(tiny.write_recipe(folder / "tiny.yaml", model, stages, base={"quantization": quantization}))
    text_format = load_text_format(recipe.base)
    run = folder / out
    if not run.exists():
        roles.write_adapters(folder / "made", recipe.base, text_format)
        for stage in ("sft", "reward"):
            (run / stage).mkdir(parents=True)
            (folder / "made" / stage).rename(run / stage / "adapter")
        (run / "ppo").mkdir()
    accelerator = Accelerator(cpu=True)
    reward_model = models.classifier(models.load_base(recipe.base, text_format, accelerator))
    reward_model = models.open_adapter(reward_model, run / "reward" / "adapter")
    probe = []
    for question in tiny.QUESTIONS[:2]:
        ids = text_format.prompt_ids(question)
        with torch.no_grad():
            score = models.sequence_scores(reward_model, torch.tensor([ids]), torch.ones(1, len(ids)))
        probe.append({"ids": ids, "score": float(score)})
    return Job(
        recipe=recipe,
        name="ppo",
        settings=recipe.stages["ppo"],
        folder=run / "ppo",
        inputs={"sft": {}, "reward": {"score_normalisation": {"mean": 0.1, "std": 0.5}, "probe": probe}},
        examples={str(path): load_examples(load_card(path)) for path in (card, shown)},
        text_format=text_format,
        accelerator=accelerator,
        stop=StopRequest(),
    )


def metrics(job: Job) -> list[dict]:
    """Return the lines of metrics.jsonl without what a clock or the operating system measured."""
    lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    measured = ("time/", "throughput/", "memory/")
    return [{name: value for name, value in line.items() if not name.startswith(measured)} for line in lines]


@pytest.mark.parametrize("value", ["adapter", "trunk"])
def test_microbatches_do_not_change_the_update(tmp_path, value):
    """1x8, 2x4 and 8x1 microbatches take the same optimizer steps up to the order of float summation."""
    results = []
    for microbatch in (8, 4, 1):
        trainer = ppo.PPO(make_job(tmp_path, microbatch=microbatch, value=value, minibatches=1, updates=1))
        rollout, _ = trainer.roll_out(0)
        trainer.learn(0, rollout, trainer.targets(rollout))
        results.append({name: parameter.detach().clone() for name, parameter in trainer.parameters.items()})
    start = ppo.PPO(make_job(tmp_path, value=value)).parameters
    for name, reference in results[0].items():
        moved = (reference - start[name]).abs().max()
        assert moved > 0, name
        for other in results[1:]:
            # Adam turns a gradient g into a step of about g / |g|: an error of 1e-6 in g weighs most where g is small.
            assert (other[name] - reference).abs().max() < 0.02 * moved, name


@pytest.mark.parametrize(
    ("settings", "rows_begun"),
    [
        ({"minibatches": 1, "microbatch": 8}, 8),
        ({"minibatches": 2, "microbatch": 8}, 4),
        ({"minibatches": 1, "microbatch": 4, "value": "trunk"}, 4),
        ({"minibatches": 2, "microbatch": 1}, 1),
        ({"minibatches": 1, "microbatch": 8, "quantization": "8bit"}, 8),
        ({"minibatches": 1, "microbatch": 8, "quantization": "4bit"}, 8),
    ],
)
def test_learning_begins_with_the_passes_of_scoring(tmp_path, settings, rows_begun):
    """They are of rows that are learnt from first, no more than a microbatch, serve once, and change nothing."""
    results = []
    for begun in (True, False):
        trainer = ppo.PPO(make_job(tmp_path, epochs=2, missing_eos_penalty=None, **settings))
        rollout, _ = trainer.roll_out(0)
        rows = [row for piece in trainer.begun for row in piece]
        assert sum(made.logprobs.numel() for made in trainer.begun.values()) <= (
            2 * trainer.settings.microbatch * rollout.completion_ids.shape[1]  # results are laid out in rows
        )
        taken = [trainer.shared.room(rollout.ids[[*piece]], rollout.mask[[*piece]]) for piece in trainer.begun]
        assert sum(taken) <= trainer.settings.microbatch * rollout.ids.shape[1]
        assert len(rows) >= rows_begun and set(rows) <= set(trainer._minibatches(0, 0)[0])
        if not begun:
            trainer.begun = {}
        trainer.learn(0, rollout, trainer.targets(rollout))
        assert trainer.begun == {}
        results.append({name: parameter.detach().clone() for name, parameter in trainer.parameters.items()})
    with_passes, without = results
    start = ppo.PPO(make_job(tmp_path, **settings)).parameters
    for name, parameter in with_passes.items():
        moved = (parameter - start[name]).abs().max()
        assert moved > 0 and (parameter - without[name]).abs().max() < 0.02 * moved, name


@pytest.mark.parametrize(("minibatches", "microbatch"), [(2, 8), (1, 3)])
def test_a_pass_is_begun_by_the_policy_that_wrote(tmp_path, monkeypatch, minibatches, microbatch):
    """Only the first optimizer step may use what scoring made, for the policy has moved since in all others; and before
    passes of its own, beside which there would be no room for it.
    """
    trainer = ppo.PPO(make_job(tmp_path, epochs=2, minibatches=minibatches, microbatch=microbatch))
    used, learn_from = [], trainer._learn_from
    monkeypatch.setattr(trainer, "_learn_from", lambda *a: used.append(a[5] is not None) or learn_from(*a))
    rollout, _ = trainer.roll_out(0)
    trainer.learn(0, rollout, trainer.targets(rollout))
    assert used[0] and not any(used[used.index(False) :])


def test_passes_that_no_longer_fit_are_let_go_in_the_first_step(tmp_path, monkeypatch):
    """Where memory ran out in between, pieces are other ones; a later step must not find what an older policy made."""
    trainer = ppo.PPO(make_job(tmp_path, epochs=2, minibatches=1, microbatch=8))
    rollout, _ = trainer.roll_out(0)
    held, step = [len(trainer.begun)], trainer._step
    monkeypatch.setattr(trainer, "_step", lambda *a: held.append(len(trainer.begun)) or step(*a))
    trainer.pieces.size = 1
    trainer.learn(0, rollout, trainer.targets(rollout))
    assert held[0] > 0 and held[1:] == [0, 0]


@pytest.mark.parametrize(("value", "times"), [("adapter", 3), ("trunk", 4)])
def test_the_value_function_has_a_rate_of_its_own(tmp_path, value, times):
    """An adapter's makes up for the epochs in which it does not learn; a head on the trunk takes larger steps."""
    trainer = ppo.PPO(make_job(tmp_path, epochs=3, value=value, learning_rate=0.004))
    rates = {id(p): group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.parameters.items():
        assert rates[id(parameter)] == pytest.approx(0.004 * (times if name.startswith("value/") else 1)), name


@pytest.mark.parametrize(
    ("settings", "learns"),
    [
        ({"value": "adapter"}, [True, True, False, False, False, False]),
        ({"value": "adapter", "value_epochs": 2}, [True, True, True, True, False, False]),
        ({"value": "trunk"}, [True] * 6),
    ],
)
def test_the_value_function_learns_in_its_epochs(tmp_path, monkeypatch, settings, learns):
    """In later epochs nothing of it moves, not by momentum either; the policy moves in every step."""
    trainer = ppo.PPO(make_job(tmp_path, epochs=3, minibatches=2, **settings))
    moved = []
    step = trainer._step

    def watched(*arguments):
        before = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
        norm = step(*arguments)
        changed = {name.split("/")[0] for name, p in trainer.parameters.items() if not torch.equal(p, before[name])}
        moved.append(changed)
        return norm

    monkeypatch.setattr(trainer, "_step", watched)
    rollout, _ = trainer.roll_out(0)
    trainer.learn(1, rollout, trainer.targets(rollout))
    assert moved == [{"policy", "value"} if value else {"policy"} for value in learns]


def test_scores_stay_with_their_rows(tmp_path, monkeypatch):
    """Rows are scored among others of like length, and each gets its own score."""
    trainer = ppo.PPO(make_job(tmp_path, microbatch=2))
    rollout, written = trainer.roll_out(0)
    monkeypatch.setattr(trainer, "scorer", lambda part: torch.tensor([float(len(text)) for text in part.texts]))
    assert trainer._scored(rollout, written).scores.tolist() == [len(text) for text in written.texts]


def test_the_trunks_head_reads_the_reward_models_states(tmp_path):
    """They are those of a pass of the reward model's own, row by row, and the values start as the normalised score
    would be if the completion ended there.
    """
    trainer = ppo.PPO(make_job(tmp_path, microbatch=2, value="trunk"))
    rollout, _ = trainer.roll_out(0)
    mask = rollout.completion_mask
    assert len(set(mask.sum(1).tolist())) > 1
    with torch.no_grad():
        states = completion_states(trainer.shared, ppo.REWARD, rollout)
        scores = (trainer.shared.heads[ppo.REWARD](states).squeeze(-1) - trainer.mean) / trainer.std
    torch.testing.assert_close(rollout.reward_states[mask], states[mask], rtol=0, atol=1e-5)
    torch.testing.assert_close(rollout.values, scores * mask, rtol=0, atol=1e-5)


def test_the_trunks_head_teaches_the_policys_trunk(tmp_path):
    """Once it has begun to read it: at first it is the reward model's head."""
    trainer = ppo.PPO(make_job(tmp_path, value="trunk"))
    rollout, _ = trainer.roll_out(0)
    trainer.learn(1, rollout, trainer.targets(rollout))
    made = policy_pass(trainer.shared, ppo.POLICY, rollout, 1.0)
    trainer.value(rollout, made.states).sum().backward()
    slopes = [parameter.grad for parameter in trainer.shared.parameters_of(ppo.POLICY).values()]
    assert all(slope.any() for slope in slopes)


def test_a_head_starts_in_the_unit_that_is_measured(tmp_path):
    """Where the reward adapter brings none."""
    trainer = ppo.PPO(make_job(tmp_path, value="trunk"))
    trainer.has_unit = False
    trainer.resume()
    start = trainer.shared.heads[ppo.VALUE].linear.weight[:, trainer.shared.width :]
    assert trainer.std != 0.5
    torch.testing.assert_close(start, trainer.shared.heads[ppo.REWARD].weight / trainer.std)


def test_without_a_reward_adapter_the_trunks_head_reads_the_policy_alone(tmp_path):
    """It starts at zero, and learns."""
    job = make_job(tmp_path, value="trunk", reward="tests.invariants.test_ppo:count_of_a")
    trainer = ppo.PPO(job)
    trainer.resume()
    rollout, _ = trainer.roll_out(0)
    assert rollout.reward_states.shape == (*rollout.values.shape, 0)
    assert not rollout.values.any()
    trainer.learn(1, rollout, trainer.targets(rollout))
    assert trainer.roll_out(1)[0].values.any()


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_the_step_0_invariants_hold(tmp_path, quantization):
    """A run starts with KL exactly 0 and a first ratio of exactly 1, whatever the base is stored in."""
    found = ppo.PPO(make_job(tmp_path, quantization=quantization)).check_invariants()
    assert found["kl"] == 0
    assert found["first_ratio_error"] == 0


@pytest.mark.parametrize(
    ("dtype", "ratio", "sound"), [("float32", 1.1, False), ("bfloat16", 1.2, True), ("bfloat16", 1.4, False)]
)
def test_the_first_ratio_may_be_off_by_rounding_alone(tmp_path, monkeypatch, dtype, ratio, sound):
    """Which in bfloat16 is an eighth of a nat where a logit is above 16."""
    job = make_job(tmp_path)
    base = job.recipe.base.model_copy(update={"dtype": dtype})
    trainer = ppo.PPO(replace(job, recipe=job.recipe.model_copy(update={"base": base})))
    whole = trainer._logprobs_with_gradients
    monkeypatch.setattr(trainer, "_logprobs_with_gradients", lambda *args: whole(*args) + math.log(ratio))
    with nullcontext() if sound else pytest.raises(RuntimeError, match="first_ratio_error"):
        trainer.check_invariants()


def test_a_reward_model_that_changed_is_noticed(tmp_path):
    """If the stored probe no longer gets the score that was stored, the run stops before it samples anything."""
    job = make_job(tmp_path)
    job.inputs["reward"]["probe"][1]["score"] += 0.01
    with pytest.raises(RuntimeError, match="probe_score_error"):
        ppo.PPO(job).check_invariants()


@pytest.mark.parametrize("value", ["adapter", "trunk"])
@pytest.mark.parametrize("looks", [2, 3])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, value, looks):
    """Stopped while it learns, or while it samples, a run ends with the same adapters, metrics and samples."""
    whole = make_job(tmp_path, value=value, samples_every=1, kl_target=2.0)
    ppo.run(whole)

    # An update looks twice whether it is to stop: before it learns, and at its end. The third look is at the rollout of
    # the second update, which is given up.
    halves = make_job(tmp_path, out="halves", value=value, samples_every=1, kl_target=2.0)
    with pytest.raises(Interrupted, match="after update 1 of 3"):
        ppo.run(replace(halves, stop=StopAfter(looks)))
    ppo.run(halves)

    folders = ("adapter", "value") if value == "adapter" else ("adapter",)
    for name in folders:
        ours, theirs = (models.read_adapter(job.folder / name) for job in (whole, halves))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert metrics(whole) == metrics(halves)
    assert (whole.folder / "samples.jsonl").read_text() == (halves.folder / "samples.jsonl").read_text()


def test_every_metric_of_the_contract_is_logged(tmp_path):
    """Each update writes one line with every name that the contract lists for PPO."""
    job = make_job(tmp_path)
    ppo.run(job)
    lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    contract = """objective/score objective/kl objective/kl_k2 objective/kl_k3 objective/kl_coef
    rollout/logprob_gap ppo/policy_loss ppo/value_loss
    ppo/clip_fraction ppo/approx_kl ppo/first_ratio_error value/explained_variance rollout/ended_fraction
    rollout/length time/rollout_s time/update_s throughput/completions_per_s memory/peak_bytes""".split()
    for line in lines:
        assert set(contract) <= line.keys()
        assert all(math.isfinite(line[name]) for name in contract)
        assert line["ppo/first_ratio_error"] < 1e-4
    assert lines[0]["objective/kl"] == 0


def test_a_score_that_is_not_a_number_stops_the_run(tmp_path, monkeypatch):
    """The message names the tensor and the update, and nothing has been learned from it."""
    trainer = ppo.PPO(make_job(tmp_path))
    monkeypatch.setattr(trainer, "scorer", lambda written: torch.full((len(written.texts),), torch.nan))
    with pytest.raises(Diverged, match=r"update 1: scores is NaN or infinite"):
        trainer.roll_out(0)


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    """The message names the parameter, and no parameter has been changed."""
    trainer = ppo.PPO(make_job(tmp_path))
    before = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    for parameter in trainer.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    broken = list(trainer.parameters)[2]
    trainer.parameters[broken].grad[0, 0] = torch.inf
    with pytest.raises(Diverged, match=rf"update 3: the gradient of {re.escape(broken)} is NaN or infinite"):
        trainer._step(2, with_value=True)
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.parameters.items())


@pytest.mark.parametrize("quantization", ["none", "8bit"])
def test_ppo_learns_what_is_rewarded(tmp_path, quantization):
    """With a function as the reward, the policy writes more of what it counts."""
    job = make_job(
        tmp_path,
        quantization=quantization,
        reward="tests.invariants.test_ppo:count_of_a",
        updates=12,
        batch_size=32,
        microbatch=32,
        learning_rate=0.01,
        kl_coef=0.01,
        missing_eos_penalty=None,
    )
    ppo.run(job)
    scores = [line["objective/score"] for line in metrics(job)]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 1.0, scores  # in standard deviations of the reference


def test_score_settings_do_what_they_say(tmp_path):
    """Scores are held within the clip; the penalty is then taken from completions without an end token."""
    trainer = ppo.PPO(make_job(tmp_path, score_clip=0.1, missing_eos_penalty=3.0, kl_coef=0.0, gamma=1.0, lam=1.0))
    rollout, _ = trainer.roll_out(0)
    assert rollout.scores.abs().max() <= 0.1
    returns = trainer.targets(rollout).returns
    expected = rollout.scores - 3.0 * (~rollout.ended)
    torch.testing.assert_close(returns[:, 0], expected, rtol=0, atol=1e-5)  # lambda 1: the return is the reward to come


def test_prompts_come_in_shuffled_passes(tmp_path):
    """Every pass over the prompts uses each prompt once, in another order."""
    trainer = ppo.PPO(make_job(tmp_path))
    count = len(trainer.prompts)
    seen = [row for update in range(2 * count) for row in trainer._prompt_rows(update)][: 2 * count]
    assert sorted(seen[:count]) == sorted(seen[count:]) == list(range(count))
    assert seen[:count] != seen[count:]


def test_a_checkpoint_without_all_that_learns_is_refused(tmp_path):
    """It is another version's, and what it lacks would begin anew unnoticed."""
    trainer = ppo.PPO(make_job(tmp_path, value="trunk"))
    tensors = checkpoints.tensors_of(trainer.parameters, trainer.optimizer)
    del tensors["parameter/value/head.outer.weight"]
    with pytest.raises(InputError, match=r"step 2: has no value/head.outer.weight .*--fresh"):
        checkpoints.put_back(checkpoints.Checkpoint(2, tensors, {}), trainer.parameters, trainer.optimizer)
