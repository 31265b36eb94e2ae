"""How a rollout's rows are cut into pieces, and prompts of several rows that are read once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kit import recipe
from rlhf_kit.batches import PromptBatch
from rlhf_kit.collate import left_pad, right_pad
from rlhf_kit.generation import generate, uniforms
from rlhf_kit.models import SharedBase
from rlhf_kit.rollout import in_pieces
from rlhf_kit.unpadded import Once, is_enough
from tests.unit.test_unpadded import PADDED_AS_BEFORE, model


def cut(rows, prompts, size):
    """Pieces of all rows, which are lists of tokens; unpadded."""
    ids, mask = right_pad(rows, 0)
    return in_pieces(ids, mask, range(len(rows)), size, prompts=prompts, unpadded=True)


def apart(*lengths):
    """Rows of these lengths that begin with tokens of their own."""
    return [[100 + number] * length for number, length in enumerate(lengths)]


def test_pieces_of_rows_that_share_nothing():
    """Longest first, all pieces full but the first; results are laid out in rows, of at most twice as many places."""
    assert cut(apart(10, 100, 11, 99, 9), range(5), 3) == [[1, 3, 2, 0, 4]]
    assert cut(apart(10, 100, 11, 99, 9), range(5), 2) == [[1], [3, 2, 0, 4]]
    assert cut(apart(10, 50, 11, 9), range(4), 1) == [[1], [2, 0, 3]]
    assert cut(apart(50, 4, 3, 2, 1), range(5), 2) == [[0], [1, 2, 3, 4]]  # in one 5 x 50 places for 100 tokens
    nothing = torch.zeros(2, 0, dtype=torch.long)
    assert in_pieces(nothing, nothing.bool(), [], 4, prompts="ab", unpadded=True) == []


def test_rows_of_one_prompt_stay_together():
    """The prompt with the longest row first; in each the longest row first."""
    rows = [[7] * 10 + [number] * length for number, length in enumerate((5, 1, 4, 2))]
    assert cut(rows, "abba", 4) == [[0, 3, 2, 1]]


def test_what_rows_have_in_common_takes_half():
    """Four rows of 30 tokens, 20 of them one prompt's: 30 + 3 x (10 + 20 / 2) = 90 tokens, three rows' worth."""
    rows = [[7] * 20 + [number] * 10 for number in range(4)]
    assert cut(rows, "aaaa", 3) == [[3, 2, 1, 0]]
    assert cut(rows, "aaaa", 2) == [[3, 2], [1, 0]]
    assert cut(rows, "abcd", 3) == [[3, 2, 1, 0]]  # a beginning that prompts have in common, too


def test_rows_with_padding_are_in_pieces():
    """There are no pieces by prompt where every place is computed."""
    ids, mask = right_pad(apart(10, 100, 10, 100, 10), 0)
    assert in_pieces(ids, mask, range(5), 2, prompts="abaab", unpadded=False) == [[1, 3], [0, 2, 4]]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), min_size=1, max_size=12), st.integers(1, 4))
def test_pieces_stay_within_a_microbatch(drawn, size):
    """Each row is in one of them, and none computes or lays out more than it may."""
    prompts = [prompt for prompt, _ in drawn]
    rows = [[prompt] * (5 * prompt) + [10 + number] * length for number, (prompt, length) in enumerate(drawn)]
    budget = size * max(map(len, rows))
    pieces = cut(rows, prompts, size)
    assert sorted(row for piece in pieces for row in piece) == [*range(len(rows))]
    for piece in pieces:
        once = Once.of(*right_pad([rows[row] for row in piece], 0))
        computed, tokens = len(once.first), len(once.which)
        assert len(piece) == 1 or (computed + (tokens - computed) / 2 if is_enough(*once.counts) else tokens) <= budget
        assert len(piece) == 1 or len(piece) * max(len(rows[row]) for row in piece) <= 2 * budget


CACHES = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gemma3_text": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
    "lfm2": PADDED_AS_BEFORE["lfm2"],
    "qwen3_next": PADDED_AS_BEFORE["qwen3_next"],
}


@pytest.mark.parametrize("name", CACHES)
def test_a_prompt_of_several_rows_is_read_once(name):
    """Whatever its layers keep of the tokens before, and rows get the completions that they get alone."""
    causal, seen = model(name, CACHES[name]), []
    shared = SharedBase(causal, recipe.Base(model="model", dtype="float32"))
    prompts = [[5, 6, 7], [9], [5, 6, 7], [8, 9, 10, 11, 12], [9], [5, 6, 7]]
    batch, uniform = left_pad(prompts, 0), uniforms(range(6), 6, 8, "a seed")

    def completed(prompts: PromptBatch, uniform):
        made = generate(shared, "base", prompts, uniform, end_id=20, pad_id=0)
        return [ids[mask].tolist() for ids, mask in zip(made.completion_ids, made.completion_mask, strict=True)]

    causal.get_input_embeddings().register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape)))
    together = completed(batch, uniform)
    assert seen[0] == (3, 5) and seen[1][0] in (5, 6)
    assert together == [completed(left_pad([ids], 0), uniform[[row]])[0] for row, ids in enumerate(prompts)]
    assert len(set(map(tuple, together))) > 4
