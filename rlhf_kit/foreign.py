"""What a stage starts from, or scores with, that no stage of the recipe made: a folder, or one on the Hub, looked at.

Its files say what it is:

    adapter_config.json of task CAUSAL_LM (or none)         a policy
    the same and value_head.safetensors                     a reward model of trl or LLaMA-Factory, or a policy
    adapter_config.json of task SEQ_CLS, with a score head  a reward model of PEFT, trl or ours
    adapter/ with one of these                              the same, as a stage of ours leaves it
    config.json and weights                                 a sequence classification model

Adapters must be plain LoRA, for only what is computed here as in PEFT is taken; weights are safetensors. No torch here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rlhf_kit import artifacts
from rlhf_kit.errors import InputError, first_line, printable
from rlhf_kit.model_folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX,
    LORA_WEIGHT,
    PICKLES,
    SCORE_HEAD,
    VALUE_HEAD,
    WEIGHTS,
    ModelFolder,
    adapter_problems,
    from_hub,
    names_on_hub,
    read_object,
    safetensors_header,
)
from rlhf_kit.recipe import SCORERS, Base, Recipe
from rlhf_kit.settings import HUB_ID, HubReference, climbs, hub_reference, without_local_paths

Kind = Literal["policy", "value head", "reward", "model"]
WORDS: Mapping[Kind, str] = {
    "policy": "an adapter of a causal language model without a value head",
    "value head": "an adapter of a causal language model with a value head",
    "reward": "an adapter of a sequence classifier, which gives scores",
    "model": "a whole model and no adapter",
}
POLICIES: tuple[Kind, ...] = ("policy", "value head")
REWARDS: tuple[Kind, ...] = ("reward", "value head", "model")
WOULD_WORK = {
    POLICIES: "the adapter of a causal language model (task_type CAUSAL_LM); a whole model is base.model",
    REWARDS: (
        "an adapter of task_type SEQ_CLS with its score head, one of CAUSAL_LM with value_head.safetensors, or a "
        "sequence classification model"
    ),
}
SUMMARY_WEIGHT, SUMMARY_BIAS = "v_head.summary.weight", "v_head.summary.bias"
FLOATS = {"F32", "F16", "BF16", "F64"}
"""Types of weights whose shape is that of their layer; quantised ones are packed."""


@dataclass(frozen=True)
class Foreign:
    """An adapter or a model that was looked at and can be loaded."""

    written: str
    """As the recipe names it."""
    kind: Kind
    folder: Path
    """Of the adapter's own files, or the model's."""
    hub: HubReference | None = None
    """Where it is from, with the commit as its revision; None is a local folder."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """`adapter_config.json`; empty of a model."""
    manifest: Mapping[str, Any] | None = None
    """Of the stage of ours that made it."""

    @cached_property
    def sha256(self) -> str:
        """The hash of all that it computes with."""
        if self.kind == "model":
            return ModelFolder(self.folder).sha256
        files = [self.folder / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, VALUE_HEAD)]
        unit = {}
        if self.kind == "reward" and self.manifest is not None:
            unit = {key: self.manifest.get(key) for key in ("score_normalisation", "ensemble")}
            files += [
                self.folder.parent / member["folder"] / ADAPTER_WEIGHTS
                for member in self.manifest.get("ensemble", {"members": []})["members"][1:]
            ]
        hashes = [artifacts.sha256_of_file(path) for path in files if path.is_file()]
        return artifacts.hash_of([hashes, unit])

    def source(self) -> dict[str, Any]:
        """Return what a manifest says of it: where it was got, and its hash."""
        if self.hub is None:
            return {"folder": without_local_paths(self.written), "sha256": self.sha256}
        place = {"hub": self.hub.repo, "commit": self.hub.revision}
        return {**place, **({"subfolder": self.hub.subfolder} if self.hub.subfolder else {}), "sha256": self.sha256}

    def __str__(self) -> str:
        """What it is, for a person."""
        where = f" (commit {(self.hub.revision or '')[:12]})" if self.hub else ""
        if self.kind == "model":
            return f"{self.written}{where}: a model of its own"
        targets = self.settings.get("target_modules")
        on = targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))
        shape = f"r {self.settings.get('r')}, alpha {self.settings.get('lora_alpha')}, on {on}"
        return printable(f"{self.written}{where}: {WORDS[self.kind]}; {shape}")


def input_name(written: str) -> str:
    """Return the key of a folder or Hub repository among a manifest's inputs; it names no place on this machine."""
    short = without_local_paths(written)
    return str(short if short == written else f"…/{short}")


