"""The recipe: one YAML file that tells the whole story of a run, as typed data.

`load_recipe` reads it whole before anything else is looked at, and reports everything that is wrong with it together,
each with file, line and what would work. There are no includes, no interpolation and no environment variables. What the
user must decide has no default. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, Discriminator, Field, PrivateAttr, Tag, ValidationError

from rlhf_kit.errors import InputError, did_you_mean, printable
from rlhf_kit.marked_yaml import KeyPath, MarkedYaml, Problem, read_yaml, write_yaml
from rlhf_kit.settings import (
    HUB,
    HUB_ID,
    Count,
    Fraction,
    HubReference,
    NonNegative,
    Positive,
    Settings,
    Text,
    TextOrTexts,
    explain,
    find_path,
    hub_reference,
    matching,
    not_found,
    read_text,
    written_wrongly,
)

__all__ = [
    "PTX",
    "Adapter",
    "Base",
    "Cards",
    "CheckpointEvery",
    "DPOStage",
    "Evaluation",
    "GRPOStage",
    "Guard",
    "KTOStage",
    "OnlineStage",
    "PPOStage",
    "PolicyStage",
    "Portion",
    "Publish",
    "RLOOStage",
    "Recipe",
    "RejectionSamplingStage",
    "Require",
    "RewardStage",
    "SFTStage",
    "SamplingStage",
    "Stage",
    "Ties",
    "TrainingStage",
    "Truncate",
    "TunedStage",
    "Watch",
    "load_recipe",
    "recipe_schema",
    "resolved_yaml",
    "written_recipe",
]

FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
COMMIT = re.compile(r"[0-9a-f]{40}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

# ---------------------------------------------------------------- the fields


LearningRate = Annotated[float, Field(gt=0, le=1)]
Schedule = Literal["cosine", "linear", "constant"]
Truncate = Literal["error", "drop", "left_prompt"]
Ties = Literal["drop", "soft"]
Function = Annotated[str, matching(FUNCTION, "a function, written package.module:function")]


class Base(Settings):
    """The pretrained checkpoint that every role is an adapter on."""

    model: Text
    """A local folder (looked for beside the recipe, then in the working directory), or a Hub id owner/name."""
    revision: Text = "main"
    """Branch, tag or commit of a Hub model; of no effect on a local folder."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """How the frozen weights are held: as they are, in 8 bit (int8), or in 4 bit (NF4)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights that are not quantised, and of the arithmetic."""
    hub_id: Annotated[str, matching(HUB_ID, "owner/name on the Hub")] | None = None
    """What a local folder is called on the Hub, for those who load a published adapter."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint; a Hub model then needs `revision` to be a 40-digit commit."""
    chat_template: Text | None = None
    """A .jinja file that takes the place of the tokenizer's own chat template."""


class Adapter(Settings):
    """The shape of every LoRA adapter of the run."""

    r: Count = 16
    """Rank: an adapted layer gets r x (inputs + outputs) weights."""
    alpha: Positive = 32.0
    """Updates are scaled by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of what goes into an adapter, in sft, reward and rejection_sampling stages; the others have none, so that policy
    and reference start alike."""
    target_modules: TextOrTexts = "all-linear"
    """all-linear, a list of module names, or one regular expression."""


class CheckpointEvery(Settings):
    """Whichever comes first; null leaves one out."""

    updates: Count | None = 20
    """Of ppo, rloo and grpo stages; of the others, optimizer steps."""
    minutes: Positive | None = 10.0
    """Since the last checkpoint."""


class Portion(Settings):
    """One of several cards that a stage learns from."""

    card: Text
    """A data card."""
    weight: Positive = 1.0
    """How often each row to train on is there in an epoch; 2.5 is twice, and half of the rows, by hash, once more."""
    cap: Count | None = None
    """At most so many rows to train on, chosen by their hash, before the weight."""


_ONE, _SEVERAL = "one card", "several cards"
Cards = Annotated[
    Annotated[Text, Tag(_ONE)] | Annotated[tuple[Portion, ...], Field(strict=False), Tag(_SEVERAL)],
    Discriminator(lambda written: _SEVERAL if isinstance(written, list | tuple) and written else _ONE),
]
"""A data card, or a list of cards, each its path or {card, weight?, cap?}."""


