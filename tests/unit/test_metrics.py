"""What a run says while it works."""

import fcntl
import json
import math
import os
import pty
import struct
import subprocess
import sys
import termios
import types

import pytest

from rlhf_kit import metrics
from rlhf_kit.errors import InputError
from rlhf_kit.metrics import MetricLog, duration, peak_bytes, progress, read_metrics, say, track_samples, tracking


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ppo" / "metrics.jsonl"


def test_a_step_is_one_json_object_with_its_step(path):
    """Each step is one line of JSON, readable as soon as `log` has returned."""
    log = MetricLog(path, enabled=True)
    log.log(1, {"objective/score": 0.5, "memory/peak_bytes": 7})
    assert path.read_text() == '{"step": 1, "objective/score": 0.5, "memory/peak_bytes": 7}\n'
    log.log(2, {"objective/score": 0.75})
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


def test_two_calls_for_one_step_make_one_object(path):
    """Values of a step that come in two calls are joined in one line, also after a restart."""
    log = MetricLog(path, enabled=True)
    log.log(1, {"sft/loss": 3.0})
    log.log(2, {"sft/loss": 2.0})
    log.log(2, {"sft/heldout_loss": 2.5})
    MetricLog(path, enabled=True).log(2, {"time/total_s": 4.0})
    expected = [
        {"step": 1, "sft/loss": 3.0},
        {"step": 2, "sft/loss": 2.0, "sft/heldout_loss": 2.5, "time/total_s": 4.0},
    ]
    assert read_metrics(path) == expected


def test_resume_keeps_each_step_once(path):
    """After truncate_after(2) the steps 3 and up are written again and stand in the file once."""
    log = MetricLog(path, enabled=True)
    for step in (1, 2, 3, 4):
        log.log(step, {"x": 1.0})
    log = MetricLog(path, enabled=True)
    log.truncate_after(2)
    for step in (3, 4, 5):
        log.log(step, {"x": 2.0})
    assert [(line["step"], line["x"]) for line in read_metrics(path)] == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]


def test_truncating_everything_starts_anew(path):
    """After truncate_after(-1) the file is empty and step 0 may be written."""
    log = MetricLog(path, enabled=True)
    log.log(5, {"x": 1.0})
    log.truncate_after(-1)
    assert path.read_bytes() == b""
    log.log(0, {"x": 1.0})
    assert [line["step"] for line in read_metrics(path)] == [0]


def test_a_line_cut_off_by_a_crash_is_removed(path):
    """What is written after a crash in mid-line does not stick to the torn line."""
    path.parent.mkdir()
    path.write_text('{"step": 1, "x": 1.0}\n{"step": 2, "x": 1.')
    MetricLog(path, enabled=True).log(2, {"x": 3.0})
    assert path.read_text() == '{"step": 1, "x": 1.0}\n{"step": 2, "x": 3.0}\n'


def test_an_earlier_step_is_refused(path):
    """A step below the last one is a mistake in the stage, not data."""
    log = MetricLog(path, enabled=True)
    log.log(3, {"x": 1.0})
    with pytest.raises(ValueError, match="step 2 after step 3"):
        log.log(2, {"x": 1.0})


def test_numbers_that_are_not_finite_become_null(path, capsys):
    """NaN and infinity leave valid JSON (null) and are shown as what they are."""
    MetricLog(path, enabled=True).log(1, {"a": math.nan, "b": -math.inf, "c": 1})

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == {"step": 1, "a": None, "b": None, "c": 1}
    assert "a nan  b -inf  c 1" in capsys.readouterr().err


def test_tensors_are_written_as_numbers(path):
    """A scalar tensor is a number like any other."""
    import torch

    MetricLog(path, enabled=True).log(1, {"x": torch.tensor(0.5, dtype=torch.float64)})
    assert read_metrics(path) == [{"step": 1, "x": 0.5}]


def test_only_the_enabled_log_writes(path, capsys):
    """A log of a process that is not the main one leaves no file and says nothing."""
    log = MetricLog(path, enabled=False)
    log.truncate_after(0)
    log.log(1, {"x": 1.0})
    assert not path.exists()
    assert capsys.readouterr().err == ""


def test_the_line_of_a_step_has_the_headline_on_stderr(path, capsys):
    """One line a step with score, KL, length and losses goes to stderr; the other values only to the file."""
    values = {"objective/score": 1.5, "objective/kl": 12.25, "rollout/length": 31.0, "ppo/policy_loss": -0.01}
    MetricLog(path, enabled=True).log(7, {**values, "time/rollout_s": 3.0})
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "ppo step 7  score 1.5  kl 12.25  rollout/length 31  ppo/policy_loss -0.01\n"


