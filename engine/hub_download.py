"""Fetches files of a Hub repository into the cache that huggingface_hub's other users share, and goes on where a cut one ended.

huggingface_hub (2.4) throws away what it has of a file when its process ends; here a part stays under the name of its content
(`blobs/<hash>.incomplete`) and the rest is asked for with a Range. What has come is checked against the Hub's hash.
The layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import ModelLoadError
from engine.hub_errors import first_line

MAX_HTTP_BYTES = 50_000_000_000  # of a file; the Hub gives larger ones by Xet alone
MAX_PARALLEL = 8  # files at once, as huggingface_hub does it
MAX_FAILURES = 5  # in a row, of one file or question
FIRST_WAIT_S = 1.0  # and twice as long each time
MAX_BACKOFF_S = 8.0
MAX_ASKED_WAIT_S = 300.0  # what a Hub that limits its callers may ask for; huggingface.co counts in windows of 300 s
REPORT_INTERVAL_S = 1.0
LEAST_REPORTED_BYTES = 1_000_000  # what is there within a second and smaller is nothing to tell
RATE_WINDOW_S = 5.0
LOCK_POLL_S = 0.2
CHUNK_BYTES = 1 << 20
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_RETRIED = frozenset({408, 429, 500, 502, 503, 504})

Report = Callable[[str, str, float | None], None]


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository. blob: the hash of its content, SHA-256 for one in large file storage, else Git's SHA-1."""

    name: str
    size: int
    blob: str
    is_large: bool

    def hasher(self) -> Any:
        """The hash whose hexdigest is `blob` when the content has gone through it."""
        if self.is_large:
            return hashlib.sha256()
        return hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)


class Retries:
    """How often, and after which waits, one thing is tried again.

    wait: called with seconds and the reason. Waits grow from FIRST_WAIT_S to MAX_BACKOFF_S; a server that says how long is
    obeyed up to MAX_ASKED_WAIT_S.
    """

    def __init__(self, wait: Callable[[float, str], None]) -> None:
        self._wait = wait
        self._failures = 0

    def succeeded(self) -> None:
        self._failures = 0

    def failed(self, error: Exception) -> None:
        """Wait before the next try. Raises `error` where there is to be none."""
        asked_s = _asked_wait_s(error)
        self._failures += 1
        if not is_passing(error) or self._failures >= MAX_FAILURES or asked_s > MAX_ASKED_WAIT_S:
            raise error
        backoff_s = min(MAX_BACKOFF_S, FIRST_WAIT_S * 2 ** (self._failures - 1))
        self._wait(max(asked_s, backoff_s), _reason(error))


class ShortAnswer(Exception):
    """A server ended an answer early, and in good order."""


def is_passing(error: Exception) -> bool:
    """Whether the same question may be answered when it is asked again."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _RETRIED
    return isinstance(error, httpx2.TimeoutException | httpx2.NetworkError | httpx2.RemoteProtocolError | ShortAnswer)


def _reason(error: Exception) -> str:
    """In words, without an address: that of storage is signed, and lets whoever has it read the file."""
    from huggingface_hub.errors import HfHubHTTPError

    return f"HTTP {error.response.status_code}" if isinstance(error, HfHubHTTPError) else first_line(error)


def _asked_wait_s(error: Exception) -> float:
    """Seconds that a server asks to wait, by Retry-After or RateLimit; 0 where it does not."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import parse_ratelimit_headers

    if not isinstance(error, HfHubHTTPError):
        return 0.0
    headers = error.response.headers
    limit = parse_ratelimit_headers(headers) if error.response.status_code == 429 else None
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    after = headers.get("retry-after", "").strip()
    return float(after) if after.isdecimal() else 0.0


