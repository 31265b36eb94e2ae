"""Cards from LLaMA-Factory's dataset_info.json: each entry's rows come out as that tool reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_kit.data_cards import HubSource, load_card
from rlhf_kit.errors import InputError
from rlhf_kit.examples.loading import load_examples
from rlhf_kit.examples.rows import Demonstration, Preference, Text
from rlhf_kit.importing import import_cards


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def rows_of(entry: dict, rows: list[dict]) -> list:
    """Import one entry over these rows, and return what its card yields."""
    Path("info").mkdir(exist_ok=True)
    Path("info/rows.json").write_text(json.dumps(rows))
    Path("info/dataset_info.json").write_text(json.dumps({"mine": {"file_name": "rows.json", **entry}}))
    ((card,), _) = import_cards(Path("info/dataset_info.json"), [], Path("cards"))
    text = card.read_text()
    card.write_text(text.replace("rlhf_kit:\n", "rlhf_kit:\n  heldout: 0\n"))
    found = load_examples(load_card(card)).train
    card.unlink()
    return found


ALPACA = {"instruction": "Add.", "input": "1, 2", "output": "3"}
SHAREGPT = {"conversations": [{"from": "human", "value": "Q"}]}


def test_alpaca():
    """Instruction and input are one message of the user; history and system come before it."""
    (row,) = rows_of({}, [ALPACA])
    assert (row.prompt, row.completion) == ([user("Add.\n1, 2")], "3")
    columns = {"prompt": "instruction", "query": "input", "response": "output", "system": "sys", "history": "past"}
    rows = [{**ALPACA, "input": "", "sys": "Be brief.", "past": [["Hi", "Yes?"]]}, {**ALPACA, "sys": "", "past": []}]
    first, second = rows_of({"columns": columns}, rows)
    assert first.prompt == [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Yes?"), user("Add.")]
    assert second.prompt == [user("Add.\n1, 2")]
    gaps = [{**ALPACA, "input": None, "sys": None, "past": None}, {"instruction": "Add.", "output": "3"}]
    assert [row.prompt for row in rows_of({"columns": columns}, gaps)] == [[user("Add.")]] * 2


def test_alpaca_rankings():
    """Two columns, or one list with the better answer first."""
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    (row,) = rows_of({"ranking": True, "columns": columns}, [{**ALPACA, "chosen": "3", "rejected": "4"}])
    assert row == Preference([user("Add.\n1, 2")], "3", "4", row.where)
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    (row,) = rows_of({"ranking": True, "columns": columns}, [{**ALPACA, "output": ["3", "4"]}])
    assert (row.chosen, row.rejected) == ("3", "4")


def test_sharegpt():
    """The dialogue's last answer is learned from; a system column comes first."""
    talk = {"conversations": [*SHAREGPT["conversations"], {"from": "gpt", "value": "A"}], "system": "S"}
    assert rows_of({"formatting": "sharegpt"}, [talk])[0] == Demonstration(
        [user("Q")], "A", rows_of({"formatting": "sharegpt"}, [talk])[0].where
    )
    (row,) = rows_of({"formatting": "sharegpt", "columns": {"messages": "conversations", "system": "system"}}, [talk])
    assert (row.prompt, row.completion) == ([{"role": "system", "content": "S"}, user("Q")], "A")


