"""Puts one engine together: resolve the model, plan the memory, load, allocate pages, warm up. Each phase is timed and told."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.attention.base import group_layers
from engine.attention.choose import choose_backend
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.cuda_graphs import buckets
from engine.errors import ConfigError
from engine.fusion import fuse, quantize
from engine.host_memory import available_bytes
from engine.kv_cache_manager import KVCacheManager
from engine.memory_plan import KVPlan, estimate_kv_groups, estimate_weight_bytes, plan_kv_cache
from engine.messages import EngineReady
from engine.model_files import resolve_model
from engine.model_loader import LoadedModel, load_model, max_context, resolve_dtype
from engine.model_runner import ModelRunner
from engine.model_support import read_config
from engine.scheduler import Scheduler
from engine.step import KVGroupSpec

Report = Callable[[str, str, float | None], None]

_BYTES_PER_LAUNCH = 16 << 10  # of a recorded kernel launch, device side, generously
_GENERAL_SAMPLING_COPIES = 5  # float32 logits, as the general path holds at once: raw, scaled, probabilities, noise, logprobs


@dataclass(frozen=True, slots=True)
class _Limits:
    """What the configuration leaves to the device: its defaults, resolved."""

    device: torch.device
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_mixed_tokens: int
    pipeline_depth: int


def build_engine(config: EngineConfig, report: Report) -> tuple[EngineCore, EngineReady]:
    """Load the model that `config` names. Raises OctavoError where it, or the context asked for, cannot be served."""
    seconds: dict[str, float] = {}

    @contextmanager
    def phase(name: str, detail: str = "") -> Iterator[None]:
        report(name, detail, None)
        started = time.monotonic()
        yield
        seconds[name] = round(time.monotonic() - started, 3)

    limits = _limits(config)
    torch.set_num_threads(config.parallel.num_threads or _usable_cores())
    with phase("resolve", config.model.model):
        folder = resolve_model(config.model, report)
        hf_config = read_config(folder)
        dtype = resolve_dtype(config.model.dtype, limits.device, hf_config)
        kv_dtype = torch.float8_e4m3fn if config.cache.kv_cache_dtype == "fp8" else dtype
    model_context = max_context(hf_config.get_text_config(decoder=True))

    def plan(groups: tuple[KVGroupSpec, ...], free_bytes: int, max_model_len: int | None, context: int) -> KVPlan:
        return plan_kv_cache(
            free_bytes=free_bytes,
            groups=groups,
            block_size=config.cache.block_size,
            max_model_len=max_model_len,
            model_context=context,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens * (1 + limits.pipeline_depth),
            num_kv_blocks=config.cache.num_kv_blocks,
        )

    # Before any weight is read: a context that does not fit is refused here.
    expected_bytes = _bytes_for_pages(config, folder, dtype, limits)
    estimate = plan(
        estimate_kv_groups(hf_config.to_dict(), config.cache.block_size, kv_dtype.itemsize),
        expected_bytes,
        config.model.max_model_len,
        model_context,
    )
    with phase("load", f"{folder.name} as {_name(dtype)} on {limits.device}"):
        loaded = load_model(folder, config.model, limits.device, dtype, served_context=estimate.max_model_len)
    groups = group_layers(loaded.layers, config.cache.block_size, kv_dtype.itemsize)
    backend_class, reason = choose_backend(
        config.attention_backend,
        layers=loaded.layers,
        groups=groups,
        block_size=config.cache.block_size,
        dtype=dtype,
        device=limits.device,
        kv_cache_dtype=config.cache.kv_cache_dtype,
    )
    report("attention", f"{backend_class.name}: {reason}", None)
    own: dict[str, Any] = {"kv_dtype": kv_dtype, "max_num_seqs": limits.max_num_seqs} if backend_class.name == "triton" else {}
    backend = backend_class(loaded.layers, groups, config.cache.block_size, dtype, limits.device, **own)
    on_gpu = limits.device.type == "cuda"
    fused = None
    if on_gpu:
        with phase("fuse"), torch.inference_mode():
            if hasattr(backend, "rotate_and_write"):
                fused = fuse(loaded.model, loaded.layers, estimate.max_model_len)
            if config.model.quantization == "fp8":
                quantize(loaded.model, fused)
    elif config.model.quantization != "none":
        raise ConfigError("quantization fp8 needs a GPU: leave it out on a CPU", param="quantization")
    runner = ModelRunner(
        loaded.model,
        backend,
        vocab_size=loaded.vocab_size,
        num_groups=len(groups),
        max_num_seqs=limits.max_num_seqs,
        max_model_len=estimate.max_model_len,
        block_size=config.cache.block_size,
        device=limits.device,
        fused=fused,
        on_device=on_gpu and backend.name != "sdpa",
        use_graphs=config.cuda_graphs,
    )
    free_bytes, max_model_len, context = expected_bytes, config.model.max_model_len, estimate.max_model_len
    if on_gpu:
        backend.allocate([1] * len(groups))
        with phase("compile kernels"):
            runner.warm_up()
        if config.cache.kv_cache_memory_bytes is None:
            with phase("profile a step"):
                step_bytes = runner.profile(limits.max_num_batched_tokens)
                free_bytes = _free_after_profile(config, limits, loaded, step_bytes)
    with phase("allocate pages"):
        kv_plan = plan(groups, free_bytes, max_model_len, context)
        backend.allocate(kv_plan.num_blocks)
    with phase("warm up"):
        runner.warm_up()
    kv_cache = KVCacheManager(
        groups,
        kv_plan.num_blocks,
        block_size=config.cache.block_size,
        max_step_tokens=limits.max_num_batched_tokens * (1 + limits.pipeline_depth),
        enable_prefix_caching=config.cache.enable_prefix_caching,
    )
    scheduler = Scheduler(
        kv_cache,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_num_mixed_tokens=limits.max_num_mixed_tokens,
        max_model_len=kv_plan.max_model_len,
    )
    core = EngineCore(
        scheduler,
        runner,
        vocab_size=loaded.vocab_size,
        eos_token_ids=frozenset(loaded.eos_token_ids),
        pipeline_depth=limits.pipeline_depth,
    )
    report("started", ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()), None)
    return core, _ready(config, limits, loaded, folder, kv_plan, estimate.notes + kv_plan.notes, seconds, backend.name)


def _limits(config: EngineConfig) -> _Limits:
    """Raises ConfigError where a device is asked for that is not there, or the limits contradict each other."""
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise ConfigError("device is cuda, but torch finds no usable CUDA device; use --device cpu or auto", param="device")
    on_gpu = has_cuda if config.device == "auto" else config.device == "cuda"
    scheduler = config.scheduler
    max_num_seqs = scheduler.max_num_seqs or (256 if on_gpu else 32)
    max_num_batched_tokens = scheduler.max_num_batched_tokens or max(8192 if on_gpu else 512, max_num_seqs)
    if max_num_batched_tokens < max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens ({max_num_batched_tokens}) must be at least max_num_seqs ({max_num_seqs}), "
            "so that every running sequence can get a token in each step",
            param="max_num_batched_tokens",
        )
    depth = scheduler.pipeline_depth
    return _Limits(
        device=torch.device("cuda" if on_gpu else "cpu"),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_mixed_tokens=scheduler.max_num_mixed_tokens
        or (max(min(2048, max_num_batched_tokens), max_num_seqs) if on_gpu else max_num_batched_tokens),
        pipeline_depth=depth if depth is not None else int(on_gpu),
    )


def _usable_cores() -> int:
    """The cores this process may run on, where the system tells; all of them elsewhere."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _bytes_for_pages(config: EngineConfig, folder: Path, dtype: torch.dtype, limits: _Limits) -> int:
    """Memory for KV pages, told before the weights are loaded: what they will leave, and of that the configured share."""
    if config.cache.kv_cache_memory_bytes is not None:
        return config.cache.kv_cache_memory_bytes
    weights = estimate_weight_bytes(folder, dtype.itemsize) or 0
    if limits.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(limits.device)
        reserve = total - int(total * config.cache.gpu_memory_utilization)
        return max(0, free - reserve - weights - _activation_bytes(folder, dtype, limits))
    return max(0, int((available_bytes() - weights) * config.cache.cpu_memory_share))


