"""The servers that the clients talk to: one with the demo model, and one that lets nobody in, or nobody more."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.clients.workers import Worker, why_missing
from tests.test_server_with_demo_model import Server, free_port, start_server

KEY = "a-key"


@pytest.fixture(scope="package")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model in float32, so that greedy answers are those known."""
    log = tmp_path_factory.mktemp("clients") / "server.log"
    server = start_server(log, "--dtype", "float32", "--max-model-len", "4096", "--strict")
    yield server
    server.process.kill()
    server.process.wait()


@dataclass(frozen=True)
class FullServer:
    """A server with an API key, all of whose places are taken."""

    url: str
    key: str = KEY
    model: str = "tiny"


@pytest.fixture(scope="package")
def full_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FullServer]:
    port = free_port()
    flags = ["tiny", "--port", str(port), "--api-key", KEY, "--max-open-requests", "1", "--read-timeout-s", "3600"]
    with (tmp_path_factory.mktemp("clients") / "full.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "tests.server.fake_serve", *flags], stdout=log, stderr=log)
    try:
        server = FullServer(f"http://127.0.0.1:{port}")
        _wait_until_up(process, server.url)
        with socket.create_connection(("127.0.0.1", port)) as visitor:
            # One request whose body never comes takes the only place.
            head = f"POST /v1/completions HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 9\r\n\r\n"
            visitor.sendall(head.encode())
            yield server
    finally:
        process.kill()
        process.wait()


def _wait_until_up(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError(f"the server is not up; exit code {process.poll()}")


@pytest.fixture(scope="package")
def worker_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Worker]]:
    """The worker of a program; skips the test where it cannot run."""
    workers: dict[str, Worker] = {}
    folder: Path = tmp_path_factory.mktemp("workers")

    def find(program: str) -> Worker:
        if reason := why_missing(program):
            pytest.skip(reason)
        return workers.setdefault(program, Worker(program, folder / f"{program}.log"))

    yield find
    for worker in workers.values():
        worker.stop()
