"""Text to tokens: chat template, tokenisation, truncation, padding; the only place that makes masks.

Every stage sees a dialogue as the same tokens: prompt ids, then completion ids that end with the end token. The ids of
a prompt never depend on the completion, for PPO knows only the prompt. What a tokenizer lacks (a padding token, a chat
template) is chosen here, and `TextFormat.notes` says what and why. Text of the data that spells a special token
("</s>") stays text unless its card says otherwise: only the template, the tokenizer's BOS and the end token put special
tokens into a row.

Not here: packing several rows into one, chunking long texts, tools and thinking blocks of chat templates.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, combinations
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_kit import recipe
from rlhf_kit.batches import Comparisons, PromptBatch
from rlhf_kit.chat_templates import try_template
from rlhf_kit.errors import InputError, first_line
from rlhf_kit.examples.rows import (
    Demonstration,
    Preference,
    Prompt,
    PromptRow,
    Ranking,
    Text,
    probability_of,
    refusal,
    refused_rows,
    texts_of,
)
from rlhf_kit.model_folders import opened
from rlhf_kit.settings import read_text

IGNORED = -100
"""The label of a token without a loss."""

PLAIN_TEMPLATE = (
    "{% set names = {'system': 'System', 'user': 'Human', 'assistant': 'Assistant'} %}"
    "{% for message in messages %}{{ names[message['role']] + ':\n' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
"""For chat prompts where the tokenizer has no template. Names end with a newline, not with a space, because tokenizers
disagree about which side of a word a space belongs to."""

_PAD_NAME = re.compile(r"pad|reserved|unused", re.IGNORECASE)
_PROBE = "\ue002"  # private use: in no template
_MARKS = re.compile("[\ue000\ue001]")
_HIDDEN = re.compile("\ue000(\\d+)\ue001")


# ---------------------------------------------------------------- a tokenizer and its habits


@dataclass(frozen=True)
class TextFormat:
    """A tokenizer and how prompts and completions become tokens."""

    tokenizer: PreTrainedTokenizerBase
    pad_id: int
    """Fills rows up; may equal the end token, for masks come from lengths."""
    end_id: int
    """Ends every completion."""
    start_ids: tuple[int, ...]
    """What the tokenizer puts before a text: its BOS token or nothing. A real chat template writes its own."""
    template_origin: Literal["recipe", "tokenizer", "plain"]
    notes: tuple[str, ...]
    """What was chosen and why."""

    def prompt_text(self, prompt: Prompt) -> str:
        """Return a text prompt as it is, chat messages through the chat template up to where the answer starts.

        Raises: InputError when the template cannot render the messages.
        """
        return prompt if isinstance(prompt, str) else self._render(prompt)

    def prompt_ids(self, prompt: Prompt, *, allow_special: bool = False) -> list[int]:
        """Return the prompt's tokens; a completion's come right behind them.

        allow_special: text that spells a special token becomes that token; here as in the methods below.
        """
        if isinstance(prompt, str):
            return [*self.start_ids, *self._encode(prompt, special=allow_special)]
        ids = self._encode_chat(*self._render_hiding(prompt, allow_special))
        return [*self.start_ids, *ids] if self.template_origin == "plain" else ids

    def completion_ids(self, prompt: Prompt, completion: str, *, allow_special: bool = False) -> list[int]:
        """Return the completion's tokens, the end token last, to stand behind `prompt_ids(prompt)`.

        Prompt and completion are tokenised together where that leaves the prompt's tokens unchanged; where a token
        would cross the border, the completion is tokenised behind a newline, so that no space is added before it.
        """
        if isinstance(prompt, str):
            before = self._encode(prompt, special=allow_special)
            together = self._encode(prompt + completion, special=allow_special)
        else:
            text, hidden = self._render_hiding(prompt, allow_special)
            before = self._encode_chat(text, hidden)
            apart = not allow_special and (self.spells_special(completion) or _MARKS.search(completion))
            together = [] if apart else self._encode_chat(text + completion, hidden)
        if together[: len(before)] == before and len(together) > len(before):
            return [*together[len(before) :], self.end_id]
        newline, behind = self._encode("\n"), self._encode("\n" + completion, special=allow_special)
        if behind[: len(newline)] == newline:
            return [*behind[len(newline) :], self.end_id]
        return [*self._encode(completion, special=allow_special), self.end_id]

    def text_ids(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Return the tokens of a whole text, the end token last."""
        return [*self.start_ids, *self._encode(text, special=allow_special), self.end_id]

    def completion_text(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> str:
        """Return what the completion adds to the prompt's text, without its end token; other special tokens show."""
        completion = list(completion_ids)
        if completion and completion[-1] == self.end_id:
            completion.pop()
        before, whole = self._decode(prompt_ids), self._decode([*prompt_ids, *completion])
        return whole.removeprefix(before) if whole.startswith(before) else self._decode(completion)

    def completion_texts(self, prompts: Sequence[Sequence[int]], ids: Tensor, mask: Tensor) -> list[str]:
        """Return `completion_text` of each row of `ids` [B, C], whose real tokens `mask` [B, C] shows."""
        rows = zip(prompts, ids, mask, strict=True)
        return [self.completion_text(prompt, completion[real].tolist()) for prompt, completion, real in rows]

    def spells_special(self, text: str) -> bool:
        """Whether the text holds the name of a special token."""
        return self._special.search(text) is not None

    def changes(self, text: str, ids: Sequence[int]) -> bool:
        """Whether the tokens read back as another text, spaces aside: characters that the vocabulary lacks, say."""
        return "".join(self._decode(ids).split()) != "".join(text.split())

    def identity(self) -> dict[str, Any]:
        """Return what makes two formats the same one: tokenizer, vocabulary, chat template, padding and end token."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = json.dumps(self.tokenizer.get_vocab(), sort_keys=True) if backend is None else _content(backend)
        template = self.tokenizer.chat_template
        return {
            "class": type(self.tokenizer).__name__,
            "sha256": _sha256(vocabulary),
            "chat_template_sha256": _sha256(template if isinstance(template, str) else json.dumps(template)),
            "chat_template_origin": self.template_origin,
            "pad_token": self.tokenizer.convert_ids_to_tokens(self.pad_id),
            "end_token": self.tokenizer.convert_ids_to_tokens(self.end_id),
            "notes": list(self.notes),
        }

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return special_tokens_pattern(self.tokenizer)

    def _encode(self, text: str, *, special: bool = False) -> list[int]:
        return encode(self.tokenizer, text, special=special)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _render(self, messages: Sequence[dict[str, str]]) -> str:
        try:
            return _rendered(self.tokenizer, messages, add_generation_prompt=True)
        except Exception as error:  # a template is somebody's program
            raise InputError(
                f"the chat template ({self.template_origin}) cannot render roles "
                f"{', '.join(message['role'] for message in messages)}: {first_line(error)}"
            ) from error

    def _render_hiding(self, messages: Sequence[dict[str, str]], allow_special: bool) -> tuple[str, list[str]]:
        """Return the rendered messages with special-token text of their contents taken out, and what was taken out."""
        safe, hidden = (messages, []) if allow_special else hide_special_tokens(messages, self._special)
        return self._render(safe), hidden

    def _encode_chat(self, text: str, hidden: Sequence[str]) -> list[int]:
        return encode_chat(self.tokenizer, text, hidden)


# ---------------------------------------------------------------- special tokens, and text that spells them


def special_tokens_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return what finds the text of a special token, of the longest one where several begin."""
    names = sorted(map(re.escape, _special_tokens(tokenizer)), key=len, reverse=True)
    return re.compile("|".join(names) or r"(?!)")


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    """Return the tokens of a text and no more; with `special`, text that spells a special token becomes that token."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=not special, verbose=False)["input_ids"]


def hide_special_tokens(
    messages: Sequence[dict[str, str]], special: re.Pattern[str]
) -> tuple[list[dict[str, str]], list[str]]:
    """Return the messages with the special-token text of their contents taken out, and what was taken out, in order.

    Marks stand in its place; characters of the data that look like marks are taken out too.
    """
    hidden: list[str] = []
    taken_out = re.compile(f"{special.pattern}|{_MARKS.pattern}")

    def hide(match: re.Match[str]) -> str:
        hidden.append(match[0])
        return f"\ue000{len(hidden) - 1}\ue001"

    return [{**message, "content": taken_out.sub(hide, message["content"])} for message in messages], hidden


def encode_chat(tokenizer: PreTrainedTokenizerBase, text: str, hidden: Sequence[str]) -> list[int]:
    """Return the tokens of a rendered chat; what `hide_special_tokens` took out is put back as text."""
    if not hidden:
        return encode(tokenizer, text, special=True)
    pieces = _HIDDEN.split(text)  # template text and numbers of hidden pieces in turn
    ids: list[int] = []
    for index, piece in enumerate(pieces):
        if piece:
            ids += encode(tokenizer, hidden[int(piece)] if index % 2 else piece, special=not index % 2)
    return ids


# ---------------------------------------------------------------- what a tokenizer lacks


def load_text_format(base: recipe.Base) -> TextFormat:
    """Return the base model's tokenizer with what it lacks chosen.

    The end token is what the chat template writes right after an answer, where that is one special token, else the
    tokenizer's EOS. The padding token is the tokenizer's own unless that ends completions too, else its unknown token,
    else a reserved one, else the end token.

    Raises:
        InputError: there is no tokenizer, or nothing to end a completion with.
    """
    trust = base.trust_remote_code
    folder = opened(base.model, base.revision, setting="base.model", trust_remote_code=trust, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise InputError(f"base.model: cannot load a tokenizer from {base.model}: {first_line(error)}") from error
    notes = []
    origin: Literal["recipe", "tokenizer", "plain"] = "tokenizer"
    if base.chat_template is not None:
        tokenizer.chat_template = read_text(Path(base.chat_template), "chat template", (".jinja",))
        origin = "recipe"
    elif not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
        origin = "plain"
        notes.append("chat template: the tokenizer has none; chat prompts become plain Human:/Assistant: text")
    if origin != "plain":
        try_template(tokenizer, "base.chat_template" if origin == "recipe" else f"base.model: {base.model}")
    end, why = _end_token(tokenizer, base.model, origin)
    notes.append(f"end token: {end!r}, {why}")
    pad, why = _pad_token(tokenizer, end)
    notes.append(f"padding token: {pad!r}, {why}")
    tokenizer.pad_token = pad
    tokenizer.padding_side = "left"  # what generation needs; our own batches do not ask the tokenizer
    start_ids = _start_ids(tokenizer)
    start = tokenizer.convert_ids_to_tokens(list(start_ids))
    notes.append(f"text prompts start with {''.join(start)!r}" if start else "text prompts start without a BOS token")
    return TextFormat(tokenizer, _id(tokenizer, pad), _id(tokenizer, end), start_ids, origin, tuple(notes))


def _end_token(tokenizer: PreTrainedTokenizerBase, name: str, origin: str) -> tuple[str, str]:
    """Return the end token and the reason for it."""
    eos = tokenizer.eos_token
    why = "the tokenizer's EOS"
    if origin != "plain":
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _PROBE}]
        try:
            after = _rendered(tokenizer, turns, add_generation_prompt=False).partition(_PROBE)[2].lstrip()
        except Exception as error:  # a template is somebody's program
            said = f"cannot render a question and an answer: {first_line(error)}"
            if origin == "recipe":
                raise InputError(f"base.chat_template: {said}") from error
            why += f", for the chat template ({origin}) {said}"
        else:
            found = [token for token in _special_tokens(tokenizer) if after.startswith(token)]
            if found:
                return max(found, key=len), f"which the chat template ({origin}) writes after an answer"
            why += f", for the chat template ({origin}) writes no special token after an answer"
    if eos is None:
        raise InputError(
            f"base.model: {name}: nothing ends a completion: the tokenizer has no EOS token and no chat template that "
            "writes a special token after an answer; set eos_token in its tokenizer_config.json."
        )
    return eos, why


def _pad_token(tokenizer: PreTrainedTokenizerBase, end: str) -> tuple[str, str]:
    """Return the padding token and the reason for it."""
    if tokenizer.pad_token not in (None, end):
        return tokenizer.pad_token, "the tokenizer's own"
    why = "the tokenizer has none" if tokenizer.pad_token is None else "the tokenizer's own ends completions"
    if tokenizer.unk_token not in (None, end):
        return tokenizer.unk_token, f"its unknown token, for {why}"
    for token in _special_tokens(tokenizer):
        if _PAD_NAME.search(token) and token != end:
            return token, f"a token that stands for no text, for {why}"
    return end, f"the end token too, for {why}; masks come from lengths, so the two are not mixed up"


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the special tokens' texts in the order of their ids."""
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = {token: _id(tokenizer, token) for token in tokenizer.all_special_tokens}
    return sorted(named | added, key=(named | added).__getitem__)


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids the tokenizer puts before a text; what it puts behind one is not ours to keep."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a")["input_ids"]
    return tuple(dressed[: next(at for at in range(len(dressed)) if dressed[at : at + len(bare)] == bare)])


