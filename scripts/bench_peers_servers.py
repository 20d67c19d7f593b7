"""The servers that bench_peers.py compares: their command lines, their start and end, their memory and processor time.

A server is named family-precision, as in octavo-int8, llama-q8_0 or vllm-bf16. Every one gets its best setting as far as we
found it; what was tried stands beside it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from bench_process import Server, kill, octavo_command, octavo_environ, process_tree, running

MODEL_NAME = "bench"
MAX_SEQS = 16
SLOT_TOKENS = 1024  # llama.cpp divides its context among the slots; the longest request here has 592
SAME_PRECISION = {"bf16": "bf16", "f16": "bf16", "int8": "int8", "q8_0": "int8", "float32": "float32", "f32": "float32"}
"""Which precisions of weights are of one size, by a class's name."""


class NotInstalled(Exception):
    """The server is not on this machine; the message says what was looked for."""


@dataclass(frozen=True)
class Setup:
    """What the command lines depend on. The paths of peers are None where the user named none."""

    model: str
    model_folder: Path
    cpus: tuple[int, ...]
    llama_server: Path | None = None
    llama_models: Path | None = None
    vllm_python: Path | None = None
    vllm_int8_model: Path | None = None
    transformers_python: Path | None = None
    extra_args: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Further arguments, by family."""


@dataclass(frozen=True)
class Command:
    """How to start one server on a port; `model` is what requests must ask for."""

    argv: tuple[str, ...]
    environ: dict[str, str] = field(default_factory=dict)
    model: str = MODEL_NAME
    extra_body: dict[str, Any] = field(default_factory=dict)
    has_ignore_eos: bool = True


def precision_of(name: str) -> str:
    """The precision's class of a server's name, of SAME_PRECISION's values."""
    return SAME_PRECISION[name.partition("-")[2]]


def octavo(precision: str, setup: Setup, port: int) -> Command:
    """`octavo serve` of this checkout, as a user starts it, but for the size of its cache: the peers' are as large."""
    flags = {
        "bf16": ("--dtype", "bfloat16"),
        "float32": ("--dtype", "float32"),
        "int8": ("--quantization", "int8"),
    }[precision]
    argv = [*octavo_command(setup.model, port, MODEL_NAME), *flags, "--device", "cpu", "--kv-cache-memory-bytes", "1G"]
    return Command(tuple(argv), octavo_environ())


def llama(precision: str, setup: Setup, port: int) -> Command:
    """llama.cpp's server: as many slots as requests, physical batches of a whole prompt, and no menu of a web page."""
    if setup.llama_server is None or not setup.llama_server.is_file():
        raise NotInstalled(f"no llama-server at {setup.llama_server}: name one with --llama-server")
    files = sorted((setup.llama_models or Path(".")).glob("*.gguf"))
    matching = [file for file in files if file.stem.lower().endswith(f"-{precision}")]
    if not matching:
        raise NotInstalled(f"no *-{precision}.gguf in {setup.llama_models}: name the folder with --llama-models")
    argv = [setup.llama_server, "-m", matching[0], "--host", "127.0.0.1", "--port", port, "--alias", MODEL_NAME]
    argv += ["-np", MAX_SEQS, "-c", MAX_SEQS * SLOT_TOKENS, "-t", len(setup.cpus), "-tb", len(setup.cpus)]
    argv += ["-b", 2048, "-ub", 512, "-fa", "on"]
    return Command(tuple(map(str, argv)))


