"""Run a recipe: its stages in order, finished ones skipped, each handing its manifest to the next.

Everything that can be checked is checked before the first stage and before the run directory is made. A stage is known
by what it was made from: its settings, its data, the base, the tokenizer and the manifests it consumed. What was made
from the same is not made again; what was not is, and the log names the setting that changed.
"""

from __future__ import annotations

import gc
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from rlhf_kit import (
    artifacts,
    check,
    distributed,
    evaluation,
    foreign,
    health,
    metrics,
    models,
    remote_reward,
    repeat,
    report,
    scorers,
)
from rlhf_kit.collate import (
    TextFormat,
    Tokenised,
    load_text_format,
    refuse_special_tokens,
    tokenise_comparisons,
    tokenise_demonstrations,
    tokenise_prompts,
)
from rlhf_kit.errors import InputError, Interrupted, NotPushed, RequirementMissed, did_you_mean, first_line
from rlhf_kit.examples.loading import Examples, prompts_of
from rlhf_kit.finished import FinishedRun, verified_manifest
from rlhf_kit.foreign import Foreign
from rlhf_kit.memory import keep_freed_memory, return_freed_memory
from rlhf_kit.metrics import say
from rlhf_kit.recipe import (
    Cards,
    DPOStage,
    KTOStage,
    OnlineStage,
    Publish,
    Recipe,
    RejectionSamplingStage,
    RewardStage,
    SamplingStage,
    SFTStage,
    Stage,
    resolved_yaml,
)
from rlhf_kit.recipe_reading import load_recipe
from rlhf_kit.settings import HUB, without_local_paths
from rlhf_kit.stages import Job, Outcome, StopRequest
from rlhf_kit.token_cache import tokenised

CARD_FIELDS = ("data", "normalize_on", "prompts")
"""Settings that name a data card: a stage is known by the card's content, not by its path."""
NOT_OF_THE_RESULT = (
    "activation_checkpointing",
    "checkpoint_every",
    "keep_checkpoints",
    "kl_budget",
    "on_nonfinite",
    "max_skipped",
    "require",
)
"""Settings that change nothing a stage leaves behind; a finished stage is not run again for them."""

SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
"""Ways of `accelerate launch` to split one model over processes, as its environment variables name them."""

TRIED_ON = (" Yes.", " No, thank you.")
"""Completions that a function which scores is tried on."""

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """What a recipe's run has left in its folder."""

    recipe: Recipe
    folder: Path
    manifests: dict[str, dict[str, Any]]
    """Of the finished stages, by name."""
    summary: dict[str, Any] | None
    """The content of `summary.json`; None as long as a stage is missing."""


