"""A stand-in for the Hugging Face Hub on the loopback: repositories of files at commits, and a log of what was asked.

It speaks the part of the protocol that `snapshot_download` uses: repository info, the tree of a commit, and files by
HEAD and GET.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """Serves `commits[repository][commit]`, folders, and `branches[repository][name]`, commits."""

    url: str = ""
    commits: dict[str, dict[str, Path]] = field(default_factory=dict)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)  # paths of files that were read with GET, in their repository

    def push(self, repository: str, folder: Path, branch: str = "main") -> str:
        """A new commit, named after its content, that `branch` is at from now on."""
        digest = hashlib.sha1()
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
        commit = digest.hexdigest()
        self.commits.setdefault(repository, {})[commit] = folder
        self.branches.setdefault(repository, {})[branch] = commit
        return commit


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            api = parts[:2] == ["api", "models"]
            owner, name, *rest = parts[2:] if api else parts
            repository = f"{owner}/{name}"
            if repository not in hub.commits:
                return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
            what, revision, *path = rest or ["revision", "main"]
            commit = hub.branches[repository].get(revision, revision)
            folder = hub.commits[repository].get(commit)
            if folder is None:
                return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
            if api and what == "revision":
                siblings = [{"rfilename": p.relative_to(folder).as_posix()} for p in files]
                about = {"id": repository, "modelId": repository, "sha": commit, "private": False, "tags": []}
                return self.send(200, json.dumps(about | {"siblings": siblings, "downloads": 0}).encode())
            if api and what == "tree":
                return self.send(200, json.dumps([self.entry(p, folder) for p in files]).encode())
            file = folder.joinpath(*path)
            if not file.is_file():
                return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
            if self.command == "GET":
                hub.fetched.append("/".join(path))
            headers = {"ETag": f'"{self.entry(file, folder)["oid"]}"', "X-Repo-Commit": commit}
            return self.send(200, file.read_bytes(), headers)

        @staticmethod
        def entry(path: Path, folder: Path) -> dict:
            content = path.read_bytes()
            return {
                "type": "file",
                "path": path.relative_to(folder).as_posix(),
                "size": len(content),
                "oid": hashlib.sha1(content).hexdigest(),
            }

        def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Nothing: stderr is the test's."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
