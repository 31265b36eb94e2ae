"""The page about a run."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
import yaml

from rlhf_kit import artifacts
from rlhf_kit.drawings import POINTS, charts
from rlhf_kit.errors import InputError
from rlhf_kit.report import figure, write_report

HOSTILE = (
    '<script>alert(1)</script><img src="https://example.org/x.png" onerror="alert(2)">'
    "&\"'</pre></style>{{ 7919 * 7919 }}"
)
RECIPE = {
    "name": "quickstart",
    "seed": 7,
    "base": {"model": "checkpoint", "quantization": "8bit", "dtype": "float32"},
    "stages": {
        "sft": {"kind": "sft", "data": "cards/d.md"},
        "reward": {"kind": "reward", "data": "cards/p.md"},
        "ppo": {"kind": "ppo", "policy": "sft", "reward": "reward", "kl_coef": 0.05, "kl_budget": 12.0},
    },
}
SUMMARY = {
    "reward": {"accuracy": 0.7312, "accuracy_ci": [0.69, 0.77], "best_reachable": 0.75},
    "systems": {
        "base": {"score": -1.5, "gold": -2.0, "gold_std": 1.0, "kl": 30.0, "length": 40.0},
        "sft": {"score": 0.0, "gold": 1.0, "gold_std": 0.5, "kl": 0.0, "length": 31.0},
        "ppo": {"score": 2.0, "gold": 2.0, "gold_std": 0.6, "kl": 8.25, "length": 28.5},
    },
    "win_rate": {"ppo/sft": {"rate": 0.81, "ci": [0.76, 0.85], "length_matched": 0.79}},
    "examples": [{"prompt": "Where is my parcel?", "sft": "Who knows.", "ppo": "It arrives tomorrow."}] * 3,
    "cost": {},
}


class Page(HTMLParser):
    """What a browser would make of the page: its tags with their attributes, and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run_dir(tmp_path):
    """A run directory with a recipe and nothing else."""
    folder = tmp_path / "quickstart"
    folder.mkdir()
    (folder / artifacts.RECIPE).write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return folder


