"""/metrics of an engine client without an engine: what docs/metrics.md lists is there, in both formats, and each number moves
when its thing happens."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import msgspec
import prometheus_client.openmetrics.exposition
import prometheus_client.openmetrics.parser
import prometheus_client.parser
import pytest
from prometheus_client.openmetrics.exposition import ALLOWUTF8

import server.backlog
from engine.client import EngineClient
from engine.errors import ConfigError, DeadlineExceeded, RequestFailed
from engine.histogram import HistogramCounts
from engine.messages import STEP_TIME_BOUNDS_S, STEP_TOKENS_BOUNDS, DeviceUsage, EngineStats
from server.config import ServerConfig, load_config
from server.metrics import Metrics
from server.metrics.exposition import write_openmetrics, write_text
from tests.metrics_text import metric
from tests.server.fake_client import FakeEngineClient

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
KEYS = ["ann-key ann", "bob-key bob", "prom-key prometheus metrics"]
COMMON = {"model_name", "engine"}
STEP_COUNTS = [1] * (len(STEP_TIME_BOUNDS_S) + 1)
STATS = EngineStats(
    num_running=3,
    num_waiting=5,
    num_deferred=2,
    num_blocks=4,
    num_referenced_blocks=1,
    num_cached_blocks=2,
    resident_bytes=77,
    devices=[DeviceUsage("cuda:0", 30, 80, 0.5)],
    steps=9,
    step_time=HistogramCounts(STEP_COUNTS, 2.5),
    step_tokens=HistogramCounts([0, 4] + [0] * (len(STEP_TOKENS_BOUNDS) - 1), 8),
    prompt_tokens=100,
    cached_prompt_tokens=32,
    prefix_query_tokens=90,
    generation_tokens=50,
    preemptions=2,
    recomputed_tokens=11,
    cpu_seconds=1.5,
)
Talk = Callable[[httpx.AsyncClient, FakeEngineClient], Awaitable[Any]]


async def nothing(http: httpx.AsyncClient, client: FakeEngineClient) -> None:
    pass


def scraped(talk: Talk = nothing, *, accept: str = "", stats: EngineStats = STATS, **settings: Any) -> httpx.Response:
    """/metrics after a talk, of a server with these settings."""

    async def scenario() -> httpx.Response:
        client = FakeEngineClient()
        client.stats = stats
        async with client.http(ServerConfig(model="tiny", **settings)) as http:
            await talk(http, client)
            return await http.get("/metrics", headers={"Accept": accept, "Authorization": "Bearer prom-key"})

    return asyncio.run(scenario())


def documented() -> dict[str, tuple[str, set[str]]]:
    """By name as in the page: type and own labels. The frontend's process metrics, which have no prefix, are not among them."""
    rows = re.findall(r"^\| `(\w+)(?:\{([\w, ]+)\})?` \| (\w+) \| ([^|]*) \|$", DOCS.read_text(), re.MULTILINE)
    return {
        name: (kind, set(re.findall(r"`(\w+)`", text)) if kind == "info" else set(re.findall(r"\w+", labels)))
        for name, labels, kind, text in rows
    }


def exposed(text: str, prefix: str = "octavo_") -> dict[str, tuple[str, set[str]]]:
    """The same of an OpenMetrics text."""
    found = {}
    for family in prometheus_client.openmetrics.parser.text_string_to_metric_families(text):
        if family.name.startswith(prefix):
            labels = {label for sample in family.samples for label in sample.labels} - COMMON - {"le"}
            name = family.name.removeprefix(prefix) + ("_info" if family.type == "info" else "")
            found[name] = family.type, labels
            assert all(set(sample.labels) >= COMMON for sample in family.samples)
    return found


def documented_reasons() -> list[str]:
    """Of requests_shed."""
    (row,) = re.findall(r"^\| `requests_shed\{reason\}` \|.*", DOCS.read_text(), re.MULTILINE)
    return re.findall(r"`(\w+)`", row)


async def one_of_each(http: httpx.AsyncClient, client: FakeEngineClient) -> None:
    """What gives series to the families that have none before."""
    await http.get("/v1/models")


def test_the_page_and_the_server_name_the_same() -> None:
    text = scraped(one_of_each, accept="application/openmetrics-text").text
    assert exposed(text) == documented()
    named = set(re.findall(r"`(process_\w+)`", DOCS.read_text()))
    assert named == {f"{n}" for n in re.findall(r"^(process_\w+) ", text, re.MULTILINE)}