def cards_of(cards: Cards) -> list[str]:
    """Return the cards that one or several are, in order."""
    return [cards] if isinstance(cards, str) else [portion.card for portion in cards]


class _Stage(Settings):
    """What every kind of stage has."""

    kind: str
    checkpoint_every: CheckpointEvery = CheckpointEvery()
    """How often what was done is saved."""
    keep_checkpoints: bool = False
    """Keep all of them, also when the stage is finished."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What becomes of a step whose loss, gradient or score is NaN or infinite: the run ends, or it is not taken."""
    max_skipped: Count = 10
    """Steps of the stage that may be skipped; one more ends the run."""


class TrainingStage(_Stage):
    """What every stage has that passes over rows which are there before it learns."""

    epochs: Positive = 1.0
    """Passes over the rows; 0.5 is half of one."""
    max_steps: Count | None = None
    """Optimizer steps; set, it takes the place of epochs."""
    batch_size: Count = 16
    """Sequences (reward, dpo, kto: prompts, each with all its completions) per optimizer step, over all processes."""
    microbatch: Count = 8
    """Sequences (reward, dpo, kto: prompts, of the longest) per forward and backward pass of one process; halved when
    memory runs out, which changes no step."""
    learning_rate: LearningRate = 2e-4
    """Of AdamW, at its peak."""
    schedule: Schedule = "cosine"
    """How the rate falls after the warm-up: to 0 along a cosine or a line, or not at all."""
    warmup_fraction: Fraction = 0.03
    """Of the optimizer steps."""
    weight_decay: NonNegative = 0.0
    """AdamW's."""
    max_grad_norm: Positive = 1.0
    """A longer gradient is shortened to this."""


class _Reading(TrainingStage):
    max_length: Count | None = None
    """Tokens per row, prompt and completion together; null is the base model's context."""
    truncate: Truncate = "error"
    """What becomes of longer rows: an error, left out and counted, or their prompts cut from the left and counted."""


class SFTStage(_Reading):
    """Supervised finetuning on demonstrations; the loss is on completion tokens."""

    kind: Literal["sft"]
    """Says which of the kinds of stage this is."""
    init: Text | None = None
    """What this one goes on from: an earlier sft stage; or the adapter of a causal language model in a folder or on the
    Hub (hub://OWNER/NAME[/SUBFOLDER][@REVISION]), whose rank and targets it then keeps."""
    data: Cards
    """A data card of kind demonstrations or text, or several to mix."""


class Require(Settings):
    """What a reward model must be before a stage learns from it, by its health report; null asks for nothing."""

    accuracy: Fraction | None = None
    """Held-out accuracy, at least."""
    accuracy_lower_bound: Fraction | None = None
    """The lower end of its 95 % interval, at least; above 0.5 it is better than a coin."""
    accuracy_over_rules: Annotated[float, Field(ge=-1, le=1)] | None = None
    """By how much it is above that of the best trivial rule, such as "longer wins", at least."""
    calibration_error: Fraction | None = None
    """Expected calibration error, at most."""
    length_correlation: Fraction | None = None
    """Correlation of score and length, of either sign, at most."""
    probes: Fraction | None = None
    """Share of good answers that score no higher than what a probe made of them (empty, shuffled, ...), at most."""
    action: Literal["stop", "warn"] = "stop"
    """What becomes of the chain when one is missed: it ends before the stage that would learn from it, or goes on."""


