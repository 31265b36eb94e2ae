"""The over-optimisation guard on made-up series: when it acts, when it does not, and what it would go back to."""

from __future__ import annotations

import json
import random
from statistics import fmean

import pytest

from rlhf_kit.guard import Change, Guard, Look
from rlhf_kit.maths import diversity
from rlhf_kit.maths.statistics import mean_and_error
from rlhf_kit.recipe import Guard as Settings

COUNT = 256


def look(
    update: int,
    rng: random.Random,
    *,
    score: float = 0.0,
    gold: float | None = 0.0,
    kl: float = 1.0,
    length: float = 20.0,
    count: int = COUNT,
) -> Look:
    """Return a look whose figures scatter around these means: scores by 1, KL by 1, lengths by 5."""

    def around(mean: float, spread: float) -> list[float]:
        return [rng.gauss(mean, spread) for _ in range(count)]

    return Look(update, around(score, 1), around(kl, 1), around(length, 5), None if gold is None else around(gold, 1))


def judged(settings: Settings, looks: list[Look]) -> Guard:
    """Return a guard that has seen the looks."""
    guard = Guard(settings)
    for one in looks:
        guard.judge(one)
    return guard


def test_a_fall_of_gold_from_its_best_is_seen_in_every_of_forty_series():
    """Gold rises by one and falls by half while the score goes on rising: the guard acts on gold, and goes back to a
    look near the top."""
    for seed in range(40):
        rng = random.Random(seed)
        golds = [0.0, 0.5, 1.0, 0.9, 0.7, 0.5, 0.5]
        guard = judged(Settings(), [look(n, rng, score=n, gold=gold) for n, gold in enumerate(golds)])
        assert guard.acted is not None and guard.acted["alarm"] == "gold", seed
        assert "over-optimises" in guard.acted["why"]
        assert guard.best["update"] in (2, 3), seed


def test_chance_alone_seldom_has_it_act():
    """Sixteen looks at a policy that no longer changes: the best of them was lucky, and cross-fitting does not take
    that for a fall. At worst, each look drawn anew, fewer than one series in ten is stopped."""
    acted = 0
    for seed in range(100):
        rng = random.Random(seed)
        series = [look(n, rng, count=64) for n in range(16)]
        acted += judged(Settings(), series).acted is not None
    assert acted < 10


def test_without_cross_fitting_chance_would_be_taken_for_a_fall():
    """The same series against the plain best look fall by more than an error on the average; cross-fitted they do
    not."""
    plain, fitted = [], []
    for seed in range(100):
        rng = random.Random(seed)
        series = [look(n, rng, count=64) for n in range(16)]
        best = max(series[:-1], key=lambda one: fmean(one.worth))
        plain.append(fmean(series[-1].worth) - fmean(best.worth))
        fitted.append(judged(Settings(), series[:-1]).judge(series[-1])["guard/change"])
    assert fmean(plain) < -0.15
    assert abs(fmean(fitted)) < 0.05


def test_a_rising_gold_is_left_alone():
    """Slowly or fast, as long as it does not fall."""
    for slope in (0.0, 0.02, 0.2):
        series = [look(n, random.Random(n), score=n * slope, gold=n * slope) for n in range(12)]
        assert judged(Settings(), series).acted is None


def test_a_score_that_gold_does_not_follow_is_enough():
    """Gold stands still at its best while the score climbs: nothing is lost yet, and the guard acts; with no share
    asked for it waits, and a score that brings gold along is left alone."""
    golds, scores = [0.0, 1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 3.0, 5.0, 7.0]
    for seed in range(10):
        rng = random.Random(seed)
        series = [look(n, rng, score=s, gold=g) for n, (s, g) in enumerate(zip(scores, golds, strict=True))]
        assert judged(Settings(), series).acted["update"] >= 2, seed
        assert judged(Settings(share=0), series).acted is None, seed
        rng = random.Random(seed)
        assert judged(Settings(), [look(n, rng, score=s, gold=0.5 * s) for n, s in enumerate(scores)]).acted is None


def test_a_little_that_gold_stays_behind_is_tolerated():
    """A fall by a tenth of a standard deviation, on every prompt, for a tenth more score: only who tolerates nothing
    acts; one by half acts."""
    rng = random.Random(0)
    start, better = look(0, rng, count=64), look(1, rng, score=2.0, gold=2.0, count=64)
    for fall, tolerance, acts in ((0.1, None, False), (0.1, 0.0, True), (0.5, None, True)):
        last = Look(2, [s + 0.1 for s in better.score], better.kl, better.length, [g - fall for g in better.gold or []])
        settings = Settings() if tolerance is None else Settings(tolerance=tolerance)
        assert (judged(settings, [start, better, last]).acted is not None) is acts, (fall, tolerance)


@pytest.mark.parametrize("patience", [1, 3])
def test_patience_counts_looks_in_a_row(patience):
    """An alarm acts in the look in which it stands for the `patience`th time in a row; one that is gone starts anew."""
    rng = random.Random(0)
    fallen = [look(2 + n, rng, gold=-2.0) for n in range(patience)]
    guard = judged(Settings(patience=patience), [look(0, rng), look(1, rng, gold=0.1), *fallen])
    assert guard.acted is not None and guard.acted["update"] == 1 + patience
    one, back = look(1, rng, gold=-2.0), look(2, rng)
    assert judged(Settings(patience=2), [look(0, rng), one, back, look(3, rng, gold=-2.0)]).acted is None


