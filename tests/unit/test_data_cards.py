"""Data cards: what they say when they are right, and what is said when they are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_kit.columns import template_columns
from rlhf_kit.data_cards import DataCard, HubSource, load_card, range_of
from rlhf_kit.errors import InputError
from rlhf_kit.marked_yaml import read_yaml, write_yaml

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "data_cards").glob("*.md"))
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with two data files, as the working directory."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "b.csv").write_text("prompt\nx\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(block: dict, path: str = "card.md", **metadata: object) -> str:
    """Write a card and return its name."""
    Path(path).write_text(f"---\n{write_yaml({**metadata, 'rlhf_kit': block})}---\nProse.\n")
    return path


def problems(block: dict) -> list[str]:
    with pytest.raises(InputError) as caught:
        load_card(write(block))
    return list(caught.value.problems)


class TestReading:
    def test_what_is_written_is_what_is_there(self, here):
        """Kind, files, columns, filters and the rest of the front matter; what is not said has its default."""
        block = {
            "kind": "prompts", "source": ["a.jsonl", "b.csv"], "columns": {"prompt": "question"}, "heldout": 0.2,
            "filters": {"max_rows": 3, "where": {"language": ["en", "no"]}}, "on_problem": "drop",
        }  # fmt: skip
        card = load_card(write(block, license="mit"))
        assert (card.name, card.kind, card.sources) == ("card", "prompts", (Path("a.jsonl"), Path("b.csv")))
        assert (card.columns, card.mapped, card.heldout) == ({"prompt": "question"}, {"prompt"}, 0.2)
        assert (card.filters.max_rows, card.filters.where, card.on_problem) == (3, {"language": ["en", "no"]}, "drop")
        assert (card.metadata, card.text) == ({"license": "mit"}, "Prose.")
        plain = load_card(write({"kind": "text", "source": "a.jsonl"}))
        assert (plain.columns, plain.heldout, plain.on_problem, plain.format) == ({"text": "text"}, 0.1, "error", None)

    def test_a_card_as_the_hub_has_them(self, here):
        """Front matter of a dataset card is read whatever it holds; `no` is a language."""
        front = (
            "language:\n- no\n- en\nconfigs:\n- config_name: default\n  data_files: x\ndataset_info:\n  features: []\n"
        )
        Path("card.md").write_text(f"---\n{front}rlhf_kit: {{kind: prompts, source: a.jsonl}}\n---\n\n---\nmore\n")
        card = load_card("card.md")
        assert card.metadata["language"] == ["no", "en"]
        assert card.text == "---\nmore"

    def test_a_hub_dataset(self, here):
        """Repository, revision, configuration, split and folder; `heldout` may then be another split."""
        source = {"hub": "owner/name", "revision": COMMIT, "config": "c", "data_dir": "d", "split": "train"}
        card = load_card(write({"kind": "preferences", "source": source, "heldout": "test"}))
        assert card.sources == HubSource("owner/name", COMMIT, "c", "train", "d", None)
        assert card.heldout == HubSource("owner/name", COMMIT, "c", "test", "d", None)
        assert str(card.heldout) == f"owner/name/c/d@{COMMIT}[test]"

    def test_heldout_files(self, here):
        """`heldout` may be a file or files."""
        card = load_card(write({"kind": "prompts", "source": "a.jsonl", "heldout": "b.csv"}))
        assert card.heldout == (Path("b.csv"),)

    def test_where_files_are_looked_for(self, here):
        """In data_root first, then beside the card, then in the working directory."""
        for folder in ("root", "cards"):
            Path(folder).mkdir()
        card = write({"kind": "prompts", "source": "a.jsonl"}, "cards/card.md")
        assert load_card(card).sources == (Path("a.jsonl"),)
        Path("cards/a.jsonl").write_text("")
        assert load_card(card).sources == (Path("cards/a.jsonl"),)
        Path("root/a.jsonl").write_text("")
        assert load_card(card, data_root="root").sources == (Path("root/a.jsonl"),)

    def test_sources_do_not_lead_out_of_the_cards_folder(self, here):
        """Not by ../ from the card's folder nor from here; from data_root, or as an absolute path, they may."""
        for folder in ("root/inner", "cards"):
            Path(folder).mkdir(parents=True)
        for name in ("../a.jsonl", "x/../../a.jsonl"):
            card = write({"kind": "prompts", "source": name}, "cards/card.md")
            with pytest.raises(InputError, match=r"cards/card\.md:\d+: rlhf_kit\.source: .* leads out of the card's"):
                load_card(card)
        card = write({"kind": "prompts", "source": "b.csv", "heldout": ["../a.jsonl"]}, "cards/card.md")
        with pytest.raises(InputError, match=r"rlhf_kit\.heldout\[0\]: \.\./a\.jsonl leads out"):
            load_card(card)
        card = write({"kind": "prompts", "source": "../a.jsonl"}, "cards/card.md")
        Path("root/a.jsonl").write_text("")
        assert load_card(card, data_root="root/inner").sources == (Path("root/a.jsonl"),)
        card = write({"kind": "prompts", "source": str(Path("a.jsonl").absolute())}, "cards/card.md")
        assert load_card(card).sources == (Path("a.jsonl"),)
        card = write({"kind": "prompts", "source": "cards/../a.jsonl"}, "cards/card.md")
        assert load_card(card).sources == (Path("a.jsonl"),)

    @pytest.mark.parametrize("key", ["data_files", "data_dir"])
    def test_files_of_a_hub_dataset_are_its_own(self, here, key):
        """What `datasets` would take for a file of this machine or another address is refused."""
        for path in ("/etc/hostname", "../x", "a/../../x", "~/x", "https://example.org/x", "file:///x", "zip://a::b"):
            for value in (path, ["a", path]) if key == "data_files" else (path,):
                (message,) = problems({"kind": "prompts", "source": {"hub": "a/b", "revision": "v1", key: value}})
                assert f"rlhf_kit.source.{key}: must be a path inside the dataset" in message
        source = {"hub": "a/b", "revision": "v1", key: "x/y-*.jsonl" if key == "data_files" else "x/y"}
        assert getattr(load_card(write({"kind": "prompts", "source": source})).sources, key) == source[key]

    def test_special_tokens(self, here):
        """They stay text unless the card says otherwise."""
        assert load_card(write({"kind": "prompts", "source": "a.jsonl"})).special_tokens == "escape"
        block = {"kind": "prompts", "source": "a.jsonl", "special_tokens": "allow"}
        assert load_card(write(block)).special_tokens == "allow"
        assert "must be escape, refuse or allow" in problems({**block, "special_tokens": "keep"})[0]

    def test_a_card_names_no_code(self, here):
        """A function that scores is the recipe's to name: neither a key of the block nor one beside it does it."""
        for key in ("gold", "reward", "scorer", "function"):
            (message,) = problems({"kind": "prompts", "source": "a.jsonl", key: "os:system"})
            assert f"rlhf_kit.{key}: unknown key" in message

    def test_templates(self):
        """Braces name columns; text with other braces is no template."""
        assert template_columns("{a}\n{b c}") == ("a", "b c")
        assert template_columns("a") == template_columns("{a") == template_columns("a} {b}") == ()