class RewardStage(_Reading):
    """A reward model from preferences or rankings; a preference is a ranking of two.

    Each completion of a prompt is encoded once, and the loss is averaged over the prompt's pairs, then over the prompts
    of a step, so every prompt counts the same.
    """

    kind: Literal["reward"]
    """Says which of the kinds of stage this is."""
    init: Text | None = None
    """What the reward adapter starts as a copy of: an earlier sft stage, or an adapter in a folder or on the Hub."""
    data: Cards
    """A data card of kind preferences or rankings, or several to mix."""
    normalize_on: Text | None = None
    """A card of demonstrations whose mean score becomes 0 and standard deviation 1; null takes the card of the `init`
    stage, or without one the chosen completions."""
    microbatch_tokens: Count | None = None
    """Tokens of the prompts whose gradient one process makes at a time, all their completions together; changes memory
    and speed, not the steps. null is `microbatch` times those of the longest prompt."""
    ties: Ties = "drop"
    """drop: pairs that were judged equal teach nothing; soft: they are learnt as even odds. Held-out accuracy is over
    the other pairs in either case."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a label is the wrong way round."""
    center_coef: NonNegative = 0.0
    """Weight of (score of chosen + score of rejected)^2 in the loss."""
    lm_coef: NonNegative = 0.0
    """Weight of the language modelling loss on each prompt's best completion, in nats per token."""
    ensemble: Count = 1
    """Reward adapters, trained one after the other with heads, data orders and seeds of their own."""
    ensemble_score: Literal["mean", "worst", "lower"] = "mean"
    """Of the members' normalised scores: the mean, the least, or the mean less `ensemble_k` standard deviations."""
    ensemble_k: NonNegative = 1.0
    """Of `lower`: how many standard deviations over the members are taken off."""
    require: Require = Require()
    """What it must be before a stage learns from it."""


class Watch(Settings):
    """Held-out prompts that the policy answers now and then while it is trained, with the same random numbers each
    time."""

    every: Count = 5
    """Updates; before the first and after the last as well."""
    count: Annotated[int, Field(ge=8)] = 128
    """Held-out prompts of the stage's `prompts`, at most; from the end of the order in which the closing table takes
    them, so that the two share as few as can be."""
    gold: Text | None = None
    """A scorer that the policy is not trained on: an earlier reward stage, or anything else that `reward` may name."""


class Guard(Settings):
    """When `watch` shows that the policy learns to please the reward and nobody else, and what is done then."""

    action: Literal["stop", "rollback", "warn"] = "rollback"
    """stop: the stage ends with the policy as it is. rollback: it ends with the best policy that was watched. warn: it
    says so and goes on."""
    patience: Count = 1
    """Looks in a row that must show the same before anything is done."""
    share: Fraction = 0.5
    """Of what the score has gained since gold was best, so much must have arrived in gold, each in its standard
    deviations at the start; 0 waits until gold falls."""
    tolerance: NonNegative = 0.2
    """How far gold may stay behind that, in the same standard deviations."""
    sigmas: Positive = 2.0
    """Standard errors, of differences on the same prompts, by which each alarm's limit must be passed."""
    kl_budget: Positive | None = None
    """Nats per completion on the held-out prompts; null: any."""
    length_factor: Annotated[float, Field(gt=1)] | None = 1.75
    """How many times longer, or shorter, than at the start the completions may become; null: any."""


class PTX(Settings):
    """Language modelling on other texts, mixed into every optimizer step of PPO (PPO-ptx)."""

    data: Text
    """A data card of kind text, or of demonstrations, whose completions are then learnt."""
    coef: Positive = 0.5
    """Weight of the loss on these texts, in nats per token, beside the policy loss."""
    batch_size: Count = 32
    """Texts per optimizer step, over all processes."""


class TunedStage(_Stage):
    """What every stage has that tunes a policy further; the closing table compares the two."""

    policy: Text
    """Where this one starts, and the KL reference: an earlier stage that makes a policy, of any kind but reward; or an
    adapter in a folder or on the Hub (hub://OWNER/NAME[/SUBFOLDER][@REVISION])."""
    kl_budget: Positive | None = None
    """Nats per completion that the closing table compares with."""


class SamplingStage(TunedStage):
    """What every stage has whose completions are sampled and scored."""

    reward: Text
    """An earlier reward stage; a folder or hub://OWNER/NAME[/SUBFOLDER][@REVISION] of a reward model, as an adapter or
    as a sequence classification model; package.module:function; or the address of a reward server (`rlhf-kit
    serve-reward`), such as http://127.0.0.1:8000."""
    prompts: Cards
    """A data card of kind prompts, or several; of demonstrations, preferences and rankings the prompts are used."""
    max_new_tokens: Count = 64
    """Tokens of a completion, its end token included."""
    temperature: Positive = 1.0
    """Of sampling, and of every log-probability. Nothing else shapes the distribution: no top-k, no top-p."""
    truncate: Truncate = "error"
    """What becomes of prompts that leave no room for `max_new_tokens`."""
    missing_eos_penalty: NonNegative | None = None
    """Taken from the score of a completion that has no end token."""
    normalize_score: bool = True
    """Use the mean and standard deviation that the reward stage left."""