def test_sharegpt_rankings():
    """chosen and rejected are one message each."""
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    row = {**SHAREGPT, "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}
    (found,) = rows_of({"formatting": "sharegpt", "ranking": True, "columns": columns}, [row])
    assert (found.prompt, found.chosen, found.rejected) == ([user("Q")], "a", "b")


def test_openai_tags():
    """role and content, user and assistant are other words for the same."""
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
            "system_tag": "system"}  # fmt: skip
    entry = {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    (row,) = rows_of(entry, [{"messages": [user("Q"), assistant("A")]}])
    assert (row.prompt, row.completion) == ([user("Q")], "A")


def test_tags_that_are_not_known():
    """They become roles of the card; known ones need none, in upper case or lower."""
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "me", "assistant_tag": "Model"}
    entry = {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    talk = [{"role": "me", "content": "Q"}, {"role": "Model", "content": "A"}]
    (row,) = rows_of(entry, [{"messages": talk}])
    assert (row.prompt, row.completion) == ([user("Q")], "A")
    ((card,), _) = import_cards(Path("info/dataset_info.json"), [], Path("cards"))
    assert load_card(card).roles == {"me": "user"}


def test_tags_of_tools():
    """Rows with such messages are not read, which is said; the dataset is imported all the same."""
    tags = {"observation_tag": "seen", "function_tag": "call"}
    Path("i.json").write_text(json.dumps({"a": {"file_name": "x", "formatting": "sharegpt", "tags": tags}}))
    cards, (said,) = import_cards(Path("i.json"), ["a"], Path("cards"))
    assert cards == [Path("cards/a.md")]
    assert said.startswith("i.json: a: rows with messages of function_tag or observation_tag, for the use of tools")


def test_texts_unpaired_and_samples():
    """A prompt alone is text to learn whole; of unpaired rows the good ones are demonstrations; num_samples caps."""
    assert rows_of({"columns": {"prompt": "text"}}, [{"text": "T"}]) == [Text("T", rows_of(
        {"columns": {"prompt": "text"}}, [{"text": "T"}])[0].where)]  # fmt: skip
    columns = {"prompt": "instruction", "response": "output", "kto_tag": "good"}
    rows = [{**ALPACA, "good": True}, {**ALPACA, "instruction": "No.", "good": False}, {**ALPACA, "good": True}]
    assert [row.prompt for row in rows_of({"columns": columns, "num_samples": 1}, rows)] == [[user("Add.")]]


def test_openai_format():
    """Messages of role and content in a column messages, where nothing else is said; another format is refused."""
    (row,) = rows_of({"formatting": "openai"}, [{"messages": [user("Q"), assistant("A")]}])
    assert (row.prompt, row.completion) == ([user("Q")], "A")
    columns = {"messages": "messages", "chosen": "chosen", "rejected": "rejected"}
    pair = {"messages": [user("Q")], "chosen": assistant("a"), "rejected": assistant("b")}
    (found,) = rows_of({"formatting": "openai", "ranking": True, "columns": columns}, [pair])
    assert (found.prompt, found.chosen, found.rejected) == ([user("Q")], "a", "b")
    with pytest.raises(InputError, match="formatting is 'chatml'; known: alpaca, sharegpt, openai"):
        rows_of({"formatting": "chatml"}, [])


def test_what_can_be_imported_is():
    """Where no dataset is named, one that cannot be read keeps none of the others back, and is told."""
    entries = {"good": {"file_name": "x"}, "seen": {"file_name": "x", "columns": {"prompt": "p", "images": "i"}}}
    Path("i.json").write_text(json.dumps(entries))
    cards, left_out = import_cards(Path("i.json"), [], Path("cards"))
    assert cards == [Path("cards/good.md")] and Path("cards/good.md").is_file()
    assert left_out == ["i.json: seen: has images, which are not read"]
    with pytest.raises(InputError, match="has images"):
        import_cards(Path("i.json"), ["good", "seen"], Path("others"))
    assert not Path("others").exists()


def test_hub_datasets():
    """Repository, configuration, split and folder; the revision is for a person to pin."""
    Path("i.json").write_text(json.dumps({
        "far": {"hf_hub_url": "owner/name", "subset": "c", "split": "train", "folder": "d"}, "other": {}
    }))  # fmt: skip
    ((card,), _) = import_cards(Path("i.json"), ["far"], Path("cards"))
    assert load_card(card).sources == HubSource("owner/name", "main", "c", "train", "d", None)


@pytest.mark.parametrize(
    ("content", "names", "said"),
    [
        ("[]", [], "is not a dataset_info.json"),
        ("{", [], "i.json: is not JSON"),
        ('{"a": {"file_name": "x"}}', ["b"], "--name b: i.json has no such dataset; known: a"),
        ('{"a": {"script_url": "x"}}', [], "i.json: a: names neither file_name nor hf_hub_url"),
        ('{"a": {"file_name": "x", "columns": {"prompt": "p", "images": "i"}}}', [], "a: has images"),
        (
            '{"a": {"file_name": "x", "formatting": "sharegpt", "tags": {"role_tag": "who"}}}',
            [],
            "writes role_tag as 'who'; known: from, role",
        ),
        ('{"../a": {"file_name": "x"}}', [], "'../a' cannot be a card's name"),
    ],
)
def test_what_is_not_read(content, names, said):
    """One message; nothing is written."""
    Path("i.json").write_text(content)
    with pytest.raises(InputError) as caught:
        import_cards(Path("i.json"), names, Path("cards"))
    assert said in str(caught.value) and not Path("cards").exists()


def test_a_card_is_not_overwritten():
    """What a person has filled in stays."""
    Path("i.json").write_text('{"a": {"file_name": "x"}}')
    import_cards(Path("i.json"), [], Path("cards"))
    with pytest.raises(InputError, match="is there already"):
        import_cards(Path("i.json"), [], Path("cards"))