class TestMessages:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"kind": "demo"}, "kind: must be demonstrations, preferences, rankings, prompts or text"),
            ({"kind": ...}, "rlhf_kit.kind: missing, and has no default: demonstrations"),
            ({"source": ...}, "rlhf_kit.source: missing, and has no default: a file"),
            ({"source": 3}, "rlhf_kit.source: must be a file"),
            ({"source": "c.jsonl"}, "card.md:4: rlhf_kit.source: there is no file c.jsonl; did you mean a.jsonl?"),
            ({"source": ["a.jsonl", "nowhere"]}, "card.md:6: rlhf_kit.source[1]: there is no file nowhere"),
            ({"source": "owner/name"}, "for the Hub dataset write {hub: owner/name, revision: <commit>}"),
            ({"source": "."}, "is a folder; name the files in it: a.jsonl, b.csv"),
            ({"source": "card.md"}, "card.md: files end in .jsonl"),
            ({"source": ["a.jsonl", "a.jsonl"]}, "names a file twice"),
            ({"source": {"hub": "name", "revision": "x"}}, "must be a Hub dataset, written owner/name"),
            ({"source": {"hub": "a/b"}}, "rlhf_kit.source.revision: missing"),
            ({"source": {"hub": "a/b", "revison": "x"}}, "unknown key; did you mean revision?"),
            ({"columns": {"promt": "q"}}, "prompts have no column promt; did you mean prompt?"),
            ({"columns": {"question": "prompt"}}, "the order is ours: theirs, so prompt: question"),
            ({"columns": {"prompt": "{a"}}, "a template names columns in braces"),
            ({"columns": {"prompt": 3}}, 'must be text; seen 3; in quotes it is text: "3"'),
            ({"heldout": 1}, "must be a share, at least 0 and less than 1; seen 1"),
            ({"heldout": True}, "must be a share such as 0.1"),
            ({"heldout": "a.jsonl"}, "names a file that is also the source"),
            ({"heldout": "test"}, "there is no file test"),
            ({"on_problem": "skip"}, 'must be error or drop; seen "skip"'),
            ({"filters": {"max_row": 3}}, "rlhf_kit.filters.max_row: unknown key; did you mean max_rows?"),
            ({"filters": {"where": {"a": {"b": 1}}}}, "rlhf_kit.filters.where.a: must be a value or a list of values"),
            ({"format": "hhh"}, "must be hh, common_prefix or threads"),
            ({"heldout": "10%"}, "rlhf_kit.heldout: must be a share, not 10%; write 0.1"),
            ({"source": "https://huggingface.co/datasets/a/b/tree/main"}, "write {hub: a/b, revision: <commit>}"),
            ({"source": "https://host/x.jsonl"}, "is an address; get the file and name it"),
            ({"source": {"hub": "https://huggingface.co/datasets/a/b", "revision": "x"}}, "an address; write hub: a/b"),
            ({"columns": {"prompt": {"user": None}}}, "must be columns, written as text (a template in quotes)"),
            ({"rows": "data"}, "rlhf_kit.rows: is for .json files; seen a.jsonl"),
            ({"rows": ["data"]}, "rlhf_kit.rows: must be text; seen a list"),
            ({"roles": {"user": []}}, "roles.user: must be a name in the data or a list of names; seen a list"),
            ({"roles": {"bot": "x"}}, "rlhf_kit.roles.bot: unknown key; known: assistant, system, user"),
            ({"roles": {"user": ["A", "b"], "assistant": "B"}}, "gives B to assistant, and user has it; keep one"),
            ({"heldot": 3}, "rlhf_kit.heldot: unknown key; did you mean heldout?"),
        ],
    )  # fmt: skip
    def test_where_what_seen_and_what_would_work(self, here, change, said):
        """Each fault is one message with its line in the card."""
        block = {"kind": "prompts", "source": "a.jsonl", **change}
        messages = problems({key: value for key, value in block.items() if value is not ...})
        assert len(messages) == 1 and messages[0].startswith("card.md:") and said in messages[0], messages

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"columns": {"first": "a", "second": "b"}}, "map one of preferred, ratings, probability"),
            ({"columns": {"preferred": "w"}}, "say what its values mean: preferred: {first: 0, second: 1, tie: tie}"),
            ({"preferred": {"first": 0, "second": 1}}, "there is no column for it; map columns: {preferred"),
            ({"preferred": {"first": 0}, "columns": {"preferred": "w"}}, "preferred.second: missing"),
            ({"preferred": {"first": 0, "second": 1, "ties": 2}, "columns": {"preferred": "w"}}, "did you mean tie?"),
            ({"columns": {"first": "a", "chosen": "b", "preferred": "w"}, "preferred": {"first": 0, "second": 1}},
             "preferences have no column chosen, in a card with prompt, first, second"),
            ({"preferred": {"first": "0..3", "second": "2..5"}, "columns": {"preferred": "w"}},
             "preferred.second: 0..3 and 2..5 have values in common, which cannot mean first and second"),
            ({"preferred": {"first": "A", "second": "B", "drop": ["x", "A"]}, "columns": {"preferred": "w"}},
             "preferred.drop: A cannot mean first and drop"),
            ({"preferred": {"first": 1, "second": 0, "tie": "1"}, "columns": {"preferred": "w"}},
             "preferred.tie: 1 cannot mean first and tie"),
            ({"preferred": {"first": "1..3", "second": "5..7", "tie": 4},
              "columns": {"preferred": "w", "margin": "w"}}, "so its sign must say which one is better"),
            ({"votes": "majority"}, "votes are counted in a column preferred, which is not mapped"),
            ({"votes": "most", "columns": {"preferred": "w"}, "preferred": {"first": 0, "second": 1}},
             "must be majority or probability"),
            ({"scale": [1, 7]}, "is of ratings, and no column is mapped to ratings"),
            ({"scale": [7, 1], "columns": {"ratings": ["a", "b"]}}, "from the lowest rating to the highest; seen 7, 1"),
            ({"scale": [1], "columns": {"ratings": ["a", "b"]}}, "must be the lowest and the highest rating: [1, 7]"),
            ({"margin_per_point": 1}, "is of ratings, and no column is mapped to ratings"),
            ({"margin_per_point": 1, "columns": {"ratings": ["a", "b"], "margin": "m"}}, "margin_per_point says it"),
            ({"columns": {"chosen": ["a", "b"]}}, "must be one column, or a template; seen a list"),
            ({"columns": {"chosen": {"user": "a"}}}, "must be one column, or a template; seen a mapping"),
            ({"columns": {"prompt": {"assistant": "a"}}}, "has system, history, user, not assistant"),
            ({"columns": {"ratings": ["a", 3]}}, "must be columns, written as text"),
            ({"templates": {"a": "no columns"}}, 'names no columns in braces, such as "{question}"'),
            ({"templates": {"a": "{q}"}, "columns": {"prompt": "q"}}, "is mapped, and templates say it too; keep one"),
            ({"format": "common_prefix", "kind": "demonstrations"}, "common_prefix is for preferences and not for"),
            ({"kind": "rankings", "columns": {"ranks": "r", "comparisons": "c"},
              "preferred": {"first": 0, "second": 1}}, "says again which is better, as ranks does"),
            ({"kind": "rankings", "columns": {"ranks": "r", "ratings": "c"}}, "again which is better, as ranks does"),
            ({"kind": "rankings", "columns": {"ranked": "r", "names": "n", "ratings": "c"}}, "as ranked does"),
            ({"kind": "rankings", "columns": {"ranked": "r"}}, "nothing says what these are called; map names"),
            ({"kind": "rankings", "columns": {"ranked": "r", "completions": ["a[0]", "b"]}}, "map names"),
            ({"kind": "rankings", "columns": {"ranked": "r", "completions": ["a.text", "b.text"]}}, "map names"),
            ({"kind": "rankings", "columns": {"ranks": "r", "names": "n"}}, "are what ranked has in order"),
            ({"kind": "rankings", "columns": {"ratings": [1, 2]}}, "are for ranks and names"),
            ({"max_completions": 9}, "is for rankings whose completions have a row each"),
            ({"max_completions": 9, "kind": "rankings"}, "have a row each; of a list, completions[:9] takes the first"),
            ({"max_completions": 10, "kind": "rankings", "columns": {"rating": "r"}}, "max_completions: must be"),
            ({"quoting": "none"}, "is for .csv and .tsv files, of which the source names none"),
            ({"source": "x*.jsonl"}, "there is no file x*.jsonl"),
            ({"source": "../*/a.jsonl"}, "../*/a.jsonl leads out of the card's folder"),
        ],
    )  # fmt: skip
    def test_what_does_not_go_together(self, here, change, said):
        """Settings about judgements that contradict each other, or lack one another, in one message."""
        messages = problems({"kind": "preferences", "source": "a.jsonl", **change})
        assert len(messages) == 1 and said in messages[0], messages

    def test_all_at_once(self, here):
        """Faults of different keys come together."""
        assert (
            len(problems({"kind": "prompts", "source": "no.jsonl", "heldout": 2, "x": 1, "columns": {"y": "z"}})) == 4
        )

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "card.md: is empty"),
            ("# Title\n", "card.md:1: a data card begins with front matter"),
            ("---\na: 1\n", "card.md:1: the front matter has no end"),
            ("---\na: 1\n---\n", "card.md:2: the front matter has no block rlhf_kit"),
            ("---\nkind: prompts\nsource: x\n---\n", "indent kind and source below rlhf_kit:"),
            ("---\nrlhf-kit: {}\n---\n", "card.md:2: rlhf-kit: unknown key; did you mean rlhf_kit?"),
            ("---\nrlhf_kit: 3\n---\n", "card.md:2: rlhf_kit: must be a mapping; seen 3"),
            (
                "---\nrlhf_kit: {columns: {prompt: x.y[0]}}\n---\n",
                'put text with [ ] { } or ? in quotes: "x.y[0]"',
            ),
            ("---\nlicense: mit\nrlhf_kit:\n  kind: a: b\n---\n", "card.md:4: not YAML"),
        ],
    )
    def test_front_matter(self, here, text, said):
        """A card without front matter, or without our block in it, is told how one begins."""
        Path("card.md").write_text(text)
        with pytest.raises(InputError) as caught:
            load_card("card.md")
        assert len(caught.value.problems) == 1 and said in str(caught.value)

    def test_hh_columns(self, here):
        """Transcripts have other columns than rows with a prompt."""
        block = {"kind": "demonstrations", "source": "a.jsonl", "format": "hh"}
        assert load_card(write(block)).columns == {"transcript": "chosen"}
        assert "did you mean transcript?" in problems({**block, "columns": {"transcrip": "x"}})[0]
        assert "hh transcripts have no kind text" in problems({**block, "kind": "text"})[0]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_cards_that_ship(path, monkeypatch, tmp_path):
    """They are dataset cards with a licence, a language and prose, and all but the template can be read.

    The files of some are not part of the project; empty ones stand for them here.
    """
    monkeypatch.chdir(ROOT)
    front = yaml.safe_load(path.read_text().split("---\n")[1])
    assert {"pretty_name", "license", "language", "annotations_creators"} <= set(front)
    if path.name == "TEMPLATE.md":
        return
    source = front["rlhf_kit"]["source"]
    if isinstance(source, str) and not (ROOT / source).exists():
        (tmp_path / source).parent.mkdir(parents=True)
        (tmp_path / source.replace("json*", "jsonl").replace("jsonl*", "jsonl")).write_text("")
    assert len(load_card(path, tmp_path).text) > 300


