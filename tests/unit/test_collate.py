"""Text to tokens: what a tokenizer lacks, where a completion starts, what is too long, what is padding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf_kit import recipe
from rlhf_kit.collate import (
    IGNORED,
    Pair,
    TextFormat,
    compare,
    compared,
    forward_passes,
    left_pad,
    load_text_format,
    pass_cost,
    refuse_special_tokens,
    right_pad,
    tokenise_comparisons,
    tokenise_demonstrations,
    tokenise_prompts,
    within_budget,
)
from rlhf_kit.data_cards import load_card
from rlhf_kit.errors import InputError
from rlhf_kit.examples.loading import load_examples
from rlhf_kit.examples.rows import Demonstration, Preference, PromptRow, Ranking, Text
from tests import tiny
from tests.tiny import CHATML, make_tokenizer

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
QUESTION = [{"role": "user", "content": "Where is it?"}]
REAL = Path(__file__).resolve().parents[3] / "shared" / "assets" / "checkpoints"


def text_format(folder: Path, *, template_file: str | None = None, **tokenizer) -> TextFormat:
    """The format of a tokenizer as `make_tokenizer` makes it, read from its folder as a run does."""
    make_tokenizer(**tokenizer).save_pretrained(folder)
    if template_file is not None:
        (folder / "given.jinja").write_text(template_file)
    template = str(folder / "given.jinja") if template_file is not None else None
    return load_text_format(recipe.Base(model=str(folder), chat_template=template))


def sentencepiece_format(folder: Path) -> TextFormat:
    """The format of a tokenizer that, as Llama's first, begins every text with a space and has tokens like "they▁"."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyzHON.,?:", "\n"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("y", "▁"), (",", "▁")]
    special = ["<unk>", "<s>", "</s>"]
    vocabulary = {token: number for number, token in enumerate(special + letters + [a + b for a, b in merges])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return load_text_format(recipe.Base(model=str(folder)))


def real_format(name: str) -> TextFormat:
    if not (REAL / name).is_dir():
        pytest.skip(f"the real checkpoint {name} is not here")
    return load_text_format(recipe.Base(model=str(REAL / name)))


# ---------------------------------------------------------------- what a tokenizer lacks


@pytest.mark.parametrize(
    ("tokenizer", "pad"),
    [
        ({"pad": "<pad>"}, "<pad>"),
        ({"pad": None, "unk": "<unk>"}, "<unk>"),
        ({"pad": "</s>", "unk": "<unk>"}, "<unk>"),
        ({"pad": None, "extra": ("<|reserved_0|>",)}, "<|reserved_0|>"),
        ({"pad": None, "bos": None, "eos": "<|endoftext|>", "unk": "<|endoftext|>"}, "<|endoftext|>"),
    ],
    ids=["own", "unknown", "own ends completions", "reserved", "only one special token"],
)
def test_padding_token(tmp_path, tokenizer, pad):
    """Padding is the tokenizer's own unless that ends completions, else unknown, else reserved, else the end token."""
    found = text_format(tmp_path, **tokenizer)
    assert found.tokenizer.convert_ids_to_tokens(found.pad_id) == pad == found.tokenizer.pad_token
    assert any(note.startswith(f"padding token: {pad!r}") for note in found.notes)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        ("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {{ eos_token }}{% endfor %}", "</s>"),
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", "</s>"),
        ("{{ raise_exception('only in Latin') }}", "</s>"),
        (None, "</s>"),
    ],
    ids=["end of turn", "eos behind a space", "no special token", "raises", "no template"],
)
def test_end_token(tmp_path, template, end):
    """A completion ends with what the chat template writes after an answer, else with the tokenizer's EOS."""
    found = text_format(tmp_path, extra=CHAT_TOKENS, chat_template=template)
    assert found.tokenizer.convert_ids_to_tokens(found.end_id) == end
    assert found.completion_ids("A", "B")[-1] == found.end_id


def test_nothing_to_end_a_completion_with(tmp_path):
    """A tokenizer without EOS needs a chat template that ends answers."""
    with pytest.raises(InputError, match="nothing ends a completion"):
        text_format(tmp_path / "without", eos=None)
    found = text_format(tmp_path / "with", eos=None, extra=CHAT_TOKENS, chat_template=CHATML)
    assert found.tokenizer.convert_ids_to_tokens(found.end_id) == "<|im_end|>"