def run(
    recipe_path: Path | str,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    out: Path | None = None,
    *,
    only: str | None = None,
    fresh: bool = False,
) -> Run:
    """Run the stages of a recipe that are not finished, then measure the result; see `rlhf_kit.run`."""
    published = repeat.fetched(str(recipe_path)) if str(recipe_path).startswith(HUB) else None
    with repeat.explained(published):
        recipe = load_recipe(published.recipe if published else recipe_path, _as_written(overrides))
    if published is not None:
        recipe = repeat.as_repeated(published, recipe, list(_as_written(overrides)))
    if only is not None and only not in recipe.stages:
        raise InputError(f"--only {only}: {recipe.path} has no such stage{did_you_mean(only, recipe.stages)}")
    with repeat.explained(published):
        plan = check.plan(recipe)
    shape = models.without_weights(recipe.base)
    models.tried(shape, recipe.adapter, recipe.where(models.TARGETS))
    models.check_stages(recipe, shape)
    unsure = check_foreign(recipe, plan.foreign)
    folder = out or Path("runs") / (published.name if published else recipe.name)
    artifacts.check_run_directory(folder)
    accelerator = start(recipe)
    text_format = load_text_format(recipe.base)
    for note in text_format.notes:
        say(f"tokenizer: {note}")
    for artefact in plan.foreign.values():
        say(f"from: {artefact}; content {artefact.sha256[:12]}")
    for note in [*plan.notes, *unsure]:
        say(f"note: {note}")
    if published is not None:
        as_it_was = ["data, base and versions are as they were"]
        for difference in repeat.differences(published, recipe, plan.examples) or as_it_was:
            say(f"{published.written}: {difference}")
    check_imports(recipe, plan.examples)
    for examples in plan.examples.values():
        refuse_special_tokens([*examples.train, *examples.heldout], text_format)
    check_lengths(recipe, plan.examples, text_format)
    with StopRequest() as stop, artifacts.writing(folder), _held(folder, accelerator):
        pipeline = Pipeline(recipe, folder, plan.examples, plan.foreign, text_format, accelerator, stop)
        if fresh:
            _on_main(accelerator, lambda: artifacts.remove_folder(folder / only) if only else artifacts.clear(folder))
        try:
            for name in [only] if only is not None else recipe.stages:
                pipeline.bring_up_to_date(name, only=only is not None)
            summary = pipeline.summarise()
        except Interrupted as error:
            raise Interrupted(f"{error}; to go on:\n  {_again(recipe_path, overrides, out, only)}") from error
    if summary is not None and recipe.publish is not None and accelerator.is_main_process:
        _publish(folder, recipe.publish)  # nothing is held any more, and Ctrl-C is what it always is
    return Run(recipe, folder, pipeline.finished(), summary)


def load(run_dir: Path, stage: str) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Return model and tokenizer of a finished stage; see `rlhf_kit.load`."""
    run = FinishedRun(run_dir)
    run.manifest(stage)
    text_format = run.text_format
    model = models.load_base(run.recipe.base, text_format, run.accelerator)
    model.config.use_cache = True
    if model.generation_config is not None:
        model.generation_config.pad_token_id = text_format.pad_id
        model.generation_config.eos_token_id = text_format.end_id
    if isinstance(run.recipe.stages[stage], RewardStage):
        model = models.classifier(model)
    return models.open_adapter(model, run_dir / stage / "adapter"), text_format.tokenizer


def _publish(folder: Path, wanted: Publish) -> None:
    """Push a finished run as its recipe asks; that this fails does not make the run a failed one."""
    from rlhf_kit.publish import push

    try:
        pushed = push(FinishedRun(folder), wanted.repo, private=wanted.private)
    except Exception as error:  # whatever it is, the run is done
        say(f"publish: {error if isinstance(error, InputError | NotPushed) else first_line(error)}")
        visible = "private" if wanted.private else "public"
        say(
            f"publish: the run is finished and not pushed; to push it:\n  "
            f"rlhf-kit push {shlex.quote(str(folder))} --repo {wanted.repo} --{visible}"
        )
        return
    for warning in pushed.warnings:
        say(f"publish: {warning}")
    say(f"publish: {pushed.url} {'at' if pushed.new else 'has it already, at'} commit {pushed.commit}")


def leave() -> None:
    """Take this process out of the group it was launched in, which would otherwise complain at exit."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------- before the first stage


