"""Puts one engine together: resolve the model, plan the memory, load, allocate pages, warm up. Each phase is timed and told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from engine.attention.base import AttentionBackend, AttentionNeeds, group_layers
from engine.attention.choose import choose_backend
from engine.attention.native import NativeBackend
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.engine_limits import EngineLimits
from engine.errors import ConfigError
from engine.fused_decoder import FusedDecoder
from engine.fusion import fuse, fuse_native, pack_linears, quantize
from engine.grammar_compiler import GrammarCompiler, GrammarSetup
from engine.host_cores import usable_cores
from engine.host_memory import available_bytes
from engine.kernels.compiler import HAS_TRITON, compiling_ahead
from engine.kernels.cpu_library import cpu_kernels, unavailable_reason
from engine.kernels.cpu_ops import CpuKernels, Format
from engine.kernels.toolchain import check_toolchain
from engine.kv_cache_manager import KVCacheManager
from engine.memory_plan import (
    KVPlan,
    ModelShape,
    activation_bytes,
    bytes_for_pages,
    estimate_kv_groups,
    graph_bytes,
    logits_bytes,
    plan_kv_cache,
    weights_of,
)
from engine.messages import EngineReady
from engine.model_files import resolve_model
from engine.model_loader import LoadedModel, load_model, max_context, resolve_dtype
from engine.model_runner import ModelRunner
from engine.model_support import read_config
from engine.native_decoder import NativeDecoder
from engine.scheduler import Scheduler
from engine.step import KVGroupSpec

Report = Callable[[str, str, float | None], None]

MEMORY_WAIT_S = 30.0


class _Phases:
    """The start's phases, told as they begin and timed. seconds: by name."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, detail: str = "") -> Iterator[None]:
        self.report(name, detail, None)
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 3)


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """A model with its pages, ready to run: all of an engine but its core. The scheduler decides what it computes."""

    folder: Path
    runner: ModelRunner
    groups: tuple[KVGroupSpec, ...]
    kv_plan: KVPlan
    limits: EngineLimits
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    ready: EngineReady


def build_engine(config: EngineConfig, report: Report) -> tuple[EngineCore, EngineReady]:
    """The engine of the model that `config` names. Raises OctavoError where it, or the context asked for, cannot be served."""
    engine = load_engine(config, report)
    return _build_core(config, engine), engine.ready


def load_engine(config: EngineConfig, report: Report) -> LoadedEngine:
    """Load the model that `config` names. Raises as `build_engine`."""
    phases = _Phases(report)
    limits = EngineLimits.of(config)
    earlier = config.earlier
    torch.set_num_threads(config.parallel.num_threads or usable_cores())
    if limits.on_gpu and HAS_TRITON:
        check_toolchain()
    free_device_bytes = _wait_for_memory(config, limits, phases) if limits.on_gpu else 0
    kernels = _load_kernels(config, limits, phases)
    with phases.phase("resolve", config.model.model):
        read = partial(read_config, trust_remote_code=config.model.trust_remote_code)
        # Not asked for again when an engine has died: the branch may have moved, and open requests go on with these weights.
        known = Path(earlier.model_dir) if earlier and earlier.model_dir else None
        folder = known if known and known.is_dir() else resolve_model(config.model, report, check_config=read)
        hf_config = read(folder)
        dtype = resolve_dtype(config.model.dtype, limits.device, hf_config, has_kernels=kernels is not None)
        kv_dtype = torch.float8_e4m3fn if config.cache.kv_cache_dtype == "fp8" else dtype
    # Before any weight is read: a context that does not fit is refused here.
    shape = ModelShape.of(hf_config.to_dict())
    free_bytes = _bytes_for_pages(config, shape, folder, dtype, limits)
    estimate = _plan_pages(
        config,
        limits,
        estimate_kv_groups(hf_config.to_dict(), config.cache.block_size, kv_dtype.itemsize),
        free_bytes,
        earlier.max_model_len if earlier else max_context(hf_config.get_text_config(decoder=True)),
        max(earlier.num_blocks) if earlier else None,
    )
    name = f"{config.model.model} {folder.name[:7]}" if folder.parent.name == "snapshots" else folder.name  # a commit's
    with phases.phase("load", f"{name} as {_name(dtype)} on {limits.device}"):
        loaded = load_model(folder, config.model, limits.device, dtype, served_context=estimate.max_model_len)
    groups = group_layers(loaded.layers, config.cache.block_size, kv_dtype.itemsize)
    needs = AttentionNeeds(loaded.layers, groups, config.cache.block_size, dtype, limits.device, kv_dtype)
    backend = _build_backend(config, limits, needs, report)
    with phases.phase("fuse" if limits.on_gpu else "pack"):
        fused = _fuse(config, loaded, backend, kernels, estimate.max_model_len, limits)
    runner = _build_runner(config, limits, loaded, backend, len(groups), estimate.max_model_len, fused)
    if limits.on_gpu:
        free_bytes = _measure_free_bytes(config, limits, shape, needs, backend, runner, phases)
    with phases.phase("allocate pages"):
        blocks = earlier.num_blocks if earlier else None
        kv_plan = _plan_pages(config, limits, groups, free_bytes, estimate.max_model_len, blocks)
        backend.allocate(kv_plan.num_blocks)
    with phases.phase("warm up"):
        runner.warm_up()
    notes = estimate.notes + kv_plan.notes
    if kernels is not None and config.model.quantization == "none":
        notes.append("--quantization int8 makes this CPU faster, at about 0.5% of perplexity (docs/performance.md)")
    ready = _ready(config, limits, loaded, folder, kv_plan, notes, phases.seconds, backend.name)
    return LoadedEngine(
        folder=folder,
        runner=runner,
        groups=groups,
        kv_plan=kv_plan,
        limits=limits,
        vocab_size=loaded.vocab_size,
        eos_token_ids=tuple(loaded.eos_token_ids),
        ready=msgspec.structs.replace(ready, free_device_bytes=free_device_bytes),
    )


