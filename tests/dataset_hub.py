"""A small Hub on loopback that datasets are read from, for the real clients: `datasets` and huggingface_hub.

with DatasetHub({"owner/name": {"v1": {"train.jsonl": b"..."}}}) as hub:
    subprocess.run(..., env={**os.environ, **hub.environment(cache)})

A repository has revisions, by the name of a tag; each is a mapping from paths to contents. Commits are hashes of these.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub import Loopback

Files = Mapping[str, bytes]
Answer = tuple[int, Any, dict[str, str]]


class DatasetHub(Loopback):
    """Datasets' repositories, to read from."""

    def __init__(self, repositories: Mapping[str, Mapping[str, Files]]):
        super().__init__(_Handler)
        self.repositories = repositories
        self.requests: list[str] = []
        """ "METHOD /path" of each request, and how many bytes answered a ranged one."""

    def answer(self, command: str, path: str, query: Mapping[str, list[str]], body: bytes) -> Answer:
        """Return status, content and headers."""
        match = re.fullmatch(r"/(?:api/)?datasets/([\w.-]+/[\w.-]+)(?:/([\w-]+)/([^/]+)(?:/(.*))?)?", path)
        if match is None or match[1] not in self.repositories:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        name, what, revision, inside = match.groups()
        found = commits(self.repositories[name])
        commit = revision or "main"
        oid = next((oid for oid in found if commit in (oid, *(tag for tag in found[oid][0]))), None)
        if oid is None:
            return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
        files = found[oid][1]
        if what == "resolve":
            if inside not in files:
                return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid}
            return 200, files[inside], {"ETag": f'"{blob(files[inside])}"', "X-Repo-Commit": oid}
        if what == "tree":
            below = [entry for entry in entries(files) if not inside or entry["path"].startswith(f"{inside}/")]
            if not below:
                return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
            depth = inside.count("/") + 1 if inside else 0
            if query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
                below = [entry for entry in below if entry["path"].count("/") == depth]
            return 200, below, {}
        if what == "paths-info":
            wanted = (json.loads(body) if body.startswith(b"{") else parse_qs(body.decode()))["paths"]
            return 200, [entry for entry in entries(files) if entry["path"] in wanted], {}
        siblings = [{"rfilename": path} for path in files]
        return 200, {"id": name, "sha": oid, "private": False, "siblings": siblings, "tags": []}, {}


def commits(revisions: Mapping[str, Files]) -> dict[str, tuple[list[str], Files]]:
    """Return commit -> the names of its tags, and its files."""
    found: dict[str, tuple[list[str], Files]] = {}
    for tag, files in revisions.items():
        oid = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        found.setdefault(oid, ([], files))[0].append(tag)
    return found


def blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entries(files: Files) -> list[dict[str, Any]]:
    """Return what the Hub says of files and of the folders they are in."""
    folders = {str(folder) for path in files for folder in Path(path).parents if str(folder) != "."}
    listed = [{"type": "directory", "path": folder, "size": 0, "oid": blob(folder.encode())} for folder in folders]
    return [
        *listed,
        *(
            {"type": "file", "path": path, "size": len(content), "oid": blob(content)}
            for path, content in files.items()
        ),
    ]


class _Handler(BaseHTTPRequestHandler):
    hub: DatasetHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, answer, headers = self.hub.answer(self.command, unquote(url.path), parse_qs(url.query), body)
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if status == 200 and ranged:
            total, start = len(content), int(ranged[1])
            content = content[start : int(ranged[2]) + 1 if ranged[2] else None]
            headers = {**headers, "Content-Range": f"bytes {start}-{start + len(content) - 1}/{total}"}
            status = 206
        self.hub.requests.append(f"{self.command} {unquote(url.path)} {status} {len(content)}")
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "Accept-Ranges": "bytes", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_POST = do_GET
