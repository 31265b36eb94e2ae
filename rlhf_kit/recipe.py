"""The recipe: one YAML file that tells the whole story of a run, as typed data.

`load_recipe` reads it whole before anything else is looked at, and reports everything that is wrong with it together,
each with file, line and what would work. There are no includes, no interpolation and no environment variables. What the
user must decide has no default. Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from rlhf_kit.errors import InputError, did_you_mean
from rlhf_kit.marked_yaml import KeyPath, MarkedYaml, Problem, read_yaml, write_yaml

__all__ = [
    "Adapter",
    "Base",
    "CheckpointEvery",
    "Evaluation",
    "PPOStage",
    "Publish",
    "Recipe",
    "RewardStage",
    "SFTStage",
    "Stage",
    "load_recipe",
    "recipe_schema",
    "resolved_yaml",
    "written_recipe",
]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
COMMIT = re.compile(r"[0-9a-f]{40}")
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$"
STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
MAX_BYTES = 1_000_000
"""A recipe is a page long; something larger is another file."""

# ---------------------------------------------------------------- the fields


class Settings(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _text_or_texts(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise PydanticCustomError("text_or_texts", "must be text or a list of texts")
    return value


Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
LearningRate = Annotated[float, Field(gt=0, le=1)]
Schedule = Literal["cosine", "linear", "constant"]
Truncate = Literal["error", "drop", "left_prompt"]
Function = Annotated[str, Field(pattern=f"^{FUNCTION.pattern}$")]
Text = Annotated[str, Field(min_length=1)]


class Base(Settings):
    """The pretrained checkpoint that every role is an adapter on."""

    model: Text
    """A local folder (looked for beside the recipe, then in the working directory), or a Hub id owner/name."""
    revision: Text = "main"
    """Branch, tag or commit of a Hub model; of no effect on a local folder."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights that are not quantised, and of the arithmetic."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint; a Hub model then needs `revision` to be a 40-digit commit."""
    chat_template: Text | None = None
    """A .jinja file that takes the place of the tokenizer's own chat template."""


class Adapter(Settings):
    """The shape of every LoRA adapter of the run."""

    r: Count = 16
    alpha: Positive = 32.0
    """Updates are scaled by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[str | list[str], BeforeValidator(_text_or_texts)] = "all-linear"
    """all-linear, a list of module names, or one regular expression."""


class CheckpointEvery(Settings):
    """Whichever comes first; null leaves one out."""

    updates: Count | None = 20
    minutes: Positive | None = 10.0


class _Training(Settings):
    epochs: Positive = 1.0
    max_steps: Count | None = None
    """Optimizer steps; set, it takes the place of epochs."""
    batch_size: Count = 16
    """Sequences (reward: pairs) per optimizer step, over all processes."""
    microbatch: Count = 8
    """Sequences (reward: pairs) per forward pass of one process."""
    learning_rate: LearningRate = 2e-4
    schedule: Schedule = "cosine"
    warmup_fraction: Fraction = 0.03
    """Of the optimizer steps."""
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0
    max_length: Count | None = None
    """Tokens per row, prompt and completion together; null is the base model's context."""
    truncate: Truncate = "error"
    """What becomes of longer rows: an error, left out and counted, or their prompts cut from the left and counted."""


class SFTStage(_Training):
    """Supervised finetuning on demonstrations; the loss is on completion tokens."""

    kind: Literal["sft"]
    init: Text | None = None
    """An earlier sft stage whose adapter this one goes on from."""
    data: Text
    """A data card of kind demonstrations or text."""


class RewardStage(_Training):
    """A reward model from pairwise preferences."""

    kind: Literal["reward"]
    init: Text | None = None
    """An earlier sft stage whose adapter the reward adapter starts as a copy of."""
    data: Text
    """A data card of kind preferences."""
    normalize_on: Text | None = None
    """A card of demonstrations whose mean score becomes 0 and standard deviation 1; null takes the card of the `init`
    stage, or without one the chosen completions."""
    center_coef: NonNegative = 0.0
    """Weight of (score of chosen + score of rejected)^2 in the loss."""


