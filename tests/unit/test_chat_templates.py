"""Chat templates are programs of somebody else's: those without an end or a measure are told, not run."""

from __future__ import annotations

import pytest

from rlhf_kit import chat_templates
from rlhf_kit.chat_templates import try_template
from rlhf_kit.collate import load_text_format
from rlhf_kit.errors import InputError
from rlhf_kit.recipe import Base
from tests.tiny import CHATML, make_tokenizer

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (ENDLESS, "does not come to an end within 5 seconds of computing"),
        ("{{ (9**9)**(9**8) }}", "does not come to an end"),  # folded when it is compiled
        (DOUBLING, "needs more than 256 MiB for a dialogue of 1 short messages"),
        ("{{ 'a' * 10**12 }}", "needs more than 256 MiB"),
        ("{% for i in range(99999) %}hello {% endfor %}", "writes 599,994 letters for a dialogue of 1 short messages"),
        ("{% if messages|length > 1 %}{{ 'a' * 10**12 }}{% endif %}", "needs more than 256 MiB for a dialogue of 2"),
        ({"tool_use": CHATML}, "no default"),
    ],
    ids=["endless", "compiling", "doubling", "at once", "wordy", "second message", "no default"],
)
def test_a_template_without_measure_is_refused(template, said):
    """The message says what it does and what to do."""
    with pytest.raises(InputError, match=r"^base\.model: m: ") as caught:
        try_template(make_tokenizer(chat_template=template), "base.model: m")
    assert said in str(caught.value) and "base.chat_template" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("template", [CHATML, "{{ raise_exception('no') }}", "{% if", "{{ ''.__class__.__mro__ }}"])
def test_others_pass(template):
    """Also those that raise an exception: where that matters, it is told in other words."""
    try_template(make_tokenizer(chat_template=template), "base.model: m")


def test_a_template_is_tried_once(monkeypatch):
    """A process is started for a template that was not tried yet, and for no other."""
    try_template(make_tokenizer(chat_template=CHATML), "a")
    monkeypatch.setattr(chat_templates.subprocess, "run", None)
    try_template(make_tokenizer(chat_template=CHATML), "b")
    with pytest.raises(TypeError):
        try_template(make_tokenizer(chat_template=CHATML + " "), "b")


def test_before_a_tokenizer_is_used(tmp_path):
    """The tokenizer's own template and the recipe's, each named for what it is."""
    tokenizer = make_tokenizer(extra=("<|im_start|>", "<|im_end|>"), chat_template=ENDLESS)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=rf"^base\.model: {tmp_path}: the chat template does not come to an end"):
        load_text_format(Base(model=str(tmp_path)))
    (tmp_path / "given.jinja").write_text(ENDLESS)
    with pytest.raises(InputError, match=r"^base\.chat_template: the chat template does not come to an end"):
        load_text_format(Base(model=str(tmp_path), chat_template=str(tmp_path / "given.jinja")))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 1 // 0 }}", "division"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ messages | map('nonsense') | list }}", "nonsense"),
        ("{% if", "end of template"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ raise_exception('a\nb\x1b[2J') }}", "a"),
    ],
)
def test_a_recipes_template_that_fails(tmp_path, template, said):
    """Whatever it raises is one message on one line."""
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "given.jinja").write_text(template)
    with pytest.raises(InputError) as caught:
        load_text_format(Base(model=str(tmp_path), chat_template=str(tmp_path / "given.jinja")))
    message = str(caught.value)
    assert message.startswith("base.chat_template: cannot render a question and an answer: ") and said in message
    assert message.isprintable()


def test_a_template_file_that_is_none(tmp_path):
    """Bytes that are no text, and a file that is too large, are told."""
    make_tokenizer().save_pretrained(tmp_path / "model")
    path = tmp_path / "given.jinja"
    for content, said in ((b"\xff", "is not UTF-8 text"), (b" " * 2_000_000, "more than the 1,000,000")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=said):
            load_text_format(Base(model=str(tmp_path / "model"), chat_template=str(path)))
