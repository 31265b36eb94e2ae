"""A finished run as one repository of the Hub: `rlhf-kit push`, and `publish:` of a recipe.

The policy's adapter lies at the root, so that peft alone loads it; the other adapters lie in folders named as their
stages, beside the manifests. What is sent is chosen by name, never by what happens to lie there, and is searched for
secrets and local paths first. The same run makes the same files: pushing it twice makes one commit.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo, constants, set_client_factory
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils._http import default_client_factory

from rlhf_kit import artifacts, check
from rlhf_kit.data_cards import card_metadata
from rlhf_kit.errors import InputError, NotPushed, first_line
from rlhf_kit.finished import FinishedRun
from rlhf_kit.marked_yaml import write_yaml
from rlhf_kit.model_card import model_card
from rlhf_kit.model_folders import CHAT_TEMPLATE
from rlhf_kit.recipe_reading import written_recipe
from rlhf_kit.settings import HUB_ID, without_local_paths

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "head.safetensors")
RUN_FILES = (artifacts.ENVIRONMENT, artifacts.SUMMARY, artifacts.EVAL, artifacts.REPORT)
CONNECT_S, ANSWER_S = 30.0, 300.0
"""How long the Hub may take to be reached, and to say something; of a large file, after the last of it was sent."""
OF_A_NEW_REPOSITORY = {".gitattributes"}
SECRETS = {
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}"),
    "an OpenAI key": re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),
    "an AWS key": re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a GitHub token": re.compile(r"\b(gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a home folder": re.compile(r"(/home/|/Users/|[A-Z]:\\+Users\\+)[^/\\\s\"']+"),
}
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.IGNORECASE)
SHORTEST_SECRET = 8  # characters; a shorter value would be found in any text


@dataclass(frozen=True)
class Pushed:
    """Where a run went."""

    url: str
    commit: str
    new: bool
    """Whether there was anything to commit."""
    warnings: tuple[str, ...]


def push(
    run: FinishedRun,
    repo: str,
    *,
    stage: str | None = None,
    private: bool = True,
    create_pr: bool = False,
    revision: str | None = None,
) -> Pushed:
    """Push a run, and return where it is. The same command completes a push that was interrupted.

    stage: whose policy lies at the root; None is the last finished one. private: of a repository that is made now.

    Raises:
        InputError: it cannot be pushed as it is, or not by this user; nothing was committed.
        NotPushed: the Hub could not be reached, or did not take it.
    """
    if not HUB_ID.fullmatch(repo):
        raise InputError(f"--repo {repo}: must be owner/name on the Hub.")
    stage = stage or run.newest_policy()
    set_client_factory(_impatient_client)
    api = HfApi()
    base = run.recipe.base.hub_id or (None if run.recipe.is_local_base else run.recipe.base.model)
    files, warnings = contents(run, stage, repo, _licence(api, base))
    refuse_secrets(files)
    if constants.HF_HUB_OFFLINE:
        raise InputError("HF_HUB_OFFLINE is set, so nothing is pushed; unset it and run the same command again.")
    with _explained(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(repo, branch=revision, exist_ok=True)
        info = api.model_info(repo, revision=None if create_pr else revision)
        if private and not info.private:
            raise InputError(f"{repo}: is there already, and everybody can read it; say --public if that is meant.")
        if not create_pr:
            _refuse_others_work(api, run, info)
        message = f"{run.recipe.name}: {stage} and what it was made with"
        proposal = _open_proposal(api, repo, message) if create_pr else None
        if proposal is not None:
            info = api.model_info(repo, revision=proposal[0])
        operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        commit = api.create_commit(
            repo,
            operations,
            commit_message=message,
            parent_commit=info.sha,
            revision=proposal[0] if proposal else None if create_pr else revision,
            create_pr=create_pr and proposal is None,
        )
    where = proposal[1] if proposal else commit.pr_url or f"{constants.ENDPOINT}/{repo}"
    return Pushed(where, commit.oid, commit.oid != info.sha, tuple(warnings))


def _open_proposal(api: HfApi, repo: str, title: str) -> tuple[str, str] | None:
    """Return revision and address of this user's open pull request of that title, which a second push goes on with."""
    me = api.whoami()["name"]
    for found in api.get_repo_discussions(repo, author=me, discussion_type="pull_request", discussion_status="open"):
        if found.title == title and found.author == me:
            return found.git_reference or f"refs/pr/{found.num}", found.url
    return None


def _impatient_client() -> httpx2.Client:
    """Return the Hub's own client, which would wait for an answer for ever, with an end to that."""
    client = default_client_factory()
    client.timeout = httpx2.Timeout(ANSWER_S, connect=CONNECT_S)
    return client


