"""Accuracy on tasks of lm-evaluation-harness: what tuning has cost, or brought, elsewhere (extra `tasks`).

The harness runs on the one base that is loaded; each system is a role on it. A task is one of the harness's own, by
name, which it fetches from the Hub, or a YAML file of its format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlhf_kit.errors import InputError, did_you_mean, first_line
from rlhf_kit.finished import FinishedRun
from rlhf_kit.marked_yaml import read_yaml
from rlhf_kit.settings import read_text


def check_installed() -> None:
    """Look whether the harness is there.

    Raises: InputError otherwise.
    """
    if find_spec("lm_eval") is None:
        raise InputError("--tasks: not installed: lm-eval; `pip install 'rlhf-kit[tasks]'`.")


def accuracies(
    run: FinishedRun,
    systems: Mapping[str, str],
    tasks: Sequence[str],
    *,
    fewshot: int | None,
    limit: int | None,
    batch_size: int,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return by task and system the metrics of the harness: {"arc_easy": {"sft": {"acc": 0.6, "acc_stderr": 0.01}}}.

    systems: role of each. fewshot: examples before each question; None is the task's own choice. limit: questions of a
    task at most.

    Raises: InputError when a task is not known, or cannot be had.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    files = {task: Path(task) for task in tasks if task.endswith((".yaml", ".yml"))}
    names = {task: _name_of(files[task]) if task in files else task for task in tasks}
    folders = sorted({str(path.parent.resolve()) for path in files.values()})
    manager = TaskManager(include_path=folders or None)
    for name in names.values():
        if name not in manager.all_tasks:
            raise InputError(f"--tasks {name}: lm-eval has no such task{did_you_mean(name, manager.all_tasks)}")
    causal = run.shared.causal
    causal.config.use_cache = True
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for system, role in systems.items():
        with run.shared.using(role):
            model = HFLM(
                pretrained=causal,
                tokenizer=run.text_format.tokenizer,
                batch_size=batch_size,
                max_length=run.context,
                device=str(run.shared.device),
            )
            try:
                results = simple_evaluate(
                    model=model,
                    tasks=list(names.values()),
                    num_fewshot=fewshot,
                    limit=limit,
                    task_manager=manager,
                    log_samples=False,
                    bootstrap_iters=0,
                )
            except (OSError, ValueError, ConnectionError) as error:
                raise InputError(f"--tasks {', '.join(tasks)}: lm-eval cannot run them: {first_line(error)}") from error
        for task, figures in results["results"].items():
            found.setdefault(task, {})[system] = dict(_metrics(figures))
    return found


def _name_of(path: Path) -> str:
    """Return the name that a task's file gives it."""
    written = read_yaml(read_text(path, "task", (".yaml", ".yml")), str(path)).value
    if not isinstance(written, dict) or not isinstance(written.get("task"), str):
        raise InputError(f"{path}: is no task of lm-eval, which has a name under task:")
    return written["task"]


def _metrics(figures: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers that the harness measured; "acc,none" is acc."""
    for name, value in figures.items():
        if isinstance(value, int | float) and "," in name:
            yield name.partition(",")[0], float(value)
