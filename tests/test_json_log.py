"""--log-format json: every line of a server's whole life parses, whatever becomes of its engine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.messages import CrashKind, CrashPoint
from tests.test_crash_over_http import serving

SECRET = "tulipbulb"
ROOT = Path(__file__).parents[1]


def life(folder: Path, kind: CrashKind, *flags: str) -> list[dict[str, Any]]:
    """The log of a server that is asked this and that, and whose engine dies in the middle."""
    with serving(folder, CrashPoint(place="before_step", kind=kind, step=40), *flags, step_s=0.005) as server:
        url = f"{server.url}/v1/completions"
        with httpx.Client(timeout=120) as http:
            body = {"prompt": [3, 4, 5], "max_tokens": 20, "ignore_eos": True}
            assert http.post(url, json=body, headers={"X-Request-Id": "mine"}).status_code == 200
            bad_id = b"x\t12:00:00 INFO forged"
            assert http.post(url, json=body | {"max_tokens": 60}, headers={b"X-Request-Id": bad_id}).status_code == 200
            assert http.post(url, json=body | {"stop": SECRET, "model": SECRET}).status_code == 404
            assert http.get(f"{server.url}/a%0A%7B%7D%0D%E2%80%A8").status_code == 404
            assert http.get(f"{server.url}/health").status_code == 200
        server.process.terminate()
        assert server.process.wait(60) == 0
    text = server.log.read_text(encoding="utf-8")
    assert SECRET not in text
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", ["kill", "segfault", "cuda_error", "exit"])
def test_every_line_parses(kind: CrashKind, tmp_path: Path, run_all: bool) -> None:
    if kind in ("cuda_error", "exit") and not run_all:
        pytest.skip("one more life: with --run-all")
    lines = life(tmp_path, kind, "--log-format", "json")
    for line in lines:
        assert {"time", "level", "logger", "process", "message"} <= set(line)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    assert lines[0]["message"].startswith("start the engine process") and "Stopping." in [line["message"] for line in lines]
    assert any("it is started again" in line["message"] for line in lines if line["level"] == "error")
    requests = [line for line in lines if line["message"] == "request"]
    first, replayed, refused, nowhere = requests
    assert first.pop("total_s") >= first.pop("ttft_s") > 0 and first.pop("queue_s") >= 0 and first.pop("prefill_s") > 0
    assert first.pop("response_id").startswith("cmpl-") and first.pop("time") and first.pop("model")
    assert first == EXPECTED
    assert replayed["replays"] == 1 and re.fullmatch("[0-9a-f]{32}", replayed["request_id"])
    assert (refused["status"], refused["error"], refused.get("model")) == (404, "model_not_found", None)
    assert nowhere["path"] == "/a\n{}\r\u2028"
    from_engine = [line for line in lines if line["process"] == "engine"]
    if kind == "segfault":
        assert any("Segmentation fault" in line["message"] and "crash_points.py" in line["message"] for line in from_engine)
    if kind == "cuda_error":
        assert any("illegal memory access" in line.get("traceback", "") for line in from_engine)


EXPECTED = {
    "level": "info",
    "logger": "octavo.request",
    "process": "frontend",
    "message": "request",
    "request_id": "mine",
    "method": "POST",
    "path": "/v1/completions",
    "status": 200,
    "prompt_tokens": 3,
    "cached_tokens": 0,
    "output_tokens": 20,
    "finish_reason": "length",
}


def test_a_start_that_fails_parses_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.serve_fake_engine", "null", "broken", "--port", "0", "--log-format", "json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    *_, last = map(json.loads, done.stderr.splitlines())
    assert done.returncode == 1 and last["level"] == "critical" and "broken on purpose" in last["message"]


@pytest.mark.timeout(240)
def test_for_people(tmp_path: Path) -> None:
    with serving(tmp_path, None) as server:
        body = {"prompt": [3, 4, 5], "max_tokens": 20, "ignore_eos": True}
        httpx.post(f"{server.url}/v1/completions", json=body, headers={"X-Request-Id": "mine"}, timeout=120)
        server.process.terminate()
        server.process.wait(60)
    lines = server.log.read_text().splitlines()
    assert "\x1b" not in server.log.read_text()
    (line,) = [line for line in lines if "POST" in line]
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d INFO    POST /v1/completions 200, 3 prompt tokens \(0 cached\), 20 output tokens, queue \d\.\d{3} s, "
        r"first token \d+\.\d{3} s, total \d+\.\d{3} s, length \[mine\]",
        line,
    )
