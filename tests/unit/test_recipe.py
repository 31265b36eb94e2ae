"""The recipe: what it means when it is right, and what is said when it is not."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rlhf_kit.errors import InputError
from rlhf_kit.marked_yaml import read_yaml, write_yaml
from rlhf_kit.recipe import Recipe, recipe_schema, resolved_yaml
from rlhf_kit.recipe_reading import load_recipe, written_recipe
from tests.faults.bad_inputs import mutated
from tests.plain import RECIPE, make_workplace

FULL = """\
name: full
seed: 3
data_root: data
base: {model: model, revision: main, quantization: 8bit, dtype: bfloat16, chat_template: chat.jinja}
adapter: {r: 4, alpha: 8, dropout: 0.1, target_modules: [q_proj, v_proj]}
stages:
  sft: {kind: sft, data: shown.md, epochs: 2, max_steps: 9, schedule: linear, max_length: 99, truncate: drop}
  again: {kind: sft, init: sft, data: shown.md}
  reward: {kind: reward, init: again, data: pairs.md, normalize_on: shown.md, center_coef: 0.01}
  ppo:
    {kind: ppo, policy: again, reward: reward, prompts: asked.md, kl_coef: 1e-2, kl_target: 6, value: trunk,
     missing_eos_penalty: 1, score_clip: 5, kl_budget: 9, checkpoint_every: {updates: 5, minutes: null}}
  more: {kind: ppo, policy: ppo, reward: my.module:score, prompts: asked.md, kl_coef: 0}
