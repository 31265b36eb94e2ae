"""Everything that can be found wrong before a model is loaded, all at once; and the plan with every derived size.

`rlhf-kit check` prints it, `run` does it first. It reads the recipe's cards, their rows, and of the base the
configuration, the tokenizer and the headers of its weights. It imports no torch, transformers or datasets; Hub datasets
are read by `run` only, which fetches them.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_kit import foreign
from rlhf_kit.data_cards import DataCard, HubSource, load_card
from rlhf_kit.errors import InputError
from rlhf_kit.examples.loading import Examples, Share, load_examples, mixed, prompts_of
from rlhf_kit.examples.rows import Demonstration, Preference, Prompt, PromptRow, Ranking, Text, refusal, refused_rows
from rlhf_kit.foreign import Foreign
from rlhf_kit.model_folders import ModelFolder
from rlhf_kit.recipe import (
    NEW_TOKENS,
    Cards,
    DPOStage,
    KTOStage,
    OnlineStage,
    Recipe,
    RejectionSamplingStage,
    RewardStage,
    SamplingStage,
    SFTStage,
    Stage,
    TrainingStage,
    Truncate,
    cards_of,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WITH_PROMPTS = ("prompts", "demonstrations", "preferences", "rankings")
LEAST_WATCHED = 8
"""Held-out prompts, for `watch`."""
MEASURED = 64
"""Of the rows whose characters say that they fit, so many are tokenised to say how long the longest is."""


@dataclass(frozen=True)
class Plan:
    """A recipe that was checked, with what was read for it."""

    recipe: Recipe
    examples: dict[Cards, Examples]
    """By what the recipe names, a card's path or a mixture of cards; without the Hub's if these were not fetched."""
    foreign: dict[str, Foreign]
    """What stages start from or score with that no stage makes, by what the recipe names; without the Hub's if these
    were not fetched."""
    lines: list[str]
    """For a person to read."""
    notes: list[str]
    """What is allowed and may still surprise."""


def check_recipe(recipe: Recipe) -> list[str]:
    """Return the resolved plan, line by line, without fetching anything from the Hub.

    Raises:
        InputError: everything that is wrong with base, cards and data.
    """
    found = _plan(recipe, fetch=False)
    return [*found.lines, *(f"note     {note}" for note in found.notes)]


def plan(recipe: Recipe) -> Plan:
    """Return the plan with the rows of every card.

    Raises:
        InputError: everything that is wrong with base, cards and data.
    """
    return _plan(recipe, fetch=True)


def _plan(recipe: Recipe, fetch: bool) -> Plan:
    problems: list[str] = []
    base = _base(recipe, problems)
    cards: dict[str, DataCard] = {}
    examples: dict[Cards, Examples] = {}
    for path, uses in card_uses(recipe).items():
        try:
            card = cards[path] = load_card(path, recipe.data_root)
            for use, kinds in uses.items():
                if card.kind not in kinds:
                    problems.append(
                        f"{recipe.where(use)}: needs a card of {' or '.join(kinds)}; {path} has {card.kind}"
                    )
            if fetch or not is_on_hub(card):
                examples[path] = load_examples(card)
        except InputError as error:
            problems += error.problems
    problems += _mix(recipe, examples)
    problems += _heldout_problems(recipe, examples)
    problems += _function_problems(recipe)
    artefacts, found = foreign.of_recipe(recipe, fetch=fetch)
    problems += found
    if base is not None:
        for one in artefacts.values():
            problems += [f"{foreign.place(recipe, one.written)}: {it}" for it in foreign.shape_problems(one, base)]
    too_long: list[_TooLong] = []
    if base is not None:
        too_long = list(_too_long(recipe, base, examples))
        problems += _length_problems(recipe, base.context, too_long)
        problems += _special_token_problems(base, examples)
    if problems:
        raise InputError(problems)
    notes = [*_leaks(recipe, examples), *_watched_twice(recipe, examples), *_length_notes(too_long)]
    return Plan(recipe, examples, artefacts, _lines(recipe, base, cards, examples, artefacts), notes)


def card_uses(recipe: Recipe) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return the cards of a recipe: path -> {"stages.sft.data": the kinds of card that will do there}."""
    uses: dict[str, dict[str, tuple[str, ...]]] = {}
    for name, stage in recipe.stages.items():
        fields: dict[str, tuple[Cards | None, tuple[str, ...]]] = {}
        if isinstance(stage, SFTStage):
            fields["data"] = stage.data, ("demonstrations", "text")
        elif isinstance(stage, RewardStage):
            fields["data"] = stage.data, ("preferences", "rankings")
            fields["normalize_on"] = stage.normalize_on, ("demonstrations",)
        elif isinstance(stage, DPOStage | KTOStage):
            fields["data"] = stage.data, ("preferences", "rankings")
        else:
            fields["prompts"] = stage.prompts, WITH_PROMPTS
            ptx = stage.ptx if isinstance(stage, OnlineStage) else None
            fields["ptx.data"] = ptx.data if ptx else None, ("text", "demonstrations")
        for key, (written, kinds) in fields.items():
            for path in [] if written is None else cards_of(written):
                uses.setdefault(path, {})[f"stages.{name}.{key}"] = kinds
    if recipe.evaluation.prompts is not None:
        uses.setdefault(recipe.evaluation.prompts, {})["evaluation.prompts"] = WITH_PROMPTS
    return uses


