"""Completions of a finished run for any prompts, and scores of any texts, row by row.

What is sampled is what training sampled: the whole distribution, from numbers drawn for each row alone, so the same
seed writes the same completions whatever the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_kit import rollout
from rlhf_kit.collate import left_pad
from rlhf_kit.data_cards import data_suffix, load_card
from rlhf_kit.data_files import file_rows, short
from rlhf_kit.errors import InputError
from rlhf_kit.examples.loading import load_examples, prompts_of
from rlhf_kit.examples.rows import Prompt
from rlhf_kit.finished import FinishedRun, RewardModel
from rlhf_kit.generation import uniforms
from rlhf_kit.metrics import progress
from rlhf_kit.pieces import Pieces
from rlhf_kit.rollout import microbatches
from rlhf_kit.scorers import Written

NEW_TOKENS = 128
"""Of a completion at most, where no stage of the run says."""


def usual_settings(run: FinishedRun) -> tuple[int, float]:
    """Return the length limit, in tokens, and the temperature that the last stage of the run that samples has."""
    sampling = run.recipe.last_sampling()
    return (sampling[1].max_new_tokens, sampling[1].temperature) if sampling else (NEW_TOKENS, 1.0)


def read_prompts(path: Path) -> list[Prompt]:
    """Return the prompts of a file: a .txt with one a line, a data file with a column `prompt`, or a data card.

    Raises: InputError when there is none, naming the row.
    """
    if path.suffix == ".md":
        examples = prompts_of(load_examples(load_card(path)))
        return [row.prompt for row in (*examples.train, *examples.heldout)]
    prompts: list[Prompt]
    if path.suffix == ".txt":
        prompts = [line for line in _text(path).splitlines() if line.strip()]
    else:
        prompts = [_prompt(cells.get("prompt"), where) for where, cells in _rows(path)]
    if not prompts:
        raise InputError(f"{path}: holds no prompt.")
    return prompts


def read_answers(path: Path) -> list[tuple[Prompt, str]]:
    """Return prompts and completions of a data file: columns of these names, or messages that end with an answer.

    Raises: InputError naming the row that has neither.
    """
    answers = []
    for where, cells in _rows(path):
        messages = cells.get("messages")
        if isinstance(messages, list) and len(messages) > 1 and isinstance(messages[-1], dict):
            if messages[-1].get("role") != "assistant":
                raise InputError(f"{where}: messages: the last one is not the assistant's, so there is no answer.")
            cells = {"prompt": messages[:-1], "completion": messages[-1].get("content")}
        if not isinstance(cells.get("completion"), str):
            raise InputError(
                f"{where}: completion: is {short(cells.get('completion'))}; a row is {{prompt, completion}} or "
                "{messages}."
            )
        answers.append((_prompt(cells.get("prompt"), where), cells["completion"]))
    if not answers:
        raise InputError(f"{path}: holds no row.")
    return answers


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    _check_file(path)
    if data_suffix(path) is None:
        raise InputError(
            f"{path}: is no data file; use .jsonl, .json, .csv, .tsv, .parquet or .arrow (also .gz, .zst)."
        )
    return file_rows(path)


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path}: there is no such file.")


def _text(path: Path) -> str:
    _check_file(path)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def _prompt(prompt: Any, where: str) -> Prompt:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt):
        return [{"role": message["role"], "content": message["content"]} for message in prompt]
    raise InputError(f"{where}: prompt: is {short(prompt)}; it is a text, or a list of {{role, content}}.")


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def sampled(
    run: FinishedRun,
    role: str,
    prompts: Sequence[Prompt],
    *,
    count: int,
    limit: int,
    temperature: float,
    seed: int,
    batch_size: int,
    reward: RewardModel | None,
) -> Iterator[dict[str, Any]]:
    """Yield `count` completions of each prompt in turn: prompt, completion, score (with `reward`), length, ended.

    Raises: InputError naming a prompt that leaves no room for `limit` tokens.
    """
    prompt_ids = [fitting_ids(run, prompt, limit, f"prompt {number}") for number, prompt in enumerate(prompts, 1)]
    rows = [number for number in range(len(prompts)) for _ in range(count)]
    uniform = uniforms(range(len(rows)), len(rows), limit, seed, "sample")

    def piece(batch: list[int]) -> list[dict[str, Any]]:
        ids = [prompt_ids[rows[row]] for row in batch]
        asked = [prompts[rows[row]] for row in batch]
        completions, written = rollout.sampled(
            run.shared, role, asked, ids, uniform[batch], run.text_format, temperature
        )
        scores = reward(written) if reward else None
        return [
            {
                "prompt": asked[row],
                "completion": written.texts[row],
                **({} if scores is None else {"score": scores[row]}),
                "length": int(completions.completion_mask[row].sum()),
                "ended": bool(completions.ended[row]),
            }
            for row in range(len(batch))
        ]

    yield from _in_batches(len(rows), Pieces("--batch-size", batch_size, "completions", run.accelerator), piece)


def scored(
    run: FinishedRun, reward: RewardModel, answers: Sequence[tuple[Prompt, str]], *, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Yield prompt, completion and score of each answer.

    Raises: InputError naming an answer that is longer than the base's context.
    """
    text_format, context = run.text_format, run.context
    ids = []
    for number, (prompt, completion) in enumerate(answers, 1):
        row = [*text_format.prompt_ids(prompt), *text_format.completion_ids(prompt, completion)]
        if context is not None and len(row) > context:
            raise InputError(f"row {number}: has {len(row)} tokens, and the base reads {context} at most.")
        ids.append(row)

    def piece(batch: list[int]) -> list[dict[str, Any]]:
        packed = left_pad([ids[row] for row in batch], text_format.pad_id)
        prompts, texts = zip(*(answers[row] for row in batch), strict=True)
        device = run.shared.device
        written = Written(prompts, texts, packed.prompt_ids.to(device), packed.prompt_mask.to(device))
        return [
            {"prompt": prompt, "completion": text, "score": score}
            for prompt, text, score in zip(prompts, texts, reward(written), strict=True)
        ]

    yield from _in_batches(len(ids), Pieces("--batch-size", batch_size, "answers", run.accelerator), piece)


def fitting_ids(run: FinishedRun, prompt: Prompt, limit: int, called: str) -> list[int]:
    """Return a prompt's tokens.

    Raises: InputError when they leave no room for `limit` more in the base's context, or there are none.
    """
    ids, context = run.text_format.prompt_ids(prompt), run.context
    if not ids:
        raise InputError(f"{called}: is empty, and this tokenizer starts texts with no token; write something.")
    if context is not None and len(ids) + limit > context:
        raise InputError(
            f"{called}: has {len(ids)} tokens, and the base reads {context} at most, the {limit} of the answer "
            "included; shorten it, or lower --max-new-tokens."
        )
    return ids


def _in_batches(
    rows: int, pieces: Pieces, work: Callable[[list[int]], list[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    """Yield what `work` makes of the rows, a batch at a time, whose pieces halve when memory runs out."""

    def whole(batch: list[int]) -> list[dict[str, Any]]:
        return pieces.whole(lambda size: [made for piece in microbatches(batch, size) for made in work(piece)])

    with torch.no_grad():
        for batch in progress(list(microbatches(range(rows), pieces.size)), desc=f"{pieces.unit}, batches"):
            yield from whole(batch)
