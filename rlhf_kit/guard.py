"""The over-optimisation guard: does the policy still get better, or only better at pleasing the reward?

It is shown what `watch` saw of the held-out prompts, one `Look` after another, and decides on numbers alone. Three
things alarm it:

    gold     since gold was best, less than a `share` of what the score gained has arrived in gold, beyond chance;
             without a gold scorer: the score has fallen from its best
    kl       the KL is above its budget, beyond chance
    length   completions have become `length_factor` times as long, or short, as at the start, beyond chance

and an alarm that comes back in `patience` looks in a row has it act. "Beyond chance" is `sigmas` standard errors of a
difference on the same prompts, answered with the same random numbers. Where the policy gets better both rise; where it
begins to over-optimise, the score rises and gold stands still; then gold falls. The share tells the second, in which
nothing is lost yet, from chance sooner than the third could be.

The best of several noisy looks is partly lucky, and what comes after it is likely to be worse by chance alone. So the
fall is cross-fitted: prompts are taken in two halves, the best look of each half is chosen, and the fall from it is
measured on the other half, where it had no luck.

What over-optimisation looks like: Gao et al. 2023 (arXiv 2210.10760). Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, pstdev
from typing import Any

from rlhf_kit.maths.statistics import mean_and_error
from rlhf_kit.recipe import Guard as Settings


@dataclass(frozen=True)
class Look:
    """What the policy did with the held-out prompts after `update` updates, one entry a prompt."""

    update: int
    score: list[float]
    """As the policy is trained on it, normalised, before penalties."""
    kl: list[float]
    """Nats per completion, k1."""
    length: list[float]
    """Tokens, end token included."""
    gold: list[float] | None

    @property
    def worth(self) -> list[float]:
        """What decides how good the policy is: the gold scores where there are any."""
        return self.score if self.gold is None else self.gold

    def figures(self) -> dict[str, float]:
        """Return the means, and the update."""
        gold = {} if self.gold is None else {"gold": fmean(self.gold)}
        return {
            "update": self.update,
            "score": fmean(self.score),
            **gold,
            "kl": fmean(self.kl),
            "length": fmean(self.length),
        }


@dataclass(frozen=True)
class Change:
    """A mean difference on the same prompts, with its standard error."""

    mean: float
    error: float

    def is_above(self, limit: float, sigmas: float) -> bool:
        """Whether the change exceeds `limit` by more than `sigmas` standard errors."""
        return self.mean - sigmas * self.error > limit

    def is_below(self, limit: float, sigmas: float) -> bool:
        """Whether the change is less than `limit` by more than `sigmas` standard errors."""
        return self.mean + sigmas * self.error < limit

    def __str__(self) -> str:
        return f"{self.mean:+.3g} ± {self.error:.2g}"


class Guard:
    """The looks so far, as far as judging the next one needs them; `state` and `load` carry it over a checkpoint."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.first: Look | None = None
        """The policy as it started, which is the reference."""
        self.best_of_half: list[Look] = []
        """The best look by the even prompts, and by the odd ones."""
        self.best: dict[str, float] = {}
        """The figures of the look to go back to."""
        self.in_a_row: dict[str, int] = {}
        """In how many looks in a row, up to the last, each alarm stood."""
        self.acted: dict[str, Any] | None = None
        """{"update", "alarm", "why"} of the first time that patience ran out."""

    def judge(self, look: Look) -> dict[str, float]:
        """Take in a look; return metrics about it."""
        self.first = self.first or look
        change = self._change(look, lambda one: one.worth)
        alarms = dict(self._alarms(look))
        self.in_a_row = {name: self.in_a_row.get(name, 0) + 1 for name in alarms}
        longest = max(self.in_a_row.values(), default=0)
        if longest >= self.settings.patience and self.acted is None:
            name = next(name for name, looks in self.in_a_row.items() if looks == longest)
            self.acted = {"update": look.update, "alarm": name, "why": alarms[name]}
        self._remember(look)
        return {"guard/change": change.mean, "guard/change_error": change.error, "guard/alarms": longest}

    def is_best(self, look: Look) -> bool:
        """Return whether the look judged last is the one to go back to."""
        return self.best["update"] == look.update

    @property
    def over(self) -> bool:
        """Whether the stage is to end."""
        return self.acted is not None and self.settings.action != "warn"

    def state(self) -> dict[str, Any]:
        """Return what `load` needs, for JSON."""
        return {
            "first": self.first and asdict(self.first),
            "best_of_half": [asdict(look) for look in self.best_of_half],
            "best": self.best,
            "in_a_row": self.in_a_row,
            "acted": self.acted,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.first = state["first"] and Look(**state["first"])
        self.best_of_half = [Look(**look) for look in state["best_of_half"]]
        self.best, self.in_a_row, self.acted = (dict(state[name] or {}) for name in ("best", "in_a_row", "acted"))
        self.acted = self.acted or None

    # ------------------------------------------------------------ the three alarms

    def _alarms(self, look: Look) -> Iterator[tuple[str, str]]:
        """Yield the name of each alarm, and what it says."""
        settings, sigmas = self.settings, self.settings.sigmas
        assert self.first is not None
        behind = settings.tolerance * (pstdev(self.first.worth) or 1.0)
        if self._change(look, self._surplus(look)).is_below(-behind, sigmas):
            yield "score" if look.gold is None else "gold", self._fallen(look)
        if settings.kl_budget is not None and Change(*mean_and_error(look.kl)).is_above(settings.kl_budget, sigmas):
            yield "kl", f"KL is {Change(*mean_and_error(look.kl))} nats per completion, above {settings.kl_budget:g}"
        if (factor := settings.length_factor) is not None:
            pairs = list(zip(look.length, self.first.length, strict=True))
            longer = Change(*mean_and_error([now - factor * then for now, then in pairs]))
            shorter = Change(*mean_and_error([factor * now - then for now, then in pairs]))
            if longer.is_above(0, sigmas) or shorter.is_below(0, sigmas):
                yield (
                    "length",
                    f"completions have {fmean(look.length):.3g} tokens, {fmean(self.first.length):.3g} at the start: "
                    f"beyond {factor:g} times",
                )

    def _surplus(self, look: Look) -> Callable[[Look], Sequence[float]]:
        """Return what must not fall: gold, less the `share` of the score where that rose, in units of the start."""
        assert self.first is not None
        if look.gold is None or self._change(look, lambda one: one.score).mean <= 0:
            return lambda one: one.worth
        gold_unit, score_unit = (pstdev(values) or 1.0 for values in (self.first.worth, self.first.score))
        weight = self.settings.share * gold_unit / score_unit
        return lambda one: [gold - weight * score for gold, score in zip(one.worth, one.score, strict=True)]

    def _fallen(self, look: Look) -> str:
        worth, score = self._change(look, lambda one: one.worth), self._change(look, lambda one: one.score)
        if look.gold is None:
            return f"the score is {worth} from its best, so the policy gets worse at what it is trained on"
        if score.is_above(0, self.settings.sigmas):
            return f"gold is {worth} from its best while the score went {score}: the policy over-optimises"
        return f"gold is {worth} from its best, and the score did not rise for it ({score})"

    def _change(self, look: Look, of: Callable[[Look], Sequence[float]]) -> Change:
        """Return the mean change since the best look before: since the best by the other prompts, for each half."""
        if not self.best_of_half:
            return Change(0.0, 0.0)
        differences = []
        for half in (0, 1):
            now, then = of(look)[half::2], of(self.best_of_half[1 - half])[half::2]
            differences += [after - before for after, before in zip(now, then, strict=True)]
        return Change(*mean_and_error(differences))

    # ------------------------------------------------------------ the best so far

    def _remember(self, look: Look) -> None:
        if not self.best_of_half:
            self.best_of_half = [look, look]
        for half in (0, 1):
            if fmean(look.worth[half::2]) > fmean(self.best_of_half[half].worth[half::2]):
                self.best_of_half[half] = look
        figures = look.figures()
        if not self.best or (self._may_be_best(figures) and self._worth(figures) > self._worth(self.best)):
            self.best = figures

    def _may_be_best(self, figures: Mapping[str, float]) -> bool:
        """Whether a look keeps to the budget and the length, by its means."""
        assert self.first is not None
        budget, factor = self.settings.kl_budget, self.settings.length_factor
        start = fmean(self.first.length)
        within = factor is None or start / factor <= figures["length"] <= start * factor
        return within and (budget is None or figures["kl"] <= budget)

    def _worth(self, figures: Mapping[str, float]) -> float:
        return figures.get("gold", figures["score"])
