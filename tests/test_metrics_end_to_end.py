"""/metrics of a server with an engine process: no counter and no histogram falls when that dies, and the numbers are those
of what was asked."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.client import EngineClient
from server.app import create_app
from server.config import ServerConfig
from tests.crashes import kill, make_model, running, until
from tests.metrics_text import metric
from tests.test_crash_with_tiny_model import engine_of, serving, wait_until_ready
from tests.test_server_with_demo_model import Server

NUM_REQUESTS, MAX_TOKENS = 12, 300


def counts(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every series that may only rise."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        if family.type in ("counter", "histogram")
        for sample in family.samples
    }


def assert_none_fell(before: str, after: str) -> None:
    later = counts(after)
    fallen = {series: (value, later.get(series)) for series, value in counts(before).items() if later.get(series, -1) < value}
    assert not fallen


class Watch:
    """Scrapes again and again, and compares each with the one before."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self.texts: list[str] = []

    async def scrape(self) -> str:
        self.texts.append((await self._http.get("/metrics")).text)
        if len(self.texts) > 1:
            assert_none_fell(*self.texts[-2:])
        return self.texts[-1]

    async def run(self) -> None:
        while True:
            await self.scrape()
            await asyncio.sleep(0.2)


async def ask(http: httpx.AsyncClient, i: int) -> None:
    body = {"prompt": [3 + i, 50, 4], "max_tokens": MAX_TOKENS, "ignore_eos": True, "temperature": 1, "seed": i}
    response = await http.post("/v1/completions", json=body)
    assert response.json()["usage"]["completion_tokens"] == MAX_TOKENS, response.text


def test_nothing_falls_when_engines_die(tmp_path: Path) -> None:
    async def scenario(client: EngineClient, http: httpx.AsyncClient) -> None:
        watch = Watch(http)
        watching = asyncio.create_task(watch.run())
        asking = [asyncio.create_task(ask(http, i)) for i in range(NUM_REQUESTS)]
        for num_tokens in (400, 1200):
            await until(lambda least=num_tokens: client.stats.generation_tokens > least)
            before = await watch.scrape()
            assert metric(before, "octavo_engine_ready") == 1
            await kill(client)
            between = await watch.scrape()
            assert metric(between, "octavo_engine_ready") == metric(between, "octavo_num_requests_running") == 0
            num_waiting = metric(between, "octavo_num_requests_waiting")
            assert metric(between, "octavo_num_requests_waiting_by_reason", reason="deferred") == num_waiting > 0
        await asyncio.gather(*asking)
        await until(lambda: client.stats.num_running == 0)
        text = await watch.scrape()
        watching.cancel()
        assert metric(text, "octavo_engine_restarts_total") == 2
        assert metric(text, "octavo_request_success_total", finished_reason="length") == NUM_REQUESTS
        assert metric(text, "octavo_num_preemptions_total") > 0, "the pages do not hold all of these"
        assert metric(text, "octavo_recomputed_tokens_total") > 0
        # What a dead engine had sent no numbers about is missing.
        for name in ("engine_step_time_seconds_count", "iteration_tokens_total_count"):
            assert metric(text, f"octavo_{name}") == pytest.approx(metric(text, "octavo_engine_steps_total"), abs=4)
        assert metric(text, "octavo_engine_process_resident_memory_bytes") > 2**20
        assert metric(text, "octavo_device_memory_used_bytes", device="cpu") > 2**20
        assert 0 <= metric(text, "octavo_device_utilization_ratio", device="cpu") <= 1

    async def main() -> None:
        async with running(make_model(tmp_path / "model", step_s=0.01)) as client:
            app = create_app(client, ServerConfig(model="fake"))
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=120) as http:
                await until(lambda: bool(client.stats.devices))
                await scenario(client, http)

    asyncio.run(asyncio.wait_for(main(), 240))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--device", "cpu", "--num-threads", "1", "--kv-cache-memory-bytes", "32M", "--max-waiting-requests", "1")
    with serving(tmp_path_factory.mktemp("tiny"), *flags) as server:
        yield server


def scrape(server: Server) -> str:
    return httpx.get(f"{server.url}/metrics").text