def _plan_pages(
    config: EngineConfig,
    limits: EngineLimits,
    groups: tuple[KVGroupSpec, ...],
    free_bytes: int,
    context: int,
    num_kv_blocks: Sequence[int] | int | None = None,
) -> KVPlan:
    """Pages in free_bytes, for the context asked for, or the largest up to `context` that fits."""
    return plan_kv_cache(
        free_bytes=free_bytes,
        groups=groups,
        block_size=config.cache.block_size,
        max_model_len=config.model.max_model_len,
        model_context=context,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens * (1 + limits.pipeline_depth),
        num_kv_blocks=num_kv_blocks or config.cache.num_kv_blocks,
    )


def _wait_for_memory(config: EngineConfig, limits: EngineLimits, phases: _Phases) -> int:
    """Bytes free on the card before anything is loaded. A dead engine's memory comes back some time after its end: as much as
    that one found is waited for, within reason, since others may have taken some meanwhile."""
    free, total = torch.cuda.mem_get_info(limits.device)
    if config.earlier is None:
        return free
    enough = config.earlier.free_device_bytes - total // 100
    with phases.phase("wait for memory"):
        deadline_s = time.monotonic() + MEMORY_WAIT_S
        while free < enough and time.monotonic() < deadline_s:
            time.sleep(0.1)
            free, _ = torch.cuda.mem_get_info(limits.device)
    return free


def _build_backend(config: EngineConfig, limits: EngineLimits, needs: AttentionNeeds, report: Report) -> AttentionBackend:
    """Without pages yet."""
    requested = config.attention_backend
    if requested == "auto" and not limits.on_gpu and not config.cpu_kernels:
        requested = "sdpa"
    backend_class, reason = choose_backend(requested, needs)
    report("attention", f"{backend_class.name}: {reason}", None)
    own: dict[str, Any] = {}
    if backend_class.name == "triton":
        own = {"kv_dtype": needs.kv_cache_dtype, "max_num_seqs": limits.max_num_seqs}
    return backend_class(needs.layers, needs.groups, needs.block_size, needs.dtype, needs.device, **own)


def _build_runner(
    config: EngineConfig,
    limits: EngineLimits,
    loaded: LoadedModel,
    backend: AttentionBackend,
    num_groups: int,
    max_model_len: int,
    fused: FusedDecoder | NativeDecoder | None,
) -> ModelRunner:
    return ModelRunner(
        loaded.model,
        backend,
        vocab_size=loaded.vocab_size,
        num_groups=num_groups,
        max_num_seqs=limits.max_num_seqs,
        max_model_len=max_model_len,
        block_size=config.cache.block_size,
        device=limits.device,
        fused=fused,
        on_device=limits.on_gpu and backend.name != "sdpa",
        use_graphs=config.cuda_graphs,
    )


def _measure_free_bytes(
    config: EngineConfig,
    limits: EngineLimits,
    shape: ModelShape,
    needs: AttentionNeeds,
    backend: AttentionBackend,
    runner: ModelRunner,
    phases: _Phases,
) -> int:
    """Memory for KV pages on a card, after its kernels are compiled and a step has been profiled on a page a group."""
    backend.allocate([1] * len(needs.groups))
    with phases.phase("compile kernels"), compiling_ahead():
        runner.warm_up()
    with phases.phase("profile a step"):
        step_bytes = runner.profile(limits.max_num_batched_tokens)
        return _bytes_after_profile(config, shape, needs.dtype, limits, step_bytes)


