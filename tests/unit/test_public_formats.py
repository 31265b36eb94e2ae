"""Public datasets and tools' exports, each in a few rows of its own schema: a card alone reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_kit.data_cards import load_card
from rlhf_kit.errors import InputError
from rlhf_kit.examples.loading import Examples, load_examples
from rlhf_kit.examples.rows import Demonstration, Preference, Ranking
from rlhf_kit.marked_yaml import write_yaml


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def load(rows: list[dict], **block: object) -> Examples:
    Path("d.json").write_text(json.dumps(rows))
    Path("c.md").write_text(f"---\n{write_yaml({'rlhf_kit': {'source': 'd.json', 'heldout': 0, **block}})}---\n")
    return load_examples(load_card("c.md"))


def bare(rows: list) -> list[dict]:
    """Rows as mappings, without where they stood and what is not there."""
    return [
        {key: value for key, value in vars(row).items() if key not in ("where", "special_tokens") and value is not None}
        for row in rows
    ]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


SUMMARY = {
    "info": {"id": "t3_1", "post": "My dog ate it.", "title": "Homework", "subreddit": "tifu"},
    "split": "train",
    "summaries": [{"text": " Dog ate.", "policy": "sup1", "note": None}, {"text": " Bad dog.", "policy": "ref"}],
    "choice": 1,
    "worker": "w1",
    "batch": "batch3",
    "extra": {"confidence": 7},
}
ULTRA = {
    "source": "evol",
    "instruction": "Name a fish.",
    "models": ["a", "b"],
    "completions": [
        {
            "model": "a",
            "response": "Cod.",
            "overall_score": 8.5,
            "fine-grained_score": 4.25,
            "annotations": {"helpfulness": {"Rating": "5", "Rationale": "Right."}},
        },
        {
            "model": "b",
            "response": "Oak.",
            "overall_score": 1.0,
            "fine-grained_score": 1.5,
            "annotations": {"helpfulness": {"Rating": "1", "Rationale": "Wrong."}},
        },
    ],
}
HELPSTEER = [
    {"prompt": "P", "response": text, "helpfulness": score, "correctness": 4, "coherence": 4, "complexity": 1,
     "verbosity": 1}
    for text, score in (("bad", 1), ("good", 4))
]  # fmt: skip
ARENA = {
    "question_id": "q",
    "model_a": "x",
    "model_b": "y",
    "judge": "arena_user_1",
    "conversation_a": [user("Q"), assistant("a")],
    "conversation_b": [user("Q"), assistant("b")],
    "turn": 1,
}
VALUES_AB = {"first": "model_a", "second": "model_b", "tie": ["tie", "tie (bothbad)"]}


class TestPairs:
    def test_trl_standard(self):
        """Explicit prompt, text."""
        (row,) = load([{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}], kind="preferences").train
        assert row == Preference("The sky is", " blue.", " green.", "d.json:1")

    def test_trl_standard_implicit(self):
        """Only where the card asks for it by name is the longest common prefix the prompt, cut between words."""
        rows = [{"chosen": "The sky is blue.", "rejected": "The sky is bleak."}]
        with pytest.raises(InputError, match="write format: common_prefix"):
            load(rows, kind="preferences")
        (row,) = load(rows, kind="preferences", format="common_prefix").train
        assert (row.prompt, row.chosen, row.rejected) == ("The sky is", " blue.", " bleak.")

    def test_trl_conversational(self):
        """Explicit and implicit prompt."""
        rows = [{"prompt": [user("Q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}]
        implicit = [{"chosen": [user("Q"), assistant("a")], "rejected": [user("Q"), assistant("b")]}]
        assert load(rows, kind="preferences").train == load(implicit, kind="preferences").train

    def test_summarize_from_feedback(self):
        """Nested fields in a template, an element of a list, a choice that is an index."""
        (row,) = load(
            [SUMMARY],
            kind="preferences",
            columns={
                "prompt": "SUBREDDIT: r/{info.subreddit}\nTITLE: {info.title}\nPOST: {info.post}\nTL;DR:",
                "first": "summaries[0].text",
                "second": "summaries[1].text",
                "preferred": "choice",
                "annotator": "worker",
            },
            preferred={"first": 0, "second": 1},
        ).train
        assert row == Preference(
            "SUBREDDIT: r/tifu\nTITLE: Homework\nPOST: My dog ate it.\nTL;DR:", " Bad dog.", " Dog ate.",
            "d.json:1", None, "w1",
        )  # fmt: skip

    def test_webgpt_comparisons(self):
        """A score for each answer; equal ones tie; a margin from the scores by a stated rule."""
        row = {"question": {"full_text": "Why?", "id": "1"}, "answer_0": "a", "answer_1": "b"}
        rows = [{**row, "score_0": -0.5, "score_1": 0.5}, {**row, "score_0": 0.0, "score_1": 0.0}]
        columns = {
            "prompt": "question.full_text",
            "first": "answer_0",
            "second": "answer_1",
            "ratings": ["score_0", "score_1"],
        }
        found = load(rows, kind="preferences", columns=columns, scale=[-1, 1], margin_per_point=2).train
        assert bare(found) == [
            {"prompt": "Why?", "chosen": "b", "rejected": "a", "margin": 2.0},
            {"prompt": "Why?", "chosen": "a", "rejected": "b", "margin": 0.0, "probability": 0.5},
        ]

    def test_shp(self):
        """labels is 1 where A is preferred."""
        row = {"post_id": "p", "history": "H", "human_ref_A": "a", "human_ref_B": "b", "score_ratio": 2.0}
        columns = {"prompt": "history", "first": "human_ref_A", "second": "human_ref_B", "preferred": "labels"}
        found = load([{**row, "labels": 1}, {**row, "labels": 0}], kind="preferences", columns=columns,
                     preferred={"first": 1, "second": 0})  # fmt: skip
        assert [row.chosen for row in found.train] == ["a", "b"]

    def test_stack_exchange_paired(self):
        """Other names."""
        rows = [{"qid": 1, "question": "Q", "response_j": "a", "response_k": "b", "metadata": ["x"]}]
        columns = {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}
        assert bare(load(rows, kind="preferences", columns=columns).train) == [
            {"prompt": "Q", "chosen": "a", "rejected": "b"}
        ]

    def test_ultrafeedback_binarized(self):
        """A text prompt beside whole conversations; the scores give margins."""
        row = {
            "prompt": "Q",
            "chosen": [user("Q"), assistant("a")],
            "rejected": [user("Q"), assistant("b")],
            "messages": [user("Q"), assistant("a")],
            "score_chosen": 8.5,
            "score_rejected": 6.0,
        }
        block = {
            "kind": "preferences",
            "columns": {"ratings": ["score_chosen", "score_rejected"]},
            "scale": [1, 10],
            "margin_per_point": 0.2,
        }
        assert bare(load([row], **block).train) == [
            {"prompt": [user("Q")], "chosen": "a", "rejected": "b", "margin": 0.5}
        ]
        with pytest.raises(InputError, match="chosen is rated 6 and rejected 8"):
            load([{**row, "score_chosen": 6, "score_rejected": 8}], **block)
        with pytest.raises(InputError, match="on a scale from 1 to 10; seen 11"):
            load([{**row, "score_chosen": 11}], **block)

    def test_pku_saferlhf(self):
        """An index that names the better response."""
        row = {"prompt": "Q", "response_0": "a", "response_1": "b", "better_response_id": 1, "safer_response_id": 0}
        block = {"kind": "preferences", "preferred": {"first": 0, "second": 1}}
        names = {"first": "response_0", "second": "response_1"}
        found = [
            load([row], columns={**names, "preferred": judged}, **block).train[0].chosen
            for judged in ("better_response_id", "safer_response_id")
        ]
        assert found == ["b", "a"]

    def test_chatbot_arena(self):
        """Two conversations and a winner; ties, or values left out and counted."""
        rows = [{**ARENA, "winner": winner} for winner in ("model_a", "model_b", "tie (bothbad)")]
        columns = {"first": "conversation_a", "second": "conversation_b", "preferred": "winner", "annotator": "judge"}
        found = load(rows, kind="preferences", columns=columns, preferred=VALUES_AB).train
        assert [(row.prompt, row.chosen, row.probability) for row in found] == [
            ([user("Q")], "a", None), ([user("Q")], "b", None), ([user("Q")], "a", 0.5),
        ]  # fmt: skip
        assert found[0].annotator == "arena_user_1"
        left_out = {"first": "model_a", "second": "model_b", "drop": "tie (bothbad)"}
        counts = load(rows, kind="preferences", columns=columns, preferred=left_out).counts
        assert counts == {"read": 3, "kept": 2, "dropped: judged tie (bothbad)": 1}
        with pytest.raises(InputError, match="no meaning to model_a; known: A, B"):
            load(rows, kind="preferences", columns=columns, preferred={"first": "A", "second": "B"})

    def test_arena_one_hot(self):
        """A column for each outcome, and lists spelled as JSON."""
        row = {"prompt": '["Q"]', "response_a": '["a"]', "response_b": '["b"]'}
        rows = [
            {**row, "winner_model_a": a, "winner_model_b": b, "winner_tie": tie} for a, b, tie in ((0, 1, 0), (0, 0, 1))
        ]
        columns = {
            "prompt": "prompt[0]",
            "first": "response_a[0]",
            "second": "response_b[0]",
            "ratings": ["winner_model_a", "winner_model_b"],
        }
        assert bare(load(rows, kind="preferences", columns=columns).train) == [
            {"prompt": "Q", "chosen": "b", "rejected": "a"},
            {"prompt": "Q", "chosen": "a", "rejected": "b", "probability": 0.5},
        ]

    def test_helpsteer_preferences(self):
        """A strength from -3 to 3, as ranges."""
        row = {"prompt": "Q", "response_1": "a", "response_2": "b"}
        rows = [{**row, "preference_strength": strength} for strength in (-3, 0, 0.5)]
        found = load(
            rows,
            kind="preferences",
            columns={"first": "response_1", "second": "response_2", "preferred": "preference_strength"},
            preferred={"first": "-3..-0.1", "second": "0.1..3", "tie": 0},
        ).train
        assert [(row.chosen, row.probability) for row in found] == [("a", None), ("a", 0.5), ("b", None)]

    def test_helpsteer3(self):
        """Messages as the context, and each annotator's vote in a list."""
        row = {
            "context": [user("Q")],
            "response1": "a",
            "response2": "b",
            "individual_preference": [{"score": score, "reasoning": "..."} for score in (-2, -1, 1)],
        }
        columns = {
            "prompt": "context",
            "first": "response1",
            "second": "response2",
            "preferred": "individual_preference[].score",
        }
        block = {"kind": "preferences", "columns": columns, "preferred": {"first": "-3..-1", "second": "1..3"}}
        assert load([row], votes="majority", **block).train == [Preference([user("Q")], "a", "b", "d.json:1")]
        (soft,) = load([row], votes="probability", **block).train
        assert (soft.chosen, soft.probability) == ("a", pytest.approx(2 / 3))
        with pytest.raises(InputError, match="3 votes; write votes: majority or votes: probability"):
            load([row], **block)

    def test_a_strength_with_a_sign_is_the_margin(self):
        """HelpSteer3: -3 is as strong as 3; where margin is another column than preferred, it has no sign."""
        row = {"context": [user("Q")], "response1": "a", "response2": "b"}
        rows = [{**row, "overall_preference": strength} for strength in (-3, 2, 0)]
        columns = {"prompt": "context", "first": "response1", "second": "response2", "preferred": "overall_preference"}
        block = {"kind": "preferences", "preferred": {"first": "-3..-1", "second": "1..3", "tie": 0}}
        found = load(rows, columns={**columns, "margin": "overall_preference"}, **block).train
        assert [(row.chosen, row.margin) for row in found] == [("a", 3.0), ("b", 2.0), ("a", 0.0)]
        with pytest.raises(InputError, match=r"margin \(column points\) says by how much .* seen -3"):
            load([{**rows[0], "points": -3}], columns={**columns, "margin": "points"}, **block)

    def test_a_vote_and_ratings_that_disagree(self):
        """Are an error of the row, also of a tie; a vote may part equal ratings, and of many votes one may differ."""
        row = {"prompt": "Q", "a": "x", "b": "y"}
        columns = {"first": "a", "second": "b", "preferred": "vote", "ratings": ["s", "t"]}
        block = {"kind": "preferences", "columns": columns, "preferred": {"first": 1, "second": 2, "tie": 0}}
        for vote, s, t in ((1, 1, 5), (2, 5, 1), (0, 5, 1), ([1], 1, 5)):
            with pytest.raises(InputError, match=rf"first is rated {s}, second {t}; where the two need not agree"):
                load([{**row, "vote": vote, "s": s, "t": t}], **block)
        agreed = [{**row, "vote": vote, "s": s, "t": t} for vote, s, t in ((1, 5, 1), (2, 3, 3), (0, 3, 3))]
        assert [row.chosen for row in load(agreed, **block).train] == ["x", "y", "x"]
        assert load([{**row, "vote": [1, 2, 2], "s": 5, "t": 1}], votes="majority", **block).train[0].chosen == "y"

    def test_distilabel_capybara(self):
        """Several turns, the last answers rated."""
        turns = [user("Q"), assistant("A"), user("R")]
        row = {
            "source": "Airoboros",
            "conversation": [{"input": "Q", "output": "A"}],
            "chosen": [*turns, assistant("a")],
            "rejected": [*turns, assistant("b")],
            "rating_chosen": 5,
            "rating_rejected": 2,
        }
        columns = {"ratings": ["rating_chosen", "rating_rejected"]}
        found = load([row], kind="preferences", columns=columns, scale=[1, 5], margin_per_point=1).train
        assert bare(found) == [{"prompt": turns, "chosen": "a", "rejected": "b", "margin": 3.0}]

    def test_orca_dpo_pairs(self):
        """A system text and a question become chat messages; an empty system text is no message."""
        rows = [
            {"system": "Be brief.", "question": "Q", "chosen": "a", "rejected": "b"},
            {"system": "", "question": "Q", "chosen": "a", "rejected": "b"},
        ]
        columns = {"prompt": {"system": "system", "user": "question"}}
        found = load(rows, kind="preferences", columns=columns).train
        assert [row.prompt for row in found] == [[{"role": "system", "content": "Be brief."}, user("Q")], [user("Q")]]

    def test_full_hh(self):
        """A transcript as the prompt beside plain answers."""
        row = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " a", "rejected": " b"}
        (found,) = load([row], kind="preferences", format="hh", columns={"prompt": "prompt"}).train
        assert (found.prompt, found.chosen) == ([user("Hi")], " a")

    def test_messages_and_a_rejected_response(self):
        """A dialogue whose last answer is the chosen one, and another answer as text."""
        row = {"messages": [user("Q"), assistant("a")], "rejected_response": "b"}
        columns = {
            "prompt": "messages[:-1]",
            "chosen": "messages[-1].content",
            "rejected": "rejected_response",
        }
        assert load([row], kind="preferences", columns=columns).train[0] == Preference(
            [user("Q")], "a", "b", "d.json:1"
        )

    def test_argilla(self):
        """Records as argilla 2 writes them: fields, and the responses of each user; votes on a pair are counted."""
        record = {
            "id": "1",
            "fields": {"prompt": "Q", "response1": "a", "response2": "b"},
            "metadata": {},
            "suggestions": {},
            "responses": {
                "preference": [
                    {"value": value, "user_id": person}
                    for value, person in (("response1", "u1"), ("response2", "u2"), ("response2", "u3"))
                ]
            },
            "vectors": {},
        }
        columns = {
            "prompt": "fields.prompt",
            "first": "fields.response1",
            "second": "fields.response2",
            "preferred": "responses.preference[].value",
            "annotator": "responses.preference[].user_id",
        }
        preferred = {"first": "response1", "second": "response2"}
        (row,) = load([record], kind="preferences", columns=columns, preferred=preferred, votes="probability").train
        assert (row.chosen, row.rejected, row.probability) == ("b", "a", pytest.approx(2 / 3))

    def test_argilla_as_a_dataset(self):
        """The flat columns of argilla's to_datasets, whose names have dots."""
        row = {"prompt": "Q", "r1": "a", "r2": "b", "preference.responses": ["r2"], "preference.responses.users": ["u"]}
        columns = {
            "first": "r1",
            "second": "r2",
            "preferred": "preference.responses",
            "annotator": "preference.responses.users",
        }
        (found,) = load([row], kind="preferences", columns=columns, preferred={"first": "r1", "second": "r2"}).train
        assert (found.chosen, found.annotator) == ("b", "u")

    def test_label_studio(self):
        """Its JSON export of pairwise comparisons: every annotation is a vote."""
        task = {
            "id": 1,
            "data": {"prompt": "Q", "answer1": "a", "answer2": "b"},
            "annotations": [
                {
                    "id": number,
                    "completed_by": number,
                    "was_cancelled": False,
                    "result": [{"from_name": "pw", "type": "pairwise", "value": {"selected": side}}],
                }
                for number, side in enumerate(("left", "left", "right"))
            ],
        }
        columns = {
            "prompt": "data.prompt",
            "first": "data.answer1",
            "second": "data.answer2",
            "preferred": "annotations[].result[0].value.selected",
        }
        block = {"kind": "preferences", "columns": columns, "preferred": {"first": "left", "second": "right"}}
        assert load([task], votes="majority", **block).train == [Preference("Q", "a", "b", "d.json:1")]
        task["annotations"].append({"id": 9, "was_cancelled": True, "result": []})
        block["preferred"]["drop"] = [None]
        found = load([task], votes="majority", **block)
        assert found.train == [Preference("Q", "a", "b", "d.json:1")]
        assert found.counts["noted: votes left out, others on the pair counted"] == 1
        task["annotations"] = task["annotations"][3:]
        other = {**task, "data": {"prompt": "R", "answer1": "a", "answer2": "b"}, "annotations": [
            {"result": [{"value": {"selected": "left"}}]}]}  # fmt: skip
        assert load([task, other], votes="majority", **block).counts["dropped: no vote that counts"] == 1

    def test_equal_ratings_are_a_tie(self):
        """Also where the columns are called chosen and rejected."""
        rows = [{"prompt": p, "chosen": "a", "rejected": "b", "ratings": r} for p, r in (("Q", [3, 3]), ("R", [4, 3]))]
        found = load(rows, kind="preferences", columns={"ratings": "ratings"}).train
        assert [row.probability for row in found] == [0.5, None]

    def test_votes_in_rows_of_their_own(self):
        """One row for each vote, the sides shown either way round; a split vote is a tie."""
        rows = [
            {"prompt": "Q", "first": "a", "second": "b", "preferred": "A", "annotator": "1"},
            {"prompt": "Q", "first": "b", "second": "a", "preferred": "A", "annotator": "2"},
            {"prompt": "R", "first": "a", "second": "b", "preferred": "B", "annotator": "1"},
            {"prompt": "R", "first": "a", "second": "b", "preferred": "tie", "annotator": "2"},
        ]
        names = {name: name for name in ("first", "second", "preferred")}
        block = {
            "kind": "preferences",
            "columns": names,
            "preferred": {"first": "A", "second": "B", "tie": "tie"},
        }
        each = load(rows, **block)
        assert [row.chosen for row in each.train] == ["a", "b", "b", "a"]
        assert [row.annotator for row in each.train] == ["1", "2", "1", "2"]
        soft = load(rows, votes="probability", **block)
        assert bare(soft.train) == [
            {"prompt": "Q", "chosen": "a", "rejected": "b", "probability": 0.5},
            {"prompt": "R", "chosen": "b", "rejected": "a", "probability": 0.75},
        ]
        assert soft.counts == {"read": 4, "kept": 2, "merged: votes on one pair": 2}
        assert [row.probability for row in load(rows, votes="majority", **block).train] == [0.5, None]


