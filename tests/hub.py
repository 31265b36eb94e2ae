"""A small Hub on loopback, for the real huggingface_hub client: repositories in memory, tokens, and faults on order.

    with Hub() as hub:
        subprocess.run(..., env={**os.environ, **hub.environment(cache)})

It answers what a push and a download ask: repositories, branches, upload modes, commits with a parent, LFS files by
their hash, the tree and the files of a revision. Large files go the plain LFS way (`HF_HUB_DISABLE_XET=1`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "t" * 34


@dataclass
class Repository:
    """Commits, oldest first, each a mapping from names to contents; branches name one."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    proposals: dict[int, str] = field(default_factory=dict)
    """Titles of the open pull requests; number n is the branch refs/pr/n."""

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Put files on top of a branch; return the commit."""
        parent = self.branches.get(branch)
        oid = hashlib.sha1(f"{parent}{len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = {**self.commits.get(parent or "", {}), **files}
        self.branches[branch] = oid
        return oid

    def at(self, revision: str) -> str | None:
        """The commit that a branch or a commit's name stands for."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD /path" matches: they wait, and are then refused."""

    pattern: str
    status: int | None = None
    """None resets the connection, unless they are only to wait."""
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1
    after: bool = False
    """The request is served first, and only its answer is lost."""
    wait_s: float = 0.0


class Loopback:
    """A server on 127.0.0.1 that answers as `handler` does, while the block runs; `handler.hub` is this object."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables for a process that is to use this Hub, with its own cache."""
        found = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return found if token is None else {**found, "HF_TOKEN": token}


class Hub(Loopback):
    """Models' repositories, to push to and to load from."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.before: Callable[[str], None] = lambda request: None
        """Called with each "METHOD /path" before it is served."""

    def add(self, name: str, files: dict[str, bytes], *, private: bool = False) -> Repository:
        """Make a repository with one commit."""
        repository = self.repositories[name] = Repository(private)
        repository.commit(files)
        return repository

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision of a repository holds."""
        repository = self.repositories[name]
        return repository.commits[repository.at(revision) or ""]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        url = urlsplit(self.path)
        request = f"{self.command} {unquote(url.path)}"
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.before(request)
        self.hub.requests.append(request)
        fault = next((one for one in self.hub.faults if one.times and re.search(one.pattern, request)), None)
        if fault is not None:
            fault.times -= 1
            time.sleep(fault.wait_s)  # the fault itself: a server that takes so long
            if fault.after:
                self._respond(request, parse_qs(url.query), body)
            if fault.status is None and not fault.wait_s:
                self.close_connection = True
                self.connection.close()
                return
            if fault.status is not None:
                self._send(fault.status, {"error": "as ordered"}, fault.headers)
                return
        status, answer, headers = self._respond(request, parse_qs(url.query), body)
        self._send(status, answer, headers)

    def _send(self, status: int, answer: Any, headers: dict[str, str]) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _respond(self, request: str, query: dict[str, list[str]], body: bytes) -> tuple[int, Any, dict[str, str]]:
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if given and given != TOKEN:
            return 401, {"error": "Invalid credentials"}, {}
        for pattern, answer in ROUTES:
            if match := re.fullmatch(pattern, request):
                if request.startswith("POST ") and not given and "validate-yaml" not in request:
                    return 401, {"error": "Unauthorized"}, {"X-Error-Message": "Invalid username or password."}
                return answer(self.hub, match, query, body, bool(given))
        return 404, {"error": f"no route {request}"}, {}


Answer = tuple[int, Any, dict[str, str]]
NOT_FOUND: Answer = (404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})


def _create(hub: Hub, match: Any, query: Any, body: bytes, known: bool) -> Answer:
    wanted = json.loads(body)
    name = f"{wanted['organization']}/{wanted['name']}"
    if wanted["organization"] != "me":
        return 403, {"error": "You don't have the rights to create a model there"}, {}
    if name in hub.repositories:
        return 409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"}, {}
    hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=wanted.get("visibility") == "private")
    return 200, {"url": f"{hub.url}/{name}", "name": name}, {}


def _branch(hub: Hub, match: Any, query: Any, body: bytes, known: bool) -> Answer:
    repository = hub.repositories[match[1]]
    if match[2] in repository.branches:
        return 409, {"error": "Reference already exists"}, {}
    repository.branches[match[2]] = repository.branches["main"]
    return 200, {}, {}


def _info(hub: Hub, match: Any, query: Any, body: bytes, known: bool) -> Answer:
    repository = hub.repositories.get(match[1])
    if repository is None or (repository.private and not known):
        return NOT_FOUND
    oid = repository.at(match[2] or "main")
    if oid is None:
        return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
    siblings = [{"rfilename": name} for name in repository.commits[oid]]
    return 200, {"id": match[1], "sha": oid, "private": repository.private, "siblings": siblings, "tags": []}, {}


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tree(hub: Hub, match: Any, query: Any, body: bytes, known: bool) -> Answer:
    repository = hub.repositories.get(match[1])
    oid = repository.at(match[2]) if repository else None
    if repository is None or oid is None:
        return NOT_FOUND
    return 200, [
        {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}
        for name, content in repository.commits[oid].items()
    ], {}  # fmt: skip


