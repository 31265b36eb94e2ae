"""What must hold for the roles on one base, in full precision, 8-bit and 4-bit."""

from __future__ import annotations

import functools
import weakref
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from rlhf_kit import artifacts, models, recipe
from rlhf_kit.collate import left_pad, load_text_format
from rlhf_kit.errors import InputError
from rlhf_kit.generation import uniforms
from rlhf_kit.maths.logprobs import sample_inverse_cdf
from rlhf_kit.maths.products import FrozenMatrix
from rlhf_kit.rehearsal import Machine, Rehearsal
from rlhf_kit.rollout import completion_logprobs, completion_states
from rlhf_kit.scorers import AdapterScorer, Written, unpadded
from tests import tiny
from tests.invariants import roles

QUANTIZATIONS = ["none", "8bit", "4bit"]


@pytest.fixture(params=QUANTIZATIONS)
def world(request, tmp_path):
    return roles.shared_base(tmp_path, request.param)


def logprobs(shared, role, rollout):
    return completion_logprobs(shared, completion_states(shared, role, rollout), rollout, 1.0)


def test_an_untrained_policy_is_the_reference_bit_for_bit(world):
    """The policy starts as a copy of the SFT adapter: its KL to the reference is exactly 0, and not so to the base."""
    shared, text_format = world
    rollout = roles.sampled(shared, text_format)
    with torch.no_grad():
        policy, reference, base = (logprobs(shared, role, rollout) for role in ("policy", "reference", models.BASE))
    assert torch.equal(policy, reference)
    assert (policy - base).abs().max() > 1e-3


def test_gradients_do_not_change_the_log_probabilities(world):
    """The same tokens have the same log-probabilities with and without gradients, so the first ratio is exactly 1."""
    shared, text_format = world
    rollout = roles.sampled(shared, text_format)
    with torch.no_grad():
        before = logprobs(shared, "policy", rollout)
    during = logprobs(shared, "policy", rollout)
    assert during.requires_grad
    assert torch.equal(before, during.detach())


def test_a_roles_loss_reaches_that_roles_parameters_only(world):
    """The policy's log-probabilities train the policy adapter, the values the value adapter and head, nothing else."""
    shared, text_format = world
    rollout = roles.sampled(shared, text_format)
    everything = shared.trainable()
    assert {name.split("/")[0] for name in everything} == {"policy", "value"}

    logprobs(shared, "policy", rollout).sum().backward()
    touched = {name for name, parameter in everything.items() if parameter.grad is not None}
    assert touched == {name for name in everything if name.startswith("policy/")}

    shared.heads["value"](completion_states(shared, "value", rollout)).sum().backward()
    assert all(parameter.grad is not None for parameter in everything.values())
    assert all(
        parameter.grad is None
        for name, parameter in shared.peft.named_parameters()
        if ".policy." not in name and ".value." not in name
    )


