"""What a run says while it works: `metrics.jsonl`, one line a step and progress on stderr, trackers if asked for.

stdout is left to results. Nothing leaves the machine unless the recipe names a tracker that sends it.
"""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from rlhf_kit import artifacts
from rlhf_kit.errors import InputError

if TYPE_CHECKING:  # accelerate takes a second to import; only `tracking` needs it
    from accelerate import Accelerator

# What the line of a step shows, if the step has any of them; metrics.jsonl has everything.
HEADLINE = (
    "objective/score",
    "objective/kl",
    "rollout/length",
    "heldout/score",
    "heldout/gold",
    "ppo/policy_loss",
    "ppo/value_loss",
    "rloo/policy_loss",
    "grpo/policy_loss",
    "value/explained_variance",
    "sft/loss",
    "reward/loss",
    "reward/accuracy",
    "dpo/loss",
    "kto/loss",
    "dpo/accuracy",
    "rejection_sampling/loss",
)
SECONDS_BETWEEN_PLAIN_LINES = 10.0


def is_main_process() -> bool:
    """Whether this is the process that writes and speaks: the only one, or rank 0 of those launched together."""
    names = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # those accelerate reads
    return int(next((os.environ[name] for name in names if name in os.environ), "0")) == 0


def say(message: str) -> None:
    """Write one line to stderr, from the main process only, above any progress bar."""
    if is_main_process():
        tqdm.write(message, file=sys.stderr)
        sys.stderr.flush()


class MetricLog:
    """The `metrics.jsonl` of a stage: one JSON object a step, {"step": int, "<group>/<name>": number or null, ...}.

    A number that is not finite is written as null (JSON has no word for it) and shown as nan or inf on the line of the
    step. An existing file is continued; a line that a crash cut off is removed.
    """

    def __init__(self, path: Path, *, enabled: bool, accelerator: "Accelerator | None" = None):
        """With `enabled` false (every process but the main one) nothing is written or shown.

        `accelerator` passes the values on to the trackers started by `tracking`; with none started it does nothing.
        """
        self.path = path
        self.enabled = enabled
        self.accelerator = accelerator
        self._last: dict[str, Any] = {}  # the last line of the file
        if enabled and path.exists():
            self._rewrite(read_metrics(path))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append the values of `step` (from the smallest up) and show its headline; a second call for the same step
        adds to its line.

        Raises: ValueError for a step below one already written.
        """
        if not self.enabled:
            return
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in values.items()}
        again = self._last.get("step") == step
        if self._last and step < self._last["step"]:
            raise ValueError(f"{self.path}: step {step} after step {self._last['step']}; truncate_after comes first")
        line = {"step": step, **(self._last if again else {}), **{k: finite(v) for k, v in numbers.items()}}
        if again:
            self._rewrite([*read_metrics(self.path)[:-1], line])
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            artifacts.append_lines(self.path, [line])
            self._last = line
        shown = {name: numbers[name] for name in HEADLINE if name in numbers} or numbers
        pairs = "  ".join(f"{name.removeprefix('objective/')} {value:.4g}" for name, value in shown.items())
        say(f"{self.path.parent.name} step {step}  {pairs}")
        if self.accelerator is not None:
            self.accelerator.log({name: value for name, value in numbers.items() if math.isfinite(value)}, step=step)

    def truncate_after(self, step: int) -> None:
        """Remove the lines of later steps, atomically: a stage that goes on from a checkpoint at `step` writes them
        again. -1 removes all.
        """
        if self.enabled and self.path.exists():
            self._rewrite([line for line in read_metrics(self.path) if line["step"] <= step])

    def _rewrite(self, lines: list[dict[str, Any]]) -> None:
        artifacts.write_atomically(self.path, b"".join(map(artifacts.json_line, lines)))
        self._last = lines[-1] if lines else {}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, without a last one that has no end of line (a crash cut it off)."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def finite(value: float) -> float | None:
    """The value as a JSON file has it: nothing in place of NaN and infinity."""
    return value if math.isfinite(value) else None


class PlainProgress:
    """What `progress` gives where there is no terminal: lines at every tenth, at least 10 s apart.

    A loop shorter than that says nothing. It has of tqdm what we use: iteration, `update`, `with`, `close`.
    """

    def __init__(self, iterable: Iterable[Any] | None, total: int | None, desc: str):
        self.iterable = iterable
        self.total = total
        self.desc = desc
        self.done = 0
        self._started = self._spoke = time.monotonic()
        self._tenths = 0

    def __iter__(self) -> Iterator[Any]:
        assert self.iterable is not None, "progress(total=...) is moved by update, not iterated"
        for item in self.iterable:
            yield item
            self.update(1)

    def update(self, n: int = 1) -> None:
        """Count `n` more as done."""
        self.done += n
        now = time.monotonic()
        if now - self._spoke < SECONDS_BETWEEN_PLAIN_LINES:
            return
        if not self.total:
            self._spoke = now
            say(f"{self.desc}: {self.done} done in {duration(now - self._started)}")
        elif 10 * self.done // self.total > self._tenths:
            self._spoke, self._tenths = now, 10 * self.done // self.total
            elapsed = now - self._started
            left = elapsed * (self.total - self.done) / self.done
            share = f"{100 * self.done // self.total} % ({self.done} of {self.total})"
            say(f"{self.desc}: {share} in {duration(elapsed)}, about {duration(left)} left")

    def close(self) -> None:
        """Nothing; a bar would be taken off the screen."""

    def __enter__(self) -> "PlainProgress":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def progress(iterable: Iterable[Any] | None = None, total: int | None = None, desc: str = "") -> "tqdm | PlainProgress":
    """A progress bar with a time estimate over `iterable`, or moved by `update(n)` up to `total`, on stderr.

    A bar on a terminal and in the main process only, taken off the screen when it ends; else plain lines now and then.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if is_main_process() and sys.stderr.isatty():
        return tqdm(iterable, total=total, desc=desc, file=sys.stderr, leave=False, dynamic_ncols=True)
    return PlainProgress(iterable, total, desc)