# ---------------------------------------------------------------- those of a recipe


def of_recipe(
    recipe: Recipe, *, fetch: bool = True, commits: Mapping[str, str] | None = None
) -> tuple[dict[str, Foreign], list[str]]:
    """Return what the stages name, by the name, and everything that is wrong with it.

    fetch: false looks at local folders only. commits: revisions, by name, in place of those that were written.
    """
    artefacts: dict[str, Foreign] = {}
    problems = []
    for stage in recipe.stages:
        for key, written in recipe.foreign(stage).items():
            at = recipe.where(f"stages.{stage}.{key}")
            if not fetch and on_hub(written):
                continue
            try:
                one = artefacts[written] = artefacts.get(written) or found(written, (commits or {}).get(written))
            except InputError as error:
                problems += [f"{at}: {problem}" for problem in error.problems]
                continue
            kinds = REWARDS if key in SCORERS else POLICIES
            if one.kind not in kinds:
                problems.append(
                    f"{at}: {written} is {WORDS[one.kind]}{_pickled_head(one)}; what works here: {WOULD_WORK[kinds]}"
                )
    return artefacts, problems


def folder_of(name: str, run: Path, artefacts: Mapping[str, Foreign]) -> Path:
    """Return where the adapter or model that a recipe names lies: what others made, else that of a stage of a run."""
    return artefacts[name].folder if name in artefacts else run / name / "adapter"


def place(recipe: Recipe, written: str) -> str:
    """Return "file:line: a.b" of the first setting that names a folder or repository."""
    named = (
        f"stages.{stage}.{key}" for stage in recipe.stages for key, it in recipe.foreign(stage).items() if it == written
    )
    return recipe.where(next(named))


def on_hub(written: str) -> HubReference | None:
    """Return the repository that a name means, or None where it means a local folder."""
    bare = HUB_ID.fullmatch(written) and not Path(written).is_dir()
    return HubReference(written) if bare else hub_reference(written)


def found(written: str, commit: str | None = None) -> Foreign:
    """Return what a name means, got from the Hub where it is there, and looked at.

    Raises:
        InputError: it cannot be had, is nothing that a stage can use, or is not safe and complete.
    """
    hub = on_hub(written)
    if hub is None:
        if not Path(written).is_dir():
            raise InputError(f"there is no folder {written}")
        return look(written, Path(written))
    try:
        folder, commit = from_hub(replace(hub, revision=commit or hub.revision))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot get {written} from the Hub: {first_line(error)}") from error
    return look(written, folder, replace(hub, revision=commit))


# ---------------------------------------------------------------- looking


def look(written: str, folder: Path, hub: HubReference | None = None) -> Foreign:
    """Return what lies in a folder.

    Raises:
        InputError: nothing that a stage can use, or not safe and complete.
    """
    if (folder / "adapter" / ADAPTER_CONFIG).is_file() and not (folder / ADAPTER_CONFIG).is_file():
        folder = folder / "adapter"
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if hub is not None and not names & {ADAPTER_WEIGHTS, WEIGHTS, INDEX}:
        names |= names_on_hub(hub)
    pickles = sorted(name for name in names if Path(name).suffix in PICKLES)
    if names & {ADAPTER_CONFIG, ADAPTER_WEIGHTS}:
        if ADAPTER_WEIGHTS not in names and pickles:
            raise InputError(_pickled(written, pickles, ADAPTER_WEIGHTS))
        return _adapter(written, folder, hub)
    if names & {"config.json", WEIGHTS, INDEX}:
        if not names & {WEIGHTS, INDEX} and pickles:
            raise InputError(_pickled(written, pickles, WEIGHTS))
        problems = ModelFolder(folder).problems()
        if problems:
            raise InputError(problems)
        return Foreign(written, "model", folder, hub)
    stages = sorted(path.parent.name for path in folder.glob(f"*/{artifacts.MANIFEST}"))
    if stages:
        raise InputError(f"{written} is a run; name one of its stages, such as {written.rstrip('/')}/{stages[0]}")
    seen = f"in it: {', '.join(sorted(names)[:6])}" if names else "it is empty"
    raise InputError(
        f"{written} is neither an adapter nor a model ({seen}); what works: a folder with {ADAPTER_CONFIG} and "
        f"{ADAPTER_WEIGHTS}, a stage's folder of a run, or, as a reward, one with config.json and {WEIGHTS}"
    )