def test_missing_tokenizer_is_the_users_error(tmp_path):
    """A folder without a tokenizer gives one message that names it."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match=f"cannot load a tokenizer from {tmp_path}"):
        load_text_format(recipe.Base(model=str(tmp_path)))


# ---------------------------------------------------------------- prompts


def test_text_prompt_stands_as_it_is(tmp_path):
    """A text prompt is never wrapped in a template; the tokenizer's BOS comes before it."""
    found = text_format(tmp_path, extra=CHAT_TOKENS, chat_template=CHATML)
    assert found.prompt_text("Hi ") == "Hi "
    assert found.tokenizer.convert_ids_to_tokens(found.prompt_ids("Hi ")) == ["<s>", "H", "i", "Ġ"]


def test_chat_prompt_goes_through_the_tokenizers_template(tmp_path):
    """Messages are rendered up to where the answer starts, without a second BOS."""
    found = text_format(tmp_path, extra=CHAT_TOKENS, chat_template=CHATML)
    text = "<|im_start|>user\nWhere is it?<|im_end|>\n<|im_start|>assistant\n"
    assert found.prompt_text(QUESTION) == text
    assert found.tokenizer.decode(found.prompt_ids(QUESTION)) == text


def test_recipes_template_replaces_the_tokenizers(tmp_path):
    """A template that the recipe names is used, and the identity says so."""
    found = text_format(
        tmp_path, chat_template=CHATML, template_file="{% for m in messages %}Q {{ m['content'] }} A {% endfor %}"
    )
    assert found.prompt_text(QUESTION) == "Q Where is it? A "
    assert found.identity()["chat_template_origin"] == "recipe"


def test_recipes_template_must_render(tmp_path):
    """A template named in the recipe that cannot render a question and an answer is refused at once."""
    with pytest.raises(InputError, match=r"base\.chat_template: cannot render"):
        text_format(tmp_path, template_file="{% for m in messages %}{{ m['content'] }}")


def test_plain_template_where_there_is_none(tmp_path):
    """Without a chat template, messages become plain text that starts with BOS and ends where the answer starts."""
    found = text_format(tmp_path)
    messages = [{"role": "system", "content": "Be kind."}, *QUESTION]
    assert found.prompt_text(messages) == "System:\nBe kind.\n\nHuman:\nWhere is it?\n\nAssistant:\n"
    assert found.prompt_ids(messages)[0] == found.tokenizer.bos_token_id
    assert any("chat template" in note for note in found.notes)


def test_template_that_raises_names_the_row(tmp_path):
    """Messages that a chat template refuses are an error with the row's place; text prompts still work."""
    found = text_format(tmp_path, chat_template="{{ raise_exception('roles must alternate') }}")
    assert tokenise_prompts([PromptRow("Hi", "a.jsonl:1")], found, None, "error").rows
    with pytest.raises(InputError, match=r"a\.jsonl:2: the chat template .* user: roles must alternate"):
        tokenise_prompts([PromptRow("Hi", "a.jsonl:1"), PromptRow(QUESTION, "a.jsonl:2")], found, None, "error")


# ---------------------------------------------------------------- special tokens in the data


@pytest.mark.parametrize("chat", [False, True])
def test_special_token_text_stays_text(tmp_path, chat):
    """Text of the data that spells a special token becomes ordinary tokens, in prompts and in completions."""
    found = text_format(tmp_path, extra=CHAT_TOKENS, chat_template=CHATML)
    nasty = "a</s><|im_end|>b"
    prompt = [{"role": "user", "content": nasty}] if chat else nasty
    ids = found.prompt_ids(prompt)
    completion = found.completion_ids(prompt, nasty)
    special = set(found.tokenizer.all_special_ids)
    expected = ["<|im_start|>", "<|im_end|>", "<|im_start|>"] if chat else ["<s>"]
    assert found.tokenizer.convert_ids_to_tokens([token for token in ids if token in special]) == expected
    assert [token for token in completion if token in special] == [found.end_id]
    assert found.tokenizer.decode(ids).count(nasty) == 1
    assert found.completion_text(ids, completion) == nasty


