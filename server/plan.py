"""`octavo plan MODEL [flags]`: what serving will take of a device's memory, told from config.json before anything is loaded.

The arithmetic is the engine's own (`engine.memory_plan`). What only a load can show is estimated here: the weights' bytes where
there are no files, and the room that CUDA itself takes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import psutil

from engine.config import EngineConfig, check_quantization
from engine.errors import ConfigError, ModelLoadError
from engine.host_memory import available_bytes
from engine.memory_plan import (
    KVPlan,
    ModelShape,
    activation_bytes,
    bytes_for_pages,
    estimate_kv_groups,
    graph_batch_sizes,
    graph_bytes,
    kv_bytes_per_element,
    model_context,
    plan_kv_cache,
    requests_that_fit,
    weights_of,
)
from engine.model_cache import present_folder
from server.config import has_nvidia_driver, load_config, parse_count
from server.flags import flag_name

CUDA_BYTES = 1_000_000_000  # an estimate of what the driver, the context and its libraries take of a card
SHOWN_LENGTHS = (32768, 8192, 2048, 512)
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Device:
    """The memory to plan for; free_bytes: what Octavo finds there when it starts to load."""

    name: str
    on_gpu: bool
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Plan:
    """All that is said. weights_at_load: before they are quantized or packed, for a moment. kv: None where it does not fit, and
    `problem` says why. requests: (length, how many of that length the pages hold), longest first."""

    config: EngineConfig
    device: Device
    shape: ModelShape
    dtype: str
    weights: int
    weights_at_load: int
    is_estimate: bool
    activations: int
    graphs: int
    pages: int
    bytes_per_token: int
    model_context: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv: KVPlan | None = None
    problem: str = ""
    requests: tuple[tuple[int, int], ...] = ()

    @property
    def usable_bytes(self) -> int:
        """What weights, activations, graphs and pages may take together."""
        if not self.device.on_gpu:
            return self.device.free_bytes
        left = self.device.total_bytes - int(self.device.total_bytes * self.config.cache.gpu_memory_utilization)
        return max(0, self.device.free_bytes - left)


def run_plan(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Prints the plan; 0 where the model fits, 1 where it does not. Raises OctavoError for what cannot be planned at all."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--memory", nargs="?", const="")
    given, rest = parser.parse_known_args(argv)
    memory = None if given.memory is None else _parse_memory(given.memory)
    if memory is not None and not any(argument.split("=")[0] == "--device" for argument in rest):
        rest += ["--device", "cuda"]
    config = load_config(rest, environ, command="plan").engine_config()
    device = find_device(config.device, memory, environ)
    folder = present_folder(config.model)
    plan = make_plan(config, device, folder, _read_config(folder))
    print(describe(plan))
    if plan.kv is None:
        print(f"It does not fit: {plan.problem}; {_advice(plan, folder)}.")
        return 1
    print(f"It fits, with a context of {plan.kv.max_model_len:,} tokens.")
    if plan.kv.max_model_len < plan.model_context and config.model.max_model_len is None:
        print(f"The model knows {plan.model_context:,} tokens: {_advice(plan, folder, full_context=True)}.")
    return 0


def _parse_memory(text: str) -> int:
    try:
        value = parse_count(text)
    except ValueError as error:
        raise ConfigError(f"--memory {error}, got {text!r}", param="memory") from None
    if not isinstance(value, int) or value <= 0:
        raise ConfigError(f"--memory must be above 0, got {text!r}", param="memory")
    return value


def find_device(name: str, memory: int | None, environ: Mapping[str, str]) -> Device:
    """The device that `name` (auto, cpu, cuda) means here; `memory` stands for all its bytes where it is given."""
    on_gpu = name == "cuda" or (name == "auto" and has_nvidia_driver(environ))
    if memory is not None:
        where = "a GPU" if on_gpu else "a machine"
        return Device(f"{where} of {_gb(memory)}", on_gpu, memory, memory - CUDA_BYTES if on_gpu else memory)
    if not on_gpu:
        return Device("this machine's CPU", False, psutil.virtual_memory().total, available_bytes())
    card = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"
    query = ["nvidia-smi", "-i", card, "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        title, total, free = answer.splitlines()[0].rsplit(",", 2)
        return Device(title.strip(), True, int(total) << 20, (int(free) << 20) - CUDA_BYTES)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        raise ConfigError(
            "nvidia-smi names no GPU here: say the memory to plan for with --memory 80G, or plan for a CPU with --device cpu",
            param="device",
        ) from None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} must hold a JSON object")
    return value


def make_plan(config: EngineConfig, device: Device, folder: Path, hf_config: Mapping[str, Any]) -> Plan:
    """Raises ModelLoadError where config.json does not state the sizes, ConfigError for a quantization of other devices."""
    check_quantization(config.model.quantization, on_gpu=device.on_gpu)
    shape = ModelShape.of(hf_config)
    dtype = _dtype(config.model.dtype, device, hf_config)
    width = DTYPE_BYTES[dtype]
    scheduler, cache = config.scheduler, config.cache
    max_num_seqs = scheduler.max_num_seqs or (256 if device.on_gpu else 32)
    max_tokens = scheduler.max_num_batched_tokens or max(8192 if device.on_gpu else 512, max_num_seqs)
    source: dict[str, Any] = {"load_format": config.model.load_format, "bytes_per_element": width}
    weights, is_estimate = weights_of(
        folder, shape, quantization=config.model.quantization, packs_head=not device.on_gpu, **source
    )
    weights_at_load, _ = weights_of(folder, shape, quantization="none", **source)
    activations = activation_bytes(shape, max_num_batched_tokens=max_tokens, max_num_seqs=max_num_seqs, bytes_per_element=width)
    has_graphs = device.on_gpu and config.cuda_graphs
    graphs = graph_bytes(shape, max_num_seqs=max_num_seqs, bytes_per_element=width) if has_graphs else 0
    pages = bytes_for_pages(
        cache,
        on_gpu=device.on_gpu,
        total_bytes=device.total_bytes,
        free_bytes=device.free_bytes,
        weights=weights,
        activations=activations,
        graphs=graphs,
    )
    groups = estimate_kv_groups(hf_config, cache.block_size, kv_bytes_per_element(cache.kv_cache_dtype, width))
    plan = Plan(
        config=config,
        device=device,
        shape=shape,
        dtype=dtype,
        weights=weights,
        weights_at_load=weights_at_load,
        is_estimate=is_estimate,
        activations=activations,
        graphs=graphs,
        pages=pages,
        bytes_per_token=sum(group.bytes_per_block for group in groups) // cache.block_size,
        model_context=model_context(hf_config),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_tokens,
    )
    if problem := _overdrawn(plan):
        return replace(plan, problem=problem)
    depth = scheduler.pipeline_depth
    try:
        kv = plan_kv_cache(
            free_bytes=pages,
            groups=groups,
            block_size=cache.block_size,
            max_model_len=config.model.max_model_len,
            model_context=plan.model_context,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_tokens * (1 + (int(device.on_gpu) if depth is None else depth)),
            num_kv_blocks=cache.num_kv_blocks,
        )
    except ConfigError as error:
        return replace(plan, problem=error.message)
    lengths = (kv.max_model_len, *(length for length in SHOWN_LENGTHS if length < kv.max_model_len))
    counts = tuple((length, requests_that_fit(kv, groups, cache.block_size, length, max_tokens)) for length in lengths)
    return replace(plan, kv=kv, requests=counts)


def _overdrawn(plan: Plan) -> str:
    """Which parts take more than there is, before any page that is not asked for by its bytes; "" where none do."""
    asked = plan.pages if plan.config.cache.kv_cache_memory_bytes is not None else 0
    others = plan.weights + plan.activations + plan.graphs if plan.device.on_gpu else plan.weights
    usable, free = plan.usable_bytes, plan.device.free_bytes
    sums = (
        ("the weights alone", plan.weights, usable),
        ("the weights before they are quantized", plan.weights_at_load, free),
        ("weights, activations and graphs", others, usable),
        ("with the pages that --kv-cache-memory-bytes asks for, they", others + asked, usable),
    )
    return next((f"{what} take {_gb(size)} of {_gb(limit)} there are" for what, size, limit in sums if size > limit), "")


def _dtype(name: str, device: Device, hf_config: Mapping[str, Any]) -> str:
    """What "auto" means on the device, as the loader decides it."""
    if name != "auto":
        return name
    if not device.on_gpu:
        return "bfloat16" if _cpu_runs_bfloat16() else "float32"
    text = hf_config.get("text_config") or hf_config
    stored = str(text.get("dtype") or text.get("torch_dtype") or hf_config.get("dtype") or hf_config.get("torch_dtype"))
    return stored if stored in ("bfloat16", "float16") else "bfloat16"


def _cpu_runs_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Where the CPU multiplies it, or our kernels can be compiled, which need AVX2."""
    try:
        flags = cpuinfo.read_text()
    except OSError:
        return False
    has_compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    return "avx512_bf16" in flags or "amx_bf16" in flags or ("avx2" in flags and has_compiler)


