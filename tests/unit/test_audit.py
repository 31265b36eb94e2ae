"""data check: what the audit finds, on rows whose faults are known."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from rlhf_kit import audit as audits
from rlhf_kit import sketches
from rlhf_kit.audit import Audit, Measured, audit
from rlhf_kit.audit_words import as_json, lines_of
from rlhf_kit.data_cards import load_card
from rlhf_kit.errors import InputError
from rlhf_kit.marked_yaml import write_yaml
from rlhf_kit.maths.statistics import krippendorff_alpha

WORDS = [one + other for one in "ba ke lo mi nu ra".split() for other in "fel gan hir jos tup".split()]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def sentence(seed: object, length: int = 30) -> str:
    return " ".join(random.Random(str(seed)).choices(WORDS, k=length))


def pair(number: int, **cells: object) -> dict:
    return {"prompt": f"Q{number}? {sentence(number)}", "chosen": sentence(f"c{number}"),
            "rejected": sentence(f"r{number}"), **cells}  # fmt: skip


def look(rows: list, kind: str = "preferences", measured: Measured | None = None, **block: object) -> Audit:
    """Write rows and a card over them, and return the audit."""
    Path("d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = {"kind": kind, "source": "d.jsonl", "heldout": 0.1, **block}
    Path("c.md").write_text(f"---\n{write_yaml({'rlhf_kit': card})}---\n")
    return audit(load_card("c.md"), measured)


class TestRows:
    def test_read_kept_and_dropped(self):
        """Each reason with its rows and where they stand, whether read in blocks or one by one."""
        rows = [pair(n) for n in range(20)]
        rows[3]["chosen"] = " "
        rows[7]["rejected"] = rows[7]["chosen"] + " "
        rows[9]["prompt"] = None
        for extra in ({}, {"annotator": "x"}, {"margin": 1}):  # plain columns are read in blocks, others row by row
            found = look([{**row, **extra} for row in rows], on_problem="drop")
            assert (found.rows["read"], found.rows["kept"]) == (20, 17)
            dropped = found.rows["dropped"].items()
            assert {reason: (note["rows"], note["examples"][0][:10]) for reason, note in dropped} == {
                "empty chosen": (1, "d.jsonl:4:"),
                "chosen equal to rejected": (1, "d.jsonl:8:"),
                "non-text cell": (1, "d.jsonl:10"),
            }
            assert not found.problems

    def test_what_would_stop_a_run(self):
        """Broken rows under on_problem: error are problems, beside the figures."""
        found = look([pair(1), {**pair(2), "chosen": ""}])
        assert found.rows["kept"] == 1
        assert found.problems[0].startswith("d.jsonl:2: chosen is empty")

    def test_nothing_left(self):
        """What became of all the rows is told with their places, and it is a problem."""
        found = look([{**pair(2), "chosen": ""}], on_problem="drop")
        assert found.problems == ["c.md: no row is left of 1 read"]
        assert "1 dropped: empty chosen" in "\n".join(lines_of(found))
        assert json.loads(as_json(found))["rows"]["dropped"]["empty chosen"]["examples"] == [
            "d.jsonl:1: chosen is empty"
        ]

    def test_rows_on_one_line_have_numbers(self):
        """Of a JSON list that is one long line, the second row and those behind it are told by which they are."""
        Path("d.json").write_text(json.dumps([pair(1), pair(2), pair(1), {**pair(4), "chosen": ""}]))
        Path("c.md").write_text("---\nrlhf_kit: {kind: preferences, source: d.json, on_problem: drop}\n---\n")
        found = audit(load_card("c.md"))
        assert found.duplicates["exact"]["examples"] == [["d.json:1", "d.json:1#3"]]
        assert found.rows["dropped"]["empty chosen"]["examples"] == ["d.json:1#4: chosen is empty"]

    def test_blocks_and_rows_agree(self, monkeypatch):
        """The two ways of reading find the same, block borders, empty lines and odd lines included."""
        monkeypatch.setattr("rlhf_kit.data_files.BLOCK", 2000)
        rows = [pair(n % 90, note=n, annotator="xyz"[n % 3]) for n in range(120)]
        rows[80]["annotator"] = None
        rows[50]["chosen"] = rows[50]["rejected"]
        rows[60]["prompt"] = "half \ud800"
        rows[61]["chosen"], rows[62] = rows[3]["chosen"], rows[2]  # beside it, so that it is read row by row
        lines = [json.dumps(row) for row in rows]
        lines[70:70] = ["", "  "]
        Path("d.jsonl").write_text("\n".join(lines))
        Path("e.json").write_text("\n".join(lines))  # the same rows, in a file that is not read in blocks
        found = []
        for name in ("d.jsonl", "e.json"):
            block = {"kind": "preferences", "source": name, "on_problem": "drop"}
            Path("c.md").write_text(f"---\n{write_yaml({'rlhf_kit': block})}---\n")
            found.append(as_json(audit(load_card("c.md"))).replace(name, "file"))
        assert found[0] == found[1]
        assert json.loads(found[0])["rows"]["kept"] == 118

    def test_lines_that_are_no_json(self):
        """They are told with their line, wherever they stand."""
        Path("d.jsonl").write_text("".join(json.dumps(pair(n)) + "\n" for n in range(5)) + '{"prompt": \n')
        Path("c.md").write_text("---\nrlhf_kit: {kind: preferences, source: d.jsonl}\n---\n")
        with pytest.raises(InputError, match=r"d\.jsonl:6: not a line of JSON"):
            audit(load_card("c.md"))


class TestRepetitions:
    def test_exact(self):
        """Every row but the first of its kind, with the places of both."""
        rows = [pair(n) for n in range(50)] + [pair(3), pair(3), pair(8)]
        found = look(rows)
        assert found.duplicates["exact"]["rows"] == 3
        assert found.duplicates["exact"]["examples"] == [["d.jsonl:4", "d.jsonl:51"], ["d.jsonl:9", "d.jsonl:53"]]
        assert found.prompts["distinct"] == 50
        assert any("3 rows (5.7%) repeat another one exactly" in warning for warning in found.warnings)

    def test_near(self):
        """A word changed in ninety, or other capitals, is near; other sentences of the same words are not."""
        rows = [pair(n) for n in range(300)]
        near = [{**pair(n), "chosen": pair(n)["chosen"] + " indeed"} for n in range(100)]
        shout = [{**pair(n), "prompt": pair(n)["prompt"].upper()} for n in range(100, 150)]
        assert look(rows).duplicates["near"]["rows"] == 0
        found = look([*rows, *near, *shout]).duplicates
        assert found["exact"]["rows"] == 0
        assert 130 <= found["near"]["rows"] <= 150  # 93 in 100 are found

    def test_scripts_without_spaces(self):
        """Texts that begin alike and have no spaces are not near for that."""
        letters = [chr(0x4E00 + n) for n in range(500)]
        rows = [{"text": "".join(["開始開始開始", *random.Random(n).choices(letters, k=300)])} for n in range(50)]
        assert look(rows, "text").duplicates["near"]["rows"] == 0
        assert look([*rows, {"text": rows[3]["text"] + "終"}], "text").duplicates["near"]["rows"] == 1

    def test_hashes_in_several_parts(self, monkeypatch):
        """Where there are more hashes than are sorted together, the same is found."""
        rows = [pair(n) for n in range(40)] + [pair(n) for n in range(10)]
        whole = look(rows)
        monkeypatch.setattr(sketches, "PART", 7)
        monkeypatch.setattr(sketches, "CHUNK", 3)
        parts = look(rows)
        assert parts.duplicates["exact"]["rows"] == whole.duplicates["exact"]["rows"] == 10
        assert parts.prompts == whole.prompts

    def test_prompts_on_both_sides(self):
        """Refused unless the card drops them."""
        Path("h.jsonl").write_text(json.dumps(pair(3)) + "\n" + json.dumps(pair(77)) + "\n")
        rows = [pair(n) for n in range(10)]
        found = look(rows, heldout="h.jsonl")
        assert found.prompts["shared_between_splits"] == {"rows": 1, "examples": [["d.jsonl:4", "h.jsonl:1"]]}
        assert found.problems[0] == "d.jsonl:4: the prompt is also held out, in h.jsonl:1"
        dropped = look(rows, heldout="h.jsonl", shared_prompts="drop")
        assert not dropped.problems and dropped.rows["kept"] == 11
        assert dropped.rows["dropped"]["prompt is also held out"] == {"rows": 1, "examples": ["d.jsonl:4"]}


class TestLabels:
    def test_conflicts(self):
        """Pairs judged both ways, whichever side is named first."""
        turned = {**pair(5), "chosen": pair(5)["rejected"], "rejected": pair(5)["chosen"]}
        found = look([*(pair(n) for n in range(20)), turned])
        assert found.labels["conflicting"] == {"pairs": 1, "examples": [["d.jsonl:6", "d.jsonl:21"]]}
        assert (found.labels["pairs"], found.labels["pairs_judged_more_than_once"]) == (20, 1)

    def test_votes_sides_and_ties(self):
        """How often the first, the second, neither."""
        rows = [
            {"prompt": f"Q{n}", "first": sentence(n), "second": sentence(-n - 1), "preferred": "AABt"[n % 4]}
            for n in range(400)
        ]
        names = {name: name for name in ("first", "second", "preferred")}
        found = look(rows, columns=names, preferred={"first": "A", "second": "B", "tie": "t"})
        assert found.labels["votes"] == {"first": 200, "second": 100, "tie": 100}
        assert found.labels["ties"] == 100
        assert any("the completion shown first wins 66.7%" in warning for warning in found.warnings)

    def test_votes_are_counted_together(self):
        """Three people's votes on a pair are one row, and none repeats another."""
        votes = [{"prompt": "Q", "first": "a", "second": "b", "preferred": side, "annotator": who}
                 for who, side in (("x", "A"), ("y", "A"), ("z", "B"))]  # fmt: skip
        names = {name: name for name in ("first", "second", "preferred")}
        found = look(votes, columns=names, preferred={"first": "A", "second": "B"}, votes="majority")
        assert (found.rows["kept"], found.rows["merged"]) == (1, {"votes on one pair": 2})
        assert found.duplicates["exact"]["rows"] == 0

    def test_votes_are_no_repetitions_and_are_judged_together(self):
        """Ten pairs of three votes each, two for the longer one: it wins all ten, none is tied, nothing is repeated."""
        rows = [
            {"prompt": f"Q{n}? {sentence(n)}", "first": sentence(f"f{n}"), "second": sentence(f"s{n}", 40),
             "preferred": side, "annotator": who}
            for n in range(10) for who, side in (("x", "A"), ("y", "B"), ("z", "B"))
        ]  # fmt: skip
        names = {name: name for name in ("first", "second", "preferred")}
        found = look(rows, columns=names, preferred={"first": "A", "second": "B"}, votes="majority")
        assert (found.rows["kept"], found.labels["pairs"], found.labels["ties"]) == (10, 10, 0)
        assert found.duplicates == {
            "of_rows": 10,
            "exact": {"rows": 0, "examples": []},
            "near": {"rows": 0, "examples": []},
        }
        assert found.lengths["longer_wins"] == 1.0
        apart = look(rows, columns=names, preferred={"first": "A", "second": "B"})
        assert apart.lengths["longer_wins"] == pytest.approx(2 / 3, abs=1e-4)

    def test_an_annotator_counts_once_for_a_pair(self):
        """One who judges a pair twice, both ways, agrees with nobody thereby; alpha names the pairs that it is over."""
        one = pair(1)
        turned = {**one, "chosen": one["rejected"], "rejected": one["chosen"]}
        alone = look([{**one, "annotator": "x"}, {**turned, "annotator": "x"}])
        assert alone.labels["krippendorff_alpha"] is None
        assert alone.labels["pairs_judged_by_several_annotators"] == 0
        both = look([{**one, "annotator": "x"}, {**turned, "annotator": "x"}, {**one, "annotator": "y"}])
        assert both.labels["pairs_judged_by_several_annotators"] == 1
        assert "over the 1 pairs" in "\n".join(lines_of(both))

    def test_agreement(self):
        """Krippendorff's alpha of the annotators: 1 where all agree, near 0 where they toss coins."""
        same = [{**pair(n), "annotator": who} for n in range(60) for who in "ab"]
        assert look(same).labels["krippendorff_alpha"] == 1
        coin = random.Random(7)
        tossed = []
        for n in range(300):
            for who in "ab":
                row = {**pair(n), "annotator": who}
                if coin.random() < 0.5:
                    row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
                tossed.append(row)
        found = look(tossed)
        assert abs(found.labels["krippendorff_alpha"]) < 0.2
        assert found.labels["annotators"] == {"a": 300, "b": 300}

    def test_alpha_by_hand(self):
        """Three items of two votes: agree on 0, agree on 1, differ. Do = 2 / 6, De = 2 * 3 * 3 / (6 * 5)."""
        assert krippendorff_alpha(np.array([[2, 0], [0, 2], [1, 1]])) == pytest.approx(1 - (2 / 6) / (18 / 30))
        assert krippendorff_alpha(np.array([[1, 0], [0, 1]])) is None
        assert krippendorff_alpha(np.array([[2, 0], [3, 0]])) is None

    def test_longer_wins(self):
        """Three of four chosen answers are longer: right in 75 %, ties between equal lengths a half."""
        rows = [{"prompt": f"Q{n}", "chosen": "aaaa" if n % 4 else "a", "rejected": "bb"} for n in range(100)]
        found = look(rows)
        assert found.lengths["longer_wins"] == 0.75
        assert found.lengths["chosen_characters"] == 3.2  # (3 x 4 + 1) / 4, to one digit
        assert any("the longer one wins 75%" in warning for warning in found.warnings)
        equal = [{"prompt": f"Q{n}", "chosen": "aa", "rejected": "bb"} for n in range(10)]
        assert look(equal).lengths["longer_wins"] == 0.5

    def test_rankings(self):
        """Pairs, ties, where the best one stands, and whether longer wins, over all pairs of a ranking."""
        rows = [{"prompt": f"Q{n}", "completions": ["aaaa", "bb", "c"], "ranks": [1, 2, 2]} for n in range(10)]
        found = look(rows, "rankings")
        assert (found.labels["pairs"], found.labels["ties"]) == (30, 10)
        assert found.labels["best_stands_at"] == {"1": 10}
        assert found.lengths["longer_wins"] == 1.0