def _pickled(written: str, pickles: list[str], instead: str) -> str:
    return (
        f"{written} has pickled weights only ({', '.join(pickles[:3])}), which can run any code when they are read; "
        f"name a revision that has {instead}, or save it again as safetensors"
    )


def _pickled_head(artefact: Foreign) -> str:
    """Return what to add of an adapter whose value head is there as a pickle only."""
    names = names_on_hub(artefact.hub) if artefact.hub else {path.name for path in artefact.folder.iterdir()}
    heads = sorted(names & {"value_head.bin", "pytorch_model.bin"}) if artefact.kind == "policy" else []
    return f" ({heads[0]} is pickled and not read: save it as {VALUE_HEAD})" if heads else ""


def _adapter(written: str, folder: Path, hub: HubReference | None) -> Foreign:
    problems = adapter_problems(folder)
    if problems:
        raise InputError(problems)
    settings, header = read_object(folder / ADAPTER_CONFIG), safetensors_header(folder / ADAPTER_WEIGHTS)
    task = settings.get("task_type")
    kind: Kind = "reward" if task == "SEQ_CLS" else "value head" if (folder / VALUE_HEAD).is_file() else "policy"
    heads = {name: tensor["shape"] for name, tensor in header.items() if SCORE_HEAD.search(name)}
    odd = [name for name in header if not LORA_WEIGHT.search(name) and not (kind == "reward" and name in heads)]
    if task not in ("CAUSAL_LM", "SEQ_CLS", None):
        problems.append(f"{written}: is an adapter of task_type {task}; CAUSAL_LM and SEQ_CLS are what works")
    elif not any(LORA_WEIGHT.search(name) for name in header):
        problems.append(f"{written}: {ADAPTER_WEIGHTS} holds no weights of LoRA; save the adapter again")
    elif odd:
        many = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        problems.append(
            f"{written}: {odd[0]}{many} in {ADAPTER_WEIGHTS} are weights beside LoRA's two matrices, and no role here "
            "has such; merge the adapter into its base and name that as base.model"
        )
    elif kind == "reward" and [shape[:1] for shape in heads.values()] != [[1]]:
        there = ", ".join(f"{name} {shape}" for name, shape in heads.items()) or "no score head"
        problems.append(
            f"{written}: is an adapter of a sequence classifier with {there}; a reward model has one score.weight of "
            "one row (in PEFT, task_type SEQ_CLS and num_labels=1 save it)"
        )
    elif kind == "value head":
        shapes = {name: tensor["shape"] for name, tensor in safetensors_header(folder / VALUE_HEAD).items()}
        weight, bias = shapes.get(SUMMARY_WEIGHT, []), shapes.get(SUMMARY_BIAS, [1])
        if shapes.keys() - {SUMMARY_WEIGHT, SUMMARY_BIAS} or weight[:1] != [1] or len(weight) != 2 or bias != [1]:
            there = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            problems.append(
                f"{written}: {VALUE_HEAD} holds {there}; trl's {SUMMARY_WEIGHT} of one row, and {SUMMARY_BIAS}, work"
            )
    if problems:
        raise InputError([printable(problem) for problem in problems])
    return Foreign(written, kind, folder, hub, settings, _manifest(written, folder))


