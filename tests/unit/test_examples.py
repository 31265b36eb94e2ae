"""Rows: every one kept, or dropped and counted with a reason; nothing on both sides of the split."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_kit.audit import audit
from rlhf_kit.data_cards import load_card
from rlhf_kit.errors import InputError
from rlhf_kit.examples.loading import Examples, load_examples, prompts_of
from rlhf_kit.examples.rows import Demonstration, Preference, PromptRow, Ranking, Text
from rlhf_kit.marked_yaml import write_yaml

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT.parent / "shared" / "assets" / "data"
with_assets = pytest.mark.skipif(not ASSETS.is_dir(), reason="the real data is not here (../shared/assets)")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(rows: Iterable | None, kind: str, /, file: str = "d.jsonl", **block: object) -> Examples:
    """Write rows as JSON lines, a card over them, and return what it yields. No rows held out unless asked for."""
    if rows is not None:
        Path("d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("c.md").write_text(
        f"---\n{write_yaml({'rlhf_kit': {'kind': kind, 'source': file, 'heldout': 0, **block}})}---\n"
    )
    return load_examples(load_card("c.md"))


def wrong(rows: Iterable | None, kind: str, /, **block: object) -> list[str]:
    with pytest.raises(InputError) as caught:
        load(rows, kind, **block)
    return list(caught.value.problems)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


class TestKinds:
    def test_demonstrations(self, here):
        """Prompt and completion as they are written, white space too."""
        (row,) = load([{"prompt": "Q\n", "completion": " A"}], "demonstrations").train
        assert row == Demonstration("Q\n", " A", "d.jsonl:1")

    def test_preferences(self, here):
        """With margin and annotator where there are any."""
        rows = [
            {"prompt": "Q", "chosen": "a", "rejected": "b", "margin": 2, "annotator": 7},
            {"prompt": "Q", "chosen": "a", "rejected": "b", "margin": None, "annotator": ""},
        ]
        assert load(rows, "preferences").train == [
            Preference("Q", "a", "b", "d.jsonl:1", 2.0, "7"),
            Preference("Q", "a", "b", "d.jsonl:2", None, None),
        ]

    def test_rankings(self, here):
        """Ranks as they are; ratings give the ranks, equal ones the same."""
        rows = [{"prompt": "Q", "completions": ["a", "b", "c", "d"], "ranks": [2, 1, 2, 4], "annotator": "x"}]
        assert load(rows, "rankings").train == [
            Ranking("Q", ["a", "b", "c", "d"], [2.0, 1.0, 2.0, 4.0], "d.jsonl:1", None, "x")
        ]
        rows = [{"prompt": "Q", "completions": ["a", "b", "c", "d"], "ratings": [3, 7, 3, 1]}]
        assert load(rows, "rankings").train == [
            Ranking("Q", ["a", "b", "c", "d"], [2.0, 1.0, 2.0, 4.0], "d.jsonl:1", [3.0, 7.0, 3.0, 1.0])
        ]

    def test_prompts_and_text(self, here):
        """One column each."""
        assert load([{"prompt": "Q"}], "prompts").train == [PromptRow("Q", "d.jsonl:1")]
        assert load([{"text": "T"}], "text").train == [Text("T", "d.jsonl:1")]

    def test_columns(self, here):
        """Their names, and templates over several; the ends of what a template makes carry no white space."""
        rows = [{"ask": "Add", "with": "1, 2", "say": " 3 "}, {"ask": "Sing", "with": "", "say": "la"}]
        columns = {"prompt": "{ask}\n{with}", "completion": "say"}
        found = load(rows, "demonstrations", columns=columns).train
        assert [(row.prompt, row.completion) for row in found] == [("Add\n1, 2", " 3 "), ("Sing", "la")]

    def test_parts_that_may_be_missing(self, here):
        """What has a ? reads as no text where it is missing or null, which is counted; else that is an error."""
        rows = [{"ask": "Add", "with": "1"}, {"ask": "Sing", "with": None}, {"ask": "Hum"}]
        columns = {"prompt": "{ask}\n{with?}"}
        found = load(rows, "prompts", columns=columns)
        assert [row.prompt for row in found.train] == ["Add\n1", "Sing", "Hum"]
        assert found.counts["noted: with? is missing or null, read as no text"] == 2
        assert load(rows, "prompts", templates={"one": columns["prompt"]}).train == found.train
        first, second, _ = wrong(rows, "prompts", columns={"prompt": "{ask}\n{with}"})
        assert all("write {with?} where rows may lack it" in message for message in (first, second))

    def test_messages_that_may_be_missing(self, here):
        """As the documentation writes them, with quotation marks where YAML wants them."""
        Path("d.jsonl").write_text('{"ask": "Q"}\n{"ask": "R", "sys": "S", "past": [["a", "b"]]}\n')
        way = '{system: "sys?", history: "past?", user: "{ask}?"}'
        Path("c.md").write_text(f"---\nrlhf_kit: {{kind: prompts, source: d.jsonl, columns: {{prompt: {way}}}}}\n---\n")
        found = load_examples(load_card("c.md"))
        prompts = [row.prompt for row in [*found.train, *found.heldout]]
        whole = [{"role": "system", "content": "S"}, user("a"), assistant("b"), user("R?")]
        assert sorted(prompts, key=len) == [[user("Q?")], whole]

    def test_a_system_text_of_the_cards_own(self, here):
        """The same in every row; a text where a column should stand is told how it is written."""
        prompt = {"system": {"text": "Be {brief}."}, "user": "prompt"}
        (row,) = load([{"prompt": "Q"}], "prompts", columns={"prompt": prompt}).train
        assert row.prompt == [{"role": "system", "content": "Be {brief}."}, user("Q")]
        (message,) = wrong([{"prompt": "Q"}], "prompts", columns={"prompt": {**prompt, "system": "Be brief."}})
        assert message.endswith("where that is the text itself, write system: {text: Be brief.}")

    def test_a_template_does_not_fill_in_twice(self, here):
        """Braces in the data stay as they are."""
        (row,) = load([{"a": "{b}", "b": "{a}"}], "prompts", columns={"prompt": "{a} {b}"}).train
        assert row.prompt == "{b} {a}"


class TestChat:
    def test_a_prompt_of_messages(self, here):
        """Messages keep role and content, and nothing else."""
        prompt = [{"role": "system", "content": "Be brief."}, {**user("Q"), "name": "me"}]
        (row,) = load([{"prompt": prompt, "completion": "A"}], "demonstrations").train
        assert row.prompt == [{"role": "system", "content": "Be brief."}, user("Q")]

    def test_explicit_prompt(self, here):
        """trl's form: messages as the prompt, one message each as the answers."""
        row = {"prompt": [user("Q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
        assert load([row], "preferences").train == [Preference([user("Q")], "a", "b", "d.jsonl:1")]

    def test_implicit_prompt(self, here):
        """trl's other form: whole dialogues; what comes before the last answer is the prompt."""
        begin = [user("Q"), assistant("A"), user("R")]
        row = {"chosen": [*begin, assistant("a")], "rejected": [*begin, assistant("b")]}
        assert load([row], "preferences").train == [Preference(begin, "a", "b", "d.jsonl:1")]

    def test_whole_dialogues_beside_a_text_prompt(self, here):
        """UltraFeedback's form: the prompt as text, and again in the dialogues."""
        row = {"prompt": "Q", "chosen": [user("Q"), assistant("a")], "rejected": [user("Q"), assistant("b")]}
        assert load([row], "preferences").train[0].prompt == [user("Q")]
        assert "is not in the dialogue" in wrong([{**row, "prompt": "other"}], "preferences")[0]

    def test_a_dialogue_as_demonstration(self, here):
        """A column of messages, also in ShareGPT's words, is prompt and completion at once."""
        talk = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
        (row,) = load([{"talk": talk}], "demonstrations", columns={"completion": "talk"}).train
        assert (row.prompt, row.completion) == ([user("Q")], "A")

    def test_rows_of_messages_alone(self, here):
        """trl's commonest form: the last answer is the completion; of prompts it is left away."""
        rows = [{"messages": [user("Q"), assistant("A")]}, {"messages": [user("Q"), assistant("A"), user("R")]}]
        (row,) = load(rows[:1], "demonstrations").train
        assert (row.prompt, row.completion) == ([user("Q")], "A")
        assert [row.prompt for row in load(rows, "prompts").train] == [[user("Q")], rows[1]["messages"]]
        assert audit(load_card("c.md")).rows["kept"] == 2
        assert "messages) must end with the assistant's message" in wrong(rows, "demonstrations")[0]
        rows = [{**rows[0], "completion": "B", "prompt": "P"}]  # what is called as we call it comes first
        (row,) = load(rows, "demonstrations").train
        assert (row.prompt, row.completion) == ("P", "B")
        assert load(rows, "prompts").train[0].prompt == "P"

    @pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
    def test_thoughts_beside_the_content(self, here, key):
        """They are left out, and that is counted."""
        rows = [{"messages": [user("Q"), {**assistant("A"), key: "Hm."}]}, {"messages": [user("R"), assistant("B")]}]
        found = load(rows, "demonstrations")
        assert [row.completion for row in found.train] == ["A", "B"]
        assert found.counts["noted: message with thoughts beside its content, which are left out"] == 1

    @pytest.mark.parametrize("name", ["d.csv", "d.jsonl"])
    def test_messages_written_as_text(self, here, name):
        """A text that is a JSON list of messages is read as these, as from CSV files, and that is counted."""
        talks = [json.dumps([user("Q"), assistant(text)]) for text in "ab"]
        rows = [dict(zip(("chosen", "rejected"), talks, strict=True)), {"chosen": talks[1], "rejected": talks[0]}]
        with Path("d.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        found = load(rows, "preferences", file=name)
        assert [(row.prompt, row.chosen) for row in found.train] == [([user("Q")], "a"), ([user("Q")], "b")]
        assert found.counts["noted: text that is a JSON list of messages, read as these"] == 2
        assert audit(load_card("c.md")).rows["noted"] == {"text that is a JSON list of messages, read as these": 2}

    def test_other_lists_written_as_text(self, here):
        """They stay text: what a model shall write may be JSON."""
        texts = ['[{"a": 1}]', '[{"role": "user"}]', "[{", '[{"role": "user", "content": "x"}, 3]', "[1]"]
        rows = [{"prompt": text, "completion": text} for text in texts]
        assert [(row.prompt, row.completion) for row in load(rows, "demonstrations").train] == [(t, t) for t in texts]
        (row,) = load([{"past": json.dumps([user("Q"), assistant("A")]), "prompt": "R"}], "prompts",
                      columns={"prompt": {"history": "past", "user": "prompt"}}).train  # fmt: skip
        assert row.prompt == [user("Q"), assistant("A"), user("R")]

    @pytest.mark.parametrize(
        ("asks", "answers"),
        [("User", "Assistant"), ("HUMAN", "GPT"), ("human", "model"), ("user", "bot"), ("prompter", "Chatbot")],
    )
    def test_known_names(self, here, asks, answers):
        """In upper case or lower; developer is OpenAI's newer word for system."""
        talk = [("Developer", "S"), (asks, "Q"), (answers, "A")]
        rows = [{"completion": [{"role": role, "content": text} for role, text in talk]}]
        (row,) = load(rows, "demonstrations").train
        assert (row.prompt, row.completion) == ([{"role": "system", "content": "S"}, user("Q")], "A")

    def test_names_of_the_datas_own(self, here):
        """The card says whose words they are, also against what is known; numbers are names too."""
        talk = [{"role": role, "content": text} for role, text in [("Me", "Q"), ("gpt", "R"), (1, "A"), ("tool", "T")]]
        roles = {"user": ["me", "GPT", "tool"], "assistant": 1}
        (row,) = load([{"prompt": talk}], "prompts", roles=roles).train
        assert row.prompt == [user("Q"), user("R"), assistant("A"), user("T")]
        (found,) = load([{"all": {"past": talk[:3]}}], "demonstrations", roles=roles,
                        columns={"completion": "all.past"}).train  # fmt: skip
        assert (found.prompt, found.completion) == ([user("Q"), user("R")], "A")

    def test_answers_that_differ_in_use_of_tools_alone(self, here):
        """They are told apart from equal answers, and left out, counted, where the card drops problems."""
        calls = [[{**assistant("I look."), "tool_calls": [{"name": name}]}] for name in ("right", "wrong")]
        rows = [
            {"prompt": [user("Q")], "chosen": calls[0], "rejected": calls[1]},
            {"prompt": [user("Q")], "chosen": [{**assistant("a"), "tool_calls": []}], "rejected": [assistant("b")]},
        ]
        counts = load(rows, "preferences", on_problem="drop").counts
        assert counts == {"read": 2, "kept": 1, "dropped: use of a tool": 1}

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            (
                {"chosen": [user("Q"), assistant("a")], "rejected": [user("R"), assistant("b")]},
                "differ before the last",
            ),
            ({"chosen": [user("Q")], "rejected": [user("Q")]}, "must end with the assistant's message"),
            ({"prompt": [user("Q")], "chosen": [assistant("a")], "rejected": "b"}, "chosen must be text; seen [{"),
            ({"prompt": [assistant("Q")], "chosen": "a", "rejected": "b"}, "nothing to answer"),
            (
                {"prompt": [{"role": "me", "content": ""}], "chosen": "a", "rejected": "b"},
                "system, user or assistant; seen me; if it is one of them, write in the card roles: {assistant: me}",
            ),
            (
                {"prompt": [{"speaker": "user", "text": "Q"}], "chosen": "a", "rejected": "b"},
                "a message has role and content, or from and value; seen speaker, text",
            ),
            (
                {"prompt": [user("Q"), {"role": "Tool", "content": "4"}], "chosen": "a", "rejected": "b"},
                "is Tool; mess",
            ),
            (
                {
                    "prompt": [user("Q")],
                    "chosen": [{**assistant("a"), "tool_calls": [{"name": "f"}]}],
                    "rejected": [assistant("b")],
                },
                'chosen: a message calls a tool, which is not read: [{"name": "f"}]',
            ),
            (
                {
                    "prompt": [user("Q")],
                    "chosen": [{**assistant("a"), "function_call": {"name": "f"}}],
                    "rejected": [assistant("b")],
                },
                "chosen: a message calls a tool",
            ),
            (
                {"prompt": [user(None)], "chosen": "a", "rejected": "b"},
                "content of a message must be text; seen nothing",
            ),
            ({"prompt": ["Q"], "chosen": "a", "rejected": "b"}, 'must be text or messages; seen ["Q"]'),
            ({"prompt": [], "chosen": "a", "rejected": "b"}, "empty prompt"),
            ({"prompt": [user(" ")], "chosen": "a", "rejected": "b"}, "empty prompt"),
        ],
    )
    def test_what_is_no_dialogue(self, here, row, said):
        """Each is told with file and line."""
        message, _ = wrong([row], "preferences")
        assert message.startswith("d.jsonl:1: ") and said in message


class TestTranscripts:
    def test_turns(self, here):
        """The last answer is what follows the last Assistant:, white space around turns is not theirs."""
        begin = "\n\nHuman: Hi\nthere \n\nAssistant: Yes?\n\nHuman: Q\n\nAssistant:"
        row = {"chosen": f"{begin} a\n\nmore ", "rejected": f"{begin} b"}
        prompt = [user("Hi\nthere"), assistant("Yes?"), user("Q")]
        assert load([row], "preferences", format="hh").train == [Preference(prompt, "a\n\nmore", "b", "d.jsonl:1")]
        assert load([row], "demonstrations", format="hh").train == [Demonstration(prompt, "a\n\nmore", "d.jsonl:1")]
        assert load([row], "prompts", format="hh", columns={"transcript": "rejected"}).train[0].prompt == prompt

    def test_shared_answer_text_is_no_prompt(self, here):
        """Answers that begin alike differ from their first word on, not from the first that differs."""
        begin = "\n\nHuman: Q\n\nAssistant:"
        (row,) = load([{"chosen": f"{begin} I will", "rejected": f"{begin} I won't"}], "preferences", format="hh").train
        assert (row.prompt, row.chosen, row.rejected) == ([user("Q")], "I will", "I won't")

    def test_speakers_within_a_turn_and_twice_in_a_row(self, here):
        """Human: within a line is text; a speaker's turns in a row are one message."""
        (row,) = load(
            [{"chosen": "\n\nHuman: a Human: b\n\nHuman: c\n\nAssistant: d"}], "demonstrations", format="hh"
        ).train
        assert row.prompt == [user("a Human: b\n\nc")]

    @pytest.mark.parametrize(
        ("chosen", "said"),
        [
            ("\n\nHuman: Q", "the last turn of a transcript must be the Assistant's"),
            ("Hello\n\nHuman: Q\n\nAssistant: A", "must begin with Human:"),
            ("\n\nAssistant: A", "must begin with Human:"),
            ("no transcript", "must begin with Human:"),
            ("\n\nHuman: Q\n\nAssistant: ", "the last answer of transcript (column chosen) is empty"),
            ("\n\nHuman: \n\nAssistant: A", "empty prompt"),
            ("\n\nHuman: Q\n\nAssistant: A\n\nAssistant: B", "nothing to answer"),
        ],
    )
    def test_what_is_no_transcript(self, here, chosen, said):
        """Each is told with file and line."""
        message, _ = wrong([{"chosen": chosen}], "demonstrations", format="hh")
        assert message == f"d.jsonl:1: {said}" or said in message

    def test_a_forgotten_format(self, here):
        """Transcripts without `format: hh` are recognised."""
        (message,) = wrong([{"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "b"}], "preferences")
        assert "write format: hh" in message


class TestRules:
    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"prompt": "", "chosen": "a", "rejected": "b"}, "empty prompt"),
            ({"prompt": "Q", "chosen": "\n ", "rejected": "b"}, "empty chosen"),
            ({"prompt": "Q", "chosen": "a", "rejected": ""}, "empty rejected"),
            ({"prompt": "Q", "chosen": "a", "rejected": "a "}, "chosen equal to rejected"),
            ({"prompt": "Q", "chosen": 3, "rejected": "b"}, "non-text cell"),
            ({"prompt": None, "chosen": "a", "rejected": "b"}, "non-text cell"),
            ({"prompt": "Q", "chosen": "a"}, "missing column"),
            ({"prompt": "Q\ud800", "chosen": "a", "rejected": "b"}, "text that is not Unicode"),
            ({"prompt": "Q", "chosen": "a", "rejected": "b", "margin": "much"}, "margin is no number"),
            ({"prompt": "Q", "chosen": "a", "rejected": "b", "margin": 10**400}, "margin is no number"),
            ({"prompt": "Q", "chosen": "a", "rejected": "b", "margin": True}, "margin is no number"),
            ({"prompt": "Q", "chosen": "a", "rejected": "b", "margin": float("nan")}, "margin is no number"),
            ({"prompt": "Q", "chosen": "a", "rejected": "b", "margin": "-2"}, "negative margin"),
        ],
    )
    def test_error_or_counted(self, here, row, reason):
        """A row that breaks a rule is an error with its line; with on_problem: drop it is left out and counted."""
        good = {"prompt": "Q", "chosen": "a", "rejected": "b"}
        first, summary = wrong([good, row], "preferences")
        assert first.startswith("d.jsonl:2: ")
        assert summary.startswith(f"c.md: 1 × {reason} in 2 rows") and "on_problem: drop" in summary
        assert load([good, row], "preferences", on_problem="drop").counts == {
            "read": 2,
            "kept": 1,
            f"dropped: {reason}": 1,
        }

    def test_the_first_five_are_shown(self, here):
        """And all are counted by reason."""
        messages = wrong([{"prompt": ""}] * 7 + [{"prompt": 1}, {"prompt": "x"}], "prompts")
        assert len(messages) == 6
        assert "7 × empty prompt, 1 × non-text cell in 9 rows" in messages[-1]

    def test_nothing_left(self, here):
        """A card of which every row is left out is an error that says why."""
        (message,) = wrong([{"prompt": ""}], "prompts", on_problem="drop")
        assert message == "c.md: no row is left to train on: of 1 read 1 × empty prompt"


class TestFilters:
    ROWS = [{"prompt": str(n), "language": "no" if n % 2 else "en", "ok": n > 2} for n in range(6)]  # noqa: RUF012

    def test_where(self, here):
        """A value or one of several; what is filtered is counted by column; true is not 1."""
        found = load(self.ROWS, "prompts", filters={"where": {"language": "no"}})
        assert [row.prompt for row in found.train] == ["1", "3", "5"]
        assert found.counts == {"read": 6, "kept": 3, "dropped: filters.where.language": 3}
        both = load(self.ROWS, "prompts", filters={"where": {"language": ["en", "no"], "ok": True}})
        assert [row.prompt for row in both.train] == ["3", "4", "5"]
        assert "no row is left" in wrong(self.ROWS, "prompts", filters={"where": {"ok": 1}})[0]

    @pytest.mark.parametrize(
        ("cell", "wanted", "equal"),
        [
            ("TRUE", True, True), ("true", True, True), ("False", False, True), ("TRUE", False, False),
            ("1", 1, True), ("1.0", 1, True), (" 1 ", 1.0, True), (1.0, 1, True), (1, "1.0", True), ("1e0", 1, True),
            ("9007199254740993", 9007199254740993, True), ("9007199254740993", 9007199254740992, False),
            ("1", True, False), (1, True, False), (True, "yes", False), ("007", "7", False), ("007", 7, True),
            (4, "3..5", True), ("5.0", "3..5", True), (5.5, "3..5", False), (True, "0..1", False), ("x", "3..5", False),
            ("", None, True), ("None", None, True), ("0", None, False), (0, None, False), ({"a": 1}, 1, False),
        ],
    )  # fmt: skip
    def test_what_equals_what(self, here, cell, wanted, equal):
        """A text beside a number, true, false or null is what it spells; two texts are compared letter by letter."""
        pair = {"prompt": "Q", "a": "a", "b": "b"}
        rows = [{**pair, "x": cell}, {**pair, "x": "other"}]
        where = {"filters": {"where": {"x": wanted}}}
        if equal:
            assert len(load(rows, "prompts", **where).train) == 1
        else:
            assert "no row is left" in wrong(rows, "prompts", **where)[0]
        preferred = {"first": [wanted], "second": "other"}
        card = {"columns": {"first": "a", "second": "b", "preferred": "x"}, "preferred": preferred}
        assert len(load(rows, "preferences", on_problem="drop", **card).train) == 1 + equal

    def test_ratings_that_are_true_or_false(self, here):
        """Also as CSV files write them; other numbers are not."""
        rows = [{"prompt": "Q", "completion": text, "label": label} for text, label in [("a", "TRUE"), ("b", "False")]]
        card = {"columns": {"rating": "label"}, "scale": [0, 1]}
        (row,) = load(rows, "rankings", **card).train
        assert (row.ratings, row.ranks) == ([1.0, 0.0], [1.0, 2.0])
        assert "must be a number; seen TRUE" in wrong(rows, "rankings", columns={"rank": "label"})[0]

    def test_what_was_wanted_and_seen(self, here):
        """Where no row is left, the message names what each filter wanted and some of what it saw; the audit too."""
        rows = [{"prompt": "Q", "lang": lang, "n": n} for n, lang in enumerate(["en", "en", None, "de", *"abcd"])]
        block = {"filters": {"where": {"lang": ["en", "EN"], "n": "x"}}}
        (message,) = wrong(rows, "prompts", **block)
        said = (
            '; filters.where.n wants x, seen 0, 1; filters.where.lang wants ["en", "EN"], '
            "seen nothing (null), de, a, b, c"
        )
        assert message.endswith(said)
        assert audit(load_card("c.md")).problems == [f"c.md: no row is left of 8 read{said}"]

    def test_max_rows(self, here):
        """The first rows that pass `where`; nothing is read after them."""
        found = load(self.ROWS, "prompts", filters={"max_rows": 2, "where": {"language": "no"}})
        assert [row.prompt for row in found.train] == ["1", "3"]
        assert found.counts == {"read": 4, "kept": 2, "dropped: filters.where.language": 2}

    def test_an_unknown_column(self, here):
        """A filter on a column that is not there is an error."""
        (message,) = wrong(self.ROWS, "prompts", filters={"where": {"langage": "no"}})
        assert message.endswith("filters.where of c.md names; did you mean language?")


class TestSlices:
    ROWS = [  # noqa: RUF012
        {"prompt": f"Q{n // 2}", "completion": f"A{n}", "rating": n % 2, "subset": subset, "at": {"level": n // 4}}
        for n, subset in enumerate(["chat"] * 4 + ["code"] * 4)
    ]

    def test_values_are_kept_as_text(self, here):
        """Also of columns inside columns, and where completions of one prompt are put together."""
        found = load(self.ROWS, "rankings", columns={"rating": "rating"}, slices=["subset", "at.level"], heldout=0.3)
        rows = sorted([*found.train, *found.heldout], key=lambda row: row.prompt)
        assert [dict(row.slices) for row in rows] == [{"subset": "chat", "at.level": "0"}] * 2 + [
            {"subset": "code", "at.level": "1"}
        ] * 2

    def test_they_change_no_content(self, here):
        """A stage is not run again because a card tells its rows apart; votes that are counted keep their slices."""
        rows = [{"prompt": f"Q{n}", "first": "a", "second": "b", "preferred": 1, "subset": "x"} for n in range(9)] * 2
        card = {
            "columns": {"first": "first", "preferred": "preferred"},
            "preferred": {"first": 1, "second": 2},
            "votes": "majority",
        }
        plain, sliced = load(rows, "preferences", **card), load(rows, "preferences", **card, slices=["subset"])
        assert plain.content_hash == sliced.content_hash
        assert {row.slices["subset"] for row in sliced.train} == {"x"} and not plain.train[0].slices

    def test_a_gap_is_no_slice(self, here):
        rows = [{"prompt": f"Q{n}", "chosen": "a", "rejected": "b", "subset": ["", None, "x"][n % 3]} for n in range(9)]
        found = load(rows, "preferences", slices=["subset"])
        assert [dict(row.slices) for row in found.train + found.heldout].count({}) == 6

    def test_an_unknown_column(self, here):
        (message,) = wrong(self.ROWS, "rankings", columns={"rating": "rating"}, slices=["subst"])
        assert message.endswith("there is no column subst, which slices of c.md names; did you mean subset?")

    def test_only_comparisons_have_them(self, here):
        (message,) = wrong([{"prompt": "Q"}], "prompts", slices=["subset"])
        assert message.endswith("slices: is for preferences and rankings, whose rows are comparisons")


class TestSplit:
    def test_a_prompt_is_on_one_side(self, here):
        """Rows of one prompt stay together, in order, and about the share asked for is held out."""
        rows = [{"prompt": f"Q{n % 500}", "completion": str(n)} for n in range(1000)]
        found = load(rows, "demonstrations", heldout=0.2)
        train, heldout = ({row.prompt for row in side} for side in (found.train, found.heldout))
        assert not train & heldout and len(found.train) + len(found.heldout) == 1000
        assert 60 < len(heldout) < 140  # 500 prompts, each with probability 0.2: 100 and 4.5 standard deviations
        assert [int(row.completion) for row in found.train] == sorted(int(row.completion) for row in found.train)

    def test_the_same_prompts_in_every_card(self, here):
        """Cards of different kinds with the same share hold the same prompts out."""
        prompts = [f"Q{n}" for n in range(100)]
        asked = load([{"prompt": p} for p in prompts], "prompts", heldout=0.3)
        shown = load([{"prompt": p, "completion": "A"} for p in reversed(prompts)], "demonstrations", heldout=0.3)
        assert {row.prompt for row in asked.heldout} == {row.prompt for row in shown.heldout}

    @pytest.mark.parametrize("share", [0.001, 0.999])
    def test_both_sides_have_something(self, here, share):
        """Of a few prompts that would all fall on one side one is put on the other; of one prompt none."""
        found = load([{"prompt": f"Q{n}"} for n in range(5)], "prompts", heldout=share)
        assert sorted((len(found.train), len(found.heldout))) == [1, 4]
        assert load([{"prompt": "Q"}], "prompts", heldout=share).heldout == []

    def test_heldout_file(self, here):
        """Rows of another file; a training prompt that is also in it is an error, or dropped and counted."""
        Path("h.jsonl").write_text('{"prompt": "a"}\n{"prompt": "z"}\n')
        first, last = wrong([{"prompt": p} for p in "abc"], "prompts", heldout="h.jsonl")
        assert first == "d.jsonl:1: the prompt is also held out, in h.jsonl:1"
        assert last.startswith("c.md: 1 rows to train on have prompts that are also held out")
        found = load([{"prompt": p} for p in "abc"], "prompts", heldout="h.jsonl", shared_prompts="drop")
        assert [row.prompt for row in found.train] == ["b", "c"]
        assert [row.where for row in found.heldout] == ["h.jsonl:1", "h.jsonl:2"]
        assert found.counts == {"read": 5, "kept": 4, "dropped: prompt is also held out": 1}


class TestHash:
    def test_it_depends_on_what_is_learned_from(self, here):
        """The same rows have the same hash wherever they are; another word, order or split has another."""
        rows = [{"prompt": f"Q{n}", "completion": "A"} for n in range(9)]
        first = load(rows, "demonstrations")
        Path("other.jsonl").write_text(Path("d.jsonl").read_text().replace("\n", "\n\n"))
        assert load(None, "demonstrations", file="other.jsonl").content_hash == first.content_hash
        hashes = {
            first.content_hash,
            load(rows[::-1], "demonstrations").content_hash,
            load(rows, "demonstrations", heldout=0.5).content_hash,
            load([*rows[:-1], {"prompt": "Q8", "completion": "B"}], "demonstrations").content_hash,
        }
        assert len(hashes) == 4


class TestPrompts:
    def test_each_once(self, here):
        """Prompts of any kind with prompts; repeated ones are left out and counted."""
        rows = [{"prompt": p, "completion": "A"} for p in "abab"] + [{"prompt": "", "completion": "A"}]
        found = prompts_of(load(rows, "demonstrations", on_problem="drop"))
        assert found.train == [PromptRow("a", "d.jsonl:1"), PromptRow("b", "d.jsonl:2")]
        assert found.counts == {"read": 5, "kept": 2, "dropped: empty prompt": 1, "dropped: repeated prompt": 2}

    def test_text_has_none(self, here):
        """Texts are no prompts."""
        with pytest.raises(InputError, match="rows of kind text have no prompts"):
            prompts_of(load([{"text": "T"}], "text"))


ROWS = [{"prompt": 'Q "1",\n2', "completion": "A"}, {"prompt": "Frage ß", "completion": " ja"}]


def _opened_to_write(name: str):
    """Open a text file, packed as its ending says."""
    if name.endswith(".zst"):
        import pyarrow

        return io.TextIOWrapper(pyarrow.CompressedOutputStream(name, "zstd"), "utf-8", newline="")
    opened = gzip.open if name.endswith(".gz") else open
    return opened(name, "wt", encoding="utf-8", newline="")


def write_file(name: str) -> None:
    """Write ROWS in the format that the name says."""
    import pyarrow
    import pyarrow.feather
    import pyarrow.parquet

    kind = name.lower().removesuffix(".gz").removesuffix(".zst")
    table = pyarrow.Table.from_pylist(ROWS)
    if kind.endswith(".parquet"):
        pyarrow.parquet.write_table(table, name)
        return
    if kind.endswith(".feather"):
        pyarrow.feather.write_feather(table, name)
        return
    if kind.endswith(".arrow"):  # the stream format, as datasets writes it
        with pyarrow.ipc.new_stream(name, table.schema) as stream:
            stream.write_table(table)
        return
    with _opened_to_write(name) as file:
        if kind.endswith((".jsonl", ".ndjson")):
            file.write("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS))
        elif kind.endswith(".json"):
            json.dump(ROWS, file, indent=1)
        else:
            writer = csv.DictWriter(file, ["prompt", "completion"], delimiter="\t" if ".tsv" in kind else ",")
            writer.writeheader()
            writer.writerows(ROWS)


class TestFiles:
    @pytest.mark.parametrize(
        ("name", "lines"),
        [
            ("d.jsonl", [1, 2]),
            ("d.ndjson", [1, 2]),
            ("d.json", [2, 6]),
            ("d.csv", [2, 4]),
            ("d.tsv", [2, 4]),
            ("d.parquet", [1, 2]),
            ("d.jsonl.gz", [1, 2]),
            ("d.json.gz", [2, 6]),
            ("d.csv.gz", [2, 4]),
            ("d.jsonl.zst", [1, 2]),
            ("d.json.zst", [2, 6]),
            ("d.tsv.zst", [2, 4]),
            ("d.arrow", [1, 2]),
            ("d.feather", [1, 2]),
            ("D.JSONL", [1, 2]),
        ],
    )
    def test_every_format_gives_the_same_rows(self, here, name, lines):
        """With the line on which each row begins (the row's number in Parquet)."""
        write_file(name)
        assert load(None, "demonstrations", file=name).train == [
            Demonstration(row["prompt"], row["completion"], f"{name}:{line}")
            for row, line in zip(ROWS, lines, strict=True)
        ]

    def test_a_pattern_of_names(self, here):
        """All files that it matches, in the order of their names; other endings are left alone."""
        for name in ("b", "a", "c"):
            Path(f"part-{name}.jsonl").write_text(f'{{"prompt": "{name}"}}\n')
        Path("part-d.doc").write_text("no data")
        found = load(None, "prompts", source="part-*.jsonl")
        assert [(row.prompt, row.where) for row in found.train] == [(n, f"part-{n}.jsonl:1") for n in "abc"]
        assert [row.prompt for row in load(None, "prompts", source="p*").train] == ["a", "b", "c"]

    @pytest.mark.parametrize("name", ["d.txt", "d.txt.gz"])
    def test_a_text_a_line(self, here, name):
        """A .txt file has a column text; what is in a line stays as it is, and empty lines are none."""
        with _opened_to_write(name) as file:
            file.write('One, "two".\n\n  Tab\there \r\nLast')
        found = load(None, "text", file=name).train
        assert [(row.text, row.where) for row in found] == [
            ('One, "two".', f"{name}:1"), ("  Tab\there ", f"{name}:3"), ("Last", f"{name}:4"),
        ]  # fmt: skip

    def test_json_longer_than_what_is_held(self, here, monkeypatch):
        """A list is read piece by piece, on one line or on many, with letters cut anywhere."""
        monkeypatch.setattr("rlhf_kit.data_files.CHUNK", 7)
        rows = [{"prompt": f"{'ß' * n}{n}"} for n in range(20)]
        Path("d.json").write_text(json.dumps(rows, ensure_ascii=False))
        assert [row.prompt for row in load(None, "prompts", file="d.json").train] == [row["prompt"] for row in rows]
        Path("d.json").write_text(json.dumps(rows, indent=0))
        assert [row.where for row in load(None, "prompts", file="d.json").train] == [
            f"d.json:{2 + 3 * n}" for n in range(20)
        ]

    def test_json_lines_that_are_called_json(self, here):
        """A .json file of one object after another is read as what it is."""
        Path("d.json").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
        assert [row.where for row in load(None, "prompts", file="d.json").train] == ["d.json:1", "d.json:2"]

    def test_a_byte_order_mark_and_empty_lines(self, here):
        """Neither is a row."""
        Path("d.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n\n  \n{"prompt": "b"}')
        assert [row.where for row in load(None, "prompts").train] == ["d.jsonl:1", "d.jsonl:4"]

    def test_several_files(self, here):
        """One after the other."""
        Path("e.jsonl").write_text('{"prompt": "b"}')
        found = load([{"prompt": "a"}], "prompts", source=["d.jsonl", "e.jsonl"])
        assert [row.where for row in found.train] == ["d.jsonl:1", "e.jsonl:1"]

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("d.jsonl", b"", "d.jsonl: is empty"),
            ("d.jsonl", b"\n\n", "d.jsonl: is empty"),
            ("d.json", b"[]", "d.json: is empty"),
            ("d.csv", b"prompt\n", "d.csv: is empty"),
            (
                "d.jsonl",
                b'{"prompt": "a"}\n{"prom',
                "d.jsonl:2: not a line of JSON: Unterminated string starting at; is the file",
            ),
            ("d.jsonl", b'{"prompt": "a"},\n', "d.jsonl:1: not a line of JSON: Extra data"),
            ("d.jsonl", b"[\n", "d.jsonl:1: is a JSON list and not JSON lines; let its name end in .json"),
            ("d.jsonl", b'["a"]\n', 'd.jsonl:1: a row is an object such as {"prompt": "..."}; seen ["a"]'),
            ("d.jsonl", b"[" * 100_000, "d.jsonl:1: not a line of JSON: nested too deeply"),
            ("d.jsonl", b'{"prompt": "\xff"}', "d.jsonl:1: byte 13 of the line is not UTF-8"),
            (
                "d.jsonl",
                b'{"prompt": "caf\xe9"}',
                "d.jsonl:1: byte 16 of the line is not UTF-8 text, but 0xE9; if it is W",
            ),
            (
                "d.json",
                b'[{"prompt": "caf\xe9"}]',
                "d.json:1: byte 17 of the line is not UTF-8 text, but 0xE9; if it is W",
            ),
            ("d.csv", "prompt\nQ".encode("utf-16"), "d.csv:1: looks like UTF-16LE (its byte order mark is 0xFFFE)"),
            ("d.jsonl", '{"prompt": "Q"}'.encode("utf-16-be"), "d.jsonl:1: looks like UTF-16BE (every other byte is"),
            ("d.json", '[{"prompt": "Q"}]'.encode("utf-16-le"), "d.json:1: looks like UTF-16LE (every other byte is"),
            ("d.csv", b"prompt,,\na,b,c\n", "d.csv:1: 2 columns have no name; name or remove them"),
            ("d.json", b'[{"prompt": "a"},\n{"prompt": "b"}', "d.json:2: the list has no end"),
            ("d.json", b'[{"prompt": "a"}] x', "d.json:1: there is more behind the end"),
            ("d.json", b'[{"prompt": "a"},\n{"prompt" "b"}]', "d.json:2: not JSON: Expecting ':' delimiter"),
            (
                "d.json",
                b'{"data": [{"prompt": "a"}]}',
                "d.json:1: there is no column prompt: the rows are a list inside the key data; write rows: data in",
            ),
            ("d.csv", b'prompt\n"a', "d.csv:2: not CSV: unexpected end of data; is a quote not closed"),
            (
                "d.tsv",
                b'prompt\n"a" b',
                "d.tsv:2: not CSV: '\\t' expected after '\"'; is a quote not closed, or the file cut off? "
                "Where quotes are text, a card says quoting: none",
            ),
            ("d.csv", b"prompt,x\na\n", "d.csv:2: 1 cells under a header of 2"),
            ("d.csv", b"prompt,prompt\na,b\n", "d.csv:1: the header names column prompt twice"),
            (
                "d.csv",
                b"prompt;x\na;b\n",
                "d.csv:2: there is no column prompt, but one called 'prompt;x': save the file with commas",
            ),
            ("d.jsonl.gz", b"no gzip", "d.jsonl.gz: is not compressed, whatever its name says"),
            (
                "d.jsonl.gz",
                gzip.compress(b'{"prompt": "a"}\n', mtime=0)[:-9],
                "d.jsonl.gz:2: the compressed file is cut off here",
            ),
            (
                "d.jsonl.gz",
                gzip.compress(b'{"prompt": "a"}\n', mtime=0)[:-8] + bytes(8),
                "d.jsonl.gz:2: not a sound gzip file: CRC",
            ),
            (
                "d.jsonl.gz",
                gzip.compress(b"x" * (2**24 + 1), mtime=0),
                "d.jsonl.gz:1: the line is longer than 16,777,216 bytes",
            ),
            (
                "d.json.gz",
                gzip.compress(b'[{"prompt": "' + b"x" * (2**24 + 9), mtime=0),
                "d.json.gz:1: not JSON, or a row",
            ),
            (
                "d.jsonl.gz",
                gzip.compress((b'{"prompt": "' + b"x" * (2**20 - 15) + b'"}\n') * 70, mtime=0),
                "d.jsonl.gz:65: unpacks to more than 200 times its size",
            ),
            ("d.jsonl.zst", b"no zstd", "d.jsonl.zst:1: not a sound zstd file"),
            ("d.parquet", b"PAR1xxxxPAR1", "d.parquet:1: not a sound Parquet file"),
            ("d.arrow", b"ARROW1xxxx", "d.arrow:1: not a sound Arrow file"),
            ("d.arrow", b"", "d.arrow:1: not a sound Arrow file"),
            ("d.arrow", b"something else", "d.arrow:1: not a sound Arrow file"),
        ],
    )
    def test_broken_files(self, here, name, content, said):
        """Each is one message with the line, whatever the card says about rows."""
        Path(name).write_bytes(content)
        (message,) = wrong(None, "prompts", source=name, on_problem="drop")
        assert message.startswith(said)

    def test_rows_inside_an_object(self, here):
        """The card says behind which key of a .json file they are a list; what stands around them may be anything."""
        whole = {"n": 1.5, "export": {"about": [{"rows": 1}], "rows": [{"prompt": "a"}, {"prompt": "b"}]}, "more": []}
        Path("d.json").write_text(json.dumps(whole, indent=1))
        found = load(None, "prompts", file="d.json", rows="export.rows").train
        assert [(row.prompt, row.where) for row in found] == [("a", "d.json:10"), ("b", "d.json:13")]

    @pytest.mark.parametrize(
        ("content", "rows", "said"),
        [
            (
                '{"a": {"rows": []}}',
                "a.row",
                "d.json:1: there is no key row here, which the card's rows: names; did you",
            ),
            ('{"a": 12}', "a", "d.json:1: there is no list behind a, which the card's rows: names"),
            ('[{"a": []}]', "a", "d.json:1: there is no object here that has a key a"),
            ('{"a": [{"prompt": "x"}],\n', "a", "d.json:2: the object has no end; is the file cut off here?"),
            ('{"a": [{"prompt": "x"}]} {', "a", "d.json:1: there is more behind the end of the object"),
            ('{"a": 1', "b", "d.json:1: the object has no end"),
        ],
    )
    def test_rows_that_are_not_there(self, here, content, rows, said):
        """One message with the line."""
        Path("d.json").write_text(content)
        (message,) = wrong(None, "prompts", file="d.json", rows=rows)
        assert message.startswith(said)

    def test_numbers_across_what_is_held(self, here, monkeypatch):
        """A value that is passed by is read to its end, wherever the file is cut into pieces."""
        monkeypatch.setattr("rlhf_kit.data_files.CHUNK", 7)
        Path("d.json").write_text('{"n": 123456789012345, "data": [{"prompt": "x"}], "m": 3.25}')
        assert len(load(None, "prompts", file="d.json", rows="data").train) == 1

    def test_a_list_in_a_row_is_no_list_of_rows(self, here):
        """In lines or a list of rows nothing is said about a key that holds the rows."""
        row = {"data": [{"x": "y"}]}
        Path("d.json").write_text(json.dumps([row]))
        for messages in (wrong([row], "prompts"), wrong(None, "prompts", file="d.json")):
            assert "rows:" not in messages[0] and "map it in c.md" in messages[0]

    @pytest.mark.parametrize("name", ["d.parquet", "d.arrow"])
    def test_a_long_row_of_a_table(self, here, name):
        """The limit on rows holds where a small file unpacks to a long cell too."""
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"prompt": ["short", "x" * (2**24 + 1)]})
        if name.endswith("parquet"):
            pyarrow.parquet.write_table(table, name, compression="zstd")
            assert Path(name).stat().st_size < 50_000
        else:
            with pyarrow.ipc.new_file(name, table.schema) as file:
                file.write_table(table)
        (message,) = wrong(None, "prompts", source=name)
        assert message == f"{name}:2: the row is longer than 16,777,216 bytes"

    def test_missing_column(self, here):
        """Named with the columns that are there and how to map them."""
        rows = [{"question": "Q", "answer": "A"}]
        assert wrong(rows, "demonstrations") == [
            "d.jsonl:1: there are no columns prompt, completion; columns: answer, question; "
            "map them in c.md: columns: {prompt: <their name>, completion: <their name>}",
        ]
        (message,) = wrong([{"Prompt": "Q", "good": "A", " reject": "B"}], "preferences")
        assert message.endswith('{prompt: Prompt, chosen: <their name>, rejected: " reject"}')
        assert wrong([{"question": "Q", "completion": "A"}], "demonstrations") == [
            "d.jsonl:1: there is no column prompt; columns: completion, question; "
            "map it in c.md: columns: {prompt: <their name>}",
        ]
        (message,) = wrong(rows, "demonstrations", columns={"prompt": "question", "completion": "anwser"})
        (told,) = wrong(rows, "demonstrations", columns={"prompt": "$.question", "completion": "answer"})
        assert told.endswith(
            "no column $.question, which the card takes for prompt; the way into a column is written question"
        )
        assert message == (
            "d.jsonl:1: there is no column anwser, which the card takes for completion; did you mean answer? "
            "(columns: question, answer)"
        )


class TestHub:
    def test_a_dataset_is_read_through_datasets(self, here, monkeypatch):
        """With everything that the card says of it; rows are named by dataset, revision, split and number."""
        datasets = pytest.importorskip("datasets")
        asked = []

        def load_dataset(*arguments, **named):
            asked.append((arguments, named))
            return datasets.Dataset.from_list([{"prompt": "Q" + named["split"]}])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        source = {"hub": "a/b", "revision": "v1", "config": "c", "data_files": ["x", "y"]}
        found = load(None, "prompts", source=source, heldout="test")
        assert found.train == [PromptRow("Qtrain", "a/b/c@v1[train]:1")]
        assert found.heldout == [PromptRow("Qtest", "a/b/c@v1[test]:1")]
        more, there = {"data_dir": None, "data_files": ["x", "y"], "revision": "v1"}, "hf://datasets/a/b"
        assert asked == [((there, "c"), {**more, "split": "train"}), ((there, "c"), {**more, "split": "test"})]

    def test_streaming(self, here, monkeypatch):
        """Rows as they come, where the card says so."""
        datasets = pytest.importorskip("datasets")
        asked = []

        def load_dataset(*arguments, **named):
            asked.append(named["streaming"])
            return datasets.Dataset.from_list([{"prompt": "Q"}]).to_iterable_dataset()

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        found = load(None, "prompts", source={"hub": "a/b", "revision": "v1", "streaming": True})
        assert (found.train, asked) == ([PromptRow("Q", "a/b@v1[train]:1")], [True])

    def test_one_that_cannot_be_had(self, here):
        """No network, no such dataset or split: one message."""
        code = (
            "from rlhf_kit.data_cards import load_card\nfrom rlhf_kit.examples.loading import load_examples\n"
            "from rlhf_kit.errors import InputError\n"
            "try:\n    load_examples(load_card('c.md'))\nexcept InputError as error:\n    print(error)\n"
        )
        block = {"rlhf_kit": {"kind": "prompts", "source": {"hub": "nobody/nothing", "revision": "v1"}}}
        Path("c.md").write_text(f"---\n{write_yaml(block)}---\n")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(here)}
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert result.stdout.startswith("nobody/nothing@v1[train]: cannot be had from the Hub: "), result.stderr
        assert len(result.stdout.splitlines()) == 1