def vllm(precision: str, setup: Setup, port: int) -> Command:
    """vLLM's CPU build, a thread on every core it may use."""
    if setup.vllm_python is None or not setup.vllm_python.is_file():
        raise NotInstalled(f"no Python at {setup.vllm_python}: name vLLM's with --vllm-python")
    model, dtype = setup.model_folder, {"bf16": "bfloat16", "float32": "float32", "int8": "bfloat16"}[precision]
    if precision == "int8":
        if setup.vllm_int8_model is None or not setup.vllm_int8_model.is_dir():
            raise NotInstalled(f"no folder {setup.vllm_int8_model}: name a W8A8 checkpoint with --vllm-int8-model")
        model = setup.vllm_int8_model
    argv = [setup.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--dtype", dtype]
    argv += ["--host", "127.0.0.1", "--port", port, "--served-model-name", MODEL_NAME, "--max-num-seqs", MAX_SEQS]
    argv += ["--max-model-len", 2048, "--enable-prefix-caching"]
    environ = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, setup.cpus)),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    libraries = [setup.vllm_python.parent.parent / "lib" / name for name in ("libtcmalloc_minimal.so.4", "libiomp5.so")]
    if preload := [str(path) for path in libraries if path.is_file()]:
        environ["LD_PRELOAD"] = ":".join(preload)  # vLLM's own advice
    return Command(tuple(map(str, argv)), environ)


def transformers(precision: str, setup: Setup, port: int) -> Command:
    """`transformers serve` with its continuous batching. It knows no ignore_eos: no token of its vocabulary ends a text."""
    if setup.transformers_python is None or not setup.transformers_python.is_file():
        raise NotInstalled(f"no Python at {setup.transformers_python}: name its Python with --transformers-python")
    dtype = {"bf16": "bfloat16", "float32": "float32"}[precision]
    argv = [setup.transformers_python, "-m", "transformers.cli.transformers", "serve", setup.model_folder]
    argv += ["--continuous-batching", "--dtype", dtype, "--device", "cpu", "--host", "127.0.0.1", "--port", port]
    environ = {"OMP_NUM_THREADS": str(len(setup.cpus)), "HF_HUB_OFFLINE": "1"}
    return Command(
        tuple(map(str, argv)),
        environ,
        model=str(setup.model_folder),
        extra_body={"generation_config": '{"do_sample": false, "eos_token_id": -1}'},
        has_ignore_eos=False,
    )


FAMILIES: dict[str, tuple[Callable[[str, Setup, int], Command], tuple[str, ...]]] = {
    "octavo": (octavo, ("bf16", "int8", "float32")),
    "llama": (llama, ("bf16", "q8_0", "f16", "f32")),
    "vllm": (vllm, ("bf16", "int8", "float32")),
    "transformers": (transformers, ("bf16", "float32")),
}
"""By family: its command and the precisions it comes in."""

SERVERS = tuple(f"{family}-{precision}" for family, (_, precisions) in FAMILIES.items() for precision in precisions)


def command_of(name: str, setup: Setup, port: int) -> Command:
    """The command line of one of SERVERS. Raises NotInstalled."""
    family, _, precision = name.partition("-")
    command = FAMILIES[family][0](precision, setup, port)
    return replace(command, argv=(*command.argv, *setup.extra_args.get(family, ())))


def serving(command: Command, port: int, cpus: Sequence[int], caches: Path, log: Path) -> AbstractContextManager[Server]:
    """The server on its cores. What a peer compiles and keeps for its next start goes to `caches`, not to the user's own cache;
    ours stays where scripts/install put it."""
    environ = {
        "XDG_CACHE_HOME": str(caches),
        "VLLM_CACHE_ROOT": str(caches / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
    }
    return running(command.argv, environ | command.environ, port, log, cpus)


@contextmanager
def time_limit(server: Server, seconds: float) -> Iterator[None]:
    """Kills the server's processes when the block takes longer, so that its clients get errors and the benchmark goes on."""
    timer = threading.Timer(seconds, lambda: kill(process_tree(server.process.pid)))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def memory_peak_bytes(server: Server) -> int:
    """The peaks of resident memory of the server's present processes together: a little more than their common peak."""
    return sum(map(_peak_bytes, process_tree(server.process.pid)))


def _peak_bytes(process: psutil.Process) -> int:
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    with suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


def cpu_seconds(server: Server) -> float:
    """Processor time that the server's present processes have used."""
    total = 0.0
    for process in process_tree(server.process.pid):
        with suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total