evaluation: {prompts: asked.md, count: 8, gold: a.b:c}
publish: {repo: me/mine, private: false}
trackers: [tensorboard]
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a recipe, cards, a checkpoint, as the working directory."""
    make_workplace(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "chat.jinja").write_text("")
    (tmp_path / "full.yaml").write_text(FULL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problems(*overrides: str, path: str = "recipe.yaml") -> list[str]:
    with pytest.raises(InputError) as caught:
        load_recipe(path, overrides)
    return list(caught.value.problems)


class TestReading:
    def test_what_is_written_is_what_is_there(self, workplace):
        """Every value arrives with its type; numbers such as 1e-2 are numbers."""
        recipe = load_recipe("full.yaml")
        assert (recipe.name, recipe.seed, recipe.data_root) == ("full", 3, "data")
        assert (recipe.base.quantization, recipe.adapter.target_modules) == ("8bit", ["q_proj", "v_proj"])
        ppo = recipe.stages["ppo"]
        assert (ppo.kl_coef, ppo.kl_target, ppo.checkpoint_every.updates, ppo.checkpoint_every.minutes) == (
            0.01,
            6,
            5,
            None,
        )
        assert list(recipe.stages) == ["sft", "again", "reward", "ppo", "more"]

    def test_what_must_be_decided_has_no_default(self, workplace):
        """Base, data, policy, reward, prompts and KL coefficient are asked for by name."""
        Path("recipe.yaml").write_text(
            "name: x\nbase: {}\nstages:\n  a: {kind: sft}\n  b: {kind: reward}\n  c: {kind: ppo}\n"
        )
        missing = [line.split(": ")[1] for line in problems() if "missing" in line]
        assert missing == [
            "base.model", "stages.a.data", "stages.b.data",
            "stages.c.policy", "stages.c.reward", "stages.c.prompts", "stages.c.kl_coef",
        ]  # fmt: skip

    def test_sections_whose_every_key_is_commented_out(self, workplace):
        """`adapter:` with nothing behind it means its defaults, as does `checkpoint_every:`."""
        text = RECIPE.replace("stages:", "adapter:\nevaluation:\nstages:") + "    checkpoint_every:\n"
        Path("recipe.yaml").write_text(text)
        recipe = load_recipe("recipe.yaml")
        assert (recipe.adapter.r, recipe.evaluation.count, recipe.stages["ppo"].checkpoint_every.updates) == (
            16,
            256,
            20,
        )

    def test_it_cannot_be_changed(self, workplace):
        """A recipe is frozen."""
        with pytest.raises(ValueError, match="frozen"):
            load_recipe("recipe.yaml").seed = 3

    def test_depends_on(self, workplace):
        """A stage builds on the earlier stages that its fields name, and on no card or function."""
        recipe = load_recipe("full.yaml")
        assert [recipe.depends_on(name) for name in recipe.stages] == [
            [],
            ["sft"],
            ["again"],
            ["again", "reward"],
            ["ppo"],
        ]
        assert recipe.reward_source("ppo") == "stage" and recipe.reward_source("more") == "function"

    def test_where(self, workplace):
        """Any setting can be traced to its line, or to the override that it came from."""
        recipe = load_recipe("recipe.yaml", ["seed=4"])
        assert recipe.where("stages.ppo.kl_coef") == "recipe.yaml:17: stages.ppo.kl_coef"
        assert recipe.where("stages.ppo.updates") == "recipe.yaml:12: stages.ppo.updates"
        assert recipe.where("seed") == "--set seed=4: seed"

    def test_the_schema_holds_the_help(self):
        """Editors get every field with its explanation."""
        schema = recipe_schema()
        assert "nat of KL" in schema["$defs"]["PPOStage"]["properties"]["kl_coef"]["description"]
        assert set(schema["required"]) == {"name", "base", "stages"}
        json.dumps(schema)


class TestResolved:
    @pytest.mark.parametrize("name", ["recipe.yaml", "full.yaml"])
    def test_it_loads_to_the_same_recipe(self, workplace, name):
        """With every default written out it is the same recipe, also from another folder, and resolves to itself."""
        recipe = load_recipe(name)
        (workplace / "runs").mkdir()
        (workplace / "runs" / "resolved.yaml").write_text(resolved_yaml(recipe))
        again = load_recipe("runs/resolved.yaml")
        assert again == recipe
        assert resolved_yaml(again) == resolved_yaml(recipe)

    def test_every_field_is_written(self, workplace):
        """No default is left unsaid."""
        content = read_yaml(resolved_yaml(load_recipe("recipe.yaml")), "resolved").value
        assert set(content) == set(Recipe.model_fields)
        assert content["stages"]["ppo"]["lam"] == 0.95 and content["base"]["revision"] == "main"

    def test_it_can_be_read_when_the_files_are_gone(self, workplace):
        """What a run wrote down is still a recipe after its cards and base have moved; loading it to run it is not."""
        recipe = load_recipe("recipe.yaml")
        Path("resolved.yaml").write_text(resolved_yaml(recipe))
        Path("asked.md").unlink()
        Path("model").rename("elsewhere")
        assert written_recipe("resolved.yaml") == recipe
        assert len(problems(path="resolved.yaml")) == 2


class TestPaths:
    def test_beside_the_recipe_first_then_here(self, workplace, monkeypatch):
        """Paths are looked for in the recipe's folder, then in the working directory, and open from the latter."""
        inner = workplace / "recipes"
        inner.mkdir()
        (inner / "asked.md").write_text("another card")
        (inner / "recipe.yaml").write_text(RECIPE)
        recipe = load_recipe("recipes/recipe.yaml")
        assert recipe.stages["ppo"].prompts == "recipes/asked.md"
        assert recipe.stages["sft"].data == "shown.md"
        monkeypatch.chdir(inner)
        (inner / "recipe.yaml").write_text(
            RECIPE.replace(": model\n", ": ../model\n").replace("shown", "../shown").replace("pairs", "../pairs")
        )
        recipe = load_recipe("recipe.yaml")
        assert recipe.stages["sft"].data == str(workplace / "shown.md")  # outside the working directory: absolute
        assert recipe.is_local_base

    def test_a_hub_id_stays(self, workplace):
        """owner/name with no such folder is a Hub id; anything else that is not there is an error."""
        recipe = load_recipe("recipe.yaml", ["base.model=owner/name"])
        assert recipe.base.model == "owner/name" and not recipe.is_local_base
        for model in ("./model2", "a/b/c", "/nowhere/model", "gpt2", "../x", "owner/", "$HOME/model"):
            (message,) = problems(f"base.model={model}")
            assert "base.model: there is no model folder" in message

    def test_reward_models(self, workplace):
        """`reward` may be a folder or a Hub id as well as a stage; any other word is taken for a stage."""
        recipe = load_recipe("recipe.yaml", ["stages.ppo.reward=model"])
        assert recipe.stages["ppo"].reward == "model" and recipe.reward_source("ppo") == "model"
        assert load_recipe("recipe.yaml", ["stages.ppo.reward=a/b"]).reward_source("ppo") == "model"
        assert problems("stages.ppo.reward=reword")[0].endswith("there is no stage reword; did you mean reward?")

    def test_a_reward_server_is_named_by_its_address(self, workplace):
        """It stays as it is written; a folder or a stage of that name is not looked for."""
        for address in (
            "http://127.0.0.1:8000",
            "http://localhost:8000/",
            "https://rm.example.org/small",
            "http://[::1]:1",
        ):
            recipe = load_recipe("recipe.yaml", [f"stages.ppo.reward={address}"])
            assert recipe.stages["ppo"].reward == address and recipe.reward_source("ppo") == "server"
            assert recipe.depends_on("ppo") == ["sft"]

    @pytest.mark.parametrize(
        ("address", "told"),
        [
            ("https://me:hunter2@rm.example.org", "has a user or a password in it"),
            ("http://me:hunter2/@rm.example.org", "has a user or a password in it"),
            ("https://rm.example.org/?key=hunter2", "is no address of a reward server"),
            ("ftp://127.0.0.1:8000", "http:// or https://, a host, and :port"),
            ("http://:8000", "http:// or https://, a host, and :port"),
            ("http://127.0.0.1:80000", "Port out of range"),
            ("http://127.0.0.1:http", "Port could not be cast"),
            ("127.0.0.1:8000", "the address of a reward server is http://127.0.0.1:8000"),
        ],
    )
    def test_what_is_no_address_of_a_reward_server(self, workplace, address, told):
        """One message, which repeats no secret."""
        (message,) = problems(f"stages.ppo.reward='{address}'")
        assert "stages.ppo.reward: " in message and told in message
        assert "hunter2" not in message.partition("stages.ppo.reward: ")[2]

    def test_remote_code_needs_a_commit(self, workplace):
        """Code from the Hub runs only at a commit that cannot change; a local folder needs none."""
        assert load_recipe("recipe.yaml", ["base.trust_remote_code=true"]).base.trust_remote_code
        (message,) = problems("base.model=a/b", "base.trust_remote_code=true")
        assert "commit of 40 hex digits; seen main" in message
        (message,) = problems("base.model=a/b", "base.trust_remote_code=true", f"base.revision='{41 * '0'}'")
        assert "commit of 40 hex digits" in message
        commit = "0123456789abcdef0123456789abcdef01234567"
        assert load_recipe(
            "recipe.yaml", ["base.model=a/b", "base.trust_remote_code=true", f"base.revision='{commit}'"]
        )