def peak_bytes() -> int:
    """The most memory this process has held so far: of the GPU where there is one, else resident (Linux, macOS)."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def duration(seconds: float) -> str:
    """Seconds as a person says them: "8 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextmanager
def tracking(
    accelerator: "Accelerator", names: Sequence[str], *, project: str, stage: str, folder: Path, settings: Mapping
) -> Iterator[None]:
    """While it lasts, what a `MetricLog` with this accelerator writes also goes to the trackers `names`.

    `names` are accelerate's (tensorboard, trackio, wandb, mlflow); nothing happens when there are none. Each stage is
    a run of its own, for the steps of each start anew. TensorBoard's files go to `folder`/<project>. `settings` are
    shown beside the run.

    Raises: InputError naming a tracker that is not installed (accelerate would leave it out without a word).
    """
    if not names:
        yield
        return
    from accelerate.tracking import filter_trackers
    from accelerate.utils import LoggerType

    started = filter_trackers(list(names), logging_dir=folder)
    missing = [name for name in names if LoggerType(name) not in started]
    if missing:
        packages = " ".join(missing)
        raise InputError(f"trackers: {packages} not installed; `pip install {packages}`, or take it out of the recipe")
    accelerator.log_with = started
    accelerator.project_configuration.logging_dir = str(folder)
    flat = {key: v if isinstance(v, bool | int | float | str) else json.dumps(v) for key, v in settings.items()}
    run_names = {"wandb": {"name": stage}, "trackio": {"name": stage}, "mlflow": {"run_name": stage}}
    with redirect_stdout(sys.stderr):  # trackio greets there
        accelerator.init_trackers(project, config=flat, init_kwargs=run_names)
    try:
        yield
    finally:  # not accelerator.end_training(): that also ends the process group, and more stages may follow
        with redirect_stdout(sys.stderr):
            for tracker in accelerator.trackers:
                tracker.finish()
        accelerator.trackers.clear()


def track_samples(accelerator: "Accelerator", samples: Sequence[Mapping[str, Any]], step: int) -> None:
    """Show rows of `samples.jsonl` as a table in the trackers of `tracking`, each in its own way."""
    columns = [name for name in samples[0] if name != "step"] if samples else []
    rows = [[_cell(sample[name]) for name in columns] for sample in samples]
    for tracker in accelerator.trackers if samples else ():
        if tracker.name == "wandb":
            tracker.log_table("samples", columns=columns, data=rows, step=step)
        elif tracker.name == "trackio":
            import trackio

            tracker.log({"samples": trackio.Table(columns=columns, data=rows)}, step=step)
        elif tracker.name == "mlflow":
            import mlflow

            mlflow.log_text(_markdown(columns, rows), f"samples/step-{step}.md")
        else:
            tracker.tracker.add_text("samples", _markdown(columns, rows), global_step=step)  # TensorBoard


def _cell(value: Any) -> Any:
    """A value of a sample as a cell: chat messages as text."""
    if isinstance(value, list):
        return "\n".join(f"{message['role']}: {message['content']}" for message in value)
    return round(value, 4) if isinstance(value, float) else value


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown; what would end a cell is put otherwise, and markup stays text."""

    def cell(value: Any) -> str:
        text = str(value).replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
        return text.replace("\n", "<br>")

    head = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join([*head, *(f"| {' | '.join(map(cell, row))} |" for row in rows)])
