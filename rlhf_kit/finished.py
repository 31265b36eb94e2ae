"""A finished run, opened to be used: what its stages made, as frozen roles on one base."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_kit import artifacts, distributed, foreign, models
from rlhf_kit.collate import TextFormat, load_text_format
from rlhf_kit.errors import InputError, did_you_mean
from rlhf_kit.foreign import Foreign
from rlhf_kit.metrics import say
from rlhf_kit.models import BASE, SharedBase
from rlhf_kit.recipe import PolicyStage, Recipe, RewardStage, SamplingStage, TunedStage
from rlhf_kit.recipe_reading import written_recipe
from rlhf_kit.scorers import Scorer, ServerScorer, Written, scorer_of
from rlhf_kit.settings import HubReference, without_local_paths


@dataclass(frozen=True)
class RewardModel:
    """What a run's completions are scored by, in the unit of its reports."""

    name: str
    scorer: Scorer
    mean: float
    std: float

    def __call__(self, written: Written) -> list[float]:
        """Return the normalised scores of some completions."""
        return self.normalised(self.scorer(written))

    def normalised(self, raw: Tensor) -> list[float]:
        """Return scores in this unit."""
        return ((raw - self.mean) / self.std).tolist()


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
        self.accelerator = distributed.join()

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
                f"{identity['sha256'][:12]} and {manifest['base']['sha256'][:12]}); put that one back, or name it with "
                "--base."
            )
        return manifest

    def policies(self) -> list[str]:
        """Return the stages that make a policy, in the recipe's order."""
        return [name for name, stage in self.recipe.stages.items() if isinstance(stage, PolicyStage)]

    def finished_policies(self) -> list[str]:
        """Return those of them that are finished."""
        return [name for name in self.policies() if artifacts.read_manifest(self.folder / name) is not None]

    def newest_policy(self) -> str:
        """Return the last finished stage that makes a policy, or the base where there is none."""
        return next(reversed(self.finished_policies()), BASE)

    def start_of(self, stage: str) -> str:
        """Return what a policy started from: the one that its stage tuned further, else the base."""
        return self.recipe.start_of(stage) if isinstance(self.recipe.stages.get(stage), TunedStage) else BASE

    @cached_property
    def foreign(self) -> dict[str, Foreign]:
        """What the stages started from or score with that none of them made, by what the recipe names.

        Raises: InputError when it cannot be had any more, or is another one by now.
        """
        recorded = dict(self._recorded_foreign())
        gone = [written for written, source in recorded.items() if "folder" in source and not Path(written).is_dir()]
        if gone:
            raise InputError(
                [f"{written}: {self.folder} was made from it, and it is gone; put it back" for written in gone]
            )
        commits = {written: source["commit"] for written, source in recorded.items() if "commit" in source}
        artefacts, problems = foreign.of_recipe(self.recipe, commits=commits)
        problems += [
            f"{written}: is not what {self.folder} was made from (content {artefacts[written].sha256[:12]} and "
            f"{source['sha256'][:12]}); put it back"
            for written, source in recorded.items()
            if written in artefacts and artefacts[written].sha256 != source["sha256"]
        ]
        if problems:
            raise InputError(problems)
        return artefacts

    def starts(self, stage: str) -> dict[str, str]:
        """Return the fields of a stage that name what no stage made, and where others find it: hub://...@commit, or the
        name of a local folder.
        """
        recorded = dict(self._recorded_foreign())
        found = {}
        for key, written in self.recipe.foreign(stage).items():
            source = recorded.get(written, {})
            found[key] = without_local_paths(written)
            if "hub" in source:
                found[key] = str(HubReference(source["hub"], source.get("subfolder", ""), source["commit"]))
        return found

    def _recorded_foreign(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield what the recipe names and what the manifests of finished stages tell of it."""
        for stage in self.recipe.stages:
            inputs = (artifacts.read_manifest(self.folder / stage) or {}).get("inputs", {})
            for written in self.recipe.foreign(stage).values():
                if (source := inputs.get(foreign.input_name(written))) is not None:
                    yield written, source

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
        if stage in (starts := self.recipe.starts()):
            self.shared.add(stage, self.foreign[starts[stage]].folder)
            return stage
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
        if isinstance(settings, RewardStage):
            written = name
        elif isinstance(settings, SamplingStage) and stage is None:
            written = settings.reward
        else:
            raise InputError(f"{name}: is a stage of kind {manifest['kind']}; a stage of kind reward gives scores.")
        artefacts = self.foreign if self.recipe.scorer_source(written) == "model" else {}
        place = foreign.folder_of(written, self.folder, artefacts)
        scorer = scorer_of(written, place, self.shared, self.text_format, role=f"reward model {name}")
        if isinstance(scorer, ServerScorer):
            there, learnt_from = scorer.server.identity.manifest, manifest["made_from"][f"stages.{name}.reward"]
            if there != learnt_from:
                raise InputError(
                    f"{written}: has another reward model (manifest {there[:12]}) than {self.folder / name} learnt "
                    f"from ({learnt_from[:12]}); serve that one there."
                )
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
