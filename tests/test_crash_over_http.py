"""What clients of a server see while its engine dies: answers that go on, comments, 500 and 503, and an end with a sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil

from engine.messages import CrashPoint
from tests.crashes import make_model, text_of
from tests.fake_runner import expected_tokens
from tests.test_crash_with_tiny_model import engine_of, wait_until_ready
from tests.test_server_with_demo_model import Server, free_port


@contextmanager
def serving(folder: Path, crash_point: CrashPoint | None, *flags: str, **options: Any) -> Iterator[Server]:
    """options: of the fake model."""
    model, log, port = make_model(folder / "model", **options), folder / "log", free_port()
    point = msgspec.json.encode(crash_point).decode()
    command = [sys.executable, "-m", "tests.serve_fake_engine", point, str(model), "--port", str(port), *flags]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=Path(__file__).parents[1])
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        wait_until_ready(server)
        yield server
    finally:
        process.kill()
        process.wait()


def complete(server: Server, prompt: list[int], **fields: Any) -> httpx.Response:
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 5, "seed": 0, **fields}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)


class Stream(threading.Thread):
    """Reads a stream in the background."""

    def __init__(self, server: Server, prompt: list[int], max_tokens: int) -> None:
        super().__init__(daemon=True)
        self._url = f"{server.url}/v1/completions"
        self._body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True, "seed": 0}
        self.lines: list[str] = []
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", self._url, json=self._body, timeout=120) as response:
            for line in response.iter_lines():
                self.lines.append(line)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line[6:]) for line in self.lines if line.startswith("data: {")]

    @property
    def text(self) -> str:
        return "".join(choice["text"] for event in self.events for choice in event.get("choices", ()))


def until(condition: Any, timeout_s: float = 60) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come to pass"
        time.sleep(0.01)


def test_a_stream_goes_on_with_comments_meanwhile_and_new_requests_wait(tmp_path: Path) -> None:
    with serving(tmp_path, None, step_s=0.01) as server:
        make_model(tmp_path / "model", step_s=0.01, load_s=12)  # the next engine takes its time
        stream = Stream(server, [5], 300)
        until(lambda: len(stream.events) > 10)
        engine = engine_of(server)
        assert engine is not None
        os.kill(engine.pid, signal.SIGKILL)
        until(lambda: httpx.get(f"{server.url}/health").status_code == 503, 1)
        health = httpx.get(f"{server.url}/health/ready").json()
        assert health["status"] == "recovering" and "started again" in health["detail"]
        assert httpx.get(f"{server.url}/health/live").status_code == 200
        assert complete(server, [7]).json()["choices"][0]["text"] == text_of(expected_tokens_of([7], 5))
        stream.join(60)
        assert sum(line.startswith(": ") for line in stream.lines) >= 1
        assert stream.text == text_of(expected_tokens_of([5], 300)) and stream.lines[-2:] == ["data: [DONE]", ""]
        assert server.metric("engine_restarts_total") == 1
        assert psutil.pid_exists(server.process.pid) and server.process.poll() is None


def expected_tokens_of(prompt: list[int], count: int) -> list[int]:
    """The fake model's noise is the seed's, also where the temperature is 0."""
    from engine.sampling_params import choice_seed

    return expected_tokens(prompt, choice_seed(0, 0), count)


def test_new_requests_are_told_when_to_come_again(tmp_path: Path) -> None:
    with serving(tmp_path, None, "--restart-wait-s", "0.5") as server:
        make_model(tmp_path / "model", load_s=5)  # the next engine takes its time
        engine = engine_of(server)
        assert engine is not None
        os.kill(engine.pid, signal.SIGKILL)
        until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
        response = complete(server, [7])
        assert response.status_code == 503 and int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "engine_unavailable"


def test_a_request_that_brings_the_engine_down_gets_a_500_that_names_it(tmp_path: Path) -> None:
    poison = CrashPoint(place="before_step", kind="memory_error", token_id=95, epochs=None)
    with serving(tmp_path, poison, step_s=0.005) as server:
        stream = Stream(server, [5], 300)
        until(lambda: stream.events)
        response = complete(server, [95])
        assert response.status_code == 500
        error = response.json()["error"]
        assert error["code"] == "engine_died" and error["type"] == "server_error" and "this request" in error["message"]
        stream.join(60)
        assert stream.text == text_of(expected_tokens_of([5], 300))


def test_an_engine_that_gets_nowhere_ends_the_server_with_a_sentence(tmp_path: Path) -> None:
    always = CrashPoint(place="after_sampling", kind="cuda_error", epochs=None)
    with serving_unready(tmp_path, always) as server:
        stream = Stream(server, [5], 30)
        assert server.process.wait(120) == 1
        stream.join(30)
        assert "the request was lost" in stream.lines[0] or stream.events[-1]["error"]
        (sentence,) = [line for line in server.log.read_text().splitlines() if line.startswith("octavo: ")]
        assert "died 3 times in a row without completing a step" in sentence and "exit code 70" in sentence


@contextmanager
def serving_unready(folder: Path, crash_point: CrashPoint) -> Iterator[Server]:
    """One whose readiness is not asked for, because asking makes a step."""
    model, log, port = make_model(folder / "model"), folder / "log", free_port()
    command = [sys.executable, "-m", "tests.serve_fake_engine", msgspec.json.encode(crash_point).decode(), str(model)]
    with log.open("wb") as out:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=out, stderr=subprocess.STDOUT)
    try:
        until(lambda: "Octavo serves" in log.read_text())
        yield Server(f"http://127.0.0.1:{port}", process, log)
    finally:
        process.kill()
        process.wait()
