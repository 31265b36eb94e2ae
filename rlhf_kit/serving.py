"""A run's reward model over HTTP: `rlhf-kit serve-reward`.

Rows of tokens, or texts, come in and raw scores go out, the same that a PPO stage of the run would have got. What waits
while the model is busy is scored together. It serves whoever reaches it and knows no passwords, so it listens on this
machine alone unless it is told otherwise. /openapi.json says how to ask.
"""

from __future__ import annotations

import math
import signal
import socket
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from rlhf_kit import artifacts
from rlhf_kit.collate import right_pad
from rlhf_kit.errors import InputError, OutOfRoom
from rlhf_kit.finished import FinishedRun
from rlhf_kit.pieces import Pieces
from rlhf_kit.remote_reward import (
    IDENTITY,
    SCORE_TEXTS,
    SCORE_TOKENS,
    Identity,
    Scores,
    TextRows,
    TokenRow,
    TokenRows,
    Unit,
)
from rlhf_kit.rollout import microbatches
from rlhf_kit.scorers import Written, reads


class ServedReward:
    """The reward model of a finished stage, as a server has it."""

    def __init__(self, run: FinishedRun, stage: str | None, batch_size: int) -> None:
        """stage: None is the one that PPO learnt from. batch_size: rows of a forward pass at most.

        Raises: InputError when it is not finished, or no reward stage.
        """
        self.run = run
        self.stage = stage or run.scored_by() or ""
        self.reward = run.reward(self.stage or None)
        self.pieces = Pieces("--batch-size", batch_size, "rows", run.accelerator)
        self.vocabulary: int = run.shared.causal.get_input_embeddings().num_embeddings

    def identity(self) -> Identity:
        """Return which reward model this is."""
        return Identity(
            rlhf_kit=artifacts.__version__,
            run=self.run.recipe.name,
            stage=self.stage,
            manifest=artifacts.manifest_hash(self.run.folder / self.stage),
            **reads(self.run.recipe.base, self.run.text_format),
            context=self.run.context,
            score_normalisation=Unit(mean=self.reward.mean, std=self.reward.std),
        )

    def tokenised(self, texts: TextRows) -> list[TokenRow]:
        """Return texts as rows of tokens that end in one column, as `rlhf-kit score` has them.

        Raises: InputError when the chat template cannot render a prompt.
        """
        rows = []
        for row in texts.rows:
            prompt = row.prompt if isinstance(row.prompt, str) else [turn.model_dump() for turn in row.prompt]
            text_format = self.run.text_format
            rows.append([*text_format.prompt_ids(prompt), *text_format.completion_ids(prompt, row.completion)])
        longest = max(map(len, rows))
        return [TokenRow(ids=ids, left_padding=longest - len(ids)) for ids in rows]

    def refuse(self, rows: Sequence[TokenRow]) -> None:
        """Raises: InputError naming the first row that the model cannot read."""
        longest, context = max(len(row.ids) for row in rows), self.run.context
        for number, row in enumerate(rows):
            at, left = f"rows.{number}", row.left_padding
            if context is not None and len(row.ids) > context:
                raise InputError(f"{at}: has {len(row.ids)} tokens, and the reward model reads {context} at most.")
            if (largest := max(row.ids)) >= self.vocabulary:
                raise InputError(f"{at}: has token {largest}; the vocabulary ends with {self.vocabulary - 1}.")
            if left > longest:
                raise InputError(f"{at}: left_padding {left} is more than the {longest} tokens of the longest row.")

    def scores(self, rows: Sequence[TokenRow]) -> list[float | None]:
        """Return the raw score of each row, None where it is not finite, a batch at a time."""
        return self.pieces.whole(
            lambda size: [score for piece in microbatches(rows, size) for score in self._forward(piece)]
        )

    def _forward(self, rows: Sequence[TokenRow]) -> list[float | None]:
        left = [row.left_padding for row in rows]
        pad_id, device = self.run.text_format.pad_id, self.run.shared.device
        ids, mask = right_pad([[pad_id] * n + row.ids for n, row in zip(left, rows, strict=True)], pad_id)
        for n, columns in zip(left, mask, strict=True):
            columns[:n] = False
        nothing = [""] * len(rows)  # an adapter reads tokens alone
        written = Written(nothing, nothing, ids.to(device), mask.to(device)).rows(range(len(rows)))
        return [score if math.isfinite(score) else None for score in self.reward.scorer(written).tolist()]


