"""Watching held-out prompts, the guard that judges them, PPO-ptx and the KL doctor, on the tiny model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from rlhf_kit import models, rollout
from rlhf_kit.batches import Completions
from rlhf_kit.errors import InputError, Interrupted
from rlhf_kit.maths import masking
from rlhf_kit.stages import ppo
from tests.invariants.stage_jobs import StopAfter
from tests.invariants.test_ppo import make_job, metrics

HERE = "tests.invariants.test_watch"
SEEN = "score gold kl length ended_fraction repetition distinct_1 distinct_2 reference_perplexity".split()
HACKED = {
    "reward": f"{HERE}:letters",
    "normalize_score": False,
    "updates": 4,
    "batch_size": 16,
    "microbatch": 16,
    "learning_rate": 0.01,
    "kl_coef": 0.0,
    "missing_eos_penalty": None,
    "warmup_updates": 0,
    "schedule": "constant",
    "heldout": 0.5,
    "watch": {"every": 1, "count": 16, "gold": f"{HERE}:no_letters"},
}
"""A reward that the tiny policy soon pleases, and a gold score that says the contrary."""


def letters(prompts, completions):
    """Score completions by the letters in them."""
    return [sum(letter.isalpha() for letter in completion) for completion in completions]


def no_letters(prompts, completions):
    """Score completions against the reward."""
    return [-count for count in letters(prompts, completions)]


def lengths(prompts, completions):
    """Score completions by their letters."""
    return [len(completion) for completion in completions]


def broken(prompts, completions):
    """Score completions by something that is no number."""
    return [float("nan") for _ in completions]


def weights(job):
    """Return the policy that a job left."""
    return models.read_adapter(job.folder / "adapter")


def same(one, other):
    """Whether two adapters are bit for bit the same."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def without_watch(lines):
    """Return the lines of updates, without what was watched."""
    return [{k: v for k, v in line.items() if not k.startswith(("heldout/", "guard/"))} for line in lines[-3:]]


WATCHED = {"heldout": 0.5, "watch": {"every": 2, "count": 12, "gold": f"{HERE}:lengths"}}


def test_watching_changes_nothing_and_tells_everything(tmp_path):
    """Before the first update, every second and after the last, every figure is there; the policy that comes out, its
    other metrics and its samples are those of a run that nobody watched."""
    plain, watched = make_job(tmp_path, heldout=0.5), make_job(tmp_path, out="watched", **WATCHED)
    ppo.run(plain)
    outcome = ppo.run(watched)
    lines = metrics(watched)
    assert [line["step"] for line in lines if "heldout/score" in line] == [0, 2, 3]
    for line in (lines[0], lines[2], lines[3]):
        assert {f"heldout/{name}" for name in SEEN} <= line.keys()
    assert lines[0]["heldout/kl"] == 0
    assert 0 < lines[0]["heldout/distinct_1"] <= lines[0]["heldout/distinct_2"] <= 1
    assert lines[0]["heldout/reference_perplexity"] > 1
    assert same(weights(plain), weights(watched))
    assert metrics(plain) == without_watch(lines)
    assert (plain.folder / "samples.jsonl").read_text() == (watched.folder / "samples.jsonl").read_text()
    assert outcome.extra["watch"]["kept_update"] == 3
    assert [look["update"] for look in outcome.extra["watch"]["looks"]] == [0, 2, 3]


def test_a_look_is_the_same_again(tmp_path):
    """The same policy shows the same figures, whatever its update: the random numbers are fixed."""
    trainer = ppo.PPO(make_job(tmp_path, **WATCHED))
    trainer.resume()
    first, again = (trainer.watch.look("policy", "reference", done) for done in (0, 2))
    assert first == again


