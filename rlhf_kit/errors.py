"""The ways a run may end early with a message; every other exception is a bug and travels."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "Diverged",
    "InputError",
    "Interrupted",
    "NotPushed",
    "NotScored",
    "OutOfRoom",
    "RequirementMissed",
    "did_you_mean",
    "first_line",
    "printable",
]

MOST = 100
"""Problems that one InputError tells."""
LONGEST = 2_000
"""Letters of a problem that are told."""


class InputError(Exception):
    """What the user gave us is wrong: recipe, data card, data or arguments. Ends the process with exit code 2.

    A message says where, what, what was seen and what would work:
    `recipes/my.yaml:31: stages.ppo.kl_coeff: unknown key; did you mean kl_coef?`
    Several problems found together are given as a sequence; `str()` puts each on its own line. What they quote of the
    input cannot break a line, colour the terminal or fill it: a problem is printable and shortened, and of very many
    the first are told.
    """

    problems: tuple[str, ...]

    def __init__(self, message: str | Sequence[str]):
        given = [message] if isinstance(message, str) else list(dict.fromkeys(message))
        if len(given) > MOST + 1:  # the one more tells how many are left out, also when it is raised anew
            given = [*given[:MOST], f"and {len(given) - MOST:,} more problems"]
        short = [problem if len(problem) <= LONGEST else problem[:LONGEST] + " …" for problem in given]
        self.problems = tuple(map(printable, short))
        super().__init__(message)  # the argument itself, so that the exception survives pickling

    def __str__(self) -> str:
        return "\n".join(self.problems)


class Interrupted(BaseException):
    """Stopped by SIGTERM or SIGINT; what was done is in a checkpoint, if anything was. Ends with exit code 75.

    Not an Exception: it may come in the middle of somebody's code, which must not take it for an error of its own.
    """


class Diverged(ArithmeticError):
    """A loss, gradient or score is NaN or infinite, and going on would destroy the weights. Ends with exit code 1."""


class RequirementMissed(Exception):
    """A reward model is not what the recipe requires it to be; it is finished and kept. Ends with exit code 1."""


class OutOfRoom(Exception):
    """The machine has no more memory, or takes no more files; what was finished is kept. Ends with exit code 1."""


class NotPushed(Exception):
    """The Hub could not be reached or did not take a push; the run is as it was. Ends with exit code 1."""


class NotScored(Exception):
    """The reward server could not be reached or gave no scores; what was done is kept. Ends with exit code 1."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown `word`: the nearest known one, or all of them if none is near."""
    names = sorted({str(name) for name in known})
    near = difflib.get_close_matches(word, names, n=1) or [n for n in names if n.lower() == word.lower()]
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known: {', '.join(names)}" if names else ""


def printable(text: str) -> str:
    """Return text for one line of a message: line breaks and other invisible characters as escapes."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def first_line(error: Exception) -> str:
    """Return what a library's exception says, the first line of it, for a message of ours."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])
