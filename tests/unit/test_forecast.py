"""What a recipe will take, told before anything is loaded: memory as it is afterwards, time in proportion."""

import json

import pytest
import torch
from accelerate import Accelerator

from rlhf_kit import forecast, models, passes
from rlhf_kit.collate import load_text_format
from rlhf_kit.errors import InputError
from rlhf_kit.maths.products import FrozenMatrix, packs
from rlhf_kit.recipe_reading import load_recipe
from rlhf_kit.rehearsal import Machine, Rehearsal, rehearsing
from tests.end_to_end import chain
from tests.invariants import roles

MACHINE = Machine(flops_per_second=1e11, bytes_per_second=1e10, seconds_per_operation=5e-6)
CPU = torch.device("cpu")


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """The tiny chain, on a machine that is always the same; nothing can be loaded."""
    monkeypatch.setattr(Machine, "measured", classmethod(lambda *_: MACHINE))
    monkeypatch.setattr(models, "load_base", lambda *_: pytest.fail("a base was loaded"))
    return chain.write_chain(tmp_path)


def told(recipe, *overrides):
    return forecast.forecast(load_recipe(recipe, overrides))


def test_every_stage_is_told_of(recipe):
    """And the closing table; whatever kind of stage it is."""
    found = told(recipe)
    assert list(found.needs) == ["sft", "reward", "ppo", "evaluation"]
    assert found.unknown == []
    assert found.needs["ppo"].steps == 3
    for need in found.needs.values():
        assert need.seconds > 0 and need.base > 0
        assert need.peak == need.base + need.adapters + max(need.learning, need.sampling)


@pytest.mark.parametrize("kind", ["dpo", "kto", "rloo", "grpo", "rejection_sampling"])
def test_other_kinds_are_told_of(recipe, kind):
    """In memory and time."""
    stage = {"kind": kind, "policy": "sft", "batch_size": 8, "microbatch": 4}
    if kind in ("dpo", "kto"):
        stage |= {"data": str(recipe.parent / "pairs.md"), "kl_coef": 0.1}
    else:
        stage |= {"prompts": str(recipe.parent / "asked.md"), "reward": "reward", "max_new_tokens": 16}
        stage |= {"kl_coef": 0.1} if kind != "rejection_sampling" else {}
    need = told(recipe, f"stages.other={json.dumps(stage)}").needs["other"]
    assert need.seconds > 0 and need.learning > 0
    assert (need.sampling > 0) == (kind not in ("dpo", "kto"))


def test_time_grows_with_the_work(recipe):
    """Twice the updates take twice the time, and longer completions more."""
    once, twice = told(recipe).needs["ppo"], told(recipe, "stages.ppo.updates=6").needs["ppo"]
    assert twice.seconds == pytest.approx(2 * once.seconds)
    assert told(recipe, "stages.ppo.max_new_tokens=32").needs["ppo"].seconds > once.seconds


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_completions_of_one_prompt_read_it_once(recipe, monkeypatch, kind):
    """As many take less time the fewer prompts they are of; in passes only where these are over real tokens alone."""
    stage = {"kind": kind, "policy": "sft", "batch_size": 8, "microbatch": 8, "max_new_tokens": 4, "minibatches": 1}
    stage |= {"prompts": str(recipe.parent / "asked.md"), "reward": "reward", "kl_coef": 0.1, "updates": 2}
    found = []
    for possible in (True, False):
        monkeypatch.setattr("rlhf_kit.unpadded.possible", lambda _, possible=possible: possible)
        for count in (2, 8):
            settings = json.dumps(stage | {"completions_per_prompt": count})
            found.append(told(recipe, f"stages.other={settings}").needs["other"].seconds)
    few, many, few_padded, many_padded = found
    assert many < 0.9 * few < 0.9 * few_padded and 0.9 * few_padded < many_padded < few_padded


def test_a_sampler_reads_each_prompt_once(recipe):
    there = passes.Passes(load_recipe(recipe), CPU)
    assert there.sample(8, 100, 1, 8).seconds < 0.5 * there.sample(8, 100, 1).seconds


