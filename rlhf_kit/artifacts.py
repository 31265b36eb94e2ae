"""The files of a run: written whole or not at all, known by their hashes, described by one manifest a stage.

A run directory holds one folder a stage. A stage is finished when its `manifest.json` is there, which is written last.
No torch here; nothing here decides what is run.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from rlhf_kit.errors import InputError, OutOfRoom

__version__ = "0.1.0"  # here, for every manifest names it
MANIFEST = "manifest.json"
STARTED = "started.json"
RECIPE = "recipe.resolved.yaml"
ENVIRONMENT = "environment.json"
SUMMARY = "summary.json"
EVAL = "eval.json"
REPORT = "report.html"
LOCK = ".lock"
CHECKPOINTS = "checkpoints"
TRACKERS = "trackers"
PARTIAL = ".partial"  # suffix of a file that is being written
PREVIOUS = ".previous"  # suffix of a finished stage's folder while the stage is run again
SCHEMA = 1
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}
PACKAGES = (
    *("rlhf-kit", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "tokenizers"),
    *("safetensors", "huggingface_hub", "numpy", "pyarrow", "pydantic"),
)
"""Those whose version environment.json tells."""


# ---------------------------------------------------------------- hashes


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of(value: Any) -> str:
    """Return the SHA-256, in hex, of a JSON value; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


# ---------------------------------------------------------------- writing


def write_atomically(path: Path, content: str | bytes) -> None:
    """Put a file in place whole: written beside, synced, renamed. A crash leaves the old file or the new one."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    with _open_own(partial, os.O_TRUNC) as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; numbers that JSON does not know (nan, inf) are an error."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Return a JSON file's content."""
    return json.loads(path.read_text(encoding="utf-8"))


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Append lines, each with its "step", to a file of JSON lines."""
    with _open_own(path, os.O_APPEND) as file:
        file.write(b"".join(map(json_line, lines)))


def json_line(line: Mapping[str, Any]) -> bytes:
    """Return a line of a file of JSON lines; numbers that JSON does not know (nan, inf) are an error."""
    return json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def check_new_file(path: Path, option: str = "--out") -> None:
    """Look whether a file can be made: it is not there, and its folder is.

    Raises: InputError otherwise.
    """
    if path.exists() or path.is_symlink():
        raise InputError(f"{option} {path}: is there already; name another file.")
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: there is no folder {path.parent}.")


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> int:
    """Write the lines as a file, whole or not at all, and return how many there are."""
    made = [json_line(line) for line in lines]
    write_atomically(path, b"".join(made))
    return len(made)


def truncate_jsonl(path: Path, step: int) -> None:
    """Remove the lines of a JSON-lines file whose "step" is above `step`, and a last line that a crash cut off."""
    if not path.exists():
        return
    whole_lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    write_atomically(path, "".join(line + "\n" for line in whole_lines if json.loads(line)["step"] <= step))


def _open_own(path: Path, mode: int) -> BinaryIO:
    """Open a file of the run for writing; a symbolic link in its place is an error and is not followed."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | mode, 0o666), "wb")


def sync(path: Path) -> None:
    """Have the disk take a file's content, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- manifests


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return every file of a finished stage's folder as {"adapter/x": {"bytes", "sha256"}}.

    Not its checkpoints, not the two files that say how far the stage is, and no half file that a crash has left.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        own = name in {MANIFEST, STARTED} or name.startswith(f"{CHECKPOINTS}/") or path.name.endswith(PARTIAL)
        if path.is_file() and not own:
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
    return files


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write a stage's manifest with all its files; it becomes visible last, when every byte it speaks of is on disk."""
    files = describe_files(folder)
    for name in files:
        sync(folder / name)
        sync((folder / name).parent)
    write_json(folder / MANIFEST, {**manifest, "files": files})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return a stage's manifest, or None where the stage is not finished.

    Raises:
        InputError: it is not a manifest this version can read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = read_json(path)
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); delete {folder} to run the stage again.") from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise InputError(
            f"{path}: manifest schema {schema}, this version reads {SCHEMA}; run with --fresh or --out DIR."
        )
    return manifest


def manifest_at(path: Path) -> dict[str, Any] | None:
    """Return a manifest of ours beside an adapter that somebody made, or None where there is none or another thing."""
    try:
        manifest = read_json(path) if path.is_file() else None
    except ValueError:
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("schema") == SCHEMA else None


