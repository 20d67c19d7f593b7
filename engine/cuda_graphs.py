"""CUDA graphs: capture and replay, by bucket of batch size, while the server serves.

A graph replays the recorded kernels with one call instead of hundreds of launches. It holds addresses, so everything that
varies lives in static device memory (`step_feed.py`), and a step's rows or tokens are padded to the next bucket.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable
from typing import Any

import torch

logger = logging.getLogger(__name__)

STEPS_BETWEEN_CAPTURES = 20
CAPTURE_PAUSE_S = 0.03  # no capture is begun in a step that has paused longer than this


class CudaGraphs:
    """Captured functions by key. All share one memory pool: a graph's temporaries are free for the others, since graphs run
    one after another on one stream, and what outlives a replay lies in memory that the caller owns.

    A capture is a pause for everybody: one step in STEPS_BETWEEN_CAPTURES may make it, and an idle moment. What is captured
    must have run before (kernels compiled, libraries set up), so a function's first call always runs as it is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._ran: set[Hashable] = set()
        self._pool: Any = None
        self._stream = torch.cuda.Stream(device)
        self._steps_since_capture = 0
        self._pause_left_s = 0.0
        self._is_idle = False
        self._failed = False

    def __len__(self) -> int:
        return len(self._graphs)

    def __contains__(self, key: Hashable) -> bool:
        return self._failed or key in self._graphs

    def begin_step(self, idle: bool = False) -> None:
        """Decides whether this step may capture. idle: nobody waits for a result, so it may, and nothing need be run."""
        self._steps_since_capture += 1
        self._is_idle = idle
        is_due = idle or self._steps_since_capture > STEPS_BETWEEN_CAPTURES
        self._pause_left_s = CAPTURE_PAUSE_S if is_due and not self._failed else 0.0

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Run `work`, as its graph if there is one, or can be one now. In an idle moment: only capture, if there is time."""
        graph = self._graphs.get(key)
        if graph is None and key in self._ran and self._pause_left_s > 0:
            graph = self._capture(key, work)
        if self._is_idle:
            return
        if graph is not None:
            graph.replay()
            return
        work()
        self._ran.add(key)

    def _capture(self, key: Hashable, work: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """Record what `work` launches. None where that fails: then nothing has run, and no further capture is tried."""
        started = time.perf_counter()
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(self._stream):
                # torch.cuda.graph() would also collect garbage and empty the allocator's cache: a pause of its own.
                if self._pool is None:
                    self._pool = torch.cuda.graph_pool_handle()
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    work()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            self._failed = True
            self._pause_left_s = 0.0
            logger.warning("steps run without further CUDA graphs: capturing failed (%s)", str(error).splitlines()[0])
            return None
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._graphs[key] = graph
        self._steps_since_capture = 0
        self._pause_left_s -= time.perf_counter() - started
        return graph
