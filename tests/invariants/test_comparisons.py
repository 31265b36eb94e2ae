"""Reward training on comparisons: what the loss of a step is, that batching is not part of it, and ensembles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from torch import Tensor

from rlhf_kit.batches import Comparisons
from rlhf_kit.collate import compare, right_pad, tokenise_comparisons
from rlhf_kit.errors import InputError, Interrupted
from rlhf_kit.examples.rows import Preference, Ranking
from rlhf_kit.models import load_base, sequence_scores
from rlhf_kit.pieces import Pieces
from rlhf_kit.recipe import RewardStage
from rlhf_kit.stages import reward
from rlhf_kit.training import Training, evaluating, row_order
from tests.invariants.roles import disturb
from tests.invariants.stage_jobs import StopAfter, adapter_weights, make_job, make_recipe, metrics

RANKED = Ranking("Where?", ["Yes.", "No, go away now.", "Perhaps here or over there, who knows."], [2.0, 3.0, 1.0], "1")


def make_trainer(folder: Path, batch_size: int = 1, **settings: Any) -> tuple[reward.Trainer, reward.Job]:
    """Return a trainer that has its model, with an adapter that says something, and its settings, but no data."""
    job = make_job(make_recipe(folder, reward={"init": None, **settings}), "reward", folder)
    trainer = reward.Trainer.__new__(reward.Trainer)
    trainer.model, trainer.head = reward.new_reward_model(job, "reward")
    trainer.settings = job.settings.model_copy(update={"batch_size": batch_size})
    trainer.seen = []
    disturb(trainer.model, 5)
    return trainer, job


def microbatch(job: reward.Job, *rows: Preference | Ranking, ties: str = "drop") -> Comparisons:
    return compare(tokenise_comparisons(rows, job.text_format, None, "error", ties).rows, job.text_format.pad_id)


def scores_of(trainer: reward.Trainer, job: reward.Job, prompt: str, *completions: str) -> list[Tensor]:
    """Return the scores of completions, each read alone."""
    rows = [job.text_format.prompt_ids(prompt) + job.text_format.completion_ids(prompt, text) for text in completions]
    return [sequence_scores(trainer.model, torch.tensor([ids]), torch.ones(1, len(ids)))[0] for ids in rows]


def gradients(trainer: reward.Trainer, *parts: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the sum of the parts of a loss."""
    trainer.model.zero_grad(set_to_none=True)
    sum(parts).backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------- the loss of a step


def test_the_loss_is_what_the_formulas_say(tmp_path):
    """Every term, on a pair with margin and soft label and a ranking with a tie, worked out from scores read alone."""
    trainer, job = make_trainer(tmp_path, 2, label_smoothing=0.1, center_coef=0.02, ties="soft")
    rows = [
        Preference("Who?", "Me.", "Not me.", "1", margin=0.3, probability=0.8),
        Ranking("Where?", ["Yes.", "No.", "Up."], [1.0, 1.0, 3.0], "2", [4.0, 4.0, 2.0], None, 0.25),
    ]
    found = trainer.part(microbatch(job, *rows, ties="soft"), torch.tensor(0))
    a, b = scores_of(trainer, job, "Who?", "Me.", "Not me.")
    yes, no, up = scores_of(trainer, job, "Where?", "Yes.", "No.", "Up.")

    def loss(one: Tensor, other: Tensor, p: float, margin: float) -> Tensor:
        p = 0.9 * p + 0.1 * (1 - p)
        right, wrong = torch.sigmoid(one - other - margin), torch.sigmoid(other - one - margin)
        return -p * right.log() - (1 - p) * wrong.log() + 0.02 * (one + other) ** 2

    ranking = (loss(yes, no, 0.5, 0.0) + loss(yes, up, 1.0, 0.5) + loss(no, up, 1.0, 0.5)) / 3
    expected = (loss(a, b, 0.8, 0.3) + ranking) / 2
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    right, margin, pairs, modelling = trainer.seen[0].tolist()
    difference = [(a - b).item(), (yes - up).item(), (no - up).item()]
    assert (right, pairs, modelling) == (sum(d > 0 for d in difference), 3, 0)
    assert margin == pytest.approx(sum(difference), rel=1e-4)


def test_a_ranking_learns_what_its_pairs_would(tmp_path):
    """The gradient from one pass over three completions is the mean of those of the three pairs, six passes."""
    trainer, job = make_trainer(tmp_path)
    whole = gradients(trainer, trainer.part(microbatch(job, RANKED), torch.tensor(0)))
    yes, no, perhaps = RANKED.completions
    pairs = [Preference("Where?", *pair, "1") for pair in ((perhaps, yes), (yes, no), (perhaps, no))]
    parts = [trainer.part(microbatch(job, pair), torch.tensor(0)) / 3 for pair in pairs]
    apart = gradients(trainer, *parts)
    assert whole.keys() == apart.keys() and any("lora_A" in name for name in whole)
    for name in whole:
        torch.testing.assert_close(whole[name], apart[name], rtol=1e-4, atol=1e-6)


