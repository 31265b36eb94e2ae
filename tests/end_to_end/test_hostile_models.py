"""Model folders that were made to do harm: through the command line, one message, exit code 2, nothing written.

Each is the folder of tests/plain.py with one thing in it that a library would have followed, loaded or run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_kit import models
from rlhf_kit.errors import InputError
from rlhf_kit.model_folders import ModelFolder, check_adapter, opened
from rlhf_kit.recipe_reading import load_recipe
from rlhf_kit.scorers import ClassifierScorer
from tests import tiny
from tests.end_to_end.chain import ROOT, write_chain
from tests.end_to_end.test_bad_input import Fault, call, everything_in, workplace  # noqa: F401  (a fixture)
from tests.plain import write_model, write_safetensors

AT = "recipe.yaml:3: base.model: model"


def setting(file: str, **values: Any) -> Callable[[Path], None]:
    """Add keys to a JSON file of the model."""

    def make(folder: Path) -> None:
        path = folder / "model" / file
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | values))

    return make


def index(**weight_map: str) -> Callable[[Path], None]:
    """Put an index of shards in place of the weights."""

    def make(folder: Path) -> None:
        model = folder / "model"
        (model / "model.safetensors").rename(model / "model-1.safetensors")
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
        setting("model.safetensors.index.json", weight_map={"a": "model-1.safetensors", **weight_map})(folder)
        write_safetensors(folder / "up.safetensors", b=(3,))

    return make


def link(name: str, target: str) -> Callable[[Path], None]:
    """Put a link in place of a file of the model; its target is named from the work place."""

    def make(folder: Path) -> None:
        path = folder / "model" / name
        if path.exists():
            path.rename(folder / "outside")
        path.symlink_to(folder / target)

    return make


HOSTILE = [
    Fault("link out of the folder", link("model.safetensors", "outside"), (f"{AT}/model.safetensors is a link out",)),
    Fault("link to a secret", link("merges.txt", "recipe.yaml"), (f"{AT}/merges.txt is a link out of its folder",)),
    Fault("link to nothing", link("vocab.txt", "nowhere"), (f"{AT}/vocab.txt is a link to nothing",)),
    Fault("pipe", lambda folder: os.mkfifo(folder / "model" / "vocab.json"), (f"{AT}/vocab.json is neither a file",)),
    Fault("index climbs", index(b="../up.safetensors"), ("names '../up.safetensors', which is no file of the folder",)),
    Fault("index absolute", index(b="/etc/hostname"), ("names '/etc/hostname', which is no file of the folder",)),
    Fault("index of folders", index(b="inner/up.safetensors"), ("names 'inner/up.safetensors'",)),
    Fault("shard missing", index(b="model-2.safetensors"), (f"{AT} has no model-2.safetensors", "get it again")),
    Fault(
        "vocabulary elsewhere",
        setting("tokenizer_config.json", tokenizer_class="BertTokenizer", vocab="/etc/hostname"),
        ('sets vocab to a path ("/etc/hostname"); a tokenizer is read from its own folder only',),
    ),
    Fault("merges elsewhere", setting("tokenizer_config.json", merges="hostname"), ("sets merges to a path",)),
    Fault(
        "vocabulary file elsewhere",
        setting("tokenizer_config.json", vocab_file="../recipe.yaml"),
        ("sets vocab_file to a path",),
    ),
    Fault(
        "merges file elsewhere", setting("tokenizer_config.json", merges_file="/a/b"), ("sets merges_file to a path",)
    ),
    Fault(
        "tokenizer file elsewhere",
        setting("tokenizer_config.json", tokenizer_file="/a/tokenizer.json"),
        ("sets tokenizer_file to a path",),
    ),
    Fault("gguf", setting("tokenizer_config.json", gguf_file="x.gguf"), ("sets gguf_file to a path",)),
    Fault(
        "path among the special tokens", setting("special_tokens_map.json", vocab="/etc/hostname"), ("sets vocab to",)
    ),
    Fault("positional path", setting("tokenizer_config.json", init_inputs=["/etc/hostname"]), ("init_inputs hands",)),
    Fault(
        "other tokenizer files",
        setting("tokenizer_config.json", fast_tokenizer_files=["../../tokenizer.4.0.0.json"]),
        ("fast_tokenizer_files must be names of files in the folder",),
    ),
    Fault(
        "code of the tokenizer",
        setting("tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Mine", None]}),
        ("auto_map, which runs only with base.trust_remote_code",),
    ),
    Fault(
        "code of another repository",
        setting("config.json", auto_map={"AutoModelForCausalLM": "other/repo--mine.Mine"}),
        ("names code of another repository in auto_map, which no revision pins",),
        settings=("base.trust_remote_code=true",),
    ),
    Fault(
        "kernel from the Hub",
        setting("config.json", attn_implementation="owner/kernel"),
        ('names code on the Hub as its attn_implementation ("owner/kernel")',),
    ),
    Fault(
        "adapter inside",
        setting("adapter_config.json", base_model_name_or_path="owner/other", peft_type="LORA"),
        (f"{AT} is a model with an adapter in it",),
    ),
    Fault(
        "a billion layers",
        setting("config.json", num_hidden_layers=10**9),
        ("says num_hidden_layers 1,000,000,000, which the weights do not have (1 tensors, none wider than 256)",),
    ),
    Fault(
        "a vast vocabulary",
        setting("config.json", text_config={"vocab_size": 10**12}),
        ("says vocab_size 1,000,000,000,000, which the weights do not have",),
    ),
    Fault(
        "vast configuration",
        lambda folder: os.truncate(folder / "model" / "config.json", 2**27) and None,
        ("config.json has 134,217,728 bytes, more than the 67,108,864 it may have",),
    ),
    Fault(
        "deep configuration",
        lambda folder: (folder / "model" / "tokenizer_config.json").write_text("[" * 200_000) and None,
        ("tokenizer_config.json is not JSON",),
    ),
    Fault(
        "line breaks in a name",
        lambda folder: os.mkfifo(folder / "model" / "a\n\x1b[2Jb"),
        ("model/a\\n\\x1b[2Jb is neither",),
    ),
]


@pytest.mark.parametrize("verb", ["check", "run"])
@pytest.mark.parametrize("fault", HOSTILE, ids=lambda fault: fault.name)
def test_a_hostile_base(workplace, capsys, fault, verb):  # noqa: F811
    """It is refused with the reason before anything in it is loaded; stdout is empty and nothing new on the disk."""
    fault.make(workplace)
    before = contents(workplace)
    settings = [word for value in fault.settings for word in ("--set", value)]
    code, out, err = call(capsys, verb, "recipe.yaml", *settings)
    assert (code, out) == (2, ""), err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
    for piece in fault.said:
        assert piece in err
    assert contents(workplace) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*") if not p.is_fifo()}


def test_a_hostile_reward_model(workplace, capsys):  # noqa: F811
    """A reward model in a folder is looked at like the base."""
    write_model(workplace / "judge")
    (workplace / "judge" / "special_tokens_map.json").write_text('{"vocab": "/etc/hostname"}')
    before = everything_in(workplace)
    for verb in ("check", "run"):
        code, out, err = call(capsys, verb, "recipe.yaml", "--set", "stages.ppo.reward=judge")
        assert (code, out) == (2, "") and "stages.ppo.reward: judge/special_tokens_map.json sets vocab" in err
    assert everything_in(workplace) == before


# ---------------------------------------------------------------- adapters


@pytest.fixture
def adapter(tmp_path):
    """An adapter folder without a fault."""
    write_safetensors(tmp_path / "adapter_model.safetensors", a=(2, 3))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "init_lora_weights": true}')
    check_adapter(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("adapter_config.json", '{"peft_type": "IA3"}', "is not of peft_type LORA"),
        (
            "adapter_config.json",
            '{"peft_type": "LORA", "init_lora_weights": "corda"}',
            "init_lora_weights must be true",
        ),
        ("adapter_config.json", '{"peft_type": "LORA", "auto_mapping": {"parent_library": "os"}}', "names Python code"),
        ("adapter_config.json", "[]", "does not hold an object"),
        ("adapter_model.safetensors", "x", "is not a safetensors file"),
    ],
)
def test_a_hostile_adapter(adapter, file, content, said):
    """What PEFT would follow further than LoRA weights is refused."""
    (adapter / file).write_text(content)
    with pytest.raises(InputError, match=said):
        check_adapter(adapter)


def test_an_adapter_without_safetensors(adapter):
    """PEFT would take adapter_model.bin in their place."""
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(InputError, match="pickled weights only"):
        check_adapter(adapter)


def test_an_adapter_that_links_out(adapter, tmp_path_factory):
    """Its files are its own."""
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "weights"
    (adapter / "adapter_model.safetensors").rename(elsewhere)
    (adapter / "adapter_model.safetensors").symlink_to(elsewhere)
    with pytest.raises(InputError, match="is a link out of its folder"):
        check_adapter(adapter)


# ---------------------------------------------------------------- the Hub's cache


def as_snapshot(model: Path, cache: Path) -> Path:
    """Lay a model out as the Hub's cache does: blobs, and a snapshot of links to them; return the snapshot."""
    repo = cache / "models--owner--name"
    snapshot = repo / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(snapshot.name)
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(repo / "blobs" / f"{number:040}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040}")
    return snapshot


