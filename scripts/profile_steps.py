#!/usr/bin/env python3
"""Where a step's time goes: the whole engine in one process, its real loop, under torch's profiler.

    scripts/profile_steps.py llama-3.1-8b                                   # 256 requests decoding, 30 steps; needs a CUDA GPU
    scripts/profile_steps.py llama-3.1-8b --num-seqs 1 --input-len 128
    scripts/profile_steps.py FOLDER --load-format auto --mixed 5 --out profile.json --trace trace.json

The model is a folder, or a shape of dummy_model.py, which is then written to a scratch folder. All prompts are admitted and all
graphs captured before anything is measured. Measured twice: by the clock alone, for the time of a step and the host's parts of
it; then with the profiler, which makes both a little longer, for what the device does. The device is idle while no kernel, copy
or memset runs, between the first and the last: in all, and counting only gaps of at least 5 µs, since shorter ones lie
between the kernels of a graph. Without a GPU (--device cpu) only the host's part is told.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import msgspec
import torch
from dummy_model import SHAPES, write_model

from engine.build import build_engine
from engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from engine.core import EngineCore
from engine.messages import (
    AddRequest,
    EngineMessage,
    EngineReady,
    FrontendMessage,
    Refused,
    RequestOutput,
    StepOutputs,
)
from engine.process import EngineLoop, FrontendSocket
from engine.sampling_params import SamplingParams
from engine.step import HostMasks, ModelRunnerOutput, PendingOutput, SchedulerOutput

IDLE_GOAL = 0.03  # at 256 decoding
GAP_US = 5.0  # launches within a graph follow each other in 1 to 2
SETTLE_STEPS = 10
FRONTEND = b"profile"
HOST_PARTS = ("receive", "schedule", "launch", "sample", "wait", "update", "send")
DEVICE_CATEGORIES = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
NAME_WIDTH = 72
T = TypeVar("T")


# -- what the device did ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Work:
    """A kernel, copy or memset; times in microseconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Of the time from the first work's start to the last one's end, in microseconds: none of it runs for `idle`, of which
    `idle_in_gaps` in gaps of at least GAP_US."""

    span: float
    idle: float
    idle_in_gaps: float
    longest_gap: float
    num_gaps: int

    @property
    def idle_share(self) -> float:
        return self.idle / self.span

    @property
    def gap_share(self) -> float:
        return self.idle_in_gaps / self.span


@dataclass(frozen=True, slots=True)
class KernelTime:
    """All work of one name, by step. share: of the span; kernels that run side by side add up to more than all of it."""

    name: str
    calls: float
    us: float
    share: float


def device_work(trace: dict[str, Any]) -> list[Work]:
    """What ran on the device according to a trace in Chrome's format, in order of start."""
    found = [
        Work(str(event["name"]), float(event["ts"]), float(event["ts"]) + float(event.get("dur", 0.0)))
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in DEVICE_CATEGORIES
    ]
    return sorted(found, key=lambda work: work.start)


def occupancy(works: Sequence[Work], gap_us: float = GAP_US) -> Occupancy:
    """Of works in order of start, on whatever streams: time covered by several counts once."""
    gaps = []
    end = works[0].start
    for work in works:
        if work.start > end:
            gaps.append(work.start - end)
        end = max(end, work.end)
    large = [gap for gap in gaps if gap >= gap_us]
    return Occupancy(end - works[0].start, sum(gaps), sum(large), max(gaps, default=0.0), len(large))


def by_kernel(works: Iterable[Work], num_steps: int, span: float) -> list[KernelTime]:
    """The most time first."""
    calls: dict[str, int] = defaultdict(int)
    seconds: dict[str, float] = defaultdict(float)
    for work in works:
        calls[work.name] += 1
        seconds[work.name] += work.end - work.start
    return [
        KernelTime(name, calls[name] / num_steps, us / num_steps, us / span)
        for name, us in sorted(seconds.items(), key=lambda item: -item[1])
    ]