def _fuse(
    config: EngineConfig,
    loaded: LoadedModel,
    backend: AttentionBackend,
    kernels: CpuKernels | None,
    max_model_len: int,
    limits: EngineLimits,
) -> FusedDecoder | NativeDecoder | None:
    """The fused decoder, where device, backend and model have one, with its weights quantized if asked for."""
    with torch.inference_mode():
        if not limits.on_gpu:
            return _fuse_on_cpu(config, loaded, backend, kernels, max_model_len)
        fused = fuse(loaded.model, loaded.layers, max_model_len) if hasattr(backend, "rotate_and_write") else None
        if config.model.quantization == "fp8":
            try:
                quantize(loaded.model, fused)
            except ValueError as error:
                raise ConfigError(f"quantization fp8 cannot be used: {error}", param="quantization") from None
    return fused


def _fuse_on_cpu(
    config: EngineConfig, loaded: LoadedModel, backend: AttentionBackend, kernels: CpuKernels | None, max_model_len: int
) -> NativeDecoder | None:
    """Pack the weights: of the whole decoder for the compiled kernels where they know it, else of every linear by itself."""
    format: Format
    if config.model.quantization == "int8":
        format = "int8"
    elif loaded.dtype in (torch.float32, torch.bfloat16):
        format = "float32" if loaded.dtype == torch.float32 else "bfloat16"
    else:
        return None
    native = None
    if kernels is not None and isinstance(backend, NativeBackend):
        native = fuse_native(loaded.model, loaded.layers, max_model_len, kernels, backend, format)
    if native is not None:
        # What is left to torch is small: a second team of threads would only wait for the cores that the kernels' has.
        torch.set_num_threads(1)
    pack_linears(loaded.model, kernels, format, head_only=native is not None)
    return native


def _load_kernels(config: EngineConfig, limits: EngineLimits, phases: _Phases) -> CpuKernels | None:
    """The compiled kernels of a CPU, built if need be. Without them everything runs by torch, and the log says why."""
    if limits.on_gpu:
        return None
    with phases.phase("CPU kernels"):
        why = unavailable_reason() if config.cpu_kernels else "switched off by --no-cpu-kernels"
        if why is None:
            return cpu_kernels()
    phases.report("CPU kernels", f"none: {why}", None)
    return None


def _build_core(config: EngineConfig, engine: LoadedEngine) -> EngineCore:
    limits = engine.limits
    kv_cache = KVCacheManager(
        engine.groups,
        engine.kv_plan.num_blocks,
        block_size=config.cache.block_size,
        max_step_tokens=limits.max_num_batched_tokens * (1 + limits.pipeline_depth),
        enable_prefix_caching=config.cache.enable_prefix_caching,
    )
    scheduler = Scheduler(
        kv_cache,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_num_mixed_tokens=limits.max_num_mixed_tokens,
        max_model_len=engine.kv_plan.max_model_len,
    )
    return EngineCore(
        scheduler,
        engine.runner,
        vocab_size=engine.vocab_size,
        eos_token_ids=frozenset(engine.eos_token_ids),
        pipeline_depth=limits.pipeline_depth,
        grammars=GrammarCompiler(GrammarSetup(str(engine.folder), engine.vocab_size, list(engine.eos_token_ids))),
    )


def _bytes_for_pages(config: EngineConfig, shape: ModelShape, folder: Path, dtype: torch.dtype, limits: EngineLimits) -> int:
    """Memory for KV pages, told before the weights are loaded: the same arithmetic as `octavo plan`."""
    weights, _ = weights_of(
        folder,
        shape,
        load_format=config.model.load_format,
        quantization=config.model.quantization,
        bytes_per_element=dtype.itemsize,
        packs_head=not limits.on_gpu,
    )
    free, total = torch.cuda.mem_get_info(limits.device) if limits.on_gpu else (available_bytes(), 0)
    return bytes_for_pages(
        config.cache,
        on_gpu=limits.on_gpu,
        total_bytes=total,
        free_bytes=free,
        weights=weights,
        activations=activation_bytes(
            shape,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_num_seqs=limits.max_num_seqs,
            bytes_per_element=dtype.itemsize,
        ),
        graphs=_graph_bytes(config, shape, dtype, limits),
    )


def _graph_bytes(config: EngineConfig, shape: ModelShape, dtype: torch.dtype, limits: EngineLimits) -> int:
    if not config.cuda_graphs:
        return 0
    return graph_bytes(shape, max_num_seqs=limits.max_num_seqs, bytes_per_element=dtype.itemsize)


def _bytes_after_profile(
    config: EngineConfig, shape: ModelShape, dtype: torch.dtype, limits: EngineLimits, step_bytes: int
) -> int:
    """Memory for KV pages, from what the card says is free with the weights on it, and what a step was seen to take."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(limits.device)
    return bytes_for_pages(
        config.cache,
        on_gpu=True,
        total_bytes=total,
        free_bytes=free,
        weights=0,
        activations=step_bytes + logits_bytes(shape, limits.max_num_seqs),
        graphs=_graph_bytes(config, shape, dtype, limits),
    )


def _ready(
    config: EngineConfig,
    limits: EngineLimits,
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
        hidden_size=int(loaded.config.hidden_size),
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