def scorers_of(name: str, stage: Stage) -> dict[str, str]:
    """Return what scores the completions of a stage: {"stages.ppo.reward": what it names}; empty if it samples none."""
    if not isinstance(stage, SamplingStage):
        return {}
    watch = stage.watch if isinstance(stage, OnlineStage) else None
    gold = {} if watch is None or watch.gold is None else {f"stages.{name}.watch.gold": watch.gold}
    return {f"stages.{name}.reward": stage.reward, **gold}


def _mix(recipe: Recipe, examples: dict[Cards, Examples]) -> list[str]:
    """Add the mixtures of cards whose every card was read; return what is wrong with any."""
    problems = []
    for name, stage in recipe.stages.items():
        key = "prompts" if isinstance(stage, SamplingStage) else "data"
        cards = getattr(stage, key)
        if isinstance(cards, str):
            continue
        at = recipe.where(f"stages.{name}.{key}")
        if len(set(cards_of(cards))) < len(cards):
            problems.append(f"{at}: names a card twice; give it a weight instead")
        if isinstance(stage, SamplingStage) and any(portion.weight > 1 for portion in cards):
            problems.append(f"{at}: a prompt is there once, so a weight is at most 1")
        if not all(card in examples for card in cards_of(cards)):
            continue
        kinds = {examples[card].card.kind for card in cards_of(cards)}
        found = [examples[portion.card] for portion in cards]
        if isinstance(stage, SamplingStage) and kinds <= set(WITH_PROMPTS):
            found = [prompts_of(one) for one in found]
        examples[cards] = mixed([Share(one, part.weight, part.cap) for one, part in zip(found, cards, strict=True)])
        if not examples[cards].train:
            problems.append(f"{at}: no row is left to train on: {examples[cards].counts}")
    return problems


def named(cards: Cards) -> str:
    """Return the names of a card or several, for a message."""
    return " + ".join(cards_of(cards))


def is_on_hub(card: DataCard) -> bool:
    """Return whether reading the card's rows may fetch them."""
    return isinstance(card.sources, HubSource)


def evaluation_card(recipe: Recipe) -> Cards | None:
    """Return the card, or mixture, whose held-out prompts the closing table is measured on; None where no stage tunes
    a policy further.
    """
    tuned, sampling = list(recipe.tuned().values()), recipe.last_sampling()
    if not tuned or recipe.evaluation.prompts is not None:
        return recipe.evaluation.prompts if tuned else None
    if sampling is not None:
        return sampling[1].prompts
    last = tuned[-1]
    assert isinstance(last, DPOStage | KTOStage)
    return last.data


def _heldout_problems(recipe: Recipe, examples: Mapping[Cards, Examples]) -> Iterable[str]:
    for name, stage in recipe.stages.items():
        if isinstance(stage, RewardStage) and stage.data in examples and not examples[stage.data].heldout:
            yield (
                f"{recipe.where(f'stages.{name}.data')}: {named(stage.data)} holds no pairs out to measure the "
                "accuracy on; write heldout: 0.1 in the card"
            )
        if isinstance(stage, OnlineStage) and stage.watch is not None and stage.prompts in examples:
            heldout = len(prompts_of(examples[stage.prompts]).heldout)
            if heldout < LEAST_WATCHED:
                yield (
                    f"{recipe.where(f'stages.{name}.watch')}: {named(stage.prompts)} holds {heldout} prompts out, and "
                    f"{LEAST_WATCHED} are the least that say something; write heldout: 0.1 in the card"
                )
    card = evaluation_card(recipe)
    if card is not None and card in examples and not examples[card].heldout:
        yield (
            f"{named(card)}: holds no prompts out to measure the policies on; write heldout: 0.1 in it, or name "
            "another card in evaluation.prompts"
        )