def kernel_table(kernels: Sequence[KernelTime], limit: int) -> str:
    """Markdown. What is past the limit is one line."""
    shown, rest = list(kernels[:limit]), kernels[limit:]
    if rest:
        sums = (sum(getattr(kernel, field) for kernel in rest) for field in ("calls", "us", "share"))
        shown.append(KernelTime(f"{len(rest)} others", *sums))
    lines = ["| kernel | calls a step | µs a call | µs a step | share |", "|---|---|---|---|---|"]
    for kernel in shown:
        name = kernel.name if len(kernel.name) <= NAME_WIDTH else f"{kernel.name[: NAME_WIDTH - 1]}…"
        name = name.replace("|", "¦")
        a_call = kernel.us / kernel.calls
        lines.append(f"| {name} | {kernel.calls:.1f} | {a_call:.1f} | {kernel.us:,.0f} | {100 * kernel.share:.1f}% |")
    return "\n".join(lines)


def idle_line(found: Occupancy, num_seqs: int) -> str:
    verdict = ""
    if num_seqs >= 256:
        verdict = f"; goal < {100 * IDLE_GOAL:.0f}%: {'reached' if found.idle_share < IDLE_GOAL else 'missed'}"
    return (
        f"Device idle {100 * found.idle_share:.2f}% of {found.span / 1e3:.1f} ms; in {found.num_gaps} gaps of {GAP_US:.0f} µs "
        f"or more {100 * found.gap_share:.2f}%, the longest {found.longest_gap:,.0f} µs{verdict}"
    )


# -- what the host did ------------------------------------------------------------------------------------------------


class HostClock:
    """Seconds of each step by part; wraps the core, its scheduler and its runner."""

    def __init__(self, core: EngineCore, socket: QueueSocket) -> None:
        self.steps: list[dict[str, float]] = []
        self.sizes: list[tuple[int, int]] = []  # rows and tokens of each step that was launched
        self._seconds: dict[str, float] = {}
        self._last_end = time.perf_counter()
        scheduler, runner = core._scheduler, core._runner
        step, launch, sample = core.step, self._timed("launch", runner.launch), self._timed("sample", runner.sample)

        def counted_step() -> list[RequestOutput]:
            outputs = step()
            now = time.perf_counter()
            self.steps.append({**self._seconds, "total": now - self._last_end})
            self._seconds, self._last_end = {}, now
            return outputs

        def counted_launch(plan: SchedulerOutput) -> None:
            self.sizes.append((len(plan.slots), plan.total_num_tokens))
            launch(plan)

        def sample_with_timed_wait(masks: HostMasks | None) -> PendingOutput:
            pending = sample(masks)
            return _TimedOutput(pending, self._timed("wait", pending.wait))

        wrapped: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
            (core, "step", counted_step),
            (scheduler, "schedule", self._timed("schedule", scheduler.schedule)),
            (scheduler, "update", self._timed("update", scheduler.update)),
            (runner, "launch", counted_launch),
            (runner, "sample", sample_with_timed_wait),
            (socket, "receive", self._timed("receive", socket.receive)),
            (socket, "send", self._timed("send", socket.send)),
        )
        for owner, name, method in wrapped:
            setattr(owner, name, method)

    def _timed(self, part: str, function: Callable[..., T]) -> Callable[..., T]:
        def call(*args: Any) -> T:
            started = time.perf_counter()
            try:
                return function(*args)
            finally:
                self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - started

        return call

    def restart(self) -> None:
        """Forget what was; the next step counts from now."""
        self.steps.clear()
        self.sizes.clear()
        self._seconds, self._last_end = {}, time.perf_counter()


class _TimedOutput:
    """A step.PendingOutput with another `wait`."""

    def __init__(self, pending: PendingOutput, wait: Callable[[], ModelRunnerOutput]) -> None:
        self._pending = pending
        self.wait = wait

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pending, name)