def test_other_ranks_are_silent(monkeypatch, capsys):
    """With RANK=1 neither `say` nor `progress` writes, and the items still come through."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(metrics, "SECONDS_BETWEEN_PLAIN_LINES", 0.0)
    say("hello")
    assert list(progress(range(5), desc="x")) == list(range(5))
    assert capsys.readouterr().err == ""


def test_without_a_terminal_progress_is_plain_lines_at_tenths(monkeypatch, capsys):
    """Off a terminal a loop of 20 says one line each 2 items, with the share done and an estimate, no control codes."""
    monkeypatch.setattr(metrics, "SECONDS_BETWEEN_PLAIN_LINES", 0.0)
    clock = iter(range(1000))
    monkeypatch.setattr(metrics.time, "monotonic", lambda: float(next(clock)))  # one second an item
    assert list(progress(range(20), desc="generate")) == list(range(20))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "generate: 10 % (2 of 20) in 2 s, about 18 s left"
    assert len(lines) == 10
    assert "\r" not in "".join(lines)


def test_a_short_loop_off_a_terminal_says_nothing(capsys):
    """Ten lines for each of a hundred quick rollouts would bury the log."""
    with progress(total=50, desc="learn") as bar:
        for _ in range(50):
            bar.update(1)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_progress_is_a_bar():
    """With stderr a terminal there is a bar with rate and time left, and a line said meanwhile stands on its own."""
    reading_end, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    code = (
        "import time; from rlhf_kit.metrics import progress, say\n"
        "for i in progress(range(4), desc='learn'):\n"
        "    time.sleep(0.15)\n"
        "    if i == 2: say('a line')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "RANK"}
    subprocess.run([sys.executable, "-c", code], stderr=terminal, env=environment, check=True, timeout=60)
    os.close(terminal)
    seen = b""
    while True:
        try:
            part = os.read(reading_end, 4096)
        except OSError:  # how Linux says that the other end is closed
            break
        if not part:
            break
        seen += part
    os.close(reading_end)
    text = seen.decode()
    assert "learn:" in text and "<00:" in text and "2/4" in text
    assert "a line\r\n" in text


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations_are_words(seconds, words):
    """A duration reads as a person would say it."""
    assert duration(seconds) == words


def test_tensorboard_gets_what_the_log_gets(path, tmp_path):
    """With the tracker asked for, the values of each stage land in TensorBoard's files under the stage's own run."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    for stage in ("sft", "ppo"):
        folder = tmp_path / "trackers" / stage
        with tracking(
            accelerator,
            ["tensorboard"],
            project="quickstart",
            stage=stage,
            folder=folder,
            settings={"lr": 1e-3, "x": None},
        ):
            log = MetricLog(tmp_path / stage / "metrics.jsonl", enabled=True, accelerator=accelerator)
            log.log(1, {f"{stage}/loss": 2.0})
            log.log(2, {f"{stage}/loss": 1.5, "bad": math.nan})
        events = event_accumulator.EventAccumulator(str(folder / "quickstart"))
        events.Reload()
        assert [(e.step, e.value) for e in events.Scalars(f"{stage}/loss")] == [(1, 2.0), (2, 1.5)]
        assert "bad" not in events.Tags()["scalars"]
    assert accelerator.trackers == []


def test_no_tracker_means_no_tracker(tmp_path):
    """With an empty list nothing is started and nothing is written."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    with tracking(accelerator, [], project="p", stage="sft", folder=tmp_path / "trackers", settings={}):
        MetricLog(tmp_path / "sft" / "metrics.jsonl", enabled=True, accelerator=accelerator).log(1, {"x": 1.0})
        assert accelerator.trackers == []
    assert not (tmp_path / "trackers").exists()


def test_a_tracker_that_is_not_installed_is_an_input_error(tmp_path, monkeypatch):
    """accelerate drops a missing tracker silently; we name it and say what to do."""
    from accelerate import Accelerator
    from accelerate import tracking as accelerate_tracking

    monkeypatch.setattr(accelerate_tracking, "_available_trackers", [])
    started = tracking(Accelerator(cpu=True), ["wandb"], project="p", stage="s", folder=tmp_path, settings={})
    with pytest.raises(InputError, match="trackers: wandb not installed; `pip install wandb`"), started:
        pass


def test_what_a_tracker_prints_is_no_result(tmp_path, capsys, monkeypatch):
    """Greetings and goodbyes go to stderr, whatever the tracker's own choice."""
    from accelerate import Accelerator
    from accelerate import tracking as accelerate_tracking
    from accelerate.utils import LoggerType

    class Talkative:
        def finish(self):
            print("bye")

    def greet(*_, **__):
        print("hello")
        accelerator.trackers.append(Talkative())

    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerate_tracking, "filter_trackers", lambda names, **_: [LoggerType(name) for name in names])
    monkeypatch.setattr(accelerator, "init_trackers", greet)
    with tracking(accelerator, ["trackio"], project="p", stage="ppo", folder=tmp_path, settings={}):
        print("result")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("result\n", "hello\nbye\n")


def test_peak_memory_is_in_bytes():
    """A Python process with these tests loaded holds between 20 MB and 50 GB: neither KiB nor MB."""
    assert 20e6 < peak_bytes() < 50e9


ASKED = [{"role": "user", "content": "Hi"}]
SAMPLES = [{"step": 3, "prompt": ASKED, "completion": "a | <b>\nc", "score": 0.123456, "ended": True}]


def test_tensorboard_shows_samples_as_a_table(tmp_path):
    """A cell keeps its text: a bar ends none, a line break breaks none, markup is not obeyed."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    with tracking(accelerator, ["tensorboard"], project="p", stage="ppo", folder=tmp_path, settings={}):
        track_samples(accelerator, SAMPLES, 3)
        track_samples(accelerator, [], 4)
    events = event_accumulator.EventAccumulator(str(tmp_path / "p"))
    events.Reload()
    (event,) = events.Tensors("samples/text_summary")
    table = event.tensor_proto.string_val[0].decode()
    assert event.step == 3
    assert table.splitlines()[0] == "| prompt | completion | score | ended |"
    assert table.splitlines()[2] == "| user: Hi | a &#124; &lt;b><br>c | 0.1235 | True |"


def test_wandb_gets_a_table_of_its_own():
    """By accelerate's call, whose table has our columns."""
    told = []

    class Tracker:
        name = "wandb"

        def log_table(self, name, columns, data, step):
            told.append((name, columns, data, step))

    track_samples(types.SimpleNamespace(trackers=[Tracker()]), SAMPLES, 3)
    columns = ["prompt", "completion", "score", "ended"]
    assert told == [("samples", columns, [["user: Hi", "a | <b>\nc", 0.1235, True]], 3)]