def changed_files(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the files a manifest lists: "a/x: missing", "a/x: 10 bytes, was 12", "a/x: changed"."""
    problems = []
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif (size := path.stat().st_size) != expected["bytes"]:
            problems.append(f"{name}: {size} bytes, was {expected['bytes']}")
        elif sha256_of_file(path) != expected["sha256"]:
            problems.append(f"{name}: changed")
    return problems


def manifest_hash(folder: Path) -> str:
    """Return the hash by which a later stage names the manifest it consumed."""
    return sha256_of_file(folder / MANIFEST)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return what changed between two flat mappings, one "key: old -> new" each, hashes shortened."""
    return [
        f"{key}: {_shown(old.get(key))} -> {_shown(new.get(key))}"
        for key in [*old, *(key for key in new if key not in old)]
        if old.get(key) != new.get(key)
    ]


def _shown(value: Any) -> str:
    is_hash = isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
    return value[:12] if is_hash else "none" if value is None else json.dumps(value)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys: {"a": {"b": 1}} is {"a.b": 1}."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    pairs: dict[str, Any] = {}
    for key, item in value.items():
        pairs |= flat(item, f"{prefix}.{key}" if prefix else key)
    return pairs


# ---------------------------------------------------------------- the run directory


def check_run_directory(folder: Path) -> None:
    """Refuse a folder that holds something else than a run, before anything is written into it.

    Raises:
        InputError: it is a file, a folder with other people's things in it, or holds symbolic links, which would lead
            what is written elsewhere (trackers' own files apart).
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; a run needs a folder of its own (--out DIR).")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if any(name[0] != "." for name in names) and not (folder / RECIPE).is_file():  # not a lock or a half file
        raise InputError(f"{folder}: is not empty and holds no {RECIPE}; a run needs a folder of its own (--out DIR).")
    links = [path for path in folder.rglob("*") if path.is_symlink() and TRACKERS not in path.relative_to(folder).parts]
    if links:
        raise InputError(
            f"{links[0]}: is a symbolic link to {os.readlink(links[0])}; a run writes to files of its own alone. Put "
            "the real file there, or use --out DIR."
        )


@contextmanager
def locked(folder: Path) -> Iterator[str]:
    """Hold a run directory, so that two runs do not write into it; yield who held it and died, or "".

    A lock left by a killed process holds nobody: the kernel lets go of it.

    Raises:
        InputError: another process holds it, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "r+")
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror}); a run needs a folder of its own (--out DIR)."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{folder}: another run is at work here ({file.read().strip() or 'it does not say who'}); "
                "wait for it, stop it, or use --out DIR."
            ) from error
        before = file.read().strip()
        _write_over(file, f"process {os.getpid()} on {socket.gethostname()}\n")
        try:
            yield before
        finally:  # closing the file releases the lock; the kernel does the same when the process dies
            with suppress(OSError):
                _write_over(file, "")


def _write_over(file: TextIO, text: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses while the block writes into a run directory into a message.

    Raises:
        OutOfRoom: the disk is full, the folder cannot be written any more, or it is gone.
    """
    try:
        yield
    except OSError as error:
        own = error.filename is not None and Path(os.fsdecode(error.filename)).is_relative_to(folder)
        if not own and error.errno not in DISK_ERRORS:
            raise
        what = f"{error.filename}: " if error.filename is not None else ""
        gone = "; the folder is gone" if error.errno == errno.ENOENT else ""
        raise OutOfRoom(
            f"{folder}: cannot go on writing here: {what}{error.strerror}{gone}. Nothing that was finished is lost by "
            "it: mend the cause (free space, permissions, the folder) and run the same command again."
        ) from error


def clear(folder: Path) -> None:
    """Remove what runs left in a run directory, and nothing else."""
    for path in folder.iterdir():
        if (path / MANIFEST).is_file() or (path / STARTED).is_file():
            remove_folder(path)
        elif path.name in (ENVIRONMENT, SUMMARY, REPORT):  # not RECIPE, by which a run directory is known
            path.unlink()


def set_aside(folder: Path) -> None:
    """Clear the way for a stage to run anew: it becomes `<stage>.previous`, unless it is unfinished and has no
    checkpoint, or a finished one is there already; then it goes.
    """
    if not folder.exists():
        return
    kept = folder.with_name(folder.name + PREVIOUS)
    begun = (folder / CHECKPOINTS).is_dir() and not (kept / MANIFEST).is_file()
    if (folder / MANIFEST).is_file() or begun:
        remove_folder(kept)
        folder.rename(kept)
    else:
        remove_folder(folder)


def remove_folder(folder: Path) -> None:
    """Remove a stage's folder, its manifest first, so that a half-removed one never looks finished."""
    (folder / MANIFEST).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def environment(device: str, processes: int, threads: int) -> dict[str, Any]:
    """Return what a run ran on: versions of Python and the packages, system, device. No names, paths or secrets."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None  # run from a checkout that is not installed
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
        "processes": processes,
        "threads": threads,
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": versions,
    }