@with_assets
class TestRealData:
    """Cards of tests/cards over real human data: no row is lost unexplained."""

    @pytest.fixture(autouse=True)
    def at_the_root(self, monkeypatch):
        monkeypatch.chdir(ROOT)

    @pytest.mark.parametrize(
        ("name", "counts"),
        [
            (
                "hh_preferences",
                {
                    "read": 2312,
                    "kept": 2303,
                    "dropped: transcripts differ before the last answer": 5,
                    "dropped: empty chosen": 4,
                },
            ),
            (
                "hh_demonstrations",
                {"read": 2312, "kept": 2304, "dropped: empty completion": 4, "dropped: prompt ends with an answer": 4},
            ),
            ("hh_prompts", {"read": 2312, "kept": 2308, "dropped: prompt ends with an answer": 4}),
            ("polite_preferences", {"read": 1100, "kept": 1094, "dropped: chosen equal to rejected": 6}),
            ("instruction_demonstrations", {"read": 1100, "kept": 1100}),
            ("tinystories_text", {"read": 2316, "kept": 2316}),
        ],
    )
    def test_every_row_is_explained(self, name, counts):
        """What is kept and what is dropped for each reason, as counted by hand from the files."""
        found = load_examples(load_card(f"tests/cards/{name}.md", ASSETS))
        assert found.counts == counts
        assert len(found.train) + len(found.heldout) == counts["kept"]

    @pytest.mark.parametrize(
        ("name", "counts"),
        [
            ("qa_feedback", {"read": 500, "kept": 500, "noted: judgements of equal, ordered by the others": 54}),
            (
                "hh_harmless_test",
                {
                    "read": 2312,
                    "kept": 2303,
                    "dropped: empty chosen": 4,
                    "dropped: transcripts differ before the last answer": 5,
                },
            ),
            ("polite_answers", {"read": 1100, "kept": 1094, "dropped: chosen equal to rejected": 6}),
        ],
    )
    def test_shipped_cards(self, name, counts):
        """The cards of data_cards/ over files that are not part of the project, in a data_root."""
        assert load_examples(load_card(f"data_cards/{name}.md", ASSETS)).counts == counts

    def test_rankings_by_judgements_and_by_scores(self):
        """Ranks from the six judgements of a row are those of the scores that were derived from them elsewhere."""
        found = load_examples(load_card("data_cards/qa_feedback.md", ASSETS))
        lines = (ASSETS / "qa-feedback-dev" / "derived_ranked.jsonl").read_text().splitlines()
        derived = {row["question"]: row for row in map(json.loads, lines)}
        ties = 0
        for row in [*found.train, *found.heldout]:
            theirs = derived[row.prompt.removesuffix("\nAnswer:")]
            scores = dict(zip(theirs["responses"], theirs["scores"], strict=True))
            for (one, rank), (other, rank_of_other) in itertools.combinations(
                zip(row.completions, row.ranks, strict=True), 2
            ):
                assert (rank < rank_of_other) == (scores[one] > scores[other] + 1e-9)
                ties += rank == rank_of_other
        assert ties == 330

    def test_transcripts_put_together_again(self):
        """Prompt and answers, written as a transcript, are the file's own text up to white space."""
        found = load_examples(load_card("tests/cards/hh_preferences.md", ASSETS))
        lines = (ASSETS / "hh-rlhf-harmless-test" / "test.jsonl").read_text().splitlines()
        speakers = {"user": "Human", "assistant": "Assistant"}
        for row in [*found.train, *found.heldout]:
            theirs = json.loads(lines[int(row.where.rpartition(":")[2]) - 1])
            for name in ("chosen", "rejected"):
                turns = [*row.prompt, assistant(getattr(row, name))]
                ours = "".join(f"\n\n{speakers[turn['role']]}: {turn['content']}" for turn in turns)
                merged = theirs[name].replace("\n\nHuman:", "").replace("\n\nAssistant:", "")
                assert ours.replace("\n\nHuman:", "").replace("\n\nAssistant:", "").split() == merged.split()


