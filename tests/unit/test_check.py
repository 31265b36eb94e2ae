"""Check: what is looked at before a model is loaded, and the sizes that the plan derives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from rlhf_kit.check import check_recipe, longest, plan
from rlhf_kit.errors import InputError
from rlhf_kit.examples.rows import Demonstration, Preference, PromptRow
from rlhf_kit.model_folders import ModelFolder, safetensors_header
from rlhf_kit.recipe_reading import load_recipe
from tests.plain import make_workplace, write_jsonl, write_model, write_safetensors

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a recipe without a fault, as the working directory."""
    make_workplace(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(*overrides: str) -> dict[str, str]:
    """Return the plan's lines by their first two words."""
    return {" ".join(line.split()[:2]): line for line in check_recipe(load_recipe("recipe.yaml", overrides))}


def problems(*overrides: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        check_recipe(load_recipe("recipe.yaml", overrides))
    return list(caught.value.problems)


class TestPlan:
    def test_derived_sizes(self, workplace):
        """Steps, completions and minibatches, as worked out by hand."""
        rows = [{"prompt": f"Q{n}?", "completion": "A"} for n in range(50)]
        write_jsonl(workplace / "shown.jsonl", rows)
        write_jsonl(workplace / "held.jsonl", [{"prompt": "other", "completion": "A"}] * 3)
        text = Path("shown.md").read_text().replace("shown.jsonl", "shown.jsonl\n  heldout: held.jsonl")
        Path("shown.md").write_text(text)
        found = lines(
            "stages.sft.batch_size=16", "stages.sft.epochs=2", "stages.reward.max_steps=5", "stages.ppo.updates=10"
        )
        assert "53 rows read, 50 to train on, 3 held out; the longest has 6 tokens" in found["data shown.md:"]
        # 2 x 50 rows in batches of 16: 6.25, so 7 steps, which see 112 rows
        assert found["stage sft:"].endswith("50 rows x 2.24 epochs = 7 optimizer steps of 16 rows")
        assert "= 5 optimizer steps of 16 pairs" in found["stage reward:"]
        # 10 updates of 64; an update is 4 epochs of 2 minibatches of 32
        assert "10 updates x 64 = 640 completions of at most 32 tokens" in found["stage ppo:"]
        assert "4 epochs x 2 minibatches of 32 = 80 optimizer steps" in found["stage ppo:"]
        assert "llama, 0.00102 M parameters, context 128 tokens, weights in float32" in found["base model:"]

    def test_the_rows_come_along(self, workplace):
        """`plan` hands on what it read, by the cards' paths in the recipe."""
        made = plan(load_recipe("recipe.yaml"))
        assert set(made.examples) == {"shown.md", "pairs.md", "asked.md"}
        assert made.lines == check_recipe(load_recipe("recipe.yaml"))

    def test_hub_datasets_are_left_alone(self, workplace, monkeypatch):
        """`check` says what it did not read; `plan`, for `run`, does read it."""
        fetched = []

        def fetch(source):
            fetched.append(str(source))
            yield from ((f"{source}:{n}", {"prompt": f"Q{n}"}) for n in range(20))

        monkeypatch.setattr("rlhf_kit.examples.reading.hub_rows", fetch)
        Path("asked.md").write_text("---\nrlhf_kit: {kind: prompts, source: {hub: a/b, revision: v1}}\n---\n")
        assert "prompts of a/b@v1[train], not fetched by check" in lines()["data asked.md:"]
        assert fetched == []
        assert plan(load_recipe("recipe.yaml")).examples["asked.md"].counts["read"] == 20
        assert fetched == ["a/b@v1[train]"]

    def test_a_hub_base_is_left_alone(self, workplace):
        """A Hub id is said to be one, in case a folder was meant."""
        found = lines("base.model=owner/model")
        assert "from the Hub at main, there being no such folder here" in found["base owner/model"]

    def test_trained_on_what_is_measured(self, workplace):
        """A held-out prompt that another stage learns from is a note."""
        write_jsonl(workplace / "held.jsonl", [{"prompt": "Where is the hat?"}, {"prompt": "unseen"}])
        Path("asked.md").write_text(
            Path("asked.md")
            .read_text()
            .replace("asked.jsonl", "asked.jsonl\n  heldout: held.jsonl\n  shared_prompts: drop")
        )
        Path("shown.md").write_text(Path("shown.md").read_text().replace("shown.jsonl", "shown.jsonl\n  heldout: 0"))
        notes = [line for line in check_recipe(load_recipe("recipe.yaml")) if line.startswith("note")]
        assert "note     1 of the 2 held-out prompts of asked.md are trained on in shown.md" in notes

    def test_watched_on_the_closing_tables_prompts(self, workplace):
        """Ten are held out and eight watched: a table of two has none of them, one of three has one."""
        write_jsonl(workplace / "held.jsonl", [{"prompt": f"Where is hat {number}?"} for number in range(10)])
        asked = Path("asked.md")
        asked.write_text(asked.read_text().replace("asked.jsonl", "asked.jsonl\n  heldout: held.jsonl"))
        for shown, shared in ((2, []), (3, ["1"]), (10, ["8"]), (300, ["8"])):
            settings = ["stages.ppo.watch={count: 8}", f"evaluation.count={shown}"]
            notes = [line for line in check_recipe(load_recipe("recipe.yaml", settings)) if "stages.ppo.watch" in line]
            assert [note.partition(" share ")[2].partition(" of the 10 ")[0] for note in notes] == shared

    def test_it_imports_nothing_heavy(self, workplace):
        """Neither torch, transformers, datasets nor pandas is loaded, so that the answer comes at once."""
        code = (
            "import sys\nfrom rlhf_kit.check import check_recipe\nfrom rlhf_kit.recipe_reading import load_recipe\n"
            "check_recipe(load_recipe('recipe.yaml'))\n"
            "print([name for name in ('torch', 'transformers', 'datasets', 'pandas', 'numpy') if name in sys.modules])"
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert result.stdout == "[]\n", result.stderr


class TestLengths:
    def test_longest(self, workplace):
        """The longest row in tokens, of a pair the longer side; and every row beyond the room, shortest first."""
        tokenizer = ModelFolder(Path("model")).tokenizer
        rows = [
            PromptRow("x" * 5, "f:1"),
            PromptRow([{"role": "user", "content": "x" * 9}, {"role": "user", "content": "y"}], "f:2"),
            Preference("x", "y", "z" * 7, "f:3"),
            Demonstration("x" * 6, "y" * 6, "f:4"),
        ]
        assert longest(rows, tokenizer, None) == (12, [])
        assert longest(rows, tokenizer, 8) == (12, [("f:2", 10), ("f:4", 12)])
        assert longest([], tokenizer, 8) == (0, [])

    def test_every_row_beyond_the_room_is_counted(self, workplace):
        """Not only those that are measured to find the longest."""
        rows = [PromptRow("x" * 10, f"f:{n}") for n in range(300)]
        assert len(longest(rows, ModelFolder(Path("model")).tokenizer, 9)[1]) == 300

    def test_truncate_makes_them_welcome(self, workplace):
        """Long prompts are an error only where nothing is said of what becomes of them."""
        write_jsonl(workplace / "asked.jsonl", [{"prompt": "x" * 200}, {"prompt": "Where?"}])
        assert len(problems()) == 1
        for truncate, becomes in (("drop", "they are left out"), ("left_prompt", "are cut from the left")):
            (note,) = [line for line in lines(f"stages.ppo.truncate={truncate}").values() if "are longer than" in line]
            assert "at least 1 of 2 rows of asked.md" in note and becomes in note
        write_jsonl(workplace / "asked.jsonl", [{"prompt": letter * 200} for letter in "abcdefgh"])
        (message,) = problems("stages.ppo.truncate=drop")
        assert "so truncate: drop leaves none" in message

    def test_refused_special_tokens(self, workplace):
        """Rows that spell a special token of the base are told where their card refuses it, and only there."""
        write_jsonl(workplace / "asked.jsonl", [{"prompt": f"Where {n}? </s>"} for n in range(8)])
        tokenizer = Tokenizer.from_file("model/tokenizer.json")
        tokenizer.add_special_tokens(["</s>"])
        tokenizer.save("model/tokenizer.json")
        lines()
        card = Path("asked.md").read_text().replace("kind: prompts", "kind: prompts\n  special_tokens: refuse")
        Path("asked.md").write_text(card)
        (message,) = problems()
        assert message.startswith("asked.md: 8 of 8 rows spell special tokens of the model: asked.jsonl:")

    def test_evaluation_prompts(self, workplace):
        """Another card to measure on must fit as well, with its own number of new tokens."""
        write_jsonl(workplace / "long.jsonl", [{"prompt": f"{n}" + "x" * 60} for n in range(8)])
        Path("long.md").write_text(Path("asked.md").read_text().replace("asked", "long"))
        lines("evaluation.prompts=long.md")
        (message,) = problems("evaluation.prompts=long.md", "evaluation.max_new_tokens=100")
        assert message.startswith(
            "--set evaluation.prompts=long.md: evaluation.prompts: at least 8 of 8 rows of long.md"
        )

    def test_no_room_for_a_prompt(self, workplace):
        """More new tokens than the base reads, of a stage and of an evaluation on a card of its own."""
        said = "max_new_tokens 128 leaves no room for a prompt in the context of 128"
        (message,) = problems("stages.ppo.max_new_tokens=128")
        assert said in message
        (message,) = problems("evaluation.prompts=asked.md", "evaluation.max_new_tokens=128")
        assert message.endswith(said) and "evaluation.prompts" in message

    def test_max_length_beyond_the_context(self, workplace):
        """Rows cannot be longer than what the model reads."""
        (message,) = problems("stages.sft.max_length=129")
        assert message == "recipe.yaml:5: stages.sft.max_length: 129 is more than the base's context of 128 tokens"
        lines("stages.sft.max_length=128")


class TestModelFolder:
    def test_shards(self, workplace):
        """Every file that the index names must be there, whole, and in the folder."""
        model = Path("model")
        (model / "model.safetensors").unlink()
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        (model / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": dict(zip("ab", names, strict=True))})
        )
        write_safetensors(model / names[0], a=(3, 4))
        assert problems()[0].endswith(
            f"model has no {names[1]}, which model.safetensors.index.json names; get it again"
        )
        write_safetensors(model / names[1], b=(5,))
        lines()
        assert ModelFolder(model).parameters == 17
        (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../up.safetensors"}}')
        assert "names '../up.safetensors', which is no file of the folder" in problems()[0]

    def test_headers(self, workplace):
        """A weights file says itself how long it should be."""
        path = Path("w.safetensors")
        write_safetensors(path, a=(2, 3), b=())
        assert {name: tensor["shape"] for name, tensor in safetensors_header(path).items()} == {"a": [2, 3], "b": []}
        whole = path.read_bytes()
        for content, said in (
            (whole[:-1], "it is cut off"),
            (whole + b"x", "it is cut off"),
            (whole[:20], "is not a safetensors file"),
            (b"", "is not a safetensors file"),
            (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
            ((4).to_bytes(8, "little") + b"[1] ", "is not a safetensors file"),
        ):
            path.write_bytes(content)
            with pytest.raises(InputError, match=said):
                safetensors_header(path)

    def test_what_is_loaded_makes_the_model(self, tmp_path):
        """Another place, README, format of the weights or untrusted code leave it the same; each file loaded counts."""
        one, two = write_model(tmp_path / "one"), write_model(tmp_path / "two")
        (one / "README.md").write_text("x")
        (one / "model.fp16.safetensors").write_bytes(b"x")
        (one / "modeling.py").write_text("x")
        assert ModelFolder(one).sha256 == ModelFolder(two).sha256
        seen = {ModelFolder(one).sha256, ModelFolder(one, trust_remote_code=True).sha256}
        for name in ("model.safetensors", "config.json", "tokenizer.json", "merges.txt", "chat_template.jinja"):
            (one / name).write_bytes(b"x")
            seen.add(ModelFolder(one).sha256)
        (one / "model.safetensors").unlink()
        (one / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
        for content in (b"x", b"y"):
            (one / "model-1.safetensors").write_bytes(content)
            seen.add(ModelFolder(one).sha256)
        assert len(seen) == 9

    def test_all_that_is_wrong(self, tmp_path):
        """Broken weights and a missing tokenizer are told together."""
        model = write_model(tmp_path / "m")
        (model / "tokenizer.json").unlink()
        (model / "model.safetensors").write_bytes(b"x")
        assert len(ModelFolder(model).problems()) == 2

    @pytest.mark.parametrize(
        ("file", "content", "said"),
        [
            ("config.json", "{", "config.json is not JSON"),
            ("config.json", "[]", "config.json does not hold an object"),
            ("config.json", '{"is_encoder_decoder": true, "model_type": "t5"}', "t5 is an encoder-decoder"),
            ("tokenizer.json", "{}", "tokenizer.json is not a tokenizer"),
        ],
    )
    def test_broken_files(self, workplace, file, content, said):
        """Each is named."""
        (workplace / "model" / file).write_text(content)
        (message,) = problems()
        assert message.startswith("recipe.yaml:3: base.model: ") and said in message


def test_what_watch_and_ptx_need(workplace):
    """Held-out prompts, a card of texts, a module that is there and a whole model are asked for before anything runs;
    a gold stage comes before its ppo stage, and is one that it depends on."""
    (said,) = problems("stages.ppo.watch={}")
    assert "prompts out, and 8 are the least that say something" in said
    (said,) = problems("stages.ppo.ptx={data: pairs.md}")
    assert "stages.ppo.ptx.data: needs a card of text or demonstrations; pairs.md has preferences" in said
    found = problems("stages.ppo.watch={gold: 'nowhere_at_all:f'}")
    assert any("stages.ppo.watch.gold: there is no module nowhere_at_all" in one for one in found)
    (workplace / "half").mkdir()
    assert any("stages.ppo.watch.gold: half" in one for one in problems("stages.ppo.watch={gold: half}"))
    text = Path("recipe.yaml").read_text().replace("  ppo:", "  judge:\n    kind: reward\n    data: pairs.md\n  ppo:")
    Path("recipe.yaml").write_text(text)
    recipe = load_recipe("recipe.yaml", ["stages.ppo.watch={gold: judge}"])
    assert recipe.depends_on("ppo") == ["sft", "reward", "judge"]


def test_a_reward_model_in_a_folder(workplace):
    """It is looked at like the base."""
    write_model(workplace / "judge")
    lines("stages.ppo.reward=judge")
    (workplace / "judge" / "config.json").unlink()
    assert "stages.ppo.reward: judge has no config.json" in problems("stages.ppo.reward=judge")[0]


def test_functions_are_looked_for(workplace):
    """A module of the working directory is found without being run; one that is nowhere is an error."""
    Path("mine.py").write_text("raise SystemExit('imported')")
    lines("stages.ppo.reward=mine:score", "evaluation.gold=mine.inner:gold")
    assert len(problems("stages.ppo.reward=not_mine_at_all:score", "evaluation.gold=nor_this:gold")) == 2