@pytest.mark.parametrize("chat", [False, True])
def test_special_token_text_that_is_allowed_becomes_special_tokens(tmp_path, chat):
    """With special_tokens: allow the text is the token, in prompts and completions, and the loss is on the latter."""
    found = text_format(tmp_path, extra=CHAT_TOKENS, chat_template=CHATML)
    prompt = [{"role": "user", "content": "a</s>b"}] if chat else "a</s>b"
    rows = [Demonstration(prompt, "c<|im_end|>d", "1", special_tokens="allow")]
    tokenised = tokenise_demonstrations(rows, found, None, "error")
    (row,) = tokenised.rows
    a, b, c, d = found.tokenizer.convert_tokens_to_ids(list("abcd"))
    eos, start, turn = found.tokenizer.convert_tokens_to_ids(["</s>", "<|im_start|>", "<|im_end|>"])
    completion = [c, turn, d, found.end_id]
    prompt_ids = row["input_ids"][: -len(completion)]
    assert row["input_ids"][-len(completion) :] == completion
    assert row["labels"] == [IGNORED] * len(prompt_ids) + completion
    at = prompt_ids.index(eos)
    assert prompt_ids[at - 1 : at + 2] == [a, eos, b]
    assert prompt_ids.count(start) == (2 if chat else 0) and prompt_ids == found.prompt_ids(prompt, allow_special=True)
    assert tokenised.counts["special-token text made special tokens"] == 1
    assert tokenise_prompts(rows, found, None, "error").rows == [prompt_ids]


@pytest.mark.parametrize("chat", [False, True])
def test_special_token_text_escaped_has_the_ids_of_its_letters(tmp_path, chat):
    """With special_tokens: escape each letter is a token of this vocabulary, and the mask is as of any other text."""
    found = text_format(tmp_path, extra=CHAT_TOKENS, chat_template=CHATML)
    prompt, plain = ([{"role": "user", "content": text}] if chat else text for text in ("a</s>", "axxxx"))
    row, same = tokenise_demonstrations(
        [Demonstration(prompt, "<s>", "1"), Demonstration(plain, "xxx", "2")], found, None, "error"
    ).rows
    letters = found.tokenizer.convert_tokens_to_ids(list("a</s>"))
    assert " ".join(map(str, letters)) in " ".join(map(str, row["input_ids"]))
    assert row["labels"][-4:] == [*found.tokenizer.convert_tokens_to_ids(list("<s>")), found.end_id]
    assert [label == IGNORED for label in row["labels"]] == [label == IGNORED for label in same["labels"]]


@pytest.mark.parametrize("chat", [False, True])
def test_special_token_text_that_is_refused_is_an_error_with_the_rows(tmp_path, chat):
    """With special_tokens: refuse, in whichever text of a row it stands; of prompts, the prompts count."""
    found = text_format(tmp_path, extra=CHAT_TOKENS, chat_template=CHATML)
    prompt, plain = ([{"role": "user", "content": text}] if chat else text for text in ("a</s>", "a"))
    rows = [
        Demonstration(prompt, "b", "x.jsonl:1", special_tokens="refuse"),
        Demonstration(plain, "b<|im_end|>", "x.jsonl:2", special_tokens="refuse"),
        Demonstration(plain, "b", "x.jsonl:3", special_tokens="refuse"),
    ]
    for refused in (
        lambda: tokenise_demonstrations(rows, found, None, "error"),
        lambda: refuse_special_tokens(rows, found),
    ):
        with pytest.raises(InputError, match=r"^2 of 3 rows spell special tokens .*: x\.jsonl:1; x\.jsonl:2\."):
            refused()
    with pytest.raises(InputError, match=r"^1 of 3 rows .* x\.jsonl:1\. .*special_tokens: escape"):
        tokenise_prompts(rows, found, None, "error")
    pairs = [Preference(plain, "b", "c</s>", "p:1", special_tokens="refuse")]
    with pytest.raises(InputError, match="p:1"):
        tokenise_comparisons(pairs, found, None, "error")
    with pytest.raises(InputError, match="t:1"):
        tokenise_demonstrations([Text("</s>", "t:1", special_tokens="refuse")], found, None, "error")
    refuse_special_tokens([Text("</s>", "t:1"), rows[2]], found)


