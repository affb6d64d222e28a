"""A model hub on this machine: the few endpoints that `huggingface_hub` asks, over real HTTP."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE_SUFFIX = ".safetensors"
"""Files of this kind are kept outside the repository, named by their SHA-256, as the real hub does with large ones."""


@dataclass
class Repository:
    """One model of the hub, at one commit."""

    files: dict[str, bytes]
    is_gated: bool = False
    token: str | None = None
    """Who does not send it learns nothing of a private repository."""
    corrupt: set[str] = field(default_factory=set)
    """Names of files that are sent with their last byte changed."""
    stuck: set[str] = field(default_factory=set)
    """Names of files of which half is sent, and then nothing for as long as the hub lives."""

    @property
    def commit(self) -> str:
        """Named by its content."""
        names = sorted((name, hashlib.sha256(data).hexdigest()) for name, data in self.files.items())
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:40]

    def sent(self, name: str) -> bytes:
        """What a client receives of a file."""
        data = self.files[name]
        return data[:-1] + bytes([data[-1] ^ 1]) if name in self.corrupt else data


@dataclass
class Hub:
    """The hub: its repositories, where it listens, and what it was asked for."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    url: str = ""
    asked: list[str] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)

    def add(self, name: str, folder: Path, **changes: Any) -> Repository:
        """A repository with the files of a folder."""
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        self.repositories[name] = Repository(files, **changes)
        return self.repositories[name]

    def downloaded(self) -> list[str]:
        """The names of the files whose content was sent."""
        return [line.rsplit("/", 1)[1] for line in self.asked if line.startswith("GET") and "/resolve/" in line]


@contextmanager
def serving_hub() -> Iterator[Hub]:
    """A hub that answers until the end."""
    hub = Hub()

    class Handler(Answers):
        """The answers of this hub."""

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class Answers(BaseHTTPRequestHandler):
    """One connection."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        """Headers only."""
        self._answer()

    def do_GET(self) -> None:
        """Headers and content."""
        self._answer()

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        is_api = path.startswith("/api/models/")
        for name, repository in self.hub.repositories.items():
            prefix = f"/api/models/{name}/" if is_api else f"/{name}/resolve/"
            if path.startswith(prefix):
                self._answer_for(repository, name, path.removeprefix(prefix).split("/"), is_api=is_api)
                return
        self._refuse(401, "RepoNotFound")

    def _answer_for(self, repository: Repository, name: str, parts: list[str], *, is_api: bool) -> None:
        if repository.token is not None and self.headers.get("Authorization") != f"Bearer {repository.token}":
            self._refuse(401, "RepoNotFound")
        elif (parts[1] if is_api else parts[0]) not in ("main", repository.commit):
            self._refuse(404, "RevisionNotFound")
        elif is_api and parts[0] == "revision":
            siblings = [{"rfilename": path, "size": len(data)} for path, data in sorted(repository.files.items())]
            self._send(json.dumps({"id": name, "sha": repository.commit, "siblings": siblings}).encode())
        elif is_api:
            self._send(json.dumps([_entry(path, data) for path, data in sorted(repository.files.items())]).encode())
        elif repository.is_gated:
            self._refuse(403, "GatedRepo")
        elif parts[1] not in repository.files:
            self._refuse(404, "EntryNotFound")
        else:
            etag = _etag(parts[1], repository.files[parts[1]])
            headers = {"X-Repo-Commit": repository.commit, "ETag": f'"{etag}"'}
            self._send(repository.sent(parts[1]), headers, is_stuck=parts[1] in repository.stuck)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, body: bytes, headers: dict[str, str] | None = None, *, is_stuck: bool = False) -> None:
        self.send_response(200)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "GET":
            return
        self.wfile.write(body[: len(body) // 2])
        if is_stuck:
            self.hub.closing.wait()
            self.close_connection = True
            return
        self.wfile.write(body[len(body) // 2 :])


def _etag(name: str, data: bytes) -> str:
    if name.endswith(LARGE_SUFFIX):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": _etag(name, data)[:40]}
    if name.endswith(LARGE_SUFFIX):
        entry["lfs"] = {"oid": _etag(name, data), "size": len(data), "pointerSize": 130}
    return entry