def describe(plan: Plan) -> str:
    """The table of parts, and how many requests of which length the pages hold."""
    config, device = plan.config, plan.device
    share = f", of which Octavo may take {_gb(plan.usable_bytes)}" if device.on_gpu else f", {_gb(device.free_bytes)} free"
    quantized = {"fp8": " with FP8 weights", "int8": " with int8 weights"}.get(config.model.quantization, "")
    title = f"{config.model.model}: {plan.shape.num_layers} layers in {plan.dtype}{quantized}"
    step = (
        f"a step of {plan.max_num_batched_tokens:,} tokens (--max-num-batched-tokens), logits of {plan.max_num_seqs} sequences"
    )
    sizes = f"{len(graph_batch_sizes(plan.max_num_seqs))} batch sizes, up to {plan.max_num_seqs} (--max-num-seqs)"
    stored = "FP8" if config.cache.kv_cache_dtype == "fp8" else plan.dtype
    rows = [
        ("weights", plan.weights, "by the configuration's sizes, an estimate" if plan.is_estimate else "by the files' headers"),
        ("activations", plan.activations, step),
        *([("CUDA graphs", plan.graphs, sizes)] if plan.graphs else []),
        (
            "KV pages",
            plan.kv.kv_cache_bytes if plan.kv else plan.pages,
            f"{plan.bytes_per_token:,} bytes a token in {stored}, {config.cache.block_size} tokens a page",
        ),
    ]
    lines = [f"{title}, on {device.name} ({_gb(device.total_bytes)}{share})"]
    lines += [f"  {name:<12}{_gb(size):>10}  {text}" for name, size, text in rows]
    if plan.kv is not None:
        lines.append(f"  {plan.kv.kv_cache_tokens:,} tokens: {', '.join(_requests(plan))}")
    return "\n".join(lines)