def test_the_figures_are_those_of_the_completions(tmp_path):
    """Gold is the mean over the completions, and perplexity that of the reference by whole forward passes of
    transformers."""
    trainer = ppo.PPO(make_job(tmp_path, **WATCHED))
    trainer.resume()
    watch = trainer.watch
    seen = watch.look("policy", "reference", 0)
    assert len(watch.prompts) == 12
    with torch.no_grad():
        rows = watch._answers("policy", "reference")
        total = tokens = 0.0
        for row, prompt in zip(rows, watch.prompt_ids, strict=True):
            ids = torch.tensor([[*prompt, *row["ids"]]])
            with trainer.shared.using("reference"):
                logprobs = trainer.shared.causal(input_ids=ids).logits.double().log_softmax(-1)
            total += float(logprobs[0, len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None]).sum())
            tokens += len(row["ids"])
    assert seen["heldout/reference_perplexity"] == pytest.approx(float(torch.tensor(-total / tokens).exp()), rel=1e-4)
    assert seen["heldout/length"] == tokens / 12
    texts = [trainer.format.tokenizer.decode(row["ids"], skip_special_tokens=True) for row in rows]
    assert seen["heldout/gold"] == pytest.approx(sum(map(len, texts)) / 12)


@pytest.mark.parametrize("action", ["stop", "rollback", "warn"])
def test_each_action(tmp_path, action, capsys):
    """The guard acts on the gold score that falls: `stop` keeps the policy of that update, `rollback` the bytes of the
    best one, which an undisturbed run had after that update, and `warn` goes on to the end."""
    guard = {"action": action, "patience": 1, "sigmas": 0.1, "tolerance": 0, "length_factor": None}
    job = make_job(tmp_path, **HACKED, guard=guard)
    outcome = ppo.run(job)
    told = outcome.extra["watch"]
    assert told["acted"]["alarm"] == "gold" and "from its best" in told["why"]
    assert "guard: update" in capsys.readouterr().err
    at = told["acted"]["update"]
    assert at < 4
    last = metrics(job)[-1]["step"]
    assert last == (4 if action == "warn" else at)
    best = max(told["looks"], key=lambda look: look["gold"])["update"]
    assert told["kept_update"] == {"stop": at, "rollback": best, "warn": 4}[action]

    plain = make_job(tmp_path, out="plain", **HACKED, keep_checkpoints=True, checkpoint_every={"updates": 1})
    ppo.run(plain)
    if told["kept_update"] == 0:
        expected = models.read_adapter(plain.folder.parent / "sft" / "adapter")
    elif told["kept_update"] == 4:
        expected = weights(plain)
    else:
        trainer = ppo.PPO(plain)
        folder = plain.folder / "checkpoints"
        for later in folder.iterdir():
            if int(later.name.removeprefix("step-")) > told["kept_update"]:
                later.rename(tmp_path / later.name)
        assert trainer.resume() == told["kept_update"]
        trainer.save()
        expected = weights(plain)
    assert same(expected, weights(job))
    assert (job.folder / "value").is_dir()


def test_the_value_function_goes_back_with_the_policy(tmp_path):
    """Over its KL budget after update 3, a run ends with both as an undisturbed one had them after update 2."""
    guard = {"action": "rollback", "kl_budget": 2.5, "sigmas": 0.1, "length_factor": None}
    job = make_job(tmp_path, **{**HACKED, "watch": {"every": 1, "count": 16}}, guard=guard)
    told = ppo.run(job).extra["watch"]
    assert (told["acted"]["update"], told["kept_update"]) == (3, 2)
    plain = make_job(tmp_path, out="plain", **{**HACKED, "watch": None, "updates": 2})
    ppo.run(plain)
    for folder in ("adapter", "value"):
        files = [{path.name: path.read_bytes() for path in (one.folder / folder).iterdir()} for one in (plain, job)]
        assert files[0] == files[1] and len(files[0]) == (3 if folder == "value" else 2)


