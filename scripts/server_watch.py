"""What can be seen of a running server from outside: its two processes, their memory and file descriptors, and its gauges."""

from __future__ import annotations

import http.client
import re
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass

import psutil

POLL_S = 0.1
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "backlog_tokens", "backlog_wait_seconds")
"""What is 0 when nothing is asked of the server."""


@dataclass(frozen=True)
class Vitals:
    """At one moment. Of a process that is not there, 0."""

    frontend_pid: int
    engine_pid: int
    frontend_rss_bytes: int
    engine_rss_bytes: int
    frontend_fds: int
    engine_fds: int
    metrics: dict[str, float]
    """By name without `octavo_`, summed over labels."""

    def at_rest(self) -> bool:
        """Whether nothing runs, waits or holds a page."""
        return all(self.metrics[name] == 0 for name in GAUGES)


class ServerWatch:
    """Of the server whose frontend has this process id and answers at this address without a key."""

    def __init__(self, pid: int, base_url: str) -> None:
        self._frontend = psutil.Process(pid)
        self._host_and_port = base_url.removeprefix("http://").rstrip("/")

    def engine(self) -> psutil.Process | None:
        """The engine's process; None where there is none at the moment."""
        with suppress(psutil.NoSuchProcess):
            for child in self._frontend.children():
                with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    if "engine" in " ".join(child.cmdline()):
                        return child
        return None

    def vitals(self) -> Vitals:
        """Raises OSError or HTTPException where the server does not answer."""
        metrics = self._read_metrics()
        engine = self.engine()
        frontend_rss, frontend_fds = _resources(self._frontend)
        engine_rss, engine_fds = _resources(engine)
        return Vitals(
            self._frontend.pid,
            0 if engine is None else engine.pid,
            frontend_rss,
            engine_rss,
            frontend_fds,
            engine_fds,
            metrics,
        )

    def wait_at_rest(self, limit_s: float) -> Vitals:
        """The first vitals of a ready server in which everything has ended, or those after limit_s. Raises like `vitals`."""
        deadline = time.monotonic() + limit_s
        while True:
            vitals = self.vitals()
            if (vitals.engine_pid and vitals.at_rest() and self.is_ready()) or time.monotonic() >= deadline:
                return vitals
            time.sleep(POLL_S)

    def is_ready(self) -> bool:
        """Whether the engine completes steps. Raises like `vitals`."""
        return self.get("/health/ready")[0] == 200

    def get(self, path: str) -> tuple[int, str]:
        """Status and body. Raises like `vitals`."""
        connection = http.client.HTTPConnection(self._host_and_port, timeout=30)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def _read_metrics(self) -> dict[str, float]:
        text = self.get("/metrics")[1]
        sums: dict[str, float] = defaultdict(float)
        for name, value in re.findall(r"^octavo_(\w+)(?:\{.*\})? (\S+)$", text, re.MULTILINE):
            sums[name] += float(value)
        return dict(sums)


def _resources(process: psutil.Process | None) -> tuple[int, int]:
    """Bytes of resident memory, and open file descriptors."""
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        if process is not None:
            return process.memory_info().rss, process.num_fds()
    return 0, 0
