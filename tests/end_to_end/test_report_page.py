"""The report in a real browser: Debian's chromium without a window, where it and its driver are installed."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import yaml

from rlhf_kit import artifacts, health
from rlhf_kit.examples.rows import Preference
from rlhf_kit.report import write_report
from tests.unit.test_health import answers, pair
from tests.unit.test_report import HOSTILE, RECIPE, SUMMARY, finish_all

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the PATH")


def write_health(folder):
    """Give a finished reward stage a health report."""
    draw = np.random.default_rng(0)
    groups = [pair([row], *draw.integers(1, 20, 2).tolist()) for row in range(60)]
    found = answers(draw.normal(size=120).tolist(), draw.integers(1, 20, 120).tolist())
    rows = [Preference("p", "a", "b", "here", slices={"subset": HOSTILE}) for _ in groups]
    samples = {"demonstrations": draw.normal(size=30), "policy samples": draw.normal(size=30)}
    manifest = artifacts.read_manifest(folder)
    manifest["health"] = health.report(health.pairs_of(groups), found, rows, samples, {"empty": draw.normal(size=9)})
    artifacts.write_json(folder / artifacts.MANIFEST, manifest)


def evaluation(text: str) -> dict:
    """Return an `eval.json` in which every system says `text`."""
    figures = dict.fromkeys(
        "score gold kl kl_k3 length ended repetition distinct_1 distinct_2 refusals reference_perplexity".split(), 0.5
    )
    place = {"verdict": "gold", "value": 0.6, "kl": 3.0, "equal_kl": 0.4, "kl_ratio": 7.5}
    points = [{"n": n, "kl_bound": np.log(n) - (n - 1) / n, "gold": n / 64, "score": n / 64} for n in (1, 2, 4, 64)]
    answer = {"text": text, "score": 1.0, "gold": 0.5, "kl": 3.0, "length": 4}
    marked = {**answer, "tokens": [[text, 1.5], [" and more", -0.2]]}
    return {
        "prompts": {"count": 8},
        "reference": "sft",
        "verdict": "gold",
        "systems": dict.fromkeys(("base", "sft", "ppo"), figures),
        "win_rate": {"ppo/sft": {"rate": 0.6, "ci": [0.5, 0.7], "ties": 0.1, "length_controlled": 0.6}},
        "judge": {"name": HOSTILE, "ppo/sft": {"rate": 0.5, "ci": [0.4, 0.6], "ties": 0.2}},
        "best_of_n": {"of": "sft", "samples": 64, "prompts": 8, "points": points},
        "frontier": {"ppo": place},
        "text": {
            "card": "shown",
            "rows": 3,
            "heldout": True,
            "perplexity": dict.fromkeys(("base", "sft", "ppo"), 3.0),
            "change": {"base": 0.2, "sft": 0.0, "ppo": 0.3},
        },
        "cost": {"sft": {"flops": 1e12, "6PD": 2e12}},
        "examples": [{"prompt": text, "answers": {"base": marked, "sft": answer, "ppo": marked}}],
    }


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a run whose every text is hostile."""
    run_dir = tmp_path_factory.mktemp("page") / "quickstart"
    run_dir.mkdir()
    (run_dir / artifacts.RECIPE).write_text(yaml.safe_dump({**RECIPE, "name": HOSTILE}, sort_keys=False))
    finish_all(run_dir, {**SUMMARY, "examples": [{"prompt": HOSTILE, "sft": HOSTILE, "ppo": HOSTILE}]})
    write_health(run_dir / "reward")
    artifacts.write_json(run_dir / artifacts.EVAL, evaluation(HOSTILE))
    return write_report(run_dir)


@pytest.fixture
def browser():
    """A chromium that keeps its console and all its requests."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield opened
    opened.quit()


def requested(browser) -> set[str]:
    """Return every address that the browser has asked for."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}


def test_it_renders_and_nothing_leaves_it(page, browser):
    """No message in the console, no request but the file's own, and what models wrote is text."""
    browser.get(page.as_uri())
    shown = browser.find_element("tag name", "body").text
    for expected in ("What to worry about", "Is this reward model any good?", "Beside best-of-n", "What it cost"):
        assert expected in shown
    assert shown.count("<script>alert(1)</script>") >= 6
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    assert requested(browser) == {page.as_uri()}
    counts = browser.execute_script(
        "return ['script', 'img', 'iframe', 'a'].map(tag => document.getElementsByTagName(tag).length)"
    )
    assert counts == [0, 0, 0, 0]
    assert page.stat().st_size < 3_000_000


@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_a_phone(page, browser, width):
    """Only wide tables scroll, in themselves."""
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(page.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_by_day_and_by_night(page, browser, scheme):
    """Text stands out from what is behind it as WCAG 2 asks, 4.5 to 1; the night's page is dark."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())
    colours = browser.execute_script(
        """const body = getComputedStyle(document.body), root = getComputedStyle(document.documentElement);
        const soft = getComputedStyle(document.querySelector('.soft')).color;
        const card = getComputedStyle(document.querySelector('.card')).backgroundColor;
        return [body.backgroundColor, card, body.color, soft]"""
    )
    paper, card, ink, soft = ([int(n) / 255 for n in colour[4:-1].split(",")] for colour in colours)
    assert (luminance(paper) < 0.1) == (scheme == "dark")
    assert all(contrast(text, behind) >= 4.5 for text in (ink, soft) for behind in (paper, card))


def test_what_is_drawn_is_also_said(page, browser):
    """Every picture has a name and a text; the page has a language, a title and headings in order."""
    browser.get(page.as_uri())
    pictures = browser.find_elements("tag name", "svg")
    assert pictures and all(p.get_attribute("role") == "img" and p.get_attribute("aria-label") for p in pictures)
    assert browser.find_element("tag name", "html").get_attribute("lang") == "en" and browser.title
    levels = browser.execute_script("return [...document.querySelectorAll('h1, h2, h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and all(after <= before + 1 for before, after in pairwise(levels))


def luminance(colour: list[float]) -> float:
    """Relative luminance of an sRGB colour (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: list[float], other: list[float]) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)
