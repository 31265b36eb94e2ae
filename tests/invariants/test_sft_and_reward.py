"""SFT and reward training on a tiny model: what is learned, what is saved, and that nothing but the recipe matters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from rlhf_kit.collate import tokenise_demonstrations
from rlhf_kit.errors import Diverged, InputError, Interrupted
from rlhf_kit.models import _steady_4bit_on_cpu, load_base, open_adapter
from rlhf_kit.pieces import Pieces
from rlhf_kit.stages import reward, sft
from rlhf_kit.training import Training, row_order
from tests.invariants.stage_jobs import StopAfter, adapter_weights, make_job, make_recipe, metrics

PRECISIONS = [("none", "float32"), ("none", "bfloat16"), ("8bit", "float32"), ("8bit", "bfloat16"), ("4bit", "float32")]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder to work in, where trl would be found out if it reported to the Hub."""

    def refuse(*args, **kwargs):
        raise AssertionError("telemetry")

    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", refuse)
    monkeypatch.setattr("huggingface_hub.utils._telemetry.send_telemetry", refuse)
    return tmp_path


# ---------------------------------------------------------------- learning and saving


@pytest.mark.parametrize(("quantization", "dtype"), PRECISIONS)
def test_chain_learns_and_loads_with_plain_peft(here, quantization, dtype):
    """In every precision SFT lowers the held-out loss, the reward model tells pairs apart, and plain transformers and
    peft, without us, compute from the folders what was stored.
    """
    recipe = make_recipe(here, base={"quantization": quantization, "dtype": dtype})
    tuned = sft.run(make_job(recipe, "sft", here))
    assert tuned.metrics["sft/heldout_loss"] < tuned.metrics["sft/heldout_loss_before"] - 1
    told = reward.run(make_job(recipe, "reward", here))
    assert told.extra["health"]["accuracy"] == 1.0
    low, high = told.extra["health"]["accuracy_ci"]
    assert 0 < low < high == 1.0
    assert told.extra["score_normalisation"]["std"] > 0 and len(told.extra["probe"]) == 8

    text_format = make_job(recipe, "sft", here).text_format
    ours = open_adapter(load_base(recipe.base, text_format, Accelerator(cpu=True)), here / "sft" / "adapter")
    kwargs = {"dtype": getattr(torch, dtype), "device_map": "cpu"}
    if quantization == "8bit":
        kwargs["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if quantization == "4bit":
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
        )
    plain = AutoModelForCausalLM.from_pretrained(recipe.base.model, **kwargs)
    _steady_4bit_on_cpu(plain)  # else 4-bit layers take a bfloat16 path on CPUs that have one
    plain = PeftModel.from_pretrained(plain, str(here / "sft" / "adapter")).eval()
    ids = torch.tensor([told.extra["probe"][0]["ids"]])
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, ours(input_ids=ids).logits)

    plain = AutoModelForSequenceClassification.from_pretrained(recipe.base.model, num_labels=1, **kwargs)
    _steady_4bit_on_cpu(plain)
    plain = PeftModel.from_pretrained(plain, str(here / "reward" / "adapter")).eval()
    with torch.no_grad():
        scores = [float(plain(input_ids=torch.tensor([row["ids"]])).logits) for row in told.extra["probe"]]
    stored = [row["score"] for row in told.extra["probe"]]
    # the head of a plain model is in the base's precision, ours is float32
    assert scores == pytest.approx(stored, abs=1e-6 if dtype == "float32" else 0.05)