@pytest.mark.parametrize("looks", [2, 3])
def test_a_watched_run_goes_on_bit_for_bit(tmp_path, looks):
    """Stopped before the guard acts, a run that is to roll back keeps the same policy and says the same of it; the best
    adapter is in the checkpoint."""
    guard = {"action": "rollback", "patience": 2, "sigmas": 0.01, "tolerance": 0, "length_factor": None}
    settings = {**HACKED, "guard": guard, "samples_every": 1}
    whole = make_job(tmp_path, **settings)
    told = ppo.run(whole).extra["watch"]
    assert told["acted"] is not None
    halves = make_job(tmp_path, out="halves", **settings)
    with pytest.raises(Interrupted):
        ppo.run(replace(halves, stop=StopAfter(looks)))
    assert ppo.run(halves).extra["watch"] == told
    assert same(weights(whole), weights(halves))
    assert metrics(whole) == metrics(halves)
    assert (whole.folder / "samples.jsonl").read_text() == (halves.folder / "samples.jsonl").read_text()


def test_a_run_that_was_stopped_when_the_guard_had_ended_it_makes_no_more_updates(tmp_path):
    """The checkpoint after the guard's last word ends the stage at once when it is gone on from."""
    guard = {"action": "stop", "patience": 1, "sigmas": 0.5, "tolerance": 0, "length_factor": None}
    job = make_job(tmp_path, **HACKED, guard=guard)
    trainer = ppo.PPO(job)
    trainer.resume()
    trainer.look(0)
    trainer.watch.guard.acted = {"update": 0, "alarm": "gold", "why": "for a test"}
    trainer.checkpoint(1)
    ppo.run(job)
    assert not (job.folder / "metrics.jsonl").exists()
    assert (job.folder / "adapter").is_dir()


def test_gold_scores_that_are_no_numbers_are_wrong_input(tmp_path):
    """The message names the setting."""
    job = make_job(tmp_path, heldout=0.5, watch={"count": 12, "gold": f"{HERE}:broken"})
    with pytest.raises(InputError, match=r"stages\.ppo\.watch\.gold"):
        ppo.run(job)


# ---------------------------------------------------------------- ptx


def test_ptx_adds_the_gradient_of_the_language_modelling_loss(tmp_path):
    """The gradient with ptx, less that without, is coef times the gradient of the mean loss per completion token that
    transformers gives for the step's texts; the texts are the same in pieces of any size."""
    with_ptx = ppo.PPO(make_job(tmp_path, ptx={"coef": 0.7, "batch_size": 5}))
    without = ppo.PPO(make_job(tmp_path))
    gradients = []
    for trainer, microbatch in ((with_ptx, 4), (without, 4), (with_ptx, 2)):
        trainer.pieces.size = microbatch
        rollout, _ = trainer.roll_out(0)
        targets = trainer.targets(rollout)
        tokens = int(rollout.completion_mask.sum())
        *_, loss = trainer._gradients(rollout, list(range(8)), targets, tokens, False, 3)
        gradients.append({name: p.grad.clone() for name, p in trainer.shared.parameters_of("policy").items()})
        trainer.optimizer.zero_grad()
    for name, ours in gradients[0].items():
        torch.testing.assert_close(gradients[2][name], ours, rtol=1e-4, atol=1e-7)

    trainer = with_ptx
    trainer.pieces.size = 4
    rows = [trainer.ptx.rows[row] for row in trainer.ptx.batch(3)]
    losses = []
    count = sum(label != -100 for row in rows for label in row["labels"])
    with trainer.shared.using("policy"):
        for row in rows:
            output = trainer.shared.causal(
                input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])
            )
            losses.append(output.loss * sum(label != -100 for label in row["labels"]) / count)
        sum(losses).backward()
    assert float(loss) == pytest.approx(float(sum(losses)), rel=1e-4)
    for name, parameter in trainer.shared.parameters_of("policy").items():
        added = gradients[0][name] - gradients[1][name]
        torch.testing.assert_close(added, 0.7 * parameter.grad, rtol=1e-3, atol=1e-6)