class TestChain:
    @pytest.mark.parametrize(
        ("override", "said"),
        [
            ("stages.reward.init=ppo", "stages.reward.init: stage ppo comes later in the file"),
            ("stages.sft.init=sft", "stages.sft.init: a stage cannot build on itself"),
            ("stages.sft.init=reward", "stages.sft.init: stage reward comes later in the file"),
            ("stages.ppo.policy=reward", "must name a stage of kind sft, ppo, "),
            ("stages.ppo.policy=reward", "; reward is of kind reward"),
            ("stages.ppo.reward=sft", "must name a stage of kind reward; sft is of kind sft"),
            ("stages.ppo.watch={gold: sft}", "must name a stage of kind reward; sft is of kind sft"),
            ("stages.ppo.watch={gold: rewrd}", "there is no stage rewrd; did you mean reward?"),
            ("stages.reward.init=sfft", "there is no stage sfft; did you mean sft?"),
        ],
    )
    def test_stages_name_earlier_stages_of_the_right_kind(self, workplace, override, said):
        """Any other reference is an error that says what it refers to."""
        (message,) = problems(override)
        assert message.startswith(f"--set {override}: ") and said in message

    def test_the_order_is_that_of_the_file(self, workplace):
        """The same stages in another order are a chain or not."""
        head, sft, reward, ppo = re.split("  (?=sft:\n|reward:\n|ppo:\n)", RECIPE)
        Path("recipe.yaml").write_text("  ".join([head, reward, sft, ppo]))
        assert problems() == [
            "recipe.yaml:7: stages.reward.init: stage sft comes later in the file; a stage builds on earlier ones only"
        ]


