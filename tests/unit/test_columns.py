"""The words in which a card says where a value stands in a row."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kit.columns import Missing, columns_of, fault, optional_columns, our_way, path_of, value_of

ROW = {
    "a": "1",
    "a.b": "dotted",
    "info": {"post": "P", "tags": ["x", "y", "z"]},
    "list": [{"t": "p", "n": {"m": 1}}, {"t": "q", "n": {"m": 2}}, {"t": "r", "n": {"m": 3}}],
    "json": '[{"t": "in text"}]',
    "prediction 1": "one",
    "Better?": "yes",
    "sure": 1,
    "null": None,
    "n": 1999,
    "x": 0.5,
    "yes": True,
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
        ("{a}\n{none?}\n{info.none?}{null?}", "1"),  # the white space goes, as at any end
        ("{a}{Better?} {sure?}", "1yes 1"),  # with and without a column that is called so
        ("{n} {x} {yes}", "1999 0.5 true"),
        (r"\boxed{{{a}}} and {{a}}", r"\boxed{1} and {a}"),
        (["a", "list[0].t"], ["1", "p"]),
        ([1, 2.5], [1, 2.5]),
        (
            {"system": "none?", "history": "null?", "user": "{a} ok?"},
            {"system": None, "history": None, "user": "1 ok?"},
        ),
        ({"system": "Better?", "user": "Better?"}, {"system": "yes", "user": "yes"}),
        ({"system": {"text": "{a}"}, "user": "a"}, {"system": "{a}", "user": "1"}),
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
        ("{list?}", "column list? must be text"),
        ("{null}", "column null must be text; seen nothing (null); write {null?} where rows may lack it"),
        ("{none}", "there is no none in this row"),
        ("{inf}", "column inf must be text; seen Infinity"),
        ("list.t", "inside no mapping"),
    ],
)
def test_what_is_not_there(written, said):
    """One message that names the place."""
    row = {key: value for key, value in ROW.items() if key != "a.b"}
    with pytest.raises(Missing) as caught:
        value_of(written, {**row, "inf": float("inf")})
    assert said in caught.value.detail


def test_columns_and_faults():
    """The columns that a card needs, and what is written wrongly."""
    assert columns_of({"system": "s", "user": "{a.b} {c}"}) == ["s", "a.b", "c"]
    assert columns_of(["x[0]", "y"]) == ["x[0]", "y"]
    assert columns_of({"system": "s?", "history": {"text": "h"}, "user": "{a?} {b}?"}) == ["b"]
    assert optional_columns({"system": "s?", "user": "{a?} {b}?"}) == ["s?", "a?"]
    assert (columns_of("Better?"), optional_columns(["Better?"])) == (["Better?"], [])
    assert fault("{a") is not None and fault("a[0].b") is None
    assert fault("{{ a }}") == "a template has single braces: {a}"
    assert "its own braces being {{ and }}" in str(fault(r"\boxed{}: {a}")) and fault("{{a}} {b}") is None
    assert (columns_of({"user": "Better?"}), optional_columns({"user": "Better?"})) == (["Better?"], [])
    assert fault({"system": {"text": "x"}, "user": "q"}) is None
    for parts in ({"system": {"txt": "x"}, "user": "q"}, {"user": {"text": "x"}}):
        assert fault(parts) == "a text of the card's own is system: {text: Be brief.}"
    assert fault({"assistant": "a"}) == "a prompt of messages has system, history, user, not assistant"
    assert fault({"system": "a"}) == "a prompt of messages needs user: what is asked"


@pytest.mark.parametrize(
    ("written", "ours"),
    [
        ("$.x.y[*].z", "x.y[].z"), ("x['y'][0]", "x.y[0]"), ("$['x'].y", "x.y"), ('x["a b"]', "x.a b"), ("$", "$"),
        ("$price", "$price"), ("a'b", "a'b"), ("x.y[0]", "x.y[0]"), ("x['a.b']", "x['a.b']"), ("$.", "$."),
    ],
)  # fmt: skip
def test_paths_in_other_words(written, ours):
    """JSONPath and Python, as far as we have words for it."""
    assert our_way(written) == ours


@given(st.text())
def test_any_text_is_a_path_or_a_name(text):
    """Every text has steps, and reading by them gives a value or Missing."""
    assert path_of(text)
    try:
        value_of(text, ROW)
    except Missing as missing:
        assert missing.detail