def _rendered(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[dict[str, str]], *, add_generation_prompt: bool
) -> str:
    text = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=add_generation_prompt)
    return str(text)


def _id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    return cast(int, tokenizer.convert_tokens_to_ids(token))


def _content(backend: Any) -> str:
    """Return a tokenizers.Tokenizer as JSON without the padding and truncation that calls leave behind."""
    content = json.loads(backend.to_str())
    return json.dumps({**content, "padding": None, "truncation": None}, sort_keys=True)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ---------------------------------------------------------------- rows of tokens


@dataclass(frozen=True)
class Tokenised:
    """Tokenised rows and what became of the others."""

    rows: list[Any]
    counts: dict[str, int]
    """Rows given, "kept", "prompt cut", "dropped: <reason>", "special-token text kept as text" (or "made special
    tokens"), "text changed by the tokenizer" (completions with characters that it does not have); and "tokens"."""
    kept: list[int]
    """For each of `rows`, its index among the rows given."""

    def __str__(self) -> str:
        rest = [f"{count:,} {what}" for what, count in self.counts.items() if what not in ("rows", "kept", "tokens")]
        return ", ".join(
            [f"{self.counts['kept']:,} of {self.counts['rows']:,} rows, {self.counts['tokens']:,} tokens", *rest]
        )