class TestOverrides:
    def test_they_are_yaml(self, workplace):
        """The value is read as in the file: numbers, lists, null, text."""
        recipe = load_recipe(
            "recipe.yaml",
            ["stages.ppo.kl_coef=1e-3", "trackers=[tensorboard]", "stages.ppo.score_clip=2", "evaluation={count: 5}",
             "name=no", "stages.reward.init="],
        )  # fmt: skip
        ppo = recipe.stages["ppo"]
        assert (ppo.kl_coef, recipe.trackers, ppo.score_clip, recipe.evaluation.count) == (
            0.001,
            ["tensorboard"],
            2.0,
            5,
        )
        assert recipe.name == "no" and recipe.stages["reward"].init is None

    def test_a_mapping_is_replaced_as_a_whole(self, workplace):
        """What stood in the file below the key is gone, also from the messages."""
        (message,) = problems("base={model: nowhere, revision: x}")
        assert message.startswith("--set base={model: nowhere, revision: x}: base.model: there is no model folder")

    def test_the_last_wins(self, workplace):
        """An override of the same key later on the command line replaces it."""
        assert load_recipe("recipe.yaml", ["seed=1", "seed=2"]).seed == 2

    @pytest.mark.parametrize(
        ("override", "said"),
        [
            ("seed", "write a key path, =, and a value"),
            ("=3", "write a key path, =, and a value"),
            ("stages..x=3", "write a key path, =, and a value"),
            ("name.first=3", 'name is "plain", not a mapping'),
            ("seed=[", "not YAML"),
            ("stages.ppo.kl_coeff=3", "unknown key; did you mean kl_coef?"),
        ],
    )
    def test_wrong_ones(self, workplace, override, said):
        """The message begins with the override itself."""
        (message,) = problems(override)
        assert message.startswith(f"--set {override}") and said in message