def _function_problems(recipe: Recipe) -> Iterable[str]:
    functions = {} if recipe.evaluation.gold is None else {"evaluation.gold": recipe.evaluation.gold}
    for name, stage in recipe.stages.items():
        for at, scorer in scorers_of(name, stage).items():
            if recipe.scorer_source(scorer) == "function":
                functions[at] = scorer
    for use, function in functions.items():
        package = function.partition(":")[0].partition(".")[0]
        here = [Path(package).with_suffix(".py"), Path(package)]
        if importlib.util.find_spec(package) is None and not any(path.exists() for path in here):
            yield f"{recipe.where(use)}: there is no module {package}; run where it can be imported, or install it"


# ---------------------------------------------------------------- the base


def _base(recipe: Recipe, problems: list[str]) -> ModelFolder | None:
    """Return the base if it is a folder that can be looked into; say what is wrong with it."""
    if not recipe.is_local_base:
        return None
    base = ModelFolder(Path(recipe.base.model), recipe.base.trust_remote_code)
    found = [f"{recipe.where('base.model')}: {problem}" for problem in base.problems()]
    if not found:
        try:
            _ = base.tokenizer
        except InputError as error:
            found = [f"{recipe.where('base.model')}: {problem}" for problem in error.problems]
    problems += found
    return None if found else base


# ---------------------------------------------------------------- lengths


def _texts(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)


def _row_texts(row: Any) -> list[str]:
    """Return what of a row must fit into the context together."""
    match row:
        case Text(text=text):
            return [text]
        case PromptRow(prompt=prompt):
            return [_texts(prompt)]
        case Demonstration(prompt=prompt, completion=completion):
            return [_texts(prompt) + completion]
        case Preference(prompt=prompt, chosen=chosen, rejected=rejected):
            return [_texts(prompt) + chosen, _texts(prompt) + rejected]
        case Ranking(prompt=prompt, completions=completions):
            return [_texts(prompt) + completion for completion in completions]
    raise TypeError(type(row))


def longest(rows: Sequence[Any], tokenizer: Tokenizer, room: int | None) -> tuple[int, list[tuple[str, int]]]:
    """Return the tokens of the longest row, and "file:line" and tokens of the rows longer than `room`.

    Lower bounds: without chat template, beginning and end tokens. No token is shorter than a byte, so most rows need
    not be tokenised to be seen to fit.
    """
    by_size = sorted(((len(text.encode()), row.where, text) for row in rows for text in _row_texts(row)), reverse=True)
    measured = [item for place, item in enumerate(by_size) if place < MEASURED or (room is not None and item[0] > room)]
    encoded = tokenizer.encode_batch([text for _, _, text in measured], add_special_tokens=False)
    lengths = [(where, len(tokens)) for (_, where, _), tokens in zip(measured, encoded, strict=True)]
    over = {where: length for where, length in sorted(lengths, key=lambda item: item[1]) if room and length > room}
    return max((length for _, length in lengths), default=0), list(over.items())


@dataclass(frozen=True)
class _Limit:
    """Rows that a stage reads, and how long they may be."""

    at: str
    card: Cards
    rows: list[Any]
    room: int
    """Tokens."""
    words: str
    """The limit, for a message."""
    other_way: str
    """What else would make room for longer ones."""
    truncate: Truncate


@dataclass(frozen=True)
class _TooLong:
    """Rows that are longer than they may be."""

    limit: _Limit
    longest: int
    """Tokens, at least, of the longest of all."""
    rows: list[tuple[str, int]]
    """"file:line" and tokens, at least."""

    @property
    def many(self) -> str:
        limit = self.limit
        rows = f"{len(self.rows):,} of {len(limit.rows):,} rows of {named(limit.card)}"
        return f"at least {rows} are longer than {limit.words}"


def _sampled(recipe: Recipe) -> Iterator[tuple[str, Truncate, Cards, int]]:
    """Yield place, truncation, prompts and new tokens wherever completions are sampled for prompts of their own."""
    for name, stage in recipe.stages.items():
        if isinstance(stage, SamplingStage):
            yield recipe.where(f"stages.{name}"), stage.truncate, stage.prompts, stage.max_new_tokens
    card, sampling = evaluation_card(recipe), recipe.last_sampling()
    if card is not None and (sampling is None or recipe.evaluation.prompts is not None):
        truncate, new = evaluation_lengths(recipe)
        place = "evaluation.prompts" if recipe.evaluation.prompts is not None else "evaluation"
        yield recipe.where(place), truncate, card, new