# ---------------------------------------------------------------- what is sent


def contents(run: FinishedRun, stage: str, repo: str, base_licence: str | None) -> tuple[dict[str, bytes], list[str]]:
    """Return the files of the repository by their names, and what to warn of.

    Raises: InputError when the stage is no finished policy, or a file is a link.
    """
    if stage not in run.policies():
        raise InputError(f"--stage {stage}: names no policy of {run.folder}; use {', '.join(run.policies())}.")
    manifests = {
        name: run.manifest(name)
        for name in run.recipe.stages
        if name == stage or artifacts.read_manifest(run.folder / name) is not None
    }
    files: dict[str, bytes] = {}
    for name in manifests:
        files[f"{name}/{artifacts.MANIFEST}"] = _read(run.folder / name / artifacts.MANIFEST)
        for path in sorted((run.folder / name).rglob("*")):
            inside = path.relative_to(run.folder / name)
            if path.name in ADAPTER_FILES and not any(part == artifacts.CHECKPOINTS for part in inside.parts):
                content = _adapter_file(run, path)
                at_root = name == stage and inside.parts[0] == "adapter"
                files[inside.name if at_root else f"{name}/{inside.as_posix()}"] = content
    for name in RUN_FILES:
        if (run.folder / name).exists():
            files[name] = _read(run.folder / name)
    files |= dict(_tokenizer(run))
    cards = _cards(run)
    files |= {inside: _read(Path(path)) for path, inside in cards.items()}
    files[artifacts.RECIPE] = _recipe(run).encode()
    described = [_described(Path(path)) for path in cards]
    summary, evaluation = _written(run, artifacts.SUMMARY) or {}, _written(run, artifacts.EVAL)
    starts = {f"{name}.{key}": where for name in manifests for key, where in run.starts(name).items()}
    card, warnings = model_card(
        run.recipe, stage, manifests, summary, evaluation, repo, described, starts, base_licence
    )
    files["README.md"] = card.encode()
    return files, warnings


def _read(path: Path) -> bytes:
    if path.is_symlink():
        raise InputError(f"{path}: is a link, and links are not sent; put the file itself there.")
    return path.read_bytes()


def _adapter_file(run: FinishedRun, path: Path) -> bytes:
    """Return a file of an adapter; its configuration names the base as it is called on the Hub."""
    content = _read(path)
    base = run.recipe.base
    if path.name != "adapter_config.json" or base.hub_id is None:
        return content
    revision = None if base.revision == "main" else base.revision
    config = {**json.loads(content), "base_model_name_or_path": base.hub_id, "revision": revision}
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _tokenizer(run: FinishedRun) -> Iterator[tuple[str, bytes]]:
    with TemporaryDirectory() as folder:
        tokenizer = run.text_format.tokenizer
        tokenizer.name_or_path = run.recipe.base.hub_id or Path(run.recipe.base.model).name
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            yield path.name, path.read_bytes()


def _cards(run: FinishedRun) -> dict[str, str]:
    """Return where each data card of the recipe lies in the repository, by its path."""
    names = check.card_uses(run.recipe)
    missing = [name for name in names if not Path(name).is_file()]
    if missing:
        raise InputError(f"{missing[0]}: there is no such data card; push where the recipe was run.")
    cards: dict[str, str] = {}
    for name in names:
        stem, number = Path(name).stem, 1
        while (inside := f"data_cards/{stem}{f'-{number}' if number > 1 else ''}.md") in cards.values():
            number += 1
        cards[name] = inside
    return cards


def _described(path: Path) -> dict[str, Any]:
    """Return what the model card tells of a data card, whose own files need not be here."""
    metadata = card_metadata(path)
    source = metadata["rlhf_kit"].get("source")
    hub = source.get("hub") if isinstance(source, dict) else None
    return {"name": path.stem, "license": metadata.get("license"), "hub": hub}