class Batches:
    """Rows that wait are scored together, by one thread; a request's rows stay together and in order."""

    def __init__(self, score: Callable[[list[TokenRow]], list[float | None]], most: int) -> None:
        """most: rows of several requests scored together at most."""
        self._score, self._most = score, most
        self._waiting: deque[tuple[list[TokenRow], Future[list[float | None]]]] = deque()
        self._worker = ThreadPoolExecutor(max_workers=1)

    def scores(self, rows: list[TokenRow]) -> list[float | None]:
        """Return the scores of a request, after those before it."""
        found: Future[list[float | None]] = Future()
        self._waiting.append((rows, found))
        self._worker.submit(self._next)
        return found.result()

    def _next(self) -> None:
        """Score what waits; it is called as often as there are requests, so some calls find nothing."""
        rows: list[TokenRow] = []
        taken: list[tuple[int, Future[list[float | None]]]] = []
        while self._waiting and (not taken or len(rows) + len(self._waiting[0][0]) <= self._most):
            asked, found = self._waiting.popleft()
            rows += asked
            taken.append((len(asked), found))
        if not taken:
            return
        try:
            scores = iter(self._score(rows))
        except BaseException as error:  # goes to those who wait, in their own threads
            for _, found in taken:
                found.set_exception(error)
            return
        for count, found in taken:
            found.set_result([next(scores) for _ in range(count)])


class Problem(BaseModel):
    """Why there are no scores."""

    detail: str


REFUSALS: dict[int | str, dict[str, Any]] = {
    422: {"model": Problem, "description": "Rows that the reward model cannot read"},
    503: {"model": Problem, "description": "Memory ran out"},
}


class Health(BaseModel):
    """That the server answers."""

    status: str = "ready"


def application(served: ServedReward) -> FastAPI:
    """Return what answers the requests."""
    identity = served.identity()
    batches = Batches(served.scores, served.pieces.size)
    app = FastAPI(
        title="rlhf_kit reward server",
        version=artifacts.__version__,
        description=f"The reward model {identity.stage} of {identity.run}.",
        docs_url=None,  # these pages fetch scripts from elsewhere
        redoc_url=None,
    )

    @app.get("/health")
    def health() -> Health:
        """Tell that the reward model is loaded."""
        return Health()

    @app.get(IDENTITY)
    def told() -> Identity:
        """Tell which reward model this is, and how it reads."""
        return identity

    @app.post(SCORE_TOKENS, responses=REFUSALS)
    def score_tokens(asked: TokenRows) -> Scores:
        """Score rows of tokens, as a PPO stage does."""
        served.refuse(asked.rows)
        return Scores(scores=batches.scores(asked.rows), manifest=identity.manifest)

    @app.post(SCORE_TEXTS, responses=REFUSALS)
    def score_texts(asked: TextRows) -> Scores:
        """Score texts, as `rlhf-kit score` does."""
        return score_tokens(TokenRows(rows=served.tokenised(asked)))

    @app.exception_handler(RequestValidationError)
    def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        found = [f"{'.'.join(map(str, one['loc'][1:])) or 'body'}: {one['msg']}" for one in error.errors()[:5]]
        return JSONResponse({"detail": "; ".join(found)}, 422)

    @app.exception_handler(InputError)
    def refused(request: Request, error: InputError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    @app.exception_handler(OutOfRoom)
    def full(request: Request, error: OutOfRoom) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 503)

    return app


def bound(host: str, port: int) -> socket.socket:
    """Return a socket at an address that nobody else has; it does not listen yet.

    Raises: InputError when it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # also right after another server there has ended
        found.bind(address)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"--host {host} --port {port}: cannot be served on ({error}); name another port, 0 for any that is free."
        ) from error
    return found


def serve(app: FastAPI, listening: socket.socket) -> None:
    """Answer requests until SIGINT or SIGTERM; those that are being answered get their answers."""
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off")
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:  # uvicorn ends on these signals, and then raises them anew for whoever had them before
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
