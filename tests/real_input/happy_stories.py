"""Happier stories: data for the chain on a real pretrained story model, labelled by an outside scorer.

A story's first sentence is the prompt, the next few are the completion. Two continuations are sampled from the base
model for each prompt, and the outside scorer (a word count that training never sees) draws the label by Bradley–Terry.
`write_data` makes the files that the cards beside this module name.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HAPPY = set(
    """amazing beautiful best brave bright celebrated cheered delicious enjoyed excited favorite friend friends fun
    glad good great grin happily happy hug hugged kind laugh laughed laughing love loved lovely nice play played
    playing pretty proud safe share shared smile smiled smiling special thank thanked wonderful yay yummy""".split()
)
SAD = set(
    """afraid alone angry bad broke broken cold cried cry crying dead died fell fight hate hated hurt lost mad mean
    naughty never pain sad scared scary sick sorry stuck tears tired ugly unhappy upset worried yelled""".split()
)
PROMPT_TOKENS, COMPLETION_TOKENS = 40, 46
LABEL_TEMPERATURE = 0.15


def score(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Return how happy each story is: (happy words - sad words) / sqrt(words), so that length alone earns nothing."""
    return [_happiness(completion) for completion in completions]


def _happiness(text: str) -> float:
    words = re.findall(r"[a-z]+", text.lower())
    return sum((word in HAPPY) - (word in SAD) for word in words) / math.sqrt(max(8, len(words)))


def split_story(text: str, tokenizer) -> tuple[str, str] | None:
    """Return a story's first sentence and as many of the next as fit, or None where either is too long."""
    first, *rest = re.split(r"(?<=[.!?]) ", text.replace("\n", " "))
    prompt, completion = first + " ", ""  # this tokenizer's tokens carry the following space
    for sentence in rest:
        longer = f"{completion} {sentence}".strip()
        if len(tokenizer(longer)["input_ids"]) > COMPLETION_TOKENS:
            break
        completion = longer
    fits = completion and len(tokenizer(prompt)["input_ids"]) <= PROMPT_TOKENS
    return (prompt, completion) if fits else None


def write_data(folder: Path, checkpoint: Path, stories: Path, *, pairs: int = 2000, seed: int = 0) -> None:
    """Write demonstrations.jsonl, preferences.jsonl and prompts.jsonl into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    texts = [json.loads(line)["text"] for line in stories.read_text(encoding="utf-8").splitlines()]
    demonstrations = [split for text in texts if (split := split_story(text, tokenizer)) is not None]
    _write(folder / "demonstrations.jsonl", [{"prompt": p, "completion": c} for p, c in demonstrations])
    prompts = list(dict.fromkeys(prompt for prompt, _ in demonstrations))
    _write(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])

    asked = [prompts[row % len(prompts)] for row in range(pairs)]
    first, second = (sample_stories(checkpoint, tokenizer, asked, seed=seed + half) for half in range(2))
    labels = random.Random(seed)
    rows = []
    for prompt, a, b in zip(asked, first, second, strict=True):
        if a == b or not a or not b:
            continue
        wins = 1 / (1 + math.exp((_happiness(b) - _happiness(a)) / LABEL_TEMPERATURE))
        chosen, rejected = (a, b) if labels.random() < wins else (b, a)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    _write(folder / "preferences.jsonl", rows)


@torch.no_grad()
def sample_stories(checkpoint: Path, tokenizer, prompts: Sequence[str], *, seed: int, batch: int = 128) -> list[str]:
    """Return one continuation a prompt from the pretrained model, sampled at temperature 1."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    torch.manual_seed(seed)
    stories: list[str] = []
    for start in range(0, len(prompts), batch):
        inputs = tokenizer(list(prompts[start : start + batch]), return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
        ids = model.generate(
            **inputs, max_new_tokens=COMPLETION_TOKENS, do_sample=True, top_k=0, pad_token_id=tokenizer.pad_token_id
        )
        stories += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [story.strip() for story in stories]


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
