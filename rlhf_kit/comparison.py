"""`rlhf-kit eval`: every policy of a run, and of another one, on the same held-out prompts, with all that is measured.

Each system answers each prompt once, as in the closing table and with its random numbers. Beside the means stand win
rates of each tuned policy over what it started from, best-of-n sampling from that start as the baseline that needs no
training, how well each system still models text that it was not tuned on, and what every stage has cost.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import torch

from rlhf_kit import artifacts, benchmark_tasks, health, sampling
from rlhf_kit.check import evaluation_card, evaluation_lengths
from rlhf_kit.collate import (
    compared,
    tokenise_comparisons,
    tokenise_demonstrations,
)
from rlhf_kit.data_cards import load_card
from rlhf_kit.errors import InputError
from rlhf_kit.evaluation import Examination, System, heldout_prompts, win_rates
from rlhf_kit.examples.loading import Examples, Share, load_examples, mixed
from rlhf_kit.examples.rows import Prompt
from rlhf_kit.finished import FinishedRun
from rlhf_kit.judges import HumanJudge, Judge, blind_pairs
from rlhf_kit.maths import diversity, statistics
from rlhf_kit.maths.best_of_n import expected_best, kl_bound
from rlhf_kit.metrics import progress
from rlhf_kit.models import BASE, SharedBase
from rlhf_kit.pieces import Pieces
from rlhf_kit.ptx import mean_loss
from rlhf_kit.recipe import Cards, DPOStage, KTOStage, OnlineStage, PPOStage, RewardStage, SFTStage
from rlhf_kit.rollout import microbatches

OTHER = "policy of another run"
"""Its role; its name may hold what the name of a role may not."""
SHOWN = 6
"""Prompts of which the answers are kept."""
TEXTS, AT_ONCE = 256, 32
"""Held-out texts at most that perplexity is measured on, and texts of full length read at a time."""
REFUSAL = re.compile(
    r"\W*((i'?m|i am) (sorry|unable|not able)|sorry, (but )?i|i (can ?not|can'?t|won'?t)|as an ai\b|i must decline"
    r"|i apologi[sz]e, but)",
    re.IGNORECASE,
)
"""How an answer begins that refuses, in English."""


@dataclass(frozen=True)
class Asked:
    """What is to be measured; None leaves it to the run."""

    systems: tuple[str, ...] | None = None
    against: Path | None = None
    """Another run directory on the same base, whose newest policy joins."""
    prompts: tuple[Prompt, ...] | None = None
    count: int | None = None
    best_of: int = 64
    best_of_prompts: int = 64
    text: Path | None = None
    """A data card; None takes the ptx texts, or the demonstrations of the SFT stage."""
    preferences: tuple[Path, ...] = ()
    """Data cards of comparisons that the reward model is measured on."""
    tasks: tuple[str, ...] = ()
    """Of lm-evaluation-harness: names, or YAML files."""
    fewshot: int | None = None
    task_limit: int | None = None
    batch_size: int | None = None
    judge: Judge | None = None
    pairs_out: Path | None = None
    """Where blind pairs for people to judge go."""


class Comparison:
    """One evaluation of a finished run."""

    def __init__(self, run: FinishedRun, asked: Asked) -> None:
        self.run, self.asked = run, asked
        named = asked.systems or (BASE, *self._starts(), *self.run.finished_policies())
        self.systems = {name: run.policy(name) for name in named}
        if asked.against is not None:
            self.systems |= self._other(asked.against)
        names = [path.stem for path in asked.preferences]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"--preferences: two cards are called {twice[0]}; figures go by the name, so rename one.")
        if len(self.systems) < 2:
            raise InputError(f"{run.folder}: only {', '.join(named)} to look at; a comparison has two systems or more.")

    def _starts(self) -> list[str]:
        """Return the policies that finished stages tuned further and none has made, by the closing table's names."""
        used = {self.run.start_of(name) for name in self.run.finished_policies()}
        return [name for name in self.run.recipe.starts() if name in used]

    def _hashes(self) -> dict[str, str]:
        """Return the hash of every finished stage's manifest."""
        return {name: artifacts.manifest_hash(self.run.folder / name) for name in self._manifests()}

    def _manifests(self) -> dict[str, dict[str, Any]]:
        """Return the manifest of every finished stage."""
        found = {name: artifacts.read_manifest(self.run.folder / name) for name in self.run.recipe.stages}
        return {name: manifest for name, manifest in found.items() if manifest is not None}

    def _other(self, folder: Path) -> dict[str, str]:
        """Return the newest policy of another run as a role on this run's base.

        Raises: InputError when it was made on another base.
        """
        other = FinishedRun(folder)
        stage = other.newest_policy()
        if stage == BASE:
            raise InputError(f"{folder}: has no finished policy to compare with.")
        theirs, ours = (
            other.manifest(stage)["base"]["sha256"],
            self.run.manifest(self.run.finished_policies()[-1])["base"]["sha256"],
        )
        if theirs != ours:
            raise InputError(f"{folder}: was made on another base than {self.run.folder}; both must be on the same.")
        name = f"{other.recipe.name}:{stage}"
        if name in self.systems or folder.resolve() == self.run.folder.resolve():
            name = f"{folder.name}:{stage}"
        self.run.shared.add(OTHER, folder / stage / "adapter")
        return {name: OTHER}

    @cached_property
    def examination(self) -> Examination:
        """The held-out prompts and what answers are measured with."""
        run, recipe = self.run, self.run.recipe
        limit, temperature = sampling.usual_settings(run)
        limit = recipe.evaluation.max_new_tokens or limit
        count = self.asked.count or recipe.evaluation.count
        if self.asked.prompts is not None:
            prompts = list(self.asked.prompts[:count])
            ids = [
                sampling.fitting_ids(run, prompt, limit, f"prompt {number}") for number, prompt in enumerate(prompts, 1)
            ]
        else:
            card = evaluation_card(recipe)
            if card is None:
                raise InputError(f"{run.folder}: its recipe names no prompts to measure on; use --prompts FILE.")
            limit = evaluation_lengths(recipe)[1]
            prompts, ids = heldout_prompts(recipe, {card: self._examples(card)}, run.text_format, count)
        done = run.finished_policies()
        tuned = [name for name in self.systems if name in done and run.start_of(name) in self.systems]
        reference = run.start_of(tuned[-1]) if tuned else next(iter(self.systems))
        return Examination(
            shared=run.shared,
            text_format=run.text_format,
            prompts=prompts,
            prompt_ids=ids,
            limit=limit,
            temperature=temperature,
            reference=reference,
            reward=run.reward_if_any(),
            gold=recipe.evaluation.gold,
            seed=recipe.seed,
            pieces=Pieces(
                "--batch-size", self.asked.batch_size or recipe.evaluation.batch_size, "prompts", run.accelerator
            ),
        )

    def _examples(self, cards: Cards) -> Examples:
        """Return the rows of the card, or the mixture, that the recipe names.

        Raises: InputError when it is not there any more.
        """
        recipe = self.run.recipe
        try:
            if isinstance(cards, str):
                return load_examples(load_card(cards, recipe.data_root))
            shares = [
                Share(load_examples(load_card(portion.card, recipe.data_root)), portion.weight, portion.cap)
                for portion in cards
            ]
            return mixed(shares)
        except InputError as error:
            raise InputError([*error.problems, "to measure on other prompts: --prompts FILE"]) from error

    # ------------------------------------------------------------ measuring

    def measure(self) -> dict[str, Any]:
        """Return `eval.json`."""
        examination = self.examination
        answers = {
            name: examination.answers(role) for name, role in progress(self.systems.items(), desc="evaluating, systems")
        }
        pairs = self._pairs()
        measured: dict[str, Any] = {
            "schema": artifacts.SCHEMA,
            "made_from": {"stages": self._hashes()},
            "rlhf_kit": artifacts.__version__,
            "prompts": {"count": len(examination.prompts), "hash": artifacts.hash_of(list(examination.prompts))},
            "reference": examination.reference,
            "verdict": "gold" if examination.gold else "score" if examination.reward else None,
            "systems": {name: figures(system) for name, system in answers.items()},
            "win_rate": {
                f"{after}/{before}": found
                for after, before in pairs
                if (found := won(answers[after], answers[before])) is not None
            },
            "judge": None,
            "best_of_n": None,
            "frontier": {},
            "text": self._text(),
            "tasks": self._tasks(),
            "reward_sets": dict(map(self._reward_set, self.asked.preferences)),
            "cost": self._cost(),
            "examples": self._examples_shown(answers),
        }
        texts = {
            f"{after}/{before}": (examination.prompts, answers[after].texts, answers[before].texts)
            for after, before in pairs
        }
        if self.asked.pairs_out is not None:
            rows = [row for pair, columns in texts.items() for row in blind_pairs(pair, *columns)]
            artifacts.write_lines(self.asked.pairs_out, sorted(rows, key=lambda row: str(row["id"])))
        if (judge := self.asked.judge) is not None:
            measured["judge"] = {"name": judge.name} | {
                pair: judge.verdicts(pair, *columns) for pair, columns in texts.items()
            }
            if isinstance(judge, HumanJudge):
                judge.check_all_met()
        if self.asked.best_of > 1 and examination.reward is not None:
            best = self._best_of_n(answers)
            measured["best_of_n"], measured["frontier"] = best
        return measured

    def _pairs(self) -> list[tuple[str, str]]:
        """Return the systems that are compared: each with what it started from, and another run's with ours."""
        ours = (BASE, *self._starts(), *self.run.policies())
        own = [name for name in self.systems if name in ours]
        pairs = [(name, self.run.start_of(name)) for name in own if name != BASE]
        others = [name for name in self.systems if name not in own]
        return [pair for pair in pairs if pair[1] in self.systems] + [(own[-1], name) for name in others]

    def _examples_shown(self, answers: Mapping[str, System]) -> list[dict[str, Any]]:
        """Return the first prompts with what every system answered, and how it was scored."""
        return [
            {
                "prompt": self.examination.prompts[row],
                "answers": {
                    name: {
                        "text": system.texts[row],
                        "score": system.scores[row] if system.scores else None,
                        "gold": system.gold[row] if system.gold else None,
                        "kl": system.kl[row],
                        "length": system.lengths[row],
                        **self._marked(system, name, row),
                    }
                    for name, system in answers.items()
                },
            }
            for row in range(min(SHOWN, len(self.examination.prompts)))
        ]

    def _marked(self, system: System, name: str, row: int) -> dict[str, Any]:
        """Return "tokens", the text and KL of each token of an answer; nothing of the reference, which has none."""
        if name == self.examination.reference:
            return {}
        asked, pieces = self.examination.prompt_ids[row], []
        before = ""
        for count, divergence in enumerate(system.token_kl[row][: len(system.tokens[row])], start=1):
            text = self.run.text_format.completion_text(asked, system.tokens[row][:count])
            text = text if text.startswith(before) else before  # a letter of several tokens is shown with its last one
            pieces.append([text[len(before) :], divergence])
            before = text
        return {"tokens": pieces}

    def _best_of_n(self, answers: Mapping[str, System]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what best-of-n of the reference reaches, n in powers of two, and where tuned policies stand to it.

        Both are measured on the same prompts, the first `best_of_prompts`.
        """
        whole, samples = self.examination, self.asked.best_of
        rows = range(min(self.asked.best_of_prompts, len(whole.prompts)))
        some = whole.rows(rows)
        uniform = torch.stack([some.uniforms("best of n", draw) for draw in range(samples)], dim=1).flatten(0, 1)
        columns: dict[str, list[float]] = {"score": [], "gold": [], "length": []}  # of all samples of a prompt in turn
        asked = [row for row in rows for _ in range(samples)]
        with torch.no_grad():
            pieces = list(microbatches(range(len(asked)), whole.pieces.size))
            for piece in progress(pieces, desc=f"best of n, samples of {whole.reference}"):
                several = some.rows([asked[number] for number in piece])
                rollout, written = several.sampled(whole.reference, uniform[piece])
                columns["score"] += several.scores(written, whole.reference) or []
                columns["gold"] += several.judged(written.texts) or []
                columns["length"] += rollout.completion_mask.sum(1).tolist()
        by_prompt = {name: [*microbatches(values, samples)] for name, values in columns.items()}
        points = []
        for n in powers_of_two(self.asked.best_of):
            per_prompt = {
                name: [expected_best(by_prompt["score"][row], values[row], n) for row in rows]
                for name, values in by_prompt.items()
                if values
            }
            means = {name: fmean(values) for name, values in per_prompt.items()}
            points.append({"n": n, "kl_bound": kl_bound(n), **means})
        verdict = "gold" if by_prompt["gold"] else "score"
        frontier = {
            name: self._against(system, rows, verdict, [(point["kl_bound"], point[verdict]) for point in points])
            for name, system in answers.items()
            if name not in (BASE, whole.reference)
        }
        best = {"of": whole.reference, "samples": self.asked.best_of, "prompts": len(rows), "points": points}
        return best, frontier

    def _against(
        self, system: System, rows: Sequence[int], verdict: str, curve: Sequence[tuple[float, float]]
    ) -> dict[str, Any]:
        """Return a system's KL and verdict on some prompts, and how much KL best-of-n needs for as much.

        curve: (KL bound, verdict) of best-of-n. "equal_kl" is None where no n measured reaches the system.
        """
        values = system.gold if verdict == "gold" else system.scores
        assert values is not None
        reached, divergence = fmean(values[row] for row in rows), fmean(system.kl[row] for row in rows)
        equal = interpolated(curve, reached)
        ratio = None if not equal or equal <= 0 else divergence / equal
        return {"verdict": verdict, "value": reached, "kl": divergence, "equal_kl": equal, "kl_ratio": ratio}

    def _reward_set(self, path: Path) -> tuple[str, dict[str, Any]]:
        """Return a card's name and the reward model's health on its comparisons.

        All rows count, but of a card that a stage was trained on the held-out ones alone.

        Raises: InputError when it holds no comparisons, or nothing scores.
        """
        run, reward = self.run, self.examination.reward
        examples = load_examples(load_card(path, run.recipe.data_root))
        if examples.card.kind not in ("preferences", "rankings"):
            raise InputError(f"{path}: is of kind {examples.card.kind}; --preferences takes preferences or rankings.")
        if reward is None:
            raise InputError(f"--preferences {path}: {run.folder} has no reward model to measure.")
        data = [part for manifest in self._manifests().values() for part in manifest["data"].values()]
        seen = {part.get("content_hash") for part in data}
        rows = examples.heldout if examples.content_hash in seen else [*examples.heldout, *examples.train]
        groups = tokenise_comparisons(rows, run.text_format, run.context, "drop")
        kept = [rows[row] for row in groups.kept]
        texts = [(row.prompt, text) for row in kept for text in compared(row).completions]
        scored = sampling.scored(run, reward, texts, batch_size=self.examination.pieces.size)
        scores = np.asarray([row["score"] for row in scored])
        lengths = [len(ids) - group["prompt_tokens"] for group in groups.rows for ids in group["completions"]]
        overlaps = [health.overlap(prompt, text) for prompt, text in texts]
        answers = health.Answers(scores, scores * reward.std + reward.mean, np.asarray(lengths), np.asarray(overlaps))
        return examples.card.name, health.report(health.pairs_of(groups.rows), answers, kept, {}, {})

    def _tasks(self) -> dict[str, Any]:
        """Return what every system reaches on the tasks, by task."""
        if not self.asked.tasks:
            return {}
        return benchmark_tasks.accuracies(
            self.run,
            self.systems,
            self.asked.tasks,
            fewshot=self.asked.fewshot,
            limit=self.asked.task_limit,
            batch_size=self.examination.pieces.size,
        )

    def _text(self) -> dict[str, Any] | None:
        """Return the perplexity of every system on held-out text, and its change from the reference's."""
        if self.asked.text is not None:
            examples = load_examples(load_card(self.asked.text, self.run.recipe.data_root))
        elif (card := self._text_of_run()) is not None:
            examples = self._examples(card)
        else:
            return None
        if examples.card.kind not in ("text", "demonstrations"):
            seen = f"{examples.card.path}: is of kind {examples.card.kind}"
            raise InputError(f"{seen}; --text takes a card of kind text or demonstrations.")
        rows = (examples.heldout or examples.train)[:TEXTS]
        tokenised = tokenise_demonstrations(rows, self.run.text_format, self.run.context, "drop")
        how = (tokenised.rows, self.run.text_format.pad_id, AT_ONCE)
        found = {name: math.exp(mean_loss(self.run.shared, role, *how)) for name, role in self.systems.items()}
        return {
            "card": examples.card.name,
            "rows": len(tokenised.rows),
            "heldout": bool(examples.heldout),
            "perplexity": found,
            "change": {name: value / found[self.examination.reference] - 1 for name, value in found.items()},
        }

    def _text_of_run(self) -> Cards | None:
        stages = self.run.recipe.stages.values()
        ptx = [stage.ptx.data for stage in stages if isinstance(stage, OnlineStage) and stage.ptx is not None]
        shown = [stage.data for stage in stages if isinstance(stage, SFTStage)]
        return next(chain(ptx, shown), None)

    def _cost(self) -> dict[str, Any]:
        """Return for each finished stage wall time, tokens, peak memory, and an estimate of its arithmetic."""
        parameters = sum(base_parameters(self.run.shared))
        asked = fmean(map(len, self.examination.prompt_ids))
        costs = {}
        for name, manifest in self._manifests().items():
            stage = self.run.recipe.stages[name]
            tokens, each = manifest["cost"]["tokens"], operations_per_token(stage, manifest, asked)
            flops = parameters * tokens * each if tokens and each else None
            costs[name] = {**manifest["cost"], "flops": flops, "6PD": tokens and 6 * parameters * tokens}
        return costs


def operations_per_token(stage: Any, manifest: Mapping[str, Any], prompt_tokens: float) -> float | None:
    """Return about how many operations a stage does for each base parameter and each token that its manifest counts.

    A forward pass takes 2; the backward pass through frozen weights 2 more, for nothing is summed up for the weights.
    A stage that learns online counts completion tokens and reads prompts too; per completion it samples (2), reads
    policy, reference and reward, and value (2 each), and learns (4 an epoch, and 4 for a value adapter's). None where
    that cannot be said.
    """
    if isinstance(stage, SFTStage | RewardStage):
        return 4.0
    if isinstance(stage, DPOStage | KTOStage):
        return 6.0  # the reference reads too
    if not isinstance(stage, OnlineStage):
        return None
    length = max(1.0, manifest["metrics"].get("rollout/length") or 1.0)
    value_epochs = stage.own_value_epochs if isinstance(stage, PPOStage) else 0
    return (prompt_tokens + length) / length * (2 * (4 + (value_epochs > 0)) + 4 * (stage.epochs + value_epochs))


def base_parameters(shared: SharedBase) -> Iterator[int]:
    """Yield how many numbers each frozen weight of the trunk holds; 4-bit weights hold two a byte."""
    for name, parameter in shared.trunk.named_parameters():
        if "lora_" not in name:
            packed = getattr(parameter, "quant_state", None)
            yield math.prod(packed.shape) if packed is not None else parameter.numel()


# ---------------------------------------------------------------- figures


def figures(system: System) -> dict[str, Any]:
    """Return the means of a system over the prompts."""
    kl_error = statistics.mean_and_error(system.kl)[1]
    scored: dict[str, Any] = {}
    for name, values in (("score", system.scores), ("gold", system.gold)):
        if values is not None:
            mean, error = statistics.mean_and_error(values)
            scored |= {name: mean, f"{name}_std": pstdev(values), f"{name}_error": error}
    return {
        **scored,
        "kl": fmean(system.kl),
        "kl_error": kl_error,
        "kl_k3": fmean(system.kl_k3),
        "length": fmean(system.lengths),
        "ended": fmean(system.ended),
        "repetition": fmean(map(diversity.repetition, system.tokens)),
        "distinct_1": diversity.distinct(system.tokens, 1),
        "distinct_2": diversity.distinct(system.tokens, 2),
        "refusals": fmean(bool(REFUSAL.match(text)) for text in system.texts),
        "reference_perplexity": math.exp(-math.fsum(system.reference) / math.fsum(system.lengths)),
    }


def won(after: System, before: System) -> dict[str, Any] | None:
    """Return how often one system beats another on the same prompts, ties counted half and told; None where nothing
    scores.
    """
    rates = win_rates(after, before)
    if rates is None:
        return None
    plain, matched = rates
    ties = fmean(one == other for one, other in zip(after.verdict or [], before.verdict or [], strict=True))
    return {
        "rate": plain.rate,
        "ci": list(plain.ci),
        "ties": ties,
        "length_controlled": matched.rate,
        "length_controlled_ci": list(matched.ci),
    }


def powers_of_two(most: int) -> list[int]:
    """Return 1, 2, 4, ... up to `most`, which is the last."""
    return [*(2**power for power in range(most.bit_length()) if 2**power < most), most]


def interpolated(curve: Sequence[tuple[float, float]], value: float) -> float | None:
    """Return the first x at which a curve of (x, y), of straight lines, reaches `value`; None if it never does."""
    before: tuple[float, float] | None = None
    for x, y in curve:
        if y >= value:
            if before is None or y == before[1]:
                return x
            return before[0] + (x - before[0]) * (value - before[1]) / (y - before[1])
        before = (x, y)
    return None
