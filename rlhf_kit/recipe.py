"""The recipe: one YAML file that tells the whole story of a run, as typed data.

Here are its fields, which of them name other stages, and how it is written out. `recipe_reading` makes one of a file;
`recipe_problems` has what may be wrong with one. There are no includes, no interpolation and no environment variables.
What the user must decide has no default. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, PrivateAttr, Tag

from rlhf_kit.marked_yaml import MarkedYaml, write_yaml
from rlhf_kit.settings import (
    HUB,
    HUB_ID,
    Count,
    Fraction,
    NonNegative,
    Positive,
    Settings,
    Text,
    TextOrTexts,
    matching,
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
    "recipe_schema",
    "resolved_yaml",
]

FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")

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


ONE, SEVERAL = "one card", "several cards"
Cards = Annotated[
    Annotated[Text, Tag(ONE)] | Annotated[tuple[Portion, ...], Field(strict=False), Tag(SEVERAL)],
    Discriminator(lambda written: SEVERAL if isinstance(written, list | tuple) and written else ONE),
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
    activation_checkpointing: bool | None = None
    """Whether the layers keep their inputs alone for the backward pass, which computes the rest again: far less memory
    for half more arithmetic of learning. null: on a GPU, if transformers can do it with the base."""


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

    @property
    def group(self) -> int:
        """How many completions of an update answer the same prompt."""
        count: int = getattr(self, "completions_per_prompt", 1)
        return count


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
    """null is `learning_rate` times epochs / value_epochs of an adapter, so that fewer steps go as far, and times 4 of
    a head on the trunk."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount of what later tokens earn."""
    lam: Fraction = 0.95
    """Lambda of generalised advantage estimation: 0 trusts the value function, 1 what was earned."""
    value_clip: Positive = 0.2
    """How far from its value at sampling time a value may move before the loss is flat."""
    value_coef: NonNegative = 0.1
    """Weight of the value loss."""
    value: Literal["adapter", "trunk"] = "adapter"
    """adapter: its own adapter and head, started from the reward adapter. trunk: a head alone, which reads the states
    of the policy and of the reward adapter; it takes no pass through the base."""
    value_epochs: Count | None = None
    """In how many of the epochs, from the first, the value function learns too. null is 1 of an adapter, whose passes
    come on top of the policy's, and all of a head on the trunk."""
    whiten_scores: bool = False
    """Divide the scores of each update by their standard deviation; their mean stays."""
    whiten_advantages: bool = True
    """Bring the advantages of each update to mean 0 and variance 1."""

    @property
    def own_value_epochs(self) -> int:
        """Epochs in which the value function learns in passes of its own; 0 of a head on the trunk."""
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
class Origin:
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

    _origin: Origin = PrivateAttr(default_factory=Origin)

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
            for field, name, _ in references(self.stages[stage].model_dump())
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
            dict.fromkeys(name for _, name, _ in references(self.stages[stage].model_dump()) if name in self.stages)
        )


# ---------------------------------------------------------------- where they stand


SECTIONS: Mapping[str, type[BaseModel]] = {
    "base": Base,
    "adapter": Adapter,
    "evaluation": Evaluation,
    "publish": Publish,
}
NESTED: Mapping[str, type[BaseModel]] = {"watch": Watch, "guard": Guard, "ptx": PTX}
"""Mappings within a stage that learns online: ppo, rloo, grpo."""
HOMES: Mapping[str, type[BaseModel]] = {
    **SECTIONS,
    **{f"stages.<{kind} stage>": settings for kind, settings in STAGE_KINDS.items()},
    "stages.<stage>.checkpoint_every": CheckpointEvery,
    "stages.<reward stage>.require": Require,
    **{f"stages.<online stage>.{key}": settings for key, settings in NESTED.items()},
}


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


def references(stage: Mapping[str, Any]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield field, the stage it names, and the kinds that stage may have."""
    for name, kinds in MAY_NAME.get(str(stage.get("kind")), {}).items():
        section, _, key = name.rpartition(".")
        named = within(stage, section, key) if section else stage.get(key)
        if isinstance(named, str) and named:
            yield name, named, kinds


def within(stage: Mapping[str, Any], section: str, key: str) -> Any:
    """Return a setting of a mapping within a stage, or None."""
    found = stage.get(section)
    return found.get(key) if isinstance(found, dict) else None


def is_address(reward: str) -> bool:
    """Return whether a `reward` is the address of a server, well written or not."""
    return "://" in reward and not reward.startswith(HUB)


# ---------------------------------------------------------------- written out


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