def finish(run_dir, stage, kind, steps=40):
    folder = run_dir / stage
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    lines = [
        {"step": s, f"{stage}/loss": 1 / (s + 1), "objective/score": s / 10, "x": -1.0 + s} for s in range(1, steps)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = {
        "schema": artifacts.SCHEMA,
        "kind": kind,
        "metrics": {f"{stage}/loss": 0.025},
        "cost": {"seconds": 83.0, "peak_bytes": 1_500_000_000, "tokens": 123_456},
        "inputs": {},
        "settings_hash": "ab" * 32,
    }
    artifacts.write_manifest(folder, manifest)


def finish_all(run_dir, summary=SUMMARY):
    for stage, kind in (("sft", "sft"), ("reward", "reward"), ("ppo", "ppo")):
        finish(run_dir, stage, kind)
    artifacts.write_json(run_dir / artifacts.SUMMARY, summary)
    artifacts.write_json(run_dir / artifacts.ENVIRONMENT, {"python": "3.11.9", "packages": {"torch": "2.13.0"}})


def test_a_finished_run_has_everything_on_its_page(run_dir):
    """Headline figures, tables, samples, curves, recipe, hashes and environment."""
    finish_all(run_dir)
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    page = Page(path.read_text())
    for expected in (
        "0.731",  # accuracy
        "0.69 to 0.77; best reachable 0.75",
        "0.76 to 0.85; at equal length 0.79",
        "+2.00",  # gold 2.0 - 1.0 in standard deviations of 0.5
        "budget 12",
        "It arrives tomorrow.",
        "kl_coef: 0.05",
        "1 min 23 s, 1.50 GB at most, 123,456 tokens",
        artifacts.manifest_hash(run_dir / "ppo"),
        artifacts.sha256_of_file(run_dir / "sft" / "adapter" / "adapter_config.json"),
        "torch: 2.13.0",
    ):
        assert expected in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 9
    assert "Not evaluated yet" not in page.text
    assert "run again after" not in page.text


def test_a_run_that_has_only_begun_has_a_page(run_dir):
    """Without a stage, a summary or an environment the page says so and still shows the recipe."""
    page = Page(write_report(run_dir).read_text())
    assert "Not evaluated yet" in page.text
    assert page.text.count("not run yet") == 3
    assert "kl_budget: 12.0" in page.text


def test_a_stage_at_work_shows_its_curves_and_samples(run_dir):
    """Metrics and samples without a manifest: the step it is at, the curves, three samples of the last step."""
    (run_dir / "ppo").mkdir()
    (run_dir / "ppo" / "metrics.jsonl").write_text(
        '{"step": 1, "objective/kl": 0.0}\n{"step": 2, "objective/kl": 1.5}\n'
    )
    samples = [
        {"step": step, "prompt": f"prompt {n}", "completion": f"answer {step}.{n}", "score": 0.5}
        for step in (1, 2)
        for n in range(5)
    ]
    (run_dir / "ppo" / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    page = Page(write_report(run_dir).read_text())
    assert "not finished; at step 2" in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 1
    assert re.findall(r"answer \d.\d", page.text) == ["answer 2.0", "answer 2.1", "answer 2.2"]


def test_text_of_models_and_data_is_inert(run_dir):
    """Markup, scripts and template syntax in prompts, completions, names and recipe are shown and not obeyed."""
    example = {"prompt": [{"role": "user", "content": HOSTILE}], "sft": HOSTILE, "ppo": HOSTILE}
    finish_all(run_dir, {**SUMMARY, "examples": [example]})
    (run_dir / artifacts.RECIPE).write_text(yaml.safe_dump({**RECIPE, "name": HOSTILE}, sort_keys=False))
    (run_dir / "sft" / "metrics.jsonl").write_text("".join(json.dumps({"step": s, HOSTILE: s}) + "\n" for s in (1, 2)))
    page = Page(write_report(run_dir).read_text())
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "iframe", "object", "embed", "base", "link", "a", "form"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count(HOSTILE) >= 4
    assert "62710561" not in page.text


def test_the_page_asks_nothing_of_the_network(run_dir):
    """No attribute or style rule names an address, and the page's own policy forbids loading anything."""
    finish_all(run_dir, {**SUMMARY, "examples": [{"prompt": "http://example.org", "sft": HOSTILE, "ppo": "x"}]})
    html = write_report(run_dir).read_text()
    page = Page(html)
    for _, attributes in page.tags:
        assert not {"src", "href", "srcset", "action", "data", "background", "poster", "xlink:href"} & attributes.keys()
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    policy = {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'"}
    assert ("meta", policy) in page.tags


def test_the_page_stays_small(run_dir):
    """Ten thousand steps of thirty metrics and megabytes of text make a page below 3 MB."""
    finish_all(run_dir, {**SUMMARY, "examples": [{"prompt": "x" * 2_000_000, "sft": "y" * 2_000_000, "ppo": "z"}] * 3})
    lines = [{"step": s, **{f"group/metric_{n}": math.sin(s * n) for n in range(30)}} for s in range(10_000)]
    (run_dir / "ppo" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = write_report(run_dir)
    assert path.stat().st_size < 3_000_000
    assert "more characters" in path.read_text()


def test_figures_of_an_earlier_state_are_marked(run_dir):
    """When a stage was run again after the summary was measured, the page says that its figures are old."""
    finish_all(run_dir)
    measured = {name: artifacts.manifest_hash(run_dir / name) for name in RECIPE["stages"]}
    artifacts.write_json(run_dir / artifacts.SUMMARY, {**SUMMARY, "made_from": {"stages": measured}})
    assert "run again after" not in write_report(run_dir).read_text()
    artifacts.write_json(run_dir / artifacts.SUMMARY, {**SUMMARY, "made_from": {"stages": {**measured, "sft": "old"}}})
    assert "run again after" in write_report(run_dir).read_text()


def test_a_run_without_ppo_has_a_page(run_dir):
    """A recipe of SFT and reward model has no systems and no win rate to show."""
    finish_all(run_dir, {**SUMMARY, "systems": {}, "win_rate": {}, "examples": []})
    text = Page(write_report(run_dir).read_text()).text
    assert "0.731" in text
    assert "Win rates" not in text


def test_another_folder_is_refused(tmp_path):
    """A folder without a recipe is no run directory, and nothing is written into it."""
    with pytest.raises(InputError, match="not a run directory"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_curve_by_hand():
    """Three steps of 0, 10, 5 run from the lower left over the top to half height at the right."""
    (chart,) = charts([{"step": 1, "x": 0.0}, {"step": 2, "x": 10.0}, {"step": 3, "x": 5.0}])
    assert chart.paths == ("M4.0,116.0L160.0,4.0L316.0,60.0",)
    assert (chart.first_step, chart.last_step, chart.lowest, chart.highest, chart.last) == (1, 3, 0.0, 10.0, 5.0)
    assert chart.zero is None


def test_a_curve_has_a_gap_where_a_number_is_missing():
    """null breaks the line in two; a lone point between gaps stays visible as a line of no length."""
    (chart,) = charts([{"step": s, "x": y} for s, y in enumerate([1.0, 2.0, None, 3.0, None])])
    assert [path.count("L") for path in chart.paths] == [1, 1]


def test_a_curve_shows_zero_where_it_crosses_it():
    """From -1 to 1 the zero line is at half height."""
    (chart,) = charts([{"step": 0, "x": -1.0}, {"step": 1, "x": 1.0}])
    assert chart.zero == 60.0


def test_a_constant_is_a_level_line():
    """No division by its span of 0."""
    (chart,) = charts([{"step": 0, "x": 3.0}, {"step": 1, "x": 3.0}])
    assert chart.paths == ("M4.0,60.0L316.0,60.0",)


def test_what_has_one_number_or_none_has_no_curve():
    """A single value is no development."""
    assert charts([{"step": 1, "once": 1.0, "never": None}, {"step": 2, "never": None}]) == []


def test_a_long_curve_is_thinned_by_means():
    """1,000 steps become at most 240 points that keep mean and range of a straight line."""
    (chart,) = charts([{"step": s, "x": float(s)} for s in range(1000)])
    points = chart.paths[0].count(",")
    assert POINTS / 2 < points <= POINTS
    assert (chart.lowest, chart.highest, chart.last) == (0.0, 999.0, 999.0)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "–"),
        (0.73125, "0.731"),
        (-1.5, "−1.5"),
        (12.345, "12.3"),
        (123456, "123,456"),
        (123456.7, "123,457"),
        (0, "0"),
    ],
)
def test_figures_are_short(value, words):
    """Three significant digits, thousands apart, a dash for none."""
    assert figure(value) == words
