"""What a recipe needs around it, as files made without torch: for tests of what is read before a model is loaded.

The checkpoint looks like one, with a tokenizer that works (one token a byte), and weights that nobody loads.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

RECIPE = """\
name: plain
base:
  model: model
stages:
  sft:
    kind: sft
    data: shown.md
  reward:
    kind: reward
    init: sft
    data: pairs.md
  ppo:
    kind: ppo
    policy: sft
    reward: reward
    prompts: asked.md
    kl_coef: 0.05
    max_new_tokens: 32
"""
"""A recipe without a fault, for `make_workplace`; the tests name its lines."""

CARD = "---\nlicense: cc0-1.0\nrlhf_kit:\n  kind: {kind}\n  source: {name}.jsonl\n---\nMade for a test.\n"
QUESTIONS = [f"Where is the {thing}?" for thing in ("hat", "cup", "map", "dog", "key", "boat", "book", "cake")]


def write_safetensors(path: Path, **shapes: tuple[int, ...]) -> None:
    """Write a weights file of float32 zeros."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def write_model(folder: Path, *, context: int = 128) -> Path:
    """Write a checkpoint folder and return it."""
    folder.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": context}
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", **{"model.embed_tokens.weight": (256, 4)})
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def write_jsonl(path: Path, rows: list) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_workplace(folder: Path) -> Path:
    """Write recipe.yaml, its checkpoint, cards and data into a folder, all without a fault; return the recipe."""
    folder.mkdir(exist_ok=True)
    write_model(folder / "model")
    for name, kind in (("shown", "demonstrations"), ("pairs", "preferences"), ("asked", "prompts")):
        (folder / f"{name}.md").write_text(CARD.format(kind=kind, name=name))
    write_jsonl(folder / "shown.jsonl", [{"prompt": q, "completion": " Here."} for q in QUESTIONS])
    write_jsonl(folder / "pairs.jsonl", [{"prompt": q, "chosen": " Here.", "rejected": " No."} for q in QUESTIONS])
    write_jsonl(folder / "asked.jsonl", [{"prompt": q} for q in QUESTIONS])
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder / "recipe.yaml"