def test_marks_in_the_data_are_text(tmp_path):
    """The characters that stand for hidden special-token text are kept as they are where the data has them."""
    found = text_format(tmp_path, extra=CHAT_TOKENS, chat_template=CHATML)
    nasty = "\ue0007\ue001</s>\ue000"
    prompt = [{"role": "user", "content": nasty}]
    ids = found.prompt_ids(prompt)
    assert found.tokenizer.decode(ids).count(nasty) == 1
    assert found.completion_text(ids, found.completion_ids(prompt, nasty)) == nasty


def test_special_token_text_is_counted(tmp_path):
    """Rows whose text spells special tokens are counted."""
    rows = [Demonstration("a", "b</s>", "1"), Demonstration("a", "b", "2")]
    assert tokenise_demonstrations(rows, text_format(tmp_path), None, "error").counts == {
        "rows": 2,
        "kept": 2,
        "special-token text kept as text": 1,
        "tokens": 8 + 4,
    }


def test_text_the_tokenizer_changes_is_counted(tmp_path):
    """Rows whose completions hold characters that the vocabulary lacks are counted; spaces do not count."""
    rows = [Demonstration("a ", text, "1") for text in (" here", "here", "it’s here", "here\n")]
    found = sentencepiece_format(tmp_path)
    tokenised = tokenise_demonstrations(rows, found, None, "error")
    assert tokenised.counts["text changed by the tokenizer"] == 1
    pairs = [Preference("a ", "here", "it’s", "1"), Preference("a ", "here", "it is", "2")]
    assert tokenise_comparisons(pairs, found, None, "error").counts["text changed by the tokenizer"] == 1
    assert str(tokenised) == "4 of 4 rows, 39 tokens, 1 text changed by the tokenizer"


# ---------------------------------------------------------------- where a completion starts


@pytest.mark.parametrize("name", ["made here", "TinyStories-656K", "stories260K"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("One day, they ", "went home."),
        ("One day, they", " went home."),
        ("One day, th", "ey went home."),
        ("One day,\n", "\nthey went home."),
        (QUESTION, "Here."),
        (QUESTION, " Here."),
    ],
)
def test_completion_text_comes_back(tmp_path, name, prompt, completion):
    """What is tokenised behind a prompt reads back as the same text, wherever the border cuts."""
    found = sentencepiece_format(tmp_path) if name == "made here" else real_format(name)
    ids = found.prompt_ids(prompt)
    assert found.completion_text(ids, found.completion_ids(prompt, completion)) == completion


def test_prompt_never_depends_on_the_completion(tmp_path):
    """Where a token would cross the border, the prompt keeps the tokens it has alone."""
    found = sentencepiece_format(tmp_path)
    together = found.tokenizer("One day, they went")["input_ids"]
    prompt, completion = found.prompt_ids("One day, t"), found.completion_ids("One day, t", "hey went")
    assert together[: len(prompt)] != prompt
    assert found.tokenizer.decode(prompt + completion[:-1]) == found.tokenizer.decode(together)


def test_completion_without_end_token_reads_back(tmp_path):
    """A completion that stopped at its limit loses no token, and special tokens in it show."""
    found = text_format(tmp_path)
    prompt, completion = found.prompt_ids("A"), found.completion_ids("A", "bc")[:-1]
    assert found.completion_text(prompt, completion) == "bc"
    assert found.completion_text(prompt, [*completion, found.pad_id]) == "bc<pad>"


# ---------------------------------------------------------------- rows


def test_loss_is_on_the_completion_only(tmp_path):
    """Labels are the completion's tokens and its end token; of a text without prompt, all tokens."""
    found = text_format(tmp_path)
    rows = tokenise_demonstrations([Demonstration("ab", "cd", "1"), Text("ab", "2")], found, None, "error").rows
    s, e, a, b, c, d = found.tokenizer.convert_tokens_to_ids(["<s>", "</s>", "a", "b", "c", "d"])
    assert rows[0] == {"input_ids": [s, a, b, c, d, e], "labels": [IGNORED] * 3 + [c, d, e]}
    assert rows[1] == {"input_ids": [s, a, b, e], "labels": [s, a, b, e]}


