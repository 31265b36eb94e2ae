"""A run among planted things: tokens, a home folder with a name in it, and pickles that leave a mark when unpickled.

None of the tokens is in any file of the run or on the terminal; the name and absolute paths are in no file that goes
along with an adapter; no pickle is ever read.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from rlhf_kit.errors import InputError
from tests.end_to_end import chain

USER = "planted-user-name"
SECRETS = {
    "HF_TOKEN": "hf_plantedTokenOfTheEnvironment0000001",
    "HUGGING_FACE_HUB_TOKEN": "hf_plantedTokenOfTheOldVariable0000002",
    "WANDB_API_KEY": "planted0wandb0key0000000000000000000000003",
}
IN_THE_FILE = "hf_plantedTokenOfTheTokenFile00000004"
FOR_THIS_MACHINE = ("recipe.resolved.yaml", ".lock")
"""The two files of a run that may name its folders: what to run again here, and who is at work."""

LEFT_OUT = (*FOR_THIS_MACHINE, "adapter_model.bin", "optimizer.pt")
"""Also the pickles that were planted."""


class Mark:
    """What writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (exec, (f"open({self.path!r}, 'w').close()",))


def plant_pickles(folder: Path, mark: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(pickle.dumps({"weight": Mark(mark)}))


def python(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python as the planted user, in their work folder, with pickles allowed wherever torch asks for that."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    environment |= {
        **SECRETS,
        "HOME": str(home),
        "USER": USER,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(chain.ROOT),
        "OMP_NUM_THREADS": "1",
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=home / "work", env=environment, timeout=300
    )


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The home, its finished run, where a pickle would leave its mark, and all that was said on the way."""
    home = tmp_path_factory.mktemp("home") / USER
    (home / "work").mkdir(parents=True)
    (home / "hf").mkdir()
    (home / "hf" / "token").write_text(IN_THE_FILE)
    recipe = chain.write_chain(home / "things", trackers=["tensorboard"], evaluation={"count": 4})
    mark = home / "mark"
    plant_pickles(
        *(home / "things" / "model", mark, "pytorch_model.bin", "adapter_model.bin", "training_args.bin"),
        *("optimizer.pt", "scheduler.pt", "rng_state.pth", "vocab.pkl"),
    )
    first = python(home, "-m", "rlhf_kit", "run", str(recipe), "--set", "stages.ppo.updates=2")
    assert first.returncode == 0, first.stderr[-4000:]
    out = home / "work" / "runs" / "chain"
    for stage in ("sft", "reward"):
        plant_pickles(out / stage, mark, "adapter/adapter_model.bin", "checkpoints/step-000009/optimizer.pt")
    wrong = [
        python(home, "-m", "rlhf_kit", "run", str(recipe), "--set", "base.model=owner/nowhere"),
        python(home, "-m", "rlhf_kit", "check", str(recipe), "--set", "seed=$HF_TOKEN"),
    ]
    return home, out, mark, [first, *wrong]


def everything(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_tokens_reach_no_file_and_no_terminal(planted):
    """Neither what was finished nor what went wrong tells one, of the environment or of the token file."""
    home, out, _, said = planted
    assert [process.returncode for process in said] == [0, 2, 2]
    files = everything(out) | everything(home / "work")
    assert any(name.endswith("metrics.jsonl") for name in files) and any("tfevents" in name for name in files)
    for secret in (*SECRETS.values(), IN_THE_FILE):
        assert [name for name, content in files.items() if secret.encode() in content] == []
        assert not any(secret in process.stdout + process.stderr for process in said)


def test_what_goes_along_with_an_adapter_names_no_home(planted):
    """No file of the run has the user's name or an absolute path of theirs, but the recipe to run again here."""
    home, out, _, _ = planted
    files = everything(out)
    ours = {name: content for name, content in files.items() if Path(name).name not in LEFT_OUT}
    for told in (USER, str(home)):
        assert [name for name, content in ours.items() if told.encode() in content] == []
    assert str(home / "things" / "model").encode() in files["recipe.resolved.yaml"]
    config = json.loads(files["sft/adapter/adapter_config.json"])
    assert config["base_model_name_or_path"] == "model"
    manifest = json.loads(files["ppo/manifest.json"])
    assert manifest["base"]["name"] == "model" and manifest["settings"]["prompts"] == "asked.md"


def test_no_pickle_is_read(planted):
    """Neither beside the base's weights nor in a finished run; and the pickles would have left their mark."""
    home, out, mark, _ = planted
    script = (
        "import rlhf_kit\nfrom rlhf_kit import models\nfrom pathlib import Path\n"
        f"model, _ = rlhf_kit.load({str(out)!r}, 'reward')\nmodel, _ = rlhf_kit.load({str(out)!r}, 'sft')\n"
    )
    loaded = python(home, "-c", script)
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    assert not mark.exists()
    with suppress(RuntimeError):  # having run it, torch finds that this is no checkpoint
        torch.load(out / "sft" / "adapter" / "adapter_model.bin", weights_only=False)
    assert mark.exists()
    mark.unlink()


def test_an_adapter_of_pickles_alone_is_refused(planted):
    """Where PEFT would fall back to adapter_model.bin, also behind a manifest that was made to fit."""
    from accelerate import Accelerator

    from rlhf_kit import collate, models
    from rlhf_kit.recipe import Base

    home, out, mark, _ = planted
    folder = home / "alone"
    plant_pickles(folder, mark, "adapter_model.bin")
    (folder / "adapter_config.json").write_bytes((out / "sft" / "adapter" / "adapter_config.json").read_bytes())
    base = Base(model=str(home / "things" / "model"))
    causal = models.load_base(base, collate.load_text_format(base), Accelerator(cpu=True))
    for load in (models.read_adapter, lambda path: models.open_adapter(causal, path),
                 lambda path: models.SharedBase(causal, base).add("policy", path)):  # fmt: skip
        with pytest.raises(InputError, match="pickled weights only"):
            load(folder)
    assert not mark.exists()


def test_a_base_of_pickles_alone_is_refused(planted):
    """Nothing is read, nothing written."""
    home, _, mark, _ = planted
    model = home / "things" / "model"
    (model / "model.safetensors").rename(model / "away")
    try:
        result = python(home, "-m", "rlhf_kit", "run", str(home / "things" / "chain.yaml"), "--set", "name=pickled")
        assert result.returncode == 2 and "has pickled weights only" in result.stderr
        assert not mark.exists() and not (home / "work" / "runs" / "pickled").exists()
    finally:
        (model / "away").rename(model / "model.safetensors")
