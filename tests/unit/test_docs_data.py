"""docs/data.md: every card on the page reads rows as the dataset it names has them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from rlhf_kit.audit import audit
from rlhf_kit.data_cards import HubSource, load_card
from rlhf_kit.examples.loading import load_examples
from rlhf_kit.marked_yaml import write_yaml
from tests.unit import test_public_formats as formats  # whole: a test class imported by name would run here too
from tests.unit.test_public_formats import ARENA, HELPSTEER, SUMMARY, ULTRA, assistant, user

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text()
BLOCKS = [yaml.safe_load(block)["rlhf_kit"] for block in re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)]

DIALOGUES = {"chosen": [user("Q"), assistant("a")], "rejected": [user("Q"), assistant("b")]}
TWO = {"prompt": "Q", "response_0": "a", "response_1": "b", "response_2": "c"}
ROWS = {
    "Anthropic/hh-rlhf": [{side: f"\n\nHuman: Q\n\nAssistant: {side}" for side in ("chosen", "rejected")}],
    "HuggingFaceH4/ultrafeedback_binarized": [{"prompt": "Q", **DIALOGUES, "score_chosen": 8.0, "score_rejected": 3.5}],
    "argilla/distilabel-capybara-dpo-7k-binarized": [{**DIALOGUES, "rating_chosen": 5, "rating_rejected": 1}],
    "Intel/orca_dpo_pairs": [{"system": "S", "question": "Q", "chosen": "a", "rejected": "b"}],
    "lvwerra/stack-exchange-paired": [{"qid": 1, "question": "Q", "response_j": "a", "response_k": "b"}],
    "openai/summarize_from_feedback": [SUMMARY],
    "openai/webgpt_comparisons": [
        {"question": {"full_text": "Q"}, "answer_0": "a", "answer_1": "b", "score_0": 1.0, "score_1": -1.0}
    ],
    "stanfordnlp/SHP": [{"history": "Q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}],
    "PKU-Alignment/PKU-SafeRLHF": [{**TWO, "better_response_id": 0, "safer_response_id": 1}],
    "lmsys/chatbot_arena_conversations": [{**ARENA, "winner": "tie"}],
    "preference.jsonl.gz": [{**TWO, "preference_strength": -2}],
    "nvidia/HelpSteer3": [
        {"context": [user("Q")], "response1": "a", "response2": "b", "overall_preference": n} for n in (-3, 0, 2)
    ],
    "argilla.json": [
        {
            "fields": {"prompt": "Q", "response1": "a", "response2": "b"},
            "responses": {"preference": [{"value": "response1", "user_id": "u"}]},
        }
    ],
    "label_studio.json": [
        {
            "data": {"prompt": "Q", "answer1": "a", "answer2": "b"},
            "annotations": [{"result": [{"value": {"selected": side}}]} for side in ("left", "right", "left")],
        }
    ],
    "argilla_ranking.json": [
        {
            "fields": {"prompt": "Q", "response-1": "a", "response-2": "b"},
            "responses": {"ranking": [{"value": [{"value": f"response-{n}", "rank": 3 - n} for n in (2, 1)]}]},
        }
    ],
    "label_studio_ranker.json": [formats.TestRankings.LABEL_STUDIO],
    "allenai/reward-bench-2": [
        {
            "prompt": "Q",
            "chosen": ["a"],
            "rejected": ["b", "c", "d"],
            "num_correct": 1,
            "num_rejected": 3,
            "subset": "Focus",
        }
    ],
    "openbmb/UltraFeedback": [ULTRA],
    "berkeley-nest/Nectar": [
        {
            "prompt": "\n\nHuman: Q\n\nAssistant: ",
            "answers": [{"answer": str(rank), "rank": float(rank)} for rank in range(1, 8)],
        }
    ],
    "nvidia/HelpSteer2": HELPSTEER,
    "HuggingFaceH4/stack-exchange-preferences": [
        {"question": "Q", "answers": [{"text": str(n), "pm_score": n} for n in range(11)]}
    ],
    "dev_feedback.json": [{"question": "Q", **{f"prediction {n}": str(n) for n in range(1, 5)}, "preference": [1] * 6}],
    "OpenAssistant/oasst1": formats.TestThreads.ROWS,
    "comments.jsonl": [{**row, "score": row["rank"]} for row in formats.TestThreads.ROWS],
    "conversations.jsonl": [
        {"conversation_id": n // 2, "prompt": "Hi", "response": f"a{n}", "score": n % 2} for n in range(4)
    ],
    "trl-lib/kto-mix-14k": [
        {"prompt": [user("Q")], "completion": [assistant(text)], "label": text == "a"} for text in "ab"
    ],
    "nli.jsonl": [{"premise": "It rains.", "hypothesis": "it is wet", "answer": "yes"}],
}


def name_of(block: dict) -> str:
    return block["source"]["hub"] if isinstance(block["source"], dict) else block["source"]


@pytest.mark.parametrize("block", BLOCKS, ids=name_of)
def test_every_card_reads_its_rows(block, tmp_path, monkeypatch):
    """The block as it stands is a card; over a few rows as the dataset has them it gives rows."""
    monkeypatch.chdir(tmp_path)
    rows = ROWS[name_of(block)]
    if isinstance(block["source"], dict):
        Path("hub.md").write_text(f"---\n{write_yaml({'rlhf_kit': block})}---\n")
        assert isinstance(load_card("hub.md").sources, HubSource)
    Path("rows.json").write_text(json.dumps(rows))
    local = {**block, "source": "rows.json", "heldout": 0, "on_problem": "error"}
    Path("card.md").write_text(f"---\n{write_yaml({'rlhf_kit': local})}---\n")
    found = load_examples(load_card("card.md"))
    assert found.train
    rows = audit(load_card("card.md")).rows  # data check counts what a run counts
    counts = {"read": rows["read"], "kept": rows["kept"]}
    counts |= {f"dropped: {reason}": note["rows"] for reason, note in rows["dropped"].items()}
    others = {f"{how}: {what}": n for how in ("merged", "noted") for what, n in rows[how].items() if n}
    assert counts | others == found.counts


def test_every_dataset_is_on_the_page():
    """No sample is left over."""
    assert {name_of(block) for block in BLOCKS} == set(ROWS)


def test_templates_are_drawn_by_content(tmp_path, monkeypatch):
    """Rows draw different templates, the same ones in any order; another template takes rows and moves no others."""
    monkeypatch.chdir(tmp_path)
    block = next(block for block in BLOCKS if "templates" in block)
    rows = [{"premise": f"P{n}.", "hypothesis": f"h{n}", "answer": "yes"} for n in range(200)]

    def prompts(rows: list[dict], templates: dict) -> dict[str, str]:
        Path("nli.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        card = {**block, "templates": templates, "heldout": 0}
        Path("card.md").write_text(f"---\n{write_yaml({'rlhf_kit': card})}---\n")
        train = load_examples(load_card("card.md")).train
        return {re.search(r"P\d+\.", row.prompt)[0]: row.prompt for row in train}

    templates = block["templates"]
    first = prompts(rows, templates)
    assert prompts(rows[::-1], templates) == first
    shares = [sum("Does it follow" in p for p in first.values()), sum("Read:" in p for p in first.values())]
    assert all(40 < share < 95 for share in shares)  # a third of 200: 67 and four standard deviations
    more = prompts(rows, {**templates, "new": "NEW {premise} {hypothesis}"})
    assert 25 < sum("NEW" in prompt for prompt in more.values()) < 75
    assert all(more[key] == first[key] for key in more if "NEW" not in more[key])