class PPOStage(Settings):
    """PPO on the reward model's score, with a KL penalty towards the policy it starts from."""

    kind: Literal["ppo"]
    policy: Text
    """An earlier sft or ppo stage: where the policy starts, and the KL reference."""
    reward: Text
    """An earlier reward stage; or a folder or Hub id of a sequence classification model; or package.module:function."""
    prompts: Text
    """A data card of kind prompts; of demonstrations and preferences the prompts are used."""
    kl_coef: NonNegative
    """Score given up per nat of KL to the reference. Between 0.01 and 0.2 is usual for a normalised score."""
    kl_target: Positive | None = None
    """Nats per completion. Set, it makes the coefficient adaptive (Ziegler et al. 2019, section 2.2)."""
    kl_horizon: Positive = 10_000.0
    """Completions over which the adaptive coefficient moves."""
    updates: Count = 40
    batch_size: Count = 64
    """Completions per update, over all processes."""
    epochs: Count = 4
    """Passes over the completions of an update."""
    minibatches: Count = 2
    """Optimizer steps per epoch."""
    microbatch: Count = 16
    """Completions per forward pass of one process."""
    max_new_tokens: Count = 64
    temperature: Positive = 1.0
    truncate: Truncate = "error"
    """What becomes of prompts that leave no room for `max_new_tokens`."""
    learning_rate: LearningRate = 1e-4
    value_learning_rate: LearningRate | None = None
    """null is `learning_rate`."""
    schedule: Schedule = "linear"
    warmup_updates: Annotated[int, Field(ge=0)] = 3
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    lam: Fraction = 0.95
    clip: Positive = 0.2
    """The policy ratio's distance from 1 beyond which the objective is flat."""
    value_clip: Positive = 0.2
    value_coef: NonNegative = 0.1
    value: Literal["adapter", "trunk"] = "adapter"
    """adapter: its own adapter and head, started from the reward adapter. trunk: a head on the policy's trunk."""
    missing_eos_penalty: NonNegative | None = None
    """Taken from the score of a completion that has no end token."""
    normalize_score: bool = True
    """Use the mean and standard deviation that the reward stage left."""
    whiten_scores: bool = False
    whiten_advantages: bool = True
    score_clip: Positive | None = None
    """Scores are held within plus and minus this."""
    kl_budget: Positive | None = None
    """Nats per completion that the closing table compares with."""
    samples_every: Count = 10
    """Updates."""
    checkpoint_every: CheckpointEvery = CheckpointEvery()
    keep_checkpoints: bool = False


Stage = Annotated[SFTStage | RewardStage | PPOStage, Field(discriminator="kind")]
STAGE_KINDS: Mapping[str, type[BaseModel]] = {"sft": SFTStage, "reward": RewardStage, "ppo": PPOStage}


class Evaluation(Settings):
    """What the closing table is measured on."""

    prompts: Text | None = None
    """A data card; null takes the held-out prompts of the last ppo stage's card."""
    count: Count = 256
    """Prompts, at most."""
    batch_size: Count = 64
    gold: Function | None = None
    """A scorer package.module:function that no stage trains on."""
    max_new_tokens: Count | None = None
    """null is the ppo stage's."""


class Publish(Settings):
    """Where `push` takes the run."""

    repo: Annotated[str, Field(pattern=f"^{HUB_ID.pattern}$")]
    private: bool = True


@dataclass(frozen=True)
class _Origin:
    """Where a recipe came from; two recipes from different files may be equal."""

    path: Path = field(default=Path("recipe.yaml"), compare=False)
    marked: MarkedYaml = field(default_factory=lambda: MarkedYaml("recipe.yaml"), compare=False)


class Recipe(Settings):
    """A whole run. Paths in it open from the working directory."""

    name: Annotated[str, Field(pattern=NAME)]
    """The run directory is runs/<name>."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    data_root: Text | None = None
    """A folder in which the cards' relative sources are looked for first."""
    base: Base
    adapter: Adapter = Adapter()
    stages: Annotated[dict[str, Stage], Field(min_length=1)]
    """In the order in which they run; a stage may name only earlier ones."""
    evaluation: Evaluation = Evaluation()
    publish: Publish | None = None
    trackers: list[Literal["tensorboard", "trackio", "wandb", "mlflow"]] = []

    _origin: _Origin = PrivateAttr(default_factory=_Origin)

    @property
    def path(self) -> Path:
        """The file it was read from, as the user named it."""
        return self._origin.path

    @property
    def folder(self) -> Path:
        """The folder of that file."""
        return self._origin.path.parent

    @property
    def is_local_base(self) -> bool:
        """Whether the base is a folder, and not a Hub id."""
        return Path(self.base.model).is_dir()

    def where(self, dotted: str) -> str:
        """Return "file:line: a.b" of a setting, to begin a message with."""
        return f"{self._origin.marked.place(tuple(dotted.split('.')))}: {dotted}"

    def reward_source(self, stage: str) -> Literal["stage", "function", "model"]:
        """Return what the `reward` of a ppo stage names."""
        settings = self.stages[stage]
        assert isinstance(settings, PPOStage)
        if settings.reward in self.stages:
            return "stage"
        return "function" if FUNCTION.fullmatch(settings.reward) else "model"

    def depends_on(self, stage: str) -> list[str]:
        """Return the names of the earlier stages that a stage builds on, in the order in which its fields name them."""
        return list(
            dict.fromkeys(name for _, name, _ in _references(self.stages[stage].model_dump()) if name in self.stages)
        )