def evaluation_lengths(recipe: Recipe) -> tuple[Truncate, int]:
    """Return what becomes of long prompts in the closing table, and how long its completions are, in tokens."""
    sampling, new = recipe.last_sampling(), recipe.evaluation.max_new_tokens
    if sampling is not None:
        return sampling[1].truncate, new or sampling[1].max_new_tokens
    last = list(recipe.tuned().values())[-1]
    assert isinstance(last, DPOStage | KTOStage)
    return last.truncate, new or NEW_TOKENS


def _limits(recipe: Recipe, context: int | None, examples: Mapping[Cards, Examples]) -> Iterator[_Limit]:
    for name, stage in recipe.stages.items():
        if isinstance(stage, SamplingStage) or stage.data not in examples:
            continue
        if room := stage.max_length or context:
            rows = [*examples[stage.data].train, *examples[stage.data].heldout]
            words = f"max_length {room}" if stage.max_length else f"the base's context of {room} tokens"
            way = "a larger max_length" * bool(stage.max_length)
            yield _Limit(recipe.where(f"stages.{name}"), stage.data, rows, room, words, way, stage.truncate)
    for at, truncate, card, new in _sampled(recipe):
        if context is None or context <= new or card not in examples or examples[card].card.kind not in WITH_PROMPTS:
            continue
        found, room = prompts_of(examples[card]), context - new
        words = f"the {room} tokens that max_new_tokens {new} leaves of the base's context of {context}"
        rows = [*found.train, *found.heldout]
        yield _Limit(at, card, rows, room, words, "a smaller max_new_tokens", truncate)


def _too_long(recipe: Recipe, base: ModelFolder, examples: Mapping[Cards, Examples]) -> Iterator[_TooLong]:
    if base.tokenizer is None:
        return
    for limit in _limits(recipe, base.context, examples):
        most, over = longest(limit.rows, base.tokenizer, limit.room)
        if over:
            yield _TooLong(limit, most, over)


def _length_problems(recipe: Recipe, context: int | None, too_long: Iterable[_TooLong]) -> Iterator[str]:
    if context is not None:
        for name, stage in recipe.stages.items():
            if isinstance(stage, SamplingStage) or stage.max_length is None:
                continue
            if stage.max_length > context:
                at = recipe.where(f"stages.{name}")
                yield f"{at}.max_length: {stage.max_length} is more than the base's context of {context} tokens"
        for at, _, _, new in _sampled(recipe):
            if new >= context:
                yield f"{at}: max_new_tokens {new} leaves no room for a prompt in the context of {context}"
    for found in too_long:
        limit = found.limit
        if limit.truncate == "error":
            yield (
                f"{limit.at}: {found.many}; the longest has at least {found.longest} ({found.rows[-1][0]}). Write "
                "truncate: left_prompt to cut prompts from the left, truncate: drop to leave such rows out"
                f"{', or ' * bool(limit.other_way)}{limit.other_way}"
            )
        elif limit.truncate == "drop" and len(found.rows) == len({row.where for row in limit.rows}):
            yield (
                f"{limit.at}: all rows of {named(limit.card)} are longer than {limit.words}, so truncate: drop leaves "
                "none; use shorter rows or a base with a longer context"
            )


def _length_notes(too_long: Iterable[_TooLong]) -> Iterator[str]:
    """Tell of rows that a stage will cut or leave out, as its recipe says."""
    ways = {
        "drop": "they are left out",
        "left_prompt": "their prompts are cut from the left; a row whose completion alone is too long is left out",
    }
    for found in too_long:
        truncate = found.limit.truncate
        if truncate in ways:
            yield f"{found.limit.at}: truncate: {truncate}: {found.many}; {ways[truncate]}"


def _special_token_problems(base: ModelFolder, examples: Mapping[Cards, Examples]) -> Iterator[str]:
    """Yield the refusals of cards whose rows spell special tokens of the base."""
    if base.tokenizer is None:
        return
    names = [token.content for token in base.tokenizer.get_added_tokens_decoder().values() if token.special]
    spells = re.compile("|".join(map(re.escape, names)) or r"(?!)").search
    for card, found in examples.items():
        rows = [*found.train, *found.heldout] if isinstance(card, str) else []  # a mixture's are those of its cards
        if refused := refused_rows(rows, lambda text: spells(text) is not None):
            yield f"{card}: {refusal(refused, len(rows))}"


