"""A pass over real tokens alone, and over what begins several rows once, makes the states of a padded one, on every
architecture where it is made.
"""

import copy
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_kit import recipe, unpadded
from rlhf_kit.models import SharedBase

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 60,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"sliding_window": 3},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
}
PADDED_AS_BEFORE = {
    "bloom": {"n_layer": 2, "n_head": 4},  # tells positions by its mask
    "stablelm": {},  # has an attention of its own
    "lfm2": {"layer_types": ["conv", "full_attention"]},  # a convolution looks at the token before
    "llama": {"sliding_window": 6},  # a setting that its layers do not heed
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2},
}

MASK = torch.tensor(
    [[0, 0, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]]
).bool()
IDS = torch.arange(MASK.numel()).view(MASK.shape) + 3
ALIKE = torch.tensor(
    [
        [0, 0, 3, 4, 5, 6, 0, 0],  # all of it begins the next
        [3, 4, 5, 6, 7, 8, 9, 10],
        [0, 11, 12, 13, 14, 15, 16, 17],
        [3, 4, 5, 18, 7, 8, 9, 10],  # goes on as the second does, after another token
    ]
)
COMPUTED = 8 + 7 + 5


def model(name, settings):
    torch.manual_seed(0)
    known = vars(AutoConfig.for_model(name))
    config = AutoConfig.for_model(name, **{key: value for key, value in SMALL.items() if key in known} | settings)
    return AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()


def padded(causal, ids, mask):
    trunk = getattr(causal, causal.base_model_prefix)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    return trunk(input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False).last_hidden_state


def works(causal, tolerance):
    return unpadded.works(causal, partial(padded, causal), tolerance)


def slopes_of(embedding, states):
    embedding.weight.grad = None
    (states[MASK] * torch.linspace(-1, 1, states.shape[-1])).sum().backward()
    return embedding.weight.grad