def test_adapter_folder_is_standard(here, monkeypatch):
    """The adapter names the recipe's base as it is found from here, and nothing of the trainer's is left behind."""
    monkeypatch.chdir(here)
    recipe = make_recipe(here, epochs=0.1)
    sft.run(make_job(recipe, "sft", here))
    reward.run(make_job(recipe, "reward", here))
    for stage, task in (("sft", "CAUSAL_LM"), ("reward", "SEQ_CLS")):
        assert {path.name for path in (here / stage / "adapter").iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        config = PeftConfig.from_pretrained(str(here / stage / "adapter"))
        assert (config.base_model_name_or_path, config.task_type) == (recipe.base.model, task)
        assert {p.name for p in (here / stage).iterdir()} - {"checkpoints"} == {"adapter", "metrics.jsonl"}
    assert AutoPeftModelForCausalLM.from_pretrained(str(here / "sft" / "adapter")).active_adapter == "default"
    assert any(name.endswith("score.weight") for name in adapter_weights(here / "reward"))


def test_reward_adapter_starts_from_the_sft_adapter(here, monkeypatch):
    """With `init`, training starts from an exact float32 copy, also on 8-bit weights, where trl rounds to bfloat16."""
    recipe = make_recipe(here, base={"quantization": "8bit"})
    sft.run(make_job(recipe, "sft", here))
    tuned = adapter_weights(here / "sft")
    assert not any(torch.equal(weight, weight.bfloat16().float()) for weight in tuned.values())
    start = {}

    def look(training):
        optimized = {id(parameter) for group in training.optimizer.param_groups for parameter in group["params"]}
        assert optimized == {id(p) for p in training.model.parameters() if p.requires_grad}
        assert all(p.dtype == torch.float32 for p in training.model.parameters() if p.requires_grad)
        start.update({name: p.detach().clone() for name, p in training.model.named_parameters()})
        raise Interrupted

    monkeypatch.setattr(Training, "run", look)
    with pytest.raises(Interrupted):
        reward.run(make_job(recipe, "reward", here))
    assert all(torch.equal(start[name.replace(".weight", ".default.weight")], tuned[name]) for name in tuned)


def test_text_card_trains_on_every_token(here):
    """A text card has its loss on all tokens, not only behind a prompt."""
    job = make_job(make_recipe(here, text=True, epochs=0.5), "sft", here)
    outcome = sft.run(job)
    assert outcome.metrics["sft/heldout_loss"] < outcome.metrics["sft/heldout_loss_before"]
    assert outcome.extra["tokens"] > 0


def test_loss_is_the_mean_over_completion_tokens(here):
    """The first step's logged loss is what plain cross-entropy over the batch's completion tokens gives."""
    recipe = make_recipe(here, max_steps=1)
    job = make_job(recipe, "sft", here)
    outcome = sft.run(job)
    assert outcome.extra["steps"] == 1
    rows = tokenise_demonstrations(job.examples[job.settings.data].train, job.text_format, None, "error").rows
    model = AutoModelForCausalLM.from_pretrained(recipe.base.model)
    total, tokens = 0.0, 0
    for row in (rows[index] for index in row_order(len(rows), 0, 8, recipe.seed, "sft")):
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        picked = labels[1:] != -100
        assert job.text_format.tokenizer.decode(ids[1:][picked]) == " Yes, here.</s>"
        total += float(torch.nn.functional.cross_entropy(logits[:-1][picked], ids[1:][picked], reduction="sum"))
        tokens += int(picked.sum())
    assert metrics(here / "sft")[1]["sft/loss"] == pytest.approx(total / tokens, rel=1e-5)


# ---------------------------------------------------------------- nothing but the recipe matters


def test_microbatches_give_the_same_training(here):
    """1 x 8, 2 x 4 and 8 x 1 rows give the same steps, losses and adapter, up to the order of summation."""
    results = {}
    for size in (8, 4, 1):
        recipe = make_recipe(here, text=True, microbatch=size)  # texts differ in length, so microbatches in tokens
        run = here / f"run{size}"
        sft.run(make_job(recipe, "sft", run))
        reward.run(make_job(recipe, "reward", run))
        results[size] = {stage: (metrics(run / stage), adapter_weights(run / stage)) for stage in ("sft", "reward")}
    for size in (4, 1):
        for stage in ("sft", "reward"):
            (lines, weights), (expected_lines, expected_weights) = results[size][stage], results[8][stage]
            assert len(lines) == len(expected_lines)
            for line, expected in zip(lines, expected_lines, strict=True):
                assert line == pytest.approx(expected, rel=2e-4, abs=2e-6)
            for name in weights:
                # Adam divides by the size of a gradient, so a sign lost in rounding moves a weight by up to the rate
                assert float((weights[name] - expected_weights[name]).abs().median()) < 1e-6


@pytest.mark.parametrize("stage", ["sft", "reward"])
@pytest.mark.parametrize("quantization", ["none", "8bit"])
def test_interrupted_training_goes_on_bit_for_bit(here, stage, quantization):
    """Stopped twice and gone on with, a training leaves the very files of an uninterrupted one, dropout included."""
    recipe = make_recipe(here, base={"quantization": quantization}, adapter={"dropout": 0.1}, reward={"init": None})
    module = {"sft": sft, "reward": reward}[stage]
    expected = module.run(make_job(recipe, stage, here / "whole"))
    stopped_at = []
    for _ in range(2):
        with pytest.raises(Interrupted, match="stopped after step") as error:
            module.run(make_job(recipe, stage, here / "pieces", stop=StopAfter(2)))
        stopped_at.append(str(error.value).split()[4])
    assert stopped_at == ["2", "4"]
    outcome = module.run(make_job(recipe, stage, here / "pieces"))
    assert outcome == expected
    assert metrics(here / "pieces" / stage) == metrics(here / "whole" / stage)
    whole, pieces = adapter_weights(here / "whole" / stage), adapter_weights(here / "pieces" / stage)
    assert whole.keys() == pieces.keys() and all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_steps_after_the_last_checkpoint_are_logged_once(here):
    """A training that was killed after its checkpoint writes the lost steps' metrics again, not twice."""
    recipe = make_recipe(here)
    with pytest.raises(Interrupted):
        sft.run(make_job(recipe, "sft", here, stop=StopAfter(2)))
    with (here / "sft" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "sft/loss": 99.0}\n{"step": 4, "sft/lo')
    sft.run(make_job(recipe, "sft", here))
    lines = metrics(here / "sft")
    assert [line["step"] for line in lines] == list(range(len(lines)))
    assert all(line.get("sft/loss", 0) < 99 for line in lines)


# ---------------------------------------------------------------- what stops a training


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_broken_numbers_stop_the_training(here, stage):
    """A learning rate that blows the adapter up ends in an error that names step and cause, never in a loss of 0."""
    recipe = make_recipe(here, learning_rate=1.0, max_grad_norm=1e30, reward={"init": None})
    module = {"sft": sft, "reward": reward}[stage]
    job = make_job(recipe, stage, here)
    original = torch.optim.AdamW.step

    def explode(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.param_groups[0]["params"][0].data.fill_(float("nan"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", explode)
        with pytest.raises(Diverged, match=rf"{stage}: the loss of step 2 is nan because of .*lora_A"):
            module.run(job)
    assert not (here / stage / "adapter").exists()


def test_demonstrations_that_score_alike_are_refused(here):
    """Without any spread there is no unit for the score."""
    recipe = make_recipe(here, reward={"init": None, "learning_rate": 1e-9})
    job = make_job(recipe, "reward", here)
    reward.save_adapter(reward.new_reward_model(job, "reward")[0], job.folder / "adapter", recipe.base)
    reference = {"card": "card", "rows": [[5, 6, 7]] * 3, "heldout": 0, "counts": {}}
    with pytest.raises(InputError, match="all 3 rows of card have the same score"):
        reward.Ensemble(job, Pieces("here", 64, "tokens", job.accelerator)).normalise_on(reference)


def test_members_that_cancel_out_are_refused(here, monkeypatch):
    """What two members make of the demonstrations together may be one score where each makes several."""
    recipe = make_recipe(here, reward={"init": None, "ensemble": 2, "ensemble_score": "mean"})
    job = make_job(recipe, "reward", here)
    for member in range(2):
        folder = reward.member_folder(job, member) / "adapter"
        reward.save_adapter(reward.new_reward_model(job, "reward")[0], folder, recipe.base)
    ensemble = reward.Ensemble(job, Pieces("here", 64, "tokens", job.accelerator))
    raw = torch.tensor([[0.0, 2.0, 0.0, 2.0], [5.0, 1.0, 5.0, 1.0]], dtype=torch.float64)
    monkeypatch.setattr(ensemble, "raw", lambda *_: raw)
    with pytest.raises(InputError, match=r"all 4 rows of card have the same score \(0\)"):
        ensemble.normalise_on({"card": "card", "rows": [[5]] * 4, "heldout": 0, "counts": {}})
