"""Is a reward model any good? What its scores of held-out comparisons, samples and spoilt answers say of it.

Everything here is arithmetic on scores that somebody else made: `report` puts the figures together that a reward stage
leaves in its manifest, `concerns` says in words which of them should worry, `unmet` which of a recipe's requirements
they miss.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from rlhf_kit.examples.rows import Preference, Prompt, Ranking
from rlhf_kit.maths import statistics
from rlhf_kit.recipe import Require

BINS = 24
"""Of a histogram of scores."""
THIRDS = ("small", "medium", "large")
"""Of the pairs, by their margin or votes."""
MOST_VALUES = 20
"""Of a slice, or annotators: those with most pairs."""


@dataclass(frozen=True)
class Answers:
    """Held-out completions, one entry each: what is known of them besides their text."""

    score: np.ndarray
    """In standard deviations of the demonstrations."""
    logit: np.ndarray
    """Raw score; sigma of the difference of two is the model's probability that the first is better."""
    tokens: np.ndarray
    """Of the completion, its end token included."""
    overlap: np.ndarray
    """Share of the completion's different words that the prompt has too; 0 of none."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of held-out completions that were judged, one entry each; ties are not among them."""

    chosen: np.ndarray
    """Which of the answers is the better one; `rejected` is the other."""
    rejected: np.ndarray
    probability: np.ndarray
    """That `chosen` is the better one, by the votes; 1 where there was one judgement."""
    margin: np.ndarray
    prompt: np.ndarray
    """Which prompt: equal prompts have equal numbers."""
    row: np.ndarray
    """Which comparison of the card."""

    def where(self, picked: np.ndarray) -> Pairs:
        """Return some of the pairs, by their indices or a mask."""
        return Pairs(*(getattr(self, field.name)[picked] for field in fields(self)))

    def __len__(self) -> int:
        return len(self.chosen)


def pairs_of(groups: Sequence[Mapping[str, Any]]) -> Pairs:
    """Return the pairs of some prompts, rows of `collate.tokenise_comparisons`; answers are numbered through."""
    columns: dict[str, list[Any]] = {field.name: [] for field in fields(Pairs)}
    numbers: dict[tuple[int, ...], int] = {}
    first = 0
    for row, group in enumerate(groups):
        prompt = numbers.setdefault(tuple(group["completions"][0][: group["prompt_tokens"]]), len(numbers))
        for chosen, rejected, probability, margin in zip(
            group["chosen"], group["rejected"], group["probability"], group["margin"], strict=True
        ):
            if probability == 0.5:
                continue
            found = (first + chosen, first + rejected, probability, margin, prompt, row)
            for column, value in zip(columns.values(), found, strict=True):
                column.append(value)
        first += len(group["completions"])
    return Pairs(**{name: np.asarray(column) for name, column in columns.items()})


def accuracy(pairs: Pairs, value: np.ndarray) -> dict[str, Any]:
    """Return how often the better answer of a pair has the higher value, equal ones counted half, with its 95 %
    interval; pairs of one prompt are not independent and count as fewer there.

    value: of every answer.
    """
    difference = value[pairs.chosen] - value[pairs.rejected]
    right = (difference > 0) + 0.5 * (difference == 0)
    prompts, of_prompt = np.unique(pairs.prompt, return_inverse=True)
    successes, trials = np.bincount(of_prompt, right), np.bincount(of_prompt)
    interval = statistics.clustered_wilson_interval(successes.tolist(), trials.tolist())
    return {
        "accuracy": float(right.mean()),
        "accuracy_ci": list(interval),
        "pairs": len(pairs),
        "prompts": len(prompts),
    }