def test_ptx_goes_on_bit_for_bit_and_says_its_loss(tmp_path):
    """Which texts a step has depends on its number alone."""
    settings = {"ptx": {"coef": 0.5, "batch_size": 3}}
    whole, halves = make_job(tmp_path, **settings), make_job(tmp_path, out="halves", **settings)
    ppo.run(whole)
    with pytest.raises(Interrupted):
        ppo.run(replace(halves, stop=StopAfter(3)))
    ppo.run(halves)
    assert same(weights(whole), weights(halves))
    assert metrics(whole) == metrics(halves)
    assert all(line["ppo/ptx_loss"] > 0 for line in metrics(whole))


def test_texts_come_in_shuffled_passes(tmp_path):
    """Each pass has each text once."""
    trainer = ppo.PPO(make_job(tmp_path, ptx={"batch_size": 3}))
    count = len(trainer.ptx.rows)
    seen = [row for step in range(count) for row in trainer.ptx.batch(step)]
    assert all(sorted(seen[lap * count : (lap + 1) * count]) == list(range(count)) for lap in range(3))


# ---------------------------------------------------------------- what the sampler knows


def test_the_sampler_keeps_the_log_probabilities_of_its_tokens(tmp_path):
    """They are those of a whole forward pass, up to rounding, and 0 on padding."""
    trainer = ppo.PPO(make_job(tmp_path, temperature=0.7))
    rollout, _ = trainer._sample("policy", list(range(8)), "test")
    scored, _ = trainer._scored_by_models(rollout)
    torch.testing.assert_close(rollout.policy_logprobs, scored["policy_logprobs"], rtol=0, atol=1e-4)
    assert float(masking.masked_sum(rollout.policy_logprobs, ~rollout.completion_mask)) == 0


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_sampler_with_another_temperature_is_found_out(tmp_path, monkeypatch, temperature, capsys):
    """Completions drawn at another temperature than is scored: the gap says so, and where the KL is negative the
    doctor names the sampling settings, once."""
    trainer = ppo.PPO(make_job(tmp_path, batch_size=32, microbatch=32, updates=2))
    with torch.no_grad():  # a policy that has moved: at 0 KL nothing could be below it
        for name, parameter in trainer.shared.parameters_of("policy").items():
            if "lora_B" in name:
                parameter.mul_(1.5)

    def other(*arguments, **settings) -> Completions:
        return generated(*arguments, **{**settings, "temperature": temperature})

    generated = rollout.generate
    monkeypatch.setattr(rollout, "generate", other)
    for update in range(2):
        made, _ = trainer.roll_out(update)
        targets = trainer.targets(made)
        seen = trainer.summarise(made, targets, trainer.learn(update, made, targets))
        assert seen["rollout/logprob_gap"] > 0.01
    said = capsys.readouterr().err
    if seen["objective/kl"] < -1:
        assert said.count("Likely the sampling settings") == 1


def test_the_doctor_speaks_once(tmp_path, capsys):
    """A KL of -5 nats at a small error, in two updates."""
    trainer = ppo.PPO(make_job(tmp_path))
    for _ in range(2):
        trainer._explain_kl(-5.0, 25.01, 0.0, 0.0, 1.0)
    assert capsys.readouterr().err.count("Likely the template") == 1
    trainer = ppo.PPO(make_job(tmp_path))
    trainer.shared.causal.train()
    trainer._explain_kl(-5.0, 25.01, 0.1, 0.0, 1.0)
    assert "Likely the mode" in capsys.readouterr().err


def test_the_state_of_the_guard_is_plain_json(tmp_path):
    """What a checkpoint holds of it can be written."""
    guard = {"action": "rollback"}
    trainer = ppo.PPO(make_job(tmp_path, **WATCHED, guard=guard))
    trainer.resume()
    trainer.look(0)
    assert json.loads(json.dumps(trainer.watch.state())) == trainer.watch.state()
    assert {name.partition("/")[0] for name in trainer.watch.tensors()} == {"best"}