def test_too_long_is_an_error_with_the_rows(tmp_path):
    """`truncate: error` names the rows, their lengths and what would work."""
    rows = [Demonstration("abcd", "ef", f"x.jsonl:{line}") for line in range(1, 9)] + [Demonstration("a", "e", "short")]
    with pytest.raises(InputError) as error:
        tokenise_demonstrations(rows, text_format(tmp_path), 7, "error")
    message = str(error.value)
    assert "8 of 9 rows are longer than 7 tokens: x.jsonl:1 (8 tokens);" in message
    assert "x.jsonl:5" in message and "x.jsonl:6" not in message and "left_prompt" in message


def test_dropped_rows_are_counted(tmp_path):
    """`truncate: drop` leaves long rows out, counts them, and says which rows were kept."""
    rows = [Demonstration("abcd", "ef", "1"), Demonstration("a", "e", "2")]
    tokenised = tokenise_demonstrations(rows, text_format(tmp_path), 7, "drop")
    assert tokenised.kept == [1] and len(tokenised.rows) == 1
    assert tokenised.counts == {"rows": 2, "kept": 1, "dropped: longer than 7 tokens": 1, "tokens": 4}


def test_left_prompt_cuts_prompts_and_keeps_bos(tmp_path):
    """`truncate: left_prompt` drops the prompt's first tokens behind BOS; completions stay whole."""
    found = text_format(tmp_path)
    tokenised = tokenise_demonstrations([Demonstration("abcd", "ef", "1")], found, 6, "left_prompt")
    ids = found.tokenizer.convert_tokens_to_ids(["<s>", "c", "d", "e", "f", "</s>"])
    assert tokenised.rows == [{"input_ids": ids, "labels": [IGNORED] * 3 + ids[3:]}]
    assert tokenised.counts["prompt cut"] == 1


def test_completion_too_long_alone_is_dropped_and_counted(tmp_path):
    """A completion that leaves no room for any prompt is not cut: its row is left out."""
    rows = [Demonstration("ab", "cdefgh", "1"), Demonstration("a", "e", "2")]
    tokenised = tokenise_demonstrations(rows, text_format(tmp_path), 7, "left_prompt")
    assert tokenised.kept == [1] and tokenised.counts["dropped: longer than 7 tokens"] == 1


def test_none_left_is_an_error(tmp_path):
    """Dropping every row is an error."""
    with pytest.raises(InputError, match="none of the 1 rows is at most 3 tokens long"):
        tokenise_demonstrations([Demonstration("ab", "cd", "1")], text_format(tmp_path), 3, "drop")


def test_completions_share_one_cut_prompt(tmp_path):
    """All completions keep the same part of the prompt: what the longest leaves room for."""
    found = text_format(tmp_path)
    rows = [Preference("abcd", "e", "fgh", "1"), Ranking("abcd", ["e", "f", "gh"], [2.0, 3.0, 1.0], "2")]
    pair, ranking = tokenise_comparisons(rows, found, 7, "left_prompt").rows
    assert [found.tokenizer.decode(ids) for ids in pair["completions"]] == ["<s>cde</s>", "<s>cdfgh</s>"]
    assert [found.tokenizer.decode(ids) for ids in ranking["completions"]] == [
        "<s>bcde</s>",
        "<s>bcdf</s>",
        "<s>bcdgh</s>",
    ]
    assert (pair["prompt_tokens"], ranking["prompt_tokens"]) == (3, 4)


def test_a_pair_is_a_ranking_of_two(tmp_path):
    """The same comparison as a preference and as a ranking gives the same row."""
    rows = [
        Preference("Q", "better", "worse", "1", annotator="ann"),
        Ranking("Q", ["better", "worse"], [1.0, 2.0], "2", annotator="ann"),
    ]
    pair, ranking = tokenise_comparisons(rows, text_format(tmp_path), None, "error").rows
    assert pair == ranking
    assert {name: pair[name] for name in ("best", "chosen", "rejected", "probability", "margin", "annotator")} == {
        "best": 0, "chosen": [0], "rejected": [1], "probability": [1.0], "margin": [0.0], "annotator": "ann"
    }  # fmt: skip