def _recipe(run: FinishedRun) -> str:
    """Return the resolved recipe as it is for others: the base by its Hub id, what is from the Hub at its commit, cards
    and chat template where the repository has them.
    """
    data = run.recipe.model_dump()
    base = data["base"]
    base["model"] = base["hub_id"] or base["model"]
    base["chat_template"] = base["chat_template"] and CHAT_TEMPLATE
    for name in run.recipe.stages:
        for key, artefact in run.starts(name).items():
            *section, field = key.split(".")
            (data["stages"][name][section[0]] if section else data["stages"][name])[field] = artefact
    cards = _cards(run)

    def moved(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: moved(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [moved(item) for item in value]
        return cards.get(value, value) if isinstance(value, str) else value

    return write_yaml(without_local_paths(moved(data)))


def _written(run: FinishedRun, name: str) -> dict[str, Any] | None:
    """Return a JSON file of the run directory, None where it is not there."""
    path = run.folder / name
    return artifacts.read_json(path) if path.is_file() else None


def refuse_secrets(files: Mapping[str, bytes]) -> None:
    """Look for secrets, home folders and values of secret-looking environment variables in what is to be sent.

    Raises: InputError naming file and line of each.
    """
    patterns = dict(SECRETS)
    home = str(Path.home())
    if len(home) > 1:
        patterns["your home folder"] = re.compile(re.escape(home) + r"(?![\w.-])")
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= SHORTEST_SECRET:
            patterns[f"the value of {name}"] = re.compile(re.escape(value))
    problems = []
    for name, content in sorted(files.items()):
        if name.endswith(".safetensors"):
            continue
        for number, line in enumerate(content.decode(errors="replace").splitlines(), start=1):
            found = [what for what, pattern in patterns.items() if pattern.search(line)]
            problems += [f"{name}:{number}: holds what looks like {what}; it is not sent" for what in found]
    if problems:
        raise InputError([*problems, "Nothing was pushed; take it out where it comes from and run the recipe again."])


# ---------------------------------------------------------------- what the Hub says


def _licence(api: HfApi, base: str | None) -> str | None:
    """Return the licence that the Hub gives for a base, or None where it says none or is not reached."""
    try:
        data = api.model_info(base).card_data if base else None
    except (HTTPError, OSError, ValueError):
        return None
    return str(data.license) if data is not None and data.license else None


def _refuse_others_work(api: HfApi, run: FinishedRun, info: ModelInfo) -> None:
    """Refuse a repository with content that no push of this recipe's runs has made."""
    names = {sibling.rfilename for sibling in info.siblings or ()}
    foreign = names - OF_A_NEW_REPOSITORY
    if artifacts.RECIPE in names:
        path = api.hf_hub_download(info.id, artifacts.RECIPE, revision=info.sha)
        theirs = written_recipe(path).name
        if theirs == run.recipe.name:
            return
        foreign = {f"a run of {theirs}"}
    if foreign:
        raise InputError(
            f"{info.id}: has other content ({', '.join(sorted(foreign)[:3])}); push to a new repository, or propose it "
            "to this one with --create-pr."
        )


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn what the Hub, or the way to it, refuses into one message with the next step."""
    try:
        yield
    except (InputError, NotPushed):
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:  # an upload's own error lies below the one that tells of its thread
            if (told := _in_words(repo, cause)) is not None:
                raise told from error
            cause = cause.__cause__ or cause.__context__
        raise


def _in_words(repo: str, error: BaseException) -> InputError | NotPushed | None:
    """Return an error for the user, or None where it is not one of the Hub's or the network's."""
    again = "run the same command again, it goes on where it stopped"
    if isinstance(error, LocalTokenNotFoundError):
        return InputError(f"{repo}: you are not logged in; run `hf auth login`, or set HF_TOKEN.")
    if isinstance(error, OfflineModeIsEnabled):
        return InputError("HF_HUB_OFFLINE is set, so nothing is pushed; unset it.")
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"{repo}: has no such revision; --revision names a branch.")
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        match status:
            case 401:
                return InputError(f"{repo}: the Hub does not know this token; run `hf auth login` again.")
            case 403:
                owner = repo.partition("/")[0]
                return InputError(f"{repo}: this token may not write there; use one with write access to {owner}.")
            case 404:
                return InputError(
                    f"{repo}: the Hub has no such owner, or hides it from you; mend --repo, or log in as a member."
                )
            case 409 | 412:
                return NotPushed(
                    f"{repo}: was changed by somebody else meanwhile; nothing of theirs was overwritten; look at it, "
                    f"then {again}."
                )
            case 429:
                wait = error.response.headers.get("Retry-After")
                return NotPushed(
                    f"{repo}: the Hub takes no more for now; {again}, {f'in {wait} seconds' if wait else 'later'}."
                )
        if status >= 500:
            return NotPushed(f"{repo}: the Hub has trouble of its own (HTTP {status}); {again}.")
        return NotPushed(f"{repo}: the Hub refuses (HTTP {status}): {first_line(error)}")
    if isinstance(error, HTTPError | OSError):
        return NotPushed(f"{repo}: the Hub cannot be reached ({first_line(error)}); {again}.")
    return None