# ---------------------------------------------------------------- reading


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in the file `path`, after the overrides, each "stages.ppo.kl_coef=0.1".

    Raises:
        InputError: everything that is wrong with it, together.
    """
    return _load(Path(path), overrides, look=True)


def written_recipe(path: str | Path) -> Recipe:
    """Return the recipe that a run wrote down, without looking whether the files it names are still there.

    Raises:
        InputError: it is not there, or has been changed to something that is no recipe.
    """
    return _load(Path(path), (), look=False)


def resolved_yaml(recipe: Recipe) -> str:
    """Return the recipe with every default written out. Loaded from the same working directory it gives it again."""
    data = recipe.model_dump()
    for name, stage in recipe.stages.items():
        first = {key: data["stages"][name][key] for key in type(stage).__annotations__}  # what is its own: kind, data
        data["stages"][name] = first | data["stages"][name]
    return write_yaml(data)


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes, for editors."""
    return Recipe.model_json_schema()


def _load(path: Path, overrides: Sequence[str], look: bool) -> Recipe:
    marked = read_yaml(read_text(path, "recipe"), str(path))
    if marked.value is None and not overrides:
        raise InputError(f"{path}: is empty; a recipe has name, base and stages")
    if marked.value is not None and not (isinstance(marked.value, dict) and marked.value.keys() & Recipe.model_fields):
        raise InputError(f"{path}:1: is not a recipe, which is a mapping with name, base and stages; wrong file?")
    wrong = [message for override in overrides for message in _override(marked, override)]
    if wrong:
        raise InputError(wrong)
    data = _open_sections(marked.value or {})
    marked.value = data
    problems = list(_field_problems(data, marked))
    problems += _chain_problems(data.get("stages"), path.parent)
    problems += _path_problems(data, path.parent, look)  # turns the paths in `data` into ones that open
    if problems:
        raise InputError(marked.messages(problems))
    recipe = Recipe.model_validate(data)
    recipe._origin = _Origin(path, marked)
    return recipe


def read_text(path: Path, what: str) -> str:
    """Return the text of a small file that the user named.

    Raises:
        InputError: there is none, it is a folder, too large, or not UTF-8.
    """
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a folder; name the {what} file in it{_files_in(path)}")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise InputError(f"{path}: {size:,} bytes is more than the {MAX_BYTES:,} a {what} may have; wrong file?")
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        near = did_you_mean(path.name, _names(path.parent)) if path.parent.is_dir() else "; nor is there such a folder"
        raise InputError(f"{path}: there is no such {what}{near}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8 text; is this a {what}?") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read the {what}: {error.strerror}") from None


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.suffix in (".yaml", ".yml", ".md")]


def _files_in(folder: Path) -> str:
    names = sorted(_names(folder))
    return f": {', '.join(names[:8])}" if names else ""


def _override(marked: MarkedYaml, override: str) -> Iterator[str]:
    place = f"--set {override if len(override) <= 80 else override[:77] + '...'}"
    key, equals, value = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        yield f"{place}: write a key path, =, and a value, such as --set stages.ppo.kl_coef=0.1"
        return
    try:
        marked.put(path, read_yaml(value, place), place)
    except InputError as error:
        yield from error.problems


SECTIONS: Mapping[str, type[BaseModel]] = {
    "base": Base,
    "adapter": Adapter,
    "evaluation": Evaluation,
    "publish": Publish,
}
MAY_BE_EMPTY = ("base", "adapter", "evaluation")