def test_the_better_one_is_chosen():
    """A pair is turned round where its label says that the other one is better, and margins grow with the ratings."""
    found = compared(Preference("Q", "a", "b", "1", margin=0.5, probability=0.25))
    assert (found.completions, found.best, found.pairs) == (["a", "b"], 1, [Pair(1, 0, 0.75, 0.5)])
    # ranks 2, 1, 2 from ratings 3, 7, 3 on a scale of which a point is worth .25
    found = compared(Ranking("Q", ["a", "b", "c"], [2.0, 1.0, 2.0], "1", [3.0, 7.0, 3.0], None, 0.25))
    assert found.best == 1
    assert found.pairs == [Pair(1, 0, 1.0, 1.0), Pair(0, 2, 0.5, 0.0), Pair(1, 2, 1.0, 1.0)]


def test_a_card_says_what_a_point_of_the_ratings_is_worth(tmp_path):
    """margin_per_point of a card of rankings reaches the pairs; changing it changes the data's hash."""
    rows = [{"prompt": f"Q{n}", "completions": ["a", "b"], "ratings": [1, 5]} for n in range(4)]
    cards = [
        load_examples(load_card(tiny.write_card(tmp_path, name, "rankings", rows, heldout=0.5, **settings)))
        for name, settings in (("with", {"margin_per_point": 0.25}), ("without", {}))
    ]
    assert [compared(found.train[0]).pairs for found in cards] == [[Pair(1, 0, 1.0, 1.0)], [Pair(1, 0, 1.0, 0.0)]]
    assert cards[0].content_hash != cards[1].content_hash


def test_ties_are_left_out_or_soft(tmp_path):
    """Tied pairs and prompts with no other are left out and counted, or kept as even odds."""
    found = text_format(tmp_path)
    rows = [
        Ranking("P", ["a", "b", "c"], [1.0, 1.0, 3.0], "1"),
        Ranking("Q", ["a", "b"], [1.0, 1.0], "2"),
        Preference("R", "a", "b", "3", probability=0.5),
    ]
    dropped = tokenise_comparisons(rows, found, None, "error", "drop")
    assert [(row["chosen"], row["rejected"]) for row in dropped.rows] == [([0, 1], [2, 2])]
    assert dropped.counts == {"rows": 3, "kept": 1, "tokens": 12, "tied pairs left out": 3, "dropped: all tied": 2}
    soft = tokenise_comparisons(rows, found, None, "error", "soft")
    assert [row["probability"] for row in soft.rows] == [[0.5, 1.0, 1.0], [0.5], [0.5]]
    with pytest.raises(InputError, match="all 2 rows are ties, which teach no order; set ties: soft"):
        tokenise_comparisons(rows[1:], found, None, "error", "drop")


def test_prompts_are_cut_to_their_limit(tmp_path):
    """Prompts of any kind of row are tokenised, and cut where asked."""
    found = text_format(tmp_path)
    tokenised = tokenise_prompts([PromptRow("abcd", "1"), Demonstration("e", "f", "2")], found, 3, "left_prompt")
    assert [found.tokenizer.decode(row) for row in tokenised.rows] == ["<s>cd", "<s>e"]
    assert tokenised.counts == {"rows": 2, "kept": 2, "prompt cut": 1, "tokens": 5}


# ---------------------------------------------------------------- padding


def test_masks_come_from_lengths_not_from_pad_ids():
    """A real token that equals the pad id is real."""
    batch = left_pad([[5, 0], [0, 7, 0]], 0)
    assert batch.prompt_ids.tolist() == [[0, 5, 0], [0, 7, 0]]
    assert batch.prompt_mask.tolist() == [[False, True, True], [True, True, True]]
    ids, mask = right_pad([[5, 0], [0, 7, 0]], 0)
    assert ids.tolist() == [[5, 0, 0], [0, 7, 0]] and ids.dtype == torch.int64
    assert mask.tolist() == [[True, True, False], [True, True, True]]


# ---------------------------------------------------------------- identity


