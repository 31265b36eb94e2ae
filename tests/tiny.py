"""A tiny checkpoint and what a run needs around it, for tests: ordinary files, made in a second.

The model is a random two-layer Llama of width 64 with a byte-level tokenizer (one token a byte, plus special tokens).
Width 64 is the least that 4-bit blocks divide; a random model learns a short fixed answer in a few dozen steps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template as many models have it; goes with `extra=("<|im_start|>", "<|im_end|>")`."""


def make_tokenizer(
    *,
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    pad: str | None = "<pad>",
    unk: str | None = None,
    extra: Sequence[str] = (),
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for every byte and the special tokens named; it writes BOS before a text."""
    special = list(dict.fromkeys(token for token in (pad, bos, eos, unk, *extra) if token is not None))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(special + letters)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    named = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": unk}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=list(extra),
        **{name: token for name, token in named.items() if token is not None},
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def make_checkpoint(
    folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, *, context: int = 128, seed: int = 0, **config: Any
) -> Path:
    """Write the tiny model and its tokenizer (`make_tokenizer()`, unless given) as a checkpoint folder; return it.

    config: overrides fields of `LlamaConfig`.
    """
    tokenizer = make_tokenizer() if tokenizer is None else tokenizer
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**shape, **config}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_card(folder: Path, name: str, kind: str, rows: Sequence[Mapping[str, Any]], **settings: Any) -> Path:
    """Write rows as `folder`/<name>.jsonl and the data card <name>.md that reads them; return the card's path.

    settings: further keys of the card's `rlhf_kit` block, such as heldout=0.25.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    block = {"kind": kind, "source": f"{name}.jsonl", **settings}
    card = folder / f"{name}.md"
    card.write_text(f"---\n{yaml.safe_dump({'license': 'cc0-1.0', 'rlhf_kit': block}, sort_keys=False)}---\n# {name}\n")
    return card


def write_recipe(path: Path, model: Path, stages: Mapping[str, Mapping[str, Any]], **settings: Any) -> Path:
    """Write a recipe over a checkpoint; return its path.

    settings: further top-level keys; `base` given as a mapping joins the model's.
    """
    content = {
        "name": path.stem,
        "seed": 7,
        **settings,
        "base": {"model": str(model), **settings.get("base", {})},
        "adapter": {"r": 4, "alpha": 8.0, **settings.get("adapter", {})},
        "stages": {name: dict(stage) for name, stage in stages.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


QUESTIONS = [
    f"{verb} {thing}?"
    for verb in ("Where is", "May I see", "Who has", "Is this")
    for thing in ("my hat", "the red cup", "a map", "our dog", "the key", "his boat", "that book", "the cake")
]


def demonstrations() -> list[dict[str, str]]:
    """Return 32 short rows that all have the same answer."""
    return [{"prompt": question, "completion": " Yes, here."} for question in QUESTIONS]


def preferences() -> list[dict[str, str]]:
    """Return 32 short pairs in which the polite answer is always the better one."""
    return [{"prompt": question, "chosen": " Yes, here.", "rejected": " No, go away."} for question in QUESTIONS]


def rankings() -> list[dict[str, Any]]:
    """Return 32 rankings of four answers of unlike lengths, politest first, two tied; two annotators in turn."""
    answers = [" Yes, here.", " Perhaps later, when I have the time for it.", " No.", " No, go away."]
    return [
        {"prompt": question, "completions": answers, "ranks": [1, 2, 2, 4], "annotator": "ann" if row % 2 else "bob"}
        for row, question in enumerate(QUESTIONS)
    ]