# ---------------------------------------------------------------- whatever is in the file

CELLS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["Q", "a", "\n\nHuman: Q\n\nAssistant: A", "\ud800", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": inner})
        | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=6,
)
NAMES = ["a\nb", "prompt", "completion", "chosen", "rejected", "text", "margin", "annotator", "completions", "ranks"]
ANY_ROWS = st.lists(st.dictionaries(st.sampled_from(NAMES), CELLS, min_size=3), max_size=6)
KINDS = st.sampled_from(["demonstrations", "preferences", "rankings", "prompts", "text"])
COLUMNS = st.sampled_from([
    {}, {"prompt": "chosen.role"}, {"prompt": "chosen[0].content"}, {"completion": "text[-1:]"},
    {"prompt": {"system": "text", "user": "prompt"}}, {"chosen": "completions[0]", "rejected": "completions[-1]"},
    {"first": "chosen", "second": "rejected", "ratings": "ranks"}, {"completion": "text", "rating": "margin"},
])  # fmt: skip
anything = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@anything
@given(
    rows=ANY_ROWS,
    kind=KINDS,
    columns=COLUMNS,
    style=st.sampled_from([None, None, "hh", "common_prefix"]),
    heldout=st.sampled_from([0, 0.3, 0.9]),
    problem=st.sampled_from(["error", "drop"]),
)
def test_any_rows_are_accounted_for(here, rows, kind, columns, style, heldout, problem):
    """Whatever the cells hold: every row kept, merged or counted as dropped, or InputError with one-line messages."""
    block = {} if style is None else {"format": style}
    try:
        found = load(rows, kind, heldout=heldout, on_problem=problem, columns=columns, **block)
    except InputError as error:
        assert error.problems and all(line and "\n" not in line for line in error.problems)
        return
    dropped = sum(number for reason, number in found.counts.items() if reason.startswith(("dropped: ", "merged: ")))
    assert found.counts["read"] == len(rows) == found.counts["kept"] + dropped
    assert found.counts["kept"] == len(found.train) + len(found.heldout)


@anything
@given(
    content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode),
    name=st.sampled_from(["d.jsonl", "d.json", "d.csv", "d.parquet", "d.arrow", "d.jsonl.gz", "d.jsonl.zst"]),
)
def test_any_bytes_are_rows_or_wrong_input(here, content, name):
    """Whatever the file holds: rows, or InputError with one-line messages, and nothing else."""
    Path(name).write_bytes(content)
    try:
        load(None, "prompts", file=name)
    except InputError as error:
        assert error.problems and all(line and "\n" not in line for line in error.problems)