def _free_after_profile(config: EngineConfig, limits: _Limits, loaded: LoadedModel, step_bytes: int) -> int:
    """Memory for KV pages, from what the card says is free now: less what a step was seen to take, the graphs, the general
    sampling path, and the share of the card that is not ours to take."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(limits.device)
    reserve = total - int(total * config.cache.gpu_memory_utilization)
    sampling = _GENERAL_SAMPLING_COPIES * 4 * limits.max_num_seqs * loaded.vocab_size
    graphs = _graph_bytes(loaded, limits) if config.cuda_graphs else 0
    return max(0, free - reserve - step_bytes - sampling - graphs)


def _graph_bytes(loaded: LoadedModel, limits: _Limits) -> int:
    """Set aside for CUDA graphs: one pool of temporaries for the largest batch, and the recorded launches of each bucket."""
    launches = 16 * len(loaded.layers) * len(buckets(limits.max_num_seqs))
    text = loaded.config
    width = 8 * text.hidden_size + 4 * (getattr(text, "intermediate_size", None) or 4 * text.hidden_size) + loaded.vocab_size
    return int(launches * _BYTES_PER_LAUNCH + limits.max_num_seqs * width * loaded.dtype.itemsize)


def _activation_bytes(folder: Path, dtype: torch.dtype, limits: _Limits) -> int:
    """An upper estimate of a step's temporaries: the widest layer's activations for every token, and float32 logits."""
    text = read_config(folder).get_text_config()
    widest = 4 * text.hidden_size + 3 * (getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
    logits = 3 * 4 * limits.max_num_seqs * text.vocab_size
    return int(2 * limits.max_num_batched_tokens * widest * dtype.itemsize + logits)


def _ready(
    config: EngineConfig,
    limits: _Limits,
    loaded: LoadedModel,
    folder: Path,
    kv_plan: KVPlan,
    notes: list[str],
    seconds: dict[str, float],
    backend_name: str,
) -> EngineReady:
    return EngineReady(
        model_dir=str(folder),
        architecture=loaded.architecture,
        device=str(limits.device),
        dtype=_name(loaded.dtype),
        attention_backend=backend_name,
        vocab_size=loaded.vocab_size,
        max_model_len=kv_plan.max_model_len,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        block_size=config.cache.block_size,
        num_blocks=kv_plan.num_blocks,
        kv_cache_bytes=kv_plan.kv_cache_bytes,
        kv_cache_tokens=kv_plan.kv_cache_tokens,
        eos_token_ids=sorted(loaded.eos_token_ids),
        generation_defaults=loaded.generation_defaults,
        load_seconds=seconds,
        notes=notes,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