def test_each_completion_is_encoded_once(tmp_path):
    """A ranking of three sends three rows through the model, not six."""
    trainer, job = make_trainer(tmp_path)
    rows = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    trainer.part(microbatch(job, RANKED), torch.tensor(0))
    assert sum(rows) == 3


def test_language_modelling_is_of_the_best_completions(tmp_path):
    """The first step's loss has lm_coef times plain cross-entropy over the best completions' tokens on top, which the
    base, as the adapter starts at zero, computes the same.
    """
    logged = {}
    for coef in (0.0, 0.5):
        run = tmp_path / f"run{coef}"
        recipe = make_recipe(tmp_path, ranked=True, max_steps=1, reward={"init": None, "lm_coef": coef})
        job = make_job(recipe, "reward", run)
        reward.run(job)
        logged[coef] = metrics(run / "reward")[0]
    base = load_base(recipe.base, job.text_format, job.accelerator)
    groups = tokenise_comparisons(job.examples[job.settings.data].train, job.text_format, None, "error").rows
    total, tokens = 0.0, 0
    for group in (groups[index] for index in row_order(len(groups), 0, 8, recipe.seed, "reward")):
        ids = torch.tensor(group["completions"][group["best"]])
        with torch.no_grad():
            logits = base(input_ids=ids[None]).logits[0]
        start = group["prompt_tokens"]
        assert job.text_format.tokenizer.decode(ids[start:]) == " Yes, here.</s>"
        losses = torch.nn.functional.cross_entropy(logits[start - 1 : -1], ids[start:], reduction="sum")
        total, tokens = total + float(losses), tokens + len(ids) - start
    assert "reward/lm_loss" not in logged[0.0]
    assert logged[0.5]["reward/lm_loss"] == pytest.approx(total / tokens, rel=1e-5)
    extra = logged[0.5]["reward/loss"] - logged[0.0]["reward/loss"]
    assert extra == pytest.approx(0.5 * total / tokens, rel=1e-4)


# ---------------------------------------------------------------- batching is not part of it


def test_padding_changes_no_score(tmp_path):
    """A row padded on the right scores what it scores alone, to 1e-5 of scores of about 1 (measured: 5e-7); rows alone
    in a pass of their own are the same to the last bit.
    """
    trainer, job = make_trainer(tmp_path)
    made = microbatch(job, RANKED)
    rows = [ids[mask].tolist() for passed, masks in zip(made.ids, made.mask, strict=True)
            for ids, mask in zip(passed, masks, strict=True)]  # fmt: skip
    ids, mask = right_pad([*rows, [7] * 120], job.text_format.pad_id)
    with evaluating(trainer.model):
        alone = [reward.score_alone(trainer.model, row) for row in rows]
        padded = sequence_scores(trainer.model, ids, mask.long())[:-1].tolist()
        passes = [
            float(score)
            for row in rows
            for score in sequence_scores(trainer.model, *right_pad([row], job.text_format.pad_id))
        ]
    assert padded == pytest.approx(alone, abs=1e-5)
    assert passes == alone


@pytest.mark.parametrize("quantization", ["none", "8bit"])
def test_budgets_give_the_same_training(tmp_path, quantization):
    """Whatever the token budget, the steps, losses and the adapter are the same, up to the order of summation."""
    results = {}
    for budget in (None, 700, 200):
        run = tmp_path / f"run{budget}"
        settings = {"init": None, "microbatch_tokens": budget, "lm_coef": 0.1, "ties": "soft"}
        recipe = make_recipe(tmp_path, base={"quantization": quantization}, ranked=True, epochs=1, reward=settings)
        reward.run(make_job(recipe, "reward", run))
        results[budget] = metrics(run / "reward"), adapter_weights(run / "reward")
    for budget in (700, 200):
        (lines, weights), (expected_lines, expected_weights) = results[budget], results[None]
        assert len(lines) == len(expected_lines) == 3
        tolerance = 2e-4 if quantization == "none" else 0.02  # int8 rounds activations, here or there
        for line, expected in zip(lines, expected_lines, strict=True):
            assert line == pytest.approx(expected, rel=tolerance, abs=tolerance / 100)
        for name in weights:
            assert float((weights[name] - expected_weights[name]).abs().median()) < tolerance / 200


def test_a_prompt_larger_than_the_budget_is_refused(tmp_path):
    """Its completions are learnt from together, so they must fit together; the message says how many tokens that is."""
    recipe = make_recipe(tmp_path, ranked=True, reward={"init": None, "microbatch_tokens": 100})
    with pytest.raises(InputError, match=r"stages\.reward\.microbatch_tokens: 100 tokens, but .* use at least 1\d\d"):
        reward.run(make_job(recipe, "reward", tmp_path))


# ---------------------------------------------------------------- what is measured


