"""What may be wrong with a recipe: its fields one by one, stages that name stages, and paths.

What is looked at is the mapping that the file has. Each problem tells which setting it is about, what was seen and what
would work. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from rlhf_kit.errors import did_you_mean
from rlhf_kit.marked_yaml import KeyPath, MarkedYaml, Problem
from rlhf_kit.recipe import (
    FUNCTION,
    HOMES,
    NESTED,
    ONE,
    SCORERS,
    SECTIONS,
    SEVERAL,
    STAGE_KINDS,
    CheckpointEvery,
    OnlineStage,
    Portion,
    Recipe,
    Require,
    is_address,
    references,
    within,
)
from rlhf_kit.settings import (
    HUB,
    HUB_ID,
    HubReference,
    explain,
    find_path,
    hub_reference,
    not_found,
    written_wrongly,
)

__all__ = ["chain_problems", "field_problems", "path_problems"]

COMMIT = re.compile(r"[0-9a-f]{40}")
STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

# ---------------------------------------------------------------- fields one by one


def either(words: Iterable[str]) -> str:
    """Return words as a choice: "a", "a or b", "a, b or c"."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


FROM_ELSEWHERE: Mapping[str, str] = {
    "lr": "learning_rate",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "ppo_epochs": "epochs",
    "num_generations": "completions_per_prompt",
    "rloo_k": "completions_per_prompt",
    "num_ppo_epochs": "epochs",
    "num_mini_batches": "minibatches",
    "mini_batch_size": "minibatches (how many, not how large)",
    "per_device_train_batch_size": "microbatch (and batch_size, over all processes)",
    "gradient_accumulation_steps": "batch_size and microbatch, from which accumulation follows",
    "max_seq_length": "max_length",
    "response_length": "max_new_tokens",
    "beta": "kl_coef",
    "init_kl_coef": "kl_coef",
    "target_kl": "kl_target",
    "cliprange": "clip",
    "vf_coef": "value_coef",
    "dataset": "data",
    "lr_scheduler_type": "schedule",
    "warmup_ratio": "warmup_fraction",
    "model_name_or_path": "base.model",
    "torch_dtype": "base.dtype",
    "load_in_8bit": "base.quantization: 8bit",
    "load_in_4bit": "base.quantization: 4bit",
    "lora_r": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "report_to": "trackers",
    "output_dir": "name, or --out on the command line",
}
"""What other toolkits call our settings."""

NEEDED: Mapping[str, str] = {
    "name": "the run directory is runs/<name>",
    "base": "at least {model: <folder or Hub id>}",
    "model": "a local folder or a Hub id such as HuggingFaceTB/SmolLM2-135M",
    "stages": "at least one, such as sft: {kind: sft, data: data_cards/mine.md}",
    "kind": either(STAGE_KINDS),
    "data": "the data card to learn from",
    "card": "a data card, such as data_cards/mine.md",
    "policy": "the earlier stage to start from, such as the sft stage, or an adapter",
    "reward": "an earlier reward stage, a model, package.module:function, or the address of a reward server",
    "prompts": "the data card with the prompts",
    "kl_coef": "the price of a nat of KL, usually between 0.01 and 0.2 (dpo, kto: the paper's beta)",
    "repo": "owner/name on the Hub",
}
"""What to write for a required setting."""


def field_problems(data: dict[str, Any], marked: MarkedYaml) -> Iterator[Problem]:
    """Yield what is wrong with fields, each by itself or beside others of its section."""
    try:
        Recipe.model_validate(data)
    except ValidationError as invalid:
        for error in invalid.errors(include_url=False):
            loc = error["loc"]
            if len(loc) > 2 and loc[0] == "stages":
                loc = (*loc[:2], *loc[3:])  # pydantic puts the stage's kind behind its name
            loc = tuple(step for step in loc if step not in (ONE, SEVERAL))
            key, settings = str(loc[-1]), _settings_at(loc[:-1], data)
            match error["type"]:
                case "extra_forbidden":
                    yield loc, f"unknown key{_home(key, loc, settings)}"
                case "missing":
                    if not written_wrongly(key, _at(loc[:-1], data), settings.model_fields if settings else ()):
                        yield loc, f"missing, and has no default: {NEEDED[key]}"
                case "union_tag_not_found":
                    yield loc, f"kind is missing, and has no default: {NEEDED['kind']}"
                case "union_tag_invalid":
                    at = (*loc, "kind")
                    yield at, f"must be {NEEDED['kind']}; seen {marked.seen(at)}"
                case _:
                    yield loc, explain(error, loc, marked)
    stages = data.get("stages")
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        if not STAGE_NAME.fullmatch(name) or name == "base":
            yield ("stages", name), "a stage is named with letters, digits, _ and -, and not base"
        kind = STAGE_KINDS.get(str(stage.get("kind"))) if isinstance(stage, dict) else None
        if kind is not None and issubclass(kind, OnlineStage):

            def value_of(key: str, stage: Any = stage, fields: Any = kind.model_fields) -> Any:
                return stage.get(key, fields[key].default if key in fields else None)

            batch_size = value_of("batch_size")
            for key in ("minibatches", "completions_per_prompt"):
                parts = value_of(key)
                if _is_count(batch_size) and _is_count(parts) and batch_size % parts:
                    yield (
                        ("stages", name, key if key in stage else "batch_size"),
                        f"batch_size {batch_size} is not a multiple of {key} {parts}",
                    )
            if stage.get("guard") is not None and stage.get("watch") is None:
                yield (
                    ("stages", name, "guard"),
                    "judges what watch sees, and there is no watch; write watch: {gold: ...} beside it",
                )
            gold = within(stage, "watch", "gold")
            if gold is not None and gold == stage.get("reward"):
                yield (
                    ("stages", name, "watch", "gold"),
                    f"is what the policy is trained on ({gold}); name another scorer, such as a reward stage of other "
                    "pairs",
                )
            epochs, value_epochs = value_of("epochs"), value_of("value_epochs")
            if _is_count(epochs) and _is_count(value_epochs) and value_epochs > epochs:
                yield (
                    ("stages", name, "value_epochs"),
                    f"must be at most epochs, which is {epochs}; seen {value_epochs}",
                )
    trackers = data.get("trackers")
    if isinstance(trackers, list) and len({str(tracker) for tracker in trackers}) < len(trackers):
        yield ("trackers",), "names a tracker twice"


