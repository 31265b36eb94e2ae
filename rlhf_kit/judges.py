"""Who says which of two answers is better, where no score does: a language model on this machine, or a person.

Both see two answers to one prompt in an order that says nothing. A model is asked in both orders, for it may prefer
the first or the second whatever they say; where its two verdicts differ, that is a tie, and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_kit.artifacts import hash_of
from rlhf_kit.chat_templates import try_template
from rlhf_kit.collate import encode_chat, hide_special_tokens, special_tokens_pattern
from rlhf_kit.data_files import file_rows, short
from rlhf_kit.errors import InputError, did_you_mean, first_line
from rlhf_kit.examples.rows import Prompt
from rlhf_kit.maths import statistics
from rlhf_kit.metrics import progress
from rlhf_kit.model_folders import opened

QUESTION = """Two answers to the same request follow. Which one is better: more helpful, correct and harmless?

Request:
{prompt}

Answer A:
{a}

Answer B:
{b}

Reply with A or B and nothing else."""
VERDICTS = {"a": 1.0, "b": 0.0, "tie": 0.5}


class Judge(Protocol):
    """Verdicts on answers of two systems to the same prompts."""

    name: str

    def verdicts(
        self, pair: str, prompts: Sequence[Prompt], after: Sequence[str], before: Sequence[str]
    ) -> dict[str, Any]:
        """Return how often the first system's answers are the better ones, with its 95 % interval.

        pair: "<after>/<before>", as in the win rates.
        """
        ...


def _rate(wins: Sequence[float]) -> dict[str, Any]:
    interval = statistics.wilson_interval(sum(wins), len(wins)) if wins else (0.0, 1.0)
    rate, ties = (fmean(wins), fmean(win == 0.5 for win in wins)) if wins else (None, None)
    return {"rate": rate, "ci": list(interval), "ties": ties, "prompts": len(wins)}


class LocalJudge:
    """A causal language model from a folder or the Hub, which is asked for A or B.

    Its verdict is the likelier of the two as its next token. Source of the swap: Zheng et al. 2023, "Judging
    LLM-as-a-Judge with MT-Bench and Chatbot Arena", section 3.4.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        """Raises: InputError when it cannot be loaded, or has no two tokens for A and B."""
        self.name = name
        folder = opened(name, setting="--judge")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            self.model = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", trust_remote_code=False, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise InputError(f"--judge: cannot load {name}: {first_line(error)}") from error
        if self.tokenizer.chat_template:
            try_template(self.tokenizer, f"--judge: {name}")
        self.special = special_tokens_pattern(self.tokenizer)
        self.model.to(device).eval().requires_grad_(False)
        self.limit: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        before = "" if self.tokenizer.chat_template else " "
        first, second = (self.tokenizer(before + letter, add_special_tokens=False)["input_ids"] for letter in "AB")
        different = [pair for pair in zip(first, second, strict=False) if pair[0] != pair[1]]
        if not different:
            raise InputError(f"--judge: {name}: its tokenizer has the same tokens for A and B; use another model.")
        self.letters = different[0]
        self.lead = first[: first.index(self.letters[0])]

    def verdicts(
        self, pair: str, prompts: Sequence[Prompt], after: Sequence[str], before: Sequence[str]
    ) -> dict[str, Any]:
        """As `Judge`; "consistent" is the share of prompts on which both orders have the same winner.

        Raises: InputError when a question is longer than the model reads.
        """
        wins, consistent = [], []
        for prompt, one, other in progress(list(zip(prompts, after, before, strict=True)), desc=f"judging {pair}"):
            forward, backward = self._prefers_a(prompt, one, other), not self._prefers_a(prompt, other, one)
            wins.append((forward + backward) / 2)
            consistent.append(forward == backward)
        return {**_rate(wins), "consistent": fmean(consistent)}

    @torch.no_grad()
    def _prefers_a(self, prompt: Prompt, a: str, b: str) -> bool:
        asked = prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
        ids = self._ids(QUESTION.format(prompt=asked.strip(), a=a.strip(), b=b.strip())) + self.lead
        if self.limit is not None and len(ids) > self.limit:
            raise InputError(
                f"--judge: {self.name}: reads {self.limit} tokens at most, but a prompt with two answers has "
                f"{len(ids)}; use a judge with a longer context."
            )
        logits = self.model(torch.tensor([ids], device=self.model.device)).logits[0, -1]
        return bool(logits[self.letters[0]] >= logits[self.letters[1]])

    def _ids(self, question: str) -> list[int]:
        if not self.tokenizer.chat_template:
            return self.tokenizer(f"{question}\n\nThe better answer is", split_special_tokens=True)["input_ids"]
        turns, hidden = hide_special_tokens([{"role": "user", "content": question}], self.special)
        text = str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        return encode_chat(self.tokenizer, text, hidden)


# ---------------------------------------------------------------- people


def blind_pairs(
    pair: str, prompts: Sequence[Prompt], after: Sequence[str], before: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield for each prompt {"id", "prompt", "a", "b"}; which system is `a` follows from the id alone."""
    for prompt, one, other in zip(prompts, after, before, strict=True):
        name = hash_of([pair, prompt, one, other])[:16]
        a, b = (one, other) if _is_after_first(name) else (other, one)
        yield {"id": name, "prompt": prompt, "a": a, "b": b}


def _is_after_first(name: str) -> bool:
    return int(name, 16) % 2 == 0


class HumanJudge:
    """A file of rows {"id", "preferred": a, b or tie}, on the pairs that `blind_pairs` wrote."""

    def __init__(self, path: Path) -> None:
        """Raises: InputError naming the row that is none."""
        if not path.is_file():
            raise InputError(f"--human {path}: there is no such file.")
        self.name, self.path = path.name, path
        self.preferred: dict[str, str] = {}
        for where, cells in file_rows(path):
            name, preferred = cells.get("id"), cells.get("preferred")
            if preferred in (None, ""):
                continue  # not judged
            if not isinstance(name, str) or preferred not in VERDICTS:
                hint = did_you_mean(str(preferred), VERDICTS)
                raise InputError(f"{where}: a row is {{id, preferred: a, b or tie}}; seen {short(cells)}{hint}")
            self.preferred[name] = preferred
        self.met: set[str] = set()

    def verdicts(
        self, pair: str, prompts: Sequence[Prompt], after: Sequence[str], before: Sequence[str]
    ) -> dict[str, Any]:
        """As `Judge`, on the pairs that were judged."""
        wins = []
        for row in blind_pairs(pair, prompts, after, before):
            if row["id"] in self.preferred:
                self.met.add(row["id"])
                share = VERDICTS[self.preferred[row["id"]]]
                wins.append(share if _is_after_first(row["id"]) else 1 - share)
        return _rate(wins)

    def check_all_met(self) -> None:
        """Look whether every verdict was on answers that were given.

        Raises: InputError otherwise: the answers are others by now.
        """
        unknown = self.preferred.keys() - self.met
        if unknown:
            raise InputError(
                f"--human {self.path}: {len(unknown)} of {len(self.preferred)} verdicts are on answers that these "
                f"systems do not give ({', '.join(sorted(unknown)[:3])}); they were written for another run, other "
                "prompts or other options."
            )