class OnlineStage(SamplingStage):
    """What every stage has that learns from each update's own completions."""

    kl_coef: NonNegative
    """Score given up per nat of KL to the reference. Between 0.01 and 0.2 is usual for a normalised score."""
    updates: Count = 40
    """How often completions are sampled and learnt from."""
    batch_size: Count = 64
    """Completions per update, over all processes."""
    epochs: Count = 1
    """Passes over the completions of an update."""
    minibatches: Count = 1
    """Optimizer steps per epoch."""
    microbatch: Count = 16
    """Completions of full length per forward pass of one process; of shorter ones, as many as have as many tokens."""
    learning_rate: LearningRate = 1e-4
    """Of the policy's AdamW, at its peak."""
    schedule: Schedule = "linear"
    """How the rate falls after the warm-up: to 0 along a cosine or a line, or not at all."""
    warmup_updates: Annotated[int, Field(ge=0)] = 3
    """Over which the rate rises."""
    weight_decay: NonNegative = 0.0
    """AdamW's."""
    max_grad_norm: Positive = 1.0
    """A longer gradient is shortened to this."""
    clip: Positive = 0.2
    """The policy ratio's distance from 1 beyond which the objective is flat."""
    score_clip: Positive | None = None
    """Scores are held within plus and minus this."""
    samples_every: Count = 10
    """Updates."""
    watch: Watch | None = None
    """Answers to held-out prompts, measured on the way; null: none."""
    guard: Guard | None = None
    """What becomes of a run that over-optimises; needs `watch`. null: it goes on."""
    ptx: PTX | None = None
    """Texts that the policy keeps learning as a language model; null: none."""


class PPOStage(OnlineStage):
    """PPO on the reward model's score, with a KL penalty towards the policy it starts from."""

    kind: Literal["ppo"]
    """Says which of the kinds of stage this is."""
    kl_target: Positive | None = None
    """Nats per completion. Set, it makes the coefficient adaptive (Ziegler et al. 2019, section 2.2)."""
    kl_horizon: Positive = 10_000.0
    """Completions over which the adaptive coefficient moves."""
    epochs: Count = 4
    """Passes over the completions of an update."""
    minibatches: Count = 2
    """Optimizer steps per epoch."""
    value_learning_rate: LearningRate | None = None
    """null is `learning_rate` times epochs / value_epochs of an adapter, so that fewer steps go as far, and times 5 of
    a head on the policy's trunk."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount of what later tokens earn."""
    lam: Fraction = 0.95
    """Lambda of generalised advantage estimation: 0 trusts the value function, 1 what was earned."""
    value_clip: Positive = 0.2
    """How far from its value at sampling time a value may move before the loss is flat."""
    value_coef: NonNegative = 0.1
    """Weight of the value loss."""
    value: Literal["adapter", "trunk"] = "adapter"
    """adapter: its own adapter and head, started from the reward adapter. trunk: a head on the policy's trunk."""
    value_epochs: Count | None = None
    """In how many of the epochs, from the first, the value function learns too. null is 1 of an adapter, whose passes
    come on top of the policy's, and all of a head on the policy's trunk."""
    whiten_scores: bool = False
    """Divide the scores of each update by their standard deviation; their mean stays."""
    whiten_advantages: bool = True
    """Bring the advantages of each update to mean 0 and variance 1."""

    @property
    def own_value_epochs(self) -> int:
        """Epochs in which the value function learns in passes of its own; 0 of a head on the policy's trunk."""
        return (self.value_epochs or 1) if self.value == "adapter" else 0