def test_identity_survives_use_and_tells_formats_apart(tmp_path):
    """The identity is that of the files, not of what was tokenised since; another vocabulary or template changes it."""
    found = text_format(tmp_path / "one", extra=CHAT_TOKENS, chat_template=CHATML)
    before = found.identity()
    found.completion_ids(QUESTION, "</s>")
    found.tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert (
        found.identity() == before == text_format(tmp_path / "two", extra=CHAT_TOKENS, chat_template=CHATML).identity()
    )
    other = text_format(tmp_path / "three", extra=(*CHAT_TOKENS, "<|x|>"), chat_template=CHATML + "\n").identity()
    assert {key for key in before if before[key] != other[key]} == {"sha256", "chat_template_sha256"}


# ---------------------------------------------------------------- batches by tokens


def cost(passes: list[list[int]], lengths: list[int]) -> int:
    return sum(len(rows) * max(lengths[row] for row in rows) + pass_cost() for rows in passes)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=7), st.integers(1, 900))
def test_no_other_passes_take_less_time(lengths, budget):
    """Of all ways to cut the rows, sorted by length, into passes within the budget none costs less; no row is lost."""
    passes = forward_passes(lengths, budget)
    order = [row for rows in passes for row in rows]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[row] for row in order] == sorted(lengths, reverse=True)
    assert all(len(rows) == 1 or len(rows) * lengths[rows[0]] <= budget for rows in passes)
    least = min(
        cost(cut, lengths)
        for ends in itertools.product((False, True), repeat=len(order) - 1)
        for cut in [_cut(order, ends)]
        if all(len(rows) == 1 or len(rows) * lengths[rows[0]] <= budget for rows in cut)
    )
    assert cost(passes, lengths) == least


def _cut(order: list[int], ends: Sequence[bool]) -> list[list[int]]:
    cut = [[order[0]]]
    for row, begins in zip(order[1:], ends, strict=True):
        if begins:
            cut.append([])
        cut[-1].append(row)
    return cut


@pytest.fixture
def on_a_cpu(monkeypatch) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)


def test_passes_by_hand(on_a_cpu):
    """Two long and three short rows: apart they cost 2 x 100 + 3 x 10 + 2 x 64 = 358, together 500 + 64."""
    assert forward_passes([10, 100, 10, 100, 10]) == [[1, 3], [0, 2, 4]]
    assert forward_passes([10, 12, 11]) == [[1, 2, 0]]


def test_lists_stay_within_the_budget():
    """Largest first; one that is larger than the budget is alone."""
    assert within_budget([3, 9, 1, 4, 2], 6) == [[1], [3], [0, 4, 2]]
    assert within_budget([5, 5], 10) == [[0, 1]]


def test_comparisons_point_at_their_completions(tmp_path, on_a_cpu):
    """Each completion is there once, and each pair finds its two among the passes, whatever their order."""
    found = text_format(tmp_path)
    rows = [
        Ranking("abc", ["d" * 80, "e", "f"], [3.0, 1.0, 2.0], "1"),
        Preference("g", "h" * 70, "i", "2", margin=0.5),
    ]
    groups = tokenise_comparisons(rows, found, None, "error").rows
    made = compare(groups, found.pad_id)
    texts = [
        found.tokenizer.decode(ids[mask])
        for passed, masks in zip(made.ids, made.mask, strict=True)
        for ids, mask in zip(passed, masks, strict=True)
    ]
    assert [ids.shape for ids in made.ids] == [(2, 85), (3, 6)]  # long ones share a pass, short ones another
    assert sorted(texts) == sorted(found.tokenizer.decode(ids) for group in groups for ids in group["completions"])
    pairs = list(zip(made.chosen.tolist(), made.rejected.tolist(), strict=True))
    long, short = "<s>abc" + "d" * 80 + "</s>", "<s>abcf</s>"
    assert [(texts[a], texts[b]) for a, b in pairs] == [
        ("<s>abce</s>", long),
        (short, long),
        ("<s>abce</s>", short),
        ("<s>g" + "h" * 70 + "</s>", "<s>gi</s>"),
    ]
    assert made.prompt.tolist() == [0, 0, 0, 1]
    assert made.margin.tolist() == [0, 0, 0, 0.5]
    learnt = [
        found.tokenizer.decode(ids[mask])
        for passed, masks in zip(made.ids, made.learnt, strict=True)
        for ids, mask in zip(passed, masks, strict=True)
        if mask.any()
    ]
    assert sorted(learnt) == sorted(["e</s>", "h" * 70 + "</s>"])  # the best one's own tokens, and its end
