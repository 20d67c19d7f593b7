"""What people's clients do, done by those clients against a running server. The scenarios are in programs/ and node/."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.clients.conftest import FullServer
from tests.clients.workers import Worker
from tests.test_server_with_demo_model import Server

MODEL = "SmolLM2-135M-Instruct"
PROGRAMS = {
    "openai": "openai_sync.py",
    "openai-async": "openai_async.py",
    "openai-node": "openai.mjs",
    "litellm": "litellm_client.py",
    "langchain": "langchain_client.py",
}
SCENARIOS = (
    "list_models",
    "complete_batch",
    "chat",
    "stream_with_usage",
    "tool_loop",
    "structured_output",
    "embeddings",
    "responses",
    "responses_stream",
    "parallel",
    "cancel",
    "bad_request",
    "not_found",
)
CANNOT = {("langchain", "list_models")}
TALKS = [(name, scenario) for name in PROGRAMS for scenario in SCENARIOS if (name, scenario) not in CANNOT]


def wait_until_idle(server: Server) -> None:
    """No request is left in the engine, for whatever reason its client went away."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if server.metric("num_requests_running") == server.metric("num_requests_waiting") == 0:
            return
        time.sleep(0.05)
    raise AssertionError("requests are left in the engine")


@pytest.mark.parametrize(("client", "scenario"), TALKS)
def test_client(client: str, scenario: str, demo_server: Server, worker_of: Callable[[str], Worker]) -> None:
    worker_of(PROGRAMS[client]).run(scenario, url=demo_server.url, key="none", model=MODEL)
    wait_until_idle(demo_server)


@pytest.mark.parametrize("client", PROGRAMS)
def test_wrong_key(client: str, full_server: FullServer, worker_of: Callable[[str], Worker]) -> None:
    worker_of(PROGRAMS[client]).run("unauthorized", url=full_server.url, key="wrong", model=full_server.model)


@pytest.mark.parametrize("client", PROGRAMS)
def test_full_server(client: str, full_server: FullServer, worker_of: Callable[[str], Worker]) -> None:
    worker_of(PROGRAMS[client]).run("rate_limited", url=full_server.url, key=full_server.key, model=full_server.model)