def _preupload(hub: Hub, match: Any, query: Any, body: bytes, known: bool) -> Answer:
    repository = hub.repositories[match[1]]
    there = repository.commits[repository.at(match[2]) or ""]
    files = []
    for file in json.loads(body)["files"]:
        name, content = file["path"], there.get(file["path"])
        large = name.endswith(".safetensors")
        oid = None if content is None else hashlib.sha256(content).hexdigest() if large else _oid(content)
        mode = "lfs" if large else "regular"
        files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return 200, {"files": files}, {}


def _batch(hub: Hub, match: Any, query: Any, body: bytes, known: bool) -> Answer:
    objects = []
    for one in json.loads(body)["objects"]:
        actions = {
            "upload": {"href": f"{hub.url}/objects/{one['oid']}"},
            "verify": {"href": f"{hub.url}/verify", "header": {"Authorization": f"Bearer {TOKEN}"}},
        }
        objects.append(one if one["oid"] in hub.objects else {**one, "actions": actions})
    return 200, {"transfer": "basic", "objects": objects}, {}


def _put(hub: Hub, match: Any, query: Any, body: bytes, known: bool) -> Answer:
    if hashlib.sha256(body).hexdigest() != match[1]:
        return 400, {"error": "not what its hash says"}, {}
    hub.objects[match[1]] = body
    return 200, {}, {}


def _verify(hub: Hub, match: Any, query: Any, body: bytes, known: bool) -> Answer:
    return (200 if json.loads(body)["oid"] in hub.objects else 404), {}, {}


def _commit(hub: Hub, match: Any, query: Any, body: bytes, known: bool) -> Answer:
    repository, branch = hub.repositories[match[1]], match[2]
    files: dict[str, bytes] = {}
    title = ""
    for line in map(json.loads, body.splitlines()):
        value = line["value"]
        if line["key"] == "header" and value.get("parentCommit") not in (None, repository.branches[branch]):
            return 412, {"error": "A commit has happened since. Please refresh and try again."}, {}
        title = value["summary"] if line["key"] == "header" else title
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = hub.objects[value["oid"]]
    proposed = query.get("create_pr") == ["1"]
    if proposed:
        branch = f"refs/pr/{len(repository.branches)}"
        repository.branches[branch] = repository.branches["main"]
        repository.proposals[int(branch.rpartition("/")[2])] = title
    oid = repository.commit(files, branch)
    answer = {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{match[1]}/commit/{oid}"}
    if proposed:
        answer["pullRequestUrl"] = f"{hub.url}/{match[1]}/discussions/{branch.rpartition('/')[2]}"
    return 200, answer, {}


def _discussions(hub: Hub, match: Any, query: Any, body: bytes, known: bool) -> Answer:
    repository = hub.repositories.get(match[1])
    if repository is None:
        return NOT_FOUND
    same = {"author": {"name": "me"}, "createdAt": "2026-01-01T00:00:00.000Z", "status": "open", "isPullRequest": True}
    where = {"repo": {"name": match[1], "type": "model"}}
    found = [{"num": number, "title": title, **same, **where} for number, title in repository.proposals.items()]
    return 200, {"count": len(found), "start": 0, "discussions": found}, {}


def _resolve(hub: Hub, match: Any, query: Any, body: bytes, known: bool) -> Answer:
    repository = hub.repositories.get(match[1])
    if repository is None or (repository.private and not known):
        return NOT_FOUND
    oid = repository.at(match[2])
    content = repository.commits[oid].get(match[3]) if oid else None
    if content is None:
        return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid or ""}
    return 200, content, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": oid or ""}


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, Callable[..., Answer]]] = [
    ("POST /api/repos/create", _create),
    ("POST /api/validate-yaml", lambda *_: (200, {"errors": [], "warnings": []}, {})),
    ("GET /api/whoami-v2", lambda *_: (200, {"name": "me", "type": "user"}, {})),
    (rf"POST /api/models/{NAME}/branch/(.+)", _branch),
    (rf"GET /api/models/{NAME}/discussions", _discussions),
    (rf"POST /api/models/{NAME}/preupload/(.+)", _preupload),
    (rf"POST /api/models/{NAME}/commit/(.+)", _commit),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", _batch),
    (r"PUT /objects/(\w+)", _put),
    ("POST /verify", _verify),
    (rf"GET /api/models/{NAME}/tree/([^/]+)", _tree),
    (rf"GET /api/models/{NAME}(?:/revision/(.+))?", _info),
    (rf"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)", _resolve),
]
