"""A small Hugging Face Hub on 127.0.0.1: what huggingface_hub and Octavo ask of the real one, and its ways of saying no.

Files of 1,000 bytes and more lie in large file storage, which is another origin, as on huggingface.co. Every request is kept,
and a test can have answers refused, cut, held or slowed. In tests: `with LocalHub() as hub: hub.add("someone/model", folder)`.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

LARGE_BYTES = 1000
BAD_TOKEN = "Invalid credentials in Authorization header"
_CHUNK_BYTES = 16384


@dataclass
class Asked:
    """One request as it came. where: "hub" or "storage". sent: bytes of the answer's body that left."""

    where: str
    method: str
    path: str
    range: str | None
    token: str | None
    name: str = ""
    status: int = 0
    sent: int = 0


@dataclass
class Trouble:
    """What is to happen to requests whose file (or path, for a question) fits `pattern`, `times` times.

    status: refuse with it. cut_after: close the connection after so many bytes of the body. hold_after: stop there until
    released.
    """

    pattern: str
    times: int
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    hold_after: int | None = None
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


class HubRepository:
    """Commits with their files, branches and tags. gated, private: who may read them is in the hub's tokens."""

    def __init__(self, name: str, *, gated: bool = False, private: bool = False) -> None:
        self.name, self.gated, self.private = name, gated, private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """A new state of the branch; returns its hash."""
        contents = repr((self.name, branch, len(self.commits), sorted((n, _sha256(b)) for n, b in files.items())))
        sha = hashlib.sha1(contents.encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        found = self.branches.get(revision) or self.tags.get(revision)
        return found or (revision if revision in self.commits else None)


class LocalHub:
    """url: for HF_ENDPOINT. tokens: which repositories each token may read. asked: every request, in order.

    ignores_ranges: storage sends files whole. corrupted: names of files that it sends with other bytes. bytes_per_s: of one
    answer; None does not slow it.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, HubRepository] = {}
        self.tokens: dict[str, set[str]] = {}
        self.asked: list[Asked] = []
        self.ignores_ranges = False
        self.corrupted: set[str] = set()
        self.bytes_per_s: float | None = None
        self._troubles: list[Trouble] = []
        self._lock = threading.Lock()
        self._servers = [_serve(self, where) for where in ("hub", "storage")]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for trouble in self._troubles:
            trouble.released.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(self, name: str, files: Path | dict[str, bytes], **kind: bool) -> HubRepository:
        """A repository with one commit: of a folder's files, or of names and contents."""
        contents = {path.name: path.read_bytes() for path in files.iterdir()} if isinstance(files, Path) else files
        self.repositories[name] = HubRepository(name, **kind)
        self.repositories[name].commit(contents)
        return self.repositories[name]

    def trouble(self, pattern: str, times: int = 1_000_000, **what: Any) -> Trouble:
        """See Trouble; the first that fits and is not used up counts."""
        self._troubles.append(Trouble(pattern, times, **what))
        return self._troubles[-1]

    def fetched(self, pattern: str = "*") -> list[Asked]:
        """The requests that asked for a file's content and got (some of) it."""
        return [
            asked
            for asked in self.asked
            if asked.method == "GET" and asked.status in (200, 206) and asked.name and fnmatch.fnmatch(asked.name, pattern)
        ]

    def take_trouble(self, asked: Asked) -> Trouble | None:
        with self._lock:
            for trouble in self._troubles:
                if trouble.times > 0 and fnmatch.fnmatch(asked.name or asked.path, trouble.pattern):
                    trouble.times -= 1
                    return trouble
        return None

    def blob(self, sha256: str) -> tuple[str, bytes] | None:
        """Name and content of what storage holds under a hash."""
        for repository in self.repositories.values():
            for files in repository.commits.values():
                for name, content in files.items():
                    if len(content) >= LARGE_BYTES and _sha256(content) == sha256:
                        return name, content
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Whoever asked has gone, as killed processes do."""


def _serve(hub: LocalHub, where: str) -> ThreadingHTTPServer:
    handler = type(f"{where}Handler", (_Handler,), {"hub": hub, "where": where})
    server = _Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True, name=where).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    where: str
    protocol_version = "HTTP/1.1"
    timeout = 60

    def log_message(self, *_: object) -> None:
        """The hub keeps its own list."""

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        authorization = self.headers.get("Authorization")
        token = authorization.removeprefix("Bearer ") if authorization else None
        self.asked = Asked(self.where, self.command, path, self.headers.get("Range"), token)
        self.hub.asked.append(self.asked)
        if self.where == "storage":
            self._storage(path)
        elif token is not None and token not in self.hub.tokens:
            self._refuse(401, None, BAD_TOKEN)
        elif match := re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree|refs)(?:/(.+))?)?", path):
            self._question(match[1], match[2], match[3] or "main")
        elif match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            self._file(*match.groups())
        else:
            self._refuse(404, None, "Sorry, we can't find the page you are looking for.")

    def _repository(self, name: str) -> HubRepository | None:
        """The one that the caller may know of; says no where there is none."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and name not in self.hub.tokens.get(self.asked.token or "", ())):
            self._refuse(404 if self.asked.token else 401, "RepoNotFound", "Repository not found")
            return None
        return found

    def _question(self, name: str, kind: str | None, revision: str) -> None:
        with self._in_order() as trouble:
            if trouble is not None:
                return
            found = self._repository(name)
            if found is None:
                return
            if kind == "refs":
                refs = {
                    group: [{"name": n, "ref": f"refs/{n}", "targetCommit": sha} for n, sha in table.items()]
                    for group, table in (("branches", found.branches), ("tags", found.tags), ("converts", {}))
                }
                self._answer(json.dumps(refs).encode(), {"Content-Type": "application/json"})
                return
            sha = found.resolve(revision)
            if sha is None:
                self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
                return
            entries = [_entry(n, content) for n, content in sorted(found.commits[sha].items())]
            siblings = [{"rfilename": entry["path"], "blobId": entry["oid"], **entry} for entry in entries]
            info = {"_id": "1", "id": name, "sha": sha, "private": found.private, "tags": [], "siblings": siblings}
            self._answer(json.dumps(entries if kind == "tree" else info).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, revision: str, file: str) -> None:
        self.asked.name = file
        found = self._repository(name)
        if found is None:
            return
        if found.gated and name not in self.hub.tokens.get(self.asked.token or "", ()):
            said = "Access to model is restricted and you are not in the authorized list."
            self._refuse(403 if self.asked.token else 401, "GatedRepo", said)
            return
        sha = found.resolve(revision)
        content = found.commits[sha].get(file) if sha else None
        if sha is None or content is None:
            self._refuse(404, "EntryNotFound" if sha else "RevisionNotFound", "Entry not found")
            return
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_git_hash(content)}"'}
        if len(content) < LARGE_BYTES:
            with self._in_order() as trouble:
                if trouble is None or trouble.status == 0:
                    self._answer(content, headers, trouble)
            return
        digest = _sha256(content)
        self.asked.name = ""  # storage is where it is fetched
        linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{digest}"'}
        self._answer(b"", {**headers, **linked, "Location": f"{self.hub.storage_url}/{digest}"}, status=302)

    def _storage(self, path: str) -> None:
        found = self.hub.blob(path.lstrip("/"))
        if found is None:
            self._refuse(404, None, "no such blob")
            return
        self.asked.name, content = found
        if self.asked.name in self.hub.corrupted:
            content = content[::-1]
        with self._in_order() as trouble:
            if trouble is None or trouble.status == 0:
                self._answer(content, {"ETag": f'"{path.lstrip("/")}"'}, trouble, may_range=not self.hub.ignores_ranges)

    @contextmanager
    def _in_order(self) -> Iterator[Trouble | None]:
        """The trouble that this request is to have, refused already where that is the trouble."""
        trouble = self.hub.take_trouble(self.asked)
        if trouble is not None and trouble.status:
            self._refuse(trouble.status, None, "out of order", trouble.headers)
        yield trouble

    def _refuse(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> None:
        codes = {"X-Error-Code": code} if code else {}
        body = json.dumps({"error": message}).encode()
        everything = {"X-Error-Message": message, "Content-Type": "application/json", **codes, **(headers or {})}
        self._answer(body, everything, status=status)

    def _answer(
        self,
        body: bytes,
        headers: dict[str, str],
        trouble: Trouble | None = None,
        status: int = 200,
        *,
        may_range: bool = False,
    ) -> None:
        start = 0
        if may_range and (match := re.fullmatch(r"bytes=(\d+)-", self.asked.range or "")):
            start = int(match[1])
            if start >= len(body):
                self._answer(b"", {"Content-Range": f"bytes */{len(body)}"}, status=416)
                return
            status, headers = 206, {**headers, "Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
        self.asked.status = status
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body) - start), "Accept-Ranges": "bytes"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self._send_body(body[start:], trouble)

    def _send_body(self, body: bytes, trouble: Trouble | None) -> None:
        stop_at = trouble.cut_after if trouble and trouble.cut_after is not None else len(body)
        hold_at = trouble.hold_after if trouble else None
        position = 0
        try:
            while position < min(stop_at, len(body)):
                if hold_at is not None and trouble is not None and position >= hold_at and not trouble.released.is_set():
                    trouble.reached.set()
                    trouble.released.wait(60)
                end = min(position + _CHUNK_BYTES, stop_at, len(body))
                end = min(end, hold_at) if hold_at is not None and position < hold_at else end
                self.wfile.write(body[position:end])
                self.asked.sent += end - position
                if self.hub.bytes_per_s:
                    time.sleep((end - position) / self.hub.bytes_per_s)
                position = end
        except OSError:
            self.close_connection = True  # whoever asked has gone
        if position < len(body):
            self.close_connection = True
            if trouble is not None:
                trouble.reached.set()


def _entry(name: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": _git_hash(content)}
    if len(content) >= LARGE_BYTES:
        digest = _sha256(content)
        entry["lfs"] = {"oid": digest, "sha256": digest, "size": len(content), "pointerSize": 130}
    return entry


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
