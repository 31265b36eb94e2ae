"""A published run, run again: its recipe and data cards as they lie on the Hub, and what is not as it was.

A recipe can name code, or a server to ask, and this one is somebody else's: one that does is refused, to be read and
run as a file.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_kit import artifacts, models
from rlhf_kit.check import scorers_of
from rlhf_kit.errors import InputError, first_line
from rlhf_kit.examples.loading import Examples
from rlhf_kit.foreign import read_manifest
from rlhf_kit.model_folders import CHAT_TEMPLATE, read_object
from rlhf_kit.recipe import Cards, Recipe, SamplingStage
from rlhf_kit.settings import HUB, HubReference, hub_reference

COPIES = Path("published")
"""Where the recipes and cards of published runs are put, in the working directory."""


@dataclass(frozen=True)
class Published:
    """A run on the Hub, at one commit."""

    written: str
    folder: Path
    """With its recipe, data cards and chat template."""
    manifests: Mapping[str, Mapping[str, Any]]
    """Of its stages, by name."""
    versions: Mapping[str, Any]
    """Of Python and the packages."""

    @property
    def recipe(self) -> Path:
        """The recipe's file here."""
        return self.folder / artifacts.RECIPE

    @property
    def name(self) -> str:
        """What a run of it is called here, so that it does not go on with another of the same recipe name."""
        return self.folder.name.partition("@")[0]


def fetched(written: str) -> Published:
    """Return a published run: hub://OWNER/NAME[@REVISION], perhaps with /recipe.resolved.yaml behind the name.

    Raises:
        InputError: it cannot be had, or is no run; or its copy here was changed.
    """
    reference = hub_reference(written)
    if reference is None or reference.subfolder not in ("", artifacts.RECIPE):
        raise InputError(f"{written}: a published run is written {HUB}OWNER/NAME[@REVISION]")
    snapshot = _snapshot(written, reference)
    if not (snapshot / artifacts.RECIPE).is_file():
        raise InputError(
            f"{written}: has no {artifacts.RECIPE}, so it is no run that rlhf-kit push has sent; an adapter or a "
            "reward model is named in a recipe, as init, policy or reward"
        )
    folder = COPIES / f"{reference.repo.replace('/', '--')}@{snapshot.name[:12]}"
    cards = (f"data_cards/{path.name}" for path in sorted(snapshot.glob("data_cards/*.md")))
    templates = (path.name for path in snapshot.glob(CHAT_TEMPLATE))
    names = [artifacts.RECIPE, *cards, *templates]
    _copy(snapshot, names, folder)
    found = {path.parent.name: read_manifest(path) for path in sorted(snapshot.glob(f"*/{artifacts.MANIFEST}"))}
    manifests = {name: manifest for name, manifest in found.items() if manifest is not None}
    environment: dict[str, Any] = {}
    with suppress(InputError):
        environment = read_object(snapshot / artifacts.ENVIRONMENT)
    return Published(written, folder, manifests, _versions(environment))


def _snapshot(written: str, reference: HubReference) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [artifacts.RECIPE, artifacts.ENVIRONMENT, CHAT_TEMPLATE, "data_cards/*.md", f"*/{artifacts.MANIFEST}"]
    try:
        return Path(snapshot_download(reference.repo, revision=reference.revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise InputError(f"{written}: cannot be had from the Hub: {first_line(error)}") from error


def _copy(snapshot: Path, names: list[str], folder: Path) -> None:
    """Copy files into a new folder, whole or not at all; one that is there must hold the same."""
    if folder.exists():
        changed = [name for name in names if not _same(snapshot / name, folder / name)]
        if changed:
            raise InputError(
                f"{folder / changed[0]}: is not what the Hub has; run your copy as a file, rlhf-kit run "
                f"{folder / artifacts.RECIPE}, or delete {folder}"
            )
        return
    COPIES.mkdir(exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=COPIES))
    try:
        for name in names:
            (beside / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(snapshot / name, beside / name)
        beside.chmod(0o755)
        with suppress(OSError):  # another process of the same run was quicker
            os.rename(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


@contextmanager
def explained(published: Published | None) -> Iterator[None]:
    """Add to what is wrong with a published recipe what may have to be given."""
    try:
        yield
    except InputError as error:
        if published is None:
            raise
        raise InputError(
            [
                *error.problems,
                f"{published.written}: its recipe and data cards are in {published.folder}. What is not on the Hub "
                "has to be given: --set data_root=DIR, the folder of the cards' files; --set base.model=FOLDER",
            ]
        ) from error


def as_repeated(published: Published, recipe: Recipe, overrides: list[str]) -> Recipe:
    """Return the recipe of a published run as it is run here: pushed nowhere, unless an override says so.

    Raises:
        InputError: it names code, or a reward server.
    """
    named = [recipe.base.model] if recipe.base.trust_remote_code else []
    named += [recipe.evaluation.gold] if recipe.evaluation.gold else []
    for name, stage in recipe.stages.items():
        scores = scorers_of(name, stage).values()
        named += [scorer for scorer in scores if recipe.scorer_source(scorer) in ("function", "server")]
    if named:
        what = ", ".join(dict.fromkeys(named))
        raise InputError(
            f"{published.written}: its recipe names code to run or a server to ask ({what}), which somebody chose; "
            f"read {published.recipe}, and if you trust it: rlhf-kit run {published.recipe}"
        )
    if any(override.strip().startswith("publish") for override in overrides):
        return recipe
    return recipe.model_copy(update={"publish": None})


# ---------------------------------------------------------------- what is not as it was


def differences(published: Published, recipe: Recipe, examples: Mapping[Cards, Examples]) -> list[str]:
    """Return what is not as it was when the run was published: data, base, versions; each "what: then -> now"."""
    then: dict[str, Any] = {}
    now: dict[str, Any] = {}
    for name, manifest in published.manifests.items():
        stage = recipe.stages.get(name)
        cards = None if stage is None else stage.prompts if isinstance(stage, SamplingStage) else stage.data
        part = manifest["data"].get("prompts") or manifest["data"].get("train") or {}
        if cards is not None and "content_hash" in part:
            then[f"{name}: data"], now[f"{name}: data"] = part["content_hash"], examples[cards].content_hash
    if published.manifests:
        base, here = next(iter(published.manifests.values()))["base"], models.base_identity(recipe.base)
        what = ("sha256", "quantization", "dtype")  # the content tells more than name and revision
        then |= {f"base.{key}": base.get(key) for key in what}
        now |= {f"base.{key}": here[key] for key in what}
    return artifacts.differences(then | dict(published.versions), now | _versions(artifacts.environment("", 0, 0)))


def _versions(environment: Mapping[str, Any]) -> dict[str, Any]:
    packages = environment.get("packages")
    versions = {name: packages.get(name) for name in artifacts.PACKAGES} if isinstance(packages, dict) else {}
    return {"python": environment.get("python"), **versions}