def _manifest(written: str, folder: Path) -> dict[str, Any] | None:
    """Return the manifest of ours that lists an adapter's weights, beside its folder or, of a published run, below.

    Raises:
        InputError: the one beside it lists others.
    """
    weights = artifacts.sha256_of_file(folder / ADAPTER_WEIGHTS)
    for path in (folder.parent / artifacts.MANIFEST, *sorted(folder.glob(f"*/{artifacts.MANIFEST}"))):
        manifest = read_manifest(path)
        listed = manifest["files"].get(f"adapter/{ADAPTER_WEIGHTS}", {}).get("sha256") if manifest else None
        if listed == weights:
            return manifest
        if listed is not None and path.parent == folder.parent and folder.name == "adapter":
            raise InputError(
                f"{written}: {ADAPTER_WEIGHTS} is not what {path} says that the stage left; put the file back, or take "
                "the manifest away"
            )
    return None


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Return a manifest that came with somebody's artefact, or None where there is none, or nothing that can be used.

    Raises:
        InputError: it is one of ours that was changed: what it must tell is not there, or it names folders elsewhere.
    """
    manifest = artifacts.manifest_at(path)
    if manifest is None:
        return None
    try:
        units = [manifest["score_normalisation"]] if "score_normalisation" in manifest else []
        ensemble = manifest["ensemble"]["members"] if "ensemble" in manifest else []
        sound = (
            all(math.isfinite(unit["mean"]) and 0 < unit["std"] < math.inf for unit in [*units, *ensemble])
            and not any(climbs(one["folder"]) or Path(one["folder"]).is_absolute() for one in ensemble)
            and all(isinstance(one["score"], float) and one["ids"] for one in manifest.get("probe", []))
            and isinstance(manifest["base"]["name"], str)
            and {"sha256", "quantization", "dtype"} <= manifest["base"].keys()
            and all(isinstance(one, dict) for part in ("files", "data") for one in manifest[part].values())
        )
    except (AttributeError, KeyError, TypeError):
        sound = False
    if not sound:
        raise InputError(printable(f"{path}: is not as rlhf_kit writes a manifest; get it again"))
    return manifest


# ---------------------------------------------------------------- beside the recipe's base


def shape_problems(artefact: Foreign, base: ModelFolder) -> Iterator[str]:
    """Yield that an adapter's weights do not fit the base, as far as the headers of both tell."""
    if artefact.kind == "model":
        return
    width = base.config.get("hidden_size", base.config.get("n_embd"))
    header = safetensors_header(artefact.folder / ADAPTER_WEIGHTS)
    if (artefact.folder / VALUE_HEAD).is_file():
        header = header | safetensors_header(artefact.folder / VALUE_HEAD)
    turned = bool(artefact.settings.get("fan_in_fan_out"))
    for name, tensor in header.items():
        layer, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        theirs = base.tensors.get(f"{layer}.weight", {"dtype": None})
        if part and theirs["dtype"] in FLOATS:
            side = 1 if part.removeprefix("embedding_").startswith("A") else 0
            of_base = theirs["shape"][1 - side if turned or part.startswith("embedding") else side]
            of_adapter = tensor["shape"][side]
        elif not part and len(tensor["shape"]) == 2 and isinstance(width, int):
            of_base, of_adapter = width, tensor["shape"][1]
        else:
            continue
        if of_base != of_adapter:
            yield (
                f"{artefact.written}: does not fit {base.folder}: {name} is made for a size of {of_adapter:,}, and the "
                f"base has {of_base:,} there{_made_for(artefact)}"
            )
            return


def _made_for(artefact: Foreign) -> str:
    name = base_name(artefact)
    return printable(f"; it says that it was made for {name}") if name else "; name the base that it was made for"


def base_name(artefact: Foreign) -> str | None:
    """Return what an adapter calls its base."""
    if artefact.manifest is not None:
        return str(artefact.manifest["base"]["name"])
    return artefact.settings.get("base_model_name_or_path") or None


def base_told_apart(artefact: Foreign, base: Base, sha256: Callable[[], str]) -> tuple[str | None, str | None]:
    """Return a problem, that an adapter was made on other content than the base's, or a note, that only names differ.

    sha256: gives the hash of the base's content, which is asked for where there is one to compare it with.
    """
    if artefact.kind == "model":
        return None, None
    theirs = artefact.manifest["base"]["sha256"] if artefact.manifest is not None else None
    name = base_name(artefact)
    if theirs:
        ours = sha256()
        if theirs == ours:
            return None, None
        return (
            f"{artefact.written}: this adapter was made for another base ({name}, content {theirs[:12]}) than "
            f"{base.model} (content {ours[:12]}); name the base it was trained on, or another adapter"
        ), None
    if name is None or name in (base.model, base.hub_id, without_local_paths(base.model)):
        return None, None
    return None, (
        f"{artefact.written} says that it was made for {printable(json.dumps(name, ensure_ascii=False))}, and the base "
        f"here is {base.model}: the shapes fit, whether the content is the same nobody can tell"
    )