def _at(path: KeyPath, data: Any) -> Any:
    for step in path:
        data = data[step]
    return data


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _settings_at(path: KeyPath, data: Any) -> type[BaseModel] | None:
    """Return the class whose fields the mapping at `path` has."""
    match path:
        case ():
            return Recipe
        case ("stages", name):
            stage = data["stages"][name]
            return STAGE_KINDS.get(str(stage.get("kind"))) if isinstance(stage, dict) else None
        case ("stages", _, "checkpoint_every"):
            return CheckpointEvery
        case ("stages", _, "require"):
            return Require
        case ("stages", _, "watch" | "guard" | "ptx" as nested):
            return NESTED[nested]
        case ("stages", _, "data" | "prompts", int()):
            return Portion
        case (section,):
            return SECTIONS.get(str(section))
    return None


def _home(key: str, path: KeyPath, settings: type[BaseModel] | None) -> str:
    """Return where an unknown key belongs or what it is called here, as the end of a message."""
    fields = settings.model_fields if settings else {}
    ours = FROM_ELSEWHERE.get(key)
    if ours and ("." in ours or "name" in ours or re.findall(r"\w+", ours)[0] in fields):
        return f"; here it is {ours}"
    homes = [f"{place}.{key}" for place, home in HOMES.items() if key in home.model_fields]
    if key in Recipe.model_fields and len(path) > 1:
        homes.insert(0, f"the top level, as {key}")
    return f"; it belongs to {' or '.join(homes[:3])}" if homes else did_you_mean(key, fields)


# ---------------------------------------------------------------- stages that name stages


def chain_problems(stages: Any, folder: Path) -> Iterator[Problem]:
    """Yield where a stage names another that is not before it, or not of the kind that is wanted there."""
    if not isinstance(stages, dict):
        return
    order = {name: index for index, name in enumerate(stages)}
    for name, stage in stages.items():
        if not isinstance(stage, dict):
            continue
        for key, target, kinds in references(stage):
            at = ("stages", name, *key.split("."))
            if target == name:
                yield at, "a stage cannot build on itself"
            elif target not in stages:
                if key in SCORERS and is_address(target):
                    yield from ((at, problem) for problem in _address_problems(target))
                    continue
                if _names_a_model(target, folder) or (key in SCORERS and FUNCTION.fullmatch(target)):
                    continue
                yield at, f"there is no stage {target}{did_you_mean(target, [n for n in stages if n != name])}"
            elif order[target] > order[name]:
                yield at, f"stage {target} comes later in the file; a stage builds on earlier ones only"
            else:
                found = stages[target].get("kind") if isinstance(stages[target], dict) else None
                if isinstance(found, str) and found in STAGE_KINDS and found not in kinds:
                    yield at, f"must name a stage of kind {either(kinds)}; {target} is of kind {found}"


def _address_problems(written: str) -> Iterator[str]:
    """Yield what is wrong with the address of a reward server; what may be a secret is not repeated."""
    if "@" in written:
        yield "has a user or a password in it, and recipes are published; a reward server asks for none"
        return
    try:
        address = urlsplit(written)
        plain = address.scheme in ("http", "https") and address.hostname and not address.query + address.fragment
        wrong = "" if plain else "http:// or https://, a host, and :port"
        _ = address.port
    except ValueError as error:
        wrong = str(error)
    if wrong:
        seen = written.partition("?")[0][:80]
        yield f"is no address of a reward server ({wrong}), such as http://127.0.0.1:8000; seen {seen}"