class TestMessages:
    @pytest.mark.parametrize(
        ("override", "said"),
        [
            ("seed=-1", "must be at least 0; seen -1"),
            ("seed=1.0", "must be a whole number; seen 1.0; write 1"),
            ("seed='1'", 'must be a whole number; seen "1"; write it without quotes'),
            ("seed=true", "must be a whole number; seen true"),
            ("base.quantization=8", "must be none, 8bit or 4bit; seen 8"),
            ("base.dtype=bf16", 'seen "bf16"; did you mean bfloat16?'),
            ("base.trust_remote_code=yes", 'must be true or false; seen "yes"; write true'),
            ("base.revision=123", 'must be text; seen 123; in quotes it is text: "123"'),
            ("base.model=", "base.model: must be text; seen nothing"),
            ("stages.ppo.kl_target=none", "for none at all write null"),
            ("stages.ppo.score_clip=.nan", "must be a finite number; seen .nan"),
            ("stages.ppo.score_clip=.inf", "must be a finite number; seen .inf"),
            ("stages.sft.learning_rate=2", "must be at most 1; seen 2"),
            ("stages.ppo.minibatches=7", "batch_size 64 is not a multiple of minibatches 7"),
            ("stages.ppo.guard={}", "judges what watch sees, and there is no watch"),
            ("stages.ppo.watch={gold: reward}", "is what the policy is trained on (reward); name another scorer"),
            ("stages.ppo.watch={count: 7}", "must be at least 8; seen 7"),
            ("stages.ppo.watch={evry: 2}", "stages.ppo.watch.evry: unknown key; did you mean every?"),
            ("stages.ppo.watch={gold: ./none}", "there is no model folder ./none"),
            ("stages.ppo.ptx={}", "stages.ppo.ptx.data: missing, and has no default"),
            ("stages.ppo.ptx={data: shown}", "there is no data card shown; did you mean shown.md"),
            ("stages.ppo.ptx={data: shown.md, coef: 0}", "must be more than 0; seen 0"),
            ("stages.ppo.value_epochs=9", "must be at most epochs, which is 4; seen 9"),
            ("stages.sft.kl_coef=1", "unknown key; it belongs to stages.<ppo stage>.kl_coef"),
            ("stages.sft.seed=1", "unknown key; it belongs to the top level, as seed"),
            ("load_in_8bit=true", "unknown key; here it is base.quantization: 8bit"),
            ("stages.sft.num_train_epochs=1", "unknown key; here it is epochs"),
            ("stages.base={kind: sft, data: shown.md}", "a stage is named with letters, digits, _ and -, and not base"),
            ("stages.sft.data=shown", "there is no data card shown; did you mean shown.md"),
            ("stages.sft.data=model", "model is a folder, not a data card"),
            ("adapter.target_modules=[]", "must be text or a list of texts, none empty; seen a list"),
            ("adapter=3", "must be a mapping; seen 3"),
            ("stages=[]", "must be a mapping; seen a list"),
            ("stages={}", "must be given: at least one"),
            ("trackers=tensorboard", 'must be a list; seen "tensorboard"'),
            ("trackers=[wandb, wandb]", "names a tracker twice"),
            ("evaluation.gold=a.b.c", 'must be a function, written package.module:function; seen "a.b.c"'),
            ("publish={repo: mine}", 'must be owner/name on the Hub; seen "mine"'),
            ("name=a b", 'seen "a b"'),
            ("name=../up", 'seen "../up"'),
        ],
    )
    def test_expected_seen_and_what_would_work(self, workplace, override, said):
        """One message, with what was seen as it was written."""
        messages = [message for message in problems(override) if "there is no stage" not in message]
        assert len(messages) == 1 and said in messages[0], messages

    def test_a_misspelt_required_key_is_one_problem(self, workplace):
        """The unknown key is reported, and not a second time as missing."""
        Path("recipe.yaml").write_text(RECIPE.replace("kl_coef", "kl_coeff"))
        assert problems() == ["recipe.yaml:17: stages.ppo.kl_coeff: unknown key; did you mean kl_coef?"]


