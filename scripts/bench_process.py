"""Servers that the bench scripts start: a process on a free port of this machine, its log, its readiness, its end."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
POLL_S = 0.02


@dataclass
class Server:
    """A server process and what it wrote, each line with its time in seconds since the start of the process."""

    process: subprocess.Popen[str]
    base_url: str
    started: float
    lines: list[tuple[float, str]] = field(default_factory=list)

    def wait_ready(self, time_limit_s: float) -> float:
        """Seconds from exec to the first 200 of /health. Raises RuntimeError when the server ends or takes too long."""
        host_and_port = self.base_url.removeprefix("http://")
        while time.monotonic() - self.started < time_limit_s:
            if self.process.poll() is not None:
                raise RuntimeError(
                    f"the server ended with {self.process.returncode}: {self.lines[-1][1] if self.lines else ''}"
                )
            connection = http.client.HTTPConnection(host_and_port, timeout=5)
            try:
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return time.monotonic() - self.started
            except (OSError, http.client.HTTPException):
                pass  # not listening yet
            finally:
                connection.close()
            time.sleep(POLL_S)
        raise RuntimeError(f"the server was not ready after {time_limit_s:.0f} s")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def octavo_command(model: str, port: int, name: str) -> list[str]:
    """`octavo serve` from this checkout, nothing installed; it needs `octavo_environ()`."""
    command = [sys.executable, "-m", "server.cli", "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    return [*command, "--served-model-name", name]


def octavo_environ() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))}


@contextmanager
def running(
    command: Sequence[str], environ: Mapping[str, str], port: int, log: Path, cpus: Sequence[int] = ()
) -> Iterator[Server]:
    """The command as a server on `port`, until the block ends; what it writes is kept in `log`. `environ` adds to ours.

    cpus: the cores it may use, where the system can bind processes; none binds nothing.
    """
    started = time.monotonic()
    with on_cpus(cpus):
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    with process:
        server = Server(process, f"http://127.0.0.1:{port}", started)
        reader = threading.Thread(target=_keep_log, args=(server, log), daemon=True)
        reader.start()
        try:
            yield server
        finally:
            end(process)
            reader.join(timeout=5)


@contextmanager
def on_cpus(cpus: Sequence[int]) -> Iterator[None]:
    """What this thread starts inside runs on these cores, where the system can bind processes."""
    if not cpus or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _keep_log(server: Server, log: Path) -> None:
    assert server.process.stdout is not None
    with log.open("w", encoding="utf-8") as file:
        for line in server.process.stdout:
            at = time.monotonic() - server.started
            server.lines.append((at, line.rstrip()))
            file.write(f"{at:9.3f} {line}")
            file.flush()


def process_tree(pid: int) -> list[psutil.Process]:
    """The process and all below it; empty when it is gone."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def end(process: subprocess.Popen[str], patience_s: float = 20) -> None:
    """SIGTERM, then SIGKILL to what is left of it and its children after patience_s."""
    tree = process_tree(process.pid)
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(patience_s)
    kill(tree)


def kill(tree: Sequence[psutil.Process]) -> None:
    for process in tree:
        with suppress(psutil.NoSuchProcess):
            process.kill()
