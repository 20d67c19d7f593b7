"""StepClock: how long steps take, for the one that is planned next and for the statistics."""

from __future__ import annotations

import time
from collections import deque

from engine.histogram import Histogram
from engine.messages import STEP_TIME_BOUNDS_S, STEP_TOKENS_BOUNDS


class StepClock:
    """When the device will want its next step, so that a long one is followed by a step planned late, which takes in what has
    arrived until then.

    Steps of about the same number of tokens take about the same time: what the last one took is expected of the next, less a
    quarter. Planning and launching takes the host `_launch_s`, a moving average, and gets twice that. Short steps are planned
    at once: a host's clock is no match for them, and there is little to gain.

    step_time, step_tokens: of every step that has ended, its seconds (of a first one with those that the host spent on it: a
    CPU's launch is the step itself) and its tokens.
    """

    MARGIN_S = 0.002
    SHORT_S = 0.012

    def __init__(self) -> None:
        self._durations: dict[int, float] = {}  # by tokens // 64
        self._launch_s = 0.005
        self._running: deque[int] = deque()  # tokens of the steps in flight
        self._started_s = 0.0  # when the oldest of them began
        self._planned_s = 0.0  # the same, or when the host began with it
        self.step_time = Histogram(STEP_TIME_BOUNDS_S)
        self.step_tokens = Histogram(STEP_TOKENS_BOUNDS)

    def launched(self, num_tokens: int, host_s: float) -> None:
        if not self._running:
            self._started_s = time.monotonic()
            self._planned_s = self._started_s - host_s
        self._running.append(num_tokens)
        self._launch_s += 0.1 * (host_s - self._launch_s)

    def withdrawn(self) -> None:
        """The step launched last does not run after all."""
        self._running.pop()

    def finished(self) -> None:
        """The oldest step has ended, and the next one, if there is one, has begun."""
        now = time.monotonic()
        num_tokens = self._running.popleft()
        self._durations[num_tokens // 64] = now - self._started_s
        self.step_time.observe(now - self._planned_s)
        self.step_tokens.observe(num_tokens)
        self._started_s = self._planned_s = now

    def spare_s(self) -> float:
        """Time that may pass before the next step must be planned."""
        expected_s = self._durations.get(self._running[0] // 64, 0.0) if self._running else 0.0
        if expected_s < self.SHORT_S:
            return 0.0
        due_s = self._started_s + 0.75 * expected_s - 2 * self._launch_s - self.MARGIN_S
        return max(0.0, due_s - time.monotonic())
