"""The client of a reward server, against servers that answer as ordered; and how a server puts requests together."""

from __future__ import annotations

import json
import math
import threading
from http.server import BaseHTTPRequestHandler
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_kit import remote_reward
from rlhf_kit.collate import load_text_format
from rlhf_kit.errors import InputError, NotScored
from rlhf_kit.recipe import Base
from rlhf_kit.remote_reward import Identity, RewardServer, TokenRow, Unit, identity
from rlhf_kit.scorers import ServerScorer, Written, reads
from rlhf_kit.serving import Batches
from tests import tiny
from tests.hub import Loopback

ROWS = [{"ids": [1, 2]}, {"ids": [3]}]
ITS = Identity(
    rlhf_kit="0",
    run="other",
    stage="reward",
    manifest="a" * 64,
    base={"sha256": "b"},
    tokenizer={},
    context=None,
    score_normalisation=Unit(mean=1.0, std=2.0),
)


class Server(Loopback):
    """Answers with what stands in `answers` by path, in order; the last one of each stays."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.answers: dict[str, list[tuple[int, Any]]] = {"/identity": [(200, ITS.model_dump())]}
        self.asked: list[tuple[str, Any]] = []
        self.over = threading.Event()

    def scores(self, *answers: Any) -> RewardServer:
        """Order answers to what asks for scores: a status and its content, or an event to wait for; return a client."""
        self.answers["/score/tokens"] = self.answers["/score/texts"] = list(answers)
        return RewardServer(self.url)


class _Handler(BaseHTTPRequestHandler):
    hub: Server

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked.append((self.path, json.loads(body) if body else None))
        answers = self.hub.answers[self.path]
        status, content = answers.pop(0) if len(answers) > 1 else answers[0]
        if status == 0:  # never, or by breaking the connection
            if content:
                content.wait()
            self.connection.close()
            return
        told = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Location", "/score/texts")
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    do_POST = do_GET


@pytest.fixture
def server(monkeypatch):
    """A server; what the client asks again, it asks at once."""
    monkeypatch.setattr(remote_reward, "WAITS_S", (0.0, 0.0))
    with Server() as found:
        yield found
        found.over.set()
    identity.cache_clear()


def scores(*numbers: Any, manifest: str = ITS.manifest) -> tuple[int, Any]:
    return 200, {"scores": list(numbers), "manifest": manifest}


def test_scores_come_back_as_they_were(server):
    """To the last bit of a float32; one that is not finite as nan, however the server writes it."""
    exact = torch.tensor([1 / 3, 1e-30, -16777217.0]).tolist()
    assert server.scores(scores(*exact)).scores("/score/tokens", [*ROWS, {"ids": [1]}]) == exact
    for content in (scores(None, 2), (200, f'{{"scores": [NaN, 2], "manifest": "{ITS.manifest}"}}')):
        first, second = server.scores(content).scores("/score/tokens", ROWS)
        assert math.isnan(first) and second == 2.0


@pytest.mark.parametrize("trouble", [(500, {"detail": "x"}), (503, "no JSON"), (0, None)])
def test_trouble_that_passes_is_waited_for(server, trouble, capsys):
    """The same request is made again, and that is said."""
    assert server.scores(trouble, trouble, scores(1, 2)).scores("/score/tokens", ROWS) == [1.0, 2.0]
    assert server.asked[1:] == [("/score/tokens", {"rows": ROWS})] * 3
    assert capsys.readouterr().err.count("asking again in 0 s") == 2


@pytest.mark.parametrize(
    ("answer", "told", "asked"),
    [
        ((500, {"detail": "out of order"}), "asked 3 times (HTTP 500, out of order)", 3),
        ((0, None), "asked 3 times (", 3),
        (scores(1), "gave 1 scores for 2 completions", 1),
        ((200, "hello"), "answers hello, which are no scores", 1),
        ((200, {"scores": ["good", "bad"], "manifest": "a"}), "which are no scores", 1),
        (scores(1, 2, manifest="c" * 64), "has another reward model than when this run began", 1),
    ],
)
def test_a_server_that_gives_no_scores_ends_the_run(server, answer, told, asked):
    """One message with the address and what to do; what was done is kept, so it is no wrong input."""
    client = server.scores(answer)
    with pytest.raises(NotScored, match=r"run the same command|run it now") as caught:
        client.scores("/score/tokens", ROWS)
    assert told in str(caught.value) and server.url in str(caught.value)
    assert len(server.asked) == 1 + asked


def test_a_server_that_is_silent_is_not_waited_for_forever(server, monkeypatch):
    """Each request has a time limit."""
    monkeypatch.setattr(remote_reward, "ANSWER_S", 0.05)
    client = server.scores((0, server.over))
    with pytest.raises(NotScored, match="ReadTimeout"):
        client.scores("/score/tokens", ROWS)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((422, {"detail": "rows.0: has 300 tokens"}), "refuses to score: HTTP 422, rows.0: has 300 tokens"),
        ((404, "<html>"), "HTTP 404, Not Found"),
        ((307, ""), "HTTP 307, Temporary Redirect"),
    ],
)
def test_what_the_server_refuses_is_wrong_input(server, answer, told):
    """It is not asked again, and a redirect is not followed."""
    client = server.scores(answer)
    with pytest.raises(InputError, match=told):
        client.scores("/score/tokens", ROWS)
    assert len(server.asked) == 2


def test_who_is_no_reward_server_is_told(server, monkeypatch):
    """Nothing there, another server, another answer: each one message."""
    server.answers["/identity"] = [(404, {"detail": "Not Found"}), (200, {"hello": 1}), (200, "<html>")]
    for told in ("gives HTTP 404, Not Found", "gives {.*hello", "gives <html>"):
        with pytest.raises(InputError, match=f"{server.url}: is no reward server.*{told}"):
            identity(server.url)
    server.server.server_close()
    with pytest.raises(InputError, match=r"no reward server answers .ConnectError.*rlhf-kit serve-reward"):
        identity("http://127.0.0.1:1")
    with pytest.raises(InputError, match="no reward server answers"):
        identity("http://a b:1")


def test_the_address_alone_decides_where_a_request_goes(server, monkeypatch):
    """A proxy that the environment names is not asked."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert server.scores(scores(1, 2)).scores("/score/tokens", ROWS) == [1.0, 2.0]


