"""The words in which a card says where a value stands in a row."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kit.columns import Missing, columns_of, fault, path_of, value_of

ROW = {
    "a": "1",
    "a.b": "dotted",
    "info": {"post": "P", "tags": ["x", "y", "z"]},
    "list": [{"t": "p", "n": {"m": 1}}, {"t": "q", "n": {"m": 2}}, {"t": "r", "n": {"m": 3}}],
    "json": '[{"t": "in text"}]',
    "prediction 1": "one",
}


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("a", "1"),
        ("a.b", "dotted"),  # a column's own name comes first
        ("info.post", "P"),
        ("info.tags[0]", "x"),
        ("info.tags[-1]", "z"),
        ("list[1].t", "q"),
        ("list[].t", ["p", "q", "r"]),
        ("list[].n.m", [1, 2, 3]),
        ("list[:2].t", ["p", "q"]),
        ("list[-1:].t", ["r"]),
        ("list[1:2].t", ["q"]),
        ("json[0].t", "in text"),
        ("prediction 1", "one"),
        ("{info.post} and {list[0].t}\n", "P and p"),
        (["a", "list[0].t"], ["1", "p"]),
        ([1, 2.5], [1, 2.5]),
        ({"system": "a", "user": "{info.post}!"}, {"system": "1", "user": "P!"}),
    ],
)
def test_values(written, value):
    """What stands there."""
    assert value_of(written, ROW) == value


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("b", "there is no b in this row"),
        ("info.pots", "did you mean post?"),
        ("list[3].t", "the list has 3 elements, there is no [3]"),
        ("info[0]", "there is no list to take [0] of"),
        ("prediction 1.x", "goes into a text, which is not JSON"),
        ("list[].x", "there is no x"),
        ("{list}", "column list must be text"),
        ("list.t", "inside no mapping"),
    ],
)
def test_what_is_not_there(written, said):
    """One message that names the place."""
    with pytest.raises(Missing) as caught:
        value_of(written, {key: value for key, value in ROW.items() if key != "a.b"})
    assert said in caught.value.detail


def test_columns_and_faults():
    """The columns that a card needs, and what is written wrongly."""
    assert columns_of({"system": "s", "user": "{a.b} {c}"}) == ["s", "a.b", "c"]
    assert columns_of(["x[0]", "y"]) == ["x[0]", "y"]
    assert fault("{a") is not None and fault("a[0].b") is None
    assert fault({"assistant": "a"}) == "a prompt of messages has system, history, user, not assistant"
    assert fault({"system": "a"}) == "a prompt of messages needs user: what is asked"


@given(st.text())
def test_any_text_is_a_path_or_a_name(text):
    """Every text has steps, and reading by them gives a value or Missing."""
    assert path_of(text)
    try:
        value_of(text, ROW)
    except Missing as missing:
        assert missing.detail
