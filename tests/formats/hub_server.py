"""A stand-in for the Hugging Face hub on this machine: answers what huggingface_hub asks, and fails on demand.

    with serve(folder, repo="openbmb/MiniCPM-2B-history") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        server.break_after("pytorch_model.10000", 1000, times=2)
        ...
        assert server.requests[-1].range == "bytes=1000-"

The files of `folder` are the commit that `main` means, `server.commit`; they are read when they are asked for. As on
the hub, all but small text (.json, .md, .py, .txt) is stored with LFS: listed with its sha256, and redirected to
another host.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_TEXT = {".json", ".md", ".py", ".txt"}
_PIECE = 2**16


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # without the query
    range: str | None
    authorization: str | None


class HubServer:
    """What the server serves, what it was asked, and how it is to fail until `behave` is called."""

    def __init__(self, folder: Path, repo: str, port: int) -> None:
        self.repo = repo
        self.port = port
        self.endpoint = f"http://127.0.0.1:{port}"
        self.requests: list[Request] = []
        self.ranges = True  # False: the whole file, whatever part is asked for
        self.listing: Any = None  # answered in the place of the model info
        self._folders: dict[str, Path] = {}
        self._breaks: dict[str, list[int]] = {}
        self._refusals: dict[str | None, tuple[int, str | None]] = {}
        self._lengths: dict[str, int] = {}
        self._corrupt: set[str] = set()
        self._rates: dict[str, float] = {}
        self.push(folder)

    def push(self, folder: Path) -> None:
        """A new commit of other files; `main` means it from now on, the commits before stay."""
        self.commit = hashlib.sha1(f"{len(self._folders)} {folder}".encode()).hexdigest()
        self._folders[self.commit] = folder

    def downloads(self, name: str) -> list[Request]:
        """The requests for the bytes of a file, without those that were redirected."""
        place = "/cdn/" if _is_lfs(name) else f"/{self.repo}/resolve/"
        return [
            r for r in self.requests if r.method == "GET" and r.path.startswith(place) and r.path.endswith(f"/{name}")
        ]

    def break_after(self, name: str, size: int, times: int = 1) -> None:
        """Drops the connection after `size` bytes of each of the next `times` answers."""
        self._breaks[name] = [size] * times

    def truncate(self, name: str, size: int) -> None:
        """Serves the first `size` bytes as if they were all; the listing says otherwise."""
        self._lengths[name] = size

    def corrupt(self, name: str) -> None:
        """Serves the file with its last byte changed."""
        self._corrupt.add(name)

    def refuse(self, status: int, code: str | None = None, name: str | None = None) -> None:
        """Answers all that asks for a file, or for the repository, with an error and the hub's X-Error-Code for it."""
        self._refusals[name] = status, code

    def slow(self, name: str, rate: float) -> None:
        """Serves `rate` bytes a second."""
        self._rates[name] = rate

    def behave(self) -> None:
        """Forgets all failures."""
        self.ranges, self.listing = True, None
        for failures in (self._breaks, self._refusals, self._lengths, self._corrupt, self._rates):
            failures.clear()

    def files(self, commit: str) -> dict[str, Path]:
        folder = self._folders[commit]
        return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}

    def find(self, revision: str) -> str | None:
        """The commit a revision means."""
        commit = self.commit if revision == "main" else revision
        return commit if commit in self._folders else None

    def info(self, commit: str) -> Any:
        siblings = []
        for name, path in self.files(commit).items():
            entry = {"rfilename": name, "size": path.stat().st_size, "blobId": _git_hash(path)}
            if _is_lfs(name):
                entry["lfs"] = {"sha256": _sha256(path), "size": path.stat().st_size, "pointerSize": 135}
            siblings.append(entry)
        return {
            "id": self.repo,
            "modelId": self.repo,
            "sha": commit,
            "private": False,
            "tags": [],
            "siblings": siblings,
        }

    def tree(self, commit: str) -> Any:
        entries = []
        for name, path in self.files(commit).items():
            entry = {"type": "file", "path": name, "size": path.stat().st_size, "oid": _git_hash(path)}
            if _is_lfs(name):
                entry["lfs"] = {"oid": _sha256(path), "size": path.stat().st_size, "pointerSize": 135}
            entries.append(entry)
        return entries