@pytest.mark.parametrize("ids", [IDS, ALIKE], ids=["apart", "alike"])
@pytest.mark.parametrize("slack", [0.0, 0.25, 9.0], ids=["cpu", "accelerator", "all rows together"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_states_and_gradients_are_those_of_padded_rows(name, slack, ids, monkeypatch):
    """Rows padded on both sides, longer than the window where there is one; with however much padding in attention."""
    monkeypatch.setitem(unpadded.SLACK, "cpu", slack)
    plain = model(name, ARCHITECTURES[name])
    ours = copy.deepcopy(plain)
    assert works(ours, 1e-4)
    assert getattr(ours.config, "sliding_window", None) == getattr(plain.config, "sliding_window", None)
    embeddings = [causal.get_input_embeddings().requires_grad_() for causal in (ours, plain)]
    made, expected = unpadded.states(ours, ids, MASK), padded(plain, ids, MASK)
    torch.testing.assert_close(made[MASK], expected[MASK], rtol=1e-4, atol=1e-5)
    assert not made[~MASK].any()
    torch.testing.assert_close(*map(slopes_of, embeddings, (made, expected)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PADDED_AS_BEFORE)
def test_where_it_is_not_the_same_passes_stay_padded(name):
    """And the attention stays the model's own."""
    causal = model(name, PADDED_AS_BEFORE[name])
    before = causal.config._attn_implementation
    assert not works(causal, 1e-3)
    assert causal.config._attn_implementation == before


def test_layers_of_other_kinds_are_not_tried():
    """A convolution that does little would not show in half precision."""
    assert not works(model("lfm2", PADDED_AS_BEFORE["lfm2"]), tolerance=10.0)


def test_sharing_is_tried_too(monkeypatch):
    """An architecture on which shared tokens come out wrong keeps its padding."""
    monkeypatch.setattr(unpadded, "_taken", lambda tokens, which: tokens.new_zeros(len(which), *tokens.shape[1:]))
    assert not works(model("llama", {}), 1e-3)


def test_a_row_may_be_all_padding():
    causal = model("llama", {})
    assert works(causal, 1e-4)
    mask = MASK & torch.tensor([[True], [False], [True], [True]])
    made, expected = unpadded.states(causal, IDS, mask), unpadded.states(causal, IDS, MASK)
    torch.testing.assert_close(made[mask], expected[mask], rtol=1e-4, atol=1e-5)


def test_memory_that_runs_out_is_no_answer(monkeypatch):
    """It is told, and the model's attention is its own again."""

    def full(*_):
        raise torch.OutOfMemoryError("out of memory")

    causal = model("llama", {})
    monkeypatch.setattr(unpadded, "states", full)
    with pytest.raises(torch.OutOfMemoryError):
        works(causal, 1e-4)
    assert causal.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("ids", "tokens"), [(IDS, int(MASK.sum())), (ALIKE, COMPUTED)], ids=["apart", "alike"])
def test_a_shared_base_computes_real_tokens_alone(ids, tokens):
    """And those that begin several rows once."""
    causal = model("llama", {})
    plain = copy.deepcopy(causal)
    shared, seen = SharedBase(causal, recipe.Base(model="model", dtype="float32")), []
    causal.model.layers[0].input_layernorm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    states = shared.hidden("base", ids, MASK)
    torch.testing.assert_close(states[MASK], padded(plain, ids, MASK)[MASK], rtol=1e-4, atol=1e-5)
    assert seen == [(1, tokens, 32)]
    assert shared.room(ids, MASK) == tokens + (MASK.sum() - tokens) / 2


def test_gradients_of_shared_tokens_are_summed_in_float32():
    """In bfloat16 a sum of 64 ones and small numbers would lose these."""
    tokens = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    taken = unpadded._taken(tokens, torch.tensor([0] * 64 + [1]))
    slopes = torch.full_like(taken, 1 / 256)
    slopes[0] = 1
    taken.backward(slopes)
    assert tokens.grad[0].tolist() == [1.25] * 3  # of 1 + 63 / 256


def test_a_few_tokens_in_common_are_computed_in_each_row():
    """A token that begins all texts is not worth what it takes."""
    ids = torch.arange(60).view(3, 20)
    assert unpadded.room(ids.index_fill(1, torch.tensor(0), 99), torch.ones_like(ids).bool()) == 60
    assert unpadded.room(ids.index_fill(1, torch.arange(3), 99), torch.ones_like(ids).bool()) == 60 - 6 / 2


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=8), st.integers(0, 3))
def test_tokens_that_begin_rows_alike_are_there_once(rows, padding):
    """Each is the one of the first row that begins so, whatever follows, and however the rows are padded."""
    width = padding + max(map(len, rows))
    mask = torch.tensor([[padding <= place < padding + len(row) for place in range(width)] for row in rows]).bool()
    tokens = torch.tensor([token for row in rows for token in row], dtype=torch.long)
    ids = torch.zeros(len(rows), width, dtype=torch.long).masked_scatter(mask, tokens)
    once = unpadded.Once.of(ids, mask)
    beginnings = [tuple(row[: end + 1]) for row in rows for end in range(len(row))]
    first = {beginning: place for place, beginning in reversed([*enumerate(beginnings)])}
    assert once.first.tolist() == sorted(first.values())
    assert [beginnings[once.first[place]] for place in once.which] == beginnings
    pairs = [[*map(int.__eq__, one, other), False] for one, other in pairwise(rows)]
    assert unpadded.in_common(ids, mask) == [0, *(pair.index(False) for pair in pairs)]


def test_generation_reads_prompts_as_before():
    """Where rows are not told, attention is transformers' own."""
    causal = model("llama", {})
    expected = padded(copy.deepcopy(causal), IDS, MASK)
    assert works(causal, 1e-4)
    assert torch.equal(padded(causal, IDS, MASK)[MASK], expected[MASK])


def groups(lengths, device):
    return [[*group.lengths] for group in unpadded.groups_of(lengths, torch.device(device))]


def test_attention_computes_rows_of_like_length_together():
    """On a CPU those of one length; elsewhere, where places stand for tokens too, at most a quarter of padding."""
    lengths = [9, 9, 8, 5, 5, 1]
    assert groups(lengths, "cpu") == [[9, 9], [8], [5, 5], [1]]
    assert groups([4, 0, 4], "cpu") == [[4, 4]]
    assert groups(lengths, "meta") == [[9, 9, 8, 5, 5], [1]]  # 45 places for 36 tokens; with the last 54 for 37
