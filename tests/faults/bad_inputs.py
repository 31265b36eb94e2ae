"""Bad input without end: recipes, cards and data files that went wrong in every way a generator can think of.

Each case is put into a set of files that is otherwise without a fault and goes through what `rlhf-kit check` does. It
is accepted, or refused with messages of one printable line each; nothing else may happen, nothing may take long, and
nothing may be left behind. The tests draw some hundred cases; a soak draws as many as it is told:

    python -m tests.faults.bad_inputs --cases 2000 --seed 1
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gzip
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from rlhf_kit.check import check_recipe
from rlhf_kit.errors import InputError
from rlhf_kit.marked_yaml import read_yaml, write_yaml
from rlhf_kit.recipe_reading import load_recipe
from tests.plain import CARD, QUESTIONS, RECIPE, make_workplace, write_model

SECONDS = 20.0
"""Of computing that a case may take; the longest take about two on an idle core."""

KINDS = {"shown": "demonstrations", "pairs": "preferences", "asked": "prompts"}


@dataclass(frozen=True)
class Case:
    """What is put over the files without a fault, and the overrides of the command line."""

    files: dict[str, bytes]
    overrides: tuple[str, ...] = ()


# ---------------------------------------------------------------- values and texts

WORDS = [
    *("sft", "ppo", "kind", "none", "1e-5", "*x", "a/b", "a.b:c", "model", "asked.md", "~/x", "..", "~nobody", "{a}"),
    *("../../etc/passwd", "/dev/zero", "/", "a\0b", "\x1b[2J", "\u2028", "\ud800", "hub", "os:system", "x" * 5000),
    "a/" + "x" * 300,
]
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(10**18, 10**40) | st.floats() | st.text(max_size=8)
    | st.sampled_from([word for word in WORDS if word.isprintable()]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to everything inside a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@st.composite
def changed(draw: st.DrawFn, data: Any) -> Any:
    """Plain data in which a few values were replaced, removed, renamed or added."""
    data = copy.deepcopy(data)
    for _ in range(draw(st.integers(1, 4))):
        ways = list(places(data))
        if not ways:
            break
        *way, key = draw(st.sampled_from(ways))
        target = data
        for step in way:
            target = target[step]
        match draw(st.sampled_from(["replace", "remove", "rename", "add"])):
            case "replace":
                target[key] = draw(JUNK)
            case "remove":
                del target[key]
            case "rename" if isinstance(target, dict):
                target[draw(st.text(max_size=6))] = target.pop(key)
            case _ if isinstance(target, dict):
                target[draw(st.sampled_from(KEYS))] = draw(JUNK)
    return data


def mutated(text: str) -> st.SearchStrategy[str]:
    """YAML in which a few values were replaced, removed, renamed or added."""
    return changed(read_yaml(text, "whole").value).map(write_yaml)


KEYS = ["kind", "init", "reward", "updates", "x", "model", "base", "source", "heldout", "columns", "filters", "where",
        "special_tokens", "trust_remote_code", "data_root", "evaluation", "gold", "chat_template", "auto_map", "vocab",
        "num_hidden_layers", "text_config", "weight_map", "max_position_embeddings"]  # fmt: skip


@st.composite
def slipped(draw: st.DrawFn, text: str) -> str:
    """A text of which some piece was replaced by any other."""
    start, length = draw(st.integers(0, len(text))), draw(st.integers(0, 20))
    put = draw(st.text(max_size=10) | st.sampled_from(WORDS))
    return text[:start] + put + text[start + length :]


@st.composite
def piled_up(draw: st.DrawFn, text: str) -> str:
    """A text with a great heap of something in it: depth, keys, anchors, digits, quotes, blanks."""
    heap = draw(st.sampled_from(HEAPS)) * draw(st.integers(1, 300) | st.sampled_from([3000, 60_000]))
    if draw(st.booleans()):  # every key another
        heap = "\n".join(f"{line}{number}: 1" for number, line in enumerate(heap.splitlines()[:9000]))
    before = draw(st.sampled_from(["", "\n", "\nx: ", "\nx: [", '\nx: "', "\nx: '", "\n  x: &a "]))
    lines = text.splitlines(keepends=True)
    at = draw(st.integers(0, len(lines)))
    return "".join(lines[:at]) + before + heap + "\n" + "".join(lines[at:])


HEAPS = [
    *(
        "[",
        "{",
        "- ",
        "? ",
        "a",
        "9",
        "1_",
        "-",
        "'",
        '"',
        "\t",
        " ",
        "\n",
        "#",
        "&a ",
        "*a,",
        "!!x ",
        "!",
        "%TAG ",
        ":",
    ),
    *(",", "1,", "[],", "a: 1\n", "k\n", "&a [*a,*a],", "\\x41", "\U0001f600", "\x85", "\u2028", "---\n"),
]


def written_wrong(text: str) -> st.SearchStrategy[bytes]:
    """A YAML text gone wrong, as the bytes of a file."""
    texts = mutated(text) | slipped(text) | piled_up(text)
    return texts.map(lambda wrong: wrong.encode("utf-8", "surrogatepass")) | st.binary(max_size=40)


# ---------------------------------------------------------------- cards and rows

CELLS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
    | st.sampled_from(["Q", "a", "\n\nHuman: Q\n\nAssistant: A", "", *WORDS]),
    lambda inner: st.lists(inner, max_size=3)
    | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": inner})
    | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)  # fmt: skip
COLUMNS = ["prompt", "completion", "chosen", "rejected", "text", "margin", "annotator", "a\nb"]


@st.composite
def card(draw: st.DrawFn, name: str) -> bytes:
    """A card gone wrong: its front matter, its fences, or the whole file."""
    whole = CARD.format(kind=KINDS[name], name=name)
    front = whole.split("---\n")[1]
    if draw(st.booleans()):
        return b"---\n" + draw(written_wrong(front)) + b"---\nMade for a test.\n"
    return draw(slipped(whole) | piled_up(whole) | st.text(max_size=60)).encode("utf-8", "surrogatepass")


@st.composite
def rows(draw: st.DrawFn, name: str) -> bytes:
    """A data file gone wrong: strange cells, a piece missing or put in, or any bytes."""
    row = {"shown": {"completion": " Here."}, "pairs": {"chosen": " Here.", "rejected": " No."}, "asked": {}}[name]
    content: list[Any] = [{"prompt": question, **row} for question in QUESTIONS]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content) - 1))
        if draw(st.integers(0, 4)):
            content[at] = {**content[at], draw(st.sampled_from(COLUMNS)): draw(CELLS)} if content[at] else draw(CELLS)
        else:
            content[at] = draw(st.dictionaries(st.sampled_from(COLUMNS), CELLS, max_size=3))
    text = "".join(json.dumps(line) + "\n" for line in content)
    match draw(st.sampled_from(["cells", "slip", "pile", "bytes"])):
        case "cells":
            return text.encode()
        case "slip":
            return draw(slipped(text)).encode("utf-8", "surrogatepass")
        case "pile":
            return draw(piled_up(text)).encode("utf-8", "surrogatepass")
    return draw(st.binary(max_size=60))


@st.composite
def other_file(draw: st.DrawFn, name: str) -> dict[str, bytes]:
    """A card that names a file of another kind, and that file."""
    suffix = draw(st.sampled_from([".csv", ".tsv", ".json", ".parquet", ".jsonl.gz", ".csv.gz", ".txt", ""]))
    content = draw(rows(name) | st.binary(max_size=60))
    if suffix.endswith(".gz") and draw(st.booleans()):
        packed = gzip.compress(content)
        content = packed[: draw(st.integers(0, len(packed)))] if draw(st.booleans()) else packed
    source = f"other{suffix}"
    text = CARD.format(kind=KINDS[name], name=name).replace(f"{name}.jsonl", source)
    return {f"{name}.md": text.encode(), source: content}


DROPPING = CARD.replace("source:", "on_problem: drop\n  source:")


@st.composite
def model_file(draw: st.DrawFn) -> dict[str, bytes]:
    """A file of the checkpoint gone wrong."""
    name = draw(st.sampled_from(sorted(MODEL)))
    text = json.dumps(draw(changed(MODEL[name])))
    text = draw(st.just(text) | slipped(text) | piled_up(text))
    return {f"model/{name}": text.encode("utf-8", "surrogatepass")}


with tempfile.TemporaryDirectory() as _folder:  # the tokenizer and configuration of `make_workplace`
    MODEL = {path.name: json.loads(path.read_text()) for path in write_model(Path(_folder, "model")).glob("*.json")}
MODEL["tokenizer_config.json"] |= {"bos_token": "<s>", "added_tokens_decoder": {"0": {"content": "a"}}}
MODEL["tokenizer.json"]["model"]["vocab"] = {"a": 0, "b": 1}
MODEL["model.safetensors.index.json"] = {"weight_map": {"a": "model.safetensors"}}
NAMES = st.sampled_from(sorted(KINDS))
OVERRIDE = st.text(max_size=30) | st.builds(
    "{}={}".format,
    st.sampled_from(["seed", "stages.ppo.lam", "base.model", "stages", "a.b", "base.trust_remote_code", "name"]),
    st.text(max_size=12) | st.sampled_from([*WORDS, *(heap * 300 for heap in HEAPS)]),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """One or two things gone wrong."""
    files: dict[str, bytes] = {}
    overrides: list[str] = []
    for _ in range(draw(st.integers(1, 2))):
        match draw(st.sampled_from(["recipe", "recipe", "card", "card", "rows", "rows", "file", "override", "model"])):
            case "recipe":
                files["recipe.yaml"] = draw(written_wrong(RECIPE))
            case "card":
                name = draw(NAMES)
                files[f"{name}.md"] = draw(card(name))
            case "rows":
                name = draw(NAMES)
                files[f"{name}.jsonl"] = draw(rows(name))
                if draw(st.booleans()):
                    files[f"{name}.md"] = DROPPING.format(kind=KINDS[name], name=name).encode()
            case "file":
                files |= draw(NAMES.flatmap(other_file))
            case "model":
                files |= draw(model_file())
            case "override":
                overrides.append(draw(OVERRIDE))
    return Case(files, tuple(overrides))


# ---------------------------------------------------------------- what must hold


def refused(case: Case, folder: Path) -> bool:
    """Return whether `check` refuses the case, in a folder that `make_workplace` made and that is the working one.

    Raises:
        AssertionError: a message that is not one printable line, or something was left behind.
        Exception: what `check` raised beside InputError; TimeoutError when it took too long.
    """
    before = {name: (folder / name).read_bytes() if (folder / name).exists() else None for name in case.files}
    try:
        for name, content in case.files.items():
            (folder / name).write_bytes(content)
        there = everything_in(folder)
        try:
            with at_most(SECONDS):
                check_recipe(load_recipe("recipe.yaml", case.overrides))
        except InputError as error:
            assert error.problems, "an InputError without a message"
            for problem in error.problems:
                assert problem and problem.isprintable(), f"not one printable line: {problem!r}"
            assert len(set(error.problems)) == len(error.problems), f"told twice: {error.problems}"
            return True
        finally:
            assert everything_in(folder) == there, "something was left behind"
        return False
    finally:
        for name, content in before.items():
            (folder / name).unlink() if content is None else (folder / name).write_bytes(content)


def everything_in(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block when it has computed for so long."""

    def out_of_time(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took more than {seconds} seconds of computing")

    previous = signal.signal(signal.SIGVTALRM, out_of_time)  # not SIGALRM, which is pytest-timeout's
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


def soak(number: int, start: int) -> tuple[Counter[str], list[str]]:
    """Return how many cases were refused and accepted, and of those that failed what happened."""
    counts: Counter[str] = Counter()
    failures: list[str] = []
    longest = 0.0

    @seed(start)
    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases())
    def go(case: Case) -> None:
        nonlocal longest
        began = time.process_time()
        try:
            counts["refused" if refused(case, folder) else "accepted"] += 1
        except Exception:
            failures.append(f"{case}\n{traceback.format_exc()}")
        longest = max(longest, time.process_time() - began)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        make_workplace(folder)
        with contextlib.chdir(folder):
            go()
    print(f"the longest case took {longest:.1f} s", file=sys.stderr)
    return counts, failures


def main() -> int:
    """Run the soak of the command line; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    counts, failures = soak(arguments.cases, arguments.seed)
    for failure in failures[:10]:
        print(failure[:20_000], file=sys.stderr)
    total = counts.total() + len(failures)
    print(f"cases {total}, refused {counts['refused']}, accepted {counts['accepted']}, failures {len(failures)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