def host_parts(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Microseconds of the median step by part; "busy" is all but waiting, for the device or for what may arrive meanwhile."""
    busy = [{**step, "busy": step["total"] - step.get("wait", 0.0) - step.get("receive", 0.0)} for step in steps]
    return {part: 1e6 * statistics.median(step.get(part, 0.0) for step in busy) for part in (*HOST_PARTS, "busy", "total")}


def host_line(parts: dict[str, float]) -> str:
    return "Host, µs a step (median): " + " · ".join(f"{part} {us:,.0f}" for part, us in parts.items())


def sizes_line(sizes: Sequence[tuple[int, int]]) -> str:
    """What the steps were made of, so that a profile of something else is noticed."""
    rows, tokens = ([size[i] for size in sizes] for i in (0, 1))
    return f"{len(sizes)} steps of {min(rows)} to {max(rows)} rows, {min(tokens)} to {max(tokens)} tokens"


# -- the load ---------------------------------------------------------------------------------------------------------


class QueueSocket(FrontendSocket):
    """The engine loop's socket with a frontend in the same process. What is sent is encoded, as it would be, and dropped."""

    def __init__(self) -> None:
        self.frontends = {FRONTEND}
        self.queue: list[FrontendMessage] = []
        self.answered: set[str] = set()  # requests that have had a token
        self._encoder = msgspec.msgpack.Encoder()

    def receive(self, timeout_ms: int) -> list[FrontendMessage]:
        if not self.queue:
            time.sleep(timeout_ms / 1e3)
        messages, self.queue = self.queue, []
        return messages

    def send(self, identity: bytes, message: EngineMessage) -> None:
        self._encoder.encode(message)
        if isinstance(message, StepOutputs):
            self.answered.update(output.request_id for output in message.outputs if output.token_ids)
        elif isinstance(message, Refused):
            raise SystemExit(f"profile_steps: {message.error.message}")


class Load:
    """Greedy requests of random tokens that never end by themselves, and the loop of the engine process that serves them."""

    def __init__(self, core: EngineCore, ready: EngineReady, input_len: int) -> None:
        self._socket = QueueSocket()
        self.clock = HostClock(core, self._socket)
        self._loop = EngineLoop(core, self._socket, epoch=1)
        self._random = random.Random(0)
        self._input_len = input_len
        self._vocab_size = ready.vocab_size
        self._max_tokens = min(4096, ready.max_model_len - input_len)
        self._num_sent = 0
        if self._max_tokens < 1:
            raise SystemExit(f"the engine's context of {ready.max_model_len} tokens leaves no room after {input_len}")

    def add(self) -> None:
        prompt = [self._random.randrange(self._vocab_size) for _ in range(self._input_len)]
        sampling = SamplingParams(max_tokens=self._max_tokens, temperature=0.0, ignore_eos=True)
        request_id = f"{FRONTEND.decode()}:{self._num_sent}"
        self._socket.queue.append(AddRequest(request_id=request_id, prompt_token_ids=prompt, sampling=sampling))
        self._num_sent += 1

    def admit(self, num_requests: int) -> None:
        """Until each has its first token, and some steps more."""
        for _ in range(num_requests):
            self.add()
        while len(self._socket.answered) < num_requests:
            self._loop.turn()
        self.run(SETTLE_STEPS)

    def run(self, num_steps: int, arrival_every: int = 0) -> float:
        """Seconds. arrival_every: a prompt arrives before every so many-th step."""
        self.clock.restart()
        started = time.perf_counter()
        for index in range(num_steps):
            if arrival_every and index % arrival_every == 0:
                self.add()
            while len(self.clock.steps) == index:  # a turn may only wait for what arrives
                self._loop.turn()
        return time.perf_counter() - started


def num_arrivals(num_steps: int, every: int) -> int:
    return -(-num_steps // every) if every else 0


def profiled(run: Callable[[], object], trace_file: Path) -> list[Work]:
    """What the device did while `run` ran; the trace is left in the file."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]):  # the first one takes seconds to set up
        pass
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(trace_file))
    return device_work(json.loads(trace_file.read_text(encoding="utf-8", errors="replace")))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"a folder, or a shape: {', '.join(SHAPES)}")
    parser.add_argument("--num-seqs", type=int, default=256, help="requests decoding at once [%(default)s]")
    parser.add_argument("--input-len", type=int, default=512, help="tokens of a prompt [%(default)s]")
    parser.add_argument("--steps", type=int, default=30, help="steps to measure [%(default)s]")
    parser.add_argument(
        "--mixed",
        type=int,
        nargs="?",
        const=5,
        default=0,
        metavar="N",
        help="a prompt arrives every N steps [5]; default: none",
    )
    parser.add_argument("--load-format", default="dummy", choices=("dummy", "auto"), help="[%(default)s]")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="[%(default)s]")
    parser.add_argument("--max-model-len", type=int, default=8192, help="[%(default)s]")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--no-cuda-graphs", action="store_true")
    parser.add_argument("--kernels", type=int, default=20, help="lines of the table [%(default)s]")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures there as JSON")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="keep the profiler's trace there, for chrome://tracing")
    return parser


def engine_config(args: argparse.Namespace, folder: Path) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(
            model=str(folder),
            dtype=args.dtype,
            load_format=args.load_format,
            quantization=args.quantization,
            max_model_len=args.max_model_len,
        ),
        cache=CacheConfig(kv_cache_dtype=args.kv_cache_dtype),
        scheduler=SchedulerConfig(max_num_seqs=args.num_seqs),
        device=args.device,
        attention_backend=args.attention_backend,
        cuda_graphs=not args.no_cuda_graphs,
    )


def build(args: argparse.Namespace, scratch: Path) -> tuple[EngineCore, EngineReady]:
    """The engine as the server has it, with every graph captured."""
    folder = Path(args.model)
    if not folder.is_dir() and args.model in SHAPES:
        folder = write_model(args.model, scratch / args.model)

    def report(phase: str, detail: str, _fraction: float | None) -> None:
        print(f"{phase}: {detail}", file=sys.stderr, flush=True)

    core, ready = build_engine(engine_config(args, folder), report)
    started = time.perf_counter()
    while core.idle():
        pass
    print(f"graphs captured in {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    gc.collect()
    gc.freeze()  # as the engine process does
    return core, ready


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("profile_steps: torch finds no CUDA GPU here (--device cpu tells the host's part)", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.WARNING)
    arrivals = num_arrivals(args.steps, args.mixed)
    num_first = args.num_seqs - 2 * arrivals  # who arrives finds a place
    if num_first < 1:
        raise SystemExit(f"--num-seqs {args.num_seqs} has no room for the {2 * arrivals} prompts that arrive")
    with tempfile.TemporaryDirectory(prefix="octavo-profile-") as scratch:
        core, ready = build(args, Path(scratch))
        load = Load(core, ready, args.input_len)
        load.admit(num_first)
        seconds = load.run(args.steps, args.mixed)
        parts, sizes = host_parts(load.clock.steps), list(load.clock.sizes)
        kind = f", a prompt of {args.input_len} every {args.mixed} steps" if args.mixed else ""
        where = torch.cuda.get_device_name() if args.device == "cuda" else "a CPU"
        print(f"{args.model} on {where}: {num_first} requests decoding after {args.input_len} tokens{kind}, {ready.dtype}")
        print(f"{1e3 * seconds / args.steps:.3f} ms a step: {sizes_line(sizes)}\n{host_line(parts)}", flush=True)
        record: dict[str, Any] = {"arguments": {name: str(value) for name, value in vars(args).items()}, "device": where}
        record |= {"ms_per_step": 1e3 * seconds / args.steps, "host_us_per_step": parts, "rows_and_tokens": sizes}
        if args.device == "cuda":
            works = profiled(lambda: load.run(args.steps, args.mixed), args.trace or Path(scratch) / "trace.json")
            if not works:
                print("profile_steps: the profiler saw nothing on the device", file=sys.stderr)
                return 1
            found = occupancy(works)
            kernels = by_kernel(works, args.steps, found.span)
            print(f"Profiled, {found.span / 1e3 / args.steps:.3f} ms a step: {sizes_line(load.clock.sizes)}")
            print(f"{idle_line(found, args.num_seqs)}\n\n{kernel_table(kernels, args.kernels)}", flush=True)
            record |= {
                "profiled_ms_per_step": found.span / 1e3 / args.steps,
                "idle_share": found.idle_share,
                "idle_share_in_gaps": found.gap_share,
                "longest_gap_us": found.longest_gap,
                "kernels": [
                    {"name": k.name, "calls_per_step": k.calls, "us_per_step": k.us, "share": k.share} for k in kernels
                ],
            }
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