def test_a_data_root_that_is_not_there(here):
    """It is told, not passed over."""
    Path("c.md").write_text("---\nrlhf_kit: {kind: prompts, source: c.jsonl}\n---\n")
    Path("c.jsonl").write_text("")
    load_card("c.md")
    with pytest.raises(InputError, match="nosuch: is no folder"):
        load_card("c.md", "nosuch")


def test_settings_of_a_stage_and_ranges_the_wrong_way_round(here):
    """Each in one message with its line."""
    Path("c.jsonl").write_text("")
    block = "kind: preferences, source: c.jsonl, columns: {first: a, second: b, preferred: p}"
    for more, said in (
        ("truncate: drop", "c.md:2: rlhf_kit.truncate: unknown key; it is a setting of a recipe's stage"),
        ('preferred: {first: "3..1", second: 4}', 'must be ranges from low to high, such as "1..3"'),
    ):
        Path("c.md").write_text(f"---\nrlhf_kit: {{{block}, {more}}}\n---\n")
        with pytest.raises(InputError) as caught:
            load_card("c.md")
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("written", "ends"),
    [("0.5..3", (0.5, 3)), ("-1..-.5", (-1, -0.5)), (".5..1.", (0.5, 1)), ("1.2.3..4", None), ("3", None), (3, None)],
)
def test_ranges(written, ends):
    """Two numbers with two dots between them, however these are written; what is no number is no range."""
    assert range_of(written) == ends


