"""Two servers behind a real HAProxy with configs/haproxy.cfg: tokens come one by one, and who is dead or ending is left out."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.crashes import make_model
from tests.test_server_with_demo_model import free_port

ROOT = Path(__file__).parent.parent
HAPROXY = shutil.which("haproxy", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))
LIMIT_S = 60.0
NUM_TOKENS = 12
HTTP = httpx.Client(timeout=LIMIT_S)

pytestmark = [
    pytest.mark.skipif(HAPROXY is None, reason="HAProxy (Debian: apt install haproxy) is not installed"),
    pytest.mark.timeout(240),
]


@dataclass
class Replica:
    """One server, and what it calls its model, which tells it from the other in an answer."""

    process: subprocess.Popen[str]
    port: int
    name: str


@contextmanager
def replica(model: Path, name: str) -> Iterator[Replica]:
    port = free_port()
    command = [sys.executable, "-m", "tests.serve_fake_engine", str(model), "--port", str(port), "--device", "cpu"]
    command += ["--served-model-name", name, "any", "--drain-delay-s", "5"]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("OCTAVO_")}
    with subprocess.Popen(command, cwd=ROOT, env=environ, text=True) as process:
        try:
            yield Replica(process, port, name)
        finally:
            process.kill()


@contextmanager
def proxy(folder: Path, *replicas: Replica) -> Iterator[int]:
    """The port of HAProxy with the shipped configuration, in which only addresses are other ones."""
    port = free_port()
    text = (ROOT / "configs" / "haproxy.cfg").read_text()
    places = {"bind :8000": f"bind 127.0.0.1:{port}"}
    for number, each in enumerate(replicas, 1):
        name = "octavo" if number == 1 else f"octavo-{number}"
        places[f"server {name} {name}:8000"] = f"server {name} 127.0.0.1:{each.port}"
    for shipped, here in places.items():
        assert len(re.findall(rf"^    {shipped}$", text, re.M)) == 1
        text = re.sub(rf"^    {shipped}$", f"    {here}", text, flags=re.M)
    (folder / "haproxy.cfg").write_text(text)
    assert HAPROXY is not None
    with subprocess.Popen([HAPROXY, "-db", "-f", str(folder / "haproxy.cfg")]) as process:
        try:
            until(lambda: process.poll() is not None or answers(port))
            assert process.poll() is None
            yield port
        finally:
            process.kill()


@pytest.fixture
def whole(run_all: bool) -> None:
    """Before the servers, so that none is started for a test that is skipped."""
    if not run_all:
        pytest.skip("one more pair of servers: with --run-all")


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[tuple[int, Replica, Replica]]:
    """(the proxy's port, one server, another)"""
    model = make_model(tmp_path / "model", step_s=0.2)
    with ExitStack() as stack:
        one, other = (stack.enter_context(replica(model, name)) for name in ("one", "other"))
        until(lambda: answers(one.port) and answers(other.port))
        yield stack.enter_context(proxy(tmp_path, one, other)), one, other


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come to pass"
        time.sleep(0.05)


def answers(port: int) -> bool:
    try:
        return HTTP.get(f"http://127.0.0.1:{port}/health/ready").status_code == 200
    except httpx.HTTPError:
        return False


def served_by(port: int) -> str:
    """Which server the proxy chose for a request, which must succeed."""
    response = HTTP.get(f"http://127.0.0.1:{port}/v1/models")
    assert response.status_code == 200, response.text
    return str(response.json()["data"][0]["id"])


def stream(port: int) -> Iterator[bytes]:
    """What comes of a streamed completion, as it comes from the network."""
    body = {"model": "any", "prompt": [3, 4], "max_tokens": NUM_TOKENS, "stream": True, "ignore_eos": True}
    with HTTP.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body) as response:
        assert response.status_code == 200
        yield from response.iter_raw()


def texts_of(stream_bytes: bytes) -> list[str]:
    """The text of each event that has some: one token, or a few where the server had no time for each."""
    events = [json.loads(line[6:]) for line in stream_bytes.decode().splitlines() if line.startswith("data: {")]
    return [text for event in events if (text := event["choices"][0]["text"])]


def num_tokens(stream_bytes: bytes) -> int:
    return len(re.findall(r"t\d+\. ", "".join(texts_of(stream_bytes))))


def test_tokens_come_one_by_one(replicas: tuple[int, Replica, Replica]) -> None:
    port, _, _ = replicas
    parts = list(stream(port))
    whole = b"".join(parts)
    assert num_tokens(whole) == NUM_TOKENS
    assert whole.rstrip().endswith(b"data: [DONE]")
    # A token every 0.2 s: a few events may meet on the way when this machine is busy; a proxy that holds them back joins all.
    num_events, num_reads = len(texts_of(whole)), sum(bool(texts_of(part)) for part in parts)
    assert num_events > 3 and num_reads >= num_events * 2 / 3, (num_events, num_reads)


@pytest.mark.usefixtures("whole")
def test_both_serve_and_a_dead_one_is_left_out(replicas: tuple[int, Replica, Replica]) -> None:
    port, one, other = replicas
    until(lambda: served_by(port) == one.name)
    until(lambda: served_by(port) == other.name)
    other.process.kill()
    other.process.wait()
    # Also in the second in which the proxy has not noticed.
    assert {served_by(port) for _ in range(40)} == {one.name}


@pytest.mark.usefixtures("whole")
def test_one_that_ends_finishes_its_streams_and_gets_no_new_ones(replicas: tuple[int, Replica, Replica]) -> None:
    port, one, other = replicas
    open_streams = [stream(port), stream(port)]  # leastconn: one at each server
    begun = [next(each) for each in open_streams]
    other.process.send_signal(signal.SIGTERM)
    chosen: list[str] = []
    while other.process.poll() is None:
        chosen.append(served_by(port))  # none fails, whatever the proxy knows yet
        time.sleep(0.05)
    assert other.process.returncode == 0
    assert len(chosen) > 5 and set(chosen[-5:]) == {one.name}, chosen
    whole = [first + b"".join(rest) for first, rest in zip(begun, open_streams, strict=True)]
    assert [num_tokens(text) for text in whole] == [NUM_TOKENS, NUM_TOKENS]