@contextlib.contextmanager
def serve(folder: Path, repo: str) -> Iterator[HubServer]:
    """Serves until the block ends."""

    class Handler(_Handler):
        pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    Handler.hub = HubServer(folder, repo, http.server_port)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield Handler.hub
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    timeout = 5

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client may hang up, or be killed
            super().handle()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(
            Request(self.command, path, self.headers.get("Range"), self.headers.get("Authorization"))
        )
        model, resolve = f"/api/models/{self.hub.repo}", f"/{self.hub.repo}/resolve/"
        if path == model:
            self._describe("main", "info")
        elif path.startswith(f"{model}/revision/"):
            self._describe(path.removeprefix(f"{model}/revision/"), "info")
        elif path.startswith(f"{model}/tree/"):
            self._describe(path.removeprefix(f"{model}/tree/"), "tree")
        elif path.startswith(resolve):
            self._resolve(*path.removeprefix(resolve).split("/", 1))
        elif path.startswith("/cdn/"):
            commit, name = path.removeprefix("/cdn/").split("/", 1)
            self._send_file(name, self.hub.files(commit)[name], {})
        else:
            self._refuse(404, "RepoNotFound")

    def _describe(self, revision: str, what: str) -> None:
        commit = self.hub.find(revision)
        if None in self.hub._refusals:
            self._refuse(*self.hub._refusals[None])
        elif commit is None:
            self._refuse(404, "RevisionNotFound")
        else:
            answer = getattr(self.hub, what)(commit) if self.hub.listing is None else self.hub.listing
            body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self._start(200, {"Content-Type": "application/json"}, len(body))
            self.wfile.write(body)

    def _resolve(self, revision: str, name: str) -> None:
        commit = self.hub.find(revision)
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        path = self.hub.files(commit).get(name)
        if name in self.hub._refusals:
            return self._refuse(*self.hub._refusals[name])
        if path is None:
            return self._refuse(404, "EntryNotFound")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_git_hash(path)}"'}
        if not _is_lfs(name):
            return self._send_file(name, path, headers)
        headers |= {"X-Linked-Size": str(path.stat().st_size), "X-Linked-Etag": f'"{_sha256(path)}"'}
        location = f"http://localhost:{self.hub.port}/cdn/{commit}/{name}"
        self._start(302, headers | {"Location": location}, 0)

    def _send_file(self, name: str, path: Path, headers: dict[str, str]) -> None:
        data = path.read_bytes()[: self.hub._lengths.get(name)]
        if name in self.hub._corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) if self.hub.ranges else None
        start = int(asked[1]) if asked else 0
        headers = headers | {"Accept-Ranges": "bytes"}
        if asked and start >= len(data):
            return self._start(416, headers | {"Content-Range": f"bytes */{len(data)}"}, 0)
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._start(206 if asked else 200, headers, len(data) - start)
        if self.command == "GET":
            self._send_body(name, data[start:])

    def _send_body(self, name: str, body: bytes) -> None:
        breaks = self.hub._breaks.get(name)
        if breaks:
            body = body[: breaks.pop()]
            self.close_connection = True
        rate = self.hub._rates.get(name)
        size = max(1, int(rate / 50)) if rate else _PIECE
        for start in range(0, len(body), size):
            self.wfile.write(body[start : start + size])
            if rate:
                time.sleep(size / rate)

    def _refuse(self, status: int, code: str | None) -> None:
        self._start(status, {"X-Error-Code": code} if code else {}, 0)

    def _start(self, status: int, headers: dict[str, str], length: int) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()


def _is_lfs(name: str) -> bool:
    return Path(name).suffix not in _TEXT


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _git_hash(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