class RLOOStage(OnlineStage):
    """REINFORCE with a leave-one-out baseline: a completion is judged by the others of its prompt, without a value
    function; the KL penalty is part of what it earns.
    """

    kind: Literal["rloo"]
    """Says which of the kinds of stage this is."""
    completions_per_prompt: Annotated[int, Field(ge=2)] = 4
    """Of the `batch_size` completions of an update, so many answer the same prompt."""


class GRPOStage(OnlineStage):
    """GRPO: as rloo, but a completion's score is seen in standard deviations of its prompt's, every token has a clipped
    ratio of its own, and the KL is part of the loss.
    """

    kind: Literal["grpo"]
    """Says which of the kinds of stage this is."""
    kl_coef: NonNegative
    """Weight of the KL to the reference in the loss, in standard deviations of a prompt's scores per nat."""
    completions_per_prompt: Annotated[int, Field(ge=2)] = 4
    """Of the `batch_size` completions of an update, so many answer the same prompt."""


class RejectionSamplingStage(SamplingStage, TrainingStage):
    """Best of n: several completions of each prompt are sampled once, and supervised finetuning learns from those that
    score best.
    """

    kind: Literal["rejection_sampling"]
    """Says which of the kinds of stage this is."""
    completions_per_prompt: Annotated[int, Field(ge=2)] = 8
    """Of which the best one is learnt from."""
    sampled_at_once: Count = 64
    """Completions generated at a time by one process; of no effect on which ones."""


class DPOStage(TunedStage, _Reading):
    """Direct preference optimization: the policy learns from preferences, without a reward model."""

    kind: Literal["dpo"]
    """Says which of the kinds of stage this is."""
    data: Cards
    """A data card of kind preferences or rankings, or several to mix."""
    kl_coef: Positive
    """The beta of the paper: what the policy's log-ratio to the reference is multiplied with to be a score; 0.1 is
    usual, and less lets the policy go further."""
    ties: Ties = "drop"
    """drop: pairs that were judged equal teach nothing; soft: they are learnt as even odds."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a label is the wrong way round."""


class KTOStage(TunedStage, _Reading):
    """KTO: as dpo, but every completion counts by itself as desirable or undesirable, by whether it won or lost more of
    its prompt's pairs.
    """

    kind: Literal["kto"]
    """Says which of the kinds of stage this is."""
    data: Cards
    """A data card of kind preferences or rankings, or several to mix."""
    kl_coef: Positive
    """The beta of the paper, as in dpo."""
    desirable_weight: Positive = 1.0
    """Of the loss of a desirable completion."""
    undesirable_weight: Positive = 1.0
    """Of the loss of an undesirable one."""


Stage = Annotated[
    SFTStage | RewardStage | PPOStage | RLOOStage | GRPOStage | DPOStage | KTOStage | RejectionSamplingStage,
    Field(discriminator="kind"),
]
STAGE_KINDS: Mapping[str, type[BaseModel]] = {
    "sft": SFTStage,
    "reward": RewardStage,
    "ppo": PPOStage,
    "rloo": RLOOStage,
    "grpo": GRPOStage,
    "dpo": DPOStage,
    "kto": KTOStage,
    "rejection_sampling": RejectionSamplingStage,
}
PolicyStage = (SFTStage, TunedStage)
"""Stages that make a policy, for `isinstance`."""
NEW_TOKENS = 64
"""Of a completion in the closing table, where no stage of the recipe samples."""


class Evaluation(Settings):
    """What the closing table is measured on."""

    prompts: Text | None = None
    """A data card; null takes the held-out prompts of the last stage that samples, else of the last stage that tunes a
    policy."""
    count: Count = 256
    """Prompts, at most."""
    batch_size: Count = 64
    """Prompts answered at a time."""
    gold: Function | None = None
    """A scorer package.module:function that no stage trains on: (prompts, completions) to numbers."""
    max_new_tokens: Count | None = None
    """null is that of the last stage that samples, or 64 without one."""


class Publish(Settings):
    """Where `push` takes the run."""

    repo: Annotated[str, matching(HUB_ID, "owner/name on the Hub")]
    """owner/name on the Hub."""
    private: bool = True
    """Whether a new repository is visible to you alone."""