@pytest.mark.parametrize("same", [True, False])
def test_a_server_with_this_runs_tokenizer_and_base_gets_tokens(server, tmp_path, same):
    """Laid out as they were sampled; any other server gets texts."""
    base = Base(model=str(tiny.make_checkpoint(tmp_path)))
    text_format = load_text_format(base)
    its = ITS.model_copy(update=reads(base, text_format) | ({} if same else {"base": {"sha256": "another"}}))
    server.answers["/identity"] = [(200, its.model_dump())]
    server.scores(scores(1, None))
    shared: Any = SimpleNamespace(base=base, device=torch.device("cpu"))
    scorer = ServerScorer(server.url, shared, text_format)
    ids = torch.tensor([[0, 5, 6, 7], [4, 5, 8, 0]])
    prompts = ["a", [{"role": "user", "content": "b"}]]
    found = scorer(Written(prompts, ["x", "y"], ids, ids > 0))
    assert found.tolist()[0] == 1.0 and bool(found[1].isnan())
    assert scorer.unit == (1.0, 2.0)
    tokens = [{"ids": [5, 6, 7], "left_padding": 1}, {"ids": [4, 5, 8], "left_padding": 0}]
    texts = [{"prompt": "a", "completion": "x"}, {"prompt": prompts[1], "completion": "y"}]
    path, rows = ("/score/tokens", tokens) if same else ("/score/texts", texts)
    assert server.asked[-1] == (path, {"rows": rows})


# ---------------------------------------------------------------- the server's side


def row(number: int) -> TokenRow:
    return TokenRow(ids=[number])


def test_requests_that_wait_are_scored_together():
    """In order, whole requests of at most so many rows together; each gets its own scores, or the error."""
    batches: list[list[int]] = []
    started, go_on = threading.Event(), threading.Event()

    def score(rows):
        batches.append([one.ids[0] for one in rows])
        started.set()
        go_on.wait()
        if 9 in batches[-1]:
            raise ValueError("nine")
        return [float(number) for number in batches[-1]]

    together = Batches(score, most=4)
    found: dict[int, Any] = {}

    def ask(*numbers):
        try:
            found[numbers[0]] = together.scores([row(number) for number in numbers])
        except ValueError as error:
            found[numbers[0]] = str(error)

    threads = []
    for number, asked in enumerate([(1,), (2, 3), (4, 5), (6,), (7, 8, 0, 0, 0), (9,)]):
        threads.append(threading.Thread(target=ask, args=asked))
        threads[-1].start()
        if number == 0:
            started.wait()
        else:
            while len(together._waiting) < number:  # so that they come in this order
                pass
    go_on.set()
    for thread in threads:
        thread.join()
    assert batches == [[1], [2, 3, 4, 5], [6], [7, 8, 0, 0, 0], [9]]
    assert found == {1: [1.0], 2: [2.0, 3.0], 4: [4.0, 5.0], 6: [6.0], 7: [7.0, 8.0, 0.0, 0.0, 0.0], 9: "nine"}