def tokenise_demonstrations(
    rows: Iterable[Demonstration | Text], text_format: TextFormat, max_length: int | None, truncate: recipe.Truncate
) -> Tokenised:
    """Return {"input_ids", "labels"} of each row: a loss on the completion and its end token, on all of a plain text.

    max_length: tokens of a whole row. Completions are never cut: one that is too long alone is an error or dropped.

    Raises: InputError naming the rows that are too long under `truncate="error"` or spell special tokens where their
        card refuses that, or when none is left.
    """
    fitting = _Fitting(text_format, max_length, truncate)
    for index, row in enumerate(rows):
        allow = row.special_tokens == "allow"
        if isinstance(row, Text):
            fitting.look_at(row)
            prompt, completion = [], text_format.text_ids(row.text, allow_special=allow)
            fitting.read_back((row.text, completion[len(text_format.start_ids) :]))
        else:
            fitting.look_at(row)
            with _located(row.where):
                prompt = text_format.prompt_ids(row.prompt, allow_special=allow)
            completion = text_format.completion_ids(row.prompt, row.completion, allow_special=allow)
            fitting.read_back((row.completion, completion))
        fitted = fitting.fit(row.where, prompt, len(completion))
        if fitted is not None:
            ids, labels = fitted + completion, [IGNORED] * len(fitted) + completion
            fitting.keep(index, {"input_ids": ids, "labels": labels}, len(ids))
    return fitting.result()