@dataclass(frozen=True)
class _Origin:
    """Where a recipe came from; two recipes from different files may be equal."""

    path: Path = field(default=Path("recipe.yaml"), compare=False)
    marked: MarkedYaml = field(default_factory=lambda: MarkedYaml("recipe.yaml"), compare=False)


class Recipe(Settings):
    """A whole run. Paths in it open from the working directory."""

    name: Annotated[str, matching(NAME, "letters, digits, '.', '_', '-', the first a letter or digit; 96 at most")]
    """The run directory is runs/<name>. Letters, digits, `.`, `_` and `-`, 96 at most, the first a letter or digit."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Everything random follows from it."""
    data_root: Text | None = None
    """A folder in which the cards' relative sources are looked for first."""
    base: Base
    """The checkpoint; required."""
    adapter: Adapter = Adapter()
    """One shape for all adapters."""
    stages: Annotated[dict[str, Stage], Field(min_length=1)]
    """In the order in which they run; a stage may name only earlier ones."""
    evaluation: Evaluation = Evaluation()
    """What the closing table is measured on."""
    publish: Publish | None = None
    """Where the run goes on the Hub; null: nowhere."""
    trackers: list[Literal["tensorboard", "trackio", "wandb", "mlflow"]] = Field(default=[])
    """Where metrics go besides `metrics.jsonl`."""

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

    def reward_source(self, stage: str) -> Literal["stage", "function", "server", "model"]:
        """Return what the `reward` of a stage that samples names."""
        settings = self.stages[stage]
        assert isinstance(settings, SamplingStage)
        return self.scorer_source(settings.reward)

    def scorer_source(self, scorer: str) -> Literal["stage", "function", "server", "model"]:
        """Return what the name of a scorer names."""
        if scorer in self.stages:
            return "stage"
        if is_address(scorer):
            return "server"
        return "function" if FUNCTION.fullmatch(scorer) else "model"

    def tuned(self) -> dict[str, TunedStage]:
        """Return the stages that tune a policy further, by name."""
        return {name: stage for name, stage in self.stages.items() if isinstance(stage, TunedStage)}

    def last_sampling(self) -> tuple[str, SamplingStage] | None:
        """Return name and settings of the last stage that samples, whose reward, length and temperature others use."""
        stages = [(name, stage) for name, stage in self.stages.items() if isinstance(stage, SamplingStage)]
        return stages[-1] if stages else None

    def foreign(self, stage: str) -> dict[str, str]:
        """Return the fields of a stage that name a folder or a repository of the Hub, and what they name."""
        return {
            field: name
            for field, name, _ in _references(self.stages[stage].model_dump())
            if name not in self.stages and not (field in SCORERS and self.scorer_source(name) != "model")
        }

    def start_of(self, stage: str) -> str:
        """Return the name of the policy that a stage tunes further: a stage, or "start of" the first that names it."""
        settings = self.stages[stage]
        assert isinstance(settings, TunedStage)
        return settings.policy if settings.policy in self.stages else self._starts()[settings.policy]

    def starts(self) -> dict[str, str]:
        """Return the policies that stages tune further and none has made, by the name that results give them."""
        return {name: written for written, name in self._starts().items()}

    def _starts(self) -> dict[str, str]:
        first: dict[str, str] = {}
        for name in self.stages:
            written = self.foreign(name).get("policy")
            if written is not None:
                first.setdefault(written, f"start of {name}")
        return first

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
        fields = type(stage).model_fields
        first = [key for key in ("kind", *fields) if fields[key].is_required()]  # what the user has to decide
        own = [key for kind in type(stage).__mro__ for key in getattr(kind, "__annotations__", ()) if key in fields]
        data["stages"][name] = {key: data["stages"][name][key] for key in dict.fromkeys([*first, *own])}
    return write_yaml(data)


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes, for editors."""
    return Recipe.model_json_schema()


def _load(path: Path, overrides: Sequence[str], look: bool) -> Recipe:
    marked = read_yaml(read_text(path, "recipe", (".yaml", ".yml")), str(path))
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


def _override(marked: MarkedYaml, override: str) -> Iterator[str]:
    place = printable(f"--set {override if len(override) <= 80 else override[:77] + '...'}")
    key, equals, value = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        yield f"{place}: write a key path, =, and a value, such as --set stages.ppo.kl_coef=0.1"
        return
    try:
        marked.put(path, read_yaml(value, place), place)
    except InputError as error:
        yield from error.problems


def either(words: Iterable[str]) -> str:
    """Return words as a choice: "a", "a or b", "a, b or c"."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


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
            for key in ("data", "prompts") if isinstance(stage, dict) else ():
                if isinstance(stage.get(key), list):  # a card's name alone is a portion without weight and cap
                    stage[key] = [{"card": card} if isinstance(card, str) else card for card in stage[key]]
            for key in ("checkpoint_every", "require") if isinstance(stage, dict) else ():
                if key in stage and stage[key] is None:
                    stage[key] = {}
            for key in ("watch", "ptx") if isinstance(stage, dict) else ():  # in which paths are put that open
                if isinstance(stage.get(key), dict):
                    stage[key] = dict(stage[key])
    return data