def test_a_snapshot_of_the_hub_is_links_to_its_blobs(tmp_path):
    """They are followed, also where a blob is a link into the cache's shared store; other links are not."""
    snapshot = as_snapshot(write_model(tmp_path / "model"), tmp_path / "hub")
    assert ModelFolder(snapshot).problems() == []
    store = tmp_path / "hub" / "blobs" / "01"
    store.mkdir(parents=True)
    blob = (snapshot / "config.json").resolve()
    blob.rename(store / "config")
    blob.symlink_to(store / "config")
    assert ModelFolder(snapshot).problems() == []
    (tmp_path / "secret.txt").write_text("s")
    (snapshot / "vocab.txt").symlink_to(tmp_path / "secret.txt")
    assert ModelFolder(snapshot).problems() == [f"{snapshot / 'vocab.txt'} is a link out of its folder; put the file "
                                                "itself there"]  # fmt: skip


def test_what_is_fetched_is_looked_at(tmp_path, monkeypatch):
    """A Hub model is opened as its snapshot, small files first, the weights that its index names at the same commit;
    what is wrong in it is told with the setting that named it."""
    import huggingface_hub

    snapshot = as_snapshot(write_model(tmp_path / "model"), tmp_path / "hub")
    asked = []

    def snapshot_download(repo: str, **how: Any) -> str:
        asked.append((repo, how))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert opened("owner/looked-at", "main", setting="base.model") == snapshot
    (first, weights) = asked
    assert first[1]["revision"] == "main" and "*.py" not in first[1]["allow_patterns"]
    assert weights == (
        "owner/looked-at",
        {"revision": snapshot.name, "allow_patterns": ["model.safetensors"]},
    )
    (snapshot / "special_tokens_map.json").write_text('{"merges": "/etc/hostname"}')
    with pytest.raises(InputError, match=r"^base\.model: .*special_tokens_map\.json sets merges to a path"):
        opened("owner/looked-at", "main", setting="base.model")


