"""A chat template tried before it is used: it is a program, and comes with a model from somebody else.

transformers runs it in Jinja's sandbox, where it reaches no file and no Python object, but nothing bounds its time or
memory. So it is first run in a process of its own, on a few short dialogues, with both limited. That tells a template
that loops or grows by itself; not one that does so only on certain rows. Run as a script, this file is that process.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 5
"""Of computing, for all the dialogues. A usual template takes milliseconds."""
PATIENCE = 120.0
"""Seconds until a process that does not even compute is given up."""
BYTES = 2**28
"""Of memory beyond what the process has before it begins."""
LETTERS = 100_000
"""Of what is rendered of a dialogue of two dozen letters."""
DIALOGUES = (
    [{"role": "user", "content": "Hello"}],
    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}],
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Bye"},
    ],
)


def try_template(tokenizer: PreTrainedTokenizerBase, setting: str) -> None:
    """Try the tokenizer's chat template; one that only raises an exception may fit other dialogues and is let pass.

    setting: what it belongs to, for the message.

    Raises:
        InputError: there is none to use; or it takes too long or too much memory, or writes too much.
    """
    from rlhf_kit.errors import InputError, first_line  # late: the process that tries it cannot import the package

    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # several, and none is the default
        raise InputError(f"{setting}: {first_line(error)}; name one in base.chat_template") from error
    known = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    problem = _tried(json.dumps({"template": template, "known": known}))
    if problem:
        raise InputError(f"{setting}: the chat template {problem}; use another one (base.chat_template)")


@cache
def _tried(order: str) -> str:
    """Return what is wrong with a template, "" if nothing is."""
    alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # threads reserve memory
    try:
        process = subprocess.run(
            [sys.executable, "-P", str(Path(__file__).resolve())],  # -P: the files beside this one are not imported
            input=order,
            capture_output=True,
            text=True,
            env={**os.environ, **alone},
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return f"does not come to an end within {PATIENCE:.0f} seconds"
    if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"does not come to an end within {SECONDS} seconds of computing"
    if process.returncode < 0:
        return f"ends the process that tries it ({signal.Signals(-process.returncode).name})"
    if process.returncode > 0:
        raise RuntimeError(f"the process that tries a chat template failed:\n{process.stderr}")
    return process.stdout


def _try_here(order: dict[str, Any]) -> str:
    """Return what is wrong with the template, having limited this process."""
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_this_process()
    for dialogue in DIALOGUES:
        for answer_follows in (False, True):
            try:
                (text,), _ = render_jinja_template(
                    conversations=[dialogue],
                    chat_template=order["template"],
                    add_generation_prompt=answer_follows,
                    **order["known"],
                )
            except MemoryError:
                return f"needs more than {BYTES // 2**20} MiB for a dialogue of {len(dialogue)} short messages"
            except Exception:  # told where it is used, in the words of that place
                continue
            if len(text) > LETTERS:
                return f"writes {len(text):,} letters for a dialogue of {len(dialogue)} short messages"
    return ""


def _limit_this_process() -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + SECONDS + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    if sys.platform == "linux":  # elsewhere the system does not hold a process to it
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    print(_try_here(json.load(sys.stdin)), end="")
