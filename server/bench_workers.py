"""The load generator's processes: who sends which request when, and their samples brought together."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import queue
import signal
import sys
import time
from collections.abc import Coroutine, Iterator, Sequence
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from typing import Any

from server.bench_http import Connections
from server.bench_load import Load, arrival_times, send_one
from server.bench_report import Sample


class CutShort(KeyboardInterrupt):
    """Ctrl-C during a run. `samples`: of the requests that had ended."""

    def __init__(self, samples: list[Sample]) -> None:
        super().__init__()
        self.samples = samples


class Turn:
    """Who sends what: requests are numbered by one counter for all processes. Shared with the workers at their start."""

    def __init__(self, context: SpawnContext, num_processes: int) -> None:
        self.next_index = context.Value("q", 0)
        self.num_done = context.Value("q", 0)
        self.start_line = context.Barrier(num_processes)
        self.samples = context.Queue()  # of Sample; None where a worker has done its part

    def take(self) -> int:
        with self.next_index.get_lock():
            self.next_index.value += 1
            return int(self.next_index.value) - 1

    def finish(self, sample: Sample) -> None:
        with self.num_done.get_lock():
            self.num_done.value += 1
        self.samples.put(sample)


async def run_closed(load: Load, turn: Turn, num_streams: int) -> None:
    """`num_streams` streams, each sending its next request when the last is answered."""
    connections = Connections(load.base_url, load.api_key)
    start = time.monotonic()

    async def stream() -> None:
        while not is_over(load, time.monotonic() - start) and (index := turn.take()) < load.num_requests:
            turn.finish(await send_one(connections, load, index))

    await asyncio.gather(*(stream() for _ in range(num_streams)))
    connections.close()


async def run_open(load: Load, turn: Turn, worker: int, num_processes: int) -> None:
    """Every `num_processes`-th request at its time of arrival, whatever became of the earlier ones."""
    connections = Connections(load.base_url, load.api_key)
    start = time.monotonic()

    async def arrive(index: int, at: float) -> None:
        await asyncio.sleep(start + at - time.monotonic())
        turn.finish(await send_one(connections, load, index))

    times = arrival_times(load)
    mine = [index for index in range(worker, load.num_requests, num_processes) if not is_over(load, times[index])]
    await asyncio.gather(*(arrive(index, times[index]) for index in mine))
    connections.close()


def is_over(load: Load, elapsed_s: float) -> bool:
    return load.max_time_s is not None and elapsed_s >= load.max_time_s


async def _until_told_to_end(run: Coroutine[Any, Any, None]) -> None:
    """SIGTERM ends the run; the requests that are open then leave no sample."""
    task = asyncio.ensure_future(run)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


def work(load: Load, turn: Turn, worker: int, num_processes: int) -> None:
    """A worker process's main. Ctrl-C reaches the whole group; the parent tells the workers to end and reads on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    turn.start_line.wait()
    if load.rate is not None:
        asyncio.run(_until_told_to_end(run_open(load, turn, worker, num_processes)))
    else:
        share = load.concurrency // num_processes + (worker < load.concurrency % num_processes)
        asyncio.run(_until_told_to_end(run_closed(load, turn, share)))
    turn.samples.put(None)


def gather(load: Load, num_processes: int, show_progress: bool = True) -> list[Sample]:
    """Runs the load in worker processes and returns a sample for every request that was sent. Raises CutShort."""
    context = multiprocessing.get_context("spawn")
    turn = Turn(context, num_processes)
    workers = [context.Process(target=work, args=(load, turn, i, num_processes), daemon=True) for i in range(num_processes)]
    samples: list[Sample] = []
    progress = _Progress(load.num_requests) if show_progress else None
    with _ctrl_c_noted() as interrupt:
        try:
            for process in workers:
                process.start()
            _collect(turn, workers, samples, progress, interrupt)
        except KeyboardInterrupt:
            for process in workers:
                process.kill()
            raise CutShort(samples) from None
    if interrupt.seen:
        raise CutShort(samples)
    return samples


class _Interrupt:
    seen = False


@contextlib.contextmanager
def _ctrl_c_noted() -> Iterator[_Interrupt]:
    """The first Ctrl-C is noted: raised in the middle of reading the queue, it would lose samples. The second is raised."""
    interrupt = _Interrupt()

    def note(_number: int, _frame: object) -> None:
        interrupt.seen = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def _collect(
    turn: Turn, workers: Sequence[BaseProcess], samples: list[Sample], progress: _Progress | None, interrupt: _Interrupt
) -> None:
    """Fills `samples` until every worker has done its part, or has been told to end and did."""
    num_working = len(workers)
    was_told = False
    while num_working:
        if interrupt.seen and not was_told:
            was_told = True
            for process in workers:
                process.terminate()
        have_ended = all(process.exitcode is not None for process in workers)
        try:
            sample = turn.samples.get(timeout=0.1)
        except queue.Empty:
            if was_told and have_ended:  # one that was told before it began says nothing
                break
            if not was_told and any(process.exitcode for process in workers):
                raise SystemExit("a worker process of the load generator died; see above") from None
        else:
            if sample is None:
                num_working -= 1
            else:
                samples.append(sample)
        if progress is not None:
            progress.show(turn.num_done.value)
    for process in workers:
        process.join()
    if progress is not None:
        progress.clear()


class _Progress:
    """A line on stderr: rewritten twice a second on a terminal, a new one every ten seconds elsewhere."""

    def __init__(self, num_requests: int) -> None:
        self._num_requests = num_requests
        self._is_terminal = sys.stderr.isatty()
        self._started = self._shown = time.monotonic()

    def show(self, num_done: int) -> None:
        now = time.monotonic()
        if now - self._shown <= (0.5 if self._is_terminal else 10):
            return
        self._shown = now
        line = f"{num_done}/{self._num_requests} requests after {now - self._started:.0f} s"
        print(f"\r{line} " if self._is_terminal else line, end="" if self._is_terminal else "\n", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._is_terminal:
            print("\r" + " " * 60 + "\r", end="", file=sys.stderr, flush=True)