# ---------------------------------------------------------------- the plan, to be read


def _lines(
    recipe: Recipe,
    base: ModelFolder | None,
    cards: Mapping[str, DataCard],
    examples: Mapping[Cards, Examples],
    artefacts: Mapping[str, Foreign],
) -> list[str]:
    settings = recipe.base
    weights = {"none": settings.dtype, "8bit": f"8-bit ({settings.dtype})", "4bit": f"4-bit ({settings.dtype})"}
    modules = recipe.adapter.target_modules
    origin = "" if recipe.is_local_base else f" from the Hub at {settings.revision}, there being no such folder here"
    lines = [
        f"{recipe.path}: {recipe.name}, seed {recipe.seed}",
        f"base     {settings.model}{origin}: "
        + (f"{base.config.get('model_type')}, {_millions(base.parameters)} parameters, " if base else "")
        + (f"context {base.context} tokens, " if base and base.context else "")
        + f"weights in {weights[settings.quantization]}",
        f"adapter  r {recipe.adapter.r}, alpha {recipe.adapter.alpha:g}, dropout {recipe.adapter.dropout:g}, "
        f"on {modules if isinstance(modules, str) else ', '.join(modules)}",
    ]
    for path, card in cards.items():
        lines += _card_lines(path, card, examples.get(path), base)
    for mixture in (cards for cards in examples if not isinstance(cards, str)):
        found = examples[mixture]
        lines.append(
            f"mixture  {named(mixture)}: {len(found.train):,} rows to train on, {len(found.heldout):,} held out"
        )
        lines += _count_lines(found)
    for name in recipe.stages:
        for key, written in recipe.foreign(name).items():
            what = artefacts.get(written, f"{written}, on the Hub, not fetched by check")
            lines.append(f"from     {name}.{key}: {what}")
    for name, stage in recipe.stages.items():
        lines += _stage_lines(recipe, name, stage, examples)
    card_path = evaluation_card(recipe)
    if card_path is not None:
        count, available = recipe.evaluation.count, ""
        if card_path in examples:
            heldout = len(prompts_of(examples[card_path]).heldout)
            count, available = min(count, heldout), f" of {heldout:,}"
        gold = f", gold {recipe.evaluation.gold}" if recipe.evaluation.gold else ""
        lines.append(f"evaluation  on {count:,}{available} held-out prompts of {named(card_path)}{gold}")
    return lines


def _card_lines(path: str, card: DataCard, found: Examples | None, base: ModelFolder | None) -> list[str]:
    if found is None:
        return [f"data     {path}: {card.kind} of {card.sources}, not fetched by check"]
    line = (
        f"data     {path}: {card.kind}, {found.counts['read']:,} rows read, {len(found.train):,} to train on, "
        f"{len(found.heldout):,} held out"
    )
    if base is not None and base.tokenizer is not None:
        most, _ = longest([*found.train, *found.heldout], base.tokenizer, None)
        line += f"; the longest has {most:,} tokens"
    return [line, *_count_lines(found)]


def _count_lines(found: Examples) -> Iterable[str]:
    """Yield what became of the rows that are not there as they were read."""
    words = {"dropped": "left out", "merged": "put together", "repeated": "repeated", "noted": "noted"}
    for reason, number in found.counts.items():
        kind, colon, what = reason.partition(": ")
        if colon:
            yield f"         {words[kind]}: {number:,} × {what}"