def test_a_hub_model_is_loaded_from_its_snapshot(tmp_path):
    """With the Hub's own client and cache, offline: links to blobs load, a link to elsewhere is refused."""
    snapshot = as_snapshot(tiny.make_checkpoint(tmp_path / "model"), tmp_path / "hf" / "hub")
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "script.py").write_text(OPENS_TWICE)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "script.py", str(snapshot / "special_tokens_map.json")]
    found = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-2000:]
    first, second = found.stdout.splitlines()
    assert first == "LlamaForCausalLM" and "special_tokens_map.json is a link out of its folder" in second


OPENS_TWICE = """\
import sys
from pathlib import Path
from accelerate import Accelerator
from rlhf_kit import collate, models
from rlhf_kit.errors import InputError
from rlhf_kit.recipe import Base

base = Base(model="owner/name")
print(type(models.load_base(base, collate.load_text_format(base), Accelerator(cpu=True))).__name__)
Path(sys.argv[1]).symlink_to(Path("secret").resolve())
try:
    collate.load_text_format(base)
except InputError as error:
    print(error)
"""


def test_a_hub_model_that_cannot_be_had(workplace, capsys):  # noqa: F811
    """Without network, or where there is none of that name: one message, exit code 2, nothing written."""
    before = everything_in(workplace)
    code, out, err = call(capsys, "run", "recipe.yaml", "--set", "base.model=owner/nowhere-at-all")
    assert (code, out) == (2, "") and err.splitlines()[-1].startswith("base.model: cannot get owner/nowhere-at-all")
    assert "Traceback" not in err and everything_in(workplace) == before