@dataclass(frozen=True)
class Pair:
    """Two completions of one prompt that were compared."""

    chosen: int
    """Which completion is the better one, or as good; `rejected` is the other."""
    rejected: int
    probability: float
    """That `chosen` is the better one: from 0.5, a tie, to 1."""
    margin: float
    """By how much the scores are to differ."""


@dataclass(frozen=True)
class Compared:
    """The completions of one prompt and what was said about them."""

    completions: list[str]
    best: int
    """The first among equals."""
    pairs: list[Pair]
    """All of them, ties included."""


def compared(row: Preference | Ranking) -> Compared:
    """Return what a row compares; a preference is a ranking of two.

    A ranking's margins grow with the difference of the ratings (Touvron et al. 2023, section 3.2.2: larger margins for
    clearer preferences), where its card gives a margin per point.
    """
    if isinstance(row, Preference):
        probability, margin = probability_of(row), row.margin or 0.0
        pair = Pair(0, 1, probability, margin) if probability >= 0.5 else Pair(1, 0, 1 - probability, margin)
        return Compared([row.chosen, row.rejected], pair.chosen, [pair])
    ranks, pairs = row.ranks, []
    for one, other in combinations(range(len(ranks)), 2):
        chosen, rejected = (one, other) if ranks[one] <= ranks[other] else (other, one)
        margin = row.margin_per_point * (row.ratings[chosen] - row.ratings[rejected]) if row.ratings else 0.0
        pairs.append(Pair(chosen, rejected, 0.5 if ranks[one] == ranks[other] else 1.0, margin))
    return Compared(list(row.completions), ranks.index(min(ranks)), pairs)


