"""The engine's metrics, read from what it sends when somebody scrapes, so that nothing has to be copied in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from engine.client import EngineClient
from engine.messages import STEP_TIME_BOUNDS_S, STEP_TOKENS_BOUNDS, EngineReady, EngineStats
from server.config import ServerConfig
from server.metrics.families import Families

Read = Callable[[EngineStats], float]

_GAUGES: tuple[tuple[str, str, Read], ...] = (
    ("num_requests_running", "Choices that the engine is computing.", attrgetter("num_running")),
    ("num_requests_waiting", "Choices that wait in the engine.", attrgetter("num_waiting")),
    ("kv_cache_usage_perc", "Share of the KV pages in use, 0 to 1.", lambda s: s.num_referenced_blocks / max(s.num_blocks, 1)),
    ("kv_cache_cached_blocks", "Free KV pages whose content can be found again.", attrgetter("num_cached_blocks")),
    ("engine_process_resident_memory_bytes", "Resident memory of the engine process.", attrgetter("resident_bytes")),
)
_COUNTERS: tuple[tuple[str, str, Read], ...] = (
    ("prompt_tokens", "Prompt tokens of the requests taken up.", attrgetter("prompt_tokens")),
    ("prompt_tokens_cached", "Prompt tokens that the prefix cache served.", attrgetter("cached_prompt_tokens")),
    ("generation_tokens", "Tokens generated.", attrgetter("generation_tokens")),
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", attrgetter("prefix_query_tokens")),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", attrgetter("cached_prompt_tokens")),
    ("num_preemptions", "Choices that had to give their pages back.", attrgetter("preemptions")),
    ("recomputed_tokens", "Tokens computed again, after a preemption or an engine's death.", attrgetter("recomputed_tokens")),
    ("engine_steps", "Steps planned.", attrgetter("steps")),
    ("engine_process_cpu_seconds", "CPU time of the engine processes.", attrgetter("cpu_seconds")),
)


class EngineCollector(Collector):
    """All that is known of one engine and its device."""

    def __init__(self, families: Families, client: EngineClient, config: ServerConfig) -> None:
        self._families = families
        self._client = client
        self._config = config

    def collect(self) -> Iterator[Metric]:
        families, client, stats = self._families, self._client, self._client.stats
        yield families.gauge("engine_ready", "Whether there is an engine that takes requests.", [((), client.state == "ready")])
        for name, text, read in _GAUGES:
            yield families.gauge(name, text, [((), read(stats))])
        by_reason = {"capacity": stats.num_waiting - stats.num_deferred, "deferred": stats.num_deferred}
        yield families.gauge(
            "num_requests_waiting_by_reason",
            "Choices that wait in the engine: for room, or (deferred) for something else.",
            [((reason,), number) for reason, number in by_reason.items()],
            labels=["reason"],
        )
        for name, text, read in _COUNTERS:
            yield families.counter(name, text, [((), read(stats))])
        yield families.counter("engine_restarts", "Engines that took a dead one's place.", [((), client.num_restarts)])
        yield families.histogram("engine_step_time_seconds", "Time of a step.", STEP_TIME_BOUNDS_S, stats.step_time)
        yield families.histogram("iteration_tokens_total", "Tokens of a step.", STEP_TOKENS_BOUNDS, stats.step_tokens)
        yield from self._devices(stats)
        if client.ready is not None:
            yield from self._facts(client.ready)

    def _devices(self, stats: EngineStats) -> Iterator[Metric]:
        used = [((device.name,), device.memory_used_bytes) for device in stats.devices]
        total = [((device.name,), device.memory_total_bytes) for device in stats.devices]
        busy = [((device.name,), device.utilization) for device in stats.devices if device.utilization is not None]
        label = ["device"]
        yield self._families.gauge("device_memory_used_bytes", "Memory in use on the device.", used, label)
        yield self._families.gauge("device_memory_total_bytes", "Memory of the device.", total, label)
        yield self._families.gauge("device_utilization_ratio", "Share of the time in which it was busy, 0 to 1.", busy, label)

    def _facts(self, ready: EngineReady) -> Iterator[Metric]:
        config = self._config
        cache = {
            "block_size": ready.block_size,
            "num_gpu_blocks": ready.kv_cache_tokens // ready.block_size,
            "cache_dtype": config.kv_cache_dtype,
            "enable_prefix_caching": config.enable_prefix_caching,
            "gpu_memory_utilization": config.gpu_memory_utilization,
        }
        engine = {
            "architecture": ready.architecture,
            "device": ready.device,
            "dtype": ready.dtype,
            "attention_backend": ready.attention_backend,
            "quantization": config.quantization,
            "max_model_len": ready.max_model_len,
            "max_num_seqs": ready.max_num_seqs,
            "max_num_batched_tokens": ready.max_num_batched_tokens,
        }
        for name, text, facts in (
            ("cache_config", "The KV cache.", cache),
            ("engine", "What the engine decided at load.", engine),
        ):
            yield self._families.info(name, text, {key: str(value) for key, value in facts.items()})