def at_rest(server: Server) -> str:
    """The metrics once the engine has nothing more to tell."""

    async def wait() -> str:
        async with httpx.AsyncClient(base_url=server.url) as http:
            for _ in range(600):
                text = (await http.get("/metrics")).text
                busy = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
                if not any(metric(text, f"octavo_{name}") for name in busy):
                    return text
                await asyncio.sleep(0.05)
            raise AssertionError("it does not come to rest")

    return asyncio.run(wait())


@pytest.mark.timeout(600)
def test_a_model_s_numbers_add_up(server: Server) -> None:
    def difference(name: str, **labels: str) -> float:
        return metric(after, f"octavo_{name}", **labels) - metric(before, f"octavo_{name}", **labels)

    before, usages = scrape(server), []
    for i in range(3):
        body = {"prompt": "the printer folds the sheet " * 12, "max_tokens": 4 + i, "seed": i, "ignore_eos": True}
        response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
        usages.append(response.json()["usage"])
    after = at_rest(server)
    prompt_tokens = sum(usage["prompt_tokens"] for usage in usages)
    cached_tokens = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    assert cached_tokens > 0, "the second finds the first one's pages"
    for name, number in (
        ("prompt_tokens_total", prompt_tokens),
        ("prompt_tokens_cached_total", cached_tokens),
        ("prefix_cache_queries_total", prompt_tokens),
        ("prefix_cache_hits_total", cached_tokens),
        ("generation_tokens_total", 4 + 5 + 6),
        ("request_prefill_kv_computed_tokens_sum", prompt_tokens - cached_tokens),
        ("iteration_tokens_total_sum", prompt_tokens - cached_tokens + 3 + 4 + 5),  # an answer's last token is not computed
        ("api_key_generation_tokens_total", 4 + 5 + 6),
        ("recomputed_tokens_total", 0),
        ("num_preemptions_total", 0),
        ("request_queue_time_seconds_count", 3),
        ("request_inference_time_seconds_count", 3),
    ):
        assert difference(name) == number, name
    assert difference("iteration_tokens_total_count") == difference("engine_step_time_seconds_count")
    assert difference("engine_step_time_seconds_count") == difference("engine_steps_total") > 0
    assert 0 < difference("engine_step_time_seconds_sum") <= difference("e2e_request_latency_seconds_sum")
    assert difference("request_prefill_time_seconds_sum") <= difference("time_to_first_token_seconds_sum")
    assert difference("engine_process_cpu_seconds_total") > 0
    assert metric(after, "octavo_kv_cache_cached_blocks") > 0
    assert metric(after, "octavo_engine_info", dtype="float32", device="cpu") == 1
    assert metric(after, "process_resident_memory_bytes") > 2**20


@pytest.mark.timeout(600)
def test_a_crowd_is_shed(server: Server) -> None:
    before = scrape(server)

    async def scenario() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=300) as http:
            body = {"prompt": "a", "max_tokens": 30, "ignore_eos": True, "n": 40}  # 32 run at once
            first = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(2)]
            statuses = {response.status_code for response in await asyncio.gather(*first)}
            assert statuses <= {200, 429}
            for _ in range(20):
                more = await asyncio.gather(*(http.post("/v1/completions", json=body) for _ in range(3)))
                if any(response.status_code == 429 for response in more):
                    return
            raise AssertionError("nothing was refused")

    asyncio.run(scenario())
    after = at_rest(server)
    shed = "octavo_requests_shed_total"
    assert metric(after, shed, reason="waiting_requests") > metric(before, shed, reason="waiting_requests")


@pytest.mark.timeout(600)
def test_a_model_s_counters_outlive_its_engine(server: Server) -> None:
    before = at_rest(server)
    engine = engine_of(server)
    assert engine is not None
    os.kill(engine.pid, signal.SIGKILL)
    while metric(scrape(server), "octavo_engine_restarts_total") == metric(before, "octavo_engine_restarts_total"):
        assert_none_fell(before, scrape(server))
    assert_none_fell(before, scrape(server))
    wait_until_ready(server)
    httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 3, "ignore_eos": True}, timeout=120)
    after = at_rest(server)
    assert_none_fell(before, after)
    name = "octavo_generation_tokens_total"
    assert metric(after, name) >= metric(before, name) + 3
