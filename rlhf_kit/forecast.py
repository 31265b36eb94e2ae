"""What each stage of a recipe will take, in memory and time, told before anything is loaded.

The base is built without weights, and the passes of each stage are rehearsed on it (rehearsal.py), as long and as wide
as the stage's own rows make them. Memory is for the longest rows, time for the mean ones; completions that are sampled
are taken to be as long as they may be. The arithmetic of a scoring function, of another reward model or of a reward
server is not known here and left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from rlhf_kit import check, metrics, models
from rlhf_kit.closing import plain_table
from rlhf_kit.collate import (
    IGNORED,
    TextFormat,
    load_text_format,
    tokenise_comparisons,
    tokenise_demonstrations,
    tokenise_prompts,
    tokens_of_group,
)
from rlhf_kit.errors import InputError
from rlhf_kit.examples.loading import Examples, prompts_of
from rlhf_kit.passes import Pass, Passes
from rlhf_kit.recipe import (
    Cards,
    DPOStage,
    KTOStage,
    OnlineStage,
    PolicyStage,
    PPOStage,
    Recipe,
    RejectionSamplingStage,
    RewardStage,
    SFTStage,
    TrainingStage,
)
from rlhf_kit.rehearsal import Machine, NotRehearsed
from rlhf_kit.stages.reward import NORMALISED_ON, SAMPLED, SAMPLED_TOKENS
from rlhf_kit.stages.sft import HELDOUT
from rlhf_kit.token_cache import tokenised
from rlhf_kit.training import optimizer_steps

TRAINED = 4
"""Float32 numbers for each trained weight: itself, its gradient and AdamW's two."""


@dataclass(frozen=True)
class Need:
    """What a stage takes."""

    steps: int
    """Of the optimizer; of stages that learn online, updates."""
    seconds: float
    base: int
    """Bytes of the weights, as they are quantised."""
    adapters: int
    """Bytes of all adapters, with gradients and optimizer."""
    learning: int
    """Bytes that the longest microbatch keeps for its backward pass, at most."""
    sampling: int
    """Bytes of keys, values and logits while completions are sampled."""

    @property
    def peak(self) -> int:
        """Bytes."""
        return self.base + self.adapters + max(self.learning, self.sampling)


