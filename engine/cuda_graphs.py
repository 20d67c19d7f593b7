"""CUDA graphs of the steps that only decode: capture and replay, by bucket of batch size.

A graph replays the recorded kernels with one call instead of hundreds of launches. It holds addresses, so everything that
varies lives in static device memory (`step_feed.py`), and a step's rows are padded to the next bucket.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable
from typing import Any

import torch

logger = logging.getLogger(__name__)

STEPS_BETWEEN_CAPTURES = 20


class CudaGraphs:
    """Captured functions by key. All share one memory pool: a graph's temporaries are free for the others, since graphs run
    one after another on one stream, and what outlives a replay lies in memory that the caller owns.

    A capture waits: after one, the next comes STEPS_BETWEEN_CAPTURES steps later at the earliest, or in an idle moment.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self._stream = torch.cuda.Stream(device)
        self._steps_since_capture = STEPS_BETWEEN_CAPTURES
        self.failed = False

    def __len__(self) -> int:
        return len(self._graphs)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    def replay(self, key: Hashable) -> bool:
        """Run the captured function again, if there is one."""
        graph = self._graphs.get(key)
        if graph is None:
            return False
        graph.replay()
        return True

    def may_capture(self) -> bool:
        """Called once a step: whether this one may pause for a capture."""
        self._steps_since_capture += 1
        return not self.failed and self._steps_since_capture > STEPS_BETWEEN_CAPTURES

    def capture(self, key: Hashable, run: Callable[[], object]) -> bool:
        """Record what `run` launches. It must have run before (kernels compiled, libraries set up). False where the
        recording fails: then nothing was run, and no further capture is tried."""
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
                    run()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            self.failed = True
            logger.warning("steps run without CUDA graphs: capturing failed (%s)", str(error).splitlines()[0])
            return False
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._graphs[key] = graph
        self._steps_since_capture = 0
        logger.debug("captured a graph for %s in %.0f ms", key, 1e3 * (time.perf_counter() - started))
        return True