def test_adapted_layers_compute_what_pefts_do(world):
    """For every layer and role, and for the base without one; values, and gradients of input and adapter."""
    shared, _ = world
    torch.manual_seed(0)
    for layer in shared._layers:
        x = torch.randn(2, 3, layer.in_features)
        adapter = [layer.lora_A["policy"].weight, layer.lora_B["policy"].weight]
        for role in ("policy", "reward", models.BASE):
            with shared.using(role):
                results = []
                for forward in (layer.forward, functools.partial(type(layer).forward, layer)):
                    inputs = x.clone().requires_grad_()
                    out = forward(inputs)
                    learning = [inputs, *adapter] if role == "policy" else [inputs]
                    results.append((out.detach(), *torch.autograd.grad(out.square().sum(), learning)))
            torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_on_the_shared_base_are_pefts(tmp_path, family, dtype):
    """Of the whole model, in both precisions, and where linear layers lie the other way round."""
    base = roles.base_settings(tiny.make_checkpoint(tmp_path / "model"), "none", dtype)
    if family == "gpt2":
        torch.manual_seed(0)
        shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.1}
        size = len(load_text_format(base).tokenizer)
        GPT2LMHeadModel(GPT2Config(vocab_size=size, **shape)).save_pretrained(tmp_path / "model")
    text_format = load_text_format(base)
    accelerator = Accelerator(cpu=True)
    plain = models.add_adapter(
        models.load_base(base, text_format, accelerator), roles.ADAPTER, "CAUSAL_LM", init=None, seed=1, base=base
    )
    roles.disturb(plain, 1)
    models.save_adapter(plain, tmp_path / "adapter", base)
    shared = models.SharedBase(models.load_base(base, text_format, accelerator), base)
    shared.add("policy", tmp_path / "adapter", trainable=True)
    ids = torch.arange(2, 20).view(2, 9)

    ours = shared.hidden("policy", ids, torch.ones_like(ids, dtype=torch.bool))
    theirs = getattr(plain.base_model.model, plain.base_model.model.base_model_prefix)(ids).last_hidden_state
    tolerance = 1e-4 if dtype == "float32" else 0.1
    slopes = torch.randn(
        ours.shape, generator=torch.Generator().manual_seed(0)
    )  # squares of what a norm made are fixed
    for states in (ours, theirs):
        (slopes * states.float()).sum().backward()
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    expected = [parameter.grad for name, parameter in plain.named_parameters() if ".lora_" in name]
    found = [parameter.grad for parameter in shared.parameters_of("policy").values()]
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


def test_using_a_role_ends_where_it_began(world):
    """Switching nests and is undone, also by an exception, and leaves every parameter's requires_grad as it was."""
    shared, text_format = world
    rollout = roles.sampled(shared, text_format)

    def trainable():
        return {name for name, parameter in shared.peft.named_parameters() if parameter.requires_grad}

    before = trainable()
    with torch.no_grad(), shared.using("policy"):
        with pytest.raises(KeyError), shared.using(models.BASE):
            raise KeyError
        inside = shared.trunk(input_ids=rollout.ids).last_hidden_state
        with shared.using("reward"):
            other = shared.trunk(input_ids=rollout.ids).last_hidden_state
        again = shared.trunk(input_ids=rollout.ids).last_hidden_state
    assert torch.equal(inside, again)
    assert not torch.equal(inside, other)
    assert trainable() == before


def test_decoding_has_the_role_folded_in_and_leaves_the_base_as_it_was(world):
    """To rounding within, and to the bit afterwards, also without an adapter or when an exception ends the block."""
    shared, text_format = world
    rollout = roles.sampled(shared, text_format)

    def states(role):
        with torch.no_grad(), shared.using(role):
            return shared.trunk(input_ids=rollout.ids).last_hidden_state

    before = {role: states(role) for role in ("policy", "reward", models.BASE)}
    for role, expected in before.items():
        with torch.no_grad(), pytest.raises(KeyError), shared.decoding(role):
            within = shared.trunk(input_ids=rollout.ids).last_hidden_state
            matrices = [layer.forward for layer in shared.trunk.modules() if isinstance(layer.forward, FrozenMatrix)]
            changed = sum(matrix.multiplied_by is not matrix.packed for matrix in matrices)
            raise KeyError
        torch.testing.assert_close(within, expected, rtol=1e-4, atol=1e-4)
        assert changed == (0 if role == models.BASE else len(matrices))
        assert all(torch.equal(states(other), there) for other, there in before.items())