class TestYaml:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("1e-5", 1e-5), ("1E5", 1e5), (".5", 0.5), ("-3", -3), ("10_000", 10_000), ("1.", 1.0), ("0x1f", "0x1f"),
            ("no", "no"), ("on", "on"), ("True", True), ("~", None), ("", None), ("12:30", "12:30"), ("1.2.3", "1.2.3"),
            ("2026-01-01", "2026-01-01"), ("'1'", "1"), ("[1, a]", [1, "a"]), ("e5", "e5"), ("1e", "1e"),
        ],
    )  # fmt: skip
    def test_scalars(self, text, value):
        """Numbers are numbers, and what YAML 1.1 makes of no, on and 12:30 is text."""
        read = read_yaml(f"a: {text}", "x").value["a"]
        assert read == value and type(read) is type(value)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("a: &x 1\nb: *x", ["x:1: &x is an anchor", "x:2: *x is an alias"]),
            ("a: 1\nb: 2\na: 3", ["x:3: a: written twice, first on line 1"]),
            ("a: {b: 1, b: 2}\nc: 1\nc: 2", ["x:1: a.b: written twice", "x:3: c: written twice"]),
            ("a: !!python/object:os.system x", ["x:1: !!python/object:os.system is a tag"]),
            ("a: *.jsonl", ["x:1: not YAML", ]),
            ("a:\n\tb: 1", ["x:2: not YAML"]),
            ("a: 1\n---\nb: 1", ["x:2: not YAML"]),
            ("a: \x07", ["x:1: the character '\\x07'"]),
            ("? [1]\n: 2", ["x:1: a key must be a word"]),
            ("[" * 99, ["x:1: nested more than 16 deep"]),
        ],
    )  # fmt: skip
    def test_what_is_refused(self, text, said):
        """Surprises of YAML are errors, each with its line, all of a kind together."""
        with pytest.raises(InputError) as caught:
            read_yaml(text, "x")
        assert len(caught.value.problems) == len(said)
        for problem, start in zip(caught.value.problems, said, strict=True):
            assert problem.startswith(start)

    def test_lines_count_from_where_the_document_begins(self):
        """Of front matter the lines are those of the whole file."""
        assert read_yaml("a: 1\nb: 2", "x", first_line=5).lines[("b",)] == 6


# ---------------------------------------------------------------- whatever anybody writes

anything = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def recipe_or_problems(path: Path, *overrides: str) -> None:
    """Loading gives a recipe that resolves to itself, or problems that are each one line."""
    try:
        recipe = load_recipe(path, overrides)
    except InputError as error:
        assert error.problems and all(problem and "\n" not in problem for problem in error.problems)
        assert len(set(error.problems)) == len(error.problems)
        return
    Path("again.yaml").write_text(resolved_yaml(recipe))
    assert load_recipe("again.yaml") == recipe


@anything
@given(text=mutated(FULL))
def test_a_broken_recipe_is_a_recipe_or_wrong_input(workplace, text):
    """Whatever is replaced, removed or renamed: a recipe, or InputError, and nothing else."""
    Path("broken.yaml").write_text(text)
    recipe_or_problems(Path("broken.yaml"))


@anything
@given(start=st.integers(0, len(RECIPE)), length=st.integers(0, 20), text=st.text(max_size=10))
def test_a_slip_of_the_keyboard_is_a_recipe_or_wrong_input(workplace, start, length, text):
    """Any piece of the text replaced by any other: a recipe, or InputError, and nothing else."""
    Path("broken.yaml").write_bytes((RECIPE[:start] + text + RECIPE[start + length :]).encode("utf-8", "surrogatepass"))
    recipe_or_problems(Path("broken.yaml"))


@anything
@given(
    override=st.text(max_size=30)
    | st.builds(
        "{}={}".format, st.sampled_from(["seed", "stages.ppo.lam", "base.model", "stages", "a.b"]), st.text(max_size=12)
    )
)
@example(override="base.model=~nobody")
def test_any_override_is_taken_or_wrong_input(workplace, override):
    """Whatever stands behind --set: a recipe, or InputError, and nothing else."""
    recipe_or_problems(Path("recipe.yaml"), override)


@settings(max_examples=300, deadline=None)
@given(
    value=st.dictionaries(
        st.text(), st.text() | st.floats(allow_nan=False) | st.integers(-(10**20), 10**20) | st.none() | st.booleans()
    )
)
def test_what_is_written_reads_back(value):
    """Any text and number comes back from YAML as what it was, whatever it looks like."""
    try:
        read = read_yaml(write_yaml(value), "x").value
    except InputError as error:
        pytest.fail(f"{value!r}: {error}")
    assert read == value
    assert all(type(read[key]) is type(value[key]) and math.copysign(1, read[key]) == math.copysign(1, value[key])
               for key in value if isinstance(value[key], float))  # fmt: skip
