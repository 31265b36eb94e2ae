"""What a folder is that no stage made, told by its files, and what of it is refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlhf_kit import artifacts, foreign, models, recipe
from rlhf_kit.check import check_recipe
from rlhf_kit.collate import left_pad, load_text_format
from rlhf_kit.errors import InputError
from rlhf_kit.recipe_reading import load_recipe
from rlhf_kit.scorers import Written, scorer_of
from tests import tiny
from tests.others import add_value_head, make_adapter
from tests.plain import make_workplace, write_safetensors

LORA = {"base_model.model.model.layers.0.q_proj.lora_A.weight": (2, 4), "x.lora_B.weight": (4, 2)}


def write_adapter(folder: Path, weights: dict = LORA, **settings: object) -> Path:
    """Write the files of an adapter without a fault, or with one."""
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "adapter_model.safetensors", **weights)
    plain = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**plain, "bias": "none", "loftq_config": {}, **settings}))
    return folder


def with_score(**shape: tuple[int, ...]) -> dict:
    return {**LORA, "base_model.model.score.weight": shape.get("shape", (1, 4))}


def value_head(folder: Path, **shapes: tuple[int, ...]) -> Path:
    write_safetensors(folder / "value_head.safetensors", **shapes)
    return folder


KINDS: dict[str, Callable[[Path], Path]] = {
    "policy": write_adapter,
    "reward": lambda folder: write_adapter(folder, with_score(), task_type="SEQ_CLS", modules_to_save=["score"]),
    "value head": lambda folder: value_head(write_adapter(folder), **{"v_head.summary.weight": (1, 4)}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_files_say_what_a_folder_is(tmp_path, kind):
    """Also a folder with it in adapter/, as a stage leaves it."""
    assert foreign.found(str(KINDS[kind](tmp_path / "adapter"))).kind == kind
    assert foreign.found(str(tmp_path)).folder == tmp_path / "adapter"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda f: write_adapter(f, use_dora=True), "asks for more than LoRA: use_dora true"),
        (lambda f: write_adapter(f, bias="lora_only"), 'asks for more than LoRA: bias "lora_only"'),
        (lambda f: write_adapter(f, lora_bias=True), "asks for more than LoRA: lora_bias true"),
        (lambda f: write_adapter(f, layer_replication=[[0, 2]]), "asks for more than LoRA: layer_replication"),
        (lambda f: write_adapter(f, of_next_year="x"), 'asks for more than LoRA: of_next_year "x"'),
        (lambda f: write_adapter(f, modules_to_save=["lm_head"]), "trains whole layers of the base"),
        (lambda f: write_adapter(f, task_type="SEQ_2_SEQ_LM"), "task_type SEQ_2_SEQ_LM"),
        (lambda f: write_adapter(f, {"a": (1,)}), "holds no weights of LoRA"),
        (lambda f: write_adapter(f, with_score()), "score.weight in adapter_model.safetensors are weights beside"),
        (lambda f: write_adapter(f, task_type="SEQ_CLS"), "with no score head; a reward model has one"),
        (lambda f: write_adapter(f, with_score(shape=(3, 4)), task_type="SEQ_CLS"), "score.weight [3, 4]; a reward"),
        (lambda f: value_head(write_adapter(f), a=(1, 4)), "value_head.safetensors holds a [1, 4]; trl's v_head"),
        (lambda f: (f / "notes.txt").write_text(""), "is neither an adapter nor a model (in it: notes.txt)"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter_model.safetensors: no such file"),
    ],
)
def test_what_no_role_can_hold_is_refused(tmp_path, make, said):
    """With the reason, one message."""
    make(tmp_path)
    with pytest.raises(InputError) as refused:
        foreign.found(str(tmp_path))
    assert said in str(refused.value)


def test_pickles_are_not_read(tmp_path):
    """Neither an adapter's nor a model's."""
    write_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match=r"pickled weights only \(adapter_model\.bin\)"):
        foreign.found(str(tmp_path))


def test_a_run_and_its_changed_stage(tmp_path):
    """A run's folder holds several; a stage whose weights its manifest does not list is not taken for that stage."""
    folder = write_adapter(tmp_path / "sft").rename(tmp_path / "made")
    (tmp_path / "sft").mkdir()
    folder.rename(tmp_path / "sft" / "adapter")
    listed = {"adapter/adapter_model.safetensors": {"sha256": "0" * 64}}
    made_on = {"name": "b", "sha256": None, "quantization": "none", "dtype": "float32"}
    manifest = {"schema": artifacts.SCHEMA, "base": made_on, "files": listed, "data": {}}
    artifacts.write_json(tmp_path / "sft" / "manifest.json", manifest)
    with pytest.raises(InputError, match=r"is a run; name one of its stages, such as .*/sft"):
        foreign.found(str(tmp_path))
    with pytest.raises(InputError, match=r"is not what .* says that the stage left"):
        foreign.found(str(tmp_path / "sft"))
    weights = tmp_path / "sft" / "adapter" / "adapter_model.safetensors"
    listed["adapter/adapter_model.safetensors"]["sha256"] = artifacts.sha256_of_file(weights)
    artifacts.write_json(tmp_path / "sft" / "manifest.json", manifest)
    found = foreign.found(str(tmp_path / "sft"))
    assert found.manifest == manifest
    base = recipe.Base(model="c")
    assert "says that it was made for" in str(foreign.base_told_apart(found, base, lambda: "1" * 64)[1])
    manifest["base"]["sha256"] = "2" * 64
    artifacts.write_json(tmp_path / "sft" / "manifest.json", manifest)
    changed = foreign.found(str(tmp_path / "sft"))
    assert "another base" in str(foreign.base_told_apart(changed, base, lambda: "1" * 64)[0])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("stages.ppo.policy=theirs",), "stages.ppo.policy: theirs: does not fit model"),
        (("stages.sft.init=hub://me",), "stages.sft.init: must be written hub://OWNER/NAME[/SUBFOLDER][@REVISION]"),
        (("stages.sft.init=hub://me/x/../y",), "stages.sft.init: must be written hub://OWNER/NAME"),
        (("stages.sft.init=me/adapter",), "there is no folder me/adapter; on the Hub it is hub://me/adapter"),
        (("stages.ppo.policy=judge",), "stages.ppo.policy: judge is an adapter of a sequence classifier"),
        (("stages.ppo.watch={gold: fits}",), "stages.ppo.watch.gold: fits is an adapter of a causal language model"),
        (("stages.ppo.watch={gold: hub://me}",), "stages.ppo.watch.gold: must be written hub://OWNER/NAME"),
        (("stages.ppo.reward=fits",), "stages.ppo.reward: fits is an adapter of a causal language model without"),
        (("stages.ppo.reward=fits",), "(value_head.bin is pickled and not read: save it as value_head.safetensors)"),
    ],
)
def test_check_tells_without_torch_and_network(tmp_path, monkeypatch, settings, said):
    """Names as they are written, kinds, and shapes that the headers of both tell apart."""
    monkeypatch.chdir(make_workplace(tmp_path / "work").parent)
    write_safetensors(Path("model/model.safetensors"), **{"model.embed_tokens.weight": (256, 4), "q.weight": (8, 4)})
    write_adapter(Path("theirs"), {"base_model.model.q.lora_A.weight": (2, 6)})
    write_adapter(
        Path("fits"), {"base_model.model.q.lora_A.weight": (2, 4), "base_model.model.q.lora_B.weight": (8, 2)}
    )
    Path("fits/value_head.bin").write_bytes(b"")
    write_adapter(Path("judge"), with_score(), task_type="SEQ_CLS")
    with pytest.raises(InputError) as refused:
        check_recipe(load_recipe("recipe.yaml", settings))
    assert said in str(refused.value)
    lines = check_recipe(load_recipe("recipe.yaml", ["stages.ppo.policy=fits", "stages.ppo.reward=hub://me/judge@v1"]))
    assert (
        "from     ppo.policy: fits: an adapter of a causal language model without a value head; r 2, alpha 4, on q_proj"
        in lines
    )
    assert "from     ppo.reward: hub://me/judge@v1, on the Hub, not fetched by check" in lines