def test_memory_grows_with_what_is_held(recipe):
    """Larger microbatches keep more; the head on the trunk saves an adapter; more completions hold more keys."""
    need = told(recipe).needs["ppo"]
    assert told(recipe, "stages.ppo.microbatch=2").needs["ppo"].learning < need.learning
    trunk = told(recipe, "stages.ppo.value=trunk").needs["ppo"]
    assert 10 * trunk.adapters == 6 * need.adapters  # of policy 4, reference 1, reward 1, and value 4
    larger = told(recipe, "stages.ppo.value=trunk", "stages.ppo.batch_size=16").needs["ppo"]
    assert larger.learning > trunk.learning > need.learning, "states of the reward model, for each completion token"
    assert told(recipe, "stages.ppo.batch_size=16").needs["ppo"].sampling > need.sampling


def test_what_cannot_be_known_is_said(recipe):
    """The time of a scoring function is not in the figures."""
    assert told(recipe, "stages.ppo.reward=tests.end_to_end.chain:vowels").unknown == ["tests.end_to_end.chain:vowels"]


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_weights_take_what_they_take_when_loaded(tmp_path, quantization):
    """The base as quantised, and an adapter."""
    recipe = load_recipe(chain.write_chain(tmp_path, base={"quantization": quantization}))
    there = passes.Passes(recipe, CPU)
    model = models.load_base(recipe.base, load_text_format(recipe.base), Accelerator(cpu=True))
    kept = {parameter.data_ptr(): parameter for parameter in model.parameters()}.values()  # tied ones once
    taken = sum(parameter.nbytes for parameter in kept)
    for parameter in kept:
        taken += getattr(parameter, "SCB", torch.empty(0)).nbytes
        state = getattr(parameter, "quant_state", None)
        taken += state.absmax.nbytes if state is not None else 0
    assert there.bytes == taken
    adapted = models.add_adapter(model, recipe.adapter, "CAUSAL_LM", init=None, seed=0, base=recipe.base)
    assert there.adapter_bytes == sum(p.nbytes for name, p in adapted.named_parameters() if ".lora_" in name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["none", "8bit"])
def test_a_shared_base_holds_the_copies_that_are_told(tmp_path, quantization, dtype):
    """Of the output head, and of linear layers that are not quantised while it samples, where such copies are made."""
    recipe = load_recipe(chain.write_chain(tmp_path, base={"quantization": quantization, "dtype": dtype}))
    there = passes.Passes(recipe, CPU)
    text_format = load_text_format(recipe.base)
    shared = models.SharedBase(models.load_base(recipe.base, text_format, Accelerator(cpu=True)), recipe.base)
    there_packed = [block.weight.nbytes for block in shared.output_head.blocks if block.packed is not None]
    assert there.copied_bytes == sum(there_packed)
    assert bool(there_packed) == packs(CPU, getattr(torch, dtype))

    roles.write_adapters(tmp_path, recipe.base, text_format)
    shared.add("policy", tmp_path / "sft")
    matrices = [layer.forward for layer in shared.trunk.modules() if isinstance(layer.forward, FrozenMatrix)]
    before = [matrix.multiplied_by for matrix in matrices]
    with shared.decoding("policy"):
        others = [m.weight.nbytes for m, own in zip(matrices, before, strict=True) if m.multiplied_by is not own]
    assert there.folded_bytes == sum(others)
    assert bool(others) == (bool(there_packed) and quantization == "none")


