"""docs/ as a site: it builds without a warning or the network, asks nobody for anything, and the names in it exist."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhf_kit import data_cards, recipe
from rlhf_kit.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = {path.relative_to(ROOT / "docs").as_posix(): path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))}
OFFLINE = """
import runpy, socket, sys
def refused(*args):
    raise OSError(f"the build asked the network: {args[1:]}")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refused
sys.argv = ["mkdocs", "build", "--strict", "--site-dir", sys.argv[1]]
runpy.run_module("mkdocs", run_name="__main__")
"""
LOADS = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src"), ("object", "data")}
KINDS = {
    "training.py": ("sft", "reward", "dpo", "kto", "rejection_sampling"),
    "ppo.py": ("ppo", "rloo", "grpo"),
    "dpo.py": ("dpo", "kto"),
}
"""The kinds of stage that log names with their kind in front, by where these names stand."""
GROUPS = "|".join(
    ["objective", "value", "rollout", "heldout", "guard", "time", "throughput", "memory", *sum(KINDS.values(), ())]
)


def settings_classes() -> list[type[Settings]]:
    """Every class of settings that a recipe or a card is written with."""
    of_recipes = [recipe.Recipe, *recipe.HOMES.values(), recipe.Portion]
    return [*of_recipes, data_cards._Block, data_cards._HubSettings, data_cards.Filters, data_cards.Preferred]


class Loaded(HTMLParser):
    """What a browser fetches for a page by itself, and the text that it shows."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") in ("prev", "next", "canonical"):
            return
        self.addresses += [value for name, value in attrs if (tag, name) in LOADS and value]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site; a warning of mkdocs, or a connection, fails it."""
    for module in ("material", "latex2mathml"):
        pytest.importorskip(module, reason="the docs extra is not installed")
    folder = tmp_path_factory.mktemp("site")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-c", OFFLINE, str(folder)]
    built = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def reference(site) -> tuple[str, str]:
    """The pages of recipe and card, as HTML and as one line of text."""
    pages = "".join((site / "reference" / name).read_text() for name in ("recipe.html", "data-card.html"))
    return pages, " ".join(Loaded(pages).text.split())


class TestSite:
    def test_no_page_loads_from_elsewhere(self, site):
        """Scripts, styles, fonts and pictures are the site's own files; nothing draws with a script that is fetched."""
        pages = sorted(site.rglob("*.html"))
        assert len(pages) >= 17
        for page in pages:
            loaded = Loaded(page.read_text()).addresses
            assert len(loaded) >= 3, page.name
            assert [address for address in loaded if re.match(r"[a-z]+:|//", address)] == [], page.name
            assert 'class="mermaid"' not in page.read_text()
        for style in site.rglob("*.css"):
            assert re.findall(r"@import|url\(\s*[\"']?(?:https?:)?//", style.read_text()) == [], style.name

    def test_equations_are_drawn(self, site):
        """Each equation is MathML with what it says; none is left in LaTeX."""
        page = (site / "method.html").read_text()
        assert page.count("<math") > 40 and page.count('display="block"') >= 10
        assert "arithmatex" not in page and "<mfrac>" in page
        assert not re.search(r"\\[a-z]+|\$", Loaded(page).text)

    @pytest.mark.parametrize("settings", settings_classes(), ids=lambda one: one.__name__)
    def test_every_key_is_in_the_reference(self, reference, settings):
        """The reference has a row for each key of recipes and cards, with what the key means."""
        pages, text = reference
        for key, field in settings.model_fields.items():
            assert f"<td><code>{key}</code></td>" in pages, key
            assert " ".join((field.description or "").replace("`", "").split()) in text, key

    def test_files_from_elsewhere_are_pages(self, site):
        """SECURITY.md, results and changes are there, and links to files that are no page are plain words."""
        assert "Weights" in (site / "security.html").read_text()
        assert "three seeds" in (site / "results.html").read_text()
        assert 'href="reference/data-card-template.html"' in (site / "data.html").read_text()
        assert "data_check.py" in (site / "data.html").read_text()
        assert 'data_check.py"' not in (site / "data.html").read_text()

    def test_every_verb_is_in_the_reference(self, site):
        """The command line's page has every verb with its options."""
        text = Loaded((site / "reference" / "commands.html").read_text()).text
        for words in ("rlhf-kit run", "rlhf-kit check", "rlhf-kit data preview", "--set A.B=VALUE", "--data-root DIR"):
            assert words in text


@pytest.mark.parametrize("settings", settings_classes(), ids=lambda one: one.__name__)
def test_every_key_says_what_it_means(settings):
    """A key has a docstring beside it, which the reference and editors show."""
    assert [key for key, field in settings.model_fields.items() if not field.description] == []


# ---------------------------------------------------------------- names


