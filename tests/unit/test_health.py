"""The health report's figures by hand, on scores that are made up; and what is said of them."""

import math

import numpy as np
import pytest

from rlhf_kit import health
from rlhf_kit.examples.rows import Preference, Ranking
from rlhf_kit.recipe import Require


def pair(prompt: list[int], chosen: int, rejected: int, *, probability: float = 1.0, margin: float = 0.0) -> dict:
    """Return the tokens of a pair whose completions have so many tokens."""
    completions = [[*prompt, *range(100, 100 + length)] for length in (chosen, rejected)]
    judged = {"chosen": [0], "rejected": [1], "probability": [probability], "margin": [margin]}
    return {"completions": completions, "prompt_tokens": len(prompt), "best": 0, **judged}


def answers(scores: list[float], tokens: list[int], overlap: list[float] | None = None) -> health.Answers:
    column = np.asarray(scores)
    return health.Answers(column, column, np.asarray(tokens), np.asarray(overlap or [0.0] * len(scores)))


def report(groups: list[dict], found: health.Answers, rows: list | None = None, **probes: list[float]) -> dict:
    rows = rows or [Preference("p", "a", "b", "here") for _ in groups]
    changes = {name: np.asarray(change) for name, change in probes.items()}
    return health.report(health.pairs_of(groups), found, rows, {"demonstrations": np.asarray([0.0, 1.0])}, changes)


def test_accuracy_by_hand():
    """Right, equal and wrong of three pairs of one prompt: a half; the same prompt in two rows is one cluster; a tie is
    not counted.
    """
    rows = [
        {"completions": [[1, 2, 3], [1, 2, 4], [1, 2, 5]], "chosen": [0, 1, 0], "rejected": [1, 2, 2]},
        {"completions": [[1, 2, 6], [1, 2, 7]], "chosen": [1], "rejected": [0]},
        {"completions": [[9, 9, 6], [9, 9, 7]], "chosen": [1], "rejected": [0]},
    ]
    probabilities = ([1.0] * 3, [1.0], [0.5])
    rows = [
        {"prompt_tokens": 2, "margin": [0.0] * len(p), "probability": p, **row}
        for row, p in zip(rows, probabilities, strict=True)
    ]
    found = health.accuracy(health.pairs_of(rows), np.asarray([1.0, 0.0, 1.0, 0.0, 1.0, 5.0, 0.0]))
    assert (found["accuracy"], found["pairs"], found["prompts"]) == ((1 + 0 + 0.5 + 1) / 4, 4, 1)


def test_rules_and_slices_by_hand():
    """Four pairs: the longer one is right in three, the model in two; each slice has its own pairs."""
    groups = [
        pair([1], 3, 2, margin=1),
        pair([2], 5, 1, margin=2),
        pair([3], 2, 1, margin=3),
        pair([4], 1, 4, margin=3),
    ]
    subsets = ("chat", "chat", "code", "code")
    rows = [
        Preference("p", "a", "b", "here", annotator=who, slices={"subset": subset} if subset else {})
        for who, subset in zip(("ann", "ann", None, "bob"), subsets, strict=True)
    ]
    found = report(groups, answers([1, 0, 1, 0, 0, 1, 0, 1], [3, 2, 5, 1, 2, 1, 1, 4]), rows)
    assert found["accuracy"] == 0.5
    assert {rule: part["accuracy"] for rule, part in found["rules"].items()} == {
        "longer wins": 0.75,
        "shorter wins": 0.25,
        "more words of the prompt win": 0.5,
    }
    by = {kind: {part: (f["accuracy"], f["pairs"]) for part, f in parts.items()} for kind, parts in found["by"].items()}
    assert by["length"] == {"chosen is shorter": (0.0, 1), "chosen is longer": (2 / 3, 3)}
    assert by["annotator"] == {"ann": (1.0, 2), "bob": (0.0, 1)}
    assert sum(pairs for _, pairs in by["margin"].values()) == 4
    assert {part: f["accuracy"] for part, f in found["slices"]["subset"].items()} == {"chat": 1.0, "code": 0.0}
    assert "votes" not in by
    assert found["length"]["longer_scores_higher"] == {"model": 0.75, "labels": 0.75}  # right, right, not, right
    assert found["length"]["correlation"] == pytest.approx(
        np.corrcoef([1, 0, 1, 0, 0, 1, 0, 1], [3, 2, 5, 1, 2, 1, 1, 4])[0, 1]
    )