def report(
    pairs: Pairs,
    answers: Answers,
    rows: Sequence[Preference | Ranking],
    samples: Mapping[str, np.ndarray],
    probes: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Return the health report, ready for JSON.

    rows: the comparisons that the pairs are of.
    samples: normalised scores by what was scored, such as "demonstrations".
    probes: by what was done to an answer, the differences that it made to its normalised score.
    """
    right, length = accuracy(pairs, answers.score), answers.tokens
    rules = {
        "longer wins": accuracy(pairs, length.astype(float)),
        "shorter wins": accuracy(pairs, -length.astype(float)),
        "more words of the prompt win": accuracy(pairs, answers.overlap),
    }
    longer = length[pairs.chosen] != length[pairs.rejected]
    return {
        **right,
        "by": dict(_by(pairs, answers, rows)),
        "slices": dict(_by_value(pairs, answers, [row.slices or {} for row in rows])),
        "calibration": calibration(pairs, answers.logit),
        "rules": rules,
        "length": {
            "correlation": statistics.correlation(answers.score, length),
            "longer_scores_higher": _longer_is_higher(pairs.where(longer), answers) if longer.any() else None,
        },
        "scores": _scores(
            {"chosen": answers.score[pairs.chosen], "rejected": answers.score[pairs.rejected], **samples}
        ),
        "probes": {
            name: {
                "mean_change": float(change.mean()),
                "scores_higher": float(((change > 0) + 0.5 * (change == 0)).mean()),
                "rows": len(change),
            }
            for name, change in probes.items()
            if len(change)
        },
    }


Parts = dict[str, dict[str, Any]]
"""Accuracy by part."""


def _by(pairs: Pairs, answers: Answers, rows: Sequence[Preference | Ranking]) -> Iterator[tuple[str, Parts]]:
    """Yield accuracy by what every comparison has: lengths; and by what some have: margin, votes, annotator."""
    longer = answers.tokens[pairs.chosen] - answers.tokens[pairs.rejected]
    which = {"chosen is shorter": longer < 0, "equally long": longer == 0, "chosen is longer": longer > 0}
    yield "length", _parts(pairs, answers, which)
    for name, strength in (("margin", pairs.margin), ("votes", pairs.probability)):
        if len(np.unique(strength)) > 1:
            third = np.searchsorted(np.quantile(strength, [1 / 3, 2 / 3]), strength, side="left")
            yield name, _parts(pairs, answers, {part: third == number for number, part in enumerate(THIRDS)})
    yield from _by_value(pairs, answers, [{"annotator": row.annotator} if row.annotator else {} for row in rows])


def _by_value(pairs: Pairs, answers: Answers, values: Sequence[Mapping[str, str]]) -> Iterator[tuple[str, Parts]]:
    """Yield accuracy by each of the names that comparisons have values for; of very many, the most frequent values."""
    for name in sorted({name for row in values for name in row}):
        column = [values[row].get(name) for row in pairs.row]
        most = [value for value, _ in Counter(value for value in column if value is not None).most_common(MOST_VALUES)]
        which = {value: np.asarray([found == value for found in column]) for value in sorted(most)}
        yield name, _parts(pairs, answers, which)


def _parts(pairs: Pairs, answers: Answers, which: Mapping[str, np.ndarray]) -> Parts:
    return {part: accuracy(pairs.where(mask), answers.score) for part, mask in which.items() if mask.any()}


def calibration(pairs: Pairs, logit: np.ndarray, bins: int = 10) -> dict[str, Any]:
    """Return how far sigma(difference of raw scores) is from how often it is right.

    The model's confidence in the answer that it prefers, 0.5 to 1, is put into bins of equal width; "error" is the
    expected calibration error, the mean distance of confidence and accuracy over the pairs; "curve" has the bins.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2.
    """
    difference = logit[pairs.chosen] - logit[pairs.rejected]
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    right = np.where(difference > 0, pairs.probability, np.where(difference < 0, 1 - pairs.probability, 0.5))
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    curve = []
    for number in range(bins):
        inside = place == number
        if inside.any():
            curve.append(
                {
                    "from": 0.5 + number / (2 * bins),
                    "to": 0.5 + (number + 1) / (2 * bins),
                    "pairs": int(inside.sum()),
                    "confidence": float(confidence[inside].mean()),
                    "accuracy": float(right[inside].mean()),
                }
            )
    error = sum(part["pairs"] * abs(part["confidence"] - part["accuracy"]) for part in curve) / len(pairs)
    return {"error": error, "curve": curve}


def _longer_is_higher(pairs: Pairs, answers: Answers) -> dict[str, float]:
    """Return how often the longer of two answers is preferred: by the model, and by those who judged."""
    longer = answers.tokens[pairs.chosen] > answers.tokens[pairs.rejected]
    difference = answers.score[pairs.chosen] - answers.score[pairs.rejected]
    by_model = np.where(difference == 0, 0.5, (difference > 0) == longer)
    return {"model": float(by_model.mean()), "labels": float(longer.mean())}


def _scores(samples: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return mean, standard deviation and a histogram of each; the histograms have the same edges."""
    every = np.concatenate(list(samples.values()))
    edges = np.histogram_bin_edges(every, BINS)
    return {
        "edges": edges.tolist(),
        "of": {
            name: {
                "mean": float(scores.mean()),
                "std": float(scores.std()),
                "count": len(scores),
                "histogram": np.histogram(scores, edges)[0].tolist(),
            }
            for name, scores in samples.items()
            if len(scores)
        },
    }


# ---------------------------------------------------------------- answers that are spoilt


def _shuffled(prompt: str, answer: str, draw: random.Random) -> str:
    words = answer.split()
    draw.shuffle(words)
    return " ".join(words)


SPOILT: Mapping[str, Callable[[str, str, random.Random], str]] = {
    "empty": lambda prompt, answer, draw: "",
    "repeated": lambda prompt, answer, draw: f"{answer} {answer.strip()}",
    "truncated": lambda prompt, answer, draw: " ".join(answer.split(" ")[: (len(answer.split(" ")) + 1) // 2]),
    "words shuffled": _shuffled,
    "prompt echoed": lambda prompt, answer, draw: prompt,
}
"""What a probe makes of the text of a prompt and of a good answer to it. None should score higher than the answer."""


def spoilt(prompt: Prompt, answer: str, seed: int) -> dict[str, str]:
    """Return the probes of an answer that differ from it, by name."""
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    made = {name: spoil(asked, answer, random.Random(seed)) for name, spoil in SPOILT.items()}
    return {name: text for name, text in made.items() if text.strip() != answer.strip()}


def overlap(prompt: Prompt, answer: str) -> float:
    """Return the share of an answer's different words that the prompt has too; 0 of no words."""
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    asked = {word for text in texts for word in text.lower().split()}
    words = set(answer.lower().split())
    return len(words & asked) / len(words) if words else 0.0


# ---------------------------------------------------------------- in words


def concerns(health: Mapping[str, Any]) -> list[str]:
    """Return what of a health report should worry somebody who is about to train against this reward model."""
    return list(_concerns(health))


def _concerns(health: Mapping[str, Any]) -> Iterator[str]:
    low = health["accuracy_ci"][0]
    if low <= 0.5:
        yield (
            f"its held-out accuracy, {health['accuracy']:.3f}, may be that of a coin: the 95 % interval begins at "
            f"{low:.3f}; more pairs, or more held-out ones, would tell"
        )
    rule, best = max(health["rules"].items(), key=lambda item: item[1]["accuracy"])
    if best["accuracy"] >= health["accuracy"]:
        yield (
            f'the rule "{rule}" is right in {best["accuracy"]:.3f} of the pairs, the model in '
            f"{health['accuracy']:.3f}; PPO would learn the rule"
        )
    longer = health["length"]["longer_scores_higher"]
    if longer and longer["model"] > max(0.6, longer["labels"] + 0.1):
        yield (
            f"it prefers the longer answer in {longer['model']:.0%} of the pairs, the labels do in "
            f"{longer['labels']:.0%}; watch rollout/length in PPO"
        )
    error = health["calibration"]["error"]
    if error > 0.1:
        yield (
            f"its probabilities are off by {error:.2f} on average (expected calibration error); fewer epochs, "
            "label_smoothing or weight_decay make it less sure"
        )
    for probe, found in health["probes"].items():
        if found["scores_higher"] >= 0.5:
            yield f"answers that are {probe} score higher than good ones in {found['scores_higher']:.0%} of the rows"
    for kind, parts in (health["by"] | health["slices"]).items():
        for value, part in parts.items():
            if part["accuracy_ci"][1] < 0.5:
                yield f"where {kind} is {value} it is wrong more often than right ({part['accuracy']:.3f})"


def unmet(require: Require, health: Mapping[str, Any] | None) -> list[str]:
    """Return which requirements of a recipe a health report misses; None is that of a model with no held-out pair."""
    wanted = {name: value for name, value in require if value is not None and name != "action"}
    if health is None:
        return [f"{name}: nothing is held out, so nothing is known" for name in wanted]
    best_rule = max(found["accuracy"] for found in health["rules"].values())
    found = {
        "accuracy": health["accuracy"],
        "accuracy_lower_bound": health["accuracy_ci"][0],
        "accuracy_over_rules": health["accuracy"] - best_rule,
        "calibration_error": health["calibration"]["error"],
        "length_correlation": abs(health["length"]["correlation"] or 0.0),
        "probes": max((probe["scores_higher"] for probe in health["probes"].values()), default=0.0),
    }
    missed = {
        name: "at most" if name in AT_MOST else "at least"
        for name, value in wanted.items()
        if (found[name] > value if name in AT_MOST else found[name] < value)
    }
    return [f"{name}: is {found[name]:.3f}, required {how} {wanted[name]:g}" for name, how in missed.items()]


AT_MOST = ("calibration_error", "length_correlation", "probes")
"""Requirements that are upper ends; the others are lower ones."""