def _requests(plan: Plan) -> Iterator[str]:
    """How many requests run at once by their length, prompt and answer together, down to a length of which all may run."""
    noun = " requests"
    for length, count in plan.requests:
        if count >= plan.max_num_seqs:
            yield f"{plan.max_num_seqs:,}{noun} (--max-num-seqs) of {length:,}"
            return
        yield f"{count:,}{noun} of {length:,}"
        noun = ""


def _advice(plan: Plan, folder: Path, *, full_context: bool = False) -> str:
    """The first change of one flag after which it fits, or after which the whole context does."""
    hf_config = _read_config(folder)
    for flag, change in _changes(plan):
        changed = make_plan(change(plan.config), plan.device, folder, hf_config)
        if changed.kv is not None and (not full_context or changed.kv.max_model_len == plan.model_context):
            if flag == "max_model_len":
                return f"{flag_name(flag)} {changed.kv.max_model_len} fits"
            return f"{flag} {'serves them all' if full_context else 'makes it fit'}"
    if full_context:
        return "no single flag serves them all; more memory would"
    return "no single flag makes it fit: take a smaller model or a device with more memory"


def _changes(plan: Plan) -> Iterator[tuple[str, Callable[[EngineConfig], EngineConfig]]]:
    """Single flags that save memory, the least costly for the user first."""

    def setting(part: str, **fields: Any) -> Callable[[EngineConfig], EngineConfig]:
        def change(config: EngineConfig) -> EngineConfig:
            return msgspec.structs.replace(config, **{part: msgspec.structs.replace(getattr(config, part), **fields)})

        return change

    config = plan.config
    if config.cache.kv_cache_memory_bytes is not None:
        yield "leaving out --kv-cache-memory-bytes", setting("cache", kv_cache_memory_bytes=None)
    if config.cache.num_kv_blocks is not None:
        yield "leaving out --num-kv-blocks", setting("cache", num_kv_blocks=None)
    if config.model.max_model_len is not None:
        yield "max_model_len", setting("model", max_model_len=None)
    if plan.device.on_gpu:
        if config.cache.gpu_memory_utilization < 0.95:
            yield "--gpu-memory-utilization 0.95", setting("cache", gpu_memory_utilization=0.95)
        if plan.max_num_batched_tokens > 2048 >= plan.max_num_seqs:
            yield "--max-num-batched-tokens 2048", setting("scheduler", max_num_batched_tokens=2048, max_num_mixed_tokens=None)
        if config.cache.kv_cache_dtype == "auto":
            yield "--kv-cache-dtype fp8", setting("cache", kv_cache_dtype="fp8")
        if config.model.quantization == "none":
            yield "--quantization fp8", setting("model", quantization="fp8")
        return
    if config.cache.cpu_memory_share < 0.8:
        yield "--cpu-memory-share 0.8", setting("cache", cpu_memory_share=0.8)
    if plan.dtype == "float32":
        yield "--dtype bfloat16", setting("model", dtype="bfloat16")
    if config.model.quantization == "none":
        yield "--quantization int8", setting("model", quantization="int8")


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB"
