"""A Hugging Face hub of one process: repositories in memory, behind the HTTP calls that huggingface_hub makes.

Without LFS and xet: every file is said to be "regular" and arrives inside the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stub"


class Hub(ThreadingHTTPServer):
    """`repos`: repository id -> file name -> content. `asked`: requests so far. `silent`: paths never answered.

    `past`: revision -> files of whatever repository, for all but the newest commit.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.past: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.silent: str | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, repo: str) -> str:
        return _digest(self.repos[repo])

    def at(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """The files of a branch, a tag or a commit."""
        known = {"main": self.repos[repo], self.commit(repo): self.repos[repo], **self.past}
        return (known | {_digest(files): files for files in self.past.values()}).get(revision)


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(*self._get())

    def do_GET(self) -> None:
        self._answer(*self._get())

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        self._answer(*self._post(body))

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        if self.server.silent and self.server.silent in path:
            time.sleep(60)
        return path

    def _get(self) -> tuple[int, bytes, dict[str, str]]:
        path = self._path()
        if path == "/":
            return 200, b"", {}
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if found is None:
            return 404, b"{}", {"X-Error-Code": "EntryNotFound"}
        repo, revision, name = found.groups()
        if repo not in self.server.repos:
            return 404, b"{}", {"X-Error-Code": "RepoNotFound"}
        files = self.server.at(repo, revision)
        if files is None:
            return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
        if name not in files:
            return 404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": _digest(files)}
        etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
        return 200, files[name], {"ETag": etag, "X-Repo-Commit": _digest(files)}

    def _post(self, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        path = self._path()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, b'{"error": "Invalid token"}', {}
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            self.server.repos.setdefault(repo, {})
            return _json({"url": f"{self.server.endpoint}/{repo}", "name": repo})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/[^/]+", path)
        assert found is not None, path
        repo, what = found.groups()
        if what == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return _json({"files": modes})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                value = line["value"]
                self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
        commit = self.server.commit(repo)
        return _json({"commitUrl": f"{self.server.endpoint}/{repo}/commit/{commit}", "commitOid": commit})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _digest(files: dict[str, bytes]) -> str:
    return hashlib.sha1(b"".join(sorted(files.values()))).hexdigest()


def _json(value: object) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}
