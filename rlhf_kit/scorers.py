"""What gives completions their scores: a reward stage's adapter, another classifier, a Python function, or a server."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_kit import artifacts, recipe
from rlhf_kit.chat_templates import try_template
from rlhf_kit.collate import TextFormat, encode_chat, hide_special_tokens, special_tokens_pattern
from rlhf_kit.errors import InputError, did_you_mean, first_line
from rlhf_kit.examples.rows import Prompt
from rlhf_kit.foreign import SUMMARY_BIAS, SUMMARY_WEIGHT
from rlhf_kit.maths.ensembles import ensemble_score, ensemble_std
from rlhf_kit.metrics import say
from rlhf_kit.model_folders import ADAPTER_CONFIG, SCORE_HEAD, VALUE_HEAD, opened
from rlhf_kit.models import SUMMATION_TOLERANCE, SharedBase, base_identity, new_head
from rlhf_kit.remote_reward import SCORE_TEXTS, SCORE_TOKENS, RewardServer


@dataclass(frozen=True)
class Written:
    """Completions of one batch, as tokens of the policy and as text."""

    prompts: Sequence[Prompt]
    texts: Sequence[str]
    """Completions without their end token."""
    ids: Tensor
    """[B, T] prompt and completion, prompts left-padded, completions right-padded."""
    mask: Tensor
    """[B, T] bool."""

    def rows(self, index: Sequence[int]) -> Written:
        """Return some of the completions, without columns that are padding in all of them."""
        picked = list(index)
        texts, prompts = [self.texts[row] for row in picked], [self.prompts[row] for row in picked]
        columns = self.mask[picked].any(0)
        return Written(prompts, texts, self.ids[picked][:, columns], self.mask[picked][:, columns])


class Scorer(Protocol):
    """Raw scores [B], float32, of one batch."""

    def __call__(self, written: Written) -> Tensor: ...


class AdapterScorer:
    """The reward model as a role on the shared base: it reads the policy's own tokens, end token included.

    Of an ensemble every member is a role, whose head gives its normalised score; the score is what `combine` makes of
    the members' scores [n, B].
    """

    def __init__(
        self, shared: SharedBase, roles: Sequence[str], combine: Callable[[Tensor], Tensor] = lambda scores: scores[0]
    ) -> None:
        self.shared = shared
        self.roles = roles
        self.combine = combine
        self.last_std = torch.zeros(0)
        """Of the completions scored last [B], the standard deviation over the members; empty without an ensemble."""

    def __call__(self, written: Written) -> Tensor:
        return self.scores_and_states(written)[0]

    @torch.no_grad()
    def scores_and_states(self, written: Written) -> tuple[Tensor, Tensor]:
        """Return scores [B] and the states [B, T, H] that the trunk made for them, an ensemble's first member's."""
        last = written.mask.shape[1] - 1 - written.mask.flip(1).long().argmax(1)
        members, first = [], torch.empty(0)
        for role in self.roles:
            hidden = self.shared.hidden(role, written.ids, written.mask)
            states = hidden[torch.arange(len(hidden), device=hidden.device), last]
            members.append(self.shared.heads[role](states.float()).squeeze(-1))
            first = hidden if role == self.roles[0] else first
        scores = torch.stack(members)
        if len(self.roles) > 1:
            self.last_std = ensemble_std(scores)
        return self.combine(scores), first


def add_reward_role(shared: SharedBase, role: str, folder: Path) -> AdapterScorer:
    """Return the scorer of a reward adapter's folder, added to the shared base as a frozen role.

    Where the manifest beside the folder tells of an ensemble, `role` is its first member and the others join it.
    """
    manifest = artifacts.manifest_at(folder.parent / artifacts.MANIFEST) or {}
    ensemble = manifest.get("ensemble")
    if ensemble is None:
        _add_member(shared, role, folder, 0.0, 1.0)
        return AdapterScorer(shared, [role])
    roles = [role, *(f"{role} {number}" for number in range(1, len(ensemble["members"])))]
    for name, member in zip(roles, ensemble["members"], strict=True):
        _add_member(shared, name, folder.parent / member["folder"], member["mean"], member["std"])
    return AdapterScorer(shared, roles, lambda scores: ensemble_score(scores, ensemble["score"], ensemble["k"]))


def _add_member(shared: SharedBase, role: str, folder: Path, mean: float, std: float) -> None:
    """Add a reward adapter and its head as a frozen role whose score is (the adapter's - mean) / std."""
    heads = shared.add(role, folder)
    if (folder / VALUE_HEAD).is_file():  # trl's and LLaMA-Factory's, beside a causal adapter
        heads |= load_file(folder / VALUE_HEAD)
    weights = [tensor for name, tensor in heads.items() if SCORE_HEAD.search(name) or name == SUMMARY_WEIGHT]
    if len(weights) != 1 or weights[0].shape != (1, shared.width):
        raise InputError(f"{folder}: holds no score head for this base; a reward model is a SEQ_CLS adapter with one.")
    head = new_head(shared.width, shared.device, bias=True)
    with torch.no_grad():
        head.weight.copy_(weights[0] / std)
        head.bias.copy_((heads.get(SUMMARY_BIAS, torch.zeros(1)) - mean) / std)
    shared.set_head(role, head)


class ClassifierScorer:
    """A sequence classifier from the Hub or a folder, with its own tokenizer and chat template.

    A text prompt becomes one user turn where that tokenizer has a chat template, and stands as it is where not.
    """

    def __init__(self, name: str, device: torch.device, setting: str = "reward") -> None:
        """setting: what named it, for messages."""
        self.name, self.setting = name, setting
        folder = opened(name, setting=setting)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            self.model, report = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype="auto", trust_remote_code=False, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise InputError(f"{setting}: cannot load {name}: {first_line(error)}") from error
        if report["missing_keys"]:
            raise InputError(
                f"{setting}: {name}: has no weights for {', '.join(sorted(report['missing_keys']))}; this is not a "
                "finished sequence classifier."
            )
        if self.model.config.num_labels != 1:
            raise InputError(
                f"{setting}: {name}: has {self.model.config.num_labels} labels; a reward model has one, its score. "
                "Wrap it in a function (package.module:function) that turns its labels into one number."
            )
        if self.tokenizer.chat_template:
            try_template(self.tokenizer, f"{setting}: {name}")
        self.special = special_tokens_pattern(self.tokenizer)
        self.model.to(device).eval().requires_grad_(False)
        self.limit: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def render(self, prompt: Prompt, completion: str) -> list[int]:
        """Return the tokens of one dialogue in this model's own format; text that spells special tokens stays text."""
        if self.tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            turns, hidden = hide_special_tokens([*turns, {"role": "assistant", "content": completion}], self.special)
            try:
                text = str(self.tokenizer.apply_chat_template(turns, tokenize=False))
            except Exception as error:  # a template is somebody's program
                raise InputError(
                    f"{self.setting}: {self.name}: its chat template fails: {first_line(error)}"
                ) from error
            return encode_chat(self.tokenizer, text, hidden)
        if not isinstance(prompt, str):
            raise InputError(
                f"{self.setting}: {self.name}: its tokenizer has no chat template, but the prompts are chat messages; "
                "use a reward model with a template, or a function."
            )
        return self.tokenizer(prompt + completion, split_special_tokens=True)["input_ids"]

    @torch.no_grad()
    def __call__(self, written: Written) -> Tensor:
        rows = [self.render(*pair) for pair in zip(written.prompts, written.texts, strict=True)]
        longest = max(map(len, rows))
        if self.limit is not None and longest > self.limit:
            raise InputError(
                f"{self.setting}: {self.name}: reads at most {self.limit} tokens, but a dialogue has {longest}; "
                "shorten the prompts or max_new_tokens, or use a reward model with a longer context."
            )
        # One dialogue at a time: which token a batch's score is read at depends on the architecture and its pad token.
        scores = [self.model(torch.tensor([row], device=self.model.device)).logits.float() for row in rows]
        return torch.cat(scores).squeeze(-1)


class FunctionScorer:
    """A Python function `package.module:function(prompts, completions) -> numbers`, the user's own code.

    A score that is not finite is passed on: what becomes of it is for `on_nonfinite` to say.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.function = load_function(name)
        self.device = device

    def __call__(self, written: Written) -> Tensor:
        numbers = call_function(self.function, self.name, written.prompts, written.texts, finite=False)
        return torch.tensor(numbers, device=self.device)


class ServerScorer:
    """The reward model of a reward server, which each process asks for the scores of its own completions.

    A server with this run's base and tokenizer gets the policy's own tokens, laid out as they were sampled, so that its
    scores are those that a stage of this run would give. Another one gets texts, to which it adds the end token.
    """

    def __init__(self, address: str, shared: SharedBase, text_format: TextFormat) -> None:
        self.server = RewardServer(address)
        self.shared = shared
        its = self.server.identity
        self.unit = its.score_normalisation.mean, its.score_normalisation.std
        """Mean and standard deviation that the reward stage left."""
        self.by_tokens = reads(shared.base, text_format) == {"base": its.base, "tokenizer": its.tokenizer}
        how = "tokens" if self.by_tokens else "texts, for its base or tokenizer is another one"
        say(f"reward: {address}: is {its.stage} of {its.run} (manifest {its.manifest[:12]}), asked with {how}")

    def __call__(self, written: Written) -> Tensor:
        rows: list[dict[str, Any]]
        if self.by_tokens:
            left = written.mask.long().argmax(1).tolist()
            tokens = [ids[real].tolist() for ids, real in zip(written.ids, written.mask, strict=True)]
            rows = [{"ids": ids, "left_padding": columns} for ids, columns in zip(tokens, left, strict=True)]
            scores = self.server.scores(SCORE_TOKENS, rows)
        else:
            pairs = zip(written.prompts, written.texts, strict=True)
            rows = [{"prompt": prompt, "completion": text} for prompt, text in pairs]
            scores = self.server.scores(SCORE_TEXTS, rows)
        return torch.tensor(scores, device=self.shared.device)


def reads(base: recipe.Base, text_format: TextFormat) -> dict[str, Any]:
    """Return the "base" and "tokenizer" that two must both have for one to read the other's tokens."""
    tokenizer = {key: value for key, value in text_format.identity().items() if key != "notes"}
    return {"base": {"sha256": base_identity(base)["sha256"]}, "tokenizer": tokenizer}


def scorer_of(
    name: str, folder: Path, shared: SharedBase, text_format: TextFormat, *, role: str, setting: str = "reward"
) -> Scorer:
    """Return the scorer that a recipe names: a server, a function, an adapter, which becomes a role on the shared base,
    or a classifier.

    folder: of the adapter or the classifier, if it is one. setting: what named it, for messages.
    """
    if recipe.is_address(name):
        return ServerScorer(name, shared, text_format)
    if recipe.FUNCTION.fullmatch(name):
        return FunctionScorer(name, shared.device)
    if (folder / ADAPTER_CONFIG).is_file():
        return add_reward_role(shared, role, folder)
    return ClassifierScorer(str(folder), shared.device, setting)


def probe_error(scorer: Scorer, shared: SharedBase, manifest: Mapping[str, Any]) -> float:
    """Return the largest difference of the scores of a reward stage's stored probe then and now; 0 where none is
    stored, or the base was held in another precision then.
    """
    there = manifest.get("base", {})
    if any(there[key] != getattr(shared.base, key) for key in ("quantization", "dtype") if key in there):
        return 0.0
    errors = [0.0]
    for probe in manifest.get("probe", []):
        ids = torch.tensor([probe["ids"]], device=shared.device)
        now = scorer(Written([""], [""], ids, torch.ones_like(ids, dtype=torch.bool)))
        errors.append(abs(float(now) - probe["score"]))
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def probe_limit(shared: SharedBase, unit: tuple[float, float] | None) -> float:
    """Return how large that may be, by the order of summation alone; unit: mean and standard deviation of the score."""
    return SUMMATION_TOLERANCE[shared.base.dtype] * max(1.0, unit[1] if unit is not None else 1.0)


def load_function(name: str) -> Callable[..., Any]:
    """Return the function that "package.module:function" names; modules in the working directory count too.

    Raises: InputError when there is no such module or function.
    """
    module_name, _, attribute = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # as `python -m` does, so that the console script finds the same modules
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(f"{name}: cannot import {module_name} ({error}); run where it can be imported.") from error
    if not hasattr(module, attribute):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"{name}: module {module_name} has no {attribute!r}{did_you_mean(attribute, public)}")
    function = getattr(module, attribute)
    if not callable(function):
        raise InputError(f"{name}: is of type {type(function).__name__}, not a function of (prompts, completions).")
    return function


