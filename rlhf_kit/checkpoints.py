"""What a stage must save to go on as if never stopped: tensors as safetensors, the rest as JSON, both checked by hash.

A checkpoint is a folder `step-000020` that appears whole: it is written beside, synced, then renamed. The one before it
stays as a spare, older ones are removed. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_kit import artifacts

_NAME = re.compile(r"step-(\d{6,})$")


@dataclass(frozen=True)
class Checkpoint:
    """What a stage had done after `step` steps (SFT, reward) or updates (PPO)."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint, *, keep_all: bool) -> Path:
    """Write a checkpoint under `folder`, then remove all but the last two unless all are kept; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{checkpoint.step:06d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    save_file(tensors, partial / "tensors.safetensors")
    state = {"tensors_sha256": artifacts.sha256_of_file(partial / "tensors.safetensors"), **checkpoint.state}
    (partial / "state.json").write_text(json.dumps(state))
    for path in (partial / "tensors.safetensors", partial / "state.json", partial):
        _sync(path)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _sync(folder)
    if not keep_all:
        for _, older in _found(folder)[:-2]:
            shutil.rmtree(older)
    return final


def latest(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint under `folder` that is whole; damaged ones are named and passed over."""
    for step, path in reversed(_found(folder)):
        try:
            state = json.loads((path / "state.json").read_text())
            if artifacts.sha256_of_file(path / "tensors.safetensors") == state.pop("tensors_sha256"):
                return Checkpoint(step, load_file(path / "tensors.safetensors"), state)
        except (OSError, ValueError, KeyError):
            pass
        say(f"{path}: this checkpoint is damaged; trying the one before it")
    return None


def append_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Append lines, each with its "step", to a file of JSON lines."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _found(folder: Path) -> list[tuple[int, Path]]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(match[1]), path) for path in paths if (match := _NAME.match(path.name)))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