def test_every_refusal_has_its_reason_in_the_page() -> None:
    source = Path(server.backlog.__file__).read_text()
    assert sorted(documented_reasons()) == sorted(["open_requests", *re.findall(r'return "(\w+)", f"', source)])


def test_the_prefix_is_a_setting() -> None:
    text = scraped(one_of_each, accept="application/openmetrics-text", metrics_prefix="vllm:").text
    assert exposed(text, "vllm:") == documented() and "octavo_" not in text
    assert metric(scraped(metrics_prefix="vllm:").text, "vllm:num_requests_waiting", model_name="tiny", engine="0") == 5


def test_what_is_made_for_vllm_finds_what_it_asks_for() -> None:
    named = set(re.findall(r"`vllm:(\w+)`", DOCS.read_text()))
    assert len(named) > 15
    text = scraped(one_of_each, metrics_prefix="vllm:").text
    families = {family.name: family for family in prometheus_client.parser.text_string_to_metric_families(text)}
    for name in named:
        family = families[f"vllm:{name}".removesuffix("_total")]
        assert family.samples and all(sample.labels["model_name"] == "tiny" for sample in family.samples), name


@pytest.mark.parametrize("prefix", ["", "1a", "a-b", "vllm.", "ä", "a b", "a" * 65, "a{", "a\n"])
def test_prefixes_that_prometheus_would_not_take(prefix: str) -> None:
    with pytest.raises(ConfigError, match=r"(?s)metrics.prefix.*1 to 64 letters"):
        load_config(["--model", "tiny", "--metrics-prefix", prefix], {})