def call_function(
    function: Callable[..., Any],
    name: str,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    *,
    finite: bool = True,
) -> list[float]:
    """Return the function's numbers, one for each completion.

    Raises: InputError when they are not that many numbers, or if `finite` one is NaN or infinite.
    """
    returned = function(list(prompts), list(completions))
    try:
        numbers = [float(number) for number in returned]
    except (TypeError, ValueError):
        seen = str(returned)[:80]
        raise InputError(f"{name}: returned {seen}; it must return one number for each completion.") from None
    if len(numbers) != len(completions):
        raise InputError(f"{name}: returned {len(numbers)} numbers for {len(completions)} completions.")
    for number, completion in zip(numbers, completions, strict=True):
        if finite and not math.isfinite(number):
            raise InputError(f"{name}: returned {number} for the completion {completion[:80]!r}; finite numbers only.")
    return numbers


def unpadded(scorer: Scorer) -> bool:
    """Return whether a scorer's passes are over real tokens alone; a server's with the same base are where ours are."""
    if isinstance(scorer, ServerScorer):
        return scorer.by_tokens and scorer.shared.unpadded
    return isinstance(scorer, AdapterScorer) and scorer.shared.unpadded


def score_unit(scores: Sequence[float], where: str, reward: str) -> tuple[float, float]:
    """Return mean and standard deviation of the scores of the reference policy's completions: a score's zero and unit.

    where: the setting that names the reward, for messages.

    Raises: InputError when they are not finite, or all the same.
    """
    unit = torch.tensor(scores, dtype=torch.float64)
    if not bool(unit.isfinite().all()):
        raise InputError(
            f"{where}: {reward} gives completions of the reference policy scores that are NaN or infinite, so it has "
            "no unit; mend it, or set normalize_score: false."
        )
    if not float(unit.std(correction=0)) > 0:
        raise InputError(
            f"{where}: {reward} gives all {len(scores)} completions of the reference policy the same score "
            f"({scores[0]}), so it has no unit; set normalize_score: false."
        )
    return float(unit.mean()), float(unit.std(correction=0))
