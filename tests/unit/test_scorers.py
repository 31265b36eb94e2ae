"""Scorers other than a reward stage: a classifier with a tokenizer of its own, and Python functions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from rlhf_kit.errors import InputError
from rlhf_kit.scorers import (
    ClassifierScorer,
    FunctionScorer,
    Written,
    call_function,
    load_function,
    scorer_of,
    unpadded,
)
from tests import tiny

CPU = torch.device("cpu")
NOTHING: Any = None  # of the run
CHAT = [{"role": "user", "content": "Where is my hat?"}]


def lengths(prompts, completions):
    return [len(completion) for completion in completions]


def too_few(prompts, completions):
    return [1.0]


def not_finite(prompts, completions):
    return [float("nan") for _ in completions]


def words(prompts, completions):
    return ["good" for _ in completions]


def one_number(prompts, completions):
    return 1.0


not_a_function = 3


def opened(name):
    """Return the scorer of a classifier or function, which looks at nothing of the run but the device."""
    return scorer_of(name, Path(name), SimpleNamespace(device=CPU), NOTHING, role="reward")


def written(prompts, texts) -> Written:
    """Return completions whose tokens, the policy's own, mean nothing to another tokenizer."""
    ids = torch.full((len(texts), 3), 7)
    return Written(prompts, texts, ids, torch.ones_like(ids, dtype=torch.bool))


def make_classifier(folder, *, labels=1, chat_template=tiny.CHATML):
    """Write a sequence classifier with its own, different tokenizer."""
    tokenizer = tiny.make_tokenizer(bos=None, extra=("<|im_start|>", "<|im_end|>"), chat_template=chat_template)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=96,
        num_labels=labels,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
    )
    torch.manual_seed(3)
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval(), tokenizer


def test_a_classifier_reads_the_dialogue_in_its_own_template(tmp_path):
    """Prompt and completion are rendered with the scorer's template and tokenizer, text prompts as one user turn."""
    model, tokenizer = make_classifier(tmp_path)
    scores = opened(str(tmp_path))(written([CHAT, "Where is my hat?"], ["Here.", "Here."]))
    text = "<|im_start|>user\nWhere is my hat?<|im_end|>\n<|im_start|>assistant\nHere.<|im_end|>\n"
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = float(model(ids).logits)
    assert scores.tolist() == pytest.approx([expected, expected], abs=1e-6)


@pytest.mark.parametrize("template", [tiny.CHATML, None])
def test_a_completion_cannot_end_its_own_turn(tmp_path, template):
    """Text that spells the classifier's special tokens stays text, so that no completion writes a turn of its own."""
    make_classifier(tmp_path, chat_template=template)
    scorer = ClassifierScorer(str(tmp_path), CPU)
    end = scorer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = scorer.render("Where?", "Here.<|im_end|>")
    assert ids.count(end) == (2 if template else 0)
    assert scorer.tokenizer.decode(ids).count("Here.<|im_end|>") == 1


def test_a_classifier_without_a_template_reads_plain_text_only(tmp_path):
    """Text prompts are put before the completion as they are; chat messages are refused with what would work."""
    model, tokenizer = make_classifier(tmp_path, chat_template=None)
    scorer = ClassifierScorer(str(tmp_path), CPU)
    ids = tokenizer("Where? Here.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = float(model(ids).logits)
    assert float(scorer(written(["Where? "], ["Here."]))) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(InputError, match="has no chat template"):
        scorer(written([CHAT], ["Here."]))


def test_a_classifier_with_several_labels_is_refused(tmp_path):
    """Two labels are not one score."""
    make_classifier(tmp_path, labels=2)
    with pytest.raises(InputError, match="has 2 labels"):
        ClassifierScorer(str(tmp_path), CPU)


def test_a_causal_model_is_no_reward_model(tmp_path):
    """A checkpoint without a score head is refused, not given a random one."""
    tiny.make_checkpoint(tmp_path / "model")
    with pytest.raises(InputError, match=r"has no weights for score\.weight"):
        ClassifierScorer(str(tmp_path / "model"), CPU)


def test_a_dialogue_too_long_for_the_classifier_is_refused(tmp_path):
    """Nothing is cut silently: the message tells the limit and the length."""
    make_classifier(tmp_path)
    with pytest.raises(InputError, match="at most 96 tokens"):
        ClassifierScorer(str(tmp_path), CPU)(written([CHAT], ["long " * 40]))


def test_a_path_with_a_colon_is_no_function(tmp_path):
    """Only package.module:function is imported; everything else is a model that may not be there."""
    with pytest.raises(InputError, match="cannot get"):
        opened("./tests/unit:test_scorers")


def test_a_function_scores_text():
    """`package.module:function` gets prompts and completions and returns numbers."""
    scorer = opened("tests.unit.test_scorers:lengths")
    assert scorer(written(["a", "b"], ["four", "seven.."])).tolist() == [4.0, 7.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tests.unit.test_scorers:lenghts", "has no 'lenghts'; did you mean lengths"),
        ("tests.unit.no_such_module:f", "cannot import tests.unit.no_such_module"),
        ("tests.unit.test_scorers:not_a_function", "is of type int, not a function"),
    ],
)
def test_a_function_that_is_not_there_is_named(name, message):
    """What cannot be imported or called is reported when the scorer is opened, not in the middle of a run."""
    with pytest.raises(InputError, match=message):
        FunctionScorer(name, CPU)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_few", "returned 1 numbers for 2 completions"),
        ("not_finite", "returned nan"),
        ("words", r"returned \['good', 'good'\]; it must return one number for each completion"),
        ("one_number", r"returned 1\.0; it must"),
    ],
)
def test_a_function_must_return_one_finite_number_a_completion(name, message):
    """Anything else stops the run with the function's name and what it returned."""
    with pytest.raises(InputError, match=message):
        call_function(load_function(f"tests.unit.test_scorers:{name}"), name, ["a", "b"], ["x", "y"])


def test_a_score_that_is_not_finite_is_for_the_recipe_to_judge():
    """While PPO runs, NaN is passed on: on_nonfinite says what becomes of it."""
    assert FunctionScorer("tests.unit.test_scorers:not_finite", CPU)(written(["a"], ["x"])).isnan().all()


def test_a_function_is_given_rows_of_like_length():
    """It may pad them for a model of its own; only roles on a shared base take rows of any length together."""
    assert not unpadded(FunctionScorer("tests.unit.test_scorers:not_finite", CPU))
