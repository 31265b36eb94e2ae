"""Tokenised rows from an earlier run: the same as new ones, or not taken."""

from __future__ import annotations

import os

import pytest

from rlhf_kit import recipe, token_cache
from rlhf_kit.collate import load_text_format, tokenise_comparisons, tokenise_demonstrations, tokenise_prompts
from rlhf_kit.errors import InputError
from rlhf_kit.examples.rows import Demonstration, Preference, PromptRow
from tests import tiny

ROWS = [Demonstration(f"Q{n}", f" A{n}", f"d:{n}") for n in range(12)]


@pytest.fixture(scope="module")
def text_format(tmp_path_factory):
    return load_text_format(recipe.Base(model=str(tiny.make_checkpoint(tmp_path_factory.mktemp("base") / "model"))))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache of a user who has none yet, for any number of rows; calls to `tokenise` are counted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(token_cache, "FEWEST_ROWS", 1)
    return tmp_path / "rlhf_kit" / "tokens"


class Counted:
    """A function of collate, and how often it ran."""

    def __init__(self, tokenise):
        self.tokenise, self.calls, self.__name__ = tokenise, 0, tokenise.__name__

    def __call__(self, *arguments):
        self.calls += 1
        return self.tokenise(*arguments)


@pytest.mark.parametrize(
    ("tokenise", "rows"),
    [
        (tokenise_demonstrations, ROWS),
        (tokenise_comparisons, [Preference("Q", "a", "b", "d:1", margin) for margin in (None, 0.5)]),
        (tokenise_comparisons, [Preference("Q", "a", "b", "d:1")]),
        (tokenise_prompts, [PromptRow("Q", "d:1"), PromptRow([{"role": "user", "content": "Hi"}], "d:2")]),
    ],
)
def test_a_second_run_gives_the_same(cache, text_format, tokenise, rows):
    """Rows, counts and which were kept; tokenised once."""
    counted = Counted(tokenise)
    first = token_cache.tokenised(counted, rows, text_format, None, "error")
    second = token_cache.tokenised(counted, rows, text_format, None, "error")
    assert first == second == tokenise(rows, text_format, None, "error") and counted.calls == 1


def test_what_it_depends_on(cache, text_format):
    """Other rows, limits and ways to cut are tokenised anew; where a row stood does not matter."""
    counted = Counted(tokenise_demonstrations)
    for rows, limit, truncate in (
        (ROWS, None, "error"), (ROWS[1:], None, "error"), (ROWS, 99, "error"), (ROWS, None, "drop"),
    ):  # fmt: skip
        token_cache.tokenised(counted, rows, text_format, limit, truncate)
    assert counted.calls == 4 and len(list(cache.iterdir())) == 4
    moved = [Demonstration(row.prompt, row.completion, "elsewhere:1") for row in ROWS]
    token_cache.tokenised(counted, moved, text_format, None, "error")
    assert counted.calls == 4


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_entry_is_not_taken(cache, text_format, damage):
    """It is made anew."""
    counted = Counted(tokenise_demonstrations)
    first = token_cache.tokenised(counted, ROWS, text_format, None, "error")
    (entry,) = cache.iterdir()
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1
    entry.write_bytes({"cut": content[:-9], "flip": content, "empty": b""}[damage])
    assert token_cache.tokenised(counted, ROWS, text_format, None, "error") == first
    assert counted.calls == 2


def test_errors_and_short_data_are_not_kept(cache, text_format, monkeypatch):
    """Rows that are too long are an error every time; few rows are not worth a file."""
    for _ in range(2):
        with pytest.raises(InputError, match="longer than 3 tokens"):
            token_cache.tokenised(tokenise_demonstrations, ROWS, text_format, 3, "error")
    monkeypatch.setattr(token_cache, "FEWEST_ROWS", 13)
    token_cache.tokenised(tokenise_demonstrations, ROWS, text_format, None, "error")
    assert not cache.exists()


def test_the_oldest_entries_make_room(cache, text_format, monkeypatch):
    """Those used longest ago go when there is too much; using one makes it young again."""
    names = []
    for number in range(3):
        token_cache.tokenised(tokenise_demonstrations, ROWS[number:], text_format, None, "error")
        (new,) = {entry.name for entry in cache.iterdir()} - set(names)
        names.append(new)
        os.utime(cache / new, (number, number))
    token_cache.tokenised(tokenise_demonstrations, ROWS, text_format, None, "error")  # the first one is used again
    size = max(entry.stat().st_size for entry in cache.iterdir())
    monkeypatch.setattr(token_cache, "MOST_BYTES", 2 * size + size // 2)
    token_cache.tokenised(tokenise_demonstrations, ROWS[3:], text_format, None, "error")
    left = {entry.name for entry in cache.iterdir()}
    assert len(left) == 2 and names[0] in left


def test_a_home_that_cannot_be_written_to(tmp_path, text_format, monkeypatch):
    """Rows are tokenised all the same."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(token_cache, "FEWEST_ROWS", 1)
    found = token_cache.tokenised(tokenise_demonstrations, ROWS, text_format, None, "error")
    assert len(found.rows) == 12