def metric_names() -> Iterator[str]:
    """Yield every metric name that the source spells, those with a stage's kind in front for all its kinds."""
    for path in (ROOT / "rlhf_kit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if re.fullmatch(rf"({GROUPS})/[a-z0-9_]+", node.value):
                    yield node.value
            elif isinstance(node, ast.JoinedStr) and len(node.values) == 2 and isinstance(node.values[1], ast.Constant):
                name = str(node.values[1].value)
                if re.fullmatch(r"/[a-z_]+", name) and "kind" in ast.unparse(node.values[0]):
                    yield from (f"{kind}{name}" for kind in KINDS[path.name])


def explained() -> set[str]:
    """The names that docs/reference/metrics.md explains, from the first column of its tables."""
    cells = re.findall(r"^\| (`[^|]*`) \|", PAGES["reference/metrics.md"], re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_the_metrics_page_has_every_metric_and_no_other():
    """The names in the source and on the page are the same."""
    assert set(metric_names()) == explained()


def test_metrics_named_in_the_docs_exist():
    """A metric that any page names is one."""
    for page, text in PAGES.items():
        named = set(re.findall(rf"`((?:{GROUPS})/[a-z0-9_]+)`", text))
        theirs = {"objective/scores"} if page == "coming-from.md" else set()
        assert named - explained() - theirs == set(), page


def test_keys_named_in_the_docs_exist():
    """A dotted key that any page names, such as `stages.ppo.kl_coef` or `base.dtype`, is a key of recipes."""
    sections = {name: set(settings.model_fields) for name, settings in recipe.SECTIONS.items()}
    kinds = {name: set(settings.model_fields) for name, settings in recipe.STAGE_KINDS.items()}
    found = 0
    for page, text in PAGES.items():
        for section, key in re.findall(rf"`({'|'.join(sections)})\.(\w+)", text):
            found += 1
            assert key in sections[section], f"{page}: {section}.{key}"
        for kind, key in re.findall(r"`stages\.(\w+)\.(\w+)", text):
            found += 1
            assert key in kinds[kind], f"{page}: stages.{kind}.{key}"
    assert found > 20


def compared() -> list[str]:
    """The cells of docs/coming-from.md that have our names."""
    rows = [line.split(" | ") for line in PAGES["coming-from.md"].splitlines() if line.startswith("| ")]
    assert {len(row) for row in rows} == {3}
    return [row[1] for row in rows]


def test_our_names_in_the_comparison_exist():
    """The second column of each table of docs/coming-from.md names keys of recipes and cards, values, and options."""
    ours = {key for settings in settings_classes() for key in settings.model_fields}
    values = {"adapter", "linear", "float32", "all-linear"}
    named = [token for here in compared() for token in re.findall(r"`([^`]+)`", here)]
    assert len(named) > 60
    for token in named:
        key = token.rpartition(".")[2]
        assert key in ours or token in values or token in ("--out", "--fresh") or token.startswith("rlhf-kit "), token


def test_defaults_in_the_comparison_are_ours():
    """Where docs/coming-from.md gives one of our numbers in brackets, it is the default."""
    stage = recipe.PPOStage.model_fields
    given = re.findall(r"`(\w+)` \(([\d.,e-]+)\)", " ".join(compared()))
    assert len(given) >= 25
    for key, number in given:
        assert float(number.replace(",", "")) == stage[key].default, key


def test_computed_sizes_follow_from_the_formulas():
    """The table of docs/hardware.md is what its formulas give for the shapes that stand in it."""
    head = "| base | layers |"
    lines = PAGES["hardware.md"][PAGES["hardware.md"].index(head) :].split("\n\n")[0].splitlines()[2:]
    assert len(lines) == 3
    for line in lines:
        _, *shape, tied, n, o, w, in_8_bit, in_4_bit, adapters = (cell.strip() for cell in line.strip("|").split("|"))
        layers, width, inner, kv_width, vocabulary = map(int, shape)
        linear = [(width, width), (width, kv_width), (width, kv_width), (width, width)]
        linear += [(width, inner), (width, inner), (inner, width)]  # a Llama's: q, k, v, o; gate, up, down
        weights = layers * sum(inputs * outputs for inputs, outputs in linear)
        others = vocabulary * width * (1 if tied == "yes" else 2)
        adapter = layers * 16 * sum(inputs + outputs for inputs, outputs in linear)
        assert (n, o, w) == tuple(f"{count / 1e6:.1f}" for count in (weights, others, adapter))
        assert in_8_bit == f"{(weights + 2 * others) / 1e9:.2f}"
        assert in_4_bit == f"{(0.5625 * weights + 2 * others) / 1e9:.2f}"
        assert adapters == f"{40 * adapter / 1e9:.2f}"


def test_messages_quoted_in_troubleshooting_are_said():
    """What the page tells to look for is what the program says."""
    source = "\n".join(path.read_text() for path in (ROOT / "rlhf_kit").rglob("*.py"))
    start = PAGES["troubleshooting.md"].index("## It does not start")
    table = PAGES["troubleshooting.md"][start:].split("\n## ")[0]
    quoted = [text for row in table.splitlines() for text in re.findall(r"^\| `([^`]+)` \|", row)]
    quoted += ["memory ran out", "is NaN or infinite"]
    assert len(quoted) >= 6
    for text in quoted:
        assert all(part.strip() in source for part in text.split("...")), text


def test_the_table_of_the_report_page_is_the_readme_s():
    """The closing table in docs/report.md is the one that the README shows."""
    table = re.search(r"^```text\n(.*?)```", PAGES["report.md"], re.MULTILINE | re.DOTALL)[1]
    assert table.strip() in (ROOT / "README.md").read_text()