def _stage_lines(recipe: Recipe, name: str, stage: Stage, examples: Mapping[Cards, Examples]) -> list[str]:
    after = recipe.depends_on(name)
    head = f"stage    {name}: {stage.kind}{' after ' if after else ''}{' and '.join(after)}, "
    if isinstance(stage, OnlineStage):
        completions = stage.updates * stage.batch_size
        minibatch = stage.batch_size // stage.minibatches
        line = (
            f"{head}{stage.updates:,} updates x {stage.batch_size:,} = {completions:,} completions of at most "
            f"{stage.max_new_tokens} tokens; {stage.epochs} epochs x {stage.minibatches} minibatches of {minibatch:,} "
            f"= {stage.updates * stage.epochs * stage.minibatches:,} optimizer steps; kl_coef {stage.kl_coef:g}"
        )
        if recipe.reward_source(name) == "server":
            line += f"; scored by {stage.reward}, which check does not ask"
        if stage.prompts in examples:
            prompts = len(prompts_of(examples[stage.prompts]).train)
            line += f"; {prompts:,} prompts, each seen {completions / prompts:.3g} times"
        lines = [line]
        if isinstance(stage, OnlineStage) and stage.watch is not None:
            gold = f", gold {stage.watch.gold}" if stage.watch.gold else ""
            then = f"; guard: {stage.guard.action}" if stage.guard else ""
            lines.append(
                f"         watched every {stage.watch.every:,} updates on {stage.watch.count:,} held-out prompts at "
                f"most{gold}{then}"
            )
        if isinstance(stage, OnlineStage) and stage.ptx is not None:
            steps = stage.updates * stage.epochs * stage.minibatches
            lines.append(
                f"         ptx: {steps * stage.ptx.batch_size:,} texts of {stage.ptx.data}, coef {stage.ptx.coef:g}"
            )
        return lines
    if isinstance(stage, RejectionSamplingStage):
        line = f"{head}best of {stage.completions_per_prompt} completions of at most {stage.max_new_tokens} tokens"
        if stage.prompts not in examples:
            return [f"{line} a prompt, in steps of {stage.batch_size:,}"]
        rows = len(prompts_of(examples[stage.prompts]).train)
        steps, epochs = _steps(stage, rows)
        return [
            f"{line} for each of {rows:,} prompts = {rows * stage.completions_per_prompt:,}; {epochs:.3g} epochs of "
            f"the best = {steps:,} optimizer steps of {stage.batch_size:,} rows"
        ]
    units = {"preferences": "pairs", "rankings": "rankings"}
    kinds = {type(row) for row in examples[stage.data].train} if stage.data in examples else set()
    unit = units.get(examples[stage.data].card.kind, "rows") if len(kinds) == 1 else "rows"
    if stage.data not in examples:
        long = f"{stage.max_steps:,} optimizer steps" if stage.max_steps else f"epochs {stage.epochs:g}, in steps"
        return [f"{head}{long} of {stage.batch_size:,} {unit}"]
    rows = len(examples[stage.data].train)
    steps, epochs = _steps(stage, rows)
    return [f"{head}{rows:,} {unit} x {epochs:.3g} epochs = {steps:,} optimizer steps of {stage.batch_size:,} {unit}"]


def _steps(stage: TrainingStage, rows: int) -> tuple[int, float]:
    """Return the optimizer steps of a stage that passes over so many rows, and how many passes these are."""
    steps = stage.max_steps or math.ceil(stage.epochs * rows / stage.batch_size)
    return steps, steps * stage.batch_size / rows


def _leaks(recipe: Recipe, examples: Mapping[Cards, Examples]) -> Iterable[str]:
    """Tell of each card whose training prompts are among those that the closing table is measured on."""
    card = evaluation_card(recipe)
    if card is None or card not in examples:
        return
    heldout = {_texts(row.prompt) for row in prompts_of(examples[card]).heldout}
    for path, uses in card_uses(recipe).items():
        if path in examples and examples[path].card.kind in WITH_PROMPTS and any("stages." in use for use in uses):
            both = len(heldout & {_texts(row.prompt) for row in examples[path].train})
            if both:
                yield f"{both:,} of the {len(heldout):,} held-out prompts of {named(card)} are trained on in {path}"


def _watched_twice(recipe: Recipe, examples: Mapping[Cards, Examples]) -> Iterable[str]:
    """Tell of each stage that is watched on prompts of the closing table, which then flatters what the guard chose.

    The table takes the first of the held-out prompts in their drawn order, the watch the last.
    """
    card = evaluation_card(recipe)
    for name, stage in recipe.stages.items():
        if isinstance(stage, OnlineStage) and stage.watch is not None and stage.prompts == card and card in examples:
            rows = len(prompts_of(examples[card]).heldout)
            both = min(rows, stage.watch.count) + min(rows, recipe.evaluation.count) - rows
            if both > 0:
                yield (
                    f"stages.{name}.watch and the closing table share {both:,} of the {rows:,} held-out prompts of "
                    f"{named(card)}; hold out more, or lower watch.count or evaluation.count"
                )


def _millions(number: int) -> str:
    return f"{number / 1e9:.3g} B" if number >= 1e9 else f"{number / 1e6:.3g} M"