@dataclass(frozen=True)
class Forecast:
    """What a run takes."""

    device: str
    machine: Machine
    libraries: int
    """Bytes that a process takes with the libraries imported and nothing else; 0 on a GPU."""
    needs: dict[str, Need]
    """By stage, and "evaluation" where there is a closing table."""
    unknown: list[str]
    """Scorers whose time is left out."""

    def as_json(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        needs = {name: {**asdict(need), "peak": self.libraries + need.peak} for name, need in self.needs.items()}
        return {**asdict(self), "needs": needs, "seconds": sum(need.seconds for need in self.needs.values())}


def forecast(recipe: Recipe) -> Forecast:
    """Return what a run of the recipe will take on this machine.

    Raises:
        InputError: what `check` finds; or the passes of the base depend on numbers, so they cannot be rehearsed.
    """
    found = check.plan(recipe)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    libraries = metrics.peak_bytes() if device.type == "cpu" else 0
    stages = _Stages(recipe, found.examples, load_text_format(recipe.base), Passes(recipe, device))
    try:
        needs = dict(stages.needs())
    except NotRehearsed as error:
        raise InputError(
            f"base.model: {recipe.base.model}: a pass of this model depends on more than shapes "
            f"({error}), so its cost cannot be told beforehand; run one step of it "
            "(--set stages.<stage>.max_steps=1, of a stage that samples updates=1) and read its manifest.json."
        ) from error
    scorers = [scorer for name, stage in recipe.stages.items() for scorer in check.scorers_of(name, stage).values()]
    unknown = [scorer for scorer in dict.fromkeys(scorers) if recipe.scorer_source(scorer) != "stage"]
    return Forecast(_named(device), stages.passes.machine, libraries, needs, unknown)


def _named(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def print_forecast(recipe: Recipe, found: Forecast, console: Console) -> None:
    """Print what a run will take as a table."""
    machine = found.machine
    console.print(
        Text(
            f"{recipe.path}: {recipe.name} on this machine ({found.device}): {machine.flops_per_second / 1e9:,.0f} "
            f"GFLOP/s in a linear layer of this base, {machine.bytes_per_second / 1e9:,.0f} GB/s, "
            f"{1e6 * machine.seconds_per_operation:.1f} µs an operation"
        ),
        soft_wrap=True,
    )
    table = plain_table(["about", "steps", "time", "memory", "base", "adapters", "learning", "sampling"])
    for name, need in found.needs.items():
        parts = (found.libraries + need.peak, need.base, need.adapters, need.learning, need.sampling)
        steps = f"{need.steps:,}" if need.steps else ""
        table.add_row(name, steps, metrics.duration(need.seconds), *map(_size, parts))
    console.print(table)
    total = metrics.duration(sum(need.seconds for need in found.needs.values()))
    most = max(found.libraries + need.peak for need in found.needs.values())
    libraries = f", {_size(found.libraries)} of it for the libraries" if found.libraries else ""
    lines = [f"all together about {total}, and {_size(most)} at the most{libraries}; loading not counted"]
    lines += [f"without the time of {scorer}, which is not known" for scorer in found.unknown]
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _size(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


# ---------------------------------------------------------------- stages


@dataclass(frozen=True)
class _Lengths:
    """Of some rows, in tokens."""

    rows: int
    mean: float
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> _Lengths:
        return cls(len(lengths), fmean(lengths) if lengths else 0.0, max(lengths, default=0))

    @property
    def typical(self) -> int:
        return max(1, round(self.mean))


class _Stages:
    """The recipe's stages, with the lengths of their rows."""

    def __init__(
        self, recipe: Recipe, examples: Mapping[Cards, Examples], text_format: TextFormat, passes: Passes
    ) -> None:
        self.recipe, self.examples, self.format, self.passes = recipe, examples, text_format, passes
        self.context = models.context_length(recipe.base)

    def _learn(self, stage: TrainingStage | OnlineStage, rows: int, tokens: int, predicted: int = 0) -> Pass:
        """What a stage's pass and its way back take."""
        stock = not isinstance(stage, OnlineStage)
        again = models.checkpointed(stage.activation_checkpointing, self.passes.trunk, self.passes.device)
        return self.passes.learn(rows, tokens, predicted, stock=stock, checkpointed=again)

    def needs(self) -> Iterator[tuple[str, Need]]:
        for name, stage in self.recipe.stages.items():
            match stage:
                case SFTStage():
                    yield name, self._sft(stage)
                case RewardStage():
                    yield name, self._reward(stage)
                case DPOStage() | KTOStage():
                    yield name, self._compared(stage)
                case OnlineStage():
                    yield name, self._online(stage)
                case RejectionSamplingStage():
                    yield name, self._rejection_sampling(stage)
        card = check.evaluation_card(self.recipe)
        if card is not None:
            yield "evaluation", self._evaluation(card)

    def _need(self, steps: int, seconds: float, trained: int, frozen: int, learning: float, sampling: float) -> Need:
        """trained, frozen: how many adapters of the kind there are."""
        adapters = (TRAINED * trained + frozen) * self.passes.adapter_bytes
        return Need(steps, seconds, self.passes.bytes, adapters, round(learning), round(sampling))

    def _sft(self, stage: SFTStage) -> Need:
        examples, how = self.examples[stage.data], (self.format, stage.max_length or self.context, stage.truncate)
        rows = tokenised(tokenise_demonstrations, examples.train, *how).rows
        lengths = _Lengths.of([len(row["input_ids"]) for row in rows])
        predicted = _Lengths.of([sum(label != IGNORED for label in row["labels"]) for row in rows])
        need = self._trained_on(stage, lengths, predicted)
        heldout = math.ceil(min(HELDOUT, len(examples.heldout)) / stage.microbatch)
        reading = self.passes.read(stage.microbatch, lengths.typical, predicted.typical)
        return replace(need, seconds=need.seconds + 2 * heldout * reading.seconds)

    def _trained_on(self, stage: TrainingStage, lengths: _Lengths, predicted: _Lengths) -> Need:
        """What it takes to learn from rows one by one."""
        steps, pieces = optimizer_steps(lengths.rows, stage), math.ceil(stage.batch_size / stage.microbatch)
        size = min(stage.microbatch, stage.batch_size)
        learn = self._learn(stage, size, lengths.typical, predicted.typical)
        most = self._learn(stage, size, lengths.longest, predicted.longest)
        return self._need(steps, steps * pieces * learn.seconds, 1, 0, most.bytes, 0)

    def _reward(self, stage: RewardStage) -> Need:
        examples = self.examples[stage.data]
        how = (self.format, stage.max_length or self.context, stage.truncate)
        groups = tokenised(tokenise_comparisons, examples.train, *how, stage.ties).rows
        need, row = self._trained_on_groups(stage, groups, stage.microbatch_tokens, bool(stage.lm_coef), reads=0)
        heldout = [tokens_of_group(group) for group in groups[: len(examples.heldout)]]  # about as long
        prompts = _Lengths.of([group["prompt_tokens"] for group in groups])
        answers = min(SAMPLED_TOKENS, row.longest - min(group["prompt_tokens"] for group in groups))
        sampled = self.passes.sample(min(SAMPLED, len(examples.heldout) or 1), prompts.longest, max(1, answers))
        read = self.passes.read(stage.microbatch, row.typical).seconds / (stage.microbatch * row.typical)
        seconds = stage.ensemble * (need.seconds + (sum(heldout) + NORMALISED_ON * row.mean) * read) + sampled.seconds
        return replace(need, seconds=seconds, sampling=round(sampled.bytes))

    def _compared(self, stage: DPOStage | KTOStage) -> Need:
        how = (self.format, stage.max_length or self.context, stage.truncate)
        groups = tokenised(tokenise_comparisons, self.examples[stage.data].train, *how, "drop").rows
        return self._trained_on_groups(stage, groups, None, True, reads=1 if isinstance(stage, DPOStage) else 2)[0]

    def _trained_on_groups(
        self, stage: TrainingStage, groups: Sequence[Any], budget: int | None, logprobs: bool, *, reads: int
    ) -> tuple[Need, _Lengths]:
        """What it takes to learn from the completions of a prompt together, and how long these are with their prompt.

        reads: how often others read what is learnt from.
        """
        rows = _Lengths.of([len(ids) for group in groups for ids in group["completions"]])
        answers = _Lengths.of([len(ids) - group["prompt_tokens"] for group in groups for ids in group["completions"]])
        of_group = _Lengths.of([tokens_of_group(group) for group in groups])
        budget = budget or stage.microbatch * of_group.longest
        steps = optimizer_steps(len(groups), stage)
        tokens = stage.batch_size * of_group.mean  # of a step
        size = max(1, min(budget // rows.typical, round(tokens / rows.mean)))
        at_once = max(1, min(budget // rows.longest, round(tokens / rows.mean)))
        predicted = (answers.typical, answers.longest) if logprobs else (0, 0)
        learn = self._learn(stage, size, rows.typical, predicted[0])
        read = self.passes.read(size, rows.typical, predicted[0])
        most = self._learn(stage, at_once, rows.longest, predicted[1])
        pieces = tokens / (size * rows.typical)
        seconds = steps * pieces * (learn.seconds + reads * read.seconds)
        return self._need(steps, seconds, 1, 2 if reads else 0, most.bytes, 0), rows

    def _prompts(self, stage: OnlineStage | RejectionSamplingStage) -> _Lengths:
        room = None if self.context is None else self.context - stage.max_new_tokens
        rows = prompts_of(self.examples[stage.prompts]).train
        return _Lengths.of(list(map(len, tokenised(tokenise_prompts, rows, self.format, room, stage.truncate).rows)))

    def _tokens(self, prompts: _Lengths, together: float) -> int:
        """Return how many tokens of a prompt a pass computes for each of its completions, so many of which share it."""
        return math.ceil(prompts.typical / together) if self.passes.unpadded else prompts.typical

    def _reward_roles(self, scorer: str) -> int:
        """Return how many adapters score a completion: the members of a reward stage."""
        stage = self.recipe.stages.get(scorer)
        return stage.ensemble if isinstance(stage, RewardStage) else 0

    def _online(self, stage: OnlineStage) -> Need:
        prompts, new, passes = self._prompts(stage), stage.max_new_tokens, self.passes
        size = min(stage.microbatch, stage.batch_size // stage.minibatches)
        pieces = math.ceil(stage.batch_size / size)
        roles = self._reward_roles(stage.reward)
        value_epochs = stage.own_value_epochs if isinstance(stage, PPOStage) else 0
        own_value = value_epochs > 0

        tokens = self._tokens(prompts, min(size, 1 + (stage.group - 1) / stage.minibatches)) + new
        sample = passes.sample(stage.batch_size, prompts.typical, new, stage.group)
        read = passes.read(size, self._tokens(prompts, min(size, stage.group)) + new)
        read_logprobs = passes.read(size, tokens, new)
        learn, learn_value = self._learn(stage, size, tokens, new), self._learn(stage, size, tokens)
        update = (
            sample.seconds
            + (2 * pieces - 1) * read_logprobs.seconds  # policy and reference; learning begins with one of the passes
            + pieces * (roles + own_value) * read.seconds
            + pieces * (stage.epochs * learn.seconds + value_epochs * learn_value.seconds)
        )
        seconds = stage.updates * update
        if stage.watch is not None:
            looks = 1 + math.ceil(stage.updates / stage.watch.every)
            watched = passes.sample(stage.watch.count, prompts.typical, new).seconds
            reads = math.ceil(stage.watch.count / size) * (2 * read_logprobs.seconds + roles * read.seconds)
            seconds += looks * (watched + reads)
        if stage.ptx is not None:
            how = (self.format, self.context, stage.truncate)
            rows = tokenised(tokenise_demonstrations, self.examples[stage.ptx.data].train, *how).rows
            texts = _Lengths.of([len(row["input_ids"]) for row in rows])
            mixed = self._learn(stage, size, texts.typical, texts.typical).seconds * stage.ptx.batch_size / size
            seconds += stage.updates * stage.epochs * stage.minibatches * mixed
        most = self._learn(stage, size, prompts.longest + new, new)
        at_once = passes.sample(stage.batch_size, prompts.longest, new)
        kept = 0  # of the reward model, for a head on the trunk
        if isinstance(stage, PPOStage) and not own_value and roles:
            state = passes.config.hidden_size * getattr(torch, self.recipe.base.dtype).itemsize
            kept = stage.batch_size * new * state
        need = self._need(stage.updates, seconds, 1 + own_value, 1 + roles, most.bytes + kept, at_once.bytes)
        return self._on_a_shared_base(need)

    def _rejection_sampling(self, stage: RejectionSamplingStage) -> Need:
        prompts, new, passes = self._prompts(stage), stage.max_new_tokens, self.passes
        group = min(stage.completions_per_prompt, stage.sampled_at_once)
        roles, tokens = self._reward_roles(stage.reward), self._tokens(prompts, group) + new
        sample = passes.sample(stage.sampled_at_once, prompts.typical, new, group)
        score = passes.read(stage.sampled_at_once, tokens).seconds * roles
        times = math.ceil(prompts.rows * stage.completions_per_prompt / stage.sampled_at_once)
        rows = _Lengths(prompts.rows, prompts.mean + new, prompts.longest + new)
        need = self._trained_on(stage, rows, _Lengths(prompts.rows, new, new))
        most = passes.sample(stage.sampled_at_once, prompts.longest, new)
        seconds = need.seconds + times * (sample.seconds + score)
        return self._on_a_shared_base(replace(need, seconds=seconds, sampling=round(most.bytes)))

    def _on_a_shared_base(self, need: Need) -> Need:
        return replace(need, base=need.base + self.passes.copied_bytes)

    def _evaluation(self, card: Cards) -> Need:
        """The closing table: what every policy answers, and what reference and reward model say of it."""
        truncate, new = check.evaluation_lengths(self.recipe)
        room = None if self.context is None else self.context - new
        heldout = prompts_of(self.examples[card]).heldout
        rows = tokenised(tokenise_prompts, heldout, self.format, room, truncate).rows[: self.recipe.evaluation.count]
        prompts, size = _Lengths.of(list(map(len, rows))), min(self.recipe.evaluation.batch_size, len(rows) or 1)
        sampling, passes = self.recipe.last_sampling(), self.passes
        roles = 0 if sampling is None else self._reward_roles(sampling[1].reward)
        policies = 1 + sum(isinstance(stage, PolicyStage) for stage in self.recipe.stages.values())
        tokens, pieces = prompts.typical + new, math.ceil(prompts.rows / size)
        answer = passes.sample(size, prompts.typical, new).seconds + 2 * passes.read(size, tokens, new).seconds
        seconds = policies * pieces * (answer + roles * passes.read(size, tokens).seconds)
        most = passes.sample(size, prompts.longest, new)
        return self._on_a_shared_base(self._need(0, seconds, 0, policies - 1 + roles, 0, most.bytes))