class TestRankings:
    def test_ultrafeedback(self):
        """Completions and ratings inside a list; ratings that are texts; other ratings by another path."""
        columns = {
            "prompt": "instruction",
            "completions": "completions[].response",
            "ratings": "completions[].overall_score",
        }
        assert load([ULTRA], kind="rankings", columns=columns, scale=[1, 10]).train == [
            Ranking("Name a fish.", ["Cod.", "Oak."], [1.0, 2.0], "d.json:1", [8.5, 1.0])
        ]
        columns["ratings"] = "completions[].annotations.helpfulness.Rating"
        assert load([ULTRA], kind="rankings", columns=columns, scale=[1, 5]).train[0].ratings == [5.0, 1.0]

    def test_nectar(self):
        """Seven answers with ranks, and a transcript as the prompt."""
        ranked = zip("gfedcba", range(7, 0, -1), strict=True)
        answers = [{"answer": letter, "model": "m", "rank": float(rank)} for letter, rank in ranked]
        row = {"prompt": "\n\nHuman: Q\n\nAssistant: ", "answers": answers, "turns": 1, "num_responses": 7}
        columns = {"completions": "answers[].answer", "ranks": "answers[].rank"}
        (plain,) = load([row], kind="rankings", columns=columns).train
        assert (plain.prompt, plain.completions[-1], plain.ranks) == (row["prompt"], "a", [7, 6, 5, 4, 3, 2, 1])
        assert load([row], kind="rankings", columns=columns, format="hh").train[0].prompt == [user("Q")]

    def test_helpsteer2(self):
        """One row for each response; those of a prompt are one ranking."""
        found = load(
            HELPSTEER, kind="rankings", columns={"completion": "response", "rating": "helpfulness"}, scale=[0, 4]
        )
        assert found.train == [Ranking("P", ["bad", "good"], [2.0, 1.0], "d.json:1", [1.0, 4.0])]
        assert found.counts == {"read": 2, "kept": 1, "merged: completions of one prompt": 1}
        with pytest.raises(InputError, match="1 completions of this prompt; a ranking has 2 to 9"):
            load(HELPSTEER[:1], kind="rankings", columns={"completion": "response", "rating": "helpfulness"})

    def test_groups(self):
        """Rows of a group are one ranking, though another group has their prompt too; within one it is the same."""
        rows = [
            {"id": name, "prompt": "Hi", "answer": text, "score": score, "who": who}
            for name, text, score, who in ((1, "a", 1, "x"), (2, "b", 2, "x"), (2, "c", 3, "x"), (1, "d", 4, "x"),
                                           (1, "e", 1, "y"), (1, "f", 1, "y"))
        ]  # fmt: skip
        columns = {"completion": "answer", "rating": "score", "annotator": "who", "group": "id"}
        found = load(rows, kind="rankings", columns=columns)
        assert [row.completions for row in found.train] == [["a", "d"], ["b", "c"], ["e", "f"]]
        assert found.counts == {"read": 6, "kept": 3, "merged: completions of one prompt": 3}
        other = [*rows, {**rows[0], "prompt": "Ho", "answer": "g"}]
        with pytest.raises(InputError, match=r"d\.json:1: the group 1 has another prompt in d\.json:1#7"):
            load(other, kind="rankings", columns=columns)
        for nothing in (None, "", [1]):
            with pytest.raises(InputError, match=r"group \(column id\) must be text or a number; seen"):
                load([{**rows[0], "id": nothing}], kind="rankings", columns=columns)

    def test_more_completions_than_nine(self):
        """Are refused with a way out; the card takes the first so many of each prompt, and the others are counted."""
        rows = [{"prompt": "PQ"[n % 2], "completion": str(n), "rating": n} for n in range(22)]
        block = {"kind": "rankings", "columns": {"rating": "rating"}}
        with pytest.raises(InputError, match=r"11 completions of this prompt; .* max_completions: 9 takes the first"):
            load(rows, **block)
        found = load(rows, **block, max_completions=4)
        assert [row.completions for row in found.train] == [["0", "2", "4", "6"], ["1", "3", "5", "7"]]
        assert found.counts == {
            "read": 22,
            "kept": 2,
            "dropped: over max_completions": 14,
            "merged: completions of one prompt": 6,
        }

    def test_summarize_axes(self):
        """One row for each summary, with a rating from 1 to 7 far inside."""
        rows = [
            {"info": {"post": "P"}, "summary": {"text": text, "axes": {"overall": rating}}, "worker": "w"}
            for text, rating in (("a", 7), ("b", 2), ("c", 7))
        ]
        columns = {
            "prompt": "info.post",
            "completion": "summary.text",
            "rating": "summary.axes.overall",
            "annotator": "worker",
        }
        assert load(rows, kind="rankings", columns=columns, scale=[1, 7]).train == [
            Ranking("P", ["a", "b", "c"], [1.0, 3.0, 1.0], "d.json:1", [7.0, 2.0, 7.0], "w")
        ]

    def test_stack_exchange_preferences(self):
        """The first nine of many answers, as the card says."""
        answers = [{"text": str(number), "pm_score": number, "selected": False} for number in range(12)]
        columns = {"prompt": "question", "completions": "answers[:9].text", "ratings": "answers[:9].pm_score"}
        (row,) = load([{"question": "Q", "answers": answers}], kind="rankings", columns=columns).train
        assert (len(row.completions), row.ranks) == (9, [9, 8, 7, 6, 5, 4, 3, 2, 1])
        with pytest.raises(InputError, match=r"12 completions; a ranking has 2 to 9; \[:9\] behind a list"):
            load(
                [{"question": "Q", "answers": answers}],
                kind="rankings",
                columns={"prompt": "question", "completions": "answers[].text", "ratings": "answers[].pm_score"},
            )

    def test_comparisons_of_all_pairs(self):
        """Six judgements of four answers in columns of their own; a circle is a tie."""
        row = {"question": "Q", **{f"prediction {n}": f"p{n}" for n in range(1, 5)}}
        # 1>2, 1=3, 4>1, 2>3, 2>4, 3>4: wins 1.5, 2, 1.5, 1
        block = {
            "kind": "rankings",
            "columns": {
                "prompt": "question",
                "completions": [f"prediction {n}" for n in range(1, 5)],
                "comparisons": "preference",
            },
            "preferred": {"first": 1, "second": 2, "tie": 0},
        }
        (found,) = load([{**row, "preference": [1, 0, 2, 1, 1, 1]}], **block).train
        assert (found.completions, found.ranks) == (["p1", "p2", "p3", "p4"], [2.0, 1.0, 2.0, 4.0])
        with pytest.raises(InputError, match="must be 6 judgements"):
            load([{**row, "preference": [1]}], **block)

    ANSWERS = {"prompt": "Q", "response-1": "a", "response-2": "b", "response-3": "c"}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("values", "ranks"),
        [
            ([("response-2", 1), ("response-3", 2), ("response-1", 3)], [3.0, 1.0, 2.0]),
            ([("response-3", 1), ("response-1", 2), ("response-2", 2)], [2.0, 2.0, 1.0]),
        ],
    )
    def test_argilla_rankings(self, values, ranks):
        """Names in the order of their ranks, with the ranks beside them: version 1's export, and version 2's."""
        said = [{"user_id": "u", "value": [{"value": name, "rank": rank} for name, rank in values]}]
        names = ["response-1", "response-2", "response-3"]
        one = load(
            [{**self.ANSWERS, "ranking": said}],
            kind="rankings",
            columns={"completions": names, "ranked": "ranking[0].value[].value", "ranks": "ranking[0].value[].rank"},
        )
        two = load(
            [{"fields": self.ANSWERS, "responses": {"ranking": said}}],
            kind="rankings",
            columns={
                "prompt": "fields.prompt",
                "completions": [f"fields.{name}" for name in names],
                "ranked": "responses.ranking[0].value[].value",
                "ranks": "responses.ranking[0].value[].rank",
            },
        )
        assert one.train == two.train == [Ranking("Q", ["a", "b", "c"], ranks, "d.json:1")]
        with pytest.raises(InputError, match=r"names the completions; map ranked: ranking\[0\].value\[\].value"):
            load(
                [{**self.ANSWERS, "ranking": said}],
                kind="rankings",
                columns={"completions": names, "ranks": "ranking[0].value[].rank"},
            )

    LABEL_STUDIO = {  # noqa: RUF012
        "data": {"prompt": "Q", "items": [{"id": name, "title": name, "body": f"text {name}"} for name in "ABC"]},
        "annotations": [{"result": [{"value": {"ranker": {"rank": ["B", "C", "A"]}}}]}],
    }
    RANKER = {  # noqa: RUF012
        "prompt": "data.prompt",
        "completions": "data.items[].body",
        "names": "data.items[].id",
        "ranked": "annotations[0].result[0].value.ranker.rank",
    }

    def test_label_studio_ranker(self):
        """Names, best first."""
        (row,) = load([self.LABEL_STUDIO], kind="rankings", columns=self.RANKER).train
        assert row == Ranking("Q", ["text A", "text B", "text C"], [3.0, 1.0, 2.0], "d.json:1")

    def test_numbers_as_names(self):
        """Positions, from 0 or from 1 as the card says; one alone is the best, the others tie behind it."""
        rows = [{"prompt": "Q", "completions": ["a", "b", "c"], "order": [2, 0, 1], "best": 1}]
        block = {"kind": "rankings", "columns": {"names": [0, 1, 2], "ranked": "order"}}
        assert load(rows, **block).train[0].ranks == [2.0, 3.0, 1.0]
        block["columns"]["ranked"] = "best"
        assert load(rows, **block).train[0].ranks == [2.0, 1.0, 2.0]
        block["columns"]["names"] = [1, 2, 3]
        assert load(rows, **block).train[0].ranks == [1.0, 2.0, 2.0]

    def test_completions_that_stand_best_first(self):
        """Are called by their own texts."""
        columns = {"completions": "answers", "names": "answers", "ranked": "answers"}
        (row,) = load([{"prompt": "Q", "answers": ["b", "c", "a"]}], kind="rankings", columns=columns).train
        assert (row.completions, row.ranks) == (["b", "c", "a"], [1.0, 2.0, 3.0])

    @pytest.mark.parametrize(
        ("ranked", "names", "said"),
        [
            (["B", "A"], "ABC", "must have each of A, B, C once; seen C 0 times"),
            (["B", "A", "C", "B"], "ABC", "must have each of A, B, C once; seen B 2 times"),
            (["B", "A", "D"], "ABC", "has D, as no completion is called; known: A, B, C"),
            (None, "ABC", r"has nothing \(null\), as no completion is called"),
            (["B", "A"], "AB", "must be a list of 3 names; seen"),
            (["B", "A"], "ABA", "must be different ones"),
            (["B", "A"], ["A", "B", None], "must be a list of 3 names"),
        ],
    )
    def test_names_that_do_not_fit(self, ranked, names, said):
        """Are an error of the row: unknown, missing or twice, of the completions or in the ranking."""
        rows = [{"prompt": "Q", "completions": ["a", "b", "c"], "names": list(names), "ranked": ranked}]
        with pytest.raises(InputError, match=said):
            load(rows, kind="rankings", columns={"names": "names", "ranked": "ranked"})

    def test_one_name_with_ranks(self):
        """Ranks belong to a list of names, one for each."""
        rows = [{"prompt": "Q", "a": "x", "b": "y", "ranked": "b", "ranks": [1, 2]}]
        with pytest.raises(InputError, match="must have each of a, b once; seen a 0 times"):
            load(rows, kind="rankings", columns={"completions": ["a", "b"], "ranked": "ranked", "ranks": "ranks"})

    def test_rewardbench_2(self):
        """One good answer and three bad ones: ranks that are the same in each row."""
        row = {"prompt": "Q", "chosen": ["a"], "rejected": ["b", "c", "d"]}
        columns = {"completions": ["chosen[0]", *(f"rejected[{n}]" for n in range(3))], "ranks": [1, 2, 2, 2]}
        (found,) = load([row], kind="rankings", columns=columns).train
        assert (found.completions, found.ranks) == (["a", "b", "c", "d"], [1.0, 2.0, 2.0, 2.0])
        with pytest.raises(InputError, match=r"ranks \(1, 2\) must be a list of 4 numbers"):
            load([row], kind="rankings", columns={**columns, "ranks": [1, 2]})

    def test_ranks_and_ratings_together(self):
        """Which of the two counts is for the card to say."""
        row = {"prompt": "Q", "completions": ["a", "b"], "ranks": [1, 2], "ratings": [1, 2]}
        with pytest.raises(InputError, match="columns ranks and ratings; map the one that counts"):
            load([row], kind="rankings")
        assert load([row], kind="rankings", columns={"ratings": "ratings"}).train[0].ranks == [2.0, 1.0]

    def test_whole_dialogues(self):
        """Completions may be dialogues; what comes before their last answer is the prompt."""
        row = {"completions": [[user("Q"), assistant("a")], [user("Q"), assistant("b")]], "ranks": [2, 1]}
        (found,) = load([row], kind="rankings").train
        assert (found.prompt, found.completions, found.ranks) == ([user("Q")], ["a", "b"], [2.0, 1.0])


