"""Pictures of the report as SVG shapes: curves over steps, histograms, calibration, the frontier of score and KL."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

POINTS = 240  # of one curve; longer ones are drawn as means of neighbouring steps
WIDTH, HEIGHT, MARGIN = 320.0, 120.0, 4.0  # of a chart, in its own units
PLOT = (320.0, 200.0)  # of a picture with labelled ends

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """One curve: what its picture and its caption need."""

    name: str
    paths: tuple[str, ...]  # SVG path data of its unbroken pieces
    first_step: int
    last_step: int
    lowest: float
    highest: float
    last: float
    zero: float | None  # height of the line at 0, where it is in the picture


@dataclass(frozen=True)
class Plot:
    """A picture with lines and named points, the ends of whose axes are labelled."""

    name: str
    said: str
    """What it shows, for those who do not see it."""
    x: tuple[float, float]
    y: tuple[float, float]
    x_name: str
    y_name: str
    lines: list[tuple[int, str, str]] = field(default_factory=list)
    """Colour number, name for the legend ("" for none), SVG path data."""
    points: list[tuple[int, float, float, str]] = field(default_factory=list)
    """Colour number, place, label."""

    def line(self, colour: int, name: str, points: Points) -> None:
        """Draw a line through points of the data."""
        placed = [f"{x:.1f},{y:.1f}" for x, y in map(self._place, points)]
        self.lines.append((colour, name, "M" + "L".join(placed)))

    def point(self, colour: int, x: float, y: float, label: str) -> None:
        """Draw a point of the data."""
        self.points.append((colour, *self._place((x, y)), label))

    def _place(self, point: tuple[float, float]) -> tuple[float, float]:
        """Return where a point of the data stands in the picture."""
        (left, right), (bottom, top) = self.x, self.y
        width, height = PLOT
        x = (point[0] - left) / (right - left) if right > left else 0.5
        y = (point[1] - bottom) / (top - bottom) if top > bottom else 0.5
        return 8 + (width - 16) * x, height - 8 - (height - 16) * y


def reliability(calibration: Mapping[str, Any]) -> Plot:
    """Return a reward model's accuracy over its confidence; a calibrated one is on the diagonal."""
    curve = calibration["curve"]
    low = min([0.5, *(part["accuracy"] for part in curve)])
    shown = ", ".join(f"{part['accuracy']:.2f} at {part['confidence']:.2f}" for part in curve)
    plot = Plot("calibration", f"accuracy by confidence: {shown}", (0.5, 1.0), (low, 1.0), "confidence", "accuracy")
    plot.line(3, "calibrated", [(0.5, 0.5), (1.0, 1.0)])
    plot.line(0, "this model", [(part["confidence"], part["accuracy"]) for part in curve])
    for part in curve:
        plot.point(0, part["confidence"], part["accuracy"], f"{part['pairs']} pairs")
    return plot


def histograms(scores: Mapping[str, Any]) -> Plot:
    """Return how the scores of several samples are spread, each as shares of its own count."""
    edges = scores["edges"]
    shares = {name: [n / part["count"] for n in part["histogram"]] for name, part in scores["of"].items()}
    top = max(max(of_one) for of_one in shares.values())
    means = ", ".join(f"{name} {part['mean']:.2f} ± {part['std']:.2f}" for name, part in scores["of"].items())
    plot = Plot("scores", f"mean and spread: {means}", (edges[0], edges[-1]), (0.0, top), "score", "share")
    for colour, (name, of_one) in enumerate(shares.items()):
        corners = [(edge, share) for n, share in enumerate(of_one) for edge in (edges[n], edges[n + 1])]
        plot.line(colour, name, corners)
    return plot


def frontier(best_of_n: Mapping[str, Any], systems: Mapping[str, Mapping[str, Any]]) -> Plot | None:
    """Return where tuned policies stand beside best-of-n, by KL and what decides who wins; None where none does."""
    if not systems:
        return None
    verdict = next(iter(systems.values()))["verdict"]
    curve = [(point["kl_bound"], point[verdict]) for point in best_of_n["points"]]
    xs = [x for x, _ in curve] + [place["kl"] for place in systems.values()]
    ys = [y for _, y in curve] + [place["value"] for place in systems.values()]
    shown = ", ".join(f"{name} {place['value']:.2f} at {place['kl']:.1f} nats" for name, place in systems.items())
    plot = Plot("frontier", f"{shown}", (0.0, max(xs)), (min(ys), max(ys)), "KL, nats", verdict)
    plot.line(0, f"best of n of {best_of_n['of']}", curve)
    for (x, y), point in zip(curve, best_of_n["points"], strict=True):
        plot.point(0, x, y, str(point["n"]))
    for colour, (name, place) in enumerate(systems.items(), start=1):
        plot.point(colour, place["kl"], place["value"], name)
    return plot


# ---------------------------------------------------------------- curves


def charts(lines: Sequence[Mapping[str, Any]], first: Sequence[str] = ()) -> list[Chart]:
    """A chart for every metric with at least two numbers, those of `first` first, else as in the file."""
    names = list(dict.fromkeys(name for line in lines for name in line if name != "step"))
    names.sort(key=lambda name: first.index(name) if name in first else len(first))
    series = ((name, [(line["step"], line[name]) for line in lines if name in line]) for name in names)
    return [_chart(name, points) for name, points in series if sum(y is not None for _, y in points) > 1]


def _chart(name: str, points: list[tuple[int, float | None]]) -> Chart:
    numbers = [y for _, y in points if y is not None]
    first_step, last_step = points[0][0], points[-1][0]
    thinned = list(_thinned(points))
    drawn = [y for _, y in thinned if y is not None]
    low, high = min(drawn), max(drawn)

    def place_x(step: float) -> float:
        return MARGIN + (WIDTH - 2 * MARGIN) * (step - first_step) / max(1, last_step - first_step)

    def place_y(y: float) -> float:
        if high == low:
            return HEIGHT / 2
        return HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (y - low) / (high - low)

    pieces: list[list[str]] = [[]]
    for step, y in thinned:
        if y is None:
            pieces.append([])  # a gap where the number was not finite
        else:
            pieces[-1].append(f"{place_x(step):.1f},{place_y(y):.1f}")
    return Chart(
        name=name,
        # a single point between gaps gets a line of no length, which round ends make visible
        paths=tuple("M" + "L".join(piece if len(piece) > 1 else piece * 2) for piece in pieces if piece),
        first_step=first_step,
        last_step=last_step,
        lowest=min(numbers),
        highest=max(numbers),
        last=numbers[-1],
        zero=place_y(0.0) if low < 0 < high else None,
    )


def _thinned(points: Sequence[tuple[int, float | None]]) -> Iterator[tuple[float, float | None]]:
    """At most `POINTS` points: means of equally many neighbours, None where they hold no number."""
    size = math.ceil(len(points) / POINTS)
    for start in range(0, len(points), size):
        group = points[start : start + size]
        numbers = [y for _, y in group if y is not None]
        yield sum(step for step, _ in group) / len(group), sum(numbers) / len(numbers) if numbers else None