@pytest.mark.parametrize(
    "wrong",
    [
        {"base": {"name": "b"}},
        {"files": []},
        {"score_normalisation": {"mean": 0.0, "std": 0.0}},
        {"ensemble": {"members": [{"folder": "../elsewhere", "mean": 0.0, "std": 1.0}]}},
        {"ensemble": {"members": [{"folder": "/etc", "mean": 0.0, "std": 1.0}]}},
        {"probe": [{"ids": [], "score": 1.0}]},
    ],
)
def test_a_manifest_that_was_tampered_with(tmp_path, wrong):
    """It is not believed, and leads nowhere."""
    write_adapter(tmp_path / "adapter")
    made_on = {"name": "b", "sha256": None, "quantization": "none", "dtype": "float32"}
    manifest = {"schema": artifacts.SCHEMA, "base": made_on, "files": {}, "data": {}}
    artifacts.write_json(tmp_path / "manifest.json", manifest)
    foreign.found(str(tmp_path))
    artifacts.write_json(tmp_path / "manifest.json", manifest | wrong)
    with pytest.raises(InputError, match="is not as rlhf_kit writes a manifest"):
        foreign.found(str(tmp_path))


# ---------------------------------------------------------------- on a base


@pytest.fixture
def base(tmp_path):
    return recipe.Base(model=str(tiny.make_checkpoint(tmp_path / "model")))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 5}},
        {"target_modules": r".*\.1\..*_proj", "layers_to_transform": None},
    ],
    ids=["rank", "rslora and patterns", "regular expression"],
)
def test_a_policy_that_starts_from_others_adapter_is_that_adapter(tmp_path, base, settings):
    """Written out again untrained, peft alone gives bit-equal logits; as a role they differ by the order of sums."""
    theirs = make_adapter(tmp_path / "theirs", tmp_path / "model", **settings)
    assert models.misfits(base, foreign.found(str(theirs))) == ([], [])
    shared = models.SharedBase(models.load_base(base, load_text_format(base), Accelerator(cpu=True)), base)
    shared.add("policy", theirs, trainable=True)
    shared.add("other", make_adapter(tmp_path / "other", tmp_path / "model", target_modules=["o_proj"]))
    shared.save("policy", tmp_path / "again")
    ids = torch.arange(5, 30).unsqueeze(0)
    with torch.no_grad():
        expected, again = (
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), folder)
            .eval()(ids)
            .logits
            for folder in (theirs, tmp_path / "again")
        )
        assert torch.equal(again, expected)
        with shared.using("policy"):
            torch.testing.assert_close(shared.causal(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_trls_value_head_scores_as_trl_does(tmp_path, base):
    """v_head.summary on the last hidden state of the last token, through peft and transformers alone."""
    judge = make_adapter(tmp_path / "judge", tmp_path / "model", r=3)
    weight, bias = add_value_head(judge)
    text_format = load_text_format(base)
    shared = models.SharedBase(models.load_base(base, text_format, Accelerator(cpu=True)), base)
    shared.add("policy", make_adapter(tmp_path / "sft", tmp_path / "model"))
    scorer = scorer_of("it", foreign.found(str(judge)).folder, shared, text_format, role="reward")
    rows = [text_format.prompt_ids(text) for text in ("Where is my hat?", "Why?")]
    packed = left_pad(rows, text_format.pad_id)
    scores = scorer(Written(["", ""], ["", ""], packed.prompt_ids, packed.prompt_mask))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), judge).eval()
    for row, score in zip(rows, scores, strict=True):
        with torch.no_grad():
            states = plain(torch.tensor([row]), output_hidden_states=True).hidden_states[-1][0, -1]
        assert float(score) == pytest.approx(float(states @ weight[0] + bias), abs=1e-4)