# ---------------------------------------------------------------- paths


def path_problems(data: dict[str, Any], folder: Path, look: bool) -> Iterator[Problem]:
    """Yield what is not there, and put paths that open from the working directory in place of the ones written."""
    base, stages, evaluation = data.get("base"), data.get("stages"), data.get("evaluation")
    if isinstance(base, dict):
        yield from _model(base, "model", ("base", "model"), folder, look)
        yield from _unpinned_code(base)
        yield from _file(base, "chat_template", ("base", "chat_template"), folder, look, "chat template file")
    yield from _file(data, "data_root", ("data_root",), folder, look, "folder")
    stages = stages if isinstance(stages, dict) else {}
    for name, stage in stages.items():
        if isinstance(stage, dict):
            for key in ("data", "normalize_on", "prompts"):
                yield from _file(stage, key, ("stages", name, key), folder, look, "data card")
                for index, portion in enumerate(stage[key] if isinstance(stage.get(key), list) else []):
                    if isinstance(portion, dict):
                        at = ("stages", name, key, index, "card")
                        yield from _file(portion, "card", at, folder, look, "data card")
            for key, target, _ in references(stage):
                if _names_a_model(target, folder) and target not in stages:
                    at = ("stages", name, *key.split("."))
                    settings = _at(at[:-1], data)
                    yield from _artefact(settings, at, folder, look, bare_hub_id=key in SCORERS)
            if isinstance(stage.get("ptx"), dict):
                yield from _file(stage["ptx"], "data", ("stages", name, "ptx", "data"), folder, look, "data card")
    if isinstance(evaluation, dict):
        yield from _file(evaluation, "prompts", ("evaluation", "prompts"), folder, look, "data card")


def _unpinned_code(base: dict[str, Any]) -> Iterator[Problem]:
    """Yield that code of the Hub that can change would be run; a local `base.model` is a path that opens by now."""
    model, revision = base.get("model"), base.get("revision", "main")
    if base.get("trust_remote_code") is not True or not isinstance(model, str) or find_path(model, [Path()]):
        return
    if not (isinstance(revision, str) and COMMIT.fullmatch(revision)):
        yield (
            ("base", "trust_remote_code"),
            f"runs code from the Hub, so base.revision must be a commit of 40 hex digits; seen {str(revision)[:60]}",
        )


def _names_a_model(target: str, folder: Path) -> bool:
    """Whether what is no stage is written as a folder or a repository of the Hub."""
    if FUNCTION.fullmatch(target) or is_address(target):
        return False
    here = find_path(target, [folder, Path()])
    return re.search("[/:]", target) is not None or (here is not None and here.is_dir())


def _artefact(
    settings: dict[str, Any], at: KeyPath, folder: Path, look: bool, *, bare_hub_id: bool
) -> Iterator[Problem]:
    """Yield what is wrong with the name of an adapter or a model, which of a reward model may lack its hub://."""
    key = str(at[-1])
    written = settings[key]
    if written.startswith(HUB):
        if hub_reference(written) is None:
            yield at, f"must be written {HubReference.FORM}; seen {written[:80]}"
        return
    if not bare_hub_id and HUB_ID.fullmatch(written) and find_path(written, [folder, Path()]) is None:
        if look:
            yield at, f"there is no folder {written}; on the Hub it is {HUB}{written}"
        return
    yield from _model(settings, key, at, folder, look)


def _file(settings: dict[str, Any], key: str, at: KeyPath, folder: Path, look: bool, what: str) -> Iterator[Problem]:
    written = settings.get(key)
    if not isinstance(written, str) or not written:
        return
    found = find_path(written, [folder, Path()])
    if found is not None and found.is_dir() == (what == "folder"):
        settings[key] = str(found)
    elif look and found is not None:
        yield at, f"{found} is a {'folder' if found.is_dir() else 'file'}, not a {what}"
    elif look:
        yield at, f"there is no {what} {written}{not_found(written, [folder, Path()])}"


def _model(settings: dict[str, Any], key: str, at: KeyPath, folder: Path, look: bool) -> Iterator[Problem]:
    written = settings.get(key)
    if not isinstance(written, str) or not written:
        return
    found = find_path(written, [folder, Path()])
    if found is not None and found.is_dir():
        settings[key] = str(found)
    elif found is not None:
        yield at, f"{written} is a file; name the checkpoint's folder"
    elif look and not HUB_ID.fullmatch(written):
        hub = "" if re.match(r"[./~]", written) else ", and a Hub id looks like owner/name"
        if re.fullmatch(r"[\w.-]+:\d+", written):
            hub = f"; the address of a reward server is http://{written}"
        yield at, f"there is no model folder {written}{not_found(written, [folder, Path()])}{hub}"