def test_rankings_are_learnt_and_measured(tmp_path):
    """Held-out accuracy is over untied pairs, its interval counts prompts, and annotators have figures of their own."""
    recipe = make_recipe(tmp_path, ranked=True, reward={"init": None})
    outcome = reward.run(make_job(recipe, "reward", tmp_path))
    heldout = outcome.extra["health"]
    assert heldout["accuracy"] == 1.0
    assert heldout["pairs"] == 5 * heldout["prompts"] == 5 * outcome.data["heldout"]["rows"]
    assert heldout["accuracy_ci"][0] == pytest.approx(1 / (1 + 1.96**2 / heldout["prompts"]), abs=1e-3)  # Wilson at 1
    assert outcome.data["train"]["tokenised"]["tied pairs left out"] == outcome.data["train"]["rows"]
    by_annotator = heldout["by"]["annotator"]
    assert by_annotator.keys() == {"ann", "bob"}
    assert sum(figures["pairs"] for figures in by_annotator.values()) == heldout["pairs"]
    assert {"accuracy", "accuracy_ci", "pairs", "prompts"} == by_annotator["ann"].keys()


# ---------------------------------------------------------------- ensembles


def members(folder: Path) -> list[dict[str, Tensor]]:
    return [adapter_weights(folder), adapter_weights(folder / "members" / "1")]


def test_an_ensemble_is_read_back_and_makes_one_score(tmp_path):
    """Members differ in head and order of data; each one's folder is a standard adapter; the stored score is their mean
    less k standard deviations, each in its own unit, and these units are those of the demonstrations.
    """
    settings = {"init": None, "ensemble": 2, "ensemble_score": "lower", "ensemble_k": 0.5}
    recipe = make_recipe(tmp_path, ranked=True, epochs=1, reward=settings)
    job = make_job(recipe, "reward", tmp_path)
    outcome = reward.run(job)
    first, second = members(tmp_path / "reward")
    assert first.keys() == second.keys()
    assert all(not torch.equal(first[name], second[name]) for name in first)
    assert PeftConfig.from_pretrained(str(tmp_path / "reward" / "members" / "1" / "adapter")).task_type == "SEQ_CLS"
    losses = [metrics(tmp_path / "reward" / place) for place in ("", "members/1")]
    assert losses[0][0]["reward/loss"] != losses[1][0]["reward/loss"]
    assert outcome.metrics["reward/ensemble_std"] == losses[0][-1]["reward/ensemble_std"] > 0

    described = outcome.extra["ensemble"]
    assert (described["score"], described["k"]) == ("lower", 0.5)
    assert [member["folder"] for member in described["members"]] == ["adapter", "members/1/adapter"]
    ensemble = reward.Ensemble(job, Pieces("here", 512, "tokens", job.accelerator))
    probe = outcome.extra["probe"][0]
    raw = []
    for member in range(2):
        ensemble._activate(member)
        raw.append(reward.score_alone(ensemble.model, probe["ids"]))
    units = [(score - m["mean"]) / m["std"] for score, m in zip(raw, described["members"], strict=True)]
    assert probe["score"] == pytest.approx(sum(units) / 2 - 0.5 * abs(units[0] - units[1]) / 2, rel=1e-6)


def test_members_start_apart(tmp_path):
    """A member has weights of its own before it has seen any data, in its head and in its adapter."""
    _, job = make_trainer(tmp_path)
    first, second = (
        dict(reward.new_reward_model(job, name)[0].named_parameters()) for name in ("reward", "reward member 1")
    )
    own = [name for name, parameter in first.items() if not torch.equal(parameter, second[name])]
    assert any("score" in name for name in own) and any("lora_A" in name for name in own)
    assert all("score" in name or "lora_A" in name for name in own)


def test_an_interrupted_ensemble_goes_on_bit_for_bit(tmp_path, monkeypatch):
    """Stopped in the first member and in the second, it leaves the very files of an uninterrupted one."""
    recipe = make_recipe(
        tmp_path, adapter={"dropout": 0.1}, ranked=True, reward={"init": None, "ensemble": 2, "lm_coef": 0.1}
    )
    expected = reward.run(make_job(recipe, "reward", tmp_path / "whole"))
    for stop in (2, 6):  # of 6 steps a member; a training looks once a step
        with pytest.raises(Interrupted):
            reward.run(make_job(recipe, "reward", tmp_path / "pieces", stop=StopAfter(stop)))
    trained, run = [], Training.run
    monkeypatch.setattr(Training, "run", lambda self: (trained.append((self.name, self.first)), run(self)))
    outcome = reward.run(make_job(recipe, "reward", tmp_path / "pieces"))
    assert trained == [("reward", 6), ("reward member 1", 2)]  # where each goes on; the first is not trained again
    assert outcome == expected
    for place in ("", "members/1"):
        whole, pieces = tmp_path / "whole" / "reward" / place, tmp_path / "pieces" / "reward" / place
        assert metrics(whole) == metrics(pieces)
        assert all(torch.equal(a, adapter_weights(pieces)[name]) for name, a in adapter_weights(whole).items())


def test_settings_refuse_what_makes_no_sense():
    """Half of all labels the wrong way round would be no labels."""
    with pytest.raises(ValueError, match="label_smoothing"):
        RewardStage(kind="reward", data="card.md", label_smoothing=0.5)