def test_what_does_not_fit_is_found_before_the_base_is_loaded(tmp_path, base):
    """More layers, another width, the output head: each in one line; another name of the base is a note."""
    for name, shape, settings in (
        ("deep", {"num_hidden_layers": 3}, {}),
        ("wide", {"hidden_size": 96}, {}),
        ("headed", {"tie_word_embeddings": False}, {"target_modules": ["q_proj", "lm_head"]}),
        ("absent", {}, {"target_modules": ["up_proj"]}),
    ):
        other = tiny.make_checkpoint(tmp_path / f"{name}-base", **shape)
        make_adapter(tmp_path / name, other, **settings)
    with pytest.raises(InputError, match=r"lm_head\.base_layer\.weight .* are weights beside LoRA's"):
        foreign.found(str(tmp_path / "headed"))
    weights = load_file(tmp_path / "headed" / "adapter_model.safetensors")
    lora = {name: tensor for name, tensor in weights.items() if ".lora_" in name}
    save_file(lora, tmp_path / "headed" / "adapter_model.safetensors")
    found = {name: foreign.found(str(tmp_path / name)) for name in ("deep", "wide", "headed", "absent")}
    said = {name: models.misfits(base, one) for name, one in found.items()}
    assert "does not fit" in said["deep"][0][0] and "layers.2" in said["deep"][0][0]
    assert "does not fit" in said["wide"][0][0]
    assert "adapts the base's output head" in said["headed"][0][0]
    problems, notes = said["absent"]
    assert problems == [] and "absent-base" in notes[0]


def test_a_changed_weight_changes_the_hash(tmp_path):
    """Weights, settings and head count; a read-me does not."""
    folder = value_head(write_adapter(tmp_path), **{"v_head.summary.weight": (1, 4)})
    hashes = {foreign.found(str(folder)).sha256}
    (folder / "README.md").write_text("x")
    assert {foreign.found(str(folder)).sha256} == hashes
    for name in ("adapter_model.safetensors", "value_head.safetensors"):
        tensors = load_file(folder / name)
        save_file({key: tensor + 1 for key, tensor in tensors.items()}, folder / name)
        hashes.add(foreign.found(str(folder)).sha256)
    write_adapter(folder, lora_alpha=5)
    assert len({*hashes, foreign.found(str(folder)).sha256}) == 4
