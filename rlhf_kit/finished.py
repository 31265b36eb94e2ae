"""A finished run, opened to be used: what its stages made, as frozen roles on one base."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from rlhf_kit import artifacts, models
from rlhf_kit.collate import TextFormat, load_text_format
from rlhf_kit.errors import InputError, did_you_mean
from rlhf_kit.metrics import say
from rlhf_kit.models import BASE, SharedBase
from rlhf_kit.recipe import PolicyStage, Recipe, RewardStage, SamplingStage, TunedStage, written_recipe
from rlhf_kit.scorers import Scorer, ServerScorer, Written, add_reward_role, external_scorer


@dataclass(frozen=True)
class RewardModel:
    """What a run's completions are scored by, in the unit of its reports."""

    name: str
    scorer: Scorer
    mean: float
    std: float

    def __call__(self, written: Written) -> list[float]:
        """Return the normalised scores of some completions."""
        return ((self.scorer(written) - self.mean) / self.std).tolist()


class FinishedRun:
    """The recipe of a run and its finished stages."""

    def __init__(self, folder: Path, base: str | None = None) -> None:
        """base: where the base is now, if not where the recipe says; its content is compared.

        Raises: InputError when the folder holds no run.
        """
        self.folder = folder
        recipe = written_recipe(folder / artifacts.RECIPE)
        if base is not None:
            recipe = recipe.model_copy(update={"base": recipe.base.model_copy(update={"model": base})})
        self.recipe: Recipe = recipe
        self.accelerator = Accelerator(mixed_precision="no")

    def manifest(self, stage: str) -> dict[str, Any]:
        """Return the manifest of a finished stage.

        Raises: InputError when there is none, its files were changed, or the base is another one by now.
        """
        if stage not in self.recipe.stages:
            raise InputError(f"{self.folder}: has no stage {stage}{did_you_mean(stage, self.recipe.stages)}")
        manifest = verified_manifest(self.folder / stage)
        if manifest is None:
            raise InputError(f"{self.folder / stage}: is not finished; run the recipe first.")
        identity = models.base_identity(self.recipe.base)
        if identity["sha256"] != manifest["base"]["sha256"]:
            raise InputError(
                f"{self.recipe.base.model}: is not the base that {self.folder / stage} was made on (content "
                f"{(identity['sha256'] or 'unknown')[:12]} and {(manifest['base']['sha256'] or 'unknown')[:12]}); put "
                "it back, or name it with --base."
            )
        return manifest

    def policies(self) -> list[str]:
        """Return the stages that make a policy, in the recipe's order."""
        return [name for name, stage in self.recipe.stages.items() if isinstance(stage, PolicyStage)]

    def newest_policy(self) -> str:
        """Return the last finished stage that makes a policy, or the base where there is none."""
        done = [name for name in self.policies() if artifacts.read_manifest(self.folder / name) is not None]
        return done[-1] if done else BASE

    def start_of(self, stage: str) -> str:
        """Return what a policy started from: that of another stage, such as sft, else the base."""
        settings = self.recipe.stages.get(stage)
        return settings.policy if isinstance(settings, TunedStage) else BASE

    @cached_property
    def text_format(self) -> TextFormat:
        """The base's tokenizer and how texts become tokens."""
        return load_text_format(self.recipe.base)

    @cached_property
    def context(self) -> int | None:
        """How many tokens the base reads at most, None where nothing limits them."""
        return models.context_length(self.recipe.base)

    @cached_property
    def shared(self) -> SharedBase:
        """The base that the roles are on, loaded when it is first asked for."""
        return SharedBase(models.load_base(self.recipe.base, self.text_format, self.accelerator), self.recipe.base)

    def policy(self, stage: str) -> str:
        """Return the role of a stage's policy, or of the base, added to the shared base.

        Raises: InputError when the stage makes none, or is not finished.
        """
        if stage == BASE:
            return BASE
        manifest = self.manifest(stage)
        if stage not in self.policies():
            wanted = ", ".join([BASE, *self.policies()])
            raise InputError(f"{stage}: is a stage of kind {manifest['kind']}, which writes nothing; use {wanted}.")
        self.shared.add(stage, self.folder / stage / "adapter")
        return stage

    def reward(self, stage: str | None = None) -> RewardModel:
        """Return the reward model of a stage, or the one that the last stage that samples learns from.

        Raises: InputError when there is none, or it is not finished.
        """
        name = stage or self.scored_by()
        if name is None:
            raise InputError(f"{self.folder}: has no reward stage, so nothing scores its completions.")
        manifest, settings = self.manifest(name), self.recipe.stages[name]
        scorer: Scorer
        if isinstance(settings, RewardStage):
            scorer = add_reward_role(self.shared, f"reward model {name}", self.folder / name / "adapter")
        elif isinstance(settings, SamplingStage) and stage is None:
            scorer = external_scorer(settings.reward, self.shared, self.text_format)
            learnt_from = manifest["made_from"][f"stages.{name}.reward"]
            if isinstance(scorer, ServerScorer) and (there := scorer.server.identity.manifest) != learnt_from:
                raise InputError(
                    f"{settings.reward}: has another reward model (manifest {there[:12]}) than {self.folder / name} "
                    f"learnt from ({learnt_from[:12]}); serve that one there."
                )
        else:
            raise InputError(f"{name}: is a stage of kind {manifest['kind']}; a stage of kind reward gives scores.")
        unit = manifest["score_normalisation"]
        return RewardModel(name, scorer, unit["mean"], unit["std"])

    def reward_if_any(self) -> RewardModel | None:
        """Return `reward()`, or None where nothing that scores is finished, or a server does not have it."""
        name = self.scored_by()
        if name is None or artifacts.read_manifest(self.folder / name) is None:
            return None
        try:
            return self.reward()
        except InputError as error:
            if name in self.policies() and self.recipe.reward_source(name) == "server":
                say(f"{error} Until then there are no scores.")
                return None
            raise

    def scored_by(self) -> str | None:
        """Return the stage that has the scores' unit: of kind reward, or one that samples and whose reward is no
        stage.
        """
        sampling = self.recipe.last_sampling()
        if sampling is None:
            rewards = [name for name, stage in self.recipe.stages.items() if isinstance(stage, RewardStage)]
            return rewards[-1] if rewards else None
        name, settings = sampling
        return settings.reward if settings.reward in self.recipe.stages else name


def verified_manifest(folder: Path) -> dict[str, Any] | None:
    """Return a finished stage's manifest, None where it is not finished.

    Raises:
        InputError: files that it lists are missing or changed.
    """
    manifest = artifacts.read_manifest(folder)
    problems = artifacts.changed_files(folder, manifest) if manifest else []
    if problems:
        raise InputError(
            f"{folder}: not as it was when the stage finished: {'; '.join(problems)}. "
            f"Put the files back, or run the stage anew with --only {folder.name} --fresh."
        )
    return manifest