def tokenise_comparisons(
    rows: Iterable[Preference | Ranking],
    text_format: TextFormat,
    max_length: int | None,
    truncate: recipe.Truncate,
    ties: recipe.Ties = "drop",
) -> Tokenised:
    """Return of each prompt the token rows of its completions and the pairs of them that are learnt from:

    {"completions": ids of prompt and completion, K of them; "prompt_tokens": how many of these are the prompt;
    "best": the index of the best completion, the first among equals; "chosen", "rejected", "probability", "margin": of
    each pair, as in `Pair`; "annotator"}.

    A prompt that is cut is cut alike for all completions, so that the longest fits.
    ties: "drop" leaves tied pairs out, and rows without any other, counted.

    Raises: as `tokenise_demonstrations`; or when all pairs are ties that are left out.
    """
    fitting = _Fitting(text_format, max_length, truncate)
    for index, row in enumerate(rows):
        found = compared(row)
        texts, pairs = found.completions, found.pairs
        fitting.look_at(row)
        if ties == "drop":
            fitting.counts["tied pairs left out"] += sum(pair.probability == 0.5 for pair in pairs)
            pairs = [pair for pair in pairs if pair.probability != 0.5]
            if not pairs:
                fitting.counts["dropped: all tied"] += 1
                continue
        allow = row.special_tokens == "allow"
        with _located(row.where):
            prompt = text_format.prompt_ids(row.prompt, allow_special=allow)
        completions = [text_format.completion_ids(row.prompt, text, allow_special=allow) for text in texts]
        fitting.read_back(*zip(texts, completions, strict=True))
        fitted = fitting.fit(row.where, prompt, max(map(len, completions)))
        if fitted is not None:
            group = {
                "completions": [fitted + completion for completion in completions],
                "prompt_tokens": len(fitted),
                "best": found.best,
                **{name: [getattr(pair, name) for pair in pairs] for name in Pair.__annotations__},
                "annotator": row.annotator,
            }
            fitting.keep(index, group, tokens_of_group(group))
    if fitting.counts["rows"] == fitting.counts["dropped: all tied"]:
        raise InputError(
            f"all {fitting.counts['rows']} rows are ties, which teach no order; set ties: soft to pull the scores of "
            "tied completions together, or use data with preferences."
        )
    return fitting.result()


def tokens_of_group(group: Mapping[str, Any]) -> int:
    """Return the tokens of a prompt's completions, the prompt counted with each of them."""
    return sum(map(len, group["completions"]))


def tokenise_prompts(
    rows: Iterable[PromptRow | Demonstration | Preference | Ranking],
    text_format: TextFormat,
    max_prompt_tokens: int | None,
    truncate: recipe.Truncate,
) -> Tokenised:
    """Return the token ids of each row's prompt.

    Raises: as `tokenise_demonstrations`.
    """
    fitting = _Fitting(text_format, max_prompt_tokens, truncate)
    for index, row in enumerate(rows):
        fitting.look_at(row, prompt_only=True)
        with _located(row.where):
            prompt = text_format.prompt_ids(row.prompt, allow_special=row.special_tokens == "allow")
        fitted = fitting.fit(row.where, prompt, 0)
        if fitted is not None:
            fitting.keep(index, fitted, len(fitted))
    return fitting.result()