def test_the_templates_examples_are_cards(here):
    """What TEMPLATE.md has behind comment marks can be written as it stands there."""
    lines = (ROOT / "data_cards" / "TEMPLATE.md").read_text().splitlines()
    Path("my_pairs.jsonl").write_text("")
    keys = "columns roles preferred filters votes scale margin_per_point max_completions shared_prompts".split()
    blocks = [line.removeprefix("  # ") for line in lines if line.startswith(tuple(f"  # {key}: " for key in keys))]
    settings = [read_yaml(block, "TEMPLATE.md").value for block in blocks]
    first, ratings, ranks, one_by_one, by_name = (s["columns"] for s in settings if "columns" in s)
    rest = {key: value for s in settings if "columns" not in s for key, value in s.items()}
    common = {
        "source": "my_pairs.jsonl",
        "filters": rest["filters"],
        "roles": rest["roles"],
        "shared_prompts": rest["shared_prompts"],
    }
    pairs = {"preferred": rest["preferred"], "votes": rest["votes"]}
    rated = {"scale": rest["scale"], "margin_per_point": rest["margin_per_point"]}
    for kind, columns, more in (
        ("preferences", first, pairs), ("preferences", ratings, rated), ("rankings", ranks, {}),
        ("rankings", one_by_one, {key: rest[key] for key in ("scale", "max_completions")}), ("rankings", by_name, {}),
    ):  # fmt: skip
        assert load_card(write({"kind": kind, "columns": columns, **common, **more})).mapped == set(columns)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
    | st.sampled_from(["a.jsonl", "prompts", "preferences", "rankings", "text", "majority", "*.jsonl"])
    | st.sampled_from(["a[0].b", "hh", "drop", "a/b", ".", "{a}", "prompt"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["hub", "revision", "split", "where", "prompt", "x"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
KEYS = st.sampled_from(
    "kind source rows format columns roles heldout filters on_problem templates preferred votes scale margin_per_point "
    "max_completions x".split()
)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(change=st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_block_is_a_card_or_wrong_input(here, change):
    """Whatever stands in the block: a card, or InputError with one-line messages, and nothing else."""
    path = write({"kind": "prompts", "source": "a.jsonl", **change})
    try:
        assert isinstance(load_card(path), DataCard)
    except InputError as error:
        assert error.problems and all(line and "\n" not in line for line in error.problems)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text() | st.builds("---\n{}\n---\n".format, st.text()))
def test_any_text_is_a_card_or_wrong_input(here, text):
    """Whatever the file holds: InputError with one-line messages, and nothing else."""
    Path("card.md").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError) as caught:
        load_card("card.md")
    assert all(line and "\n" not in line for line in caught.value.problems)