@pytest.mark.parametrize(
    ("settings", "seen", "alarm"),
    [
        ({"kl_budget": 8}, {"kl": 9.0}, "kl"),
        ({"kl_budget": 8}, {"kl": 7.9}, None),
        ({}, {"kl": 900.0}, None),
        ({}, {"length": 45.0}, "length"),
        ({}, {"length": 8.0}, "length"),
        ({}, {"length": 34.0}, None),
        ({"length_factor": None}, {"length": 900.0}, None),
    ],
)
def test_budget_and_length(settings, seen, alarm):
    """The KL alarms above its budget, and completions that are more than 1.75 times as long, or short."""
    rng = random.Random(1)
    guard = judged(Settings(**settings), [look(0, rng), *(look(n, rng, score=n, gold=n, **seen) for n in range(1, 4))])
    assert (guard.acted and guard.acted["alarm"]) == alarm


def test_without_gold_the_score_decides():
    """The guard acts on a score that falls, and goes back to the best score within the budget."""
    rng = random.Random(2)
    scores, kls = [0, 1, 2, 3, 1, 0], [0, 2, 6, 12, 12, 12]
    series = [look(n, rng, gold=None, score=s, kl=k) for n, (s, k) in enumerate(zip(scores, kls, strict=True))]
    guard = judged(Settings(kl_budget=8, patience=2), series)
    assert guard.acted is not None and guard.acted["update"] == 4  # the KL, at 3 and 4
    assert guard.acted["alarm"] == "kl"
    assert guard.best["update"] == 2
    assert judged(Settings(), series).acted["alarm"] == "score"


def test_the_start_is_always_there_to_go_back_to():
    """Where every look breaks the budget, the best is the policy as it started."""
    rng = random.Random(3)
    series = [look(0, rng, kl=0.0), *(look(n, rng, gold=n, kl=20.0) for n in range(1, 4))]
    assert judged(Settings(kl_budget=8), series).best["update"] == 0


@pytest.mark.parametrize(("action", "over"), [("stop", True), ("rollback", True), ("warn", False)])
def test_only_a_warning_goes_on(action, over):
    """stop and rollback end the stage."""
    rng = random.Random(4)
    guard = judged(Settings(action=action, patience=1), [look(0, rng), look(1, rng, gold=-3.0)])
    assert guard.acted is not None
    assert guard.over is over


@pytest.mark.parametrize("cut", [0, 1, 3, 6])
def test_a_guard_that_goes_on_decides_as_one_that_never_stopped(cut):
    """The state through JSON after any look, and the looks that follow, give the same figures and the same state."""
    rng = random.Random(5)
    series = [look(n, rng, score=n, gold=g, kl=n) for n, g in enumerate([0, 1, 1.2, 1.0, 0.8, 0.5, 0.2])]
    whole, half = Guard(Settings(kl_budget=5)), Guard(Settings(kl_budget=5))
    for one in series[:cut]:
        assert whole.judge(one) == half.judge(one)
    resumed = Guard(Settings(kl_budget=5))
    resumed.load(json.loads(json.dumps(half.state())))
    for one in series[cut:]:
        assert whole.judge(one) == resumed.judge(one)
    assert whole.state() == resumed.state()


def test_the_change_is_that_of_the_same_prompts():
    """By hand: what all prompts share cancels, so a fall of 0.1 on every prompt is certain."""
    level = [float(10 * n) for n in range(8)]
    guard = Guard(Settings(tolerance=0))
    guard.judge(Look(0, level, [0.0] * 8, [5.0] * 8, level))
    figures = guard.judge(Look(1, level, [0.0] * 8, [5.0] * 8, [one - 0.1 for one in level]))
    assert figures["guard/change"] == pytest.approx(-0.1)
    assert figures["guard/change_error"] == pytest.approx(0, abs=1e-9)
    assert figures["guard/alarms"] == 1


def test_mean_and_error():
    """By hand: of 1, 2, 3 the mean is 2 and the error sqrt(1 / 3)."""
    assert mean_and_error([1, 2, 3]) == (2, pytest.approx((1 / 3) ** 0.5))
    with pytest.raises(ValueError, match="1 values"):
        mean_and_error([1])
    assert Change(-1.0, 0.4).is_below(0, 2) and not Change(-1.0, 0.6).is_below(0, 2)


def test_diversity_by_hand():
    """a b a b a: two words of five; bigrams ab ba ab ba, two of four. Repetition looks at one text at a time."""
    assert diversity.distinct(["ababa"], 1) == 2 / 5
    assert diversity.distinct(["ababa"], 2) == 2 / 4
    assert diversity.distinct(["ab", "ab"], 2) == 1 / 2
    assert diversity.distinct(["a"], 2) == 0
    assert diversity.repetition("abcdabcd") == pytest.approx(1 - 4 / 5)  # abcd bcda cdab dabc abcd
    assert diversity.repetition("abc") == diversity.repetition("abcdefgh") == 0
