"""What a stage must save to go on as if never stopped: tensors as safetensors, the rest as JSON, both checked by hash.

A checkpoint is a folder `step-000020` that appears whole: it is written beside, synced, then renamed. The one before it
stays as a spare, older ones are removed. Nothing is pickled.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from rlhf_kit import artifacts, distributed
from rlhf_kit.errors import InputError
from rlhf_kit.recipe import CheckpointEvery

TENSORS, STATE = "tensors.safetensors", "state.json"
_NAME = re.compile(r"step-(\d{6,})$")


@dataclass(frozen=True)
class Checkpoint:
    """What a stage had done after `step` steps (SFT, reward) or updates (PPO)."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def tensors_of(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what `put_back` needs, parameters and their optimizer state: "parameter/<name>", "exp_avg/<name>" ..."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"parameter/{name}"] = parameter
        tensors |= {f"{kind}/{name}": value for kind, value in optimizer.state[parameter].items()}
    return tensors


def put_back(checkpoint: Checkpoint, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Put the tensors of a checkpoint into the parameters and their optimizer state; what is of neither is left out.

    Raises:
        InputError: a parameter is not in it.
    """
    if missing := sorted(name for name in parameters if f"parameter/{name}" not in checkpoint.tensors):
        raise InputError(
            f"checkpoint of step {checkpoint.step}: has no {missing[0]} ({len(missing)} missing); another version of "
            "rlhf_kit made it. --fresh starts anew."
        )
    for key, tensor in checkpoint.tensors.items():
        kind, _, name = key.partition("/")
        if name not in parameters:
            continue
        parameter = parameters[name]
        if kind == "parameter":
            with torch.no_grad():
                parameter.copy_(tensor)
        else:
            optimizer.state[parameter][kind] = tensor if kind == "step" else tensor.to(parameter)


def due(every: CheckpointEvery, done: int, saved_at: float, accelerator: Accelerator) -> bool:
    """Return whether a checkpoint is due after `done` steps, the last one saved at that `time.monotonic()`."""
    by_count = every.updates is not None and done % every.updates == 0
    late = every.minutes is not None and time.monotonic() - saved_at > 60 * every.minutes
    return distributed.agree(late, accelerator) or by_count


def save(folder: Path, checkpoint: Checkpoint, *, keep_all: bool, logs: Sequence[Path] = ()) -> Path:
    """Write a checkpoint under `folder`, then remove all but the last two unless all are kept; return its path.

    logs: files of JSON lines up to this step; the disk has them before it has the checkpoint. Checkpoints of later
    steps are damaged ones that were passed over, and go.
    """
    for path in logs:
        if path.exists():
            artifacts.sync(path)
    folder.mkdir(parents=True, exist_ok=True)
    for half in folder.glob(f".*{artifacts.PARTIAL}"):  # that a crash has left
        shutil.rmtree(half)
    final = folder / f"step-{checkpoint.step:06d}"
    partial = folder / f".{final.name}{artifacts.PARTIAL}"
    partial.mkdir()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    artifacts.write_atomically(partial / TENSORS, to_bytes(tensors))
    state = {**checkpoint.state, "step": checkpoint.step, "tensors": artifacts.sha256_of_file(partial / TENSORS)}
    artifacts.write_json(partial / STATE, {**state, "sha256": artifacts.hash_of(state)})
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    artifacts.sync(folder)
    steps = dict(_found(folder))
    older = [] if keep_all else sorted(step for step in steps if step < checkpoint.step)[:-1]
    for step in [*older, *(step for step in steps if step > checkpoint.step)]:
        shutil.rmtree(steps[step])
    return final


def latest(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint under `folder` that is whole; damaged ones are named and passed over."""
    found = _found(folder)
    for step, path in reversed(found):
        try:
            state = artifacts.read_json(path / STATE)
            whole = state.pop("sha256") == artifacts.hash_of(state) and state.pop("step") == step
            if whole and state.pop("tensors") == artifacts.sha256_of_file(path / TENSORS):
                return Checkpoint(step, load_file(path / TENSORS), state)
        except (AttributeError, KeyError, OSError, TypeError, ValueError):
            pass  # not there, or not what `save` wrote
        before = "trying the one before it" if path != found[0][1] else "none is left, so the stage starts anew"
        say(f"{path}: this checkpoint is damaged; {before}")
    return None


def _found(folder: Path) -> list[tuple[int, Path]]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(match[1]), path) for path in paths if (match := _NAME.match(path.name)))