def _open_sections(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a copy in which a section whose every key is commented out is empty and not null."""
    data = dict(raw)
    for section in MAY_BE_EMPTY:
        if section in data and data[section] is None:
            data[section] = {}
        elif isinstance(data.get(section), dict):
            data[section] = dict(data[section])
    if isinstance(data.get("stages"), dict):
        data["stages"] = {
            name: {} if stage is None else dict(stage) if isinstance(stage, dict) else stage
            for name, stage in data["stages"].items()
        }
        for stage in data["stages"].values():
            if isinstance(stage, dict) and "checkpoint_every" in stage and stage["checkpoint_every"] is None:
                stage["checkpoint_every"] = {}
    return data


# ---------------------------------------------------------------- fields one by one

FROM_ELSEWHERE: Mapping[str, str] = {
    "lr": "learning_rate",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "ppo_epochs": "epochs",
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

HOMES: Mapping[str, type[BaseModel]] = {
    **SECTIONS,
    **{f"stages.<{kind} stage>": settings for kind, settings in STAGE_KINDS.items()},
    "stages.<ppo stage>.checkpoint_every": CheckpointEvery,
}

NEEDED: Mapping[str, str] = {
    "name": "the run directory is runs/<name>",
    "base": "at least {model: <folder or Hub id>}",
    "model": "a local folder or a Hub id such as HuggingFaceTB/SmolLM2-135M",
    "stages": "at least one, such as sft: {kind: sft, data: data_cards/mine.md}",
    "kind": "sft, reward or ppo",
    "data": "the data card to learn from",
    "policy": "the earlier sft stage to start from",
    "reward": "an earlier reward stage, a model, or package.module:function",
    "prompts": "the data card with the prompts",
    "kl_coef": "the price of a nat of KL, usually between 0.01 and 0.2",
    "repo": "owner/name on the Hub",
}
"""What to write for a required setting."""


def _field_problems(data: dict[str, Any], marked: MarkedYaml) -> Iterator[Problem]:
    try:
        Recipe.model_validate(data)
    except ValidationError as invalid:
        for error in invalid.errors(include_url=False):
            loc = error["loc"]
            if len(loc) > 2 and loc[0] == "stages":
                loc = (*loc[:2], *loc[3:])  # pydantic puts the stage's kind behind its name
            settings = _settings_at(loc[:-1], data)
            if error["type"] == "missing" and _written_wrongly(str(loc[-1]), loc[:-1], data, settings):
                continue  # the message about the unknown key says it
            yield loc, explain(error, loc, marked, settings)
    stages = data.get("stages")
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        if not STAGE_NAME.fullmatch(name) or name == "base":
            yield ("stages", name), "a stage is named with letters, digits, _ and -, and not base"
        if isinstance(stage, dict) and stage.get("kind") == "ppo":
            batch_size, minibatches = stage.get("batch_size", 64), stage.get("minibatches", 2)
            if _is_count(batch_size) and _is_count(minibatches) and batch_size % minibatches:
                yield (
                    ("stages", name, "minibatches" if "minibatches" in stage else "batch_size"),
                    f"batch_size {batch_size} is not a multiple of minibatches {minibatches}",
                )
    trackers = data.get("trackers")
    if isinstance(trackers, list) and len({str(tracker) for tracker in trackers}) < len(trackers):
        yield ("trackers",), "names a tracker twice"
    base = data.get("base")
    if isinstance(base, dict) and base.get("trust_remote_code") is True and isinstance(base.get("model"), str):
        revision = base.get("revision", "main")
        local = Path(base["model"]).expanduser().exists()
        if not local and not (isinstance(revision, str) and COMMIT.fullmatch(revision)):
            yield (
                ("base", "trust_remote_code"),
                f"runs code from the Hub, so base.revision must be a commit of 40 hex digits; seen {revision}",
            )


def _written_wrongly(key: str, path: KeyPath, data: Any, settings: type[BaseModel] | None) -> bool:
    for step in path:
        data = data[step]
    fields = settings.model_fields if settings else {}
    return any(near == f"; did you mean {key}?" for near in (_near(k, fields) for k in data if k not in fields))


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
        case (section,):
            return SECTIONS.get(str(section))
    return None


def explain(error: ErrorDetails, path: KeyPath, marked: MarkedYaml, settings: type[BaseModel] | None) -> str:
    """Return what one of pydantic's errors means to the person who wrote the file: expected, seen, what would work."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key{_unknown(str(path[-1]), path, settings)}"
    if kind == "missing" or kind == "union_tag_not_found":
        key = "kind" if kind == "union_tag_not_found" else str(path[-1])
        what = "missing" if kind == "missing" else "kind is missing"
        return f"{what}, and has no default{': ' + NEEDED[key] if key in NEEDED else ''}"
    seen = marked.seen(path) if kind != "union_tag_invalid" else marked.seen((*path, "kind"))
    if kind == "union_tag_invalid":
        return f"kind must be one of sft, reward, ppo; seen {seen}{_near(str(context['tag']), STAGE_KINDS)}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        one_of = f"{', '.join(choices[:-1])} or {choices[-1]}" if len(choices) > 1 else choices[0]
        return f"must be {one_of}; seen {seen}{_near(str(error['input']), choices)}"
    nullish = isinstance(error["input"], str) and error["input"].lower() in ("none", "nil", "n/a", "off", "no")
    expected = _expected(kind, context)
    if expected is None:
        return f"{error['msg']}; seen {seen}"
    hint = ""
    if kind == "string_type" and isinstance(error["input"], int | float):
        hint = f'; in quotes it is text: "{marked.texts.get(path, error["input"])}"'
    elif kind == "bool_type" and str(error["input"]).lower() in ("yes", "no", "on", "off", "0", "1"):
        hint = "; write true" if str(error["input"]).lower() in ("yes", "on", "1") else "; write false"
    elif kind in ("int_type", "float_type") and isinstance(error["input"], str):
        try:
            float(error["input"])
            hint = "; write it without quotes"
        except ValueError:
            hint = "; for none at all write null" if nullish else ""
    elif kind == "int_type" and isinstance(error["input"], float) and error["input"].is_integer():
        hint = f"; write {int(error['input'])}"
    return f"must be {expected}; seen {seen}{hint}"


def _expected(kind: str, context: Mapping[str, Any]) -> str | None:
    words = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "string_type": "text",
        "string_too_short": "text that is not empty",
        "list_type": "a list",
        "dict_type": "a mapping",
        "model_type": "a mapping",
        "model_attributes_type": "a mapping",
        "text_or_texts": "text or a list of texts, none empty",
        "too_short": "given: at least one",
    }
    limits = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    comparison = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
    if kind in limits:
        return f"{comparison[limits[kind]]} {context[limits[kind]]:g}"
    if kind == "string_pattern_mismatch":
        return {
            NAME: "letters, digits, '.', '_' and '-', beginning with a letter or digit, 96 at most",
            f"^{FUNCTION.pattern}$": "a function, written package.module:function",
            f"^{HUB_ID.pattern}$": "owner/name on the Hub",
        }[context["pattern"]]
    return words.get(kind)