def message(name: str, parent: str | None, role: str, rank: float | None = None, **more: object) -> dict:
    return {"message_id": name, "parent_id": parent, "role": role, "text": f"text {name}", "rank": rank,
            "lang": "en", **more}  # fmt: skip


class TestThreads:
    ROWS = [  # noqa: RUF012
        message("p1", None, "prompter"),
        message("a1", "p1", "assistant", 1.0),
        message("a2", "p1", "assistant", 0.0),
        message("p2", "a2", "prompter"),
        message("b1", "p2", "assistant", 0.0),
        message("b2", "p2", "assistant", 2.0),
        message("b3", "p2", "assistant", 1.0),
        message("p3", "b1", "prompter"),
        message("c1", "p3", "assistant"),
        message("de", "p2", "assistant", 3.0, lang="de"),
    ]
    BLOCK = {  # noqa: RUF012
        "kind": "rankings",
        "format": "threads",
        "columns": {"id": "message_id", "parent": "parent_id"},
        "filters": {"where": {"lang": "en"}},
    }

    def test_openassistant(self):
        """Ranked answers to one message are a ranking; the way to it is the prompt; all messages are accounted for."""
        found = load(self.ROWS, **self.BLOCK)
        first = [user("text p1")]
        assert found.train == [
            Ranking(first, ["text a1", "text a2"], [2.0, 1.0], "d.json:1#2"),
            Ranking(
                [*first, assistant("text a2"), user("text p2")],
                ["text b1", "text b2", "text b3"],
                [1.0, 3.0, 2.0],
                "d.json:1#5",
            ),
        ]
        assert found.counts == {
            "read": 10,
            "kept": 2,
            "dropped: filters.where.lang": 1,
            "dropped: message of no ranking": 2,  # p3 and c1
            "merged: messages of dialogues": 5,  # p1, a1, a2, p2, b1, b2, b3 less the two kept
        }

    def test_ratings(self):
        """The highest is the best, and only answers have one that counts; the ratings make margins."""
        rows = [{**row, "score": row["rank"]} for row in self.ROWS[:7]]
        columns = {**self.BLOCK["columns"], "rating": "score"}
        found = load([{**rows[0], "score": "?"}, *rows[1:]], **{**self.BLOCK, "columns": columns}, margin_per_point=2)
        (first, second) = found.train
        assert (first.ranks, first.ratings, first.margin_per_point) == ([1.0, 2.0], [1.0, 0.0], 2.0)
        assert (second.ranks, second.ratings) == ([3.0, 1.0, 2.0], [0.0, 2.0, 1.0])

    def test_more_answers_than_nine(self):
        """Are refused with a way out; those over what the card takes are counted if they lead to no other prompt."""
        rows = [*self.ROWS[:7], *(message(f"a{n}", "p1", "assistant", float(n)) for n in range(3, 12))]
        with pytest.raises(InputError, match=r"11 ranked answers; .* max_completions: 9 takes the first nine"):
            load(rows, **self.BLOCK)
        rows.insert(1, rows.pop())  # a11 and a1 are the first two
        assert load(rows, **self.BLOCK, max_completions=2).counts == {
            "read": 16,
            "kept": 2,
            "dropped: over max_completions": 9,  # a3 to a10, and b3; a2 is on the way to p2
            "merged: messages of dialogues": 5,  # p1, a11, a1, a2, p2, b1, b2 less the two kept
        }

    def test_a_message_that_is_missing(self):
        """A ranking whose thread is cut is an error, or left out and counted."""
        with pytest.raises(InputError, match="the message p1 before it is not in the data"):
            load(self.ROWS[1:3], **self.BLOCK)


class TestUnpaired:
    ROWS = [  # noqa: RUF012
        {"prompt": "Q", "completion": "a", "label": True},
        {"prompt": "Q", "completion": "b", "label": False},
        {"prompt": "R", "completion": "c", "label": True},
    ]

    def test_the_good_ones_are_demonstrations(self):
        """A filter on the label."""
        found = load(self.ROWS, kind="demonstrations", filters={"where": {"label": True}})
        assert found.train == [Demonstration("Q", "a", "d.json:1"), Demonstration("R", "c", "d.json:1#3")]

    def test_good_and_bad_ones_of_a_prompt_are_a_ranking(self):
        """True is rated 1 and false 0; prompts with one of them only are left out and counted."""
        found = load(
            self.ROWS, kind="rankings", columns={"completion": "completion", "rating": "label"}, on_problem="drop"
        )
        assert found.train == [Ranking("Q", ["a", "b"], [1.0, 2.0], "d.json:1", [1.0, 0.0])]
        assert found.counts["dropped: not 2 to 9 completions"] == 1
