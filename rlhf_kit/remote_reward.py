"""A reward server (`rlhf-kit serve-reward`) as its clients see it: what goes over the wire, and how it is asked.

Tokens or texts go there and raw scores come back; there is no torch here. The address alone decides where a request
goes: no proxy, no redirect, no credentials. Every request has a time limit; one without an answer is made again a few
times.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import httpx2
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlhf_kit.errors import InputError, NotScored, first_line, printable
from rlhf_kit.metrics import say

IDENTITY, SCORE_TOKENS, SCORE_TEXTS = "/identity", "/score/tokens", "/score/texts"
MOST_ROWS = 4096
"""Of one request."""
CONNECT_S, ANSWER_S = 5.0, 120.0
"""How long a server may take to accept a connection, and to answer."""
WAITS_S = (1.0, 2.0, 4.0)
"""Before each further try."""


# ---------------------------------------------------------------- what goes over the wire


class _Asked(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class _Answered(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)  # a newer server may tell more


class TokenRow(_Asked):
    """One completion behind its prompt, as tokens."""

    ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    """Prompt and completion, the end token included where there is one. The score is read at the last."""
    left_padding: Annotated[int, Field(ge=0)] = 0
    """Columns of padding before them, so that the rows of a request lie as they lay where they were sampled. It changes
    the rounding of scores and nothing else."""


class TokenRows(_Asked):
    """Rows of tokens to score."""

    rows: Annotated[list[TokenRow], Field(min_length=1, max_length=MOST_ROWS)]


class Message(_Asked):
    """One turn of a dialogue."""

    role: str
    content: str


class TextRow(_Asked):
    """One completion and its prompt, as texts."""

    prompt: str | list[Message]
    """A text, or a dialogue up to where the answer starts."""
    completion: str
    """Without its end token, which is added."""


class TextRows(_Asked):
    """Texts to score, tokenised as the reward model's training data were."""

    rows: Annotated[list[TextRow], Field(min_length=1, max_length=MOST_ROWS)]


class Scores(_Answered):
    """Raw scores, in the order of the rows."""

    scores: list[float | None]
    """null stands for one that is NaN or infinite, for which JSON has no word."""
    manifest: str
    """Which reward model gave them; see `Identity`."""


class Unit(_Answered):
    """(raw score - mean) / std is the score in the unit of the run's reports."""

    mean: float
    std: float


class Identity(_Answered):
    """Which reward model a server has, and how it reads."""

    rlhf_kit: str
    """Version of the server."""
    run: str
    """Name of the recipe."""
    stage: str
    """The reward stage."""
    manifest: str
    """SHA-256 of the stage's manifest: another reward model has another one."""
    base: dict[str, Any]
    """The content hash of the base, or its Hub id and revision."""
    tokenizer: dict[str, Any]
    """Vocabulary, chat template, padding and end token. Token ids mean something to those alone who have the same."""
    context: int | None
    """Tokens of a row at most; null where nothing limits them."""
    score_normalisation: Unit


# ---------------------------------------------------------------- asking


@functools.cache  # one answer for the whole of a run; whether it still holds, every scored answer tells
def identity(address: str) -> Identity:
    """Return what the server at an address tells of itself.

    Raises: InputError when it does not answer, or is no reward server.
    """
    try:
        with _client() as client:
            response = client.get(address.rstrip("/") + IDENTITY)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise InputError(
            f"{address}: no reward server answers ({_seen(error)}); start it with rlhf-kit serve-reward, or mend the "
            "address."
        ) from error
    if response.status_code != 200:
        raise InputError(f"{address}: is no reward server: {IDENTITY} gives {_refusal(response)}.")
    try:
        return Identity.model_validate_json(response.content)
    except ValidationError as error:
        raise InputError(
            f"{address}: is no reward server of this version: {IDENTITY} gives {printable(response.text[:80])}"
        ) from error


class RewardServer:
    """A reward server, asked again and again by one process."""

    def __init__(self, address: str) -> None:
        """Raises: InputError when it does not answer, or is no reward server."""
        self.address = address
        self.identity = identity(address)
        self._client = _client()

    def scores(self, path: str, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """Return the raw score of each row, nan where it is not finite; a request without an answer is made again.

        Raises:
            NotScored: there is none after a few tries, it is not one for each row, or of another reward model.
            InputError: the server refuses the rows.
        """
        response = self._answer(path, {"rows": rows})
        if response.status_code != 200:
            raise InputError(f"reward: {self.address}: refuses to score: {_refusal(response)}")
        try:
            found = Scores.model_validate_json(response.content)
        except ValidationError as error:
            raise self._lost(f"answers {printable(response.text[:80])}, which are no scores") from error
        if found.manifest != self.identity.manifest:
            raise NotScored(
                f"reward: {self.address}: has another reward model than when this run began (manifest "
                f"{printable(found.manifest[:12])}, not {self.identity.manifest[:12]}); serve that one again and run "
                "the same command to go on, or run it now to start the stage anew with the other."
            )
        if len(found.scores) != len(rows):
            raise self._lost(f"gave {len(found.scores)} scores for {len(rows)} completions")
        return [math.nan if score is None else score for score in found.scores]

    def _answer(self, path: str, content: Mapping[str, Any]) -> httpx2.Response:
        """Return the answer of a server that has no trouble of its own.

        Raises: NotScored when there is none after a few tries.
        """
        for wait in (*WAITS_S, None):
            try:
                response = self._client.post(self.address.rstrip("/") + path, json=content)
                if response.status_code < 500:
                    return response
                seen = _refusal(response)
            except httpx2.HTTPError as error:
                seen = _seen(error)
            if wait is not None:
                say(f"reward: {self.address}: no scores ({seen}); asking again in {wait:g} s")
                time.sleep(wait)
        raise self._lost(f"gives no scores, asked {len(WAITS_S) + 1} times ({seen})")

    def _lost(self, what: str) -> NotScored:
        return NotScored(
            f"reward: {self.address}: {what}. What was done is kept: look at the server, start it again with rlhf-kit "
            "serve-reward, and run the same command to go on."
        )


def _client() -> httpx2.Client:
    return httpx2.Client(timeout=httpx2.Timeout(ANSWER_S, connect=CONNECT_S), trust_env=False)


def _seen(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _refusal(response: httpx2.Response) -> str:
    """Return the status of an answer, and what it says of the reason."""
    try:
        reason = str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        reason = response.reason_phrase
    return f"HTTP {response.status_code}, {printable(reason[:400])}"
