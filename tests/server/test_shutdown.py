"""The end of `octavo serve`, as a process with an engine process: what is open is finished, what is new is refused, nothing is
cut off in silence."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.crashes import make_model

ROOT = Path(__file__).parent.parent.parent
BODY = {"prompt": [3, 4], "max_tokens": 380, "stream": True, "ignore_eos": True}
HEALTH = ("/health", "/health/ready", "/health/live")


@contextmanager
def served(model: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client, list[str]]]:
    """(process, HTTP client, what it has written to stderr so far)."""
    command = [sys.executable, "-m", "tests.serve_fake_engine", str(model), "--port", "0", "--device", "cpu", *flags]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OCTAVO_")}
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environ) as process:
        assert process.stderr is not None
        lines: list[str] = []
        try:
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"at (http://127\.0\.0\.1:\d+)", line):
                    break
            else:
                pytest.fail("".join(lines))
            rest = threading.Thread(target=lines.extend, args=(process.stderr,), daemon=True)
            rest.start()
            with httpx.Client(base_url=found[1], timeout=60) as http:
                yield process, http, lines
            process.wait(60)
            rest.join(60)
        finally:
            process.kill()


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come to pass"
        time.sleep(0.02)


def status(http: httpx.Client, path: str) -> int:
    return http.get(path).status_code


def complete(http: httpx.Client, **body: object) -> httpx.Response:
    return http.post("/v1/completions", json={"prompt": [5], "max_tokens": 2, **body})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", step_s=0.02)


@pytest.mark.timeout(240)
def test_open_streams_are_finished_and_new_work_is_refused(model: Path) -> None:
    with served(model) as (process, http, lines):
        assert [status(http, path) for path in HEALTH] == [200, 200, 200]
        with http.stream("POST", "/v1/completions", json=BODY) as response:
            parts = response.iter_text()
            text = next(parts)
            process.send_signal(signal.SIGTERM)
            until(lambda: status(http, "/health/ready") == 503)
            health = http.get("/health").json()
            assert health["status"] == "stopping" and health["detail"] == "The server is shutting down."
            assert status(http, "/health/live") == 200 and status(http, "/metrics") == 200
            until(lambda: complete(http).status_code == 503)
            refused = complete(http)
            assert refused.headers["Retry-After"] == "1" and refused.headers["Connection"] == "close"
            assert refused.json()["error"]["code"] == "engine_unavailable"
            text += "".join(parts)
        assert text.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in text and "error" not in text
        assert process.wait(60) == 0
    assert "Traceback" not in "".join(lines) and "Stopping when 1 open requests are done" in "".join(lines)


@pytest.mark.timeout(240)
def test_new_work_is_taken_during_the_delay(model: Path) -> None:
    with served(model, "--drain-delay-s", "5") as (process, http, _):
        status(http, "/health/ready")
        process.send_signal(signal.SIGTERM)
        until(lambda: status(http, "/health/ready") == 503)
        assert complete(http).status_code == 200 and status(http, "/health/live") == 200
        with http.stream("POST", "/v1/completions", json=BODY) as response:  # longer than what is left of the delay
            parts = response.iter_text()
            text = next(parts)
            until(lambda: complete(http).status_code == 503)
            text += "".join(parts)
        assert text.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in text
        assert process.wait(60) == 0


@pytest.mark.timeout(240)
@pytest.mark.parametrize("hurried", [True, False])
def test_what_cannot_be_finished_ends_with_an_error(model: Path, hurried: bool) -> None:
    """By a second signal, or because the time is up."""
    with served(model, "--shutdown-timeout-s", "3600" if hurried else "0.5", "--drain-delay-s", "3600" if hurried else "0") as (
        process,
        http,
        lines,
    ):
        answers: list[httpx.Response] = []
        unstreamed = threading.Thread(target=lambda: answers.append(complete(http, max_tokens=380, ignore_eos=True)))
        with http.stream("POST", "/v1/completions", json=BODY) as response:
            parts = response.iter_text()
            text = next(parts)
            unstreamed.start()
            until(lambda: "num_requests_running" in http.get("/metrics").text and _num_running(http) == 2)
            process.send_signal(signal.SIGTERM)
            if hurried:
                until(lambda: status(http, "/health/ready") == 503)
                process.send_signal(signal.SIGTERM)
            text += "".join(parts)
        *_, last, done, empty = text.split("\n\n")
        assert '"error":{' in last and '"type":"service_unavailable_error"' in last and (done, empty) == ("data: [DONE]", "")
        unstreamed.join(60)
        assert answers[0].status_code == 503 and answers[0].json()["error"]["type"] == "service_unavailable_error"
        assert process.wait(60) == 0
    assert "Traceback" not in "".join(lines)


def _num_running(http: httpx.Client) -> int:
    line = re.search(r"^octavo_num_requests_running\{.*\} ([\d.]+)$", http.get("/metrics").text, re.MULTILINE)
    return 0 if line is None else int(float(line[1]))


@pytest.mark.timeout(240)
def test_an_idle_server_ends_at_once(model: Path) -> None:
    with served(model) as (process, http, _):
        status(http, "/health")  # a connection that stays open
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