def test_padding_and_batch_mates_do_not_change_log_probabilities(world):
    """A completion has the same log-probabilities alone, in a batch, and with more padding on either side.

    With the outlier decomposition of 8-bit weights on, they would differ by tenths of a nat.
    """
    shared, text_format = world
    rollout = roles.sampled(shared, text_format)
    padded = replace(
        rollout,
        prompt_ids=torch.nn.functional.pad(rollout.prompt_ids, (3, 0), value=text_format.pad_id),
        prompt_mask=torch.nn.functional.pad(rollout.prompt_mask, (3, 0)),
    )
    with torch.no_grad():
        together = logprobs(shared, "policy", rollout)
        torch.testing.assert_close(logprobs(shared, "policy", padded), together, rtol=0, atol=2e-5)
        for row in range(len(roles.PROMPTS)):
            alone = rollout.rows(torch.tensor([row]))
            expected = together[row : row + 1, : alone.completion_ids.shape[1]]
            torch.testing.assert_close(logprobs(shared, "policy", alone), expected, rtol=0, atol=2e-5)


def test_generation_with_cache_and_leaving_rows_equals_one_token_at_a_time(world):
    """Sampling with a cache, while ended rows leave the batch, draws what full forward passes of one row would."""
    shared, text_format = world
    # An end token that comes early, so that rows leave at different steps.
    first = roles.sampled(shared, text_format, length=20)
    end_id = int(first.completion_ids[1, 4])
    text_format = replace(text_format, end_id=end_id)
    rollout = roles.sampled(shared, text_format, length=20)
    lengths = rollout.completion_mask.sum(1).tolist()
    assert len(set(lengths)) > 1
    assert rollout.ended.tolist() == [
        int(ids[length - 1]) == end_id for ids, length in zip(rollout.completion_ids, lengths, strict=True)
    ]
    uniform = uniforms(range(4), 4, 20, 0, "test")
    for row, prompt in enumerate(roles.PROMPTS):
        ids = text_format.prompt_ids(prompt)
        for step in range(lengths[row]):
            with torch.no_grad(), shared.using("policy"):
                logits = shared.causal(input_ids=torch.tensor([ids])).logits[:, -1]
            token = sample_inverse_cdf(logits, uniform[row, step : step + 1])
            assert int(token) == int(rollout.completion_ids[row, step]), (row, step)
            ids = [*ids, int(token)]


def test_the_reward_role_scores_as_the_plain_sequence_classifier_does(tmp_path):
    """transformers and peft alone give the scores that the shared base gives, from the files of the adapter folder."""
    shared, text_format = roles.shared_base(tmp_path)
    rollout = roles.sampled(shared, text_format)
    scorer = AdapterScorer(shared, ["reward"])
    assert unpadded(scorer)
    ours = scorer(Written([], [], rollout.ids, rollout.mask))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1)
    plain = PeftModel.from_pretrained(plain, tmp_path / "reward").eval()
    for row in range(len(roles.PROMPTS)):
        ids = rollout.ids[row][rollout.mask[row]]
        with torch.no_grad():
            theirs = plain(input_ids=ids.unsqueeze(0)).logits
        torch.testing.assert_close(ours[row], theirs.squeeze(), rtol=0, atol=1e-5)


def test_the_value_function_starts_as_the_normalised_score(world):
    """At the last real token the value head gives (score - mean) / std of the reward model it was started from."""
    shared, text_format = world
    rollout = roles.sampled(shared, text_format)
    scores = AdapterScorer(shared, ["reward"])(Written([], [], rollout.ids, rollout.mask))
    with torch.no_grad():
        hidden = shared.hidden("value", rollout.ids, rollout.mask)
        last = rollout.prompt_ids.shape[1] + rollout.completion_mask.sum(1) - 1
        values = shared.heads["value"](hidden[torch.arange(4), last]).squeeze(-1)
    torch.testing.assert_close(values, (scores - 0.5) / 2.0, rtol=0, atol=1e-5)


def test_an_ensembles_states_are_its_first_members(world, monkeypatch):
    """As the value function starts as the first."""
    shared, text_format = world
    rollout = roles.sampled(shared, text_format)
    monkeypatch.setitem(shared.heads, "reference", shared.heads["reward"])
    scorer = AdapterScorer(shared, ["reward", "reference"])
    _, states = scorer.scores_and_states(Written([], [], rollout.ids, rollout.mask))
    with torch.no_grad():
        first, second = (shared.hidden(role, rollout.ids, rollout.mask) for role in scorer.roles)
    assert torch.equal(states, first) and not torch.equal(states, second)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("train", [False, True])
