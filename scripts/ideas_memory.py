"""What a call takes, measured: seconds, and the peak of what it allocates beside what was there before it.

On a GPU the peak is that of torch's allocator. On a CPU every allocation of torch is traced by its profiler and summed up in
the order of time; beside that stands by how much the process grew, as Linux tells, which sees what is not torch's as well.
"""

from __future__ import annotations

import gc
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from engine.host_memory import available_bytes

Result = TypeVar("Result")

LONG_S = 1.0
"""A call that takes longer is not repeated: its time is that under the profiler, which is little then."""

_PROC = Path("/proc/self")
_NO_MEMORY = re.compile("can't allocate memory|not enough memory|out of memory", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Usage:
    """seconds: of the fastest call. peak_bytes: allocated by the call at its worst moment, its result included. grown_bytes: by
    how much the process grew meanwhile; None on a GPU, and where the system does not tell."""

    seconds: float
    peak_bytes: int
    grown_bytes: int | None


class DoesNotFit(Exception):
    """There is not so much memory."""


def usage(call: Callable[[], Result], device: str, *, limit_bytes: int | None = None) -> tuple[Usage, Result]:
    """Of a call, and what it returned. It is repeated for the time if it takes less than LONG_S. Raises DoesNotFit where it
    finds no memory: on a CPU no more than limit_bytes, by default half of what is free."""
    with _memory_errors(), _limited(limit_bytes) if device == "cpu" else nullcontext():
        watched = _watch_gpu if device == "cuda" else _watch_cpu
        first, result = watched(call)
        seconds = [first.seconds]
        if first.seconds < LONG_S or device == "cuda":  # there a first call may load a library for a second
            seconds = [_timed(call, device)]
            while len(seconds) < 3 and sum(seconds) < LONG_S:
                seconds.append(_timed(call, device))
        return replace(first, seconds=min(seconds)), result


def _timed(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _watch_gpu(call: Callable[[], Result]) -> tuple[Usage, Result]:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    result = call()
    torch.cuda.synchronize()
    return Usage(time.perf_counter() - started, torch.cuda.max_memory_allocated() - before, None), result


def _watch_cpu(call: Callable[[], Result]) -> tuple[Usage, Result]:
    with _growth() as grown, _silent_stderr():
        started = time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            result = call()
            seconds = time.perf_counter() - started
    assert trace.profiler is not None and trace.profiler.kineto_results is not None
    changes = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: int(event.start_ns())):
        held += change.nbytes()
        peak = max(peak, held)
    return Usage(seconds, peak, grown[0] if grown else None), result


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler's library writes a line there whenever it starts and stops."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _growth() -> Iterator[list[int]]:
    """A list that holds, after the block, by how many bytes the process grew in it at most; empty where Linux does not tell."""
    grown: list[int] = []
    try:
        (_PROC / "clear_refs").write_text("5")  # sets the peak back to what is there now
        before = _status("VmRSS")
    except OSError:
        yield grown
        return
    yield grown
    grown.append(max(0, _status("VmHWM") - before))


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", (_PROC / "status").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


@contextmanager
def _limited(limit_bytes: int | None) -> Iterator[None]:
    """Let the process take limit_bytes more and not all that the machine has: an allocation beyond that fails, instead of
    ending some process of the system's choice. Systems without /proc go without."""
    if not (_PROC / "status").is_file():
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _status("VmSize") + (available_bytes() // 2 if limit_bytes is None else limit_bytes)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except (MemoryError, torch.cuda.OutOfMemoryError) as error:
        raise DoesNotFit(str(error)) from error
    except RuntimeError as error:
        if not _NO_MEMORY.search(str(error)):
            raise
        raise DoesNotFit(str(error)) from error