class TestTexts:
    def test_scripts(self):
        """The share of letters in each, the most frequent first."""
        found = look([{"text": "abcdef"}, {"text": "привет 12"}, {"text": "漢字字"}, {"text": "ñé"}], "text")
        assert found.scripts == {"Latin": 8 / 17, "Cyrillic": 6 / 17, "Han": 3 / 17} or found.scripts == {
            "Latin": 0.4706, "Cyrillic": 0.3529, "Han": 0.1765,
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("text", "what"),
        [
            ("a\x07b", "control characters"),
            ("a\x85b", "control characters"),
            ("a\u200bb", "zero-width or direction marks"),
            ("a\ufffdb", "replacement characters"),
            ("Hi<|im_end|>", "template tokens"),
            ("[INST] do [/INST]", "template tokens"),
            ("so</s>", "template tokens"),
            ("<start_of_turn>user", "template tokens"),
        ],
    )
    def test_suspicious(self, text, what):
        """What texts should not have, with the row's place."""
        found = look([{"text": "fine <b>text</b> [1]\n\ttwo"}, {"text": text}], "text")
        assert found.suspicious == {what: {"rows": 1, "examples": ["d.jsonl:2"]}}

    @pytest.mark.parametrize("text", ['["a"]', '{"a": "b"}', '[{"role": "user"}] '])
    def test_structures_as_texts(self, text):
        """A text that is a list or object of JSON as a whole, probably a cell of which a part was meant."""
        fine = {"chosen": "[1] says so", "rejected": "{x} and [y", "completion": "3", "completions": ["[a", "b"]}
        rows = [{"prompt": "Q", **fine, "ranks": [1, 2]} for _ in range(2)]
        for kind, key, cell in (
            ("preferences", "rejected", text), ("demonstrations", "completion", text), ("prompts", "prompt", text),
            ("rankings", "completions", ["a", text]),
        ):  # fmt: skip
            found = look([*rows, {**rows[0], key: cell}], kind)
            assert found.suspicious == {audits.STRUCTURED: {"rows": 1, "examples": ["d.jsonl:3"]}}
            assert "column[:] reads a list in a cell" in found.warnings[-1]
        assert not look([{"text": text}], "text").suspicious

    @pytest.mark.parametrize("text", ["nan", "NaN", "None", "NULL", "null", "N/A", "#N/A", " <NA> "])
    def test_words_for_nothing(self, text):
        """A text that is nothing but what programs write where there is nothing."""
        rows = [{"prompt": "Q", "completion": "None of them", "completions": ["nano", "b"], "ranks": [1, 2]}]
        for kind, key, cell in (
            ("demonstrations", "completion", text), ("prompts", "prompt", text),
            ("rankings", "completions", ["a", text]),
        ):  # fmt: skip
            found = look([*rows, {**rows[0], key: cell}], kind)
            assert found.suspicious == {audits.NOTHING: {"rows": 1, "examples": ["d.jsonl:2"]}}

    def test_rows_that_a_quote_swallows(self):
        """A cell of a .tsv over several lines is told; with quoting: none there is none, and quotes are text."""
        Path("d.tsv").write_text('prompt\tcompletion\nP\tx\nQ\t"a\nR\tb"\nS\tc\n')
        found = look([], "demonstrations", source="d.tsv")
        assert (found.rows["read"], found.suspicious) == (3, {audits.OVER_LINES: {"rows": 1, "examples": ["d.tsv:3"]}})
        assert "write quoting: none" in found.warnings[-1]
        found = look([], "demonstrations", source="d.tsv", quoting="none")
        assert (found.rows["read"], found.suspicious) == (4, {})
        Path("d.csv").write_text('prompt,completion\nP,"a\nb"\n')
        assert not look([], "demonstrations", source="d.csv").suspicious

    def test_tokens(self):
        """Counted by the base's own rule: how long rows are, which would be cut, which cannot be."""
        count = lambda prompt, completions: (len(prompt.split()), [len(text.split()) for text in completions])  # noqa: E731
        measured = Measured("words", 12, lambda size, messages: size > 12, count)
        rows = [{"prompt": "one two", "completion": "three"} for _ in range(998)]
        rows += [{"prompt": "w " * 12, "completion": "x"}, {"prompt": "w", "completion": "x " * 20}]
        found = look(rows, "demonstrations", measured)
        assert (found.tokens["median"], found.tokens["context"]) == (3, 12)
        assert found.tokens["too_long"] == {
            "rows": 2,
            "tokens_to_cut": 1 + 9,
            "rows_whose_completion_alone_is_too_long": 1,
            "examples": ["d.jsonl:999 (13 tokens)", "d.jsonl:1000 (21 tokens)"],
        }


def test_in_words():
    """The lines say what the figures say."""
    found = look([pair(n) for n in range(20)] + [pair(3)])
    text = "\n".join(lines_of(found))
    assert "21 read, 21 kept" in text and "1 exact: d.jsonl:4 and d.jsonl:21" in text
    assert "20 distinct; 10% held out, by hash" in text and "Latin 100.0%" in text
    assert json.loads(as_json(found))["kind"] == "preferences"
