"""Any recipe, card and data file is accepted by `check`, or refused in printable lines, at once and without a trace.

The cases come from tests/faults/bad_inputs.py, which draws them without end.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings

from rlhf_kit.errors import LONGEST, MOST, InputError
from rlhf_kit.marked_yaml import MAX_VALUES, read_yaml
from tests.faults import bad_inputs
from tests.faults.bad_inputs import Case, cases, refused
from tests.plain import RECIPE, make_workplace


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """The folder of a recipe without a fault, as the working directory."""
    make_workplace(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
@example(case=Case({}))
@example(case=Case({"recipe.yaml": RECIPE.replace("model: model", "model: model/" + "b" * 300).encode()}))
@example(case=Case({"recipe.yaml": RECIPE.replace("shown.md", "/dev/zero").encode()}))
@example(case=Case({"asked.jsonl": b'{"prompt": "\\ud800"}\n'}))
@example(case=Case({}, ("x", "x")))
def test_whatever_is_written(workplace, case):
    """A recipe, cards, rows and overrides gone wrong: accepted or refused, and nothing else."""
    refused(case, workplace)


def test_a_case_without_a_fault_is_accepted(workplace):
    """And one with a fault is refused: the property tells them apart."""
    assert not refused(Case({}), workplace)
    assert refused(Case({"asked.jsonl": b"x"}), workplace)
    assert (workplace / "asked.jsonl").read_bytes() != b"x"


def raises(error: Exception):
    def check(recipe):
        raise error

    return check


def endless(recipe):
    while True:
        pass


def leaves(recipe):
    Path("left").write_text("behind")
    return []


@pytest.mark.parametrize(
    ("check", "caught"),
    [
        (raises(KeyError("x")), KeyError),
        (endless, TimeoutError),
        (leaves, AssertionError),
    ],
)
def test_what_the_property_forbids_is_seen(workplace, monkeypatch, check, caught):
    """Another exception, an endless loop, a file left behind."""
    monkeypatch.setattr(bad_inputs, "check_recipe", check)
    monkeypatch.setattr(bad_inputs, "SECONDS", 0.5)
    with pytest.raises(caught):
        refused(Case({}), workplace)


def test_the_soak_counts(monkeypatch, capsys):
    """It prints cases, refused, accepted and failures, and ends with 1 if there are any."""
    monkeypatch.setattr("sys.argv", ["bad_inputs", "--cases", "12", "--seed", "3"])
    monkeypatch.setenv("HF_HUB_OFFLINE", os.environ.get("HF_HUB_OFFLINE", "1"))
    assert bad_inputs.main() == 0
    words = capsys.readouterr().out.split()
    assert words[::2] == ["cases", "refused", "accepted", "failures"] and words[-1] == "0"
    assert int(words[1].strip(",")) == int(words[3].strip(",")) + int(words[5].strip(",")) >= 12
    monkeypatch.setattr(bad_inputs, "check_recipe", raises(KeyError("x")))
    monkeypatch.setattr("sys.argv", ["bad_inputs", "--cases", "60"])
    assert bad_inputs.main() == 1
    assert int(capsys.readouterr().out.split()[-1]) > 0


class TestMessages:
    def test_a_message_is_one_printable_line(self):
        """Whatever of the input it quotes: no line break, no colour of the terminal, no direction of writing."""
        error = InputError("a\nb\x1b[2Jc\u202ed\x00")
        assert error.problems == ("a\\nb\\x1b[2Jc\\u202ed\\x00",)
        assert str(error).isprintable()

    def test_a_message_is_told_once_and_shortened(self):
        """Of very many the first are told, and how many more there are."""
        assert InputError(["a", "b", "a"]).problems == ("a", "b")
        many = InputError([f"{number}" for number in range(MOST + 7)]).problems
        assert len(many) == MOST + 1 and many[-1] == "and 7 more problems"
        assert InputError(many).problems == many
        (long,) = InputError("x" * 10_000).problems
        assert long == "x" * LONGEST + " …"


class TestHostileYaml:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("a: [" + "1," * 400_000 + "]", f"more than {MAX_VALUES:,} keys and values"),
            ("".join(f"k{n}: 1\n" for n in range(90_000)), f"more than {MAX_VALUES:,} keys and values"),
            ("a: &x [1]\nb: [*x, *x]", "x:1: &x is an anchor"),
            ("[" * 900_000, "nested more than 16 deep"),
            ("- " * 400_000, "nested more than 16 deep"),
            ("a: !!python/object/apply:os.system [x]", "!!python/object/apply:os.system is a tag"),
            ("a: \x00", "cannot stand in YAML"),
            ("a: 1\n" * 9_999, "a: written twice"),
        ],
        ids=["values", "keys", "anchors", "depth", "dashes", "objects", "nul", "twice"],
    )
    def test_is_refused_at_once(self, text, said):
        """Documents of up to a megabyte that would take minutes or all memory: within seconds of computing."""
        with bad_inputs.at_most(20), pytest.raises(InputError) as caught:
            read_yaml(text, "x")
        assert said in caught.value.problems[0] and len(caught.value.problems) <= MOST + 1

    @pytest.mark.parametrize("digits", ["9" * 900_000, "0." + "9" * 900_000, "1e" + "9" * 900_000, "1" + "_" * 900_000])
    def test_long_numbers_end(self, digits):
        """They are text or numbers; none takes long."""
        with bad_inputs.at_most(20):
            assert isinstance(read_yaml(f"a: {digits}", "x").value["a"], str | int | float)