@pytest.mark.parametrize(
    ("stock", "checkpointed", "least", "most"),
    [(False, False, 0.95, 1.05), (True, False, 0.95, 1.05), (False, True, 0.95, 1.3)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pass_keeps_what_it_keeps_with_numbers(tmp_path, monkeypatch, stock, checkpointed, least, most, dtype):
    """What is alive at most in a rehearsal is what is alive when the same pass is computed on a CPU, in a stage that
    shares a base and in one of a stock trainer; of layers that are computed again not less.
    """
    monkeypatch.setattr("rlhf_kit.layers.packs", lambda *_: False)  # of packed weights nobody can ask the size
    monkeypatch.setattr("rlhf_kit.maths.products.packs", lambda *_: False)
    recipe = load_recipe(chain.write_chain(tmp_path, base={"dtype": dtype}))
    there = passes.Passes(recipe, CPU)
    rehearsed = there.learn(4, 40, 10, stock=stock, checkpointed=checkpointed)

    text_format = load_text_format(recipe.base)
    fresh = models.add_adapter(
        models.load_base(recipe.base, text_format, Accelerator(cpu=True)),
        recipe.adapter,
        "CAUSAL_LM",
        init=None,
        seed=0,
        base=recipe.base,
    )
    models.save_adapter(fresh, tmp_path / "adapter", recipe.base)
    causal = models.load_base(recipe.base, text_format, Accelerator(cpu=True))
    shared = models.SharedBase(causal, recipe.base, checkpointed=checkpointed)
    shared.add("policy", tmp_path / "adapter", trainable=True)
    ids = torch.arange(1, 5).unsqueeze(1).repeat(1, 40)  # rows that share nothing
    mask = torch.ones_like(ids).bool()
    with Rehearsal(MACHINE) if checkpointed else rehearsing(MACHINE) as seen:
        if stock:
            states = fresh.base_model.model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        else:
            states = shared.hidden("policy", ids, mask)
        hidden = states[:, -10:].flatten(0, 1)
        logprobs = passes.token_logprobs(hidden, shared.output_head, ids[:, -10:].flatten(), 1.0, 2**20)
        logprobs.sum().backward()
    assert least * seen.peak <= rehearsed.bytes <= most * seen.peak


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_layers_that_are_computed_again_take_time_for_memory(recipe, stage):
    """In the stage that says so, and in no other."""
    kept, again = told(recipe).needs, told(recipe, f"stages.{stage}.activation_checkpointing=true").needs
    assert again[stage].learning < kept[stage].learning
    assert again[stage].seconds > kept[stage].seconds
    assert all(again[name] == kept[name] for name in kept if name != stage)


def test_layers_that_cannot_be_computed_again_are_refused(recipe, monkeypatch):
    """As a run would refuse them."""
    monkeypatch.setattr("rlhf_kit.layers.can_compute_again", lambda _: False)
    assert told(recipe).needs
    with pytest.raises(InputError, match=r"stages\.ppo\.activation_checkpointing: true, but"):
        told(recipe, "stages.ppo.activation_checkpointing=true")


def test_a_model_that_cannot_be_rehearsed_is_named(recipe, monkeypatch):
    """One message, wrong input, and what to do instead."""

    def looks(*_, **__):
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr(passes.Passes, "_states", looks)
    with pytest.raises(InputError, match=r"depends on more than shapes.*max_steps=1"):
        told(recipe)


def test_the_verb_prints_a_table_and_writes_json(tmp_path):
    """rlhf-kit plan: the stages with time and memory on stdout, the same as data in a file, and nothing else."""
    recipe = chain.write_chain(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    result = chain.run("plan", str(recipe), "--json", str(tmp_path / "plan.json"))
    assert result.returncode == 0, result.stderr
    for name in ("sft", "reward", "ppo", "evaluation", "memory    base", "all together about"):
        assert name in result.stdout
    content = json.loads((tmp_path / "plan.json").read_text())
    assert list(content["needs"]) == ["sft", "reward", "ppo", "evaluation"]
    assert content["seconds"] == pytest.approx(sum(need["seconds"] for need in content["needs"].values()))
    assert content["libraries"] > 10**8
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "plan.json"])


def test_wrong_input_is_told_as_by_check(tmp_path):
    """Exit code 2, no traceback, nothing written."""
    recipe = chain.write_chain(tmp_path)
    result = chain.run("plan", str(recipe), "--set", "stages.ppo.kl_cof=1", "--json", str(tmp_path / "plan.json"))
    assert (result.returncode, result.stdout) == (2, "")
    assert "did you mean kl_coef" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "plan.json").exists()
    missing = chain.run("plan", str(recipe), "--json", str(tmp_path / "none" / "plan.json"))
    assert missing.returncode == 2 and "there is no such folder" in missing.stderr