class Download:
    """Files of one commit of one repository, and where they go.

    name: the repository's. folder: its part of the cache.
    """

    def __init__(self, name: str, folder: Path, commit: str, report: Report) -> None:
        self._name = name
        self._commit = commit
        self._cache = folder.parent
        self._blobs = folder / "blobs"
        self.snapshot = folder / "snapshots" / commit
        self._report = report
        self._stop = threading.Event()
        self._progress = _Progress()

    def is_here(self, file: HubFile) -> bool:
        """Whether the snapshot holds the file, as long as it should be."""
        return _size(self.snapshot / file.name) == file.size

    def missing_bytes(self, files: Sequence[HubFile]) -> int:
        """Bytes that have to be fetched yet to have them all."""
        # Where the file system has no links, a file of the snapshot is its own blob.
        absent = [file for file in files if not (self._has_blob(file) or self.is_here(file))]
        return sum(file.size - self._partial_bytes(file) for file in absent)

    def fetch(self, files: Sequence[HubFile]) -> None:
        """Fetch what is not here yet, several files at once. Raises what kept one of them from coming; its part stays."""
        files = [file for file in files if not self.is_here(file)]
        if not files:
            return
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._progress = _Progress(sum(file.size for file in files))
        self._stop = threading.Event()
        with ThreadPoolExecutor(MAX_PARALLEL, thread_name_prefix="hub") as pool:
            pending: set[Future[None]] = {pool.submit(self._fetch, file) for file in files}
            is_told = self._progress.total >= LEAST_REPORTED_BYTES
            try:
                while pending:
                    done, pending = wait(pending, REPORT_INTERVAL_S, FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                    if is_told := is_told or bool(pending):
                        self._report("fetch", f"{self._name}: {self._progress}", self._progress.fraction)
            except BaseException:
                self._stop.set()  # the other files end at their next piece
                raise

    def _fetch(self, file: HubFile) -> None:
        if file.size > MAX_HTTP_BYTES:
            self._fetch_by_library(file)
            return
        blob, partial = self._blobs / file.blob, self._partial(file)
        if not self._has_blob(file):
            with partial.open("ab", buffering=0) as out:
                self._lock(out, file)
                if self._has_blob(file):  # another process was faster, or another file with the same content
                    partial.unlink(missing_ok=True)
                    self._progress.add(file.size, is_new=False)
                else:
                    self._fill(out, partial, file)
                    os.fsync(out.fileno())
                    partial.replace(blob)
        else:
            self._progress.add(file.size, is_new=False)
        _link(blob, self.snapshot / file.name)

    def _fetch_by_library(self, file: HubFile) -> None:
        from huggingface_hub import hf_hub_download

        try:
            hf_hub_download(self._name, file.name, revision=self._commit, cache_dir=self._cache)
        except Exception as error:  # of the library, of HTTP, of Xet
            if getattr(error, "errno", None) in DISK_ERRORS:
                raise
            raise ModelLoadError(f"{file.name} of {self._name} could not be fetched ({_reason(error)}): start again") from error
        self._progress.add(file.size, is_new=False)

    def _fill(self, out: BinaryIO, partial: Path, file: HubFile) -> None:
        """Append the rest of the file, in as many answers as it takes."""
        retries = Retries(self._wait)
        digest, offset = self._begun(partial, file)
        furthest = offset  # what a server without ranges sends again is no success
        is_second = False
        while True:
            try:
                with closing(self._answer(file, offset)) as answer:
                    for start, chunk in answer:
                        if start != offset:  # it has begun anew
                            digest, offset = self._restart(out, file, offset)
                        _write(out, chunk)
                        digest.update(chunk)
                        offset += len(chunk)
                        self._progress.add(len(chunk))
                        if offset > furthest:
                            furthest = offset
                            retries.succeeded()
                if offset < file.size:
                    raise ShortAnswer(f"an answer ended after {offset:,} of {file.size:,} bytes of {file.name}")
            except Exception as error:
                retries.failed(error)
                continue
            if offset == file.size and digest.hexdigest() == file.blob:
                return
            digest, offset = self._restart(out, file, offset)
            furthest = 0
            if is_second:
                raise ModelLoadError(
                    f"{file.name} of {self._name} came twice with other bytes than the Hub lists: start again, and look for a "
                    "proxy that changes what goes through it"
                )
            is_second = True

    def _begun(self, partial: Path, file: HubFile) -> tuple[Any, int]:
        """The hash and length of what came before; it counts as done, and not for the rate."""
        digest, offset = file.hasher(), 0
        with partial.open("rb") as begun:
            while chunk := begun.read(CHUNK_BYTES):
                digest.update(chunk)
                offset += len(chunk)
        self._progress.add(offset, is_new=False)
        return digest, offset

    def _restart(self, out: BinaryIO, file: HubFile, offset: int) -> tuple[Any, int]:
        out.truncate(0)
        self._progress.add(-offset, is_new=False)
        return file.hasher(), 0

    def _answer(self, file: HubFile, offset: int) -> Generator[tuple[int, bytes], None, None]:
        """(where it belongs, bytes) of the file from `offset` on, or from 0 where the server knows no ranges."""
        if offset >= file.size:
            return
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        headers = {**build_hf_headers(library_name="octavo"), "Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        url = hf_hub_url(self._name, file.name, revision=self._commit)
        timeout_s = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout_s) as response:
            hf_raise_for_status(response)
            position = offset if response.status_code == 206 else 0
            for chunk in response.iter_bytes():
                if self._stop.is_set():
                    raise _Stopped
                if position + len(chunk) > file.size:
                    raise ShortAnswer(f"an answer has more than the {file.size:,} bytes of {file.name}")
                yield position, chunk
                position += len(chunk)

    def _wait(self, seconds: float, reason: str) -> None:
        self._progress.note = f"; again in {seconds:.0f} s: {reason}"
        if self._stop.wait(seconds):
            raise _Stopped
        self._progress.note = ""

    def _lock(self, out: BinaryIO, file: HubFile) -> None:
        """Wait for another process that fetches the same file, where the file system can tell."""
        while True:
            try:
                fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                self._progress.note = f"; another process fetches {file.name}"
                if self._stop.wait(LOCK_POLL_S):
                    raise _Stopped from None
                self._progress.note = ""
            except OSError:
                return  # without locks the worst is that both fetch, and the hash tells a mixture

    def _partial(self, file: HubFile) -> Path:
        return self._blobs / f"{file.blob}.incomplete"

    def _partial_bytes(self, file: HubFile) -> int:
        return min(file.size, max(0, _size(self._partial(file))))

    def _has_blob(self, file: HubFile) -> bool:
        """A blob of another length is damaged, and fetched again."""
        return _size(self._blobs / file.blob) == file.size


class _Stopped(Exception):
    """Another file has failed, so this one is not fetched on."""


class _Progress:
    """What all files together have come to. note: why it does not go on just now."""

    def __init__(self, total: int = 0) -> None:
        self.total = total
        self._done = 0
        self._new = 0
        self._lock = threading.Lock()
        self._samples: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        self.note = ""

    def add(self, count: int, *, is_new: bool = True) -> None:
        with self._lock:
            self._done += count
            self._new += count if is_new else 0

    @property
    def fraction(self) -> float:
        return min(1.0, self._done / self.total) if self.total else 1.0

    def __str__(self) -> str:
        """To be asked for at intervals: the rate is of the time since, over some seconds."""
        now = time.monotonic()
        self._samples.append((now, self._new))
        while len(self._samples) > 2 and now - self._samples[0][0] > RATE_WINDOW_S:
            self._samples.popleft()
        since, before = self._samples[0]
        rate = (self._new - before) / max(now - since, 1e-3)
        unit, name = (1e9, "GB") if self.total >= 1e9 else (1e6, "MB")
        return f"{self._done / unit:.2f} of {self.total / unit:.2f} {name}, {rate / 1e6:.1f} MB/s{self.note}"


def _write(out: BinaryIO, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[out.write(view) :]


def _size(path: Path) -> int:
    """Bytes of the file, or of what a link leads to; -1 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _link(blob: Path, pointer: Path) -> None:
    """Let the snapshot's file lead to the blob; where the file system has no links, the blob itself becomes the file."""
    pointer.parent.mkdir(parents=True, exist_ok=True)
    target = os.path.relpath(blob, pointer.parent)
    if pointer.is_symlink() and os.readlink(pointer) == target:
        return
    link = pointer.with_name(f".{pointer.name}.{os.getpid()}")
    try:
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        link.replace(pointer)
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise
        blob.replace(pointer)