# ---------------------------------------------------------------- fields one by one

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

NESTED: Mapping[str, type[BaseModel]] = {"watch": Watch, "guard": Guard, "ptx": PTX}
"""Mappings within a stage that learns online: ppo, rloo, grpo."""
HOMES: Mapping[str, type[BaseModel]] = {
    **SECTIONS,
    **{f"stages.<{kind} stage>": settings for kind, settings in STAGE_KINDS.items()},
    "stages.<stage>.checkpoint_every": CheckpointEvery,
    "stages.<reward stage>.require": Require,
    **{f"stages.<online stage>.{key}": settings for key, settings in NESTED.items()},
}

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


def _field_problems(data: dict[str, Any], marked: MarkedYaml) -> Iterator[Problem]:
    try:
        Recipe.model_validate(data)
    except ValidationError as invalid:
        for error in invalid.errors(include_url=False):
            loc = error["loc"]
            if len(loc) > 2 and loc[0] == "stages":
                loc = (*loc[:2], *loc[3:])  # pydantic puts the stage's kind behind its name
            loc = tuple(step for step in loc if step not in (_ONE, _SEVERAL))
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
            gold = _within(stage, "watch", "gold")
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


def _within(stage: Mapping[str, Any], section: str, key: str) -> Any:
    """Return a setting of a mapping within a stage, or None."""
    found = stage.get(section)
    return found.get(key) if isinstance(found, dict) else None


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


POLICY_KINDS = tuple(kind for kind, settings in STAGE_KINDS.items() if issubclass(settings, PolicyStage))
MAY_NAME: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "sft": {"init": ("sft",)},
    "reward": {"init": ("sft",)},
    "dpo": {"policy": POLICY_KINDS},
    "kto": {"policy": POLICY_KINDS},
    **{
        kind: {
            "policy": POLICY_KINDS,
            "reward": ("reward",),
            **({"watch.gold": ("reward",)} if issubclass(settings, OnlineStage) else {}),
        }
        for kind, settings in STAGE_KINDS.items()
        if issubclass(settings, SamplingStage)
    },
}
"""For each kind of stage the fields that name a stage, and of which kinds."""


SCORERS = ("reward", "watch.gold")
"""Fields that name what gives scores: a function or a server too."""


def _references(stage: Mapping[str, Any]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield field, the stage it names, and the kinds that stage may have."""
    for name, kinds in MAY_NAME.get(str(stage.get("kind")), {}).items():
        section, _, key = name.rpartition(".")
        named = _within(stage, section, key) if section else stage.get(key)
        if isinstance(named, str) and named:
            yield name, named, kinds


def _chain_problems(stages: Any, folder: Path) -> Iterator[Problem]:
    if not isinstance(stages, dict):
        return
    order = {name: index for index, name in enumerate(stages)}
    for name, stage in stages.items():
        if not isinstance(stage, dict):
            continue
        for key, target, kinds in _references(stage):
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


def is_address(reward: str) -> bool:
    """Return whether a `reward` is the address of a server, well written or not."""
    return "://" in reward and not reward.startswith(HUB)


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


def _path_problems(data: dict[str, Any], folder: Path, look: bool) -> Iterator[Problem]:
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
            for key, target, _ in _references(stage):
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