def test_slices_of_rankings_count_their_pairs():
    ranking = {
        "completions": [[1, 5], [1, 6], [1, 7]],
        "prompt_tokens": 1,
        "best": 0,
        "chosen": [0, 0, 1],
        "rejected": [1, 2, 2],
        "probability": [1.0, 1.0, 0.5],
        "margin": [0.0] * 3,
    }
    rows = [Ranking("p", ["a", "b", "c"], [1.0, 2.0, 2.0], "here", slices={"task": "qa"})]
    found = report([ranking], answers([2.0, 1.0, 3.0], [1, 1, 1]), rows)
    assert found["slices"]["task"]["qa"]["pairs"] == found["pairs"] == 2 and found["accuracy"] == 0.5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_calibration_of_a_model_that_knows_its_doubt(temperature):
    """Labels drawn with the probabilities that the scores stand for: no error but that of sampling; scaled scores are
    too sure or too unsure, by the mean distance of the two probabilities.
    """
    draw = np.random.default_rng(0)
    true = draw.normal(0, 2, 40_000)
    better = draw.random(len(true)) < 1 / (1 + np.exp(-true))
    difference = np.where(better, true, -true) * temperature
    pairs = health.Pairs(*(np.arange(len(true)) + shift for shift in (0, len(true))), *(np.ones(len(true)),) * 4)
    found = health.calibration(pairs, np.concatenate([difference, np.zeros(len(true))]))
    expected = np.abs(1 / (1 + np.exp(-np.abs(true) * temperature)) - 1 / (1 + np.exp(-np.abs(true)))).mean()
    assert found["error"] == pytest.approx(expected, abs=0.01)
    assert sum(part["pairs"] for part in found["curve"]) == len(true)
    for part in found["curve"]:
        assert part["from"] <= part["confidence"] <= part["to"]


def test_votes_are_the_labels_of_calibration():
    """Where 8 of 10 preferred the one that the model prefers with 0.8, the model is right."""
    logit = math.log(0.8 / 0.2)
    found = report([pair([1], 2, 2, probability=0.8)], answers([logit, 0.0], [2, 2]))
    assert found["calibration"]["error"] == pytest.approx(0.0)
    assert report([pair([1], 2, 2, probability=0.8)], answers([0.0, logit], [2, 2]))["calibration"][
        "error"
    ] == pytest.approx(0.6)


def test_histograms_share_their_edges():
    found = report([pair([1], 2, 2)] * 3, answers([1, -2, 3, 0, 5, 0], [2] * 6))["scores"]
    for part in found["of"].values():
        assert sum(part["histogram"]) == part["count"] and len(part["histogram"]) == len(found["edges"]) - 1
    assert found["of"]["chosen"]["mean"] == 3.0 and found["edges"][0] == -2 and found["edges"][-1] == 5


def test_probes_that_spoil():
    """What a probe makes of an answer; one that changes nothing is left out; the same seed shuffles alike."""
    made = health.spoilt("What is it?", "It is a red ball.", 3)
    assert made["empty"] == ""
    assert made["repeated"] == "It is a red ball. It is a red ball."
    assert made["truncated"] == "It is a"
    assert sorted(made["words shuffled"].split()) == sorted("It is a red ball.".split())
    assert made["prompt echoed"] == "What is it?"
    assert made == health.spoilt("What is it?", "It is a red ball.", 3)
    assert health.spoilt("Say no", "No", 1).keys() == {"empty", "repeated", "prompt echoed"}
    chat = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hi"}]
    assert health.spoilt(chat, "Hello there", 1)["prompt echoed"] == "Hi"


def test_overlap_is_of_different_words():
    assert health.overlap("the red ball", "The ball the dog") == pytest.approx(2 / 3)
    assert health.overlap("the red ball", "") == 0.0


def test_a_healthy_report_worries_nobody_and_an_ill_one_says_why():
    """Scores that follow the labels and not the length are fine; those that follow the length are not."""
    draw = np.random.default_rng(1)
    groups = [pair([number], *draw.integers(1, 20, 2).tolist()) for number in range(400)]
    lengths = [len(ids) - 1 for group in groups for ids in group["completions"]]
    labels = [value for _ in groups for value in (1.0, -1.0)]
    sure = answers([value * 3 for value in labels], lengths)
    well = report(groups, sure, empty=[-2.0, -1.0])
    assert health.concerns(well) == []
    ill = report(groups, answers([float(length) for length in lengths], lengths), empty=[2.0, -1.0, 3.0])
    told = " ".join(health.concerns(ill))
    for words in (
        'the rule "longer wins"',
        "prefers the longer answer in",
        "empty score higher",
        "may be that of a coin",
    ):
        assert words in told


@pytest.mark.parametrize(
    ("require", "missed"),
    [
        ({}, []),
        ({"accuracy": 0.5}, []),
        ({"accuracy": 0.51}, ["accuracy: is 0.500, required at least 0.51"]),
        ({"accuracy_lower_bound": 0.5}, ["accuracy_lower_bound: is 0.150, required at least 0.5"]),
        ({"accuracy_over_rules": 0.0}, ["accuracy_over_rules: is -0.250, required at least 0"]),
        ({"length_correlation": 0.01, "accuracy": 0.1}, ["length_correlation: is 0.621, required at most 0.01"]),
        ({"probes": 0.4}, ["probes: is 0.500, required at most 0.4"]),
        ({"probes": 0.5, "calibration_error": 1.0}, []),
    ],
)
def test_requirements(require, missed):
    groups = [pair([1], 3, 2), pair([2], 5, 1), pair([3], 2, 1), pair([4], 1, 4)]
    found = report(groups, answers([1, 0, 1, 0, 0, 1, 0, 1], [3, 2, 5, 1, 2, 1, 1, 4]), empty=[1.0, -1.0])
    assert health.unmet(Require(**require), found) == missed


def test_requirements_of_what_is_unknown_are_missed():
    assert health.unmet(Require(accuracy=0.6), None) == ["accuracy: nothing is held out, so nothing is known"]
    assert health.unmet(Require(), None) == []