def start(recipe: Recipe) -> Accelerator:
    """Return the accelerator of this process, after saying what the run runs on.

    Raises:
        InputError: fewer processes run than were asked for, or in a way that this recipe cannot use.
    """
    sharding = [name for name in SHARDING if os.environ.get(f"ACCELERATE_USE_{name}") == "true"]
    if sharding:
        eight_bit = " int8 weights cannot be split at all;" if recipe.base.quantization == "8bit" else ""
        raise InputError(
            f"accelerate launch: {sharding[0]} splits the base over processes, and rlhf_kit keeps it whole in each;"
            f"{eight_bit} use recipes/accelerate/multi_gpu.yaml, and base.quantization: 4bit if it does not fit."
        )
    accelerator = distributed.join()
    world, asked = accelerator.num_processes, int(os.environ.get("WORLD_SIZE", "1"))
    # `accelerate launch --cpu --num_processes 2` starts one process; an address for the other is all it leaves.
    alone = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and "RANK" not in os.environ
    if alone:
        raise InputError(
            "accelerate launch: several processes were asked for and one was started; on CPUs use --config_file "
            "recipes/accelerate/cpu_two_processes.yaml (or unset MASTER_ADDR, if one is what you want)."
        )
    if world != asked:
        raise InputError(
            f"launched as one of {asked} processes (WORLD_SIZE) but joined with {world}; use a launcher configuration "
            "from recipes/accelerate/."
        )
    device = accelerator.device
    if device.type == "cpu":
        keep_freed_memory()
    say(
        f"rlhf_kit {artifacts.__version__}: {world} process{'es' if world > 1 else ''} on {_device_name(device)}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
    return accelerator


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def check_imports(recipe: Recipe, examples: Mapping[Cards, Examples]) -> None:
    """Look for the trackers, ask the reward servers who they are, and try the functions that score on a few prompts,
    before anything is trained for them.

    Raises:
        InputError: one is not installed, cannot be imported, does not answer, or does not return one number for each
            completion.
    """
    missing = [name for name in recipe.trackers if find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        raise InputError(f"{recipe.where('trackers')}: not installed: {names}; `pip install {names}`, or take it out.")
    if unanswered := list(_unanswered(recipe)):
        raise InputError(unanswered)
    functions: dict[str, Cards | None] = {  # and a card with prompts
        scorer: settings.prompts
        for name, settings in recipe.stages.items()
        if isinstance(settings, SamplingStage)
        for scorer in check.scorers_of(name, settings).values()
        if recipe.scorer_source(scorer) == "function"
    }
    if recipe.evaluation.gold is not None:
        functions[recipe.evaluation.gold] = check.evaluation_card(recipe)
    for name, card in functions.items():
        function = scorers.load_function(name)
        prompts = [row.prompt for row in prompts_of(examples[card]).train[: len(TRIED_ON)]] if card else []
        scorers.call_function(function, name, prompts, TRIED_ON[: len(prompts)])


def _unanswered(recipe: Recipe) -> Iterator[str]:
    """Yield what is wrong with the reward servers, which tell the whole run who they are."""
    remote_reward.identity.cache_clear()  # what an earlier run in this process was told
    for name, settings in recipe.stages.items():
        for at, scorer in check.scorers_of(name, settings).items():
            if recipe.scorer_source(scorer) == "server":
                try:
                    remote_reward.identity(scorer)
                except InputError as error:
                    yield from (f"{recipe.where(at)}: {problem}" for problem in error.problems)


def check_foreign(recipe: Recipe, artefacts: Mapping[str, Foreign]) -> list[str]:
    """Return what cannot be told of how adapters that others made fit the base.

    Raises:
        InputError: they do not fit it.
    """
    problems, notes = [], []
    for written, artefact in artefacts.items():
        wrong, unsure = models.misfits(recipe.base, artefact)
        problems += [f"{foreign.place(recipe, written)}: {problem}" for problem in wrong]
        notes += unsure
    if problems:
        raise InputError(problems)
    return notes


def check_lengths(recipe: Recipe, examples: Mapping[Cards, Examples], text_format: TextFormat) -> None:
    """Refuse rows that do not fit, before hours are spent on the stages that come first.

    Only stages with `truncate: error`: the others count what they cut or leave out.

    Raises:
        InputError: the rows of every stage that are too long.
    """
    context = models.context_length(recipe.base)
    todo: list[tuple[str, Callable[..., Tokenised], list[Any], int | None]] = []  # place, how, rows, their limit
    for name, settings in recipe.stages.items():
        place = f"stages.{name}"
        if settings.truncate != "error":
            continue
        if isinstance(settings, SamplingStage):
            room = None if context is None else context - settings.max_new_tokens
            prompts = prompts_of(examples[settings.prompts])
            watched = prompts.heldout if isinstance(settings, OnlineStage) and settings.watch else []
            todo.append((place, tokenise_prompts, [*prompts.train, *watched], room))
            if isinstance(settings, OnlineStage) and settings.ptx is not None:
                texts = examples[settings.ptx.data].train
                todo.append((f"{place}.ptx", tokenise_demonstrations, texts, context))
        else:
            tokenise = tokenise_demonstrations if isinstance(settings, SFTStage) else tokenise_comparisons
            rows = [*examples[settings.data].train, *examples[settings.data].heldout]
            todo.append((place, tokenise, rows, settings.max_length or context))
    card = check.evaluation_card(recipe)
    if card is not None:
        truncate, new_tokens = check.evaluation_lengths(recipe)
        room = None if context is None else context - new_tokens
        if truncate == "error":
            todo.append(("evaluation", tokenise_prompts, prompts_of(examples[card]).heldout, room))
    problems = []
    for place, tokenise, rows, limit in todo:
        try:
            tokenised(tokenise, rows, text_format, limit, "error")
        except InputError as error:
            problems += [f"{recipe.where(place)}: {problem}" for problem in error.problems]
    if problems:
        raise InputError(problems)


# ---------------------------------------------------------------- the stages


@dataclass(frozen=True)
class Pipeline:
    """One run at work: the recipe, what was read for it, and where it goes."""

    recipe: Recipe
    folder: Path
    examples: Mapping[Cards, Examples]
    foreign: Mapping[str, Foreign]
    text_format: TextFormat
    accelerator: Accelerator
    stop: StopRequest

    def finished(self) -> dict[str, dict[str, Any]]:
        """Return the manifests of the finished stages, in the recipe's order."""
        manifests = {name: artifacts.read_manifest(self.folder / name) for name in self.recipe.stages}
        return {name: manifest for name, manifest in manifests.items() if manifest is not None}

    def made_from(self, name: str) -> dict[str, Any]:
        """Return, as one flat mapping, all that a stage's result depends on."""
        settings = self.recipe.stages[name]
        own = settings.model_dump(exclude={*NOT_OF_THE_RESULT, *CARD_FIELDS})
        cards: dict[str, Cards | None] = {field: getattr(settings, field, None) for field in CARD_FIELDS}
        own |= {field: self.examples[card].content_hash for field, card in cards.items() if card is not None}
        own = artifacts.flat(own)
        own |= {field: self.foreign[written].sha256 for field, written in self.recipe.foreign(name).items()}
        for at, scorer in check.scorers_of(name, settings).items():
            if self.recipe.scorer_source(scorer) == "server":
                own[at.removeprefix(f"stages.{name}.")] = remote_reward.identity(scorer).manifest
        if isinstance(settings, OnlineStage) and settings.ptx is not None:
            own["ptx.data"] = self.examples[settings.ptx.data].content_hash
        base = models.base_identity(self.recipe.base)
        del base["name"], base["revision"]  # the content tells more
        tokenizer = {key: value for key, value in self.text_format.identity().items() if key != "notes"}
        inputs = {stage: artifacts.manifest_hash(self.folder / stage) for stage in self.recipe.depends_on(name)}
        return artifacts.flat(
            {
                f"stages.{name}": own,
                "adapter": self.recipe.adapter.model_dump(),
                "base": base,
                "tokenizer": tokenizer,
                "seed": self.recipe.seed,
                "inputs": inputs,
            }
        )

    def bring_up_to_date(self, name: str, *, only: bool) -> None:
        """Leave a finished stage as it is if it was made from what it would be made from now; else run it."""
        if only:
            _on_main(self.accelerator, lambda: self._require_inputs(name))
        made_from, found = _on_main(self.accelerator, lambda: self._prepare(name))
        if found:
            return
        folder = self.folder / name
        inputs = {stage: artifacts.read_manifest(self.folder / stage) or {} for stage in self.recipe.depends_on(name)}
        artefacts = {written: self.foreign[written] for written in self.recipe.foreign(name).values()}
        inputs |= {written: dict(one.manifest) for written, one in artefacts.items() if one.manifest is not None}
        settings = self.recipe.stages[name]
        job = Job(
            recipe=self.recipe,
            name=name,
            settings=settings,
            folder=folder,
            inputs=inputs,
            foreign=artefacts,
            examples=self.examples,
            text_format=self.text_format,
            accelerator=self.accelerator,
            stop=self.stop,
        )
        self._raise_if_stopped(name)
        say(f"{name}: starting ({settings.kind})")
        set_seed(self.recipe.seed)  # a stage must not depend on whether the ones before it ran in this process
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        tracking = metrics.tracking(
            self.accelerator,
            self.recipe.trackers,
            project=self.recipe.name,
            stage=name,
            folder=folder / artifacts.TRACKERS,
            settings=without_local_paths(settings.model_dump()),
        )
        try:
            with tracking:
                outcome = stage_function(settings)(job)
        except Interrupted:
            seconds = time.monotonic() - started
            _on_main(self.accelerator, lambda: _add_seconds(folder, seconds))
            raise
        self.accelerator.wait_for_everyone()
        seconds, peak = time.monotonic() - started, distributed.maximum(metrics.peak_bytes(), self.accelerator)
        _on_main(self.accelerator, lambda: self._finish(job, outcome, made_from, seconds, int(peak)))
        say(f"{name}: finished in {metrics.duration(seconds)}")
        gc.collect()  # the trainers' cycles hold the base; the next stage loads its own
        return_freed_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _require_inputs(self, name: str) -> None:
        """Refuse to run a stage alone unless the stages it builds on, and theirs, are finished and unchanged."""
        for stage in self.recipe.depends_on(name):
            self._require_inputs(stage)
            manifest = verified_manifest(self.folder / stage)
            if manifest is None:
                raise InputError(f"--only {name}: it builds on {stage}, which is not finished; run without --only.")
            changed = artifacts.differences(manifest["made_from"], self.made_from(stage))
            if changed:
                raise InputError(
                    f"--only {name}: it builds on {stage}, which was made from something else ({_listed(changed)}); "
                    "run without --only, or set it back."
                )

    def _prepare(self, name: str) -> tuple[dict[str, Any], bool]:
        """Return what the stage is made from, and whether it is finished already; if not, make its folder ready."""
        folder = self.folder / name
        made_from = self.made_from(name)
        manifest = verified_manifest(folder)
        if manifest is not None:
            changed = artifacts.differences(manifest["made_from"], made_from)
            if not changed:
                self._tidy(name)
                say(f"{name}: finished already, nothing has changed; skipped")
                return made_from, True
            self._require_healthy(name)
            say(f"{name}: runs again, because of {_listed(changed)}; the old one is kept until then")
        else:
            self._require_healthy(name)
        if manifest is None and (folder / artifacts.STARTED).is_file():
            begun = artifacts.read_json(folder / artifacts.STARTED)
            changed = artifacts.differences(begun["made_from"], made_from)
            checkpoints = folder / artifacts.CHECKPOINTS
            if not changed and any(checkpoints.glob("step-*")):
                say(f"{name}: was interrupted; going on from its checkpoint")
                self._note_environment(folder, begun)
                return made_from, False
            if changed:
                kept = f"; what it had done is kept in {name}{artifacts.PREVIOUS} until then"
                say(
                    f"{name}: was interrupted and starts anew, because of {_listed(changed)}"
                    f"{kept if checkpoints.is_dir() else ''}"
                )
        self._write_head()
        artifacts.set_aside(folder)
        folder.mkdir()
        started = {"made_from": made_from, "seconds": 0.0, "environments": [self._environment()]}
        artifacts.write_json(folder / artifacts.STARTED, started)
        return made_from, False

    def _require_healthy(self, name: str) -> None:
        """Look whether the reward model that a stage learns from is what the recipe requires.

        Raises: RequirementMissed when it is not, unless the recipe says warn.
        """
        for stage in self.recipe.depends_on(name):
            settings = self.recipe.stages[stage]
            manifest = artifacts.read_manifest(self.folder / stage)
            if not isinstance(settings, RewardStage) or manifest is None:
                continue
            unmet = health.unmet(settings.require, manifest.get("health"))
            if not unmet:
                continue
            told = f"{name}: learns from {stage}, which misses what stages.{stage}.require asks for: {'; '.join(unmet)}"
            if settings.require.action == "stop":
                raise RequirementMissed(
                    f"{told}. It is not started; better or more data, another setting of {stage}, a lower requirement "
                    "or action: warn would let it."
                )
            say(told)

    def _environment(self) -> dict[str, Any]:
        device = _device_name(self.accelerator.device)
        return artifacts.environment(device, self.accelerator.num_processes, torch.get_num_threads())

    def _note_environment(self, folder: Path, begun: dict[str, Any]) -> None:
        """Say what is not as it was when the stage began, and add it to what the stage's manifest will tell."""
        now = self._environment()
        changed = artifacts.differences(artifacts.flat(begun["environments"][-1]), artifacts.flat(now))
        if changed:
            say(
                f"{folder.name}: goes on elsewhere than it began ({_listed(changed)}): with the same steps, but no "
                "longer bit for bit as if never stopped, since sums are taken in another order"
            )
            environments = [*begun["environments"], now]
            artifacts.write_json(folder / artifacts.STARTED, {**begun, "environments": environments})

    def _write_head(self) -> None:
        """Write what is going to run, and on what."""
        artifacts.write_atomically(self.folder / artifacts.RECIPE, resolved_yaml(self.recipe))
        artifacts.write_json(self.folder / artifacts.ENVIRONMENT, self._environment())

    def _finish(self, job: Job, outcome: Outcome, made_from: dict[str, Any], seconds: float, peak: int) -> None:
        """Write the manifest, and only then remove what served to get there."""
        settings = without_local_paths(job.settings.model_dump())
        extra = dict(outcome.extra)
        begun = artifacts.read_json(job.folder / artifacts.STARTED)
        inputs = {stage: made_from[f"inputs.{stage}"] for stage in self.recipe.depends_on(job.name)}
        inputs |= {foreign.input_name(written): one.source() for written, one in job.foreign.items()}
        manifest = {
            "schema": artifacts.SCHEMA,
            "rlhf_kit": artifacts.__version__,
            "stage": job.name,
            "kind": job.settings.kind,
            "base": without_local_paths(models.base_identity(self.recipe.base)),
            "tokenizer": self.text_format.identity(),
            "inputs": inputs,
            "data": outcome.data,
            "settings": settings,
            "settings_hash": artifacts.hash_of(settings),
            "seed": self.recipe.seed,
            "metrics": {key: value and metrics.finite(value) for key, value in outcome.metrics.items()},
            "environments": begun["environments"],
            "cost": {"seconds": begun["seconds"] + seconds, "peak_bytes": peak, "tokens": extra.pop("tokens", None)},
            "made_from": made_from,
            **extra,
        }
        artifacts.write_manifest(job.folder, manifest)
        self._tidy(job.name)

    def _tidy(self, name: str) -> None:
        folder = self.folder / name
        if not getattr(self.recipe.stages[name], "keep_checkpoints", False):
            shutil.rmtree(folder / artifacts.CHECKPOINTS, ignore_errors=True)
        (folder / artifacts.STARTED).unlink(missing_ok=True)
        artifacts.remove_folder(folder.with_name(name + artifacts.PREVIOUS))

    def _raise_if_stopped(self, where: str) -> None:
        if distributed.agree(self.stop.requested, self.accelerator):
            raise Interrupted(f"stopped before {where}")

    # ------------------------------------------------------------ afterwards

    def summarise(self) -> dict[str, Any] | None:
        """Return the summary, measured now unless it is there and of these stages; None while one is not finished."""
        made_from, summary = _on_main(self.accelerator, self._look_for_summary)
        page = self.folder / artifacts.REPORT
        if summary is not None and self.accelerator.is_main_process and not page.is_file():
            report.write_report(self.folder)  # a run that was killed had got as far as the summary
        if made_from is None or summary is not None:
            return summary
        self._raise_if_stopped("the evaluation")
        with self.stop.nothing_to_lose(self.accelerator):
            summary = evaluation.summarise(
                self.recipe,
                self.folder,
                self.finished(),
                self.examples,
                self.foreign,
                self.text_format,
                self.accelerator,
            )
        summary["made_from"] = made_from
        if self.accelerator.is_main_process:
            page.unlink(missing_ok=True)  # of an earlier summary
            artifacts.write_json(self.folder / artifacts.SUMMARY, summary)
            report.write_report(self.folder)
        return summary

    def _look_for_summary(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Return what the summary is made from (None while a stage is missing), and the summary if it is there."""
        manifests = self.finished()
        missing = [
            name
            for name in self.recipe.stages
            if name not in manifests or artifacts.differences(manifests[name]["made_from"], self.made_from(name))
        ]
        if missing:
            say(f"no summary yet: {', '.join(missing)} to be run")
            return None, None
        settings = self.recipe.evaluation
        made_from = {
            "stages": {name: artifacts.manifest_hash(self.folder / name) for name in manifests},
            "evaluation": settings.model_dump(exclude={"prompts"}),
            "prompts": self.examples[settings.prompts].content_hash if settings.prompts is not None else None,
        }
        path = self.folder / artifacts.SUMMARY
        if path.is_file() and (summary := artifacts.read_json(path)).get("made_from") == made_from:
            say("summary: measured already")
            return made_from, summary
        return made_from, None


def stage_function(settings: Stage) -> Callable[[Job], Outcome]:
    """Return what runs a stage of this kind. Imported late: trl alone takes six seconds."""
    if isinstance(settings, SFTStage):
        from rlhf_kit.stages import sft

        return sft.run
    if isinstance(settings, RewardStage):
        from rlhf_kit.stages import reward

        return reward.run
    if isinstance(settings, RejectionSamplingStage):
        from rlhf_kit.stages import rejection_sampling

        return rejection_sampling.run
    if isinstance(settings, DPOStage | KTOStage):
        from rlhf_kit.stages import dpo

        return dpo.run
    from rlhf_kit.stages import ppo

    return ppo.run


# ---------------------------------------------------------------- small things


def _as_written(overrides: Mapping[str, Any] | Sequence[str]) -> Sequence[str]:
    """Return overrides as the command line has them: "a.b=value"."""
    if not isinstance(overrides, Mapping):
        return overrides
    return [f"{key}={json.dumps(value)}" for key, value in artifacts.flat(overrides).items()]


def _again(
    recipe_path: Path | str, overrides: Mapping[str, Any] | Sequence[str], out: Path | None, only: str | None
) -> str:
    """Return the command that goes on with this run; without --fresh, which would not."""
    words = [str(recipe_path)]
    for override in _as_written(overrides):
        words += ["--set", override]
    words += ["--out", str(out)] if out else []
    words += ["--only", only] if only else []
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return f"{'accelerate launch [as before] -m rlhf_kit' if launched else 'rlhf-kit'} run {shlex.join(words)}"


def _listed(changes: Sequence[str]) -> str:
    return ", ".join(changes[:5]) + (f" and {len(changes) - 5} more" if len(changes) > 5 else "")


def _add_seconds(folder: Path, seconds: float) -> None:
    begun = artifacts.read_json(folder / artifacts.STARTED)
    artifacts.write_json(folder / artifacts.STARTED, {**begun, "seconds": begun["seconds"] + seconds})


@contextmanager
def _held(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold the run directory in the main process; all processes fail where it cannot."""
    lock = artifacts.locked(folder)
    before = _on_main(accelerator, lambda: lock.__enter__())
    if before:
        say(f"{folder}: the run before this one ended without a word ({before})")
    try:
        yield
    finally:
        if accelerator.is_main_process:
            lock.__exit__(None, None, None)


def _on_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Return what `function` returns in the main process, in every process; wrong input and what the disk refuses are
    raised in every one.
    """
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except (InputError, RequirementMissed, OSError) as error:
            outcome[1] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