PROMETHEUS_ACCEPTS = (
    "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


@pytest.mark.parametrize(
    ("accept", "is_openmetrics"),
    [
        ("", False),
        ("*/*", False),
        ("text/html", False),
        ("text/plain", False),
        (PROMETHEUS_ACCEPTS, True),
        ("application/openmetrics-text; version=1.0.0; charset=utf-8", True),
        ("application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=1.0.0;q=0.5", True),
        ("application/openmetrics-text;q=0.2,text/plain;q=0.3", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;version=2.0.0", False),
        ("application/openmetrics-text;version=abc", False),
        ("application/openmetrics-text;q=abc, text/plain;version=9x", False),
        (";=;,,;q", False),
    ],
)
def test_a_scraper_gets_the_format_that_it_asks_for(accept: str, is_openmetrics: bool) -> None:
    response = scraped(one_of_each, accept=accept)
    if is_openmetrics:
        assert response.headers["content-type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
        assert response.text.endswith("# EOF\n")
        families = list(prometheus_client.openmetrics.parser.text_string_to_metric_families(response.text))
    else:
        assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        families = list(prometheus_client.parser.text_string_to_metric_families(response.text))
    assert response.headers["vary"] == "Accept"
    counters = [family for family in families if family.type == "counter"]
    assert len(counters) > 15
    assert all(sample.name.endswith("_total") for family in counters for sample in family.samples)


def test_what_is_written_is_what_the_library_would_write() -> None:
    client = FakeEngineClient()
    client.stats = msgspec.structs.replace(STATS, generation_tokens=10**15, cpu_seconds=1e-7, step_tokens=HistogramCounts())
    name = 'a "model"\nof \\ C:\\é'
    metrics = Metrics(cast(EngineClient, client), ServerConfig(model="tiny", served_model_name=[name], metrics_prefix="vllm:"))
    metrics.observe_response("", 200)
    metrics.observe_first_token(float("inf"))
    families = list(metrics._registry.collect())
    same = SimpleNamespace(collect=lambda: families)
    assert write_text(families) == prometheus_client.generate_latest(same, ALLOWUTF8)
    assert write_openmetrics(families) == prometheus_client.openmetrics.exposition.generate_latest(same, ALLOWUTF8)
    assert metric(write_text(families).decode(), "vllm:generation_tokens_total", model_name=name) == 10**15


# What promtool finds wrong with names that are vLLM's.
LINT_OF_VLLM = {
    ("iteration_tokens_total", 'non-counter metrics should not have "_total" suffix'),
}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool, which comes with Prometheus, is not installed")
@pytest.mark.parametrize("prefix", ["octavo_", "vllm:"])
def test_promtool_has_nothing_to_say(prefix: str) -> None:
    text = scraped(one_of_each, metrics_prefix=prefix).text
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60, check=False)
    found = {tuple(line.removeprefix(prefix).split(" ", 1)) for line in done.stderr.splitlines()}
    colons = {(name, said) for name, said in found if said == "metric names should not contain ':'"}
    assert (found - colons if prefix == "vllm:" else found) == LINT_OF_VLLM, done.stderr


@pytest.mark.parametrize(
    ("name", "labels", "number"),
    [
        ("num_requests_running", {}, 3),
        ("num_requests_waiting", {}, 5),
        ("num_requests_waiting_by_reason", {"reason": "capacity"}, 3),
        ("num_requests_waiting_by_reason", {"reason": "deferred"}, 2),
        ("kv_cache_usage_perc", {}, 0.25),
        ("kv_cache_cached_blocks", {}, 2),
        ("prompt_tokens_total", {}, 100),
        ("prompt_tokens_cached_total", {}, 32),
        ("prefix_cache_queries_total", {}, 90),
        ("prefix_cache_hits_total", {}, 32),
        ("generation_tokens_total", {}, 50),
        ("num_preemptions_total", {}, 2),
        ("recomputed_tokens_total", {}, 11),
        ("engine_steps_total", {}, 9),
        ("engine_step_time_seconds_sum", {}, 2.5),
        ("engine_step_time_seconds_count", {}, len(STEP_COUNTS)),
        ("engine_step_time_seconds_bucket", {"le": "0.001"}, 2),
        ("iteration_tokens_total_sum", {}, 8),
        ("iteration_tokens_total_bucket", {"le": "1.0"}, 0),
        ("iteration_tokens_total_bucket", {"le": "2.0"}, 4),
        ("engine_ready", {}, 1),
        ("engine_restarts_total", {}, 0),
        ("device_memory_used_bytes", {"device": "cuda:0"}, 30),
        ("device_memory_total_bytes", {"device": "cuda:0"}, 80),
        ("device_utilization_ratio", {"device": "cuda:0"}, 0.5),
        ("engine_process_resident_memory_bytes", {}, 77),
        ("engine_process_cpu_seconds_total", {}, 1.5),
        ("cache_config_info", {"block_size": "16", "num_gpu_blocks": "10", "enable_prefix_caching": "True"}, 1),
        ("engine_info", {"architecture": "FakeForCausalLM", "device": "cpu", "dtype": "float32", "max_num_seqs": "8"}, 1),
    ],
)
def test_what_the_engine_says(name: str, labels: dict[str, str], number: float) -> None:
    assert metric(scraped().text, f"octavo_{name}", model_name="tiny", engine="0", **labels) == number


def test_before_the_engine_has_said_anything() -> None:
    async def start(http: httpx.AsyncClient, client: FakeEngineClient) -> None:
        client.state, client.ready = "starting", None

    text = scraped(start, stats=EngineStats()).text
    assert metric(text, "octavo_engine_ready") == 0
    assert metric(text, "octavo_engine_step_time_seconds_count") == metric(text, "octavo_iteration_tokens_total_sum") == 0
    assert "cache_config_info" not in text and "build_info" in text
    assert "device_utilization_ratio{" not in text, "the driver has said nothing"


def test_a_request_is_counted() -> None:
    async def ask(http: httpx.AsyncClient, client: FakeEngineClient) -> None:
        client.num_cached_tokens = 1
        await http.post("/v1/completions", json={"prompt": "abc", "n": 2, "max_tokens": 3})
        await http.post("/v1/completions", json={"prompt": ["ab", "c"], "max_tokens": 1})
        client.fail_after, client.stream_error = 1, RequestFailed("no")
        await http.post("/v1/completions", json={"prompt": "ab", "n": 2, "max_tokens": 3})

    text = scraped(ask).text
    for name, number in (
        ("request_success_total", 6),
        ("time_to_first_token_seconds_count", 3),
        ("inter_token_latency_seconds_count", 4),
        ("request_time_per_output_token_seconds_count", 2),
        ("request_decode_time_seconds_count", 4),
        ("request_inference_time_seconds_count", 4),
        ("request_queue_time_seconds_count", 4),
        ("request_prefill_time_seconds_count", 4),
        ("e2e_request_latency_seconds_count", 2),
        ("request_prompt_tokens_sum", 3 + 3),
        ("request_prefill_kv_computed_tokens_sum", 2 + 1),
        ("request_generation_tokens_sum", 6 + 2),
        ("request_max_num_generation_tokens_sum", 3 + 1),
        ("request_params_max_tokens_sum", 3 + 1),
        ("request_params_n_sum", 2 + 1),
        ("request_aborts_total", 0),
        ("api_key_prompt_tokens_total", 3 + 3 + 2),
        ("api_key_generation_tokens_total", 6 + 2 + 2),
    ):
        assert metric(text, f"octavo_{name}") == number, name
    for reason, number in (("length", 4), ("error", 2), ("stop", 0), ("abort", 0)):
        assert metric(text, "octavo_request_success_total", finished_reason=reason) == number


class Held:
    """What is awaited here is never over. entered: an entry for each who waits."""

    def __init__(self) -> None:
        self.entered: asyncio.Queue[None] = asyncio.Queue()

    async def wait(self) -> None:
        self.entered.put_nowait(None)
        await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("path", "field", "place", "num_choices"),
    [
        ("completions", "prompt", "gate", 1),  # while tokens come
        ("completions", "prompt", "accepting", 0),  # before the engine has answered
        ("embeddings", "input", "accepting", 1),
    ],
)
def test_a_client_that_goes_away_is_counted(path: str, field: str, place: str, num_choices: int) -> None:
    async def leave(http: httpx.AsyncClient, client: FakeEngineClient) -> None:
        held = Held()
        setattr(client, place, held)
        asking = asyncio.create_task(http.post(f"/v1/{path}", json={field: "abc"}))
        await asyncio.wait_for(held.entered.get(), 30)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    text = scraped(leave).text
    assert metric(text, "octavo_request_aborts_total") == 1
    assert metric(text, "octavo_request_success_total", finished_reason="abort") == num_choices
    assert metric(text, "octavo_e2e_request_latency_seconds_count") == 0


def test_a_request_that_is_late_is_counted() -> None:
    async def ask(http: httpx.AsyncClient, client: FakeEngineClient) -> None:
        client.refusal = DeadlineExceeded("late", param="first_token_timeout")
        await http.post("/v1/completions", json={"prompt": "abc"})

    text = scraped(ask).text
    assert metric(text, "octavo_deadlines_exceeded_total", kind="first_token_timeout") == 1
    assert metric(text, "octavo_deadlines_exceeded_total", kind="timeout") == 0


def test_keys_are_told_apart_and_nothing_else() -> None:
    async def ask(http: httpx.AsyncClient, client: FakeEngineClient) -> None:
        for key in ("ann-key", "ann-key", "bob-key", "tulip", "rose"):
            headers = {"Authorization": f"Bearer {key}", "X-Request-Id": f"id-{key}"}
            body = {"prompt": "abc", "max_tokens": 2, "user": key}
            await http.post("/v1/completions", json=body, headers=headers)
            await http.get(f"/{key}", headers=headers)

    text = scraped(ask, api_key=KEYS, accept="application/openmetrics-text").text
    values: dict[str, set[str]] = {}
    for family in prometheus_client.openmetrics.parser.text_string_to_metric_families(text):
        for sample in family.samples:
            for label, value in sample.labels.items():
                values.setdefault(label, set()).add(value)
    assert values["api_key_id"] == {"ann", "bob", "prometheus", "invalid"}
    assert values["status"] == {"200", "401", "404"}
    assert values["reason"] == {"capacity", "deferred", *documented_reasons()}
    assert values["model_name"] == {"tiny"} and values["engine"] == {"0"}
    assert "tulip" not in text and "ann-key" not in text
    text = scraped(ask, api_key=KEYS).text
    assert metric(text, "octavo_api_key_prompt_tokens_total", api_key_id="ann") == 6
    assert metric(text, "octavo_api_key_generation_tokens_total", api_key_id="ann") == 4
    assert metric(text, "octavo_api_key_generation_tokens_total", api_key_id="bob") == 2
    assert metric(text, "octavo_api_key_prompt_tokens_total", api_key_id="prometheus") == 0