# ---------------------------------------------------------------- code that comes with a model

MODELLING = """\
from pathlib import Path
Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class MineConfig(LlamaConfig):
    model_type = "mine"
class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture
def with_code(tmp_path, monkeypatch):
    """A recipe over a checkpoint whose configuration names Python files beside it, which leave a mark when run."""
    recipe = write_chain(tmp_path / "things")
    model, mark = tmp_path / "things" / "model", tmp_path / "mark"
    (model / "modelling_mine.py").write_text(MODELLING.format(mark=str(mark)))
    (model / "planted_scorer.py").write_text(MODELLING.format(mark=str(mark)))
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": ["MineForCausalLM"], "scorer": "planted_scorer:score"}
    named = {"AutoConfig": "modelling_mine.MineConfig", "AutoModelForCausalLM": "modelling_mine.MineForCausalLM"}
    (model / "config.json").write_text(json.dumps({**config, "auto_map": named, "reward": "planted_scorer:score"}))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return recipe, mark


def test_code_of_a_checkpoint_is_not_run(with_code, capsys):
    """Without the recipe's word for it: the reason, exit code 2, nothing written, no question on the terminal."""
    recipe, mark = with_code
    code, out, err = call(capsys, "run", str(recipe))
    assert (code, out) == (2, ""), err
    assert "trust_remote_code" in err and "Traceback" not in err
    assert not mark.exists() and not Path("runs").exists()


def test_code_of_a_checkpoint_is_run_when_the_recipe_says_so(with_code):
    """The key does what it says, which shows that the mark would have been left above."""
    recipe, mark = with_code
    base = load_recipe(recipe, ["base.trust_remote_code=true"]).base
    assert models.context_length(base) == 128 and mark.exists()


def test_a_checkpoint_names_no_scorer(with_code):
    """Keys of its configuration that look like one, and a module of that name beside it, mean nothing."""
    recipe, mark = with_code
    model = recipe.parent / "model"
    config = json.loads((model / "config.json").read_text()) | {"model_type": "llama"}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="has no weights for score"):
        ClassifierScorer(str(model), torch.device("cpu"))
    assert not mark.exists()


# ---------------------------------------------------------------- told before anything is trained


@pytest.mark.parametrize(
    ("said", "settings"),
    [
        ("1 of 32 rows spell special tokens of the model: ", ("stages.sft.truncate=drop",)),
        ("base.chat_template: the chat template does not come to an end", ("base.chat_template=endless.jinja",)),
        ("rlhf_kit.source: ../outside.jsonl leads out of the card's folder", ("stages.reward.data=climbs.md",)),
    ],
    ids=["special tokens", "endless template", "card that climbs"],
)
def test_told_before_the_run_directory_is_made(tmp_path, monkeypatch, capsys, said, settings):
    """Text that the card refuses, a template without an end, a card that reads elsewhere: exit code 2, no run."""
    recipe = write_chain(tmp_path / "things")
    odd = "Is this </s> it?" if "special" in said else "Is this it?"
    rows = [*tiny.demonstrations()[1:], {"prompt": odd, "completion": " Yes."}]
    tiny.write_card(tmp_path / "things", "shown", "demonstrations", rows, heldout=0.2, special_tokens="refuse")
    (tmp_path / "things" / "endless.jinja").write_text("{{ (9**9)**(9**8) }}")
    (tmp_path / "outside.jsonl").write_text("")
    climbing = (tmp_path / "things" / "pairs.md").read_text().replace("pairs.jsonl", "../outside.jsonl")
    (tmp_path / "things" / "climbs.md").write_text(climbing)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    code, out, err = call(capsys, "run", str(recipe), *[word for value in settings for word in ("--set", value)])
    assert (code, out) == (2, "") and "Traceback" not in err and not Path("runs").exists()
    assert said in err, err