def test_8bit_layers_keep_no_input(tmp_path, dtype, train):
    """They compute what bitsandbytes' do, also backwards and in both modes, and nobody holds on to what came in."""
    base = roles.base_settings(tiny.make_checkpoint(tmp_path / "model"), "8bit", dtype)
    causal = models.load_base(base, load_text_format(base), Accelerator(cpu=True)).train(train)
    layer = causal.model.layers[0].mlp.up_proj
    torch.manual_seed(0)
    drawn, results, held = torch.randn(2, 5, layer.in_features, dtype=causal.dtype), [], []
    for forward in (layer.forward, functools.partial(type(layer).forward, layer)):
        x = drawn.clone().requires_grad_()
        given = x * 1
        out = forward(given)
        there = weakref.ref(given)
        del given
        held.append(there() is not None)
        out.float().square().sum().backward()
        results.append((out.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert held == [False, True]


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_layers_that_are_computed_again_give_the_same_gradients(tmp_path_factory, monkeypatch, quantization):
    """Bit for bit, also when another role is at work by then; and the graph holds little more than their inputs."""
    monkeypatch.setattr("rlhf_kit.layers.packs", lambda *_: False)  # of packed weights nobody can ask the size
    found, alive = [], []
    for again in (False, True):
        shared, text_format = roles.shared_base(tmp_path_factory.mktemp("world"), quantization, checkpointed=again)
        rollout = roles.sampled(shared, text_format)
        with Rehearsal(Machine(1.0, 1.0, 1.0)) as seen:
            states = completion_states(shared, "policy", rollout)
            alive.append(seen.alive)
        ours = completion_logprobs(shared, states, rollout, 1.0)
        values = shared.heads["value"](completion_states(shared, "value", rollout))
        with shared.using("reward"):
            (ours.sum() + values.square().sum()).backward()
        found.append([ours.detach(), values.detach(), *(p.grad for p in shared.trainable().values())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in found[0][2:])
    hidden, layers = rollout.mask.sum() * shared.width * 4, len(shared.trunk.layers)
    assert alive[1] < (layers + 4) * hidden < alive[0] / 2


@pytest.mark.parametrize("width", [64, 96])
def test_4bit_gradients_survive_a_pass_without_gradients(tmp_path, width):
    """Gradients after generation equal those before it, also for widths that 64 does not divide."""
    tiny.make_checkpoint(tmp_path / "model", hidden_size=width, intermediate_size=2 * width)
    shared, text_format = roles.shared_base(tmp_path, "4bit")
    prompts = left_pad([[*text_format.prompt_ids("Where?"), 10, 11, 12]], text_format.pad_id)

    def gradients():
        hidden = shared.hidden("policy", prompts.prompt_ids, prompts.prompt_mask)
        hidden.square().sum().backward()
        result = {name: p.grad.clone() for name, p in shared.parameters_of("policy").items()}
        for parameter in shared.parameters_of("policy").values():
            parameter.grad = None
        return result

    before = gradients()
    roles.sampled(shared, text_format)
    after = gradients()
    for name, gradient in before.items():
        assert torch.equal(gradient, after[name]), name


def test_an_adapter_of_another_base_is_refused(tmp_path):
    """An adapter made on other weights gets a message that names both, not wrong text."""
    shared, text_format = roles.shared_base(tmp_path)
    made_on = models.base_identity(shared.base)
    artifacts.write_json(tmp_path / "manifest.json", {"schema": artifacts.SCHEMA, "base": made_on})
    tiny.make_checkpoint(tmp_path / "other", seed=5)
    base = roles.base_settings(tmp_path / "other", "none")
    other = models.SharedBase(models.load_base(base, text_format, Accelerator(cpu=True)), base)
    with pytest.raises(InputError, match="made for another base"):
        other.add("policy", tmp_path / "sft")


def test_an_adapter_of_another_shape_is_refused(tmp_path):
    """An adapter whose weights do not fit the base is refused before anything is copied."""
    roles.shared_base(tmp_path)
    tiny.make_checkpoint(tmp_path / "wide", hidden_size=96)
    base = roles.base_settings(tmp_path / "wide", "none")
    model = models.load_base(base, load_text_format(base), Accelerator(cpu=True))
    models._content.cache_clear()
    with pytest.raises(InputError, match="another base"):
        models.add_adapter(model, roles.ADAPTER, "CAUSAL_LM", init=tmp_path / "sft", seed=0, base=base)


def test_missing_weights_are_refused(tmp_path):
    """A checkpoint that lacks a weight is refused instead of starting with random numbers there."""
    folder = tiny.make_checkpoint(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    base = roles.base_settings(folder, "none")
    with pytest.raises(InputError, match=r"no weights for model\.layers\.1\.mlp\.up_proj\.weight"):
        models.load_base(base, load_text_format(base), Accelerator(cpu=True))


def test_an_adapter_is_written_the_same_way_every_time(tmp_path):
    """The same weights make the same files, byte for byte, so that hashes of runs can be compared."""
    shared, _ = roles.shared_base(tmp_path)
    for name in ("once", "twice", "thrice"):
        shared.save("policy", tmp_path / name)
    for file in sorted(path.name for path in (tmp_path / "once").iterdir()):
        contents = {(tmp_path / name / file).read_bytes() for name in ("once", "twice", "thrice")}
        assert len(contents) == 1, file


@pytest.mark.parametrize(
    "targets", ["all-linear", r".*\.(q|v)_proj", ["q_proj", "v_proj"], ["model.layers.0.self_attn.q_proj"]]
)
def test_what_can_be_adapted(tmp_path, targets):
    """All linear layers, a pattern, names, and a layer's whole name."""
    base = roles.base_settings(tiny.make_checkpoint(tmp_path / "model"), "none")
    models.tried(models.without_weights(base), recipe.Adapter(target_modules=targets), "here")


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_proj", "qproj"], "here: adapts nothing by the name qproj"),
        (["q_proj", "lm_head"], "here: names the base's output head.*; name some of down_proj, gate_proj,"),
        (["norm"], "here: PEFT says: .*RMSNorm.* is not supported.*name some of down_proj"),
        ("nothing", "here: PEFT says: Target modules nothing not found in the base model.*name some of down_proj"),
    ],
)
def test_what_cannot_be_adapted(tmp_path, targets, said):
    """No name of several is passed over."""
    base = roles.base_settings(tiny.make_checkpoint(tmp_path / "model"), "none")
    with pytest.raises(InputError, match=said):
        models.tried(models.without_weights(base), recipe.Adapter(target_modules=targets), "here")


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "w1", "w2", "w3"]])
def test_experts_cannot_be_adapted(targets):
    """PEFT adapts them as parameters, which is not among what an adapter's folder may hold here."""
    config = MixtralConfig(
        hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_local_experts=2
    )
    with (
        torch.device("meta"),
        pytest.raises(InputError, match=r"(experts|gate).*no layer.*name some of k_proj, o_proj"),
    ):
        models.adapted(
            MixtralForCausalLM(config), models.lora_config(recipe.Adapter(target_modules=targets), "CAUSAL_LM")
        )


def test_an_adapter_on_the_output_head_is_refused(tmp_path):
    """Every role reads the base's own output head, so an adapter on it would not be used."""
    base = roles.base_settings(tiny.make_checkpoint(tmp_path / "model"), "none")
    model = models.load_base(base, load_text_format(base), Accelerator(cpu=True))
    adapter = recipe.Adapter(r=4, target_modules=["q_proj", "lm_head"])
    with pytest.raises(InputError, match="output head"):
        models.add_adapter(model, adapter, "CAUSAL_LM", init=None, seed=0, base=base)