class _Fitting:
    """Rows on their way through the length limit, with the books kept."""

    def __init__(self, text_format: TextFormat, limit: int | None, truncate: recipe.Truncate):
        self.text_format = text_format
        self.limit = limit
        self.truncate = truncate
        self.rows: list[Any] = []
        self.kept: list[int] = []
        self.counts: Counter[str] = Counter()
        self.too_long: list[str] = []
        self.refused: list[str] = []

    def look_at(self, row: Any, *, prompt_only: bool = False) -> None:
        """Count a row, and whether its text spells special tokens."""
        self.counts["rows"] += 1
        if any(self.text_format.spells_special(text) for text in texts_of(row, prompt_only=prompt_only)):
            if row.special_tokens == "refuse":
                self.refused.append(row.where)
            else:
                became = "made special tokens" if row.special_tokens == "allow" else "kept as text"
                self.counts[f"special-token text {became}"] += 1

    def read_back(self, *completions: tuple[str, list[int]]) -> None:
        """Count a row with completions that their tokens (the end token last) do not spell."""
        if any(self.text_format.changes(text, ids[:-1]) for text, ids in completions):
            self.counts["text changed by the tokenizer"] += 1

    def fit(self, where: str, prompt: list[int], completion: int) -> list[int] | None:
        """Return the prompt, cut from the left if that is asked for and needed, or None for a row to leave out.

        completion: tokens that must fit behind it.
        """
        length = len(prompt) + completion
        if self.limit is None or length <= self.limit:
            return prompt
        if self.truncate == "error":
            self.too_long.append(f"{where} ({length} tokens)")
            return None
        start = list(self.text_format.start_ids)
        start = start if prompt[: len(start)] == start else []
        room = self.limit - completion - len(start)
        if self.truncate == "drop" or not prompt or room < 1:
            self.counts[f"dropped: longer than {self.limit} tokens"] += 1
            return None
        self.counts["prompt cut"] += 1
        return start + prompt[-room:]

    def keep(self, index: int, row: Any, tokens: int) -> None:
        """Take a row that fits."""
        self.rows.append(row)
        self.kept.append(index)
        self.counts["tokens"] += tokens

    def result(self) -> Tokenised:
        if self.refused:
            raise InputError(refusal(self.refused, self.counts["rows"]))
        if self.too_long:
            shown = "; ".join(self.too_long[:5]) + (" …" if len(self.too_long) > 5 else "")
            raise InputError(
                f"{len(self.too_long)} of {self.counts['rows']} rows are longer than {self.limit} tokens: {shown}. "
                "Set truncate: left_prompt to cut their prompts from the left, truncate: drop to leave them out, or a "
                "larger max_length (or a smaller max_new_tokens) where the model's context allows it."
            )
        if not self.rows:
            raise InputError(
                f"none of the {self.counts['rows']} rows is at most {self.limit} tokens long; use shorter rows or a "
                "model with a longer context."
            )
        self.counts["kept"] = len(self.rows)
        return Tokenised(self.rows, dict(+self.counts), self.kept)


def refuse_special_tokens(rows: Sequence[Any], text_format: TextFormat) -> None:
    """Refuse rows that spell special tokens, of cards that refuse them.

    Raises: InputError naming the rows.
    """
    if refused := refused_rows(rows, text_format.spells_special):
        raise InputError(refusal(refused, len(rows)))