def _near(word: str, known: Any) -> str:
    hint = did_you_mean(word, known)
    return hint if hint.startswith("; did") else ""


def _unknown(key: str, path: KeyPath, settings: type[BaseModel] | None) -> str:
    here = settings.model_fields if settings else {}
    if key in FROM_ELSEWHERE:
        ours = FROM_ELSEWHERE[key]
        if "." in ours or settings is None or re.match(r"\w+", ours).group() in here:  # type: ignore[union-attr]
            return f"; here it is {ours}"
    near = _near(key, here)
    homes = [f"{place}.{key}" for place, home in HOMES.items() if key in home.model_fields]
    if key in Recipe.model_fields and len(path) > 1:
        homes.insert(0, f"{key}, beside base and stages")
    if homes:
        return f"; it belongs to {' or '.join(homes[:3])}"
    return near or did_you_mean(key, here)


# ---------------------------------------------------------------- stages that name stages


MAY_NAME: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "sft": {"init": ("sft",)},
    "reward": {"init": ("sft",)},
    "ppo": {"policy": ("sft", "ppo"), "reward": ("reward",)},
}
"""For each kind of stage the fields that name a stage, and of which kinds."""


def _references(stage: Mapping[str, Any]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield field, the stage it names, and the kinds that stage may have."""
    for name, kinds in MAY_NAME.get(str(stage.get("kind")), {}).items():
        if isinstance(stage.get(name), str) and stage[name]:
            yield name, stage[name], kinds


def _chain_problems(stages: Any, folder: Path) -> Iterator[Problem]:
    if not isinstance(stages, dict):
        return
    order = {name: index for index, name in enumerate(stages)}
    for name, stage in stages.items():
        if not isinstance(stage, dict):
            continue
        for key, target, kinds in _references(stage):
            at = ("stages", name, key)
            if target == name:
                yield at, "a stage cannot build on itself"
            elif target not in stages:
                if key == "reward" and (FUNCTION.fullmatch(target) or _names_a_model(target, folder)):
                    continue
                yield at, f"there is no stage {target}{did_you_mean(target, [n for n in stages if n != name])}"
            elif order[target] > order[name]:
                yield at, f"stage {target} comes later in the file; a stage builds on earlier ones only"
            else:
                found = stages[target].get("kind") if isinstance(stages[target], dict) else None
                if found in STAGE_KINDS and found not in kinds:
                    yield at, f"must name a stage of kind {' or '.join(kinds)}; {target} is of kind {found}"


# ---------------------------------------------------------------- paths


def _path_problems(data: dict[str, Any], folder: Path, look: bool) -> Iterator[Problem]:
    """Yield what is not there, and put paths that open from the working directory in place of the ones written."""
    base, stages, evaluation = data.get("base"), data.get("stages"), data.get("evaluation")
    if isinstance(base, dict):
        yield from _model(base, "model", ("base", "model"), folder, look)
        yield from _file(base, "chat_template", ("base", "chat_template"), folder, look, "chat template file")
    yield from _file(data, "data_root", ("data_root",), folder, look, "folder")
    stages = stages if isinstance(stages, dict) else {}
    for name, stage in stages.items():
        if isinstance(stage, dict):
            for key in ("data", "normalize_on", "prompts"):
                yield from _file(stage, key, ("stages", name, key), folder, look, "data card")
            if stage.get("reward") not in stages and _names_a_model(stage.get("reward"), folder):
                yield from _model(stage, "reward", ("stages", name, "reward"), folder, look)
    if isinstance(evaluation, dict):
        yield from _file(evaluation, "prompts", ("evaluation", "prompts"), folder, look, "data card")


def _names_a_model(reward: Any, folder: Path) -> bool:
    if not isinstance(reward, str) or FUNCTION.fullmatch(reward):
        return False
    return re.search("[/:]", reward) is not None or any((place / reward).is_dir() for place in (folder, Path()))


def _file(settings: dict[str, Any], key: str, at: KeyPath, folder: Path, look: bool, what: str) -> Iterator[Problem]:
    written = settings.get(key)
    if not isinstance(written, str) or not written:
        return
    found = find_path(written, folder)
    if found is None or found.is_dir() != (what == "folder"):
        if look:
            yield at, f"there is no {what} {written}{_not_found(written, folder, found)}"
        return
    settings[key] = str(found)


def _model(settings: dict[str, Any], key: str, at: KeyPath, folder: Path, look: bool) -> Iterator[Problem]:
    written = settings.get(key)
    if not isinstance(written, str) or not written:
        return
    found = find_path(written, folder)
    if found is not None and found.is_dir():
        settings[key] = str(found)
    elif found is not None:
        yield at, f"{written} is a file; name the checkpoint's folder"
    elif look and not HUB_ID.fullmatch(written):
        hub = "" if re.match(r"[./~]", written) else ", and a Hub id looks like owner/name"
        yield at, f"there is no model folder {written}{_not_found(written, folder, None)}{hub}"


def find_path(written: str, folder: Path) -> Path | None:
    """Return the path that a recipe or card in `folder` means by `written`, or None if nothing is there.

    Looked for beside the file, then in the working directory. Relative to the working directory when inside it.
    """
    path = Path(written).expanduser()
    for place in (folder, Path()):
        candidate = place / path
        try:
            exists = candidate.exists()
        except (OSError, ValueError):  # too long a name, a NUL character
            exists = False
        if exists:
            absolute = Path(os.path.abspath(candidate))
            here = Path.cwd()
            return absolute.relative_to(here) if absolute.is_relative_to(here) and absolute != here else absolute
    return None


def _not_found(written: str, folder: Path, found: Path | None) -> str:
    """Return where it was looked for, and the nearest name that is there."""
    if found is not None:
        return f"; {found} is a {'folder' if found.is_dir() else 'file'}"
    if "$" in written:
        return "; environment variables are not filled in, use --set"
    places = [folder] if Path(written).expanduser().is_absolute() else list(dict.fromkeys([folder, Path()]))
    for place in places:
        wanted = place / Path(written).expanduser()
        if wanted.parent.is_dir() and wanted.name:
            near = _near(wanted.name, [entry.name for entry in wanted.parent.iterdir()])
            if near:
                return f"{near.removesuffix('?')} in {wanted.parent}?"
    if Path(written).expanduser().is_absolute():
        return ""
    return f" (looked in {' and in '.join('the working directory' if p == Path() else str(p) for p in places)})"