@contextmanager
def _located(where: str) -> Iterator[None]:
    """Put the row's place before the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


# ---------------------------------------------------------------- padding


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> PromptBatch:
    """Return the rows as one batch, padded on the left to the longest."""
    ids, mask = right_pad([list(reversed(row)) for row in rows], pad_id)
    return PromptBatch(prompt_ids=ids.flip(1), prompt_mask=mask.flip(1))


def right_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids [B, T] int64 and mask [B, T] bool, padded on the right to the longest row."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    ids = torch.full(mask.shape, pad_id, dtype=torch.long)
    ids[mask] = torch.tensor([token for row in rows for token in row], dtype=torch.long)
    return ids, mask


# ---------------------------------------------------------------- batches by tokens


def pass_cost() -> int:
    """Return how many tokens take as long as a forward pass does besides its tokens.

    Between 64 and 384, 128 was the best on a CPU, by little; on an accelerator, where launching a layer's kernels takes
    longer than the work of a few rows, it is an estimate.
    """
    return 512 if torch.accelerator.is_available() else 128


def forward_passes(lengths: Sequence[int], budget: int | None = None) -> list[list[int]]:
    """Return rows in forward passes, longest first, that take the least time: rows of like length share one.

    The least is found among all ways of cutting the rows, sorted by length, into passes. A pass has at most `budget`
    tokens, padding included; a longer row is alone.
    """
    budget = sum(lengths) * len(lengths) if budget is None else budget
    cost = pass_cost()
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    longest = torch.tensor([lengths[row] for row in order], dtype=torch.float64)
    least = torch.zeros(len(order) + 1, dtype=torch.float64)  # time of the first rows
    start = [0] * (len(order) + 1)  # of the last pass among the first rows
    for end in range(1, len(order) + 1):
        first = max(0, min(end - 1, end - budget // max(1, lengths[order[end - 1]])))
        rows = end - torch.arange(first, end)
        tokens = longest[first:end] * rows
        time = least[first:end] + tokens + cost
        time[(tokens > budget) & (rows > 1)] = torch.inf
        least[end], cut = time.min(0)
        start[end] = first + int(cut)
    passes = []
    end = len(order)
    while end:
        passes.append(order[start[end] : end])
        end = start[end]
    return passes[::-1]


def within_budget(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Return items, largest first, in lists whose sizes add up to at most `budget`; a larger one is alone."""
    lists: list[list[int]] = []
    room = -1
    for item in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        if sizes[item] > room:
            lists.append([])
            room = budget
        lists[-1].append(item)
        room -= sizes[item]
    return lists


def compare(groups: Sequence[Mapping[str, Any]], pad_id: int, *, learn_all: bool = False) -> Comparisons:
    """Return the completions and pairs of some prompts, rows of `tokenise_comparisons`, as one microbatch.

    learn_all: `learnt` is true on the tokens of every completion, not only of each prompt's best.
    """
    rows = [ids for group in groups for ids in group["completions"]]
    firsts = [0, *accumulate(len(group["completions"]) for group in groups)]  # of each prompt's rows
    asked = [group["prompt_tokens"] for group in groups for _ in group["completions"]]
    best = {first + group["best"] for first, group in zip(firsts, groups, strict=False)}
    passes = forward_passes([len(ids) for ids in rows])
    padded = [right_pad([rows[row] for row in rows_of_pass], pad_id) for rows_of_pass in passes]
    learnt = []
    for rows_of_pass, (_, mask) in zip(passes, padded, strict=True):
        first = torch.tensor([asked[row] if learn_all or row in best else mask.shape[1] for row in rows_of_pass])
        learnt.append(mask & (torch.arange(mask.shape[1]) >= first.unsqueeze(1)))
    place = {row: number for number, row in enumerate(row for rows_of_pass in passes for row in rows_of_pass)}

    def of_pairs(name: str) -> list[Any]:
        return [value for group in groups for value in group[name]]

    def places(name: str) -> Tensor:
        return torch.tensor([place[f + row] for f, group in zip(firsts, groups, strict=False) for row in group[name]])

    return Comparisons(
        ids=tuple(ids for ids, _ in padded),
        mask=tuple(mask for _, mask in padded),
        learnt=tuple(learnt),
        chosen=places("chosen"),
        rejected=places("rejected"),
        probability=torch.tensor(of_pairs("probability")),
        margin=torch.tensor(of_pairs("margin")),
        prompt=torch.tensor([number for number, group in enumerate(groups) for _ in group["chosen"]]),
    )
